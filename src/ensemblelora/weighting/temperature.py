"""How sure an ensemble may be: one number that its class scores are divided by. No torch.

In: scores of one task's held-out rows. Out: the temperature of least cross-entropy. It changes no answer and only the
loss, which over- and underconfident scores pay for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import softmax

__all__ = ["fit_temperature"]

Array = npt.NDArray[np.float64]

_MOST = 20.0  # and, turned round, the least; what few rows ask for beyond is no measurement


def fit_temperature(scores: npt.ArrayLike, labels: npt.NDArray[np.integer]) -> float:
    """Find the temperature T that minimises the mean cross-entropy of ``softmax(scores / T)``.

    The loss is convex in 1 / T: its slope there, the mean score under the softmax less the right class's, only rises.

    Args:
        scores: ``(n_rows, K)``, -inf past a row's number of classes.
        labels: Right classes ``(n_rows,)``.

    Returns:
        T, between 1/20 and 20; 1 where no row has scores that differ.

    Reference:
        Guo and others, "On calibration of modern neural networks" (2017), temperature scaling.

    Example:
        >>> overconfident = np.array([[8.0, 0.0], [8.0, 0.0], [8.0, 0.0], [8.0, 0.0]])
        >>> round(fit_temperature(overconfident, np.array([0, 0, 0, 1])), 3)  # right in three of four: 8 / log 3
        7.282
    """
    logits = np.asarray(scores, dtype=np.float64)
    absent = np.isneginf(logits)
    values = np.where(absent, 0.0, logits)
    values -= values.sum(axis=1, keepdims=True) / (~absent).sum(axis=1, keepdims=True)
    values = np.where(absent, 0.0, values)
    if not values.any():
        return 1.0
    right = values[np.arange(len(labels)), labels]

    def slope(inverse: float) -> float:
        shares = softmax(np.where(absent, -np.inf, inverse * values), axis=1)
        return float(((shares * values).sum(axis=1) - right).mean())

    if slope(1 / _MOST) >= 0:
        return _MOST
    if slope(_MOST) <= 0:
        return 1 / _MOST
    return 1 / float(brentq(slope, 1 / _MOST, _MOST))
