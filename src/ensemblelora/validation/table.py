"""Measured fine-tunings as arrays: seeds, subsets, tasks.

In: :class:`~ensemblelora.validation.records.TrueRun`, one by one. Out: :class:`Truth`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.estimation import compute_wilson_interval
from ensemblelora.validation.records import TrueRun

__all__ = ["Truth", "mean_over_seeds", "tabulate"]

FloatArray = npt.NDArray[np.float64]
Subset = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Truth:
    """What was measured, in the order of ``subsets``.

    Attributes:
        tasks: Names, in the order of task indices.
        subsets: Those with at least one finished fine-tuning.
        nll: Mean validation loss ``(n_seeds, k, n)``; NaN where not measured.
        accuracy: The same.
        base_nll: Of the base model, ``(n,)``.
        base_accuracy: The same.
        marked: Tasks whose answers no fine-tuning told from chance.
    """

    tasks: tuple[str, ...]
    subsets: tuple[Subset, ...]
    nll: FloatArray
    accuracy: FloatArray
    base_nll: FloatArray
    base_accuracy: FloatArray
    marked: tuple[int, ...]


def tabulate(runs: Sequence[TrueRun], base: TrueRun, names: tuple[str, ...], *, confidence: float) -> Truth:
    """Arrange measured fine-tunings by seed, subset and task.

    Args:
        runs: At least one.
        base: The base model's record.
        names: Tasks in the order of their indices.
        confidence: Of the interval within which a task counts as at chance.
    """
    index = {name: i for i, name in enumerate(names)}
    subsets = tuple(dict.fromkeys(tuple(index[name] for name in run.tasks) for run in runs))
    place = {subset: s for s, subset in enumerate(subsets)}
    shape = (1 + max(run.seed for run in runs), len(subsets), len(names))
    nll, accuracy = np.full(shape, np.nan), np.full(shape, np.nan)
    for run in runs:
        s = place[tuple(index[name] for name in run.tasks)]
        for name in run.tasks:
            nll[run.seed, s, index[name]] = np.mean(run.nll[name])
            accuracy[run.seed, s, index[name]] = np.mean(run.correct[name]) if run.correct[name] else np.nan
    return Truth(
        tasks=names,
        subsets=subsets,
        nll=nll,
        accuracy=accuracy,
        base_nll=np.array([np.mean(base.nll[name]) for name in names]),
        base_accuracy=np.array([np.mean(base.correct[name]) if base.correct[name] else np.nan for name in names]),
        marked=tuple(i for i, name in enumerate(names) if _is_at_chance(name, runs, base, confidence)),
    )


def mean_over_seeds(values: FloatArray) -> FloatArray:
    """Mean over the seeds there are, ``(k, n)``; NaN where there is none."""
    n_seeds = np.isfinite(values).sum(axis=0)
    return np.where(n_seeds > 0, np.nansum(values, axis=0) / np.maximum(n_seeds, 1), np.nan)


def _is_at_chance(name: str, runs: Sequence[TrueRun], base: TrueRun, confidence: float) -> bool:
    """Whether the mean accuracy over all fine-tunings is within the interval of always giving the commonest answer."""
    rows = [run.correct[name] for run in runs if name in run.tasks]
    if not rows or not rows[0]:
        return False
    chance = base.chance[name]
    _, high = compute_wilson_interval(chance, len(rows[0]), confidence)
    return float(np.mean([np.mean(row) for row in rows])) <= high
