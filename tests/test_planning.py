"""The choice of groups on toys whose right answer is known, and the laws of judging it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest

from ensemblelora.affinity import affinity_from_scores, sample_subsets
from ensemblelora.config import AffinityConfig, EstimationConfig, GroupingConfig
from ensemblelora.errors import ConfigError, StoreError
from ensemblelora.estimation import Oracle, TaskFeatures, compute_clustered_se
from ensemblelora.grouping import Partition, sort_groups
from ensemblelora.planning import Plan, choose_groups, read_plan
from ensemblelora.planning.budget import Budget
from ensemblelora.planning.choose import _choose, _Contest
from ensemblelora.planning.describe import count_errors_to_part, list_plan_warnings
from ensemblelora.planning.judge import Judge, PairedMeans, average_rows, make_judge, pair_means
from ensemblelora.planning.search import (
    estimate_half_affinity,
    measure_gradient_cosines,
    refine_partition,
    sample_partition,
)
from ensemblelora.store import FeatureBlock

DIMENSION = 8


def make_features(
    families: tuple[int, ...],
    *,
    n_train: int = 30,
    n_validation: int = 60,
    rows_per_group: int = 2,
    mode: str = "margin",
    seed: int = 0,
    projection: int = 0,
) -> TaskFeatures:
    """Tasks whose labels follow their family's direction: 0 and 1 are opposite, others are unrelated."""
    directions = np.random.default_rng([seed, 99]).normal(size=(max(families) + 1, DIMENSION))
    if max(families) > 0:
        directions[1] = -directions[0]
    rotation = np.linalg.qr(np.random.default_rng(projection).normal(size=(DIMENSION, DIMENSION)))[0]
    splits = []
    for split, n in (("train", n_train), ("validation", n_validation)):
        blocks = []
        for i, family in enumerate(families):
            rng = np.random.default_rng([seed, i, n, len(split)])
            gradients, base = rng.normal(size=(n, DIMENSION)), 0.1 * rng.normal(size=n)
            labels = (base + gradients @ directions[family] + 0.5 * rng.logistic(size=n) > 0).astype(np.int64)
            if mode == "sequence":  # the right answer is class 0: turn rows instead of labels
                gradients, labels = gradients * np.where(labels, 1, -1)[:, None], np.zeros(n, dtype=np.int64)
            features = gradients @ rotation
            if projection:
                features *= 1 + 0.2 * np.random.default_rng(projection).normal(size=DIMENSION)
            blocks.append(
                FeatureBlock(
                    f"task-{i}",
                    split,
                    mode,
                    base[:, None].astype(np.float32),
                    features[:, None].astype(np.float32),
                    labels,
                    np.full(n, 2),
                    np.ones(n, np.float32),
                    np.arange(n) // rows_per_group,
                    tuple(map(str, range(n))),
                )
            )
        splits.append(tuple(blocks))
    return TaskFeatures(*splits)


def make_oracle(*features: TaskFeatures, penalty: float = 0.1) -> Oracle:
    return Oracle(features, penalty, EstimationConfig(method="ridge", l2_penalty=penalty))


def affinity_of(oracle: Oracle) -> np.ndarray:
    design = sample_subsets(oracle.n_tasks, AffinityConfig(), seed=0)
    return affinity_from_scores(design, -oracle.score(design.subsets).nll).matrix


def plan_for(oracle: Oracle, seed: int = 0, **settings: object) -> Plan:
    costs = {name: settings.pop(name) for name in ("bytes_per_adapter", "n_boosters", "max_solves") if name in settings}
    return choose_groups(affinity_of(oracle), oracle, GroupingConfig(**settings), seed=seed, **costs)


def slow_row_losses(oracle: Oracle, groups: Partition, task: int) -> np.ndarray:
    (group,) = [group for group in groups if task in group]
    return oracle.row_nll([group], task)[0]


OPPOSED = (0, 1, 0, 1, 1, 0)


@pytest.fixture(scope="module")
def opposed() -> Oracle:
    return make_oracle(make_features(OPPOSED))


@pytest.fixture(scope="module")
def opposed_plan(opposed: Oracle) -> Plan:
    return plan_for(opposed, bytes_per_adapter=100)


def test_conflicting_families_are_grouped(opposed_plan: Plan) -> None:
    plan = opposed_plan
    assert plan.decision == "group" and plan.groups == ((0, 2, 5), (1, 3, 4))
    assert plan.predicted.plan.mean_nll < plan.predicted.shared.mean_nll - 0.1
    assert plan.predicted.plan.mean_nll < plan.predicted.singles.mean_nll
    assert plan.predicted.plan.mean_accuracy > 0.8 > plan.predicted.shared.mean_accuracy
    assert (
        plan.reason.startswith("2 groups: predicted mean validation loss") and "better than one adapter" in plan.reason
    )
    named = {comparison.name: comparison for comparison in plan.comparisons}
    assert list(named) == ["one adapter", "one per task", "random groups", "gradient cosine"]
    assert named["gradient cosine"].groups == plan.groups, "opposite families have opposite gradients"
    assert named["random groups"].predicted_nll > plan.predicted.plan.mean_nll
    assert named["random groups"].predicted_nll_sd > 0


@pytest.mark.parametrize("seed", range(5))
def test_one_family_stays_together(seed: int) -> None:
    plan = plan_for(make_oracle(make_features((0,) * 6, seed=seed)), max_groups=4)
    assert plan.decision == "one adapter" and plan.groups == (tuple(range(6)),)
    assert plan.reason.startswith("No grouping is predicted to beat one adapter for all")
    assert plan.predicted.plan == plan.predicted.shared
    asked = plan_for(make_oracle(make_features((0,) * 6, seed=seed)), max_groups=4, n_groups=1)
    assert asked.reason.endswith(" nats."), "one adapter is neither better nor worse than itself"


def test_three_families_are_told_apart() -> None:
    plan = plan_for(make_oracle(make_features((0, 1, 2, 0, 1, 2, 0, 1), n_train=60)))
    assert plan.groups == ((0, 3, 6), (1, 4, 7), (2, 5))


def test_tasks_with_nothing_in_common_get_an_adapter_each() -> None:
    plan = plan_for(make_oracle(make_features((0, 1, 2, 3), n_train=120), penalty=0.01))
    assert plan.decision == "one per task" and plan.groups == ((0,), (1,), (2,), (3,))
    assert plan.predicted.plan == plan.predicted.singles


def test_the_curve_is_consistent_with_itself(opposed: Oracle, opposed_plan: Plan) -> None:
    curve = opposed_plan.curve
    assert [candidate.n_groups for candidate in curve] == [1, 2, 3, 4, 5, 6]
    assert curve[0].gain == 0 and curve[0].gain_se == 0
    affinity = affinity_of(opposed)
    for candidate in curve:
        assert len(candidate.groups) == candidate.n_groups and candidate.groups == sort_groups(candidate.groups)
        assert candidate.gain == pytest.approx(curve[0].predicted_nll - candidate.predicted_nll)
        assert candidate.adapter_bytes == 100 * candidate.n_groups and candidate.latency_ratio == candidate.n_groups
        assert candidate.allowed and candidate.gap >= 0
        rows = [slow_row_losses(opposed, candidate.groups, task).mean() for task in range(6)]
        assert candidate.search_nll == pytest.approx(np.mean(rows))
        objective = sum(affinity[np.ix_(group, group)].sum() / len(group) for group in candidate.groups)
        assert candidate.objective == pytest.approx(objective)
        assert candidate.bound >= candidate.objective - 1e-9


def test_the_predictions_are_means_of_rows(opposed: Oracle, opposed_plan: Plan) -> None:
    predicted = opposed_plan.predicted
    together: Partition = (tuple(range(6)),)
    for task in range(6):
        rows = slow_row_losses(opposed, together, task)
        assert predicted.shared.nll[task] == pytest.approx(rows.mean())
        assert predicted.shared.nll_se[task] == pytest.approx(
            compute_clustered_se(rows, opposed.validation_groups(task))
        )
        base = opposed.row_nll([()], task)[0]
        assert predicted.base.nll[task] == pytest.approx(base.mean())
    assert predicted.shared.mean_nll == pytest.approx(np.mean(predicted.shared.nll))
    assert predicted.shared.mean_nll_se == pytest.approx(np.sqrt(np.sum(np.square(predicted.shared.nll_se))) / 6)
    assert predicted.shared.mean_nll == pytest.approx(opposed_plan.curve[0].predicted_nll)
    assert predicted.plan.mean_nll == pytest.approx(opposed_plan.curve[1].predicted_nll)


def test_a_plan_is_json_and_comes_back(opposed_plan: Plan) -> None:
    assert read_plan(json.loads(json.dumps(asdict(opposed_plan), allow_nan=False))) == opposed_plan
    with pytest.raises(StoreError, match=r"plan: groups: .*run the group stage again"):
        read_plan({**asdict(opposed_plan), "groups": "all"})


def test_the_same_seed_gives_the_same_plan(opposed: Oracle, opposed_plan: Plan) -> None:
    again = plan_for(make_oracle(*opposed.replicates), bytes_per_adapter=100)
    assert again.groups == opposed_plan.groups and again.reason == opposed_plan.reason
    for one, other in zip(again.curve, opposed_plan.curve, strict=True):
        assert one.groups == other.groups and one.gain == pytest.approx(other.gain, abs=1e-8)


def test_the_order_of_tasks_changes_nothing(opposed: Oracle, opposed_plan: Plan) -> None:
    order = [3, 5, 0, 1, 4, 2]
    moved = TaskFeatures(
        *(tuple(blocks[i] for i in order) for blocks in (opposed.replicates[0].train, opposed.replicates[0].validation))
    )
    plan = plan_for(make_oracle(moved), bytes_per_adapter=100)
    assert sort_groups([order[i] for i in group] for group in plan.groups) == opposed_plan.groups
    for one, other in zip(plan.curve, opposed_plan.curve, strict=True):
        assert one.gain == pytest.approx(other.gain, abs=1e-6) and one.gain_se == pytest.approx(other.gain_se, abs=1e-6)


def flip_half(features: TaskFeatures, judge: Judge, half: int) -> TaskFeatures:
    """Turn every label of the validation rows that one half owns."""
    validation = tuple(
        replace(block, labels=np.where(owner == half, 1 - block.labels, block.labels))
        for block, owner in zip(features.validation, judge.owner, strict=True)
    )
    return TaskFeatures(features.train, validation)


@pytest.mark.parametrize("half", [0, 1])
def test_what_a_half_finds_does_not_depend_on_the_other_half(opposed: Oracle, half: int) -> None:
    judge, design = make_judge(opposed, seed=0), sample_subsets(6, AffinityConfig(), seed=0)
    poisoned = make_judge(make_oracle(flip_half(opposed.replicates[0], judge, 1 - half)), seed=0)
    clean, dirty = (estimate_half_affinity(j, design, half, AffinityConfig()) for j in (judge, poisoned))
    np.testing.assert_allclose(dirty, clean, rtol=1e-9)
    start: Partition = ((0, 1, 2), (3, 4, 5))
    found = [refine_partition(start, clean, j, half, max_solves=500) for j in (judge, poisoned)]
    assert found[0] == found[1]
    other = estimate_half_affinity(poisoned, design, 1 - half, AffinityConfig())
    assert np.abs(other - clean).max() > 0.1, "the flipped half itself does see it"


def test_both_halves_together_are_all_rows_and_no_group_of_rows_is_cut(opposed: Oracle) -> None:
    judge = make_judge(opposed, seed=0)
    for task, (owner, searchable) in enumerate(zip(judge.owner, judge.searchable, strict=True)):
        groups = opposed.validation_groups(task)
        assert all(len(set(owner[groups == group])) == 1 for group in groups)
        np.testing.assert_array_equal(searchable, [owner == 0, owner == 1])
        assert abs(int((owner == 0).sum()) - 30) <= 2


def test_a_half_is_judged_by_what_the_other_found(opposed: Oracle) -> None:
    judge = make_judge(opposed, seed=0)
    first: Partition = ((0, 2, 5), (1, 3, 4))
    second: Partition = ((0, 1, 2, 3), (4, 5))
    judged = judge.judge(first, second)
    for task in range(6):
        rows = np.where(judge.owner[task] == 0, *(slow_row_losses(opposed, p, task) for p in (second, first)))
        np.testing.assert_allclose(judged.nll[task], rows)
    np.testing.assert_allclose(judge.judge(first).nll[0], slow_row_losses(opposed, first, 0))
    mixed = average_rows([judge.judge(first), judge.judge(second)])
    np.testing.assert_allclose(mixed.nll[3], (judge.judge(first).nll[3] + judge.judge(second).nll[3]) / 2)


@pytest.mark.parametrize("is_even", [True, False])
def test_the_bootstrap_agrees_with_the_clustered_formula(is_even: bool) -> None:
    features = make_features(OPPOSED, n_validation=120)
    if not is_even:  # groups of 1, 2, ... rows
        groups = np.repeat(np.arange(15), np.arange(1, 16))
        features = TaskFeatures(features.train, tuple(replace(block, groups=groups) for block in features.validation))
    oracle = make_oracle(features)
    judge = make_judge(oracle, seed=0)
    ways = [judge.judge(((0, 1, 2, 3, 4, 5),)), judge.judge(((0, 2, 5), (1, 3, 4))), judge.judge_base()]
    paired = pair_means(judge, ways, n_draws=4000, seed=1)
    for one, other in [(0, 1), (2, 0), (1, 2)]:
        gain, gain_se = paired.compare(one, other)
        errors = [
            compute_clustered_se(ways[one].nll[i] - ways[other].nll[i], oracle.validation_groups(i)) for i in range(6)
        ]
        assert gain == pytest.approx(ways[one].mean_nll - ways[other].mean_nll)
        assert gain_se == pytest.approx(np.sqrt(np.sum(np.square(errors))) / 6, rel=0.1)
    assert paired.compare(1, 1) == (0.0, 0.0)


def test_few_rows_make_no_error_smaller() -> None:
    """A bootstrap of n rows alone would be too sure by the root of n / (n - 1)."""
    oracle = make_oracle(make_features(OPPOSED, n_validation=3, rows_per_group=1))
    judge = make_judge(oracle, seed=0)
    ways = [judge.judge(((0, 1, 2, 3, 4, 5),)), judge.judge_base()]
    _, gain_se = pair_means(judge, ways, n_draws=4000, seed=1).compare(0, 1)
    errors = [compute_clustered_se(ways[0].nll[i] - ways[1].nll[i], oracle.validation_groups(i)) for i in range(6)]
    assert gain_se == pytest.approx(np.sqrt(np.sum(np.square(errors))) / 6, rel=0.05)


@pytest.mark.parametrize(
    ("gains", "errors", "is_allowed", "expected"),
    [
        ((0.30, 0.31, 0.32), 0.1, (True, True, True), 2),  # all as good: the fewest
        ((0.05, 0.31, 0.32), 0.1, (True, True, True), 3),  # 2 is no gain
        ((0.15, 0.31, 0.60), 0.1, (True, True, True), 4),  # each is better than the one before
        ((0.15, 0.31, 0.60), 0.1, (True, True, False), 3),  # the best is over budget
        ((0.05, 0.08, 0.09), 0.1, (True, True, True), 1),  # nothing above its error
        ((0.30, 0.31, 0.32), 0.1, (False, False, False), 1),
        ((-0.3, -0.2, -0.1), 0.01, (True, True, True), 1),
    ],
)
def test_the_smallest_number_within_one_error_of_the_best_is_taken(
    gains: tuple[float, ...], errors: float, is_allowed: tuple[bool, ...], expected: int, opposed_plan: Plan
) -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4000, 4)) * [0, errors, errors, errors]  # independent: differences err by 1.4 times that
    paired = PairedMeans(np.array([0.0, *(-gain for gain in gains)]), draws, np.zeros((1, 4)))
    contest = _Contest({}, ({}, {}), dict.fromkeys((1, 2, 3, 4)), paired)
    curve = {}
    for m, gain, allowed in zip((1, 2, 3, 4), (0.0, *gains), (True, *is_allowed), strict=True):
        _, gain_se = contest.compare(1, m)
        curve[m] = replace(opposed_plan.curve[m - 1], gain=gain, gain_se=gain_se, allowed=allowed)
    chosen, reason = _choose(contest, curve, GroupingConfig(), Budget(100, 0, 250))
    assert chosen == expected and reason.endswith(".")


def test_with_few_validation_rows_groups_have_to_win_by_two_errors(opposed_plan: Plan) -> None:
    for n_validation, expected in ((9, 2.0), (10, 1.0)):
        oracle = make_oracle(make_features(OPPOSED, n_validation=n_validation, rows_per_group=1))
        assert count_errors_to_part(oracle) == expected
    draws = np.random.default_rng(0).normal(size=(4000, 2)) * [0, 0.1]
    paired = PairedMeans(np.array([0.0, -0.15]), draws, np.zeros((1, 2)))
    for n_errors, expected in ((1.0, 2), (2.0, 1)):
        contest = _Contest({}, ({}, {}), dict.fromkeys((1, 2)), paired, n_errors=n_errors)
        gains = {m: contest.compare(1, m) for m in (1, 2)}
        curve = {m: replace(opposed_plan.curve[m - 1], gain=gain, gain_se=se) for m, (gain, se) in gains.items()}
        chosen, reason = _choose(contest, curve, GroupingConfig(max_groups=2), Budget())
        assert chosen == expected and ("two standard errors" in reason) == (n_errors == 2)


def test_refining_ends_where_no_step_helps_and_never_loses(opposed: Oracle) -> None:
    judge, affinity = make_judge(opposed, seed=0), affinity_of(opposed)
    start: Partition = ((0, 1, 2), (3, 4, 5))
    end = refine_partition(start, affinity, judge, None, max_solves=1000)
    assert end == ((0, 2, 5), (1, 3, 4))
    value = sum(judge.search_losses(end, None))
    for i in range(6):
        for j in range(i):
            swapped = [{i: j, j: i}.get(task, task) for task in range(6)]
            moved = sort_groups([swapped[task] for task in group] for group in end)
            assert sum(judge.search_losses(moved, None)) >= value - 1e-5
        labels = [next(g for g, group in enumerate(end) if task in group) for task in range(6)]
        labels[i] = 1 - labels[i]
        moved = sort_groups([task for task in range(6) if labels[task] == g] for g in (0, 1))
        assert sum(judge.search_losses(moved, None)) >= value - 1e-5


def test_refining_keeps_to_its_budget_of_fits(opposed: Oracle) -> None:
    judge, affinity = make_judge(make_oracle(*opposed.replicates), seed=0), affinity_of(opposed)
    start: Partition = ((0, 1, 2), (3, 4, 5))
    assert refine_partition(start, affinity, judge, None, max_solves=0) == start
    assert judge.oracle.n_fits == 2
    refine_partition(start, affinity, judge, None, max_solves=1)
    assert judge.oracle.n_fits <= 2 + 2 * 6, "one step of moves, and no more"


def test_budgets_limit_the_number_of_groups(opposed: Oracle) -> None:
    tight = plan_for(opposed, bytes_per_adapter=100, max_memory_bytes=199)
    assert tight.decision == "one adapter"
    assert tight.reason.startswith("Only one adapter is within budget: 2 groups take 200 bytes")
    assert [candidate.allowed for candidate in tight.curve] == [True] + [False] * 5
    roomy = plan_for(opposed, bytes_per_adapter=100, n_boosters=1, max_memory_bytes=300, max_latency_ratio=4)
    assert roomy.decision == "group" and roomy.curve[1].adapter_bytes == 300 and roomy.curve[1].latency_ratio == 4
    assert "3, 4, 5, 6 groups are over budget" in roomy.reason
    alone = plan_for(opposed, n_boosters=1, max_latency_ratio=2)
    assert alone.decision == "one adapter" and any("3 forward passes" in warning for warning in alone.warnings)


@pytest.mark.parametrize(
    ("n_groups", "decision"), [(1, "one adapter"), (2, "group"), (3, "group"), (6, "one per task")]
)
def test_a_number_of_groups_asked_for_is_taken(opposed: Oracle, n_groups: int, decision: str) -> None:
    plan = plan_for(opposed, n_groups=n_groups, max_groups=3)
    assert plan.decision == decision and len(plan.groups) == n_groups
    would = "the same" if n_groups == 2 else "2"
    assert plan.reason.startswith(f"Groups were set to {n_groups} (grouping.n_groups); auto would choose {would}. ")
    assert (plan.n_groups_asked, plan.n_groups_auto) == (n_groups, len(plan_for(opposed, max_groups=3).groups))
    assert len(plan.curve) == (4 if n_groups == 6 else 3)


def test_impossible_requests_are_refused(opposed: Oracle) -> None:
    with pytest.raises(ConfigError, match="n_groups 7: expected 1 to 6"):
        plan_for(opposed, n_groups=7)
    with pytest.raises(ConfigError, match="n_groups 0"):
        plan_for(opposed, n_groups=0)
    with pytest.raises(ConfigError, match="n_groups 3 takes 30 bytes of adapters"):
        plan_for(opposed, n_groups=3, bytes_per_adapter=10, max_memory_bytes=20)


@pytest.mark.parametrize("n_tasks", [1, 2])
def test_one_and_two_tasks(n_tasks: int) -> None:
    plan = plan_for(make_oracle(make_features((0, 1)[:n_tasks])))
    assert plan.decision == ("one adapter" if n_tasks == 1 else "one per task")
    assert len(plan.curve) == n_tasks
    assert [comparison.name for comparison in plan.comparisons] == ["one adapter", "one per task"]
    if n_tasks == 1:
        assert plan.reason == "There is only one task, so there is nothing to group."


def test_rows_that_all_belong_together_decide_nothing() -> None:
    plan = plan_for(make_oracle(make_features(OPPOSED, rows_per_group=1000)))
    assert plan.decision == "one adapter" and "can be told from chance" in plan.reason
    assert plan.curve[1].gain > 0 and plan.curve[1].gain_se is None
    assert plan.predicted.plan.nll_se == (None,) * 6 and plan.predicted.plan.mean_nll_se is None
    assert any(warning.startswith("All validation rows of task-0") for warning in plan.warnings)
    json.dumps(asdict(plan), allow_nan=False)


def test_free_text_tasks_have_no_accuracy() -> None:
    plan = plan_for(make_oracle(make_features(OPPOSED, mode="sequence")))
    assert plan.groups == ((0, 2, 5), (1, 3, 4))
    assert plan.predicted.plan.accuracy == (None,) * 6 and plan.predicted.plan.mean_accuracy is None
    assert any("leave task-0, task-1, " in told and "over 0 of 6 tasks" in told for told in plan.warnings)
    assert json.loads(json.dumps(asdict(plan), allow_nan=False))["predicted"]["plan"]["accuracy_se"] == [None] * 6


def test_projection_seeds_are_cut_in_halves_and_widen_errors(opposed: Oracle) -> None:
    several = make_oracle(*(make_features(OPPOSED, projection=seed) for seed in (0, 1, 2)))
    judge = make_judge(several, seed=0)
    assert [judge.seeds_of(half) for half in (0, 1)] == [[0, 2], [1]]
    found: Partition = ((0, 2, 5), (1, 3, 4))
    rows = np.stack([outcome.nll[0] for outcome in several.row_outcomes([found[0]], 0)])
    expected = np.where(judge.owner[0] == 0, rows[[0, 2]].mean(axis=0), rows[1])
    np.testing.assert_allclose(judge.judge(found).nll[0], expected)
    design = sample_subsets(6, AffinityConfig(), seed=0)
    only = make_judge(make_oracle(several.replicates[1]), seed=0)
    np.testing.assert_allclose(
        estimate_half_affinity(judge, design, 1, AffinityConfig()),
        estimate_half_affinity(only, design, 1, AffinityConfig()),
        rtol=1e-5,  # fits end at a gradient of 1e-6, and where below that depends on their company
        err_msg="the second half uses the second seed only",
    )
    ways = [judge.judge(((0, 1, 2, 3, 4, 5),)), judge.judge(found)]
    paired = pair_means(judge, ways)
    row_se = float((paired.draws[:, 0] - paired.draws[:, 1]).std(ddof=1))
    seeds = ways[0].seed_nll.mean(axis=1) - ways[1].seed_nll.mean(axis=1)
    assert paired.compare(0, 1)[1] == pytest.approx(np.sqrt(row_se**2 + seeds.var(ddof=1) / 3))
    plan = choose_groups(affinity_of(several), several, GroupingConfig(max_groups=3))
    assert plan.groups == found


def test_the_papers_threshold_rounding_can_be_asked_for(opposed: Oracle) -> None:
    plan = plan_for(opposed, rounding="threshold", max_groups=4)
    assert plan.groups == ((0, 2, 5), (1, 3, 4))
    numbers = [candidate.n_groups for candidate in plan.curve]
    assert numbers == sorted(set(numbers)) and numbers[0] == 1


def test_gradient_cosines_are_those_of_mean_gradients(opposed: Oracle) -> None:
    cosines = measure_gradient_cosines(make_judge(opposed, seed=0))
    np.testing.assert_allclose(np.diag(cosines), 1)
    family = np.array(OPPOSED)
    assert (np.sign(cosines) == np.where(family[:, None] == family, 1, -1)).all()


def test_random_partitions_have_the_sizes_and_are_uniform() -> None:
    generator = np.random.default_rng(0)
    drawn = [sample_partition([2, 1, 1], generator) for _ in range(1200)]
    counts = {partition: drawn.count(partition) for partition in set(drawn)}
    assert len(counts) == 6 and all(partition == sort_groups(partition) for partition in counts)
    assert max(abs(count - 200) for count in counts.values()) < 5 * np.sqrt(200)


def test_every_predicted_loss_has_its_error_and_rivals_are_paired_with_the_plan(opposed_plan: Plan) -> None:
    chosen = next(c for c in opposed_plan.curve if c.n_groups == len(opposed_plan.groups))
    assert chosen.predicted_nll_se == opposed_plan.predicted.plan.mean_nll_se
    assert opposed_plan.curve[0].predicted_nll_se == opposed_plan.predicted.shared.mean_nll_se
    for other in opposed_plan.comparisons:
        assert other.predicted_nll_se is not None and other.predicted_nll_se > 0
        assert other.gain_over_plan == pytest.approx(other.gain - chosen.gain)
        if other.name == "one adapter":
            assert other.gain_over_plan_se == pytest.approx(chosen.gain_se), "the same pair, the other way round"
        if other.groups == chosen.groups:
            assert other.gain_over_plan_se < chosen.gain_se
    assert f"{chosen.predicted_nll:.4f} ± {chosen.predicted_nll_se:.4f} nats" in opposed_plan.reason


def test_warnings_say_what_speaks_against_the_plan() -> None:
    assert any("training seeds" in warning for warning in plan_for(make_oracle(make_features((0, 1)))).warnings)
    useless = make_features(OPPOSED)
    turned = TaskFeatures(useless.train, tuple(replace(b, labels=1 - b.labels) for b in useless.validation))
    harmful = plan_for(make_oracle(turned), max_groups=2)
    assert any(warning.startswith("No adapter is predicted to help") for warning in harmful.warnings)
    capped = plan_for(make_oracle(make_features((0, 1, 2, 3), n_train=120), penalty=0.01), max_groups=2)
    better = "One adapter per task (4 adapters) is predicted to do better than the plan by "
    (told,) = (warning for warning in capped.warnings if warning.startswith(better))
    assert re.search(r"by 0\.\d{4} ± 0\.\d{4} nats; set grouping.max_groups to 4 or more to allow it\.$", told)
    set_to_2 = plan_for(make_oracle(make_features((0, 1, 2, 3), n_train=120), penalty=0.01), n_groups=2, max_groups=3)
    (told,) = (warning for warning in set_to_2.warnings if warning.startswith(better))
    assert told.endswith("; set grouping.n_groups to auto and grouping.max_groups to 4 or more to allow it.")
    rushed = Oracle((make_features(OPPOSED),), 1e-3, EstimationConfig(method="ridge", max_iter=2))
    slow = plan_for(rushed, max_groups=2)
    assert any("fits did not converge" in warning for warning in slow.warnings)
    few = plan_for(make_oracle(make_features((0, 1), n_validation=18, rows_per_group=2))).warnings
    assert [
        text
        for text in few
        if text.startswith("Few validation rows, repeated texts counted once, of task-0 (9), task-1 (9): ")
    ], few
    assert not any(text.startswith("Few validation rows") for text in slow.warnings)
    assert "training seeds" in slow.warnings[-1], "what holds for every plan comes after what holds for this one"


@pytest.mark.parametrize(
    ("name", "groups", "told"),
    [
        (
            "random groups",
            None,
            ["Random grouping into 2 groups is predicted to do as well as the plan: which tasks are together matters"],
        ),
        (
            "gradient cosine",
            ((0, 1, 2), (3, 4, 5)),
            ["Grouping by gradient cosine into 2 groups is predicted to do as well as the plan."],
        ),
        ("gradient cosine", ((0, 2, 5), (1, 3, 4)), []),  # these are the plan's own
    ],
)
def test_other_groups_that_do_as_well_are_named(
    opposed_plan: Plan, name: str, groups: Partition | None, told: list[str]
) -> None:
    chosen = opposed_plan.curve[1]
    other = replace(
        opposed_plan.comparisons[-1], name=name, n_groups=2, groups=groups, gain_over_plan=1e-6, gain_over_plan_se=0.1
    )
    predicted = opposed_plan.predicted
    halves = (chosen.groups, chosen.groups)
    warnings = list_plan_warnings(
        chosen, predicted.plan, predicted.base, [other], halves, Budget(), GroupingConfig(), lambda _: True
    )
    assert [warning[: len(start)] for warning, start in zip(warnings, told, strict=True)] == told


@pytest.mark.parametrize(
    ("families", "groups"), [((0,), {1}), ((0, 0), {1}), ((0, 1), {2}), ((0, 1, 0), {2}), ((0, 0, 0), {1})]
)
def test_few_tasks_are_told_apart(families: tuple[int, ...], groups: set[int]) -> None:
    plan = plan_for(make_oracle(make_features(families, n_validation=200)))
    assert len(plan.groups) in groups and plan.n_validation == (200,) * len(families)
    if families == (0, 1, 0):
        assert plan.groups == ((0, 2), (1,))
    if len(families) == 1:
        assert plan.reason == "There is only one task, so there is nothing to group."
    assert not any("n_subsets" in warning for warning in plan.warnings)


def test_a_design_that_can_not_tell_some_partners_apart_is_warned_of() -> None:
    oracle, config = make_oracle(make_features((0, 1, 0))), AffinityConfig(n_subsets=2, min_pair_count=0)
    plan = choose_groups(affinity_of(oracle), oracle, GroupingConfig(), affinity_config=config)
    (warning,) = (text for text in plan.warnings if "affinity.n_subsets 2" in text)
    assert re.match(r"With affinity\.n_subsets 2, task-\d, task-\d are in one subset only, where", warning)
