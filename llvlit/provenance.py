"""What a result was computed with: versions, device, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "scipy", "scikit-learn")

GIT_SECONDS = 10.0
"""How long git may take to answer."""


def environment(device: torch.device | None = None) -> dict[str, str]:
    """Versions of Python and the packages that matter, the commit, and the device's name."""
    versions = {"llvlit": version("llvlit"), "python": platform.python_version(), "commit": commit()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    if device is not None:
        versions["device"] = device_name(device)
    return versions


def device_name(device: torch.device) -> str:
    """Name of the accelerator, or of the processor's architecture with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


@cache
def commit() -> str:
    """Commit of the checkout that holds the package; asked once a process.

    A ``+`` behind it: files have changed since; a ``?``: git could not tell whether they have.

    Files that came without their history, as into a container, have the commit that the environment variable
    ``LLVLIT_COMMIT`` names, else ``unknown``.
    """
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return os.environ.get("LLVLIT_COMMIT", "unknown")
    revision = _git(folder, "rev-parse", "--short=12", "HEAD")
    if revision is None:
        return "unknown"
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return revision + ("?" if changes is None else "+" if changes else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git answers; nothing if there is no git, no repository, or no answer in time."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
