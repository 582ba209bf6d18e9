"""Tasks of the hub: where each lies, and how its rows become texts and labels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from llvlit.errors import InputError
from llvlit.grammars import EMBEDDED_TASKS, clean_text
from llvlit.hub import hub_reachable

OFFLINE_CHOICES = f"Without a network: {', '.join(EMBEDDED_TASKS)}, or a .parquet file with columns text and label."


@dataclass(frozen=True)
class HubTask:
    """Where a task of the hub lies and how its rows are read.

    Attributes
    ----------
    hub_id, config, split : str
        Arguments of ``datasets.load_dataset``.
    columns : tuple of str
        Text columns, joined by ``": "``.
    label : str
        Column of the label; with a ``threshold``, a score that makes label 1 from there on.
    per_class : int
        Texts of each class that are read at most.
    """

    hub_id: str
    config: str | None
    split: str
    columns: tuple[str, ...]
    class_names: tuple[str, str]
    description: str
    label: str = "label"
    threshold: float | None = None
    per_class: int = 1200


def _read_table() -> dict[str, HubTask]:
    table = json.loads((files("llvlit") / "data" / "hub_tasks.json").read_text(encoding="utf-8"))
    return {
        name: HubTask(**record | {key: tuple(record[key]) for key in ("columns", "class_names")})
        for name, record in table.items()
    }


HUB_TASKS: Mapping[str, HubTask] = _read_table()


def read_hub_examples(name: str) -> tuple[list[str], list[int]]:
    """Texts and labels of a hub task, from the first rows of its stream, shuffled with a fixed seed.

    Raises
    ------
    InputError
        If the hub is out of reach or fails, or the rows are not what the table says.
    """
    if not hub_reachable():
        raise InputError(f"name={name!r} lies on the hub, which cannot be reached. {OFFLINE_CHOICES}")
    from datasets import load_dataset  # here, since it is slow to import

    record = HUB_TASKS[name]
    try:
        rows = load_dataset(record.hub_id, record.config, split=record.split, streaming=True)
        return examples_from_rows(rows.shuffle(seed=0, buffer_size=10_000), record)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"name={name!r}: {record.hub_id} could not be read ({error}). {OFFLINE_CHOICES}") from error


def examples_from_rows(rows: Iterable[Mapping[str, Any]], record: HubTask) -> tuple[list[str], list[int]]:
    """Texts and labels of a hub task's rows, until each class has ``record.per_class``.

    Rows without a text or a label (-1 on the hub) are passed over.
    """
    texts: list[str] = []
    labels: list[int] = []
    room = {0: record.per_class, 1: record.per_class}
    for row in rows:
        if missing := {*record.columns, record.label} - set(row):
            raise InputError(f"{record.hub_id} lacks {', '.join(sorted(missing))}; it has {', '.join(row)}.")
        text = ": ".join(filter(None, (clean_text(row[column] or "") for column in record.columns)))
        label = row[record.label]
        if not text or label is None or label == -1:
            continue
        if record.threshold is not None:
            label = int(label >= record.threshold)
        if label not in (0, 1):
            raise InputError(f"{record.hub_id} has {record.label}={label!r}; 0 or 1 was expected.")
        if room[label]:
            room[label] -= 1
            texts.append(text)
            labels.append(int(label))
        if not any(room.values()):
            break
    return texts, labels
