"""Ridge-regularised fits of many task subsets together, each certified in float64.

Input: the training blocks of n tasks and k subsets of them. Output: a :class:`Fit`, one weight vector per subset, and a
bound on how far its objective is from the least (:mod:`ensemblelora.estimation.problem` has the objective).

All subsets move together. A step is a limited-memory quasi-Newton one on top of a Hessian that costs nothing per
subset: the tasks' Hessians at the base model, summed, in the directions where they matter
(:mod:`ensemblelora.estimation.curvature`). Sums over rows are taken in float32 until the gradient is small, then in
float64. The few fits that are not done by then get their own Hessian.

Cost: one evaluation is 4 N_S c d flops a subset. Measured on one core with 20 two-class tasks of 250 rows, d = 400, 200
subsets of 3, predictions included: 0.08 s at l2_penalty 100, 0.12 s at 10, 0.2 s at 1, 0.6 s at 0.1, 1.4 s at 0.01 (and
``benchmarks/oracle.py``). Memory: 160 d + 12 r^2 bytes a subset of a block of subsets, r at most 96, with as many in a
block as ``block_bytes`` allows; 8 d^2 a subset that needs its own Hessian. Errors: DataError for features that can't be
fitted, UsageError for subsets that name no task.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ensemblelora.estimation.descent import StepMemory, descend, start_descent
from ensemblelora.estimation.inverse import OwnInverse, SharedInverse
from ensemblelora.estimation.problem import (
    Subset,
    SubsetProblem,
    check_subsets,
    compute_penalties,
    make_batch,
    prepare_problem,
)
from ensemblelora.store import FeatureBlock

__all__ = [
    "Fit",
    "Subset",
    "SubsetProblem",
    "check_subsets",
    "compute_penalties",
    "fit_subsets",
    "prepare_problem",
    "solve_subsets",
]

FloatArray = npt.NDArray[np.float64]

_logger = logging.getLogger(__name__)

_PATIENCE = 70  # evaluations before a fit gets a Hessian of its own, which costs as much as a hundred of them


@dataclass(frozen=True, eq=False)
class Fit:
    """Solutions of the subset fits.

    Attributes:
        weights: w, one row per subset, in the units of the features, shape ``(k, d)``.
        converged: Whether the gradient, summed in float64, met the tolerance, shape ``(k,)``.
        gradient_norms: Norm of the gradient where the solver stopped (features in curvature units), shape ``(k,)``.
        iterations: Objective evaluations each subset took, shape ``(k,)``.
        penalties: lambda_S, shape ``(k,)``.
        objectives: L_S(w), shape ``(k,)``.
        objective_gaps: No weights have an objective lower than ``objectives`` by more, shape ``(k,)``. L_S is strongly
            convex with modulus lambda_S, so ``L_S(w) - min L_S <= ||grad L_S(w)||^2 / (2 lambda_S)``. Infinite where
            the solver stopped before it summed the gradient in float64.
    """

    weights: FloatArray
    converged: npt.NDArray[np.bool_]
    gradient_norms: FloatArray
    iterations: npt.NDArray[np.int64]
    penalties: FloatArray
    objectives: FloatArray
    objective_gaps: FloatArray


def fit_subsets(
    train: Sequence[FeatureBlock],
    subsets: Sequence[Subset],
    *,
    l2_penalty: float,
    balance: Literal["example", "task"] = "example",
    example_weights: Sequence[npt.ArrayLike] | None = None,
    max_iter: int = 100,
    tolerance: float = 1e-6,
    block_bytes: int = 2**28,
) -> Fit:
    """Fit one weight vector to every subset of tasks.

    Args:
        train: One block per task, all of the same ``proj_dim``.
        subsets: Non-empty tuples of distinct task indices.
        l2_penalty: Relative ridge, above 0, in curvature units.
        balance: Whether every example or every task has the same weight in a subset's loss.
        example_weights: Weights a_s of each task's examples instead, such as AdaBoost's; multiplied into ``balance``.
        max_iter: Most objective evaluations per subset.
        tolerance: Stop where the gradient norm is at most this times ``max(1, |L_S|)``, in curvature units.
        block_bytes: Memory for what is held of several subsets at once.

    Returns:
        The solutions, in the order of ``subsets``. Those that ran out of iterations are marked and logged.

    Raises:
        DataError: If blocks are empty, differ in dimension, or hold values that are not finite.
        UsageError: If a subset is empty or names a task twice or one that is not there.
        ConfigError: If the penalty is not positive.
    """
    problem = prepare_problem(
        train,
        l2_penalty=l2_penalty,
        balance=balance,
        example_weights=example_weights,
        max_iter=max_iter,
        tolerance=tolerance,
    )
    return solve_subsets(problem, subsets, block_bytes=block_bytes)


def solve_subsets(problem: SubsetProblem, subsets: Sequence[Subset], *, block_bytes: int = 2**28) -> Fit:
    """Fit one weight vector to every subset of a prepared problem; see :func:`fit_subsets`.

    Args:
        problem: Rows and settings.
        subsets: Non-empty tuples of distinct task indices.
        block_bytes: Memory for what is held of several subsets at once.

    Returns:
        The solutions, in the order of ``subsets``.

    Raises:
        UsageError: If a subset is empty or names a task twice or one that is not there.
    """
    checked = check_subsets(subsets, len(problem.rows))
    size = max(1, block_bytes // problem.bytes_per_subset)
    fit = _join([_solve(problem, block, block_bytes) for block in _split(checked, size)], problem.dimension)
    n_failed = int((~fit.converged).sum())
    if n_failed:
        _logger.warning(
            "%d of %d subset fits ended above gradient norm %g in %d steps (worst %.2g); raise estimation.max_iter",
            *(n_failed, len(checked), problem.tolerance, problem.max_iter, fit.gradient_norms.max()),
        )
    return fit


def _solve(problem: SubsetProblem, subsets: Sequence[Subset], block_bytes: int) -> Fit:
    """Minimise every subset's objective, all together and the stubborn ones again by themselves."""
    batch = make_batch(problem, subsets)
    state, shared, memory = start_descent(batch), SharedInverse(batch), StepMemory(len(subsets))
    for dtype in (np.float32, np.float64):
        descend(batch, state, shared, memory, dtype=dtype, max_iter=min(_PATIENCE, problem.max_iter))
    left = np.flatnonzero(~state.find_converged(problem.tolerance) & (state.iterations < problem.max_iter))
    size = max(1, block_bytes // (8 * problem.dimension**2))
    for first in range(0, len(left), size):
        which = left[first : first + size]
        part, here = batch.take(which), state.take(which)
        own = OwnInverse(part, here.weights)
        descend(part, here, own, StepMemory(len(which)), dtype=np.float64, max_iter=problem.max_iter)
        state.put(which, here)
    return Fit(
        weights=state.weights / problem.unit,
        converged=state.find_converged(problem.tolerance),
        gradient_norms=state.norms,
        iterations=state.iterations,
        penalties=batch.ridges * problem.unit**2,
        objectives=state.losses,
        objective_gaps=np.where(state.is_exact, state.norms**2 / (2.0 * batch.ridges), np.inf),
    )


def _split(subsets: Sequence[Subset], size: int) -> Iterator[Sequence[Subset]]:
    for first in range(0, len(subsets), size):
        yield subsets[first : first + size]


def _join(blocks: Sequence[Fit], dimension: int) -> Fit:
    names = ("converged", "gradient_norms", "iterations", "penalties", "objectives", "objective_gaps")
    if not blocks:
        empty = np.zeros(0)
        return Fit(np.zeros((0, dimension)), np.zeros(0, bool), empty, np.zeros(0, np.int64), empty, empty, empty)
    weights = np.concatenate([block.weights for block in blocks])
    return Fit(weights, *(np.concatenate([getattr(block, name) for block in blocks]) for name in names))
