"""Execute chapters with papermill, in kernels of this very interpreter, and remember how each run went."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
import papermill
import torch
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from llvlit.errors import BuildError, InputError
from llvlit.files import write_atomically
from llvlit.provenance import device_name, environment
from llvlit.publishing.pages import Page, cell_label

KERNEL = "llvlit-book"
PUBLIC_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def run_facts(profile: str, device: str) -> dict[str, str]:
    """What the status page tells of a run: profile, device, versions, commit.

    Raises
    ------
    InputError
        If this machine has no such device.
    """
    name = device
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device={device!r} is not known: {error}. Try 'auto', 'cpu' or 'cuda'.") from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={device!r}: there is no CUDA device here. Use 'auto' or 'cpu'.")
    model = device_name(resolved) if resolved.type == "cuda" else f"{platform.machine()} {resolved.type.upper()}"
    asked = {"profile": profile, "device_asked": device, "device_kind": resolved.type, "device": model}
    return {**environment(), **asked}


def executed_path(executed: Path, name: str) -> Path:
    """Where the executed notebook of a chapter is kept."""
    return executed / f"{name}.ipynb"


def _digest(page: Page) -> str:
    return hashlib.sha256(page.text.encode()).hexdigest()[:16]


def is_current(page: Page, executed: Path, run: Mapping[str, str]) -> bool:
    """Whether a chapter has been executed since its text and the settings last changed."""
    try:
        facts = nbformat.read(executed_path(executed, page.name), as_version=4).metadata["llvlit"]
        asked = all(facts[key] == run[key] for key in ("profile", "device_asked"))
        return bool(asked and facts["source"] == _digest(page))
    except (OSError, KeyError, ValueError):
        return False


def execute_chapters(
    pages: Sequence[Page],
    notebooks: dict[str, NotebookNode],
    executed: Path,
    run: Mapping[str, str],
    *,
    jobs: int,
    progress: bool,
) -> None:
    """Execute chapters, ``jobs`` at once; all of them, also after a failure, so that one build tells all.

    Raises
    ------
    BuildError
        Naming every chapter and cell that raised, with the end of its traceback.
    """
    failures = []
    threads = max(1, (os.cpu_count() or 1) // jobs)
    facts = {**run, "threads": threads}
    silent = not progress or not sys.stderr.isatty()
    with (
        _kernel(threads, offline=run["profile"] != "paper"),
        chdir(executed.parents[1]),
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(pages), desc="Chapters", unit="chapter", disable=silent) as bar,
    ):
        futures = [pool.submit(_execute_chapter, page, notebooks[page.name], executed, facts, silent) for page in pages]
        for page, future in zip(pages, futures, strict=True):
            try:
                seconds = future.result()
            except BuildError as error:
                failures.append(str(error))
            else:
                if progress:
                    tqdm.write(f"{page.source}: executed in {seconds:.1f} s")
            bar.update()
    if failures:
        raise BuildError("\n\n".join(failures))


@contextmanager
def _kernel(threads: int, *, offline: bool) -> Iterator[None]:
    """A kernel of this interpreter, found before any installed one, with its share of the cores."""
    variables = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    variables["TOKENIZERS_PARALLELISM"] = "false"
    if offline:
        variables["HF_HUB_OFFLINE"] = "1"
    # Log level 40: errors only; the kernel's notes on its transport are not the reader's concern.
    arguments = [sys.executable, "-m", "ipykernel_launcher", "--log-level=40", "-f", "{connection_file}"]
    spec = {"argv": arguments, "display_name": "llvlit", "language": "python", "env": variables}
    before = os.environ.get("JUPYTER_PATH")
    with TemporaryDirectory() as folder:
        place = Path(folder) / "kernels" / KERNEL
        place.mkdir(parents=True)
        (place / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, (folder, before)))
        try:
            yield
        finally:
            if before is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = before


def _execute_chapter(page: Page, notebook: NotebookNode, executed: Path, run: Mapping[str, Any], quiet: bool) -> float:
    """Execute one chapter and keep its notebook; return the seconds it took."""
    output = executed_path(executed, page.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    parameters = {"profile": run["profile"], "device": run["device_asked"]}
    try:
        done = papermill.execute_notebook(
            notebook,
            str(output),
            parameters=parameters,
            kernel_name=KERNEL,
            progress_bar=False if quiet else {"desc": page.name, "leave": False},
        )
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
    write_notebook(done, output)
    return float(facts["duration"])


def write_notebook(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook, whole or not at all."""
    text = nbformat.writes(notebook)

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)
