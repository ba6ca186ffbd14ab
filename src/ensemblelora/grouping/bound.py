"""An upper bound on the clustering objective that holds for any dual values, good or bad.

It is of the relaxation over units, tasks that stay together: with s_u tasks a unit and X_uv the share of a pair of
their tasks, Z_uv = sqrt(s_u s_v) X_uv is psd, has trace m, and keeps the vector of the roots sqrt(s_u). Where every
task is a unit, Z is X and the roots are ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Domain", "bound_objective", "choose_row_duals"]

FloatArray = npt.NDArray[np.float64]
AnyFloatArray = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Domain:
    """What the relaxation asks of Z beside its eigenvalues.

    Attributes:
        roots: ``Z roots = roots``; square roots of the units' sizes, shape ``(k,)``.
        lower: Least entries, shape ``(k, k)``; none: zeros.
        upper: Largest entries, shape ``(k, k)``; none: no limit.
    """

    roots: AnyFloatArray
    lower: AnyFloatArray | None = None
    upper: AnyFloatArray | None = None

    @property
    def n_tasks(self) -> float:
        """All units' tasks together."""
        return float(self.roots @ self.roots)

    def cut(self, multipliers: FloatArray) -> FloatArray:
        """Return multipliers of the entries, symmetric: positive ones push up, negative ones down if they may."""
        symmetric = (multipliers + multipliers.T) / 2
        return np.maximum(symmetric, 0.0) if self.upper is None else np.asarray(symmetric)

    def price(self, multipliers: FloatArray) -> float:
        """Return what multipliers of :meth:`cut` add to a bound: ``<N-, upper> - <N+, lower>``."""
        price = 0.0 if self.lower is None else -float((np.maximum(multipliers, 0.0) * self.lower).sum())
        return price if self.upper is None else price + float((np.maximum(-multipliers, 0.0) * self.upper).sum())


def bound_objective(
    affinity: FloatArray,
    n_groups: int | None,
    trace_penalty: float,
    rows: FloatArray,
    entries: FloatArray,
    domain: Domain | None = None,
) -> float:
    """Return an upper bound on the relaxation from any dual values.

    For feasible Z, any y and N: ``<A, Z> <= y roots + <A + N - (y roots^T + roots y^T) / 2, Z> + price of N``. Z is psd
    with eigenvalues at most 1 (it has no negative entry, and roots, all positive, is an eigenvector of 1), so the inner
    product is at most the sum of the m largest eigenvalues, or of the positive ones where the trace is free (Ky Fan).

    Args:
        affinity: A, shape ``(k, k)``; that of units divided by the roots of both.
        n_groups: m, or none where the trace is free.
        trace_penalty: Subtracted per unit of trace where it is free.
        rows: y, duals of the row sums, shape ``(k,)``.
        entries: N, duals of the bounds of entries, shape ``(k, k)``; what can't be a dual is cut.
        domain: Roots and bounds; none: of single tasks, no entry negative.
    """
    domain = domain or Domain(np.ones(len(affinity)))
    multipliers = domain.cut(entries)
    pulled = np.outer(rows, domain.roots)
    values = np.linalg.eigvalsh(affinity + multipliers - (pulled + pulled.T) / 2)
    fixed = float(rows @ domain.roots) + domain.price(multipliers)
    if n_groups is None:
        return fixed + float(np.maximum(values - trace_penalty, 0.0).sum())
    return fixed + float(values[-n_groups:].sum())


def choose_row_duals(
    affinity: FloatArray, trace_penalty: float, entries: FloatArray, roots: AnyFloatArray | None = None
) -> FloatArray:
    """Return the y that makes :func:`bound_objective` least for given ``entries``, shape ``(k,)``.

    It takes the roots' direction out of A + N, which leaves it as an eigenvector, and lifts its eigenvalue above all
    others: every feasible Z has that direction whole, so it must not compete for the trace.

    Args:
        affinity: A, shape ``(k, k)``.
        trace_penalty: Subtracted per unit of trace where it is free, otherwise without effect.
        entries: N as :meth:`Domain.cut` gives it, shape ``(k, k)``.
        roots: Square roots of the units' sizes; none: ones.
    """
    roots = np.ones(len(affinity)) if roots is None else roots
    total, n_tasks = affinity + entries, float(roots @ roots)
    along = total @ roots / n_tasks
    lift = np.linalg.norm(total) + trace_penalty  # no eigenvalue is larger
    return np.asarray(2.0 * along - (roots @ along + lift) / n_tasks * roots)
