"""The book's pipeline on a tiny book: the healthy one passes, and every planted fault stops it by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from pypdf import PdfReader

from llvlit.errors import BuildError, InputError
from llvlit.publishing.build import build_book
from llvlit.publishing.pages import Page, read_notebook, read_pages
from llvlit.publishing.pages_html import html_faults, trimmed, with_icons

REPOSITORY = Path(__file__).resolve().parent.parent

FRONT_MATTER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

"""
PARAMETERS = """\
```{code-cell} ipython3
:tags: [parameters, remove-cell]

profile = "unset"
device = "unset"
```
"""
FIGURE = """\
from IPython.display import display

svg = "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><path d='M0 0L9 9'/></svg>"
display({"image/svg+xml": svg}, raw=True, metadata={"llvlit": %s})
"""
WORDS = {"name": "fig-line", "alt": "A line that rises.", "caption": "It rises, as $y = x$ does."}
CHAPTER = f"""\
# Does it run?

{PARAMETERS}
```{{code-cell}} ipython3
:tags: [remove-cell]

import os, sys

assert sys.executable == os.environ["EXPECTED_PYTHON"]
assert (profile, device) == ("embedded", "cpu")
assert os.environ["HF_HUB_OFFLINE"] == "1"
```

$$
y = x
$$ (eq-line)

```{{code-cell}} ipython3
:tags: [hide-input]

{FIGURE % json.dumps(WORDS)}
```
"""
INTRO = """\
# A tiny book

See {doc}`chapter`, [the same chapter](chapter.md), {eq}`eq-line`, {numref}`fig-line`,
{term}`residual stream`.

```{glossary}
residual stream
  The state.
```

```{exercise}
:label: ex-one

Why?
```

```{solution} ex-one
:class: dropdown

Because.
```

<!-- status-table -->
"""


def cell(code: str) -> str:
    return f"\n```{{code-cell}} ipython3\n{code}\n```\n"


def write_book(root: Path, *, intro: str = INTRO, chapter: str | None = CHAPTER) -> Path:
    """Book of a plain page and (unless None) a chapter, under the real settings."""
    (root / "book").mkdir(parents=True)
    config = (REPOSITORY / "_config.yml").read_text(encoding="utf-8")
    (root / "_config.yml").write_text(config, encoding="utf-8")
    (root / "book" / "references.bib").write_text("@misc{known, title={A}, author={B}, year={2000}}\n")
    shutil.copytree(REPOSITORY / "book" / "_static", root / "book" / "_static")
    (root / "book" / "intro.md").write_text(intro, encoding="utf-8")
    contents = "format: jb-book\nroot: book/intro\n"
    if chapter is not None:
        (root / "book" / "chapter.md").write_text(FRONT_MATTER + chapter, encoding="utf-8")
        contents += "chapters:\n  - file: book/chapter\n"
    (root / "_toc.yml").write_text(contents)
    return root


@pytest.fixture(scope="module", autouse=True)
def misleading_kernel(tmp_path_factory):
    """A `python3` kernel of another interpreter stands first on Jupyter's path: it must not be taken."""
    folder = tmp_path_factory.mktemp("jupyter")
    (folder / "kernels" / "python3").mkdir(parents=True)
    spec = {"argv": ["/no/such/python", "{connection_file}"], "display_name": "x", "language": "python"}
    (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        patch.setenv("EXPECTED_PYTHON", sys.executable)
        yield


def build(root: Path, **options):
    return build_book(root, device="cpu", progress=False, **options)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """The tiny book, built once; named so that its path would be seen where it leaked."""
    root = write_book(tmp_path_factory.mktemp("secret_place"))
    return root, build(root)


def test_healthy_book_has_figure_with_words_and_hides_parameters(healthy):
    root, built = healthy
    html = (root / "_build" / "html" / "book" / "chapter.html").read_text(encoding="utf-8")
    assert built.index.is_file()
    assert 'alt="A line that rises."' in html
    assert 'id="fig-line"' in html and "It rises, as" in html
    assert "llvlit_parameter" not in html and "&quot;unset&quot;" not in html
    assert "profile" not in re.sub(r"<[^>]+>", "", html.split("<article", 1)[1].split("</article>")[0])


def test_healthy_book_needs_no_network(healthy):
    root, _ = healthy
    html = root / "_build" / "html"
    pages = read_pages(root)
    assert html_faults(html, pages) == []
    text = (html / "book" / "chapter.html").read_text(encoding="utf-8")
    mathjax = re.search(r'src="\.\./(_static/mathjax/[^"?]+)', text)
    assert mathjax and (html / mathjax[1]).is_file()
    assert (html / "searchindex.js").is_file()


def test_theme_scripts_are_trimmed_to_what_pages_use(healthy):
    html = healthy[0] / "_build" / "html"
    text = (html / "book" / "chapter.html").read_text(encoding="utf-8")
    icons = (html / "_static" / "scripts" / "fontawesome.js").read_text(encoding="utf-8")
    assert "thebe" not in text.lower() and "tex-chtml" not in text
    assert "fa-moon" in text and "moon:[" in icons  # the theme's switch is drawn with it
    assert len(icons) < 100_000 and "monero" not in icons
    loaded = re.search(r'"loader": \{"load": (\[[^\]]*\])', text)
    assert loaded and all((html / "_static" / "mathjax" / f"{part}.js").is_file() for part in json.loads(loaded[1]))
    assert not list((html / "_static").rglob("*.map"))
    options = (html / "_static" / "documentation_options.js").read_text(encoding="utf-8")
    assert 'SHOW_SEARCH_SUMMARY: location.protocol !== "file:"' in options
    assert not (html / "prf-prf.html").exists()  # no page leads there


def test_only_named_icons_stay():
    script = (
        'a={moon:[512,512,[9,10],"f186","M1 2z"],"half-sun":[1,2,[],"f0",["M3","M4z"]],sun:[1,2,["s"],"f185","M5z"]};b'
    )
    assert with_icons(script, {"sun"}) == 'a={sun:[1,2,["s"],"f185","M5z"]};b'
    assert with_icons(script, {"moon", "half-sun", "sun"}) == script
    lines = '<dl>\n<dd><em class="sig-param">name</em>,</dd>\n</dl>'
    assert trimmed(lines) == '<span>\n<span class="sig-line"><em class="sig-param">name</em>,</span>\n</span>'
    assert trimmed("<dl><dt>a</dt><dd>b</dd></dl>") == "<dl><dt>a</dt><dd>b</dd></dl>"
    assert trimmed("<script>const THEBE_JS_URL = 1</script><p>x</p>") == "<p>x</p>"
    branch = '<a class="reference internal" href="api.html">Python interface</a><details><summary>'
    assert trimmed(branch) == branch[:-1] + ' aria-label="Pages of Python interface">'
    current = branch.replace('"reference', '"current reference').replace("<details>", '<details open="open">')
    assert trimmed(current) == trimmed(trimmed(current)) == current[:-1] + ' aria-label="Pages of Python interface">'


def test_launch_button_opens_an_executed_notebook_of_the_published_branch(healthy):
    root, built = healthy
    text = (root / "_build" / "html" / "book" / "chapter.html").read_text(encoding="utf-8")
    assert "colab.research.google.com/github/llvlit/llvlit/blob/gh-pages/latest/notebooks/book/chapter.ipynb" in text
    assert "mybinder.org/v2/gh/llvlit/llvlit/gh-pages?urlpath=lab/tree/latest/notebooks/book/chapter.ipynb" in text
    (staged,) = built.notebooks
    notebook = nbformat.read(staged, as_version=4)
    nbformat.validate(notebook)
    assert staged.relative_to(root / "_build" / "book") == Path("book/chapter.ipynb")
    assert any(part.get("outputs") for part in notebook.cells)
    assert notebook.metadata.kernelspec.name == "python3"


def test_download_installs_itself_and_takes_its_settings_from_one_cell(healthy):
    root, _ = healthy
    path = root / "_build" / "html" / "_sources" / "book" / "chapter.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].id == "install" and "llvlit" in notebook.cells[0].source
    settings = [cell for cell in notebook.cells if "profile =" in cell.source]
    assert len(settings) == 1 and "The outputs below were computed with" in settings[0].source
    assert any(cell.get("outputs") for cell in notebook.cells)


def test_no_path_of_the_machine_is_published(healthy):
    root, _ = healthy
    for folder in ("html", "book"):
        for path in (root / "_build" / folder).rglob("*"):
            if path.suffix in {".html", ".ipynb", ".md", ".js"}:
                assert root.name not in path.read_text(encoding="utf-8"), path


def test_status_table_tells_time_device_and_versions(healthy):
    root, built = healthy
    html = (root / "_build" / "html" / "book" / "intro.html").read_text(encoding="utf-8")
    row = next(line for line in html.split("</tr>") if 'href="chapter.html"' in line and "<td" in line)
    assert f"{built.seconds['book/chapter']:.1f}" in row
    assert "embedded" in row and "CPU" in row
    assert f"torch {torch.__version__}" in html


def test_second_build_reuses_unchanged_chapters_on_request(healthy):
    root, built = healthy
    executed = root / "_build" / "executed" / "book" / "chapter.ipynb"
    before = executed.stat().st_mtime_ns
    assert build(root, chapters=[]).seconds == built.seconds
    assert executed.stat().st_mtime_ns == before


@pytest.mark.usefixtures("browser")  # skipped, in its words, where there is none
def test_command_prints_the_book_and_takes_pictures_of_its_pages(healthy, tmp_path):
    root, _ = healthy
    command = [sys.executable, "-m", "llvlit", "book", "--root", root, "--device", "cpu", "--chapters", "chapter"]
    done = subprocess.run([*command, "--pdf", "--screenshots", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = PdfReader(root / "_build" / "llvlit.pdf")
    assert [mark.title for mark in printed.outline] == ["A tiny book", "Does it run?"]
    text = "".join(page.extract_text() for page in printed.pages)
    assert "Because." in text and "Fig. 1 It rises" in text  # solutions are open
    assert "import display" not in text  # code that the page keeps closed is not
    links = [link.get_object() for page in printed.pages for link in page.get("/Annots", ())]
    assert all(str(link["/A"]["/URI"]).startswith("https:") for link in links if "/A" in link)
    sheets = {page.indirect_reference.idnum: number for number, page in enumerate(printed.pages)}
    led = {(sheets[link["/Dest"][0].idnum], round(link["/Dest"][3])) for link in links if "/Dest" in link}
    chapter = printed.get_destination_page_number(printed.outline[1])
    assert len({height for sheet, height in led if sheet == chapter}) >= 3  # its top, its equation, its figure
    for view, width in {"light": 1280, "dark": 1280, "phone": 360}.items():
        for name in ("intro", "chapter"):
            picture = (tmp_path / view / f"{name}.png").read_bytes()
            assert picture.startswith(b"\x89PNG") and int.from_bytes(picture[16:20], "big") == width


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("gain = 1\nraise ValueError('planted fault')", "ValueError: planted fault"),
        ("import sys\nsys.exit(0)", "SystemExit|ended the chapter early|was not executed"),
    ],
)
def test_cell_that_raises_stops_the_build(tmp_path, code, told):
    root = write_book(tmp_path, chapter=CHAPTER + cell(code))
    with pytest.raises(BuildError, match=told) as caught:
        build(root)
    assert f"book/chapter.md, code cell 4 ({code.splitlines()[0]})" in str(caught.value)
    assert not (root / "_build" / "html").exists()


def test_broken_references_stop_the_build(tmp_path):
    targets = {
        "{ref}`lost-section`": "lost-section",
        "{eq}`eq-lost`": "eq-lost",
        "{numref}`fig-lost`": "fig-lost",
        "{doc}`lost_page`": "lost_page",
        "{term}`lost term`": "lost term",
        "{cite:t}`lost2026`": "lost2026",
        "{prf:ref}`thm-lost`": "thm-lost",
        "[link](lost.md)": "lost.md",
        "[link](#lost-anchor)": "lost-anchor",
    }
    lines = "\n\n".join(targets)
    root = write_book(tmp_path, intro=INTRO + "\n" + lines, chapter=CHAPTER + "\nSee {ref}`lost-in-chapter`.\n")
    with pytest.raises(BuildError) as caught:
        build(root)
    told = str(caught.value).splitlines()
    for target in targets.values():
        assert any(line.startswith("book/intro.md") and target in line for line in told), target
    assert any(line.startswith("book/chapter.md") and "lost-in-chapter" in line for line in told)


@pytest.mark.parametrize("missing", ["alt", "caption", "name"])
def test_figure_cell_without_words_stops_the_build(tmp_path, missing):
    words = {**WORDS, missing: " "}
    root = write_book(tmp_path, chapter=f"# Title\n\n{PARAMETERS}\n{cell(FIGURE % json.dumps(words))}")
    with pytest.raises(BuildError, match=rf"book/chapter.md, code cell 2 .* a figure has no {missing}"):
        build(root)


def test_picture_without_alt_text_stops_the_build(tmp_path):
    plain = "# A page\n\n![](_static/picture.svg)\n\n<svg width='1' height='1'></svg>\n"
    root = write_book(tmp_path, intro=plain, chapter=None)
    (root / "book" / "_static" / "picture.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (root / "book" / "picture.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (root / "book" / "intro.md").write_text(plain.replace("_static/", ""))
    with pytest.raises(BuildError) as caught:
        build(root)
    assert re.search(r"book/intro.md: no alt text: image .*picture.svg", str(caught.value))
    assert "book/intro.md: no alt text: an inline svg" in str(caught.value)


def test_sphinx_warning_stops_the_build(tmp_path):
    root = write_book(tmp_path, intro="# A page\n\n#### Skipped two levels\n", chapter=None)
    with pytest.raises(BuildError, match=r"book/intro.md:3: WARNING: .*header level"):
        build(root)


def test_remote_fetch_is_a_fault(tmp_path):
    page = Page(name="page", path=tmp_path / "page.md", text="", is_chapter=False)
    (tmp_path / "page.html").write_text(
        '<script src="https://cdn.example/x.js"></script><link rel="stylesheet" href="//fonts.example/a.css">'
        '<link rel="canonical" href="https://here.example/"><a href="https://there.example/">fine</a>'
        '<img src="a.svg" alt="a.svg">'
    )
    assert html_faults(tmp_path, [page]) == [
        "page.md: no alt text: image a.svg",
        "page.md: needs the network: https://cdn.example/x.js",
        "page.md: needs the network: //fonts.example/a.css",
    ]


@pytest.mark.parametrize(
    ("chapter", "told"),
    [
        ("# Title\n", "exactly one parameter cell"),
        ("# Title\n\n" + PARAMETERS.replace(", remove-cell", ""), "exactly one parameter cell"),
        ("# Title\n\n" + PARAMETERS.replace("device", "machine"), "does not set device"),
    ],
)
def test_chapter_needs_a_hidden_parameter_cell(tmp_path, chapter, told):
    root = write_book(tmp_path, chapter=chapter)
    page = read_pages(root)[1]
    with pytest.raises(BuildError, match=told) as caught:
        read_notebook(page)
    assert "book/chapter.md" in str(caught.value)


def test_code_cells_on_a_plain_page_are_refused(tmp_path):
    root = write_book(tmp_path, intro="# Page\n" + cell("1 + 1"), chapter=None)
    with pytest.raises(BuildError, match=r"book/intro.md has code cells that would never be executed"):
        read_pages(root)


def test_missing_book_and_missing_page_are_named(tmp_path):
    with pytest.raises(BuildError, match=r"no _toc.yml"):
        build_book(tmp_path)
    root = write_book(tmp_path / "other")
    os.unlink(root / "book" / "chapter.md")
    with pytest.raises(BuildError, match=r"no file book/chapter.md"):
        read_pages(root)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"profile": "papre"}, "Did you mean 'paper'"),
        ({"chapters": ["chaptre"]}, "Did you mean 'chapter'"),
        ({"jobs": 0}, "jobs=0"),
        ({"device": "gpu"}, "device='gpu'"),
    ],
)
def test_unknown_options_are_named(tmp_path, options, told):
    root = write_book(tmp_path)
    with pytest.raises(InputError, match=told):
        build_book(root, progress=False, **options)
