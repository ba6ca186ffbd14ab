"""Grouping tasks: the partition into m groups with the highest affinity within groups, and how far it may be from best.

Input: a symmetric affinity, higher is better together, and what a partition must meet. Output: :class:`Clustering`.
Up to 12 tasks the partition is exact; up to 600 it is rounded from the semidefinite relaxation, which also bounds what
any partition could reach; beyond, it starts from the affinity's own eigenvectors. Invariants: exactly m groups (except
for threshold rounding, where the number is an outcome); every constraint is met; the same groups however tasks are
numbered (ties aside) and whatever is added to rows; ``gap >= 0``. Errors: SolverError if the relaxation can't be
solved, ConfigError for more groups than tasks or constraints that no partition meets. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ensemblelora.errors import ConfigError
from ensemblelora.grouping.allowed import can_meet, find_labels
from ensemblelora.grouping.bound import bound_objective
from ensemblelora.grouping.constraints import Constraints, Limits
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
    "Constraints",
    "Limits",
    "Partition",
    "Relaxation",
    "can_meet",
    "cluster",
    "compute_density",
    "compute_objective",
    "enumerate_partitions",
    "find_best_partition",
    "find_labels",
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
    constraints: Constraints | None = None,
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
        constraints: What the partition must meet; none: nothing.
        rounding: ``best`` gives exactly ``n_groups`` groups; ``threshold`` is the paper's rule of joining tasks with
            ``X_uv >= threshold / n``, where the number of groups is an outcome.
        threshold: The paper's c.
        n_restarts: Random starts of each kind, where the partition is not exact.
        seed: The run's seed.
        is_bound_needed: If not, the relaxation is skipped where the partition can do without, and the bound is loose.

    Raises:
        SolverError: If the relaxation can't be solved, or whether constraints can be met is not settled in time.
        ConfigError: If there are more groups than tasks, no partition meets the constraints, or there are constraints
            on ``threshold``, which knows none.
        DataError: If the affinity is not square, symmetric and finite.
    """
    matrix = check_affinity(affinity, n_groups)
    wanted = constraints or Constraints(len(matrix))
    units = _take_units(matrix, n_groups, wanted)
    if rounding == "threshold":
        if not wanted.is_free:
            raise ConfigError("grouping.rounding threshold joins tasks whatever the constraints say; use best")
        found, bound = _round_by_threshold(units, n_groups, threshold)
    else:
        found, bound = _search(units, n_groups, n_restarts, seed, is_bound_needed=is_bound_needed)
    groups = sort_groups([[task for u in group for task in units.tasks[u]] for group in found])
    is_only_one = len(groups) in (1, len(units.tasks))
    return _describe(matrix, groups, None if is_only_one else bound)


@dataclass(frozen=True, eq=False)
class _Units:
    """The tasks in pieces that stay whole, in an order that does not depend on how tasks are numbered."""

    tasks: Partition
    affinity: FloatArray
    """sums over their tasks, shape ``(k, k)``"""
    limits: Limits


def _take_units(affinity: FloatArray, n_groups: int, constraints: Constraints) -> _Units:
    limits, merged, n_units = constraints.limits, constraints.merge(affinity), len(constraints.units)
    if constraints.is_contradictory or n_groups > n_units or limits.sizes.max() > limits.max_size:
        raise ConfigError(f"no partition of the tasks into {n_groups} groups meets the constraints; loosen them")
    roots = np.sqrt(limits.sizes)
    order = _canonical_order(merged / np.outer(roots, roots), None if n_units == len(affinity) else roots)
    tasks = tuple(constraints.units[u] for u in order)
    return _Units(tasks, merged[np.ix_(order, order)], limits.take(order))


def _search(
    units: _Units, n_groups: int, n_restarts: int, seed: int, *, is_bound_needed: bool
) -> tuple[Partition, float]:
    """Return the best partition of the units that is found, and a bound on all."""
    n, limits = len(units.tasks), units.limits
    is_exact = n <= MAX_TASKS_FOR_EXACT
    if n_groups in (1, n):
        labels = np.zeros(n, dtype=np.int64) if n_groups == 1 else np.arange(n)
        if not limits.allows(labels):
            raise ConfigError(f"no partition of the tasks into {n_groups} groups meets the constraints; loosen them")
        return to_partition(labels), np.inf
    exact = find_best_partition(units.affinity, n_groups, limits) if is_exact else None
    can_skip = is_exact or n > _MAX_TASKS_FOR_QUICK_SDP
    if n > _MAX_TASKS_FOR_SDP or (can_skip and not is_bound_needed):
        relaxation = _relax_spectrally(units, n_groups)
    else:
        relaxation = solve_relaxation(units.affinity, n_groups, limits=limits)
    found = exact or round_to_groups(
        relaxation.matrix, units.affinity, n_groups, n_restarts=n_restarts, seed=seed, limits=limits
    )
    return found, relaxation.bound


def _round_by_threshold(units: _Units, n_groups: int, threshold: float) -> tuple[Partition, float]:
    """Round as the paper does; returns a bound for the number of groups that came out."""
    n = len(units.tasks)

    def relax(m: int) -> Relaxation:
        return _relax_spectrally(units, m) if n > _MAX_TASKS_FOR_SDP else solve_relaxation(units.affinity, m)

    relaxation = relax(n_groups)
    if n_groups in (1, n):
        return to_partition(np.zeros(n, dtype=np.int64) if n_groups == 1 else np.arange(n)), relaxation.bound
    found = threshold_groups(relaxation.matrix, threshold)
    return found, relaxation.bound if len(found) == n_groups else relax(len(found)).bound


def _describe(affinity: FloatArray, groups: Partition, bound: float | None) -> Clustering:
    objective = compute_objective(affinity, groups)
    if bound is None:
        bound = objective  # the only partition there is
    # The bound is rigorous, so the partition can pass it by rounding errors only.
    gap = max(bound - objective, 0.0)
    return Clustering(groups, objective, objective + gap, gap, compute_density(affinity, groups))


def _canonical_order(affinity: FloatArray, roots: FloatArray | None = None) -> npt.NDArray[np.int64]:
    """Order tasks by their sorted affinities, so that the result does not depend on how they are numbered."""
    centred = centre_affinity(affinity, roots)
    rounded = np.round(centred / measure_scale(affinity, centred), 9)
    keys = np.column_stack([np.diag(rounded), np.sort(rounded, axis=1)])  # (n, n + 1)
    return np.lexsort(keys.T[::-1]).astype(np.int64)


def _relax_spectrally(units: _Units, n_groups: int) -> Relaxation:
    """Return the part of A in its leading eigenvectors, whose eigenvalues bound the objective, if loosely."""
    roots = np.sqrt(units.limits.sizes)
    frame = np.outer(roots, roots)
    centred = centre_affinity(units.affinity / frame, roots)
    shift = float(units.affinity.sum() / units.limits.sizes.sum())
    values, vectors = np.linalg.eigh(centred)
    leading = vectors[:, -n_groups:] * np.sqrt(np.maximum(values[-n_groups:], 0.0))
    zero = np.zeros(len(frame))
    bound = bound_objective(centred, n_groups, 0.0, zero, np.zeros_like(centred)) + shift
    return Relaxation(leading @ leading.T / frame, bound, bound, "spectral")
