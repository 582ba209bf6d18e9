"""``llvlit book``, ``llvlit publish`` and ``llvlit exercises``: what is made of the chapters."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llvlit.cli.options import add_device, command
from llvlit.cli.terminal import show
from llvlit.errors import BuildError, InputError

ROOT_HELP = "folder with _config.yml and _toc.yml (default: here)"


def mount(commands: Any) -> None:
    """Add the commands."""
    parser = command(commands, book, "llvlit book --chapters gains\n  llvlit book --profile embedded")
    parser.add_argument("--root", default=".", help=ROOT_HELP)
    parser.add_argument(
        "--profile",
        default="pretrained",
        help="pretrained (default: SmolLM2-135M, offline), embedded (offline), paper (hub), or a folder of models",
    )
    add_device(parser)
    parser.add_argument("--chapters", nargs="+", metavar="NAME", help="execute these only, such as: gains control")
    parser.add_argument("--no-pages", action="store_true", help="execute, and leave the built pages as they are")
    parser.add_argument(
        "--rules", action="store_true", help="execute nothing: print what each chapter shows and asks, and its limits"
    )
    parser.add_argument(
        "--pdf", action="store_true", help="also print the book into _build/llvlit.pdf (needs Chromium)"
    )
    parser.add_argument("--screenshots", metavar="FOLDER", help="also every page as PNG: light, dark, phone (Chromium)")
    parser.add_argument("--jobs", type="count", help="chapters executed at once")

    parser = command(commands, publish, "llvlit publish\n  llvlit publish --version v0.1.0 --previous gh-pages")
    parser.add_argument("--root", default=".", help="folder of the book, already built (default: here)")
    parser.add_argument("--version", default="latest", help="latest (default), or a tag such as v0.1.0")
    parser.add_argument("--site", metavar="FOLDER", help="folder to write (default _build/site)")
    parser.add_argument("--previous", metavar="FOLDER", help="site whose other versions are kept (default: --site)")
    parser.add_argument("--revision", help="commit or tag that notebooks install (default: the tag, or this commit)")

    parser = command(commands, exercises, "llvlit exercises --out course")
    parser.add_argument("--root", default=".", help=ROOT_HELP)
    parser.add_argument("--out", default="exercises", metavar="FOLDER", help="folder to write (default exercises)")
    parser.add_argument("--force", action="store_true", help="replace notebooks there that differ")


def book(options: argparse.Namespace) -> None:
    """Execute every chapter and build the book."""
    if options.no_pages and (options.pdf or options.screenshots):
        raise InputError("--no-pages builds no page; leave out --pdf and --screenshots, which show pages.")
    if options.rules:
        _rules(options)
        return
    from llvlit.publishing.browser import take_screenshots, write_pdf
    from llvlit.publishing.build import build_book
    from llvlit.publishing.pages import read_pages

    built = build_book(
        options.root,
        profile=options.profile,
        device=options.device,
        chapters=options.chapters,
        jobs=options.jobs,
        progress=not options.json,
        pages=not options.no_pages,
    )
    if built.index is None:
        executed = Path(options.root) / "_build" / "executed"
        show(options, {"executed": executed, "seconds": built.seconds}, f"Executed: {len(built.seconds)} in {executed}")
        return
    html = built.index.parent
    names = [page.name for page in read_pages(Path(options.root)) if (html / f"{page.name}.html").is_file()]
    lines = [f"The book: {built.index}"]
    try:
        if options.pdf:
            lines.append(f"PDF: {write_pdf(html, names, html.parent / 'llvlit.pdf')}")
        if options.screenshots:
            taken = take_screenshots(html, names, Path(options.screenshots))
            lines.append(f"Screenshots: {len(taken)} in {options.screenshots}")
    finally:
        show(options, {"index": built.index, "seconds": built.seconds}, "\n".join(lines))


def _rules(options: argparse.Namespace) -> None:
    """Count each chapter, print the counts, and fail where a rule is broken."""
    from llvlit.publishing.pages import read_pages
    from llvlit.publishing.rules import count_book, counts_table, rule_faults

    root = Path(options.root)
    counts = count_book(root, read_pages(root))
    show(options, {"pages": counts}, counts_table(counts))
    if faults := rule_faults(counts):
        raise BuildError("\n".join(faults))


def publish(options: argparse.Namespace) -> None:
    """Lay out the site of the built book: a folder for this version, beside the versions it already has."""
    from llvlit.publishing.site import publish_book

    published = publish_book(
        options.root,
        version=options.version,
        site=options.site,
        previous=options.previous,
        revision=options.revision,
    )
    data = {"site": published.site, "archive": published.archive, "versions": published.versions}
    lines = [f"The site: {published.site}", f"Versions: {', '.join(published.versions)}"]
    show(options, data, "\n".join([*lines, f"For a release: {published.archive.parent}"]))


def exercises(options: argparse.Namespace) -> None:
    """Write each chapter as a notebook without solutions for students, and with them for instructors."""
    from llvlit.publishing.notebooks import write_exercises

    written = write_exercises(options.root, options.out, force=options.force)
    lines = [
        f"{exercise.page.rpartition('/')[2]:<16} {'*' * exercise.stars:<4} {exercise.title} ({exercise.label})"
        for exercise in written.exercises
    ]
    lines.append(
        f"\n{len(written.student)} notebooks for students, {len(written.instructor)} for instructors: {options.out}"
    )
    show(options, written, "\n".join(lines))
