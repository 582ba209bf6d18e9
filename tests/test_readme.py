"""The README's example runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from llvlit.cli.main import parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 13  # ten lines, and what a `with` and a blank line take
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})  # in this process, where all is imported already
    printed = capsys.readouterr().out
    assert "spearman" in printed
    plain, steered = (line for line in printed.splitlines() if line.startswith("The plot was thin, and"))
    assert plain != steered


def test_local_links_exist():
    targets = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    assert targets
    assert [link for link in targets if not (ROOT / link).exists()] == []


def test_every_command_in_the_table_exists():
    named = set(re.findall(r"`llvlit (\w+)", README))
    listed = set(re.findall(r"^    (\w+)", parser().format_help(), re.MULTILINE))
    assert named == listed


def test_every_command_line_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^(?:llvlit|.* && llvlit) .*", README, re.MULTILINE)
    assert len(lines) > 6
    for line in lines:
        for command in line.partition("#")[0].split("&&"):
            program, *words = shlex.split(command)
            assert program == "llvlit" and parser().parse_args(words).command in words


def test_local_links_of_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [
        link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link and not (ROOT / link).exists()
    ] == []
