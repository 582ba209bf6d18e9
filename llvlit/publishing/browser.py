"""The built book in a real browser: every page as a picture for review, all pages printed into one PDF."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlparse

from bs4 import BeautifulSoup

from llvlit.errors import BuildError
from llvlit.files import write_atomically
from llvlit.progress import progress

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
READY = "() => window.MathJax?.startup?.promise ?? true"
"""Equations are set: MathJax, where a page has it, has promised and kept."""

FOOTER = (
    '<div style="width:100%;font-size:8px;text-align:center;color:#555">'
    '<span class="title"></span> &middot; <span class="pageNumber"></span></div>'
)
SCALE = 0.8
"""Text of some ten points.  A browser that scales what it prints has links lead to places of the unscaled page."""


@dataclass(frozen=True)
class View:
    """How a page is looked at."""

    name: str
    theme: str
    width: int


VIEWS = (View("light", "light", 1280), View("dark", "dark", 1280), View("phone", "light", 360))


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium of this system, as a playwright browser.

    Raises
    ------
    BuildError
        If playwright or Chromium is not installed.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise BuildError('playwright is not installed. Install it: pip install "llvlit[book]".') from None
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        raise BuildError(
            f"No Chromium on the PATH (looked for {', '.join(CHROMIUM)}). On Debian: apt-get install chromium."
        )
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def viewed(browser: Any, view: View) -> Iterator[Any]:
    """A tab that shows pages of the book in a theme and a width."""
    context = browser.new_context(viewport={"width": view.width, "height": 900}, color_scheme=view.theme)
    context.add_init_script(
        f"localStorage.setItem('mode', '{view.theme}'); localStorage.setItem('theme', '{view.theme}')"
    )
    try:
        yield context.new_page()
    finally:
        context.close()


def open_page(tab: Any, path: Path, query: str = "") -> None:
    """Open a page from disk and wait until its equations are set."""
    tab.goto(path.resolve().as_uri() + query, wait_until="load", timeout=0)
    tab.evaluate(READY)


def take_screenshots(html: Path, names: Sequence[str], folder: Path) -> list[Path]:
    """Every page as ``FOLDER/VIEW/PAGE.png``, whole length: light, dark and at phone width.

    Raises
    ------
    BuildError
        If there is no browser.
    """
    taken = []
    with chromium() as browser:
        for view in VIEWS:
            with viewed(browser, view) as tab:
                for name in progress(names, f"screenshots, {view.name}", total=len(names)):
                    open_page(tab, html / f"{name}.html")
                    path = folder / view.name / f"{Path(name).name}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(tab.screenshot(full_page=True))
                    taken.append(path)
    return taken


def write_pdf(html: Path, names: Sequence[str], path: Path) -> Path:
    """The pages in reading order as one PDF, solutions open, with a bookmark for each page and its sections.

    Raises
    ------
    BuildError
        If there is no browser.
    """
    address = (html / f"{names[0]}.html").resolve().as_uri()
    with chromium() as browser, viewed(browser, View("print", "light", 1000)) as tab:
        book = _joined(html, names)
        tab.route(address, lambda route: route.fulfill(body=book, content_type="text/html; charset=utf-8"))
        tab.emulate_media(media="print", color_scheme="light")
        open_page(tab, html / f"{names[0]}.html")
        tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        sheets = tab.pdf(
            format="A4",
            outline=True,
            tagged=True,
            print_background=True,
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=FOOTER,
            margin={"top": "16mm", "bottom": "18mm", "left": "16mm", "right": "16mm"},
        )
    write_atomically(path, lambda temporary: temporary.write_bytes(sheets))
    return path


def _joined(html: Path, names: Sequence[str]) -> str:
    """HTML of one page that holds all of these, in the head and frame of the first, with links among them within it."""
    addresses = {f"{name}.html" for name in names}
    soups = [BeautifulSoup((html / f"{name}.html").read_text(encoding="utf-8"), "html.parser") for name in names]
    for name, soup in zip(names, soups, strict=True):
        here = f"{name}.html"
        for tag in soup.select("article [id]"):
            tag["id"] = f"{here}:{tag['id']}"
        for link in soup.select("a[href]"):
            target, _, mark = urljoin(here, str(link["href"])).partition("#")
            if target in addresses:
                link["href"] = f"#{target}:{mark}" if mark else f"#{target}"
            elif not urlparse(target).scheme:  # a file that is not printed
                del link["href"]
        for image in soup.select("article img"):
            image["src"] = urljoin((html / here).resolve().as_uri(), str(image["src"]))
    (frame,), (title,) = soups[0].select(":has(> article)"), soups[0].select("title")
    for number, (name, soup) in enumerate(zip(names, soups, strict=True)):
        begin = "page" if number else "auto"
        page = soup.new_tag("div", id=f"{name}.html", style=f"break-before: {begin}; zoom: {SCALE}")
        page.extend([*soup.select("#jb-print-docs-body"), *soup.select("article")])
        frame.append(page)
    title.string = title.get_text().rpartition(" \N{EM DASH} ")[2]
    return str(soups[0])
