"""The README's example runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_as_it_stands(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 13  # ten lines, and what a `with` and a blank line take
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "spearman" in done.stdout
    assert "The plot was thin, and" in done.stdout


def test_local_links_exist():
    targets = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    assert targets
    assert [link for link in targets if not (ROOT / link).exists()] == []


def test_every_command_in_the_table_exists():
    from llvlit.cli.main import parser

    commands = set(re.findall(r"`llvlit (\w+)", README))
    (choices,) = [action.choices for action in parser()._actions if action.choices]
    assert commands == set(choices)
