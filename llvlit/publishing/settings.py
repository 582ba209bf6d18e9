"""Settings of the book: which models, tasks and sizes the chapters run with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llvlit import checks
from llvlit.engine.models import embedded_names
from llvlit.errors import InputError, unknown_name
from llvlit.study.grid import load_grid
from llvlit.tasks.grammars import EMBEDDED_TASKS
from llvlit.tasks.splits import Splits
from llvlit.tasks.task import Task, load_task

RUNNING = (0, 1)
"""Positions in the evaluation split of the prompt that all chapters follow, and of its twin of the other class."""


@dataclass(frozen=True)
class BookSettings:
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
    >>> from llvlit.publishing.settings import load_settings
    >>> settings = load_settings("embedded")
    >>> len(settings.split("film-sentiment").evaluation) == 2 * settings.evaluation
    True
    """

    name: str
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    concept: int = 200
    operating: int = 100
    evaluation: int = 100
    order: int = 32
    amplitude: float = 0.1

    def __post_init__(self) -> None:
        checks.text("name", self.name)
        for argument in ("models", "tasks"):
            names = checks.instance(argument, getattr(self, argument), tuple, "a tuple of names")
            for name in names:
                checks.text(argument, name)
        for argument in ("concept", "operating", "evaluation", "order"):
            object.__setattr__(self, argument, checks.integer(argument, getattr(self, argument), at_least=1))
        object.__setattr__(self, "amplitude", checks.number("amplitude", self.amplitude, above=0))

    @property
    def as_written(self) -> bool:
        """Whether this is the run that the book's sentences speak of; its conclusions are asserted there alone.

        Examples
        --------
        >>> from llvlit.publishing.settings import WRITTEN, load_settings
        >>> load_settings(WRITTEN).as_written, load_settings("embedded").as_written
        (True, False)
        """
        return self == load_settings(WRITTEN)

    def split(self, task: str | Task, *, seed: int = 0) -> Splits:
        """The splits of a task in these sizes."""
        loaded = load_task(task) if isinstance(task, str) else checks.instance("task", task, Task, "a task or its name")
        return loaded.split(concept=self.concept, operating=self.operating, evaluation=self.evaluation, seed=seed)

    def choose(self, *, model: str | None = None, task: str | None = None, order: int | None = None) -> BookSettings:
        """The settings with another model, task or order where a chapter takes its own; None changes nothing.

        Parameters
        ----------
        model
            Becomes the last: larger ones of the settings are left out, and one from outside is added.
        task
            Becomes the first.
        order
            d of the surrogates, at least 1.

        Raises
        ------
        InputError
            If the order is not a whole number of at least 1.  Unknown names are refused where they are loaded.
        """
        models, tasks = self.models, self.tasks
        if model is not None:
            model = checks.text("model", model, may_be_empty=False)
            models = models[: models.index(model) + 1] if model in models else (*models, model)
        if task is not None:
            task = checks.text("task", task, may_be_empty=False)
            tasks = (task, *(other for other in tasks if other != task))
        return replace(self, models=models, tasks=tasks, order=self.order if order is None else order)


SETTINGS = ("embedded", "pretrained", "paper")
WRITTEN = "pretrained"
"""The profile that the book's sentences speak of, and that a build takes unless told otherwise."""


def load_settings(profile: str) -> BookSettings:
    """Settings of a profile by its name, or of a local folder of models in the hub's format.

    ``pretrained`` takes SmolLM2-135M on the embedded tasks, from a package (see :func:`llvlit.load_model`);
    ``embedded`` runs anywhere; ``paper`` takes gpt2, gpt2-medium, gpt2-large and ten data sets from the hub, at the
    paper's sizes; a folder's models run on the embedded tasks.

    Raises
    ------
    InputError
        If there is no such profile.

    Examples
    --------
    >>> from llvlit.publishing.settings import load_settings
    >>> load_settings("embedded").models[-1]
    'embedded/large'
    """
    profile = checks.text("profile", profile)
    if profile == "embedded":
        return BookSettings(profile, embedded_names(), EMBEDDED_TASKS)
    if profile == "pretrained":
        return BookSettings(profile, ("smollm2-135m",), EMBEDDED_TASKS, concept=100, operating=30, evaluation=30)
    if profile == "paper":
        paper = load_grid("paper")
        sizes = paper.settings
        return BookSettings(
            profile, paper.models, paper.tasks, sizes.concept, sizes.operating, sizes.evaluation, order=sizes.orders[-1]
        )
    folder = checks.path("profile", profile)
    if not folder.is_dir():
        raise InputError(unknown_name("profile", profile, SETTINGS, hint="Or name a folder of models."))
    weights = {
        str(config.parent): sum(file.stat().st_size for file in config.parent.glob("*.safetensors"))
        for config in sorted(folder.glob("*/config.json"))
    }
    if not weights:
        raise InputError(f"profile={profile!r} holds no model: no subfolder has a config.json.")
    return BookSettings(profile, tuple(sorted(weights, key=weights.__getitem__)), EMBEDDED_TASKS)
