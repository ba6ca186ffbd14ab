"""A first-order solver for the relaxation of clustering, by splitting its constraints in two.

The one half, psd with rows that sum to 1 (and a given trace), is ``1 1^T / n`` plus a matrix on the other directions
with eigenvalues in [0, 1]; its projection is one eigendecomposition. The other half, no negative entry and whatever
else bounds the entries, is a maximum. The alternating direction method of multipliers (Boyd et al., "Distributed
optimization and statistical learning via the alternating direction method of multipliers", 2011) meets both, and its
multipliers are dual values of the bounds. Units of several tasks have their roots in the place of the ones.

Cost: an eigendecomposition and some passes over n^2 numbers an iteration; 50 to 500 iterations. More than 150 tasks are
solved in float32, which the bound does not notice: it is taken in float64, and holds for any dual values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh

from ensemblelora.errors import SolverError
from ensemblelora.grouping.bound import Domain, bound_objective, choose_row_duals
from ensemblelora.grouping.partition import centre_affinity

__all__ = ["SplitSolution", "solve_by_splitting"]

FloatArray = npt.NDArray[np.float64]
AnyFloatArray = npt.NDArray[np.floating[Any]]

_OVER_RELAXATION = 1.6
_CHECK_EVERY = 20
_MAX_TASKS_IN_FLOAT64 = 150
_UNBALANCED = 1.5


@dataclass(frozen=True, eq=False)
class SplitSolution:
    """Where the solver stopped.

    Attributes:
        matrix: X, psd with rows that sum to 1 and the trace asked for; entries out of bounds up to ``violation``.
        bound: No feasible point, hence no partition, has a larger objective.
        objective: ``<A, X> - trace_penalty tr X``.
        accuracy: Distance between bound and objective, relative to the bound or the largest affinity.
        violation: Norm of what keeps X from its entries' bounds, relative to the norm of X.
        n_iterations: Eigendecompositions.
        is_converged: Whether accuracy and violation met the tolerance.
    """

    matrix: FloatArray
    bound: float
    objective: float
    accuracy: float
    violation: float
    n_iterations: int
    is_converged: bool


@dataclass(eq=False)
class _State:
    """The two halves' points, the multiplier over the rate, and the rate: the price of their distance."""

    spectral: AnyFloatArray
    positive: AnyFloatArray
    multiplier: AnyFloatArray
    rate: float
    last_move: float = 0.0


def solve_by_splitting(
    affinity: FloatArray,
    n_groups: int | None,
    *,
    trace_penalty: float = 0.0,
    tolerance: float | None = None,
    max_iter: int = 5000,
    domain: Domain | None = None,
) -> SplitSolution:
    """Maximise ``<A, X> - trace_penalty tr X`` over the relaxation (:mod:`ensemblelora.grouping.sdp`).

    Args:
        affinity: A, symmetric, its rows sum to 0 (``A roots = 0``), its largest entry is about 1, shape ``(n, n)``.
        n_groups: The trace, more than 1 and less than n; none to leave it free.
        trace_penalty: At least 0; of use where the trace is free.
        tolerance: Of accuracy, and a tenth of that of violation; none: 1e-7, for more than 150 tasks 1e-4.
        max_iter: Most eigendecompositions.
        domain: Roots of the units and bounds of the entries; none: of single tasks, no entry negative.

    Raises:
        SolverError: If an eigendecomposition fails.
    """
    n = len(affinity)
    dtype: type[np.floating[Any]] = np.float64 if n <= _MAX_TASKS_IN_FLOAT64 else np.float32
    aim = tolerance or (1e-7 if dtype == np.float64 else 1e-4)
    domain = domain or Domain(np.ones(n))
    scaled, working = affinity.astype(dtype), _convert(domain, dtype)
    flat = np.outer(working.roots, working.roots) / dtype(domain.n_tasks)
    # Entries within a group are about n_groups / n, their multipliers about 1.
    state = _State(flat, flat, np.zeros_like(flat), n / (n_groups or np.sqrt(n)))
    found: SplitSolution | None = None
    for iteration in range(1, max_iter + 1):
        _step(state, scaled, n_groups, trace_penalty, working)
        if iteration % _CHECK_EVERY == 0 or iteration == max_iter:
            found = _assess(state, affinity, n_groups, trace_penalty, domain, found)
            is_converged = max(found.accuracy, found.violation / 10) <= aim
            found = replace(found, n_iterations=iteration, is_converged=is_converged)
            if is_converged:
                break
            _balance(state)
    assert found is not None
    return found


def _convert(domain: Domain, dtype: type[np.floating[Any]]) -> Domain:
    """The domain in the solver's precision."""
    lower, upper = (None if bound is None else bound.astype(dtype) for bound in (domain.lower, domain.upper))
    return Domain(domain.roots.astype(dtype), lower, upper)


def _step(state: _State, affinity: AnyFloatArray, n_groups: int | None, trace_penalty: float, domain: Domain) -> None:
    """Project on the one half, then on the other, and charge the multiplier with what is between them."""
    target = state.positive - state.multiplier + affinity / affinity.dtype.type(state.rate)
    state.spectral = _project_spectrum(target, n_groups, trace_penalty / state.rate, domain.roots)
    relaxed = state.multiplier + _OVER_RELAXATION * state.spectral + (1.0 - _OVER_RELAXATION) * state.positive
    positive = np.maximum(relaxed, 0.0 if domain.lower is None else domain.lower)
    if domain.upper is not None:
        positive = np.minimum(positive, domain.upper)
    state.multiplier = relaxed - positive
    state.last_move = float(np.linalg.norm(positive - state.positive))
    state.positive = positive


def _project_spectrum(
    matrix: AnyFloatArray, n_groups: int | None, price: float, roots: AnyFloatArray | None = None
) -> AnyFloatArray:
    """Return the nearest matrix with rows that sum to 1, eigenvalues in [0, 1], and trace ``n_groups``.

    Where the trace is free, every unit of it costs ``price``.
    """
    n, dtype = len(matrix), matrix.dtype.type
    roots = np.ones(n, matrix.dtype) if roots is None else roots
    flat = np.outer(roots, roots) / (roots @ roots)
    centred = centre_affinity((matrix + matrix.T) / 2, roots)
    # The direction of the roots comes last and gets nothing of the trace, since it gets its whole share below.
    centred -= (np.linalg.norm(centred) + dtype(1.0)) * flat
    try:
        values, vectors = eigh(centred, driver="evd", overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        raise SolverError(f"clustering {n} tasks: an eigendecomposition failed; check the affinity") from None
    kept = np.clip(values - price, 0.0, 1.0) if n_groups is None else _project_to_slice(values, n_groups - 1)
    first = int(np.searchsorted(kept, 0.0, side="right"))
    vectors, kept = vectors[:, first:], kept[first:].astype(matrix.dtype)
    return np.asarray((vectors * kept) @ vectors.T + flat)


def _project_to_slice(values: AnyFloatArray, total: float) -> FloatArray:
    """Return the nearest numbers in [0, 1] that sum to ``total``, for rising values."""
    wide = values.astype(np.float64)
    corners = np.sort(np.concatenate([wide, wide - 1.0]))

    def spend(level: float) -> float:
        return float(np.clip(wide - level, 0.0, 1.0).sum())

    low, high = 0, len(corners) - 1  # the sum falls from n to 0 between the corners, and is straight between two
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spend(corners[middle]) >= total else (low, middle)
    above, below = spend(corners[low]), spend(corners[high])
    share = (above - total) / (above - below) if above > below else 0.0
    level = corners[low] + share * (corners[high] - corners[low])
    return np.asarray(np.clip(wide - level, 0.0, 1.0))


def _assess(
    state: _State,
    affinity: FloatArray,
    n_groups: int | None,
    trace_penalty: float,
    domain: Domain,
    before: SplitSolution | None,
) -> SplitSolution:
    """Measure how far apart the halves are, and bound and objective."""
    matrix = state.spectral.astype(np.float64)
    entries = domain.cut(-state.rate * state.multiplier.astype(np.float64))
    rows = choose_row_duals(affinity, trace_penalty, entries, domain.roots)
    bound = bound_objective(affinity, n_groups, trace_penalty, rows, entries, domain)
    bound = bound if before is None else min(bound, before.bound)
    objective = float((affinity * matrix).sum() - trace_penalty * np.trace(matrix))
    violation = float(np.linalg.norm(state.spectral - state.positive) / np.linalg.norm(matrix))
    return SplitSolution(matrix, bound, objective, abs(bound - objective) / max(abs(bound), 1.0), violation, 0, False)


def _balance(state: _State) -> None:
    """Raise the rate where the halves are too far apart, lower it where they move too much (Boyd et al., 3.4.1)."""
    apart = np.linalg.norm(state.spectral - state.positive) / np.linalg.norm(state.spectral)
    moving = state.last_move / max(float(np.linalg.norm(state.multiplier)), 1e-12)
    factor = float(np.clip(np.sqrt(apart / max(moving, 1e-12)), 0.5, 2.0))
    if not 1 / _UNBALANCED < factor < _UNBALANCED:
        state.rate *= factor
        state.multiplier /= state.multiplier.dtype.type(factor)
