"""Intervals hold the truth as often as they say when prompts come as twins; labels are permuted as they were drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import EXACT, PROMPTS
from llvlit.engine.depth import last_token_states
from llvlit.engine.models import load_model
from llvlit.errors import ConceptNotVisibleError
from llvlit.method.agreement import agreement, compare
from llvlit.method.concepts import concept_directions, directions_of_states, separation
from llvlit.method.gains import Gains, adjoint_gains, measured_gains
from llvlit.method.intervals import interval, resampled_means, resampled_medians
from llvlit.prompts import Prompts
from llvlit.study.experiment import energy_summary
from llvlit.tasks.task import load_task

COVERAGE = (0.93, 0.97)
"""Of intervals of 95 %, whose own error is below 1 % here: the number of trials is chosen for it."""


def twins(generator, n_pairs, n_numbers, *, alike):
    """Numbers ``(2 n_pairs, n_numbers)`` of variance 1; those of twins have the correlation ``alike``, in size."""
    shared = np.repeat(generator.standard_normal((n_pairs, n_numbers)), 2, axis=0)
    if alike < 0:
        shared[1::2] *= -1
    own = generator.standard_normal((2 * n_pairs, n_numbers))
    return np.sqrt(abs(alike)) * shared + np.sqrt(1 - abs(alike)) * own


def pairs_of(n_pairs):
    return tuple(np.repeat(np.arange(n_pairs), 2).tolist())


@pytest.mark.parametrize("alike", [0.9, 0.0, -0.9])
def test_intervals_of_means_hold_the_truth_where_prompts_are_twins(alike):
    """Prompts drawn singly: 85 % where twins are alike, 100 % where they are opposite."""
    generator = np.random.default_rng(1)
    held = {"pairs": [], "single": []}
    for _ in range(60):
        values = twins(generator, 100, 50, alike=alike)  # 3,000 trials: 0.4 %
        for name, pairs in (("pairs", pairs_of(100)), ("single", ())):
            low, high = Gains(values, "measured", 0.1, pairs).interval()
            held[name].append((low < 0) & (high > 0))
    assert COVERAGE[0] < np.mean(held["pairs"]) < COVERAGE[1]
    assert (COVERAGE[0] < np.mean(held["single"]) < COVERAGE[1]) == (alike == 0)


def test_intervals_of_agreement_hold_the_truth_where_prompts_are_twins():
    """Where the measure is a smooth function of the profile: ranks are not (see below), nor is an error near zero."""
    generator = np.random.default_rng(2)
    true = np.array([1.0, 3.0, 2.0, 5.0, 4.0, 7.0, 6.0, 8.0])
    predicted = np.array([2.0, 2.0, 4.0, 4.0, 7.0, 5.0, 9.0, 6.0])
    _, pearson, error = compare(predicted[None], true[None])
    held = []
    for _ in range(600):  # 0.9 %
        values = true + 0.5 * twins(generator, 100, 8, alike=0.9)
        found = agreement(predicted, Gains(values, "measured", 0.1, pairs_of(100))).intervals
        both = (found["pearson"], pearson[0]), (found["relative_error"], error[0])
        held.append([low < truth < high for (low, high), truth in both])
    pearson_held, error_held = np.mean(held, axis=0)
    assert COVERAGE[0] < pearson_held < COVERAGE[1] and COVERAGE[0] < error_held < COVERAGE[1]


def spearman_held(generator, order, predicted, *, apart):
    """How often its interval holds the true rank correlation; neighbours in the order are so many errors apart."""
    error = 0.5 * np.sqrt(1.9 / 200)  # of the mean of 100 pairs
    true = apart * error * order
    ((truth,), _, _) = compare(predicted[None], true[None])
    held = []
    for _ in range(200):  # 1.5 %
        values = true + 0.5 * twins(generator, 100, 8, alike=0.9)
        low, high = agreement(predicted, Gains(values, "measured", 0.1, pairs_of(100))).intervals["spearman"]
        held.append(low - EXACT <= truth <= high + EXACT)  # ranks are tied: a bound may be the truth
    return np.mean(held)


def test_intervals_of_rank_correlations_hold_the_truth_where_layers_differ_by_two_errors():
    """Ranks move in steps: further apart, the interval holds the truth too often; closer, it lies too near zero."""
    generator = np.random.default_rng(12)
    order, predicted = np.array([1.0, 3, 2, 5, 4, 7, 6, 8]), np.array([2.0, 2, 4, 4, 7, 5, 9, 6])
    for profile in (predicted, order):
        assert spearman_held(generator, order, profile, apart=2.0) > COVERAGE[0]
    assert spearman_held(generator, order, order, apart=1.0) < 0.5  # as documented


@pytest.mark.parametrize("alike", [0.9, 0.0, -0.9])
def test_intervals_of_energy_ratios_hold_the_truth_where_prompts_are_twins(alike):
    """Medians of energies and of ratios.  Prompts drawn singly: 88 % where twins are alike, 100 % where opposite."""
    generator = np.random.default_rng(11)
    held = {"pairs": [], "single": []}
    for trial in range(600):  # 0.9 %; twice that for prompts drawn singly, which are far off or no worse
        logarithms = twins(generator, 100, 2, alike=alike)
        reference = np.exp(logarithms[:, 0])
        values = 2 * reference * np.exp(0.7 * logarithms[:, 1])
        for name, pairs in (("pairs", pairs_of(100)), ("single", tuple(range(200))))[: 1 + (trial % 4 == 0)]:
            summary = energy_summary(values, reference, pairs, seed=0)
            held[name].append([summary[f"{of}_low"] < 2 < summary[f"{of}_high"] for of in ("energy", "ratio")])
    energies, ratios = np.mean(held["pairs"], axis=0)
    assert COVERAGE[0] < energies < COVERAGE[1] and COVERAGE[0] < ratios < COVERAGE[1]
    assert (COVERAGE[0] < np.mean(held["single"]) < COVERAGE[1]) == (alike == 0)


def test_every_prompt_a_unit_of_its_own_is_the_plain_bootstrap():
    values = np.random.default_rng(3).standard_normal((40, 3))
    counts = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), size=1000)
    assert np.allclose(resampled_means(values, range(40), seed=0), counts @ values / 40, atol=EXACT)


def test_resampled_medians_are_those_of_the_drawn_prompts():
    """Oracle: every drawn sample written out, infinite values among them."""
    generator = np.random.default_rng(4)
    values = generator.standard_normal((3, 8))
    values[:, 5] = np.inf
    pairs = [0, 0, 1, 1, 2, 2, 3, 3]
    counts = np.repeat(np.random.default_rng(7).multinomial(4, np.full(4, 1 / 4), size=1000), 2, axis=1)
    with np.errstate(invalid="ignore"):
        expected = [np.median(np.repeat(values, count, axis=1)) for count in counts]
    assert np.array_equal(resampled_medians(values, pairs, seed=7), expected, equal_nan=True)
    assert np.isnan(interval(np.array([1.0, np.nan, 2.0])[:, None])).all()


def labelled(n_pairs, *, as_twins):
    texts = [f"text {row}" for row in range(2 * n_pairs)]
    return Prompts(texts, [0, 1] * n_pairs, pairs_of(n_pairs) if as_twins else None)


def states_of_twins(generator, n_pairs, n_states, *, gap):
    """Twins share nine tenths of their variance; the classes are ``gap`` apart along the first axis."""
    values = twins(generator, n_pairs, n_states * 6, alike=0.9).reshape(2 * n_pairs, n_states, 6)
    values[1::2, :, 0] += gap
    return torch.from_numpy(values)


def seen(states, prompts, seed):
    try:
        return ~directions_of_states(states, prompts, seed=seed).borrowed
    except ConceptNotVisibleError:
        return np.zeros(states.shape[1], dtype=bool)


def test_noise_passes_the_permutation_test_of_twins_in_one_of_twenty():
    """One state, 400 draws of noise: 5 % with an error of 1.1 %."""
    generator = np.random.default_rng(5)
    passed = [
        seen(states_of_twins(generator, 30, 1, gap=0.0), labelled(30, as_twins=True), seed)[0] for seed in range(400)
    ]
    assert 0.02 < np.mean(passed) < 0.085


def test_labels_permuted_within_twins_see_what_labels_permuted_across_them_do_not():
    """Permuted across pairs, what differs between pairs counts as chance, and a gap of two standard errors is lost."""
    generator = np.random.default_rng(6)
    draws = [states_of_twins(generator, 30, 1, gap=0.4) for _ in range(60)]
    within, across = (
        np.mean([seen(states, labelled(30, as_twins=kind), seed)[0] for seed, states in enumerate(draws)])
        for kind in (True, False)
    )
    assert within > 0.9 and across < 0.3


def test_labels_of_prompts_without_a_twin_are_permuted_among_themselves():
    """Twenty pairs and twenty single prompts: every permutation keeps the labels of a pair, and of all."""
    generator = np.random.default_rng(8)
    states = torch.from_numpy(generator.standard_normal((60, 2, 6)))
    pairs = [*pairs_of(20), *range(100, 120)]
    labels = [0, 1] * 30
    mixed = Prompts([f"text {row}" for row in range(60)], labels, pairs)
    states[1::2, :, 0] += 3.0
    found = directions_of_states(states, mixed)
    assert not found.borrowed.any() and (found.chance_gaps > 0.3).all() and (found.chance_gaps < 1.5).all()


def test_the_states_of_tense_that_show_it_are_kept():
    """Permuted across twins, the labels hid states 6 and 7 and the readout, whose held-out AUC is above 0.7."""
    model = load_model("embedded/medium", device="cpu")
    splits = load_task("tense").split(concept=200, operating=2, evaluation=100)
    directions = concept_directions(model, splits.concept)
    held_out = last_token_states(model, splits.evaluation)
    auc = separation(held_out, np.array(splits.evaluation.labels), directions.vectors)
    for state in (6, 7, 18):
        assert not directions.borrowed[state] and auc[state] > 0.7
    singly = Prompts(splits.concept.texts, splits.concept.labels)
    with pytest.raises(ConceptNotVisibleError, match="readout"):
        concept_directions(model, singly)


def test_gains_resample_the_pairs_that_the_prompts_name(gpt2):
    paired = Prompts(PROMPTS.texts, PROMPTS.labels, [4, 4, 7, 7, 9, 9])
    vectors = torch.eye(24, dtype=torch.float64)[:5]
    for gains in (measured_gains(gpt2, paired, vectors), adjoint_gains(gpt2, paired, vectors)):
        assert gains.pairs == (4, 4, 7, 7, 9, 9)
        assert gains.head(2).pairs == gains.select(slice(1, None)).head(2).pairs == (4, 4)
        lone = Gains(gains.per_prompt, gains.kind, gains.amplitude)
        assert not np.allclose(gains.interval(), lone.interval())
