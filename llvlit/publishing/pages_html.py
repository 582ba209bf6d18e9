"""The built pages: what a theme brings and no reader needs is taken out, and what is left is checked."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

from llvlit.publishing.pages import Page

_THEBE = re.compile(
    r"<script>const THEBE_JS_URL.*?</script>|<script[^>]*sphinx-thebe\.js[^>]*></script>"
    r"|<link[^>]*sphinx-thebe\.css[^>]*>|<script type=\"text/x-thebe-config\">.*?</script>",
    re.DOTALL,
)
_ICON = re.compile(r'"?(?P<name>[a-z0-9-]+)"?:\[\d+,\d+,\[[^\]]*\],"[0-9a-f]+",(?:"[^"]*"|\[[^\]]*\])\],?')
_ICON_USED = re.compile(r"\bfa-([a-z0-9-]+)")
_SIGNATURE = re.compile(r"<dl>\s*(?:<dd><em class=\"sig-param\">.*?</dd>\s*)+</dl>", re.DOTALL)
_BRANCH = re.compile(r'(<a class="(?:current )?reference internal" href="[^"]*">([^<]+)</a><details[^>]*>\s*<summary)>')
_EQUATIONS = ("core.js", "startup.js", "loader.js", "input", "output", "a11y")
"""Parts of MathJax that a page may ask for: ``_config.yml`` names what it loads."""


def trim(html: Path) -> None:
    """Take out of a built book the scripts, icons and parts of MathJax that its pages do not use.

    - thebe would run cells in the page, which is not offered here.  Its extension is always there, declares the
      same constant twice (an error in the console) and names another host.
    - Font Awesome's script holds two thousand icons; some twenty are kept.
    - MathJax comes as one large file with menus and speech.  Its parts are loaded in its place.
    - A search fetches the pages it has found, for their excerpts; opened from disk, a browser refuses that.
    """
    pages = sorted(html.rglob("*.html"))
    for path in pages:
        path.write_text(trimmed(path.read_text(encoding="utf-8")), encoding="utf-8")
    scripts = html / "_static" / "scripts"
    icons = scripts / "fontawesome.js"
    if icons.is_file():
        users = [*pages, *(path for path in scripts.glob("*.js") if path != icons)]
        used = {name for path in users for name in _ICON_USED.findall(path.read_text(encoding="utf-8"))}
        icons.write_text(with_icons(icons.read_text(encoding="utf-8"), used), encoding="utf-8")
    options = html / "_static" / "documentation_options.js"
    if options.is_file():
        text = options.read_text(encoding="utf-8")
        options.write_text(text.replace("SUMMARY: true", 'SUMMARY: location.protocol !== "file:"'), encoding="utf-8")
    for path in (html / "_static").rglob("*.map"):
        path.unlink()
    mathjax = html / "_static" / "mathjax"
    for path in mathjax.iterdir() if mathjax.is_dir() else ():
        if path.name not in _EQUATIONS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def trimmed(page: str) -> str:
    """A built page without thebe's scripts, with MathJax in parts, with no list that is none and no nameless switch.

    Sphinx sets the lines of a long signature as a list of definitions without terms, and a bibliography as a
    list without items.  The theme opens a branch of the contents by a switch that is an icon alone.  Screen
    readers stumble over all three.  And it calls its own first choice of light or dark an error.
    """
    page = _THEBE.sub("", page).replace("_static/mathjax/tex-chtml.js", "_static/mathjax/startup.js")
    page = page.replace('<div role="list" class="citation-list">', '<div class="citation-list">')
    page = page.replace('localStorage.getItem("mode") || ""', 'localStorage.getItem("mode") || "auto"')
    page = _BRANCH.sub(r'\1 aria-label="Pages of \2">', page)
    return _SIGNATURE.sub(
        lambda lines: (
            lines[0]
            .replace("<dl>", "<span>")
            .replace("</dl>", "</span>")
            .replace("<dd>", '<span class="sig-line">')
            .replace("</dd>", "</span>")
        ),
        page,
    )


def with_icons(script: str, used: Iterable[str]) -> str:
    """Font Awesome's script with these icons and no others."""
    kept = set(used)
    return _ICON.sub(lambda icon: icon[0] if icon["name"] in kept else "", script)


class _References(HTMLParser):
    """Collects what a page fetches, and its pictures without words."""

    def __init__(self) -> None:
        super().__init__()
        self.remote: list[str] = []
        self.wordless: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        address = values.get("src") if tag != "link" else values.get("href")
        fetched = tag in {"script", "img", "iframe", "source", "video", "audio", "embed"} or (
            tag == "link" and not {"canonical", "search", "next", "prev", "author"} & set(values.get("rel", "").split())
        )
        if fetched and address and urlparse(address).netloc:
            self.remote.append(address)
        if tag == "img":
            alt, name = values.get("alt", "").strip(), PurePosixPath(values.get("src", "")).name
            if not alt or alt == values.get("src") or PurePosixPath(alt).name == name:
                self.wordless.append(f"image {values.get('src')}")
        named = values.get("role") == "img" and values.get("aria-label", "").strip()
        if tag == "svg" and values.get("aria-hidden") != "true" and not named:
            self.wordless.append("an inline svg without role=img and aria-label")


def html_faults(html: Path, pages: Iterable[Page]) -> list[str]:
    """What is wrong with the built pages: pictures without alt text, anything fetched from another host."""
    faults = []
    for page in pages:
        path = html / f"{page.name}.html"
        if not path.is_file():
            faults.append(f"{page.source}: was not built")
            continue
        found = _References()
        found.feed(path.read_text(encoding="utf-8"))
        faults += [f"{page.source}: no alt text: {what}" for what in found.wordless]
        faults += [f"{page.source}: needs the network: {address}" for address in found.remote]
    return faults
