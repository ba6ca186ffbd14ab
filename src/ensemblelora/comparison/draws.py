"""Every method and pair of methods in the same draws of test rows, and what draws say about a difference. No torch.

In: a :class:`~.record.StudyRecord`. Out: :class:`Sample`. A row's values are averaged over seeds first; then groups of
rows are drawn with replacement, task by task, the same ones for all methods.

Cost: draws x groups of rows random numbers a task, and a matrix product for all methods and pairs together. The slow
twin, :func:`ensemblelora.evaluation.metrics.compare_paired_tasks`, takes one pair at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.comparison.record import MethodRecord, StudyRecord, TaskRows
from ensemblelora.evaluation.metrics import resample_means

__all__ = [
    "METRICS",
    "Pair",
    "Sample",
    "adjust_holm",
    "compute_bootstrap_p_value",
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
    """

    study: StudyRecord
    by_task: Mapping[tuple[str, str], Mapping[str | Pair, Array]]

    def draws(self, key: str | Pair, metric: str, tasks: Sequence[str]) -> Array:
        """Each draw's mean over tasks ``(n_draws,)``."""
        return np.asarray(np.mean([self.by_task[task, metric][key] for task in tasks], axis=0))

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
    for i, task in enumerate(study.head.tasks):
        for metric in METRICS:
            columns = dict(_list_columns(study, task, metric, pairs))
            if columns:
                rows = np.stack(list(columns.values()), axis=1)  # (n_rows, methods and pairs)
                drawn = resample_means(rows, task.groups, n_bootstrap=n_bootstrap, seed=seed, task=i)
                by_task[task.name, metric] = dict(zip(columns, drawn.T, strict=True))
    return Sample(study, by_task)


def compute_interval(draws: npt.ArrayLike, confidence: float) -> tuple[float | None, float | None]:
    """Return the middle of the draws that holds a share of them; none where they are not finite."""
    values = np.asarray(draws, dtype=np.float64)
    if not np.isfinite(values).all():
        return None, None
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def compute_bootstrap_p_value(difference: float, draws: npt.ArrayLike) -> float | None:
    """Return the two-sided p-value of no difference.

    Draws scatter about the measured difference as measured ones scatter about the true one, so that, were the true one
    zero, a measured one would lie as far from zero as draws lie from the measured one. It counts as a draw itself, lest
    a p-value be zero.

    Args:
        difference: Measured.
        draws: The same in draws of rows with replacement ``(n,)``.

    Returns:
        None where draws are not finite, as of a task with a single group of rows.

    Example:
        >>> compute_bootstrap_p_value(1.0, [0.9, 1.1, 1.0])
        0.25
    """
    spread = np.abs(np.asarray(draws, dtype=np.float64) - difference)
    if not np.isfinite(spread).all():
        return None
    return float((1 + (spread >= abs(difference)).sum()) / (1 + len(spread)))


def adjust_holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return Holm's corrected p-values: the k-th smallest of m times m - k + 1, made rising, at most 1.

    Example:
        >>> adjust_holm([0.5, 0.125, 0.25])
        (0.5, 0.375, 0.5)
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
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
