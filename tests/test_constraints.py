"""Groupings with constraints against all partitions that meet them, and what is said of those that none meets."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from functools import partial

import cvxpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemblelora import grouping, pipeline
from ensemblelora.config import GroupingConfig, RunConfig
from ensemblelora.errors import ConfigError, SolverError
from ensemblelora.grouping import (
    Constraints,
    Partition,
    allowed,
    can_meet,
    cluster,
    enumerate_partitions,
    find_labels,
    improve_labels,
    round_to_groups,
    solve_relaxation,
    sort_groups,
    to_partition,
)
from ensemblelora.planning import choose_groups, demand
from ensemblelora.planning.budget import Budget
from ensemblelora.planning.demand import (
    find_budget_fault,
    list_demand_faults,
    list_group_numbers,
    read_constraints,
    read_groups,
)
from ensemblelora.planning.judge import make_judge
from ensemblelora.planning.search import refine_partition
from tests.test_grouping import incidence, random_affinity, slow_objective
from tests.test_planning import OPPOSED, affinity_of, make_features, make_oracle, plan_for
from tests.tiny_run import TASKS, make_inputs, read_config, read_json

NAMES = tuple("abcdefg")


def slow_allows(constraints: Constraints, groups: Partition) -> bool:
    """Every constraint as it is said, pair by pair."""
    home = {task: g for g, group in enumerate(groups) for task in group}
    together = all(home[i] == home[j] for linked in constraints.must_link for i in linked for j in linked)
    apart = all(home[i] != home[j] for tasks in constraints.cannot_link for i, j in itertools.combinations(tasks, 2))
    largest = constraints.n_tasks if constraints.max_size is None else constraints.max_size
    return together and apart and all(constraints.min_size <= len(group) <= largest for group in groups)


def list_allowed(constraints: Constraints, n_groups: int) -> list[Partition]:
    return [p for p in enumerate_partitions(constraints.n_tasks, n_groups) if slow_allows(constraints, p)]


@st.composite
def constraints_of(draw: st.DrawFn, n_tasks: int) -> Constraints:
    tasks = st.lists(st.integers(0, n_tasks - 1), min_size=2, max_size=3, unique=True).map(tuple)
    return Constraints(
        n_tasks,
        must_link=tuple(draw(st.lists(tasks, max_size=2))),
        cannot_link=tuple(draw(st.lists(tasks, max_size=3))),
        min_size=draw(st.integers(1, 3)),
        max_size=draw(st.none() | st.integers(1, n_tasks)),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(2, 7), seed=st.integers(0, 1000))
def test_the_best_of_all_partitions_that_meet_the_constraints_is_found(data, n, seed) -> None:
    constraints, m = data.draw(constraints_of(n)), data.draw(st.integers(1, n))
    affinity, fitting = random_affinity(n, seed), list_allowed(constraints, m)
    assert can_meet(constraints, range(m, m + 1)) == bool(fitting)
    if not fitting:
        with pytest.raises(ConfigError, match=f"no partition of the tasks into {m} groups meets the constraints"):
            cluster(affinity, m, constraints=constraints)
        return
    found = cluster(affinity, m, constraints=constraints)
    best = max(slow_objective(affinity, groups) for groups in fitting)
    assert len(found.groups) == m and slow_allows(constraints, found.groups) and constraints.allows(found.groups)
    assert found.objective == pytest.approx(slow_objective(affinity, found.groups)) == pytest.approx(best, abs=1e-9)
    assert found.bound >= best - 1e-9 and found.gap >= 0


@settings(max_examples=25, deadline=None)
@given(data=st.data(), n=st.integers(2, 6))
def test_constraints_mean_what_they_say(data, n) -> None:
    constraints = data.draw(constraints_of(n))
    for m in range(1, n + 1):
        for groups in enumerate_partitions(n, m):
            if not constraints.is_contradictory:
                assert constraints.allows(groups) == slow_allows(constraints, groups)
            else:
                assert not slow_allows(constraints, groups)
    numbers = [m for m in range(1, n + 1) if list_allowed(constraints, m)]
    for first, last in itertools.combinations_with_replacement(range(1, n + 1), 2):
        assert can_meet(constraints, range(first, last + 1)) == any(first <= m <= last for m in numbers)
    assert constraints.is_free == all(
        slow_allows(constraints, p) for m in range(1, n + 1) for p in enumerate_partitions(n, m)
    )


def test_links_are_transitive_and_units_are_in_order() -> None:
    constraints = Constraints(7, must_link=((5, 2), (6, 0), (2, 4)))
    assert constraints.units == ((0, 6), (1,), (2, 4, 5), (3,))
    assert constraints.limits.sizes.tolist() == [2, 1, 3, 1]
    affinity = random_affinity(7)
    merged = constraints.merge(affinity)
    for u, one in enumerate(constraints.units):
        for v, other in enumerate(constraints.units):
            assert merged[u, v] == pytest.approx(sum(affinity[i, j] for i in one for j in other))
    assert Constraints(4, must_link=((0, 1), (1, 2)), cannot_link=((2, 0),)).is_contradictory


@settings(max_examples=30, deadline=None)
@given(data=st.data(), n=st.integers(2, 6), m=st.integers(1, 4), seed=st.integers(0, 100))
def test_the_nearest_labels_that_meet_the_limits_are_found(data, n, m, seed) -> None:
    constraints = data.draw(constraints_of(n))
    limits, n_units = constraints.limits, len(constraints.units)
    start = np.random.default_rng(seed).integers(m, size=n_units)
    every = (np.array(labels) for labels in itertools.product(range(m), repeat=n_units))
    fitting = [labels for labels in every if len(set(labels)) == m and limits.allows(labels)]
    found, anyhow = find_labels(limits, m, m, near=start), find_labels(limits, m, m)
    assert (found is None) == (anyhow is None) == (not fitting)
    if found is not None and anyhow is not None:
        assert limits.allows(found) and limits.allows(anyhow) and len(set(found)) == len(set(anyhow)) == m
        kept = [float(limits.sizes[labels == start].sum()) for labels in fitting]
        assert limits.sizes[found == start].sum() == max(kept)


def solve_slowly(affinity: np.ndarray, m: int, constraints: Constraints) -> tuple[float, np.ndarray]:
    """The relaxation over all tasks as it is written down, rows of linked tasks set equal, by an interior point."""
    n = len(affinity)
    x = cvxpy.Variable((n, n), PSD=True)
    rules = [cvxpy.sum(x, axis=1) == 1, x >= 0, cvxpy.trace(x) == m, x <= 1 / constraints.min_size]
    rules += [cvxpy.diag(x) >= 1 / (constraints.max_size or n)]
    rules += [x[i, :] == x[j, :] for linked in constraints.must_link for i, j in itertools.pairwise(linked)]
    rules += [x[i, j] == 0 for tasks in constraints.cannot_link for i, j in itertools.combinations(tasks, 2)]
    problem = cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(cvxpy.multiply(affinity, x))), rules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on how cvxpy calls its solver
        problem.solve(solver="CLARABEL")
    assert problem.status == "optimal"
    return float(problem.value), np.asarray(x.value)


CONSTRAINED = {
    "apart": (8, 3, {"cannot_link": ((0, 1, 2), (3, 4))}),
    "together": (8, 3, {"must_link": ((0, 1, 2), (3, 4))}),
    "sizes": (9, 3, {"min_size": 2, "max_size": 4}),
    "equal sizes": (8, 4, {"min_size": 2, "max_size": 2}),
    "all": (10, 3, {"must_link": ((0, 1),), "cannot_link": ((0, 2), (1, 5), (3, 4)), "min_size": 2, "max_size": 5}),
}


@pytest.mark.parametrize("case", CONSTRAINED)
def test_the_relaxation_of_units_is_that_of_tasks_with_equal_rows(case) -> None:
    n, m, asked = CONSTRAINED[case]
    constraints, affinity = Constraints(n, **asked), random_affinity(n, 5) * 3 + 1
    found = solve_relaxation(constraints.merge(affinity), m, limits=constraints.limits)
    optimum, _ = solve_slowly(affinity, m, constraints)
    assert found.status.startswith("optimal")
    assert found.objective == pytest.approx(optimum, abs=2e-4)
    assert optimum - 1e-5 <= found.bound <= optimum + 2e-4
    best = max(slow_objective(affinity, groups) for groups in list_allowed(constraints, m))
    assert found.bound >= best - 1e-9
    unit_of = [u for task in range(n) for u, unit in enumerate(constraints.units) if task in unit]
    x = found.matrix[np.ix_(unit_of, unit_of)]  # one row a task
    np.testing.assert_allclose(x.sum(axis=1), 1, atol=1e-4)
    assert np.trace(x) == pytest.approx(m, abs=1e-4)
    assert x.min() > -1e-4 and x.max() < 1 / constraints.min_size + 1e-4
    assert np.diag(x).min() > 1 / (constraints.max_size or n) - 1e-4
    assert all(abs(x[i, j]) < 1e-4 for tasks in constraints.cannot_link for i, j in itertools.combinations(tasks, 2))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), n=st.integers(3, 6), seed=st.integers(0, 500))
def test_any_dual_values_bound_every_partition_that_meets_the_constraints(data, n, seed) -> None:
    constraints = data.draw(constraints_of(n))
    k = len(constraints.units)
    m = data.draw(st.integers(1, k))
    if constraints.is_contradictory or not list_allowed(constraints, m):
        return
    rng, affinity = np.random.default_rng(seed), random_affinity(n, seed)
    domain = grouping.sdp._describe_domain(constraints.limits)
    frame = np.outer(domain.roots, domain.roots)
    own = constraints.merge(affinity) / frame
    bound = grouping.bound_objective(own, m, 0.0, rng.normal(size=k), rng.normal(size=(k, k)), domain)
    entries = domain.cut(rng.normal(size=(k, k)))
    rows = grouping.bound.choose_row_duals(own, 0.0, entries, domain.roots)
    better = grouping.bound_objective(own, m, 0.0, rows, entries, domain)
    other = grouping.bound_objective(own, m, 0.0, rows + rng.normal(size=k), entries, domain)
    assert better <= other + 1e-9
    for groups in list_allowed(constraints, m):
        objective = (affinity * incidence(groups)).sum()
        assert min(bound, better) >= objective - 1e-9


@pytest.mark.parametrize("case", CONSTRAINED)
def test_rounding_meets_the_constraints_and_mostly_the_optimum(case, monkeypatch) -> None:
    n, m, asked = CONSTRAINED[case]
    constraints = Constraints(n, **asked)
    monkeypatch.setattr(grouping, "MAX_TASKS_FOR_EXACT", 0)
    hits = 0
    for seed in range(4):
        affinity = random_affinity(n, seed)
        found = cluster(affinity, m, constraints=constraints, n_restarts=8, is_bound_needed=seed == 0)
        assert len(found.groups) == m and slow_allows(constraints, found.groups)
        best = max(slow_objective(affinity, groups) for groups in list_allowed(constraints, m))
        assert found.objective <= best + 1e-9 <= found.bound + 1e-6
        hits += found.objective == pytest.approx(best)
    assert hits >= 3


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(3, 7), m=st.integers(2, 4), seed=st.integers(0, 1000))
def test_local_search_ends_where_no_allowed_move_or_swap_helps(data, n, m, seed) -> None:
    constraints = data.draw(constraints_of(n))
    limits, units = constraints.limits, constraints.units
    start = find_labels(limits, m, m)
    if constraints.is_contradictory or start is None:
        return
    affinity = random_affinity(n, seed)

    def value_of(labels: np.ndarray) -> float:
        return slow_objective(
            affinity, sort_groups(sum((units[u] for u in group), ()) for group in to_partition(labels))
        )

    labels = improve_labels(constraints.merge(affinity), start, m, limits)
    assert limits.allows(labels) and value_of(labels) >= value_of(start) - 1e-9
    neighbours = [np.where(np.arange(len(units)) == u, g, labels) for u in range(len(units)) for g in range(m)]
    for u, v in itertools.combinations(range(len(units)), 2):
        swapped = labels.copy()
        swapped[[u, v]] = labels[[v, u]]
        neighbours.append(swapped)
    kept = [other for other in neighbours if len(set(other)) == m and limits.allows(other)]
    assert max(map(value_of, kept)) <= value_of(labels) + 1e-8


@pytest.mark.parametrize("n", [8, 20])
def test_constrained_clustering_does_not_depend_on_how_tasks_are_numbered(n) -> None:
    affinity, order = random_affinity(n), np.random.default_rng(3).permutation(n)
    places = np.argsort(order).tolist()  # task i is number places[i] among the moved
    must, cannot = ((0, 3), (3, 5)), ((1, 2, 4), (0, 7))
    moved = {
        key: tuple(tuple(places[task] for task in tasks) for tasks in lists)
        for key, lists in (("must_link", must), ("cannot_link", cannot))
    }
    one = cluster(affinity, 3, constraints=Constraints(n, must, cannot, min_size=2), n_restarts=5)
    other = cluster(affinity[np.ix_(order, order)], 3, constraints=Constraints(n, **moved, min_size=2), n_restarts=5)
    assert sort_groups([order[list(group)].tolist() for group in other.groups]) == one.groups
    assert other.objective == pytest.approx(one.objective)


@pytest.mark.parametrize(("n", "m"), [(7, 3), (18, 4)])
def test_constraints_that_bar_nothing_change_nothing(n, m) -> None:
    affinity = random_affinity(n)
    loose = Constraints(n, cannot_link=(), must_link=(), min_size=1, max_size=n)
    assert loose.is_free and cluster(affinity, m, constraints=loose) == cluster(affinity, m)


def test_many_tasks_with_tight_sizes_are_grouped(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    family = np.repeat(np.arange(6), 5)
    affinity = (family[:, None] == family) + 0.2 * rng.normal(size=(30, 30))
    affinity = (affinity + affinity.T) / 2
    constraints = Constraints(30, must_link=((0, 1), (6, 7, 8)), cannot_link=((0, 10), (2, 3)), min_size=5, max_size=5)
    found = cluster(affinity, 6, constraints=constraints, n_restarts=4)
    assert slow_allows(constraints, found.groups) and {len(group) for group in found.groups} == {5}
    assert found.objective > 0.6 * cluster(affinity, 6, n_restarts=4).objective
    monkeypatch.setattr(grouping, "_MAX_TASKS_FOR_SDP", 10)
    spectral = cluster(affinity, 6, constraints=constraints, n_restarts=4)
    assert slow_allows(constraints, spectral.groups) and spectral.gap >= 0


def test_an_unsettled_search_is_an_error_of_its_own(monkeypatch) -> None:
    limits = Constraints(5, cannot_link=((0, 1),)).limits
    stopped = type("Stopped", (), {"x": None, "status": 1, "message": "time limit reached"})
    monkeypatch.setattr("scipy.optimize.milp", lambda *_, **__: stopped)
    with pytest.raises(SolverError, match=r"5 tasks in 2 to 2 groups: .* not settled in 30 seconds"):
        find_labels(limits, 2, 2)
    config = GroupingConfig(cannot_link=(("a", "b"),), max_groups=2)
    assert list(list_demand_faults(config, NAMES[:5])) == [], "what can't be ruled out is tried"


def test_threshold_rounding_knows_no_constraints() -> None:
    with pytest.raises(ConfigError, match=r"threshold joins tasks whatever the constraints say; use best"):
        cluster(random_affinity(5), 2, constraints=Constraints(5, must_link=((0, 1),)), rounding="threshold")
    free = cluster(random_affinity(5), 2, constraints=Constraints(5), rounding="threshold")
    assert free == cluster(random_affinity(5), 2, rounding="threshold")


IMPOSSIBLE = [
    ({"n_groups": 9}, ["grouping.n_groups 9: expected 1 to 7, the number of tasks"]),
    ({"must_link": [["a", "aa"]]}, ["grouping.must_link: no task is named 'aa'; did you mean a"]),
    ({"cannot_link": [["x1", "y1"]]}, ["grouping.cannot_link: no task is named 'x1' or 'y1'; the tasks are a, b, c"]),
    ({"groups": [["a", "zz9"]]}, ["grouping.groups: no task is named 'zz9'"]),
    ({"min_group_size": 8}, ["grouping.min_group_size 8 can't be met by any grouping of 7 tasks; change it"]),
    ({"min_group_size": 4, "max_group_size": 3}, ["grouping.min_group_size 4 and grouping.max_group_size 3 can't"]),
    ({"min_group_size": 4, "n_groups": 2}, ["grouping.min_group_size 4 and grouping.n_groups 2 can't be met"]),
    ({"max_group_size": 2, "max_groups": 3}, ["grouping.max_group_size 2 and grouping.max_groups 3 can't be met"]),
    ({"max_group_size": 2, "must_link": [["a", "b"], ["b", "c"], ["d", "e"]]},
     ["grouping.max_group_size 2, grouping.must_link [a, b] and grouping.must_link [b, c] can't be met"]),
    ({"cannot_link": [["a", "c"], ["d", "e"]], "must_link": [["a", "b"], ["c", "b"], ["f", "g"]]},
     ["grouping.must_link [a, b], grouping.must_link [c, b] and grouping.cannot_link [a, c] can't be met",
      "change one of them"]),
    ({"cannot_link": [["a", "b", "c", "d"]], "max_groups": 3},
     ["grouping.cannot_link [a, b, c, d] and grouping.max_groups 3 can't be met"]),
    ({"cannot_link": [["a", "b"]], "n_groups": 1}, ["grouping.cannot_link [a, b] and grouping.n_groups 1 can't"]),
    ({"cannot_link": [["a", "a"]]}, ["grouping.cannot_link [a, a] can't be met by any grouping of 7 tasks; change it"]),
    ({"must_link": [["a", "b"]], "rounding": "threshold"},
     ["grouping.rounding threshold: it joins tasks whatever grouping.must_link [a, b] says; use best"]),
    ({"groups": [["a", "b"], ["b", "c", "d"]]},
     ["grouping.groups: e, f, g in no group", "grouping.groups: b named twice"]),
    ({"groups": [list("abc"), list("defg")], "n_groups": 3}, ["grouping.n_groups 3: grouping.groups has 2"]),
    ({"groups": [list("abc"), list("defg")], "cannot_link": [["a", "b"], ["a", "d"]], "max_group_size": 3},
     ["these groups break grouping.max_group_size 3 and grouping.cannot_link [a, b]; change one of them"]),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "told"), IMPOSSIBLE, ids=[str(asked) for asked, _ in IMPOSSIBLE])
def test_what_no_grouping_meets_is_refused_by_name(asked, told) -> None:
    config = GroupingConfig.model_validate(asked)
    line = "; ".join(list_demand_faults(config, NAMES))
    assert all(part in line for part in told), line
    with pytest.raises(ConfigError, match=re.escape(line)):
        demand.check_demands(config, NAMES)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), n=st.integers(2, 6))
def test_a_conflict_holds_nothing_that_could_be_left_out(data, n) -> None:
    names = NAMES[:n]
    tasks = st.lists(st.sampled_from(names), min_size=2, max_size=3, unique=True).map(tuple)
    config = GroupingConfig(
        must_link=tuple(data.draw(st.lists(tasks, max_size=3))),
        cannot_link=tuple(data.draw(st.lists(tasks, max_size=3))),
        min_group_size=data.draw(st.integers(1, 3)),
        max_group_size=data.draw(st.none() | st.integers(1, n)),
        max_groups=data.draw(st.integers(1, n)),
    )
    constraints = read_constraints(config, names)
    numbers = [m for m in range(1, config.max_groups + 1) if list_allowed(constraints, m)]
    assert list_group_numbers(config, names) == numbers
    demands = [*demand._list_demands(config), demand._Demand("max_groups", config.max_groups)]
    conflict = demand._find_conflict(demands, names)
    assert bool(conflict) == (not numbers) == bool(list(list_demand_faults(config, names)))

    def can_be_met(kept: list[demand._Demand]) -> bool:
        own = demand._constrain([d for d in kept if d.key != "max_groups"], names)
        most = config.max_groups if any(d.key == "max_groups" for d in kept) else n
        return any(list_allowed(own, m) for m in range(1, most + 1))

    if conflict:
        assert not can_be_met(conflict)
        assert all(can_be_met([d for d in conflict if d is not one]) for one in conflict)


def test_demands_that_can_be_met_leave_no_fault() -> None:
    config = GroupingConfig(must_link=(("a", "c"),), cannot_link=(("a", "b"),), min_group_size=2, max_groups=4)
    assert list(list_demand_faults(config, NAMES)) == []
    assert list_group_numbers(config, NAMES) == [2, 3]
    assert read_constraints(config, NAMES) == Constraints(7, ((0, 2),), ((0, 1),), 2, None)
    given_groups = GroupingConfig(groups=(("g", "a"), tuple("bcdef")))
    assert read_groups(given_groups, NAMES) == ((1, 2, 3, 4, 5), (0, 6)) and given_groups.n_groups_asked == 2
    assert read_groups(config, NAMES) is None and config.n_groups_asked is None


def test_budgets_are_held_against_what_the_constraints_leave() -> None:
    apart = GroupingConfig(cannot_link=(("a", "b", "c"),))
    assert find_budget_fault(apart, NAMES, Budget(100, 0, 300)) is None
    fault = find_budget_fault(apart, NAMES, Budget(100, 0, 250))
    assert fault is not None and fault.startswith("grouping: the constraints need 3 groups, which take 300 bytes")
    by_hand = GroupingConfig(groups=(("a", "b"), tuple("cdefg")))
    assert "grouping.groups: 2 groups take 200 bytes" in str(find_budget_fault(by_hand, NAMES, Budget(100, 0, 150)))
    assert find_budget_fault(GroupingConfig(), NAMES, Budget(100, 0, 50)) is None, "one adapter is always a way"


# Families 0 and 1 are opposite: tasks 0, 2, 5 against 1, 3, 4.
@pytest.fixture(scope="module")
def opposed():
    return make_oracle(make_features(OPPOSED))


def names_of(*tasks: int) -> tuple[str, ...]:
    return tuple(f"task-{i}" for i in tasks)


def test_a_plan_meets_its_constraints_at_every_number_of_groups(opposed) -> None:
    asked = {"cannot_link": (names_of(0, 2),), "must_link": (names_of(1, 3),), "max_group_size": 4}
    plan = plan_for(opposed, max_groups=4, **asked)
    constraints = read_constraints(GroupingConfig(**asked), opposed.task_names)
    assert [point.n_groups for point in plan.curve] == [1, 2, 3, 4]
    assert [constraints.allows(point.groups) for point in plan.curve] == [False, True, True, True]
    assert [point.allowed for point in plan.curve] == [False, True, True, True]
    assert plan.decision == "group" and constraints.allows(plan.groups)
    assert plan.reason.endswith("; the constraints rule one adapter for all out.")
    named = {way.name: way for way in plan.comparisons}
    assert named["gradient cosine"].groups is not None and constraints.allows(named["gradient cosine"].groups)
    free = plan_for(opposed, max_groups=4)
    assert (
        plan.predicted.plan.mean_nll >= free.predicted.plan.mean_nll and plan.predicted.shared == free.predicted.shared
    )


def test_where_one_adapter_is_ruled_out_the_best_grouping_is_taken_though_it_loses() -> None:
    friends = make_oracle(make_features((0,) * 6))
    assert plan_for(friends, max_groups=4).decision == "one adapter"
    plan = plan_for(friends, max_groups=4, cannot_link=(names_of(0, 1),))
    assert plan.decision == "group" and plan.curve[len(plan.groups) - 1].gain < 0
    assert "worse than one adapter for all" in plan.reason and "rule one adapter for all out" in plan.reason
    tight = plan_for(friends, max_groups=2, n_groups=4, max_group_size=2)
    assert tight.n_groups_auto == 4 and {len(group) for group in tight.groups} <= {1, 2}


def test_refining_moves_linked_tasks_together_and_keeps_others_apart(opposed) -> None:
    judge, affinity = make_judge(opposed, seed=0), affinity_of(opposed)
    start: Partition = ((0, 1, 4), (2, 3, 5))
    constraints = Constraints(6, must_link=((0, 1),), cannot_link=((2, 5),), max_size=4)
    end = refine_partition(((0, 1, 4, 5), (2, 3)), affinity, judge, None, max_solves=1000, constraints=constraints)
    assert slow_allows(constraints, end)
    losses = {p: sum(judge.search_losses(p, None)) for p in list_allowed(constraints, 2)}
    assert losses[end] <= min(losses.values()) + 1e-4, "six tasks are few enough for moves and swaps to find the best"
    free = refine_partition(start, affinity, judge, None, max_solves=1000)
    assert free == refine_partition(start, affinity, judge, None, max_solves=1000, constraints=Constraints(6))


def test_groups_given_by_hand_are_the_plan_and_judged_as_usual(opposed) -> None:
    found = plan_for(opposed, max_groups=3)
    same = plan_for(opposed, max_groups=3, groups=tuple(names_of(*group) for group in found.groups))
    assert same.groups == found.groups and same.predicted == found.predicted
    assert same.reason.startswith("Groups were given by hand (grouping.groups); auto would choose the same. Here: ")
    bad = plan_for(opposed, max_groups=3, groups=(names_of(0, 1), names_of(2, 3), names_of(4), names_of(5)))
    assert bad.groups == ((0, 1), (2, 3), (4,), (5,)) and (bad.n_groups_asked, bad.n_groups_auto) == (4, 2)
    assert "auto would choose 2 groups of its own (predicted mean validation loss" in bad.reason
    slow = [opposed.row_nll([group], task)[0].mean() for group in bad.groups for task in group]
    assert bad.predicted.plan.mean_nll == pytest.approx(np.mean(slow)) != found.predicted.plan.mean_nll
    point = next(point for point in bad.curve if point.n_groups == 4)
    assert point.groups == bad.groups and point.gap >= 0
    one = plan_for(opposed, max_groups=3, groups=(names_of(*range(6)),))
    assert one.decision == "one adapter" and one.predicted.plan == one.predicted.shared


def test_impossible_demands_are_refused_before_the_oracle_is_asked(opposed) -> None:
    before = opposed.n_fits
    config = GroupingConfig(cannot_link=(names_of(0, 1, 2),), max_groups=2)
    with pytest.raises(ConfigError, match="max_groups 2 can't be met by any grouping of 6 tasks"):
        choose_groups(np.eye(6), opposed, config)
    roomy = GroupingConfig(cannot_link=(names_of(0, 1, 2),), max_memory_bytes=250)
    with pytest.raises(ConfigError, match="the constraints need 3 groups, which take 300 bytes"):
        choose_groups(np.eye(6), opposed, roomy, bytes_per_adapter=100)
    assert opposed.n_fits == before


def test_a_run_groups_as_it_is_told_and_refuses_what_it_can_not(tmp_path) -> None:
    recipe = make_inputs(tmp_path)
    by_hand = [[TASKS[0], TASKS[4]], list(TASKS[1:4])]
    run = partial(pipeline.run, until="group")
    grouping_of = partial(lambda **asked: read_config(recipe, grouping={"n_groups": "auto", **asked}))
    run(grouping_of(groups=by_hand))
    plan = read_json(tmp_path, "plan.json")
    assert plan["groups"] == [[1, 2, 3], [0, 4]] and plan["reason"].startswith("Groups were given by hand")
    run(grouping_of(cannot_link=[[TASKS[0], TASKS[1]]], min_group_size=2))
    plan = read_json(tmp_path, "plan.json")
    assert sorted(map(len, plan["groups"])) == [2, 3] and not any({0, 1} <= set(group) for group in plan["groups"])
    config: RunConfig = grouping_of(must_link=[[TASKS[0], TASKS[1]]], cannot_link=[[TASKS[1], TASKS[0]]])
    message = f"grouping.must_link [{TASKS[0]}, {TASKS[1]}] and grouping.cannot_link [{TASKS[1]}, {TASKS[0]}] can't"
    with pytest.raises(ConfigError, match=re.escape(message)):
        run(config)


def test_colouring_is_settled_for_many_tasks() -> None:
    n, rng = 40, np.random.default_rng(1)
    classes = rng.integers(4, size=n)
    pairs = [(i, j) for i, j in itertools.combinations(range(n), 2) if classes[i] != classes[j] and rng.random() < 0.5]
    constraints = Constraints(n, cannot_link=tuple(pairs))
    found = allowed.find_labels(constraints.limits, 4, 4)
    assert found is not None and constraints.limits.allows(found)
    everyone = Constraints(n, cannot_link=(tuple(range(9)),))
    assert not can_meet(everyone, range(1, 9)) and can_meet(everyone, range(1, 10))
    assert math.isinf(cluster(random_affinity(3), 1).bound) is False
    assert round_to_groups(np.eye(9), random_affinity(9), 9, n_restarts=1) == tuple((i,) for i in range(9))


def test_what_parts_all_tasks_is_met_by_one_a_task_unless_they_are_too_many() -> None:
    def faults(n_tasks: int, **asked: object) -> list[str]:
        names = [f"t{i}" for i in range(n_tasks)]
        config = GroupingConfig.model_validate({"cannot_link": [names], **asked})
        found = list(list_demand_faults(config, names))
        assert bool(found) == (not list_group_numbers(config, names))
        return found

    assert faults(8) == []
    assert "grouping.max_groups 6 can't be met" in faults(8, max_groups=6)[0]
    assert "grouping.max_groups auto can't be met" in faults(21)[0]
    assert faults(8, min_group_size=2)
