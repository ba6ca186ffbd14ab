"""Many convex objectives minimised side by side: limited-memory quasi-Newton steps on top of a given inverse curvature.

Every round evaluates one trial of every unfinished objective, together, so that the work is products of matrices with
matrices. Far from the optimum the sums over rows are taken in float32; the last steps, and every verdict, in float64.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ensemblelora.estimation.problem import Batch, evaluate_batch

__all__ = ["AbstractCurvature", "Descent", "descend", "start_descent"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]

_MEMORY = 6
_SUFFICIENT_DECREASE = 1e-4
_RENEW_ABOVE = 0.5  # measured: 0.3 to 0.8 are within 20 % of each other
_FLOAT32_NORM = 1e-4  # below, a gradient in float32 is no longer one
_FLOAT32_LENGTH = 0.2
_FLOAT32_NOISE, _FLOAT64_NOISE = 1e-6, 64 * np.finfo(np.float64).eps
_FIRST_SHRINKAGE = 0.1  # of the gradient by one step


class AbstractCurvature(Protocol):
    """Inverse curvature of every objective."""

    def solve(self, gradients: FloatArray, which: Indices) -> FloatArray:
        """Apply the inverse of the objectives ``which`` to a vector each, shape ``(m, d)``."""

    def renew(self, which: Indices, weights: FloatArray) -> Indices:
        """Measure anew where steps came to little, at the given weights; return those that were."""


@dataclass(eq=False)
class Descent:
    """Where k objectives stand; changed in place.

    Attributes:
        weights: Shape ``(k, d)``.
        losses: Objectives there, shape ``(k,)``.
        gradients: Shape ``(k, d)``.
        is_exact: Whether losses and gradients were summed in float64, shape ``(k,)``.
        iterations: Evaluations so far, shape ``(k,)``.
    """

    weights: FloatArray
    losses: FloatArray
    gradients: FloatArray
    is_exact: BoolArray
    iterations: npt.NDArray[np.int64]

    def find_converged(self, tolerance: float) -> BoolArray:
        """Return where the float64 gradient is at most ``tolerance max(1, |L|)``, shape ``(k,)``."""
        return self.is_exact & (self.norms <= tolerance * np.maximum(1.0, np.abs(self.losses)))

    @property
    def norms(self) -> FloatArray:
        """Norms of the gradients, shape ``(k,)``."""
        return np.sqrt(np.einsum("kd,kd->k", self.gradients, self.gradients))

    def take(self, which: Indices) -> Descent:
        """Return a copy of some of the objectives."""
        return Descent(
            self.weights[which],
            self.losses[which],
            self.gradients[which],
            self.is_exact[which],
            self.iterations[which],
        )

    def put(self, which: Indices, other: Descent) -> None:
        """Write back what :meth:`take` gave."""
        self.weights[which], self.losses[which], self.gradients[which] = other.weights, other.losses, other.gradients
        self.is_exact[which], self.iterations[which] = other.is_exact, other.iterations


class _Memory:
    """The last steps of k objectives and what they did to the gradients: the L-BFGS correction of an inverse curvature.

    Source: J. Nocedal, "Updating quasi-Newton matrices with limited storage", 1980.
    """

    def __init__(self) -> None:
        self._pairs: deque[tuple[FloatArray, FloatArray, FloatArray]] = deque(maxlen=_MEMORY)

    def add(self, k: int, which: Indices, steps: FloatArray, changes: FloatArray) -> None:
        """Keep one step and change of gradient of the objectives ``which``, shape ``(m, d)``."""
        products = np.einsum("kd,kd->k", steps, changes)
        sizes = np.einsum("kd,kd->k", changes, changes)
        # Float32 can turn a tiny change around; a pair that is not convex is left out.
        usable = products > 1e-12 * sizes
        rates = np.zeros(k)
        rates[which[usable]] = 1.0 / products[usable]
        self._pairs.append((rates, _spread(k, which, steps), _spread(k, which, changes)))

    def forget(self, which: Indices) -> None:
        """Drop what is known of the objectives ``which``."""
        for rates, _, _ in self._pairs:
            rates[which] = 0.0

    def correct(self, curvature: AbstractCurvature, gradients: FloatArray, which: Indices) -> FloatArray:
        """Apply the corrected inverse curvature to the gradients of the objectives ``which``, by two loops."""
        vectors, shares = gradients.copy(), []
        pairs = [(r[which, None], _rows(s, which), _rows(y, which)) for r, s, y in self._pairs]
        for rates, steps, changes in reversed(pairs):
            shares.append(rates * np.einsum("kd,kd->k", steps, vectors)[:, None])
            vectors -= shares[-1] * changes
        vectors = curvature.solve(vectors, which)
        for (rates, steps, changes), share in zip(pairs, reversed(shares), strict=True):
            vectors += (share - rates * np.einsum("kd,kd->k", changes, vectors)[:, None]) * steps
        return vectors


def start_descent(batch: Batch) -> Descent:
    """Start at the base model, where every task was measured before."""
    problem, k = batch.problem, len(batch.subsets)
    shares = batch.membership / batch.totals[:, None]
    return Descent(
        weights=np.zeros((k, problem.dimension)),
        losses=shares @ problem.start_losses,
        gradients=shares @ problem.start_gradients,
        is_exact=np.zeros(k, dtype=bool),
        iterations=np.zeros(k, dtype=np.int64),
    )


def descend(batch: Batch, state: Descent, curvature: AbstractCurvature, *, max_iter: int) -> None:
    """Minimise every objective of a batch until its gradient, in float64, meets the problem's tolerance.

    Args:
        batch: k objectives.
        state: Where they start; left where they end.
        curvature: Their inverse curvature.
        max_iter: Most evaluations of one objective, those before included.
    """
    k, tolerance, memory = len(batch.subsets), batch.problem.tolerance, _Memory()
    steps, lengths, shrinkage = np.zeros_like(state.weights), np.ones(k), np.full(k, _FIRST_SHRINKAGE)
    in_float64, moved = state.is_exact.copy(), np.arange(k)
    while True:
        is_open = ~state.find_converged(tolerance) & (state.iterations < max_iter)
        active, moved = np.flatnonzero(is_open), moved[is_open[moved]]
        if not active.size:
            return
        steps[moved] = -memory.correct(curvature, state.gradients[moved], moved)
        in_float64 |= _is_near(state, shrinkage, tolerance)
        moves = lengths[active, None] * steps[active]
        here = state.take(active)
        trial = _try_moves(batch, here, active, moves, in_float64[active])
        state.iterations[active] += 1
        accepted = _is_lower(here, trial, moves)
        lengths[active] *= np.where(accepted, 1.0 / lengths[active], 0.5)
        in_float64 |= lengths < _FLOAT32_LENGTH  # the noise may be all that such a step meets
        moved, rows = active[accepted], np.flatnonzero(accepted)
        memory.add(k, moved, moves[rows], trial.gradients[rows] - here.gradients[rows])
        shrinkage[moved] = trial.norms[rows] / here.norms[rows]
        state.put(moved, trial.take(rows))
        slow = moved[shrinkage[moved] > _RENEW_ABOVE]
        memory.forget(curvature.renew(slow, state.weights[slow]))


def _is_near(state: Descent, shrinkage: FloatArray, tolerance: float) -> BoolArray:
    """Whether the next evaluation may be the last, or float32 could not tell."""
    norms, scales = state.norms, np.maximum(1.0, np.abs(state.losses))
    return np.asarray((norms * shrinkage <= 2.0 * tolerance * scales) | (norms <= _FLOAT32_NORM))


def _try_moves(batch: Batch, here: Descent, active: Indices, moves: FloatArray, in_float64: BoolArray) -> Descent:
    """Evaluate the objectives ``active`` a move away from where they are, each in its precision."""
    trial = replace(here, weights=here.weights + moves, is_exact=in_float64, iterations=here.iterations + 1)
    trial.losses, trial.gradients = np.empty_like(here.losses), np.empty_like(here.gradients)
    for is_chosen, dtype in ((in_float64, np.float64), (~in_float64, np.float32)):
        rows = np.flatnonzero(is_chosen)
        if rows.size:
            found = evaluate_batch(batch, trial.weights[rows], active[rows], dtype)
            trial.losses[rows], trial.gradients[rows] = found
    return trial


def _is_lower(here: Descent, trial: Descent, moves: FloatArray) -> BoolArray:
    """Whether the objectives fell enough (Armijo's rule), up to what rounding can hide."""
    slopes = np.einsum("kd,kd->k", here.gradients, moves)
    noise = np.where(here.is_exact & trial.is_exact, _FLOAT64_NOISE, _FLOAT32_NOISE)
    target = here.losses + _SUFFICIENT_DECREASE * slopes + noise * np.maximum(1.0, np.abs(here.losses))
    return np.asarray(trial.losses <= target)


def _spread(k: int, which: Indices, values: FloatArray) -> FloatArray:
    """Put values of some of k objectives at their places."""
    if len(which) == k:
        return values
    spread = np.zeros((k, values.shape[1]))
    spread[which] = values
    return spread


def _rows(values: FloatArray, which: Indices) -> FloatArray:
    return values if len(which) == len(values) else values[which]
