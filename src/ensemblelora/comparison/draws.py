"""Every method and pair of methods in the same draws of test rows, and how much the rows make them vary. No torch.

In: a :class:`~.record.StudyRecord`. Out: :class:`Sample`. A row's values are averaged over seeds first; then groups of
rows are drawn with replacement, task by task, the same ones for all methods. That says how much the choice of rows
matters for these very trainings; :mod:`.uncertainty` adds what others would have changed. A task whose test rows are of
a single group stays in every mean as it was measured, and out of the resampling.

Cost: draws x groups of rows random numbers a task, and a matrix product for all methods and pairs together. The slow
twin, :func:`ensemblelora.evaluation.metrics.compare_paired_tasks`, takes one pair at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.comparison.record import MethodRecord, StudyRecord, TaskRows
from ensemblelora.comparison.uncertainty import Error, RowSpread, join_errors, measure_rows
from ensemblelora.evaluation.metrics import resample_means

__all__ = [
    "METRICS",
    "Pair",
    "Sample",
    "adjust_holm",
    "compute_interval",
    "draw_sample",
]

Array = npt.NDArray[np.float64]
Pair = tuple[str, str]
METRICS = ("accuracy", "nll")


@dataclass(frozen=True, eq=False)
class Sample:
    """Means as measured and in every draw.

    Attributes:
        study: What is drawn from.
        by_task: Task and metric -> method or pair of methods -> each draw's mean ``(n_draws,)``; of a pair, of the
            difference on the seeds that both have.
        spreads: The same, how the mean varies with the choice of rows; not of tasks with a single group of them.
    """

    study: StudyRecord
    by_task: Mapping[tuple[str, str], Mapping[str | Pair, Array]]
    spreads: Mapping[tuple[str, str], Mapping[str | Pair, RowSpread]]

    def draws(self, key: str | Pair, metric: str, tasks: Sequence[str]) -> Array:
        """Each draw's mean over tasks ``(n_draws,)``; NaN where no task's rows can be drawn."""
        if not any(self.spreads[task, metric] for task in tasks):
            return np.full(self.n_draws, np.nan)
        return np.asarray(np.mean([self.by_task[task, metric][key] for task in tasks], axis=0))

    def error(self, key: str | Pair, metric: str, tasks: Sequence[str], per_seed: Array) -> Error | None:
        """How sure a mean over tasks is; none of a single seed.

        Args:
            key: A method, or a pair.
            metric: Of the mean.
            tasks: Behind it.
            per_seed: Each seed's mean, or difference of means.
        """
        rows = [found[key] for task in tasks if (found := self.spreads[task, metric])]
        return join_errors(rows, len(tasks), per_seed)

    @property
    def n_draws(self) -> int:
        """How often rows were drawn."""
        return next((len(draws) for found in self.by_task.values() for draws in found.values()), 0)

    def list_undrawn(self) -> tuple[str, ...]:
        """Tasks whose test rows are of a single group."""
        return tuple(dict.fromkeys(task for (task, _), found in self.spreads.items() if not found))

    def per_seed(self, method: str, metric: str, tasks: Sequence[str], seeds: Sequence[int]) -> Array:
        """Each seed's mean over tasks as measured ``(n_seeds,)``."""
        records = {record.seed: record for record in self.study.of(method)}
        values = [[_rows(records[seed], task, metric).mean() for task in tasks] for seed in seeds]
        return np.asarray(np.mean(values, axis=1))

    def list_tasks(self, metric: str, without: Sequence[str] = ()) -> tuple[str, ...]:
        """Tasks that have a metric; free text has no accuracy."""
        names = (task.name for task in self.study.head.tasks)
        return tuple(name for name in names if (name, metric) in self.by_task and name not in without)

    def shared_seeds(self, pair: Pair) -> tuple[int, ...]:
        """Seeds that both methods have."""
        return _find_shared_seeds(self.study, pair)


def draw_sample(study: StudyRecord, pairs: Sequence[Pair], *, n_bootstrap: int, seed: int) -> Sample:
    """Draw test rows with replacement for all methods and pairs at once.

    Args:
        study: As far as it has come.
        pairs: Methods to compare.
        n_bootstrap: Draws.
        seed: Their root.
    """
    by_task: dict[tuple[str, str], dict[str | Pair, Array]] = {}
    spreads: dict[tuple[str, str], dict[str | Pair, RowSpread]] = {}
    for i, task in enumerate(study.head.tasks):
        for metric in METRICS:
            columns = dict(_list_columns(study, task, metric, pairs))
            if columns:
                rows = np.stack(list(columns.values()), axis=1)  # (n_rows, methods and pairs)
                drawn = resample_means(rows, task.groups, n_bootstrap=n_bootstrap, seed=seed, task=i)
                measured = np.where(np.isnan(drawn), rows.mean(axis=0), drawn)  # as it is, where nothing can be drawn
                by_task[task.name, metric] = dict(zip(columns, measured.T, strict=True))
                varied = {key: measure_rows(values, task.groups) for key, values in columns.items()}
                spreads[task.name, metric] = {key: found for key, found in varied.items() if found is not None}
    return Sample(study, by_task, spreads)


def compute_interval(draws: npt.ArrayLike, confidence: float) -> tuple[float | None, float | None]:
    """Return the middle of the draws that holds a share of them; none where they are not finite."""
    values = np.asarray(draws, dtype=np.float64)
    if not np.isfinite(values).all():
        return None, None
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def adjust_holm(p_values: Sequence[float], *, n_more: int = 0) -> tuple[float, ...]:
    """Return Holm's corrected p-values: the k-th smallest of m times m - k + 1, made rising, at most 1.

    Args:
        p_values: Of the tests that could be made.
        n_more: Tests that were named, too, and could not be made; each counts as one whose p-value is 1.

    Example:
        >>> adjust_holm([0.5, 0.125, 0.25])
        (0.5, 0.375, 0.5)
        >>> adjust_holm([0.125], n_more=2)
        (0.375,)
    """
    n_tests = len(p_values) + n_more
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (n_tests - rank) * p_values[place]))
        adjusted[place] = highest
    return tuple(adjusted)


def _list_columns(
    study: StudyRecord, task: TaskRows, metric: str, pairs: Sequence[Pair]
) -> Iterator[tuple[str | Pair, Array]]:
    """A row's value under each method, and its difference between the methods of each pair."""
    if metric == "accuracy" and task.kind == "sequence":
        return
    for name in study.methods:
        yield name, _average(study, name, task.name, metric)
    for pair in pairs:
        if seeds := _find_shared_seeds(study, pair):
            first, second = (_average(study, name, task.name, metric, seeds) for name in pair)
            yield pair, first - second


def _average(study: StudyRecord, method: str, task: str, metric: str, seeds: Sequence[int] | None = None) -> Array:
    records = [record for record in study.of(method) if seeds is None or record.seed in seeds]
    return np.asarray(np.mean([_rows(record, task, metric) for record in records], axis=0))


def _rows(record: MethodRecord, task: str, metric: str) -> Array:
    values = record.nll[task] if metric == "nll" else record.correct[task]
    return np.asarray(() if values is None else values, dtype=np.float64)


def _find_shared_seeds(study: StudyRecord, pair: Pair) -> tuple[int, ...]:
    first, second = ([record.seed for record in study.of(name)] for name in pair)
    return tuple(seed for seed in first if seed in second)
