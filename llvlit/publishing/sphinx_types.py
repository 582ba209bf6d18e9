"""Sphinx extension: a dataclass says what its attributes are, so the types of its constructor are not listed again."""

from __future__ import annotations

from typing import Any


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx; later than autodoc has noted the types, hence the priority."""
    app.connect("autodoc-process-signature", _forget_types, priority=900)
    return {"parallel_read_safe": True}


def _forget_types(app: Any, what: str, name: str, *_: object) -> None:
    if what in ("class", "exception"):
        app.env.temp_data.get("annotations", {}).pop(name, None)
