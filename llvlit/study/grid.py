"""Grids: which models, tasks, seeds and settings a study runs over, from a small TOML file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib.resources import files
from itertools import product
from math import isfinite
from os.path import isfile
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec
from msgspec import Meta

from llvlit import checks
from llvlit.checks import shown
from llvlit.engine.tokens import MAX_TOKENS
from llvlit.errors import InputError, unknown_name
from llvlit.files import read_toml
from llvlit.method.bases import BASES
from llvlit.method.concepts import METHODS
from llvlit.method.identification import JACOBIANS
from llvlit.method.surrogate import OPERATORS
from llvlit.tasks.sources import FILES

GRIDS = ("embedded", "real", "paper")
NAMES = {"jacobians": JACOBIANS, "directions": METHODS, "bases": BASES, "operators": OPERATORS}

Kind = TypeVar("Kind")
Name = Annotated[str, Meta(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]+$")]
Count = Annotated[int, Meta(ge=1, le=10**9)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Amplitude = Annotated[float, Meta(gt=0)]


WORDS = {"int": "whole number", "float": "number", "str": "text", "array": "list", "bool": "true or false"}


def _check_fields(whole: Any) -> None:
    """Let every field through the door: of its kind, finite, of distinct values, of names that are known."""
    kinds = get_type_hints(type(whole), include_extras=True)
    for key in (one.name for one in fields(whole)):
        value = getattr(whole, key)
        if key == "per_task":
            checks.instance(key, value, Mapping, "a mapping of tasks")
        if key == "settings":
            checks.instance(key, value, Settings, "Settings")
            continue
        try:
            value = msgspec.convert(value, kinds[key])
        except (msgspec.ValidationError, RecursionError) as error:
            expected, _, where = str(error).partition(" - at `$")
            expected = re.sub(r"`(\w+)`", lambda match: WORDS.get(match[1], match[1]), expected)
            raise InputError(f"{key}{where.strip('`')}: {expected}; {key}={shown(value)} came.") from None
        object.__setattr__(whole, key, value)
        for entry in value if isinstance(value, tuple) else ():
            if isinstance(entry, float) and not isfinite(entry):
                raise InputError(f"{key}={shown(value)} must be finite.")
            if value.count(entry) > 1:
                raise InputError(f"{key}={shown(value)} must be distinct values.")
            if entry not in NAMES.get(key, value):
                raise InputError(unknown_name(key, entry, NAMES[key]))


@dataclass(frozen=True)
class Settings:
    """Everything that one cell evaluates at once, since its passes through the model serve all of it.

    Attributes
    ----------
    concept, operating, evaluation : int
        Prompts per class of each split.
    chat : bool
        Whether each prompt is the user's turn in its model's chat template.
    directions, bases : tuple of str
        Methods; the first of each is the reference (the paper: mean difference, krylov).
    operators : tuple of str
        What predicts: ``mean`` operators, each prompt's own (``per prompt``), or both.
    orders : tuple of int
        Kept sorted; profiles are kept of the last, the largest; a narrower model takes its hidden size.
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

    concept: Count = 400
    operating: Count = 200
    evaluation: Count = 200
    max_tokens: Annotated[int, Meta(ge=2, le=10**9)] = MAX_TOKENS
    chat: bool = False
    directions: Annotated[tuple[str, ...], Meta(min_length=1)] = ("mean_difference",)
    bases: Annotated[tuple[str, ...], Meta(min_length=1)] = ("krylov", "reachability", "random", "pca")
    operators: Annotated[tuple[str, ...], Meta(min_length=1)] = OPERATORS
    orders: Annotated[tuple[Count, ...], Meta(min_length=1)] = (32,)
    amplitudes: Annotated[tuple[Amplitude, ...], Meta(min_length=1)] = (0.1,)
    operating_counts: tuple[Count, ...] = ()
    energy_prompts: Annotated[int, Meta(ge=0, le=10**9)] = 0
    target: float = 0.5

    def __post_init__(self) -> None:
        _check_fields(self)
        checks.number("target", self.target, nonzero=True)
        for key in ("orders", "operating_counts"):
            object.__setattr__(self, key, tuple(sorted(getattr(self, key))))


@dataclass(frozen=True)
class Cell:
    """One model on one split of one task.

    Attributes
    ----------
    suffix : str or None
        Replaces the task's own.
    data_dir : str or None
        Folder of files that serve tasks by name.

    Examples
    --------
    >>> from llvlit.study.grid import Grid
    >>> grid = Grid("mine", "One cell.", models=("gpt2",), tasks=("film-sentiment",))
    >>> grid.cells()[0].key
    'gpt2--film-sentiment--seed-0'
    """

    model: Name
    task: Name
    seed: Seed
    jacobian: str
    final_norm: bool
    settings: Settings
    suffix: str | None = None
    data_dir: str | None = None

    def __post_init__(self) -> None:
        _check_fields(self)
        checks.choice("jacobian", self.jacobian, JACOBIANS)

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
    models: Annotated[tuple[Name, ...], Meta(min_length=1)]
    tasks: Annotated[tuple[Name, ...], Meta(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Meta(min_length=1)] = (0,)
    jacobians: Annotated[tuple[str, ...], Meta(min_length=1)] = ("jvp",)
    final_norms: Annotated[tuple[bool, ...], Meta(min_length=1)] = (False,)
    settings: Settings = Settings()
    per_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_fields(self)
        for task, own in self.per_task.items():
            _made(_TaskSettings, own, f"task.{task}.")

    def cells(self, *, data_dir: str | None = None) -> tuple[Cell, ...]:
        """All cells, those of one model side by side."""
        cells = []
        axes = product(self.models, self.tasks, self.seeds, self.jacobians, self.final_norms)
        for model, task, seed, jacobian, final_norm in axes:
            own = dict(self.per_task.get(task, {}))
            suffix = own.pop("suffix", None)
            settings = Settings(**{**asdict(self.settings), **own})
            cells.append(Cell(model, task, seed, jacobian, final_norm, settings, suffix, data_dir))
        return tuple(cells)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the results, first 16 hexadecimal digits."""
        content = {key: value for key, value in asdict(self).items() if key not in ("name", "description")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _TaskSettings:
    """What a task may have of its own."""

    suffix: str | None = None
    concept: Count | None = None
    operating: Count | None = None
    evaluation: Count | None = None

    def __post_init__(self) -> None:
        _check_fields(self)


def load_grid(name: str | Path) -> Grid:
    """Grid by the name of a shipped one, or from a ``.toml`` file.

    Raises
    ------
    FileError
        If the file is not TOML.
    InputError
        If there is no such grid, or a key or value is not what it must be; the message names it.  Models and tasks
        are checked where they are loaded.

    Examples
    --------
    >>> from llvlit.study.grid import load_grid
    >>> load_grid("paper").models
    ('gpt2', 'gpt2-medium', 'gpt2-large')
    """
    checks.path("name", name)
    if str(name) in GRIDS:
        path = Path(str(files("llvlit") / "data" / "grids" / f"{name}.toml"))
    elif isfile(name):
        path = Path(name)
    else:
        raise InputError(unknown_name("grid", name, GRIDS, hint="Or name a .toml file."))
    content = read_toml(path, "a grid")
    try:
        if "name" in content or "per_task" in content:
            raise InputError("name and per_task are no keys of a file; the file's name and [task.NAME] say them.")
        settings, per_task = _made(Settings, content.pop("settings", {}), "settings."), content.pop("task", {})
        tasks = content.get("tasks")
        _check_keys(per_task, tasks if isinstance(tasks, list) else per_task, "task.")
        return _made(Grid, {**content, "name": path.stem, "settings": settings, "per_task": per_task})
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def change_axes(grid: Grid, axes: Mapping[str, list[Any] | None]) -> Grid:
    """The grid with other models, tasks or seeds, where given; InputError as for a file."""
    given: dict[str, Any] = {key: value for key, value in axes.items() if value is not None}
    return replace(grid, **given)


def _made(kind: type[Kind], content: Any, prefix: str = "") -> Kind:
    """A table of a file as what it must be; InputError names the key, what came, what is expected."""
    declared = fields(kind)  # type: ignore[arg-type]
    _check_keys(content, [one.name for one in declared], prefix)
    for one in declared:
        if one.name not in content and one.default is MISSING and one.default_factory is MISSING:
            raise InputError(f"{prefix}{one.name} is lacking.")
    try:
        return kind(**content)
    except InputError as error:
        raise InputError(f"{prefix}{error}") from None


def _check_keys(content: Any, allowed: Collection[str], prefix: str) -> None:
    """InputError for what is no table, or has a key that is not known."""
    if not isinstance(content, Mapping):
        raise InputError(f"{prefix.rstrip('.')}={shown(content)} must be a table of keys.")
    for key in content:
        if key not in allowed:
            raise InputError(unknown_name("key", f"{prefix}{key}", [f"{prefix}{one}" for one in allowed]))


def _slug(name: str) -> str:
    """A name that can be part of a file's; a hash stands for what it cannot hold (local folders, other scripts)."""
    kind, _, bare = name.rpartition(":")
    is_path = bare.count("/") > 1 or bare.startswith((".", "/", "~")) or "\\" in bare or bare.endswith(FILES)
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(filter(None, [kind, *Path(bare).parts[-2:]]))).strip("-._")
    if is_path or len(slug) > 80 or not re.fullmatch(r"[A-Za-z0-9][\w./:-]*", name, re.ASCII):
        slug = f"{slug[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return slug.strip("-.")
