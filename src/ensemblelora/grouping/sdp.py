"""The semidefinite relaxation of clustering, with a bound that holds whatever the solver's accuracy.

    max <A, X> - trace_penalty * tr X   subject to   X psd, X >= 0, X 1 = 1   [, tr X = m]

(paper, appendix A). A partition into m groups is the point X_ij = 1 / |C| within groups. The paper prints the trace
term with a plus sign; a penalty must subtract, so that a larger one gives fewer groups.

Constraints on partitions are linear in X: ``X_ij = 0`` for tasks that must be apart, equal rows for those that must be
together, ``1 / max_size <= X_ii`` and ``X_ij <= 1 / min_size`` for the sizes of groups. Equal rows are written into the
problem: with one row of X a unit, ``Z_uv = sqrt(s_u s_v) X_uv`` meets the same as X does, but for ``Z sqrt(s) =
sqrt(s)`` in place of the sums of rows.

Solved by :mod:`ensemblelora.grouping.splitting`. To the same certified bound SCS takes 2 to 4 times as long at 10 and
100 tasks, 5 to 10 times at 500; Clarabel 2 to 6 times at 10, 100 to 200 times at 100 (``benchmarks/sdp.py``).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.errors import ConfigError
from ensemblelora.grouping.bound import Domain
from ensemblelora.grouping.constraints import Limits
from ensemblelora.grouping.partition import centre_affinity, check_affinity, measure_scale
from ensemblelora.grouping.splitting import solve_by_splitting

__all__ = ["Relaxation", "solve_relaxation"]

FloatArray = npt.NDArray[np.float64]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Relaxation:
    """A solution of the relaxation.

    Attributes:
        matrix: X, one row and column a task, or a unit of tasks that stay together.
        objective: ``<A, X>``, less the trace term; feasible only up to the solver's tolerance.
        bound: No partition's objective is larger; rigorous, from the dual.
        status: ``optimal`` or ``inaccurate``, and the iterations it took.
    """

    matrix: FloatArray
    objective: float
    bound: float
    status: str


def solve_relaxation(
    affinity: npt.ArrayLike,
    n_groups: int | None = None,
    *,
    trace_penalty: float = 0.0,
    tolerance: float | None = None,
    limits: Limits | None = None,
) -> Relaxation:
    """Solve the relaxation with a fixed number of groups, or with a penalty on the trace that leaves it free.

    Args:
        affinity: Symmetric, higher is better together, shape ``(n_tasks, n_tasks)``; or summed over units.
        n_groups: m, or none to leave it free.
        trace_penalty: At least 0; larger gives fewer groups. Without effect where m is fixed.
        tolerance: Distance of objective and bound, relative to the bound; none: 1e-7, for more than 150 tasks 1e-4.
        limits: Units and what their groups must meet; some partition into ``n_groups`` must. None: every task is a
            unit, and any partition will do.

    Raises:
        SolverError: If an eigendecomposition fails.
        ConfigError: If ``n_groups`` is outside 1 to n_tasks, or the penalty is negative.
    """
    matrix = check_affinity(affinity, 1 if n_groups is None else n_groups)
    if trace_penalty < 0:
        raise ConfigError(f"trace penalty {trace_penalty}: expected 0 or more (larger gives fewer groups)")
    limits = limits or Limits.free(len(matrix))
    n, sizes = len(matrix), limits.sizes
    if n_groups in (1, n):  # one partition, hence one feasible point
        only = np.diag(1 / sizes) if n_groups == n else np.full((n, n), 1 / sizes.sum())
        value = float((matrix * only).sum())
        return Relaxation(only, value, value, "exact")
    domain = _describe_domain(limits)
    frame = np.outer(domain.roots, domain.roots)
    centred = centre_affinity(matrix / frame, domain.roots)
    shift = float(matrix.sum() / sizes.sum())  # <A, X> - <centred, Z> for every feasible point
    scale = measure_scale(matrix, centred)
    penalty = 0.0 if n_groups is not None else trace_penalty / scale
    found = solve_by_splitting(centred / scale, n_groups, trace_penalty=penalty, tolerance=tolerance, domain=domain)
    status = f"{'optimal' if found.is_converged else 'inaccurate'} after {found.n_iterations} iterations"
    if not found.is_converged:
        _logger.warning(
            "relaxation of %d tasks: %s, bound and objective %.1e apart; the bound still holds",
            *(n, status, found.accuracy),
        )
    return Relaxation(found.matrix / frame, found.objective * scale + shift, found.bound * scale + shift, status)


def _describe_domain(limits: Limits) -> Domain:
    """Write limits as bounds on the entries of Z; none where there are none."""
    roots = np.sqrt(limits.sizes)
    if limits.is_free:
        return Domain(roots)
    frame = np.outer(roots, roots)
    upper = np.where(limits.apart, 0.0, frame / limits.min_size)
    return Domain(roots, lower=np.diag(limits.sizes / limits.max_size), upper=upper)
