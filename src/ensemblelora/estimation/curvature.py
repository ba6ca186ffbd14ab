"""Inverse curvature for many subsets at once: what turns a gradient into a step.

Two kinds. :class:`SharedCurvature` measures every task's Hessian once, at the base model, in the few directions where
the tasks together curve most, and takes one number for all others; a subset's is the sum of its tasks'. Nothing of size
d x d exists per subset. :class:`OwnCurvature` holds whole Hessians at each subset's own point, for the few fits that
the first kind does not bring home.

Cost: ``measure_curvatures`` 2 N c d r flops and one partial eigendecomposition; a shared step 4 d r + 2 r^2 a subset; an
own Hessian N_S c d^2 + d^3 / 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve, eigh
from scipy.linalg.lapack import spotrf, strtri

from ensemblelora.errors import SolverError
from ensemblelora.estimation.loss import LinearRows, compute_curvature_factor, compute_hessian

if TYPE_CHECKING:
    from ensemblelora.estimation.problem import Batch

__all__ = ["OwnCurvature", "SharedCurvature", "TaskCurvatures", "measure_curvatures"]

FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]

_MAX_RANK = 128
_ROWS_PER_DIMENSION = 4  # enough to find the leading directions, not enough to know their curvature
_LEAST_OF_RIDGE = 1 / 16  # directions that curve less, for a subset of four tasks a quarter of its ridge, are all alike


@dataclass(frozen=True, eq=False)
class TaskCurvatures:
    """Every task's Hessian at the base model, in common directions, and in curvature units.

    Attributes:
        basis: Q, orthonormal columns, shape ``(d, r)``.
        blocks: ``Q^T H_i Q`` of each task's weighted sum of losses, shape ``(n_tasks, r, r)``.
        rest: Mean curvature of all other directions, per unit of example weight.
    """

    basis: Float32Array
    blocks: Float32Array
    rest: float


def measure_curvatures(rows: Sequence[LinearRows], *, least: float) -> TaskCurvatures:
    """Measure the tasks' Hessians at w = 0 in the directions where their sum curves most.

    Args:
        rows: The tasks' rows.
        least: Relative ridge; directions that curve much less need no measuring.
    """
    dimension = rows[0].jacobian.shape[1]
    if dimension <= _MAX_RANK:
        basis, rest = np.eye(dimension, dtype=np.float32), 0.0
    else:
        basis, rest = _find_directions(rows, least)
    base = np.zeros(dimension)
    blocks = np.empty((len(rows), basis.shape[1], basis.shape[1]), dtype=np.float32)
    for i, task in enumerate(rows):
        factor = compute_curvature_factor(task, base, task.jacobian @ basis)
        np.matmul(factor.T, factor, out=blocks[i])
    return TaskCurvatures(basis, blocks, rest)


def _find_directions(rows: Sequence[LinearRows], least: float) -> tuple[Float32Array, float]:
    """Return the leading eigenvectors of the pooled Hessian, and the mean of the other eigenvalues."""
    dimension = rows[0].jacobian.shape[1]
    step = max(1, sum(len(task.jacobian) for task in rows) // (_ROWS_PER_DIMENSION * dimension))
    pooled, total, base = np.zeros((dimension, dimension), np.float32), 0.0, np.zeros(dimension)
    for task in rows:
        part = task.take(slice(0, None, step))
        factor = compute_curvature_factor(part, base, np.ascontiguousarray(part.jacobian))
        pooled += factor.T @ factor
        total += part.total_weight
    pooled /= np.float32(total)
    trace = float(np.trace(pooled))
    first = dimension - _MAX_RANK
    values, vectors = eigh(pooled, subset_by_index=(first, dimension - 1), overwrite_a=True, check_finite=False)
    n_kept = max(int((values > _LEAST_OF_RIDGE * least).sum()), 16)
    kept = values[-n_kept:]
    return np.ascontiguousarray(vectors[:, -n_kept:]), max(trace - float(kept.sum()), 0.0) / (dimension - n_kept)


class SharedCurvature:
    """Inverse curvature of every subset from the tasks' Hessians at the base model; float32, and never renewed."""

    def __init__(self, batch: Batch) -> None:
        """Factorise every subset's block."""
        curvatures = batch.problem.curvatures
        self._basis = curvatures.basis
        n_tasks, rank, _ = curvatures.blocks.shape
        shares = (batch.membership / batch.totals[:, None]).astype(np.float32)
        blocks = (shares @ curvatures.blocks.reshape(n_tasks, -1)).reshape(-1, rank, rank)
        diagonals = blocks.reshape(len(blocks), -1)[:, :: rank + 1]
        # A smaller ridge would drown in the rounding of float32, and the factor might not exist.
        least = np.finfo(np.float32).eps * rank * diagonals.max(axis=1)
        diagonals += np.maximum(batch.ridges, least).astype(np.float32)[:, None]
        self._roots = np.array([_invert_root(block) for block in blocks])
        self._others = (1.0 / (curvatures.rest + batch.ridges)).astype(np.float32)[:, None]

    def solve(self, gradients: Float32Array, which: Indices) -> Float32Array:
        """Apply the inverse curvature of the subsets ``which`` to a vector each, shape ``(m, d)``."""
        inside, others = gradients @ self._basis, self._others[which]  # (m, r), (m, 1)
        if 2 * len(which) > len(self._roots):  # blocks are larger than vectors: better all of them than copies of most
            spread = np.zeros((len(self._roots), inside.shape[1]), np.float32)
            spread[which] = inside
            solved = _apply_roots(self._roots, spread)[which]
        else:
            solved = _apply_roots(self._roots[which], inside)
        return np.asarray(gradients * others + (solved - inside * others) @ self._basis.T)

    def renew(self, which: Indices, weights: FloatArray) -> Indices:
        """Renew nothing."""
        return which[:0]


class OwnCurvature:
    """Inverse Hessians of every subset at its own weights, in float64; 8 d^2 bytes each."""

    def __init__(self, batch: Batch, weights: FloatArray) -> None:
        """Factorise every subset's Hessian at its weights, shape ``(k, d)``."""
        self._batch = batch
        self._factors = [self._factorise(s, own) for s, own in enumerate(weights)]

    def solve(self, gradients: Float32Array, which: Indices) -> Float32Array:
        """Apply the inverse Hessians of the subsets ``which`` to a vector each, shape ``(m, d)``."""
        pairs = zip(which, gradients, strict=True)
        solved = [cho_solve((self._factors[s], True), vector, check_finite=False) for s, vector in pairs]
        return np.array(solved, dtype=np.float32).reshape(gradients.shape)

    def renew(self, which: Indices, weights: FloatArray) -> Indices:
        """Factorise the Hessians of the subsets ``which`` at new weights, shape ``(m, d)``; return ``which``."""
        for s, own in zip(which, weights, strict=True):
            self._factors[s] = self._factorise(int(s), own)
        return which

    def _factorise(self, s: int, weights: FloatArray) -> FloatArray:
        batch = self._batch
        hessian = np.zeros((weights.size, weights.size))
        for i in batch.subsets[s]:
            hessian += compute_hessian(batch.problem.rows[i], weights)
        hessian /= batch.totals[s]
        hessian[np.diag_indices_from(hessian)] += batch.ridges[s]
        try:
            factor, _ = cho_factor(hessian, lower=True, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError:
            raise SolverError(
                f"the Hessian of a subset fit is not positive definite at ridge {batch.ridges[s]:.1e}; "
                "raise estimation.l2_penalty"
            ) from None
        return np.asarray(factor)


def _invert_root(block: Float32Array) -> Float32Array:
    """Return R, lower triangular, with ``R^T R`` the inverse of a positive definite block, which is overwritten."""
    # The transposed view is in LAPACK's order, so nothing is copied; an upper factor there is a lower one here.
    factor, _ = spotrf(block.T, lower=0, clean=1, overwrite_a=1)
    root, _ = strtri(factor, lower=0, overwrite_c=1)
    return np.asarray(root.T)


def _apply_roots(roots: Float32Array, vectors: Float32Array) -> Float32Array:
    """Return ``R^T R v`` of every root ``(m, r, r)`` and vector ``(m, r)``."""
    halves = np.matmul(roots, vectors[:, :, None])
    return np.asarray(np.matmul(halves.transpose(0, 2, 1), roots)[:, 0])
