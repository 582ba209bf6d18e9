"""Measured gains beside plain forward passes in SmolLM2's shape, on a processor: ``python benchmarks/gains.py``.

Random weights (30 x 576, 9 heads on 3 of keys, MLP 1536), 8 prompts of 60 tokens, in turn in one process; the ratio is
of the medians.  Counted: every layer sees each prompt's tokens, and
2 (l + 1) pushed states: 1 + (L + 1) / 60 = 1.52.
"""

from __future__ import annotations

import argparse

import torch
from engine import interleaved, random_model, random_prompts
from transformers import LlamaConfig, LlamaForCausalLM

from llvlit.engine.models import wrap_model
from llvlit.method.concepts import random_directions
from llvlit.method.gains import measured_gains
from llvlit.prompts import Prompts

N_LAYERS, HIDDEN, N_PROMPTS, N_TOKENS = 30, 576, 8, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = {"hidden_size": HIDDEN, "num_hidden_layers": N_LAYERS, "intermediate_size": 1536, "vocab_size": 1000}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "attn_implementation": "eager"}
    module = LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()
    model = wrap_model(module, random_model(1, 64).tokenizer, name="random")
    texts = [" ".join(text.split()[:N_TOKENS]) for text in random_prompts(N_PROMPTS, seed=1).texts]
    prompts = Prompts(texts, [i % 2 for i in range(N_PROMPTS)])
    tokens = torch.tensor([model.tokenizer(text)["input_ids"] for text in texts])
    vectors = random_directions(N_LAYERS + 1, HIDDEN)

    def forward() -> None:
        with torch.no_grad():
            model.module.base_model(tokens, use_cache=False)

    runs = {"forward": forward, "gains": lambda: measured_gains(model, prompts, vectors)}
    took = interleaved(runs, options.repeats)
    print(f"{options.threads} threads: forward {took['forward']:.3f} s, measured gains {took['gains']:.3f} s,")
    print(f"ratio {took['gains'] / took['forward']:.2f}; counted {1 + (N_LAYERS + 1) / N_TOKENS:.2f}")


if __name__ == "__main__":
    main()
