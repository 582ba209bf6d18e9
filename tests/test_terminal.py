"""Text in a terminal: never wider than asked, ASCII where blocks cannot be encoded, longer for more."""

from __future__ import annotations

import io

from hypothesis import given, settings
from hypothesis import strategies as st

from llvlit.cli.terminal import ASCII_LEVELS, LEVELS, bar, encodes_blocks, side_by_side, sparkline

WORDS = st.text(alphabet="abc de\n", max_size=200)
NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@given(st.dictionaries(st.text("xyz", min_size=1, max_size=20), WORDS, min_size=1, max_size=4), st.integers(8, 150))
@settings(deadline=None)
def test_columns_are_never_wider_than_asked_and_lose_nothing(texts, width):
    shown = side_by_side(texts, width)
    assert all(len(line) <= width for line in shown.splitlines())
    letters = sorted("".join(texts.values()).replace(" ", "").replace("\n", ""))
    assert sorted(letter for letter in shown if letter in "abcde") == letters


@given(NUMBERS)
@settings(deadline=None)
def test_sparkline_reaches_both_levels_in_the_order_of_the_values(values):
    for levels, blocks in ((LEVELS, True), (ASCII_LEVELS, False)):
        drawn = sparkline(values, blocks=blocks)
        heights = [levels.index(letter) for letter in drawn]
        assert len(heights) == len(values)
        assert heights[values.index(min(values))] == 0
        if max(values) - min(values) > 1e-3:
            assert heights[values.index(max(values))] == len(levels) - 1
        pairs = sorted(zip(values, heights, strict=True))
        assert [height for _, height in pairs] == sorted(heights)


@given(st.floats(-10, 10), st.floats(0.1, 10), st.integers(1, 40))
@settings(deadline=None)
def test_bar_is_as_long_as_its_value(value, largest, width):
    drawn = bar(value, largest, width, blocks=False)
    assert drawn.startswith("-") == (value < 0)
    assert abs(drawn.count("#") - width * min(abs(value) / largest, 1)) <= 0.6  # half a character, and eighths
    assert drawn.endswith(">") == (abs(value) > largest)


def test_blocks_only_where_the_encoding_has_them():
    assert encodes_blocks(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert not encodes_blocks(io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert not encodes_blocks(io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert encodes_blocks(io.StringIO()) is False
