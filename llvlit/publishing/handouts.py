"""A handout for each chapter, cut out of its built page: what a class needs of it, on one or two sheets of A4.

The link in the chapter's box of objectives is put there by the Sphinx extension; a page without the box has no handout.
"""

from __future__ import annotations

import posixpath
from base64 import b64encode
from collections.abc import Iterable, Iterator
from copy import copy
from pathlib import Path, PurePosixPath

from bs4 import BeautifulSoup, Tag

from llvlit.files import write_text

FOLDER = "handouts"
_BOX = '<p class="admonition-title">Objectives</p>'
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Handout</title>
<style>
@page { size: A4; margin: 12mm 14mm; }
:root { color-scheme: light; }
body { background: #fff; color: #000; font: 10pt/1.35 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 182mm; padding: 1em; }
h1 { font-size: 1.5em; line-height: 1.2; margin: 0.1em 0 0.5em; }
h2 { border-bottom: 1px solid #888; break-after: avoid; font-size: 1.1em; margin: 0.9em 0 0.3em; }
p, ul, figure { margin: 0.3em 0; }
ul { padding-left: 1.3em; }
li > p { margin: 0; }
a { color: inherit; }
figure { break-inside: avoid; text-align: center; }
figure img { max-height: 62mm; max-width: 100%; }
figcaption { font-size: 0.9em; text-align: left; }
table { border-collapse: collapse; width: 100%; }
td { break-inside: avoid; padding: 0; vertical-align: middle; }
tr > td:first-child { padding-right: 1em; width: 30%; }
div.math { overflow-x: auto; }
span.eqno { float: right; }
mjx-container[display="true"] { margin: 0.35em 0 !important; }
.book { border-top: 1px solid #888; font-size: 0.85em; margin-top: 1em; padding-top: 0.3em; }
@media screen and (max-width: 45em) { table, tbody, tr, td { display: block; width: auto !important; } }
@media print { body { font-size: 9pt; max-width: none; padding: 0; } }
</style>
</head>
<body><main></main></body>
</html>
"""


def handout_name(page: str) -> str:
    """Name of a page's handout, as ``handouts/gains`` is of ``book/gains``; no two pages have one last part."""
    return f"{FOLDER}/{PurePosixPath(page).name}"


def with_handout(body: str, page: str) -> str:
    """HTML of a page, in whose box of objectives stands a link to its handout.

    Examples
    --------
    >>> from llvlit.publishing.handouts import with_handout
    >>> with_handout('<div><p class="admonition-title">Objectives</p></div>', "book/gains")
    '<div>...<a href="../handouts/gains.html">Handout: this chapter in short, to print</a></p></div>'
    """
    if _BOX not in body:
        return body
    soup = BeautifulSoup(body, "html.parser")
    title = _titled(soup, "p", "Objectives")
    assert title is not None and title.parent is not None
    line, link = soup.new_tag("p"), soup.new_tag("a")
    line["class"] = "handout d-print-none"
    link["href"] = posixpath.relpath(f"{handout_name(page)}.html", posixpath.dirname(page))
    link.string = "Handout: this chapter in short, to print"
    line.append(link)
    title.parent.append(line)
    return str(soup)


def write_handouts(html: Path, names: Iterable[str]) -> list[str]:
    """Write the handouts of these pages of a built book; return their names."""
    written = []
    for name in names:
        soup = BeautifulSoup((html / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
        if soup.select_one("p.handout"):
            written.append(handout_name(name))
            write_text(html / f"{written[-1]}.html", _handout(soup, name, html))
    return written


def _handout(page: BeautifulSoup, name: str, html: Path) -> str:
    """HTML of the handout of a built page."""
    handout = BeautifulSoup(_PAGE, "html.parser")
    head, main, article = handout.head, handout.main, page.article
    assert head and head.title and main and article and article.h1
    for script in page.select("head > script"):  # equations are set as on the page
        if "window.MathJax" in script.get_text():
            head.append(copy(script))
        elif "mathjax/" in str(script.get("src", "")):
            moved = copy(script)
            moved["src"] = posixpath.normpath(posixpath.join("..", posixpath.dirname(name), str(script["src"])))
            head.append(moved)
    main.append(_plain(article.h1))
    head.title.string = f"{main.get_text(strip=True)} (handout)"

    def section(heading: str, parts: Iterable[Tag]) -> None:
        for number, part in enumerate(parts):
            if not number:
                main.append(handout.new_tag("h2", string=heading))
            main.append(part)

    objectives = _titled(article, "p", "Objectives")
    section(
        "Objectives", map(_plain, objectives.parent.select(":scope > ul")) if objectives and objectives.parent else ()
    )
    section("In one picture", _first_figure(article, (html / name).parent))
    section("Definitions", _equations(article, handout))
    summary = _titled(article, "h2", "Summary")
    section("Summary", map(_plain, summary.parent.select(":scope > ul")) if summary and summary.parent else ())
    section("Exercises", _exercises(article, handout))
    left = next((word for word in article.find_all("strong") if word.get_text() == "The question it leaves"), None)
    if left is not None and left.parent is not None:
        main.append(_plain(left.parent))
    link = handout.new_tag("a", href=posixpath.relpath(f"{name}.html", FOLDER), string="The whole chapter")
    footer = handout.new_tag("p", attrs={"class": "book"})
    footer.extend([link, f", with code, proofs and solutions: {_address(page)}"])
    main.append(footer)
    return str(handout)


def _address(page: BeautifulSoup) -> str:
    """Where the page is published."""
    link = page.select_one("link[rel=canonical]")
    return str(link["href"]) if link else "see the book"


def _titled(part: Tag, kind: str, title: str) -> Tag | None:
    """The heading of a box or a section by its words, its number aside."""
    for found in part.find_all(kind):
        words = _plain(found)
        for number in words.select(".section-number"):
            number.decompose()
        if words.get_text(strip=True) == title:
            return found
    return None


def _plain(part: Tag) -> Tag:
    """A copy of a part of a page without links, anchors and identifiers."""
    part = copy(part)
    for anchor in part.select("a.headerlink"):
        anchor.decompose()
    for tag in [part, *part.find_all(True)]:
        del tag["id"]
    for link in part.find_all("a"):
        link.unwrap()
    return part


def _first_figure(article: Tag, folder: Path) -> Iterator[Tag]:
    """The first figure of a page, its picture within the handout."""
    figure = next((found for found in article.find_all("figure") if found.img), None)
    if figure is None:
        return
    figure = _plain(figure)
    assert figure.img
    path = folder / str(figure.img["src"])
    kind = "svg+xml" if path.suffix == ".svg" else path.suffix.lstrip(".")
    figure.img["src"] = f"data:image/{kind};base64,{b64encode(path.read_bytes()).decode()}"
    yield figure


def _equations(article: Tag, soup: BeautifulSoup) -> Iterator[Tag]:
    """The numbered equations of a page outside proofs and solutions, each beside the title of its section."""
    table, last = soup.new_tag("table"), ""
    for number in article.select("div.math > span.eqno"):
        equation = number.parent
        if equation is None or equation.find_parent(class_=["solution", "proof", "dropdown", "toggle"]):
            continue
        heading = equation.find_previous("h2")
        words = _plain(heading) if isinstance(heading, Tag) else soup.new_tag("h2")
        words.name = "span"
        row, beside, cell = soup.new_tag("tr"), soup.new_tag("td"), soup.new_tag("td")
        if words.get_text() != last:
            beside.append(words)
        last = words.get_text()
        formula = _plain(equation)
        formula["tabindex"] = "0"  # on a phone it scrolls, and the keyboard must reach it
        cell.append(formula)
        row.extend([beside, cell])
        table.append(row)
    if table.tr:
        yield table


def _exercises(article: Tag, soup: BeautifulSoup) -> Iterator[Tag]:
    """The titles of the exercises as a list."""
    titles = [_plain(title) for title in article.select("div.exercise > p.admonition-title")]
    for title in titles:
        title.name = "li"
    if titles:
        exercises = soup.new_tag("ul")
        exercises.extend(titles)
        yield exercises
