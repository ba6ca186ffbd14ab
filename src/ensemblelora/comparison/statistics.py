"""From rows' losses and answers to a table: means, spreads, paired differences, and what could be found. No torch.

In: a :class:`~.record.StudyRecord`. Out: :class:`Statistics`, plain numbers. Tasks count equally. An interval says how
much the choice of test rows matters; the spread over seeds stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ensemblelora.comparison.draws import (
    METRICS,
    Array,
    Sample,
    adjust_holm,
    compute_bootstrap_p_value,
    compute_interval,
    draw_sample,
)
from ensemblelora.comparison.ledger import MethodCosts, add_costs
from ensemblelora.comparison.record import Primary, StudyRecord
from ensemblelora.evaluation.metrics import compute_chance_p_value
from ensemblelora.report.power_section import estimate_detectable_difference

__all__ = [
    "LEVEL",
    "Figure",
    "MethodResult",
    "PairedResult",
    "Statistics",
    "compute_statistics",
    "find_chance_tasks",
]

LEVEL = 0.05
"""of tests, and of the power that is stated"""
_FEWEST_DRAWS = 10_000  # a corrected p-value of sixteen comparisons must be able to fall below 0.05 by far


@dataclass(frozen=True)
class Figure:
    """One number of one method.

    Attributes:
        value: Mean over seeds, and over tasks where it is of several.
        low: Lower end of its interval over test rows; none where a task has a single group of rows.
        high: Upper end.
        seed_sd: Standard deviation over seeds; none of a single one.
        per_seed: Each seed's own.
        n_tasks: Behind it.
    """

    value: float
    low: float | None
    high: float | None
    seed_sd: float | None
    per_seed: tuple[float, ...]
    n_tasks: int = 1


@dataclass(frozen=True)
class MethodResult:
    """One method over its seeds; a metric that does not exist for a task is absent."""

    name: str
    title: str
    seeds: tuple[int, ...]
    learning_rate: float | None
    per_task: Mapping[str, Mapping[str, Figure]]
    """task -> metric"""
    mean: Mapping[str, Figure]
    """over all tasks"""
    mean_above_chance: Mapping[str, Figure]
    """over tasks on which some method is above chance"""
    costs: MethodCosts
    groups: tuple[tuple[tuple[str, ...], ...] | None, ...]
    """each seed's"""


@dataclass(frozen=True)
class PairedResult:
    """One method minus another on the same rows and seeds, in the mean over tasks.

    Attributes:
        a: A method.
        b: What it is compared with.
        metric: ``accuracy``, where higher is better, or ``nll``.
        difference: Mean of a - b.
        low: Lower end of its interval over test rows.
        high: Upper end.
        se: Standard error over test rows.
        seed_sd: Standard deviation over seeds of the difference; none of a single one.
        p_value: Two-sided, of this comparison alone; none where rows can't give one.
        p_holm: Corrected for all primary comparisons; none for the others.
        detectable: Smallest true difference found in 80 % of such studies, at :data:`LEVEL` alone.
        detectable_corrected: The same at the strictest level of the correction; none for other than primary ones.
        n_seeds: That both have.
        is_late: Whether it was named after both were tested.
    """

    a: str
    b: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    se: float | None
    seed_sd: float | None
    p_value: float | None
    p_holm: float | None
    detectable: float | None
    detectable_corrected: float | None
    n_seeds: int
    is_late: bool = False


@dataclass(frozen=True)
class Statistics:
    """Everything that the tables are made of.

    Attributes:
        tasks: In the order of task indices.
        at_chance: Tasks on which no method is above always answering the most frequent class.
        methods: By name.
        primary: Comparisons named beforehand, in both metrics.
        others: Every method against the reference, not corrected.
        reference: That method; none where it was not carried out.
        confidence: Of the intervals.
    """

    tasks: tuple[str, ...]
    at_chance: tuple[str, ...]
    methods: Mapping[str, MethodResult]
    primary: tuple[PairedResult, ...]
    others: tuple[PairedResult, ...]
    reference: str | None
    confidence: float

    def find(self, a: str, b: str, metric: str) -> PairedResult | None:
        """The comparison of two methods in a metric, primary or not."""
        found = (pair for pair in (*self.primary, *self.others) if (pair.a, pair.b, pair.metric) == (a, b, metric))
        return next(found, None)


def compute_statistics(study: StudyRecord, *, reference: str = "shared", n_bootstrap: int | None = None) -> Statistics:
    """Compute the whole table.

    Args:
        study: As far as it has come; pairs with a method that has no record are left out.
        reference: What every method is compared with besides, uncorrected.
        n_bootstrap: Draws; none: the config's, or 10,000 where these are fewer.
    """
    settings, chance = study.config.evaluation, find_chance_tasks(study)
    named = [pair for pair in study.head.primary if {pair.a, pair.b} <= set(study.methods)]
    known = {(pair.a, pair.b) for pair in named}
    others = [(name, reference) for name in study.methods if name != reference and reference in study.methods]
    pairs = [*named, *(Primary(*pair) for pair in others if pair not in known)]
    draws = n_bootstrap or max(settings.n_bootstrap, _FEWEST_DRAWS)
    sample = draw_sample(study, [(pair.a, pair.b) for pair in pairs], n_bootstrap=draws, seed=study.config.seed)
    every = [_compare(sample, pair, metric, settings.confidence) for pair in pairs for metric in METRICS]
    found = [result for result in every if result is not None]
    return Statistics(
        tasks=tuple(task.name for task in study.head.tasks),
        at_chance=chance,
        methods={name: _describe(sample, name, chance, settings.confidence) for name in study.methods},
        primary=_correct([result for result in found if (result.a, result.b) in known]),
        others=tuple(result for result in found if (result.a, result.b) not in known),
        reference=reference if reference in study.methods else None,
        confidence=settings.confidence,
    )


def find_chance_tasks(study: StudyRecord) -> tuple[str, ...]:
    """Tasks on which no method is above always answering the most frequent class.

    A method is tested on the rows of all its seeds, what a group of rows gives in all seeds being one value. Among so
    many methods one is above by luck, so their p-values are corrected for their number (Holm). Free text has none.
    """
    found = []
    for task in study.head.tasks:
        p_values = []
        for method in study.methods:
            answers = [values for r in study.of(method) if (values := r.correct[task.name]) is not None]
            if answers:
                labels, groups = np.tile(task.labels, len(answers)), np.tile(task.groups, len(answers))
                p_values.append(compute_chance_p_value(np.concatenate(answers), labels, groups))
        if p_values and min(adjust_holm(p_values)) >= LEVEL:
            found.append(task.name)
    return tuple(found)


def _describe(sample: Sample, name: str, chance: Sequence[str], confidence: float) -> MethodResult:
    records = sample.study.of(name)
    seeds = tuple(record.seed for record in records)

    def over(metric: str, tasks: Sequence[str]) -> Figure:
        values = sample.per_seed(name, metric, tasks, seeds)
        low, high = compute_interval(sample.draws(name, metric, tasks), confidence)
        return Figure(float(values.mean()), low, high, _sd(values), tuple(values.tolist()), len(tasks))

    def means(without: Sequence[str] = ()) -> dict[str, Figure]:
        return {m: over(m, tasks) for m in METRICS if (tasks := sample.list_tasks(m, without))}

    return MethodResult(
        name=name,
        title=records[0].title,
        seeds=seeds,
        learning_rate=records[0].learning_rate,
        per_task={
            task.name: {m: over(m, [task.name]) for m in METRICS if task.name in sample.list_tasks(m)}
            for task in sample.study.head.tasks
        },
        mean=means(),
        mean_above_chance=means(chance),
        costs=add_costs(sample.study.head.tasks, records),
        groups=tuple(record.groups for record in records),
    )


def _compare(sample: Sample, pair: Primary, metric: str, confidence: float) -> PairedResult | None:
    """Compare two methods; none where no seed or no task has both."""
    both = pair.a, pair.b
    seeds, tasks = sample.shared_seeds(both), sample.list_tasks(metric)
    if not seeds or not tasks:
        return None
    first, second = (sample.per_seed(name, metric, tasks, seeds) for name in both)
    difference, draws = float((first - second).mean()), sample.draws(both, metric, tasks)
    p_value, (low, high) = compute_bootstrap_p_value(difference, draws), compute_interval(draws, confidence)
    se = None if p_value is None else float(draws.std(ddof=1))
    return PairedResult(
        a=pair.a,
        b=pair.b,
        metric=metric,
        difference=difference,
        low=low,
        high=high,
        se=se,
        seed_sd=_sd(first - second),
        p_value=p_value,
        p_holm=None,
        detectable=estimate_detectable_difference(se, confidence=1 - LEVEL) if se else None,
        detectable_corrected=None,
        n_seeds=len(seeds),
        is_late=pair.is_late,
    )


def _correct(found: Sequence[PairedResult]) -> tuple[PairedResult, ...]:
    """Correct the primary comparisons, both metrics together, for their number."""
    p_values = [result.p_value for result in found if result.p_value is not None]
    adjusted, strictest = iter(adjust_holm(p_values)), 1 - LEVEL / max(len(p_values), 1)
    return tuple(
        result
        if result.p_value is None or result.se is None
        else replace(
            result,
            p_holm=next(adjusted),
            detectable_corrected=estimate_detectable_difference(result.se, confidence=strictest) if result.se else None,
        )
        for result in found
    )


def _sd(values: Array) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None
