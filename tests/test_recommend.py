"""Outputs in the logits, the Fisher metric, and what is recommended from them: against the full model with hooks."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import llvlit
from conftest import PROMPTS as SIX
from conftest import byte_tokenizer, tiny_model, tiny_module
from llvlit.engine import depth
from llvlit.engine.models import LanguageModel, wrap_model
from llvlit.errors import FileError, InputError, NumericalError
from llvlit.method import plans, recommendation
from llvlit.method.concepts import as_directions, random_directions
from llvlit.method.effects import push_effects, sources, with_continuations
from llvlit.method.fisher import responses
from llvlit.method.plans import Prediction, SecondOrder, expected, positive
from llvlit.method.recommendation import load_recommendation

DIRECTIONS = random_directions(5, 24, seed=1)
ODDS = llvlit.TokenContrast(["g", "a"], ["b", "d"], space=False)
INPUTS = np.array([0.4, -0.3, 0.5, 0.2])
PROMPTS = SIX.select([0, 2, 4])
KINDS = ("gpt2", "llama", "gemma3_text")
WORDS = ("joy", "woe", "fun", "war", "art", "mud", "ice", "tea")
EIGHT = llvlit.Prompts([f"a film of {word}" for word in WORDS], [0, 1] * 4)


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> LanguageModel:
    return tiny_model(request.param)


def log_chances(model: LanguageModel, text: str, inputs: np.ndarray, positions: str) -> torch.Tensor:
    """Of the next token, from the model's own forward pass with hooks."""
    ids = llvlit.tokenize(model, llvlit.Prompts([text], [1])).ids
    with llvlit.steer(model, DIRECTIONS, inputs, positions=positions), torch.no_grad():
        return model.module(input_ids=torch.tensor(ids)).logits[0, -1].double().log_softmax(dim=-1)


def odds(log_chances: torch.Tensor) -> float:
    ids = [[byte_tokenizer()(word)["input_ids"][0] for word in words] for words in ("ga", "bd")]
    return float(log_chances[ids[0]].logsumexp(0) - log_chances[ids[1]].logsumexp(0))


def own_effects(model: LanguageModel, advice: llvlit.Recommendation) -> np.ndarray:
    """Mean shift and divergence of each plan at the prompts that it was made from, ``(2, n_plans)``."""
    texts, vectors = (
        with_continuations(model, llvlit.tokenize(model, EIGHT), advice.horizon),
        advice.directions.on(model),
    )
    head, source = sources(model, texts, vectors, advice.output)
    inputs = np.stack([plan.inputs for plan in (advice.plan, *advice.alternatives)])
    options = {"everywhere": advice.positions == "all", "horizon": advice.horizon}
    every = np.broadcast_to(inputs, (len(texts), *inputs.shape))
    return np.stack(push_effects(head, texts, vectors, every, source, **options)).mean(axis=1)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_the_metric_is_the_divergence_of_small_pushes_and_no_more(model, positions):
    metric = llvlit.fisher_metric(model, PROMPTS, DIRECTIONS, positions=positions)
    foretold = metric.kl(INPUTS)
    errors = []
    for size in (4e-2, 4e-3):
        found = []
        for text in PROMPTS.texts:
            plain, pushed = (log_chances(model, text, scale * INPUTS, positions) for scale in (0.0, size))
            found.append(float((plain.exp() * (plain - pushed)).sum()) / size**2)
        errors.append(np.abs(np.array(found) / foretold - 1).max())
    rounding = 1e-5 if model.name == "tiny-gpt2" else 5e-3  # the others take norms in float32
    assert errors[0] < 0.3  # of second order in the push, with an error of third
    assert errors[1] < 0.2 * errors[0] + rounding


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("output", [None, ODDS, llvlit.LogitReadout({3: 1.0, 7: -2.0})], ids=["v", "odds", "sum"])
def test_gains_of_an_output_are_the_slopes_of_the_full_model(model, output, positions):
    gains = llvlit.adjoint_gains(model, PROMPTS, DIRECTIONS, output=output, positions=positions)
    slopes, size = np.empty(gains.per_prompt.shape), 1e-3  # norms in float32 round at less
    for row, text in enumerate(PROMPTS.texts):
        for layer, unit in enumerate(np.eye(4)):
            values = []
            for sign in (1, -1):
                ids = torch.tensor(llvlit.tokenize(model, llvlit.Prompts([text], [1])).ids)
                states: list[torch.Tensor] = []
                hook = model.layers[-1].register_forward_hook(
                    lambda _, __, out, states=states: states.append(out[0] if isinstance(out, tuple) else out)
                )
                with llvlit.steer(model, DIRECTIONS, sign * size * unit, positions=positions), torch.no_grad():
                    logits = model.module(input_ids=ids).logits[0, -1].double()
                hook.remove()
                last = states[0][0, -1].double() @ DIRECTIONS[-1]
                read = {"TokenContrast": odds, "LogitReadout": lambda x: x[3] - 2 * x[7]}.get(type(output).__name__)
                values.append(float(read(logits)) if read else float(last))
            slopes[row, layer] = (values[0] - values[1]) / (2 * size)
    np.testing.assert_allclose(gains.per_prompt, slopes, rtol=0, atol=2e-3 * np.abs(slopes).max())
    if positions == "last":
        measured = llvlit.measured_gains(model, PROMPTS, DIRECTIONS, output=output, amplitude=3e-3)
        np.testing.assert_allclose(measured.per_prompt, gains.per_prompt, atol=5e-3 * np.abs(slopes).max())


@pytest.mark.parametrize("everywhere", [False, True])
def test_gains_over_a_continuation_are_those_of_steered_generation(everywhere):
    model, horizon, size = tiny_model("llama"), 3, 1e-3
    prompts = llvlit.tokenize(model, llvlit.Prompts(["the film was", "a day"], [1, 0]))
    texts = with_continuations(model, prompts, horizon)
    assert [len(ids) for ids in texts.ids] == [len(ids) + horizon - 1 for ids in prompts.ids]
    vectors = DIRECTIONS.to(model.dtype)
    slopes = np.empty((2, 4))
    for rows, _, tangents in responses(model, texts, vectors, everywhere=everywhere, horizon=horizon):
        slopes[rows] = (tangents.double() @ vectors[-1].double()).mean(dim=1).numpy()
    for row, ids in enumerate(texts.ids):
        for layer, unit in enumerate(np.eye(4)):
            ends = []
            for sign in (1, -1):  # prompt first, then token by token through the cache, as generation goes
                parts = [[ids]] if everywhere else [[ids[:-horizon]], *([[each]] for each in ids[-horizon:])]
                read, cache = [], None
                hook = model.layers[-1].register_forward_hook(lambda _, __, out, read=read: read.append(out))
                for number, part in enumerate(parts):
                    pushed = sign * size * unit if everywhere or number else 0 * unit
                    with llvlit.steer(model, DIRECTIONS, pushed, positions="all"), torch.no_grad():
                        cache = model.module(
                            input_ids=torch.tensor(part), past_key_values=cache, use_cache=True
                        ).past_key_values
                hook.remove()
                every = torch.cat([out[0] if isinstance(out, tuple) else out for out in read], dim=1)
                ends.append(float((every[0, -horizon:].double() @ vectors[-1].double()).mean()))
            assert slopes[row, layer] == pytest.approx((ends[0] - ends[1]) / (2 * size), rel=5e-3, abs=5e-3)


def test_a_continuation_passes_over_all_ends_of_a_text():
    model = tiny_model("llama")
    prompts = llvlit.tokenize(model, llvlit.Prompts(["the film was", "a day"], [1, 0]))
    ends = [with_continuations(model, prompts, 2).ids[0][-1]]
    model.module.generation_config.eos_token_id = ends
    ends.append(with_continuations(model, prompts, 2).ids[0][-1])
    assert ends[1] != ends[0] != with_continuations(model, prompts, 2).ids[0][-1] != ends[1]


def test_odds_are_those_of_the_next_token(gpt2):
    expected = [odds(log_chances(gpt2, text, 0 * INPUTS, "last")) for text in PROMPTS.texts]
    from llvlit.engine.depth import last_token_states
    from llvlit.method.outputs import reading

    tokens = llvlit.tokenize(gpt2, PROMPTS)
    states = last_token_states(gpt2, tokens)[:, -1]
    found = reading(gpt2, tokens, DIRECTIONS[-1], ODDS).values(states)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)


@pytest.mark.filterwarnings("ignore:budget=")
@pytest.mark.parametrize("options", [{}, {"positions": "all"}, {"horizon": 2}], ids=["last", "all", "horizon"])
def test_a_recommendation_meets_its_budget_at_prompts_like_its_own(options):
    model = tiny_model("llama")
    advice = llvlit.recommend(model, EIGHT, DIRECTIONS, budget=0.02, output=ODDS, **options)
    assert advice.kl.value == pytest.approx(0.02, rel=0.3)
    assert advice.shift.value > 0
    np.testing.assert_allclose(own_effects(model, advice)[1], 0.02, rtol=plans.OFF)
    assert all(other.kl.value == pytest.approx(0.02, rel=0.05) for other in advice.alternatives)
    shifts = [other.shift.value for other in advice.alternatives]
    assert shifts == sorted(shifts, reverse=True)
    others = llvlit.Prompts([f"a film of {word}" for word in ["law", "sun", "oak", "rye"]], [0, 1] * 2)
    check = advice.verify(model, others)
    plain = [log_chances(model, text, 0 * INPUTS, "last") for text in others.texts]
    if advice.horizon == 1:  # measured again by hooks
        pushed = [log_chances(model, text, advice.inputs, advice.positions) for text in others.texts]
        cost = [float((p.exp() * (p - q)).sum()) for p, q in zip(plain, pushed, strict=True)]
        np.testing.assert_allclose(check.per_prompt[1], cost, rtol=1e-4)
        moved = [odds(q) - odds(p) for p, q in zip(plain, pushed, strict=True)]
        np.testing.assert_allclose(check.per_prompt[0], moved, rtol=1e-4)
    assert check.corrected.target == 0.02
    assert check.corrected.kl.value == pytest.approx(0.02)
    again = check.corrected.verify(model, others)
    assert again.kl.value == pytest.approx(0.02, rel=0.1)
    assert again.corrected.verify(model, others).kl.value == pytest.approx(0.02, rel=0.1)


def test_a_few_prompts_are_recorded_once(monkeypatch):
    model, calls = tiny_model("gpt2"), []
    run = depth.run_all_tokens
    monkeypatch.setattr(depth, "run_all_tokens", lambda *given: calls.append(len(given[1])) or run(*given))
    llvlit.recommend(model, EIGHT, DIRECTIONS, budget=0.01)
    assert sorted(calls) == [1] * 4 + [8] * 4  # the head's check, and the prompts


@pytest.mark.filterwarnings("ignore:.*trust radius")
def test_what_is_asked_for_is_kept():
    model = tiny_model("llama")
    along = replace(as_directions(DIRECTIONS), borrowed=np.array([True, False, False, False, False]))
    advice = llvlit.recommend(model, EIGHT, along, budget=0.02, layers=(0, 2))
    assert advice.inputs[0] == advice.inputs[3] == 0  # borrowed, and not allowed
    assert set(advice.layers) <= {1, 2}
    down = llvlit.recommend(model, EIGHT, along, budget=0.02, towards="negative")
    assert down.shift.value < 0
    half = llvlit.recommend(model, EIGHT, along, shift=down.shift.value / 2)
    assert half.shift.value == pytest.approx(down.shift.value / 2, rel=0.3)
    assert half.kl.value < down.kl.value
    free = llvlit.recommend(model, EIGHT, along, budget=0.01)
    limit = 0.7 * (np.abs(free.inputs) / free.sizes).max()
    bound = llvlit.recommend(model, EIGHT, along, budget=0.01, limit=limit)
    assert (np.abs(bound.inputs) / bound.sizes).max() <= limit * (1 + 1e-9)
    assert bound.kl.value == pytest.approx(0.01, rel=0.2)
    with pytest.raises(InputError, match=r"limit=.*Ask for less"):
        llvlit.recommend(model, EIGHT, along, budget=0.5, limit=1e-3)


@pytest.mark.filterwarnings("ignore:.*trust radius")
def test_what_was_aimed_at_is_scaled_and_not_what_is_expected():
    model = tiny_model("gpt2")
    for aim, power in (({"budget": 0.02}, 2), ({"shift": 0.3}, 1)):
        advice = llvlit.recommend(model, EIGHT, DIRECTIONS, **aim)
        advice = replace(advice, plan=replace(advice.plan, shift=advice.alternatives[0].shift, kl=Prediction(1, 1, 1)))
        assert advice.scaled(1.0).target == advice.target == next(iter(aim.values()))
        assert advice.scaled(-3.0).target == pytest.approx((-3.0) ** power * advice.target)


def test_the_optimum_of_the_second_order_beats_any_other_shape_there():
    model = tiny_model("gpt2")
    advice = llvlit.recommend(model, EIGHT, DIRECTIONS, budget=1e-4)
    h, F = advice.gains.mean, advice.fisher.mean

    def per_nat(u):
        return h @ u / np.sqrt(u @ F @ u)

    best = per_nat(np.linalg.solve(F, h))
    every = (advice.plan, *advice.alternatives)
    closest = next(plan for plan in every if plan.name.endswith("0.001"))
    assert per_nat(closest.inputs) >= max(per_nat(plan.inputs) for plan in every) * (1 - 1e-9)
    assert best * 0.9 < per_nat(closest.inputs) <= best * (1 + 1e-9)


def test_a_saved_recommendation_is_the_same_or_refused(tmp_path):
    model = tiny_model("gpt2")
    advice = llvlit.recommend(model, EIGHT, DIRECTIONS, budget=0.02, output=ODDS)
    advice.save(tmp_path / "plan")
    loaded = load_recommendation(tmp_path / "plan")
    assert str(loaded) == str(advice)
    np.testing.assert_array_equal(loaded.inputs, advice.inputs)
    assert [plan.name for plan in loaded.alternatives] == [plan.name for plan in advice.alternatives]
    others = llvlit.Prompts([f"a film of {word}" for word in ["law", "sun", "oak", "rye"]], [0, 1] * 2)
    np.testing.assert_array_equal(loaded.verify(model, others).per_prompt, advice.verify(model, others).per_prompt)
    manifest = json.loads((tmp_path / "plan" / "manifest.json").read_text())
    assert {"site", "positions", "hidden_size"} <= set(manifest)
    told = (tmp_path / "plan" / "manifest.json").read_text()
    (tmp_path / "plan" / "manifest.json").write_text(told.replace(manifest["sha256"], "0" * 64))
    with pytest.raises(FileError, match="manifest"):
        load_recommendation(tmp_path / "plan")
    (tmp_path / "plan" / "manifest.json").write_text(told)
    stored = tmp_path / "plan" / "plan.safetensors"
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    with pytest.raises(FileError, match="checksum"):
        load_recommendation(tmp_path / "plan")
    with pytest.raises(InputError, match="other weights"):
        advice.verify(tiny_model("gpt2", seed=1), others)
    with pytest.raises(InputError, match="made from"):
        advice.verify(model, EIGHT)


def test_a_manifest_is_as_it_was_written_wherever_the_folder_is_read(tmp_path):
    advice = llvlit.recommend(tiny_model("gpt2"), EIGHT, DIRECTIONS, budget=0.02)
    advice.save(tmp_path / "plan")
    (tmp_path / "link").symlink_to(tmp_path / "plan")
    (tmp_path / "plan" / ".git").mkdir()
    (tmp_path / "plan" / "notes.txt").write_text("of others")
    for folder in ("plan", "link"):
        assert str(load_recommendation(tmp_path / folder)) == str(advice)
        with pytest.raises(FileError):  # read, never replaced
            advice.save(tmp_path / folder)
    path = tmp_path / "plan" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["layers"] == list(advice.layers) and manifest["in words"] == str(advice)
    for name, value in manifest.items():
        for others in ({name: [value]}, {"more": 1}):
            path.write_text(json.dumps({**manifest, **others}))
            with pytest.raises(FileError, match="manifest"):
                load_recommendation(tmp_path / "plan")


def test_numbers_of_numpy_are_kept_as_pythons_own(tmp_path):
    model = tiny_model("gpt2")
    given = {"limit": np.float32(0.5), "horizon": np.int64(2), "max_tokens": np.int64(128), "budget": np.float32(0.02)}
    advice = llvlit.recommend(model, EIGHT, DIRECTIONS, layers=(np.int64(1), np.int64(3)), **given)
    advice.save(tmp_path / "plan")
    loaded = load_recommendation(tmp_path / "plan")
    assert (loaded.horizon, loaded.metadata["limit"], loaded.metadata["max_tokens"]) == (2, 0.5, 128)
    assert loaded.vectors.metadata["horizon"] == 2
    remade = replace(loaded, horizon=np.int64(2), target=np.float64(0.5))
    assert type(remade.horizon) is int and type(remade.target) is float


def test_words_and_budgets_that_cannot_be_used_are_told(gpt2):
    with pytest.raises(InputError, match="among the positive"):
        llvlit.TokenContrast(["a"], ["a"])
    with pytest.raises(InputError, match="first_tokens"):
        llvlit.TokenContrast(["good"], ["bad"], space=False).tokens(gpt2)
    for first_tokens in (False, True):  # as one token for each byte has it: all words would be read at the space
        with pytest.raises(InputError, match="'good' begins with a bare space"):
            llvlit.TokenContrast(["good"], ["bad"], first_tokens=first_tokens).tokens(gpt2)
    with pytest.raises(InputError, match="same token"):
        llvlit.TokenContrast(["good"], ["great"], space=False, first_tokens=True).tokens(gpt2)
    with pytest.raises(InputError, match="all zero"):
        llvlit.LogitReadout({3: 0.0})
    with pytest.raises(InputError, match="token 900"):
        llvlit.adjoint_gains(gpt2, PROMPTS, DIRECTIONS, output=llvlit.LogitReadout({900: 1.0}))
    with pytest.raises(InputError, match="final_norm"):
        llvlit.adjoint_gains(gpt2, PROMPTS, DIRECTIONS, output=ODDS, final_norm=True)
    for budget in (0.0, -1.0, np.nan):
        with pytest.raises(InputError, match="budget"):
            llvlit.recommend(gpt2, EIGHT, DIRECTIONS, budget=budget)
    with pytest.raises(InputError, match="independent"):
        llvlit.recommend(gpt2, EIGHT.select([0, 1]), DIRECTIONS)
    with pytest.warns(UserWarning, match="trust radius"):
        llvlit.recommend(gpt2, EIGHT, DIRECTIONS, budget=2.0)


def test_no_sentence_holds_a_divergence_below_zero(gpt2):
    advice = llvlit.recommend(gpt2, EIGHT, DIRECTIONS, budget=0.02)
    for low, high, told in (
        (0.00026, 0.0064, r"at 0\.0013 \(0\.00026 to 0\.0064\) nats"),
        (0.0010, 0.0016, r"at 0\.00130 ± 0\.00030 nats"),
    ):
        assert re.search(told, str(replace(advice, plan=replace(advice.plan, kl=Prediction(0.0013, low, high)))))


def test_words_are_looked_up_once(monkeypatch):
    model, looked_up = tiny_model("gpt2"), []
    tokens = llvlit.tokenize(model, EIGHT)
    monkeypatch.setattr(llvlit.TokenContrast, "tokens", lambda *_: looked_up.append(1) or ((3, 4), (5,)))
    llvlit.recommend(model, tokens, DIRECTIONS, budget=0.01, output=ODDS)
    assert len(looked_up) == 1


@pytest.mark.parametrize("method", ["linear", "measured"])
def test_an_output_that_does_not_fit_is_refused_before_the_matrix_is_computed(gpt2, monkeypatch, method):
    for name in ("sweep", "propagate_beside"):
        monkeypatch.setattr(f"llvlit.method.gain_matrix.{name}", lambda *_, **__: pytest.fail("computed first"))
    with pytest.raises(InputError, match="token 900"):
        llvlit.gain_matrix(gpt2, PROMPTS, DIRECTIONS, method=method, output=llvlit.LogitReadout({900: 1.0}))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_a_push_makes_infinite_are_told(kind):
    model = tiny_model(kind, dtype=torch.float32, tie_word_embeddings=False)
    states: list[torch.Tensor] = []
    head = model.module.lm_head
    with torch.no_grad():
        hook = head.register_forward_pre_hook(lambda _, given: states.append(given[0][0, -1].double()))
        for ids in llvlit.tokenize(model, EIGHT).ids:
            model.module(input_ids=torch.tensor([ids]))
        hook.remove()
        row = -torch.stack(states).mean(dim=0)  # a word that is never likely, at the edge of the largest number
        head.weight[3] = row * (3.39e38 / max(abs(float(row @ state)) for state in states))
    with pytest.raises(NumericalError, match="not finite"):
        llvlit.recommend(model, EIGHT, DIRECTIONS, budget=0.2)
    with torch.no_grad():
        head.weight[3] = -float("inf")
    with pytest.raises(NumericalError, match="not finite"):
        llvlit.recommend(model, EIGHT, DIRECTIONS, budget=0.2)


def test_what_is_sure_of_its_next_token_has_no_budget():
    model = tiny_model("gpt2", tie_word_embeddings=False)
    with torch.no_grad():
        model.module.lm_head.weight.mul_(1e6)
    with pytest.raises(NumericalError, match="sure of one token"):
        llvlit.recommend(model, EIGHT, DIRECTIONS, budget=0.2)


@pytest.mark.parametrize("shift", [60.0, 1e6])
def test_a_shift_far_beyond_the_states_is_beyond_the_trust_radius(gpt2, shift):
    with pytest.warns(UserWarning, match=r"shift=.* beyond the trust radius: .* up to \S+ times"):
        llvlit.recommend(gpt2, EIGHT, DIRECTIONS, shift=shift)


def test_every_result_reads_the_output_it_is_asked_for(gpt2):
    gains = llvlit.adjoint_gains(gpt2, PROMPTS, DIRECTIONS, output=ODDS)
    for method in ("linear", "measured"):
        matrix = llvlit.gain_matrix(gpt2, PROMPTS, DIRECTIONS, output=ODDS, method=method, amplitude=1e-3)
        plain = llvlit.gain_matrix(gpt2, PROMPTS, DIRECTIONS, method=method, amplitude=1e-3)
        np.testing.assert_allclose(matrix.per_prompt[:, :, -1], gains.per_prompt, atol=1e-5)
        np.testing.assert_array_equal(matrix.per_prompt[:, :, :-1], plain.per_prompt[:, :, :-1])
    shape, target = np.array([0.0, 1.0, 1.0, 0.0]), 0.05
    cost = llvlit.required_energy(gpt2, PROMPTS, DIRECTIONS, shape, target, output=ODDS)
    for text, scale in zip(PROMPTS.texts, cost.scale, strict=True):
        plain, pushed = (log_chances(gpt2, text, size * shape, "last") for size in (0.0, scale))
        assert odds(pushed) - odds(plain) == pytest.approx(target, rel=2e-3)
    trust = llvlit.trust_radius(gpt2, PROMPTS, DIRECTIONS, shape, coverage=0.5, output=ODDS)
    np.testing.assert_allclose(trust.slope, gains.per_prompt @ shape, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*trust radius")
def test_what_a_format_cannot_say_is_solved_away(tmp_path):
    model = tiny_model("llama")
    advice = llvlit.recommend(model, EIGHT, DIRECTIONS, budget=0.02, output=ODDS)
    with pytest.raises(InputError, match="cannot say"):
        advice.export(tmp_path / "push.gguf")
    other = tiny_model("llama", hidden_size=32, head_dim=8)
    with pytest.raises(InputError, match="for tiny-llama with other weights"):
        advice.export(tmp_path / "push.gguf", model=other, prompts=EIGHT)
    assert advice.export(tmp_path / "push.json", format="easysteer", model=model, prompts=EIGHT).inputs[0] == 0
    written = advice.export(tmp_path / "push.gguf", model=model, prompts=EIGHT)
    assert written.positions == "all"
    assert not written.inputs[:2].any()
    assert written.kl.value == pytest.approx(0.02, rel=0.3)
    assert written.export(tmp_path / "again.gguf") is written
    read = llvlit.import_vectors(tmp_path / "push.gguf")
    with (
        pytest.raises(InputError, match=r"\(5, 24\); tiny-llama needs .* \(5, 32\)"),
        llvlit.steer(other, read.directions, read.inputs, positions="all"),
    ):
        pass
    for text in EIGHT.texts[:2]:
        ids = torch.tensor(llvlit.tokenize(model, llvlit.Prompts([text], [1])).ids)
        with llvlit.steer(model, read.directions, read.inputs, positions="all"), torch.no_grad():
            found = model.module(input_ids=ids).logits[0, -1].double().log_softmax(dim=-1)
        torch.testing.assert_close(found, log_chances(model, text, written.inputs, "all"), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*trust radius")
def test_a_place_that_cannot_be_written_is_refused_before_a_plan_is_made_for_it(tmp_path, monkeypatch):
    model = tiny_model("llama")
    advice = llvlit.recommend(model, EIGHT, DIRECTIONS, budget=0.02)
    faint = replace(advice, plan=replace(advice.plan, inputs=np.array([0.0, 1e-3, 1.0, 0.0])))
    with pytest.raises(InputError, match=r"pushes before layer 1\. Pass model and prompts"):
        faint.export(tmp_path / "push.gguf")
    (tmp_path / "notes.txt").write_text("notes")
    monkeypatch.setattr(recommendation, "recommend", lambda *_, **__: pytest.fail("planned first"))
    for place in (tmp_path / "notes.txt", tmp_path, tmp_path / "notes.txt" / "push.gguf"):
        with pytest.raises(FileError, match=place.name):
            advice.export(place, model=model, prompts=EIGHT)
    assert (tmp_path / "notes.txt").read_text() == "notes" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.filterwarnings("ignore:.*trust radius")
def test_what_cannot_be_met_or_resolved_is_refused_and_never_promised(gpt2):
    for budget in (0.3, 2.0):
        advice = llvlit.recommend(gpt2, EIGHT, DIRECTIONS, budget=budget)
        np.testing.assert_allclose(own_effects(gpt2, advice)[1], budget, rtol=plans.OFF)
    with pytest.raises(InputError, match="No plan meets a budget of 20 nats"):
        llvlit.recommend(gpt2, EIGHT, DIRECTIONS, budget=20.0)
    with pytest.raises(InputError, match=r"shift=1e-14.*rounding"):
        llvlit.recommend(gpt2, EIGHT, DIRECTIONS, shift=1e-14)
    with pytest.raises(InputError, match="budget"):
        llvlit.recommend(gpt2, EIGHT, DIRECTIONS, budget=1e-12)


@pytest.mark.filterwarnings("ignore:.*trust radius")
@pytest.mark.parametrize("aim", [{"budget": 0.05}, {"shift": 1.5}], ids=["budget", "shift"])
def test_plans_meet_their_aim_however_strong_the_second_order_would_have_them(gpt2, monkeypatch, aim):
    usual, strength = llvlit.recommend(gpt2, EIGHT, DIRECTIONS, **aim), SecondOrder.strength
    monkeypatch.setattr(SecondOrder, "strength", lambda *given: 30 * strength(*given))
    advice = llvlit.recommend(gpt2, EIGHT, DIRECTIONS, **aim)
    names = [sorted(plan.name for plan in (each.plan, *each.alternatives)) for each in (usual, advice)]
    assert names[0] == names[1]
    for each in (usual, advice):  # one shape has next to no gain, and its curve is far from a power
        np.testing.assert_allclose(own_effects(gpt2, each)[int(each.aim == "kl")], each.target, rtol=plans.OFF)
    monkeypatch.setattr(plans, "OFF", 0.0)  # then all meet it as they were measured
    exact = llvlit.recommend(gpt2, EIGHT, DIRECTIONS, **aim)
    told = [getattr(plan, exact.aim).value for plan in exact.alternatives]
    np.testing.assert_allclose(told, own_effects(gpt2, exact)[int(exact.aim == "kl"), 1:], rtol=1e-6)
    monkeypatch.setattr(plans, "OFF", np.inf)  # of the other, what was expected at other prompts
    before = llvlit.recommend(gpt2, EIGHT, DIRECTIONS, **aim)
    other = ("shift", "kl")[exact.aim == "shift"]
    spreads = [
        {plan.name: getattr(plan, other).high / getattr(plan, other).value for plan in (each.plan, *each.alternatives)}
        for each in (before, exact)
    ]
    assert spreads[1] == pytest.approx(spreads[0], rel=5e-3)


@pytest.mark.filterwarnings("ignore:.*trust radius")
def test_plans_are_pushed_once_more_than_they_compete(gpt2, monkeypatch):
    pushed = []
    real = recommendation.push_effects
    monkeypatch.setattr(
        recommendation, "push_effects", lambda *given, **options: pushed.append(given[3]) or real(*given, **options)
    )
    n_plans = 1 + len(llvlit.recommend(gpt2, EIGHT, DIRECTIONS, budget=1e-4).alternatives)
    compete, check, *corrections, trust = (inputs.shape[1] for inputs in pushed)
    assert (compete, check, trust) == (4 * n_plans, n_plans, 4)
    assert len(corrections) <= 2 and max(corrections, default=0) <= 3 * n_plans
    pushed.clear()
    monkeypatch.setattr(plans, "OFF", np.inf)
    llvlit.recommend(gpt2, EIGHT, DIRECTIONS, budget=1e-4)
    assert [inputs.shape[1] for inputs in pushed] == [compete, check, trust]


@pytest.mark.filterwarnings("ignore:.*float16")
def test_a_plan_that_drowns_in_16_bits_is_refused_before_all_prompts_are_computed(monkeypatch):
    model, seen = tiny_model("gpt2", dtype=torch.float16), []
    first_order = recommendation.responses
    monkeypatch.setattr(
        recommendation,
        "responses",
        lambda *given, **options: seen.append(len(given[1])) or first_order(*given, **options),
    )
    with pytest.raises(InputError, match=r"budget=1e-05 .*float16.* smallest usable is 9.6e-05"):
        llvlit.recommend(model, EIGHT, DIRECTIONS, budget=1e-5)
    with pytest.raises(InputError, match=r"budget=0.005 .*bfloat16.* smallest usable is 0.0062"):
        llvlit.recommend(tiny_model("gpt2", dtype=torch.bfloat16), EIGHT, DIRECTIONS, budget=0.005)
    monkeypatch.setattr(recommendation, "DROWNED", 0.0)  # a surer model's pushes are weaker
    with pytest.raises(InputError, match=r"push.*float16"):
        llvlit.recommend(model, EIGHT, DIRECTIONS, budget=1e-7)
    with pytest.raises(InputError, match=r"limit=0.001.*float16"):
        llvlit.recommend(model, EIGHT, DIRECTIONS, limit=1e-3)
    assert seen == [1]
    assert llvlit.recommend(model, EIGHT, DIRECTIONS, budget=0.01).kl.value == pytest.approx(0.01, rel=0.2)
    assert seen == [1, 1, 8]


def test_the_trust_radius_of_a_weak_plan_does_not_drown_in_rounding():
    modules = [tiny_module("gpt2", dtype=torch.float32) for _ in range(2)]
    single, double = (wrap_model(module, byte_tokenizer()) for module in (modules[0], modules[1].double()))
    radii = []
    for model, shift in ((double, 1e-3), (single, 1e-4), (single, 1e-3), (single, 1e-2)):
        advice = llvlit.recommend(model, EIGHT, DIRECTIONS, shift=shift, layers=(2, 2))
        radii.append(advice.trust_radius * np.abs(advice.inputs).max())
    np.testing.assert_allclose(radii, radii[0], rtol=0.05)


@pytest.mark.filterwarnings("ignore:.*trust radius")
def test_limits_hold_layers_back_and_exports_keep_them(tmp_path):
    model = tiny_model("llama")
    alone = llvlit.recommend(model, EIGHT, DIRECTIONS, budget=0.02, layers=(2, 2))
    needed = (np.abs(alone.inputs) / alone.sizes).max()
    for room in (1.05, 1.5, 3.0):  # a limit that the plan meets changes nothing
        bound = llvlit.recommend(model, EIGHT, DIRECTIONS, budget=0.02, layers=(2, 2), limit=room * needed)
        np.testing.assert_allclose(bound.inputs, alone.inputs, rtol=0.02)
    written = bound.export(tmp_path / "push.gguf", model=model, prompts=EIGHT)
    assert written.layers == (2,)
    assert (np.abs(written.inputs) / written.sizes).max() <= 3.0 * needed * (1 + 1e-9)
    for layers in (2, (1, 2, 3), ()):
        with pytest.raises(InputError, match="layers"):
            llvlit.recommend(model, EIGHT, DIRECTIONS, layers=layers)


@pytest.mark.filterwarnings("ignore:.*trust radius")
def test_what_is_foretold_of_the_best_is_not_flattered_by_the_choice():
    model, generator = tiny_model("gpt2"), np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    texts = sorted({"a film of " + "".join(generator.choice(letters, 4)) for _ in range(150)})
    others = llvlit.Prompts(texts[:60], [0, 1] * 30)
    ahead = []
    for first in range(60, 140, 8):
        advice = llvlit.recommend(model, llvlit.Prompts(texts[first : first + 8], [0, 1] * 4), DIRECTIONS, budget=0.05)
        ahead.append(advice.shift.value / advice.verify(model, others).shift.value - 1)
    assert abs(np.mean(ahead)) < 2.5 * np.std(ahead) / np.sqrt(len(ahead))


@pytest.mark.parametrize("n_units", [6, 16])
@pytest.mark.parametrize("spread", ["log-normal, 0.6", "log-normal, 1", "squares"])
def test_an_interval_of_divergences_holds_the_mean_of_new_prompts(spread, n_units):
    generator = np.random.default_rng(0)
    draw = {
        "log-normal, 0.6": lambda shape: generator.lognormal(0, 0.6, shape),
        "log-normal, 1": lambda shape: generator.lognormal(0, 1, shape),
        "squares": lambda shape: generator.standard_normal(shape) ** 2,
    }[spread]
    seen, new = draw((2000, n_units)), draw((2000, n_units)).mean(axis=1)
    predictions = [positive(values, tuple(range(n_units))) for values in seen]
    held = np.mean([each.low <= mean <= each.high for each, mean in zip(predictions, new, strict=True)])
    assert 0.92 <= held <= 0.97
    assert all(each.value == pytest.approx(values.mean()) for each, values in zip(predictions, seen, strict=True))
    assert positive(np.full(n_units, 0.2), tuple(range(n_units))).high == pytest.approx(0.2)


def test_a_mean_is_that_of_prompts_whatever_the_size_of_units(monkeypatch):
    values, pairs = np.array([0.1, 0.2, 0.3, 0.4, 0.9, 1.6, 2.5, 3.6]), (0, 0, 0, 0, 0, 1, 2, 3)
    for kind in (expected, positive):
        assert kind(values, pairs).value == pytest.approx(values.mean())
        assert kind(np.full(8, 0.2), pairs).low == pytest.approx(0.2) == kind(np.full(8, 0.2), pairs).high
        twins = kind(values, (0, 0, 1, 1, 2, 2, 3, 3))
        assert vars(twins) == pytest.approx(vars(kind(values.reshape(4, 2).mean(axis=1), (0, 1, 2, 3))))
    monkeypatch.setattr(plans, "OFF", np.inf)
    advice = llvlit.recommend(tiny_model("gpt2"), replace(EIGHT, pairs=pairs), DIRECTIONS, budget=0.02)
    assert all(plan.kl.value == pytest.approx(0.02, rel=1e-3) for plan in advice.alternatives)


def test_prompts_of_another_kind_are_refused(gpt2):
    advice = llvlit.recommend(gpt2, EIGHT, DIRECTIONS, budget=0.01)
    others = [f"a film of {word}" for word in ("law", "sun")]
    with pytest.warns(UserWarning, match="suffix='!'"):
        advice.verify(gpt2, llvlit.Prompts([f"{text}!" for text in others], [0, 1], suffix="!"))
    with pytest.raises(InputError, match="token_index"):
        advice.verify(gpt2, llvlit.tokenize(gpt2, llvlit.Prompts(others, [0, 1]), token_index=-2))
    early = llvlit.recommend(gpt2, llvlit.tokenize(gpt2, EIGHT, token_index=-2), DIRECTIONS, budget=0.01)
    tokens = llvlit.tokenize(gpt2, llvlit.Prompts(others, [0, 1]), token_index=-2)
    raw = early.verify(gpt2, tokens.prompts)
    np.testing.assert_array_equal(raw.per_prompt, early.verify(gpt2, tokens).per_prompt)
    with pytest.raises(InputError, match="two"):
        advice.verify(gpt2, llvlit.Prompts(others, [0, 1], [7, 7]))
    assert advice.gains.metadata["horizon"] == 1
    with pytest.raises(ValueError, match="read-only"):
        advice.inputs[:] = 0
    matrix, other = (llvlit.gain_matrix(gpt2, EIGHT, DIRECTIONS, output=output) for output in (None, ODDS))
    with pytest.raises(InputError, match="reads"):
        matrix.missed_by(other)
