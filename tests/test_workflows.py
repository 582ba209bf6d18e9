"""The workflows: who may do what, where code from outside runs, and their scripts against a repository on disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from llvlit.publishing.daily import read_runs

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
}
BOOK = WORKFLOWS["book"]["jobs"]


def events(workflow) -> dict:
    return workflow[True]  # YAML reads the key `on` as true


def steps():
    for name, workflow in WORKFLOWS.items():
        for job in workflow["jobs"].values():
            for step in job["steps"]:
                yield name, job, step


def script(job, name: str) -> str:
    (found,) = (step["run"] for step in job["steps"] if step.get("name") == name)
    return found


def run(text: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a step as GitHub does; what it would ask of github.com comes from ``GIT_CONFIG_*``."""
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", text]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **variables})


@pytest.mark.parametrize("name", WORKFLOWS)
def test_rights_are_the_least(name):
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"} and "pull_request_target" not in events(workflow)
    writers = {key for key, job in workflow["jobs"].items() if job.get("permissions", {}) != {}}
    assert writers == {"book": {"publish", "release"}, "daily": {"publish"}}.get(name, set())
    for key in writers:
        job = workflow["jobs"][key]
        assert job["permissions"] == {"contents": "write"} and job["runs-on"] == "ubuntu-latest" and "if" in job
        assert not any("checkout" in step.get("uses", "") for step in job["steps"]), "a writer runs no code of the book"


def test_self_hosted_runner_never_sees_a_pull_request():
    for workflow in WORKFLOWS.values():
        runners = str([job["runs-on"] for job in workflow["jobs"].values()])
        assert "self-hosted" not in runners or "pull_request" not in events(workflow)
    assert BOOK["execute"]["runs-on"] == ["self-hosted", "gpu"]


def test_actions_are_pinned_by_commit_and_no_checkout_leaves_a_token():
    for name, _, step in steps():
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]), f"{name}: {step['uses']}"
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False
        assert "${{" not in step.get("run", ""), f"{name}: pass values by env, so that no text of others is run"


def test_zizmor_finds_nothing():
    program = shutil.which("zizmor", path=Path(sys.executable).parent)
    done = subprocess.run([str(program), "--offline", "--quiet", ROOT / ".github"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_second_index_can_offer_a_package():
    for path in (*(ROOT / ".github" / "workflows").glob("*.yml"), *(ROOT / ".binder").iterdir(), ROOT / "Makefile"):
        assert not re.search("extra.index", path.read_text(encoding="utf-8"), re.IGNORECASE), path


def test_events():
    assert events(WORKFLOWS["book"])["push"] == {"branches": ["main"], "tags": ["v*"]}
    assert "pull_request" in events(WORKFLOWS["ci"])
    (weekly,) = events(WORKFLOWS["links"])["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", weekly["cron"])
    assert any(step.get("run") == "make links" for name, _, step in steps() if name == "links")
    (daily,) = events(WORKFLOWS["daily"])["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* \*", daily["cron"])
    assert WORKFLOWS["daily"]["jobs"]["build"]["strategy"]["matrix"]["versions"] == ["locked", "newest"]


def test_pull_requests_get_the_built_book():
    (kept,) = (step for _, _, step in steps() if step.get("name") == "Keep the built book")
    assert kept["uses"].startswith("actions/upload-artifact") and kept["with"]["path"] == "_build/site/latest"
    assert "failure" not in kept["if"]


def test_hidden_files_of_the_site_are_kept():
    (kept,) = (step for step in BOOK["execute"]["steps"] if step.get("with", {}).get("path") == "_build/site")
    assert kept["with"]["include-hidden-files"] is True


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [("branch", "main", "latest"), ("tag", "v0.1.0", "v0.1.0"), ("tag", "v0.2.0", None), ("tag", "v0", None)],
)
def test_a_tag_must_be_the_version_of_the_project(tmp_path, kind, name, told):
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.1.0"\n')
    output = tmp_path / "output"
    done = run(script(BOOK["execute"], "Name the version"), tmp_path, KIND=kind, NAME=name, GITHUB_OUTPUT=str(output))
    assert (done.returncode == 0) == (told is not None), done.stdout
    if told:
        assert output.read_text() == f"version={told}\n"
    else:
        assert "is not the version in pyproject.toml" in done.stdout


@pytest.fixture
def origin(tmp_path):
    """An empty repository that stands for the one on github.com, and the variables that let git take it so."""
    bare = tmp_path / "origin.git"
    subprocess.run(["git", "init", "-q", "--bare", str(bare)], check=True)
    return bare, {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{bare.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://x-access-token:secret@github.com/llvlit/llvlit.git",
        "TOKEN": "secret",
        "GITHUB_REPOSITORY": "llvlit/llvlit",
        "GITHUB_SHA": "0" * 40,
    }


def test_publishing_keeps_what_is_there_and_refuses_a_stale_site(tmp_path, origin):
    bare, variables = origin
    fetch = script(BOOK["execute"], "Fetch what is published")
    push = script(BOOK["publish"], "Replace the gh-pages branch")

    def fetched(name: str) -> tuple[Path, str]:
        """Folder with what is published, and the commit it is of."""
        folder, output = tmp_path / name, tmp_path / f"{name}.output"
        folder.mkdir()
        done = run(fetch, folder, **variables, GITHUB_OUTPUT=str(output))
        assert done.returncode == 0, done.stderr
        return folder / "_build" / "previous", output.read_text().strip().removeprefix("tip=")

    def pushed(folder: Path, tip: str) -> bool:
        return run(push, folder, **variables, TIP=tip, VERSION="latest").returncode == 0

    site, tip = fetched("first")
    assert tip == "" and list(site.iterdir()) == []
    (site / ".nojekyll").touch()
    (site / "latest").mkdir()
    (site / "latest" / "index.html").write_text("one")
    assert pushed(site, tip)

    site, tip = fetched("second")
    assert re.fullmatch(r"[0-9a-f]{40}", tip)
    assert sorted(path.name for path in site.iterdir()) == [".nojekyll", "latest"]
    (site / "v0.1.0").mkdir()
    (site / "v0.1.0" / "index.html").write_text("two")
    assert pushed(site, tip)

    site, newest = fetched("third")
    assert sorted(path.name for path in site.iterdir()) == [".nojekyll", "latest", "v0.1.0"]
    (site / "latest" / "index.html").write_text("three")
    assert not pushed(site, tip), "a site that was made from an older branch must not replace the newer"
    log = subprocess.run(["git", "-C", str(bare), "rev-list", "gh-pages"], capture_output=True, text=True, check=True)
    assert log.stdout.split() == [newest]


def test_a_daily_build_tells_its_versions_where_the_status_page_reads_them(tmp_path, origin):
    bare, variables = origin
    daily = WORKFLOWS["daily"]["jobs"]
    tell = script(daily["build"], "Tell how it went")
    put = script(daily["publish"], "Put the outcome above the published versions")
    for versions, outcome in {"locked": "success", "newest": "failure"}.items():
        folder = tmp_path / "runs" / f"run-{versions}"
        program = folder / ".venv" / "bin" / "python"
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        program.chmod(0o755)
        done = run(tell, folder, **variables, VERSIONS=versions, OUTCOME=outcome)
        assert done.returncode == 0, done.stderr
    assert "No book is published yet" in run(put, tmp_path, **variables).stdout
    site = tmp_path / "published"
    (site / "latest").mkdir(parents=True)
    (site / "latest" / "index.html").write_text("one")
    push = script(BOOK["publish"], "Replace the gh-pages branch")
    assert run(push, site, **variables, TIP="", VERSION="latest").returncode == 0
    for _ in range(2):  # a second day replaces the first
        shutil.rmtree(tmp_path / "site", ignore_errors=True)
        done = run(put, tmp_path, **variables)
        assert done.returncode == 0, done.stderr
    shown = subprocess.run(
        ["git", "-C", bare, "show", "gh-pages:runs.json"], capture_output=True, text=True, check=True
    )
    (tmp_path / "runs.json").write_text(shown.stdout)
    locked, newest = read_runs(tmp_path / "runs.json")
    assert (locked["versions"], locked["outcome"]) == ("locked", "success")
    assert (newest["versions"], newest["outcome"], newest["commit"]) == ("newest", "failure", "0" * 12)
    assert newest["torch"] == version("torch") and newest["transformers"] == version("transformers")
    kept = subprocess.run(["git", "-C", bare, "ls-tree", "--name-only", "gh-pages"], capture_output=True, text=True)
    assert kept.stdout.split() == ["latest", "runs.json"]
    log = subprocess.run(["git", "-C", bare, "rev-list", "--count", "gh-pages"], capture_output=True, text=True)
    assert log.stdout.strip() == "1"


def test_an_unreachable_branch_is_not_taken_for_an_absent_one(tmp_path, origin):
    bare, variables = origin
    bare.rename(tmp_path / "gone")
    done = run(script(BOOK["execute"], "Fetch what is published"), tmp_path, **variables, GITHUB_OUTPUT=os.devnull)
    assert done.returncode != 0


@pytest.mark.parametrize("exists", [True, False])
def test_release_gets_the_archive_with_its_sums(tmp_path, exists):
    asked, bin_folder = tmp_path / "asked", tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "gh").write_text(f'#!/bin/sh\necho "$@" >> {asked}\ntest "$2" != view || exit {0 if exists else 1}\n')
    (bin_folder / "gh").chmod(0o755)
    (tmp_path / "release").mkdir()
    for name in ("SHA256SUMS", "llvlit-book-v0.1.0.tar.gz"):
        (tmp_path / "release" / name).touch()
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    done = run(script(BOOK["release"], "Attach the archive and its checksums"), tmp_path, PATH=path, TAG="v0.1.0")
    assert done.returncode == 0, done.stderr
    view, *create, upload = asked.read_text().splitlines()
    assert view == "release view v0.1.0" and len(create) == (not exists)
    assert upload == "release upload v0.1.0 release/SHA256SUMS release/llvlit-book-v0.1.0.tar.gz --clobber"
    assert json.dumps(BOOK["release"]["needs"]) == '["execute", "publish"]'
