"""``llvlit recommend``: which layers to push, and how strongly, for a budget, tested on other prompts."""

from __future__ import annotations

import argparse
import re
import shlex
import textwrap
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llvlit.cli.options import (
    add_experiment,
    command,
    lines_of,
    load_experiment,
    prompts_note,
    report,
    task_title,
)
from llvlit.cli.terminal import columns
from llvlit.errors import InputError, NumericalError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llvlit.engine.models import LanguageModel
    from llvlit.engine.tokens import TokenizedPrompts
    from llvlit.method.concepts import Directions
    from llvlit.method.outputs import TokenContrast
    from llvlit.method.plans import Plan
    from llvlit.method.recommendation import Recommendation

MOST_PROMPTS = 32
"""That a plan is made from, and as many that it is verified on; each is pushed dozens of times."""
WIDTH = 80


def mount(commands: Any) -> None:
    """Add the command."""
    parser = command(commands, recommend, EXAMPLES)
    strength = parser.add_argument_group("how strongly")
    aim = strength.add_mutually_exclusive_group()
    aim.add_argument(
        "--budget",
        type="length",
        metavar="NATS",
        default=0.2,
        help="what the push may cost: the divergence of the next token's distribution from the plain one. At 0.05 you "
        "hardly notice it in a sentence, at 1 the text is another one (default 0.2)",
    )
    aim.add_argument(
        "--shift",
        type="number",
        metavar="AMOUNT",
        help="what the push should do, in place of a budget: the shift of the output in its own units",
    )
    add_plan(parser)
    add_experiment(parser)
    parser.add_argument("--positions", choices=("last", "all"), default="last", help=POSITIONS)
    parser.add_argument("--save", metavar="FOLDER", help="save the plan there, for `llvlit steer --plan FOLDER`")
    parser.add_argument("--figure", metavar="FILE", help="draw the plan over the layers, as .svg or .png")


EXAMPLES = """\
llvlit recommend --budget 0.2 --save plan --figure plan.svg
llvlit recommend --positive "great, good" --negative "bad, awful" --layers 8-20
llvlit recommend --model smollm2-135m --contrast polite.txt rude.txt --chat --save polite"""
POSITIONS = "which tokens are pushed: the prompt's last and then every new one (default), or all, the prompt's too"


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Add what a plan is made with, besides its strength and which tokens are pushed."""
    aim = parser.add_argument_group("what to move, and where pushes are allowed")
    aim.add_argument(
        "--positive",
        metavar="WORDS",
        help='move the odds of next words in place of the concept: "great, good", or a file with one a line; those '
        "that should become likelier",
    )
    aim.add_argument("--negative", metavar="WORDS", help="the words that they are weighed against")
    aim.add_argument(
        "--first-tokens",
        action="store_true",
        help="of a word that is several tokens, take the first; else it is refused",
    )
    aim.add_argument(
        "--towards",
        choices=("positive", "negative"),
        default="positive",
        help="whether a budget buys more of the concept or the words (default), or less",
    )
    aim.add_argument(
        "--layers",
        type="layers",
        metavar="FIRST-LAST",
        help="push before these layers alone, such as 8-20 (default: all)",
    )
    aim.add_argument(
        "--limit",
        type="length",
        metavar="SHARE",
        help="the largest push, as a share of the length of the state that it joins, such as 0.05 (default: none)",
    )
    aim.add_argument(
        "--horizon",
        type="count",
        metavar="N",
        default=1,
        help="plan for the next N tokens of a text that the model writes, not the next alone (default 1; more take "
        "longer)",
    )


def recommend(options: argparse.Namespace) -> None:
    """Say which layers to push, and how strongly: one sentence first, then what other plans would do at the same cost,
    and what this one did on prompts that it had not seen. No trial of yours is needed. The plan is made from 32 prompts
    and tested on 32 others.
    """
    from llvlit.method.concepts import concept_directions

    places = _places(options)
    output = output_of(options)  # before the model, which takes longer
    model, splits = load_experiment(options)
    with told() as notes:
        directions = concept_directions(model, splits["concept"])
        found = make_plan(model, splits, directions, options, output=output, positions=options.positions)
    verification = found.verify(model, head(splits["evaluation"]))
    title = f"{model.name} on {task_title(options)}"
    facts = {
        **facts_of(found),
        "alternatives": [asdict(plan) for plan in found.alternatives],
        "verification": {name: getattr(verification, name) for name in ("shift", "kl", "held", "near", "per_prompt")},
        "notes": notes,
        "figure": None,
        "metadata": found.metadata,
    }
    lines = [
        *textwrap.wrap(str(found), WIDTH),
        "",
        f"{title}. {_aim(found)}, expected at new prompts:",
        "",
        table((found.plan, *found.alternatives)),
        "",
        *textwrap.wrap(str(verification), WIDTH),
        f"By hand: {by_hand(found, options)}",
        *(line for note in notes for line in textwrap.wrap(note, WIDTH)),
        *prompts_note(head(splits["operating"])),
        f"Computed in {model.precision}.",
    ]
    report(
        options,
        places,
        facts,
        "\n".join(lines),
        about=(),
        save=found.save,
        draw=lambda _, path: draw(found, path, title),
    )


def make_plan(
    model: LanguageModel,
    splits: dict[str, TokenizedPrompts],
    directions: Directions,
    options: argparse.Namespace,
    *,
    output: TokenContrast | None,
    positions: str,
) -> Recommendation:
    """The plan that the options ask for."""
    from llvlit.method import recommendation

    try:
        return recommendation.recommend(
            model,
            head(splits["operating"]),
            directions,
            budget=options.budget,
            shift=options.shift,
            output=output,
            layers=options.layers,
            positions=positions,
            horizon=options.horizon,
            limit=options.limit,
            towards=options.towards,
        )
    except NumericalError as error:
        raise InputError(f"No plan goes that far: {error}") from error


def output_of(options: argparse.Namespace) -> TokenContrast | None:
    """The words that are read, from the options or from files; None: the concept."""
    from llvlit.method.outputs import TokenContrast

    given = options.positive, options.negative
    if given == (None, None):
        return None
    if None in given:
        raise InputError("--positive and --negative come together: words, and those that they are weighed against.")
    positive, negative = (lines_of(each) if Path(each).is_file() else re.split(r"\s*,\s*", each) for each in given)
    return TokenContrast(positive, negative, first_tokens=options.first_tokens)


def head(tokens: TokenizedPrompts) -> TokenizedPrompts:
    """The first of a split, which are balanced as all are."""
    return tokens.select(range(min(len(tokens), MOST_PROMPTS)))


@contextmanager
def told() -> Iterator[list[str]]:
    """The warnings that are raised inside, as notes."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield notes
    notes += dict.fromkeys(str(each.message) for each in caught if each.category is UserWarning)


def facts_of(found: Recommendation) -> dict[str, Any]:
    """What is told of a plan, for people and programs."""
    return {
        "sentence": str(found),
        "plan": found.plan.name,
        "layers": found.layers,
        "inputs": found.inputs,
        "relative": found.inputs / found.sizes,
        "shift": found.shift,
        "kl": found.kl,
        "aim": found.aim,
        "target": found.target,
        "trust_radius": found.trust_radius,
        "positions": found.positions,
        "horizon": found.horizon,
        "output": None if found.output is None else str(found.output),
        "gap": float(found.directions.gaps[-1]),
        "borrowed": found.gains.borrowed,
    }


def _aim(found: Recommendation) -> str:
    same = f"a divergence of {found.target:.3g} nats" if found.aim == "kl" else f"a shift of {found.target:.3g}"
    return f"Plans that meet {same}"


def table(plans: tuple[Plan, ...]) -> str:
    """Plans in columns, the recommended one first."""
    rows = [
        {
            "plan": f"{'>' if place == 0 else ' '} {plan.name}",
            "shift (95 % interval)": str(plan.shift),
            "nats": str(plan.kl),
        }
        for place, plan in enumerate(plans)
    ]
    return columns(rows)


def by_hand(found: Recommendation, options: argparse.Namespace) -> str:
    """The command that pushes as the plan does in the main, without it."""
    relative = found.inputs / found.sizes
    named = ["--contrast", *options.contrast] if options.contrast else ["--task", options.task]
    words = ["llvlit", "steer", "TEXT", "--model", options.model, *named, *["--chat"] * options.chat, "--inputs"]
    return shlex.join([*words, *(f"{layer}:{relative[layer]:.2%}" for layer in found.layers)])


def draw(found: Recommendation, path: Path, title: str) -> None:
    """Write the figure of a plan over the layers."""
    from llvlit.plots import figures

    figure, axes = figures.new(n_rows=2, height=4.8)
    efficiency = abs(found.gains.mean) / found.fisher.mean.diagonal() ** 0.5
    figures.plan_profile(found.inputs / found.sizes, efficiency, axes=axes, title=title, borrowed=found.gains.borrowed)
    figures.save(figure, path)


def _places(options: argparse.Namespace) -> dict[str, Path]:
    """Where files go; a place that cannot be written to is refused before anything is computed."""
    from llvlit.files import check_ours
    from llvlit.method.recommendation import KIND

    given = {"save": options.save, "plot": options.figure}
    places = {name: Path(word) for name, word in given.items() if word}
    figure = places.get("plot", Path("none.svg"))
    if figure.suffix.lower() not in (".png", ".svg") or figure.is_dir():
        raise InputError(f"--figure {figure}: give the name of a file that ends in .svg or .png.")
    for option, path in places.items():
        if not path.absolute().parent.is_dir():
            name, kind = ("--save", "folder") if option == "save" else ("--figure", "file")
            raise InputError(f"{name} {path} cannot be written. Give a {kind} in a folder that exists.")
    if "save" in places:
        check_ours(places["save"], KIND)
    return places
