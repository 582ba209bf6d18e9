"""What every chapter promises its reader: objectives, graded exercises with executed solutions, one running example."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

BOOK = Path(__file__).resolve().parent.parent / "book"
ONE_MODEL = ("depth_as_time", "linearization", "reduction", "gains", "ablations", "control")
CHAPTERS = (*ONE_MODEL, "scaling", "explorer", "scoreboard")
IN_ORDER = ("intro", *ONE_MODEL[:5], "scaling", "control", "explorer", "scoreboard")
CHOICES = {
    **{name: {"model_name", "task_name"} for name in ("intro", *ONE_MODEL, "scoreboard")},
    "scaling": {"task_name"},
    "explorer": {"model_name", "task_name", "order"},
}
EXERCISE = re.compile(r"^`{3,4}\{exercise\} (?P<title>.*)\n:label: (?P<label>ex-[a-z0-9-]+)$", re.MULTILINE)
CODE = "```{code-cell} ipython3\n"


def page(name: str) -> str:
    return (BOOK / f"{name}.md").read_text(encoding="utf-8")


def solution(text: str, label: str) -> str:
    """What stands between the gates of an exercise's solution."""
    _, found, rest = text.partition(f"{{solution-start}} {label}\n:class: dropdown\n")
    assert found, f"{label} has no solution behind a dropdown"
    return rest.partition("{solution-end}")[0]


@pytest.mark.parametrize("name", (*CHAPTERS, "steering"))
def test_exercises_are_graded_and_their_solutions_executed(name):
    text = page(name)
    exercises = EXERCISE.findall(text)
    assert len(exercises) >= 4
    for title, label in exercises:
        assert re.search(r" ★{1,3}$", title), f"{label}: no grade in the title"
        code = solution(text, label).partition(CODE)[2].partition("```")[0]
        assert "print(" in code, f"{label}: the solution prints no answer"
    titles = [title for title, _ in exercises]
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


@pytest.mark.parametrize("name", ("intro", *CHAPTERS))
def test_chapter_states_objectives_and_boxes_a_misconception(name):
    text = page(name)
    box = text.partition("```{admonition} Objectives\n:class: tip\n- ")[2].partition("```")[0]
    assert re.search(r"^- \*\*Prerequisites\*\*: .+^- \*\*Reading\*\*: about ", box, re.M | re.S) and minutes(name)
    assert "```{admonition} A common misconception\n:class: warning\n" in text
    assert "**The question it leaves**" in text


@pytest.mark.parametrize("name", CHOICES)
def test_choices_stand_in_the_first_cell_and_are_used_below(name):
    cells = [part.partition("\n```")[0] for part in page(name).split(CODE)[1:]]
    choices = re.findall(r"^(\w+) = ", cells[0], re.MULTILINE)
    assert {"profile", "device"} | CHOICES[name] <= set(choices)
    for choice in choices:
        assert any(re.search(rf"\b{choice}\b", cell) for cell in cells[1:]), f"{choice} changes nothing"


@pytest.mark.parametrize("name", IN_ORDER)
def test_the_running_example_comes_along(name):
    assert re.search(r"\bRUNNING\b(?!,? load_settings)", page(name).partition("import RUNNING")[2])


def test_the_map_states_the_minutes_of_every_chapter():
    rows = re.findall(r"^\|[^|]*\|[^|]+\| \{doc\}`(\w+)` \| (\d+) \| (\d+) \|$", page("map"), re.MULTILINE)
    assert {name: (int(read), int(run)) for name, read, run in rows} == {
        name: minutes(name) for name in ("intro", *CHAPTERS)
    }
    assert tuple(name for name, *_ in rows) == IN_ORDER


@pytest.mark.parametrize(("before", "after"), pairwise(IN_ORDER))
def test_a_chapter_opens_with_the_question_of_the_last_one(before, after):
    left = page(before).partition("**The question it leaves**")[2].partition("\n\n")[0]
    assert "?" in left and re.search(rf"<{after}>`|`{after}`", left), f"{before} does not lead to {after}"
    text = re.sub(r"^(`{3,}).*?^\1$", "", page(after), flags=re.MULTILINE | re.DOTALL)  # without boxes and cells
    first = re.split(r"\n{2,}", text.partition("\n# ")[2])[1]
    assert re.search(rf"<{before}>`", first) and re.search(r"question|answer", first), f"{after} opens with: {first}"
