"""``llvlit steer``: text generated as it is, with the recommended push, and with a uniform one at the same cost."""

from __future__ import annotations

import argparse
import re
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llvlit.cli.options import add_experiment, command, load_experiment, prompts_note, short_name, task_title
from llvlit.cli.recommend import WIDTH, add_plan, facts_of, head, make_plan, output_of, told
from llvlit.cli.terminal import show, side_by_side, terminal_width
from llvlit.errors import FileError, InputError, NumericalError

if TYPE_CHECKING:
    import numpy as np

    from llvlit.engine.models import LanguageModel
    from llvlit.engine.tokens import TokenizedPrompts
    from llvlit.method.concepts import Directions
    from llvlit.method.outputs import Output
    from llvlit.method.recommendation import Recommendation

PROMPT, MODEL = "The plot was thin and", "embedded/large"
AT_ONCE = 32
"""Texts that are generated together."""
UNMARKED = re.compile(r"<\|.+\|>|<\w+_\w+>")
"""What special tokens look like, such as ``<start_of_image>``."""
DEAR, FAINT = 2.0, 1e-3
"""How many times the nats that were expected a push costs from which on it is told; and the fewest nats that matter,
below which 16 bits are all rounding.
"""


@dataclass(frozen=True)
class Push:
    """Inputs that steer a text, and what they are expected to do on average; None where nobody asked."""

    name: str
    inputs: np.ndarray
    shift: float | None = None
    kl: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Steering:
    """What steers: pushes along directions, which tokens they act on, and how their effects are read."""

    pushes: list[list[Push]]
    directions: Directions
    positions: str
    output: Output | None
    horizon: int
    plan: Recommendation | None

    @property
    def unit(self) -> tuple[float, str]:
        """The class gap of a concept in the output's units; one for another output, and what it counts."""
        if self.output is None:
            gap = float(self.directions.gaps[-1])
            return (gap, "gaps") if gap > 0 else (1.0, "")
        return 1.0, "log-odds" if type(self.output).__name__ == "TokenContrast" else ""


EXAMPLES = f"""\
llvlit steer "{PROMPT}" "The actors" --plan plan --targets 1 2 4
llvlit steer "The film was" --model smollm2-135m --task sst2.parquet --budget 0.3
llvlit steer "The film was" --inputs 12-15:4% 20:-2%"""
MEASURED = "measured in the full model at the plan's prompts"
SCALED = f"{MEASURED}, then scaled: the shift in proportion, the nats with the square"
PREDICTED = "predicted by gains and metric, to second order"
"""Where expectations come from."""


def mount(commands: Any) -> None:
    """Add the command."""
    parser = command(commands, steer, EXAMPLES)
    parser.add_argument("texts", type="text", nargs="*", metavar="TEXT", help=f'texts to continue (default "{PROMPT}")')
    parser.add_argument(
        "--plan",
        metavar="FOLDER",
        help="use a plan in a folder that `llvlit recommend` saved: nothing is planned anew, and the model, the chat "
        "template and the token that is read are the plan's unless named",
    )
    parser.add_argument("--tokens", type="count", metavar="N", default=30, help="tokens to write (default 30)")
    parser.add_argument(
        "--positions",
        choices=("prompt", "last", "all"),
        help="which tokens are pushed: the prompt's last alone; that and every new one (default, or what the plan "
        "says); or all, the prompt's too",
    )
    group = parser.add_argument_group("how strongly (one of these)")
    strength = group.add_mutually_exclusive_group()
    strength.add_argument(
        "--budget",
        type="length",
        metavar="NATS",
        help="what the push may cost: the divergence of the next token's distribution from the plain one (default 0.2, "
        "or the plan's)",
    )
    strength.add_argument(
        "--target",
        type="shift",
        metavar="SHIFT",
        help="what the push should do: the shift of the concept in distances between its classes (1 or 2 is a good "
        "start, and below zero it goes the other way), or of words in their log-odds",
    )
    strength.add_argument(
        "--targets", type="shift", nargs="+", metavar="SHIFT", help="several such shifts, one after the other"
    )
    strength.add_argument(
        "--inputs",
        type="text",
        nargs="+",
        metavar="LAYER:PUSH",
        help="layers and strength by hand: `20:3%% 22-25:1.5%%` in per cent of the state's length before the layer; "
        "without the sign, the length of the push itself",
    )
    add_plan(parser)
    add_experiment(parser)
    parser.set_defaults(model=None, token_index=None)


def steer(options: argparse.Namespace) -> None:
    """Write texts on, side by side: plain, with the recommended push, and with a uniform one that is to cost as much;
    each with its score and its cost in nats. A plan that was saved is used at once; else one is made first, which
    takes a minute or two on a small model.
    """
    import numpy as np

    from llvlit.method.effects import push_effects, with_continuations
    from llvlit.method.recommendation import sources

    with told() as notes:
        model, tokens, steering = _prepared(options)
    texts = with_continuations(model, tokens, steering.horizon)
    vectors = steering.directions.on(model)
    given = np.stack([push.inputs for pushes in steering.pushes for push in pushes])
    try:
        reader, source = sources(model, texts, vectors, steering.output)
        every = np.broadcast_to(given, (len(texts), *given.shape))
        everywhere = steering.positions == "all"
        effects = push_effects(reader, texts, vectors, every, source, everywhere=everywhere, horizon=steering.horizon)
    except NumericalError as error:
        raise InputError(f"The text cannot be pushed that far: {error}") from error
    size, unit = steering.unit
    rows = np.tile(np.vstack([0 * given[:1], given]), (len(tokens), 1))  # of each text the plain one first
    one_of_each = [row for row in range(len(tokens)) for _ in range(1 + len(given))]
    written = iter(_continuations(model, steering, rows, tokens.select(one_of_each), options.tokens))
    found = []
    for row, text in enumerate(tokens.prompts.texts):
        plain, blocks, measured = next(written), [], zip(effects[0][row] / size, effects[1][row], strict=True)
        for pushes in steering.pushes:
            block = {}
            for push in pushes:
                expected = None if push.shift is None else {"shift": push.shift / size, "kl": push.kl}
                done = dict(zip(("shift", "kl"), next(measured), strict=True))
                each = {"text": next(written), "expected": expected, "measured": done, "inputs": push.inputs}
                each |= {"expected_from": push.source or None}
                block[push.name] = each
            blocks.append(block)
        found.append({"prompt": text, "plain": plain, "pushed": blocks})
    about: dict[str, Any] = {"unit": unit, "positions": steering.positions, "notes": notes, "prompts": tokens.metadata}
    about |= {"plan": facts_of(steering.plan) if steering.plan and not options.inputs else None}
    lines = [line for note in notes for line in textwrap.wrap(note, WIDTH)] + [""] * bool(notes)
    lines += [line for each in found for line in _lines(each, unit)] + _legend(model, steering, options)
    lines += prompts_note(tokens)
    show(options, {**about, "texts": found}, "\n".join([*lines, f"Computed in {model.precision}."]))


def _prepared(options: argparse.Namespace) -> tuple[LanguageModel, TokenizedPrompts, Steering]:
    """The model, the texts as tokens, and what steers them."""
    import numpy as np

    from llvlit.engine.models import load_model
    from llvlit.method.concepts import concept_directions
    from llvlit.method.recommendation import load_recommendation

    output, texts = output_of(options), options.texts or [PROMPT]
    if not all(text.strip() for text in texts):
        raise InputError("TEXT is empty: there is nothing to write on from. Give the beginning of a sentence.")
    if options.target is not None:
        options.targets = [options.target]
    if options.plan:
        if not Path(options.plan).is_dir():
            raise FileError(
                f"--plan: there is no folder {options.plan}. Save a plan there with `llvlit recommend --save`."
            )
        try:
            plan = load_recommendation(options.plan)
        except FileError as error:
            raise FileError(f"--plan: {error}") from error
        model = load_model(options.model or plan.metadata["model"], device=options.device, dtype=options.dtype)
        plan.check_model(model)
        if options.token_index is None:
            options.token_index = int(plan.metadata.get("token_index", -1))
        tokens = _tokens(model, texts, options, chat=options.chat or bool(plan.metadata["chat"]))
        positions = _positions(options.positions, plan)
        if options.inputs:
            inputs = _by_hand(options.inputs, plan.sizes)
            shift, kl = float(plan.gains.mean @ inputs), float(plan.fisher.kl(inputs).mean())
            pushes = [[Push("by hand", inputs, shift, kl, PREDICTED)]]
        else:
            strengths = _strengths(plan, options)
            _warn(strengths)
            pushes = [_rivals(each, plan) for each in strengths]
        return model, tokens, Steering(pushes, plan.directions, positions, plan.output, plan.horizon, plan)
    options.model = options.model or MODEL
    options.token_index = -1 if options.token_index is None else options.token_index
    model, splits = load_experiment(options)
    tokens = _tokens(model, texts, options, chat=options.chat)
    if output is not None:
        output.tokens(model)  # like the words by hand, refused before anything is computed
    if options.inputs:
        _by_hand(options.inputs, np.ones(model.n_layers))
    positions, directions = options.positions or "last", concept_directions(model, splits["concept"])
    if options.inputs:
        pushes = [[Push("by hand", _by_hand(options.inputs, _sizes(model, head(splits["operating"]))))]]
        return model, tokens, Steering(pushes, directions, positions, output, options.horizon, None)
    options.budget = options.budget or 0.2
    gap = 1.0 if output else float(directions.gaps[-1])
    options.shift = options.targets[0] * gap if options.targets else None
    plan = make_plan(
        model, splits, directions, options, output=output, positions="all" if positions == "all" else "last"
    )
    strengths = _strengths(plan, options) if options.targets else [plan]
    _warn(strengths[1:])  # of the first, the plan has warned
    pushes = [_rivals(each, plan) for each in strengths]
    return model, tokens, Steering(pushes, directions, _positions(positions, plan), output, plan.horizon, plan)


def _positions(asked: str | None, plan: Recommendation) -> str:
    """Which tokens are pushed; what a plan predicts is of those it was made for."""
    if asked is None or asked == plan.positions:
        return plan.positions
    if asked == "prompt" and plan.positions == "last" and plan.horizon == 1:
        return asked
    raise InputError(
        f"--positions {asked} is not what the plan was made for: positions {plan.positions}, horizon {plan.horizon}. "
        "Make another one."
    )


def _strengths(plan: Recommendation, options: argparse.Namespace) -> list[Recommendation]:
    """The plan at each strength that is asked for."""
    if options.targets:
        gap = 1.0 if plan.output is not None else float(plan.directions.gaps[-1])
        if not gap > 0:
            raise InputError("The plan's directions have no class gap, in which --target counts. Give --budget.")
        shift = plan.target if plan.aim == "shift" else plan.shift.value
        return [plan.scaled(target * gap / shift) for target in options.targets]
    kl = plan.target if plan.aim == "kl" else plan.kl.value
    return [plan.scaled((options.budget / kl) ** 0.5) if options.budget else plan]


def _warn(strengths: list[Recommendation]) -> None:
    from llvlit.method.recommendation import beyond_trust

    for warning in filter(None, map(beyond_trust, strengths)):
        warnings.warn(warning, stacklevel=2)


def _rivals(plan: Recommendation, made: Recommendation) -> list[Push]:
    """The plan at a strength, and uniform inputs that are expected to cost as much."""
    import numpy as np

    from llvlit.method.plans import scaled_plan

    source = MEASURED if np.allclose(plan.inputs, made.inputs, rtol=1e-3, atol=0) else SCALED
    rivals = [Push("recommended", plan.inputs, plan.shift.value, plan.kl.value, source)]
    for other in plan.alternatives:
        if other.name == "uniform":
            sign = 1 if plan.shift.value * other.shift.value > 0 else -1
            same = scaled_plan(other, sign * float((plan.kl.value / other.kl.value) ** 0.5))
            rivals.append(Push("uniform", same.inputs, same.shift.value, same.kl.value, source))
    return rivals


def _by_hand(words: list[str], sizes: np.ndarray) -> np.ndarray:
    """Inputs ``(n_layers,)`` as they are written by hand."""
    import numpy as np

    from llvlit.checks import number

    inputs, near = np.zeros(len(sizes)), len(sizes) // 2
    for word in " ".join(words).split():
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?:([^%]+)(%?)", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not match or not first <= last < len(sizes):
            raise InputError(
                f"--inputs {word!r} is no push before a layer from 0 to {len(sizes) - 1}. Write {near}:3% for 3 % of "
                f"the state's length before layer {near}, 0-{near}:3% for several, and {near}:3 for an input of 3."
            )
        try:
            size = number("push", float(match[3]))
        except ValueError as error:
            raise InputError(f"--inputs {word!r}: {match[3]!r} is no number.") from error
        inputs[first : last + 1] = size / 100 * sizes[first : last + 1] if match[4] else size
    return inputs


def _sizes(model: LanguageModel, tokens: TokenizedPrompts) -> np.ndarray:
    """Length of the state before each layer."""
    from llvlit.engine.depth import last_token_states
    from llvlit.method.control import relative_weights

    return relative_weights(last_token_states(model, tokens)) ** -0.5


def _tokens(model: LanguageModel, texts: list[str], options: argparse.Namespace, *, chat: bool) -> TokenizedPrompts:
    """The texts as tokens, if the model has room for them and for what it shall generate."""
    from llvlit.engine.tokens import tokenize
    from llvlit.prompts import Prompts

    room = model.max_positions - options.tokens
    if room < 2:
        raise InputError(
            f"--tokens {options.tokens} leaves no room for a prompt of two tokens; {model.name} holds "
            f"{model.max_positions}. Generate fewer."
        )
    tokens = tokenize(
        model, Prompts(texts, [1] * len(texts)), max_tokens=room, chat=chat, token_index=options.token_index
    )
    if tokens.n_cut:
        raise InputError(
            f"The prompt is longer than {room} tokens; with --tokens {options.tokens} there is no room for more, as "
            f"{model.name} holds {model.max_positions}. Shorten it, or generate fewer."
        )
    return tokens


def _lines(found: dict[str, Any], unit: str) -> list[str]:
    """The continuations of a text side by side, a block for each strength."""
    plain, blocks = found["plain"], found["pushed"]
    lines = [f"{found['prompt']!r}", ""]
    if len(blocks) > 1:  # once, not beside each strength
        lines += [side_by_side({"plain": f"no push\n\n{plain}"}, terminal_width()), ""]
    for block in blocks:
        below = "\n" * sum(1 + (each["expected"] is not None) for each in [*block.values()][:1])
        texts = {} if len(blocks) > 1 else {"plain": f"no push{below}\n{plain}"}
        for name, each in block.items():
            expected, measured = each["expected"], each["measured"]
            facts = [f"expected {_fact(expected, unit)}"] if expected else []
            texts[name] = "\n".join([*facts, f"measured {_fact(measured, unit)}", "", each["text"]])
        lines += [side_by_side(texts, terminal_width()), ""]
        dear = [line for name, each in block.items() for line in _dear(name, each)]
        lines += [*dear, ""] if dear else []
    return lines


def _dear(name: str, push: dict[str, Any]) -> list[str]:
    """Lines on a push that costs far more than was expected; none on another."""
    expected, measured = push["expected"], push["measured"]["kl"]
    if not expected or not expected["kl"] > 0 or measured < FAINT:
        return []
    times = measured / expected["kl"]
    why = "this text is unlike the prompts of the plan"
    why += "" if push["expected_from"] == MEASURED else ", or the push is beyond what such a prediction holds for"
    told = f"The {name} push costs {times:.2g} times what was expected: {why}."
    return textwrap.wrap(told, WIDTH) if times > DEAR else []


def _fact(effect: dict[str, float], unit: str) -> str:
    return f"{effect['shift']:+.2f} {unit}".strip() + f", {effect['kl']:.2g} nats"


def _legend(model: LanguageModel, steering: Steering, options: argparse.Namespace) -> list[str]:
    """What the numbers above the texts mean."""
    from llvlit.method.recommendation import before

    read = f"the {steering.output}" if steering.output is not None else "the concept's reading"
    if steering.output is None and steering.unit[1] == "gaps":
        read += ", in units of the distance between the classes' means"
    over = "" if steering.horizon == 1 else f" over {steering.horizon} new tokens"
    what = f"{options.plan}: " if options.plan else f"{task_title(options)}: "
    suffix = steering.plan.metadata["suffix"] if steering.plan else ""
    like = f" that end in {suffix!r}" if suffix else ""
    told = f"{what}{read}, and the divergence of the next token of {short_name(model)}. "
    if steering.plan is not None:
        sources = dict.fromkeys(push.source for pushes in steering.pushes for push in pushes)
        told += f"Expected: at new prompts{like}, on average; {', or '.join(sources)}. "
    told += f"Measured: at this one, in the full model{over}."
    if steering.plan is not None and not options.inputs:
        at = {"all": "every token", "prompt": "the prompt's last token"}.get(
            steering.positions, "the prompt's last token and every new one"
        )
        told += f" Pushed: {before(list(steering.plan.layers))} in the main, at {at}."
    return textwrap.wrap(told, WIDTH)


def _continuations(
    model: LanguageModel, steering: Steering, inputs: np.ndarray, prompts: TokenizedPrompts, tokens: int
) -> list[str]:
    """Each prompt with what the model writes on, pushed by its own inputs ``(n_prompts, n_layers)``; of a chat, the
    answer alone. No text depends on those beside it.
    """
    import torch

    from llvlit.engine.tokens import end_tokens
    from llvlit.method import steering as method

    module: Any = model.module
    lengths = [len(ids) for ids in prompts.ids]
    ends = end_tokens(model)
    texts: dict[int, str] = {}
    for rows in _together(model, lengths):
        longest = max(lengths[row] for row in rows)
        # padding is hidden from attention; a token that the text has anyway, so that no penalty sees another one
        ids = [[prompts.ids[row][0]] * (longest - lengths[row]) + list(prompts.ids[row]) for row in rows]
        mask = [[0] * (longest - lengths[row]) + [1] * lengths[row] for row in rows]
        given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        with method.steer(model, steering.directions, inputs[rows], positions=steering.positions), torch.no_grad():
            out = module.generate(
                **{name: values.to(model.device) for name, values in given.items()},
                max_new_tokens=tokens,
                do_sample=False,
                repetition_penalty=1.3,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
            )
        for row, new in zip(rows, out[:, longest:].tolist(), strict=True):
            end = next((place for place, token in enumerate(new) if token in ends), len(new))
            whole = ([] if prompts.chat else list(prompts.ids[row])) + new[:end]
            texts[row] = _text(model.tokenizer, whole)
    return [texts[row] for row in range(len(lengths))]


def _text(tokenizer: Any, ids: list[int]) -> str:
    """Tokens as text, without special ones and those that look so, which not every file of a model marks."""
    names = tokenizer.convert_ids_to_tokens(ids)
    kept = [token for token, name in zip(ids, names, strict=True) if not UNMARKED.fullmatch(name or "")]
    return str(tokenizer.decode(kept, skip_special_tokens=True)).strip()


def _together(model: LanguageModel, lengths: list[int]) -> list[list[int]]:
    """Rows that are generated at once: of any length where a model counts positions as it is told, else of one.

    In float64 also of one: what hides padding there is minus infinity where a model takes its softmax in float32.
    """
    from inspect import signature

    import torch

    module: Any = model.module
    told = "position_ids" in signature(module.forward).parameters and not getattr(module, "_is_stateful", False)
    mixed = told and model.dtype != torch.float64
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(0 if mixed else length, []).append(row)
    return [rows[start : start + AT_ONCE] for rows in groups.values() for start in range(0, len(rows), AT_ONCE)]
