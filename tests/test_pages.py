"""The built book as readers get it: links, headings, spelling, and what a real browser says of every page."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlparse

import axe_playwright_python
import numpy as np
import pytest
from bs4 import BeautifulSoup
from playwright.sync_api import Browser
from spellchecker import SpellChecker

from llvlit.method.control import energy, minimum_energy
from llvlit.publishing.browser import VIEWS, open_page, viewed
from llvlit.publishing.pages import read_pages

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
NAMES = [page.name for page in read_pages(ROOT)]
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
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


SKIPS_BACK = """
[...document.querySelectorAll('article section')].flatMap(section => {
  const blocks = [...section.children].filter(one => !one.matches('aside, .margin, span') && one.offsetHeight);
  const tops = blocks.map(one => one.getBoundingClientRect().top);
  return blocks.filter((_, index) => tops[index] < tops[index - 1]).map(one => one.outerHTML.slice(0, 150));
})
"""
"""Blocks of a text that stand above what comes before them in the source, the order in which it is read out."""


@dataclass(frozen=True)
class Seen:
    """What a browser noticed on a page."""

    errors: list[str]
    requests: list[str]
    overflow: int
    weight: int
    violations: list[str]
    skips_back: list[str]


@pytest.fixture(scope="module", params=VIEWS, ids=lambda view: view.name)
def look(request: pytest.FixtureRequest, browser: Browser) -> Iterator:
    """Opens a page in one of the views and says what a browser noticed."""
    with viewed(browser, request.param) as tab:
        errors: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda asked: requests.append(asked.url))

        def look(name: str, query: str = "", awaited: str = "main") -> Seen:
            errors.clear()
            requests.clear()
            open_page(tab, HTML / f"{name}.html", query)
            tab.locator(awaited).first.wait_for()
            overflow = tab.evaluate("document.scrollingElement.scrollWidth - window.innerWidth")
            tab.evaluate(AXE)
            found = tab.evaluate("axe.run(document, {resultTypes: ['violations'], preload: false})")["violations"]
            violations = [
                f"{one['id']} ({one['impact']}): {one['help']}: {node['html'][:150]} {node['target']}"
                for one in found
                if one["impact"] in ("serious", "critical")
                for node in one["nodes"][:3]
            ]
            weight = sum(map(weighed, {asked.partition("?")[0].partition("#")[0] for asked in requests}))
            return Seen([*errors], [*requests], overflow, weight, violations, tab.evaluate(SKIPS_BACK))

        yield look


def check(seen: Seen) -> None:
    assert seen.errors == []
    assert [address for address in seen.requests if not address.startswith(("file:", "data:", "blob:"))] == []
    assert seen.overflow <= 0, "the page is wider than the window"
    assert seen.violations == []
    assert seen.skips_back == []
    assert seen.weight < HEAVIEST


@EVERY_PAGE
def test_a_browser_finds_no_fault(name, look):
    check(look(name))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_first_visit_is_quiet_and_takes_the_systems_scheme(browser, scheme):
    context = browser.new_context(color_scheme=scheme)
    tab, errors = context.new_page(), []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    open_page(tab, HTML / "book" / "intro.html")
    assert errors == []
    assert tab.evaluate("document.documentElement.dataset.theme") == scheme
    context.close()


def test_a_search_finds_pages_and_no_fault(look):
    check(look("search", "?q=gain", "#search-results a[href*='gains.html']"))


def explorer_cases() -> list[dict]:
    (element,) = soup("book/explorer").select(".llvlit-explorer script")
    return json.loads(element.get_text())["cases"]


def test_the_explorer_of_the_book_solves_as_the_package_does(browser):
    with viewed(browser, VIEWS[0]) as tab:
        open_page(tab, HTML / "book" / "explorer.html")
        element = tab.locator(".llvlit-explorer[data-ready]")
        for case in explorer_cases():
            for key in ("model", "task"):
                element.locator(f"[data-role={key}]").select_option(case[key])
            h, norms, target = np.array(case["response"][-1]), np.array(case["norms"]), -0.3 * case["gap"]
            for metric, weights in {"absolute": np.ones_like(h), "relative": 1 / norms**2}.items():
                element.get_by_role("radio", name=metric).check()
                element.locator("[data-role=target]").fill("-0.3")
                element.locator("[data-role=solve]").click()
                shown = element.evaluate("element => ({...element.dataset})")
                best = minimum_energy(h, target, weights=weights)
                np.testing.assert_allclose(json.loads(shown["inputs"]), best, rtol=1e-5)
                np.testing.assert_allclose(json.loads(shown["energy"]), energy(best, weights=weights), rtol=1e-5)
                np.testing.assert_allclose(json.loads(shown["output"]), -0.3, rtol=1e-5)


def test_tab_walks_through_the_explorer_in_reading_order(browser):
    focused = """() => {
        const element = document.activeElement, box = element.getBoundingClientRect(), y = window.scrollY;
        const inside = element.closest(".llvlit-explorer") !== null;
        const outlined = getComputedStyle(element).outlineStyle !== "none";
        return { inside, outlined, top: box.top + y, bottom: box.bottom + y, left: box.left };
    }"""
    with viewed(browser, VIEWS[0]) as tab:
        open_page(tab, HTML / "book" / "explorer.html")
        controls = tab.locator(".llvlit-explorer[data-ready] :is(select, button, input)")
        controls.first.focus()
        walked = [tab.evaluate(focused)]
        while walked[-1]["inside"]:
            tab.keyboard.press("Tab")
            walked.append(tab.evaluate(focused))
    walked.pop()
    assert len(walked) == controls_of(explorer_cases()[-1])
    assert all(one["outlined"] for one in walked)
    for before, after in pairwise(walked):
        assert after["top"] >= before["bottom"] - 1 or after["left"] > before["left"]


def controls_of(case: dict) -> int:
    """Two menus, a pair of radio buttons (one stop), the target, five buttons, two more, two boxes, and the sliders."""
    return 2 + 1 + 1 + 5 + 2 + 2 + case["n_layers"]


def test_the_explorer_of_the_book_has_words_where_javascript_is_off(browser):
    context = browser.new_context(java_script_enabled=False, viewport={"width": 360, "height": 800})
    page = context.new_page()
    page.goto((HTML / "book" / "explorer.html").as_uri())
    assert "JavaScript is off" in page.locator(".llvlit-explorer").inner_text()
    rows = page.locator("article table tbody tr").all_inner_texts()
    for case in explorer_cases():
        assert any(row.split()[:2] == [case["model"], case["task"]] for row in rows)
    context.close()
