"""Which plan moves generated text, and at what price?  ``python benchmarks/generation.py --help``

Plans are made on neutral openings, from continuations that the model samples.  Two kinds of gain: *words*, the
log-odds of good against bad next words along those texts, as if a push changed nothing that is written; and *text*,
the exact first-order gain of a score of the whole text, which sees what a push writes and reads again:

    d E[score] / du = E[(score - its mean) d log P(text) / du],  with pushes at every new token.

The score that plans are made for, a bag of words (TF-IDF, logistic regression), takes no part in judging.  Each plan
is scaled until its mean divergence over 16 tokens of the model's own continuations of *other* openings is the budget,
then pushes every new token while text is generated, greedily and by sampling.  Judges: a bag of words trained on other
texts, and the log-odds of good against bad words after the text under a different model.  Fluency: loss of the new
tokens under the model without a push, and the share of repeated pairs of words.

``--keep FOLDER`` holds what was sampled and judged, so that a second run goes on where the first one stopped.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from heading import begin, parser_of
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

import llvlit
from llvlit.engine.depth import last_token_states
from llvlit.engine.head import head_of
from llvlit.engine.models import LanguageModel
from llvlit.method.control import relative_weights
from llvlit.method.effects import push_effects, with_continuations
from llvlit.method.intervals import interval, resampled_means
from llvlit.method.outputs import reading
from llvlit.method.plans import SecondOrder
from llvlit.plots import figures
from llvlit.prompts import Prompts

TRIED_ON = "film book hotel restaurant concert weather phone service trip game"
LEARNED_ON = "meeting city teacher room garden speech play meal course car museum store website lecture novel bar "
LEARNED_ON += "flight party cafe doctor"
FRAMES = (" was", " turned out to be", ", as I remember it, was", " left everyone feeling", " last week was")
POSITIVE = (
    "good, great, excellent, wonderful, amazing, fantastic, beautiful, lovely, perfect, brilliant, happy, enjoyable"
)
NEGATIVE = "bad, terrible, awful, horrible, poor, boring, disappointing, ugly, dull, sad, worst, annoying"
HORIZON = 16
QUESTION = "\nOverall, it was"
CHECKED = 1
"""Sampled texts of each opening that the other model judges and whose loss is taken; the bag of words judges all."""
FOLDS = 5
FEWER = 2
"""Continuations of each opening that gains of words are read along: their noise is smaller."""
Value = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
TOGETHER = 30
"""Texts that are differentiated, and openings that are generated from, together."""


def openings(things: str) -> Prompts:
    texts = [f"The {thing}{frame}" for thing in things.split() for frame in FRAMES]
    return Prompts(texts, [0] * len(texts))


def without_end(logits: torch.Tensor, model: LanguageModel) -> torch.Tensor:
    """Logits in float32, the end of the text ruled out."""
    return logits.float().index_fill(-1, torch.tensor([model.tokenizer.eos_token_id]), -torch.inf)


@torch.no_grad()
def written(
    model: LanguageModel, prompts: Prompts, *, tokens: int, times: int, sampled: bool, seed: int
) -> torch.Tensor:
    """New tokens ``(n_prompts, times, tokens)``, sampled at temperature one, or the most likely ones."""
    module: Any = model.module
    ids = [model.tokenizer(text)["input_ids"] for text in prompts.texts]
    found = torch.empty(len(ids), times, tokens, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    for length in sorted({len(each) for each in ids}):
        every = [row for row, each in enumerate(ids) if len(each) == length]
        for rows in (every[start : start + TOGETHER] for start in range(0, len(every), TOGETHER)):
            out = module(input_ids=torch.tensor([ids[row] for row in rows]), use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(times, dim=0)
            cache.batch_repeat_interleave(times)
            for place in range(tokens):
                chances = without_end(logits, model).softmax(dim=-1)
                below = chances.cumsum(dim=-1)
                drawn = torch.searchsorted(below, torch.rand(len(below), 1, generator=generator) * below[:, -1:])
                new = drawn.clamp_max(below.shape[1] - 1) if sampled else chances.argmax(dim=-1, keepdim=True)
                found[rows, :, place] = new.view(len(rows), times)
                logits = module(input_ids=new, past_key_values=cache, use_cache=True).logits[:, -1]
    return found


def slopes(
    model: LanguageModel, vectors: torch.Tensor, prompts: Prompts, drawn: torch.Tensor, value: Value
) -> np.ndarray:
    """Derivatives ``(n_prompts, times, n_layers)`` of a value of texts with respect to inputs at every new token.

    The texts are held fixed.  The value is made of the log chances of every next word ``(n, tokens, n_words)`` and of
    the new tokens ``(n, tokens)``.
    """
    n_prompts, times, tokens = drawn.shape
    module: Any = model.module
    found = np.empty((n_prompts, times, model.n_layers))
    for row, text in enumerate(prompts.texts):
        before = model.tokenizer(text, return_tensors="pt")["input_ids"]
        for some in torch.arange(times).split(TOGETHER):
            ids = torch.cat([before.expand(len(some), -1), drawn[row, some]], dim=1)
            inputs = torch.zeros(len(some), model.n_layers, dtype=vectors.dtype, requires_grad=True)
            is_pushed = (torch.arange(ids.shape[1]) >= before.shape[1] - 1).unsqueeze(-1)

            def hook(layer: int, inputs: torch.Tensor = inputs, is_pushed: torch.Tensor = is_pushed) -> Any:
                def push(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
                    pushes = (inputs[:, layer, None] * vectors[layer]).unsqueeze(1) * is_pushed
                    return (args[0] + pushes.to(args[0]), *args[1:])

                return push

            hooks = [layer.register_forward_pre_hook(hook(index)) for index, layer in enumerate(model.layers)]
            try:
                logits = module(input_ids=ids, use_cache=False).logits[:, -tokens - 1 : -1]
            finally:
                for each in hooks:
                    each.remove()
            log_chances = without_end(logits, model).log_softmax(dim=-1)
            values = value(log_chances, drawn[row, some]).sum()
            found[row, some] = torch.autograd.grad(values, inputs)[0].numpy()
    return found


def values_of(odds: Any, model: LanguageModel) -> dict[str, Value]:
    """``chance``: log P(text); ``words``: log-odds of good next words; ``counts``: their chance less that of bad ones.

    The last two are means over the new tokens.
    """
    good, bad = (list(each) for each in odds.tokens(model))

    def words(log_chances: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return (log_chances[..., good].logsumexp(dim=-1) - log_chances[..., bad].logsumexp(dim=-1)).mean(dim=-1)

    def counts(log_chances: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return (log_chances[..., good].exp().sum(dim=-1) - log_chances[..., bad].exp().sum(dim=-1)).mean(dim=-1)

    def chance(log_chances: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        return log_chances.gather(-1, drawn.unsqueeze(-1)).sum(dim=(1, 2))

    return {"chance": chance, "words": words, "counts": counts}


def text_gains(scores: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Gains ``(n_prompts, n_layers)`` of a score of whole texts ``(n_prompts, times)``; see the top of this file.

    ``chance (n_prompts, times, n_layers)``: derivatives of log P(text).  Each text's score is held against the mean
    of the opening's others.
    """
    times = scores.shape[1]
    above = (scores - scores.mean(axis=1, keepdims=True)) * times / (times - 1)
    return (above[..., None] * chance).mean(axis=1)


def shapes_of(
    gains: dict[str, np.ndarray], metric: np.ndarray, weights: np.ndarray, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Plans' shapes ``(n_layers,)`` from some openings: optimum and best single layer of each kind of gain, and others.

    Each costs half a nat a token, to second order.
    """
    n_layers, found = len(weights), {}
    for kind, each in gains.items():
        local = SecondOrder(each, metric, weights, np.ones(n_layers, dtype=bool), 1.0).shapes(rows)
        found[f"optimum for {kind}"] = local["optimum, regularized by 1"]
        found[f"best single layer for {kind}"] = local["best single layer"]
    found["uniform"] = uniform = local["uniform"]
    thirds = np.arange(n_layers) * 3 // n_layers
    for number, name in enumerate(("early third", "middle third", "late third")):
        found[name] = uniform * (thirds == number)
    found["optimum for words, no negative input"] = found["optimum for words"].clip(min=0)
    cost = metric[rows].mean(axis=0)
    found = {name: shape / np.sqrt(shape @ cost @ shape) for name, shape in found.items()}
    both = found["optimum for words"] + found["uniform"]
    return found | {"optimum for words and uniform": both / np.sqrt(both @ cost @ both)}


def told(values: pd.Series, units: pd.Series, digits: int = 2) -> str:
    known = values.notna()
    low, high = interval(resampled_means(values[known].to_numpy()[:, None], units[known].tolist(), seed=0))[:, 0]
    return " ".join((f"{values.mean():.{digits}f}", f"({low:.{digits}f} to {high:.{digits}f})"))


def foretold(
    gains: dict[str, np.ndarray], metric: np.ndarray, weights: np.ndarray, judged_gains: np.ndarray, budget: float
) -> pd.DataFrame:
    """What each plan makes of a judge's score, to first order, at openings on things that it was not made from."""
    things = np.arange(len(judged_gains)) // len(FRAMES)
    rises: dict[str, np.ndarray] = {}
    for fold in range(FOLDS):
        held = things % FOLDS == fold
        for name, shape in shapes_of(gains, metric, weights, ~held).items():
            rises.setdefault(name, np.empty(len(held)))[held] = judged_gains[held] @ shape * np.sqrt(2 * budget)
    units = pd.Series(things)
    lines = [
        (name, told(pd.Series(rise), units, 3), told(pd.Series(rise - rises["uniform"]), units, 3))
        for name, rise in rises.items()
    ]
    return pd.DataFrame(lines, columns=["plan", f"rise at {budget:g} nats", "less uniform's"])


def at_budget(
    model: LanguageModel, texts: Any, vectors: torch.Tensor, odds: Any, shapes: np.ndarray, budget: float
) -> tuple[np.ndarray, np.ndarray]:
    """Shapes ``(k, n_layers)`` as strong as the budget of mean divergence asks, and the shifts of the odds there."""
    source, head = reading(model, texts, vectors[-1], odds), head_of(model, texts)
    for _ in range(2):
        every = np.broadcast_to(shapes, (len(texts), *shapes.shape))
        shifts, costs = push_effects(head, texts, vectors, every, source, horizon=HORIZON)
        factors = np.sqrt(budget / costs.mean(axis=0))
        if np.abs(factors - 1).max() < 0.05:
            break
        shapes = shapes * factors[:, None]
    return shapes, shifts.mean(axis=0)


def losses(model: LanguageModel, prompts: Prompts, new: torch.Tensor) -> np.ndarray:
    """Mean loss ``(n_prompts, times)`` of new tokens under the model as it stands, in nats."""
    found = np.empty(new.shape[:2])
    for row, text in enumerate(prompts.texts):
        before = model.tokenizer(text, return_tensors="pt")["input_ids"]
        ids = torch.cat([before.expand(len(new[row]), -1), new[row]], dim=1)
        with torch.no_grad():
            logits = model.module(input_ids=ids, use_cache=False).logits[:, before.shape[1] - 1 : -1]
        chances = without_end(logits, model).log_softmax(dim=-1)
        found[row] = -chances.gather(-1, new[row].unsqueeze(-1))[..., 0].mean(dim=-1).numpy()
    return found


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


def judged(
    model: LanguageModel, judges: tuple[Pipeline, LanguageModel, Any], prompts: Prompts, new: torch.Tensor
) -> pd.DataFrame:
    """One row a text."""
    bag, other, odds = judges
    n_prompts, times, _ = new.shape
    few = min(times, CHECKED)
    texts = model.tokenizer.batch_decode(new.flatten(0, 1), skip_special_tokens=True)
    before = [text for text in prompts.texts for _ in range(times)]
    is_checked = np.tile(np.arange(times) < few, n_prompts)
    whole = [first + second for first, second, checked in zip(before, texts, is_checked, strict=True) if checked]
    found = pd.DataFrame(
        {
            "opening": np.repeat(np.arange(n_prompts), times),
            "text": texts,
            "score": bag.predict_proba(texts)[:, 1],
            "odds": np.nan,
            "loss": np.nan,
            "repeated": [repeated(text) for text in texts],
        }
    )
    found.loc[is_checked, "odds"] = judged_odds(other, odds, whole)
    found.loc[is_checked, "loss"] = losses(model, prompts, new[:, :few]).ravel()
    return found


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over texts, and how far each plan is from uniform, with 95 % intervals over openings."""
    found = []
    for (budget, kind, plan), texts in rows.groupby(["budget", "kind", "plan"], sort=False):
        each = {"budget": budget, "text": kind, "plan": plan}
        for name, column in (("P(positive), bag", "score"), ("odds, other model", "odds"), ("loss", "loss")):
            each[name] = told(texts[column], texts["opening"])
        each["repeated"] = f"{texts['repeated'].mean():.3f}"
        same = rows[(rows["budget"] == budget) & (rows["kind"] == kind) & (rows["plan"] == "uniform")]
        for name, column in (("P less uniform's", "score"), ("odds less uniform's", "odds")):
            if plan != "uniform" and len(same):
                less = texts.groupby("opening")[column].mean() - same.groupby("opening")[column].mean()
                each[name] = told(less, pd.Series(less.index))
        found.append(each)
    return pd.DataFrame(found).fillna("")


def frontier(rows: pd.DataFrame, plans: list[str]) -> Figure:
    """Score against loss, a line a plan from no push over the budgets; greedy above sampled text."""
    with mpl.rc_context(figures.STYLE):
        figure, every = plt.subplots(2, figsize=(4.6, 7.2), layout="constrained")
    others = [style for name, style in figures.SCHEDULES.items() if name != "uniform"]
    for axes, kind in zip(every, ("greedy", "sampled"), strict=True):
        ends = []
        for number, plan in enumerate(plans):
            style = figures.SCHEDULES["uniform"] if plan == "uniform" else others[number]
            points = []
            mine = rows[(rows["kind"] == kind) & rows["plan"].isin(["no push", plan])]
            for _, texts in mine.groupby("budget"):
                means = texts.groupby("opening")[["loss", "score"]].mean()
                bounds = interval(resampled_means(means.to_numpy(), means.index.tolist(), seed=0))
                points.append((*means.mean(), *bounds[:, 1]))
            loss, score, low, high = np.array(points).T
            axes.errorbar(loss, score, [score - low, high - score], capsize=2, elinewidth=1, **style)
            ends.append((score[-1], loss[-1], plan, style["color"]))
        left, right = axes.get_xlim()
        lowest, highest = axes.get_ylim()
        axes.set_xlim(left, right + 0.75 * (right - left))
        middle, step = np.mean([end[0] for end in ends]), 0.09 * (highest - lowest)
        for place, (score, loss, plan, color) in enumerate(sorted(ends)):
            height = middle + step * (place - (len(ends) - 1) / 2)
            axes.annotate(
                plan,
                (loss, score),
                (right + 0.08 * (right - left), height),
                color=color,
                fontsize=10,
                va="center",
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
            )
        start = rows[(rows["kind"] == kind) & (rows["plan"] == "no push")]
        axes.annotate("no push", (start["loss"].mean(), start["score"].mean()), (8, -4), textcoords="offset points")
        axes.set_title(f"{kind} text")
        axes.set_ylabel("P(positive), bag of words")
    every[-1].set_xlabel("loss without a push, nats a token")
    for part in (figure, *every):
        part.patch.set_alpha(0)  # pages are light or dark
    return figure


def is_there(rows: pd.DataFrame, budget: float, plan: str) -> bool:
    return len(rows) > 0 and bool(((rows["budget"] == budget) & (rows["plan"] == plan)).any())


def main() -> None:
    parser = parser_of(__doc__)
    parser.set_defaults(models=["smollm2-135m"])
    parser.add_argument("--task", required=True, help="labelled texts that the directions come from, name or file")
    parser.add_argument("--plan-bags", required=True, nargs="+", type=Path, help="labelled texts (parquet) to plan for")
    parser.add_argument("--bag", required=True, type=Path, help="other labelled texts, for the judging bag of words")
    parser.add_argument("--judge", required=True, help="a different model, as load_model takes it")
    parser.add_argument("--keep", required=True, type=Path, help="folder of what was sampled and judged")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.3, 0.1])
    parser.add_argument("--plans", nargs="+", help="those that are tried, by name; by default all")
    parser.add_argument("--concept", type=int, default=200, help="prompts of each class")
    parser.add_argument("--draws", type=int, default=6, help="continuations of each opening that plans are made from")
    parser.add_argument("--openings", type=int, default=50, help="that text is generated from")
    parser.add_argument("--scaled-on", type=int, default=50, help="of them, on which the divergence is measured")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens")
    parser.add_argument("--samples", type=int, default=8, help="of each opening")
    parser.add_argument("--figure", type=Path, help="where the frontier is drawn (SVG)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    bags = ", ".join(path.name for path in options.plan_bags)
    begin(
        options,
        f"directions from {Path(options.task).name}; plans for bags of words from {bags}; judges: a bag of words from "
        f"{options.bag.name}, and {Path(options.judge).name}",
    )
    (name,) = options.models
    model, half = llvlit.load_model(name, device="cpu"), llvlit.load_model(name, device="cpu", dtype="bfloat16")
    for parameter in half.module.parameters():
        parameter.requires_grad_(False)
    odds = llvlit.TokenContrast(POSITIVE.split(", "), NEGATIVE.split(", "), first_tokens=True)
    learned, others = openings(LEARNED_ON), openings(TRIED_ON)
    others = others.select(range(min(options.openings, len(others))))
    options.keep.mkdir(exist_ok=True)
    plans_file = options.keep / "plans.npz"
    if not plans_file.exists():
        labelled = llvlit.load_task(options.task).split(concept=options.concept).concept
        vectors = llvlit.concept_directions(model, labelled).on(model)
        drawn = written(half, learned, tokens=HORIZON, times=options.draws, sampled=True, seed=1)
        found = {
            kind: slopes(half, vectors, learned, drawn if kind == "chance" else drawn[:, :FEWER], value)
            for kind, value in values_of(odds, half).items()
        }
        np.savez(plans_file, vectors=vectors.numpy(), drawn=drawn.numpy(), **found)
    kept = np.load(plans_file)
    vectors = torch.tensor(kept["vectors"])
    texts = model.tokenizer.batch_decode(kept["drawn"].reshape(-1, kept["drawn"].shape[-1]), skip_special_tokens=True)
    scores = np.mean([bag_of_words(path).predict_proba(texts)[:, 1] for path in options.plan_bags], axis=0)
    chance = kept["chance"]
    gains = {
        "words": kept["words"].mean(axis=1),
        "counts": kept["counts"].mean(axis=1),
        "text": text_gains(scores.reshape(chance.shape[:2]), chance),
    }
    metric = np.einsum("ntl,ntk->nlk", chance, chance) / chance.shape[1] / kept["drawn"].shape[-1]
    weights = relative_weights(last_token_states(model, llvlit.tokenize(model, learned)))
    shapes = shapes_of(gains, metric, weights, np.ones(len(chance), dtype=bool))
    tried, bag = options.plans or list(shapes), bag_of_words(options.bag)
    judged_gains = text_gains(bag.predict_proba(texts)[:, 1].reshape(chance.shape[:2]), chance)
    print(foretold(gains, metric, weights, judged_gains, options.budgets[0]).to_markdown(index=False), "\n", flush=True)

    file = options.keep / "texts.csv"
    blank = {"odds": "", "loss": ""}  # elsewhere an empty field is an empty text
    rows = pd.read_csv(file, keep_default_na=False, na_values=blank) if file.exists() else pd.DataFrame()
    judges = bag, llvlit.load_model(options.judge, device="cpu"), odds
    scaled_on = with_continuations(
        model, llvlit.tokenize(model, others.select(range(0, len(others), len(others) // options.scaled_on))), HORIZON
    )
    for budget in options.budgets:
        wanted = [plan for plan in tried if not is_there(rows, budget, plan)]
        if not wanted:
            continue
        units = np.stack([shapes[plan] for plan in wanted]) * np.sqrt(2 * budget)
        inputs, shifts = at_budget(model, scaled_on, vectors, odds, units, budget)
        every = dict(zip(wanted, zip(inputs, shifts, strict=True), strict=True))
        for plan, (push, shift) in {"no push": (np.zeros(model.n_layers), 0.0), **every}.items():
            if plan == "no push" and is_there(rows, 0.0, plan):
                continue
            for sampled in (False, True):
                times = options.samples if sampled else 1
                with llvlit.steer(half, vectors, push):
                    new = written(half, others, tokens=options.tokens, times=times, sampled=sampled, seed=0)
                mine = judged(half, judges, others, new)
                facts = {
                    "budget": budget if push.any() else 0.0,
                    "plan": plan,
                    "kind": "sampled" if sampled else "greedy",
                    "shift": shift,
                }
                rows = pd.concat([rows, mine.assign(**facts)], ignore_index=True)
                print(facts, mine["score"].mean(), mine["loss"].mean(), mine["text"][0], file=sys.stderr, flush=True)
            rows.to_csv(file, index=False)
    print(table(rows).to_markdown(index=False))
    if options.figure:
        figures.save(frontier(rows, tried), options.figure)


if __name__ == "__main__":
    main()
