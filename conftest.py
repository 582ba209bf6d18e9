"""Doctests of the package run as a reader would run them: after the lines of the package's docstring, and no others."""

from __future__ import annotations

import doctest
import gc
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a network

import pytest

gc.disable()  # until all is imported
pytest_plugins = ["pytester"]


def pytest_collection_finish() -> None:
    """What is imported and collected by now lives to the end: no search for garbage goes through it again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def first_lines() -> dict[str, Any]:
    """Names that the lines at the start of the reference define."""
    import llvlit

    names: dict[str, Any] = {}
    for example in doctest.DocTestParser().get_examples(llvlit.__doc__ or ""):
        exec(example.source, names)
    return names


@pytest.fixture(autouse=True)
def _as_a_reader(request: pytest.FixtureRequest) -> None:
    """Give a doctest those names in place of all that its module holds."""
    if isinstance(request.node, pytest.DoctestItem) and request.node.dtest is not None:
        request.node.dtest.globs = {**request.getfixturevalue("first_lines"), "__name__": "__main__"}
