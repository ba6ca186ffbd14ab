"""The choice: how many groups, which, or one adapter for all, by predicted performance under budgets.

Cost: ``max_groups`` clusterings on all validation rows and on each half of them, a fit per new group, and at most
``max_solves`` fits to refine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.affinity import sample_subsets
from ensemblelora.config import AffinityConfig, GroupingConfig
from ensemblelora.errors import ConfigError
from ensemblelora.estimation import Oracle
from ensemblelora.grouping import Constraints, Partition, cluster, compute_density, compute_objective
from ensemblelora.planning.budget import Budget
from ensemblelora.planning.demand import (
    check_demands,
    find_budget_fault,
    list_group_numbers,
    read_constraints,
    read_groups,
)
from ensemblelora.planning.describe import (
    describe_choice,
    describe_request,
    explain_one_adapter,
    is_above_error,
    list_oracle_warnings,
    list_plan_warnings,
    predict,
)
from ensemblelora.planning.judge import Judge, JudgedRows, PairedMeans, average_rows, make_judge, pair_means
from ensemblelora.planning.record import Candidate, Comparison, Decision, Plan, Predictions
from ensemblelora.planning.search import (
    Found,
    estimate_half_affinity,
    measure_gradient_cosines,
    sample_partition,
    search_partitions,
)
from ensemblelora.seeding import generator_for

__all__ = ["choose_groups"]

FloatArray = npt.NDArray[np.float64]

_GIVEN = 0
"""Where a contest has groups given by hand, beside numbers of groups."""


@dataclass(frozen=True, eq=False)
class _Contest:
    """Partitions for every number of groups asked for, and what they are predicted to give.

    Attributes:
        found: By number of groups, on all validation rows.
        halves: The same on each half of them.
        judged: The halves' partitions, each judged by the other half.
        paired: The judged losses side by side, in the order of the numbers.
        constraints: What all partitions meet but the one group for all, which need not; none: nothing.
    """

    found: Mapping[int, Found]
    halves: tuple[Mapping[int, Found], Mapping[int, Found]]
    judged: Mapping[int, JudgedRows]
    paired: PairedMeans
    constraints: Constraints | None = None

    def compare(self, one: int, other: int) -> tuple[float, float | None]:
        """Return by how much ``other`` groups lower the mean loss of ``one``, and the standard error."""
        sizes = list(self.judged)
        return self.paired.compare(sizes.index(one), sizes.index(other))

    def allows(self, groups: Partition) -> bool:
        """Whether a partition meets the constraints."""
        return self.constraints is None or self.constraints.allows(groups)


def choose_groups(
    matrix: npt.ArrayLike,
    oracle: Oracle,
    config: GroupingConfig,
    *,
    affinity_config: AffinityConfig | None = None,
    bytes_per_adapter: int = 0,
    n_boosters: int = 0,
    seed: int = 0,
    max_solves: int = 400,
) -> Plan:
    """Choose the number of groups and the groups, or one adapter for all, and predict what each choice gives.

    For every number of groups up to ``max_groups``, a partition is found on all validation rows. What the number gives
    is judged without that partition: one is found on each half of the rows and judged on the other half. Of the numbers
    within budget whose gain over one adapter exceeds its standard error, the smallest is taken that is within one
    standard error of the best (the paper fixes the number by hand or by a trace penalty; section 3.3). Where the
    constraints rule one adapter out, it is the smallest of all that are within one standard error of the best.

    Args:
        matrix: Symmetric affinity over all validation rows, higher is better together, shape ``(n_tasks, n_tasks)``.
        oracle: Predicts the loss of any group.
        config: Numbers of groups, rounding, constraints, budgets.
        affinity_config: How ``matrix`` was made, to make it again on each half; none: the defaults.
        bytes_per_adapter: Memory of one adapter.
        n_boosters: Boosting adapters that will be added.
        seed: The run's seed, the same as for ``matrix``.
        max_solves: Most subset fits that refining may add, over everything.

    Returns:
        The plan; plain values only.

    Raises:
        ConfigError: If ``n_groups`` is above the number of tasks, breaks a budget, or no partition meets what is asked.
        SolverError: If a relaxation can't be solved.
    """
    budget = Budget(bytes_per_adapter, n_boosters, config.max_memory_bytes, config.max_latency_ratio)
    check_demands(config, oracle.task_names)
    if fault := find_budget_fault(config, oracle.task_names, budget):
        raise ConfigError(fault)
    affinity, judge = np.asarray(matrix, dtype=np.float64), make_judge(oracle, seed=seed)
    contest = _hold_contest(affinity, judge, config, affinity_config or AffinityConfig(), seed, max_solves)
    curve = {m: _describe_candidate(contest, m, affinity, judge, budget) for m in contest.judged}
    auto, reason = _choose(contest, curve, config, budget)
    asked = config.n_groups_asked
    chosen = auto if asked is None else asked if config.groups is None else _GIVEN
    if asked is not None and oracle.n_tasks > 1:
        reason = describe_request(asked, curve[chosen], curve[auto], is_given=chosen == _GIVEN)
    singles = judge.judge(tuple((i,) for i in range(oracle.n_tasks)))
    comparisons = _compare(contest, curve, chosen, judge, singles, config, seed)
    ways = (contest.judged[chosen], contest.judged[1], singles, judge.judge_base())
    predicted = Predictions(*(predict(judge, way) for way in ways))
    halves = (contest.halves[0][chosen].groups, contest.halves[1][chosen].groups)
    warnings = list_plan_warnings(curve[chosen], predicted.plan, predicted.base, comparisons, halves, budget, config)
    groups = curve[chosen].groups
    return Plan(
        task_names=oracle.task_names,
        groups=groups,
        decision=_name_decision(len(groups), oracle.n_tasks),
        reason=reason,
        predicted=predicted,
        curve=_drop_repeats(curve, chosen),
        comparisons=comparisons,
        l2_penalty=oracle.l2_penalty,
        warnings=(*warnings, *list_oracle_warnings(judge, predicted.plan)),
        n_groups_asked=asked,
        n_groups_auto=curve[auto].n_groups,
    )


def _hold_contest(
    affinity: FloatArray,
    judge: Judge,
    config: GroupingConfig,
    affinity_config: AffinityConfig,
    seed: int,
    max_solves: int,
) -> _Contest:
    n_tasks, names = judge.oracle.n_tasks, judge.oracle.task_names
    constraints, given = read_constraints(config, names), read_groups(config, names)
    sizes = sorted({1, *list_group_numbers(config, names)})

    def search(matrix: FloatArray, half: int | None) -> dict[int, Found]:
        share = max_solves // 3
        found = search_partitions(
            matrix, judge, half, sizes, config, seed=seed, max_solves=share, constraints=constraints
        )
        return found if given is None else {**found, _GIVEN: Found(given, found[len(given)].clustering)}

    found, halves = search(affinity, None), []
    for half in range(2):
        half_affinity = affinity
        if n_tasks > 2 and sizes != [1]:  # else there is one partition of each size, whatever the affinity
            design = sample_subsets(n_tasks, affinity_config, seed=seed)
            half_affinity = estimate_half_affinity(judge, design, half, affinity_config)
        halves.append(search(half_affinity, half))
    judged = {m: judge.judge(halves[0][m].groups, halves[1][m].groups) for m in found}
    paired = pair_means(judge, list(judged.values()), seed=seed)
    return _Contest(found, (halves[0], halves[1]), judged, paired, constraints)


def _describe_candidate(contest: _Contest, m: int, affinity: FloatArray, judge: Judge, budget: Budget) -> Candidate:
    found = contest.found[m]
    n_groups = len(found.groups)
    gain, gain_se = contest.compare(1, m)
    return Candidate(
        n_groups=n_groups,
        groups=found.groups,
        predicted_nll=contest.judged[m].mean_nll,
        gain=gain,
        gain_se=gain_se,
        search_nll=sum(judge.search_losses(found.groups, None)) / judge.oracle.n_tasks,
        objective=compute_objective(affinity, found.groups),
        bound=found.clustering.bound,
        gap=found.clustering.gap,
        density=compute_density(affinity, found.groups),
        adapter_bytes=budget.adapter_bytes(n_groups),
        latency_ratio=budget.latency_ratio(n_groups),
        allowed=not budget.list_faults(n_groups) and contest.allows(found.groups),
        predicted_nll_se=predict(judge, contest.judged[m]).mean_nll_se,
    )


def _choose(
    contest: _Contest, curve: Mapping[int, Candidate], config: GroupingConfig, budget: Budget
) -> tuple[int, str]:
    """Return the number of groups to take by what is predicted, whatever was asked for, and why."""
    if sum(len(group) for group in curve[1].groups) == 1:
        return 1, "There is only one task, so there is nothing to group."
    can_share = contest.allows(curve[1].groups)
    groupings = [m for m in curve if m != _GIVEN and curve[m].n_groups > 1]
    rivals = [m for m in groupings if m <= config.max_groups]
    # Where only a number above max_groups was asked for, it is all there is.
    eligible = [m for m in (rivals if can_share else rivals or groupings) if curve[m].allowed]
    if can_share:
        eligible = [m for m in eligible if is_above_error(curve[m].gain, curve[m].gain_se)]
    if not eligible:
        return 1, explain_one_adapter([curve[m] for m in rivals], budget)
    best = max(eligible, key=lambda m: curve[m].gain)
    chosen = min(m for m in eligible if not is_above_error(*contest.compare(m, best)))
    return chosen, describe_choice(curve[chosen], curve[best], [curve[m] for m in rivals], can_share=can_share)


def _compare(
    contest: _Contest,
    curve: Mapping[int, Candidate],
    chosen: int,
    judge: Judge,
    singles: JudgedRows,
    config: GroupingConfig,
    seed: int,
) -> tuple[Comparison, ...]:
    """Judge other ways to train; random groups and groups by gradient cosine have the plan's number, or the best."""
    n_tasks = judge.oracle.n_tasks
    ways: list[tuple[str, int, Partition | None, JudgedRows, float | None]] = [
        ("one adapter", 1, curve[1].groups, contest.judged[1], None),
        ("one per task", n_tasks, tuple((i,) for i in range(n_tasks)), singles, None),
    ]
    proper = [m for m in curve if 1 < curve[m].n_groups < n_tasks]
    if proper:
        model = curve[chosen if chosen in proper else max(proper, key=lambda m: curve[m].gain)]
        drawn = _judge_random(judge, [len(group) for group in model.groups], config.n_random_partitions, seed)
        if drawn:
            spread = float(np.std([way.mean_nll for way in drawn], ddof=1)) if len(drawn) > 1 else None
            ways.append(("random groups", model.n_groups, None, average_rows(drawn), spread))
        cosines = measure_gradient_cosines(judge)
        found = cluster(cosines, model.n_groups, constraints=contest.constraints, seed=seed, is_bound_needed=False)
        groups = found.groups
        ways.append(("gradient cosine", model.n_groups, groups, judge.judge(groups), None))
    paired = pair_means(judge, [*(way[3] for way in ways), contest.judged[chosen]], seed=seed)
    return tuple(
        Comparison(
            name,
            n_groups,
            groups,
            rows.mean_nll,
            spread,
            *paired.compare(0, position),
            predict(judge, rows).mean_nll_se,
            *paired.compare(len(ways), position),
        )
        for position, (name, n_groups, groups, rows, spread) in enumerate(ways)
    )


def _judge_random(judge: Judge, sizes: Sequence[int], n_partitions: int, seed: int) -> list[JudgedRows]:
    generator = generator_for(seed, "random partitions")
    drawn = [sample_partition(sizes, generator) for _ in range(n_partitions)]
    judge.fetch([group for partition in drawn for group in partition])
    return [judge.judge(partition) for partition in drawn]


def _name_decision(n_groups: int, n_tasks: int) -> Decision:
    if n_groups == 1:
        return "one adapter"
    return "one per task" if n_groups == n_tasks else "group"


def _drop_repeats(curve: Mapping[int, Candidate], chosen: int) -> tuple[Candidate, ...]:
    """Keep one candidate per number of groups found: threshold rounding may find fewer numbers than were asked for."""
    by_number = {candidate.n_groups: candidate for candidate in curve.values()} | {
        curve[chosen].n_groups: curve[chosen]
    }
    return tuple(by_number[n_groups] for n_groups in sorted(by_number))
