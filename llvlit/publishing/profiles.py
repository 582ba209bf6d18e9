"""Profiles: which models, tasks and sizes the chapters run with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llvlit.engine.models import embedded_names
from llvlit.errors import InputError, unknown_name
from llvlit.study.grid import load_grid
from llvlit.tasks.grammars import EMBEDDED_TASKS
from llvlit.tasks.task import Splits, Task, load_task

RUNNING = (0, 1)
"""Positions in the evaluation split of the prompt that all chapters follow, and of its twin of the other class."""


@dataclass(frozen=True)
class Profile:
    """What an execution of the book uses.

    Attributes
    ----------
    models : tuple of str
        Smallest first; a chapter on one model takes the last.
    tasks : tuple of str
        A chapter on one task takes the first.
    concept, operating, evaluation : int
        Prompts per class of each split.
    order : int
        d of the surrogates.

    Examples
    --------
    >>> from llvlit.publishing.profiles import load_profile
    >>> profile = load_profile("embedded")
    >>> len(profile.split("film-sentiment").evaluation) == 2 * profile.evaluation
    True
    """

    name: str
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    concept: int
    operating: int
    evaluation: int
    order: int = 32
    amplitude: float = 0.1

    def split(self, task: str | Task, *, seed: int = 0) -> Splits:
        """The profile's splits of a task."""
        loaded = load_task(task) if isinstance(task, str) else task
        return loaded.split(concept=self.concept, operating=self.operating, evaluation=self.evaluation, seed=seed)

    def choose(self, *, model: str | None = None, task: str | None = None, order: int | None = None) -> Profile:
        """The profile with another model, task or order where a chapter takes its own; None changes nothing.

        Parameters
        ----------
        model
            Becomes the last: larger ones of the profile are left out, and one from outside is added.
        task
            Becomes the first.
        order
            d of the surrogates, at least 1.

        Raises
        ------
        InputError
            If the order is not a whole number of at least 1.  Unknown names are refused where they are loaded.
        """
        if order is not None and (isinstance(order, bool) or not isinstance(order, int) or order < 1):
            raise InputError(f"order={order!r} is not a whole number of at least 1. Pass d, such as 32, or None.")
        models, tasks = self.models, self.tasks
        if model is not None:
            models = models[: models.index(model) + 1] if model in models else (*models, model)
        if task is not None:
            tasks = (task, *(other for other in tasks if other != task))
        return replace(self, models=models, tasks=tasks, order=self.order if order is None else order)


PROFILES = ("embedded", "paper")


def load_profile(name: str) -> Profile:
    """Profile by name, or of a local folder of models in the hub's format.

    ``embedded`` runs anywhere; ``paper`` takes gpt2, gpt2-medium, gpt2-large and ten data sets from the hub,
    at the paper's sizes; a folder's models run on the embedded tasks.

    Raises
    ------
    InputError
        If there is no such profile.

    Examples
    --------
    >>> from llvlit.publishing.profiles import load_profile
    >>> load_profile("embedded").models[-1]
    'embedded/large'
    """
    if name == "embedded":
        return Profile(name, embedded_names(), EMBEDDED_TASKS, concept=200, operating=100, evaluation=100)
    if name == "paper":
        paper = load_grid("paper")
        sizes = paper.settings
        return Profile(
            name, paper.models, paper.tasks, sizes.concept, sizes.operating, sizes.evaluation, order=sizes.orders[-1]
        )
    if not Path(name).is_dir():
        raise InputError(unknown_name("profile", name, PROFILES, hint="Or name a folder of models."))
    models_found = sorted(Path(name).glob("*/config.json"), key=_size)
    if not models_found:
        raise InputError(f"profile={name!r} holds no model: no subfolder has a config.json.")
    paths = tuple(str(path.parent) for path in models_found)
    return Profile(name, paths, EMBEDDED_TASKS, concept=200, operating=100, evaluation=100)


def _size(config: Path) -> int:
    return sum(path.stat().st_size for path in config.parent.glob("*.safetensors"))
