"""What ``llvlit exercises`` does; it returns what ``--json`` prints."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from llvlit.cli.commands import say


def exercises(options: argparse.Namespace) -> dict[str, Any]:
    """Write student and instructor notebooks, and list the exercises in them."""
    from llvlit.publishing.directives import STAR
    from llvlit.publishing.exercises import write_exercises

    written = write_exercises(options.root, options.out, force=options.force)
    for one in written.exercises:
        say(options, f"{one.page.rpartition('/')[2]:<16} {STAR * one.stars:<4} {one.title} ({one.label})")
    say(
        options,
        f"\n{len(written.student)} notebooks for students, {len(written.instructor)} for instructors: {options.out}",
    )
    return {
        "student": [str(path) for path in written.student],
        "instructor": [str(path) for path in written.instructor],
        "exercises": [asdict(one) for one in written.exercises],
    }
