"""Execute chapters with papermill, in kernels of this very interpreter, and remember how each run went."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from llvlit.errors import BuildError, LlvlitError
from llvlit.files import foreign, read_text, write_text
from llvlit.publishing.pages import Page, cell_label, escaped, markdown_table

PUBLIC_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
VERSIONS = ("python", "torch", "transformers", "numpy", "scipy", "llvlit")
FACTS = {
    **dict.fromkeys(("profile", "device_asked", "device_kind", "device", "commit", "date", "source", *VERSIONS), str),
    "threads": int,
    "seconds": float,
}
"""What an executed chapter says of its run, under ``"llvlit"`` in its metadata."""


CURRENT = ("source", "profile", "models", "device_asked", "llvlit", "commit")
"""What must be as it was, so that an executed chapter need not be executed again."""


def run_facts(profile: str, models: Iterable[str], device: str) -> dict[str, str]:
    """What is noted of a run: profile, its models, device, versions, commit.

    Raises
    ------
    InputError
        If this machine has no such device.
    FileError
        If a file of a model cannot be read.
    ModelError
        If a model's folder has no configuration or no safetensors.
    """
    from llvlit.engine.models import torch_device  # here: Sphinx reads what runs left without loading torch
    from llvlit.provenance import device_name, environment

    kind = torch_device(device).type
    name = device_name(torch_device(device)) if kind == "cuda" else f"{platform.machine()} {kind.upper()}"
    identity = _identity(models)
    return {
        **environment(),
        "profile": profile,
        "models": identity,
        "device_asked": device,
        "device_kind": kind,
        "device": name,
    }


def _identity(models: Iterable[str]) -> str:
    """Digest of all files of the models that lie on this machine, and of the names of those on the hub."""
    from llvlit.engine.models import local_place

    digest = hashlib.sha256()
    for model in models:
        place = local_place(model)
        if place is None:
            digest.update(f"{model}\n".encode())
            continue
        with foreign(place, "a model"):
            for path in sorted(path for path in (place.iterdir() if place.is_dir() else [place]) if path.is_file()):
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()[:16]


def executed_path(executed: Path, name: str) -> Path:
    """Where the executed notebook of a chapter is kept."""
    return executed / f"{name}.ipynb"


def write_notebook(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook, whole or not at all."""
    write_text(path, nbformat.writes(notebook))


def read_executed(path: Path) -> NotebookNode:
    """A notebook that was executed, with whole facts about its run.

    Raises
    ------
    FileError
        If it is absent, no notebook, or lacks facts.
    """
    text = read_text(path, "an executed notebook")
    with foreign(path, "an executed notebook", remedy="Execute its chapter again."):
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
        facts = notebook.metadata["llvlit"]
        lacking = [name for name, kind in FACTS.items() if not isinstance(facts.get(name), kind)]
        if lacking:
            raise ValueError(f"it does not tell {', '.join(lacking)}")
    return notebook


def read_current(page: Page, path: Path, run: Mapping[str, str] | None = None) -> NotebookNode | None:
    """The executed notebook of a chapter, unless its text has changed since; or, of a run, anything in CURRENT."""
    try:
        notebook = read_executed(path)
    except LlvlitError:
        return None
    asked = {**(run or {}), "source": _digest(page)}
    facts = notebook.metadata["llvlit"]
    return notebook if all(facts.get(key) == asked[key] for key in CURRENT if key in asked) else None


def _digest(page: Page) -> str:
    return hashlib.sha256(page.text.encode()).hexdigest()[:16]


def execute_chapters(
    notebooks: Mapping[Page, NotebookNode],
    chosen: Collection[Page],
    executed: Path,
    run: Mapping[str, str],
    *,
    root: Path,
    scratch: Path,
    jobs: int,
    progress: bool,
) -> dict[Page, NotebookNode]:
    """Chapters executed in ``root``, ``jobs`` at once: those chosen, and those of which ``executed`` has none current.

    All of them are tried, also after a failure, so that one build tells all.

    Raises
    ------
    BuildError
        Naming every chapter and cell that raised, with the end of its traceback.
    """
    failures, results = [], {}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    silent = not progress or not sys.stderr.isatty()
    options = {
        "kernel_manager_class": _kernel_manager(scratch, threads, offline=run["profile"] != "paper"),
        "resources": {"metadata": {"path": str(root)}},
    }

    def execute(page: Page) -> NotebookNode:
        path = executed_path(executed, page.name)
        current = None if page in chosen else read_current(page, path, run)
        if current is not None:
            return current
        bar = {"progress_bar": False if silent else {"desc": page.name, "leave": False}}
        notebook = _execute(page, notebooks[page], {**run, "threads": threads}, {**options, **bar})
        write_notebook(notebook, path)
        if progress:
            tqdm.write(f"{page.source}: executed in {notebook.metadata['llvlit']['seconds']:.1f} s")
        return notebook

    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(notebooks), desc="Chapters", unit="chapter", disable=silent) as chapters,
    ):
        for page, future in [(page, pool.submit(execute, page)) for page in notebooks]:
            try:
                results[page] = future.result()
            except BuildError as error:
                failures.append(str(error))
            chapters.update()
    if failures:
        raise BuildError("\n\n".join(failures))
    return results


def _kernel_manager(scratch: Path, threads: int, *, offline: bool) -> type[AsyncKernelManager]:
    """Starts kernels of this interpreter, whichever are installed, each with its share of the cores."""
    variables = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TMPDIR": str(scratch)}
    variables["TOKENIZERS_PARALLELISM"] = "false"
    if offline:
        variables["HF_HUB_OFFLINE"] = "1"
    # Log level 50: what a kernel notes on its transport, or on being stopped at the end, is not the reader's concern.
    arguments = [sys.executable, "-m", "ipykernel_launcher", "--log-level=50", "-f", "{connection_file}"]

    class Manager(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=arguments, env=variables, display_name="llvlit", language="python")

    return Manager


def _execute(
    page: Page, notebook: NotebookNode, run: Mapping[str, str | int], options: Mapping[str, Any]
) -> NotebookNode:
    """One chapter, executed, with the facts of its run."""
    parameters = {"profile": run["profile"], "device": run["device_asked"]}
    try:
        done = papermill.execute_notebook(notebook, None, parameters, kernel_name=PUBLIC_KERNEL["name"], **options)
    except PapermillExecutionError as error:
        number = max(1, (error.exec_count or 1) - 1)  # the injected parameter cell stands in no source
        place = f"code cell {number} ({error.source.strip().splitlines()[0]})"
        tail = "\n".join(ESCAPES.sub("", "\n".join(error.traceback)).splitlines()[-20:])
        raise BuildError(f"{page.source}, {place} raised {error.ename}: {error.evalue}\n{tail}") from None
    except DeadKernelError:
        raise BuildError(f"{page.source}: its kernel died; out of memory? Try `--jobs 1`.") from None
    except Exception as error:
        raise BuildError(f"{page.source} could not be executed: {type(error).__name__}: {error}") from error
    for index, cell in enumerate(done.cells):
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            raise BuildError(f"{page.source}, {cell_label(done, index)} was not executed.")
        if any(part.output_type == "error" for part in cell.get("outputs", ())):
            raise BuildError(f"{page.source}, {cell_label(done, index)} ended the chapter early.")
    facts = done.metadata["papermill"]
    facts["input_path"], facts["output_path"] = page.source, f"{page.name}.ipynb"
    done.metadata["kernelspec"] = dict(PUBLIC_KERNEL)
    done.metadata["llvlit"] = {
        **run,
        "source": _digest(page),
        "seconds": facts["duration"],
        "date": facts["end_time"][:16].replace("T", " "),
    }
    return done


def status_table(runs: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Markdown of how chapters were executed, from their names and the facts of their runs: a table, then versions."""
    rows = []
    versions: dict[str, list[str]] = {}
    for name, run in runs:
        threads = f", {run['threads']} thread{'s' * (run['threads'] > 1)}" if run["device_kind"] == "cpu" else ""
        cells = (run["profile"], run["device"] + threads, run["commit"], run["date"])
        rows.append((f"{{doc}}`/{name}`", f"{run['seconds']:.1f}", *map(escaped, cells)))
        used = ", ".join(f"{package} {run[package]}" for package in VERSIONS)
        versions.setdefault(used, []).append(f"{{doc}}`/{name}`")
    head = "| Chapter | Seconds | Profile | Device | Commit | Date (UTC) |\n|---|---:|---|---|---|---|"
    lines = [markdown_table(head, rows)]
    for used, names in versions.items():
        lines += ["", f"Versions{'' if len(versions) == 1 else ' of ' + ', '.join(names)}: {escaped(used)}."]
    return "\n".join(lines)
