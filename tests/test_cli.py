"""The command line: every command teaches itself, results can be parsed, and failures are one line."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from filelock import FileLock
from pyarrow import parquet

from conftest import byte_tokenizer, tiny_model, tiny_module
from llvlit import LLV, Prompts, import_vectors, load_model, load_recommendation, load_task, provenance, recommend
from llvlit.cli.main import main, parser
from llvlit.cli.steer import Steering, _continuations, _text
from llvlit.engine.depth import depth_system
from llvlit.engine.models import PACKAGED, embedded_names
from llvlit.engine.tokens import end_tokens, tokenize
from llvlit.files import locked
from llvlit.method.concepts import as_directions, concept_directions, random_directions
from llvlit.method.gain_matrix import GainMatrix, gain_matrix
from llvlit.method.gains import measured_gains
from llvlit.method.plans import scaled_plan
from llvlit.method.steering import steer
from llvlit.method.verification import output_shifts
from llvlit.study.cells import load_results, run_study
from llvlit.study.grid import load_grid
from llvlit.tasks.grammars import EMBEDDED_TASKS
from llvlit.tasks.sources import HUB_TASKS

COMMANDS = ("book", "exercises", "publish", "gains", "order", "recommend", "steer", "study", "train", "models", "tasks")
ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--model", "embedded/small", "--prompts", "12", "--device", "cpu")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a test run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def last_words(shared: Path) -> Path:
    """A task that any model can read: the last word is the class."""
    path = shared / "last-words.parquet"
    texts = [f"{number} of {number + 3} say: {word}" for number in range(60) for word in ("bad", "good")]
    with FileLock(shared / "task.lock"):
        if not path.exists():
            parquet.write_table(pa.table({"text": texts, "label": [0, 1] * 60}), path)
    return path


def save_tiny(folder: Path, *, scale: float = 1.0) -> Path:
    """A model whose third layer multiplies by a number: by a large one, beyond all that float32 can hold."""
    module = tiny_module("gpt2", dtype=torch.float32)
    with torch.no_grad():
        module.transformer.h[2].mlp.c_fc.weight *= scale
        module.transformer.h[2].mlp.c_proj.weight *= scale
    module.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a command that must succeed prints; as an object if it was asked for JSON. It runs in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Any:
        status = main([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        assert status == 0, error
        return json.loads(out) if "--json" in arguments else out

    return run


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]):
    """What the parser says of an option's value that it must refuse."""

    def refuse(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        assert (stopped.value.code, out) == (2, "") and "Traceback" not in error
        return error.splitlines()[-1]

    return refuse


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]):
    """The one line that a command says when it must fail: with status 2 if it asked for what cannot be, else 1."""

    def fail(*arguments: object, status: int = 2) -> str:
        assert main([str(argument) for argument in arguments]) == status
        out, error = capsys.readouterr()
        assert out == ""
        lines = error.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"llvlit {arguments[0]}: "), error
        return lines[0]

    return fail


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    example = re.search(rf"Examples?:\n  (llvlit {command}\b.*)", text)
    assert example, text
    options = set(re.findall(r"(?<!\S)--[a-z]+", text))
    assert {"--json", *re.findall(r"(?<!\S)--[a-z]+", example[1])} <= options


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {command}\s+[A-Z]", text, re.MULTILINE) for command in COMMANDS)


def test_unknown_command_and_none(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["gain"], ["gains", "--ordre", "3"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    assert "gains" in capsys.readouterr().err
    assert main([]) == 0
    first_steps = re.findall(r"^  llvlit (\w+)", capsys.readouterr().out, re.MULTILINE)
    assert first_steps[0] == "gains" and set(first_steps) <= set(COMMANDS)
    for command in ("gains", "steer"):  # each runs as it is told there, with nothing else to name
        assert parser().parse_args([command]).command == command


def test_python_m_llvlit_without_waiting_for_torch() -> None:
    code = "import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_module('llvlit', run_name='__main__')\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("usage: llvlit") and done.stdout.endswith("False\n"), done.stderr
    done = subprocess.run([sys.executable, "-m", "llvlit", "no-such-command"], capture_output=True, text=True)
    assert done.returncode == 2 and "no-such-command" in done.stderr


# Lists


def test_models(run) -> None:
    rows = run("models", "--json")
    assert [row["name"] for row in rows] == [*embedded_names(), *PACKAGED]
    model = load_model("embedded/small", device="cpu")
    small = next(row for row in rows if row["name"] == "embedded/small")
    assert (small["parameters"], small["layers"]) == (model.n_parameters, model.n_layers)
    assert f"{model.n_parameters:,}" in run("models")


def test_tasks(run) -> None:
    named = run("tasks", "--json")
    assert list(named)[: len(EMBEDDED_TASKS)] == list(EMBEDDED_TASKS) and "sst2" in named
    text = run("tasks")
    assert all(name in text and facts["description"] in text for name, facts in named.items())
    for name, task in HUB_TASKS.items():
        facts = named[name]
        assert (facts["hub_id"], facts["split"], facts["revision"]) == (task.hub_id, task.split, task.revision)
        assert facts["columns"] == list(task.columns) and facts["reading"] in text and task.place in text
    assert named["tense"]["kind"] == "embedded" and "toxicity at least 0.5: toxic" in text


# Gains


def test_gains_are_those_of_the_library(run, tmp_path: Path) -> None:
    path = tmp_path / "llv.safetensors"
    found = run("gains", *SMALL, "--order", 8, "--amplitude", 0.2, "--seed", 3, "--save", path, "--json")
    splits = load_task("film-sentiment").split(concept=48, operating=12, evaluation=12, seed=3)
    model = load_model("embedded/small", device="cpu")
    directions = concept_directions(model, splits.concept)
    measured = measured_gains(model, splits.evaluation, directions, amplitude=0.2)
    np.testing.assert_allclose(found["measured"], measured.mean, rtol=1e-4)
    low, high = np.array(found["interval"])
    assert (low <= found["measured"]).all() and (found["measured"] <= high).all()
    assert set(found["agreement"]) == {"spearman", "pearson", "relative_error"}
    surrogate = LLV.load(path)
    np.testing.assert_array_equal(surrogate.gains(), found["predicted"])
    assert surrogate.A[0].shape == (8, 8)
    assert found["metadata"]["model_fingerprint"] == model.fingerprint
    assert not np.allclose(found["predicted"], found["adjoint"], rtol=1e-6)


def test_gains_as_a_table(run) -> None:
    text = run("gains", *SMALL, "--basis", "random", "--order", 2)
    rows = [line.split() for line in text.splitlines() if re.match(r" +\d", line)]
    assert [int(row[0].rstrip("*")) for row in rows] == list(range(12))
    assert "random" in text and re.search(r"Order 2: Spearman \S+, Pearson \S+, relative error \S+ \(24 held", text)


def test_orders_are_those_of_the_library(run, tmp_path: Path) -> None:
    path = tmp_path / "matrix.safetensors"
    found = run("order", *SMALL, "--seed", 3, "--tolerance", 0.05, "--save", path, "--json")
    splits = load_task("film-sentiment").split(concept=48, operating=12, evaluation=12, seed=3)
    model = load_model("embedded/small", device="cpu")
    matrix = gain_matrix(model, splits.evaluation, concept_directions(model, splits.concept))
    saved = GainMatrix.load(path)
    np.testing.assert_allclose(saved.mean, matrix.mean, atol=1e-5 * np.abs(matrix.mean).max())
    assert found["orders"] == [
        {"tolerance": 0.05, "order": saved.order(0.05), "interval": list(saved.order_interval(0.05, seed=3))}
    ]
    assert (tmp_path / found["figure"]).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        run("order", *SMALL, "--tolerance", 1)


def test_orders_stand_beside_their_nulls(run) -> None:
    text = run("order", *SMALL, "--nulls", "--no-plot", "--method", "linear")
    assert re.search(r"order of depth: \d+ \[\d+, \d+\] at 0.05, \d+ \[\d+, \d+\] at 0.01", text)
    assert "random directions: " in text and "untrained weights, the same directions: " in text
    assert len([line for line in text.splitlines() if re.match(r" +\d", line)]) == 6


def test_gains_draws_and_marks(run, tmp_path: Path, fail) -> None:
    text = run("gains", *SMALL, "--order", 2)
    assert (tmp_path / "gains-small-film-sentiment.png").read_bytes().startswith(b"\x89PNG")
    assert "Figure: gains-small-film-sentiment.png" in text
    spark = re.search(r"^ +measured  (\S+)$", text, re.MULTILINE)
    assert spark and len(spark[1]) == 11  # layers 1 to 11
    found = run("gains", *SMALL, "--order", 2, "--plot", "mine.png", "--json")
    assert found["figure"] == "mine.png" and (tmp_path / "mine.png").exists()
    before = set(tmp_path.iterdir())
    assert run("gains", *SMALL, "--order", 2, "--no-plot", "--json")["figure"] is None
    for wrong, message in (("none/mine.png", "folder that exists"), ("mine.jpg", ".png")):
        assert message in fail("gains", *SMALL, "--plot", wrong)
    assert set(tmp_path.iterdir()) == before


def test_default_order_fits_a_narrow_model(run, last_words: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path)  # hidden size 24
    assert "Order 24:" in run("gains", "--model", tmp_path, "--task", last_words, "--prompts", 12, "--device", "cpu")


# Recommend


@pytest.fixture(scope="session")
def plan(shared: Path) -> Path:
    """A plan that the command has saved, made once for all processes."""
    folder = shared / "plan"
    with FileLock(shared / "plan.lock"):
        if not folder.exists():
            assert main(["recommend", *SMALL, "--budget", "0.1", "--json", "--save", str(folder)]) == 0
    return folder


def test_recommend_says_and_saves_what_the_library_recommends(run, tmp_path: Path) -> None:
    text = run("recommend", *SMALL, "--budget", 0.1, "--layers", "3-9", "--save", "mine", "--figure", "plan.svg")
    advice = load_recommendation("mine")
    assert text.startswith("Push before layers ") and " ".join(text.split()).startswith(str(advice))
    assert not advice.inputs[[0, 1, 2, 10, 11]].any() and advice.inputs[3:10].any()
    pushed, expected = re.match("(Push .*?); expect (.*)", str(advice)).groups()
    assert re.search(r"by \S+ ± \S+ class gaps \(\S+ ± \S+ in its own units\)", expected)
    ranges = re.sub(r"(\d+) to (\d+)", lambda m: " ".join(map(str, range(int(m[1]), int(m[2]) + 1))), pushed)
    named = [int(n) for part in re.findall(r"layers? ([\d, ]+)", ranges) for n in re.findall(r"\d+", part)]
    assert sorted(named) == np.flatnonzero(advice.inputs).tolist()  # the faint ones, too
    rows = re.findall(r"^[> ] (.+?)  +(\S+) \(\S+ to \S+\) +(\S+) \(", text, re.MULTILINE)
    assert [name for name, *_ in rows] == [plan.name for plan in (advice.plan, *advice.alternatives)]
    assert all(abs(float(kl) - 0.1) < 0.03 for *_, kl in rows)
    shifts = [float(shift) for _, shift, _ in rows[1:]]  # of the first, what the choice cannot have flattered
    assert shifts == sorted(shifts, reverse=True)
    assert re.search(r"The warranty (held|did NOT hold) at 24 other prompts", text)
    assert "Saved: mine" in text and "suffix ' Rating:'" in text
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")
    model = load_model("embedded/small", device="cpu")
    splits = load_task("film-sentiment").split(concept=48, operating=12, evaluation=12)
    directions = concept_directions(model, splits.concept)
    again = recommend(model, splits.operating, directions, budget=0.1, layers=(3, 9))
    np.testing.assert_allclose(advice.inputs, again.inputs, rtol=1e-3)


def test_words_and_prompts_of_ones_own_are_taken_from_files(run, tmp_path: Path) -> None:
    for name, word in (("cheers", "good"), ("jeers", "bad")):
        lines = [f"{number} of {number + 3} say: {word}" for number in range(16)]
        (tmp_path / name).write_text("\n".join(lines) + "\n\n")
    (tmp_path / "words").write_text("good\nfine\n")
    asked = ("--model", "embedded/small", "--contrast", "cheers", "jeers", "--device", "cpu", "--json")
    asked += ("--positive", "words", "--negative", "bad, poor", "--first-tokens", "--suffix", ".")
    found = run("recommend", *asked, "--shift", -0.5)
    assert found["output"] == "log-odds of good, fine against bad, poor (first tokens)"
    assert found["aim"] == "shift" and found["shift"]["value"] == pytest.approx(-0.5, rel=0.02)
    assert len(found["verification"]["per_prompt"][0]) == 8 and found["metadata"]["suffix"] == "."


def test_the_printed_command_pushes_as_the_plan_does(run, tmp_path: Path) -> None:
    for name, word in (("cheers", "good"), ("jeers", "bad")):
        (tmp_path / name).write_text("\n".join(f"{number} of {number + 3} say: {word}" for number in range(16)))
    asked = ("--model", "embedded/small", "--contrast", "cheers", "jeers", "--device", "cpu", "--suffix", " so")
    asked += ("--positive", "good, fine", "--negative", "bad", "--first-tokens", "--positions", "all")
    text = run("recommend", *asked, "--budget", 0.05, "--save", "plan", "--export", "push.gguf")
    advice = load_recommendation("plan")
    assert "28 others" not in text and "Prompts: 16 for directions, 8 others for the plan, 8 others" in text
    assert "rows whose intervals overlap" in " ".join(text.split())
    np.testing.assert_allclose(import_vectors("push.gguf").pushes, advice.vectors.pushes, rtol=1e-6, atol=1e-9)
    assert not advice.inputs[:2].any() and not list(tmp_path.glob("*.svg"))
    saved = shlex.split(re.search("^Use it: (.*)", text, re.MULTILINE)[1])
    hand = run("recommend", *asked, "--budget", 0.05, "--layers", "2-11")
    hand = shlex.split(re.search("^By hand: (.*)", hand, re.MULTILINE)[1])
    pushed = []
    for words in (saved, hand):
        words[words.index("TEXT")] = "A dull film so"
        assert words.pop(0) == "llvlit"
        found = run(*words, "--tokens", 2, "--json")
        pushed.append(next(iter(found["texts"][0]["pushed"][-1].values())))
        assert found["positions"] == "all" and found["unit"] == "log-odds"
    np.testing.assert_allclose(pushed[0]["inputs"], advice.inputs, rtol=0.01)  # of a target with three digits
    np.testing.assert_allclose(pushed[1]["inputs"], advice.inputs, rtol=2e-3, atol=1e-9)


def test_a_list_of_words_may_be_longer_than_a_path(fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llvlit.cli.recommend.load_experiment", lambda _: pytest.fail("loaded"))
    words = ", ".join(f"word{number}" for number in range(2000))
    for command in ("recommend", "steer"):
        line = fail(command, "--positive", words, "--negative", f"{words}, word7")
        assert "word7" in line and "among the positive" in line


@pytest.mark.parametrize("command", ["recommend", "steer"])
def test_words_are_refused_before_anything_is_computed(command: str, fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llvlit.method.concepts.concept_directions", lambda *_: pytest.fail("computed"))
    assert "splendiferous" in fail(command, *SMALL, "--positive", "splendiferous", "--negative", "bad")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--export", "a.bin", "--positions", "all"], "--export a.bin: give the name of a file that ends in .gguf"),
        (["--export", "a.gguf"], "Add --positions all"),
        (["--export", "a.gguf", "--positions", "all", "--layers", "1-5"], "Give --layers from 2 on"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_the_model_is_loaded(arguments, message, fail, monkeypatch) -> None:
    monkeypatch.setattr("llvlit.cli.recommend.load_experiment", lambda _: pytest.fail("loaded"))
    assert message in fail("recommend", *arguments)


def test_a_place_that_takes_no_file_is_refused_before_any_work(fail, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for work in ("llvlit.engine.architectures.check_all", "llvlit.cli.recommend.load_experiment"):
        monkeypatch.setattr(work, lambda _: pytest.fail("worked first"))
    (tmp_path / "file").touch()
    for command, option, name in (("architectures", "--save", "a.csv"), ("recommend", "--figure", "a.svg")):
        os.mkfifo(tmp_path / name)
        for place in (name, f"none/{name}", f"file/{name}"):
            assert f"{option} {place} cannot be written" in fail(command, option, place)


def test_a_plan_is_not_saved_in_the_folder_that_one_is_in(fail, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llvlit.cli.recommend.load_experiment", lambda _: pytest.fail("loaded"))
    for folder in (".", tmp_path):
        assert f"{folder} is the folder you are in" in fail("recommend", "--save", folder, status=1)
    assert list(tmp_path.iterdir()) == []


# Steer


TEXTS = ("The plot was thin and", "A dull film")


def test_steer_uses_a_plan_at_several_strengths(run, plan: Path) -> None:
    advice = load_recommendation(plan)
    found = run("steer", *TEXTS, "--plan", plan, "--targets", 0.5, -1, "--tokens", 5, "--device", "cpu", "--json")
    gap = advice.directions.gaps[-1]
    model = load_model("embedded/small", device="cpu")
    system = depth_system(model, Prompts(TEXTS, [1, 1]))
    assert [each["prompt"] for each in found["texts"]] == list(TEXTS) and found["unit"] == "gaps"
    assert found["plan"]["borrowed"] == np.flatnonzero(advice.directions.borrowed).tolist()
    for row, each in enumerate(found["texts"]):
        written = [each["plain"]]
        for target, block in zip((0.5, -1), each["pushed"], strict=True):
            assert list(block) == ["recommended", "uniform"]
            factor = target * gap / advice.shift.value
            np.testing.assert_allclose(block["recommended"]["inputs"], factor * advice.inputs)
            assert block["recommended"]["expected"]["shift"] == pytest.approx(target)
            assert block["uniform"]["expected"]["kl"] == pytest.approx(block["recommended"]["expected"]["kl"])
            assert block["uniform"]["expected"]["shift"] * target > 0
            inputs = np.stack([np.array(push["inputs"]) for push in block.values()])
            shifts = output_shifts(system, advice.directions, np.stack([inputs, inputs]))[row] / gap
            measured = [push["measured"]["shift"] for push in block.values()]
            np.testing.assert_allclose(measured, shifts, rtol=1e-4)
            assert all(push["measured"]["kl"] > 0 for push in block.values())
            written += [push["text"] for push in block.values()]
        tokens = [len(model.tokenizer(text)["input_ids"]) for text in (TEXTS[row], *written)]
        assert all(text.startswith(TEXTS[row]) for text in written) and len(set(written)) > 2
        assert all(1 <= n - tokens[0] <= 6 for n in tokens[1:])


def test_shifts_below_zero_may_be_written_with_an_exponent(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def note(options: argparse.Namespace) -> None:
        given.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("llvlit.cli.steer._prepared", note)
    for words in (["--targets", "-1e-1", "1", "-.2E+1"], ["--targets=-1e-1"], ["--target", "-1e-1", "--", "-1e-1"]):
        main(["steer", *words])
    assert [options.targets for options in given] == [[-0.1, 1, -2], [-0.1], None]
    assert given[2].target == -0.1 and given[2].texts == ["-1e-1"]


def test_steer_pushes_as_planned_where_it_is_asked_for_what_the_plan_aimed_at(run, plan: Path, tmp_path: Path) -> None:
    advice = load_recommendation(plan)
    for aim, target, asked in (("kl", 0.1, ("--budget", 0.1)), ("shift", advice.directions.gaps[-1], ("--target", 1))):
        kept = replace(advice, plan=scaled_plan(advice.plan, 0.9), aim=aim, target=target)
        kept.save(tmp_path / aim)
        found = run("steer", "A film", "--plan", tmp_path / aim, *asked, "--tokens", 2, "--device", "cpu", "--json")
        inputs = found["texts"][0]["pushed"][0]["recommended"]["inputs"]
        np.testing.assert_allclose(inputs, kept.inputs)


def test_special_tokens_are_not_written_though_a_tokenizer_has_none() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<start_of_image>", "<b>"])
    ids = tokenizer("a <b>film</b><start_of_image> of it")["input_ids"]
    assert "<start_of_image>" in tokenizer.decode(ids, skip_special_tokens=True)
    assert _text(tokenizer, ids).replace(" ", "") == "a<b>film</b>ofit"


def test_steer_tells_a_push_that_costs_far_more_and_writes_the_plain_text_once(
    run, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("llvlit.cli.steer.DEAR", 0.0)
    asked = ("steer", "A dull film", "--plan", plan, "--tokens", 3, "--device", "cpu")
    told = {}
    for name, more in (("one", ()), ("several", ("--targets", 0.5, 9)), ("hand", ("--inputs", "5:3%"))):
        text = run(*asked, *more)
        told[name] = " ".join(text.split())
        assert text.count("no push") == 1 and "Push before" not in text
    assert re.search(r"The recommended push costs \S+ times what was expected: this text is unlike", told["one"])
    assert "measured in the full model at the plan's prompts." in told["one"]
    assert "then scaled: the shift in proportion" in told["several"] and "or the push is beyond" in told["several"]
    assert told["several"].startswith("budget=") and "is beyond the trust radius" in told["several"]
    assert "predicted by gains and metric" in told["hand"]
    monkeypatch.setattr("llvlit.cli.steer.DEAR", np.inf)
    assert "costs" not in run(*asked)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3_text", "bloom"])
def test_what_is_written_does_not_depend_on_the_texts_beside_it(kind: str) -> None:
    model = tiny_model(kind, dtype=torch.float32)
    tokens = tokenize(model, Prompts(["the film was good", "a day", "I liked it a lot"], [1, 0, 1]))
    pushes = np.random.default_rng(0).standard_normal((3, 4)) * [[0], [1], [1]]
    rows = [row for row in range(3) for _ in pushes]
    for positions in ("prompt", "last", "all"):
        steering = Steering([], as_directions(random_directions(5, 24, seed=1)), positions, None, 1, None)
        together = _continuations(model, steering, np.tile(pushes, (3, 1)), tokens.select(rows), 12)
        alone = [
            _continuations(model, steering, pushes[[place % 3]], tokens.select([row]), 12)[0]
            for place, row in enumerate(rows)
        ]
        assert together == alone and len(set(alone)) > 3
        with steer(model, steering.directions, pushes[1], positions=positions), torch.no_grad():
            ids = torch.tensor([tokens.ids[1]])
            kept = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.3, "pad_token_id": 0}
            out = model.module.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=end_tokens(model), **kept
            )
        new = takewhile(lambda token: token not in end_tokens(model), out[0, ids.shape[1] :].tolist())
        assert model.tokenizer.decode([*tokens.ids[1], *new], skip_special_tokens=True).strip() == alone[4]


def test_the_token_that_is_read_is_chosen_once_and_kept_in_the_plan(run, fail, capsys, tmp_path: Path) -> None:
    for name, word, answer in (("cheers", "good", "yes"), ("jeers", "bad", "no")):
        lines = [f"{number} of {number + 3} say: {word} {answer}" for number in range(16)]
        (tmp_path / name).write_text("\n".join(lines))
    asked = ("--model", "embedded/small", "--contrast", "cheers", "jeers", "--device", "cpu", "--token-index", -2)
    found = run("recommend", *asked, "--budget", 0.05, "--save", "plan", "--json")
    assert found["metadata"]["token_index"] == -2 == load_recommendation("plan").metadata["token_index"]
    for command in (("gains", "--order", 2, "--no-plot"), ("order", "--no-plot")):
        assert "read at token -2" in " ".join(run(*command, *asked).split())
    assert main(["gains", *map(str, asked[:-2]), "--order", "2", "--no-plot"]) == 0
    assert capsys.readouterr().err.startswith("llvlit gains: The last token alone tells the label")
    with_plan = ("steer", "3 of 4 say: good yes", "--plan", "plan", "--tokens", 2, "--device", "cpu", "--json")
    read, last = (run(*with_plan, *more) for more in ((), ("--token-index", -1)))
    assert read["prompts"]["token_index"] == -2 and "token_index" not in last["prompts"]
    assert read["texts"][0]["plain"].startswith("3 of 4 say: good") and "yes" not in read["texts"][0]["plain"][:20]
    assert last["texts"][0]["plain"].startswith("3 of 4 say: good yes")
    assert "has no token -9" in fail("steer", "A film", "--plan", "plan", "--token-index", -9, "--device", "cpu")


def test_steer_makes_a_plan_where_there_is_none(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("llvlit.method.recommendation._trust", lambda *_: 0.5)
    text = run("steer", "A dull film", *SMALL, "--budget", 0.3, "--tokens", 5)
    assert "budget=0.3 nats is beyond the trust radius" in text
    assert text.startswith("budget=0.3 nats is beyond") and "'A dull film'" in text
    assert ["plain", "recommended", "uniform"] in [line.split() for line in text.splitlines()]
    assert len(re.findall(r"expected \+\d\.\d\d gaps, 0\.3 nats", text)) == 2
    assert "Pushed: before layers" in " ".join(
        text.split()
    ) and "in the main, at the prompt's last token and every new one" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 110
    monkeypatch.setenv("COLUMNS", "40")
    found = run("steer", "A dull film", *SMALL, "--inputs", "3:2", "5-6:-1%", "--tokens", 5)
    assert found.splitlines()[2] == "plain" and "expected" not in found.replace("Expected", "")


def test_steer_by_hand_counts_in_the_streams_units_or_the_states_length(run, plan: Path) -> None:
    sizes = load_recommendation(plan).sizes
    asked = ("steer", "A dull film", "--plan", plan, "--inputs", "3:20 8-11:15%", "--tokens", 5, "--json")
    wanted = np.zeros(12)
    wanted[3], wanted[8:] = 20, 0.15 * sizes[8:]
    pushes = {}
    for positions in ("prompt", "last"):
        (found,) = run(*asked, "--positions", positions)["texts"]
        pushes[positions] = found["pushed"][0]["by hand"]
        np.testing.assert_allclose(pushes[positions]["inputs"], wanted)
        assert 0.5 < pushes[positions]["expected"]["shift"] / pushes[positions]["measured"]["shift"] < 2
    assert pushes["prompt"]["measured"] == pushes["last"]["measured"]
    assert len({found["plain"], *(push["text"] for push in pushes.values())}) == 3


def test_a_push_of_nothing_is_not_dear(run, plan: Path) -> None:
    asked = ("steer", "A dull film", "--plan", plan, "--tokens", 2, "--device", "cpu")
    for inputs in ("3:0", "3:1e-9%"):  # the second drowns in rounding
        assert "costs" not in run(*asked, "--inputs", inputs)


def test_borrowed_directions_are_told(run, tmp_path: Path) -> None:
    splits = load_task("film-sentiment").split(concept=48, operating=12, evaluation=12)
    directions = concept_directions(load_model("embedded/small", device="cpu"), splits.concept)
    borrowed = np.flatnonzero(directions.borrowed).tolist()
    assert borrowed and run("gains", *SMALL, "--order", 2, "--no-plot", "--json")["borrowed"] == borrowed
    text = run("gains", *SMALL, "--order", 2, "--no-plot")
    assert [int(layer) for layer in re.findall(r"^ +(\d+)\*", text, re.MULTILINE)] == borrowed
    told = f"Borrowed directions before layers {', '.join(map(str, borrowed))}"
    assert told in " ".join(text.split())
    text = " ".join(run("order", *SMALL, "--no-plot").split())
    assert (
        f"Borrowed directions at states {', '.join(map(str, borrowed))}: the class gap there is within chance" in text
    )
    assert "pushes and readings there go along the next state's own direction." in text


def test_borrowed_directions_are_marked_in_the_figure(run, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("llvlit.plots.figures.save", lambda figure, path: drawn.append(figure))
    borrowed = run("gains", *SMALL, "--order", 2, "--json")["borrowed"]
    (axes,) = drawn[0].axes
    marked = next(line for line in axes.get_lines() if "borrowed" in line.get_label())
    assert marked.get_xdata().tolist() == borrowed
    assert marked.get_label() in [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("name", ["modèle à gogo", "价格 $5$ % {x}", "a'b\"c"])
def test_any_name_of_a_model_and_a_task(name: str, run, last_words: Path, tmp_path: Path) -> None:
    model, task = tmp_path / name, tmp_path / f"{name}.parquet"
    save_tiny(model)
    shutil.copy(last_words, task)
    asked = ("--model", model, "--task", task, "--prompts", 12, "--device", "cpu")
    text = run("gains", *asked, "--order", 4, "--save", tmp_path / f"{name}.safetensors")
    (figure,) = tmp_path.glob("gains-*.png")
    assert f"{model} on {task}" in text and f"Figure: {figure.name}" in text
    assert LLV.load(tmp_path / f"{name}.safetensors").metadata["model"] == str(model)
    assert name in " ".join(run("steer", *asked, "--tokens", 2, "--inputs", "1:5%").split())
    assert run("gains", *asked, "--order", 4, "--json", "--no-plot")["metadata"]["model"] == str(model)


def test_a_prompt_of_one_token_is_named_with_what_to_do(fail, tmp_path: Path) -> None:
    texts = [*string.ascii_lowercase, *string.digits]  # a token each
    path = tmp_path / "short.parquet"
    parquet.write_table(pa.table({"text": texts, "label": [row % 2 for row in range(len(texts))]}), path)
    line = fail("gains", *SMALL, "--task", path, "--prompts", 4)
    assert "fewer than two tokens" in line and "leave it out" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A dull film", "--tokens", "500"], "--tokens 500 leaves no room for a prompt"),
        (["", "--tokens", "5"], "TEXT is empty"),
        (["A", "--tokens", "5"], "'A' has fewer than two tokens"),
        (["word " * 300], "The prompt is longer than"),
        (["A dull film", "--target", "1e20"], "cannot be pushed that far: candidates overflow"),
        (["A dull film", "--inputs", "12:1%"], "before a layer from 0 to 11. Write 6:3% for"),
        (["A dull film", "--inputs", "3:"], "--inputs '3:' is no push"),
        (["A dull film", "--inputs", "3:x%"], "'x' is no number"),
        (["A dull film", "--inputs", "3:1e30"], "cannot be pushed that far"),
        (["A dull film", "--positions", "all"], "--positions all is not what the plan was made for"),
        (["A dull film", "--model", "embedded/medium"], "with other weights than embedded/medium"),
        (["A dull film", "--dtype", "bfloat16"], "made in float32, and embedded/small is loaded in bfloat16"),
    ],
)
def test_steer_refuses(arguments: list[str], message: str, fail, plan: Path) -> None:
    assert message in fail("steer", *arguments, "--plan", plan, "--device", "cpu")


def test_a_plan_that_was_changed_is_not_used(fail, plan: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(plan, copy)
    weights = copy / "plan.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert "changed after it was written" in fail("steer", "--plan", copy, status=1)
    assert "no complete recommendation" in fail("steer", "--plan", tmp_path, status=1)
    assert "there is no folder missing" in fail("steer", "--plan", "missing", status=1)


def test_chat_is_in_the_prompts_and_in_the_metadata_and_told_once(run, fail, last_words: Path, tmp_path: Path) -> None:
    assert "embedded/small has no chat template" in fail("gains", *SMALL, "--chat", status=1)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}Q: {{ messages[0]['content'] }}{{ '!' if add_generation_prompt }}"
    tiny_module("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    asked = ("--model", tmp_path / "model", "--task", last_words, "--prompts", 12, "--device", "cpu")
    text, plain = (run("gains", *asked, *chat, "--order", 4, "--no-plot") for chat in (["--chat"], []))
    told = "Prompts as tokens: 24 prompts; start token '<|endoftext|>'; in the chat template."
    assert text.count("chat template") == 1 and told in " ".join(text.split()) and "Prompts as" not in plain
    metadata = run("gains", *asked, "--chat", "--order", 4, "--no-plot", "--json")["metadata"]
    assert (metadata["chat"], metadata["start_token"], metadata["suffix"]) == (True, "<|endoftext|>", "")
    steered = ("steer", "A dull film", *asked, "--chat", "--tokens", 2, "--inputs", "1:5%")
    found = run(*steered, "--json")
    assert found["texts"][0]["prompt"] == "A dull film" and found["prompts"]["chat"]
    assert "film" not in found["texts"][0]["plain"]  # the answer alone
    assert " ".join(run(*steered).split()).count("chat template") == 1


# Study


@pytest.fixture(scope="session")
def study(last_words: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A study whose results are there already, computed once for all processes: its arguments, its folder last."""
    shared, folder = last_words.parent, tmp_path_factory.mktemp("study")
    grid, results = shared / "quick.toml", shared / "results"
    arguments = ("study", str(grid), "--data-dir", str(shared), "--prompts", "12", "--device", "cpu", "--out")
    with FileLock(shared / "study.lock"):
        if not results.exists():
            grid.write_text(
                'description = ""\nmodels = ["embedded/small"]\ntasks = ["film-sentiment", "last-words"]\n'
                "[settings]\norders = [4]\nenergy_prompts = 1\n"
            )
            assert main([*arguments, str(folder)]) == 0
            shutil.copytree(folder, results)
    shutil.copytree(results, folder, dirs_exist_ok=True)
    return (*arguments, str(folder))


def test_study_writes_a_file_for_each_cell_and_reports_them(study: tuple[str, ...], run) -> None:
    results = load_results(study[-1]).finished
    assert [(one.cell["model"], one.cell["task"]) for one in results] == [
        ("embedded/small", "film-sentiment"),
        ("embedded/small", "last-words"),
    ]
    assert {one.cell["settings"]["operating"] for one in results} == {12}
    rows = run(*study, "--report", "--json")["agreement"]
    (row,) = [row for row in rows if row["predictor"] == "adjoint" and row["layers"] == "all"]
    both = [
        r["spearman"]
        for one in results
        for r in one.experiment.agreements
        if r["predictor"] == "adjoint" and r["layers"] == "all"
    ]
    assert row["spearman"] == pytest.approx(np.mean(both)) and row["n_tasks"] == 2
    text = run(*study, "--report")
    assert "reachability" in text and "uniform" in text
    written = {path.name for path in (Path(study[-1]) / "report").iterdir()}
    assert written == {"cells.csv", "agreement.csv", "energy.csv", "provenance.json", "agreement.png", "energy.png"}


def test_study_loads_what_it_has(study: tuple[str, ...], run) -> None:
    before = {path: path.stat().st_mtime_ns for path in (Path(study[-1]) / "cells").iterdir()}
    assert "0 cells computed, 2 kept" in run(*study)
    assert {path: path.stat().st_mtime_ns for path in (Path(study[-1]) / "cells").iterdir()} == before


def test_study_of_another_grid_is_not_mixed_in(study: tuple[str, ...], fail) -> None:
    assert "another grid" in fail(*study, "--seeds", "1", status=1)


def test_only_the_grid_of_a_folder_is_reported_from_it(study: tuple[str, ...], fail) -> None:
    assert "another grid" in fail(*(word if word != "12" else "11" for word in study), "--report", status=1)


def test_a_report_compares_whatever_the_sizes_of_the_splits(study: tuple[str, ...], run, tmp_path: Path) -> None:
    grid = tmp_path / "wide.toml"
    grid.write_text(
        'description = ""\nmodels = ["embedded/small"]\ntasks = ["last-words"]\njacobians = ["jvp", "central"]\n'
        "[settings]\nconcept = 20\noperating = 2\nevaluation = 8\norders = [4]\n"
    )
    data_dir = study[study.index("--data-dir") + 1]
    run_study(load_grid(grid), tmp_path / "out", data_dir=data_dir, device="cpu", progress=False)  # in this process
    rows = run("study", grid, "--out", tmp_path / "out", "--report", "--json")["agreement"]
    assert {row["jacobian"] for row in rows} == {"jvp", "central"}  # two kinds are never one mean
    assert {row["predictor"] for row in rows} == {"adjoint", "null", "krylov", "reachability", "random", "pca"}


def test_rows_of_a_report_differ_where_their_cells_do(run, last_words: Path, tmp_path: Path) -> None:
    grid = tmp_path / "norms.toml"
    grid.write_text(
        'description = ""\nmodels = ["embedded/small"]\ntasks = ["last-words"]\nfinal_norms = [false, true]\n'
        '[settings]\nconcept = 12\noperating = 4\nevaluation = 4\nbases = ["krylov"]\norders = [4]\n'
        "energy_prompts = 1\n"
    )
    run_study(load_grid(grid), tmp_path / "out", data_dir=last_words.parent, device="cpu", progress=False)
    text = run("study", grid, "--out", tmp_path / "out", "--report")
    for table in text.split("\n\n")[1::2]:
        head, *rows = table.splitlines()
        assert "final_norm" in head
        width = head.index("Spearman" if "Spearman" in head else "no ratio")
        assert len(rows) == len({row[:width] for row in rows}) > 2
        assert all("[" not in row for row in rows)  # one task and seed: no interval
    assert re.search(r"uniform +\d of 1 +\d+ ", text)


def test_a_report_is_written_though_nobody_reads_it(
    study: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does, which has seen enough
    with open(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", pipe)
        assert main([*study, "--report", "--save", str(tmp_path)]) == 1
    assert capsys.readouterr().err == ""
    assert {path.name for path in tmp_path.iterdir()} >= {"agreement.csv", "energy.csv", "agreement.png"}


# Standard output


def run_process(arguments: Sequence[str], **surroundings: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in surroundings that this one cannot give it."""
    command = [sys.executable, "-m", "llvlit", *arguments]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    surroundings = {"stdout": subprocess.PIPE, "env": buffered, **surroundings}
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, **surroundings)


@pytest.mark.parametrize("arguments", [[], ["tasks", "--json"], ["gains", "--help"]])
def test_whoever_stops_reading_gets_no_traceback(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run_process(arguments, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("arguments", [["tasks"], ["gains", "--help"]])
def test_a_full_disk_behind_standard_output_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = run_process(arguments, stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith(f"llvlit {arguments[0]}: Standard output could not be written (No space left")
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_standard_output_is_one_line() -> None:
    shell = f"exec {shlex.quote(sys.executable)} -m llvlit tasks >&-"
    done = subprocess.run(["bash", "-c", shell], stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1) and "output is closed" in done.stderr


def test_files_are_whole_though_standard_output_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", None)  # what Python makes of a closed one
        assert main(["gains", *SMALL, "--order", "2", "--save", "llv"]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"llv", "gains-small-film-sentiment.png"}
    assert LLV.load(tmp_path / "llv").order == 2


def test_what_an_encoding_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for encoding in ("ascii", "cp1252"):
        printed = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr("sys.stdout", printed)
        asked = ["steer", "Un modèle 日本 of a film", *SMALL, "--tokens", "1", "--inputs", "3:1%"]
        assert main(asked) == 0
        text = printed.buffer.getvalue().decode(encoding)
        assert "of a film" in text and "?" in text and ("modèle" in text) == (encoding == "cp1252")
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert main(["gains", *SMALL, "--order", "2", "--no-plot"]) == 0
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["exercises", "--root", str(ROOT), "--out", str(tmp_path / "course")]) == 0
    assert len(list((tmp_path / "course" / "student").iterdir())) > 5


def test_errors_are_told_nowhere_where_there_is_nowhere(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert main(["tasks", "--data-dir", "absent"]) == 2
    assert capsys.readouterr().out == ""  # not among the results


def test_a_slow_git_ends_no_command(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(provenance, "GIT_SECONDS", 0.2)
    provenance.commit.cache_clear()
    assert run("gains", *SMALL, "--order", 2, "--save", "llv", "--json")["metadata"]["commit"] == "unknown"
    provenance.commit.cache_clear()


def test_json_has_null_where_there_is_no_number(run, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"kind": "file", "description": "", "sizes": (1.0, float("nan"), [float("-inf"), None, True, "a"])}
    monkeypatch.setattr("llvlit.tasks.task.task_facts", lambda data_dir: {"mine": numbers})
    assert run("tasks", "--json")["mine"]["sizes"] == [1.0, None, [None, None, True, "a"]]


def test_a_failed_cell_is_named_and_the_exit_status_tells(
    last_words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, out = tmp_path / "quick.toml", tmp_path / "out"
    models = [str(save_tiny(tmp_path / "whole")), str(save_tiny(tmp_path / "overflows", scale=1e25))]
    grid.write_text(
        f'description = ""\nmodels = {json.dumps(models)}\ntasks = ["last-words"]\n[settings]\norders = [4]\n'
    )
    asked = ["study", grid, "--data-dir", last_words.parent, "--prompts", "4", "--device", "cpu", "--out", out]
    assert main([str(word) for word in asked]) == 1
    error = capsys.readouterr().err
    assert "1 of 2 cells failed" in error and "overflows is not finite after layer 2" in error
    (traceback,) = (out / "failed").iterdir()
    assert traceback.read_text().startswith("Traceback") and "NumericalError" in traceback.read_text()
    (cell,) = (out / "cells").iterdir()
    assert "whole" in cell.name


@pytest.fixture
def unreadable(tmp_path: Path) -> list[str]:
    """Models and tasks of a study none of which can be read: an error that is not about that came before."""
    model, task = tmp_path / "unreadable", tmp_path / "unreadable.parquet"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"no weights")
    task.write_bytes(b"no table")
    return ["--models", str(model), "--tasks", str(task)]


def test_names_are_checked_before_anything_is_read(fail, unreadable: list[str], tmp_path: Path) -> None:
    _, model, _, task = unreadable
    for more in ([], ["--dry-run"]):
        out = ["--out", tmp_path / "out", *more]
        assert "unreadable" in fail("study", *unreadable, *out, status=1)
        assert "'jigsaw_toxicity' is not known" in fail("study", *unreadable, "jigsaw_toxicity", *out)
        assert "Did you mean 'embedded/small'" in fail(
            "study", "--models", model, "untrained:embedded/smal", "--tasks", task, *out, status=1
        )
        assert "no such file" in fail("study", *unreadable, "absent.parquet", *out)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_told_before_anything_is_loaded(
    unreadable: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["study", *unreadable, "--device", "cpu", "--out", str(tmp_path / "out")]
    with locked(tmp_path / "out"), ThreadPoolExecutor(1) as other:  # a thread finds it locked as another process would
        assert other.submit(main, asked).result() == 1
    assert "in use by process" in capsys.readouterr().err


def test_dry_run_runs_nothing(study: tuple[str, ...], run, tmp_path: Path) -> None:
    rows = run(*study[:-1], tmp_path / "none", "--dry-run", "--json")
    assert len(rows) == 2 and all(row["minutes"] > 0 for row in rows) and not (tmp_path / "none").exists()


# Failures


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["gains", "--task", "tens"], ["Did you mean 'tense'", ".parquet"]),
        (["gains", *SMALL, "--basis", "krilov"], ["Did you mean 'krylov'"]),
        (["gains", *SMALL, "--order", "65"], ["order=65", "64"]),
        (["gains", *SMALL, "--save", "none/llv.safetensors"], ["--save none/llv.safetensors", "folder that exists"]),
        (["recommend", *SMALL, "--positive", "good", "--negative", "good"], ["good stands among"]),
        (["recommend", *SMALL, "--layers", "9-12"], ["layers[1]=12"]),
        (
            ["recommend", *SMALL, "--positive", "splendiferous", "--negative", "bad", "--save", "plan"],
            ["splendiferous"],
        ),
        (["recommend", *SMALL, "--figure", "plan.pdf"], ["--figure plan.pdf", ".svg or .png"]),
        (["recommend", *SMALL, "--save", "none/plan"], ["--save none/plan", "in one that exists"]),
        (["recommend", *SMALL, "--budget", "1e9"], ["No plan meets a budget of 1e+09 nats"]),
        (["gains", "--prompts", "5000"], ["film-sentiment", "1200", "20000"]),
        (["gains", "--model", "embedded/small", "--device", "cpux"], ["device='cpux'"]),
        (["study", "embeded"], ["Did you mean 'embedded'", ".toml"]),
        (["study", "--data-dir", "absent"], ["absent' is no folder"]),
        (["study", "--models", "embedded/small", "--tasks", "hostilty"], ["Did you mean 'hostility'"]),
        (["train", "--corpus", "absent", "--out", "run", "--sizes", "smal"], ["Did you mean 'small'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], messages: list[str], fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = fail(*arguments)
    assert all(message in line for message in messages), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["gains", "--model", "embedded/smal"], ["Did you mean 'embedded/small'"]),
        (["study", "--models", "embedded/smal", "--tasks", "tense"], ["Did you mean 'embedded/small'"]),
        (["gains", "--model", "no-such-hub-id"], ["hub cannot be reached", "embedded/small"]),
        (["study", "--report", "--out", "absent"], ["holds no results"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_failure_is_one_line(arguments: list[str], messages: list[str], fail) -> None:
    line = fail(*arguments, status=1)
    assert all(message in line for message in messages), line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gains", "--order", "0"], "--order: number=0 must be at least 1"),
        (["gains", "--order", "2.5"], "--order: number='2.5' is of type str; expected a whole number"),
        (["gains", "--prompts", "0"], "--prompts: number=0 must be at least 1"),
        (["gains", "--amplitude", "0"], "--amplitude: number=0.0 must be above 0"),
        (["gains", "--amplitude", "nan"], "--amplitude: number=nan must be finite"),
        (["gains", "--seed", "-1"], "--seed: seed=-1 must be at least 0"),
        (["gains", "--seed", str(2**64)], "--seed: seed=18446744073709551616 is beyond 64 bits"),
        (["gains", "--model", ""], "--model: name='' is no path"),
        (["gains", "--task", "a\0b"], "--task: name='a\\x00b' is no path"),
        (["gains", "--device", "\udcff"], "--device: name='\\udcff' holds a lone surrogate"),
        (["recommend", "--budget", "0"], "--budget: number=0.0 must be above 0"),
        (["recommend", "--budget", "-1"], "--budget: number=-1.0 must be above 0"),
        (["recommend", "--budget", "nan"], "--budget: number=nan must be finite"),
        (["recommend", "--token-index", "last"], "--token-index: number='last' is of type str"),
        (["recommend", "--layers", "8-2"], "--layers: layers='8-2' names no layers"),
        (["recommend", "--budget", "1", "--shift", "1"], "not allowed with argument --budget"),
        (["steer", "a\udcff"], "TEXT: text='a\\udcff' holds a lone surrogate"),
        (["steer", "--tokens", "0"], "--tokens: number=0 must be at least 1"),
        (["steer", "--target", "inf"], "--target: number=inf must be finite"),
        (["steer", "--target", "0"], "--target: number=0 must not be zero"),
        (["steer", "--targets", "1", "-0e3"], "--targets: number=0 must not be zero"),
        (["steer", "--target", "-1e400"], "--target: number=-inf must be finite"),
        (["recommend", "--shift", "0"], "--shift: number=0 must not be zero"),
        (["recommend", "--suffix", "-1e5"], "--suffix: expected one argument"),
        (["steer", "--budget", "0"], "--budget: number=0.0 must be above 0"),
        (["steer", "--budget", "1", "--targets", "1"], "--targets: not allowed with argument --budget"),
        (["study", "--prompts", "0"], "--prompts: number=0 must be at least 1"),
        (["study", "--seeds", "0", "-1"], "--seeds: seed=-1 must be at least 0"),
        (["study", "--workers", "0"], "--workers: number=0 must be at least 1"),
        (["train", "--corpus", "absent", "--out", "run", "--steps", "0"], "--steps: number=0 must be at least 1"),
        (["train", "--corpus", "absent", "--out", "run", "--keep", "-1"], "--keep: number=-1 must be at least 0"),
        (["train", "--corpus", "absent", "--out", "run", "--seed", "-1"], "--seed: seed=-1 must be at least 0"),
        (["book", "--jobs", "0"], "--jobs: number=0 must be at least 1"),
        (["exercises", "--root", ""], "--root: name='' is no path"),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "backslashreplace").decode() if isinstance(value, list) else None,
)
def test_values_of_options_are_refused_before_any_work(arguments: list[str], message: str, refuse) -> None:
    assert message in refuse(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            (["steer", "--plan", "plan", *words], f"{words[0]} says nothing with --plan")
            for words in (
                *(["--layers", "3-5"], ["--limit", "0.1"], ["--horizon", "1"], ["--towards", "positive"]),
                *(["--positive", "good", "--negative", "bad"], ["--first-tokens"], ["--task", "tense"]),
                *(["--contrast", "a", "b"], ["--suffix", ""], ["--data-dir", "."], ["--prompts", "50"]),
                ["--seed", "0"],
            )
        ),
        (["steer", "--inputs", "5:3%", "--layers", "0-1"], "--layers says nothing with --inputs"),
        (["steer", "--inputs", "5:3%", "--limit", "0.1"], "--limit says nothing with --inputs"),
        (["steer", "--inputs", "5:3%", "--towards", "negative"], "--towards says nothing with --inputs"),
        (["steer", "--target", "1", "--towards", "negative"], "--towards says nothing with --target"),
        (["steer", "--targets", "1", "2", "--towards", "positive"], "--towards says nothing with --targets"),
        (["recommend", "--shift", "5", "--towards", "negative"], "--towards says nothing with --shift"),
        (["recommend", "--contrast", "a", "b", "--task", "tense"], "--task says nothing with --contrast"),
        (["gains", "--contrast", "a", "b", "--data-dir", "."], "--data-dir says nothing with --contrast"),
        (["order", "--no-plot", "--plot", "a.png"], "--plot says nothing with --no-plot"),
        (["recommend", "--first-tokens"], "--first-tokens says nothing without --positive"),
        (["steer", "--inputs", "5:3%", "--first-tokens"], "--first-tokens says nothing without --positive"),
        (["recommend", "--positive", "good"], "--positive says nothing without --negative"),
        (["steer", "--negative", "bad"], "--negative says nothing without --positive"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_that_would_say_nothing_are_refused_before_any_work(arguments: list[str], message: str, fail) -> None:
    assert message in fail(*arguments)


def test_what_was_computed_is_shown_though_it_cannot_be_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "llv.safetensors"
    monkeypatch.setattr("os.replace", full)
    monkeypatch.setattr(Path, "replace", full)
    assert main(["gains", *SMALL, "--order", "2", "--no-plot", "--save", str(path)]) == 1
    out, error = capsys.readouterr()
    assert "Order 2" in out and "Saved" not in out
    assert str(path) in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llvlit.tasks.task.task_facts", interrupt)
    assert main(["tasks"]) == 130
    assert "finished results are kept" in capsys.readouterr().err


def test_train_without_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--corpus", str(tmp_path / "absent"), "--out", str(tmp_path / "run")]) == 2
    assert "aclImdb" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
