"""A chapter's executed notebook as a reader runs it elsewhere: it fetches its own version, and runs on any machine.

The notebook that papermill wrote holds a cell with the settings of that run, such as a GPU that a reader may not
have.  Here the chapter's own settings, which run anywhere, come back, with a note on what was computed.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat import NotebookNode

from llvlit.files import foreign
from llvlit.publishing.pages import read_yaml

SOURCE_FOLDER = "llvlit-source"
_INSTALL = """\
# Does nothing where llvlit is installed. Elsewhere, as on Colab, it installs the version of this notebook.
import importlib.util
import pathlib
import subprocess

if importlib.util.find_spec("llvlit") is None:
    pathlib.Path("{folder}").mkdir(exist_ok=True)
    for command in (
        ["init", "--quiet"],
        ["fetch", "--quiet", "--depth", "1", "--", {repository!r}, {revision!r}],
        ["checkout", "--quiet", "FETCH_HEAD"],
    ):
        subprocess.run(["git", *command], cwd="{folder}", check=True)
    %pip install --quiet ./{folder}
if pathlib.Path("{folder}").is_dir():
    %cd -q {folder}
"""


def repository_url(root: Path) -> str:
    """Address of the repository that the book's configuration names, or ours."""
    path = root / "_config.yml"
    config = read_yaml(path, "the book's settings")
    with foreign(path, "the book's settings"):
        return str(config.get("repository", {}).get("url", "https://github.com/llvlit/llvlit"))


def install_cell(repository: str, revision: str = "HEAD") -> NotebookNode:
    """Code cell that fetches a revision of the repository and installs it, if llvlit is missing.

    The folder that it fetches also holds the tables in ``results/`` that some chapters read.  Address and revision
    stand in it as Python strings and reach git without a shell, whatever they hold.

    Parameters
    ----------
    repository : str
        Address that ``git fetch`` takes.
    revision : str
        Commit (all 40 digits), tag or branch.

    Returns
    -------
    NotebookNode
    """
    source = _INSTALL.format(folder=SOURCE_FOLDER, repository=repository, revision=revision)
    return nbformat.v4.new_code_cell(source, id="install")


def runnable(notebook: NotebookNode, install: NotebookNode) -> NotebookNode:
    """Copy of an executed notebook whose first cell is ``install`` and whose settings run on any machine.

    Parameters
    ----------
    notebook : NotebookNode
        Executed chapter, with or without an older cell ``install`` of the same id.
    install : NotebookNode
        From :func:`install_cell`.

    Returns
    -------
    NotebookNode
    """
    copy = nbformat.from_dict(notebook)
    injected = [cell for cell in copy.cells if "injected-parameters" in cell.metadata.get("tags", ())]
    copy.cells = [install, *(cell for cell in copy.cells if cell not in injected and cell.id != install.id)]
    lines = [line for cell in injected for line in cell.source.splitlines() if "=" in line]
    if lines:
        note = "# The outputs below were computed with: " + "; ".join(lines) + "\n"
        for cell in copy.cells:
            if "parameters" in cell.metadata.get("tags", ()):
                cell.source = note + cell.source
    return copy
