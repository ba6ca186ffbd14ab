"""The choice: how many groups, which, or one adapter for all, by predicted performance under budgets.

Cost: for every number of groups a clustering on all validation rows and one on each half of them, a fit per new group,
and at most ``max_solves`` fits to refine. One clustering more, by gradient cosine, competes with what is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ensemblelora.affinity import SubsetDesign, sample_subsets
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
    count_errors_to_part,
    describe_choice,
    describe_cosines,
    describe_request,
    explain_one_adapter,
    is_above_error,
    list_design_warnings,
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
"""Where a contest has groups given by hand, beside numbers of groups; groups by gradient cosine: minus their number."""


@dataclass(frozen=True, eq=False)
class _Contest:
    """Partitions for every number of groups asked for, and what they are predicted to give.

    Attributes:
        found: By number of groups, on all validation rows.
        halves: The same on each half of them.
        judged: The halves' partitions, each judged by the other half.
        paired: The judged losses side by side, in the order of the numbers.
        constraints: What all partitions meet but the one group for all, which need not; none: nothing.
        n_errors: Standard errors by which groups have to be better than one adapter for all.
    """

    found: Mapping[int, Found]
    halves: tuple[Mapping[int, Found], Mapping[int, Found]]
    judged: Mapping[int, JudgedRows]
    paired: PairedMeans
    constraints: Constraints | None = None
    n_errors: float = 1.0

    def compare(self, one: int, other: int) -> tuple[float, float | None]:
        """Return by how much ``other`` groups lower the mean loss of ``one``, and the standard error."""
        sizes = list(self.judged)
        return self.paired.compare(sizes.index(one), sizes.index(other))

    def allows(self, groups: Partition) -> bool:
        """Whether a partition meets the constraints."""
        return self.constraints is None or self.constraints.allows(groups)


@dataclass(frozen=True, eq=False)
class _Choice:
    """What is taken, and of what.

    Attributes:
        contest: With groups by gradient cosine.
        curve: What each of its partitions gives.
        auto: The one that the prediction chooses.
        chosen: The one that is taken: that, or what was asked for.
        reason: Why.
    """

    contest: _Contest
    curve: Mapping[int, Candidate]
    auto: int
    chosen: int
    reason: str


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

    For every number of groups that ``max_groups`` leaves, a partition is found on all validation rows. What the number
    gives is judged without that partition: one is found on each half of the rows and judged on the other half. Of the
    numbers within budget whose gain over one adapter exceeds its standard error (twice that where a task has fewer than
    ten validation rows in the mean), the smallest is taken that is within one standard error of the best (the paper
    fixes the number by hand or by a trace penalty; section 3.3). Where the constraints rule one adapter out, it is the
    smallest of all that are within one standard error of the best. Groups by gradient cosine take the place of what is
    chosen where they are predicted to be better by as much; no validation row has a part in finding them, so that all
    of them judge.

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
    affinity_config = affinity_config or AffinityConfig()
    design = sample_subsets(oracle.n_tasks, affinity_config, seed=seed)
    contest = _hold_contest(affinity, judge, config, affinity_config, design, seed, max_solves)
    choice = _settle(contest, affinity, judge, config, budget, seed)
    contest, curve, chosen = choice.contest, choice.curve, choice.chosen
    singles = judge.judge(tuple((i,) for i in range(oracle.n_tasks)))
    comparisons = _compare(contest, curve, chosen, judge, singles, config, seed)
    ways = (contest.judged[chosen], contest.judged[1], singles, judge.judge_base())
    predicted = Predictions(*(predict(judge, way) for way in ways))
    halves = (contest.halves[0][chosen].groups, contest.halves[1][chosen].groups)
    rules = (budget, config, contest.allows, contest.n_errors)
    warnings = list_plan_warnings(curve[chosen], predicted.plan, predicted.base, comparisons, halves, *rules)
    groups = curve[chosen].groups
    return Plan(
        task_names=oracle.task_names,
        groups=groups,
        decision=_name_decision(len(groups), oracle.n_tasks),
        reason=choice.reason,
        predicted=predicted,
        curve=_drop_repeats(curve, chosen),
        comparisons=comparisons,
        l2_penalty=oracle.l2_penalty,
        warnings=(
            *warnings,
            *list_design_warnings(design, oracle.task_names, affinity_config),
            *list_oracle_warnings(judge, predicted.plan),
        ),
        n_groups_asked=config.n_groups_asked,
        n_groups_auto=curve[choice.auto].n_groups,
        n_validation=tuple(len(oracle.validation_groups(task)) for task in range(oracle.n_tasks)),
        by_group=tuple(tuple(losses) for losses in judge.predict_each(groups).tolist()),
    )


def _hold_contest(
    affinity: FloatArray,
    judge: Judge,
    config: GroupingConfig,
    affinity_config: AffinityConfig,
    design: SubsetDesign,
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
            half_affinity = estimate_half_affinity(judge, design, half, affinity_config)
        halves.append(search(half_affinity, half))
    judged = {m: judge.judge(halves[0][m].groups, halves[1][m].groups) for m in found}
    paired = pair_means(judge, list(judged.values()), seed=seed)
    n_errors = count_errors_to_part(judge.oracle)
    return _Contest(found, (halves[0], halves[1]), judged, paired, constraints, n_errors)


def _settle(
    contest: _Contest, affinity: FloatArray, judge: Judge, config: GroupingConfig, budget: Budget, seed: int
) -> _Choice:
    """Choose among what was found, and let groups by gradient cosine compete with that."""
    curve = {m: _describe_candidate(contest, m, affinity, judge, budget) for m in contest.judged}
    auto, reason = _choose(contest, curve, config, budget)
    asked = config.n_groups_asked
    chosen = auto if asked is None else asked if config.groups is None else _GIVEN
    models = [m for m in (_take_model(curve, m, config) for m in (auto, chosen)) if m is not None]
    contest = _enter_cosines(contest, models, judge, seed)
    curve |= {m: _describe_candidate(contest, m, affinity, judge, budget) for m in contest.judged if m < 0}
    before, auto = auto, _prefer_cosines(contest, curve, auto, config, is_number_set=False)
    if auto != before:
        reason = describe_cosines(curve[auto], curve[before], *contest.compare(before, auto), n_errors=contest.n_errors)
    chosen = auto if asked is None else _prefer_cosines(contest, curve, chosen, config, is_number_set=True)
    if asked is not None and judge.oracle.n_tasks > 1:
        reason = describe_request(
            asked, curve[chosen], curve[auto], is_given=chosen == _GIVEN, is_by_cosine=chosen < _GIVEN
        )
    return _Choice(contest, curve, auto, chosen, reason)


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
    open_numbers = config.list_numbers(sum(len(group) for group in curve[1].groups))
    rivals = [m for m in groupings if m in open_numbers]
    # Where only a number above max_groups was asked for, it is all there is.
    eligible = [m for m in (rivals if can_share else rivals or groupings) if curve[m].allowed]
    if can_share:
        eligible = [m for m in eligible if is_above_error(curve[m].gain, curve[m].gain_se, n_errors=contest.n_errors)]
    if not eligible:
        return 1, explain_one_adapter([curve[m] for m in rivals], budget, config, n_errors=contest.n_errors)
    best = max(eligible, key=lambda m: curve[m].gain)
    chosen = min(m for m in eligible if not is_above_error(*contest.compare(m, best)))
    return chosen, describe_choice(curve[chosen], curve[best], [curve[m] for m in rivals], can_share=can_share)


def _take_model(curve: Mapping[int, Candidate], chosen: int, config: GroupingConfig) -> int | None:
    """Say whose number of groups others are compared at: what is chosen, or the best if that is one or one a task.

    None where there is no number between.
    """
    n_tasks = sum(len(group) for group in curve[1].groups)
    if 1 < curve[chosen].n_groups < n_tasks:
        return chosen
    proper = [m for m in config.list_numbers(n_tasks) if m in curve and 1 < curve[m].n_groups < n_tasks]
    return max(proper, key=lambda m: (curve[m].allowed, curve[m].gain), default=None)


def _enter_cosines(contest: _Contest, models: Sequence[int], judge: Judge, seed: int) -> _Contest:
    """Add the groups that cosines of the tasks' gradients give, as many as each model has."""
    if not models:
        return contest
    cosines, entered = measure_gradient_cosines(judge), {}
    for model in (contest.found[m] for m in dict.fromkeys(models)):
        n_groups = len(model.groups)
        found = cluster(cosines, n_groups, constraints=contest.constraints, seed=seed, is_bound_needed=False)
        entered[-n_groups] = Found(found.groups, model.clustering)  # of the affinity, as the objective and its bound
    judged = {**contest.judged, **{m: judge.judge(found.groups) for m, found in entered.items()}}
    return replace(
        contest,
        found={**contest.found, **entered},
        halves=({**contest.halves[0], **entered}, {**contest.halves[1], **entered}),
        judged=judged,
        paired=pair_means(judge, list(judged.values()), seed=seed),
    )


def _prefer_cosines(
    contest: _Contest, curve: Mapping[int, Candidate], chosen: int, config: GroupingConfig, *, is_number_set: bool
) -> int:
    """Return groups by gradient cosine if they are better than what is chosen, as far as the choice itself asks.

    Groups that were given stay, and so do a number that was set and the paper's own way to round.
    """
    model = _take_model(curve, chosen, config)
    if model is None or chosen == _GIVEN or config.rounding == "threshold":
        return chosen
    other = -curve[model].n_groups
    is_open = curve[other].allowed and not (is_number_set and curve[other].n_groups != curve[chosen].n_groups)
    n_errors = contest.n_errors if curve[chosen].n_groups == 1 else 1.0
    return other if is_open and is_above_error(*contest.compare(chosen, other), n_errors=n_errors) else chosen


def _compare(
    contest: _Contest,
    curve: Mapping[int, Candidate],
    chosen: int,
    judge: Judge,
    singles: JudgedRows,
    config: GroupingConfig,
    seed: int,
) -> tuple[Comparison, ...]:
    """Judge other ways to train."""
    n_tasks = judge.oracle.n_tasks
    ways: list[tuple[str, int, Partition | None, JudgedRows, float | None]] = [
        ("one adapter", 1, curve[1].groups, contest.judged[1], None),
        ("one per task", n_tasks, tuple((i,) for i in range(n_tasks)), singles, None),
    ]
    if (place := _take_model(curve, chosen, config)) is not None:
        model, by_cosine = curve[place], -curve[place].n_groups
        drawn = _judge_random(judge, [len(group) for group in model.groups], config.n_random_partitions, seed)
        if drawn:
            spread = float(np.std([way.mean_nll for way in drawn], ddof=1)) if len(drawn) > 1 else None
            ways.append(("random groups", model.n_groups, None, average_rows(drawn), spread))
        judged = contest.judged[by_cosine]
        ways.append(("gradient cosine", model.n_groups, contest.found[by_cosine].groups, judged, None))
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
    found = {candidate.n_groups: candidate for m, candidate in curve.items() if m >= _GIVEN}
    by_number = found | {curve[chosen].n_groups: curve[chosen]}
    return tuple(by_number[n_groups] for n_groups in sorted(by_number))
