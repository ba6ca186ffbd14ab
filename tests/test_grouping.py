"""Clustering against all partitions, and the laws it must keep."""

from __future__ import annotations

import itertools
import logging
import warnings
from functools import partial

import cvxpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stirling2

from ensemblelora.errors import ConfigError, DataError, SolverError
from ensemblelora.grouping import (
    Partition,
    _canonical_order,
    cluster,
    compute_density,
    compute_objective,
    enumerate_partitions,
    find_best_partition,
    improve_labels,
    round_to_groups,
    sdp,
    solve_relaxation,
    sort_groups,
    splitting,
    threshold_groups,
    to_labels,
    to_partition,
)
from ensemblelora.grouping.bound import bound_objective, choose_row_duals
from ensemblelora.grouping.rounding import repair_labels
from ensemblelora.grouping.splitting import _project_spectrum, _project_to_slice, solve_by_splitting


def random_affinity(n: int, seed: int = 0) -> np.ndarray:
    matrix = np.random.default_rng([n, seed]).normal(size=(n, n))
    return (matrix + matrix.T) / 2


def planted_affinity(sizes: tuple[int, ...], *, noise: float = 0.3, seed: int = 0) -> tuple[np.ndarray, Partition]:
    """Tasks of one family score 1 together and 0 with others, with noise; tasks are shuffled."""
    rng = np.random.default_rng([sum(sizes), seed])
    family = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    matrix = (family[:, None] == family) + noise * rng.normal(size=(len(family), len(family)))
    return (matrix + matrix.T) / 2, to_partition(family)


def slow_objective(affinity: np.ndarray, groups: Partition) -> float:
    return sum(affinity[i, j] / len(group) for group in groups for i in group for j in group)


def incidence(groups: Partition) -> np.ndarray:
    """The partition as a point of the relaxation: 1 / |C| within groups."""
    labels = to_labels(groups)
    same = labels[:, None] == labels
    return same / same.sum(axis=1)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 2), (5, 3), (6, 6), (7, 4), (8, 1)])
def test_enumeration_is_complete_and_without_repeats(n: int, m: int) -> None:
    partitions = list(enumerate_partitions(n, m))
    assert len(partitions) == len(set(partitions)) == stirling2(n, m, exact=True)
    assert all(
        len(p) == m and sorted(itertools.chain(*p)) == list(range(n)) and p == sort_groups(p) for p in partitions
    )


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 7), m=st.integers(1, 7), seed=st.integers(0, 1000))
def test_exact_search_finds_the_best_of_all_partitions(n: int, m: int, seed: int) -> None:
    affinity, m = random_affinity(n, seed), min(m, n)
    best = max(enumerate_partitions(n, m), key=lambda groups: slow_objective(affinity, groups))
    found = find_best_partition(affinity, m)
    assert len(found) == m
    assert slow_objective(affinity, found) == pytest.approx(slow_objective(affinity, best), abs=1e-12)


@pytest.mark.parametrize("sizes", [(4, 3, 3), (5, 5), (2, 2, 2, 2), (9, 6, 5), (12, 4, 8, 6)])
def test_planted_groups_are_found_whatever_was_added_to_rows(sizes: tuple[int, ...]) -> None:
    affinity, truth = planted_affinity(sizes)
    shift = np.random.default_rng(1).normal(size=len(affinity)) * 50
    shifted = affinity + shift[:, None] + shift
    for matrix in (affinity, shifted):
        found = cluster(matrix, len(sizes))
        assert found.groups == truth
        assert 0 <= found.gap <= 1e-3 * len(affinity), "the relaxation is tight on groups this clear"
        assert found.objective == pytest.approx(slow_objective(matrix, truth))
    gained = cluster(shifted, len(sizes)).objective - cluster(affinity, len(sizes)).objective
    assert gained == pytest.approx(2 * shift.sum()), "a shift of rows adds the same to every partition"


@pytest.mark.parametrize(("n", "m", "n_restarts"), [(8, 3, 1), (12, 5, 1), (17, 3, 20), (30, 5, 1), (60, 8, 1)])
def test_clustering_does_not_depend_on_how_tasks_are_numbered(n: int, m: int, n_restarts: int) -> None:
    affinity = random_affinity(n)
    order = np.random.default_rng(2).permutation(n)
    seen = [a[np.ix_(o, o)] for a in (affinity, affinity[np.ix_(order, order)]) for o in (_canonical_order(a),)]
    np.testing.assert_array_equal(*seen, err_msg="random starts must meet the tasks in one order, however numbered")
    groups = cluster(affinity, m, n_restarts=n_restarts).groups
    moved = cluster(affinity[np.ix_(order, order)], m, n_restarts=n_restarts).groups
    assert sort_groups([order[list(group)] for group in moved]) == groups


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 18), m=st.integers(1, 18), seed=st.integers(0, 1000))
def test_exactly_m_groups_with_a_bound_above_them(n: int, m: int, seed: int) -> None:
    affinity, m = random_affinity(n, seed), min(m, n)
    found = cluster(affinity, m, n_restarts=3)
    assert len(found.groups) == m and found.groups == sort_groups(found.groups)
    assert sorted(itertools.chain(*found.groups)) == list(range(n))
    assert found.gap >= 0 and found.bound == pytest.approx(found.objective + found.gap)
    assert found == cluster(affinity, m, n_restarts=3), "the same input gives the same groups"
    assert cluster(affinity, m, n_restarts=3, is_bound_needed=False).bound >= found.bound - 1e-4


def test_one_group_and_single_tasks_need_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdp, "solve_by_splitting", lambda *_, **__: pytest.fail("no relaxation is needed here"))
    affinity = random_affinity(6)
    together, apart = cluster(affinity, 1), cluster(affinity, 6)
    assert together.groups == (tuple(range(6)),) and apart.groups == tuple((i,) for i in range(6))
    assert together.gap == apart.gap == 0
    np.testing.assert_allclose(solve_relaxation(affinity, 1).matrix, 1 / 6)
    np.testing.assert_allclose(solve_relaxation(affinity, 6).matrix, np.eye(6))


@pytest.mark.parametrize(("n", "m"), [(6, 2), (7, 3), (9, 4), (33, 3)])
def test_the_relaxation_is_feasible_and_above_every_partition(n: int, m: int) -> None:
    affinity = random_affinity(n, 3) * 40 + 7  # neither centred nor of unit size
    relaxation = solve_relaxation(affinity, m)
    x, spread = relaxation.matrix, 40.0
    np.testing.assert_allclose(x.sum(axis=1), 1, atol=1e-4)
    assert np.trace(x) == pytest.approx(m, abs=1e-3) and x.min() > -1e-4 and np.linalg.eigvalsh(x).min() > -1e-4
    assert relaxation.objective == pytest.approx((affinity * x).sum(), abs=1e-3 * spread)
    assert relaxation.bound == pytest.approx(relaxation.objective, abs=1e-3 * spread)
    if n < 9:
        best = max(slow_objective(affinity, groups) for groups in enumerate_partitions(n, m))
        assert relaxation.bound >= best - 1e-9 * spread


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), m=st.integers(1, 5), is_free=st.booleans())
def test_any_dual_values_bound_every_partition(seed: int, m: int, is_free: bool) -> None:
    rng = np.random.default_rng(seed)
    affinity, penalty = random_affinity(5, seed), 0.3
    bound = bound_objective(affinity, None if is_free else m, penalty, rng.normal(size=5), rng.normal(size=(5, 5)))
    for groups in enumerate_partitions(5, m):
        objective = (affinity * incidence(groups)).sum()
        assert objective == pytest.approx(compute_objective(affinity, groups))
        assert bound >= objective - (penalty * m if is_free else 0) - 1e-9


def test_a_larger_trace_penalty_gives_fewer_groups() -> None:
    affinity, truth = planted_affinity((4, 4, 4), noise=0.05)
    traces = [float(np.trace(solve_relaxation(affinity, trace_penalty=p).matrix)) for p in (0.0, 0.5, 2.0, 20.0)]
    assert all(later <= earlier + 1e-4 for earlier, later in itertools.pairwise(traces))
    assert traces[-1] == pytest.approx(1, abs=1e-3)
    free = solve_relaxation(affinity, trace_penalty=2.0)
    assert np.trace(free.matrix) == pytest.approx(3, abs=0.05)
    assert free.bound >= compute_objective(affinity, truth) - 2.0 * 3 - 1e-9


def test_rounding_reaches_the_optimum_on_noisy_affinities() -> None:
    hits = 0
    for seed in range(12):
        affinity, _ = planted_affinity((4, 3, 3), noise=1.5, seed=seed)
        relaxed = solve_relaxation(affinity, 3).matrix
        hits += round_to_groups(relaxed, affinity, 3) == find_best_partition(affinity, 3)
    assert hits == 12


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 8), m=st.integers(1, 5), seed=st.integers(0, 1000))
def test_local_search_ends_where_no_move_or_swap_helps(n: int, m: int, seed: int) -> None:
    affinity, m = random_affinity(n, seed), min(m, n)
    start = np.concatenate([np.arange(m), np.random.default_rng(seed).integers(m, size=n - m)])
    labels = improve_labels(affinity, start, m)
    value = slow_objective(affinity, to_partition(labels))
    assert value >= slow_objective(affinity, to_partition(start)) - 1e-9
    neighbours = [np.where(np.arange(n) == i, g, labels) for i in range(n) for g in range(m)]
    for i, j in itertools.combinations(range(n), 2):
        swapped = labels.copy()
        swapped[[i, j]] = labels[[j, i]]
        neighbours.append(swapped)
    kept = [p for p in map(to_partition, neighbours) if len(p) == m]
    assert max((slow_objective(affinity, p) for p in kept), default=value) <= value + 1e-8


def test_empty_groups_are_filled_by_the_task_whose_leaving_costs_least() -> None:
    affinity, truth = planted_affinity((4, 4), noise=0.05)
    affinity[0] -= 3
    affinity[:, 0] -= 3
    affinity[0, 0] += 6
    labels = repair_labels(affinity, 5 * to_labels(truth), 3)
    assert (0,) in to_partition(labels) and len(to_partition(labels)) == 3
    assert len(to_partition(repair_labels(affinity, np.zeros(8, dtype=np.int64), 8))) == 8


def test_the_papers_threshold_joins_transitively_and_the_number_of_groups_is_an_outcome() -> None:
    x = np.eye(5)
    for i, j in [(0, 1), (1, 2)]:  # 0 and 2 meet only through 1
        x[i, j] = x[j, i] = 0.3
    assert threshold_groups(x, 1.0) == ((0, 1, 2), (3,), (4,))
    assert threshold_groups(x, 2.0) == ((0,), (1,), (2,), (3,), (4,))
    assert threshold_groups(np.full((4, 4), 0.25), 1.0) == ((0, 1, 2, 3),)
    affinity, truth = planted_affinity((5, 3, 2), noise=0.02)
    assert cluster(affinity, 3, rounding="threshold").groups == truth
    loose = cluster(random_affinity(9, 5), 4, rounding="threshold")
    assert len(loose.groups) != 4 and loose.gap >= 0
    assert loose.bound >= cluster(random_affinity(9, 5), len(loose.groups)).objective - 1e-6


def test_density_does_not_depend_on_the_level_of_the_scores() -> None:
    affinity = random_affinity(7)
    groups: Partition = ((0, 1, 2), (3, 4), (5, 6))
    centred = affinity - np.diag(affinity).mean()
    assert compute_density(affinity, groups) == pytest.approx(slow_objective(centred, groups) / 3)
    assert compute_density(affinity + 11, groups) == pytest.approx(compute_density(affinity, groups))


def test_without_structure_there_is_still_an_answer() -> None:
    for matrix in (np.zeros((6, 6)), np.full((14, 14), -3.0)):
        found = cluster(matrix, 3, n_restarts=2)
        assert len(found.groups) == 3 and found.gap == pytest.approx(0, abs=1e-6)


def test_large_problems_start_from_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    affinity, truth = planted_affinity((14, 10, 6), noise=0.3)
    monkeypatch.setattr("ensemblelora.grouping._MAX_TASKS_FOR_SDP", 20)
    monkeypatch.setattr(sdp, "solve_by_splitting", lambda *_, **__: pytest.fail("too large to relax"))
    found = cluster(affinity, 3, n_restarts=3)
    assert found.groups == truth and found.gap >= 0


def solve_slowly(affinity: np.ndarray, n_groups: int | None, trace_penalty: float) -> float:
    """The relaxation as it is written down, by an interior-point method."""
    n = len(affinity)
    x = cvxpy.Variable((n, n), PSD=True)
    constraints = [cvxpy.sum(x, axis=1) == 1, x >= 0]
    if n_groups is not None:
        constraints.append(cvxpy.trace(x) == n_groups)
    objective = cvxpy.sum(cvxpy.multiply(affinity, x)) - trace_penalty * cvxpy.trace(x)
    problem = cvxpy.Problem(cvxpy.Maximize(objective), constraints)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on how cvxpy calls its solver
        problem.solve(solver="CLARABEL")
    assert problem.status == "optimal"
    return float(problem.value)


@pytest.mark.parametrize(
    ("n", "n_groups", "trace_penalty"),
    [
        (3, 2, 0),
        (7, 2, 0),
        (9, 7, 0),
        (16, 4, 0),
        (24, 3, 0),
        (9, None, 0),
        (9, None, 0.3),
        (16, None, 1),
        (9, None, 50),
    ],
)
@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_splitting_finds_the_optimum_that_an_interior_point_method_finds(n, n_groups, trace_penalty, noise) -> None:
    affinity, _ = planted_affinity((n // 2, n - n // 2), noise=noise)
    optimum = solve_slowly(affinity, n_groups, trace_penalty)
    found = solve_relaxation(affinity, n_groups, trace_penalty=trace_penalty)
    assert found.status.startswith("optimal")
    assert found.objective == pytest.approx(optimum, abs=1e-5 * n)
    assert optimum - 1e-6 * n <= found.bound <= optimum + 1e-5 * n


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 12),
    share=st.floats(0.01, 0.99),
    spread=st.sampled_from([0.0, 0.1, 1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_the_slice_of_the_cube_is_met_at_its_nearest_point(n: int, share: float, spread: float, seed: int) -> None:
    values = np.sort(np.random.default_rng(seed).normal(size=n) * spread)
    total = share * n
    found = _project_to_slice(values, total)
    assert found.min() >= 0 and found.max() <= 1 and found.sum() == pytest.approx(total)
    low, high = values.min() - 1.0, values.max()  # the twin: one level for all, by halving
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(values - middle, 0, 1).sum() > total else (low, middle)
    np.testing.assert_allclose(found, np.clip(values - low, 0, 1), atol=1e-9 * max(spread, 1))


@pytest.mark.parametrize("n_groups", [2, 4, None])
def test_the_spectral_projection_is_the_nearest_point_of_its_half(n_groups) -> None:
    matrix, price = random_affinity(7) * 3, 0.2 if n_groups is None else 0.0
    found = _project_spectrum(matrix, n_groups, price)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert np.linalg.eigvalsh(found).min() > -1e-12 and np.linalg.eigvalsh(found).max() < 1 + 1e-12
    if n_groups is not None:
        assert np.trace(found) == pytest.approx(n_groups)
        np.testing.assert_allclose(_project_spectrum(found, n_groups, 0.0), found, atol=1e-9)
    for groups in enumerate_partitions(7, n_groups or 3):  # they lie in it; none may lie on the matrix's side
        toward = incidence(groups) - found
        assert ((matrix - price * np.eye(7) - found) * toward).sum() <= 1e-9


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), m=st.integers(2, 5))
def test_no_row_duals_bound_better_than_the_chosen(seed: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    affinity, entries = random_affinity(6, seed), np.abs(random_affinity(6, seed + 1))
    chosen = bound_objective(affinity, m, 0.0, choose_row_duals(affinity, 0.0, entries), entries)
    for size in (0.01, 1.0, 10.0):
        other = choose_row_duals(affinity, 0.0, entries) + size * rng.normal(size=6)
        assert chosen <= bound_objective(affinity, m, 0.0, other, entries) + 1e-9


def test_many_tasks_are_relaxed_in_single_precision_with_a_bound_that_holds(monkeypatch) -> None:
    affinity, truth = planted_affinity((70, 50, 40), noise=1.0)
    found = solve_relaxation(affinity, 3)
    monkeypatch.setattr(splitting, "_MAX_TASKS_IN_FLOAT64", 160)
    exact = solve_relaxation(affinity, 3)
    assert exact.objective == pytest.approx(exact.bound, rel=1e-6)
    assert compute_objective(affinity, truth) <= exact.objective + 1e-6 <= found.bound + 2e-6
    assert found.bound == pytest.approx(exact.bound, rel=2e-4)
    assert found.objective == pytest.approx(exact.objective, rel=2e-3)
    np.testing.assert_allclose(found.matrix.sum(axis=1), 1, atol=1e-4)
    assert cluster(affinity, 3, n_restarts=2).groups == truth


def test_a_relaxation_stopped_short_says_so_and_still_bounds(monkeypatch, caplog) -> None:
    affinity = random_affinity(9)
    monkeypatch.setattr(sdp, "solve_by_splitting", partial(solve_by_splitting, max_iter=7))
    with caplog.at_level(logging.WARNING):
        found = solve_relaxation(affinity, 3)
    assert found.status == "inaccurate after 7 iterations" and "the bound still holds" in caplog.text
    best = max(slow_objective(affinity, groups) for groups in enumerate_partitions(9, 3))
    assert found.bound >= best


def test_an_eigendecomposition_that_fails_is_an_error() -> None:
    with pytest.raises(SolverError, match="5 tasks"):
        solve_by_splitting(np.full((5, 5), np.nan), 2)


def test_bad_input_is_refused() -> None:
    affinity = random_affinity(4)
    with pytest.raises(ConfigError, match="n_groups 5: expected 1 to 4"):
        cluster(affinity, 5)
    with pytest.raises(ConfigError, match="expected 1 to 4"):
        find_best_partition(affinity, 0)
    with pytest.raises(ConfigError, match="at most 12"):
        find_best_partition(random_affinity(13), 2)
    with pytest.raises(ConfigError, match="trace penalty -1"):
        solve_relaxation(affinity, trace_penalty=-1)
    with pytest.raises(DataError, match="shape"):
        cluster(affinity[:3], 2)
    with pytest.raises(DataError, match="not symmetric"):
        cluster(affinity + np.triu(np.ones((4, 4)), 1), 2)
    with pytest.raises(DataError, match="not finite"):
        cluster(np.where(np.eye(4) > 0, np.nan, affinity), 2)
