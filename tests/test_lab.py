"""Every chapter opens as a notebook in JupyterLab straight from its text; Binder gets what that needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import jupytext
import pytest
import yaml
from packaging.requirements import Requirement

from llvlit.publishing.pages import read_pages

ROOT = Path(__file__).resolve().parent.parent
CPU_BUILDS = (ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8")
CHAPTERS = [page for page in read_pages(ROOT) if page.is_chapter]
TOKEN = "secret"


def answers(address: str) -> bool:
    try:
        with urlopen(f"{address}api", timeout=60):
            return True
    except URLError:
        return False


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """`jupyter lab` in a copy of the book: its address, and the copy."""
    folder, runtime = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("runtime")
    shutil.copytree(ROOT / "book", folder / "book")
    shutil.copy(ROOT / "jupytext.toml", folder)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0"]
    options = [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}"]
    names = {"JUPYTER_RUNTIME_DIR": runtime, "JUPYTER_CONFIG_DIR": runtime, "JUPYTER_DATA_DIR": runtime}
    environment = {**os.environ, **{name: str(place) for name, place in names.items()}}
    with (runtime / "log").open("w") as log:
        process = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + 120
        while not (found := list(runtime.glob("jpserver-*.json"))):
            assert process.poll() is None and time.monotonic() < deadline, (runtime / "log").read_text()
            time.sleep(0.2)
        address = json.loads(found[0].read_text())["url"]
        while not answers(address):  # the file is there a moment before the server listens
            assert process.poll() is None and time.monotonic() < deadline, (runtime / "log").read_text()
            time.sleep(0.2)
        yield address, folder
    finally:
        process.terminate()
        process.wait(30)


def contents(address: str, path: str, saved: dict | None = None) -> dict:
    """What JupyterLab gets when it opens a file as a notebook, or sends when it saves one."""
    body = None if saved is None else json.dumps(saved).encode()
    request = Request(f"{address}api/contents/{path}{'' if saved else '?type=notebook'}", data=body)
    request.method = "GET" if saved is None else "PUT"
    request.add_header("Authorization", f"token {TOKEN}")
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_chapters_open_as_notebooks_and_saving_leaves_their_text(lab):
    address, folder = lab
    assert CHAPTERS
    for page in CHAPTERS:
        model = contents(address, page.source)
        notebook = model["content"]
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert model["type"] == "notebook" and notebook["metadata"]["kernelspec"]["name"] == "python3"
        assert len(code) == page.text.count("```{code-cell}"), page.source
        contents(address, page.source, {"type": "notebook", "format": "json", "content": notebook})
        assert (folder / page.source).read_text(encoding="utf-8") == page.text, page.source


def test_an_edit_in_the_notebook_arrives_in_the_text(lab):
    address, folder = lab
    page = CHAPTERS[0]
    notebook = contents(address, page.source)["content"]
    notebook["cells"][-1]["source"] += "\n\nOne more sentence."
    contents(address, page.source, {"type": "notebook", "format": "json", "content": notebook})
    text = (folder / page.source).read_text(encoding="utf-8")
    assert text.endswith("One more sentence.\n") and text.startswith(page.text.rstrip("\n"))


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.name)
def test_text_to_ipynb_and_back_is_the_same(page, tmp_path):
    path = tmp_path / "chapter.ipynb"
    jupytext.write(jupytext.reads(page.text, fmt="md:myst"), path)
    back = jupytext.writes(jupytext.read(path), fmt="md:myst")
    body = re.compile(r"^---\n.*?\n---\n", re.DOTALL)
    assert body.sub("", back) == body.sub("", page.text)


def test_binder_installs_what_the_package_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / ".binder" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = {Requirement(line).name: line for line in lines if not line.startswith(("#", "--"))}
    needed = (
        project["dependencies"] + project["optional-dependencies"]["lab"] + project["optional-dependencies"]["gguf"]
    )
    assert listed.keys() == {Requirement(line).name for line in needed}
    assert "--constraint ../constraints.txt" in lines and (ROOT / "constraints.txt").is_file()
    assert not any("index" in line for line in lines if line.startswith("--"))
    address, _, digest = listed["torch"].removeprefix("torch @ ").partition("#sha256=")
    python = re.sub(r"\W", "", (ROOT / ".binder" / "runtime.txt").read_text().removeprefix("python-"))
    assert f"-cp{python}-" in address
    assert f"--hash=sha256:{digest}" in CPU_BUILDS


def test_binder_scripts_can_run_and_its_python_is_one_we_support():
    script = ROOT / ".binder" / "postBuild"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    minor = int(re.fullmatch(r"python-3\.(\d+)\n", (ROOT / ".binder" / "runtime.txt").read_text())[1])
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    tested = [int(version.split(".")[1]) for version in ci["jobs"]["book"]["strategy"]["matrix"]["python"]]
    assert min(tested) <= minor <= max(tested)
