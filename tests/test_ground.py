"""The ground: what passes the door, files that are whole or absent, folders that are removed only if ours."""

import json
import os
import stat
import struct

import numpy as np
import pytest
import torch

from llvlit import Prompts, checks, files
from llvlit.errors import FileError, InputError, LlvlitError


class Hostile:
    """An object whose every question raises."""

    def __repr__(self):
        raise RuntimeError("no")

    def __array__(self, *_args, **_kwargs):
        raise ZeroDivisionError("no")


@pytest.mark.parametrize("value", [True, "1", None, [1.0], 1j, float("nan"), float("inf"), Hostile(), 10**400])
def test_a_number_is_finite_and_nothing_else(value):
    with pytest.raises(InputError, match="amplitude="):
        checks.number("amplitude", value)


@pytest.mark.parametrize("value", [2.0, True, "2", np.array([2]), torch.tensor(2.5), Hostile()])
def test_an_integer_is_whole_and_nothing_else(value):
    with pytest.raises(InputError, match="order="):
        checks.integer("order", value)


def test_numbers_of_libraries_are_taken_as_numbers():
    assert checks.number("amplitude", np.float32(0.5)) == checks.number("amplitude", torch.tensor(0.5)) == 0.5
    assert checks.integer("order", np.int64(3)) == checks.integer("order", torch.tensor(3)) == 3


@pytest.mark.parametrize("value", ["abc", [1, "a"], [[1], [1, 2]], [True, False], [1j], [float("nan")], None, {}])
def test_an_array_is_finite_real_numbers(value):
    with pytest.raises(InputError, match="weights"):
        checks.array("weights", value, ("n",))


def test_an_array_names_both_shapes():
    with pytest.raises(InputError, match=r"weights has shape \(2,\); expected \(n_prompts, 3\)"):
        checks.array("weights", [1.0, 2.0], ("n_prompts", 3))


@pytest.mark.parametrize("value", [3, None, b"folder", "", "a\0b", "\ud800", "~no-such-user-here/x"])
def test_a_path_is_a_name(value):
    with pytest.raises(InputError, match="folder="):
        checks.path("folder", value)


def test_prompts_carry_the_independent_unit_through_selections():
    prompts = Prompts([*"abcd"], [0, 1, 0, 1], [7, 7, 9, 9])
    assert prompts.select([3, 0]).pairs == (9, 7)
    assert prompts.select([True, False, False, True]).pairs == (7, 9)
    assert Prompts([*"abc"], [0, 1, 0]).pairs == (0, 1, 2)
    with pytest.raises(InputError, match="3 pairs"):
        Prompts(["a", "b"], [0, 1], [1, 2, 3])


@pytest.mark.parametrize("indices", [0.5, "0", [0.5], [[0]], [9], [], [True], None, {0: 1}, [None]])
def test_a_selection_that_is_none_is_refused(indices):
    with pytest.raises(InputError, match="indices"):
        Prompts([*"abcd"], [0, 1, 0, 1]).select(indices)


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"[1]", b"", b"[" * 100_000, b'{"a": NaN', b"\x00"])
def test_a_damaged_json_file_is_an_error_of_ours(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"result\.json"):
        files.read_json(path, "a result")


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero", tmp_path / "none", tmp_path / "pipe" / "below"):
        with pytest.raises(FileError):
            files.read_text(path, "a grid")


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_bytes(b" " * 101)
    with pytest.raises(FileError, match="101 bytes"):
        files.read_text(path, "a grid", most=100)


def test_tensors_without_numbers_are_saved(tmp_path):
    files.save_tensors(tmp_path / "none", {"a": np.zeros(0, np.uint16), "b": torch.ones(0, 2)}, {"kind": "gains"})
    tensors, _ = files.load_tensors(tmp_path / "none", kind="gains")
    assert [tuple(tensors[name].shape) for name in "ab"] == [(0,), (0, 2)]


def test_every_flipped_bit_of_saved_tensors_is_seen(tmp_path):
    path = tmp_path / "gains.safetensors"
    files.save_tensors(path, {"a": np.arange(6.0), "b": torch.ones(2, 2)}, {"kind": "gains", "amplitude": 0.1})
    whole = path.read_bytes()
    tensors, _ = files.load_tensors(path, kind="gains")
    unseen = []
    for bit in np.random.default_rng(0).choice(8 * len(whole), 400, replace=False):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(changed))
        try:
            again, _ = files.load_tensors(path, kind="gains")
        except FileError:
            continue
        if any(not torch.equal(again[name], tensors[name]) for name in tensors) or set(again) != set(tensors):
            unseen.append(bit)
    assert unseen == []


def test_metadata_that_were_changed_are_seen(tmp_path):
    path = tmp_path / "gains.safetensors"
    files.save_tensors(path, {"a": np.arange(6.0)}, {"kind": "gains", "amplitude": 0.1})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert b"0.1" in content[: 8 + length]
    path.write_bytes(content.replace(b"0.1", b"0.9", 1))
    with pytest.raises(FileError, match="checksum"):
        files.load_tensors(path, kind="gains")


def test_a_folder_with_files_of_others_is_never_ours(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "thesis.tex").write_text("years of work")
    for attempt in (files.own, files.remove_owned):
        with pytest.raises(FileError, match="site"):
            attempt(site, "site")
    with pytest.raises(FileError, match=r"thesis\.tex"), files.replaced(site, "site"):
        pass
    assert (site / "thesis.tex").read_text() == "years of work"


def test_a_folder_of_another_kind_with_a_repository_or_behind_a_link_stays(tmp_path):
    site = tmp_path / "site"
    files.own(site, "site")
    link = tmp_path / "link"
    link.symlink_to(site)
    for folder, kind in ((site, "book"), (link, "site")):
        with pytest.raises(FileError):
            files.remove_owned(folder, kind)
    repository = site / "latest" / ".git"
    repository.mkdir(parents=True)
    with pytest.raises(FileError, match="repository"):
        files.remove_owned(site, "site")
    with pytest.raises(FileError, match="repository"), files.replaced(site, "site"):
        pass
    assert repository.is_dir() and link.is_symlink()


def test_the_folder_that_one_is_in_is_not_replaced(tmp_path, monkeypatch):
    files.own(tmp_path / "here", "plan")
    (tmp_path / "here" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "here" / "below")
    for folder in (".", "", tmp_path / "here" / "below", "..", "../below/."):
        with pytest.raises(FileError, match="you are in"), files.replaced(folder, "plan"):
            pass
    with files.replaced("plan", "plan") as fresh:
        files.finish(fresh, "plan")
    assert files.finished("plan", "plan") == {"kind": "plan", "whole": True}


def test_a_damaged_mark_is_told_as_such(tmp_path):
    files.own(tmp_path / "site", "site")
    (tmp_path / "site" / files.MARK).write_text('{"kind":')
    with pytest.raises(FileError, match="mark is damaged"):
        files.own(tmp_path / "site", "site")


def test_a_folder_is_locked_before_it_is_marked(tmp_path):
    with files.locked(tmp_path / "run"):
        files.own(tmp_path / "run", "training run")
    assert files.is_owned(tmp_path / "run", "training run")


def test_a_replaced_folder_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    folder = tmp_path / "html"
    with files.replaced(folder, "book") as fresh:
        (fresh / "index.html").write_text("first")
        files.finish(fresh, "book", pages=1)
    with pytest.raises(ZeroDivisionError), files.replaced(folder, "book") as fresh:
        (fresh / "index.html").write_text("second")
        raise ZeroDivisionError
    assert (folder / "index.html").read_text() == "first"
    assert files.finished(folder, "book") == {"kind": "book", "whole": True, "pages": 1}
    with files.replaced(folder, "book") as fresh:
        (fresh / "index.html").write_text("third")
    assert (folder / "index.html").read_text() == "third" and files.finished(folder, "book") is None
    assert [path.name for path in tmp_path.iterdir()] == ["html"]


def test_the_last_good_pages_come_back_after_a_kill_between_the_renames(tmp_path):
    old = tmp_path / ".html.old"
    files.own(old, "book")
    (old / "index.html").write_text("good")
    with pytest.raises(ZeroDivisionError), files.replaced(tmp_path / "html", "book"):
        raise ZeroDivisionError
    assert (tmp_path / "html" / "index.html").read_text() == "good"


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    files.write_json(path, {"whole": 1})

    def fail(_temporary):
        raise OSError(28, "No space left on device")

    with pytest.raises(FileError, match="as it was"):
        files.write_atomically(path, fail)
    assert json.loads(path.read_text()) == {"whole": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_pipe_or_a_folder_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FileError, match=f"{name}: it is a folder, a device or a pipe"):
            files.write_json(tmp_path / name, {})
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and (tmp_path / "folder").is_dir()


def test_our_own_errors_pass_through_a_foreign_reading():
    class OursError(LlvlitError):
        pass

    with pytest.raises(OursError), files.foreign("x", "a grid"):
        raise OursError
