"""A study keeps what it has finished; profiles name their parts; figures refuse to be mute."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import PROMPTS

from llvlit import figures
from llvlit.errors import FileError, InputError, NumericalError
from llvlit.profiles import load_profile
from llvlit.study import Experiment, Settings, run_experiment, run_study
from llvlit.tasks import Splits

SETTINGS = Settings(order=4, concept=3, operating=3, evaluation=3)


@pytest.fixture(scope="module")
def experiment(gpt2):
    return run_experiment(gpt2, "toy", SETTINGS, splits=Splits(PROMPTS, PROMPTS, PROMPTS))


def test_an_experiment_holds_every_predictor_and_where_it_comes_from(experiment, gpt2):
    assert set(experiment.profiles) == {"measured", "adjoint", "krylov", "reachability", "random", "null"}
    assert all(len(profile) == gpt2.n_layers for profile in experiment.profiles.values())
    assert set(experiment.agreements) == set(experiment.profiles) - {"measured"}
    assert experiment.metadata["model_fingerprint"] == gpt2.fingerprint
    assert {"torch", "llvlit", "commit", "device", "seconds"} <= set(experiment.metadata)


def test_an_experiment_survives_saving(experiment, tmp_path):
    experiment.save(tmp_path / "result.json")
    assert Experiment.load(tmp_path / "result.json") == experiment


@pytest.mark.parametrize("damage", ["cut", "version", "kind", "absent"])
def test_a_damaged_result_is_refused_by_name(experiment, tmp_path, damage):
    path = tmp_path / "result.json"
    experiment.save(path)
    if damage == "cut":
        path.write_text(path.read_text()[:200])
    elif damage == "absent":
        path.unlink()
    else:
        key, value = {"version": ("format", 99), "kind": ("kind", "gains")}[damage]
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(FileError, match=r"result\.json"):
        Experiment.load(path)


def test_profiles_are_known_or_folders_of_models(tmp_path):
    assert load_profile("paper").models == ("gpt2", "gpt2-medium", "gpt2-large")
    assert len(load_profile("paper").tasks) == 10
    with pytest.raises(InputError, match="embedded"):
        load_profile("embeded")
    with pytest.raises(InputError, match="no model"):
        load_profile(str(tmp_path))
    for name, size in (("big", 20), ("little", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * size)
    models = load_profile(str(tmp_path)).models
    assert [figures.short_name(model) for model in models] == ["little", "big"]


@pytest.mark.parametrize("missing", ["name", "alt", "caption"])
def test_a_figure_without_name_alt_or_caption_is_refused(missing):
    figure, _ = figures.new()
    words = {"name": "fig-a", "alt": "A line.", "caption": "What to see.", missing: " "}
    with pytest.raises(InputError, match=missing):
        figures.show(figure, **words)


def test_measured_is_solid_predicted_dashed_and_layers_are_named():
    _, (axes,) = figures.new()
    figures.gain_profile(
        np.arange(5.0), [np.zeros(5), np.ones(5)], {"krylov": np.ones(5), "mine": np.ones(5)}, axes=axes
    )
    styles = {line.get_label(): line.get_linestyle() for line in axes.get_lines()}
    assert styles == {"measured": "-", "krylov": "--", "mine": "--"}
    assert axes.get_xlabel() == "Layer"
    assert "Gain" in axes.get_ylabel()


def test_a_concept_that_a_model_does_not_show_does_not_stop_a_study(monkeypatch, tmp_path):
    def invisible(*_args):
        raise NumericalError("not visible")

    monkeypatch.setattr("llvlit.study.run_experiment", invisible)
    monkeypatch.setattr("llvlit.study.load_model", lambda *_args, **_options: None)
    seen = []
    assert run_study(["m"], ["a", "b"], SETTINGS, tmp_path, on_failure=lambda *what: seen.append(what[:2])) == []
    assert seen == [("m", "a"), ("m", "b")]
    with pytest.raises(NumericalError):
        run_study(["m"], ["a"], SETTINGS, tmp_path)
