"""Speed and memory of the engine, as ratios measured side by side in one process: ``python benchmarks/engine.py``.

Three questions, on a random model of GPT-2-small's shape, 8 prompts of 64 tokens, two threads:

1. What does the measured gain profile of all layers cost, in plain batched forward passes of the same prompts?
   Counted: every layer sees each prompt's 64 tokens, and 2 (l + 1) pushed states; 1 + (L + 1) / 64 = 1.20.
2. What fraction of the machine's own float32 matrix-product rate do the JVPs of 32 directions reach?
   Counted: 12 H^2 multiply-adds for each row and layer, twice (value and tangent).
3. Does the memory of a sweep over 400 prompts grow with the number of layers?
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from llvlit.engine.depth import depth_system, sweep
from llvlit.engine.models import LanguageModel, wrap_model
from llvlit.method.concepts import random_directions
from llvlit.method.gains import measured_gains
from llvlit.prompts import Prompts

N_PROMPTS, N_TOKENS, N_DIRECTIONS = 8, 64, 32
VOCABULARY = 1000


def random_model(n_layers: int, hidden_size: int) -> LanguageModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=hidden_size,
        n_layer=n_layers,
        n_head=hidden_size // 64,
        bos_token_id=0,
        eos_token_id=0,
    )
    module = GPT2LMHeadModel(config)
    module.set_attn_implementation("eager")
    words = Tokenizer(WordLevel({"<unk>": 0} | {str(i): i for i in range(1, VOCABULARY)}, unk_token="<unk>"))
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words.pre_tokenizer = WhitespaceSplit()
    return wrap_model(module, PreTrainedTokenizerFast(tokenizer_object=words), name=f"random-{n_layers}x{hidden_size}")


def random_prompts(n_prompts: int, *, seed: int) -> Prompts:
    numbers = torch.randint(1, VOCABULARY, (n_prompts, N_TOKENS), generator=torch.Generator().manual_seed(seed))
    return Prompts([" ".join(map(str, row)) for row in numbers.tolist()], [i % 2 for i in range(n_prompts)])


def seconds(function: Callable[[], object]) -> float:
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Wait for an accelerator, which works on while Python goes on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, run in turn so that a drifting machine drifts for all."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


def speed(repeats: int) -> None:
    model = random_model(12, 768)
    prompts = random_prompts(N_PROMPTS, seed=1)
    directions = random_directions(13, 768)
    tokens = torch.tensor([model.tokenizer(text)["input_ids"] for text in prompts.texts])
    assert tokens.shape == (N_PROMPTS, N_TOKENS)
    system = depth_system(model, prompts)
    generator = torch.Generator().manual_seed(2)
    tangents = torch.randn(N_PROMPTS, N_DIRECTIONS, 768, generator=generator)
    left = torch.randn(N_PROMPTS * N_DIRECTIONS, 768, generator=generator)
    right = torch.randn(768, 4 * 768, generator=generator)

    def forward() -> None:
        with torch.no_grad():
            model.module.base_model(tokens, use_cache=False)

    def products() -> None:
        for _ in range(24):
            left @ right

    def jvps() -> None:
        for layer in range(12):
            system.jvp(layer, tangents)

    def central() -> None:
        for layer in range(12):
            system.jvp(layer, tangents, method="central")

    found = interleaved(
        {
            "one plain forward pass": forward,
            "measured gains, 12 layers": lambda: measured_gains(model, prompts, directions),
            "JVPs, 32 directions, 12 layers": jvps,
            "central differences, the same": central,
            "matrix products": products,
        },
        repeats,
    )
    rate = 24 * 2 * left.shape[0] * 768 * 4 * 768 / found["matrix products"] / 1e9
    jvp_operations = 12 * 2 * (2 * 12 * 768**2) * N_PROMPTS * N_DIRECTIONS
    jvp_rate = jvp_operations / found["JVPs, 32 directions, 12 layers"] / 1e9
    ratio = found["measured gains, 12 layers"] / found["one plain forward pass"]
    print(f"\n{'what':<34}{'seconds':>9}   note")
    print(f"{'one plain forward pass':<34}{found['one plain forward pass']:>9.3f}   without the vocabulary head")
    print(
        f"{'measured gains, 12 layers':<34}{found['measured gains, 12 layers']:>9.3f}   "
        f"{ratio:.2f} forward passes; counted 1.20, target at most 1.6, brute force 24"
    )
    print(
        f"{'JVPs, 32 directions, 12 layers':<34}{found['JVPs, 32 directions, 12 layers']:>9.3f}   "
        f"{jvp_rate:.0f} GFLOP/s = {jvp_rate / rate:.0%} of the matrix-product rate; target at least 50 %"
    )
    print(f"{'central differences, the same':<34}{found['central differences, the same']:>9.3f}")
    print(f"{'matrix products':<34}{found['matrix products']:>9.3f}   {rate:.0f} GFLOP/s, 256 x 768 x 3072")


def peak_of_sweep(n_layers: int) -> None:
    """In a process of its own: megabytes that a sweep adds to the model's."""
    model = random_model(n_layers, 256)
    prompts = random_prompts(400, seed=3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in sweep(model, prompts):
        pass
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((after - before) / 1024)


def memory() -> None:
    peaks = []
    for n_layers in (12, 24):
        command = [sys.executable, __file__, "--peak-of-sweep", str(n_layers)]
        peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    print(f"\nPeak memory of a sweep, 400 prompts of 64 tokens, H = 256: {peaks[0]:.0f} MB at L = 12, ", end="")
    print(f"{peaks[1]:.0f} MB at L = 24: {peaks[1] / peaks[0] - 1:+.0%}; target within 15 %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of-sweep", type=int, metavar="LAYERS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of_sweep:
        peak_of_sweep(options.peak_of_sweep)
        return
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {options.threads} threads")
    memory()  # first: a child process inherits its parent's peak
    speed(options.repeats)


if __name__ == "__main__":
    main()
