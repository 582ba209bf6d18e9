"""What every chapter promises its reader: a question, objectives, a picture, a definition, checked exercises, a map."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from llvlit.publishing.pages import read_notebook, read_pages
from llvlit.publishing.rules import AT_LEAST, RULED, count_page

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
IN_ORDER = (
    *("hook", "depth_as_time", "linearization", "reduction", "gains", "order"),
    *("control", "steering", "scaling", "ablations", "own_model"),
)
CHAPTERS = (*IN_ORDER[:7], "explorer", *IN_ORDER[7:])
NOT_HOOK = CHAPTERS[1:]
EXERCISE = re.compile(r"^(`{3,})\{exercise\} (?P<title>.*)\n:label: (?P<label>ex-[a-z0-9-]+)\n", re.MULTILINE)
CODE = "```{code-cell} ipython3\n"
HINT = re.compile(r"^`{3,}\{dropdown\} Hint\n(?P<hint>.+?)\n`{3,}$", re.MULTILINE | re.DOTALL)
CHECK = (":tags: [check]\n", "answer = None  # ", "check_answer(", "hint=")
"""What the cell holds that checks a result."""


def page(name: str) -> str:
    return (BOOK / f"{name}.md").read_text(encoding="utf-8")


def prose(name: str) -> str:
    """A page without its boxes and cells."""
    return re.sub(r"^(`{3,})\{.*?^\1$", "", page(name), flags=re.MULTILINE | re.DOTALL)


def cells(name: str) -> list[str]:
    """The code cells of a page, their tags included."""
    return [part.partition("\n```")[0] for part in page(name).split(CODE)[1:]]


def exercises(name: str) -> dict[str, tuple[str, str, str]]:
    """By label: an exercise's title, what stands between its text and its solution, and the solution."""
    found = {}
    for exercise in EXERCISE.finditer(page(name)):
        before, gate, rest = page(name)[exercise.end() :].partition(
            f"{{solution-start}} {exercise['label']}\n:class: dropdown\n"
        )
        assert gate, f"{exercise['label']} has no solution behind a dropdown"
        below = before.partition(f"\n{exercise[1]}\n")[2]
        found[exercise["label"]] = (exercise["title"], below, rest.partition("{solution-end}")[0])
    return found


@pytest.mark.parametrize("name", CHAPTERS)
def test_exercises_are_graded_hinted_checked_and_their_solutions_executed(name):
    found = exercises(name)
    assert len(found) >= AT_LEAST["exercises"]
    for label, (title, below, solution) in found.items():
        assert re.search(r" ★{1,3}$", title), f"{label}: no grade in the title"
        assert HINT.search(below) and len(HINT.findall(below)) == 1, f"{label}: one hint in a dropdown, please"
        code = "".join(part.partition("```")[0] for part in solution.split(CODE)[1:])
        assert "print(" in code, f"{label}: the solution prints no answer"
        if not title.startswith("Open: "):
            checks = [part for part in below.split(CODE)[1:] if all(words in part for words in CHECK)]
            assert len(checks) == 1, f"{label}: one cell that checks the reader's result, please"
            assert below.index("[check]") > below.index("{dropdown} Hint"), f"{label}: the hint comes first"
            assert re.search(r"^assert .*check_answer\(", code, re.MULTILINE), f"{label}: the solution is not checked"
    titles = [title for title, *_ in found.values()]
    assert any(title.startswith("Break an assumption: ") for title in titles)
    assert any(title.startswith("Open: ") and title.endswith("★★★") for title in titles)
    assert any(title.endswith(" ★") for title in titles) and any(title.endswith(" ★★") for title in titles)


def minutes(name: str) -> tuple[int, int]:
    """Minutes to read a chapter and to run it on a CPU, as its box states them."""
    stated = re.search(
        r"\*\*Reading\*\*: about (\d+) minutes\. \*\*Running\*\*: (\d+) minutes? on a CPU; \d+ on a GPU", page(name)
    )
    assert stated, f"{name} does not state its minutes"
    return int(stated[1]), int(stated[2])


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_has_its_parts_in_order(name):
    text = page(name)
    box = text.partition("```{admonition} Objectives\n:class: tip\n- ")[2].partition("```")[0]
    assert re.search(r"^- \*\*Prerequisites\*\*: .+^- \*\*Reading\*\*: about ", box, re.M | re.S) and minutes(name)
    assert "```{admonition} A common misconception\n:class: warning\n" in text
    parts = ["\n## Exercises\n", "\n## Summary\n", "\n**The question it leaves**", "\n**References**"][
        : 3 + (name != "hook")
    ]
    places = [text.find(part) for part in parts]
    assert -1 not in places and places == sorted(places), dict(zip(parts, places, strict=True))
    assert "as_written" in text, "no conclusion is asserted"


@pytest.mark.parametrize("name", NOT_HOOK)
def test_chapter_asks_predicts_defines_and_says_where_it_fails(name):
    text = page(name)
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    assert title and title[1].endswith("?")
    assert re.search(r"^\$\$ \(eq-", text, re.MULTILINE), "no equation has a label"
    assert re.search(r"predict", prose(name), re.IGNORECASE), "no prediction is written down"
    assert re.search(r"^## .*\bfails?\b", text, re.MULTILINE), "no section says where it fails"


@pytest.mark.parametrize("name", CHAPTERS)
def test_choices_stand_in_the_first_cell_and_are_used_below(name):
    first, *rest = cells(name)
    choices = dict(re.findall(r"^(\w+) = (\S+)", first, re.MULTILINE))
    assert choices["profile"] == '"pretrained"' and choices["device"] == '"auto"'
    for choice in choices:
        assert any(re.search(rf"\b{choice}\b", cell) for cell in rest), f"{choice} changes nothing"


@pytest.mark.parametrize("name", CHAPTERS)
def test_sentences_are_written_by_hand_and_layer_0_has_a_page_of_its_own(name):
    assert not [cell for cell in cells(name) if re.search(r"\bMarkdown\(", cell)], "a cell writes sentences"
    spoken = re.findall(r"\blayer 0\b", prose(name), re.IGNORECASE)
    assert len(spoken) <= 2 or (len(spoken) <= 4 and re.search(r"\{doc\}`(layer 0 <)?layer0>?`", page(name))), spoken


@pytest.mark.parametrize("name", CHAPTERS)
def test_no_rule_of_a_page_is_broken(name):
    (found,) = (found for found in read_pages(ROOT) if found.name == f"book/{name}")
    assert count_page(found, read_notebook(found)).faults == []


def test_the_map_states_the_minutes_of_every_chapter():
    rows = re.findall(r"^\|[^|]*\|[^|]+\| \{doc\}`(\w+)` \| (\d+) \| (\d+) \|$", page("map"), re.MULTILINE)
    told = {name: (int(read), int(run)) for name, read, run in rows}
    assert told == {name: minutes(name) for name in told}
    assert [name for name in told if name in IN_ORDER] == [name for name in IN_ORDER if name in told]
    assert {*told} == {*CHAPTERS} == {*RULED}


@pytest.mark.parametrize(("before", "after"), pairwise(IN_ORDER))
def test_a_chapter_opens_with_the_question_of_the_last_one(before, after):
    left = page(before).partition("**The question it leaves**")[2].partition("\n\n")[0]
    assert "?" in left and re.search(rf"<{after}>`|`{after}`", left), f"{before} does not lead to {after}"
    first = re.split(r"\n{2,}", prose(after).partition("\n# ")[2])[1]
    assert re.search(rf"<{before}>`", first) and re.search(r"question|answer", first), f"{after} opens with: {first}"
