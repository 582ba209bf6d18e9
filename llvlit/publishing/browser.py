"""The built book in a real browser: every page as a picture for review."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llvlit.errors import BuildError
from llvlit.progress import progress

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
READY = "() => window.MathJax?.startup?.promise ?? true"
"""Equations are set: MathJax, where a page has it, has promised and kept."""


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
