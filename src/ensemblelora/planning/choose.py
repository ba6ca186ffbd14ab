"""The choice: how many groups, which, or one adapter for all, by predicted performance under budgets.

Cost: ``max_groups`` clusterings on all validation rows and on each half of them, a fit per new group, and at most
``max_solves`` fits to refine.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.affinity import sample_subsets
from ensemblelora.config import AffinityConfig, GroupingConfig
from ensemblelora.errors import ConfigError
from ensemblelora.estimation import Oracle, compute_clustered_se
from ensemblelora.grouping import Partition, cluster, compute_density, compute_objective, to_labels
from ensemblelora.planning.judge import Judge, JudgedRows, PairedMeans, average_rows, make_judge, pair_means
from ensemblelora.planning.record import Candidate, Comparison, Decision, Plan, Prediction, Predictions
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

_WHAT_ERRORS_LEAVE_OUT = (
    "Standard errors cover validation rows and projection seeds; they leave out training seeds, the choice of training "
    "rows, and how far the linear model is from real fine-tuning."
)
_SHAKY_AGREEMENT = 0.8


@dataclass(frozen=True)
class _Budget:
    """What adapters may cost."""

    bytes_per_adapter: int
    n_boosters: int
    max_memory_bytes: int | None
    max_latency_ratio: float | None

    def adapter_bytes(self, n_groups: int) -> int:
        """Memory of the groups' adapters and the boosters."""
        return self.bytes_per_adapter * (n_groups + self.n_boosters)

    def latency_ratio(self, n_groups: int) -> float:
        """Forward passes: one per group and booster, and one of the base model that boosters are measured from."""
        return float(n_groups + self.n_boosters + (self.n_boosters > 0))

    def faults(self, n_groups: int) -> list[str]:
        """Which budgets a number of groups breaks, in words."""
        memory, latency = self.adapter_bytes(n_groups), self.latency_ratio(n_groups)
        faults = []
        if self.max_memory_bytes is not None and memory > self.max_memory_bytes:
            faults.append(f"{memory} bytes of adapters, grouping.max_memory_bytes is {self.max_memory_bytes}")
        if self.max_latency_ratio is not None and latency > self.max_latency_ratio:
            faults.append(f"{latency:g} forward passes, grouping.max_latency_ratio is {self.max_latency_ratio:g}")
        return faults


@dataclass(frozen=True, eq=False)
class _Contest:
    """Everything that was judged: numbers of groups as asked for, then the other ways to train."""

    judge: Judge
    found: Mapping[int, Found]
    halves: tuple[Mapping[int, Found], Mapping[int, Found]]
    judged: Mapping[int | str, JudgedRows]
    paired: PairedMeans

    def compare(self, one: int | str, other: int | str) -> tuple[float, float | None]:
        """By how much ``other`` lowers the mean loss of ``one``, and the standard error."""
        ways = list(self.judged)
        return self.paired.compare(ways.index(one), ways.index(other))

    def gain(self, way: int | str) -> tuple[float, float | None]:
        """By how much a way lowers the mean loss of one adapter for all, and the standard error."""
        return self.compare(1, way)

    def mean(self, way: int | str) -> float:
        """Mean loss over tasks."""
        return float(self.paired.means[list(self.judged).index(way)])


def choose_groups(
    matrix: npt.ArrayLike,
    oracle: Oracle,
    config: GroupingConfig,
    *,
    affinity_config: AffinityConfig | None = None,
    bytes_per_adapter: int = 0,
    n_boosters: int = 0,
    seed: int = 0,
    max_solves: int = 600,
) -> Plan:
    """Choose the number of groups and the groups, or one adapter for all, and predict what each choice gives.

    For every number m up to ``max_groups`` a partition is found on all validation rows; its predicted loss Q(m) is judged
    by partitions found on one half of the rows and judged on the other. Of the m within budget whose gain over one
    adapter exceeds its standard error, the smallest is taken that is within one standard error of the best.

    Args:
        matrix: Symmetric affinity over all validation rows, higher is better together, shape ``(n_tasks, n_tasks)``.
        oracle: Predicts the loss of any group.
        config: Numbers of groups, rounding, budgets.
        affinity_config: How ``matrix`` was made, to make it again on each half; none: the defaults.
        bytes_per_adapter: Memory of one adapter.
        n_boosters: Boosting adapters that will be added.
        seed: The run's seed, the same as for ``matrix``.
        max_solves: Most subset fits that refining may add, over everything.

    Returns:
        The plan; plain values only.

    Raises:
        ConfigError: If ``n_groups`` is above the number of tasks, or breaks a budget.
        SolverError: If a relaxation can't be solved.
    """
    budget = _Budget(bytes_per_adapter, n_boosters, config.max_memory_bytes, config.max_latency_ratio)
    sizes = _list_sizes(config, oracle.n_tasks, budget)
    affinity = np.asarray(matrix, dtype=np.float64)
    judge = make_judge(oracle, seed=seed)
    contest = _hold_contest(affinity, judge, sizes, config, affinity_config or AffinityConfig(), seed, max_solves)
    curve = {m: _describe_candidate(contest, m, affinity, budget) for m in sizes}
    chosen, reason = _choose(contest, curve, config, budget)
    compared = _compare(contest, curve, chosen, config, seed)
    groups = contest.found[chosen].groups
    shown = {candidate.n_groups: candidate for candidate in reversed(list(curve.values()))}
    return Plan(
        task_names=oracle.task_names,
        groups=groups,
        decision=_name_decision(len(groups), oracle.n_tasks),
        reason=reason,
        predicted=Predictions(
            *(_predict(judge, contest.judged[way]) for way in (chosen, 1, "one per task", "base model"))
        ),
        curve=tuple(shown[m] for m in sorted(shown)),
        comparisons=compared,
        l2_penalty=oracle.l2_penalty,
        warnings=tuple(_list_warnings(contest, curve, chosen, compared, budget)),
    )


def _list_sizes(config: GroupingConfig, n_tasks: int, budget: _Budget) -> list[int]:
    """Numbers of groups to look at: 1 to the most allowed, and the one asked for."""
    sizes = set(range(1, min(config.max_groups, n_tasks) + 1))
    if config.n_groups != "auto":
        if not 1 <= config.n_groups <= n_tasks:
            raise ConfigError(f"grouping.n_groups {config.n_groups}: expected 1 to {n_tasks}, the number of tasks")
        if faults := budget.faults(config.n_groups):
            raise ConfigError(f"grouping.n_groups {config.n_groups} takes {' and '.join(faults)}; change one of them")
        sizes.add(config.n_groups)
    return sorted(sizes)


def _hold_contest(
    affinity: FloatArray,
    judge: Judge,
    sizes: Sequence[int],
    config: GroupingConfig,
    affinity_config: AffinityConfig,
    seed: int,
    max_solves: int,
) -> _Contest:
    """Find partitions on all rows and on each half, and judge them beside one adapter per task and the base model."""
    n_tasks, share = judge.oracle.n_tasks, max_solves // 3
    found = search_partitions(affinity, judge, None, sizes, config, seed=seed, max_solves=share)
    halves = []
    for half in range(2):
        half_affinity = affinity
        if len(sizes) > 1 and n_tasks > 2:  # else every partition is the only one of its size
            design = sample_subsets(n_tasks, affinity_config, seed=seed)
            half_affinity = estimate_half_affinity(judge, design, half, affinity_config)
        halves.append(search_partitions(half_affinity, judge, half, sizes, config, seed=seed, max_solves=share))
    judged: dict[int | str, JudgedRows] = {m: judge.judge(halves[0][m].groups, halves[1][m].groups) for m in sizes}
    judged["one per task"] = judge.judge(tuple((i,) for i in range(n_tasks)))
    judged["base model"] = judge.judge_base()
    paired = pair_means(judge, list(judged.values()), seed=seed)
    return _Contest(judge, found, (halves[0], halves[1]), judged, paired)


def _describe_candidate(contest: _Contest, m: int, affinity: FloatArray, budget: _Budget) -> Candidate:
    found = contest.found[m]
    n_groups = len(found.groups)
    gain, gain_se = contest.gain(m)
    return Candidate(
        n_groups=n_groups,
        groups=found.groups,
        predicted_nll=contest.mean(m),
        gain=gain,
        gain_se=gain_se,
        search_nll=sum(contest.judge.search_losses(found.groups, None)) / contest.judge.oracle.n_tasks,
        objective=compute_objective(affinity, found.groups),
        bound=found.clustering.bound,
        gap=found.clustering.gap,
        density=compute_density(affinity, found.groups),
        adapter_bytes=budget.adapter_bytes(n_groups),
        latency_ratio=budget.latency_ratio(n_groups),
        allowed=not budget.faults(n_groups),
    )


def _choose(
    contest: _Contest, curve: Mapping[int, Candidate], config: GroupingConfig, budget: _Budget
) -> tuple[int, str]:
    """Return the number of groups to take, as asked for, and why."""
    n_tasks = contest.judge.oracle.n_tasks
    if n_tasks == 1:
        return 1, "There is only one task, so there is nothing to group."
    if config.n_groups != "auto":
        asked = curve[config.n_groups]
        return config.n_groups, f"grouping.n_groups asks for {config.n_groups}; {_describe_gain(asked)}."
    rivals = [m for m in curve if m > 1 and curve[m].n_groups > 1]
    allowed = [m for m in rivals if curve[m].allowed]
    better = [m for m in allowed if _is_better(curve[m].gain, curve[m].gain_se)]
    if not better:
        return 1, _explain_one_adapter(curve, rivals, allowed, budget)
    best = max(better, key=lambda m: curve[m].gain)
    chosen = min(m for m in better if not _is_better(*contest.compare(m, best)))
    reason = f"{curve[chosen].n_groups} groups: {_describe_gain(curve[chosen])}"
    if chosen != best:
        reason += f"; {curve[best].n_groups} groups are better by less than one standard error"
    if dropped := [str(curve[m].n_groups) for m in rivals if m not in allowed]:
        reason += f"; {', '.join(dropped)} groups are over budget"
    return chosen, f"{reason}."


def _is_better(gain: float, gain_se: float | None) -> bool:
    """Whether a gain is above zero by more than one standard error."""
    return gain_se is not None and gain > gain_se and gain > 0


def _explain_one_adapter(
    curve: Mapping[int, Candidate], rivals: Sequence[int], allowed: Sequence[int], budget: _Budget
) -> str:
    if not rivals:
        return "grouping.max_groups leaves one adapter only."
    if not allowed:
        return f"Only one adapter fits the budget: {curve[rivals[0]].n_groups} groups take {' and '.join(budget.faults(2))}."
    best = max((curve[m] for m in allowed), key=lambda candidate: candidate.gain)
    if best.gain_se is None:
        return "The validation rows of every task belong together, so no gain from grouping can be told from chance."
    return (
        f"No grouping is predicted to beat one adapter for all by more than one standard error; the best, "
        f"{best.n_groups} groups: {_describe_gain(best)}."
    )


def _describe_gain(candidate: Candidate) -> str:
    error = "" if candidate.gain_se is None else f" ± {candidate.gain_se:.4f}"
    return (
        f"predicted mean validation loss {candidate.predicted_nll:.4f} nats, {abs(candidate.gain):.4f}{error} "
        f"{'below' if candidate.gain >= 0 else 'above'} one adapter for all"
    )


def _compare(
    contest: _Contest, curve: Mapping[int, Candidate], chosen: int, config: GroupingConfig, seed: int
) -> tuple[Comparison, ...]:
    """Judge random partitions and grouping by gradient cosine at the plan's number of groups, or the best above one."""
    judge, n_tasks = contest.judge, contest.judge.oracle.n_tasks
    singles = tuple((i,) for i in range(n_tasks))
    rows: list[tuple[str, Partition | None, int, JudgedRows, float | None]] = [
        ("one adapter", (tuple(range(n_tasks)),), 1, contest.judged[1], None),
        ("one per task", singles, n_tasks, contest.judged["one per task"], None),
    ]
    proper = [m for m in curve if 1 < curve[m].n_groups < n_tasks]
    if proper:
        groups = curve[chosen if chosen in proper else max(proper, key=lambda m: curve[m].gain)].groups
        generator = generator_for(seed, "random partitions")
        sizes = [len(group) for group in groups]
        drawn = [sample_partition(sizes, generator) for _ in range(config.n_random_partitions)]
        judge.fetch([group for partition in drawn for group in partition])
        if drawn:
            judged = [judge.judge(partition) for partition in drawn]
            spread = float(np.std([_mean_nll(way) for way in judged], ddof=1)) if len(judged) > 1 else None
            rows.append(("random groups", None, len(groups), average_rows(judged), spread))
        by_cosine = cluster(measure_gradient_cosines(judge), len(groups), seed=seed, is_bound_needed=False).groups
        rows.append(("gradient cosine", by_cosine, len(groups), judge.judge(by_cosine), None))
    paired = pair_means(judge, [contest.judged[1], *(row[3] for row in rows)], seed=seed)
    return tuple(
        Comparison(name, n_groups, groups, _mean_nll(way), spread, *paired.compare(0, position))
        for position, (name, groups, n_groups, way, spread) in enumerate(rows, start=1)
    )


def _predict(judge: Judge, rows: JudgedRows) -> Prediction:
    codes = [judge.oracle.validation_groups(task) for task in range(judge.oracle.n_tasks)]
    nll, nll_se, mean_nll, mean_nll_se = _summarise(rows.nll, rows.seed_nll, codes)
    accuracy, accuracy_se, mean_accuracy, mean_accuracy_se = _summarise(rows.correct, rows.seed_correct, codes)
    return Prediction(
        nll=tuple(_mean_of(values) for values in rows.nll),
        nll_se=nll_se,
        accuracy=accuracy,
        accuracy_se=accuracy_se,
        mean_nll=float(np.mean([value for value in nll if value is not None])),
        mean_nll_se=mean_nll_se,
        mean_accuracy=mean_accuracy,
        mean_accuracy_se=mean_accuracy_se,
    )
