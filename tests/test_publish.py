"""The published site: notebooks that the buttons open and that run elsewhere, versions kept, archive and sums."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlparse

import nbformat
import pytest
from bs4 import BeautifulSoup
from test_book import command_builds

from llvlit.errors import BuildError, FileError, InputError
from llvlit.files import MARK, own
from llvlit.publishing.notebooks import SOURCE_FOLDER, install_cell, runnable
from llvlit.publishing.site import publish_book

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def book(shared, tmp_path_factory):
    """A copy of the tiny book, with what else is published beside it, in a repository with one commit."""
    copy = tmp_path_factory.mktemp("published") / "book"
    shutil.copytree(shared("secret_place", command_builds), copy, ignore=shutil.ignore_patterns("pictures"))
    complete(copy)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(copy)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "One"], check=True)
    return copy


def complete(root: Path) -> None:
    """Put beside a book what else is published."""
    html = root / "_build" / "html"
    for part in ("mathjax", "locales"):  # most of the bytes, none of the point
        shutil.rmtree(html / "_static" / part)
    for page in html.rglob("*.html"):
        page.write_text(re.sub(r"<script [^>]*mathjax/[^>]*></script>", "", page.read_text(encoding="utf-8")))
    (root / "results" / "real").mkdir(parents=True)
    (root / "results" / "real" / "cells.csv").write_text("a\n1\n")
    (root / "_build" / "llvlit.pdf").write_bytes(b"%PDF-1.7 stands for the book's")
    shutil.copytree(REPOSITORY / ".binder", root / ".binder")
    shutil.copy(REPOSITORY / "constraints.txt", root)


@pytest.fixture(scope="module")
def site(book):
    """A site with `latest` and three tags; v0.10.0 is newer than v0.9.0, and a candidate is no release."""
    site = book / "_build" / "site"
    for version in ("latest", "v0.9.0", "v0.10.0", "v0.11.0rc1"):
        publish_book(book, version=version, site=site, previous=site if site.exists() else None, revision="a" * 40)
    return site


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def launch_targets(page: Path) -> dict[str, str]:
    """Path on the published branch that each launch button of a page opens, by service."""
    targets = {}
    for address in re.findall(r'href="(https://(?:colab|mybinder)[^"]+)"', page.read_text(encoding="utf-8")):
        url = urlparse(address)
        if url.netloc == "colab.research.google.com":
            repository, _, place = url.path.removeprefix("/github/").partition("/blob/")
            branch, _, path = place.partition("/")
        else:
            repository, branch = url.path.removeprefix("/v2/gh/").rsplit("/", 1)
            (path,) = parse_qs(url.query)["urlpath"]
            path = path.removeprefix("lab/tree/")
        assert (repository, branch) == ("llvlit/llvlit", "gh-pages")
        targets[url.netloc] = path
    return targets


def check_buttons(site: Path) -> int:
    """Every chapter's buttons open executed notebooks of its own version, and so does its download; how many pages."""
    n_pages = 0
    for page in sorted(site.glob("*/book/*.html")):
        version = page.parents[1].name
        targets = launch_targets(page)
        if not (site / version / "notebooks" / "book" / f"{page.stem}.ipynb").exists():
            assert targets == {}, page
            continue
        assert set(targets) == {"colab.research.google.com", "mybinder.org"}, page
        (download,) = re.findall(r'href="(\.\./_sources/[^"]+\.ipynb)"', page.read_text(encoding="utf-8"))
        for path in (*(site / target for target in targets.values()), page.parent / download):
            assert path.resolve().relative_to(site.resolve()).parts[0] == version
            notebook = nbformat.read(path, as_version=4)
            nbformat.validate(notebook)
            install, *code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
            assert notebook.cells[0] == install and "find_spec" in install.source and "tags" not in install.metadata
            assert code and all(cell.execution_count for cell in code if "parameters" not in cell.metadata.tags), path
        n_pages += 1
    return n_pages


def test_buttons_and_downloads_lead_to_executed_notebooks_of_their_version(site):
    assert check_buttons(site) == 4


@pytest.mark.skipif(not (REPOSITORY / "_build" / "html" / "index.html").is_file(), reason="the book is not built")
def test_buttons_of_the_whole_book_lead_to_its_notebooks(tmp_path):
    built = REPOSITORY / "_build"
    if "latest/notebooks" not in (built / "html" / "book" / "intro.html").read_text(encoding="utf-8"):
        pytest.skip("the book was built by another version")
    done = publish_book(REPOSITORY, site=tmp_path / "site")
    assert check_buttons(done.site) == len(done.notebooks) > 0
    assert len(list((done.folder / "book").glob("*.html"))) > len(done.notebooks)


def test_a_button_without_its_notebook_is_refused_by_page(book, tmp_path):
    root = tmp_path / "book"
    shutil.copytree(book, root)
    page = root / "_build" / "html" / "book" / "chapter.html"
    page.write_text(page.read_text(encoding="utf-8").replace("notebooks/book/chapter", "notebooks/book/lost"))
    with pytest.raises(BuildError, match=r"latest/book/chapter.html: its launch button opens book/lost.ipynb"):
        publish_book(root, site=tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_settings_of_the_run_give_way_to_those_that_run_anywhere():
    cells = [
        nbformat.v4.new_markdown_cell("# Title"),
        nbformat.v4.new_code_cell('profile = "embedded"\ndevice = "auto"', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            '# Parameters\nprofile = "paper"\ndevice = "cuda"', metadata={"tags": ["injected-parameters"]}
        ),
        nbformat.v4.new_code_cell("print(profile)"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    install = install_cell("https://example.org/x", "v0.1.0")
    once = runnable(notebook, install)
    assert [cell.source for cell in once.cells] == [
        install.source,
        "# Title",
        '# The outputs below were computed with: profile = "paper"; device = "cuda"\n'
        'profile = "embedded"\ndevice = "auto"',
        "print(profile)",
    ]
    assert runnable(once, install).cells == once.cells
    assert len(notebook.cells) == 4 and notebook.cells[1].source.startswith("profile")


RUN_CELL = """
import importlib.util, json, pathlib, sys
from IPython.core.interactiveshell import InteractiveShell

notebook = json.loads(pathlib.Path(sys.argv[1]).read_text())
missing = sys.argv[2] == "missing"
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "llvlit" and missing else found(name)
shell = InteractiveShell.instance()
asked = []
shell.register_magic_function(asked.append, "line", "pip")
shell.run_cell("".join(notebook["cells"][0]["source"])).raise_error()
here = pathlib.Path.cwd()
print(json.dumps({"pip": asked, "folder": str(here), "files": sorted(path.name for path in here.iterdir())}))
"""


@pytest.mark.parametrize("state", ["missing", "installed"])
def test_first_cell_fetches_its_revision_where_the_package_is_missing(tmp_path, state):
    origin, here = tmp_path / "origin", tmp_path / "here"
    here.mkdir()
    origin.mkdir()
    git = partial(subprocess.run, cwd=origin, check=True, capture_output=True, text=True)
    git(["git", "init", "-q"])
    (origin / "mark.txt").write_text("this revision")
    git(["git", "add", "."])
    git(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "One"])
    revision = git(["git", "rev-parse", "HEAD"]).stdout.strip()
    notebook = nbformat.v4.new_notebook(cells=[install_cell(origin.as_uri(), revision)])
    nbformat.write(notebook, tmp_path / "first.ipynb")
    command = [sys.executable, "-c", RUN_CELL, str(tmp_path / "first.ipynb"), state]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    if state == "installed":
        assert told == {"pip": [], "folder": str(here), "files": []}
    else:
        assert told["pip"] == [f"install --quiet ./{SOURCE_FOLDER}"]
        assert told["folder"] == str(here / SOURCE_FOLDER) and "mark.txt" in told["files"]


def test_first_cell_hands_address_and_revision_to_git_alone(tmp_path):
    touch = "pathlib.Path('PWNED').touch()"
    odd = f"v0.1.0; touch PWNED {{__import__('pathlib') and {touch}}} $(touch PWNED) `touch PWNED` \""
    for number, first in enumerate((install_cell(odd), install_cell(tmp_path.as_uri(), odd))):
        here = tmp_path / str(number)
        here.mkdir()
        nbformat.write(nbformat.v4.new_notebook(cells=[first]), here / "first.ipynb")
        command = [sys.executable, "-c", RUN_CELL, "first.ipynb", "missing"]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0 and "CalledProcessError" in done.stdout + done.stderr
    assert list(tmp_path.rglob("PWNED")) == []


def test_notebooks_install_the_tag_or_the_full_commit(book, tmp_path):
    tagged = publish_book(book, version="v0.1.0", site=tmp_path / "tagged")
    assert "'v0.1.0']" in nbformat.read(tagged.notebooks[0], as_version=4).cells[0].source
    latest = publish_book(book, site=tmp_path / "latest")
    git = ["git", "-C", str(book), "rev-parse", "HEAD"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    assert len(commit) == 40
    assert f"'{commit}']" in nbformat.read(latest.notebooks[0], as_version=4).cells[0].source


def test_a_version_replaces_its_own_folder_alone(book, site, tmp_path):
    before = {version: digest(site / version) for version in ("latest", "v0.9.0", "v0.10.0")}
    again = tmp_path / "again"
    done = publish_book(book, version="v0.9.0", site=again, previous=site, revision="b" * 40)
    assert done.versions == ("latest", "v0.11.0rc1", "v0.10.0", "v0.9.0")
    after = {version: digest(again / version) for version in before}
    assert {version for version in before if before[version] != after[version]} == {"v0.9.0"}
    assert {path.name for path in again.iterdir()} == {path.name for path in site.iterdir()}


@pytest.mark.parametrize("reason", ["no repository", "no git"])
def test_a_commit_that_cannot_be_told_is_asked_for(book, tmp_path, monkeypatch, reason):
    root = tmp_path / "book"
    left_out = shutil.ignore_patterns("site*", *([".git"] if reason == "no repository" else []))
    shutil.copytree(book, root, ignore=left_out)
    if reason == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"cannot tell the commit of .*book.* Pass --revision"):
        publish_book(root, site=tmp_path / "site")
    assert not (tmp_path / "site").exists()
    done = publish_book(root, site=tmp_path / "site", revision="v0.1.0")
    assert "'v0.1.0']" in nbformat.read(done.notebooks[0], as_version=4).cells[0].source


def test_a_site_that_is_replaced_keeps_its_other_versions_and_files_or_stays(book, tmp_path):
    own_site, other = tmp_path / "site", tmp_path / "other"
    publish_book(book, site=own_site, revision="a" * 40)
    (own_site / "CNAME").write_text("book.example.org")
    before = digest(own_site / "latest")
    done = publish_book(book, version="v0.1.0", site=own_site, revision="b" * 40)
    assert done.versions == ("latest", "v0.1.0") and digest(own_site / "latest") == before
    assert (own_site / "CNAME").read_text() == "book.example.org"
    publish_book(book, site=other, revision="c" * 40)
    before = digest(own_site)
    with pytest.raises(FileError, match=r"CNAME, v0.1.0, which would be lost"):
        publish_book(book, site=own_site, previous=other, revision="c" * 40)
    assert digest(own_site) == before
    (own_site / "link").symlink_to(other)
    with pytest.raises(FileError, match="link is a symbolic link"):
        publish_book(book, site=own_site, revision="c" * 40)


def test_list_and_redirect_prefer_the_newest_release(book, site, tmp_path):
    rows = json.loads((site / "versions.json").read_text(encoding="utf-8"))
    assert [row["version"] for row in rows] == ["latest", "v0.11.0rc1", "v0.10.0", "v0.9.0"]
    assert [row["version"] for row in rows if row["preferred"]] == ["v0.10.0"]
    assert all((site / row["url"] / "index.html").is_file() and row["pdf"] for row in rows)
    assert 'url=v0.10.0/"' in (site / "index.html").read_text(encoding="utf-8")
    assert (site / ".nojekyll").exists()
    alone = publish_book(book, site=tmp_path / "alone").site
    assert 'url=latest/"' in (alone / "index.html").read_text(encoding="utf-8")


def test_version_folder_holds_tables_pdf_and_sums_of_everything(site):
    folder = site / "v0.10.0"
    assert (folder / "results" / "real" / "cells.csv").is_file() and (folder / "llvlit.pdf").is_file()
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: value for value, name in (line.split("  ", 1) for line in lines)}
    found = digest(folder)
    del found["SHA256SUMS"]
    assert sums == found


def test_binder_finds_its_files_at_the_root_of_the_branch(site):
    assert {path.name for path in (site / ".binder").iterdir()} >= {"requirements.txt", "postBuild", "runtime.txt"}
    assert (site / "constraints.txt").is_file()


def test_archive_is_the_folder_and_the_same_every_time(book, tmp_path):
    releases = []
    for name in ("one", "two"):
        done = publish_book(book, version="v0.1.0", site=tmp_path / name / "site", revision="c" * 40)
        releases.append(digest(done.archive.parent))
    assert releases[0] == releases[1]
    assert set(releases[0]) == {"llvlit-book-v0.1.0.tar.gz", "llvlit-book-v0.1.0.pdf", "SHA256SUMS", MARK}
    sums = (done.archive.parent / "SHA256SUMS").read_text(encoding="utf-8")
    for name in ("llvlit-book-v0.1.0.tar.gz", "llvlit-book-v0.1.0.pdf"):
        assert f"{releases[0][name]}  {name}\n" in sums
    with tarfile.open(done.archive) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert digest(tmp_path / "unpacked" / "llvlit-book-v0.1.0") == digest(done.folder)


@pytest.mark.parametrize("version", ["0.1.0", "v1", "../v0.1.0", "v0.1.0/..", ""])
def test_wrong_version_is_refused(book, version):
    with pytest.raises(InputError, match=re.escape(f"version={version!r}")):
        publish_book(book, version=version)


def test_what_is_no_site_is_never_replaced_nor_taken(book, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileError, match=r"is not a site .*holds thesis.txt, which llvlit did not write"):
        publish_book(book, site=tmp_path / "mine")
    with pytest.raises(FileError, match="no published site"):
        publish_book(book, site=tmp_path / "site", previous=tmp_path / "mine")
    with pytest.raises(FileError, match="no published site"):
        publish_book(book, site=tmp_path / "site", previous=tmp_path / "absent")
    with pytest.raises(BuildError, match="Run `llvlit book` first"):
        publish_book(tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_a_folder_with_a_list_of_versions_is_not_yet_ours(book, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "versions.json").write_text("[]")
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(FileError, match=r"holds thesis.txt, versions.json, which llvlit did not write"):
        publish_book(book, site=mine)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_checkout_of_the_published_branch_keeps_its_commits(book, site, tmp_path):
    checkout = tmp_path / "gh-pages"
    shutil.copytree(site, checkout)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(checkout)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "Not pushed yet"], check=True)
    with pytest.raises(FileError, match="repository"):
        publish_book(book, previous=checkout, site=checkout)
    log = subprocess.run([*git, "log", "--format=%s"], check=True, capture_output=True, text=True).stdout
    assert log == "Not pushed yet\n"
    done = publish_book(book, previous=checkout, site=tmp_path / "site")
    assert done.versions == ("latest", "v0.11.0rc1", "v0.10.0", "v0.9.0") and not (done.site / ".git").exists()


@pytest.mark.parametrize("place", ["previous", "results", "html"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_link_points_to_is_never_published(book, site, tmp_path, place, kind):
    root, previous, secret = tmp_path / "book", tmp_path / "previous", tmp_path / "secret"
    shutil.copytree(book, root, ignore=shutil.ignore_patterns("site*"))
    shutil.copytree(site, previous, ignore=shutil.ignore_patterns("v*"))
    (previous / "versions.json").write_text('[{"version": "latest"}]')
    secret.mkdir()
    (secret / "id_ed25519").write_text("a private key")
    folder = {"previous": previous / "latest", "results": root / "results", "html": root / "_build" / "html"}[place]
    (folder / "link").symlink_to(secret if kind == "folder" else secret / "id_ed25519")
    with pytest.raises(FileError, match=rf"{re.escape(str(folder / 'link'))} is a symbolic link"):
        publish_book(root, previous=previous, site=tmp_path / "site", version="v0.1.0")
    assert not (tmp_path / "site").exists() and not (tmp_path / "site-release").exists()


@pytest.mark.parametrize("fault", ["no mark", "broken off", "no pages"])
def test_a_build_that_is_not_whole_is_refused(book, tmp_path, fault):
    root = tmp_path / "book"
    shutil.copytree(book, root, ignore=shutil.ignore_patterns("site*"))
    html = root / "_build" / "html"
    if fault == "no mark":
        (html / MARK).unlink()
    elif fault == "broken off":
        own(html, "book")
    else:
        shutil.rmtree(html)
    with pytest.raises(BuildError, match=r"no whole book .* Run `llvlit book` first"):
        publish_book(root, site=tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_failure_leaves_the_old_site_and_release(book, tmp_path):
    root = tmp_path / "book"
    shutil.copytree(book, root, ignore=shutil.ignore_patterns("site*"))
    publish_book(root, site=tmp_path / "site", revision="a" * 40)
    before = digest(tmp_path / "site"), digest(tmp_path / "site-release")
    (root / "_build" / "html" / "book" / "chapter.html").write_bytes(b"\xff")
    with pytest.raises(FileError, match=r"chapter\.html cannot be read"):
        publish_book(root, site=tmp_path / "site", revision="b" * 40)
    assert (digest(tmp_path / "site"), digest(tmp_path / "site-release")) == before
    assert {path.name for path in tmp_path.iterdir()} == {"book", "site", "site-release"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"root": 5}, "root=5"),
        ({"root": ""}, "root=''"),
        ({"version": 1.0}, "version=1.0"),
        ({"version": "v1٢.0.0"}, "version="),
        ({"site": b"site"}, "site="),
        ({"site": "a\0b"}, "site="),
        ({"previous": object()}, "previous="),
        ({"revision": ""}, "revision=''"),
        ({"revision": "--upload-pack=touch x"}, "revision="),
        ({"revision": ["main"]}, "revision="),
    ],
)
def test_an_odd_argument_is_refused_by_name(book, arguments, told):
    with pytest.raises(InputError, match=re.escape(told)):
        publish_book(**{"root": book, **arguments})


@pytest.mark.parametrize("place", ["_build/html/site", "results/site", ".binder/site"])
def test_a_site_inside_what_it_copies_is_refused(book, place):
    before = digest(book)
    with pytest.raises(InputError, match="which is copied"):
        publish_book(book, site=book / place)
    assert digest(book) == before


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("_config.yml", b"title: no repository"),
        ("_config.yml", b"repository: [1, 2]"),
        ("_config.yml", b"\xff\xfe"),
        ("_build/html/_sources/book/chapter.ipynb", b'{"cells": ['),
        ("_build/html/_sources/book/chapter.ipynb", None),
        ("_build/html/_static/versions.js", b"\xff"),
        ("constraints.txt", None),
        ("previous/versions.json", b"{}"),
        ("previous/versions.json", b"nonsense"),
        ("previous/versions.json", b'[{"version": "v9.9.9"}]'),
    ],
)
def test_a_broken_file_is_refused_by_name(book, tmp_path, path, content):
    root = tmp_path / "book"
    shutil.copytree(book, root, ignore=shutil.ignore_patterns("site*"))
    previous = root / "previous"
    previous.mkdir()
    broken = root / path
    broken.unlink(missing_ok=True)
    if content is not None:
        broken.write_bytes(content)
    with pytest.raises(FileError, match=re.escape(broken.name)):
        publish_book(root, previous=previous, site=tmp_path / "site")
    assert not (tmp_path / "site").exists()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        """Say nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Address of a local server of a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def watched_page(browser):
    """A new page, what it asks for, and its complaints: failed requests, and errors of the menu's script."""
    page = browser.new_page()
    asked, complaints = [], []

    def failed(address: str) -> None:
        if not address.endswith("/favicon.ico"):
            complaints.append(address)

    def said(text: str, place: str) -> None:
        if "versions.js" in text + place:
            complaints.append(text)

    page.on("request", lambda request: asked.append(request.url))
    gone = "net::ERR_ABORTED"  # the page was left before the answer was read to its end
    page.on("requestfailed", lambda request: failed(request.url) if request.failure != gone else None)
    page.on("response", lambda response: failed(response.url) if response.status >= 400 else None)
    page.on("console", lambda message: said(message.text, str(message.location)) if message.type == "error" else None)
    page.on("pageerror", lambda error: said(str(error), str(error.stack)))
    return page, asked, complaints


def test_menu_leads_to_the_same_page_of_another_version(site, browser):
    page, asked, complaints = watched_page(browser)
    with served(site.parent) as address:
        page.goto(f"{address}/site/")
        page.wait_for_url("**/site/v0.10.0/book/intro.html")
        page.goto(f"{address}/site/v0.10.0/book/chapter.html")
        menu = page.get_by_label("Version of the book")
        assert menu.locator("option").all_inner_texts() == ["latest", "v0.11.0rc1", "v0.10.0 (stable)", "v0.9.0"]
        assert menu.input_value() == "v0.10.0/" and menu.is_visible()
        pdf = page.get_by_label("The whole book as PDF").get_attribute("href")
        assert pdf == f"{address}/site/v0.10.0/llvlit.pdf"
        menu.select_option("latest")
        page.wait_for_url("**/site/latest/book/chapter.html")
        assert page.get_by_label("Version of the book").input_value() == "latest/"
    assert complaints == [] and all(url.startswith((address, "data:")) for url in asked)
    page.close()


def test_menu_leads_to_the_first_page_where_the_other_version_lacks_this_one(site, browser, tmp_path):
    shutil.copytree(site, tmp_path / "site")
    (tmp_path / "site" / "v0.9.0" / "book" / "chapter.html").unlink()
    page, _, _ = watched_page(browser)
    with served(tmp_path / "site") as address:
        page.goto(f"{address}/latest/book/chapter.html")
        page.get_by_label("Version of the book").select_option("v0.9.0")
        page.wait_for_url("**/v0.9.0/book/intro.html")
    page.close()


RUN = {
    "versions": "newest",
    "outcome": "<failure>",
    "date": "2026-11-27 13:00",
    "commit": "0123456789ab",
    "python": "3.13.1",
    "torch": "9.9.0+cpu",
    "transformers": "8.8.0",
}


def cells_of_runs(page: Path) -> list[str]:
    """What stands in the table of daily builds."""
    found = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").select("table.daily-runs td")
    return [cell.get_text() for cell in found]


def test_daily_builds_are_taken_into_the_page_that_tells_of_them(book, tmp_path):
    site = tmp_path / "site"
    publish_book(book, site=site, revision="a" * 40)
    (told,) = cells_of_runs(site / "latest" / "book" / "intro.html")
    assert "knows of none" in told and json.loads((site / "runs.json").read_text()) == []
    (site / "runs.json").write_text(json.dumps([RUN | {"more": 1}, RUN | {"versions": "locked"}]))
    publish_book(book, site=site, revision="a" * 40)
    cells = cells_of_runs(site / "latest" / "book" / "intro.html")
    assert cells == [*RUN.values(), "locked", *list(RUN.values())[1:]] and "more" not in cells
    assert json.loads((site / "runs.json").read_text())[0]["torch"] == "9.9.0+cpu"
    (site / "runs.json").write_text(json.dumps([{"torch": "9.9.0"}]))
    with pytest.raises(FileError, match=r"runs\.json cannot be read as the list of daily builds .*versions"):
        publish_book(book, site=site, revision="a" * 40)


def test_a_published_page_reads_the_newest_daily_builds(site, browser, tmp_path):
    shutil.copytree(site, tmp_path / "site")
    page, _, complaints = watched_page(browser)
    with served(tmp_path / "site") as address:
        page.goto(f"{address}/latest/book/intro.html")
        page.get_by_label("Version of the book").wait_for()
        assert "knows of none" in page.locator(".daily-runs td").inner_text()
        (tmp_path / "site" / "runs.json").write_text(json.dumps([RUN]))
        page.reload()
        page.locator(".daily-runs td").nth(6).wait_for()
        assert page.locator(".daily-runs td").all_inner_texts() == list(RUN.values())
    assert complaints == []
    page.close()


@pytest.mark.parametrize("place", ["site/v0.9.0", "html"])
def test_book_from_disk_asks_for_no_list(book, site, browser, place):
    page, asked, complaints = watched_page(browser)
    page.goto((book / "_build" / place / "book" / "chapter.html").as_uri())
    assert complaints == [] and [url for url in asked if url.endswith("_static/versions.js") or "versions.js?" in url]
    assert [url for url in asked if "versions.json" in url or not url.startswith(("file:", "data:"))] == []
    assert page.get_by_label("Version of the book").count() == 0
    page.close()


def test_unpublished_book_on_a_server_asks_for_no_list(book, browser):
    page, asked, complaints = watched_page(browser)
    with served(book / "_build" / "html") as address:
        page.goto(f"{address}/book/chapter.html")
    assert complaints == [] and not [url for url in asked if "versions.json" in url]
    page.close()
