"""Grids: every mistake in a file is named before anything runs; every cell has a name of its own."""

from __future__ import annotations

import pytest

from llvlit.errors import FileError, InputError
from llvlit.study.grid import GRIDS, change_axes, load_grid
from llvlit.study.runner import check_keys
from llvlit.tasks.sources import HUB_TASKS

WHOLE = """
description = "A grid."
models = ["embedded/small"]
tasks = ["tense", "hostility"]
seeds = [0, 1]
jacobians = ["jvp", "central"]
final_norms = [false, true]

[settings]
concept = 8
orders = [4, 2]
amplitudes = [0.1, 1]

[task.tense]
suffix = " Now"
evaluation = 3
"""


EXTRA = {"cola", "rotten_tomatoes"}
"""Tasks of the hub that the paper does not name."""


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_grid_is_the_product_of_its_axes_and_tasks_have_their_own_counts(written):
    grid = load_grid(written(WHOLE))
    cells = grid.cells(data_dir="folder")
    assert len(cells) == 2 * 2 * 2 * 2 and len({cell.key for cell in cells}) == len(cells)
    assert grid.name == "mine" and grid.settings.orders == (2, 4)
    for cell in cells:
        assert cell.settings.concept == 8 and cell.data_dir == "folder"
        assert (cell.suffix, cell.settings.evaluation) == ((" Now", 3) if cell.task == "tense" else (None, 200))


@pytest.mark.parametrize("name", GRIDS)
def test_shipped_grids_load(name):
    grid = load_grid(name)
    assert grid.description and grid.cells()
    if name == "paper":  # three sizes, the ten tasks, its sizes of splits
        assert grid.models == ("gpt2", "gpt2-medium", "gpt2-large") and set(grid.tasks) == {*HUB_TASKS} - EXTRA
        settings = grid.settings
        assert (settings.concept, settings.operating, settings.evaluation) == (400, 200, 200)
        assert settings.orders[-1] == 32 and settings.amplitudes[0] == 0.1


def test_the_fingerprint_is_of_what_decides_the_results(written):
    original = load_grid(written(WHOLE)).fingerprint
    assert load_grid(written(WHOLE.replace("A grid.", "Another description."))).fingerprint == original
    for old, new in (
        ("orders = [4, 2]", "orders = [4, 3]"),
        ('" Now"', '" Then"'),
        ("seeds = [0, 1]", "seeds = [0, 2]"),
    ):
        assert load_grid(written(WHOLE.replace(old, new))).fingerprint != original


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds =", "seed =", r"key='seed' is not known\. Did you mean 'seeds'"),
        ("orders =", "order =", r"key='settings.order' is not known\. Did you mean 'settings.orders'"),
        ("suffix =", "sufix =", r"key='task.tense.sufix' is not known"),
        ("[task.tense]", "[task.imdb]", r"key='task.imdb' is not known"),
        ('models = ["embedded/small"]', "", "models is lacking"),
        ('models = ["embedded/small"]', "models = []", "models="),
        (
            'models = ["embedded/small"]',
            'models = "embedded/small"',
            "models: Expected list, got text; models='embedded/small' came",
        ),
        ("seeds = [0, 1]", "seeds = [0, 0]", "distinct"),
        ("seeds = [0, 1]", "seeds = [true]", "seeds="),
        ('"central"', '"centrl"', "Did you mean 'central'"),
        ("concept = 8", "concept = 0", "settings.concept: Expected whole number >= 1; concept=0 came"),
        ("concept = 8", "concept = 8.0", "settings.concept: .*concept=8.0 came"),
        ("concept = 8", 'bases = ["krilov"]', "Did you mean 'krylov'"),
        ("concept = 8", "target = 0", "settings.target=0"),
        ("orders = [4, 2]", "orders = [0]", r"settings.orders\[0\]: Expected whole number >= 1"),
        (
            "amplitudes = [0.1, 1]",
            "amplitudes = [0.1, nan]",
            r"amplitudes.*(finite|Expected number)",
        ),
        ("seeds = [0, 1]", "seeds = [-1]", r"seeds\[0\]: Expected whole number >= 0"),
        ('tasks = ["tense", "hostility"]', "tasks = 3", "tasks: Expected list, got whole number; tasks=3 came"),
        ("[task.tense]", "[[task]]", r"task=\[\{.* must be a table"),
        ("description =", "description", "cannot be read as a grid"),
        ("[task.tense]", "[task.tense", "cannot be read as a grid"),
    ],
)
def test_a_mistake_is_named(written, old, new, message):
    assert old in WHOLE
    with pytest.raises((InputError, FileError), match=message):
        load_grid(written(WHOLE.replace(old, new)))


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"", b"a = " + b"[" * 5000, b"\0", WHOLE.encode("utf-16"), b'models = ["\xe9"]']
)
def test_whatever_a_file_holds_the_error_is_ours_and_names_it(tmp_path, content):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises((FileError, InputError), match=r"mine\.toml"):
        load_grid(path)


@pytest.mark.parametrize("name", ["modèle", "données.parquet", "模型", "_m", "a b", "x" * 900])
def test_any_name_has_a_key_that_can_name_a_file(written, name):
    keys = {load_grid(written(WHOLE.replace("embedded/small", one))).cells()[0].key for one in (name, name + "2")}
    assert len(keys) == 2
    check_keys(keys)


def test_axes_given_by_hand_are_checked_like_those_of_a_file(written):
    grid = load_grid(written(WHOLE))
    changed = change_axes(grid, {"seeds": [3], "models": None})
    assert changed.seeds == (3,) and changed.models == grid.models
    for axes in ({"seeds": [0, 0]}, {"seeds": [-1]}, {"models": []}):
        with pytest.raises(InputError, match=next(iter(axes))):
            change_axes(grid, axes)


def test_an_unknown_grid_is_named():
    with pytest.raises(InputError, match="Did you mean 'real'"):
        load_grid("reel")
