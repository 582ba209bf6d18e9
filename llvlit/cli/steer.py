"""``llvlit steer``: text generated without a push, with the cheapest one, and with a uniform one of its energy."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llvlit.cli.options import add_experiment, borrowed_note, command, load_experiment, prompts_note
from llvlit.cli.terminal import show, side_by_side, terminal_width
from llvlit.errors import InputError, NumericalError

if TYPE_CHECKING:
    import numpy as np

    from llvlit.engine.models import LanguageModel
    from llvlit.engine.tokens import TokenizedPrompts
    from llvlit.method.concepts import Directions
    from llvlit.method.gains import Gains

PROMPT = "The plot was thin and"


@dataclass(frozen=True)
class Continuation:
    """A generated text, the inputs that steered it, their energy, and by how many class gaps they move the output."""

    text: str
    energy: float
    predicted: float
    measured: float
    inputs: list[float]

    @property
    def facts(self) -> str:
        """What stands above the text."""
        largest = max(range(len(self.inputs)), key=lambda layer: abs(self.inputs[layer]))
        if not self.inputs[largest]:
            return "no push"
        return (
            f"energy {self.energy:.3g}\npredicted {self.predicted:+.2f} class gaps\n"
            f"measured {self.measured:+.2f} class gaps\n"
            f"largest push {self.inputs[largest]:+.3g}, before layer {largest}"
        )


def mount(commands: Any) -> None:
    """Add the command."""
    parser = command(commands, steer, f'llvlit steer "{PROMPT}" --target 2')
    parser.add_argument("prompt", type="text", nargs="?", default=PROMPT, help=f'text to continue (default "{PROMPT}")')
    add_experiment(parser)
    parser.add_argument(
        "--target", type="number", default=1.0, help="shift of the output in units of the class gap (default 1)"
    )
    parser.add_argument(
        "--energy",
        choices=("absolute", "relative"),
        default="relative",
        help="what is cheap: the push beside the state that it joins (relative, default), or by itself (absolute)",
    )
    parser.add_argument("--tokens", type="count", default=30, help="tokens to generate (default 30)")


def steer(options: argparse.Namespace) -> None:
    """Generate text side by side: unsteered, with the cheapest push that moves the concept by a target, and with a
    uniform push of the same energy.
    """
    from llvlit.engine.depth import last_token_states
    from llvlit.method.concepts import concept_directions
    from llvlit.method.control import relative_weights
    from llvlit.method.gains import adjoint_gains

    model, splits = load_experiment(options)
    prompt = _prompt(model, options)
    directions = concept_directions(model, splits["concept"])
    gains = adjoint_gains(model, splits["operating"], directions)
    weights = None
    if options.energy == "relative":
        weights = relative_weights(last_token_states(model, splits["operating"]))
    continuations = {
        name: replace(continuation, text=_continue(model, directions, continuation.inputs, prompt, options.tokens))
        for name, continuation in pushes(model, prompt, directions, gains, weights, options).items()
    }
    cost = continuations["optimal"].energy
    about = {"target": options.target, "energy": cost, "metric": options.energy, "borrowed": gains.borrowed}
    about |= {"prompts": splits["operating"].metadata}
    texts = {name: f"{continuation.facts}\n\n{continuation.text}" for name, continuation in continuations.items()}
    lines = [
        f"{side_by_side(texts, terminal_width())}\n",
        f"Target: {options.target:+g} class gaps of {options.task} at the output of {model.name}.",
        f"Both pushes have the {options.energy} energy {cost:.3g}. Predicted: by the linear gains.",
        "Measured: in the full model, at the prompt's last token. A gap: the distance of the classes' means.",
        f"Computed in {model.precision}.",
    ]
    notes = [*borrowed_note(gains.borrowed), *prompts_note(splits["operating"])]
    show(options, {**about, **continuations}, "\n".join(lines + notes))


def pushes(
    model: LanguageModel,
    prompt: TokenizedPrompts,
    directions: Directions,
    gains: Gains,
    weights: np.ndarray | None,
    options: argparse.Namespace,
) -> dict[str, Continuation]:
    """No push, the cheapest for the target, and a uniform one of its energy, with what they do; no texts yet."""
    import numpy as np

    from llvlit.engine.depth import depth_system
    from llvlit.method.control import energy, minimum_energy, schedules
    from llvlit.method.gains import check_resolution
    from llvlit.method.verification import output_shifts

    gap = float(directions.gaps[-1])
    system = depth_system(model, prompt, max_tokens=prompt.max_tokens)
    if options.target:
        check_resolution("--target", options.target, float(system.states[0, -1].norm()) / gap, model.dtype)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what is no number is refused below
            optimal = minimum_energy(gains, options.target * gap, weights=weights)
            uniform = schedules(gains, weights=weights)["uniform"] * energy(optimal, weights=weights) ** 0.5
            uniform *= np.sign((gains.mean @ uniform) * options.target) or 1.0  # predicted to push the same way
        inputs = {"plain": np.zeros(model.n_layers), "optimal": optimal, "uniform": uniform}
        shifts = output_shifts(system, directions, np.stack([*inputs.values()])[None])[0] / gap
    except (InputError, NumericalError) as error:
        raise InputError(f"--target {options.target:g} cannot be reached: {error}") from error
    return {
        name: Continuation("", energy(u, weights=weights), float(gains.mean @ u) / gap, float(shift), u.tolist())
        for (name, u), shift in zip(inputs.items(), shifts, strict=True)
    }


def _prompt(model: LanguageModel, options: argparse.Namespace) -> TokenizedPrompts:
    """The prompt as tokens, if the model has room for it and for what it shall generate."""
    from llvlit.engine.tokens import tokenize
    from llvlit.prompts import Prompts

    room = model.max_positions - options.tokens
    if room < 2:
        raise InputError(
            f"--tokens {options.tokens} leaves no room for a prompt of two tokens; {model.name} holds "
            f"{model.max_positions}. Generate fewer."
        )
    tokens = tokenize(model, Prompts((options.prompt,), (1,)), max_tokens=room, chat=options.chat)
    if tokens.n_cut:
        raise InputError(
            f"The prompt is longer than {room} tokens; with --tokens {options.tokens} there is no room for more, as "
            f"{model.name} holds {model.max_positions}. Shorten it, or generate fewer."
        )
    return tokens


def _continue(
    model: LanguageModel, directions: Directions, inputs: list[float], prompt: TokenizedPrompts, tokens: int
) -> str:
    import numpy as np
    import torch

    from llvlit.method import steering

    module: Any = model.module
    ids = torch.tensor(prompt.ids, device=model.device)
    with steering.steer(model, directions, np.array(inputs)), torch.no_grad():
        out = module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            repetition_penalty=1.3,
            pad_token_id=model.tokenizer.eos_token_id,
        )
    return str(model.tokenizer.decode(out[0], skip_special_tokens=True))
