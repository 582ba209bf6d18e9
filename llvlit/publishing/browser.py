"""The built book in a real browser: every page as a picture for review, all pages printed into one PDF."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from bs4 import BeautifulSoup

from llvlit.errors import BuildError
from llvlit.files import write_atomically
from llvlit.progress import progress

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
READY = "() => window.MathJax?.startup?.promise ?? true"
"""Equations are set: MathJax, where a page has it, has promised and kept."""

OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"
MARK = """ids => {
    const box = document.createElement("div");
    box.style.cssText = "position: absolute; font-size: 1px; color: transparent";
    box.append(...ids.map(id => Object.assign(document.createElement("a"), { href: `#${id}`, textContent: "." })));
    document.querySelector("article").prepend(box);
}"""
"""A browser prints a place that can be linked to only where the same page links to it."""

FOOTER = (
    '<div style="width:100%;font-size:8px;text-align:center;color:#555">'
    '<span class="title"></span> &middot; <span class="pageNumber"></span></div>'
)
SCALE = 0.8
"""Text of some ten points."""


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
    tab.goto(path.resolve().as_uri() + query, wait_until="load")
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


@dataclass(frozen=True)
class _Part:
    """A printed page of the book: number of its first sheet, and sheet (from there) and height of each place in it."""

    first: int
    places: dict[str, tuple[int, float]]


def write_pdf(html: Path, names: Sequence[str], path: Path) -> Path:
    """The pages in reading order as one PDF, solutions open, with a bookmark for each page of the book.

    Raises
    ------
    BuildError
        If there is no browser, or pypdf is not installed.
    """
    try:
        from pypdf import PdfReader, PdfWriter
    except ImportError:
        raise BuildError('pypdf is not installed. Install it: pip install "llvlit[book]".') from None
    writer = PdfWriter()
    parts: dict[str, _Part] = {}
    asked = _asked(html, names)
    with chromium() as browser, viewed(browser, View("print", "light", 1000)) as tab:
        tab.emulate_media(media="print", color_scheme="light")
        for name in progress(names, "PDF", total=len(names)):
            page = (html / f"{name}.html").resolve()
            open_page(tab, page)
            tab.evaluate(OPEN_ALL)
            tab.evaluate(MARK, sorted(asked[page]))
            sheets = tab.pdf(
                format="A4",
                scale=SCALE,
                print_background=True,
                display_header_footer=True,
                header_template="<span></span>",
                footer_template=FOOTER,
                margin={"top": "16mm", "bottom": "18mm", "left": "16mm", "right": "16mm"},
            )
            reader = PdfReader(BytesIO(sheets))
            parts[page.as_uri()] = _Part(len(writer.pages), _places(reader))
            writer.append(reader, outline_item=tab.title().rpartition(" — ")[0] or tab.title(), import_outline=False)
    _link_within(writer, parts)
    writer.compress_identical_objects()
    writer.add_metadata({"/Title": "llvlit: a transformer's depth as a dynamical system"})
    write_atomically(path, writer.write)
    return path


def _asked(html: Path, names: Iterable[str]) -> dict[Path, set[str]]:
    """Ids on each page to which pages link."""
    asked: dict[Path, set[str]] = defaultdict(set)
    for name in names:
        page = (html / f"{name}.html").resolve()
        for link in BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").select("a[href*='.html#']"):
            target, _, mark = str(link["href"]).partition("#")
            asked[(page.parent / target).resolve()].add(unquote(mark))
    return asked


def _places(reader: Any) -> dict[str, tuple[int, float]]:
    """Sheet and height of every named place, which the browser tells as if nothing were scaled."""
    places = {}
    for mark, place in reader.named_destinations.items():
        sheet = reader.get_destination_page_number(place)
        full = float(reader.pages[sheet].mediabox.height)
        places[unquote(mark.removeprefix("/"))] = (sheet, full - SCALE * (full - float(place.top or full)))
    return places


def _link_within(writer: Any, parts: dict[str, _Part]) -> None:
    """Let links from page to page of the book, which name files of this machine, lead to sheets of the PDF."""
    from pypdf.generic import ArrayObject, FloatObject, NameObject, NullObject

    ends = [*[part.first for part in parts.values()][1:], len(writer.pages)]
    for (address, part), end in zip(parts.items(), ends, strict=True):
        for number in range(part.first, end):
            for link in (entry.get_object() for entry in writer.pages[number].get("/Annots", ())):
                uri, place = str(link.get("/A", {}).get("/URI", "")), link.get("/Dest")
                if uri.startswith("file:"):
                    target, _, mark = uri.partition("#")
                elif isinstance(place, str):
                    target, mark = address, place.removeprefix("/")
                else:
                    continue
                for key in ("/A", "/Dest"):
                    link.pop(key, None)
                if target in parts:
                    sheet, height = parts[target].places.get(unquote(mark), (0, None))
                    goal = writer.pages[parts[target].first + sheet].indirect_reference
                    top = NullObject() if height is None else FloatObject(height)
                    link[NameObject("/Dest")] = ArrayObject([goal, NameObject("/XYZ"), NullObject(), top, NullObject()])
