"""The folder that keeps a recommendation: safetensors, and a manifest that people can read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llvlit.errors import FileError
from llvlit.files import finish, load_tensors, read_bytes, read_json, replaced, save_tensors, write_json
from llvlit.method.concepts import Directions, borrowed_of
from llvlit.method.fisher import FisherMetric
from llvlit.method.gains import Gains
from llvlit.method.outputs import LogitReadout, Output, TokenContrast
from llvlit.method.plans import Plan, Prediction
from llvlit.provenance import environment

if TYPE_CHECKING:
    from llvlit.method.recommendation import Recommendation

KIND = "recommendation"


def write_plan(advice: Recommendation, folder: Path) -> None:
    """See :meth:`llvlit.Recommendation.save`."""
    plans = (advice.plan, *advice.alternatives)
    arrays = {
        "inputs": np.stack([plan.inputs for plan in plans]),
        "gains": advice.gains.per_prompt,
        "fisher": advice.fisher.per_prompt,
        "sizes": advice.sizes,
        "directions": advice.directions.vectors,
        "gaps": advice.directions.gaps,
        "chance_gaps": advice.directions.chance_gaps,
        "borrowed": advice.directions.borrowed.astype(np.uint8),
    }
    manifest = {
        "kind": KIND,
        "plans": [{"name": plan.name, "shift": vars(plan.shift), "kl": vars(plan.kl)} for plan in plans],
        "aim": advice.aim,
        "target": advice.target,
        "trust_radius": advice.trust_radius,
        "pairs": advice.gains.pairs,
        "directions": advice.directions.method,
        "positions": advice.positions,
        "horizon": advice.horizon,
        "site": "added to the residual stream before each layer",
        "hidden_size": int(advice.directions.vectors.shape[1]),
        "output": _output_parts(advice.output),
        "metadata": {**environment(), **advice.metadata},
        "layers": advice.layers,
        "in words": str(advice),
        "inputs": advice.inputs.tolist(),
    }
    with replaced(folder, KIND) as fresh:
        save_tensors(fresh / "plan.safetensors", arrays, manifest)
        write_json(fresh / "manifest.json", {**manifest, "sha256": _file_digest(fresh / "plan.safetensors")})
        finish(fresh, KIND)


def read_plan(folder: Path) -> dict[str, Any]:
    """Parts of the recommendation that a folder keeps; FileError if it was changed."""
    manifest = read_json(folder / "manifest.json", "a recommendation's manifest")
    tensors, header = load_tensors(folder / "plan.safetensors", kind=KIND)
    told = {key: value for key, value in header.items() if key != "format"}
    if manifest != {**told, "sha256": _file_digest(folder / "plan.safetensors")}:
        raise FileError(f"{folder}/manifest.json tells of another plan, or was changed. Make the recommendation again.")
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    plans = [
        Plan(each["name"], inputs, Prediction(**each["shift"]), Prediction(**each["kl"]))
        for each, inputs in zip(header["plans"], arrays["inputs"], strict=True)
    ]
    directions = Directions(
        tensors["directions"],
        arrays["gaps"],
        arrays["chance_gaps"],
        arrays["borrowed"].astype(bool),
        header["directions"],
    )
    metadata, pairs = header["metadata"], tuple(header["pairs"])
    about = {"borrowed": borrowed_of(directions, True), "metadata": metadata}
    return {
        "plan": plans[0],
        "alternatives": tuple(plans[1:]),
        "aim": header["aim"],
        "target": header["target"],
        "trust_radius": header["trust_radius"],
        "gains": Gains(arrays["gains"], "adjoint", 0.0, pairs, 1 / arrays["sizes"] ** 2, **about),
        "fisher": FisherMetric(arrays["fisher"], pairs, **about),
        "sizes": arrays["sizes"],
        "directions": directions,
        "positions": header["positions"],
        "horizon": header["horizon"],
        "output": _output_of(header["output"]),
        "metadata": metadata,
    }


def _file_digest(path: Path) -> str:
    return hashlib.sha256(read_bytes(path, "a plan")).hexdigest()


def _output_parts(output: Output | None) -> dict[str, Any] | None:
    return None if output is None else {"kind": type(output).__name__, **vars(output)}


def _output_of(parts: dict[str, Any] | None) -> Output | None:
    if parts is None:
        return None
    if parts["kind"] == "TokenContrast":
        options = {name: parts[name] for name in ("space", "first_tokens")}
        return TokenContrast(parts["positive"], parts["negative"], **options)
    return LogitReadout(dict(map(tuple, parts["weights"])))
