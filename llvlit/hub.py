"""Whether the model and data hub can be reached: asked once, answered at once, no retries."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlparse


def hub_reachable(*, timeout: float = 2.0) -> bool:
    """Whether a connection to the hub (``HF_ENDPOINT``, else huggingface.co) opens within ``timeout`` seconds.

    False under ``HF_HUB_OFFLINE=1`` (or ``TRANSFORMERS_OFFLINE=1``).  Behind a proxy (``HTTPS_PROXY``), the
    proxy is asked instead.
    """
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "0"
    if offline.upper() in {"1", "TRUE", "YES", "ON"}:
        return False
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    address = urlparse(proxy or os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        with socket.create_connection((address.hostname or "", port), timeout=timeout):
            return True
    except (OSError, ValueError):  # no connection; not an address
        return False
