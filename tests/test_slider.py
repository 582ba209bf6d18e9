"""Sliders: texts written in advance, of which a page shows those of one strength at a time."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from llvlit.errors import InputError
from llvlit.publishing.extension import first_slider
from llvlit.publishing.slider import slider_html

STATIC = Path(__file__).resolve().parent.parent / "book" / "_static"
TEXTS = {"against": ["It was <bad>.", "Awful, too."], "no push": ["It was."], "towards": ["It was good."]}


def page_at(browser, tmp_path, **options):
    for name in ("slider.js", "slider.css"):
        (tmp_path / name).write_bytes((STATIC / name).read_bytes())
    head = '<link rel="stylesheet" href="slider.css"><script src="slider.js"></script>'
    text = f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>t</title>{head}</head><body>"
    (tmp_path / "page.html").write_text(f"{text}{slider_html(TEXTS, start='no push')}</body></html>", encoding="utf-8")
    page = browser.new_context(**options).new_page()
    page.goto((tmp_path / "page.html").as_uri())
    return page


def test_one_strength_is_seen_and_arrow_keys_change_it(browser, tmp_path):
    page = page_at(browser, tmp_path, viewport={"width": 360, "height": 700})
    seen = page.locator("dd:visible")
    assert seen.all_inner_texts() == TEXTS["no push"]
    slider = page.get_by_role("slider", name="Push")
    slider.focus()
    height = page.locator(".llvlit-slider").bounding_box()["height"]
    for key, name in (("ArrowRight", "towards"), ("Home", "against")):
        page.keyboard.press(key)
        assert seen.all_inner_texts() == TEXTS[name]
        assert slider.get_attribute("aria-valuetext") == name == page.locator("output").inner_text()
        assert page.locator(".llvlit-slider").bounding_box()["height"] == height  # what stands below does not move
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_without_javascript_all_texts_are_there(browser, tmp_path):
    page = page_at(browser, tmp_path, java_script_enabled=False)
    assert page.locator("dd:visible").count() == sum(map(len, TEXTS.values()))
    assert page.locator("dt:visible").all_inner_texts() == list(TEXTS)


@pytest.mark.parametrize(("texts", "start", "told"), [(TEXTS, "far", "far"), ({"a": []}, "a", "paragraph")])
def test_odd_texts_are_refused_by_name(texts, start, told):
    with pytest.raises(InputError, match=told):
        slider_html(texts, start=start)


def test_the_first_page_shows_the_slider_of_an_executed_chapter():
    shown = new_output("display_data", data={"text/html": slider_html(TEXTS, start="towards")})
    other = new_output("display_data", data={"text/html": "<p>A table</p>"})
    notebook = new_notebook(cells=[new_markdown_cell("Words"), new_code_cell("1", outputs=[other, shown])])
    nbformat.validate(notebook)
    found = first_slider([new_notebook(), notebook])
    assert found.startswith('```{raw} html\n<div class="llvlit-slider"') and "&lt;bad&gt;" in found
    assert first_slider([new_notebook()]) == ""
