"""Where texts come from: our grammars, data sets of the hub, and files, all behind one kind of source."""

from __future__ import annotations

import json
import os
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from html import unescape
from importlib.resources import files
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from llvlit import checks
from llvlit.errors import FileError, InputError, unknown_name
from llvlit.files import foreign, read_bytes, read_text
from llvlit.hub import failure, hub_reachable
from llvlit.prompts import is_label
from llvlit.tasks.grammars import EMBEDDED_TASKS, generate, load_grammar
from llvlit.tasks.splits import normalized

OFFLINE_CHOICES = (
    f"Without a network: {', '.join(EMBEDDED_TASKS)}, a folder of task files (data_dir), "
    "or a .parquet, .csv or .jsonl file with columns text and label."
)
MOST_ROWS, MOST_LETTERS = 1_000_000, 256 * 2**20
"""Of a task's file; more takes minutes to read and is no set of prompts."""
FILES = (".parquet", ".csv", ".jsonl")


class Texts(NamedTuple):
    """Labelled texts as a source gives them; ``origin`` says from where, such as the commit."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    origin: str
    groups: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Source:
    """A place that a task's texts come from; everything but the texts is known before they are read.

    Attributes
    ----------
    kind : str
        ``embedded``, ``hub`` or ``file``.
    read : function
        Gives the texts, or raises InputError or FileError.
    place : str
        Added to the description in lists of tasks.
    more : mapping
        What else is known, as JSON can hold it.
    """

    kind: str
    name: str
    description: str
    class_names: tuple[str, str]
    read: Callable[[], Texts]
    more: Mapping[str, Any]
    suffix: str = ""
    place: str = ""

    def facts(self) -> dict[str, Any]:
        """What is known before a text is read: ``kind``, ``description``, ``class_names``, and more by kind."""
        description = f"{self.description} ({self.place})" if self.place else self.description
        return {**self.more, "kind": self.kind, "description": description, "class_names": self.class_names}


def all_sources(data_dir: str | Path | None = None) -> dict[str, Source]:
    """Embedded tasks, tasks of the hub, and the files in ``data_dir``, by name; a file goes before a name of ours."""
    sources = {name: embedded_source(name) for name in EMBEDDED_TASKS}
    sources |= {name: hub_source(name) for name in HUB_TASKS}
    return sources | {name: file_source(path) for name, path in task_files(data_dir).items()}


def find_source(name: str | Path, *, data_dir: str | Path | None = None, revision: str | None = None) -> Source:
    """Source of a task by its name, or by the path of a file; no text is read yet.

    Raises
    ------
    InputError
        If the name is unknown, ``data_dir`` lacks it, there is no such file, or ``revision`` is given for a task
        that is not read from the hub.
    """
    name = checks.text("name", name) if isinstance(name, str) else checks.path("name", name)
    sources = all_sources(data_dir)
    source = sources.get(_as_name(name)) if isinstance(name, str) else None
    if source is not None and source.kind == "hub" and data_dir is None:
        return hub_source(source.name, revision)
    if revision is not None:
        raise InputError(
            f"revision={checks.shown(revision)} is of use on the hub alone; name={str(name)!r} is not read from there."
        )
    if source is not None and source.kind != "hub":
        return source
    if isinstance(name, Path) or name.endswith(FILES):
        return file_source(checks.path("name", name))
    if data_dir is not None:
        found = ", ".join(path.name for path in task_files(data_dir).values()) or "no .parquet, .csv or .jsonl file"
        raise InputError(f"data_dir={str(data_dir)!r} has no {name}.parquet; it has {found}. Embedded tasks work too.")
    hint = "Or name a .parquet, .csv or .jsonl file with columns text and label."
    raise InputError(unknown_name("name", name, sources, hint=hint))


def clean_text(text: str) -> str:
    """Text on one line: HTML entities are read, ``<br />`` and runs of whitespace become one space."""
    text = re.sub(r"&#?\w+;", lambda entity: unescape(entity[0]), text)
    return re.sub(r"\s+", " ", re.sub(r"<br\s*/?>", " ", text, flags=re.IGNORECASE)).strip()


# Embedded


def embedded_source(name: str) -> Source:
    """Source of the twins that an embedded grammar writes."""
    grammar = load_grammar(name)

    def read() -> Texts:
        twins = generate(name)
        groups = tuple(pair for pair in range(len(twins)) for _ in (0, 1))
        return Texts(tuple(chain.from_iterable(twins)), (0, 1) * len(twins), "embedded grammar", groups)

    more = {"suffix": grammar.suffix}
    return Source("embedded", name, grammar.description, grammar.class_names, read, more, grammar.suffix)


# Files


def task_files(data_dir: str | Path | None) -> dict[str, Path]:
    """Task files of a folder by task name, ``NAME.parquet``, ``.csv`` or ``.jsonl`` being the file of task NAME.

    Of two files of one name, the parquet file is taken, else the one in CSV.
    """
    if data_dir is None:
        return {}
    folder = checks.path("data_dir", data_dir)
    if not os.path.isdir(folder):
        raise InputError(f"data_dir={str(data_dir)!r} is no folder. Pass a folder of files NAME.parquet.")
    found = [path for ending in reversed(FILES) for path in sorted(folder.glob(f"*{ending}"))]
    return {_as_name(path.stem): path for path in found if path.is_file()}


def _as_name(stem: str) -> str:
    """Name of a task from its file's: letters composed, whatever the file system keeps; bytes of none escaped."""
    return unicodedata.normalize("NFC", stem).encode("utf-8", "backslashreplace").decode()


def file_source(path: Path) -> Source:
    """Source of a file with the columns ``text`` and ``label``: parquet, CSV or lines of JSON, as its name ends.

    A file named like a hub task is taken to have its classes; how its texts were prepared, nobody knows.

    Raises
    ------
    InputError
        If there is no such file.
    """
    if not os.path.isfile(path):
        fault = "this is a folder or a device, no file" if os.path.exists(path) else "there is no such file"
        raise InputError(f"name={str(path)!r}: {fault}. {OFFLINE_CHOICES}")
    name = _as_name(path.stem)
    description, class_names = "local file", ("label 0", "label 1")
    if record := HUB_TASKS.get(name):
        class_names = record.class_names
        description = f"local file, named like the hub task {name}; label 1 = {class_names[1]}"
    read, more = partial(read_file, path), {"path": str(path)}
    return Source("file", name, description, class_names, read, more, place=f"file: {path}")


def read_file(path: Path) -> Texts:
    """Texts, each on one line, and labels of a file.

    Raises
    ------
    FileError
        If the file is not what its name says, cut short or empty, too large, lacks a column, or has a text that is no
        string or without content, or a label other than 0 and 1; the sentence names the row.
    """
    rows: list[tuple[Any, Any]] = []
    n_letters = 0
    what = {".csv": "a CSV file", ".jsonl": "a file of JSON lines"}.get(path.suffix, "a parquet file")
    with foreign(path, what, remedy="Write or copy it again."), _columns(path) as (columns, batches):
        if missing := sorted({"text", "label"} - set(columns)):
            raise FileError(
                f"{path} lacks {' and '.join(missing)}; its columns: {', '.join(columns)}. "
                "Name the columns text and label."
            )
        for batch in batches:
            rows += batch
            n_letters += sum(len(str(text)) for text, _ in batch)
            if n_letters > MOST_LETTERS:
                raise FileError(f"{path}: its first {len(rows)} texts have over {MOST_LETTERS} letters. Keep fewer.")
    if not rows:
        raise FileError(f"{path} has no rows. Write at least one text of each label.")
    texts = []
    for row, (text, label) in enumerate(rows):
        texts.append(clean_text(text) if isinstance(text, str) else "")
        where = f"{path}, row {row} (from 0)"
        if not texts[row]:
            raise FileError(f"{where}: text={checks.shown(text)} is no text with content. Fix or drop the row.")
        if not is_label(label):
            raise FileError(
                f"{where}: label={checks.shown(label)} is neither 0 nor 1 (1: concept present). Fix or drop the row."
            )
    return Texts(tuple(texts), tuple(int(label) for _, label in rows), f"file: {path.name}")


@contextmanager
def _columns(path: Path) -> Iterator[tuple[Sequence[str], Iterable[list[tuple[Any, Any]]]]]:
    """Names of a file's columns, and its rows of text and label in batches."""
    if path.suffix == ".jsonl":
        objects = [json.loads(line) for line in read_text(path, "JSON lines").split("\n") if line.strip()]
        yield (
            [*objects[0]] if objects else ("text", "label"),
            [[(row.get("text"), row.get("label")) for row in objects]],
        )
        return
    import pyarrow as pa  # here, since they are slow to import
    from pyarrow import csv, parquet

    if path.suffix == ".csv":
        options = csv.ParseOptions(newlines_in_values=True)
        types = csv.ConvertOptions(column_types=dict.fromkeys(("text", "label"), pa.string()))
        content = BytesIO(read_bytes(path, "CSV"))
        table = csv.read_csv(content, parse_options=options, convert_options=types)
        numbers = {"0": 0, "1": 1}
        pairs = (_pairs(batch) for batch in table.to_batches(1024))
        yield table.column_names, ([(text, numbers.get(label, label)) for text, label in part] for part in pairs)
        return
    with parquet.ParquetFile(path) as file:
        if file.metadata.num_rows > MOST_ROWS:
            raise FileError(f"{path} has {file.metadata.num_rows} rows. Keep {MOST_ROWS} at most.")
        yield file.schema_arrow.names, map(_pairs, file.iter_batches(1024, columns=["text", "label"]))


def _pairs(batch: Any) -> list[tuple[Any, Any]]:
    return list(zip(batch["text"].to_pylist(), batch["label"].to_pylist(), strict=True))


# Hub


@dataclass(frozen=True)
class HubTask:
    """Where a task of the hub lies and how its rows are read.

    Attributes
    ----------
    hub_id, config, split : str
        Arguments of ``datasets.load_dataset``.
    columns : tuple of str
        Text columns; a prompt is their texts in this order, with ``joint`` between them.
    revision : str
        Commit or branch of the data set.
    label : str
        Column of the label; with a ``threshold``, a score that makes label 1 from there on.
    classes : tuple of two int
        Values of the label that mean class 0 and class 1.
    dropped : tuple of int
        Values of the label whose rows are passed over.
    group : str or None
        Column whose texts, where equal, keep their rows in one split, such as a passage with several questions.
    escaped : bool
        Whether the texts still carry the escapes of a CSV file: backslash-n, and quotes doubled or after a backslash.
    per_class : int
        Distinct texts of each class that are read at most.
    """

    hub_id: str
    config: str | None
    split: str
    columns: tuple[str, ...]
    class_names: tuple[str, str]
    description: str
    revision: str = "main"
    joint: str = ": "
    label: str = "label"
    classes: tuple[int, int] = (0, 1)
    dropped: tuple[int, ...] = ()
    group: str | None = None
    threshold: float | None = None
    escaped: bool = False
    per_class: int = 1200

    @property
    def reading(self) -> str:
        """How rows become texts and labels, in words."""
        text = " and ".join(self.columns) + (f" joined by {self.joint!r}" if len(self.columns) > 1 else "")
        text += ", escapes of a CSV file undone" if self.escaped else ""
        zero, one = self.class_names
        rule = f"{self.label} {self.classes[1]}: {one}, {self.classes[0]}: {zero}"
        if self.threshold is not None:
            rule = f"{self.label} at least {self.threshold}: {one}, else {zero}"
        rule += "".join(f", {value}: dropped" for value in self.dropped)
        rule += f"; rows of one {self.group} stay in one split" if self.group else ""
        return f"texts: {text}, HTML entities read, on one line; {rule}"

    @property
    def place(self) -> str:
        """Data set, configuration, split and commit, in words."""
        config = f" ({self.config})" if self.config else ""
        return f"{self.hub_id}{config}, split {self.split}, commit {self.revision[:12]}"


HUB_TASKS: Mapping[str, HubTask] = msgspec.json.decode(
    (files("llvlit") / "data" / "hub_tasks.json").read_bytes(), type=dict[str, HubTask]
)

HUB_READING = (
    "Of each task the first rows of the stream are read, shuffled with a fixed seed, until each class has "
    f"{HubTask.per_class} distinct texts; rows without a text or a label are passed over."
)


def hub_source(name: str, revision: str | None = None) -> Source:
    """Source of a data set on the hub; ``revision`` replaces the table's."""
    record = HUB_TASKS[name]
    if revision is not None:
        record = replace(record, revision=checks.text("revision", revision, may_be_empty=False))
    read, more = partial(read_hub, name, record), {**asdict(record), "reading": record.reading}
    return Source("hub", name, record.description, record.class_names, read, more, place=f"hub: {record.hub_id}")


def read_hub(name: str, record: HubTask) -> Texts:
    """Texts and labels of a hub task: the first rows of the data set's stream, shuffled with a fixed seed.

    Raises
    ------
    InputError
        If the hub is out of reach or fails, or the rows are not what the record says.
    """
    if not hub_reachable():
        raise InputError(f"name={name!r} lies on the hub, which cannot be reached. {OFFLINE_CHOICES}")
    from datasets import load_dataset  # here, since they are slow to import
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(record.hub_id, revision=record.revision, timeout=30).sha or record.revision
        with _one_reading():
            rows = load_dataset(record.hub_id, record.config, split=record.split, revision=commit, streaming=True)
            texts, labels, groups = examples_from_rows(shuffled(rows), record)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"name={name!r}: {record.hub_id}, revision {record.revision}, could not be read ({failure(error)}). "
            f"{OFFLINE_CHOICES}"
        ) from error
    origin = f"hub: {record.hub_id}, {record.config or 'default'}, {record.split}, commit {commit}"
    return Texts(tuple(texts), tuple(labels), origin, tuple(groups) if groups else None)


@contextmanager
def _one_reading() -> Iterator[None]:
    """No repetition of ``datasets`` on top of the hub client's own: twenty of them take ten minutes."""
    from datasets import config

    once = {"STREAMING_READ_MAX_RETRIES": 1, "STREAMING_OPEN_MAX_RETRIES": 1}
    once |= {"STREAMING_READ_RETRY_INTERVAL": 0, "STREAMING_OPEN_RETRY_INTERVAL": 0}
    before = {name: getattr(config, name) for name in once}
    vars(config).update(once)
    try:
        yield
    finally:
        vars(config).update(before)


def shuffled(rows: Iterable[Any], *, buffer_size: int = 10_000, seed: int = 0) -> Iterator[Any]:
    """Rows in an order drawn from ``seed``, each at most ``buffer_size`` places ahead of its own.

    Unlike that of ``datasets``, the order stays the same from version to version.
    """
    generator = random.Random(f"rows/{seed}")
    buffer: list[Any] = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
            continue
        chosen = generator.randrange(buffer_size)
        buffer[chosen], row = row, buffer[chosen]
        yield row
    generator.shuffle(buffer)
    yield from buffer


def examples_from_rows(
    rows: Iterable[Mapping[str, Any]], record: HubTask
) -> tuple[list[str], list[int], list[int] | None]:
    """Texts, labels and groups of a hub task's rows, until each class has ``record.per_class`` distinct texts.

    Rows without a text or a label (-1 on the hub) are passed over, and so are repetitions within a class.
    """
    texts: list[str] = []
    labels: list[int] = []
    groups: list[int] = []
    seen: tuple[set[str], set[str]] = (set(), set())
    number_of: dict[str, int] = {}
    for row in rows:
        if missing := {*record.columns, record.label} - set(row):
            raise InputError(f"{record.hub_id} lacks {', '.join(sorted(missing))}; it has {', '.join(row)}.")
        text, value = _text(row, record), row[record.label]
        if not text or value in (None, -1, *record.dropped) or value != value:  # NaN
            continue
        if record.threshold is not None:
            value = record.classes[int(value >= record.threshold)]
        if value not in record.classes:
            zero, one = record.classes
            raise InputError(f"{record.hub_id} has {record.label}={value!r}; {zero} or {one} was expected.")
        label = record.classes.index(value)
        known, identity = seen[label], normalized(text)
        if len(known) < record.per_class and identity not in known:
            known.add(identity)
            texts.append(text)
            labels.append(label)
            if record.group:
                groups.append(number_of.setdefault(normalized(str(row[record.group])), len(number_of)))
        if min(map(len, seen)) >= record.per_class:
            break
    return texts, labels, groups if record.group else None


def _text(row: Mapping[str, Any], record: HubTask) -> str:
    """Text of a row: its text columns without escapes, on one line; empty ones are left out."""
    parts = []
    for column in record.columns:
        part = row[column] or ""
        if not isinstance(part, str):
            raise InputError(f"{record.hub_id} has {column}={part!r}; a string was expected.")
        if record.escaped:
            part = part.replace("\\n", " ").replace('\\"', '"').replace('""', '"')
        parts.append(clean_text(part))
    return record.joint.join(filter(None, parts))
