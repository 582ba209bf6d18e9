"""The model and data hub: whether it can be reached, and why one of its clients failed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten
from urllib.parse import urlparse
from urllib.request import proxy_bypass

os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
"""Where a model has no safetensors, transformers would ask a service to convert its pickle, and load a proposal
that nobody has reviewed; the model is refused instead."""


def hub_reachable(*, timeout: float = 2.0) -> bool:
    """Whether a connection to the hub (``HF_ENDPOINT``, else huggingface.co) opens within ``timeout`` seconds.

    False under ``HF_HUB_OFFLINE=1`` (or ``TRANSFORMERS_OFFLINE=1``).  Behind a proxy (``HTTPS_PROXY``, unless
    ``NO_PROXY`` exempts the hub), the proxy is asked instead.
    """
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "0"
    if offline.upper() in {"1", "TRUE", "YES", "ON"}:
        return False
    address = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    if proxy and not proxy_bypass(address.netloc):
        address = urlparse(proxy)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        with socket.create_connection((address.hostname or "", port), timeout=timeout):
            return True
    except (OSError, ValueError):  # no connection; not an address
        return False


def failure(error: BaseException) -> str:
    """Cause of an error of a hub client, in one line: what is missing, or that the transfer broke off.

    The clients wrap the cause several times over; the links of ``__cause__`` and ``__context__`` are searched.
    """
    from huggingface_hub import errors  # here, since it is slow to import

    missing = {
        errors.RepositoryNotFoundError: "Repository",
        errors.RevisionNotFoundError: "Revision",
        errors.RemoteEntryNotFoundError: "Entry",
    }
    link: BaseException | None = error
    while link is not None:
        for kind, what in missing.items():
            if isinstance(link, kind):
                return f"{what} Not Found for url: {link.response.url}"
        if isinstance(link, errors.HTTPError):
            return f"the transfer broke off: {link}"
        link = link.__cause__ or link.__context__
    return shorten(" ".join(str(error).split()), 300) or type(error).__name__


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings and no bars of transformers; what matters is raised."""
    from transformers.utils import logging as transformers_logging  # here, since it is slow to import

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
