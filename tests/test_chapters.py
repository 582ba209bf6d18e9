"""What every chapter promises its reader: objectives, graded exercises with executed solutions, one running example."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BOOK = Path(__file__).resolve().parent.parent / "book"
ONE_MODEL = ("depth_as_time", "linearization", "reduction", "gains", "ablations", "control")
CHAPTERS = (*ONE_MODEL, "scaling", "explorer", "scoreboard")
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


@pytest.mark.parametrize("name", CHAPTERS)
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


@pytest.mark.parametrize("name", ("intro", *CHAPTERS))
def test_chapter_states_objectives_and_boxes_a_misconception(name):
    text = page(name)
    box = text.partition("```{admonition} Objectives\n:class: tip\n- ")[2].partition("```")[0]
    assert re.search(
        r"^- \*\*Prerequisites\*\*: .+\*\*Minutes\*\*: .+\*\*Reading\*\*: about \d+ minutes\.\s*\Z", box, re.M | re.S
    )
    assert "```{admonition} A common misconception\n:class: warning\n" in text
    assert "**The question it leaves**" in text


@pytest.mark.parametrize("name", CHOICES)
def test_choices_stand_in_the_first_cell_and_are_used_below(name):
    cells = [part.partition("\n```")[0] for part in page(name).split(CODE)[1:]]
    choices = re.findall(r"^(\w+) = ", cells[0], re.MULTILINE)
    assert {"profile", "device"} | CHOICES[name] <= set(choices)
    for choice in choices:
        assert any(re.search(rf"\b{choice}\b", cell) for cell in cells[1:]), f"{choice} changes nothing"


@pytest.mark.parametrize("name", ("intro", *ONE_MODEL, "scaling", "scoreboard"))
def test_the_running_example_comes_along(name):
    assert re.search(r"\bRUNNING\b(?!,? load_profile)", page(name).partition("import RUNNING")[2])
