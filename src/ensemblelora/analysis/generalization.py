"""The empirical generalisation gap, and what goes with it. No torch.

In: every row's loss on training and on test rows, by the same combined scores in the same mode. Out: the gap with its
interval, differences of gaps, and correlations over many trained adapters. A training row's loss is compared with a
test row's, so both are drawn anew for an interval: groups of rows with replacement, of either part by itself; two
adapters that saw the same rows are compared in the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.comparison.draws import compute_interval
from ensemblelora.errors import DataError
from ensemblelora.evaluation.metrics import resample_means
from ensemblelora.seeding import generator_for
from ensemblelora.validation.moments import correlate, rank
from ensemblelora.validation.resampling import Estimate, Units, bootstrap

__all__ = [
    "Correlation",
    "Gap",
    "GapChange",
    "RowLosses",
    "average_losses",
    "choose_rows",
    "compare_gaps",
    "correlate_within",
    "gap_of",
    "measure_gap",
]

FloatArray = npt.NDArray[np.float64]

_PARTS = ("train", "test")
_FEWEST_UNITS = 4
"""Fewer variants than this give draws that say nothing of a correlation."""


@dataclass(frozen=True)
class RowLosses:
    """Losses of single rows, in nats, and which rows belong together.

    Attributes:
        train: Of some training rows.
        train_groups: Codes of their groups.
        test: Of the test rows.
        test_groups: Likewise.
    """

    train: Sequence[float]
    train_groups: Sequence[int]
    test: Sequence[float]
    test_groups: Sequence[int]


@dataclass(frozen=True)
class Gap:
    """Test loss minus training loss, and its interval; none where a part is a single group of rows."""

    train_nll: float
    test_nll: float
    gap: float
    low: float | None
    high: float | None
    n_train: int
    n_test: int


@dataclass(frozen=True)
class GapChange:
    """One way to train against another.

    Attributes:
        difference: Of the gaps, in nats.
        relative: Over the other's gap, less one; none where that is not surely above zero.
    """

    difference: Estimate
    relative: Estimate | None


@dataclass(frozen=True)
class Correlation:
    """Within blocks, pooled over them; none where undefined.

    Attributes:
        n_points: Points in all.
        n_units: Of which so many are drawn anew for the intervals.
        pearson: Of the values.
        spearman: Of their ranks.
    """

    n_points: int
    n_units: int
    pearson: Estimate
    spearman: Estimate


def choose_rows(n_rows: int, n_wanted: int, *, seed: int, task: str) -> npt.NDArray[np.int64]:
    """Choose training rows at random, such as as many as there are test rows; all where there are no more. Sorted.

    Fewer rows are some of those that more would be.

    Args:
        n_rows: There are.
        n_wanted: At most.
        seed: The root.
        task: Whose rows.

    Example:
        >>> choose_rows(3, 5, seed=0, task="rte").tolist()
        [0, 1, 2]
    """
    order = generator_for(seed, "gap", "rows", task).permutation(n_rows)
    return np.sort(order[:n_wanted]).astype(np.int64)


def measure_gap(losses: RowLosses, *, n_bootstrap: int, confidence: float, seed: int) -> Gap:
    """Measure test loss minus training loss.

    Args:
        losses: Of both parts.
        n_bootstrap: Draws behind the interval.
        confidence: Share of them inside.
        seed: Their root.

    Reference:
        Paper, section 4 (empirical generalization error).
    """
    low, high = compute_interval(_draw_gaps([losses], n_bootstrap, seed, 0)[:, 0], confidence)
    return Gap(
        train_nll=float(np.mean(losses.train)),
        test_nll=float(np.mean(losses.test)),
        gap=gap_of(losses),
        low=low,
        high=high,
        n_train=len(losses.train),
        n_test=len(losses.test),
    )


def compare_gaps(
    ones: Sequence[RowLosses], others: Sequence[RowLosses], *, n_bootstrap: int, confidence: float, seed: int
) -> GapChange:
    """Compare the mean gap over tasks of one way to train with another's on the same rows.

    Args:
        ones: Losses of each task.
        others: Likewise, of the same rows in the same order.
        n_bootstrap: Draws behind the intervals.
        confidence: Share of them inside.
        seed: Their root.

    Raises:
        DataError: If the rows are not the same.
    """
    pairs = list(zip(ones, others, strict=True))
    if any((a.train_groups, a.test_groups) != (b.train_groups, b.test_groups) for a, b in pairs):
        raise DataError("gaps of different rows can't be compared in the same draws; measure both on the same rows")
    one, other = (float(np.mean([gap_of(losses) for losses in several])) for several in (ones, others))
    draws = np.mean([_draw_gaps(pair, n_bootstrap, seed, i) for i, pair in enumerate(pairs)], axis=0)  # (n, 2)
    difference = Estimate(one - other, *compute_interval(draws[:, 0] - draws[:, 1], confidence))
    lowest, _ = compute_interval(draws[:, 1], confidence)
    if other <= 0 or lowest is None or lowest <= 0:
        return GapChange(difference, None)
    return GapChange(
        difference, Estimate(one / other - 1, *compute_interval(draws[:, 0] / draws[:, 1] - 1, confidence))
    )


def gap_of(losses: RowLosses) -> float:
    """Test loss minus training loss."""
    return float(np.mean(losses.test) - np.mean(losses.train))


def average_losses(several: Sequence[RowLosses]) -> RowLosses:
    """Average each row's loss over several adapters, such as those of several seeds, on the same rows."""
    train, test = (np.mean([getattr(losses, part) for losses in several], axis=0).tolist() for part in _PARTS)
    return RowLosses(train, several[0].train_groups, test, several[0].test_groups)


def correlate_within(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    blocks: Sequence[str],
    units: Sequence[str],
    *,
    n_bootstrap: int,
    confidence: float,
    seed: int,
) -> Correlation:
    """Correlate two numbers over points, within blocks such as tasks, whose levels differ for other reasons.

    Args:
        x: One number of each point.
        y: The other.
        blocks: Each point's block.
        units: What is drawn with replacement, such as how an adapter is made: points of one unit, over blocks and
            seeds, are drawn together, since they are not independent of each other.
        n_bootstrap: Draws behind the intervals; none with fewer than 4 units.
        confidence: Share of draws inside.
        seed: Their root.
    """
    names, codes = np.unique(np.asarray(blocks, dtype=str), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    first, second = (np.asarray(values, dtype=np.float64)[order] for values in (x, y))
    starts = np.searchsorted(codes[order], np.arange(len(names)))
    unit_names, unit = np.unique(np.asarray(units, dtype=str)[order], return_inverse=True)

    def statistic(weights: FloatArray) -> dict[str, FloatArray]:
        first_rank, second_rank = (rank(weights, values, starts) for values in (first, second))
        return {
            "pearson": correlate(weights, first, second, starts),
            "spearman": correlate(weights, first_rank, second_rank, starts),
        }

    found = bootstrap(
        statistic,
        [Units(unit, np.zeros(len(unit_names), dtype=np.int64))],
        n_bootstrap=n_bootstrap if len(unit_names) >= _FEWEST_UNITS else 0,
        confidence=confidence,
        generator=generator_for(seed, "sharpness", "correlation"),
    )
    return Correlation(len(first), len(unit_names), found["pearson"], found["spearman"])


def _draw_gaps(several: Sequence[RowLosses], n_bootstrap: int, seed: int, task: int) -> FloatArray:
    """Gaps in draws of both parts' groups, ``(n_bootstrap, len(several))``."""
    train, test = (
        resample_means(
            np.stack([np.asarray(getattr(losses, part)) for losses in several], axis=1),
            getattr(several[0], f"{part}_groups"),
            n_bootstrap=n_bootstrap,
            seed=seed,
            task=len(_PARTS) * task + i,
        )
        for i, part in enumerate(_PARTS)
    )
    return test - train
