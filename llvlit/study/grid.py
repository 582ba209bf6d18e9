"""Grids: which models, tasks, seeds and settings a study runs over, from a small TOML file."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

from llvlit.engine.depth import MAX_TOKENS
from llvlit.errors import InputError, unknown_name
from llvlit.method.bases import BASES
from llvlit.method.concepts import METHODS
from llvlit.method.identification import JACOBIANS

GRIDS = ("embedded", "real", "paper")


@dataclass(frozen=True)
class Settings:
    """Everything that one cell evaluates at once, since its passes through the model serve all of it.

    Attributes
    ----------
    concept, operating, evaluation : int
        Prompts per class of each split.
    directions, bases : tuple of str
        Methods; the first of each is the reference (the paper: mean difference, krylov).
    orders : tuple of int
        The last is the largest, and the one that profiles are kept of; a narrower model takes its hidden size.
    amplitudes : tuple of float
        The first is the reference; at the others, predictions meet the gains measured there.
    operating_counts : tuple of int
        Surrogates from so many operating prompts in all, besides the whole split.
    energy_prompts : int
        Held-out prompts per class whose required energies are found; 0: none.
    target : float
        Wanted shift of the output, in class gaps.

    Examples
    --------
    >>> from llvlit.study.grid import Settings
    >>> Settings(orders=(8, 16, 32)).orders[-1]
    32
    """

    concept: int = 400
    operating: int = 200
    evaluation: int = 200
    max_tokens: int = MAX_TOKENS
    directions: tuple[str, ...] = ("mean_difference",)
    bases: tuple[str, ...] = BASES
    orders: tuple[int, ...] = (32,)
    amplitudes: tuple[float, ...] = (0.1,)
    operating_counts: tuple[int, ...] = ()
    energy_prompts: int = 0
    target: float = 0.5


@dataclass(frozen=True)
class Cell:
    """One model on one split of one task.

    Attributes
    ----------
    suffix : str or None
        Replaces the task's own.
    data_dir : str or None
        Folder of parquet files that serve tasks by name.

    Examples
    --------
    >>> from llvlit.study.grid import Grid
    >>> grid = Grid("mine", "One cell.", models=("gpt2",), tasks=("film-sentiment",))
    >>> grid.cells()[0].key
    'gpt2--film-sentiment--seed-0'
    """

    model: str
    task: str
    seed: int
    jacobian: str
    final_norm: bool
    settings: Settings
    suffix: str | None = None
    data_dir: str | None = None

    @property
    def key(self) -> str:
        """Name of the cell's result file."""
        parts = [_slug(self.model), _slug(self.task), f"seed-{self.seed}"]
        parts += [self.jacobian] if self.jacobian != "jvp" else []
        parts += ["final-norm"] if self.final_norm else []
        return "--".join(parts)


@dataclass(frozen=True)
class Grid:
    """All cells of a study: every model with every task, seed, kind of Jacobian and kind of last step.

    Attributes
    ----------
    per_task : mapping of str to mapping
        Where a task differs: ``suffix``, ``concept``, ``operating``, ``evaluation``.

    Examples
    --------
    >>> from llvlit.study.grid import Grid
    >>> grid = Grid("mine", "Two seeds.", models=("gpt2",), tasks=("film-sentiment",), seeds=(0, 1))
    >>> len(grid.cells())
    2
    """

    name: str
    description: str
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    jacobians: tuple[str, ...] = ("jvp",)
    final_norms: tuple[bool, ...] = (False,)
    settings: Settings = Settings()
    per_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def cells(self, *, data_dir: str | None = None) -> tuple[Cell, ...]:
        """All cells, those of one model side by side."""
        found = []
        axes = product(self.models, self.tasks, self.seeds, self.jacobians, self.final_norms)
        for model, task, seed, jacobian, final_norm in axes:
            own = dict(self.per_task.get(task, {}))
            suffix = own.pop("suffix", None)
            settings = Settings(**{**asdict(self.settings), **own})
            found.append(Cell(model, task, seed, jacobian, final_norm, settings, suffix, data_dir))
        return tuple(found)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the results, first 16 hexadecimal digits."""
        content = {key: value for key, value in asdict(self).items() if key not in ("name", "description")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def load_grid(name: str | Path) -> Grid:
    """Grid by the name of a shipped one, or from a ``.toml`` file.

    Raises
    ------
    InputError
        If there is no such grid, the file is not TOML, or a key or value is not what it must be; the message
        names it.  Models and tasks are checked where they are loaded.

    Examples
    --------
    >>> from llvlit.study.grid import load_grid
    >>> load_grid("paper").models
    ('gpt2', 'gpt2-medium', 'gpt2-large')
    """
    if str(name) in GRIDS:
        text = (files("llvlit") / "data" / "grids" / f"{name}.toml").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise InputError(unknown_name("grid", name, GRIDS, hint="Or name a .toml file."))
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{name} is not TOML: {error}.") from error
    return _read(Path(name).stem, str(name), content)


def change_axes(grid: Grid, axes: Mapping[str, list[Any] | None]) -> Grid:
    """The grid with other models, tasks or seeds, where given; InputError as for a file."""
    changed: dict[str, Any] = {key: _value("grid", key, value) for key, value in axes.items() if value is not None}
    return replace(grid, **changed)


_NUMBERS = {"concept", "operating", "evaluation", "max_tokens", "energy_prompts"}
_LISTS: dict[str, type | tuple[type, ...]] = {
    "models": str,
    "tasks": str,
    "seeds": int,
    "jacobians": str,
    "final_norms": bool,
    "directions": str,
    "bases": str,
    "orders": int,
    "amplitudes": (int, float),
    "operating_counts": int,
}
_NAMES = {"jacobians": JACOBIANS, "directions": METHODS, "bases": BASES}
_PER_TASK = ("suffix", "concept", "operating", "evaluation")


def _read(name: str, place: str, content: dict[str, Any]) -> Grid:
    allowed = [one.name for one in fields(Grid) if one.name not in ("name", "per_task")] + ["task"]
    _known(place, "", content, allowed)
    for key in ("description", "models", "tasks"):
        if key not in content:
            raise InputError(f"{place} lacks {key!r}.")
    settings = content.pop("settings", {})
    per_task = content.pop("task", {})
    content["tasks"] = _value(place, "tasks", content["tasks"])
    _known(place, "task.", per_task, content["tasks"])
    _known(place, "settings.", settings, [one.name for one in fields(Settings)])
    for task, own in per_task.items():
        _known(place, f"task.{task}.", own, _PER_TASK)
    values = {key: value if key == "tasks" else _value(place, key, value) for key, value in content.items()}
    chosen = Settings(**{key: _value(place, f"settings.{key}", value) for key, value in settings.items()})
    own_values = {
        task: {key: _value(place, f"task.{task}.{key}", value) for key, value in own.items()}
        for task, own in per_task.items()
    }
    return Grid(name=name, settings=chosen, per_task=own_values, **values)


def _known(place: str, prefix: str, content: Any, allowed: list[str] | tuple[str, ...]) -> None:
    if not isinstance(content, dict):
        raise InputError(f"{place}: {prefix.rstrip('.')} must be a table of keys; it is {content!r}.")
    for key in content:
        if key not in allowed:
            raise InputError(f"{place}: {unknown_name('key', prefix + key, [prefix + one for one in allowed])}")


def _value(place: str, key: str, value: Any) -> Any:
    """A checked value; lists become tuples."""
    short = key.rpartition(".")[2]
    if short in _LISTS:
        kind = _LISTS[short]
        fits = isinstance(value, list) and all(
            isinstance(one, kind) and isinstance(one, bool) == (kind is bool) for one in value
        )
        if not fits or (not value and short != "operating_counts") or len(set(map(str, value))) < len(value):
            raise InputError(f"{place}: {key}={value!r} must be a list of distinct values, at least one, of its kind.")
        for one in value:
            if one not in _NAMES.get(short, (one,)):
                raise InputError(f"{place}: {unknown_name(key, one, _NAMES[short])}")
        if short in ("orders", "amplitudes", "operating_counts") and not all(0 < one < inf for one in value):
            raise InputError(f"{place}: {key}={value!r} must be positive and finite.")
        if short == "seeds" and min(value) < 0:
            raise InputError(f"{place}: {key}={value!r} must not be negative.")
        return tuple(sorted(value)) if short in ("orders", "operating_counts") else tuple(value)
    if short in _NUMBERS:
        least = 0 if short == "energy_prompts" else 1
        if type(value) is not int or value < least:
            raise InputError(f"{place}: {key}={value!r} must be a whole number, at least {least}.")
    elif short == "target":
        if type(value) not in (int, float) or not 0 < abs(value) < float("inf"):
            raise InputError(f"{place}: {key}={value!r} must be a number, not zero: a shift in class gaps.")
    elif not isinstance(value, str):
        raise InputError(f"{place}: {key}={value!r} must be text.")
    return value


def _slug(name: str) -> str:
    """A name that can be part of a file's; local folders keep their last parts and a few digits of a hash."""
    kind, _, bare = name.rpartition(":")
    is_path = bare.count("/") > 1 or bare.startswith((".", "/", "~")) or "\\" in bare or bare.endswith(".parquet")
    tail = hashlib.sha256(name.encode()).hexdigest()[:6] if is_path else ""
    parts = [kind, *Path(bare).parts[-2:], tail]
    return re.sub(r"[^\w.-]+", "-", "-".join(filter(None, parts))).strip("-.")
