"""Every task's Hessian at the base model, measured once in the directions where the tasks together curve most.

A subset's Hessian is the sum of its tasks', so nothing of size d x d exists per subset, nor per task. All other
directions share one number, their mean curvature.

Cost: N c d^2 flops for the pooled Hessian, 2 N c d r for the blocks. Memory: 4 d^2 bytes, and 4 r^2 a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.estimation.loss import LinearRows, compute_curvature_factor
from ensemblelora.seeding import generator_for

__all__ = ["TaskCurvatures", "measure_curvatures"]

Float32Array = npt.NDArray[np.float32]

_MAX_RANK = 96  # measured: 64 to 128 are within 10 % of each other
_ROWS_PER_DIMENSION = 16  # more would tell no more about the leading directions
_ROWS_AT_ONCE = 4096
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
    blocks = np.zeros((len(rows), basis.shape[1], basis.shape[1]), dtype=np.float32)
    for i, task in enumerate(rows):
        for part in task.split(_ROWS_AT_ONCE):
            factor = compute_curvature_factor(part, part.jacobian @ basis)
            blocks[i] += factor.T @ factor
    return TaskCurvatures(basis, blocks, rest)


def _find_directions(rows: Sequence[LinearRows], least: float) -> tuple[Float32Array, float]:
    """Return leading directions of the pooled Hessian, nearly eigenvectors, and the mean curvature of all others."""
    dimension = rows[0].jacobian.shape[1]
    step = max(1, sum(len(task.jacobian) for task in rows) // (_ROWS_PER_DIMENSION * dimension))
    pooled, total = np.zeros((dimension, dimension), np.float32), 0.0
    for task in rows:
        part = task.take(slice(0, None, step))
        factor = compute_curvature_factor(part, np.ascontiguousarray(part.jacobian))
        pooled += factor.T @ factor
        total += part.total_weight
    pooled /= np.float32(total)
    for rank in (_MAX_RANK // 2, _MAX_RANK):
        values, basis = _iterate_subspace(pooled, rank)
        if values[0] < _LEAST_OF_RIDGE * least:
            break
    rest = max(float(np.trace(pooled)) - float(values.sum()), 0.0) / (dimension - rank)
    return basis, rest


def _iterate_subspace(matrix: Float32Array, rank: int) -> tuple[Float32Array, Float32Array]:
    """Return the leading eigenvalues, rising, and eigenvectors of a positive matrix, as far as two rounds find them."""
    start = generator_for(0, "curvature", rank).standard_normal((len(matrix), rank), dtype=np.float32)
    basis, _ = np.linalg.qr(matrix @ (matrix @ start))
    image = matrix @ basis
    values, vectors = np.linalg.eigh(basis.T @ image)
    return values, np.ascontiguousarray(basis @ vectors)
