"""Whole files of every kind that is read, and a reader for each: what the changed ones are compared with."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import torch
from course_book import course_book
from pyarrow import Table, parquet

import llvlit
from fuzzing.tampering import as_json, cut, drop, flip, header, insert, over, places, put
from fuzzing.things import (
    GAINS_FILE,
    LLV_FILE,
    MODEL_FOLDER,
    PLAN_FOLDER,
    WORK,
    command,
    contents,
    folder_of,
    model_folder,
)
from llvlit.engine.depth import depth_system
from llvlit.files import read_json
from llvlit.method.concepts import random_directions
from llvlit.study.cells import Results, claim_folder, load_results, run_cell
from llvlit.study.comparison import agreements
from llvlit.study.grid import load_grid
from llvlit.study.runner import write_result
from llvlit.study.tables import committed, read_table

__all__ = ["as_json", "cut", "drop", "flip", "header", "insert", "over", "places", "put"]

FILMS = llvlit.Prompts(("the film was good", "a dull film", "I liked it a lot", "I did not"), (1, 0, 1, 0))


def temporary(data: bytes, name: str) -> Path:
    """A file of its own with these bytes."""
    return folder_of({name: data}) / name


# Results


GAINS, LLV = Path(GAINS_FILE).read_bytes(), Path(LLV_FILE).read_bytes()
PLAN = (Path(PLAN_FOLDER) / "plan.safetensors").read_bytes()


def read_gains(data: bytes) -> llvlit.Gains:
    return llvlit.Gains.load(temporary(data, "gains.safetensors"))


def read_plan(data: bytes) -> Any:
    """A recommendation, its manifest as if it had been written with it."""
    folder = folder_of({path.name: path.read_bytes() for path in Path(PLAN_FOLDER).iterdir() if path.is_file()})
    (folder / "plan.safetensors").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_bytes(as_json({**manifest, "sha256": hashlib.sha256(data).hexdigest()}))
    return llvlit.load_recommendation(folder)


def read_llv(data: bytes) -> Any:
    """A surrogate with what it gives."""
    surrogate = llvlit.LLV.load(temporary(data, "llv.safetensors"))
    return surrogate, surrogate.gains(), surrogate.per_prompt_gains()


# Grids and studies


def as_toml(document: dict[str, Any], table: str = "") -> bytes:
    """A small writer: values as JSON has them, tables below."""
    inner = {key: value for key, value in document.items() if isinstance(value, dict)}
    lines = [f"[{table}]"] if table else []
    for key, value in document.items():
        if key not in inner:
            name = key if key.replace("_", "").isalnum() else json.dumps(key)
            text = json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")
            lines.append(f"{name} = {text}")
    parts = [as_toml(value, f"{table}.{json.dumps(key)}" if table else key) for key, value in inner.items()]
    return "\n".join([*lines, ""]).encode("utf-8", "surrogatepass") + b"".join(parts)


GRID = {
    "description": "A tiny grid.",
    "models": [MODEL_FOLDER],
    "tasks": ["film-sentiment", "tense"],
    "seeds": [0],
    "jacobians": ["jvp"],
    "final_norms": [False],
    "settings": {
        "concept": 3,
        "operating": 2,
        "evaluation": 2,
        "max_tokens": 64,
        "directions": ["mean_difference"],
        "bases": ["reachability"],
        "orders": [2, 4],
        "amplitudes": [0.1],
        "operating_counts": [],
        "energy_prompts": 1,
        "target": 0.1,
    },
    "task": {"tense": {"suffix": " Well,", "concept": 4}},
}
GRID_TOML = as_toml(GRID)
GRID_FILE = str(WORK / "fixed-tiny.toml")
Path(GRID_FILE).write_bytes(GRID_TOML)


def read_grid(data: bytes) -> Any:
    grid = load_grid(temporary(data, "tiny.toml"))
    return grid, grid.cells(), [cell.key for cell in grid.cells()], grid.fingerprint


def dry_run(data: bytes) -> str:
    return command(["study", str(temporary(data, "tiny.toml")), "--dry-run", "--device", "cpu"])


def _study() -> Path:
    folder, grid = WORK / "fixed-study", load_grid(GRID_FILE)
    claim_folder(grid, folder, write=True)
    (folder / "cells").mkdir()
    for cell in grid.cells():
        write_result(folder, cell.key, json.loads(json.dumps(run_cell(cell, "cpu"))))
    command(["study", GRID_FILE, "--report", "--out", str(folder)])
    return folder


STUDY = contents(_study())
CELL_NAME = next(name for name in STUDY if name.startswith("cells/"))
CELL = json.loads(STUDY[CELL_NAME])
TABLES = {
    name.rpartition("/")[2]: data for name, data in STUDY.items() if name.startswith("report/") and "png" not in name
}
AGREEMENT, PROVENANCE = TABLES["agreement.csv"], json.loads(TABLES["provenance.json"])
GRID_JSON = json.loads(STUDY["grid.json"])


def read_cell(data: bytes) -> Results:
    return load_results(folder_of({"cells/cell.json": data}))


def read_csv(data: bytes) -> pd.DataFrame:
    return read_table(temporary(data, "agreement.csv").parent, "agreement")


def table_kinds(frame: pd.DataFrame) -> str:
    """Whether a table has numbers where numbers belong."""
    right = read_csv(AGREEMENT)
    numbers = [name for name in right if right[name].dtype.kind in "if" and name in frame]
    wrong = [name for name in numbers if frame[name].dtype.kind not in "if" or np.isinf(frame[name]).any()]
    return f"no numbers in {', '.join(wrong)}" if wrong else ""


def report(changed: dict[str, bytes | None]) -> str:
    """The report of a study folder with some files changed."""
    files = {name: data for name, data in STUDY.items() if not name.startswith("report/")} | changed
    folder = folder_of({name: data for name, data in files.items() if data != b"absent"})
    return command(["study", GRID_FILE, "--report", "--out", str(folder), "--json"])


def read_committed(changed: dict[str, bytes | None]) -> Any:
    """The tables of a committed study with some files changed."""
    files = {f"results/tiny/{name}": data for name, data in (TABLES | changed).items() if data != b"absent"}
    start = folder_of(files)
    folder = committed("tiny", start=start)
    energy = read_table(folder, "energy") if (folder / "energy.csv").exists() else []
    return len(agreements("tiny", start=start)), len(energy), read_json(folder / "provenance.json", "provenance")


# Models


ARCHITECTURES = {
    "gpt2": {},
    "llama": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 4},
    "gemma3_text": {
        "num_key_value_heads": 1,
        "head_dim": 4,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}
FOLDERS = {name: model_folder(name, **options) for name, options in ARCHITECTURES.items()}
CONFIGS = {name: json.loads((folder / "config.json").read_text()) for name, folder in FOLDERS.items()}
TOKENIZER = json.loads((FOLDERS["gpt2"] / "tokenizer.json").read_text())
TOKENIZER_CONFIG = json.loads((FOLDERS["gpt2"] / "tokenizer_config.json").read_text())
WEIGHTS = (FOLDERS["gpt2"] / "model.safetensors").read_bytes()
GENERATION = json.loads((FOLDERS["gpt2"] / "generation_config.json").read_text())


def used(name: str, **changed: bytes | None) -> Any:
    """A model with some files changed (``__`` for a dot), loaded and used: states and both kinds of gains."""
    folder = Path(tempfile.mkdtemp(dir=WORK))
    for path in FOLDERS[name].iterdir():
        if changed.get(path.name.replace(".", "__"), b"") is not None:
            shutil.copy(path, folder)
    for file, data in changed.items():
        if data is not None:
            (folder / file.replace("__", ".")).write_bytes(data)
    model = llvlit.load_model(folder, device="cpu")
    vectors = random_directions(model.n_layers + 1, model.hidden_size, seed=0)
    system = depth_system(model, FILMS)
    measured = llvlit.measured_gains(model, FILMS, vectors, amplitude=0.01)
    linear = llvlit.adjoint_gains(model, FILMS, vectors)
    return system.states, measured, linear


def linear_enough(result: Any) -> str:
    """Whether measured and first-order gains of a small push agree, as they must in every architecture."""
    _, measured, linear = result
    error = np.linalg.norm(measured.mean - linear.mean) / max(np.linalg.norm(linear.mean), 1e-3)
    return "" if error < 0.3 else f"measured and first-order gains differ: {error:.2g} of their size"


def _sharded() -> dict[str, Any]:
    names = [name for name in json.loads(WEIGHTS[8 : 8 + int.from_bytes(WEIGHTS[:8], "little")]) if name[0] != "_"]
    return {"metadata": {"total_size": len(WEIGHTS)}, "weight_map": dict.fromkeys(names, "shard.safetensors")}


INDEX = _sharded()


def sharded(index: Any, shard: str | None = None) -> Any:
    """A model in shards with this index, beside a pickle of its weights, a folder, and a link if one is named."""
    parent = folder_of({"outside.safetensors": WEIGHTS, "model/shard.safetensors": WEIGHTS, "model/folder": None})
    folder = parent / "model"
    for path in FOLDERS["gpt2"].iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, folder)
    stream = io.BytesIO()
    torch.save(llvlit.load_model(MODEL_FOLDER, device="cpu").module.state_dict(), stream)
    for name in ("pickle.bin", "pickle.pt", "pickle.safetensors"):
        (folder / name).write_bytes(stream.getvalue())
    links = {"link.safetensors": str(parent / "outside.safetensors"), "zero.safetensors": "/dev/zero"}
    if shard in links:
        (folder / shard).symlink_to(links[shard])
    if shard is not None:
        index = {**index, "weight_map": dict.fromkeys(index["weight_map"], shard)}
    (folder / "model.safetensors.index.json").write_bytes(index if isinstance(index, bytes) else as_json(index))
    model = llvlit.load_model(folder, device="cpu")
    return model.fingerprint


# Tasks


def table_of(**columns: Any) -> bytes:
    """A parquet file with these columns."""
    stream = io.BytesIO()
    parquet.write_table(Table.from_pydict(columns), stream)
    return stream.getvalue()


TASK = table_of(text=["a good film", "a dull film"] * 4, label=[1, 0] * 4)


def read_task(data: bytes) -> llvlit.Task:
    return llvlit.load_task(temporary(data, "task.parquet"))


# Corpora


def zipped(text: str | bytes) -> bytes:
    return gzip.compress(text if isinstance(text, bytes) else text.encode(), mtime=0)


CORPUS = {
    **{f"train/pos/{n}_9.txt": b"A good film. I liked it a lot." * 3 for n in range(8)},
    **{f"train/neg/{n}_2.txt": b"A dull film. I did not like it." * 3 for n in range(8)},
    **{f"train/unsup/{n}_0.txt": b"A film that I saw last week." * 3 for n in range(8)},
}
LINES = {
    "rated.tsv.gz": zipped("9\tA good film, and a long one.\n2\tA dull film, and a long one.\n" * 16),
    "plain.txt.gz": zipped("A film that I saw last week.\n" * 8),
}


def trained(files: dict[str, bytes | str | None]) -> str:
    """One step of training on a corpus."""
    options = ["--steps", "1", "--sizes", "1x32", "--device", "cpu"]
    return command(["train", "--corpus", str(folder_of(files)), "--out", "run", *options])


# Books


BOOK = {name: text.encode() for name, text in course_book().items()}
CHAPTER = BOOK["book/sums.md"]


def exercises(changed: dict[str, bytes | None]) -> str:
    """The class notebooks of a book with some files changed."""
    return command(["exercises", "--root", str(folder_of(_without(BOOK | changed))), "--out", "course"])


def _without(files: dict[str, Any]) -> dict[str, Any]:
    return {name: data for name, data in files.items() if data != b"absent"}


def _notebook() -> bytes:
    run = {
        "profile": "embedded",
        **dict.fromkeys(("device", "device_asked", "device_kind"), "cpu"),
        **dict.fromkeys(("commit", "source"), "0" * 40),
        **dict.fromkeys(("date", "python", "torch", "transformers", "numpy", "scipy", "llvlit"), "1"),
        "threads": 1,
        "seconds": 1.0,
    }
    cells = [
        nbformat.v4.new_code_cell('profile = "embedded"\ndevice = "cpu"', id="a", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_markdown_cell("# What do sums do?", id="b"),
    ]
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata={"llvlit": run})).encode()


NOTEBOOK = json.loads(_notebook())
_PAGE = '<html><a href="https://colab.research.google.com/github/llvlit/llvlit/blob/gh-pages/latest/notebooks/book/sums.ipynb">'
BUILT = {
    **BOOK,
    "_toc.yml": b"root: book/words\nchapters:\n- file: book/sums\n",
    "_build/html/index.html": b"<html></html>",
    "_build/html/book/sums.html": _PAGE.encode(),
    "_build/html/_static/versions.js": b'const version = "";\n',
    "_build/html/_sources/book/sums.ipynb": _notebook(),
    "_build/html/.llvlit.json": b'{"kind": "book", "whole": true}',
    "_build/llvlit.pdf": b"%PDF-1.7",
    "results/real/cells.csv": b"a\n1\n",
    ".binder/environment.yml": b"name: a\n",
    "constraints.txt": b"numpy\n",
}
SITE = {
    "versions.json": b'[{"version": "v0.1.0", "url": "v0.1.0/", "preferred": true}]',
    "v0.1.0/index.html": b"<html></html>",
    "index.html": b"<html></html>",
}
SECRET = "a private key"


def published(
    changed: dict[str, bytes | None],
    previous: dict[str, bytes | None] | None = None,
    link: str = "",
    version: str = "latest",
) -> str:
    """The site of a built book with some files changed, beside a previous one that may hold a link to a secret."""
    root = folder_of(_without(BUILT | changed))
    secret = folder_of({"secret/id": SECRET})
    more = []
    if previous is not None:
        old = folder_of(_without(SITE | previous))
        if link:
            (old / link).parent.mkdir(exist_ok=True)
            (old / link).symlink_to(secret / ("secret" if link.endswith("folder") else "secret/id"))
        more = ["--previous", str(old)]
    site = folder_of({}) / "site"
    command(["publish", "--root", str(root), "--site", str(site), "--version", version, "--revision", "main", *more])
    texts = [path.read_text(errors="replace") for path in site.rglob("*") if path.is_file()]
    assert not any(SECRET in text for text in texts), "what a link points to was published"
    return json.dumps(json.loads((site / "versions.json").read_text()))


__all__ += [name for name in dir() if not name.startswith("_") and name != "annotations"]
