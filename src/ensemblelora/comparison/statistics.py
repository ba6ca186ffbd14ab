"""From rows' losses and answers to a table: means, spreads, paired differences, and what could be found. No torch.

In: a :class:`~.record.StudyRecord`. Out: :class:`Statistics`, plain numbers. Tasks count equally. Intervals and
p-values are of test rows and trainings together (:mod:`.uncertainty`); beside them stand intervals over the test rows
alone, of these very trainings. Methods that are draws of one thing are also one method (:mod:`.pooled`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ensemblelora.comparison.draws import METRICS, Array, Sample, adjust_holm, compute_interval, draw_sample
from ensemblelora.comparison.ledger import MeanCosts, add_costs
from ensemblelora.comparison.pooled import pool_draws
from ensemblelora.comparison.record import OURS, Primary, StudyRecord
from ensemblelora.comparison.uncertainty import Error
from ensemblelora.report.power_section import estimate_detectable_difference

__all__ = [
    "ABLATIONS",
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
ABLATIONS = (("ours-boost-1", "ours-boost-0"), (OURS, "ours-boost-0"))
"""pairs that are compared besides, where both are there: what boosting adds"""
_FEWEST_DRAWS = 10_000  # the ends of an interval are to be steady
_CHANCE_METHODS = ("base", "shared")


@dataclass(frozen=True)
class Figure:
    """One number of one method.

    Attributes:
        value: Mean over seeds, and over tasks where it is of several.
        low: Lower end of its interval over test rows and trainings; none of a single seed.
        high: Upper end.
        rows_low: Lower end over test rows alone; none where tasks have a single group of rows.
        rows_high: Upper end.
        seed_sd: Standard deviation over seeds; none of a single one.
        per_seed: Each seed's own.
        n_tasks: Behind it.
    """

    value: float
    low: float | None
    high: float | None
    rows_low: float | None
    rows_high: float | None
    seed_sd: float | None
    per_seed: tuple[float, ...]
    n_tasks: int = 1

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """Its interval as far as it is known: over test rows and trainings, or of one seed over test rows alone."""
        return (self.rows_low, self.rows_high) if self.low is None else (self.low, self.high)


@dataclass(frozen=True)
class MethodResult:
    """One method over its seeds; a metric that does not exist for a task is absent."""

    name: str
    title: str
    seeds: tuple[int, ...]
    learning_rate: float | None
    is_rate_at_edge: bool
    """whether a smaller or larger rate than those that were tried might have been better"""
    per_task: Mapping[str, Mapping[str, Figure]]
    """task -> metric"""
    mean: Mapping[str, Figure]
    """over all tasks"""
    mean_above_chance: Mapping[str, Figure]
    """over tasks that are not at chance"""
    costs: MeanCosts
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
        low: Lower end of its interval over test rows and trainings; none of a single seed.
        high: Upper end.
        rows_low: Lower end over test rows alone.
        rows_high: Upper end.
        se: Standard error over test rows and trainings.
        degrees: Of freedom, behind it.
        seed_sd: Standard deviation over seeds of the difference; none of a single one.
        p_value: Two-sided, of this comparison alone; none where rows and trainings can't give one.
        p_holm: Corrected for all primary comparisons that were named; none for the others.
        detectable: Smallest true difference found in 80 % of such studies, at :data:`LEVEL` alone.
        detectable_corrected: The same at the strictest level of the correction; none for other than primary ones.
        n_seeds: That both have.
        n_tasks: Behind the mean.
        is_above_chance: Whether tasks at chance are left out.
        is_late: Whether it was named after both were tested.
    """

    a: str
    b: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    rows_low: float | None
    rows_high: float | None
    se: float | None
    degrees: float | None
    seed_sd: float | None
    p_value: float | None
    p_holm: float | None
    detectable: float | None
    detectable_corrected: float | None
    n_seeds: int
    n_tasks: int
    is_above_chance: bool = False
    is_late: bool = False


@dataclass(frozen=True)
class Statistics:
    """Everything that the tables are made of.

    Attributes:
        tasks: In the order of task indices.
        at_chance: Tasks that validation rows could not tell from chance; see :func:`find_chance_tasks`.
        undrawn: Tasks whose test rows are of a single group, and so in no interval.
        methods: By name; draws of one thing by their own and together.
        primary: Comparisons named beforehand, in both metrics, over all tasks and over those not at chance.
        n_primary: Lines that were named, those without a result too; p-values are corrected for as many.
        others: Every method against the reference, and :data:`ABLATIONS`, not corrected.
        reference: That method; none where it was not carried out.
        confidence: Of the intervals.
    """

    tasks: tuple[str, ...]
    at_chance: tuple[str, ...]
    undrawn: tuple[str, ...]
    methods: Mapping[str, MethodResult]
    primary: tuple[PairedResult, ...]
    n_primary: int
    others: tuple[PairedResult, ...]
    reference: str | None
    confidence: float

    def find(self, a: str, b: str, metric: str) -> PairedResult | None:
        """The comparison of two methods in a metric over all tasks, primary or not."""
        every = (pair for pair in (*self.primary, *self.others) if not pair.is_above_chance)
        return next((pair for pair in every if (pair.a, pair.b, pair.metric) == (a, b, metric)), None)


def compute_statistics(study: StudyRecord, *, reference: str = "shared", n_bootstrap: int | None = None) -> Statistics:
    """Compute the whole table.

    Args:
        study: As far as it has come; pairs with a method that has no record are left out, and corrected for.
        reference: What every method is compared with besides, uncorrected.
        n_bootstrap: Draws; none: the config's, or 10,000 where these are fewer.
    """
    study, settings, chance = pool_draws(study), study.config.evaluation, find_chance_tasks(study)
    present = set(study.methods)
    named = [pair for pair in study.head.primary if {pair.a, pair.b} <= present]
    known = {(pair.a, pair.b) for pair in named}
    wanted = [*((name, reference) for name in study.methods if name != reference), *ABLATIONS]
    others = [pair for pair in dict.fromkeys(wanted) if set(pair) <= present and pair not in known]
    pairs = [*named, *(Primary(*pair) for pair in others)]
    draws = n_bootstrap or max(settings.n_bootstrap, _FEWEST_DRAWS)
    sample = draw_sample(study, [(pair.a, pair.b) for pair in pairs], n_bootstrap=draws, seed=study.config.seed)
    lines = list(_list_lines(sample, chance))
    first = [_compare(sample, pair, *line, settings.confidence) for pair in named for line in lines]
    rest = [
        _compare(sample, Primary(*pair), metric, (), settings.confidence)
        for pair in others
        for metric, without in lines
        if not without
    ]
    n_named = len(study.head.primary) * len(lines)
    return Statistics(
        tasks=tuple(task.name for task in study.head.tasks),
        at_chance=chance,
        undrawn=sample.list_undrawn(),
        methods={name: _describe(sample, name, chance, settings.confidence) for name in study.methods},
        primary=_correct([result for result in first if result is not None], n_named),
        n_primary=n_named,
        others=tuple(result for result in rest if result is not None),
        reference=reference if reference in present else None,
        confidence=settings.confidence,
    )


def find_chance_tasks(study: StudyRecord) -> tuple[str, ...]:
    """Tasks on which neither the base model nor the shared adapter is above always giving the most frequent answer.

    By validation rows of the first seed, so that no test row and no other method can change which tasks they are; of
    two p-values the smaller counts, corrected for there being two (Holm). None where the shared adapter was not
    trained, as then nothing is known of what can be learnt; free text has no such answer.
    """
    records = [record for name in _CHANCE_METHODS for record in study.of(name) if record.seed == study.head.seeds[0]]
    if "shared" not in {record.method for record in records}:
        return ()
    found = []
    for task in study.head.tasks:
        p_values = [value for record in records if (value := record.chance.get(task.name)) is not None]
        if p_values and min(adjust_holm(p_values)) >= LEVEL:
            found.append(task.name)
    return tuple(found)


def _list_lines(sample: Sample, chance: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Metrics, and the tasks that a mean leaves out: none, and those at chance where others are left."""
    for metric in METRICS:
        every = sample.list_tasks(metric)
        if every:
            yield metric, ()
        if 0 < len(sample.list_tasks(metric, chance)) < len(every):
            yield metric, tuple(chance)


def _describe(sample: Sample, name: str, chance: Sequence[str], confidence: float) -> MethodResult:
    records = sample.study.of(name)
    seeds = tuple(record.seed for record in records)

    def over(metric: str, tasks: Sequence[str]) -> Figure:
        values = sample.per_seed(name, metric, tasks, seeds)
        value, error = float(values.mean()), sample.error(name, metric, tasks, values)
        low, high = _surround(value, error, confidence)
        if metric == "accuracy" and low is not None and high is not None:  # Student's t does not end at 0 and 1
            low, high = max(low, 0.0), min(high, 1.0)
        rows_low, rows_high = compute_interval(sample.draws(name, metric, tasks), confidence)
        return Figure(value, low, high, rows_low, rows_high, _sd(values), tuple(values.tolist()), len(tasks))

    def means(without: Sequence[str] = ()) -> dict[str, Figure]:
        return {m: over(m, tasks) for m in METRICS if (tasks := sample.list_tasks(m, without))}

    return MethodResult(
        name=name,
        title=records[0].title,
        seeds=seeds,
        learning_rate=records[0].learning_rate,
        is_rate_at_edge=records[0].is_rate_at_edge,
        per_task={
            task.name: {m: over(m, [task.name]) for m in METRICS if task.name in sample.list_tasks(m)}
            for task in sample.study.head.tasks
        },
        mean=means(),
        mean_above_chance=means(chance),
        costs=add_costs(sample.study.head.tasks, records),
        groups=tuple(record.groups for record in records),
    )


def _compare(
    sample: Sample, pair: Primary, metric: str, without: Sequence[str], confidence: float
) -> PairedResult | None:
    """Compare two methods; none where no seed has both."""
    both = pair.a, pair.b
    seeds, tasks = sample.shared_seeds(both), sample.list_tasks(metric, without)
    if not seeds:
        return None
    first, second = (sample.per_seed(name, metric, tasks, seeds) for name in both)
    difference = float((first - second).mean())
    error = sample.error(both, metric, tasks, first - second)
    low, high = _surround(difference, error, confidence)
    rows_low, rows_high = compute_interval(sample.draws(both, metric, tasks), confidence)
    return PairedResult(
        a=pair.a,
        b=pair.b,
        metric=metric,
        difference=difference,
        low=low,
        high=high,
        rows_low=rows_low,
        rows_high=rows_high,
        se=None if error is None else error.se,
        degrees=None if error is None else error.degrees,
        seed_sd=_sd(first - second),
        p_value=None if error is None else error.p_value(difference),
        p_holm=None,
        detectable=_detect(error, 1 - LEVEL),
        detectable_corrected=None,
        n_seeds=len(seeds),
        n_tasks=len(tasks),
        is_above_chance=bool(without),
        is_late=pair.is_late,
    )


def _correct(found: Sequence[PairedResult], n_named: int) -> tuple[PairedResult, ...]:
    """Correct the primary comparisons for the number of lines that were named, whether or not each has a p-value."""
    p_values = [result.p_value for result in found if result.p_value is not None]
    adjusted = iter(adjust_holm(p_values, n_more=n_named - len(p_values)))
    strictest = 1 - LEVEL / max(n_named, 1)
    return tuple(
        result
        if result.p_value is None
        else replace(result, p_holm=next(adjusted), detectable_corrected=_detect(_error_of(result), strictest))
        for result in found
    )


def _surround(value: float, error: Error | None, confidence: float) -> tuple[float | None, float | None]:
    return (None, None) if error is None else error.interval(value, confidence)


def _error_of(result: PairedResult) -> Error | None:
    return None if result.se is None or result.degrees is None else Error(result.se, result.degrees)


def _detect(error: Error | None, confidence: float) -> float | None:
    """None where nothing varies: rows that don't differ say nothing of what could be found."""
    if error is None or not error.se:
        return None
    return estimate_detectable_difference(error.se, confidence=confidence, degrees=error.degrees)


def _sd(values: Array) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None
