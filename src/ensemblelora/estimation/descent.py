"""Many convex objectives minimised side by side: limited-memory quasi-Newton steps on top of a given inverse curvature.

Every round evaluates one trial of every unfinished objective, together, so that the work is products of matrices with
matrices. Far from the optimum the sums over rows are taken in float32; the last steps, and every verdict, in float64.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ensemblelora.estimation.problem import Batch, evaluate_batch

__all__ = ["AbstractInverse", "Descent", "StepMemory", "descend", "start_descent"]

FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]

_MEMORY = 8
_SUFFICIENT_DECREASE = 1e-4
_RENEW_ABOVE = 0.5  # measured: 0.3 to 0.8 are within 20 % of each other
_FLOAT32_NORM = 1e-5  # measured: float32 is wrong by 3e-7 to 3e-6 in the gradient, 3e-7 in the objective
_FLOAT32_NOISE, _FLOAT64_NOISE = 1e-6, 64 * np.finfo(np.float64).eps
_FLOAT32_LENGTH = 0.1  # a step cut so short meets little but noise


class AbstractInverse(Protocol):
    """Inverse curvature of every objective."""

    def solve(self, gradients: Float32Array, which: Indices) -> Float32Array:
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
        return self.is_exact & (self.norms <= self.scale(tolerance))

    @property
    def norms(self) -> FloatArray:
        """Norms of the gradients, shape ``(k,)``."""
        return np.asarray(np.linalg.norm(self.gradients, axis=1))

    def scale(self, share: FloatArray | float) -> FloatArray:
        """Return a share of each objective, or of 1 where that is larger, shape ``(k,)``."""
        return np.asarray(share * np.maximum(1.0, np.abs(self.losses)))

    def move(
        self, which: Indices, moves: FloatArray, losses: FloatArray, gradients: FloatArray, *, is_exact: bool
    ) -> None:
        """Move the objectives ``which`` to where their losses and gradients were found."""
        self.weights[which] += moves
        self.losses[which], self.gradients[which], self.is_exact[which] = losses, gradients, is_exact

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


class StepMemory:
    """The last steps of k objectives and what they did to the gradients: the L-BFGS correction of an inverse curvature.

    Source: J. Nocedal, "Updating quasi-Newton matrices with limited storage", 1980.
    """

    def __init__(self, k: int) -> None:
        """Begin without any."""
        self._k = k
        self._pairs: deque[tuple[Float32Array, Float32Array, Float32Array]] = deque(maxlen=_MEMORY)

    def add(self, which: Indices, steps: FloatArray, changes: FloatArray) -> None:
        """Keep one step and change of gradient of the objectives ``which``, shape ``(m, d)``."""
        products = np.einsum("kd,kd->k", steps, changes)
        sizes = np.einsum("kd,kd->k", changes, changes)
        # Float32 can turn a tiny change around; a pair that is not convex is left out.
        usable = products > 1e-12 * sizes
        rates = np.zeros((self._k, 1), np.float32)
        rates[which[usable], 0] = 1.0 / products[usable]
        self._pairs.append((rates, _spread(self._k, which, steps), _spread(self._k, which, changes)))

    def forget(self, which: Indices) -> None:
        """Drop what is known of the objectives ``which``."""
        for rates, _, _ in self._pairs:
            rates[which] = 0.0

    def correct(self, inverse: AbstractInverse, gradients: FloatArray, which: Indices) -> Float32Array:
        """Apply the corrected inverse curvature to the gradients of the objectives ``which``, by two loops."""
        vectors, shares = gradients.astype(np.float32), []
        pairs = [(_rows(r, which), _rows(s, which), _rows(y, which)) for r, s, y in self._pairs]
        for rates, steps, changes in reversed(pairs):
            shares.append(rates * np.einsum("kd,kd->k", steps, vectors)[:, None])
            vectors -= shares[-1] * changes
        vectors = inverse.solve(vectors, which)
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


def descend(
    batch: Batch,
    state: Descent,
    inverse: AbstractInverse,
    memory: StepMemory,
    *,
    dtype: npt.DTypeLike,
    max_iter: int,
) -> None:
    """Minimise every objective of a batch, in float64 to the problem's tolerance, in float32 as far as that can tell.

    Args:
        batch: k objectives.
        state: Where they start; left where they end.
        inverse: Their inverse curvature.
        memory: The steps so far; goes on where it was.
        dtype: Precision of the sums over rows.
        max_iter: Most evaluations of one objective, those before included.
    """
    k = len(state.weights)
    lengths, shrinkage, moved, steps = np.ones(k), np.ones(k), np.arange(k), np.zeros_like(state.weights)
    while True:
        if dtype == np.float64:
            is_done = state.find_converged(batch.problem.tolerance)
        else:
            is_done = _is_near(state, lengths, shrinkage, batch.problem.tolerance)
        is_open = ~is_done & (state.iterations < max_iter)
        active, moved = np.flatnonzero(is_open), moved[is_open[moved]]
        if not active.size:
            return
        steps[moved] = -memory.correct(inverse, state.gradients[moved], moved)
        moves, here = lengths[active, None] * steps[active], state.take(active)
        losses, gradients = evaluate_batch(batch, here.weights + moves, active, dtype)
        state.iterations[active] += 1
        accepted = np.flatnonzero(_is_lower(here, losses, moves, dtype))
        lengths[active] *= 0.5
        moved = active[accepted]
        if moved.size:
            lengths[moved] = 1.0
            memory.add(moved, moves[accepted], gradients[accepted] - here.gradients[accepted])
            state.move(moved, moves[accepted], losses[accepted], gradients[accepted], is_exact=dtype == np.float64)
            shrinkage[moved] = state.norms[moved] / here.norms[accepted]
            slow = moved[shrinkage[moved] > _RENEW_ABOVE]
            memory.forget(inverse.renew(slow, state.weights[slow]))


def _is_near(state: Descent, lengths: FloatArray, shrinkage: FloatArray, tolerance: float) -> BoolArray:
    """Whether one more step, as good as half the last one, may meet the tolerance, or float32 can't tell any more."""
    expected = state.norms * np.clip(2.0 * shrinkage, 0.5, 1.0)
    is_noise = (state.norms <= state.scale(_FLOAT32_NORM)) | (lengths < _FLOAT32_LENGTH)
    return np.asarray(is_noise | (expected <= state.scale(tolerance)))


def _is_lower(here: Descent, losses: FloatArray, moves: FloatArray, dtype: npt.DTypeLike) -> BoolArray:
    """Whether the objectives fell enough (Armijo's rule), up to what rounding can hide."""
    slopes = np.einsum("kd,kd->k", here.gradients, moves)
    noise = np.where(here.is_exact & (dtype == np.float64), _FLOAT64_NOISE, _FLOAT32_NOISE)
    return np.asarray(losses <= here.losses + _SUFFICIENT_DECREASE * slopes + here.scale(noise))


def _spread(k: int, which: Indices, values: FloatArray) -> Float32Array:
    """Put values of some of k objectives at their places."""
    if len(which) == k:
        return values.astype(np.float32)
    spread = np.zeros((k, values.shape[1]), np.float32)
    spread[which] = values
    return spread


def _rows(values: Float32Array, which: Indices) -> Float32Array:
    """Take rows; all of them without a copy."""
    return values if len(which) == len(values) else values[which]
