"""Command line: llvlit book | gains | steer | study | train | models | tasks."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llvlit.errors import LlvlitError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors of ours are one line on standard error, with exit status 1."""
    options = _parser().parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        result = options.run(options)
    except LlvlitError as error:
        print(f"llvlit {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"llvlit {options.command}: interrupted; finished results are kept.", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(result, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llvlit",
        description="System identification of transformers: depth as time, one push per layer, "
        "what it does to a concept at the output, and the cheapest push that reaches a target.",
        epilog="Start with `llvlit gains`. Every command has --help with an example.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"Example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        return command

    book = add("book", _book, "Execute every chapter and build the book.", "llvlit book --profile embedded")
    book.add_argument("--root", default=".", help="folder with _config.yml and _toc.yml (default: here)")
    book.add_argument(
        "--profile", default="embedded", help="embedded (default, offline), paper (hub), or a folder of models"
    )
    _device(book)
    book.add_argument("--chapters", nargs="+", metavar="NAME", help="execute these only, such as: gains control")
    book.add_argument("--jobs", type=int, help="chapters executed at once")

    gains = add(
        "gains",
        _gains,
        "Gain profile of a model on a task: measured on the full model, and predicted.",
        "llvlit gains --model embedded/large --task film-sentiment --basis reachability --order 16",
    )
    _experiment(gains)
    gains.add_argument("--basis", default="reachability", help="krylov, reachability (default) or random")
    gains.add_argument("--order", type=int, help="order d of the surrogate (default 32, or H if that is less)")
    gains.add_argument("--amplitude", type=float, default=0.1, help="length of the measured push (default 0.1)")
    gains.add_argument("--save", metavar="FILE", help="save the surrogate (safetensors); LLV.load reads it")

    steer = add(
        "steer",
        _steer,
        "Generate text with and without the cheapest push that moves the concept by a target.",
        'llvlit steer "The plot was thin and" --target 2 --model embedded/large',
    )
    steer.add_argument("prompt", help="text to continue")
    _experiment(steer)
    steer.add_argument(
        "--target", type=float, default=1.0, help="shift of the output in units of the class gap (default 1)"
    )
    steer.add_argument("--tokens", type=int, default=30, help="tokens to generate (default 30)")

    study = add(
        "study",
        _study,
        "Agreement of every predictor, for a grid of models and tasks; resumes where it stopped.",
        "llvlit study --models embedded/small embedded/large --tasks tense --out results",
    )
    study.add_argument("--profile", default="embedded", help="where models, tasks and sizes come from")
    study.add_argument("--models", nargs="+", metavar="NAME", help="instead of the profile's")
    study.add_argument("--tasks", nargs="+", metavar="NAME", help="instead of the profile's")
    study.add_argument(
        "--prompts", type=int, metavar="N", help="N prompts per class to operate and N to evaluate, 2 N for directions"
    )
    study.add_argument("--out", default="study-results", help="folder of the results (default study-results)")
    study.add_argument("--seed", type=int, default=0, help="seed of splits and random bases (default 0)")
    _device(study)

    train = add(
        "train",
        _train,
        "Train the shipped family from scratch; a killed run continues where it stopped.",
        "llvlit train --corpus aclImdb --out run --sizes small medium large",
    )
    train.add_argument("--corpus", required=True, help="folder: aclImdb/, or *.txt.gz and *.tsv.gz files")
    train.add_argument("--out", required=True, help="folder of checkpoints and, at the end, models")
    train.add_argument("--sizes", nargs="+", default=["small", "medium", "large"], metavar="SIZE")
    train.add_argument("--steps", type=int, help="steps of each model (default: the recipe's)")
    train.add_argument("--seed", type=int, default=0, help="seed of weights, windows and held-out reviews")
    train.add_argument("--compile", action="store_true", help="torch.compile first (needs a C++ compiler)")
    _device(train)

    add("models", _models, "List the models that can be named.", "llvlit models")
    add("tasks", _tasks, "List the tasks that can be named.", "llvlit tasks")
    return parser


def _device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")


def _experiment(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="embedded/large", help="embedded/..., a folder, or a hub id")
    command.add_argument("--task", default="film-sentiment", help="a task's name or a .parquet file")
    command.add_argument("--prompts", type=int, default=100, help="prompts per class and split (default 100)")
    command.add_argument("--seed", type=int, default=0, help="seed of the splits (default 0)")
    _device(command)


def _splits(options: argparse.Namespace) -> Any:
    from llvlit.tasks import load_task

    n = options.prompts
    return load_task(options.task).split(concept=2 * n, operating=n, evaluation=n, seed=options.seed)


def _say(options: argparse.Namespace, text: str) -> None:
    if not options.json:
        print(text)


def _book(options: argparse.Namespace) -> dict[str, Any]:
    from llvlit.book import build_book

    book = build_book(
        options.root,
        profile=options.profile,
        device=options.device,
        chapters=options.chapters,
        jobs=options.jobs,
        progress=not options.json,
    )
    _say(options, f"The book: {book.index}")
    return {"index": str(book.index), "seconds": book.seconds}


def _gains(options: argparse.Namespace) -> dict[str, Any]:
    from llvlit.concepts import concept_directions
    from llvlit.gains import adjoint_gains, agreement, measured_gains
    from llvlit.models import load_model
    from llvlit.surrogate import identify

    splits = _splits(options)
    model = load_model(options.model, device=options.device)
    directions = concept_directions(model, splits.concept)
    order = min(32, model.hidden_size) if options.order is None else options.order
    surrogate = identify(model, splits.operating, directions, order=order, basis=options.basis)
    measured = measured_gains(model, splits.evaluation, directions, amplitude=options.amplitude)
    adjoint = adjoint_gains(model, splits.operating, directions)
    low, high = measured.interval()
    found = agreement(surrogate.gains(), measured)
    _say(options, f"{model.name} on {options.task}: output y = v_L . x_L, gains per unit push\n")
    _say(options, f"{'layer':>5} {'measured':>9} {'95 % interval':>18} {options.basis:>13} {'adjoint':>9}")
    for layer, gain in enumerate(measured.mean):
        bounds = f"[{low[layer]:.3f}, {high[layer]:.3f}]"
        predicted = surrogate.gains()[layer]
        _say(options, f"{layer:>5} {gain:>9.3f} {bounds:>18} {predicted:>13.3f} {adjoint.mean[layer]:>9.3f}")
    _say(
        options,
        f"\nOrder {order}: Spearman {found.spearman:.3f}, Pearson {found.pearson:.3f}, "
        f"relative error {found.relative_error:.3f} ({len(splits.evaluation)} held-out prompts)",
    )
    if measured.metadata["n_cut"]:
        _say(options, f"{measured.metadata['n_cut']} prompts were cut on the left.")
    if options.save:
        surrogate.save(options.save)
        _say(options, f"Saved: {options.save}")
    return {
        "measured": measured.mean.tolist(),
        "interval": [low.tolist(), high.tolist()],
        "predicted": surrogate.gains().tolist(),
        "adjoint": adjoint.mean.tolist(),
        "agreement": found.row(),
        "metadata": surrogate.metadata,
    }


def _steer(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from llvlit.concepts import concept_directions
    from llvlit.control import energy, minimum_energy, steer
    from llvlit.errors import InputError
    from llvlit.gains import adjoint_gains
    from llvlit.models import load_model

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
    _say(options, f"plain:   {plain}\nsteered: {steered}")
    _say(
        options,
        f"\nTarget {options.target:g} class gaps, energy {cost:.3g}, largest push before layer "
        f"{abs(inputs).argmax()} ({inputs[abs(inputs).argmax()]:.3g})",
    )
    return {"plain": plain, "steered": steered, "inputs": inputs.tolist(), "energy": cost}


def _study(options: argparse.Namespace) -> list[dict[str, Any]]:
    from llvlit.profiles import load_profile
    from llvlit.study import Settings, run_study

    profile = load_profile(options.profile)
    if (n := options.prompts) is not None:
        profile = replace(profile, concept=2 * n, operating=n, evaluation=n)
    settings = Settings(
        order=profile.order,
        amplitude=profile.amplitude,
        concept=profile.concept,
        operating=profile.operating,
        evaluation=profile.evaluation,
        seed=options.seed,
    )
    results = run_study(
        options.models or profile.models,
        options.tasks or profile.tasks,
        settings,
        options.out,
        device=options.device,
    )
    rows = [
        {"model": result.model, "task": result.task, "predictor": name, **found.row()}
        for result in results
        for name, found in result.agreements.items()
    ]
    _say(options, f"{'model':<18} {'task':<20} {'predictor':<13} {'Spearman':>8} {'Pearson':>8} {'error':>7}")
    for row in rows:
        _say(
            options,
            f"{row['model']:<18} {row['task']:<20} {row['predictor']:<13} "
            f"{row['spearman']:>8.3f} {row['pearson']:>8.3f} {row['relative_error']:>7.3f}",
        )
    _say(options, f"\nResults: {Path(options.out).resolve()}")
    return rows


def _train(options: argparse.Namespace) -> dict[str, Any]:
    from llvlit.training_run import train_family

    return train_family(
        options.corpus,
        options.out,
        sizes=options.sizes,
        steps=options.steps,
        seed=options.seed,
        device=options.device,
        compiled=options.compile,
    )


def _models(options: argparse.Namespace) -> list[dict[str, Any]]:
    from llvlit.models import embedded_names, load_model

    rows = []
    _say(options, f"{'name':<18} {'parameters':>11} {'layers':>7} {'hidden size':>12} {'context':>8}")
    for name in embedded_names():
        model = load_model(name, device="cpu")
        row = {
            "name": name,
            "parameters": model.n_parameters,
            "layers": model.n_layers,
            "hidden_size": model.hidden_size,
            "context": model.max_positions,
        }
        _say(options, "{name:<18} {parameters:>11,} {layers:>7} {hidden_size:>12} {context:>8}".format(**row))
        rows.append(row)
    _say(options, "\nAlso: a local folder in the hub's format (safetensors), or a hub id such as gpt2.")
    return rows


def _tasks(options: argparse.Namespace) -> dict[str, str]:
    from llvlit.tasks import task_names

    names = dict(task_names())
    for name, description in names.items():
        _say(options, f"{name:<20} {description}")
    _say(options, "\nAlso: a .parquet file with the columns text and label (0 or 1).")
    return names


if __name__ == "__main__":
    sys.exit(main())
