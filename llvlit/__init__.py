"""System identification of transformers: depth as time, one linear surrogate per layer, the cheapest push.

Each public name is imported when it is first used, so that ``llvlit --help`` does not wait for torch.

Every example of the reference starts from these lines:

>>> import numpy as np
>>> import torch
>>> import llvlit
>>> model = llvlit.load_model("embedded/small", device="cpu")
>>> task = llvlit.load_task("film-sentiment")
>>> splits = task.split(concept=20, operating=4, evaluation=4)
>>> directions = llvlit.concept_directions(model, splits.concept)
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llvlit.engine.depth import DepthSystem, depth_system
    from llvlit.engine.models import LanguageModel, load_model
    from llvlit.engine.oracle import ArchitectureCheck, check_architecture
    from llvlit.engine.tokens import tokenize
    from llvlit.method.agreement import Agreement, agreement
    from llvlit.method.concepts import Directions, concept_directions
    from llvlit.method.control import minimum_energy, schedules
    from llvlit.method.exchange import SteeringVectors, export_vectors, import_vectors
    from llvlit.method.feedback import FeedbackLaw, closed_loop, lqr
    from llvlit.method.fisher import FisherMetric, fisher_metric
    from llvlit.method.gain_matrix import GainMatrix, gain_matrix, noise_floor, realize
    from llvlit.method.gains import Gains, adjoint_gains, measured_gains
    from llvlit.method.identification import identify
    from llvlit.method.outputs import LogitReadout, TokenContrast
    from llvlit.method.recommendation import Recommendation, load_recommendation, recommend
    from llvlit.method.several_concepts import GainTensor, gain_tensor
    from llvlit.method.skipping import concept_effects, fit_layers, logit_effects, replace_layers
    from llvlit.method.steering import steer
    from llvlit.method.surrogate import LLV
    from llvlit.method.trust import TrustRadius, trust_radius
    from llvlit.method.verification import RequiredEnergy, required_energy
    from llvlit.prompts import Prompts
    from llvlit.tasks.splits import Splits
    from llvlit.tasks.task import Task, load_task

_MODULES = {
    "engine.depth": (
        "DepthSystem",
        "depth_system",
    ),
    "engine.models": (
        "LanguageModel",
        "load_model",
    ),
    "engine.oracle": (
        "ArchitectureCheck",
        "check_architecture",
    ),
    "engine.tokens": ("tokenize",),
    "method.concepts": (
        "Directions",
        "concept_directions",
    ),
    "method.control": (
        "minimum_energy",
        "schedules",
    ),
    "method.exchange": (
        "SteeringVectors",
        "export_vectors",
        "import_vectors",
    ),
    "method.feedback": (
        "FeedbackLaw",
        "closed_loop",
        "lqr",
    ),
    "method.agreement": (
        "Agreement",
        "agreement",
    ),
    "method.fisher": (
        "FisherMetric",
        "fisher_metric",
    ),
    "method.gain_matrix": (
        "GainMatrix",
        "gain_matrix",
        "noise_floor",
        "realize",
    ),
    "method.gains": (
        "Gains",
        "adjoint_gains",
        "measured_gains",
    ),
    "method.identification": ("identify",),
    "method.outputs": (
        "LogitReadout",
        "TokenContrast",
    ),
    "method.recommendation": (
        "Recommendation",
        "load_recommendation",
        "recommend",
    ),
    "method.several_concepts": (
        "GainTensor",
        "gain_tensor",
    ),
    "method.skipping": (
        "concept_effects",
        "fit_layers",
        "logit_effects",
        "replace_layers",
    ),
    "method.steering": ("steer",),
    "method.surrogate": ("LLV",),
    "method.trust": (
        "TrustRadius",
        "trust_radius",
    ),
    "method.verification": (
        "RequiredEnergy",
        "required_energy",
    ),
    "prompts": ("Prompts",),
    "tasks.splits": ("Splits",),
    "tasks.task": (
        "Task",
        "load_task",
    ),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "LLV",
    "Agreement",
    "ArchitectureCheck",
    "DepthSystem",
    "Directions",
    "FeedbackLaw",
    "FisherMetric",
    "GainMatrix",
    "GainTensor",
    "Gains",
    "LanguageModel",
    "LogitReadout",
    "Prompts",
    "Recommendation",
    "RequiredEnergy",
    "Splits",
    "SteeringVectors",
    "Task",
    "TokenContrast",
    "TrustRadius",
    "adjoint_gains",
    "agreement",
    "check_architecture",
    "closed_loop",
    "concept_directions",
    "concept_effects",
    "depth_system",
    "export_vectors",
    "fisher_metric",
    "fit_layers",
    "gain_matrix",
    "gain_tensor",
    "identify",
    "import_vectors",
    "load_model",
    "load_recommendation",
    "load_task",
    "logit_effects",
    "lqr",
    "measured_gains",
    "minimum_energy",
    "noise_floor",
    "realize",
    "recommend",
    "replace_layers",
    "required_energy",
    "schedules",
    "steer",
    "tokenize",
    "trust_radius",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("llvlit")
    if name in _HOMES:
        return getattr(import_module(f"llvlit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'llvlit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
