"""How the last daily builds went, with the locked and with the newest versions, as the status page tells it.

The workflow ``daily`` leaves ``runs.json`` above the versions of a published site: a list with an object of
:data:`FIELDS` for each build.  ``llvlit publish`` writes it into the page, and the page's script reads it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from llvlit.files import foreign, read_text

RUNS = "runs.json"
FIELDS = {
    "versions": "Versions",
    "outcome": "Outcome",
    "date": "Date (UTC)",
    "commit": "Commit",
    "python": "Python",
    "torch": "torch",
    "transformers": "transformers",
}
_BODY = re.compile(r'(<table class="daily-runs[^>]*>.*?<tbody>).*?(</tbody>)', re.DOTALL)


def runs_table(runs: Iterable[Mapping[str, str]] = ()) -> str:
    """HTML of the table of daily builds; without any, a row that says where they are.

    Examples
    --------
    >>> from llvlit.publishing.daily import runs_table
    >>> "<th>Outcome</th>" in runs_table()
    True
    """
    head = "".join(f"<th>{title}</th>" for title in FIELDS.values())
    table = f'<table class="daily-runs table"><thead><tr>{head}</tr></thead><tbody>{_rows(runs)}</tbody></table>'
    return f'<div class="pst-scrollable-table-container">{table}</div>'


def _rows(runs: Iterable[Mapping[str, str]]) -> str:
    rows = ["".join(f"<td>{escape(run[field])}</td>" for field in FIELDS) for run in runs]
    rows = rows or [f'<td colspan="{len(FIELDS)}">This copy of the book knows of none; the published one does.</td>']
    return "".join(f"<tr>{row}</tr>" for row in rows)


def read_runs(path: Path) -> list[dict[str, str]]:
    """The daily builds in a file ``runs.json``.

    Raises
    ------
    FileError
        If it cannot be read, or tells not all of a run.
    """
    text = read_text(path, "the daily builds")
    with foreign(path, "the list of daily builds"):
        return [{field: str(run[field]) for field in FIELDS} for run in json.loads(text)]


def with_runs(html: str, runs: Iterable[Mapping[str, str]]) -> str:
    """HTML of a page, its table of daily builds filled with these; a page without that table as it is."""
    return _BODY.sub(lambda found: f"{found[1]}{_rows(runs)}{found[2]}", html)
