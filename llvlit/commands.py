"""What each command of the command line does; each returns what ``--json`` prints."""

from __future__ import annotations

import argparse
from typing import Any


def _splits(options: argparse.Namespace) -> Any:
    from llvlit.tasks import load_task

    n = options.prompts
    return load_task(options.task, data_dir=options.data_dir).split(
        concept=2 * n, operating=n, evaluation=n, seed=options.seed
    )


def say(options: argparse.Namespace, text: str) -> None:
    """Print, unless JSON was asked for."""
    if not options.json:
        print(text)


def book(options: argparse.Namespace) -> dict[str, Any]:
    """Execute every chapter and build the book."""
    from llvlit.book import build_book

    book = build_book(
        options.root,
        profile=options.profile,
        device=options.device,
        chapters=options.chapters,
        jobs=options.jobs,
        progress=not options.json,
    )
    say(options, f"The book: {book.index}")
    return {"index": str(book.index), "seconds": book.seconds}


def gains(options: argparse.Namespace) -> dict[str, Any]:
    """Print measured, predicted and adjoint gains."""
    from llvlit.concepts import concept_directions
    from llvlit.gains import adjoint_gains, agreement, measured_gains
    from llvlit.identification import identify
    from llvlit.models import load_model

    splits = _splits(options)
    model = load_model(options.model, device=options.device)
    directions = concept_directions(model, splits.concept)
    order = min(32, model.hidden_size) if options.order is None else options.order
    surrogate = identify(model, splits.operating, directions, order=order, basis=options.basis)
    measured = measured_gains(model, splits.evaluation, directions, amplitude=options.amplitude)
    adjoint = adjoint_gains(model, splits.operating, directions)
    low, high = measured.interval()
    found = agreement(surrogate.gains(), measured)
    say(options, f"{model.name} on {options.task}: output y = v_L . x_L, gains per unit push\n")
    say(options, f"{'layer':>5} {'measured':>9} {'95 % interval':>18} {options.basis:>13} {'adjoint':>9}")
    for layer, gain in enumerate(measured.mean):
        bounds = f"[{low[layer]:.3f}, {high[layer]:.3f}]"
        predicted = surrogate.gains()[layer]
        say(options, f"{layer:>5} {gain:>9.3f} {bounds:>18} {predicted:>13.3f} {adjoint.mean[layer]:>9.3f}")
    say(
        options,
        f"\nOrder {order}: Spearman {found.spearman:.3f}, Pearson {found.pearson:.3f}, "
        f"relative error {found.relative_error:.3f} ({len(splits.evaluation)} held-out prompts)",
    )
    if measured.metadata["n_cut"]:
        say(options, f"{measured.metadata['n_cut']} prompts were cut on the left.")
    if options.save:
        surrogate.save(options.save)
        say(options, f"Saved: {options.save}")
    return {
        "measured": measured.mean.tolist(),
        "interval": [low.tolist(), high.tolist()],
        "predicted": surrogate.gains().tolist(),
        "adjoint": adjoint.mean.tolist(),
        "agreement": found.row(),
        "metadata": surrogate.metadata,
    }


def steer(options: argparse.Namespace) -> dict[str, Any]:
    """Print a continuation with and without the cheapest push."""
    import torch

    from llvlit.concepts import concept_directions
    from llvlit.control import energy, minimum_energy
    from llvlit.errors import InputError
    from llvlit.gains import adjoint_gains
    from llvlit.models import load_model
    from llvlit.steering import steer

    splits = _splits(options)
    model = load_model(options.model, device=options.device)
    if not 0 < options.tokens < model.max_positions:
        raise InputError(
            f"tokens={options.tokens} is not between 1 and {model.max_positions - 1}; {model.name} holds one more."
        )
    directions = concept_directions(model, splits.concept)
    gains = adjoint_gains(model, splits.operating, directions)
    inputs = minimum_energy(gains, options.target * float(directions.gaps[-1]))
    encoded = model.tokenizer(options.prompt, return_tensors="pt").to(model.device)
    n_tokens = encoded["input_ids"].shape[1]
    if not n_tokens or n_tokens + options.tokens > model.max_positions:
        raise InputError(
            f"The prompt has {n_tokens} tokens; with --tokens {options.tokens} it must have 1 to "
            f"{model.max_positions - options.tokens}, as {model.name} holds {model.max_positions}."
        )
    settings = {
        "max_new_tokens": options.tokens,
        "do_sample": False,
        "repetition_penalty": 1.3,
        "pad_token_id": model.tokenizer.eos_token_id,
    }
    inputs_of_model = {key: encoded[key] for key in ("input_ids", "attention_mask")}

    module: Any = model.module

    def generate() -> str:
        with torch.no_grad():
            out = module.generate(**inputs_of_model, **settings)
        return str(model.tokenizer.decode(out[0], skip_special_tokens=True))

    plain = generate()
    with steer(model, directions, inputs):
        steered = generate()
    cost = energy(inputs)
    say(options, f"plain:   {plain}\nsteered: {steered}")
    say(
        options,
        f"\nTarget {options.target:g} class gaps, energy {cost:.3g}, largest push before layer "
        f"{abs(inputs).argmax()} ({inputs[abs(inputs).argmax()]:.3g})",
    )
    return {"plain": plain, "steered": steered, "inputs": inputs.tolist(), "energy": cost}


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train the family."""
    from llvlit.training_run import train_family

    return train_family(
        options.corpus,
        options.out,
        sizes=options.sizes,
        steps=options.steps,
        seed=options.seed,
        device=options.device,
        compiled=options.compile,
        keep=options.keep,
    )


def models(options: argparse.Namespace) -> list[dict[str, Any]]:
    """List the models."""
    from llvlit.models import embedded_names, load_model

    rows = []
    say(options, f"{'name':<18} {'parameters':>11} {'layers':>7} {'hidden size':>12} {'context':>8}")
    for name in embedded_names():
        model = load_model(name, device="cpu")
        row = {
            "name": name,
            "parameters": model.n_parameters,
            "layers": model.n_layers,
            "hidden_size": model.hidden_size,
            "context": model.max_positions,
        }
        say(options, "{name:<18} {parameters:>11,} {layers:>7} {hidden_size:>12} {context:>8}".format(**row))
        rows.append(row)
    say(options, "\nAlso: a local folder in the hub's format (safetensors), or a hub id such as gpt2.")
    return rows


def tasks(options: argparse.Namespace) -> dict[str, str]:
    """List the tasks."""
    from llvlit.tasks import task_names

    names = task_names(options.data_dir)
    for name, description in names.items():
        say(options, f"{name:<20} {description}")
    say(options, "\nAlso: a .parquet file with the columns text and label (0 or 1).")
    return names
