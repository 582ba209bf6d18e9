"""The tasks that prompts come from, and splits that do not leak."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from operator import index
from pathlib import Path
from typing import Any

from llvlit.errors import InputError, unknown_name
from llvlit.prompts import Prompts
from llvlit.tasks.grammars import EMBEDDED_TASKS, generate, load_grammar
from llvlit.tasks.hub import HUB_TASKS, read_hub_examples
from llvlit.tasks.sources import check_file, read_parquet_examples, task_files
from llvlit.tasks.splits import Splits, distinct_units, draw


@dataclass(frozen=True)
class Task:
    """Labelled texts with what they mean and where they come from.

    Attributes
    ----------
    class_names : tuple of two str
        What label 0 and label 1 mean.
    suffix : str
        Appended to every text when prompts are made.
    source : str
    groups : tuple of int, or None
        Texts of one group (such as twins) never straddle two splits; None: every text stands alone.

    Examples
    --------
    >>> task = llvlit.load_task("film-sentiment")
    >>> task.class_names
    ('negative', 'positive')
    """

    name: str
    description: str
    class_names: tuple[str, str]
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    suffix: str = ""
    source: str = ""
    groups: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        prompts = Prompts(self.texts, self.labels)
        object.__setattr__(self, "texts", prompts.texts)
        object.__setattr__(self, "labels", prompts.labels)
        if self.groups is not None and len(self.groups) != len(prompts):
            raise InputError(f"groups has {len(self.groups)} entries for {len(prompts)} texts; pass one each.")

    def prompts(self) -> Prompts:
        """All texts, with the suffix."""
        return self._prompts(range(len(self.texts)), self.groups)

    def with_suffix(self, suffix: str) -> Task:
        """The same task with every prompt ending in ``suffix``."""
        return replace(self, suffix=suffix)

    def split(self, concept: int = 400, operating: int = 200, evaluation: int = 200, seed: int = 0) -> Splits:
        """Disjoint balanced prompts; counts are *per class*.

        Of texts that are equal up to case, punctuation and whitespace one is kept, or none if their labels
        disagree; texts of one group go to one split.

        Raises
        ------
        InputError
            If a count is below 1, or a class has too few distinct texts.
        """
        counts = {"concept": concept, "operating": operating, "evaluation": evaluation}
        for argument, count in counts.items():
            if not _is_whole(count) or count < 1:
                raise InputError(f"{argument}={count!r} must be a whole number, at least 1 prompt per class.")
        if not _is_whole(seed):
            raise InputError(f"seed={seed!r} must be a whole number.")
        units = distinct_units(self.texts, self.labels, self.groups)
        available = [sum(len(unit.rows[label]) for unit in units) for label in (0, 1)]
        if min(available) < (needed := sum(counts.values())):
            zero, one = self.class_names
            raise InputError(
                f"Task {self.name!r} has {available[0]} distinct texts of label 0 ({zero!r}) and {available[1]} of "
                f"label 1 ({one!r}); concept={concept} + operating={operating} + evaluation={evaluation} need {needed} "
                f"of each. Lower them to a sum of {min(available)} at most, or add texts. (Texts that differ in case, "
                "punctuation and whitespace alone count once, and not at all if their labels disagree.)"
            )
        random.Random(f"split/{index(seed)}").shuffle(units)
        drawn = {}
        for part, count in counts.items():
            chosen, units = draw(units, count)
            by_label = [[(row, unit.number) for unit in chosen for row in unit.rows[label]] for label in (0, 1)]
            if min(map(len, by_label)) < count:
                raise InputError(
                    f"{part}={count} of task {self.name!r}: without tearing a group apart only "
                    f"{len(by_label[0])} of label 0 and {len(by_label[1])} of label 1 are left. Ask for fewer."
                )
            rows, numbers = zip(*chain.from_iterable(zip(*by_label, strict=True)), strict=True)
            drawn[part] = self._prompts(rows, numbers)
        return Splits(**drawn)

    def _prompts(self, rows: Iterable[int], pairs: Iterable[int] | None) -> Prompts:
        rows = list(rows)
        return Prompts([self.texts[row] + self.suffix for row in rows], [self.labels[row] for row in rows], pairs)


def _is_whole(value: Any) -> bool:
    return hasattr(type(value), "__index__") and not isinstance(value, bool)


def task_names(data_dir: str | Path | None = None) -> dict[str, str]:
    """Names of embedded tasks, of hub tasks and of the files in ``data_dir``, each with its description.

    Examples
    --------
    >>> from llvlit.tasks.task import task_names
    >>> "film-sentiment" in task_names()
    True
    """
    return {name: str(facts["description"]) for name, facts in task_facts(data_dir).items()}


def task_facts(data_dir: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """What is known of every task before its texts are read, by name: ``kind``, ``description``, ``class_names``.

    Of a hub task also where it lies and how its rows are read, of a file its path.
    """
    facts: dict[str, dict[str, Any]] = {}
    for name in EMBEDDED_TASKS:
        grammar = load_grammar(name)
        facts[name] = {"kind": "embedded", "description": grammar.description, "class_names": grammar.class_names}
        facts[name]["suffix"] = grammar.suffix
    for name, task in HUB_TASKS.items():
        facts[name] = {"kind": "hub", **asdict(task), "reading": task.reading}
        facts[name]["description"] = f"{task.description} (hub: {task.hub_id})"
    for name, path in task_files(data_dir).items():
        description, class_names = _file_facts(name)
        facts[name] = {"kind": "file", "description": f"{description} (file: {path})", "class_names": class_names}
        facts[name]["path"] = str(path)
    return facts


def task_kind(name: str | Path, data_dir: str | Path | None = None) -> str:
    """Whether a name is that of an ``embedded`` task, of one on the ``hub``, or of a ``file``; nothing is read yet.

    Raises
    ------
    InputError
        If it is unknown, ``data_dir`` lacks it, or there is no such file.
    """
    filed = task_files(data_dir)
    if name in filed:
        return "file"
    if name in EMBEDDED_TASKS:
        return "embedded"
    if isinstance(name, Path) or str(name).endswith(".parquet"):
        check_file(Path(name))
        return "file"
    if data_dir is not None:
        files = ", ".join(path.name for path in filed.values()) or "no .parquet file"
        raise InputError(f"data_dir={str(data_dir)!r} has no {name}.parquet; it has {files}. Embedded tasks work too.")
    if name in HUB_TASKS:
        return "hub"
    hint = "Or name a .parquet file with columns text and label."
    raise InputError(unknown_name("name", name, task_names(), hint=hint))


def load_task(
    name: str | Path,
    *,
    suffix: str | None = None,
    data_dir: str | Path | None = None,
    revision: str | None = None,
) -> Task:
    """Task by the name of an embedded or hub task, or from a ``.parquet`` file with ``text`` and ``label``.

    Parameters
    ----------
    name
        A name of :func:`llvlit.tasks.task.task_names`, or the path of a file.
    suffix
        Replaces the task's own.
    data_dir
        Folder of task files: ``NAME.parquet`` there serves the task NAME, and the hub is not asked.
    revision
        Commit or branch of a hub task in place of the pinned one.

    Raises
    ------
    InputError
        If the name is unknown, ``data_dir`` lacks it, the hub or the file cannot be read, or the file's columns,
        texts or labels (0 or 1) are not what they must be.

    Examples
    --------
    >>> task = llvlit.load_task("film-sentiment", suffix=" In short, it was")
    >>> task.prompts().texts[0].endswith(" In short, it was")
    True
    """
    if revision is not None and not (name in HUB_TASKS and data_dir is None):
        raise InputError(
            f"revision={revision!r} is of use on the hub alone; name={str(name)!r} is not read from there."
        )
    kind, filed = task_kind(name, data_dir), task_files(data_dir)
    if kind == "embedded":
        task = _embedded_task(str(name))
    elif kind == "hub":
        task = _hub_task(str(name), revision)
    elif name in filed:
        task = _file_task(filed[str(name)], *_file_facts(str(name)))
    else:
        task = _file_task(Path(name))
    return task if suffix is None else task.with_suffix(suffix)


def _embedded_task(name: str) -> Task:
    grammar, pairs = load_grammar(name), generate(name)
    return Task(
        name,
        grammar.description,
        grammar.class_names,
        tuple(text for pair in pairs for text in pair),
        (0, 1) * len(pairs),
        suffix=grammar.suffix,
        source="embedded grammar",
        groups=tuple(pair for pair in range(len(pairs)) for _ in (0, 1)),
    )


FILE_FACTS = ("local file", ("label 0", "label 1"))  # description and class names of a file nobody described


def _file_facts(name: str) -> tuple[str, tuple[str, str]]:
    """Description and class names of a file in a folder of task files.

    A file named like a hub task is taken to have its classes; how its texts were prepared, nobody knows.
    """
    record = HUB_TASKS.get(name)
    if record is None:
        return FILE_FACTS
    return f"local file, named like the hub task {name}; label 1 = {record.class_names[1]}", record.class_names


def _file_task(path: Path, description: str = FILE_FACTS[0], class_names: tuple[str, str] = FILE_FACTS[1]) -> Task:
    texts, labels = read_parquet_examples(path)
    return Task(path.stem, description, class_names, tuple(texts), tuple(labels), source=f"file: {path.name}")


def _hub_task(name: str, revision: str | None) -> Task:
    record = HUB_TASKS[name]
    texts, labels, commit = read_hub_examples(name, revision=revision)
    source = f"hub: {record.hub_id}, {record.config or 'default'}, {record.split}, commit {commit}"
    return Task(name, record.description, record.class_names, tuple(texts), tuple(labels), source=source)
