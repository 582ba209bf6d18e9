"""``llvlit recommend``: which layers to push, and how strongly, for a budget, tested on other prompts."""

from __future__ import annotations

import argparse
import os
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
    as_written,
    check_place,
    command,
    lines_of,
    load_experiment,
    prompts_note,
    report,
    short_name,
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
        type="shift",
        metavar="AMOUNT",
        help="what the push should do, in place of a budget: the shift of words in log-odds, or of the concept in the "
        "units of its reading",
    )
    add_plan(parser)
    add_experiment(parser)
    parser.add_argument("--positions", choices=("last", "all"), default="last", help=POSITIONS)
    parser.add_argument("--save", metavar="FOLDER", help="save the plan there; `llvlit steer` takes it from there")
    parser.add_argument("--figure", metavar="FILE", help="draw the plan over the layers, as .svg or .png")
    parser.add_argument(
        "--export",
        metavar="FILE.gguf",
        help="write the pushes as a control vector for llama.cpp, which pushes every token, and not before layers 0 "
        "and 1: with --positions all, and --layers from 2 on (default: those)",
    )
    parser.description = f"{parser.description}\n\n{textwrap.fill(NAMES, WIDTH)}"


EXAMPLES = """\
llvlit recommend --budget 0.2 --save plan --figure plan.svg
llvlit recommend --positive "great, good" --negative "bad, awful" --layers 8-20
llvlit recommend --model smollm2-135m --contrast polite.txt rude.txt --chat --save polite
llvlit recommend --positions all --export push.gguf"""
REPEATED = (
    *("dtype", "device", "task", "contrast", "data_dir", "prompts", "suffix", "seed", "chat", "token_index"),
    *("positive", "negative", "first_tokens", "horizon", "positions"),
)
"""Options that pushes by hand need as well, where they were given."""
NAMES = (
    "An optimum moves the output farthest for its divergence, by gains and metric; so that no push becomes extreme, a "
    "share of its relative energy counts as cost, too (regularized). The least relative energy: the smallest pushes "
    "that reach the shift. Efficiency-weighted: each layer as if it were alone. Uniform: the same share of the state's "
    "length before all layers; late third: before the last third of them; depth 0.4: before one, two fifths of the way."
)
WINNER = (
    "> won where all were compared on prompts that they were not made from. Its numbers were then read apart from that "
    "choice, so another row may show more; rows whose intervals overlap may well be equal."
)
POSITIONS = "which tokens are pushed: the prompt's last and then every new one (default), or all, the prompt's too"


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Add what a plan is made with, besides its strength and which tokens are pushed."""
    aim = parser.add_argument_group("what to move, and where pushes are allowed")
    aim.add_argument(
        "--positive",
        type="text",
        metavar="WORDS",
        help='move the odds of next words in place of the concept: "great, good", or a file with one a line; those '
        "that should become likelier",
    )
    aim.add_argument("--negative", type="text", metavar="WORDS", help="the words that they are weighed against")
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
    at most and tested on as many others; it says how many.
    """
    from llvlit.method.concepts import concept_directions
    from llvlit.method.exchange import FIRST_LAYER

    places = _places(options)
    output = output_of(options)  # before the model, which takes longer
    model, splits = load_experiment(options)
    if output is not None:
        output.tokens(model)  # words that cannot be read are refused before anything is computed
    if options.export and options.layers is None:
        options.layers = (FIRST_LAYER["gguf"], model.n_layers - 1)
    with told() as notes:
        directions = concept_directions(model, splits["concept"])
        found = make_plan(model, splits, directions, options, output=output, positions=options.positions)
    evaluation = head(splits["evaluation"])
    verification = found.verify(model, evaluation)
    used = {"directions": len(splits["concept"]), "plan": len(head(splits["operating"])), "test": len(evaluation)}
    title = f"{model.name} on {task_title(options)}"
    facts = {
        **facts_of(found),
        "alternatives": [asdict(plan) for plan in found.alternatives],
        "verification": {name: getattr(verification, name) for name in ("shift", "kl", "held", "near", "per_prompt")},
        "notes": notes,
        "prompts": used,
        "figure": None,
        "metadata": found.metadata,
    }
    lines = [
        *_wrapped(*notes),
        *[""] * bool(notes),
        *_wrapped(str(found)),
        "",
        *_wrapped(f"{title}. {_aim(found)}, expected at new prompts:"),
        "",
        table(found),
        "",
        *_wrapped(WINNER),
        "",
        *_wrapped(
            str(verification),
            f"Prompts: {used['directions']} for directions, {used['plan']} others for the plan, {used['test']} others "
            "to test it on.",
        ),
        f"{'Use it' if options.save else 'By hand'}: {in_use(found, options)}",
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
        draw=lambda _, path: draw(found, path, f"{short_name(model)} on {task_title(options)}"),
        export=found.export,
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

    if options.positive is None:
        return None
    given = options.positive, options.negative
    files = map(os.path.expanduser, given)
    positive, negative = (
        lines_of(file) if os.path.isfile(file) else re.split(r"\s*,\s*", words)
        for file, words in zip(files, given, strict=True)
    )
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


def _wrapped(*paragraphs: str) -> list[str]:
    return [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, WIDTH)]


def _aim(found: Recommendation) -> str:
    from llvlit.method.warranty import shift_unit

    size, unit = shift_unit(found.output, found.directions)
    shift = f"a shift of {found.target / size:.3g} {unit}".strip()
    return f"Plans that meet {f'a divergence of {found.target:.3g} nats' if found.aim == 'kl' else shift}"


def table(found: Recommendation) -> str:
    """Plans in columns, the recommended one first."""
    from llvlit.method.plans import in_units
    from llvlit.method.warranty import shift_unit

    size, unit = shift_unit(found.output, found.directions)
    rows = [
        {
            "plan": f"{'>' if place == 0 else ' '} {plan.name}",
            f"shift{f' in {unit}' * bool(unit)} (95 % interval)": str(in_units(plan.shift, size)),
            "nats": str(plan.kl),
        }
        for place, plan in enumerate((found.plan, *found.alternatives))
    ]
    return columns(rows)


def in_use(found: Recommendation, options: argparse.Namespace) -> str:
    """The command that pushes as the plan does: by the folder where it was saved, else by all its pushes."""
    from llvlit.method.warranty import shift_unit

    words = ["llvlit", "steer", "TEXT"]
    if options.save:
        size, _ = shift_unit(found.output, found.directions)
        shift = found.target if found.aim == "shift" else found.shift.value
        targets = [f"{part * shift / size:.3g}" for part in (0.5, 1)]
        given = [word for name in ("dtype", "device") for word in _repeated(name, options)]
        return shlex.join([*words, "--plan", options.save, *given, "--targets", *targets])
    words += ["--model", options.model, *(word for name in REPEATED for word in _repeated(name, options))]
    relative = found.inputs / found.sizes
    pushed = relative.nonzero()[0].tolist()
    return shlex.join([*words, "--inputs", *(f"{layer}:{100 * relative[layer]:.4g}%" for layer in pushed)])


def _repeated(name: str, options: argparse.Namespace) -> list[str]:
    """An option as it was given, if it was."""
    value, option = getattr(options, name), as_written(name)
    if value is True:
        return [option]
    if name not in options.given:
        return []
    return [option, *value] if isinstance(value, list) else [f"{option}={value}"]


def draw(found: Recommendation, path: Path, title: str) -> None:
    """Write the figure of a plan over the layers."""
    from llvlit.plots import figures

    figure, axes = figures.new(n_rows=2, height=4.8)
    efficiency = abs(found.gains.mean) / found.fisher.mean.diagonal() ** 0.5
    figures.plan_profile(found.inputs / found.sizes, efficiency, axes=axes, title=title, borrowed=found.gains.borrowed)
    figures.save(figure, path)


def _places(options: argparse.Namespace) -> dict[str, Path]:
    """Where files go; a place that cannot be written to is refused before anything is computed."""
    from llvlit.files import check_replaced
    from llvlit.method.exchange import FIRST_LAYER, check_replaceable
    from llvlit.method.recommendation import KIND

    given = {"save": options.save, "plot": options.figure, "export": options.export}
    places = {name: Path(word) for name, word in given.items() if word}
    for name, option, endings in (("plot", "--figure", (".svg", ".png")), ("export", "--export", (".gguf",))):
        if name in places and places[name].suffix.lower() not in endings:
            raise InputError(f"{option} {places[name]}: give the name of a file that ends in {' or '.join(endings)}.")
        if name in places:
            check_place(option, places[name])
    if "save" in places:
        if not places["save"].absolute().parent.is_dir():
            raise InputError(f"--save {places['save']} cannot be written. Give a folder in one that exists.")
        check_replaced(places["save"], KIND)
    if "export" in places:
        first = FIRST_LAYER["gguf"]
        if options.positions != "all":
            raise InputError("--export: llama.cpp pushes every token. Add --positions all.")
        if options.layers and options.layers[0] < first:
            raise InputError(
                f"--export: llama.cpp pushes before no layer below {first}. Give --layers from {first} on."
            )
        check_replaceable(places["export"])
    return places
