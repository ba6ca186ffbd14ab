"""Partitions that meet limits, found as integer programmes: whether there is any, and the nearest to a given one.

    x_ug in {0, 1}: unit u is in group g        y_g in {0, 1}: group g is in use
    sum_g x_ug = 1        min_size y_g <= sum_u s_u x_ug <= max_size y_g        sum_{u in clique} x_ug <= y_g

Whether tasks can be kept apart in m groups is colouring a graph, which has no quick answer in general; HiGHS (scipy's
solver) settled all that was tried: 10 ms for 20 tasks, 20 ms for 100, 0.2 s for 300 tasks in 20 groups, and a second to
find that a random graph of 40 tasks and half of all pairs has no six colours. Slow twin: all partitions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ensemblelora.errors import SolverError
from ensemblelora.grouping.constraints import Constraints, Limits

__all__ = ["can_meet", "find_labels"]

Labels = npt.NDArray[np.int64]

_SECONDS = 30.0
_INFEASIBLE = 2


def can_meet(constraints: Constraints, numbers: range) -> bool:
    """Whether any partition into one of some consecutive numbers of groups meets all constraints.

    Args:
        constraints: Over tasks.
        numbers: Of groups, from 1 on.

    Raises:
        SolverError: If that is not settled in half a minute.
    """
    limits = constraints.limits
    if constraints.is_contradictory or not len(numbers) or limits.sizes.max() > limits.max_size:
        return False
    n_units = len(limits.sizes)
    if limits.is_free or (n_units in numbers and limits.allows(np.arange(n_units))):
        return numbers[0] <= n_units
    return find_labels(limits, numbers[0], numbers[-1]) is not None


def find_labels(limits: Limits, fewest: int, most: int, *, near: Labels | None = None) -> Labels | None:
    """Return a group for each unit such that the limits are met, or none if there is no way.

    Args:
        limits: What groups of units must meet.
        fewest: Groups at least.
        most: Groups at most.
        near: Labels below ``most``, of which as many tasks as possible are to keep theirs; none: any.

    Raises:
        SolverError: If no way is found in half a minute, and none is ruled out.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, hstack, kron

    n_units, n_groups = len(limits.sizes), min(most, len(limits.sizes))
    if fewest > n_groups:
        return None
    each, groups = eye_array(n_units), eye_array(n_groups)
    every_group = np.ones((1, n_groups))
    no_group = csr_array((n_units, n_groups))
    totals = kron(limits.sizes[None, :], groups)  # (m, k m): tasks of each group
    rows = [
        (hstack([kron(each, every_group), no_group]), 1, 1),
        (hstack([totals, -limits.max_size * groups]), -np.inf, 0),
        (hstack([totals, -limits.min_size * groups]), 0, np.inf),
        (hstack([csr_array((1, n_units * n_groups)), csr_array(every_group)]), fewest, most),
    ]
    for clique in limits.cliques:
        members = np.zeros((1, n_units))
        members[0, list(clique)] = 1.0
        rows.append((hstack([kron(members, groups), -groups]), -np.inf, 0))
    lower = np.zeros(n_units * n_groups + n_groups)
    cost = np.zeros_like(lower)
    if near is None:  # groups are alike: those of one clique are numbered as they come
        for group, unit in enumerate(max(limits.cliques, key=len, default=(0,))[:n_groups]):
            lower[unit * n_groups + group] = 1.0
    else:
        cost[np.arange(n_units) * n_groups + near] = -limits.sizes
    found = milp(
        cost,
        integrality=np.ones(len(cost), dtype=np.int64),
        bounds=Bounds(lower, 1.0),
        constraints=[LinearConstraint(csr_array(matrix), low, high) for matrix, low, high in rows],
        options={"time_limit": _SECONDS},
    )
    if found.x is not None:
        return np.asarray(found.x[: n_units * n_groups].reshape(n_units, n_groups).argmax(axis=1), dtype=np.int64)
    if found.status == _INFEASIBLE:
        return None
    raise SolverError(
        f"{int(limits.sizes.sum())} tasks in {fewest} to {most} groups: whether the constraints can be met was not "
        f"settled in {_SECONDS:g} seconds ({found.message}); loosen them, or give the groups by hand"
    )
