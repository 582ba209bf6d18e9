"""What each command of the command line does; each returns what ``--json`` prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def say(options: argparse.Namespace, text: str) -> None:
    """Print, unless JSON was asked for."""
    if not options.json:
        print(text)


def book(options: argparse.Namespace) -> dict[str, Any]:
    """Execute every chapter and build the book."""
    from llvlit.publishing.browser import take_screenshots
    from llvlit.publishing.build import build_book
    from llvlit.publishing.pages import read_pages
    from llvlit.publishing.pdf import write_pdf

    book = build_book(
        options.root,
        profile=options.profile,
        device=options.device,
        chapters=options.chapters,
        jobs=options.jobs,
        progress=not options.json,
    )
    say(options, f"The book: {book.index}")
    html = book.index.parent
    names = [page.name for page in read_pages(Path(options.root)) if (html / f"{page.name}.html").is_file()]
    if options.pdf:
        say(options, f"PDF: {write_pdf(html, names, html.parent / 'llvlit.pdf')}")
    if options.screenshots:
        taken = take_screenshots(html, names, Path(options.screenshots))
        say(options, f"Screenshots: {len(taken)} in {options.screenshots}")
    return {"index": str(book.index), "seconds": book.seconds}


def publish(options: argparse.Namespace) -> dict[str, Any]:
    """Lay out the site of the built book."""
    from llvlit.publishing.site import publish_book

    done = publish_book(
        options.root,
        version=options.version,
        site=options.site,
        previous=options.previous,
        revision=options.revision,
    )
    say(options, f"The site: {done.site}\nVersions: {', '.join(done.versions)}\nFor a release: {done.archive.parent}")
    return {"site": str(done.site), "archive": str(done.archive), "versions": list(done.versions)}


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train the family."""
    from llvlit.training.family import train_family

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
    from llvlit.engine.models import embedded_names, load_model

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


def tasks(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """List the tasks, and of those on the hub how their rows are read."""
    from llvlit.tasks.sources import HUB_READING, HUB_TASKS
    from llvlit.tasks.task import task_facts

    facts = task_facts(options.data_dir)
    for name, one in facts.items():
        say(options, f"{name:<20} {one['description']}")
        if one["kind"] == "hub":
            say(options, f"{'':<22}{HUB_TASKS[name].place}\n{'':<22}{HUB_TASKS[name].reading}")
    say(options, f"\n{HUB_READING}")
    say(options, "Also: a .parquet file with the columns text and label (0 or 1).")
    return facts
