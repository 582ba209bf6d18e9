"""Student notebooks hold no solution, instructor notebooks hold and run them; neither holds a word of Sphinx."""

from __future__ import annotations

import ast
import re
import resource
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from course_book import CHAPTER, FRONT_MATTER, OTHER, course_book
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbclient import NotebookClient

from llvlit.cli.main import main
from llvlit.errors import BuildError, FileError, InputError, LlvlitError
from llvlit.publishing.exercises import check_answer
from llvlit.publishing.notebooks import ANSWER, exercise_table, write_exercises
from llvlit.publishing.pages import read_pages

REPOSITORY = Path(__file__).resolve().parent.parent


def write_book(root: Path, chapter: str = CHAPTER) -> Path:
    for name, text in course_book(chapter).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = write_book(tmp_path_factory.mktemp("book"))
    return write_exercises(root, root / "out")


def cells(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    return notebook.cells


def sources(path: Path, kind: str = "") -> list[str]:
    return [cell.source for cell in cells(path) if kind in cell.cell_type]


def named(paths, name: str) -> Path:
    return next(path for path in paths if path.stem == name)


def test_students_get_an_empty_cell_where_instructors_get_the_solution(made):
    student, instructor = sources(named(made.student, "sums")), sources(named(made.instructor, "sums"))
    assert not re.search("secret", "\n".join(student), re.IGNORECASE)
    assert student.count(ANSWER) == 2 and ANSWER not in instructor
    taken = [source for source in instructor if source not in student]
    assert taken[1:] == [
        "#### Solution to In words",
        "SECRET-WORDS by (1).",
        "#### Solution to In code",
        "SECRET-BEFORE",
        "secret_code = two\nassert check_answer(secret_code, lambda: two)",
        "SECRET-AFTER",
    ] or taken[1:] == [
        "#### Solution to In words\n\nSECRET-WORDS by (1).",
        "#### Solution to In code\n\nSECRET-BEFORE",
        "secret_code = two\nassert check_answer(secret_code, lambda: two)",
        "SECRET-AFTER",
    ]
    assert "Instructor" in taken[0]
    assert [source for source in student if source not in instructor][1:] == [ANSWER, ANSWER]
    assert student[-2:] == instructor[-2:] == ["## After", "print(two)"]


CHECK = 'answer = None  # a whole number\ncheck_answer(answer, lambda: two, hint="Count again.")'


def test_hint_and_check_stand_below_the_empty_cell_and_above_the_solution(made):
    hint = "<details>\n<summary>Hint</summary>\n\nCount, as $\\mathbb{R}$ in *What do sums do?* does.\n\n</details>"
    student, instructor = (sources(named(paths, "sums")) for paths in (made.student, made.instructor))
    place = student.index("### Exercise: ★★★ In code\n\n`ex-code`\n\nCompute it.")
    assert student[place + 1 : place + 5] == [ANSWER, hint, CHECK, "## After"]
    place = instructor.index(hint)
    assert instructor[place + 1] == CHECK and instructor[place + 2].startswith("#### Solution to In code")
    (check,) = (cell for cell in cells(named(made.student, "sums")) if "check" in cell.metadata.get("tags", ()))
    assert "jupyter" not in check.metadata  # open, since it is there to be filled in


def test_exercises_are_listed_with_their_stars(made):
    found = [(one.label, one.title, one.stars, one.page) for one in made.exercises]
    assert found == [("ex-words", "In words", 1, "book/sums"), ("ex-code", "In code", 3, "book/sums")]
    for path in (named(made.student, "sums"), named(made.instructor, "sums")):
        first, install = sources(path)[:2]
        assert "What do sums do?" in first
        assert "- ★ In words (`ex-words`)\n- ★★★ In code (`ex-code`)" in first
        assert "'https://github.com/llvlit/llvlit', 'HEAD'" in install and "%pip install" in install
        assert "### Exercise: ★★★ In code\n\n`ex-code`\n\nCompute it." in sources(path)


def test_table_for_teachers_lists_every_exercise(tmp_path):
    table = exercise_table(read_pages(write_book(tmp_path)))
    assert table.splitlines()[2:] == [
        "| {doc}`/book/sums` | {ref}`ex-words` | In words | ★ |",
        "| {doc}`/book/sums` | {ref}`ex-code` | In code | ★★★ |",
    ]


def test_a_bar_in_a_title_begins_no_column(tmp_path):
    root = write_book(tmp_path)
    (page,) = (page for page in read_pages(root) if page.name.endswith("sums"))
    page.path.write_text(page.text.replace("In words", "In $|x|$ words"), encoding="utf-8")
    html = MarkdownIt().enable("table").use(dollarmath_plugin).render(exercise_table(read_pages(root)))
    assert html.count("<td>") == 8
    assert "|x|" in html and " words</td>" in html


def test_sphinx_becomes_plain_markdown(made):
    text = "\n\n".join(sources(named(made.student, "sums"), "markdown"))
    for expected in (
        "> **Objectives**\n>\n> - Add numbers, as Bell and de Boer (2000) does (Bell and de Boer, 2000).",
        "> - **Prerequisites**: [Other?](other.ipynb), *two words*.",
        "> **Theorem: The sum**\n>\n> In $\\mathbb{R}$ it holds that\n>\n> $$ 1 + 1 = 2 . \\tag{1} $$",
        "**Proof.** By (1) and (1) of *Other?*. ∎",
        "```text\n{eq}`kept`\n```",
        "See Theorem *The sum*, *What do sums do?*, this section, *In code* and Figure 1.",
        "Write ``{eq}`eq-sum` `` for (1).",
        "What is $1 + 1$?",
    ):
        assert expected in text, text
    assert "(sums)=" not in text
    assert "> * - [What do sums do?](sums.ipynb)\n>   - long\n>     cell" in sources(named(made.student, "other"))[-1]


def test_parameters_stay_and_plotting_code_is_folded(made):
    by_tag = {tag: cell for cell in cells(named(made.student, "sums")) for tag in cell.metadata.get("tags", ())}
    assert by_tag["parameters"].source == 'profile = "embedded"\ndevice = "cpu"'
    assert "jupyter" not in by_tag["parameters"].metadata
    assert by_tag["hide-input"].metadata["jupyter"]["source_hidden"] is True


def test_instructor_notebook_executes(made, tmp_path):
    notebook = nbformat.read(named(made.instructor, "sums"), as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert notebook.cells[-1].outputs[0].text == "2\n"
    told = [
        part.text
        for cell in notebook.cells
        if "check_answer(" in cell.source
        for part in cell.get("outputs", ())
        if part.output_type == "stream"
    ]
    assert told == ["Put your result into `answer` and run this cell again.\n", "Right.\n"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("SECRET-AFTER\n\n````{solution-end}\n````", "SECRET-AFTER", "book/sums.md: the solution of 'ex-code' has no"),
        (
            "SECRET-WORDS by {eq}`eq-sum`.\n\n````{solution-end}\n````",
            "",
            "'ex-code' begins in the solution of 'ex-words'",
        ),
        ("````{solution-start} ex-code\n:class: dropdown\n````", "", "book/sums.md: a solution-end closes nothing"),
        ("{solution-start} ex-code", "{solution-start} ex-cod", "'ex-cod' has a solution, but no exercise"),
        (
            "SECRET-BEFORE",
            "```{code-cell}\n:tags: [check]\n1\n```",
            "the cell that checks 'ex-code' lies in its solution",
        ),
        (":label: ex-code", ":label: ex-words", "the exercise 'In code ★★★' needs a `:label:` of its own"),
        (":label: ex-code", "", "needs a `:label:` of its own, not ''"),
    ],
)
def test_unbalanced_gates_are_refused_and_nothing_is_written(tmp_path, before, after, message):
    assert CHAPTER.count(before) == 1
    with pytest.raises(BuildError, match=re.escape(message)):
        write_exercises(write_book(tmp_path, CHAPTER.replace(before, after)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_work_of_others_is_kept_unless_forced(tmp_path, capsys):
    root, out = write_book(tmp_path), tmp_path / "out"
    first = write_exercises(root, out)
    contents = {path: path.read_bytes() for path in first.student + first.instructor}
    write_exercises(root, out)  # the same to the byte: nothing to refuse
    assert contents == {path: path.read_bytes() for path in contents}
    mine = named(first.student, "sums")
    mine.write_text("my answers")
    (out / "student" / "other.ipynb").unlink()
    with pytest.raises(FileError, match=r"1 of 4 notebooks .* student/sums\.ipynb.*--force"):
        write_exercises(root, out)
    assert mine.read_text() == "my answers"
    assert not (out / "student" / "other.ipynb").exists()  # nothing at all was written
    assert main(["exercises", "--root", str(root), "--out", str(out), "--force"]) == 0
    assert "***  In code (ex-code)" in capsys.readouterr().out
    assert contents == {path: path.read_bytes() for path in contents}


def test_a_full_disk_leaves_every_notebook_as_it_was(tmp_path):
    """No file may have more than 8,000 bytes: the first two notebooks would fit, the last two do not."""
    root, out = write_book(tmp_path, OTHER), tmp_path / "out"
    (root / "book" / "other.md").write_text(FRONT_MATTER + OTHER + "\nMuch text." * 2000, encoding="utf-8")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        with pytest.raises(FileError, match="0 of 4 notebooks were written"):
            write_exercises(root, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path for path in out.rglob("*") if path.is_file()] == []


def test_a_folder_in_a_notebooks_place_stays(tmp_path):
    root, place = write_book(tmp_path), tmp_path / "out" / "student" / "other.ipynb"
    place.mkdir(parents=True)
    with pytest.raises(FileError, match=r"1 of 4 notebooks .* student/other\.ipynb"):
        write_exercises(root, tmp_path / "out")
    with pytest.raises(FileError, match=r"Could not write .*other\.ipynb.* of 4 notebooks were written"):
        write_exercises(root, tmp_path / "out", force=True)
    assert place.is_dir()


def test_two_chapters_of_one_name_are_refused(tmp_path, capsys):
    root = write_book(tmp_path)
    (root / "more").mkdir()
    (root / "more" / "sums.md").write_text(FRONT_MATTER + OTHER.replace("eq-other", "eq-more"), encoding="utf-8")
    (root / "_toc.yml").write_text("root: book/words\nchapters:\n- file: book/sums\n- file: more/sums\n")
    assert main(["exercises", "--root", str(root), "--out", str(tmp_path / "out")]) == 1
    assert "book/sums and more/sums" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({"root": 3}, "root=3"), ({"out": b"x"}, "out="), ({"out": ""}, "out=''"), ({"force": 1}, "force=1")],
)
def test_an_odd_argument_is_refused_by_name(tmp_path, arguments, told):
    with pytest.raises(InputError, match=re.escape(told)):
        write_exercises(**{"root": write_book(tmp_path / "book"), "out": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("book/sums.md", b"\xff"),
        ("book/sums.md", FRONT_MATTER.replace("kernelspec:", "kernelspec: [").encode() + OTHER.encode()),
        ("_config.yml", b"repository: [1]"),
        ("_config.yml", b"sphinx: 3"),
        ("_config.yml", b"bibtex_bibfiles: [1]"),
        ("_config.yml", None),
        ("book/references.bib", b"@misc{known, title={A}, "),
        ("book/references.bib", b"@misc{known, title={A}}"),
        ("book/references.bib", b"\xff"),
        ("_toc.yml", b"- a\n- b"),
        ("_toc.yml", b"root: ../secret"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, path, content):
    root = write_book(tmp_path / "root")
    (root / path).unlink()
    if content is not None:
        (root / path).write_bytes(content)
    with pytest.raises(LlvlitError, match=re.escape(Path(path).name)):
        write_exercises(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "```{exercise}",
        "````{exercise} ★\n:label: [a, b\n````",
        "{eq}`nowhere` {numref}`fig-none` {doc}`none` {cite:t}`none` {ref}`none`",
        "$$\nx\n$$ (eq-new)\n\n- a\n\n  ```{admonition}\n  {eq}`eq-new`\n  ```\n",
        "```{list-table}\nno list\n```",
        "```{prf:theorem}\n```\n\n```{prf:proof}\n```\n\n{eq}``",
        "\0 \u2028 {term}`a\nb`",
    ],
)
def test_odd_text_gives_a_notebook_or_an_error_of_ours(tmp_path, text):
    root = write_book(tmp_path / "root", f"{OTHER.replace('eq-other', 'eq-x')}\n\n{text}\n")
    try:
        made = write_exercises(root, tmp_path / "out")
    except LlvlitError as error:
        assert "book/sums.md" in str(error)
    else:
        assert not re.search(r"\{[a-z:]+\}`[^`]|\{admonition\}", "".join(sources(named(made.student, "sums"))))


# The check of a reader's result


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (1.009, 1.0), (-2, -2.02), (0, 0.0), (3, 3), (3.0, 3), (True, True), (np.bool_(False), False),
        ("  Layer  TWELVE ", "layer twelve"), (["a", "B "], ["A", "b"]),
        (torch.tensor([1.0, 2.0]), np.array([1.0, 2.01])), ([[1, 2], [3, 4]], np.arange(1, 5).reshape(2, 2)),
        (torch.ones(2, dtype=torch.bfloat16, requires_grad=True), [1.0, 1.0]),
        ([0.001, 1.0], [0.0, 1.0]), (pd.Series([1.0]), [1.0]), (np.int64(7), 7),
    ],
)  # fmt: skip
def test_a_right_answer_is_told_so(answer, right, capsys):
    assert check_answer(answer, lambda: right, hint="No.") is True
    assert capsys.readouterr().out == "Right.\n"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (1.02, 1.0), (1e-9, 0.0), (300, 301), (float("nan"), 1.0), (float("inf"), 1.0), (False, True), ("sure", "no"),
        ([2.0, 1.0], [1.0, 2.0]), ([True, False], [True, True]), (10.1, 10),
    ],
)  # fmt: skip
def test_a_wrong_answer_gets_the_hint_and_no_value(answer, right, capsys):
    assert check_answer(answer, lambda: right, hint="Count again.") is False
    assert capsys.readouterr().out == "Not yet. Count again.\n"


@pytest.mark.parametrize(
    ("answer", "right", "told"),
    [
        ("0.5", 0.5, "of type str; asked for is a number. Think."),
        (True, 1.0, "of type bool; asked for is a number. Think."),
        (1, True, "of type int; asked for is True or False. Think."),
        ([1.0], 1.0, "of type list and shape (1,); asked for is a number. Think."),
        (1.0, [1.0, 2.0], "of type float; asked for is a number in each place of an array of shape (2,). Think."),
        ([[1], [1, 2]], 1.0, "of type list; asked for is a number. Think."),
        (object(), "a", "of type object; asked for is a string. Think."),
        (1 + 2j, 1.0, "of type complex; asked for is a number. Think."),
        (lambda: 1.0, 1.0, "of type function; asked for is a number. Think."),
    ],
)
def test_an_answer_of_another_kind_gets_a_sentence(answer, right, told, capsys):
    assert check_answer(answer, lambda: right, hint="Think.") is False
    assert capsys.readouterr().out == f"Not yet: `answer` is {told}\n"


def test_nothing_is_computed_while_there_is_no_answer(capsys):
    assert check_answer(None, lambda: pytest.fail("computed"), hint="Secret.") is False
    assert capsys.readouterr().out == "Put your result into `answer` and run this cell again.\n"


@pytest.mark.parametrize("right", [None, float("nan"), [], object(), 1j, [1.0, float("inf")]])
def test_an_expected_value_that_is_none_is_the_authors_fault(right):
    with pytest.raises(InputError, match="expected gives no finite number"):
        check_answer(1.0, lambda: right)
    with pytest.raises(InputError, match=r"expected=2\.0 is of type float"):
        check_answer(1.0, 2.0)


def test_tolerance_is_relative(capsys):
    assert check_answer(90.0, lambda: 100.0, tolerance=0.1) and not check_answer(90.0, lambda: 100.0, tolerance=0.09)


# The book's own


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return write_exercises(REPOSITORY, tmp_path_factory.mktemp("ours"))


def test_every_exercise_of_the_book_is_in_both_notebooks(ours):
    assert len(ours.exercises) > 15
    for one in ours.exercises:
        name = one.page.rpartition("/")[2]
        for paths in (ours.student, ours.instructor):
            assert any(f"`{one.label}`" in source for source in sources(named(paths, name))[2:]), one
        assert f"#### Solution to {one.title}" in "\n".join(sources(named(ours.instructor, name)))


def test_no_notebook_of_the_book_speaks_sphinx(ours):
    for path in ours.student + ours.instructor:
        for source in sources(path, "markdown"):
            assert not re.search(r"\{[a-z:-]+\}`|^:+\{|`{3,}\{|^\([\w-]+\)=|\$\$ \(eq-", source, re.MULTILINE), source


def names(code: str) -> tuple[set[str], set[str]]:
    """Names that some code defines, and names that it uses."""
    tree = list(ast.walk(ast.parse(re.sub(r"(?m)^( *)[%!].*", r"\1pass", code))))
    uses = {node.id for node in tree if isinstance(node, ast.Name)}
    stores = {node.id for node in tree if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    stores |= {node.name for node in tree if isinstance(node, ast.FunctionDef)}
    stores |= {node.arg for node in tree if isinstance(node, ast.arg)}
    imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    return stores | {name.asname or name.name for node in imports for name in node.names}, uses


def test_student_notebooks_lack_no_name_that_only_a_solution_defines(ours):
    for student, instructor in zip(ours.student, ours.instructor, strict=True):
        kept, whole = (names("\n".join(sources(path, "code"))) for path in (student, instructor))
        taken = whole[0] - kept[0]
        assert not taken & kept[1], student.stem
