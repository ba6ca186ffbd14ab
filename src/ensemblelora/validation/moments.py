"""Weighted correlations within blocks of cells, and the noise of the true runs.

Every function takes weights ``(draws, n_cells)``, how often a cell counts in a draw, and returns one number per draw.
Blocks are runs of neighbouring cells, given by where they start: tasks, or ``[0]`` for everything at once.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ensemblelora.validation.cells import FloatArray, IntArray
from ensemblelora.validation.resampling import divide

__all__ = ["NEGLIGIBLE", "correlate", "estimate_run_variance", "rank", "spread"]

_Number = TypeVar("_Number", np.float64, np.int64)
_MIN_DEGREES = 5

NEGLIGIBLE = 1e-26
"""Of a sum of squares: what is left of it around a mean is rounding errors"""


def correlate(weights: FloatArray, x: FloatArray, y: FloatArray, starts: IntArray) -> FloatArray:
    """Return Pearson's correlation of x and y, both centred within blocks, pooled over blocks, ``(draws,)``.

    Args:
        weights: Shape ``(draws, n_cells)``.
        x: Shape ``(n_cells,)`` or ``(draws, n_cells)``.
        y: The same.
        starts: Where blocks start; ``[0]`` gives the ordinary correlation.

    Returns:
        NaN where one of the two does not vary within any block.
    """
    x_centred, y_centred = _centre(weights, x, starts), _centre(weights, y, starts)
    xx, yy = ((weights * values**2).sum(axis=1) for values in (x_centred, y_centred))
    is_flat = [total <= NEGLIGIBLE * (weights * values**2).sum(axis=1) for total, values in ((xx, x), (yy, y))]
    product = np.where(is_flat[0] | is_flat[1], 0.0, xx * yy)
    return np.clip(divide((weights * x_centred * y_centred).sum(axis=1), np.sqrt(product)), -1.0, 1.0)


def rank(weights: FloatArray, values: FloatArray, starts: IntArray) -> FloatArray:
    """Return each cell's rank within its block as a share of the block, 0 to 1, shape ``(draws, n_cells)``.

    Ties, and a cell's own copies in a draw, share the middle of their ranks. Correlated, these are Spearman's
    coefficient; pooled over blocks, its mean over blocks weighted by their cells (without ties).

    Args:
        weights: Shape ``(draws, n_cells)``.
        values: What is ranked, ``(n_cells,)``.
        starts: Where blocks start.
    """
    n = len(values)
    block = np.repeat(np.arange(len(starts)), np.diff(starts, append=n))
    order = np.lexsort((values, block))
    is_new = np.ones(n, dtype=bool)
    is_new[1:] = (np.diff(values[order]) != 0) | (np.diff(block[order]) != 0)
    ties = np.flatnonzero(is_new)
    mass = np.add.reduceat(weights[:, order], ties, axis=1)
    middle = np.cumsum(mass, axis=1) - mass / 2
    ranks = np.empty_like(weights)
    ranks[:, order] = np.repeat(middle, np.diff(ties, append=n), axis=1)
    totals = spread(np.add.reduceat(weights, starts, axis=1), starts, n)
    before = spread(np.cumsum(np.add.reduceat(weights, starts, axis=1), axis=1), starts, n) - totals
    return np.asarray((ranks - before) / np.where(totals > 0, totals, 1.0))


def estimate_run_variance(
    weights: FloatArray, run_squares: FloatArray, n_runs: IntArray, starts: IntArray, *, prior_degrees: float = 0.0
) -> FloatArray:
    """Return the variance between seeds of one true run of each cell, shape ``(draws, n_cells)``.

    Pooled over a task's cells with two seeds or more: sum of squares around their own means over degrees of freedom,
    unbiased however many seeds each has. Tasks without such cells get the variance pooled over all tasks. NaN where
    all cells together have fewer than 5 degrees of freedom: such a variance is off by more than 60 % as a rule.

    Args:
        weights: Shape ``(draws, n_cells)``.
        run_squares: Each cell's sum of squares around its mean over seeds, ``(n_cells,)``.
        n_runs: Seeds of each cell, ``(n_cells,)``.
        starts: Where each task's cells start.
        prior_degrees: Degrees of freedom that the pooled variance counts for in each task's own, for where the
            accident of a task without noise must not happen, at the price of a bias.
    """
    if (n_runs - 1).sum() < _MIN_DEGREES:
        return np.full(weights.shape, np.nan)
    squares = np.add.reduceat(weights * run_squares, starts, axis=1)  # (draws, n_tasks)
    degrees = np.add.reduceat(weights * (n_runs - 1), starts, axis=1)
    pooled = divide(squares.sum(axis=1), degrees.sum(axis=1))
    own = divide(squares + prior_degrees * pooled[:, None], degrees + prior_degrees)
    return spread(np.where(np.isnan(own), pooled[:, None], own), starts, weights.shape[1])


def spread(per_block: npt.NDArray[_Number], starts: IntArray, n_cells: int) -> npt.NDArray[_Number]:
    """Give every cell its block's value: ``(..., n_blocks)`` to ``(..., n_cells)``."""
    return np.repeat(per_block, np.diff(starts, append=n_cells), axis=-1)


def _centre(weights: FloatArray, values: FloatArray, starts: IntArray) -> FloatArray:
    totals = np.add.reduceat(weights, starts, axis=1)
    sums = np.add.reduceat(weights * values, starts, axis=1)
    means = np.divide(sums, totals, out=np.zeros_like(sums), where=totals > 0)
    return np.asarray(values - spread(means, starts, weights.shape[1]))
