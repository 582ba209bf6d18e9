"""The tasks that prompts come from, and splits that do not leak."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

from llvlit.errors import InputError, unknown_name
from llvlit.grammars import EMBEDDED_TASKS, distinct_groups, draw, generate, load_grammar
from llvlit.hub_tasks import HUB_TASKS, read_hub_examples
from llvlit.prompts import Prompts
from llvlit.task_files import read_parquet_examples, task_files


@dataclass(frozen=True)
class Splits:
    """Disjoint, balanced prompts for directions, for surrogates, and for judging them.

    Labels alternate 0, 1, 0, 1, ... (twins stand side by side), so every even-sized head is balanced too.

    Examples
    --------
    >>> len(splits.concept), len(splits.operating), len(splits.evaluation)
    (40, 8, 8)
    """

    concept: Prompts
    operating: Prompts
    evaluation: Prompts


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
        return Prompts([text + self.suffix for text in self.texts], self.labels)

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
        groups = distinct_groups(self.texts, self.labels, self.groups or range(len(self.texts)))
        available = [sum(len(group[label]) for group in groups) for label in (0, 1)]
        if min(available) < (needed := sum(counts.values())):
            zero, one = self.class_names
            raise InputError(
                f"Task {self.name!r} has {available[0]} distinct texts of label 0 ({zero!r}) and {available[1]} of "
                f"label 1 ({one!r}); concept={concept} + operating={operating} + evaluation={evaluation} need {needed} "
                f"of each. Lower them to a sum of {min(available)} at most, or add texts. (Texts that differ in case, "
                "punctuation and whitespace alone count once, and not at all if their labels disagree.)"
            )
        random.Random(f"split/{index(seed)}").shuffle(groups)
        drawn = {}
        for part, count in counts.items():
            chosen, groups = draw(groups, count)
            if min(map(len, chosen)) < count:
                raise InputError(
                    f"{part}={count} of task {self.name!r}: without tearing a group apart only "
                    f"{len(chosen[0])} of label 0 and {len(chosen[1])} of label 1 are left. Ask for fewer."
                )
            rows = [row for pair in zip(*chosen, strict=True) for row in pair]
            drawn[part] = Prompts([self.texts[i] + self.suffix for i in rows], [self.labels[i] for i in rows])
        return Splits(**drawn)


def _is_whole(value: Any) -> bool:
    return hasattr(type(value), "__index__") and not isinstance(value, bool)


def task_names(data_dir: str | Path | None = None) -> dict[str, str]:
    """Names of embedded tasks, of hub tasks and of the files in ``data_dir``, each with its description.

    Examples
    --------
    >>> from llvlit.tasks import task_names
    >>> "film-sentiment" in task_names()
    True
    """
    embedded = {name: load_grammar(name).description for name in EMBEDDED_TASKS}
    hub = {name: f"{task.description} (hub: {task.hub_id})" for name, task in HUB_TASKS.items()}
    filed = {name: f"{_file_facts(name)[0]} (file: {path})" for name, path in task_files(data_dir).items()}
    return embedded | hub | filed


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
        A name of :func:`llvlit.tasks.task_names`, or the path of a file.
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
    filed = task_files(data_dir)
    on_hub = name in HUB_TASKS and data_dir is None
    if revision is not None and not on_hub:
        raise InputError(
            f"revision={revision!r} is of use on the hub alone; name={str(name)!r} is not read from there."
        )
    if name in filed:
        task = _file_task(filed[str(name)], *_file_facts(str(name)))
    elif name in EMBEDDED_TASKS:
        task = _embedded_task(str(name))
    elif isinstance(name, Path) or str(name).endswith(".parquet"):
        task = _file_task(Path(name))
    elif on_hub:
        task = _hub_task(str(name), revision)
    elif data_dir is not None:
        files = ", ".join(path.name for path in filed.values()) or "no .parquet file"
        raise InputError(f"data_dir={str(data_dir)!r} has no {name}.parquet; it has {files}. Embedded tasks work too.")
    else:
        hint = "Or name a .parquet file with columns text and label."
        raise InputError(unknown_name("name", name, task_names(), hint=hint))
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
    """Description and class names of a file in a folder of task files: the hub task's of that name, if any."""
    record = HUB_TASKS.get(name)
    return (record.description, record.class_names) if record else FILE_FACTS


def _file_task(path: Path, description: str = FILE_FACTS[0], class_names: tuple[str, str] = FILE_FACTS[1]) -> Task:
    texts, labels = read_parquet_examples(path)
    return Task(path.stem, description, class_names, tuple(texts), tuple(labels), source=f"file: {path.name}")


def _hub_task(name: str, revision: str | None) -> Task:
    record = HUB_TASKS[name]
    texts, labels, commit = read_hub_examples(name, revision=revision)
    source = f"hub: {record.hub_id}, {record.config or 'default'}, {record.split}, commit {commit}"
    return Task(name, record.description, record.class_names, tuple(texts), tuple(labels), source=source)
