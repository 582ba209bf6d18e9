"""The public surface, read from the package and from the reference pages, and a right value for every argument.

A new public callable is fuzzed as soon as its arguments have names that are known here; else a test fails and says so.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import llvlit

PAGES = Path(__file__).resolve().parent.parent.parent / "book"
_ENTRY = re.compile(r"(?:auto(?:function|class):: |~)(llvlit(?:\.\w+)+)")

MADE = {
    *(
        "Agreement",
        "ArchitectureCheck",
        "ClosedLoop",
        "Decoupled",
        "DepthSystem",
        "FeedbackLaw",
        "FrozenLayer",
        "LanguageModel",
        "LayerEffects",
        "Optimum",
        "Plan",
        "Prediction",
        "Recommendation",
        "RequiredEnergy",
        "TokenizedPrompts",
    ),
    *("Trajectory", "Verification"),
}
"""Classes that calls return and nobody builds: their methods are fuzzed, not their constructors."""

INSTANCES = {
    "Agreement": "match",
    "Cell": "llvlit.study.grid.Grid('g', 'd', ('gpt2',), ('a',)).cells()[0]",
    "DepthSystem": "system",
    "Directions": "directions",
    "FeedbackLaw": "law",
    "FisherMetric": "fisher",
    "FrozenLayer": "system.layers[1]",
    "GainMatrix": "gain_matrix",
    "GainTensor": "tensor",
    "Gains": "gains",
    "Grid": "llvlit.study.grid.Grid('g', 'd', ('gpt2',), ('a',))",
    "LLV": "surrogate",
    "BookSettings": "llvlit.publishing.settings.BookSettings('p', ('m',), ('t',), 3, 2, 2)",
    "LogitReadout": "llvlit.LogitReadout({3: 1.0, 7: -1.0})",
    "Prompts": "prompts",
    "Recommendation": "advice",
    "RequiredEnergy": "required",
    "SteeringVectors": "steering",
    "Task": "task",
    "TokenContrast": "llvlit.TokenContrast(['g'], ['b'], space=False)",
    "TokenizedPrompts": "llvlit.engine.tokens.tokenize(model, prompts)",
    "TrustRadius": "llvlit.TrustRadius(*np.ones((3, 6)), 0.1, 0.5)",
}

FROM_RESULTS = (
    *("agreements", "families", "control_changes", "course", "setting_effects", "straightness", "paper_numbers"),
    *("sizes_table", "tasks_table", "energies_table", "agreement_table", "concepts_table", "orders_table"),
    *("settings_table", "sources_table"),
)
"""What is read from committed studies, which lie around ``start``."""

RIGHT = {
    "A": "surrogate.A",
    "C": "surrogate.C",
    "after": "'x'",
    "alt": "'a'",
    "amplitude": "0.1",
    "answer": "2.0",
    "apply": "matrix.mv",
    "axes": "axes()",
    "band": "False",
    "bar": "True",
    "bases": "surrogate.bases",
    "basis": "'reachability'",
    "before": "'y'",
    "borrowed": "(0,)",
    "bounds": "[[0.0, 0, 0], [1.0, 1, 1]]",
    "budget": "0.02",
    "by": "['model']",
    "candidates": "system.states[:, :1]",
    "caption": "'a'",
    "cell": "('model', 'task', 'seed')",
    "chance_gaps": "directions.chance_gaps",
    "chat": "False",
    "class_names": "('bad', 'good')",
    "color": "'black'",
    "column": "'predictor'",
    "concept": "3",
    "cotangents": "system.states[:, :1]",
    "coverage": "0.5",
    "data_dir": "None",
    "description": "'words'",
    "device": "'cpu'",
    "digits": "2",
    "direction": "directions.vectors[1]",
    "directions": "directions.vectors",
    "document": "{'model': 'm', 'task': 't', 'presets': [], 'strengths': [1.0], 'tolerance': 0.1}",
    "disturbance": "None",
    "dtype": "None",
    "equal_lengths": "False",
    "evaluation": "2",
    "expected": "lambda: 2.0",
    "factor": "0.5",
    "figure": "axes().figure",
    "first_tokens": "False",
    "fillstyle": "'full'",
    "final_norm": "False",
    "final_norms": "(False,)",
    "folder": "str(ROOT / 'results' / 'real')",
    "frame": "frame",
    "gains": "gains.mean",
    "gaps": "directions.gaps",
    "generator": "torch.Generator().manual_seed(0)",
    "groups": "None",
    "header": "['a', 'b']",
    "height": "2.0",
    "hint": "'Which layer?'",
    "horizon": "1",
    "hidden_size": "8",
    "index": "1",
    "indices": "np.array([0, 1])",
    "inputs": "shape",
    "jacobian": "'jvp'",
    "jacobians": "('jvp',)",
    "kind": "'measured'",
    "label": "'gain'",
    "labels": "np.array(prompts.labels)",
    "layer": "1",
    "law": "law",
    "layers": "'all'",
    "level": "0.9",
    "limit": "0.5",
    "limits": "(0.0, 1.0)",
    "linestyle": "'--'",
    "log": "False",
    "marker": "'o'",
    "max_tokens": "64",
    "matrix": "gain_matrix",
    "measured": "gains.mean",
    "metadata": "{}",
    "method": "'mean_difference'",
    "model": "model",
    "models": "('gpt2',)",
    "module": "model.module",
    "most_layers": "3",
    "most_steps": "30",
    "n_columns": "2",
    "n_layers": "4",
    "n_products": "1",
    "n_prompts": "3",
    "n_rows": "1",
    "n_states": "5",
    "name": "'mine'",
    "noise": "0.1",
    "number": "1",
    "operating": "2",
    "other": "surrogate",
    "outputs": "surrogate.outputs",
    "operators": "surrogate.A",
    "order": "4",
    "orders": "surrogate.orders",
    "overlaps": "tensor.overlaps",
    "output": "directions.vectors[-1]",
    "pairs": "None",
    "part": "model.layers[0]",
    "paper": "json.loads((ROOT / 'results' / 'paper.json').read_text())",
    "path": "'saved.safetensors'",
    "per_prompt": "gains.per_prompt",
    "per_task": "{'a': {'concept': 3}}",
    "positions": "'all'",
    "predicted": "surrogate.gains()",
    "previous_images": "matrix[:, :3]",
    "prompts": "prompts",
    "pushes": "[(directions, 0.1)]",
    "relative_tolerance": "0.01",
    "revision": "None",
    "row": "row",
    "rows": "[['a', 1.0]]",
    "second": "None",
    "seed": "1",
    "seeds": "(0,)",
    "negative": "['b']",
    "positive": "['g']",
    "shift": "None",
    "space": "False",
    "setpoints": "1.0",
    "settings": "llvlit.study.grid.Settings()",
    "floor": "1e-6",
    "format": "'gguf'",
    "missed": "{'measured': [0.5, 0.1]}",
    "shape": "shape",
    "shapes": "{'a': shape}",
    "shifted": "False",
    "sign": "'+'",
    "slope": "np.ones(6)",
    "source": "'here'",
    "start": "0",
    "starts": "llvlit.minimum_energy(gains, 0.1)[None]",
    "states": "states",
    "stop": "3",
    "stream": "False",
    "study": "'real'",
    "suffix": "' Well,'",
    "summary": "llvlit.study.tables.summarize(frame, ['model', 'predictor'], ['spearman']).assign(layers='all')",
    "system": "system",
    "tangents": "system.states[:, :1]",
    "surrogate": "surrogate",
    "target": "0.1",
    "targets": "[1.0, 0.0]",
    "task": "'film-sentiment'",
    "tasks": "('film-sentiment',)",
    "texts": "('a good film', 'a dull film')",
    "tightness": "10.0",
    "third": "np.zeros(6)",
    "title": "'a title'",
    "towards": "'positive'",
    "token_index": "2",
    "tokenizer": "model.tokenizer",
    "tokens_per_batch": "100",
    "tolerance": "1e-8",
    "tolerances": "(0.05,)",
    "types": "('bert',)",
    "value": "'x'",
    "values": "['x']",
    "vectors": "directions.vectors",
    "weights": "np.array([1.0, 2.0, 3.0, 4.0])",
    "where": "np.array([0, 1])",
    "width": "3.0",
    "replacements": "{1: None}",
    "x": "'layer'",
    "y": "'layer'",
    "predictions": "{'krylov': [1.0, 2, 3]}",
}
"""Source of a right value by an argument's name; :data:`OWN` where one callable means another thing by it."""

OWN = {
    "Cell.per_task": "{}",
    "Cell.model": "'gpt2'",
    "Cell.suffix": "None",
    "Directions.method": "'mean_difference'",
    "Directions.borrowed": "directions.borrowed",
    "DepthSystem.jvp.method": "'jvp'",
    "DepthSystem.propagate.inputs": "torch.zeros(4, 8)",
    "FrozenLayer.dense.method": "'jvp'",
    "FrozenLayer.jvp.method": "'jvp'",
    "GainTensor.borrowed": "tensor.borrowed",
    "GainTensor.energy.inputs": "np.ones((2, 4))",
    "GainTensor.load.path": "TENSOR_FILE",
    "GainTensor.pairs": "tensor.pairs",
    "GainTensor.per_prompt": "tensor.per_prompt",
    "GainTensor.shifts.inputs": "np.ones((2, 4))",
    "Gains.load.path": "GAINS_FILE",
    "Gains.pairs": "gains.pairs",
    "Gains.select.layers": "slice(1, None)",
    "FisherMetric.kl.inputs": "shape",
    "FisherMetric.load.path": "FISHER_FILE",
    "FisherMetric.pairs": "gains.pairs",
    "FisherMetric.per_prompt": "fisher.per_prompt",
    "Grid.tasks": "('a',)",
    "LogitReadout.weights": "{3: 1.0, 7: -1.0}",
    "Recommendation.export.model": "model",
    "Recommendation.export.path": "'push.gguf'",
    "Recommendation.export.format": "'gguf'",
    "Recommendation.verify.prompts": "others",
    "Recommendation.save.folder": "'plan'",
    "adjoint_gains.output": "None",
    "load_recommendation.folder": "PLAN_FOLDER",
    "measured_gains.output": "None",
    "recommend.layers": "(1, 3)",
    "gain_matrix.output": "None",
    "recommend.output": "None",
    "required_energy.output": "None",
    "trust_radius.output": "None",
    "output_shifts.source": "None",
    "recommend.positions": "'last'",
    "GainMatrix.from_state.first": "1",
    "GainMatrix.load.path": "MATRIX_FILE",
    "GainMatrix.pairs": "gains.pairs",
    "GainMatrix.per_prompt": "gain_matrix.per_prompt",
    "GainMatrix.borrowed": "(0,)",
    "GainMatrix.order.tolerance": "0.01",
    "GainMatrix.order_interval.tolerance": "0.01",
    "LLV.B": "surrogate.B",
    "LLV.load.path": "LLV_FILE",
    "LLV.outputs": "surrogate.outputs",
    "LLV.per_prompt_inputs": "surrogate.per_prompt_inputs",
    "gain_matrix.method": "'measured'",
    "realize.order": "2",
    "realize.tolerance": "0.01",
    "markov_parameters.inputs": "surrogate.B",
    "LLV.operators": "'mean'",
    "LLV.per_prompt": "surrogate.per_prompt",
    "LLV.truncate.order": "2",
    "Settings.choose.model": "'m'",
    "Settings.choose.task": "'t'",
    "Settings.split.task": "task",
    "Prompts.labels": "[1, 0]",
    "Prompts.suffix": "''",
    "Settings.amplitudes": "(0.1,)",
    "Settings.bases": "('krylov', 'random')",
    "Settings.directions": "('mean_difference',)",
    "Settings.energy_prompts": "0",
    "LLV.left_bases": "surrogate.left_bases",
    "Settings.operating_counts": "()",
    "Settings.operators": "('mean',)",
    "Settings.orders": "(4,)",
    "Splits.concept": "prompts",
    "Splits.evaluation": "prompts",
    "Splits.operating": "prompts",
    "SteeringVectors.model": "'gpt2'",
    "SteeringVectors.pushes": "steering.pushes",
    "Task.labels": "(1, 0)",
    "Task.suffix": "''",
    **{f"{name}.start": "ROOT" for name in FROM_RESULTS},
    "agreements.study": "'real'",
    "changes.before": "agreement_rows",
    "changes.after": "agreement_rows",
    "changes.on": "('task', 'seed')",
    "energies_table.metric": "'absolute'",
    "agreement_by_size.paper": "[{'parameters': 1e8, 'spearman': 0.8}]",
    "agreement_by_size.predictors": "['krylov']",
    "agreement_by_size.split": "0",
    "agreement_by_size.summary": (
        "agreement_rows[:1].assign(name='small', parameters=1e6, spearman_low=0.0, spearman_high=1.0)"
    ),
    "promises_kept.by": "'budget'",
    "promises_kept.trials": "__import__('pandas').read_csv(ROOT / 'results/recommend/warranty.csv')",
    "shares_of_oracle.choices": "__import__('pandas').read_csv(ROOT / 'results/recommend/choices.csv')",
    "slider_html.start": "'a'",
    "slider_html.texts": "{'a': ['one'], 'b': ['two', 'three']}",
    "verdicts.known": "['gpt2']",
    "verdicts.path": "ROOT / 'results/architectures.csv'",
    "straight_ranges.names": "{'small': 0}",
    "straight_ranges.radii": "llvlit.study.comparison.straightness(start=ROOT)",
    "ladder.split": "0",
    "ladder.steps": "{'krylov': 'krylov'}",
    "ladder.summary": "agreement_rows[:1].assign(name='small', relative_error_low=1.0, relative_error_high=2.0)",
    "label.model": "'embedded/small'",
    "shared.models": "('small',)",
    "shared.rows": "agreement_rows",
    "agreement_summary.values": "{'spearman': 'Spearman'}",
    "combined.directions": "several",
    "combined.inputs": "np.ones((2, 4))",
    "committed.start": "ROOT",
    "early_and_middle.first": "0",
    "energy_summary.summary": "energy_means",
    "BookSettings.choose.model": "'gpt2'",
    "explorer_html.story": "()",
    "export_explorer.directions": "directions",
    "export_explorer.openings": "['It was']",
    "export_explorer.splits": "splits",
    "export_explorer.strengths": "[-1.0, 1.0]",
    "export_explorer.tokens": "1",
    "export_vectors.path": "'saved.gguf'",
    "export_vectors.vectors": "steering",
    "gain_profile.bounds": "[[0.0, 0, 0], [3.0, 3, 3]]",
    "gain_profile.first": "0",
    "gain_profile.measured": "[1.0, 2.0, 3.0]",
    "gain_profile.predicted": "{'krylov': [1.0, 2, 3]}",
    "hankel_spectrum.singular_values": "gain_matrix.hankel_singular_values()",
    "gain_tensor.directions": "several",
    "gain_tensor.method": "'linear'",
    "heatmap.values": "np.eye(3)",
    "plan_profile.axes": "[axes(), axes()]",
    "plan_profile.efficiency": "[2.0, 3.0]",
    "plan_profile.pushes": "[0.1, 0.2]",
    "identify.operators": "'mean'",
    "import_vectors.source": "STEERING_FILE",
    "interval_line.rows": "frame.iloc[:2].assign(x_low=0.0, x_high=1.0)",
    "layer_axis.states": "False",
    "load_grid.name": "'embedded'",
    "load_model.name": "MODEL_FOLDER",
    "load_settings.profile": "'embedded'",
    "load_subject.name": "'untrained:' + MODEL_FOLDER",
    "load_task.name": "'film-sentiment'",
    "markov_parameters.output": "surrogate.C",
    "orthonormal_basis.vectors": "torch.eye(8)[:3]",
    "minimum_energy.layers": "(0, 2)",
    "output_shifts.inputs": "np.zeros((6, 1, 4))",
    "principal_basis.states": "states[:, 0]",
    "reachability_basis.direction": "matrix[0]",
    "krylov_basis.direction": "matrix[0]",
    "krylov_basis.start": "matrix[1]",
    "read_orders.start": "ROOT",
    "read_report.column": "'Model'",
    "read_report.name": "'optimum'",
    "read_report.start": "ROOT",
    "read_report.under": "''",
    "read_shares.start": "ROOT",
    "read_table.name": "'cells'",
    "short_name.model": "'embedded/small'",
    "show.name": "'fig'",
    "steer.inputs": "shape",
    "summarize_energies.frame": "energies",
    "TrustRadius.pairs": "gains.pairs",
    "TrustRadius.second": "np.ones(6)",
    "TrustRadius.tolerance": "0.1",
    "Trajectory.states": "states",
    "fit_layers.layers": "[1]",
    "LowOrderLayer.U": "np.eye(8)[:, :2]",
    "LowOrderLayer.V": "np.eye(8)[:, :2]",
    "LowOrderLayer.constant": "np.zeros(8)",
    "LowOrderLayer.mean": "np.zeros(8)",
}

UNDEFINED = {
    *(
        "agreement",
        "agreements",
        "changes",
        "control_changes",
        "families",
        "interval",
        "means",
        "paired",
        "required_energy",
        "row",
        "setting_effects",
        "shared",
        "summarize",
    ),
    *("summarize_energies", "table", "advance", "recommend", "scaled"),
}
"""Callables whose documentation says where NaN, or an infinite energy, is the answer."""

MAY_BE_NAN = {"Directions(gaps)", "advance(candidates)", "heatmap(values)", "minimum_energy(limit)"}
"""Arguments whose documentation says what NaN, or infinity, means."""

LIMITS = {  # least and largest value, bounds included
    "amplitude": (5e-324, None),
    "budget": (1e-8, None),
    "concept": (1, None),
    "coverage": (5e-324, 1 - 1e-12),
    "evaluation": (1, None),
    "horizon": (1, None),
    "index": (0, None),
    "layer": (0, None),
    "level": (1e-12, 1 - 1e-12),
    "limit": (0, None),
    "most_layers": (1, None),
    "most_steps": (1, None),
    "max_tokens": (1, None),
    "n_prompts": (1, None),
    "n_states": (1, None),
    "hidden_size": (1, None),
    "operating": (1, None),
    "order": (1, None),
    "relative_tolerance": (1e-300, 1),
    "start": (0, None),
    "tolerance": (0, None),
}

GENERIC = {
    **{
        "int": "int",
        "float": "float",
        "bool": "bool",
        "str": "str",
        "Path": "path",
        "PathLike": "path",
        "None": "none",
    },
    **{"ndarray": "array", "ArrayLike": "array", "Tensor": "tensor", "Sequence": "sequence", "Iterable": "sequence"},
    **{"tuple": "sequence", "list": "sequence", "Mapping": "mapping", "dict": "mapping", "Any": "any", "object": "any"},
    **{
        "Paper": "mapping",
        "Callable": "callable",
        "slice": "slice",
        "dtype": "dtype",
        "device": "str",
        "Literal": "str",
    },
    **{
        "Float": "array",
        "Float64": "array",
        "Int": "array",
        "Bool": "array",
        "Vectors": "array",
        "Collection": "sequence",
    },
}
ALIASES = {
    "DirectionsLike": {"Directions", "array", "tensor", "sequence"},
    "Replacements": {"mapping"},
    "Output": {"TokenContrast", "LogitReadout"},
}
KNOWN = {
    *(
        "LanguageModel",
        "Prompts",
        "TokenizedPrompts",
        "Directions",
        "Gains",
        "GainMatrix",
        "LLV",
        "FeedbackLaw",
        "Splits",
        "Task",
        "DepthSystem",
        "TokenContrast",
        "LogitReadout",
        "FisherMetric",
        "Reading",
        "Recommendation",
        "SteeringVectors",
    ),
    *("DataFrame", "Series", "Axes", "Figure", "Generator", "Settings", "Module", "ModuleList"),
    *("PreTrainedModel", "PreTrainedTokenizerBase", "FrozenLayer", "Grid", "Results", "Experiment"),
}


@dataclass(frozen=True)
class Argument:
    """One argument of a public callable."""

    name: str
    kinds: frozenset[str]
    right: str | None
    positional: bool
    required: bool


@dataclass(frozen=True)
class Callee:
    """A public callable: its name in the reference, how a call begins, and its arguments."""

    name: str
    source: str
    arguments: tuple[Argument, ...]

    @property
    def short(self) -> str:
        return self.name.rpartition(".")[2]

    def call(self, changed: dict[str, str] | None = None) -> str:
        """Source of a call with right values, some of them changed."""
        values = {one.name: one.right or "None" for one in self.arguments if one.required} | (changed or {})
        given = [
            values[one.name] if one.positional else f"{one.name}={values[one.name]}"
            for one in self.arguments
            if one.name in values
        ]
        return f"{self.source}({', '.join(given)})"


def kinds_of(annotation: Any) -> frozenset[str]:
    """Kinds of value that an annotation allows; a name that is not known stays as it is."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    while "[" in text:
        text, n = re.subn(r"\[[^\[\]]*\]", "", text)
        if not n:
            break
    names = [part.strip().strip("'\"").rpartition(".")[2] for part in text.split("|")]
    kinds = set().union(*(ALIASES.get(name, {GENERIC.get(name, name)}) for name in names))
    return frozenset(kinds | ({"array", "tensor"} if kinds & {"array", "tensor"} else set()))


def _by_suffix(table: dict[str, str], name: str) -> str | None:
    """Entry under the longest end of a dotted name; an argument's own name alone is none."""
    parts = name.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    return next((table[end] for end in ends if end in table), None)


def _evaluated(annotation: Any, function: Any) -> Any:
    """What an annotation names, if that says more than the annotation."""
    names = getattr(inspect.unwrap(function), "__globals__", None) or vars(import_module(function.__module__))
    try:
        named = eval(annotation, names) if isinstance(annotation, str) else annotation
    except NameError:
        return annotation
    return named if get_origin(named) is Annotated else annotation


def _arguments(name: str, value: Any, *, bound: bool) -> tuple[Argument, ...]:
    found = list(inspect.signature(value).parameters.values())[1 if bound else 0 :]
    arguments, after_gap = [], False
    for one in found:
        if one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL):
            continue
        right = _by_suffix(OWN, f"{name}.{one.name}") or RIGHT.get(one.name)
        needed = one.default is one.empty
        after_gap |= not needed
        positional = one.kind is not one.KEYWORD_ONLY and needed and not after_gap
        arguments.append(Argument(one.name, kinds_of(_evaluated(one.annotation, value)), right, positional, needed))
    return tuple(arguments)


def public() -> dict[str, Any]:
    """Every public name of the package and of the reference pages, with its object."""
    names = {f"llvlit.{name}" for name in llvlit.__all__}
    for page in sorted(PAGES.glob("api*.md")):
        names |= set(_ENTRY.findall(page.read_text(encoding="utf-8")))
    found = {}
    for name in sorted(names):
        module, _, attribute = name.rpartition(".")
        value = getattr(import_module(module), attribute)
        if callable(value) and not (inspect.isclass(value) and issubclass(value, BaseException)):
            found[name] = value
    return found


def callees() -> list[Callee]:
    """Every public callable: functions, constructors, methods."""
    found = []
    for name, value in public().items():
        short = name.rpartition(".")[2]
        if not inspect.isclass(value):
            found.append(Callee(name, name, _arguments(name, value, bound=False)))
            continue
        if short not in MADE:
            found.append(Callee(name, name, _arguments(name, value, bound=False)))
        for method, own in vars(value).items():
            if method.startswith("_") or not (inspect.isfunction(own) or isinstance(own, classmethod)):
                continue
            is_method = inspect.isfunction(own)
            source = f"{_by_suffix(INSTANCES, name) or '?'}.{method}" if is_method else f"{name}.{method}"
            called = own if is_method else getattr(value, method)
            found.append(Callee(f"{name}.{method}", source, _arguments(f"{name}.{method}", called, bound=is_method)))
    return found


def words(callee: Callee) -> tuple[str, ...]:
    """Names by which an error may tell an argument: its own, or another with which it does not go together."""
    return (*(one.name for one in callee.arguments), "layer", "name", "directions", "file", "folder")


def unknown(callee: Callee) -> list[str]:
    """Arguments, or the instance, that no strategy is known for."""
    lacking = [f"an instance in INSTANCES for {callee.name}"] if callee.source.startswith("?") else []
    for one in callee.arguments:
        if one.right is None:
            lacking.append(f"a right value in RIGHT for {one.name} of {callee.name}")
        lacking += [
            f"the kind {kind} of {one.name} of {callee.name}" for kind in one.kinds - set(GENERIC.values()) - KNOWN
        ]
    return lacking


ORACLES = {
    "minimum_energy": "np.isclose(np.asarray({gains}, float) @ result, float({target}), rtol=1e-6, atol=0)",
    "schedules": "all(np.isclose(energy(u, weights={weights}), 1, rtol=1e-6) for u in result.values())",
    "measured_gains": "close_to_linear(result, {prompts}, {directions}, {amplitude}, {max_tokens}, {final_norm})",
    "required_energy": "{relative_tolerance} > 0.02 or reached(result)",
    "orthonormal_basis": "orthonormal(*result)",
    "krylov_basis": "orthonormal(*result[:2])",
    "reachability_basis": "orthonormal(*result)",
    "principal_basis": "orthonormal(*result)",
    "random_basis": "orthonormal(*result)",
    "random_directions": "units(result)",
    "concept_directions": "units(result.vectors)",
    "directions_of_states": "units(result.vectors)",
    "separation": "((0 <= result) & (result <= 1)).all()",
    "energy": "result >= 0",
    "relative_weights": "(result > 0).all()",
    "interval": "isinstance(result, str) or (result[0] <= result[1]).all()",
}
"""What holds of a result, by the callable's name; ``{argument}`` stands for its source."""


def oracle(callee: Callee, values: dict[str, str], names: dict[str, Any]) -> Callable[[Any], str] | None:
    """What a result must fulfil, as a function that complains."""
    if callee.short not in ORACLES:
        return None
    condition = ORACLES[callee.short].format(**values)

    def complaint(result: Any) -> str:
        return "" if eval(condition, {**names, "result": result}) else f"not true: {condition}"

    return complaint
