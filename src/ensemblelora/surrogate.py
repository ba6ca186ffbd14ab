"""A model of one task's scores over subsets of tasks: fills the affinity's missing pairs, smooths it for many tasks.

Input: the subsets that hold the task, as indicators ``(k, n)``, all of one size c, and the task's scores ``(k,)``.
Output: :class:`RowModel`: weights W ``(n, k)`` such that ``W @ scores`` is the task's row of the affinity. Entry j is
the model's mean over *every* subset of size c that holds the task and j: the level of equation 1.

The model is ``f(S) = mu + sum_a alpha_a kappa(|S & S_a|)``, ridge on all but the intercept. ``linear`` has the overlap
itself as kappa, which is the linear datamodel ``mu + sum_{j in S} beta_j``; ``kernel`` has the Gaussian
``exp(-gamma |1_S - 1_{S_a}|^2)``, where companions may interact. Indicators of subsets of one size are
``2 (c - overlap)`` apart, so both are functions of the overlap, and a mean over all subsets is a hypergeometric sum
instead of an enumeration. Ridge and gamma have the least leave-one-out error, in closed form.

Cost per task: ``linear`` ``min(k, n)^2 max(k, n)``; ``kernel`` ``k^3`` for each of six gammas, k at most 1,000.
Slow twins: scikit-learn left one out at a time, and all subsets enumerated, in tests/test_surrogate.py. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["RowModel", "SurrogateKind", "fit_row"]

FloatArray = npt.NDArray[np.float64]
SurrogateKind = Literal["linear", "kernel"]

_RIDGES = np.logspace(3, -3, 25)  # in units of the largest eigenvalue; of equal errors the largest wins
_WIDTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # 2 gamma times the mean distance; the first is all but linear
_MAX_SUBSETS = 1000  # a kernel matrix of more takes minutes over many tasks


@dataclass(frozen=True, eq=False)
class RowModel:
    """A fitted surrogate of one task.

    Attributes:
        weights: W, what each score counts for in each entry of the task's row, shape ``(n, k)``; every row sums to 1.
        loo_error: Root mean squared error of predicting each score from the others; NaN for a lone score.
    """

    weights: FloatArray
    loo_error: float


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """A kernel matrix K of the subsets, centred: ``left diag(energy) left^T``."""

    left: FloatArray  # (k, rank), columns of sum 0: those of no energy may be anything else
    energy: FloatArray  # (rank,)
    mean_row: FloatArray  # (k,): column means of K itself
    kappa: FloatArray  # (c + 1,): the kernel at each overlap


def fit_row(members: FloatArray, scores: FloatArray, task: int, kind: SurrogateKind) -> RowModel:
    """Fit one task's surrogate.

    Args:
        members: 1 where a subset holds a task, shape ``(k, n)``; every subset holds ``task``, all have one size.
        scores: The task's score in each subset, shape ``(k,)``.
        task: Its index.
        kind: ``linear`` or ``kernel``.
    """
    k, n = members.shape
    if kind == "kernel" and k > _MAX_SUBSETS:
        kept = np.linspace(0, k - 1, _MAX_SUBSETS).astype(int)
        part = fit_row(members[kept], scores[kept], task, kind)
        weights = np.zeros((n, k))
        weights[:, kept] = part.weights
        return RowModel(weights, part.loo_error)
    residual = scores - scores.mean()
    fits = [(spectrum, *_choose_ridge(spectrum, residual)) for spectrum in _decompose(members, kind)]
    if not fits:  # all subsets alike: nothing to learn
        return RowModel(np.full((n, k), 1 / k), math.nan)
    spectrum, ridge, error = fits[_find_first_least([error for _, _, error in fits])]
    return RowModel(_weigh(members, task, spectrum, ridge), error)


def _decompose(members: FloatArray, kind: SurrogateKind) -> list[_Spectrum]:
    """Return the kernels to choose from, the smoothest first; none where the subsets do not differ."""
    size = int(members[0].sum())
    overlaps = np.arange(size + 1.0)
    centred = members - members.mean(axis=0)
    if not centred.any():
        return []
    if kind == "linear":  # the factors of K are thinner than K where subsets outnumber tasks
        left, singular, _ = np.linalg.svd(centred, full_matrices=False)
        return [_Spectrum(left - left.mean(axis=0), singular**2, members @ members.mean(axis=0), overlaps)]
    shared = (members @ members.T).astype(np.int64)  # (k, k)
    distance = (size - shared).sum() / (len(members) * (len(members) - 1))  # mean over pairs; 0 on the diagonal
    spectra = []
    for width in _WIDTHS:
        kappa = np.exp(-width * (size - overlaps) / distance)
        kernel = kappa[shared]
        mean_row = kernel.mean(axis=0)
        energy, left = np.linalg.eigh(kernel - mean_row - mean_row[:, None] + mean_row.mean())
        spectra.append(_Spectrum(left - left.mean(axis=0), np.maximum(energy, 0.0), mean_row, kappa))
    return spectra


def _choose_ridge(spectrum: _Spectrum, residual: FloatArray) -> tuple[float, float]:
    """Return the ridge of least leave-one-out error, and that error.

    Leaving an example out of a ridge fit divides its residual by one minus its leverage; the free intercept adds
    ``1 / k`` to every leverage.
    """
    ridges = _RIDGES * spectrum.energy.max()
    shrink = spectrum.energy / (spectrum.energy + ridges[:, None])  # (ridges, rank)
    fitted = spectrum.left @ (shrink * (spectrum.left.T @ residual)).T  # (k, ridges)
    leverage = 1 / len(residual) + spectrum.left**2 @ shrink.T
    left_out = (residual[:, None] - fitted) / np.maximum(1.0 - leverage, 1e-9)
    errors = np.sqrt((left_out**2).mean(axis=0))
    best = _find_first_least(errors)
    return float(ridges[best]), float(errors[best])


def _find_first_least(errors: npt.ArrayLike) -> int:
    """Return the first of those that are least but for rounding; the smoothest models come first."""
    values = np.asarray(errors)
    return int(np.argmax(values <= values.min() * (1 + 1e-9)))


def _weigh(members: FloatArray, task: int, spectrum: _Spectrum, ridge: float) -> FloatArray:
    """Return the weights of the scores in the model's means over all subsets that hold the task and another.

    With a free intercept the alphas sum to 0, so what all subsets have in common drops out: the mean over subsets with
    the task is the intercept, and j adds ``sum_{a: j in S_a} alpha_a`` times how much more such subsets overlap.
    """
    k, n = members.shape
    projector = (spectrum.left / (spectrum.energy + ridge)).T  # (rank, k)
    intercept = 1 / k - (spectrum.mean_row @ spectrum.left) @ projector  # (k,)
    held = (members.T @ spectrum.left) @ projector  # (n, k): sums of alphas over the subsets that hold j
    held[task] = 0.0
    return np.asarray(intercept + _measure_slope(spectrum.kappa, n) * held)


def _measure_slope(kappa: FloatArray, n: int) -> float:
    """Return how much larger the mean kernel with all subsets of i and j is for a subset of i that holds j too."""
    c = len(kappa) - 1
    return _average_kernel(kappa[2:], n - 2, c - 2, c - 2) - _average_kernel(kappa[1:], n - 2, c - 1, c - 2)


def _average_kernel(kappa: FloatArray, n_pool: int, n_marked: int, n_drawn: int) -> float:
    """Return the mean of kappa at the number of marked tasks among those drawn without replacement."""
    least, most = max(0, n_drawn - (n_pool - n_marked)), min(n_marked, n_drawn)
    ways = [math.comb(n_marked, x) * math.comb(n_pool - n_marked, n_drawn - x) for x in range(least, most + 1)]
    total = math.comb(n_pool, n_drawn)
    return float(sum(way / total * kappa[x] for x, way in enumerate(ways, start=least)))
