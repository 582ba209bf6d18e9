"""What ``llvlit architectures`` found of every decoder that transformers knows, as tables of the book."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from llvlit import checks
from llvlit.errors import FileError
from llvlit.files import read_text
from llvlit.publishing.pages import escaped, markdown_table

Variants = dict[str, list[dict[str, str]]]


def variants_of(path: Path) -> Variants:
    """Rows of a table of architectures by model type, the plain variant first."""
    types: Variants = {}
    rows = csv.DictReader(read_text(path, "a table of architectures").splitlines())
    if not {"type", "status"} <= {*(rows.fieldnames or ())}:
        raise FileError(f"{path} is no table of architectures, as llvlit architectures --save writes it.")
    for row in rows:
        types.setdefault(row["type"], []).append(row)
    return types


def verdicts(path: Path, known: Sequence[str]) -> list[tuple[str, int, str]]:
    r"""Each verdict on plain models, how many model types have it, and which of those that readers know.

    Raises
    ------
    FileError
        If the file cannot be read or is no such table.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from llvlit.publishing.architectures import verdicts
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "architectures.csv"
    ...     _ = path.write_text("type,status\nllama,exact\ngpt2,exact\ngemma3n,refused\n")
    ...     verdicts(path, ["llama", "gemma3n"])
    [('exact', 2, 'llama'), ('refused', 1, 'gemma3n')]
    """
    known = [checks.text("known", name) for name in checks.sequence("known", known, "names of model types")]
    found: dict[str, list[str]] = {}
    for name, variants in variants_of(checks.path("path", path)).items():
        found.setdefault(variants[0]["status"], []).append(name)
    rows = [(status, len(names), ", ".join(name for name in known if name in names)) for status, names in found.items()]
    return sorted(rows, key=lambda row: -row[1])


def architecture_table(path: Path) -> str:
    """Markdown of what ``llvlit architectures`` found: a row for each model type, its worst variant's numbers."""
    from llvlit.study.tables import DASH  # here: it loads torch, which Sphinx starts without

    rows = []
    for name, variants in variants_of(path).items():
        exact = [row for row in variants if row["status"] == "exact"]
        worst = [max((row[key] for row in exact), key=float, default=DASH) for key in ("value", "derivative")]
        plain = variants[0]
        status = plain["status"] + ("; exact as a decoder" if exact and plain["status"] == "refused" else "")
        rows.append((f"`{name}`", status, *worst, plain["context"] or DASH, escaped(plain["reason"]) or DASH))
    head = "| Model type | Status | Value | Derivative | Candidates run with | Reason |\n|---|---|---:|---:|---|---|"
    return markdown_table(head, rows)
