"""Limited inputs are the cheapest that are allowed; pushes at every token, optima and radii are the full model's."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize

from conftest import ARCHITECTURES, PROMPTS, WHOLE_PROMPTS, affine_model, tiny_model
from llvlit.engine.depth import depth_system
from llvlit.engine.replay import first_output
from llvlit.errors import InputError, NumericalError
from llvlit.method import limits, trust
from llvlit.method.concepts import random_directions
from llvlit.method.control import energy, minimum_energy
from llvlit.method.gains import adjoint_gains
from llvlit.method.optimum import mean_shift, true_optimum
from llvlit.method.steering import steer
from llvlit.method.trust import TrustRadius, trust_radius
from llvlit.method.verification import output_shifts


def drawn(generator: np.random.Generator, n_layers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gains, weights and limits of a problem, some limits infinite."""
    gains, weights, limit = generator.standard_normal(n_layers), *np.exp(generator.standard_normal((2, n_layers)))
    return gains, weights, np.where(generator.random(n_layers) < 0.2, np.inf, limit)


def by_the_dual(gains, weights, target, low, high):
    """Oracle: ``u = clip(mu h / w, low, high)``, the multiplier by root finding; None where the target is beyond."""

    def inputs(multiplier):
        return np.clip(multiplier * gains / weights, low, high)

    reach = np.where(gains * target > 0, high, low)
    with np.errstate(invalid="ignore"):
        if np.nansum(gains * reach) * np.sign(target) < abs(target):
            return None
    end = np.sign(target)
    while (gains @ inputs(end) - target) * np.sign(target) < 0:
        end *= 2
    return inputs(brentq(lambda multiplier: gains @ inputs(multiplier) - target, 0, end, xtol=1e-15, rtol=1e-15))


def by_enumeration(gains, weights, target, low, high, most):
    """Oracle: every subset of so many layers."""
    energies = []
    for chosen in map(list, combinations(range(len(gains)), most)):
        u = by_the_dual(gains[chosen], weights[chosen], target, low[chosen], high[chosen])
        if u is not None:
            energies.append(weights[chosen] @ u**2)
    return min(energies, default=None)


def test_limited_inputs_are_those_of_brute_force():
    """Five hundred drawn problems: limits a layer, one sign, first and last layer, and at most so many layers."""
    generator, n_infeasible = np.random.default_rng(0), 0
    for _ in range(500):
        gains, weights, limit = drawn(generator, n_layers := int(generator.integers(1, 9)))
        most, target = int(generator.integers(1, n_layers + 1)), generator.normal()
        sign = generator.choice([None, "+", "-"])
        first, last = np.sort(generator.integers(n_layers, size=2)).tolist()
        inside = (np.arange(n_layers) >= first) & (np.arange(n_layers) <= last)
        high = np.where(inside & (sign != "-"), limit, 0.0)
        low = np.where(inside & (sign != "+"), -limit, 0.0)
        least = by_enumeration(gains, weights, target, low, high, most)
        options = {"limit": limit, "sign": sign, "layers": (first, last), "most_layers": most}
        if least is None:
            n_infeasible += 1
            with pytest.raises(InputError, match="out of reach"):
                minimum_energy(gains, target, weights=weights, **options)
            continue
        u = minimum_energy(gains, target, weights=weights, **options)
        assert gains @ u == pytest.approx(target, rel=1e-12)
        assert (u >= low).all() and (u <= high).all() and np.count_nonzero(u) <= most
        assert energy(u, weights=weights) == pytest.approx(least, rel=1e-9)
    assert 50 < n_infeasible < 350


def test_limits_a_layer_are_those_of_a_general_solver():
    """Oracle: sequential quadratic programming, of 30 layers."""
    generator = np.random.default_rng(1)
    for _ in range(20):
        gains, weights, limit = drawn(generator, 30)
        limit = np.minimum(limit, 5.0)
        target = 0.6 * np.abs(gains) @ limit
        u = minimum_energy(gains, target, weights=weights, limit=limit)
        found = minimize(
            lambda v, w=weights: v @ (w * v),
            0.6 * np.sign(gains) * limit,
            jac=lambda v, w=weights: 2 * w * v,
            bounds=list(zip(-limit, limit, strict=True)),
            constraints={"type": "eq", "fun": lambda v, g=gains, t=target: g @ v - t, "jac": lambda v, g=gains: g},
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-12},
        )
        assert gains @ found.x == pytest.approx(target) and energy(u, weights=weights) == pytest.approx(found.fun)


def test_limits_that_do_not_bind_change_nothing():
    gains, weights, _ = drawn(np.random.default_rng(2), 12)
    free = minimum_energy(gains, 2.0, weights=weights)
    for options in ({"limit": 1e9}, {"limit": np.inf}, {"layers": (0, 11)}, {"most_layers": 12}, {"most_layers": 99}):
        assert np.allclose(minimum_energy(gains, 2.0, weights=weights, **options), free, rtol=1e-12, atol=0)
    same = minimum_energy(np.abs(gains), 2.0, sign="+")
    assert np.allclose(same, minimum_energy(np.abs(gains), 2.0), rtol=1e-12)
    assert not minimum_energy(gains, 0.0, limit=0.1, most_layers=1).any()


def test_sorting_is_enough_where_worth_and_reach_agree(monkeypatch):
    """With one limit for all and no weights: the layers of largest gain, and no search beyond the first bound."""
    generator, n_bounds, bound = np.random.default_rng(3), [], limits._bound
    monkeypatch.setattr(limits, "_bound", lambda *arguments: n_bounds.append(1) or bound(*arguments))
    for n_problem in range(50):
        gains = generator.standard_normal(30)
        best = np.argsort(-np.abs(gains))[:5]
        u = minimum_energy(gains, 0.7 * np.abs(gains[best]).sum(), limit=1.0, most_layers=5)
        assert set(np.flatnonzero(u)) == set(best) and len(n_bounds) == n_problem + 1


def test_sorting_is_not_enough_where_they_do_not():
    """The layer of largest gain hardly moves within its limit: two others are cheaper than it and either of them."""
    gains, limit = np.array([3.0, 1.0, 0.9]), np.array([0.01, 2.0, 2.0])
    assert np.flatnonzero(minimum_energy(gains, 1.0, limit=limit, most_layers=2)).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("worth", "reach"),
    [
        ([4.7, 0.5, 0.7, 0.6], [0.3, 0.6, 0.9, 0.7]),
        ([0.7, 3.8, 0.6, 0.4], [0.9, 0.3, 0.6, 0.2]),
        ([0.6, 0.8, 0.9, 1.8], [0.7, 0.5, 0.2, 0.4]),
    ],
)
def test_bounds_that_are_not_exact_are_branched_on(worth, reach):
    """Problems whose first bound is below the least energy, and its layers not the cheapest."""
    worth, reach = np.array(worth), np.array(reach)
    shares = limits.cheapest_shares(worth, reach, 2)
    least = by_enumeration(np.ones(4), 1 / worth, 1.0, np.zeros(4), reach, 2)
    assert shares.sum() == pytest.approx(1) and (shares**2 / worth).sum() == pytest.approx(least, rel=1e-9)


def test_the_search_stays_small():
    """Forty layers, of which eight: 77 million subsets, some dozens of bounds."""
    generator, counts, bound = np.random.default_rng(4), [], limits._bound
    for _ in range(20):
        gains, weights, limit = drawn(generator, 40)
        reach = np.sort(np.abs(gains) * np.minimum(limit, 3.0))[::-1][:8].sum()
        counts.append(0)

        def counted(*arguments):
            counts[-1] += 1
            return bound(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, "_bound", counted)
            minimum_energy(gains, 0.7 * reach, weights=weights, limit=np.minimum(limit, 3.0), most_layers=8)
    assert max(counts) < 500, counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"limit": 0.5},
            r"target=9 is out of reach: inputs within limit move .* at most 4 that way, without limit any\.",
        ),
        ({"sign": "+", "limit": 1.0}, r"at most 7 that way, without limit any, without sign 8\."),
        ({"limit": 1.2, "most_layers": 2}, r"at most 8.4 that way, without limit any, without most_layers 9.6\."),
        ({"limit": 1.5, "layers": (2, 3)}, r"at most 1.5 that way, without limit any, without layers 12\."),
        ({"sign": "+", "layers": (2, 3)}, r"at most 0 that way, without sign any, without layers any\."),
        ({"limit": [0, 0, 0, 1], "layers": (3, 3)}, r"at most 0 that way, and no more without any one of them"),
    ],
)
def test_a_target_out_of_reach_says_which_limit_stands_in_the_way(options, message):
    with pytest.raises(InputError, match=message):
        minimum_energy(np.array([4.0, 3.0, -1.0, 0.0]), 9.0, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": np.nan}, "limit holds a number that is not 0 or more"),
        ({"limit": -1.0}, "limit holds a number that is not 0 or more"),
        ({"limit": np.ones(3)}, r"limit has shape \(3,\); expected a number, or one for each of 4 gains"),
        ({"limit": "small"}, "limit='small'"),
        ({"sign": "plus"}, "sign='plus'"),
        ({"layers": (3, 1)}, r"layers=\(3, 1\) ends before it begins"),
        ({"layers": (0, 4)}, "layers=4 must be at most 3"),
        ({"layers": 2}, "layers=2 .* the first and the last layer"),
        ({"most_layers": 0}, "most_layers=0 must be at least 1"),
        ({"most_layers": 1.5}, "most_layers=1.5"),
    ],
)
def test_limits_that_are_none_are_named(options, message):
    with pytest.raises(InputError, match=message):
        minimum_energy(np.array([4.0, 3.0, -1.0, 0.0]), 1.0, **options)


def test_limits_of_zero_gains_and_of_numbers_at_the_ends_of_the_range():
    with pytest.raises(NumericalError, match="zero"):
        minimum_energy(np.zeros(3), 1.0, limit=1.0)
    for size in (1e-200, 1e200):
        u = minimum_energy(size * np.array([3.0, 4.0]), 5.0, limit=1e300, most_layers=2)
        assert np.allclose(u * size, [0.6, 0.8])


def pushed_outputs(model, vectors, inputs, *, final_norm=False):
    """Oracle: outputs ``(n_prompts,)`` of the plain model, hooks of its own pushing every token, prompt by prompt."""

    def hook(layer):
        return lambda _module, args: (args[0] + inputs[layer] * vectors[layer], *args[1:])

    outputs = []
    for text in PROMPTS.texts:
        kept = []
        with ExitStack() as hooks, torch.no_grad():
            for layer, module in enumerate(model.layers):
                hooks.callback(module.register_forward_pre_hook(hook(layer)).remove)
            noted = model.layers[-1].register_forward_hook(
                lambda _m, _a, out, kept=kept: kept.append(first_output(out))
            )
            hooks.callback(noted.remove)
            model.module(torch.tensor([model.tokenizer(text)["input_ids"]]))
        final = kept[0][0, -1]
        for module in model.after_layers if final_norm else ():
            final = module(final)
        outputs.append(float(final.detach() @ vectors[-1]))
    return np.array(outputs)


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *WHOLE_PROMPTS])
def test_gains_of_pushes_at_every_token_are_differences_of_the_full_model(model_type):
    """Prompts of several lengths, which share padded batches where they may; with and without the final norm."""
    model, vectors = tiny_model(model_type), random_directions(5, 24, seed=4)
    for final_norm in (False, True):
        gains = adjoint_gains(model, PROMPTS, vectors, positions="all", final_norm=final_norm)
        step, share = (1e-4, 3e-2) if model_type == "opt" else (1e-3, 5e-3)  # kinks of ReLU; softmax in float32
        for layer, push in enumerate(step * np.eye(4)):
            ends = [pushed_outputs(model, vectors, sign * push, final_norm=final_norm) for sign in (1, -1)]
            measured = (ends[0] - ends[1]) / (2 * step)
            error = np.abs(gains.per_prompt[:, layer] - measured).max()
            assert error < share * np.abs(gains.per_prompt).max(), layer
    assert gains.metadata["positions"] == "all" and gains.kind == "adjoint"


def test_gains_at_all_tokens_converge_in_second_order(gpt2):
    vectors, errors = random_directions(5, 24, seed=4), []
    gains = adjoint_gains(gpt2, PROMPTS, vectors, positions="all").per_prompt[:, 1]
    for step in (2e-2, 1e-2, 5e-3):
        ends = [pushed_outputs(gpt2, vectors, sign * step * np.eye(4)[1]) for sign in (1, -1)]
        errors.append(np.abs((ends[0] - ends[1]) / (2 * step) - gains).max())
    assert np.allclose(np.diff(np.log2(errors)), -2, atol=0.1)


def test_several_outputs_share_the_backward_pass_through_the_prompt(gpt2):
    sets = [random_directions(5, 24, seed=seed) for seed in (1, 2)]
    together = adjoint_gains(gpt2, PROMPTS, sets, positions="all")
    for each, one in zip(together, sets, strict=True):
        assert np.allclose(each.per_prompt, adjoint_gains(gpt2, PROMPTS, one, positions="all").per_prompt, rtol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_steering_at_all_positions_is_that_of_hooks_and_leaves_padding_alone(gpt2, side):
    vectors, inputs = random_directions(5, 24, seed=6), np.array([0.5, 0.0, -1.0, 2.0])
    ids = [gpt2.tokenizer(text)["input_ids"] for text in PROMPTS.texts]
    longest, expected = max(map(len, ids)), pushed_outputs(gpt2, vectors, inputs)
    padded, mask = torch.zeros(len(ids), longest, dtype=torch.long), torch.zeros(len(ids), longest, dtype=torch.long)
    for row, tokens in enumerate(ids):
        place = slice(0, len(tokens)) if side == "right" else slice(longest - len(tokens), longest)
        padded[row, place], mask[row, place] = torch.tensor(tokens), 1
    kept, seen = [], []
    with torch.no_grad(), steer(gpt2, vectors, inputs, positions="all"):
        first = gpt2.layers[0].register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
        final = gpt2.layers[-1].register_forward_hook(lambda _m, _a, out: kept.append(first_output(out)))
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        gpt2.module(padded, attention_mask=mask, position_ids=positions)
        first.remove()
        final.remove()
    last = mask.cumsum(dim=1).argmax(dim=1)
    found = (kept[0][torch.arange(len(ids)), last] @ vectors[-1]).numpy()
    assert np.allclose(found, expected, rtol=1e-6)
    embedded = gpt2.module.transformer.wte(padded) + gpt2.module.transformer.wpe(positions)
    pushed = (seen[0] - embedded).abs().amax(dim=-1) > 1e-9
    assert torch.equal(pushed, mask.bool())


def test_generation_pushed_everywhere_is_that_of_the_whole_text_pushed_everywhere(gpt2):
    """What lies in the cache was pushed when it passed."""
    vectors, inputs = random_directions(5, 24, seed=6), np.array([0.5, 0.0, -1.0, 2.0])
    tokens = torch.tensor([gpt2.tokenizer("the film")["input_ids"]])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with steer(gpt2, vectors, inputs, positions="all"), torch.no_grad():
        written = gpt2.module.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        for end in range(tokens.shape[1], written.shape[1]):
            logits = gpt2.module(written[:, :end], use_cache=False).logits[0, -1]
            logits[0] = -np.inf  # no end of the text before five tokens
            assert logits.argmax() == written[0, end]


def test_positions_that_are_none_are_named(gpt2):
    vectors = random_directions(5, 24)
    with pytest.raises(InputError, match="positions='every'"):
        adjoint_gains(gpt2, PROMPTS, vectors, positions="every")
    with pytest.raises(InputError, match="positions='first'"), steer(gpt2, vectors, np.ones(4), positions="first"):
        pass


def test_the_gradient_along_a_push_is_that_of_differences(gpt2):
    """Far from rest, where the gains are others."""
    system, vectors = depth_system(gpt2, PROMPTS), random_directions(5, 24, seed=3)
    at, step = np.array([0.5, -1.0, 0.3, 2.0]), 1e-5
    shift, gradient = mean_shift(system, vectors, at)
    assert shift == pytest.approx(output_shifts(system, vectors, np.tile(at, (6, 1, 1))).mean(), rel=1e-12)
    ends = [[mean_shift(system, vectors, at + sign * push)[0] for push in step * np.eye(4)] for sign in (1, -1)]
    assert np.allclose(gradient, np.subtract(*ends) / (2 * step), rtol=1e-7, atol=1e-8)
    assert not np.allclose(gradient, adjoint_gains(gpt2, PROMPTS, vectors).mean, rtol=0.1)


def test_the_true_optimum_of_an_affine_model_is_the_linear_one():
    model, vectors = affine_model(), random_directions(5, 24, seed=3)
    gains, weights = (vectors[:-1] @ vectors[-1]).numpy(), np.array([1.0, 4.0, 0.5, 2.0])
    best = true_optimum(depth_system(model, PROMPTS), vectors, 2.0, weights=weights)
    assert np.allclose(best.inputs, minimum_energy(gains, 2.0, weights=weights), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("target", [1.0, -2.0])
def test_no_inputs_near_the_true_optimum_are_cheaper(gpt2, target):
    """Each of many neighbours is scaled until it meets the target on the full model, too."""
    system, vectors = depth_system(gpt2, PROMPTS), random_directions(5, 24, seed=3)
    weights, generator = np.array([1.0, 2.0, 0.5, 1.0]), np.random.default_rng(0)
    linear = minimum_energy(adjoint_gains(gpt2, PROMPTS, vectors), target, weights=weights)
    best = true_optimum(system, vectors, target, weights=weights, starts=np.stack([linear, linear / 2]))
    assert best.shift == pytest.approx(target, rel=1e-6) and best.energy == min(best.local)
    _, gradient = mean_shift(system, vectors, best.inputs)
    pull = weights * best.inputs
    assert abs(pull @ gradient) == pytest.approx(np.linalg.norm(pull) * np.linalg.norm(gradient), rel=1e-4)
    for size in (0.01, 0.1):
        near = best.inputs * (1 + size * generator.standard_normal((30, 4)))
        scales = np.linspace(0.5, 2, 151)
        inputs = np.tile((near[:, None] * scales[:, None]).reshape(1, -1, 4), (6, 1, 1))
        shifts = output_shifts(system, vectors, inputs).mean(axis=0).reshape(30, -1) / target
        for one, along in zip(near, shifts, strict=True):
            first = np.interp(1.0, along[: along.argmax() + 1], scales[: along.argmax() + 1])
            assert energy(first * one, weights=weights) > best.energy * (1 - 1e-4)


def test_a_target_that_no_inputs_reach_is_an_error(gpt2):
    system = depth_system(gpt2, PROMPTS, final_norm=True)
    with pytest.raises(NumericalError, match="no start led to inputs that reach it; the nearest missed it by"):
        true_optimum(system, random_directions(5, 24, seed=5), 1e3, starts=np.ones((1, 4)), most_steps=5)


def test_the_series_is_that_of_a_polynomial_of_fourth_order():
    coefficients, steps = np.array([3.0, -2.0, 0.5, 4.0]), np.array([0.1, 0.7])
    at = steps[:, None] * np.array([1, -1, 2, -2])
    found = trust.coefficients(steps, sum(c * at ** (i + 1) for i, c in enumerate(coefficients)))
    assert np.allclose(np.stack(found), coefficients[:3, None], rtol=1e-10)


def test_the_radius_is_where_the_curve_of_the_full_model_leaves_the_line(gpt2):
    """Prompt by prompt, both signs, slopes from one backward pass; a tolerance for which three orders are enough."""
    vectors, inputs = random_directions(5, 24, seed=5), np.array([[0.0, 1.0, 0.5, 0.2], [0.0, 0.0, 0.0, 3.0]])
    bent = trust_radius(gpt2, PROMPTS, vectors, inputs, tolerance=0.005, coverage=0.5)
    slopes = adjoint_gains(gpt2, PROMPTS, vectors).per_prompt @ inputs.T
    assert np.allclose(bent.slope, slopes, rtol=1e-2, atol=1e-2)
    system = depth_system(gpt2, PROMPTS)
    for prompt, shape in np.ndindex(6, 2):
        radius = bent.per_prompt[prompt, shape]
        for factor, inside in ((0.8, True), (1.25, False)):
            scales = factor * radius * np.array([1, -1])
            pushed = np.zeros((6, 2, 4))
            pushed[prompt] = scales[:, None] * inputs[shape]
            error = output_shifts(system, vectors, pushed)[prompt] / (scales * slopes[prompt, shape]) - 1
            assert (np.abs(error).max() <= 0.005) == inside, (prompt, shape, factor)
    half = trust_radius(gpt2, PROMPTS, vectors, 2 * inputs[0], tolerance=0.005, coverage=0.5)
    assert half.radius == pytest.approx(bent.radius[0] / 2, rel=1e-9)
    assert half.of_mean == pytest.approx(bent.of_mean[0] / 2, rel=1e-9)


def test_nothing_bends_in_an_affine_model():
    bent = trust_radius(affine_model(), PROMPTS, random_directions(5, 24, seed=3), np.ones(4), coverage=0.5)
    assert (bent.per_prompt > 1e3).all()
    straight = TrustRadius(np.array([2.0, 0.0]), np.zeros(2), np.zeros(2), 0.1, 0.5)
    assert straight.per_prompt.tolist() == [np.inf, 0.0]


@pytest.mark.parametrize(("n_units", "coverage"), [(19, 0.95), (30, 0.9), (10, 0.8)])
def test_the_radius_covers_new_prompts_as_often_as_it_promises(n_units, coverage):
    """Twins of one unit alike up to a little; the promise is on the average over the prompts that it was found from."""
    generator, pairs = np.random.default_rng(n_units), tuple(np.repeat(range(n_units), 2).tolist())
    inside = []
    for _ in range(1000):
        drawn_radii = np.exp(generator.standard_normal((n_units + 100, 1)) + generator.normal(0, 0.1, (1, 2)))
        known, new = drawn_radii[:n_units].ravel(), drawn_radii[n_units:].min(axis=1)
        bent = TrustRadius(np.ones(2 * n_units), 0.1 / known, np.zeros(2 * n_units), 0.1, coverage, pairs)
        inside.append((new >= bent.radius).mean())
    assert coverage - 0.01 < np.mean(inside) < coverage + 1 / n_units


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"inputs": np.ones(3)}, r"inputs has shape \(3,\); expected \(4,\) or \(k, 4\)"),
        ({"inputs": np.zeros((2, 4))}, "inputs holds a shape that is zero"),
        ({"inputs": np.array([1, np.nan, 0, 0])}, "inputs holds a number that is not finite"),
        ({"tolerance": 0.0}, "tolerance=0.0 must be above 0"),
        ({"coverage": 1.0}, "coverage=1.0 must be at most"),
        ({"coverage": 0.95}, r"coverage=0.95 needs 19 independent prompts or more; there are 6"),
    ],
)
def test_what_no_radius_can_be_found_of_is_named(gpt2, changed, message):
    options = {"inputs": np.ones(4), "coverage": 0.5, **changed}
    with pytest.raises(InputError, match=message):
        trust_radius(gpt2, PROMPTS, random_directions(5, 24), options.pop("inputs"), **options)
