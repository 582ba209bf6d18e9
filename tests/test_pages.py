"""The built book as readers get it: links, headings, spelling, and what a real browser says of every page."""

from __future__ import annotations

import gzip
import io
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
from pypdf import PdfReader
from spellchecker import SpellChecker

from llvlit.method.control import minimum_energy
from llvlit.publishing.browser import VIEWS, View, open_page, viewed
from llvlit.publishing.pages import read_pages

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
NAMES = [page.name for page in read_pages(ROOT)]
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
HEAVIEST = 2_000_000

pytestmark = pytest.mark.skipif(
    not (HTML / "index.html").is_file(), reason="there is no built book; run `make book` before the tests of its pages"
)


def soup(name: str) -> BeautifulSoup:
    return BeautifulSoup((HTML / f"{name}.html").read_text(encoding="utf-8"), "html.parser")


def test_every_page_and_every_handout_was_built():
    assert [name for name in NAMES if not (HTML / f"{name}.html").is_file()] == []
    led = {link["href"] for name in NAMES for link in soup(name).select("p.handout a")}
    assert led and led == {f"../handouts/{path.name}" for path in (HTML / "handouts").iterdir()}


@pytest.mark.parametrize("path", sorted(HTML.glob("handouts/*.html")), ids=lambda path: path.stem)
def test_a_handout_prints_on_two_sheets(browser, path):
    with viewed(browser, VIEWS[0]) as tab:
        open_page(tab, path)
        assert len(PdfReader(io.BytesIO(tab.pdf(prefer_css_page_size=True))).pages) <= 2


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """A page of the book; of module scope, so that all tests of a page follow one another."""
    return request.param


@pytest.fixture(scope="module")
def page(name: str) -> BeautifulSoup:
    return soup(name)


# Without a browser


def test_figures_with_panels_side_by_side_are_marked_for_the_phone():
    figures = soup("book/reduction").select("figure")
    assert {figure["id"]: "wide" in (figure.img.get("class") or []) for figure in figures} == {
        "fig-turning": False,
        "fig-orders": False,
        "fig-captured": True,
    }


@cache
def anchors(path: Path) -> set[str]:
    """Places within a page that a link may lead to."""
    return set(re.findall(r'(?:id|name)="([^"]+)"', path.read_text(encoding="utf-8")))


def test_links_within_the_book_lead_somewhere(name, page):
    here = HTML / f"{name}.html"
    lost = []
    for link in page.select("a[href]"):
        address = urlparse(str(link["href"]))
        if address.scheme or address.netloc:
            continue
        target = (here.parent / unquote(address.path)).resolve() if address.path else here
        is_page = address.fragment and target.suffix == ".html"
        if not target.is_file() or (is_page and unquote(address.fragment) not in anchors(target)):
            lost.append(str(link["href"]))
    assert lost == []


def test_links_to_other_sites_are_well_formed(page):
    addresses = [str(link["href"]) for link in page.select("a[href]")]
    other = [address for address in addresses if urlparse(address).scheme]
    wrong = [
        address
        for address in other
        if urlparse(address).scheme != "mailto"
        and (urlparse(address).scheme != "https" or "." not in urlparse(address).netloc or re.search(r"\s", address))
    ]
    assert wrong == []


def test_headings_are_in_order(page):
    levels = [int(heading.name[1]) for heading in page.select("article :is(h1, h2, h3, h4, h5, h6)")]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels


@pytest.fixture(scope="module")
def spelling() -> SpellChecker:
    return SpellChecker()


NO_PROSE = "pre, code, script, style, table, .math, .citation, .cell_output, svg, .headerlink, .sig"


def test_spelling(page, spelling):
    article = page.select_one("article")
    assert article is not None
    left_out = {id(part) for part in article.select(NO_PROSE)}
    prose = " ".join(text for text in article.strings if not any(id(part) in left_out for part in text.parents))
    known = set((ROOT / "book" / "words.txt").read_text(encoding="utf-8").split())
    written = set(re.findall(r"(?<![\w.@/-])[A-Za-z]{4,}(?![\w@/]|\.\w)", prose))
    words = {word.lower() for word in written if not re.search("[a-z][A-Z]", word)}  # no names of classes
    assert sorted(spelling.unknown(words - known)) == []


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


MARK_ALIKE = """
() => {
  for (const fading of document.getAnimations()) if (fading instanceof CSSTransition) fading.finish();
  const chains = new Map([[null, '']]), seen = new Set();
  const chain = element => {
    if (!chains.has(element)) {
      const { backgroundColor, backgroundImage, opacity } = getComputedStyle(element);
      const own = [element.localName, element.getAttribute('class'), backgroundColor, backgroundImage, opacity];
      chains.set(element, own.join(' ') + '/' + chain(element.parentElement));
    }
    return chains.get(element);
  };
  const says = node => node.nodeType === Node.TEXT_NODE && node.data.trim();
  for (const element of document.querySelectorAll('body *')) {
    if (![...element.childNodes].some(says)) continue;
    const { color, fontSize, fontWeight, textShadow } = getComputedStyle(element);
    const visible = element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    const kind = [visible, color, fontSize, fontWeight, textShadow, chain(element)].join(' ');
    element.toggleAttribute('data-alike', seen.has(kind));
    seen.add(kind);
  }
  document.querySelectorAll('pre span[data-alike]:not(:has(*))').forEach(word => word.replaceWith(word.textContent));
  document.querySelectorAll('mjx-math[aria-hidden=true]').forEach(drawn => drawn.replaceChildren());
}
"""
"""One text of each kind has its contrast looked at, in place of thousands: it is the same where text, everything
behind it and all classes above it are.  Most of a page's elements go before axe looks at it: words of code that are
like others become plain text, and of equations there stays what is read out."""

AXE_RUN = """
only => axe.run(document, { resultTypes: ['violations'], preload: false, ...(only.length ? { runOnly: only } : {}) })
"""
DESKTOP, DARK, PHONE = VIEWS


@dataclass(frozen=True)
class Seen:
    """What a browser noticed on a page, in each of the views where it may differ."""

    errors: list[str]
    requests: list[str]
    weight: int
    overflow: dict[str, int]
    violations: dict[str, list[str]]
    skips_back: dict[str, list[str]]


@pytest.fixture(scope="module")
def look(browser: Browser) -> Iterator:
    """Opens a page once and says what a browser noticed: as it is, in the dark, and as wide as a phone."""
    with viewed(browser, DESKTOP) as tab:
        errors: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda asked: requests.append(asked.url))

        def violations(*only: str) -> list[str]:
            tab.evaluate(MARK_ALIKE)
            return [
                f"{one['id']} ({one['impact']}): {one['help']}: {node['html'][:150]} {node['target']}"
                for one in tab.evaluate(AXE_RUN, only)["violations"]
                if one["impact"] in ("serious", "critical")
                for node in one["nodes"][:3]
            ]

        def look(name: str, query: str = "", awaited: str = "main") -> Seen:
            errors.clear()
            requests.clear()
            tab.set_viewport_size({"width": DESKTOP.width, "height": 900})
            open_page(tab, HTML / f"{name}.html", query)
            tab.locator(awaited).first.wait_for()
            overflow, skips_back, found = {}, {}, {}

            def measure(view: View) -> None:
                tab.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
                overflow[view.name] = tab.evaluate("document.scrollingElement.scrollWidth - window.innerWidth")
                skips_back[view.name] = tab.evaluate(SKIPS_BACK)

            measure(DESKTOP)
            tab.set_viewport_size({"width": PHONE.width, "height": 900})
            measure(PHONE)
            tab.evaluate(AXE)
            tab.evaluate("axe.configure({ rules: [{ id: 'color-contrast', selector: ':not([data-alike])' }] })")
            found[PHONE.name] = violations()
            tab.set_viewport_size({"width": DESKTOP.width, "height": 900})
            found[DESKTOP.name] = violations()
            tab.evaluate("theme => Object.assign(document.documentElement.dataset, { theme, mode: theme })", DARK.theme)
            found[DARK.name] = violations(*COLOURS)
            weight = sum(map(weighed, {asked.partition("?")[0].partition("#")[0] for asked in requests}))
            return Seen([*errors], [*requests], weight, overflow, found, skips_back)

        yield look


COLOURS = ("color-contrast", "link-in-text-block")
"""Rules of axe that ask for colours, all that a theme changes."""


def check(seen: Seen) -> None:
    assert seen.errors == []
    assert [address for address in seen.requests if not address.startswith(("file:", "data:", "blob:"))] == []
    assert {view: wide for view, wide in seen.overflow.items() if wide > 0} == {}, "wider than the window"
    assert {view: found for view, found in seen.violations.items() if found} == {}
    assert {view: found for view, found in seen.skips_back.items() if found} == {}
    assert seen.weight < HEAVIEST


def test_a_browser_finds_no_fault(name, look):
    check(look(name))


@pytest.mark.parametrize(("first", "view"), zip(["intro", "intro", "explorer"], VIEWS, strict=True))
def test_a_first_visit_is_quiet_fits_and_takes_the_systems_scheme(browser, first, view):
    context = browser.new_context(color_scheme=view.theme, viewport={"width": view.width, "height": 900})
    tab, errors = context.new_page(), []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    open_page(tab, HTML / "book" / f"{first}.html")
    assert errors == []
    assert tab.evaluate("document.documentElement.dataset.theme") == view.theme
    assert tab.evaluate("document.scrollingElement.scrollWidth") <= view.width
    context.close()


def test_a_search_finds_pages_and_no_fault(look):
    check(look("search", "?q=gain", "#search-results a[href*='gains.html']"))


def explorer_document() -> dict:
    (element,) = soup("book/explorer").select(".llvlit-explorer script")
    return json.loads(element.get_text())


def test_the_explorer_of_the_book_shows_what_the_package_computes_and_what_the_full_model_did(browser):
    document = explorer_document()
    h, norms = np.array(document["response"][-1]), np.array(document["norms"])
    place = document["strengths"].index(-0.5)
    with viewed(browser, VIEWS[0]) as tab:
        open_page(tab, HTML / "book" / "explorer.html")
        element = tab.locator(".llvlit-explorer[data-ready]")
        for kind, weights in {"absolute": np.ones_like(h), "relative": 1 / norms**2}.items():
            element.get_by_role("radio", name=kind).check()
            for preset in (preset for preset in document["presets"] if kind in preset["energy"]):
                element.get_by_role("button", name=preset["name"], exact=True).click()
                element.locator("[data-role=strength]").fill(str(place))
                shown = {
                    name: element.get_attribute(f"data-{name}") for name in ("inputs", "best", "measured", "trust")
                }
                inputs = -0.5 * np.array(preset["inputs"])
                np.testing.assert_allclose(json.loads(shown["inputs"]), inputs, rtol=1e-9)
                best = minimum_energy(h, h @ inputs, weights=weights)
                np.testing.assert_allclose(json.loads(shown["best"]), best, rtol=1e-9)
                told = [preset[name][place] for name in ("measured", "low", "high")]
                assert json.loads(shown["measured"]) == told
                assert shown["trust"] == ("held" if abs(told[0] + 0.5) <= 0.05 else "failed")
                if preset["name"] in ("Optimum", "Absolute optimum"):
                    np.testing.assert_allclose(inputs, best, rtol=1e-9)


def test_tab_walks_through_the_explorer_in_reading_order(browser):
    focused = """() => {
        const element = document.activeElement, box = element.getBoundingClientRect(), y = window.scrollY;
        const inside = element.closest(".llvlit-explorer") !== null;
        const outlined = getComputedStyle(element).outlineStyle !== "none";
        return { inside, outlined, top: box.top + y, bottom: box.bottom + y, left: box.left };
    }"""
    with viewed(browser, VIEWS[0]) as tab:
        open_page(tab, HTML / "book" / "explorer.html")
        tab.locator(".llvlit-explorer[data-ready] :is(button, input):visible").first.focus()
        walked = [tab.evaluate(focused)]
        while walked[-1]["inside"]:
            tab.keyboard.press("Tab")
            walked.append(tab.evaluate(focused))
    walked.pop()
    assert len(walked) == controls_of(explorer_document())
    assert all(one["outlined"] for one in walked)
    for before, after in pairwise(walked):
        assert after["top"] >= before["bottom"] - 1 or after["left"] > before["left"]


def controls_of(document: dict) -> int:
    """The story's steps, a pair of radio buttons (one stop), presets, the strength, two buttons, and the sliders."""
    presets = sum("relative" in preset["energy"] for preset in document["presets"])
    return len(document["story"]) + 1 + presets + 1 + 2 + len(document["norms"])


def test_the_explorer_of_the_book_has_a_table_where_javascript_is_off(browser):
    context = browser.new_context(java_script_enabled=False, viewport={"width": 360, "height": 800})
    page = context.new_page()
    page.goto((HTML / "book" / "explorer.html").as_uri())
    assert "JavaScript is off" in page.locator(".llvlit-explorer").inner_text()
    rows = page.locator(".llvlit-explorer tbody tr").all_inner_texts()
    assert [row.split("\t")[0] for row in rows] == [preset["name"] for preset in explorer_document()["presets"]]
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
    context.close()
