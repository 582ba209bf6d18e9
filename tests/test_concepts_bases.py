"""Directions tell a concept from chance; bases are orthonormal, ordered, and deflate."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from conftest import EXACT, PROMPTS, tiny_model
from llvlit.engine.depth import last_token_states
from llvlit.errors import ConceptNotVisibleError, InputError, NumericalError
from llvlit.method.bases import (
    BASES,
    krylov_basis,
    orthonormal_basis,
    principal_basis,
    random_basis,
    reachability_basis,
)
from llvlit.method.concepts import (
    METHODS,
    as_directions,
    concept_directions,
    directions_of_states,
    random_directions,
    separation,
)
from llvlit.prompts import Prompts


def labelled(labels, pairs=None):
    """Prompts of which labels and pairs alone matter."""
    return Prompts([f"text {row}" for row in range(len(labels))], labels, pairs)


def planted_states(n_per_class=60, n_states=3, hidden_size=8, gap=4.0):
    """Noise of unit variance; classes ``gap`` apart along the first axis at every state but state 0."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(2 * n_per_class, n_states, hidden_size, generator=generator, dtype=torch.float64)
    labels = np.repeat([0, 1], n_per_class)
    states[n_per_class:, 1:, 0] += gap
    return states, labels


@pytest.mark.parametrize(("direction", "start"), [(2, 1), (1, 1)])
def test_a_shifted_space_goes_on_where_a_power_lies_along_the_direction(direction, start):
    """A cycle of three: the span of v, w, A w, A^2 w is everything, though A w = v or w = v."""
    shift = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    unit = torch.eye(3, dtype=torch.float64)
    _, rank, _ = krylov_basis(shift.mv, unit[direction], order=3, start=unit[start])
    assert rank == 3


def test_mean_difference_is_the_difference_of_class_means(gpt2):
    directions = concept_directions(gpt2, PROMPTS)
    states = last_token_states(gpt2, PROMPTS)
    labels = torch.tensor(PROMPTS.labels)
    difference = states[labels == 1].mean(0) - states[labels == 0].mean(0)
    assert torch.allclose(directions.vectors * torch.from_numpy(directions.gaps)[:, None], difference, atol=EXACT)
    assert torch.allclose(directions.vectors.norm(dim=-1), torch.ones(5, dtype=torch.float64), atol=EXACT)


def test_a_state_without_the_concept_borrows_the_next_direction():
    states, labels = planted_states()
    directions = directions_of_states(states, labelled(labels))
    assert directions.borrowed.tolist() == [True, False, False]
    assert torch.equal(directions.vectors[0], directions.vectors[1])
    assert abs(directions.vectors[1][0]) > 0.95
    assert directions.gaps[1] == pytest.approx(4, abs=0.6)  # three standard errors of the mean
    assert (directions.gaps > directions.chance_gaps)[1:].all()


def test_many_states_do_not_make_a_concept_of_noise():
    """Asked one by one, 25 states of noise pass in seven of ten cases; asked together, in one of twenty."""
    generator = torch.Generator().manual_seed(2)
    labels = np.repeat([0, 1], 30)
    n_seen = 0
    for seed in range(40):
        noise = torch.randn(60, 25, 8, generator=generator, dtype=torch.float64)
        try:
            directions_of_states(noise, labelled(labels), seed=seed)
            n_seen += 1
        except NumericalError:
            pass
    assert n_seen <= 7  # of 40 at 5 %: more than 7 in one of 400 such tests


def questions(ends, n=24):
    """Twins of two classes, alike but for their ends, which come in turn."""
    words = ["the rain", "a street", "my aunt", "one river", "that door", "a year"]
    texts = [f"{words[row % 6]} {row}{ends[label][row % len(ends[label])]}" for row in range(n) for label in (0, 1)]
    return Prompts(texts, [0, 1] * n, np.arange(n).repeat(2))


def test_a_last_token_that_tells_the_label_is_flagged_with_what_to_do():
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="class 0 ends in 'B' and 'D', class 1 ends in 'A'\\.") as told:
        concept_directions(model, questions(([" (B", " (D"], [" (A"])))
    assert "token_index" in str(told[0].message) and told[0].filename == __file__


def test_prompts_that_learned_positions_tell_apart_are_called_of_unlike_length():
    texts = [f"{letter} {end}" for letter in "abcdefghijklmnop" for end in ("is so", "is not so")]
    with pytest.warns(UserWarning, match=r"position alone tells the label.*equally long"):
        concept_directions(tiny_model("gpt2"), Prompts(texts, [0, 1] * 16, np.arange(16).repeat(2)))


@pytest.mark.parametrize("ends", [([" (A", " (B"], [" (B", " (A"]), (list("abcd"), list("ABCD"))])
def test_last_tokens_that_tell_nothing_of_other_prompts_are_not_flagged(ends):
    """Letters in balance between the classes, and letters seen once each, which a fit to them would tell apart."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        concept_directions(tiny_model("llama"), questions(ends, n=4))  # too few for chance: every direction is its own


def test_no_concept_anywhere_is_an_error():
    states, labels = planted_states(gap=0.0)
    with pytest.raises(NumericalError, match="permuted labels"):
        directions_of_states(states, labelled(labels))


def test_one_class_is_an_error(gpt2):
    with pytest.raises(InputError, match="class 1"):
        concept_directions(gpt2, Prompts(("a text", "and another"), (0, 0)))


def test_separation_is_the_area_under_the_roc_curve():
    states, labels = planted_states(gap=1.0)
    vectors = random_directions(3, 8, seed=4)
    expected = [roc_auc_score(labels, states[:, i] @ vectors[i]) for i in range(3)]
    assert np.allclose(separation(states, labels, vectors), expected, atol=EXACT)


def test_directions_that_do_not_fit_are_errors(gpt2):
    with pytest.raises(InputError, match="shape"):
        as_directions(torch.eye(24)[:3]).on(gpt2)
    zero = torch.eye(24)[:5]
    zero[2] = 0
    with pytest.raises(InputError, match=r"vectors\[2\] of the directions"):
        as_directions(zero)
    zero[2] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        as_directions(zero)


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_orthonormal_basis_spans_its_vectors_in_their_order(hidden_size, n_vectors, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n_vectors, hidden_size, generator=generator, dtype=torch.float64)
    basis, rank = orthonormal_basis(vectors, order=hidden_size)
    assert rank == min(n_vectors, hidden_size)
    assert torch.allclose(basis.T @ basis, torch.diag((torch.arange(hidden_size) < rank).double()), atol=EXACT)
    for j in range(rank):  # vector j lies in the span of the first j + 1 columns
        rest = vectors[j] - basis[:, : j + 1] @ (basis[:, : j + 1].T @ vectors[j])
        assert rest.norm() < 1e-10 * vectors[j].norm()  # a nearly dependent draw amplifies rounding


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"vectors": [[1.0], [1.0, 2.0]]}, "vectors must be one or more, all of one length"),
        ({"vectors": []}, "vectors"),
        ({"order": 4}, "order=4 must be at most 3, the size of vectors"),
        ({"order": 0}, "order=0"),
        ({"tolerance": np.ma.masked}, "tolerance"),  # whose item() is 0
    ],
)
def test_bad_settings_of_a_basis_are_named(options, named):
    with pytest.raises(InputError, match=named):
        orthonormal_basis(**{"vectors": torch.eye(3), "order": 2, **options})


def test_nearly_dependent_vectors_stay_orthonormal():
    """One pass of Gram and Schmidt loses orthogonality here; the second repairs it."""
    tiny = 1e-7
    vectors = torch.eye(4, dtype=torch.float64)[:1].repeat(4, 1)
    vectors[1:, 1:] += tiny * torch.eye(3, dtype=torch.float64)
    basis, rank = orthonormal_basis(vectors, order=4, tolerance=1e-12)
    assert rank == 4
    assert torch.allclose(basis.T @ basis, torch.eye(4, dtype=torch.float64), atol=EXACT)


def test_krylov_basis_holds_the_powers(generator):
    matrix = torch.randn(10, 10, generator=generator, dtype=torch.float64) / 3
    start = torch.randn(10, generator=generator, dtype=torch.float64)
    basis, rank, images = krylov_basis(lambda q: matrix @ q, start, order=4)
    assert rank == 4
    assert torch.allclose(basis.T @ basis, torch.eye(4, dtype=torch.float64), atol=EXACT)
    assert torch.allclose(images, matrix @ basis, atol=EXACT)
    power = start
    for j in range(4):
        rest = power - basis[:, : j + 1] @ (basis[:, : j + 1].T @ power)
        assert rest.norm() < 1e-10 * power.norm()
        power = matrix @ power


def test_the_shifted_krylov_basis_holds_the_direction_and_the_powers_on_another_vector(generator):
    matrix = torch.randn(10, 10, generator=generator, dtype=torch.float64) / 3
    direction, start = torch.randn(2, 10, generator=generator, dtype=torch.float64)
    basis, rank, images = krylov_basis(lambda q: matrix @ q, direction, order=5, start=start)
    assert rank == 5 and torch.allclose(basis.T @ basis, torch.eye(5, dtype=torch.float64), atol=EXACT)
    assert torch.allclose(images, matrix @ basis, atol=EXACT)
    power, spanned = start, [direction]
    for _ in range(4):
        spanned.append(power)
        for vector in spanned:
            rest = vector - basis[:, : len(spanned)] @ (basis[:, : len(spanned)].T @ vector)
            assert rest.norm() < 1e-10 * vector.norm()
        power = matrix @ power


def test_krylov_basis_deflates_on_an_invariant_space():
    matrix = torch.diag(torch.tensor([2.0, 2.0, 3.0], dtype=torch.float64))
    basis, rank, images = krylov_basis(lambda q: matrix @ q, torch.tensor([1.0, 0, 1.0]), order=3)
    assert rank == 2
    assert not basis[:, 2].any()
    assert torch.allclose(images, matrix @ basis, atol=EXACT)


def test_reachability_basis_is_newest_first(generator):
    """Its first k columns span v and the k - 1 newest images: truncation forgets the oldest."""
    matrices = torch.randn(4, 9, 9, generator=generator, dtype=torch.float64) / 3
    directions = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    images = torch.zeros(9, 0, dtype=torch.float64)
    reached: list[torch.Tensor] = []
    for layer in range(5):
        basis, rank = reachability_basis(images, directions[layer], order=4)
        newest = [directions[layer], *reached]
        for j in range(rank):
            rest = newest[j] - basis[:, : j + 1] @ (basis[:, : j + 1].T @ newest[j])
            assert rest.norm() < 1e-9 * newest[j].norm()  # five products of matrices of condition about 50
        if layer < 4:
            images = matrices[layer] @ basis
            reached = [matrices[layer] @ vector for vector in newest]


def test_every_basis_starts_at_the_direction(generator):
    direction = torch.randn(6, generator=generator, dtype=torch.float64)
    unit = direction / direction.norm()
    images = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    starts = {
        "krylov": krylov_basis(lambda q: q.flip(0), direction, order=3)[0],
        "krylov-shifted": krylov_basis(lambda q: q.flip(0), direction, order=3, start=images[:, 0])[0],
        "reachability": reachability_basis(images, direction, order=3)[0],
        "random": random_basis(direction, order=3, generator=generator)[0],
        "pca": principal_basis(images.T, direction, order=3)[0],
    }
    assert set(starts) == set(BASES) - {"balanced"}
    for basis in starts.values():
        assert torch.allclose(basis[:, 0], unit, atol=EXACT)


def test_the_principal_basis_holds_the_directions_of_largest_variance(generator):
    spread = torch.diag(torch.tensor([0.1, 5.0, 1.0, 0.01, 0.0, 0.0], dtype=torch.float64))
    states = 7 + torch.randn(400, 6, generator=generator, dtype=torch.float64) @ spread
    basis, rank = principal_basis(states, torch.eye(6, dtype=torch.float64)[5], order=6)
    assert rank == 5  # the direction, and four components with any variance
    assert abs(basis[1, 1]) > 0.999 and abs(basis[2, 2]) > 0.999 and abs(basis[0, 3]) > 0.999


def two_classes(generator, *, n=4000):
    """States of two Gaussian classes: mean difference along e0 + e1, variance within classes large along e0."""
    labels = np.arange(n) % 2
    noise = torch.randn(n, 2, 4, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.5, 0.5])
    shift = torch.from_numpy(labels - 0.5)[:, None] * torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    return noise + shift[:, None], labels


@pytest.mark.parametrize("method", METHODS)
def test_each_method_finds_the_direction_of_its_theory(generator, method):
    states, labels = two_classes(generator)
    whitened = np.array([1 / 9, 1, 0, 0])
    expected = {
        "mean_difference": np.array([1, 1, 0, 0]) / np.sqrt(2),
        "lda": whitened / np.linalg.norm(whitened),  # Sigma^-1 (mean difference)
        "logistic": whitened / np.linalg.norm(whitened),  # the same for Gaussians of equal covariance
        "principal_component": np.array([1, 0, 0, 0]),  # the noise of pairs, not the concept
    }[method]
    found = directions_of_states(states, labelled(labels), method=method)
    assert found.method == method
    for vector in found.vectors:
        assert vector.norm().item() == pytest.approx(1)
        assert vector.numpy() @ expected > 0.99  # 4,000 prompts: errors of a few percent
    with pytest.raises(InputError, match="method"):
        directions_of_states(states, labelled(labels), method="pca")


def states_of_twins(generator, n_pairs):
    """Rows of class 0 and 1 in turn: what differs between pairs lies along e0, what differs within them along e1."""
    texts = torch.randn(n_pairs, 1, 4, generator=generator, dtype=torch.float64).repeat_interleave(2, dim=0)
    signs = torch.randn(n_pairs, generator=generator, dtype=torch.float64).repeat_interleave(2)
    states = 5 * texts * torch.tensor([1.0, 0.0, 0.0, 0.0]) + 0.1 * torch.randn(
        2 * n_pairs, 1, 4, generator=generator, dtype=torch.float64
    )
    states[1::2, 0, 1] += 1 + signs[1::2]
    return states, np.tile([0, 1], n_pairs), np.repeat(100 + np.arange(n_pairs)[::-1], 2)


def component(states, labels, pairs, rows=slice(None)):
    prompts = labelled(labels[rows].tolist(), pairs[rows].tolist())
    return directions_of_states(states[rows], prompts, method="principal_component").vectors


def test_the_principal_component_compares_twins_wherever_they_stand(generator):
    """Paired by position, all differences after a prompt that is left out were between strangers: along e0."""
    data = states_of_twins(generator, 40)
    whole, rows = component(*data), np.arange(80)
    differences = (data[0][1::2] - data[0][::2])[:, 0].numpy()
    oracle = np.linalg.svd(differences, full_matrices=False)[2][0]
    assert np.array_equal(whole[0].numpy(), oracle * np.sign(oracle @ differences.mean(0)) / np.linalg.norm(oracle))
    assert whole[0, 1] > 0.99
    shuffled = component(*data, np.random.default_rng(0).permutation(80))
    assert torch.allclose(shuffled, whole, atol=EXACT)
    assert torch.equal(component(*data, rows[1:]), component(*data, rows[2:]))  # its twin has none to compare with


def test_the_principal_component_compares_prompts_without_a_twin_in_order_after_the_twins(generator):
    states, labels, pairs = states_of_twins(generator, 40)
    left_out = np.isin(np.arange(80), [0, 5, 9, 20])  # of class 0, 1, 1, 0
    kept = np.flatnonzero(~left_out)
    ones = [row for row in kept if row % 2 and row - 1 in kept] + [1, 21]
    zeros = [row for row in kept if not row % 2 and row + 1 in kept] + [4, 8]
    oracle = np.linalg.svd((states[ones] - states[zeros])[:, 0].numpy(), full_matrices=False)[2][0]
    assert abs(component(states, labels, pairs, kept)[0].numpy() @ oracle) == pytest.approx(1, abs=EXACT)


def test_a_state_without_the_concept_borrows_whatever_the_method(generator):
    states, labels = two_classes(generator, n=400)
    states[:, 0] = 1.0  # the same for every prompt, as where all end in one token
    found = directions_of_states(states, labelled(labels), method="lda")
    assert found.borrowed.tolist() == [True, False] and torch.equal(found.vectors[0], found.vectors[1])


def test_a_readout_without_a_direction_of_its_own_is_an_error_that_says_what_to_do():
    """It was that of an earlier state, without a word."""
    states, labels = planted_states()
    with pytest.raises(ConceptNotVisibleError, match=r"no readout.*more than 120 prompts, a suffix.*or another output"):
        directions_of_states(states.flip(1), labelled(labels))
