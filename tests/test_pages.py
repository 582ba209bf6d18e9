"""The built book as readers get it: links, headings, spelling, and what a real browser says of every page."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlparse

import axe_core_python
import pytest
from bs4 import BeautifulSoup
from playwright.sync_api import Browser
from spellchecker import SpellChecker

from llvlit.browser import VIEWS, open_page, viewed
from llvlit.pages import read_pages

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
NAMES = [page.name for page in read_pages(ROOT)]
AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
HEAVIEST = 2_000_000
EVERY_PAGE = pytest.mark.parametrize("name", NAMES)

pytestmark = pytest.mark.skipif(
    not (HTML / "index.html").is_file(), reason="there is no built book; run `make book` before the tests of its pages"
)


def soup(name: str) -> BeautifulSoup:
    return BeautifulSoup((HTML / f"{name}.html").read_text(encoding="utf-8"), "html.parser")


# Without a browser


def test_figures_with_panels_side_by_side_are_marked_for_the_phone():
    page = soup("book/gains")
    assert {figure["id"]: "wide" in (figure.img.get("class") or []) for figure in page.select("figure")} == {
        "fig-gains-travel": False,
        "fig-gains-bases": True,
        "fig-gains-order": False,
        "fig-gains-lost": True,
        "fig-gains-amplitude": False,
    }


@EVERY_PAGE
def test_links_within_the_book_lead_somewhere(name):
    here = HTML / f"{name}.html"
    lost = []
    for link in soup(name).select("a[href]"):
        address = urlparse(str(link["href"]))
        if address.scheme or address.netloc:
            continue
        target = (here.parent / unquote(address.path)).resolve() if address.path else here
        if not target.is_file():
            lost.append(str(link["href"]))
        elif address.fragment and target.suffix == ".html":
            found = target.read_text(encoding="utf-8")
            if not re.search(rf'(?:id|name)="{re.escape(unquote(address.fragment))}"', found):
                lost.append(str(link["href"]))
    assert lost == []


@EVERY_PAGE
def test_links_to_other_sites_are_well_formed(name):
    addresses = [str(link["href"]) for link in soup(name).select("a[href]")]
    other = [address for address in addresses if urlparse(address).scheme]
    wrong = [
        address
        for address in other
        if urlparse(address).scheme != "mailto"
        and (urlparse(address).scheme != "https" or "." not in urlparse(address).netloc or re.search(r"\s", address))
    ]
    assert wrong == []


@EVERY_PAGE
def test_headings_are_in_order(name):
    levels = [int(heading.name[1]) for heading in soup(name).select("article :is(h1, h2, h3, h4, h5, h6)")]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels


@EVERY_PAGE
def test_spelling(name):
    page = soup(name)
    for part in page.select("pre, code, script, style, table, .math, .citation, .cell_output, svg, .headerlink, .sig"):
        part.decompose()
    article = page.select_one("article")
    assert article is not None
    known = set((ROOT / "book" / "words.txt").read_text(encoding="utf-8").split())
    written = set(re.findall(r"(?<![\w.@/-])[A-Za-z]{4,}(?![\w@/]|\.\w)", article.get_text(" ")))
    words = {word.lower() for word in written if not re.search("[a-z][A-Z]", word)}  # no names of classes
    assert sorted(SpellChecker().unknown(words - known)) == []


# With a browser


@cache
def weighed(address: str) -> int:
    """Bytes that a web server sends for a file of the book: text goes compressed, as GitHub Pages and others do it."""
    if not address.startswith("file:"):
        return 0
    path = Path(unquote(urlparse(address).path))
    content = path.read_bytes()
    return len(content) if path.suffix in {".woff", ".woff2", ".png"} else len(gzip.compress(content, 6))


@dataclass(frozen=True)
class Seen:
    """What a browser noticed on a page."""

    errors: list[str]
    requests: list[str]
    overflow: int
    weight: int
    violations: list[str]


@pytest.fixture(scope="module", params=VIEWS, ids=lambda view: view.name)
def look(request: pytest.FixtureRequest, browser: Browser) -> Iterator:
    """Opens a page in one of the views and says what a browser noticed."""
    with viewed(browser, request.param) as tab:
        errors: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda asked: requests.append(asked.url))

        def look(name: str) -> Seen:
            errors.clear()
            requests.clear()
            open_page(tab, HTML / f"{name}.html")
            overflow = tab.evaluate("document.scrollingElement.scrollWidth - window.innerWidth")
            tab.evaluate(AXE)
            found = tab.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
            violations = [
                f"{one['id']} ({one['impact']}): {one['help']}: {node['html'][:150]} {node['target']}"
                for one in found
                if one["impact"] in ("serious", "critical")
                for node in one["nodes"][:3]
            ]
            weight = sum(map(weighed, {asked.partition("?")[0].partition("#")[0] for asked in requests}))
            return Seen([*errors], [*requests], overflow, weight, violations)

        yield look


@EVERY_PAGE
def test_a_browser_finds_no_fault(name, look):
    seen = look(name)
    assert seen.errors == []
    assert [address for address in seen.requests if not address.startswith(("file:", "data:", "blob:"))] == []
    assert seen.overflow <= 0, "the page is wider than the window"
    assert seen.violations == []
    assert seen.weight < HEAVIEST
