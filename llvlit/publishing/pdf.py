"""The built book as one PDF: pages printed by a browser and put together, with links that lead within the file."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote

from llvlit.errors import BuildError
from llvlit.files import write_atomically
from llvlit.progress import progress
from llvlit.publishing.browser import View, chromium, open_page, viewed

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

_LINK = re.compile(r'href="([\w/.-]+\.html)#([^"]+)"')


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
    with (
        TemporaryDirectory() as folder,
        chromium() as browser,
        viewed(browser, View("print", "light", 1000)) as tab,
    ):
        tab.emulate_media(media="print", color_scheme="light")
        for name in progress(names, "PDF", total=len(names)):
            page = (html / f"{name}.html").resolve()
            open_page(tab, page)
            tab.evaluate(OPEN_ALL)
            tab.evaluate(MARK, sorted(asked[page]))
            sheets = Path(folder) / f"{Path(name).name}.pdf"
            tab.pdf(
                path=str(sheets),
                format="A4",
                scale=SCALE,
                print_background=True,
                display_header_footer=True,
                header_template="<span></span>",
                footer_template=FOOTER,
                margin={"top": "16mm", "bottom": "18mm", "left": "16mm", "right": "16mm"},
            )
            reader = PdfReader(sheets)
            parts[page.as_uri()] = _Part(len(writer.pages), _places(reader))
            writer.append(reader, outline_item=tab.title().rpartition(" — ")[0] or tab.title(), import_outline=False)
    _link_within(writer, parts)
    writer.compress_identical_objects()
    writer.add_metadata({"/Title": "llvlit: a transformer's depth as a dynamical system"})

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            writer.write(file)

    write_atomically(path, write)
    return path


def _asked(html: Path, names: Iterable[str]) -> dict[Path, set[str]]:
    """Ids on each page to which pages link."""
    asked: dict[Path, set[str]] = defaultdict(set)
    for name in names:
        page = (html / f"{name}.html").resolve()
        for target, mark in _LINK.findall(page.read_text(encoding="utf-8")):
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
