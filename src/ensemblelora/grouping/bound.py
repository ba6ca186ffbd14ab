"""An upper bound on the clustering objective that holds for any dual values, good or bad."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["bound_objective", "choose_row_duals"]

FloatArray = npt.NDArray[np.float64]


def bound_objective(
    affinity: FloatArray, n_groups: int | None, trace_penalty: float, rows: FloatArray, entries: FloatArray
) -> float:
    """Return an upper bound on the relaxation from any dual values.

    For feasible X and any y and N >= 0, ``<A, X> <= sum y + <A + N - (y 1^T + 1 y^T) / 2, X>``. X is psd with
    eigenvalues at most 1 (its rows are non-negative and sum to 1), so the inner product is at most the sum of the m
    largest eigenvalues, or of the positive ones where the trace is free (Ky Fan).

    Args:
        affinity: A, shape ``(n, n)``.
        n_groups: m, or none where the trace is free.
        trace_penalty: Subtracted per unit of trace where it is free.
        rows: y, duals of the row sums, shape ``(n,)``.
        entries: N, duals of ``X >= 0``, shape ``(n, n)``; negative parts are cut.
    """
    slack = np.maximum((entries + entries.T) / 2, 0.0)
    values = np.linalg.eigvalsh(affinity + slack - (rows[:, None] + rows) / 2)
    if n_groups is None:
        return float(rows.sum() + np.maximum(values - trace_penalty, 0.0).sum())
    return float(rows.sum() + values[-n_groups:].sum())


def choose_row_duals(affinity: FloatArray, trace_penalty: float, entries: FloatArray) -> FloatArray:
    """Return the y that makes :func:`bound_objective` least for given ``entries``, shape ``(n,)``.

    It takes the row means out of A + N, which leaves the vector of ones as an eigenvector, and lifts its eigenvalue
    above all others: every feasible X has that direction whole, so it must not compete for the trace.

    Args:
        affinity: A, shape ``(n, n)``.
        trace_penalty: Subtracted per unit of trace where it is free, otherwise without effect.
        entries: N, not negative, symmetric, shape ``(n, n)``.
    """
    total = affinity + entries
    means = total.mean(axis=1)
    lift = np.linalg.norm(total) + trace_penalty  # no eigenvalue is larger
    return np.asarray(2.0 * means - means.mean() - lift / len(total))
