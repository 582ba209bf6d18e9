"""Which layers can be skipped?  ``python benchmarks/skip.py --text reviews.txt --models smollm2-135m``

Prints two tables for each model.  The first says how little each layer does: as the concept sees it (the share of the
linear gain matrix that changes when the layer's Jacobian is replaced by the identity), as the next token sees it (KL of
its distribution when the layer is dropped at every position, nats per token), and as the usual angle between the states
before and after it sees it.  The second takes the first one to four layers of each ranking, and random ones, and prints
by how much the loss of held-out text rises, in nats per token, when they are dropped and when each is replaced by its
own affine map of low order, fitted on other text.  Brackets are 95 % intervals over texts; of random layers, the median
draw and the extremes.

FILE holds one text a line (.txt, .txt.gz), or has a column ``text`` (.parquet).  Its first texts rank the layers by the
next token, the following ones fit the maps, the last ones are held out.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from heading import begin, parser_of

from llvlit.engine.depth import last_token_states
from llvlit.engine.models import LanguageModel, load_model, torch_device
from llvlit.engine.tokens import TokenizedPrompts, usable_prompts
from llvlit.method.concepts import concept_directions
from llvlit.method.intervals import interval, resampled_means
from llvlit.method.skipping import LowOrderLayer, concept_effects, fit_layers, logit_effects, token_losses
from llvlit.progress import progress
from llvlit.prompts import Prompts
from llvlit.tasks.task import load_task

MOST = 4
"""Layers that are replaced together."""


def read_texts(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return list(pd.read_parquet(path)["text"])
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [line for line in data.decode("utf-8").splitlines() if line.strip()]


def parts_of(model: LanguageModel, texts: list[str], sizes: list[int], n_tokens: int) -> list[TokenizedPrompts]:
    """Disjoint parts of the texts, in their order, tokenized."""
    prompts = Prompts(tuple(texts[: sum(sizes) + 20]), (0,) * min(len(texts), sum(sizes) + 20))
    tokens, _ = usable_prompts(model, prompts, max_tokens=n_tokens)
    if len(tokens) < sum(sizes):
        raise SystemExit(f"The file has {len(tokens)} texts that can be used; {sum(sizes)} are needed.")
    ends = np.cumsum(sizes)
    return [tokens.select(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def angles(model: LanguageModel, tokens: TokenizedPrompts, n_tokens: int) -> np.ndarray:
    """``1 - cos`` between the last token's states before and after each layer, mean over texts."""
    states = last_token_states(model, tokens, max_tokens=n_tokens).double()
    return np.asarray(1 - torch.cosine_similarity(states[:, :-1], states[:, 1:], dim=-1).mean(dim=0).cpu().numpy())


def compare(model: LanguageModel, texts: list[str], options: argparse.Namespace) -> None:
    sizes, limit = [options.rank, options.fit, options.held_out], {"max_tokens": options.tokens}
    ranking, fitting, held_out = parts_of(model, texts, sizes, options.tokens)
    splits = load_task(options.task, suffix=options.suffix).split(concept=options.concept, operating=10, evaluation=1)
    directions = concept_directions(model, usable_prompts(model, splits.concept)[0])
    effects = {
        "next token": logit_effects(model, ranking, **limit).mean,
        "concept": concept_effects(model, splits.operating, directions).mean,
        "angle": angles(model, ranking, options.tokens),
    }
    orders = {name: np.argsort(values).tolist() for name, values in effects.items()}
    print("| Layer | " + " | ".join(effects) + " |\n|---:" + "|---:" * len(effects) + "|")
    for layer in range(model.n_layers):
        places = (f"{effects[name][layer]:.3f} ({orders[name].index(layer) + 1})" for name in effects)
        print(f"| {layer} | " + " | ".join(places) + " |", flush=True)
    ranks = {name: np.argsort(order) for name, order in orders.items()}
    agree = np.corrcoef(ranks["concept"], ranks["next token"])[0, 1]
    borrowed = int(directions.borrowed.sum())
    print(f"\nIn parentheses: place in the ranking. Spearman's correlation of the first two: {agree:.2f}. Borrowed")
    print(f"directions: {borrowed} of {model.n_layers + 1}.\n")

    rng = np.random.default_rng(0)
    draws = [rng.permutation(model.n_layers)[:MOST].tolist() for _ in range(options.draws)]
    wanted = sorted({layer for order in (*orders.values(), *draws) for layer in order[:MOST]})
    fitted = fit_layers(model, fitting, wanted, order=options.order, **limit)
    whole = token_losses(model, held_out, **limit)
    known: dict[tuple[tuple[int, ...], bool], np.ndarray] = {}

    def rise(layers: list[int], replaced: bool) -> np.ndarray:
        key = (tuple(sorted(layers)), replaced)
        if key not in known:
            places: dict[int, LowOrderLayer | None] = {layer: fitted[layer] if replaced else None for layer in layers}
            known[key] = token_losses(model, held_out, places, **limit) - whole
        return known[key]

    n_tokens, n_fitted = (sum(map(len, tokens.ids)) for tokens in (held_out, fitting))
    print(f"Loss of the whole model: {whole.mean():.3f} nats per token on {n_tokens} held-out tokens; maps fitted on")
    print(f"{n_fitted} tokens of other texts.\n")
    print(f"| Ranking | Layers | Dropped | Replaced, order {options.order} |\n|---|---|---:|---:|", flush=True)
    for name, order in progress(orders.items(), model.name):
        for count in range(1, MOST + 1):
            cells = []
            for replaced in (False, True):
                rises = rise(order[:count], replaced)
                low, high = interval(resampled_means(rises[:, None], range(len(rises)), seed=0))[:, 0]
                cells.append(f"{rises.mean():.3f} [{low:.3f}, {high:.3f}]")
            print(f"| {name} | {', '.join(map(str, order[:count]))} | " + " | ".join(cells) + " |", flush=True)
    for count in range(1, MOST + 1):
        means = [[rise(draw[:count], replaced).mean() for draw in draws] for replaced in (False, True)]
        cells = [f"{np.median(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in means]
        print(f"| random, {options.draws} draws | {count} | " + " | ".join(cells) + " |", flush=True)
    print()


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--task", default="film-sentiment", help="whose concept ranks the layers")
    parser.add_argument("--suffix", help="ends every prompt of the task; unless given, its own")
    parser.add_argument("--concept", type=int, default=200, help="prompts per class for the directions")
    parser.add_argument("--order", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8, help="texts that rank the layers")
    parser.add_argument("--fit", type=int, default=120, help="texts that the maps are fitted on")
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="a text is cut to its last ones")
    parser.add_argument("--draws", type=int, default=4, help="of random layers")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = torch_device(options.device)
    begin(
        options,
        f"texts of {options.text.name}, each its last {options.tokens} tokens: {options.rank} rank, {options.fit} fit, "
        f"{options.held_out} held out; concept of {Path(options.task).name}, directions from {options.concept} prompts "
        "a class",
        device=device,
    )
    texts = read_texts(options.text)
    for name in options.models:
        model = load_model(name, device=device)
        print(
            f"## {name}\n\n{model.n_layers} layers, hidden size {model.hidden_size}, {model.precision}.\n", flush=True
        )
        compare(model, texts, options)


if __name__ == "__main__":
    main()
