"""Partitions of tasks and the clustering objective they are judged by.

A partition is a tuple of groups, a group a sorted tuple of task indices; the largest group comes first, of equals the
one with the smallest index. Labels are the same as an integer per task.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora.errors import ConfigError, DataError

__all__ = [
    "Partition",
    "centre_affinity",
    "check_affinity",
    "compute_density",
    "compute_objective",
    "measure_scale",
    "sort_groups",
    "to_labels",
    "to_partition",
]

FloatArray = npt.NDArray[np.float64]
Partition = tuple[tuple[int, ...], ...]


def sort_groups(groups: Iterable[Iterable[int]]) -> Partition:
    """Return groups in their one order: largest first, ties by smallest index.

    Example:
        >>> sort_groups([[3], [2, 0], [1]])
        ((0, 2), (1,), (3,))
    """
    return tuple(sorted((tuple(sorted(int(i) for i in group)) for group in groups), key=lambda g: (-len(g), g)))


def to_partition(labels: Sequence[int] | npt.NDArray[Any]) -> Partition:
    """Return the partition that an integer per task describes."""
    values = np.asarray(labels)
    return sort_groups(np.flatnonzero(values == label).tolist() for label in np.unique(values))


def to_labels(groups: Partition) -> npt.NDArray[np.int64]:
    """Return each task's position of its group in the partition, shape ``(n_tasks,)``."""
    labels = np.empty(sum(len(group) for group in groups), dtype=np.int64)
    for g, group in enumerate(groups):
        labels[list(group)] = g
    return labels


def compute_objective(affinity: FloatArray, groups: Partition) -> float:
    """Return the sum over groups of ``(1 / |C|) sum_{i, j in C} A_ij`` (paper, appendix A), higher is better."""
    return float(sum(affinity[np.ix_(group, group)].sum() / len(group) for group in groups))


def compute_density(affinity: FloatArray, groups: Partition) -> float:
    """Return the paper's average density, ``1 / m`` of the objective, after shifting A to a zero-mean diagonal.

    Unshifted it would depend on the level of the scores: a constant added to A adds ``n / m`` times itself.
    """
    level = float(np.diag(affinity).mean()) * len(affinity)
    return (compute_objective(affinity, groups) - level) / len(groups)


def centre_affinity(affinity: FloatArray, roots: npt.NDArray[np.floating[Any]] | None = None) -> FloatArray:
    """Remove row and column means, which add the same to every partition's objective.

    Args:
        affinity: Symmetric, shape ``(n, n)``.
        roots: The direction to remove, square roots of the sizes of units; none: ones, and so the means.
    """
    if roots is None:
        means = affinity.mean(axis=0)
        return np.asarray(affinity - means[:, None] - means + means.mean())
    n_tasks = roots @ roots
    along = affinity @ roots / n_tasks
    pulled = np.outer(along - roots @ along / n_tasks / 2 * roots, roots)
    return np.asarray(affinity - pulled - pulled.T)


def measure_scale(affinity: FloatArray, centred: FloatArray) -> float:
    """Return the largest centred affinity, or 1 where centring leaves nothing but rounding errors."""
    largest = float(np.abs(centred).max())
    return largest if largest > 1e-12 * float(np.abs(affinity).max()) else 1.0


def check_affinity(affinity: npt.ArrayLike, n_groups: int) -> FloatArray:
    """Return the matrix as float64, exactly symmetric.

    Raises:
        DataError: If it is not square, finite and symmetric.
        ConfigError: If there are not between 1 and n_tasks groups.
    """
    matrix = np.asarray(affinity, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise DataError(f"affinity of shape {matrix.shape}: expected (n_tasks, n_tasks)")
    if not np.isfinite(matrix).all():
        raise DataError("the affinity holds values that are not finite; fill pairs never seen before clustering")
    if not np.allclose(matrix, matrix.T, rtol=1e-8, atol=1e-10 * np.abs(matrix).max()):
        raise DataError("the affinity is not symmetric; symmetrise it before clustering")
    if not 1 <= n_groups <= len(matrix):
        raise ConfigError(f"grouping.n_groups {n_groups}: expected 1 to {len(matrix)}, the number of tasks")
    return np.asarray((matrix + matrix.T) / 2)
