"""``python -m llvlit``: the command line."""

import sys

from llvlit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
