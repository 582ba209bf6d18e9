"""Tables that benchmarks wrote: numbers and their intervals, and what a file that is not theirs says."""

from __future__ import annotations

import pytest

from llvlit.errors import FileError
from llvlit.study.reports import read_orders, read_report, read_shares

TEXT = """# Found

| Law | Miss | Word |
|---|---:|---|
| open | 0.12 [0.1, 0.2] | 1 of 2 |
| closed | -3e-05 | 2 |

| Law | Price |
|---|---:|
| open | 7 |

## Later

| Law | Miss |
|---|---:|
| open | 5 |
"""


@pytest.fixture
def reports(tmp_path):
    folder = tmp_path / "results" / "method"
    folder.mkdir(parents=True)
    (folder / "found.md").write_text(TEXT)
    return tmp_path


def test_a_report_gives_numbers_with_their_bounds_and_leaves_words(reports):
    first = read_report("found", "Miss", start=reports)
    assert first[["Miss", "Miss_low", "Miss_high"]].iloc[0].tolist() == [0.12, 0.1, 0.2]
    assert first["Miss"].iloc[1] == -3e-05 and first["Word"].tolist() == ["1 of 2", "2"]
    assert read_report("found", "Price", start=reports)["Price"].tolist() == [7]
    assert read_report("found", "Law", under="Later", start=reports)["Miss"].tolist() == [5]


def test_what_is_not_there_is_named(reports):
    with pytest.raises(FileError, match="Cost"):
        read_report("found", "Cost", start=reports)
    with pytest.raises(FileError, match=r"lost\.md"):
        read_report("lost", "Miss", start=reports)


def test_orders_lie_in_their_intervals_and_drawn_directions_need_most():
    orders = read_orders()
    for share in (5, 1):
        assert (orders[f"order_{share}"] >= orders[f"order_{share}_low"]).all()
        assert (orders[f"order_{share}"] <= orders[f"order_{share}_high"]).all()
        assert (orders[f"drawn_{share}"] >= orders[f"turned_{share}"]).all()
    assert (orders["order_1"] >= orders["order_5"]).all() and orders["untrained"].sum() == 6


@pytest.mark.parametrize("name", ["order.csv", "headline.csv"])
def test_a_table_of_another_kind_is_refused(reports, name):
    (reports / "results" / "method" / name).write_text("model\nsmall\n")
    with pytest.raises(FileError, match=name):
        (read_orders if name == "order.csv" else read_shares)(start=reports)


def test_shares_fall_with_the_order():
    shares = read_shares().sort_values("order")
    assert (shares.groupby(["directions", "draw"])["missed"].diff().dropna() <= 0).all()
