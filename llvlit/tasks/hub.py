"""Tasks of the hub: where each lies, and how its rows become texts and labels."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from llvlit.errors import InputError
from llvlit.hub import failure, hub_reachable
from llvlit.tasks.grammars import EMBEDDED_TASKS, clean_text, normalized

OFFLINE_CHOICES = (
    f"Without a network: {', '.join(EMBEDDED_TASKS)}, a folder of task files (data_dir), "
    "or a .parquet file with columns text and label."
)


@dataclass(frozen=True)
class HubTask:
    """Where a task of the hub lies and how its rows are read.

    Attributes
    ----------
    hub_id, config, split : str
        Arguments of ``datasets.load_dataset``.
    columns : tuple of str
        Text columns, joined by ``": "``.
    revision : str
        Commit or branch of the data set.
    label : str
        Column of the label; with a ``threshold``, a score that makes label 1 from there on.
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
    label: str = "label"
    threshold: float | None = None
    escaped: bool = False
    per_class: int = 1200

    @property
    def reading(self) -> str:
        """How rows become texts and labels, in words."""
        text = " and ".join(self.columns) + (" joined by a colon" if len(self.columns) > 1 else "")
        text += ", escapes of a CSV file undone" if self.escaped else ""
        one = f"{self.label} at least {self.threshold}" if self.threshold is not None else f"{self.label} 1"
        return (
            f"texts: {text}, HTML entities read, on one line; {one}: {self.class_names[1]}, else {self.class_names[0]}"
        )

    @property
    def place(self) -> str:
        """Data set, configuration, split and commit, in words."""
        config = f" ({self.config})" if self.config else ""
        return f"{self.hub_id}{config}, split {self.split}, commit {self.revision[:12]}"


def _read_table() -> dict[str, HubTask]:
    table = json.loads((files("llvlit") / "data" / "hub_tasks.json").read_text(encoding="utf-8"))
    return {
        name: HubTask(**record | {key: tuple(record[key]) for key in ("columns", "class_names")})
        for name, record in table.items()
    }


HUB_TASKS: Mapping[str, HubTask] = _read_table()

HUB_READING = (
    "Of each task the first rows of the stream are read, shuffled with a fixed seed, until each class has "
    f"{HubTask.per_class} distinct texts; rows without a text or a label are passed over."
)


def hub_table() -> str:
    """Markdown of the hub tasks: where each lies, and how its rows are read."""
    lines = ["| Task | Data set | Rows |", "|---|---|---|"]
    lines += [f"| `{name}` | {task.place} | {task.reading} |" for name, task in HUB_TASKS.items()]
    return "\n".join([*lines, "", HUB_READING])


def read_hub_examples(name: str, *, revision: str | None = None) -> tuple[list[str], list[int], str]:
    """Texts and labels of a hub task, and the commit they come from.

    They are the first rows of the data set's stream, shuffled with a fixed seed; ``revision`` replaces the
    table's.

    Raises
    ------
    InputError
        If the hub is out of reach or fails, or the rows are not what the table says.
    """
    if not hub_reachable():
        raise InputError(f"name={name!r} lies on the hub, which cannot be reached. {OFFLINE_CHOICES}")
    from datasets import load_dataset  # here, since they are slow to import
    from huggingface_hub import HfApi

    record = HUB_TASKS[name]
    revision = revision or record.revision
    try:
        commit = HfApi().dataset_info(record.hub_id, revision=revision, timeout=30).sha or revision
        with _one_reading():
            rows = load_dataset(record.hub_id, record.config, split=record.split, revision=commit, streaming=True)
            texts, labels = examples_from_rows(shuffled(rows), record)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"name={name!r}: {record.hub_id}, revision {revision}, could not be read ({failure(error)}). "
            f"{OFFLINE_CHOICES}"
        ) from error
    return texts, labels, commit


@contextmanager
def _one_reading() -> Iterator[None]:
    """No repetition of ``datasets`` on top of the hub client's own: twenty of them take ten minutes."""
    from datasets import config

    once = dict.fromkeys(("STREAMING_READ_MAX_RETRIES", "STREAMING_OPEN_MAX_RETRIES"), 1)
    at_once = dict.fromkeys(("STREAMING_READ_RETRY_INTERVAL", "STREAMING_OPEN_RETRY_INTERVAL"), 0)
    before = {name: getattr(config, name) for name in once | at_once}
    vars(config).update(once | at_once)
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


def examples_from_rows(rows: Iterable[Mapping[str, Any]], record: HubTask) -> tuple[list[str], list[int]]:
    """Texts and labels of a hub task's rows, until each class has ``record.per_class`` distinct texts.

    Rows without a text or a label (-1 on the hub) are passed over, and so are repetitions within a class.
    """
    texts: list[str] = []
    labels: list[int] = []
    seen: tuple[set[str], set[str]] = (set(), set())
    for row in rows:
        if missing := {*record.columns, record.label} - set(row):
            raise InputError(f"{record.hub_id} lacks {', '.join(sorted(missing))}; it has {', '.join(row)}.")
        text, label = _text(row, record), row[record.label]
        if not text or label in (None, -1) or label != label:  # NaN
            continue
        if record.threshold is not None:
            label = int(label >= record.threshold)
        if label not in (0, 1):
            raise InputError(f"{record.hub_id} has {record.label}={label!r}; 0 or 1 was expected.")
        known, identity = seen[int(label)], normalized(text)
        if len(known) < record.per_class and identity not in known:
            known.add(identity)
            texts.append(text)
            labels.append(int(label))
        if min(map(len, seen)) >= record.per_class:
            break
    return texts, labels


def _text(row: Mapping[str, Any], record: HubTask) -> str:
    """Text of a row: its text columns without escapes, on one line."""
    parts = []
    for column in record.columns:
        part = row[column] or ""
        if not isinstance(part, str):
            raise InputError(f"{record.hub_id} has {column}={part!r}; a string was expected.")
        if record.escaped:
            part = part.replace("\\n", " ").replace('\\"', '"').replace('""', '"')
        parts.append(clean_text(part))
    return ": ".join(filter(None, parts))
