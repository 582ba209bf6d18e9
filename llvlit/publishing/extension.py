"""The book's one Sphinx extension: directives for what the package knows, and pages made light and accessible."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup
from docutils import nodes
from nbformat import NotebookNode
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

from llvlit.publishing.architectures import architecture_table
from llvlit.publishing.command_page import command_sections
from llvlit.publishing.daily import runs_table
from llvlit.publishing.execution import executed_path, read_executed, status_table
from llvlit.publishing.handouts import with_handout
from llvlit.publishing.notebooks import exercise_table
from llvlit.publishing.pages import Page, escaped, markdown_table, read_contents
from llvlit.tasks.sources import HUB_READING, HUB_TASKS

EQUATIONS = ("core.js", "startup.js", "loader.js", "input", "output", "a11y")
"""Parts of MathJax that a page may ask for: ``_config.yml`` names what it loads."""

_ICON = re.compile(r'"?(?P<name>[a-z0-9-]+)"?:\[\d+,\d+,\[[^\]]*\],"[0-9a-f]+",(?:"[^"]*"|\[[^\]]*\])\],?')
_ICON_USED = re.compile(r"\bfa-([a-z0-9-]+)")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx. Other extensions listen with priority 500 or less, so these come after them."""
    app.add_config_value("llvlit_command_line", "", "env", str)
    app.add_config_value("thebe_config", {}, "html")  # which jupyter-book sets, also where that extension is left out
    app.config.mathjax_path = "mathjax/startup.js"  # loads the parts of MathJax, not all in one with menus and speech
    for name, markdown in {
        "chapter-runs": lambda env: status_table((name, book.metadata["llvlit"]) for name, book in _chapters(env)),
        "exercise-list": lambda env: exercise_table(map(_page, _chapters(env))),
        "hub-tasks": lambda env: hub_table(),
        "first-slider": lambda env: first_slider(notebook for _, notebook in _chapters(env)),
        "architecture-table": lambda env: architecture_table(_result("architectures.csv", env)),
    }.items():
        app.add_directive(name, _directive(markdown))
    app.add_directive("command-line", CommandLine)
    app.add_directive("daily-runs", DailyRuns)
    app.connect("autodoc-process-signature", _forget_types, priority=900)
    app.connect("html-page-context", _mend, priority=900)
    app.connect("build-finished", _trim, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


# Directives


def hub_table() -> str:
    """Markdown of the hub tasks: where each lies, and how its rows are read."""
    rows = [(f"`{name}`", escaped(task.place), escaped(task.reading)) for name, task in HUB_TASKS.items()]
    return markdown_table("| Task | Data set | Rows |\n|---|---|---|", rows) + f"\n\n{HUB_READING}"


def first_slider(notebooks: Iterable[NotebookNode]) -> str:
    """Markdown of the first slider that an executed chapter shows; nothing where there is none."""
    for notebook in notebooks:
        for cell in notebook.cells:
            for output in cell.get("outputs", ()):
                html = "".join(output.get("data", {}).get("text/html", ""))
                if 'class="llvlit-slider"' in html:
                    return f"```{{raw}} html\n{html}\n```"
    return ""


def _result(name: str, env: BuildEnvironment) -> Path:
    """A file of ``results/`` in the checkout around the book's sources."""
    source = Path(env.srcdir).resolve()
    return next(folder / "results" for folder in (source, *source.parents) if (folder / "results").is_dir()) / name


def _directive(markdown: Callable[[BuildEnvironment], str]) -> type[SphinxDirective]:
    """A directive that stands for generated Markdown."""

    class Generated(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            return self.parse_text_to_nodes(markdown(self.env))

    return Generated


class DailyRuns(SphinxDirective):
    """The table of daily builds, which a published book fills."""

    def run(self) -> list[nodes.Node]:
        """Called by Sphinx."""
        return [nodes.raw("", runs_table(), format="html")]


class CommandLine(SphinxDirective):
    """A section for each command of a program, of which ``_config.yml`` names the function that makes the parser."""

    def run(self) -> list[nodes.Node]:
        """Called by Sphinx."""
        module, _, name = self.config.llvlit_command_line.partition(":")
        try:
            parser = getattr(import_module(module), name)()
        except (ImportError, AttributeError, ValueError) as error:
            raise self.error(f"llvlit_command_line of _config.yml names no function ({error}).") from error
        sections: list[nodes.Node] = []
        for command, text in command_sections(parser).items():
            title, label = f"{parser.prog} {command}", f"cli-{command}"
            section = nodes.section(ids=[nodes.make_id(title), label], names=[label])
            section += nodes.title("", "", nodes.literal(title, title))
            self.state.document.note_explicit_target(section)
            section += self.parse_text_to_nodes(text)
            sections.append(section)
        return sections


def _chapters(env: BuildEnvironment) -> Iterator[tuple[str, NotebookNode]]:
    """Names and executed notebooks of the chapters, in reading order."""
    root = Path(env.srcdir)
    for name in read_contents(root):
        path = executed_path(root, name)
        if path.is_file():
            yield name, read_executed(path)


def _page(chapter: tuple[str, NotebookNode]) -> Page:
    name, notebook = chapter
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return Page(name=name, path=Path(f"{name}.md"), text=text, is_chapter=True)


# Events


def _forget_types(app: Sphinx, what: str, name: str, *_: object) -> None:
    """A dataclass says what its attributes are, so the types of its constructor are not listed again."""
    if what in ("class", "exception"):
        app.env.temp_data.get("annotations", {}).pop(name, None)


def _mend(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: object) -> None:
    """Link a chapter to its handout, and mend what readers with a screen reader stumble over."""
    if "body" in context:
        context["body"] = with_handout(accessible(context["body"]), pagename)
    if "generate_toctree_html" in context:
        context["generate_toctree_html"] = cache(_labelled(context["generate_toctree_html"]))


def accessible(body: str) -> str:
    """HTML of a page without lists that are none.

    Sphinx sets the lines of a long signature as a list of definitions without terms, and a bibliography as a list
    without items.

    Examples
    --------
    >>> from llvlit.publishing.extension import accessible
    >>> accessible('<div class="citation-list" role="list">Moore 1981</div>')
    '<div class="citation-list">Moore 1981</div>'
    """
    page = BeautifulSoup(body, "html.parser")
    signatures = [dl for dl in page.find_all("dl") if not dl.dt and dl.select_one("dd > em.sig-param")]
    citations = page.select("div.citation-list[role=list]")
    for signature in signatures:
        signature.name = "span"
        for line in signature.find_all("dd", recursive=False):
            line.name, line["class"] = "span", "sig-line"
    for found in citations:
        del found["role"]
    return str(page) if signatures or citations else body


def _labelled(contents: Callable[..., Any]) -> Callable[..., Any]:
    """The theme's contents, in which a switch that opens a branch is an icon alone, with a name for each switch."""

    def labelled(kind: str, **options: Any) -> Any:
        tree = contents(kind, **options)
        if kind != "sidebar":
            return tree
        tree = BeautifulSoup(str(tree), "html.parser")
        for switch in tree.select("li > details > summary"):
            link = switch.find_previous("a")
            switch["aria-label"] = f"Pages of {link.get_text(strip=True) if link else 'this part'}"
        return tree

    return labelled


def _trim(app: Sphinx, exception: Exception | None) -> None:
    """Take out of a built book the icons and parts of MathJax that its pages do not use."""
    if exception is not None:
        return
    html = Path(app.outdir)
    scripts = html / "_static" / "scripts"
    icons = scripts / "fontawesome.js"
    if icons.is_file():
        users = [*html.rglob("*.html"), *(path for path in scripts.glob("*.js") if path != icons)]
        used = {name for path in users for name in _ICON_USED.findall(path.read_text(encoding="utf-8"))}
        icons.write_text(with_icons(icons.read_text(encoding="utf-8"), used), encoding="utf-8")
    for path in (html / "_static").rglob("*.map"):
        path.unlink()
    for path in (html / "_static" / "mathjax").glob("*"):
        if path.name not in EQUATIONS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def with_icons(script: str, used: Iterable[str]) -> str:
    """Font Awesome's script, which holds two thousand icons, with these and no others.

    Examples
    --------
    >>> from llvlit.publishing.extension import with_icons
    >>> with_icons('a={moon:[5,5,[9],"f186","M1z"],sun:[5,5,[],"f185",["M2z","M3z"]]}', ["sun"])
    'a={sun:[5,5,[],"f185",["M2z","M3z"]]}'
    """
    kept = set(used)
    return _ICON.sub(lambda icon: icon[0] if icon["name"] in kept else "", script)
