"""An experiment's numbers are those of the functions behind it; a study checks, resumes, and mixes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from pyarrow import Table, parquet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from conftest import PROMPTS, affine_model
from llvlit.engine.depth import last_token_states
from llvlit.engine.models import LanguageModel, load_model, local_place
from llvlit.engine.tokens import tokenize
from llvlit.errors import CellError, ConceptNotVisibleError, FileError, InputError, ModelError
from llvlit.method.agreement import agreement
from llvlit.method.concepts import directions_of_states, random_directions
from llvlit.method.gains import adjoint_gains, measured_gains
from llvlit.method.identification import identify
from llvlit.method.verification import required_energy
from llvlit.provenance import commit
from llvlit.study.cells import Results, forget, load_results, load_subject, run_cell, run_study
from llvlit.study.estimate import count_operations, estimate, model_shape
from llvlit.study.experiment import SplitTokens, energy_summary, run_experiment, schedule_energies, tokenize_splits
from llvlit.study.grid import Cell, Grid, Settings, load_grid
from llvlit.study.tables import (
    committed,
    read_table,
    summarize,
    summarize_energies,
    tables,
    told_of_cells,
    write_tables,
)
from llvlit.tasks.task import load_task

SETTINGS = Settings(
    concept=3,
    operating=3,
    evaluation=3,
    directions=("mean_difference", "principal_component"),
    orders=(2, 4),
    amplitudes=(0.1, 1.0),
    operating_counts=(2,),
    energy_prompts=1,
)


@pytest.fixture(scope="module")
def experiment(gpt2):
    tokens = tokenize(gpt2, PROMPTS)
    return run_experiment(gpt2, SplitTokens(tokens, tokens, tokens, left_out={}), SETTINGS)


def rows_of(experiment, **wanted):
    return [row for row in experiment.agreements if all(row[key] == value for key, value in wanted.items())]


@pytest.mark.parametrize("method", SETTINGS.directions)
def test_rows_are_what_the_functions_give_one_by_one(experiment, gpt2, method):
    directions = directions_of_states(last_token_states(gpt2, PROMPTS), PROMPTS, method=method)
    measured = measured_gains(gpt2, PROMPTS, directions)
    predictions = {
        ("adjoint", None): adjoint_gains(gpt2, PROMPTS, directions).mean,
        ("adjoint, same prompts", None): adjoint_gains(gpt2, PROMPTS, directions).mean,
    }
    for basis in ("krylov", "reachability", "pca"):
        for order in SETTINGS.orders:
            surrogate = identify(gpt2, PROMPTS, directions, order=order, basis=basis)
            predictions[basis, order] = surrogate.gains()
            own = identify(gpt2, PROMPTS, directions, order=order, basis=basis, operators="per prompt")
            predictions[f"{basis}, per prompt", order] = own.gains()
    for (predictor, order), h in predictions.items():
        for layers, part in (("all", slice(None)), ("not 0", slice(1, None))):
            (row,) = rows_of(
                experiment,
                direction=method,
                predictor=predictor,
                order=order,
                layers=layers,
                amplitude=0.1,
                n_operating=6,
            )
            expected = agreement(h[part], measured.select(part))
            for name, value in expected.row().items():
                assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-6)  # six digits are kept
                assert row[f"{name}_low"] <= row[f"{name}_high"]


def test_other_amplitudes_and_fewer_prompts_have_rows_of_their_own(experiment, gpt2):
    directions = directions_of_states(last_token_states(gpt2, PROMPTS), PROMPTS)
    large = measured_gains(gpt2, PROMPTS, directions, amplitude=1.0)
    (row,) = rows_of(experiment, predictor="adjoint", layers="all", amplitude=1.0)
    expected = agreement(adjoint_gains(gpt2, PROMPTS, directions), large)
    assert row["relative_error"] == pytest.approx(expected.relative_error, rel=1e-5)
    few = identify(gpt2, PROMPTS.select(range(2)), directions, order=4, basis="krylov")
    (row,) = rows_of(experiment, predictor="krylov", layers="all", n_operating=2)
    expected = agreement(few.gains(), measured_gains(gpt2, PROMPTS, directions))
    assert row["relative_error"] == pytest.approx(expected.relative_error, rel=1e-5)


def test_energies_are_those_of_required_energy(experiment, gpt2):
    directions = directions_of_states(last_token_states(gpt2, PROMPTS), PROMPTS)
    chosen = PROMPTS.select(range(2))
    target = SETTINGS.target * directions.gaps[-1]
    found = required_energy(gpt2, chosen, directions, np.ones(4), target, weights=np.ones(4))
    (row,) = [
        row
        for row in experiment.energies
        if (row["schedule"], row["metric"], row["layers"]) == ("uniform", "absolute", "all")
    ]
    if found.n_out_of_reach:
        assert row["n_out_of_reach"] == found.n_out_of_reach
    else:
        assert row["energy"] == pytest.approx(found.median, rel=1e-5)


def test_energies_of_a_linear_model_follow_from_its_gains():
    """Layer norms of weight zero make every layer x + b: y = sum of u_l (v_l . c), exactly."""
    model = affine_model()
    vectors = random_directions(5, 24, seed=3)
    vectors[1:-1] += vectors[-1]  # no gain near zero
    vectors /= vectors.norm(dim=-1, keepdim=True)
    directions = replace(directions_of_states(last_token_states(model, PROMPTS), PROMPTS), vectors=vectors)
    h = (vectors[:-1] @ vectors[-1]).numpy()
    weights = np.array([4.0, 1.0, 0.5, 0.25])
    rows = schedule_energies(model, tokenize(model, PROMPTS), directions, {"true": h}, weights, 0.5)
    goal = 0.5 * directions.gaps[-1]
    for metric, w in (("absolute", np.ones(4)), ("relative", weights)):
        for layers, first in (("all", 0), ("not 0", 1)):
            inside = np.arange(4) >= first
            middle = [1, 2] if first == 0 else [2]
            least = goal**2 / (h**2 / w)[inside].sum()
            single = goal**2 * w / h**2
            expected = {
                "optimal, true": least,
                "uniform": goal**2 * inside.sum() / (h / np.sqrt(w))[inside].sum() ** 2,
                "early-only": single[first],  # a third of three or four layers is one
                "middle-only": goal**2 * len(middle) / (h / np.sqrt(w))[middle].sum() ** 2,
                "last layer": single[-1],
                "best layer": single[inside].min(),
                "random layer": np.median(single[inside]),
            }
            for schedule, energy in expected.items():
                (row,) = [r for r in rows if (r["schedule"], r["metric"], r["layers"]) == (schedule, metric, layers)]
                assert row["energy"] == pytest.approx(energy, rel=5e-3)  # brackets of 1e-3, squared
                assert row["ratio"] == pytest.approx(energy / least, rel=5e-3)
                assert row["energy"] >= least * 0.995 and row["n_out_of_reach"] == 0


@pytest.mark.parametrize(
    ("values", "reference", "ratio"),
    [
        ([2, 4, 6], [2, 2, 2], 2),
        ([2, 4, np.inf], [2, 2, 2], 2),  # the median stands though one prompt is out of reach
        ([2, np.inf, np.inf], [2, 2, 2], None),  # at least 1, and who knows what
        ([2, 4, 6], [2, np.inf, np.inf], None),  # at most 1
        ([4, 8, 1, 1], [2, 2, np.inf, np.inf], None),  # halfway between 2 and what is unknown
        ([2, 2, np.inf, np.inf], [np.inf, np.inf, 2, 2], None),
    ],
)
def test_ratios_out_of_reach_are_counted_not_taken_for_zero(values, reference, ratio):
    found = energy_summary(np.array(values, float), np.array(reference, float), range(len(values)), seed=0)
    assert found["ratio"] == ratio and found["n_out_of_reach"] == np.isinf(values).sum()
    if ratio is None:
        assert found["ratio_low"] is None and found["ratio_high"] is None
    elif np.isfinite(values).all():
        assert found["ratio_low"] <= ratio <= found["ratio_high"]


def test_energies_are_summarized_with_how_many_are_censored():
    rows = [("uniform", 0, 2.0, 0), ("uniform", 1, 8.0, 1), ("uniform", 2, None, 9), ("best layer", 0, 0.0, 3)]
    frame = pd.DataFrame(rows, columns=["schedule", "seed", "ratio", "n_out_of_reach"]).assign(task="t")
    uniform, best = summarize_energies(frame, ["schedule"]).to_dict("records")
    assert uniform["ratio"] == pytest.approx(4)
    assert (uniform["n_rows"], uniform["n_censored"], uniform["n_out_of_reach"]) == (3, 1, 10)
    assert np.isnan(best["ratio"]) and (best["n_rows"], best["n_censored"], best["n_out_of_reach"]) == (1, 1, 3)


def test_an_untrained_twin_has_the_shapes_and_none_of_the_weights():
    trained, twin = load_subject("embedded/small", device="cpu"), load_subject("untrained:embedded/small", device="cpu")
    again, other = (load_subject(f"untrained-{seed}:embedded/small", device="cpu") for seed in (0, 1))
    assert (
        twin.fingerprint == again.fingerprint and len({trained.fingerprint, twin.fingerprint, other.fingerprint}) == 3
    )
    assert (twin.n_layers, twin.hidden_size, twin.n_parameters) == (12, 64, trained.n_parameters)
    assert twin.tokenizer is not None and twin.name == "untrained:embedded/small"


# Studies


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Two tasks that any model can read: the last word is the class."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("one", "two"):
        texts = [f"{name} {number} of {number + 3}: {word}" for number in range(60) for word in ("bad", "good")]
        parquet.write_table(Table.from_pydict({"text": texts, "label": [0, 1] * 60}), folder / f"{name}.parquet")
    return folder


GRID = Grid(
    name="toy",
    description="",
    models=("embedded/small",),
    tasks=("one", "two"),
    seeds=(0, 1),
    settings=Settings(concept=12, operating=3, evaluation=3, orders=(2,), max_tokens=32),
)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "results"
    outcome = run_study(GRID, folder, data_dir=data_dir, device="cpu")
    assert len(outcome.done) == 4 and not outcome.failed
    return folder


def test_a_study_keeps_what_it_has(finished, data_dir):
    before = {path: path.stat().st_mtime_ns for path in (finished / "cells").iterdir()}
    outcome = run_study(GRID, finished, data_dir=data_dir, device="cpu")
    assert len(outcome.kept) == 4 and not outcome.done
    assert {path: path.stat().st_mtime_ns for path in (finished / "cells").iterdir()} == before
    experiments = load_results(finished).finished
    assert [(one.cell["task"], one.cell["seed"]) for one in experiments] == [
        (t, s) for t in ("one", "two") for s in (0, 1)
    ]
    assert len({one.data["fingerprint"] for one in experiments}) == 4


@pytest.fixture
def one_cell(finished, data_dir, tmp_path):
    """A study of one finished cell: its grid, folder and file, and what runs it again with other inputs."""
    grid = replace(GRID, tasks=("one",), seeds=(0,))
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "grid.json").unlink()
    for path in (tmp_path / "out" / "cells").glob("*"):
        if "--one--seed-0" not in path.name:
            path.unlink()
    (path,) = (tmp_path / "out" / "cells").iterdir()
    (tmp_path / "out" / "grid.json").write_text(json.dumps({"fingerprint": grid.fingerprint}))

    def again(grid=grid, data_dir=data_dir):
        return run_study(grid, tmp_path / "out", data_dir=data_dir, device="cpu")

    return path, again


@pytest.mark.parametrize("part", ["concept", "operating", "evaluation"])
def test_a_cell_is_kept_only_where_the_texts_of_every_split_are_the_same(one_cell, data_dir, tmp_path, part):
    path, again = one_cell
    before = path.read_bytes()
    assert len(again().kept) == 1
    table = parquet.read_table(data_dir / "one.parquet").to_pydict()
    used = getattr(load_task("one", data_dir=data_dir).split(12, 3, 3, seed=0), part).texts[0]
    table["text"][table["text"].index(used)] = used.replace(" of ", " out of ")
    (tmp_path / "tasks").mkdir()
    parquet.write_table(Table.from_pydict(table), tmp_path / "tasks" / "one.parquet")
    with pytest.raises(FileError, match=rf"other inputs.*another {part} texts\."):
        again(data_dir=tmp_path / "tasks")
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", ["configuration", "tokenizer"])
def test_a_cell_is_kept_only_where_configuration_and_tokenizer_are_the_same(data_dir, tmp_path, change):
    model = tmp_path / "model"
    shutil.copytree(local_place("embedded/small"), model)
    grid = replace(GRID, models=(str(model),), tasks=("one",), seeds=(0,))
    run_study(grid, tmp_path / "out", data_dir=data_dir, device="cpu")
    name = {"configuration": "config.json", "tokenizer": "tokenizer.json"}[change]
    content = json.loads((model / name).read_text())
    if change == "configuration":
        content["layer_norm_epsilon" if "layer_norm_epsilon" in content else "rms_norm_eps"] = 1e-3
    else:
        content["normalizer"] = {"type": "Lowercase"}
    (model / name).write_text(json.dumps(content))
    with pytest.raises(FileError, match="another model"):
        run_study(grid, tmp_path / "out", data_dir=data_dir, device="cpu")


@pytest.mark.parametrize("version", [2, 99])
def test_a_cell_of_another_version_is_refused_and_left_alone(one_cell, version):
    path, again = one_cell
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": version}))
    before = path.read_bytes()
    with pytest.raises(FileError, match=rf"{path.name} has format {version}.*Nothing was touched"):
        again()
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "a list", "not UTF-8"])
def test_a_damaged_cell_is_told_in_a_report_and_computed_again_by_a_run(one_cell, damage):
    path, again = one_cell
    content = json.loads(path.read_text())
    text = path.read_text()
    changed = {"cut": text[:300], "changed": json.dumps(content | {"agreements": []}), "emptied": "", "a list": "[]"}
    path.write_bytes(b"\xff\xfe" + text.encode() if damage == "not UTF-8" else changed[damage].encode())
    with pytest.raises(FileError, match=rf"{path.name} cannot be read .*[Rr]un the same study again"):
        load_results(path.parent.parent)
    assert len(again().done) == 1
    (result,) = load_results(path.parent.parent).finished
    assert result.experiment.agreements == content["agreements"]


@pytest.mark.parametrize("name", ["modèle", "模型", "a model"])
def test_names_in_any_script_name_results(data_dir, tmp_path, name):
    shutil.copytree(local_place("embedded/small"), tmp_path / name)
    shutil.copy(data_dir / "one.parquet", tmp_path / "données.parquet")
    grid = replace(GRID, models=(str(tmp_path / name),), tasks=(str(tmp_path / "données.parquet"),), seeds=(0,))
    assert len(run_study(grid, tmp_path / "out", device="cpu").done) == 1


def test_keys_are_checked_before_anything_is_loaded(data_dir, tmp_path):
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable" / "config.json").write_text("{}")
    (tmp_path / "unreadable" / "model.safetensors").write_bytes(b"no weights")
    shutil.copy(data_dir / "one.parquet", tmp_path / "ONE.parquet")
    shutil.copy(data_dir / "one.parquet", tmp_path / "one.parquet")
    with pytest.raises(InputError, match="names two jobs"):
        grid = replace(GRID, models=(str(tmp_path / "unreadable"),), tasks=("one", "ONE"))
        run_study(grid, tmp_path / "out", data_dir=tmp_path, device="cpu")


def test_a_study_does_without_an_answer_of_git(data_dir, tmp_path, monkeypatch):
    def slow(command, **_):
        raise subprocess.TimeoutExpired(command, 10)

    commit.cache_clear()
    monkeypatch.setattr("llvlit.provenance.subprocess.run", slow)
    grid = replace(GRID, tasks=("one",), seeds=(0,))
    assert len(run_study(grid, tmp_path, data_dir=data_dir, device="cpu").done) == 1
    commit.cache_clear()
    (result,) = load_results(tmp_path).finished
    assert result.metadata["commit"] == "unknown"


def test_prompts_that_the_tokenizer_has_no_use_for_are_left_out_and_counted(tmp_path):
    texts = [f"number {number}: {word}" for number in range(60) for word in ("bad", "good")]
    texts[10:20] = list("abcdefghij")  # one token each
    parquet.write_table(Table.from_pydict({"text": texts, "label": [0, 1] * 60}), tmp_path / "one.parquet")
    grid = replace(
        GRID, tasks=("one",), seeds=(0,), settings=replace(GRID.settings, concept=40, operating=8, evaluation=8)
    )
    outcome = run_study(grid, tmp_path / "out", data_dir=tmp_path, device="cpu")
    assert len(outcome.done) == 1 and not outcome.failed
    frame = tables(load_results(tmp_path / "out"))["cells"]
    assert 0 < frame["n_left_out"][0] <= 10
    assert "prompts that are too short or equal" in " ".join(told_of_cells(frame))


@pytest.mark.parametrize("max_tokens", [128, 12, 6])
def test_no_prompt_is_held_out_whose_tokens_an_earlier_split_has(max_tokens):
    splits = load_task("film-sentiment").split(200, 50, 50)
    settings = replace(SETTINGS, max_tokens=max_tokens)
    tokens = tokenize_splits(load_subject("embedded/small", device="cpu"), splits, settings)
    concept, operating, evaluation = (set(part.ids) for part in (tokens.concept, tokens.operating, tokens.evaluation))
    assert not concept & operating and not concept & evaluation and not operating & evaluation
    for part, n_left_out in tokens.left_out.items():
        assert len(getattr(tokens, part)) + n_left_out == len(getattr(splits, part))
        assert (n_left_out > 0) == (max_tokens < 128)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seeds": (0, 1, 2)}, FileError, "another grid"),
        ({"settings": replace(GRID.settings, orders=(3,))}, FileError, "another grid"),
    ],
)
def test_results_of_another_grid_are_not_mixed_in(finished, data_dir, change, error, message):
    before = sorted(path.name for path in (finished / "cells").iterdir())
    with pytest.raises(error, match=message):
        run_study(replace(GRID, **change), finished, data_dir=data_dir, device="cpu")
    assert sorted(path.name for path in (finished / "cells").iterdir()) == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"models": ("embedded/small", "embedded/smal")}, ModelError, "Did you mean 'embedded/small'"),
        ({"models": ("untrained:embedded/smal",)}, ModelError, "Did you mean"),
        ({"tasks": ("one", "three")}, InputError, "three.parquet"),
        ({"settings": replace(GRID.settings, concept=100)}, InputError, "60 distinct"),
        ({"settings": replace(GRID.settings, max_tokens=4000)}, InputError, "max_tokens=4000"),
        ({"settings": replace(GRID.settings, chat=True)}, ModelError, "embedded/small has no chat template"),
    ],
)
def test_what_cannot_run_is_told_before_anything_does(data_dir, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        run_study(replace(GRID, **change), tmp_path / "results", data_dir=data_dir, device="cpu")
    assert not (tmp_path / "results").exists()


def test_a_study_of_chats_puts_prompts_into_the_template_and_says_so(data_dir, tmp_path):
    """The template appends a word to every prompt; a suffix does the same."""
    shutil.copytree(local_place("embedded/small"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0]['content'] }} So")
    plain = replace(GRID, models=(str(tmp_path / "model"),), tasks=("one",), seeds=(0,))
    chat = replace(plain, settings=replace(GRID.settings, chat=True))
    suffixed = replace(plain, per_task={"one": {"suffix": " So"}})
    assert chat.fingerprint != plain.fingerprint
    results = []
    for number, grid in enumerate((chat, suffixed)):
        run_study(grid, tmp_path / str(number), data_dir=data_dir, device="cpu")
        results.append(load_results(tmp_path / str(number)))
    (one,), (other,) = (result.finished for result in results)
    assert one.experiment.profiles == other.experiment.profiles
    done = {"start_token": "", "n_cut": 0}
    assert one.data.items() >= {**done, "chat": True, "suffix": ""}.items()
    assert other.data.items() >= {**done, "chat": False, "suffix": " So"}.items()
    told = [" ".join(told_of_cells(tables(result)["cells"])) for result in results]
    assert ["in its chat template" in lines for lines in told] == [True, False]


def test_a_concept_that_is_not_visible_is_a_result_and_no_failure(data_dir, tmp_path):
    hidden = replace(GRID, tasks=("one",), seeds=(0,), per_task={"one": {"suffix": " and that is all there is to say"}})
    untrained = replace(hidden, models=("untrained:embedded/small",))
    outcome = run_study(untrained, tmp_path, data_dir=data_dir, device="cpu")
    assert len(outcome.done) == 1 and not outcome.failed
    (missing,) = load_results(tmp_path).not_visible
    assert "permuted labels" in missing["reason"]
    assert missing["model"]["fingerprint"] and missing["data"]["fingerprint"] and missing["metadata"]["commit"]
    frame = tables(load_results(tmp_path))["cells"]
    assert frame["visible"].tolist() == [False]


def test_a_killed_study_goes_on_where_it_stopped(data_dir, tmp_path):
    grid = tmp_path / "toy.toml"
    grid.write_text(
        'description = "toy"\nmodels = ["embedded/small"]\ntasks = ["one", "two"]\nseeds = [0, 1, 2]\n'
        '[settings]\nconcept = 12\noperating = 3\nevaluation = 3\norders = [2]\nbases = ["krylov"]\n'
    )
    command = [sys.executable, "-m", "llvlit", "study", grid, "--data-dir", data_dir, "--out", tmp_path / "out"]
    command += ["--device", "cpu", "--workers", "2", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        while not list((tmp_path / "out" / "cells").glob("*.json")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").glob("*.json")}
    assert 1 <= len(done) < 6
    outcome = run_study(load_grid(grid), tmp_path / "out", data_dir=data_dir, device="cpu")
    assert len(outcome.kept) == len(done) and not outcome.failed
    paths = sorted((tmp_path / "out" / "cells").glob("*.json"))
    assert len(paths) == 6 and all(paths[0].parent.joinpath(name).stat().st_mtime_ns == t for name, t in done.items())


# Tables


def test_tables_hold_every_row_with_its_cell_and_survive_a_file(finished, tmp_path):
    results = load_results(finished)
    frames = tables(results)
    assert len(frames["agreement"]) == sum(len(one.experiment.agreements) for one in results.finished)
    assert list(frames["agreement"].columns[:3]) == ["model", "task", "seed"]
    paths = write_tables(results, GRID, tmp_path)
    assert {path.name for path in paths} == {"cells.csv", "agreement.csv", "provenance.json"}  # no energies asked for
    again = read_table(tmp_path, "agreement")
    assert again["predictor"].tolist() == frames["agreement"]["predictor"].tolist()  # "null" is a name
    assert np.allclose(again["relative_error"], frames["agreement"]["relative_error"], rtol=1e-4)
    assert read_table(tmp_path, "cells")["model_fingerprint"].nunique() == 1
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["grid_fingerprint"] == GRID.fingerprint and provenance["n_experiments"] == 4
    assert {"torch", "llvlit", "commit", "device", "python"} <= set(provenance)
    with pytest.raises(FileError, match=r"energy\.csv"):
        read_table(tmp_path, "energy")


def test_committed_tables_are_found_from_below(tmp_path):
    inner = tmp_path / "results" / "real"
    inner.mkdir(parents=True)
    (inner / "provenance.json").write_text("{}")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert committed("real", start=tmp_path / "a" / "b") == inner
    with pytest.raises(FileError, match="results/absent"):
        committed("absent", start=tmp_path)


def test_means_weigh_tasks_alike_and_intervals_cover_them():
    generator = np.random.default_rng(0)
    rows = [{"model": "m", "task": f"t{i}", "seed": s, "x": i + generator.normal()} for i in range(8) for s in range(3)]
    rows += [{"model": "m", "task": "t0", "seed": s, "x": 0.0} for s in range(3, 30)]  # more seeds, no more weight
    frame = pd.DataFrame(rows)
    (row,) = summarize(frame, ["model"], ["x"]).to_dict("records")
    assert row["x"] == pytest.approx(frame.groupby("task")["x"].mean().mean()) and row["n_tasks"] == 8
    spread = frame.groupby("task")["x"].mean().std() / np.sqrt(8)
    assert row["x_high"] - row["x_low"] == pytest.approx(2 * 1.96 * spread, rel=0.25)
    flat = summarize(frame.assign(x=2.0), ["model"], ["x"]).iloc[0]
    assert flat["x_low"] == flat["x_high"] == 2.0
    ratios = frame.assign(x=np.exp(frame["x"]))
    (logged,) = summarize(ratios, ["model"], ["x"], log=True).to_dict("records")
    assert logged["x"] == pytest.approx(np.exp(row["x"])) and logged["x_high"] == pytest.approx(np.exp(row["x_high"]))
    assert np.isnan(summarize(frame.assign(x=np.nan), ["model"], ["x"]).iloc[0]["x"])


def simulated(n_tasks, n_seeds, *, n_studies=1, deviations=(1.0, 0.5, 0.5), seed=1):
    """Studies of true mean 0 whose tasks, seeds and prompts add normal errors; rows know the last of these."""
    generator = np.random.default_rng(seed)
    of_tasks, of_seeds, of_prompts = deviations
    shape = (n_studies, n_tasks, n_seeds)
    x = of_tasks * generator.normal(size=(n_studies, n_tasks, 1)) + np.hypot(of_seeds, of_prompts) * generator.normal(
        size=shape
    )
    axes = dict(zip(("study", "task", "seed"), np.indices(shape).reshape(3, -1), strict=True))
    x = x.ravel()
    return pd.DataFrame({**axes, "x": x, "x_low": x - 1.96 * of_prompts, "x_high": x + 1.96 * of_prompts})


@pytest.mark.parametrize(("n_tasks", "n_seeds", "share"), [(9, 3, 0.93), (4, 3, 0.88), (2, 2, 0.79)])
def test_intervals_hold_the_true_mean_as_often_as_the_docstring_says(n_tasks, n_seeds, share):
    found = summarize(simulated(n_tasks, n_seeds, n_studies=1000), ["study"], ["x"])
    held = ((found["x_low"] <= 0) & (found["x_high"] >= 0)).mean()
    assert held == pytest.approx(share, abs=0.025) and f"{share:.0%}".replace("%", " %") in summarize.__doc__


def width(frame, **options):
    row = summarize(frame, ["study"], ["x"], **options).iloc[0]
    return row["x_high"] - row["x_low"]


def test_seeds_are_drawn_anew_where_a_task_is_drawn_twice():
    """Tasks alike: of 9 tasks of 3 seeds the mean then varies as that of 27 seeds, not as that of fewer."""
    frame = simulated(9, 3, deviations=(0.0, 1.0, 0.0))
    frame["x"] = np.tile([-1.0, 0.0, 1.0], 9)
    exact = 2 * 1.96 * np.sqrt(2 / 3 / 27)
    assert width(frame[["study", "task", "seed", "x"]]) == pytest.approx(exact, rel=0.05)


def test_intervals_cover_prompts_where_rows_say_how_much_these_vary():
    frame = simulated(5, 4, deviations=(0.0, 0.0, 0.3)).assign(x=0.0, x_low=-0.588, x_high=0.588)
    assert width(frame) == pytest.approx(2 * 1.96 * 0.3 / np.sqrt(20), rel=0.05)
    assert width(frame.drop(columns=["x_low", "x_high"])) == 0
    logs = np.exp(frame[["x", "x_low", "x_high"]])
    row = summarize(frame.assign(**logs), ["study"], ["x"], log=True).iloc[0]
    assert np.log(row["x_high"] / row["x_low"]) == pytest.approx(width(frame), rel=1e-9)
    near_one = frame.assign(x=0.999, x_low=0.9, x_high=1.0)
    assert summarize(near_one, ["study"], ["x"]).iloc[0]["x_high"] == 1.0


def test_rows_of_one_task_and_seed_are_no_seeds():
    frame = simulated(4, 2).assign(model="a")
    other = frame.assign(model="b", x=frame["x"] + 0.2, x_low=frame["x_low"] + 0.2, x_high=frame["x_high"] + 0.2)
    one = summarize(frame, ["study"], ["x"]).iloc[0]
    both = summarize(pd.concat([frame, other]), ["study"], ["x"]).iloc[0]
    assert [both[key] - one[key] for key in ("x", "x_low", "x_high")] == pytest.approx([0.1] * 3)


def test_one_task_and_seed_has_no_interval():
    frame = pd.concat([simulated(1, 1), simulated(1, 1).assign(x=2.0)])
    row = summarize(frame, ["study"], ["x"]).iloc[0]
    assert row["x"] == pytest.approx(frame["x"].mean()) and np.isnan([row["x_low"], row["x_high"]]).all()


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(FileError, match="llvlit study"):
        load_results(tmp_path)
    assert Results((), ()).finished == ()


# Cost


class Operations(TorchDispatchMode):
    """Floating-point operations of the matrix products inside (torch's own counter hooks modules, which breaks
    derivatives with respect to leaves)."""

    def __enter__(self):
        self.total = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def test_minutes_are_those_that_the_study_took(monkeypatch):
    """At the rate of the fit, with prompts of typical length; `benchmarks/estimate.py` fits again, with their own."""
    monkeypatch.setattr("llvlit.study.estimate.tokens_of", lambda cell: 64.0)
    grid, cpu = load_grid("real"), torch.device("cpu")
    shapes = {name: model_shape(load_subject(name, device="cpu")) for name in grid.models}
    took = read_table(committed("real").parent, "seconds").set_index(["model", "task", "seed"])["seconds"]
    keys = [(cell.model, cell.task, cell.seed) for cell in grid.cells()]
    found = [60 * estimate(cell, shapes[cell.model], 110e9, device=cpu).minutes for cell in grid.cells()]
    ratio = pd.Series(found, index=pd.MultiIndex.from_tuples(keys)).reindex(took.index) / took
    assert 0.75 < (ratio * took).sum() / took.sum() < 1.33
    assert ratio.between(0.5, 2).all()


def test_counted_operations_are_those_that_torch_counts(data_dir):
    """Torch counts matrix products; ours adds nothing to them but rounded token counts and replay checks."""
    settings = Settings(concept=30, operating=12, evaluation=12, orders=(4,), bases=("krylov", "pca"), energy_prompts=2)
    cell = Cell("embedded/small", "one", 0, "jvp", False, settings, None, str(data_dir))
    model = load_subject("embedded/small", device="cpu")
    texts = [f"one {number} of {number + 3}: good" for number in range(60)]
    n_tokens = float(np.mean([len(model.tokenizer(text)["input_ids"]) for text in texts]))
    with Operations() as counted:
        run_cell(cell, "cpu")
    predicted = count_operations(cell, model_shape(model), n_tokens)
    assert 0.6 < predicted / counted.total < 1.6


def test_two_threads_of_a_process_load_one_model_at_a_time(monkeypatch):
    events: list[str] = []
    second_loads = threading.Event()
    settings = Settings(concept=10, operating=4, evaluation=4)
    small, medium = (
        Cell(f"embedded/{size}", "film-sentiment", 0, "jvp", False, settings) for size in ("small", "medium")
    )
    thread = threading.Thread(target=run_cell, args=(medium, "cpu"), daemon=True)

    def load(name: str, **options: object) -> LanguageModel:
        events.append(f"{name} loads")
        if name == medium.model:
            second_loads.set()
        return load_model(name, **options)

    def run(model: LanguageModel, *_: object, **__: object) -> None:
        if model.name == small.model:
            thread.start()
            second_loads.wait(2)
        events.append(f"{model.name} has run")
        raise ConceptNotVisibleError("enough")

    forget()
    monkeypatch.setattr("llvlit.study.cells.load_model", load)
    monkeypatch.setattr("llvlit.study.cells.run_experiment", run)
    run_cell(small, "cpu")
    thread.join(60)
    assert events == [f"embedded/{size} {what}" for size in ("small", "medium") for what in ("loads", "has run")]


def test_a_device_out_of_memory_says_to_run_fewer_workers(monkeypatch):
    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.91 GiB. GPU 0 has a total capacity ...")

    monkeypatch.setattr("llvlit.study.cells.run_experiment", no_room)
    settings = Settings(concept=10, operating=4, evaluation=4)
    cell = Cell("embedded/small", "film-sentiment", 0, "jvp", False, settings)
    with pytest.raises(CellError, match=r"film-sentiment does not fit .* fewer --workers"):
        run_cell(cell, "cpu")
