"""Grouping tasks: the partition into m groups with the highest affinity within groups, and how far it may be from best.

Input: a symmetric affinity, higher is better together. Output: :class:`Clustering`. Up to 12 tasks the partition is
exact; up to 600 it is rounded from the semidefinite relaxation, which also bounds what any partition could reach;
beyond, it starts from the affinity's own eigenvectors. Invariants: exactly m groups (except for threshold rounding,
where the number is an outcome); the same groups however tasks are numbered (ties aside) and whatever is added to rows;
``gap >= 0``. Errors: SolverError if the relaxation can't be solved, ConfigError for more groups than tasks. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ensemblelora.grouping.bound import bound_objective
from ensemblelora.grouping.partition import (
    Partition,
    centre_affinity,
    check_affinity,
    compute_density,
    compute_objective,
    measure_scale,
    sort_groups,
    to_labels,
    to_partition,
)
from ensemblelora.grouping.reference import (
    MAX_TASKS_FOR_EXACT,
    enumerate_partitions,
    find_best_partition,
    threshold_groups,
)
from ensemblelora.grouping.rounding import improve_labels, round_to_groups
from ensemblelora.grouping.sdp import Relaxation, solve_relaxation

__all__ = [
    "Clustering",
    "Partition",
    "Relaxation",
    "cluster",
    "compute_density",
    "compute_objective",
    "enumerate_partitions",
    "find_best_partition",
    "improve_labels",
    "round_to_groups",
    "solve_relaxation",
    "sort_groups",
    "threshold_groups",
    "to_labels",
    "to_partition",
]

FloatArray = npt.NDArray[np.float64]

_MAX_TASKS_FOR_SDP = 600
_MAX_TASKS_FOR_QUICK_SDP = 200


@dataclass(frozen=True)
class Clustering:
    """A partition and how good it is.

    Attributes:
        groups: The partition.
        objective: Sum of the groups' densities, higher is better.
        bound: No partition into as many groups has a larger objective.
        gap: ``bound - objective``, at least 0; 0 means proven best.
        density: Average density at a zero-mean diagonal, the paper's measure.
    """

    groups: Partition
    objective: float
    bound: float
    gap: float
    density: float


def cluster(
    affinity: npt.ArrayLike,
    n_groups: int,
    *,
    rounding: Literal["best", "threshold"] = "best",
    threshold: float = 1.0,
    n_restarts: int = 20,
    seed: int = 0,
    is_bound_needed: bool = True,
) -> Clustering:
    """Partition the tasks into ``n_groups`` groups of high affinity.

    Args:
        affinity: Symmetric, higher is better together, shape ``(n_tasks, n_tasks)``.
        n_groups: From 1 to n_tasks.
        rounding: ``best`` gives exactly ``n_groups`` groups; ``threshold`` is the paper's rule of joining tasks with
            ``X_uv >= threshold / n``, where the number of groups is an outcome.
        threshold: The paper's c.
        n_restarts: Random starts of each kind, where the partition is not exact.
        seed: The run's seed.
        is_bound_needed: If not, the relaxation is skipped where the partition can do without, and the bound is loose.

    Raises:
        SolverError: If the relaxation can't be solved.
        ConfigError: If there are more groups than tasks.
        DataError: If the affinity is not square, symmetric and finite.
    """
    matrix = check_affinity(affinity, n_groups)
    n = len(matrix)
    order = _canonical_order(matrix)
    ordered = matrix[np.ix_(order, order)]
    is_trivial = n_groups in (1, n)
    is_exact = n <= MAX_TASKS_FOR_EXACT
    can_skip = is_trivial or (rounding == "best" and (is_exact or n > _MAX_TASKS_FOR_QUICK_SDP))
    if n > _MAX_TASKS_FOR_SDP or (can_skip and not is_bound_needed):
        relaxation = _relax_spectrally(ordered, n_groups)
    else:
        relaxation = solve_relaxation(ordered, n_groups)
    if is_trivial:
        found = to_partition(np.zeros(n, dtype=np.int64) if n_groups == 1 else np.arange(n))
    elif rounding == "threshold":
        found = threshold_groups(relaxation.matrix, threshold)
    elif is_exact:
        found = find_best_partition(ordered, n_groups)
    else:
        found = round_to_groups(relaxation.matrix, ordered, n_groups, n_restarts=n_restarts, seed=seed)
    if len(found) != n_groups:
        relaxation = solve_relaxation(ordered, len(found))
    groups = sort_groups([order[list(group)].tolist() for group in found])
    return _describe(matrix, groups, relaxation.bound)


def _describe(affinity: FloatArray, groups: Partition, bound: float) -> Clustering:
    objective = compute_objective(affinity, groups)
    if len(groups) in (1, len(affinity)):
        bound = objective  # the only partition there is
    # The bound is rigorous, so the partition can pass it by rounding errors only.
    gap = max(bound - objective, 0.0)
    return Clustering(groups, objective, objective + gap, gap, compute_density(affinity, groups))


def _canonical_order(affinity: FloatArray) -> npt.NDArray[np.int64]:
    """Order tasks by their sorted affinities, so that the result does not depend on how they are numbered."""
    centred = centre_affinity(affinity)
    rounded = np.round(centred / measure_scale(affinity, centred), 9)
    keys = np.column_stack([np.diag(rounded), np.sort(rounded, axis=1)])  # (n, n + 1)
    return np.lexsort(keys.T[::-1]).astype(np.int64)


def _relax_spectrally(affinity: FloatArray, n_groups: int) -> Relaxation:
    """Return the part of A in its leading eigenvectors, whose eigenvalues bound the objective, if loosely."""
    centred = centre_affinity(affinity)
    shift = float(affinity.mean()) * len(affinity)
    values, vectors = np.linalg.eigh(centred)
    leading = vectors[:, -n_groups:] * np.sqrt(np.maximum(values[-n_groups:], 0.0))
    zero = np.zeros(len(affinity))
    bound = bound_objective(centred, n_groups, 0.0, zero, np.zeros_like(centred)) + shift
    return Relaxation(leading @ leading.T, bound, bound, "spectral")
