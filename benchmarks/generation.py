"""Which plan moves generated text, and at what price?  ``python benchmarks/generation.py --help``

Plans are made on neutral openings: the optimum for the next token, the optima over 4 and 16 tokens of the model's own
continuations, and of the plans that competed over 16 uniform and the best single layer.  Each is scaled until its mean
divergence over 16 tokens of the model's own continuations of *other* openings is the budget, then pushes every new
token while text is generated, greedily and by sampling.  Judges that took no part: the log-odds of good against bad
words after the text under a different model, and a bag of words (TF-IDF, logistic regression) trained on labelled
texts.  Fluency: loss of the new tokens under the model without a push, and the share of repeated pairs of words.
"""

from __future__ import annotations

import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from heading import begin, parser_of
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

import llvlit
from llvlit.engine.depth import last_token_states
from llvlit.engine.head import head_of
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import TokenizedPrompts
from llvlit.method.effects import push_effects, with_continuations
from llvlit.method.intervals import interval, resampled_means
from llvlit.method.outputs import reading
from llvlit.prompts import Prompts

THINGS = "film book hotel restaurant concert weather phone service trip game "
THINGS += "meeting city teacher room garden speech play meal course car"
FRAMES = (" was", " turned out to be", ", as I remember it, was", " left everyone feeling", " last week was")
POSITIVE = (
    "good, great, excellent, wonderful, amazing, fantastic, beautiful, lovely, perfect, brilliant, happy, enjoyable"
)
NEGATIVE = "bad, terrible, awful, horrible, poor, boring, disappointing, ugly, dull, sad, worst, annoying"
LONGEST = 16
QUESTION = "\nOverall, it was"


def openings(things: list[str]) -> Prompts:
    texts = [f"The {thing}{frame}" for thing in things for frame in FRAMES]
    return Prompts(texts, [0] * len(texts))


def plans(
    model: LanguageModel, prompts: Prompts, directions: Any, output: Any, budget: float, horizons: list[int]
) -> dict[str, np.ndarray]:
    found = {}
    for horizon in horizons:
        advice = llvlit.recommend(model, prompts, directions, budget=budget, output=output, horizon=horizon)
        found[f"optimum over {horizon} token{'s' * (horizon > 1)}"] = advice.inputs
        print(f"- horizon {horizon}: {advice}", flush=True)
    every = {plan.name: plan.inputs for plan in (advice.plan, *advice.alternatives)}
    return found | {name: every[name] for name in ("uniform", "best single layer") if name in every}


def at_budget(
    model: LanguageModel, texts: TokenizedPrompts, vectors: torch.Tensor, odds: Any, inputs: np.ndarray, budget: float
) -> tuple[np.ndarray, float]:
    """Inputs whose mean divergence over the texts' last tokens is the budget, and the shift of the odds there."""
    source, head = reading(model, texts, vectors[-1], odds), head_of(model, texts)
    for _ in range(4):
        every = np.broadcast_to(inputs, (len(texts), 1, len(inputs)))
        shifts, costs = push_effects(head, texts, vectors, every, source, horizon=LONGEST)
        factor = np.sqrt(budget / costs.mean())
        if abs(factor - 1) < 0.01:
            break
        inputs = inputs * factor
    return inputs, float(shifts.mean())


def generate(
    model: LanguageModel, directions: Any, inputs: np.ndarray, prompts: Prompts, options: Any, *, sampled: bool
) -> list[str]:
    """Continuations, each of the same number of tokens."""
    module: Any = model.module
    model.tokenizer.padding_side = "left"
    given = model.tokenizer(list(prompts.texts), return_tensors="pt", padding=True)
    torch.manual_seed(0)
    with llvlit.steer(model, directions, inputs), torch.no_grad():
        out = module.generate(
            **given,
            max_new_tokens=options.tokens,
            min_new_tokens=options.tokens,
            do_sample=sampled,
            temperature=1.0,
            top_k=model.n_embedded,
            top_p=1.0,
            num_return_sequences=options.samples if sampled else 1,
            pad_token_id=model.tokenizer.eos_token_id,
        )
    new = out[:, given["input_ids"].shape[1] :]
    return [str(text) for text in model.tokenizer.batch_decode(new, skip_special_tokens=True)]


def losses(model: LanguageModel, before: list[str], after: list[str]) -> np.ndarray:
    """Mean loss of each continuation's tokens, without a push, in nats."""
    found = []
    for first, second in zip(before, after, strict=True):
        start = model.tokenizer(first, return_tensors="pt")["input_ids"]
        whole = model.tokenizer(first + second, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            chances = model.module(input_ids=whole).logits[0, :-1].double().log_softmax(dim=-1)
        each = -chances.gather(1, whole[0, 1:, None])[:, 0]
        found.append(float(each[start.shape[1] - 1 :].mean()))
    return np.array(found)


def judged_odds(judge: LanguageModel, odds: Any, texts: list[str]) -> np.ndarray:
    tokens = llvlit.tokenize(judge, Prompts([text + QUESTION for text in texts], [0] * len(texts)))
    states = last_token_states(judge, tokens)[:, -1]
    return np.asarray(reading(judge, tokens, states[0], odds).values(states).numpy())


def repeated(text: str) -> float:
    """Share of pairs of words that were there before."""
    words = text.lower().split()
    pairs = list(pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def bag_of_words(path: Path) -> Pipeline:
    frame = pd.read_parquet(path)
    judge = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=10))
    return judge.fit(frame["text"], frame["label"])


def told(values: np.ndarray, units: list[int]) -> str:
    low, high = interval(resampled_means(values[:, None], units, seed=0))[:, 0]
    return f"{values.mean():.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = parser_of(__doc__)
    parser.set_defaults(models=["smollm2-135m"])
    parser.add_argument("--task", required=True, help="labelled texts that the directions come from, name or file")
    parser.add_argument("--bag", type=Path, required=True, help="other labelled texts (parquet) for the bag of words")
    parser.add_argument("--judge", required=True, help="a different model, as load_model takes it")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.3])
    parser.add_argument("--horizons", nargs="+", type=int, default=[1, 4, 16], help="tokens that a plan is made for")
    parser.add_argument("--output", choices=("words", "concept"), default="words", help="what a plan is to move")
    parser.add_argument("--concept", type=int, default=200, help="prompts of each class")
    parser.add_argument("--openings", type=int, default=50, help="that text is generated from")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens")
    parser.add_argument("--samples", type=int, default=2, help="of each opening")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    begin(
        options,
        f"directions from {Path(options.task).name}, bag of words from {options.bag.name}, judge {options.judge}",
    )
    odds = llvlit.TokenContrast(POSITIVE.split(", "), NEGATIVE.split(", "), first_tokens=True)
    output = odds if options.output == "words" else None
    bag, judge = bag_of_words(options.bag), llvlit.load_model(options.judge, device="cpu")
    for name in options.models:
        model = llvlit.load_model(name, device="cpu")
        directions = llvlit.concept_directions(
            model, llvlit.load_task(options.task).split(concept=options.concept).concept
        )
        vectors = directions.on(model)
        learned, others = openings(THINGS.split()[10:]), openings(THINGS.split()[:10])
        learned = learned.select(range(0, len(learned), 3))
        others = others.select(range(min(options.openings, len(others))))
        texts = with_continuations(model, llvlit.tokenize(model, others), LONGEST)
        rows = []
        for budget in options.budgets:
            shapes = {
                "no push": np.zeros(model.n_layers),
                **plans(model, learned, directions, output, budget, options.horizons),
            }
            for shape, inputs in shapes.items():
                shift = 0.0
                if inputs.any():
                    inputs, shift = at_budget(model, texts, vectors, odds, inputs, budget)
                elif rows:
                    continue
                for sampled in (False, True):
                    new = generate(model, directions, inputs, others, options, sampled=sampled)
                    times = len(new) // len(others)
                    before = [text for text in others.texts for _ in range(times)]
                    units = [unit for unit in range(len(others)) for _ in range(times)]
                    whole = [first + second for first, second in zip(before, new, strict=True)]
                    rows.append(
                        {
                            "budget": budget if inputs.any() else 0.0,
                            "plan": shape,
                            "text": "sampled" if sampled else "greedy",
                            "shift of the odds": round(shift, 2),
                            "odds, other model": told(judged_odds(judge, odds, whole), units),
                            "P(positive), bag": told(bag.predict_proba(new)[:, 1], units),
                            "loss": told(losses(model, before, new), units),
                            "repeated": round(float(np.mean([repeated(text) for text in new])), 3),
                        }
                    )
                    print(f"{name} {budget} {shape} {sampled}: {whole[0]!r}", file=sys.stderr, flush=True)
        print(f"\n## {name}\n\n{pd.DataFrame(rows).to_markdown(index=False)}\n", flush=True)


if __name__ == "__main__":
    main()
