"""The tasks that prompts come from, and splits that do not leak."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from llvlit import checks
from llvlit.errors import InputError
from llvlit.prompts import Prompts
from llvlit.tasks.sources import all_sources, find_source
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
        for argument in ("name", "description", "suffix", "source"):
            checks.text(argument, getattr(self, argument))
        if not isinstance(self.class_names, list | tuple) or len(self.class_names) != 2:
            raise checks.refuse("class_names", self.class_names, "two names, of label 0 and of label 1")
        names = tuple(checks.text(f"class_names[{label}]", name) for label, name in enumerate(self.class_names))
        prompts, groups = Prompts(self.texts, self.labels), self.groups
        if groups is not None:
            checks.array("groups", groups, (len(prompts),))
            groups = tuple(checks.integer(f"groups[{row}]", group) for row, group in enumerate(groups))
        fields = {"class_names": names, "texts": prompts.texts, "labels": prompts.labels, "groups": groups}
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    def prompts(self) -> Prompts:
        """All texts, with the suffix."""
        return self._prompts(range(len(self.texts)), self.groups)

    def with_suffix(self, suffix: str) -> Task:
        """The same task with every prompt ending in ``suffix``."""
        return replace(self, suffix=checks.text("suffix", suffix))

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
        counts = {argument: checks.integer(argument, count, at_least=1) for argument, count in counts.items()}
        seed = checks.integer("seed", seed, at_least=-(2**63), at_most=2**63 - 1)
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
        random.Random(f"split/{seed}").shuffle(units)
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

    def _prompts(self, rows: Sequence[int], pairs: Sequence[int] | None) -> Prompts:
        texts, labels = [self.texts[row] + self.suffix for row in rows], [self.labels[row] for row in rows]
        return Prompts(texts, labels, pairs, suffix=self.suffix)


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
    return {name: source.facts() for name, source in all_sources(data_dir).items()}


def load_task(
    name: str | Path,
    *,
    suffix: str | None = None,
    data_dir: str | Path | None = None,
    revision: str | None = None,
) -> Task:
    """Task by the name of an embedded or hub task, or from a file with ``text`` and ``label``.

    Parameters
    ----------
    name
        A name of :func:`llvlit.tasks.task.task_names`, or the path of a ``.parquet``, ``.csv`` or ``.jsonl`` file.
    suffix
        Replaces the task's own.
    data_dir
        Folder of task files: ``NAME.parquet``, ``.csv`` or ``.jsonl`` there serves the task NAME; no hub is asked.
    revision
        Commit or branch of a hub task in place of the pinned one.

    Raises
    ------
    InputError
        If the name is unknown, ``data_dir`` lacks it, the hub cannot be read, or a file's columns, texts or labels
        (0 or 1) are not what they must be.
    FileError
        If a file cannot be read as what its name says.

    Examples
    --------
    >>> task = llvlit.load_task("film-sentiment", suffix=" In short, it was")
    >>> task.prompts().texts[0].endswith(" In short, it was")
    True
    """
    source = find_source(name, data_dir=data_dir, revision=revision)
    suffix = source.suffix if suffix is None else checks.text("suffix", suffix)
    texts, labels, origin, groups = source.read()
    return Task(source.name, source.description, source.class_names, texts, labels, suffix, origin, groups)
