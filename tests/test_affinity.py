"""Subset designs and the affinity matrix against plain loops, full enumeration and planted linear scores."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemblelora.affinity import (
    SubsetDesign,
    affinity_from_scores,
    choose_subset_size,
    compare_surrogates,
    list_blind_tasks,
    reference_subsets,
    relative_affinity,
    sample_subsets,
    select_values,
    symmetrize,
    weigh_scores,
)
from ensemblelora.config import AffinityConfig
from ensemblelora.errors import ConfigError, DataError
from ensemblelora.stages.request import _find_subset_fault


def every_subset(n_tasks: int, size: int) -> SubsetDesign:
    return SubsetDesign(n_tasks, tuple(itertools.combinations(range(n_tasks), size)))


def linear_scores(design: SubsetDesign, seed: int = 0) -> np.ndarray:
    """f_i(S) = mu_i + sum of beta_ij over the others in S."""
    rng = np.random.default_rng(seed)
    beta = rng.normal(size=(design.n_tasks, design.n_tasks))
    np.fill_diagonal(beta, 0)
    return rng.normal(size=design.n_tasks) + design.membership @ beta.T


def average_over_subsets(design: SubsetDesign, values: np.ndarray) -> np.ndarray:
    """Equation 1 as it is written; NaN for a pair that no subset holds."""
    directed = np.full((design.n_tasks, design.n_tasks), np.nan)
    for i, j in itertools.product(range(design.n_tasks), repeat=2):
        held = [values[s, i] for s, subset in enumerate(design.subsets) if i in subset and j in subset]
        directed[i, j] = np.mean(held) if held else np.nan
    return directed


@settings(max_examples=60, deadline=None)
@given(
    n_tasks=st.integers(1, 14),
    size=st.integers(2, 16),
    n_subsets=st.integers(1, 60),
    min_count=st.integers(0, 5),
    seed=st.integers(0, 3),
)
def test_designs_are_distinct_sorted_of_one_size_and_cover(
    n_tasks: int, size: int, n_subsets: int, min_count: int, seed: int
) -> None:
    config = AffinityConfig(subset_size=size, n_subsets=n_subsets, min_pair_count=min_count)
    design = sample_subsets(n_tasks, config, seed=seed)
    assert design == sample_subsets(n_tasks, config, seed=seed)
    subsets = design.subsets
    assert list(subsets) == sorted(set(subsets))
    (used,) = {len(subset) for subset in subsets}
    assert used == choose_subset_size(n_tasks, size) == min(size, max(n_tasks - 1, min(2, n_tasks)))
    assert all(list(subset) == sorted(set(subset)) and 0 <= subset[0] <= subset[-1] < n_tasks for subset in subsets)
    total = math.comb(n_tasks, used)
    assert min(n_subsets, total) <= len(subsets) <= min(2 * n_subsets, total)
    if total > n_subsets and len(subsets) < 2 * n_subsets:
        assert (design.membership.T @ design.membership).min() >= min(min_count, math.comb(n_tasks - 2, used - 2))


def test_the_papers_setting_has_fewer_subsets_than_it_asks_for() -> None:
    design = sample_subsets(10, AffinityConfig(), seed=0)
    assert design == every_subset(10, 3) and len(design.subsets) == 120


def test_uniform_draws_hold_every_task_equally_often() -> None:
    config = AffinityConfig(subset_size=3, n_subsets=10, min_pair_count=0)
    counts = sum(sample_subsets(9, config, seed=seed).membership.sum(axis=0) for seed in range(400))
    assert np.abs(counts / 400 - 10 / 3).max() < 5 * np.sqrt(10 * (1 / 3) * (2 / 3) / 400)


def test_coverage_can_ask_for_every_subset() -> None:
    """Each pair of six tasks is in four subsets of three; asking for four of each leaves none out."""
    design = sample_subsets(6, AffinityConfig(subset_size=3, n_subsets=12, min_pair_count=9), seed=0)
    assert design == every_subset(6, 3)


def test_topped_up_means_stay_unbiased() -> None:
    """Half of the subsets are drawn around rare pairs, and scores depend wildly on who is in the subset."""
    n_tasks, size, n_seeds = 7, 3, 1500
    everything = every_subset(n_tasks, size)
    values = np.exp(linear_scores(everything))
    truth = average_over_subsets(everything, values)
    row = {subset: s for s, subset in enumerate(everything.subsets)}
    config = AffinityConfig(subset_size=size, n_subsets=8, min_pair_count=2)
    estimates = np.empty((n_seeds, n_tasks, n_tasks))
    for seed in range(n_seeds):
        design = sample_subsets(n_tasks, config, seed=seed)
        assert len(design.subsets) > 10
        members, scores = design.membership, values[[row[s] for s in design.subsets]]
        counts = members.T @ members
        sums = (members * scores).T @ members
        estimates[seed] = np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    seen = np.isfinite(estimates).sum(axis=0)
    bias = np.nanmean(estimates, axis=0) - truth
    assert seen.min() > 1000
    assert (np.abs(bias) / (np.nanstd(estimates, axis=0) / np.sqrt(seen))).max() < 4.5


def test_equation_one_is_a_plain_mean() -> None:
    design = sample_subsets(7, AffinityConfig(subset_size=3, n_subsets=20), seed=1)
    values = np.random.default_rng(1).normal(size=(len(design.subsets), 7))
    affinity = affinity_from_scores(design, values)
    assert not affinity.surrogate.any()
    np.testing.assert_allclose(affinity.directed, average_over_subsets(design, values), atol=1e-12)
    for i, j in itertools.product(range(7), repeat=2):
        assert affinity.counts[i, j] == sum(i in subset and j in subset for subset in design.subsets)


@pytest.mark.parametrize("surrogate_above", [0, 40])
@pytest.mark.parametrize("kind", ["linear", "kernel"])
def test_every_entry_is_a_weighted_mean_of_its_tasks_scores(kind: str, surrogate_above: int) -> None:
    design = sample_subsets(8, AffinityConfig(n_subsets=15, min_pair_count=0), seed=4)
    values = linear_scores(design)
    affinity = affinity_from_scores(design, values, surrogate=kind, surrogate_above=surrogate_above)
    for i, row in enumerate(weigh_scores(design, values, surrogate=kind, surrogate_above=surrogate_above)):
        np.testing.assert_array_equal(row.subsets, [s for s, subset in enumerate(design.subsets) if i in subset])
        np.testing.assert_allclose(row.weights.sum(axis=1), 1.0)
        np.testing.assert_allclose(row.weights @ values[row.subsets, i], affinity.directed[i])
        np.testing.assert_array_equal(row.surrogate, affinity.surrogate[i])


def test_scores_of_tasks_outside_a_subset_are_never_read() -> None:
    design = every_subset(5, 3)
    values = linear_scores(design)
    poisoned = np.where(design.membership > 0, values, np.nan)
    clean = affinity_from_scores(design, values)
    np.testing.assert_array_equal(affinity_from_scores(design, poisoned).matrix, clean.matrix)


@pytest.mark.parametrize("kind", ["linear", "kernel"])
@pytest.mark.parametrize(("n_tasks", "size"), [(6, 3), (7, 4), (5, 3), (5, 2), (3, 2)])
def test_the_surrogate_lies_on_equation_ones_level(n_tasks: int, size: int, kind: str) -> None:
    design = every_subset(n_tasks, size)
    values = linear_scores(design)
    exact = average_over_subsets(design, values)
    surrogate = affinity_from_scores(design, values, surrogate=kind, surrogate_above=0).directed
    np.testing.assert_allclose(np.diag(surrogate), np.diag(exact))
    np.testing.assert_allclose(surrogate.mean(axis=1), exact.mean(axis=1))
    if size > 2:  # with pairs, every coefficient rests on one score, and leaving that out nothing predicts it
        np.testing.assert_allclose(surrogate, exact, atol=0.01 * exact.std())


@pytest.mark.parametrize("kind", ["linear", "kernel"])
def test_pairs_never_seen_are_filled_on_the_level_of_their_row(kind: str) -> None:
    full = every_subset(8, 3)
    values = linear_scores(full)
    kept = [s for s, subset in enumerate(full.subsets) if not {0, 1} <= set(subset) and not {4, 6} <= set(subset)]
    design = SubsetDesign(8, tuple(full.subsets[s] for s in kept))
    affinity = affinity_from_scores(design, values[kept], surrogate=kind)
    assert set(zip(*np.nonzero(affinity.surrogate), strict=True)) == {(0, 1), (1, 0), (4, 6), (6, 4)}
    assert affinity.counts[0, 1] == 0 and np.isfinite(affinity.matrix).all()
    # Ridge has no evidence on the unseen companion and leaves it at 0: the entry is the row's average one.
    own = average_over_subsets(design, values[kept])
    for i, j in [(0, 1), (4, 6)]:
        assert np.nanmin(own[i]) < affinity.directed[i, j] < np.nanmax(own[i])
    np.testing.assert_allclose(affinity.directed[~affinity.surrogate], own[~affinity.surrogate])


@pytest.mark.parametrize("kind", ["linear", "kernel"])
def test_many_tasks_use_the_surrogate_throughout_and_it_is_closer(kind: str) -> None:
    rng = np.random.default_rng(3)
    n_tasks, size = 30, 4
    family = np.arange(n_tasks) % 3
    beta = np.where(family[:, None] == family, 0.1, -0.1) * ~np.eye(n_tasks, dtype=bool)
    design = sample_subsets(n_tasks, AffinityConfig(subset_size=size, n_subsets=150), seed=0)
    values = design.membership @ beta.T + 0.02 * rng.normal(size=(len(design.subsets), n_tasks))
    truth = beta + (size - 2) / (n_tasks - 2) * (beta.sum(axis=1, keepdims=True) - beta)
    off = ~np.eye(n_tasks, dtype=bool)
    whole = affinity_from_scores(design, values, surrogate=kind, surrogate_above=20)
    plain = affinity_from_scores(design, values)
    assert whole.surrogate.all() and not plain.surrogate.all()
    errors = [np.abs(a.directed - truth)[off].mean() for a in (whole, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_surrogates_are_compared_by_what_they_leave_unexplained() -> None:
    design = sample_subsets(9, AffinityConfig(subset_size=4, n_subsets=60), seed=0)
    rng = np.random.default_rng(4)
    noise = 0.01 * rng.normal(size=(len(design.subsets), 9))
    linear = compare_surrogates(design, linear_scores(design) + noise)
    assert linear["linear"] < 0.05 * linear["mean"]
    assert linear["kernel"] < 1.5 * linear["linear"]
    # A task does well exactly where two companions meet: only interactions can say so.
    members = design.membership
    pairs = rng.permuted(np.tile(np.arange(9), (9, 1)), axis=1)[:, :4]
    meetings = np.stack([members[:, a] * members[:, b] + members[:, c] * members[:, d] for a, b, c, d in pairs], axis=1)
    met = compare_surrogates(design, meetings + noise)
    assert met["kernel"] < met["linear"] < met["mean"]
    assert compare_surrogates(SubsetDesign(2, ((0, 1),)), np.zeros((1, 2))) == dict.fromkeys(met)


@pytest.mark.parametrize("kind", ["linear", "kernel"])
def test_adding_to_a_row_adds_to_its_affinities_and_nothing_else(kind: str) -> None:
    design = sample_subsets(9, AffinityConfig(n_subsets=15, min_pair_count=0), seed=2)
    values = linear_scores(design)
    shift = np.random.default_rng(5).normal(size=9)
    before, after = (affinity_from_scores(design, v, surrogate=kind) for v in (values, values + shift))
    assert before.surrogate.any()
    np.testing.assert_allclose(after.directed, before.directed + shift[:, None], atol=1e-9)
    np.testing.assert_allclose(after.matrix, before.matrix + (shift[:, None] + shift) / 2, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "kernel"])
def test_relabelling_tasks_relabels_the_matrix(kind: str) -> None:
    design = sample_subsets(7, AffinityConfig(n_subsets=12, min_pair_count=0), seed=3)
    values = linear_scores(design)
    order = np.random.default_rng(6).permutation(7)
    place = np.argsort(order)
    moved = SubsetDesign(7, tuple(tuple(sorted(int(place[i]) for i in subset)) for subset in design.subsets))
    expected = affinity_from_scores(design, values, surrogate=kind).matrix[np.ix_(order, order)]
    found = affinity_from_scores(moved, values[:, order], surrogate=kind).matrix
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_rows_are_scaled_by_the_spread_of_their_affinities() -> None:
    directed = np.random.default_rng(7).normal(size=(5, 5))
    scales = np.array([1.0, 10.0, 0.1, 3.0, 2.0])
    np.testing.assert_allclose(
        symmetrize(directed * scales[:, None], row_scale="sd"), symmetrize(directed, row_scale="sd")
    )
    np.testing.assert_array_equal(symmetrize(directed), (directed + directed.T) / 2)
    np.testing.assert_array_equal(symmetrize(np.ones((4, 4)), row_scale="sd"), np.ones((4, 4)))


def test_relative_affinity_is_the_gain_over_being_alone() -> None:
    directed = np.arange(9.0).reshape(3, 3)
    np.testing.assert_array_equal(relative_affinity(directed, np.array([1.0, 2.0, 3.0]))[1], [1.0, 2.0, 3.0])


@settings(max_examples=60, deadline=None)
@given(n_tasks=st.integers(1, 7), size=st.integers(2, 6), n_subsets=st.integers(1, 6), seed=st.integers(0, 5))
def test_tasks_are_blind_whose_affinities_are_equal_whatever_the_scores(
    n_tasks: int, size: int, n_subsets: int, seed: int
) -> None:
    config = AffinityConfig(subset_size=size, n_subsets=n_subsets, min_pair_count=0)
    design = sample_subsets(n_tasks, config, seed=seed)
    blind = list_blind_tasks(design)
    if not design.membership.any(axis=0).all():
        assert {i for i in range(n_tasks) if not design.membership[:, i].any()} <= set(blind)
        return
    directed = affinity_from_scores(design, linear_scores(design)).directed
    others = [np.delete(directed[i], i) for i in range(n_tasks)]
    assert blind == [i for i in range(n_tasks) if n_tasks > 2 and np.ptp(others[i]) < 1e-12]


def test_every_task_in_one_subset_is_refused_and_three_tasks_are_told_apart() -> None:
    config = AffinityConfig(subset_size=2, n_subsets=2, min_pair_count=0)
    told = "affinity.n_subsets 2: every task would be in one subset only, where no partner can be told from another; "
    for seed in range(20):
        fault, counts = _find_subset_fault(4, config, seed), sample_subsets(4, config, seed=seed).membership.sum(axis=0)
        assert (fault == f"{told}set it to 6") == (counts.tolist() == [1] * 4)
        assert (fault or "").count("in no subset") == (counts.min() == 0)
    assert _find_subset_fault(3, AffinityConfig(), 0) is _find_subset_fault(2, AffinityConfig(), 0) is None
    assert list_blind_tasks(sample_subsets(3, AffinityConfig(), seed=0)) == []


@pytest.mark.parametrize("n_tasks", [1, 2, 3])
def test_few_tasks_have_an_affinity(n_tasks: int) -> None:
    design = sample_subsets(n_tasks, AffinityConfig(), seed=0)
    affinity = affinity_from_scores(design, linear_scores(design))
    assert affinity.matrix.shape == (n_tasks, n_tasks) and np.isfinite(affinity.matrix).all()


def test_reference_subsets_are_singles_pairs_and_all_once_each() -> None:
    assert reference_subsets(1) == ((0,),)
    assert reference_subsets(2) == ((0,), (1,), (0, 1))
    assert len(reference_subsets(6)) == 6 + 15 + 1
    assert len(reference_subsets(41)) == 42


def test_scores_are_turned_so_that_higher_is_better() -> None:
    nll, accuracy = np.array([[0.2, 0.4]]), np.array([[0.9, np.nan]])
    assert select_values(nll, accuracy, "nll").tolist() == [[-0.2, -0.4]]
    assert select_values(nll, accuracy[:, :1], "accuracy").tolist() == [[0.9]]
    with pytest.raises(ConfigError, match=r"tasks \[1\] answer with free text"):
        select_values(nll, accuracy, "accuracy")


def test_bad_designs_and_scores_are_refused() -> None:
    with pytest.raises(ConfigError, match="never hold two tasks"):
        sample_subsets(4, AffinityConfig(subset_size=1), seed=0)
    with pytest.raises(ConfigError, match="at least 1"):
        sample_subsets(0, AffinityConfig(), seed=0)
    pairs = every_subset(4, 2)
    with pytest.raises(DataError, match="for 6 subsets of 4 tasks"):
        affinity_from_scores(pairs, np.zeros((5, 4)))
    with pytest.raises(DataError, match="no finite score"):
        affinity_from_scores(pairs, np.full((6, 4), np.nan))
    with pytest.raises(DataError, match=r"tasks \[3\] are in none"):
        affinity_from_scores(SubsetDesign(4, ((0, 1), (1, 2))), np.zeros((2, 4)))
