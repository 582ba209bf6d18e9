"""Steering vectors for other runtimes: read by others, they push as ours do; what cannot be said or read is told."""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import tiny_model
from llvlit import SteeringVectors, export_vectors, import_vectors, steer
from llvlit.engine.models import PACKAGED, LanguageModel, load_model
from llvlit.errors import FileError, InputError, LlvlitError
from llvlit.method.exchange import FORMATS

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

ROUNDED = 1e-10
"""Pushes that float32 holds, in float64: a norm taken off and put on again, through a few layers."""


def pushes(model: LanguageModel, *layers: int, size: float = 1.0) -> np.ndarray:
    """Random pushes before some layers, in numbers that float32 holds."""
    rows = np.zeros((model.n_layers, model.hidden_size), dtype=np.float32)
    rows[list(layers)] = size * np.random.default_rng(3).standard_normal((len(layers), model.hidden_size))
    return rows.astype(np.float64)


def logits(model: LanguageModel, text: str = "the plot was thin, and") -> torch.Tensor:
    with torch.no_grad():
        return model.module(**model.tokenizer(text, return_tensors="pt")).logits


def steered(model: LanguageModel, vectors: SteeringVectors) -> torch.Tensor:
    with steer(model, vectors.directions, vectors.inputs, positions=vectors.positions):
        return logits(model)


def applied(model: LanguageModel, blocks: dict[int, np.ndarray], *, last: bool = False) -> torch.Tensor:
    """Logits with vectors added to what blocks give, by hooks that know nothing of llvlit's."""

    def added(vector: np.ndarray) -> Callable:
        def hook(module, args, output):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[:, -1 if last else slice(None)] += torch.tensor(vector, dtype=hidden.dtype)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    with ExitStack() as stack:
        for block, vector in blocks.items():
            stack.callback(model.layers[block].register_forward_hook(added(vector)).remove)
        return logits(model)


def in_gguf(path: Path) -> dict[int, np.ndarray]:
    return {int(each.name.split(".")[1]): np.array(each.data) for each in gguf.GGUFReader(path).tensors}


def in_spec(path: Path) -> dict[int, np.ndarray]:
    (vector,) = json.loads(path.read_text())["vectors"]
    stored = {int(name.split(".")[1]): each["data"] for name, each in vector["data"]["tensors"].items()}
    return {block: np.frombuffer(base64.b64decode(stored[block]), np.float32) for block in vector["layers"]}


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma3_text"])
def test_logits_are_those_of_an_independent_reader(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    late = SteeringVectors(pushes(model, 2, 3), "all", model_type)
    early = SteeringVectors(pushes(model, 1, 3), "all", model_type)
    last = SteeringVectors(pushes(model, 1, 3), "last", model_type)
    export_vectors(late, tmp_path / "a.gguf")
    export_vectors(early, tmp_path / "b.gguf", format="repeng")
    export_vectors(late, tmp_path / "c.json", format="easysteer")
    export_vectors(last, tmp_path / "d.json", format="easysteer")
    plain = logits(model)
    for vectors, theirs in (
        (late, applied(model, in_gguf(tmp_path / "a.gguf"))),
        (early, applied(model, in_gguf(tmp_path / "b.gguf"))),
        (early, applied(model, early.control_vector()["directions"])),
        (late, applied(model, in_spec(tmp_path / "c.json"))),
        (last, applied(model, in_spec(tmp_path / "d.json"), last=True)),
    ):
        ours = steered(model, vectors)
        assert (ours - plain).abs().max() > 0.1
        assert torch.allclose(ours, theirs, rtol=ROUNDED, atol=ROUNDED)
        assert torch.equal(logits(model), plain)


@pytest.mark.skipif(PACKAGED["smollm2-135m"].file is None, reason=PACKAGED["smollm2-135m"].remedy)
def test_logits_of_smollm2_are_those_of_an_independent_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLVLIT_CACHE", raising=False)
    model = load_model("smollm2-135m", device="cpu")
    vectors = SteeringVectors(pushes(model, *range(2, 30), size=0.3), "all", "llama")
    export_vectors(vectors, tmp_path / "a.gguf")
    plain, ours = logits(model), steered(model, vectors)
    assert (ours - plain).norm() > 0.1 * plain.norm()
    assert (ours - applied(model, in_gguf(tmp_path / "a.gguf"))).norm() < 1e-5 * plain.norm()  # float32, 30 layers


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_is_read_again(gpt2: LanguageModel, format: str, tmp_path: Path) -> None:
    layers = (2,) if format == "gguf" else (1, 2)
    positions = "last" if format == "easysteer" else "all"
    vectors = SteeringVectors(pushes(gpt2, *layers), positions, "gpt2", {"kl": 0.2, "näme": ["é"]})
    path = tmp_path / "new folder" / "vectors"
    export_vectors(vectors, path, format=format)
    export_vectors(vectors, str(path), format=format)  # over its own
    again = import_vectors(path)
    assert np.array_equal(again.pushes, vectors.pushes)
    assert (again.positions, again.model) == (positions, "gpt2")
    assert again.metadata == ({} if format == "easysteer" else vectors.metadata)
    assert [each.name for each in path.parent.iterdir()] == ["vectors"]


def test_the_file_is_what_llama_cpp_asks_for(gpt2: LanguageModel, tmp_path: Path) -> None:
    export_vectors(SteeringVectors(pushes(gpt2, 2)), tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "unknown"
    export_vectors(SteeringVectors(pushes(gpt2, 2), model="gemma3_text"), tmp_path / "b.gguf")
    assert import_vectors(tmp_path / "b.gguf").model == "gemma3"  # as llama.cpp names it
    with pytest.raises(InputError, match=r"use plan.export\(path\)"):
        export_vectors(None, tmp_path / "c.gguf")  # type: ignore[arg-type]
    count = reader.get_field("controlvector.layer_count")
    assert (count.types, count.contents()) == ([gguf.GGUFValueType.UINT32], gpt2.n_layers - 1)
    assert [each.name for each in reader.tensors] == ["direction.1", "direction.2", "direction.3"]
    assert {each.tensor_type for each in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    assert [tuple(each.shape) for each in reader.tensors] == [(gpt2.hidden_size,)] * 3


def test_repengs_object_goes_both_ways(gpt2: LanguageModel) -> None:
    class ControlVector:
        def __init__(self, model_type: str, directions: dict[int, np.ndarray]) -> None:
            self.model_type, self.directions = model_type, directions

    vectors = SteeringVectors(pushes(gpt2, 1, 3), "all", "gpt2")
    theirs = ControlVector(**vectors.control_vector())
    assert {each.dtype for each in theirs.directions.values()} == {np.dtype(np.float32)}
    for source in (theirs, vars(theirs)):
        again = import_vectors(source)
        assert np.array_equal(again.pushes, vectors.pushes) and again.model == "gpt2"


@pytest.mark.parametrize(
    "layers, positions, format, named",
    [
        ((0, 1, 3), "all", "gguf", r"before layer 0, 1 .*layers=\(2, 3\), positions='all'"),
        ((0, 1, 3), "all", "repeng", r"before layer 0 .*layers=\(1, 3\)"),
        ((0, 1, 3), "last", "easysteer", r"before layer 0 .*layers=\(1, 3\), positions='last'"),
        ((2, 3), "last", "gguf", r"positions='last' .*positions='all'"),
        ((2, 3), "last", "repeng", r"positions='last' .*positions='all'"),
        ((), "all", "gguf", "zeros alone"),
        ((2, 3), "all", "ggfu", "Did you mean 'gguf'"),
    ],
)
def test_what_a_format_cannot_say_is_refused(gpt2: LanguageModel, layers, positions, format, named, tmp_path) -> None:
    vectors = SteeringVectors(pushes(gpt2, *layers), positions)
    with pytest.raises(InputError, match=named):
        export_vectors(vectors, tmp_path / "a", format=format)
    if format == "repeng":
        with pytest.raises(InputError, match=named):
            vectors.control_vector()
    assert not list(tmp_path.iterdir())


def test_numbers_beyond_float32_and_metadata_beyond_json_are_refused(gpt2: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="beyond float32"):
        export_vectors(SteeringVectors(pushes(gpt2, 2, size=1e37) * 1e5), tmp_path / "a.gguf")
    with pytest.raises(InputError, match="not finite"):
        SteeringVectors(pushes(gpt2, 2) * np.nan)
    with pytest.raises(InputError, match="metadata"):
        SteeringVectors(pushes(gpt2, 2), metadata={"kl": np.nan})
    tiny = SteeringVectors(pushes(gpt2, 2) * 1e-200)
    assert np.allclose(np.linalg.norm(tiny.directions, axis=1), 1)
    assert np.allclose(tiny.inputs[:-1, None] * tiny.directions[:-2], tiny.pushes[:-1], atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_a_push_that_vanishes_in_float32_is_refused(gpt2: LanguageModel, format: str, tmp_path: Path) -> None:
    both = pushes(gpt2, 2, 3)
    for size in (1e-50, 1e-41):  # nothing, or a number of few digits
        both[3] *= size / np.abs(both[3]).max()
        with pytest.raises(InputError, match=r"before layer 3 reaches .* below float32"):
            export_vectors(SteeringVectors(both), tmp_path / "a", format=format)
    with pytest.raises(InputError, match="below float32"):
        SteeringVectors(both).control_vector()
    assert not list(tmp_path.iterdir())


def test_other_files_are_not_written_over(gpt2: LanguageModel, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    write_vector(model, {1: np.ones(8)}, architecture="llama")
    (tmp_path / "notes.json").write_text('{"a": 1}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    vectors = SteeringVectors(pushes(gpt2, 2))
    for name in ("model.gguf", "notes.json", "folder"):
        before = (tmp_path / name).read_bytes() if name != "folder" else b""
        with pytest.raises(FileError, match=name):
            export_vectors(vectors, tmp_path / name)
        assert name == "folder" or (tmp_path / name).read_bytes() == before
    export_vectors(vectors, tmp_path / "empty")


def write_vector(
    path: Path, blocks: dict, *, architecture: str = "controlvector", signed: bool = False, count: int | None = None
) -> Path:
    """A control vector, or what looks like one, written with the package gguf alone."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    (writer.add_int32 if signed else writer.add_uint32)("controlvector.layer_count", count or len(blocks))
    for block, vector in blocks.items():
        writer.add_tensor(block if isinstance(block, str) else f"direction.{block}", np.float32(vector))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_numbers_of_llama_cpps_generator_are_one_too_high(gpt2: LanguageModel, tmp_path: Path) -> None:
    """Differences of states between two prompts, which the generator calls by the number of the next block."""
    with torch.no_grad():
        states = [
            gpt2.module(**gpt2.tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
            for text in ("good", "dull")
        ]
    outputs = [(good - dull)[0, -1].numpy() for good, dull in zip(states[0][1:], states[1][1:], strict=True)]
    named = {block + 1: output for block, output in enumerate(outputs[:-1])}
    path = write_vector(tmp_path / "a.gguf", named, signed=True)
    with pytest.warns(UserWarning, match="one higher .*shifted=True"), pytest.warns(UserWarning, match="left out"):
        as_it_acts = import_vectors(path)
    assert np.array_equal(as_it_acts.pushes[2], np.float32(outputs[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        where_measured = import_vectors(path, shifted=True)
    for layer in range(1, 4):  # the state before a layer is the output of the block before it
        assert np.array_equal(where_measured.pushes[layer], np.float32(outputs[layer - 1]))


def test_the_number_of_layers_is_asked_for_where_it_cannot_be_told(tmp_path: Path) -> None:
    some = write_vector(tmp_path / "some.gguf", {3: np.ones(8), 5: np.ones(8)})
    with pytest.raises(InputError, match="Pass n_layers"):
        import_vectors(some)
    with pytest.raises(InputError, match=r"n_layers=5, but .*block 5"):
        import_vectors(some, n_layers=5)
    assert np.flatnonzero(import_vectors(some, n_layers=12).inputs).tolist() == [4, 6]
    every = write_vector(tmp_path / "every.gguf", dict.fromkeys(range(1, 4), np.ones(8)))
    with pytest.warns(UserWarning, match="after the last of 4 layers"):
        assert np.flatnonzero(import_vectors(every).inputs).tolist() == [2, 3]


def test_a_vector_of_another_width_is_refused_by_the_model(gpt2: LanguageModel, tmp_path: Path) -> None:
    vectors = import_vectors(write_vector(tmp_path / "a.gguf", {1: np.ones(8), 3: np.zeros(8)}), n_layers=4)
    with pytest.raises(InputError, match=r"\(5, 8\).*\(5, 24\)"), steer(gpt2, vectors.directions, vectors.inputs):
        pass


@pytest.mark.parametrize(
    "blocks, named",
    [
        ({1: [1.0, np.nan]}, "not finite"),
        ({1: [1.0, 2.0], 2: [1.0, 2.0, 3.0]}, "one width"),
        ({1: np.ones((2, 2))}, "one-dimensional"),
        ({"direction.x": np.ones(2)}, "direction.N"),
        ({"direction.-1": np.ones(2)}, "direction.N"),
        ({"direction.99999": np.ones(2)}, "direction.N"),
        ({"blk.0.weight": np.ones(2)}, "direction.N"),
        ({}, "it is empty"),
    ],
)
def test_what_is_no_control_vector_is_refused(blocks: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=named):
        import_vectors(write_vector(tmp_path / "a.gguf", blocks, count=1))


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, content in {
        "text": b"hello",
        "empty": b"",
        "list": b"[]",
        "spec": b'{"vectors": []}',
        "a": b"GGUF",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileError, match=name):
            import_vectors(tmp_path / name)
    for name in ("none", "."):
        with pytest.raises(FileError, match="no file"):
            import_vectors(tmp_path / name)
    with pytest.raises(FileError, match="architecture is 'llama'"):
        import_vectors(write_vector(tmp_path / "model.gguf", {1: np.ones(8)}, architecture="llama"))
    for source in (
        3,
        {"directions": {}},
        {"model_type": "a", "directions": {}},
        {"model_type": 1, "directions": {1: [1]}},
    ):
        with pytest.raises(InputError, match="source"):
            import_vectors(source)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"algorithm": "erase"}, "no push"),
        ({"normalize": True}, "no push"),
        ({"source": "a.gguf", "data": None}, "Import that file"),
        ({"apply": {"generation": "all"}}, "tokens that steer does not"),
        ({"scale": "much"}, "scale"),
        ({"scale": 1e999}, "scale"),
        ({"data": {"version": 2, "kind": "direction"}}, "version 2"),
        ({"data": {}}, "cannot be read"),
        ({"name": 3}, "name"),
    ],
)
def test_a_spec_that_does_not_push_is_refused(gpt2: LanguageModel, changes: dict, named: str, tmp_path: Path) -> None:
    export_vectors(SteeringVectors(pushes(gpt2, 2)), tmp_path / "a.json", format="easysteer")
    spec = json.loads((tmp_path / "a.json").read_text())
    spec["vectors"][0].update(changes)
    (tmp_path / "a.json").write_text(json.dumps(spec))
    with pytest.raises(FileError, match=named):
        import_vectors(tmp_path / "a.json")


def test_a_spec_is_scaled_and_acts_on_its_layers_alone(gpt2: LanguageModel, tmp_path: Path) -> None:
    vectors = SteeringVectors(pushes(gpt2, 1, 2, 3))
    export_vectors(vectors, tmp_path / "a.json", format="easysteer")
    spec = json.loads((tmp_path / "a.json").read_text())
    spec["vectors"][0].update(scale=-0.5, layers=[1])
    (tmp_path / "a.json").write_text(json.dumps(spec))
    expected = np.zeros_like(vectors.pushes)
    expected[2] = -0.5 * vectors.pushes[2]
    assert np.array_equal(import_vectors(tmp_path / "a.json").pushes, expected)
    spec["vectors"][0]["data"]["tensors"]["layer.1"]["data"] = base64.b64encode(np.ones(24, np.float32)).decode()
    (tmp_path / "a.json").write_text(json.dumps(spec))
    with pytest.raises(FileError, match="checksum"):
        import_vectors(tmp_path / "a.json")


@pytest.mark.parametrize("format", ["gguf", "easysteer"])
@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
@pytest.mark.filterwarnings("ignore:.*one higher:UserWarning")
def test_a_file_cut_short_or_damaged_is_refused_or_finite(gpt2: LanguageModel, format: str, tmp_path: Path) -> None:
    export_vectors(SteeringVectors(pushes(gpt2, 2), metadata={"a": 1}), tmp_path / "whole", format=format)
    content, path = (tmp_path / "whole").read_bytes(), tmp_path / "damaged"
    for size in range(0, len(content) - 2, 7):
        path.write_bytes(content[:size])
        with pytest.raises(FileError):
            import_vectors(path)
    bits = np.random.default_rng(0).integers(8 * min(len(content), 400), size=300)
    for bit in bits.tolist():
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with suppress(LlvlitError):
            assert np.isfinite(import_vectors(path).pushes).all()
