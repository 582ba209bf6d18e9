"""Text in a terminal: never wider than asked, ASCII where blocks cannot be encoded, longer for more."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from llvlit.cli.terminal import EIGHTHS, LEVELS, bar, columns, side_by_side, sparkline, write

WORDS = st.text(alphabet="abc de\n", max_size=200)
NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@given(st.dictionaries(st.text("xyz", min_size=1, max_size=20), WORDS, min_size=1, max_size=4), st.integers(8, 150))
@settings(deadline=None)
def test_columns_are_never_wider_than_asked_and_lose_nothing(texts, width):
    shown = side_by_side(texts, width)
    assert all(len(line) <= width for line in shown.splitlines())
    letters = sorted("".join(texts.values()).replace(" ", "").replace("\n", ""))
    assert sorted(letter for letter in shown if letter in "abcde") == letters


@given(st.lists(st.tuples(WORDS, st.floats(0, 1e6)), min_size=1, max_size=9))
@settings(deadline=None)
def test_a_column_begins_at_one_place_in_every_row(rows):
    texts = [text.replace("\n", "") for text, _ in rows]
    shown = columns(
        [{"text": text, "gain": gain} for text, (_, gain) in zip(texts, rows, strict=True)], {"gain": "{:g}"}
    )
    head, *lines = shown.splitlines()
    place = head.index("gain")
    assert [line[place:] for line in lines] == [f"{gain:g}" for _, gain in rows]
    assert [line[:place].rstrip() for line in lines] == [text.rstrip() for text in texts]


def test_wide_characters_take_two_places():
    shown = side_by_side({"plain": "日本語の映画 " * 9, "optimal": "dull " * 30}, 60)
    assert len({cell_len(line[: line.index("d")]) for line in shown.splitlines() if "d" in line}) == 1
    assert all(cell_len(line) <= 60 for line in shown.splitlines())


@given(NUMBERS)
@settings(deadline=None)
def test_sparkline_reaches_both_levels_in_the_order_of_the_values(values):
    heights = [LEVELS.index(letter) for letter in sparkline(values)]
    assert len(heights) == len(values)
    assert heights[values.index(min(values))] == 0
    if max(values) - min(values) > 1e-3:
        assert heights[values.index(max(values))] == len(LEVELS) - 1
    pairs = sorted(zip(values, heights, strict=True))
    assert [height for _, height in pairs] == sorted(heights)


@given(st.floats(-10, 10), st.floats(0.1, 10), st.integers(1, 40))
@settings(deadline=None)
def test_bar_is_as_long_as_its_value(value, largest, width):
    drawn = bar(value, largest, width)
    assert drawn.startswith("-") == (value < 0)
    length = sum(EIGHTHS.index(letter) + 1 for letter in drawn.strip("->")) / len(EIGHTHS)
    assert abs(length - width * min(abs(value) / largest, 1)) <= 0.07  # half an eighth, and rounding
    assert drawn.endswith(">") == (abs(value) > largest)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", f"{LEVELS} {EIGHTHS} é"), ("latin-1", "_.-:=+*# ##### é"), ("ascii", "_.-:=+*# ##### ?")],
)
def test_blocks_only_where_the_encoding_has_them(encoding, shown, monkeypatch):
    printed = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", printed)
    write(f"{LEVELS} {EIGHTHS} é")
    assert printed.buffer.getvalue().decode(encoding) == shown + "\n"
