"""Who helps whom: losses together against losses alone, with what rows and seeds leave open. No torch.

In: every task's loss row by row after fine-tunings of subsets, one or more seeds each. Out: for each task of each
subset the difference to the task alone, its interval and a verdict, and the rate of positive transfer with its own.

A subset's run and the task's run alone are scored on the same rows, so rows are drawn once for all subsets of a task.
Seeds are few: their noise is not drawn from a cell's own runs. Its variance is that of all of the task's runs around
their cells' means, moderated by all tasks', and draws allow for its being an estimate. The noise of the run alone is
the same for all partners of a task, as it is in the measurement. Where every subset has one seed, intervals are over
rows alone.

A rate counts signs, and noise turns signs: draws pull a rate towards a half. What holds in any case is the range
between the rate with all undecided cells negative and with all of them positive.
Source: paper, appendix B.6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora.errors import DataError
from ensemblelora.evaluation.metrics import resample_means
from ensemblelora.seeding import generator_for
from ensemblelora.validation.moments import correlate, rank
from ensemblelora.validation.resampling import Estimate, Units, bootstrap

__all__ = ["Cell", "Gains", "Rate", "Together", "Transfer", "compare_gains", "compare_with_alone"]

FloatArray = npt.NDArray[np.float64]
Verdict = str
"""positive, negative or undecided"""

_PRIOR_DEGREES = 4  # as usual for variances moderated across groups (Smyth 2004)


@dataclass(frozen=True, eq=False)
class Together:
    """One subset of tasks under some seeds.

    Attributes:
        subset: Tasks, ascending.
        runs: For each seed, every task's loss row by row ``(n_rows,)``.
    """

    subset: tuple[int, ...]
    runs: Sequence[Mapping[int, FloatArray]]


@dataclass(frozen=True)
class Cell:
    """One task in one subset.

    Attributes:
        task: Its index.
        subset: All of its subset.
        difference: Mean loss together less alone; below 0 the others help.
        low: Lower end of its interval; none where there is only one group of rows.
        high: Upper end.
        verdict: ``positive`` transfer where the interval is below minus the tolerance, ``negative`` where it is above.
        n_runs: Seeds together.
    """

    task: int
    subset: tuple[int, ...]
    difference: float
    low: float | None
    high: float | None
    verdict: Verdict
    n_runs: int


@dataclass(frozen=True)
class Rate:
    """Share of positive transfer, the mean over subsets of the share of their tasks.

    Attributes:
        value: By the signs of the measured differences.
        low: Lower end of its interval.
        high: Upper end.
        decided_low: With every undecided cell negative.
        decided_high: With every undecided cell positive.
        n_positive: Cells that are decided so.
        n_negative: Likewise.
        n_undecided: The others.
        n_subsets: Subsets.
    """

    value: float
    low: float | None
    high: float | None
    decided_low: float
    decided_high: float
    n_positive: int
    n_negative: int
    n_undecided: int
    n_subsets: int


@dataclass(frozen=True)
class Transfer:
    """All cells, and what they add up to."""

    cells: tuple[Cell, ...]
    rate: Rate
    has_seed_noise: bool
    """whether some subset had two seeds, so that intervals know of their noise"""

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Return plain values, tasks by name."""
        cells = [
            asdict(cell) | {"task": names[cell.task], "subset": [names[i] for i in cell.subset]} for cell in self.cells
        ]
        return {"rate": asdict(self.rate), "cells": cells, "has_seed_noise": self.has_seed_noise}


@dataclass(frozen=True)
class Gains:
    """Predicted gains against measured ones.

    Attributes:
        n_cells: Pairs of task and subset.
        pearson: Of all cells; intervals draw subsets and tasks at once.
        spearman: The same of ranks.
        within_pearson: After each task's mean is taken off: which partner, not which task.
        sign_share: Share of cells whose sign is predicted.
    """

    n_cells: int
    pearson: Estimate
    spearman: Estimate
    within_pearson: Estimate
    sign_share: Estimate


def compare_with_alone(
    together: Sequence[Together],
    alone: Mapping[int, Sequence[FloatArray]],
    groups: Sequence[npt.NDArray[np.int64]],
    *,
    tolerance: float = 0.0,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Transfer:
    """Compare every task of every subset with the task alone.

    Args:
        together: Subsets that were fine-tuned; they may be of one task, or the same twice.
        alone: Each task's loss row by row after fine-tuning it alone, for each seed.
        groups: Of each task, codes of rows that belong together.
        tolerance: Losses must differ by more, in nats.
        n_bootstrap: Draws.
        confidence: Share of draws inside an interval.
        seed: Root of the draws.

    Raises:
        DataError: If there is no subset, or a task of one was not measured alone.
    """
    missing = sorted({task for one in together for task in one.subset} - {i for i, runs in alone.items() if runs})
    if missing or not together:
        told = f"tasks {missing} were not fine-tuned alone" if missing else "no subset was fine-tuned"
        raise DataError(f"transfer: {told}; there is nothing to compare")
    tasks = sorted({task for one in together for task in one.subset})
    places = {task: [k for k, one in enumerate(together) if task in one.subset] for task in tasks}
    runs = {task: [[run[task] for run in together[k].runs] for k in places[task]] for task in tasks}
    noise = _estimate_noise({task: [*runs[task], alone[task]] for task in tasks})
    cells: dict[tuple[int, int], Cell] = {}
    drawn: dict[tuple[int, int], FloatArray] = {}
    for task in tasks:
        draws = _draw(
            runs[task], alone[task], groups[task], noise.get(task), n_bootstrap=n_bootstrap, seed=seed, task=task
        )
        for column, k in enumerate(places[task]):
            difference = float(_mean(runs[task][column]).mean() - _mean(alone[task]).mean())
            drawn[k, task] = draws[:, column]
            cells[k, task] = _judge(
                task, together[k], difference, draws[:, column], tolerance=tolerance, confidence=confidence
            )
    ordered = {(k, i): cells[k, i] for k, one in enumerate(together) for i in one.subset}
    rate = _count(together, ordered, drawn, tolerance=tolerance, confidence=confidence)
    return Transfer(tuple(ordered.values()), rate, bool(noise))


def compare_gains(
    tasks: Sequence[int],
    subsets: Sequence[int],
    predicted: npt.ArrayLike,
    true: npt.ArrayLike,
    *,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Gains:
    """Say how well predicted gains of partners agree with measured ones.

    Args:
        tasks: Each cell's task.
        subsets: Each cell's subset, by number.
        predicted: Each cell's predicted gain ``(n,)``.
        true: The measured one.
        n_bootstrap: Draws.
        confidence: Share of draws inside an interval.
        seed: Root of the draws.
    """
    order = np.lexsort((np.asarray(subsets), np.asarray(tasks)))
    task, subset = np.asarray(tasks)[order], np.asarray(subsets)[order]
    x, y = (np.asarray(values, np.float64)[order] for values in (predicted, true))
    _, starts, by_task = np.unique(task, return_index=True, return_inverse=True)
    by_subset = np.unique(subset, return_inverse=True)[1]
    whole, agrees = np.zeros(1, np.int64), (np.sign(x) == np.sign(y)).astype(np.float64)

    def measure(weights: FloatArray) -> dict[str, FloatArray]:
        return {
            "pearson": correlate(weights, x, y, whole),
            "spearman": correlate(weights, rank(weights, x, whole), rank(weights, y, whole), whole),
            "within_pearson": correlate(weights, x, y, starts.astype(np.int64)),
            "sign_share": weights @ agrees / np.maximum(weights.sum(axis=1), 1e-12),
        }

    units = [Units(codes, np.zeros(int(codes.max()) + 1, np.int64)) for codes in (by_subset, by_task)]
    found = bootstrap(
        measure,
        units,
        n_bootstrap=n_bootstrap,
        confidence=confidence,
        generator=generator_for(seed, "gains"),
    )
    return Gains(len(x), **found)


@dataclass(frozen=True)
class _Noise:
    """Noise between one task's runs.

    Attributes:
        sd: Of one run.
        degrees: Of freedom behind it.
    """

    sd: float
    degrees: float

    def draw(self, n_runs: Sequence[int], n_draws: int, generator: np.random.Generator) -> FloatArray:
        """Noise of means over some runs, ``(n_draws, len(n_runs))``; as wide as not knowing its size makes it."""
        scale = self.sd * np.sqrt(self.degrees / generator.chisquare(self.degrees, (n_draws, 1)))
        return np.asarray(scale * generator.normal(size=(n_draws, len(n_runs))) / np.sqrt(n_runs))


def _estimate_noise(cells: Mapping[int, Sequence[Sequence[FloatArray]]]) -> dict[int, _Noise]:
    """Estimate every task's noise from what its cells' runs vary, moderated by all tasks'; empty without repeats."""
    squares, degrees = dict.fromkeys(cells, 0.0), dict.fromkeys(cells, 0)
    for task, own in cells.items():
        for runs in own:
            means = np.array([run.mean() for run in runs])
            squares[task] += float(((means - means.mean()) ** 2).sum())
            degrees[task] += len(means) - 1
    total = sum(degrees.values())
    if not total:
        return {}
    pooled, found = sum(squares.values()) / total, {}
    for task in cells:
        prior = min(_PRIOR_DEGREES, total - degrees[task])  # what the others know
        weight = degrees[task] + prior
        found[task] = _Noise(((squares[task] + prior * pooled) / weight) ** 0.5, weight)
    return found


def _draw(
    runs: Sequence[Sequence[FloatArray]],
    own: Sequence[FloatArray],
    groups: npt.NDArray[np.int64],
    noise: _Noise | None,
    *,
    n_bootstrap: int,
    seed: int,
    task: int,
) -> FloatArray:
    """Differences in every draw of rows and of noise, ``(n_bootstrap, cells)``; the lone run's is in all of them."""
    columns = np.stack([_mean(one) - _mean(own) for one in runs], axis=1)
    draws = resample_means(columns, groups, n_bootstrap=n_bootstrap, seed=seed, task=task)
    if noise is None:
        return draws
    drawn = noise.draw([len(own), *map(len, runs)], n_bootstrap, generator_for(seed, "transfer", task))
    return np.asarray(draws + drawn[:, 1:] - drawn[:, :1])


def _judge(
    task: int, one: Together, difference: float, draws: FloatArray, *, tolerance: float, confidence: float
) -> Cell:
    if not np.isfinite(draws).all():
        return Cell(task, one.subset, difference, None, None, "undecided", len(one.runs))
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    verdict = "positive" if high < -tolerance else "negative" if low > tolerance else "undecided"
    return Cell(task, one.subset, difference, float(low), float(high), verdict, len(one.runs))


def _count(
    together: Sequence[Together],
    cells: Mapping[tuple[int, int], Cell],
    drawn: Mapping[tuple[int, int], FloatArray],
    *,
    tolerance: float,
    confidence: float,
) -> Rate:
    def share(is_so: Any) -> Any:
        """Mean over subsets of the mean over their tasks."""
        means = [np.mean([is_so(k, i) for i in one.subset], axis=0) for k, one in enumerate(together)]
        return np.mean(means, axis=0)

    verdicts = [cell.verdict for cell in cells.values()]
    draws = share(lambda k, i: drawn[k, i] < -tolerance)
    is_known = all(np.isfinite(values).all() for values in drawn.values())
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Rate(
        value=float(share(lambda k, i: cells[k, i].difference < -tolerance)),
        low=float(low) if is_known else None,
        high=float(high) if is_known else None,
        decided_low=float(share(lambda k, i: cells[k, i].verdict == "positive")),
        decided_high=float(share(lambda k, i: cells[k, i].verdict != "negative")),
        n_positive=verdicts.count("positive"),
        n_negative=verdicts.count("negative"),
        n_undecided=verdicts.count("undecided"),
        n_subsets=len(together),
    )


def _mean(runs: Sequence[FloatArray]) -> FloatArray:
    return np.asarray(np.mean(runs, axis=0))
