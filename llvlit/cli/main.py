"""Command line: llvlit gains | order | recommend | steer | study | train, the book's, and lists."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from llvlit.cli import book, gains, lists, order, recommend, steer, study, train
from llvlit.cli.options import check_idle, plain_numbers
from llvlit.cli.terminal import complain, printing, write
from llvlit.errors import ConceptNotVisibleError, InputError, LlvlitError

FIRST_STEPS = """\
llvlit: which layers of a transformer move a concept, how strongly, and what is the cheapest push?

  llvlit gains                            gain of every layer of a shipped model, measured and predicted
  llvlit order                            how many numbers carry a concept through its depth
  llvlit recommend                        which layers to push, how strongly, and what it will cost
  llvlit steer                            text generated as it is, as recommended, and with a uniform push
  llvlit models; llvlit tasks             what can be named
  llvlit --help                           all commands; each has --help with an example

No network and no GPU is needed."""

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# The imports of torch and transformers make hundreds of thousands of objects that live to the end. At Python's own
# threshold of 700 a quarter of their time goes into looking through them for garbage.
NEW_OBJECTS_UNTIL_COLLECTION = 50_000


def parser() -> argparse.ArgumentParser:
    """The parser of the command line, with a parser of its own for each command."""
    parser = argparse.ArgumentParser(
        prog="llvlit",
        description="System identification of transformers: depth as time, one push per layer, "
        "what it does to a concept at the output, and the cheapest push that reaches a target.",
        epilog="Start with `llvlit gains`. Every command has --help with an example.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (book, gains, order, recommend, steer, study, train, lists):
        group.mount(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what goes wrong is told on standard error.

    Returns 0 if all is done, 1 if it failed, 2 if it asks for what cannot be, 130 if it was interrupted.
    """
    if arguments is None:  # a shell's command: the process is ours
        gc.set_threshold(NEW_OBJECTS_UNTIL_COLLECTION)
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if not words:
            write(FIRST_STEPS)
            return DONE
        with printing():
            options = parser().parse_args(plain_numbers(words))
        logging.getLogger("transformers").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            usual = warnings.showwarning

            def tell(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
                if category is UserWarning:  # ours: the place in the code is no help
                    complain(f"llvlit {words[0]}: {message}")
                else:
                    usual(message, category, *place, **more)

            warnings.showwarning = tell
            check_idle(options)
            options.run(options)
        return DONE
    except BrokenPipeError:  # whoever reads has left, as `head` does: nothing to say
        return FAILED
    except KeyboardInterrupt:
        complain(f"llvlit {words[0]}: interrupted; finished results are kept.")
        return INTERRUPTED
    except (LlvlitError, OSError) as error:  # the system's own: a file or folder that was named
        complain(" ".join(["llvlit", *words[:1]]) + f": {error}")
        return USAGE if isinstance(error, InputError | ConceptNotVisibleError) else FAILED


if __name__ == "__main__":
    sys.exit(main())
