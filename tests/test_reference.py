"""The reference: all of the public surface with examples, the command line as it is, an index that finds terms."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from bs4 import BeautifulSoup

import llvlit
from llvlit.cli.main import main
from llvlit.publishing.build import build_book
from llvlit.publishing.pages import read_pages

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "book").glob("api*.md"))
THEMES = [path for path in PAGES if path.name != "api.md"]
OVERVIEW = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
NEAREST = {
    "linear-quadratic": "skifstad2026",
    "Jacobian lens": "gurnee2026",
    "tuned lens": "belrose2023",
    "Activation addition": "turner2023",
    "repeng": "vogel2024",
    "steering-vectors": "chanin2024",
    "Representation engineering": "zou2023",
    "Balanced truncation": "moore1981",
    "Krylov": "grimme1997",
    "pyMOR": "milk2016",
    "python-control": "fuller2021",
}


def documented(paths: list[Path]) -> set[str]:
    """Dotted names that directives on these pages describe."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    found = re.findall(r"^\.\. auto(?:function|class|exception|module):: ([\w.]+)$", text, flags=re.MULTILINE)
    data = re.findall(r"^\.\. py:data:: (\w+)\n   :module: ([\w.]+)$", text, flags=re.MULTILINE)
    return {*found, *(f"{module}.{name}" for name, module in data)}


def thing(name: str) -> Any:
    """What a dotted name stands for: a module, or something in one."""
    home, _, last = name.rpartition(".")
    try:
        return import_module(name)
    except ModuleNotFoundError:
        return getattr(import_module(home), last)


def same(name: str) -> str:
    """The name under which the reference describes it: names of the package itself go by the package."""
    last = name.rpartition(".")[2]
    return f"llvlit.{last}" if last in llvlit.__all__ and thing(name) is getattr(llvlit, last) else name


def imported_by_chapters() -> set[str]:
    """Names that the book's code imports from llvlit."""
    found = set()
    for page in read_pages(ROOT):
        for code in re.findall(r"```\{code-cell\}[^\n]*\n(.*?)```", page.text, flags=re.DOTALL):
            plain = "\n".join(line for line in code.splitlines() if not line.startswith((":", "%", "!")))
            for node in ast.walk(ast.parse(plain)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llvlit":
                    found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_public_name_and_every_name_of_the_chapters_is_described():
    wanted = {f"llvlit.{name}" for name in llvlit.__all__}
    chapters = {same(name) for name in imported_by_chapters()}
    assert len(chapters) > 30
    described = documented(PAGES)
    assert wanted - described == set()
    missing = {name for name in chapters - described if not inspect.ismodule(thing(name))}
    assert missing == set()


@pytest.mark.parametrize("name", sorted(name for name in documented(PAGES) if callable(thing(name))))
def test_everything_described_has_an_example(name):
    assert "\n>>> " in (inspect.getdoc(thing(name)) or ""), name


def test_the_overview_lists_what_the_pages_describe_and_each_page_is_in_the_contents():
    listed = set(re.findall(r"^   ~([\w.]+)$", OVERVIEW, flags=re.MULTILINE))
    described = {name for name in documented(THEMES) if callable(thing(name))}
    assert listed == described
    assert {path.stem for path in PAGES} <= {Path(page.name).stem for page in read_pages(ROOT)}


def test_examples_see_the_first_lines_and_nothing_of_their_module(pytester):
    pytester.makeconftest((ROOT / "conftest.py").read_text(encoding="utf-8"))
    example = '"""Doc.\n\n>>> {}\n1\n"""\nhidden = 1\n'
    pytester.makepyfile(sees=example.format("len([model])"), hides=example.format("hidden"))
    result = pytester.runpytest_inprocess("--doctest-modules", "sees.py", "hides.py")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*NameError: name 'hidden' is not defined*"])


@pytest.mark.parametrize("name", NEAREST)
def test_related_work_tells_the_nearest_work_from_ours(name):
    sections = (ROOT / "book" / "related_work.md").read_text(encoding="utf-8").split("\n## ")
    (section,) = (part for part in sections if NEAREST[name] in part and not part.startswith("Which tool"))
    assert name in section and re.search(r"\b(?:[Oo]urs?|[Ww]e|llvlit)\b", section)
    entries = (ROOT / "book" / "references.bib").read_text(encoding="utf-8").split("\n@")
    (entry,) = (part for part in entries if f"{{{NEAREST[name]}," in part)
    assert name != "linear-quadratic" or "eprint = {2604.19018}" in entry


def write_reference(root: Path) -> None:
    """The reference alone, built under the real settings; what other pages would define is left out."""
    shutil.copytree(ROOT / "book" / "_static", root / "book" / "_static")
    shutil.copy(ROOT / "_config.yml", root)
    shutil.copy(ROOT / "book" / "references.bib", root / "book")
    for path in [*PAGES, ROOT / "book" / "cli.md", ROOT / "book" / "glossary.md"]:
        text = re.sub(r"\{doc\}`(?!api)[^`]+`", "a chapter", path.read_text(encoding="utf-8"))
        text = re.sub(r"\{(?:term|eq)\}`([^`]*)`", r"\1", text)
        (root / "book" / path.name).write_text(text, encoding="utf-8")
    names = ["cli", "glossary", *(path.stem for path in THEMES)]
    chapters = [{"file": f"book/{name}"} for name in names] + [{"file": "genindex"}]
    contents = {"format": "jb-book", "root": "book/api", "chapters": chapters}
    (root / "_toc.yml").write_text(yaml.safe_dump(contents), encoding="utf-8")
    build_book(root, profile="embedded", device="cpu", progress=False)


@pytest.fixture(scope="session")
def small_book(shared) -> Path:
    return shared("reference", write_reference) / "_build" / "html"


def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def words(text: str) -> set[str]:
    return set(re.findall(r"[\w.:/*~%-]+", text.replace("[", " ").replace("]", " ")))


def test_the_command_line_page_says_what_help_says(small_book, capsys):
    page = soup(small_book / "book" / "cli.html")
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^ {4}([a-z]+)\b", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(commands) >= 9
    for command in commands:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told = capsys.readouterr().out.replace("show this help message and exit", "")
        anchor = page.find(id=f"cli-{command}")
        section = anchor if anchor.name == "section" else anchor.find_parent("section")
        assert section.find(["h1", "h2"]).code.get_text() == f"llvlit {command}"
        page_text = " ".join(section.get_text(between) for between in (" ", "")).replace("…", "...")
        told = re.sub(r"^\S.*:$", "", told, flags=re.MULTILINE)  # titles of what stands below them
        known = {"usage:", "-h", "--help"}
        assert words(told) - words(page_text) - known == set()
        for option in set(re.findall(r"--([a-z][a-z-]+)", told)) - {"help"}:
            assert section.find(id=f"cli-{command}-{option}"), f"{command} {option}"


def test_screen_readers_get_no_lists_that_are_none_and_a_name_for_each_switch(small_book):
    for path in (small_book / "book").glob("*.html"):
        page = soup(path)
        assert [found for found in page.find_all("dl") if not found.find("dt")] == []
        switches = page.select("nav summary")
        assert all(str(switch.get("aria-label")).startswith("Pages of ") for switch in switches)


def test_the_index_finds_every_term_function_and_command(small_book):
    index = (small_book / "genindex.html").read_text(encoding="utf-8")
    glossary = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\{glossary\}\n(.*?)```", glossary, flags=re.DOTALL)
    terms = [line for block in blocks for line in block.splitlines() if line and not line.startswith(" ")]
    assert len(terms) > 30
    entries = dict(re.findall(r'<a href="(book/[^"]+)">(?:<strong>)?([^<]+)', index))
    words = set(entries.values())
    assert [term for term in terms if term not in words] == []
    assert any(word.startswith("required_energy()") for word in words)
    assert "llvlit gains" in words
    for address in entries:
        page, _, anchor = address.partition("#")
        assert f'id="{anchor}"' in (small_book / page).read_text(encoding="utf-8"), address
    assert 'href="../genindex.html"' in (small_book / "book" / "cli.html").read_text(encoding="utf-8")


def test_types_link_and_no_path_of_the_machine_shows(small_book):
    gains = (small_book / "book" / "api_gains.html").read_text(encoding="utf-8")
    assert re.search(r'<a [^>]*href="api_models.html#llvlit.LanguageModel"', gains)
    assert gains.count("<strong>per_prompt</strong>") == 2  # attributes of two classes, not the constructors' too
    for path in (small_book / "book").glob("*.html"):
        assert str(ROOT) not in path.read_text(encoding="utf-8"), path


@pytest.fixture(scope="module")
def phone(browser):
    tab = browser.new_page(viewport={"width": 360, "height": 800})
    yield tab
    tab.close()


@pytest.mark.parametrize("page", ["book/api", *(f"book/{path.stem}" for path in THEMES), "book/cli", "genindex"])
def test_no_page_is_wider_than_a_phone(small_book, phone, page):
    phone.goto((small_book / f"{page}.html").as_uri())
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
