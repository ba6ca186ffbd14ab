"""Ridge-regularised fits of many task subsets together: damped Newton steps whose Hessian is kept while it works.

Input: the training blocks of n tasks and k subsets of them. Output: a :class:`Fit`, one weight vector per subset.
The objective of subset S (paper, section 2.2, with a fixed offset and no intercept) is

    L_S(w) = sum_s a_s CE(softmax(decoder (u_s + J_s w)), y_s) / sum_s a_s + (lambda_S / 2) ||w||^2
    lambda_S = l2_penalty * c * N_ref / N_S

c is the mean curvature per coordinate (trace of one example's Hessian at equally likely classes, over d), N_ref the
mean number of training examples of a task and N_S the subset's. E epochs of gradient steps are a ridge that falls as
1/N_S, X

Every Hessian starts at the all-task solution, where the tasks' Hessians are shared by all subsets, and is computed
again only where a step shrinks the gradient by less than half. Measured on one core with 20 two-class tasks of 250
rows, d = 400, 200 subsets of 3: 0.5 s at l2_penalty 100, 1 s at 1, 3 s at 0.01, 8 s at 0.0001; a new Hessian at every
step takes 1.4 to 3.4 times as long.

Cost: one evaluation is 4 N_S c d flops per subset, one Hessian N_S c d^2 + d^3 / 3. Memory: 8 d^2 bytes per subset of
a block of subsets, with as many subsets in a block as ``block_bytes`` allows. Errors: DataError for features that can't
be fitted, UsageError for subsets that name no task.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve

from ensemblelora.config import MAX_PROJ_DIM
from ensemblelora.errors import ConfigError, DataError, SolverError, UsageError
from ensemblelora.estimation.loss import LinearRows, compute_curvature_trace, compute_hessian, sum_losses
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
Subset = tuple[int, ...]

_logger = logging.getLogger(__name__)

_SUFFICIENT_DECREASE = 1e-4
_KEEP_HESSIAN_BELOW = 0.5  # measured: 0.3 to 0.8 are within 20 % of each other
_ROUNDING = 64 * np.finfo(np.float64).eps


@dataclass(frozen=True, eq=False)
class Fit:
    """Solutions of the subset fits.

    Attributes:
        weights: w, one row per subset, in the units of the features, shape ``(k, d)``.
        converged: Whether the gradient met the tolerance, shape ``(k,)``.
        gradient_norms: Norm of the gradient where the solver stopped (features in curvature units), shape ``(k,)``.
        iterations: Objective evaluations each subset took, shape ``(k,)``.
        penalties: lambda_S, shape ``(k,)``.
    """

    weights: FloatArray
    converged: npt.NDArray[np.bool_]
    gradient_norms: FloatArray
    iterations: npt.NDArray[np.int64]
    penalties: FloatArray


@dataclass(frozen=True, eq=False)
class SubsetProblem:
    """What all subset fits of one set of features share; made by :func:`prepare_problem`.

    Attributes:
        rows: The tasks' rows, gradients divided by ``unit``.
        unit: Square root of the mean curvature c.
        counts: Training examples of each task, shape ``(n_tasks,)``.
        l2_penalty: Relative ridge.
        max_iter: Most objective evaluations per subset.
        tolerance: Of the gradient norm.
        start: Where fits start, in curvature units, shape ``(d,)``: the solution of all tasks together.
        start_iterations: Objective evaluations that solution took.
    """

    rows: tuple[LinearRows, ...]
    unit: float
    counts: FloatArray
    l2_penalty: float
    max_iter: int
    tolerance: float
    start: FloatArray
    start_iterations: int = 0

    @property
    def dimension(self) -> int:
        """d, the length of a projected gradient."""
        return self.start.size

    def ridge(self, subset: Subset) -> float:
        """Return lambda_S / c, the ridge in curvature units."""
        return float(self.l2_penalty * self.counts.mean() / self.counts[list(subset)].sum())


@dataclass(frozen=True, eq=False)
class _Batch:
    """Subsets that are solved side by side."""

    problem: SubsetProblem
    subsets: tuple[Subset, ...]
    membership: npt.NDArray[np.bool_]  # (k, n_tasks)
    totals: FloatArray  # (k,) sum of a_s
    ridges: FloatArray  # (k,)


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
    """Fit one weight vector to every subset of tasks (the module's docstring has the objective).

    Args:
        train: One block per task, all of the same ``proj_dim``.
        subsets: Non-empty tuples of distinct task indices.
        l2_penalty: Relative ridge, above 0, in curvature units.
        balance: Whether every example or every task has the same weight in a subset's loss.
        example_weights: Weights a_s of each task's examples instead, such as AdaBoost's; multiplied into ``balance``.
        max_iter: Most objective evaluations per subset.
        tolerance: Stop where the gradient norm is at most this times ``max(1, |L_S|)``, in curvature units.
        block_bytes: Memory for the Hessians that are held at once.

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
        block_bytes: Memory for the Hessians that are held at once.

    Returns:
        The solutions, in the order of ``subsets``.

    Raises:
        UsageError: If a subset is empty or names a task twice or one that is not there.
    """
    checked = check_subsets(subsets, len(problem.rows))
    size = max(1, block_bytes // (8 * problem.dimension**2))
    fit = _join([_solve(_make_batch(problem, block)) for block in _split(checked, size)], problem.dimension)
    n_failed = int((~fit.converged).sum())
    if n_failed:
        _logger.warning(
            "%d of %d subset fits ended above gradient norm %g in %d steps (worst %.2g); raise estimation.max_iter",
            *(n_failed, len(checked), problem.tolerance, problem.max_iter, fit.gradient_norms.max()),
        )
    return fit


def prepare_problem(
    train: Sequence[FeatureBlock],
    *,
    l2_penalty: float,
    balance: Literal["example", "task"] = "example",
    example_weights: Sequence[npt.ArrayLike] | None = None,
    max_iter: int = 100,
    tolerance: float = 1e-6,
) -> SubsetProblem:
    """Widen the rows to float64 in curvature units, and fit all tasks together; arguments as in :func:`fit_subsets`.

    Raises:
        DataError: If blocks are empty, differ in dimension, or hold values that are not finite.
        ConfigError: If the penalty is not positive.
    """
    if not (np.isfinite(l2_penalty) and l2_penalty > 0):
        raise ConfigError(f"estimation.l2_penalty {l2_penalty}: expected a positive number, or auto")
    _check_blocks(train)
    unit = float(np.sqrt(_mean_curvature(train)))
    weights: Sequence[npt.ArrayLike | None] = [None] * len(train) if example_weights is None else example_weights
    rows = tuple(_weigh_rows(block, given, balance, unit) for block, given in zip(train, weights, strict=True))
    counts = np.array([len(block.ids) for block in train], dtype=np.float64)
    problem = SubsetProblem(rows, unit, counts, l2_penalty, max_iter, tolerance, np.zeros(train[0].proj_dim))
    together = _solve(_make_batch(problem, [tuple(range(len(train)))]))
    return replace(problem, start=together.weights[0] * unit, start_iterations=int(together.iterations[0]))


def _weigh_rows(
    block: FeatureBlock, given: npt.ArrayLike | None, balance: Literal["example", "task"], unit: float
) -> LinearRows:
    n = len(block.ids)
    weights = np.ones(n) if given is None else np.asarray(given, dtype=np.float64)
    if weights.shape != (n,) or not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
        raise DataError(f"task {block.task!r}: example weights must be {n} non-negative numbers, not all 0")
    return LinearRows.from_block(block, weights / n if balance == "task" else weights, unit=unit)


def compute_penalties(train: Sequence[FeatureBlock], subsets: Sequence[Subset], l2_penalty: float) -> FloatArray:
    """Return lambda_S of each subset in the units of the features, shape ``(k,)``."""
    counts = np.array([len(block.ids) for block in train], dtype=np.float64)
    sizes = np.array([counts[list(subset)].sum() for subset in subsets])
    return np.asarray(l2_penalty * _mean_curvature(train) * counts.mean() / sizes)


def check_subsets(subsets: Sequence[Subset], n_tasks: int) -> tuple[Subset, ...]:
    """Return the subsets with their indices sorted.

    Raises:
        UsageError: If a subset is empty or names a task twice or one that is not there.
    """
    checked = tuple(tuple(sorted(int(i) for i in subset)) for subset in subsets)
    for subset in checked:
        if not subset or len(set(subset)) != len(subset) or subset[0] < 0 or subset[-1] >= n_tasks:
            raise UsageError(f"subset {subset}: expected distinct task indices from 0 to {n_tasks - 1}, at least one")
    return checked


def _check_blocks(train: Sequence[FeatureBlock]) -> None:
    if not train:
        raise DataError("no tasks to fit: expected one block of training features per task")
    dimension = train[0].proj_dim
    if dimension > MAX_PROJ_DIM:
        raise ConfigError(
            f"features of dimension {dimension}: one Hessian would take {8e-9 * dimension**2:.0f} GB; "
            f"set gradients.proj_dim to at most {MAX_PROJ_DIM}"
        )
    for block in train:
        where = f"features of task {block.task!r}, {block.split}"
        if not block.ids:
            raise DataError(f"{where}: no rows; give the task at least one training example")
        if block.proj_dim != dimension:
            raise DataError(f"{where}: dimension {block.proj_dim}, others have {dimension}; collect them together")
        finite = np.isfinite(block.features).all(axis=(1, 2)) & np.isfinite(block.outputs).all(axis=1)
        if not finite.all():
            n_bad = int((~finite).sum())
            raise DataError(f"{where}: {n_bad} of {len(block.ids)} rows are not finite; collect them in float32")


def _mean_curvature(train: Sequence[FeatureBlock]) -> float:
    """c: mean over all examples of the trace of the Hessian at equally likely classes, divided by d."""
    traces = np.concatenate([compute_curvature_trace(block) for block in train])
    curvature = float(traces.mean()) / train[0].proj_dim
    if curvature <= 0:
        raise DataError(
            "all features are zero: the adapter has no gradient at the base model; check its target modules"
        )
    return curvature


def _make_batch(problem: SubsetProblem, subsets: Sequence[Subset]) -> _Batch:
    membership = np.zeros((len(subsets), len(problem.rows)), dtype=bool)
    for s, subset in enumerate(subsets):
        membership[s, list(subset)] = True
    task_totals = np.array([rows.total_weight for rows in problem.rows])
    ridges = np.array([problem.ridge(subset) for subset in subsets])
    return _Batch(problem, tuple(subsets), membership, membership @ task_totals, ridges)


def _solve(batch: _Batch) -> Fit:
    """Minimise every subset's objective from the problem's common start."""
    n_subsets, problem = len(batch.subsets), batch.problem
    everyone = np.arange(n_subsets)
    weights, lengths = np.tile(problem.start, (n_subsets, 1)), np.ones(n_subsets)
    iterations = np.ones(n_subsets, dtype=np.int64)
    losses, gradients = _evaluate(batch, weights, everyone)
    factors = _factorise_at_start(batch)
    steps = -_precondition(factors, gradients, everyone)
    while True:
        norms = np.linalg.norm(gradients, axis=1)
        converged = norms <= problem.tolerance * np.maximum(1.0, np.abs(losses))
        active = np.flatnonzero(~converged & (iterations < problem.max_iter))
        if not active.size:
            return Fit(weights / problem.unit, converged, norms, iterations, batch.ridges * problem.unit**2)
        trials = weights[active] + lengths[active, None] * steps[active]
        trial_losses, trial_gradients = _evaluate(batch, trials, active)
        iterations[active] += 1
        slopes = np.einsum("kd,kd->k", gradients[active], steps[active])
        target = losses[active] + _SUFFICIENT_DECREASE * lengths[active] * slopes
        accepted = trial_losses <= target + _ROUNDING * np.maximum(1.0, np.abs(losses[active]))
        moved = active[accepted]
        lengths[active[~accepted]] *= 0.5
        lengths[moved] = 1.0
        weights[moved], losses[moved], gradients[moved] = (
            trials[accepted],
            trial_losses[accepted],
            trial_gradients[accepted],
        )
        slow = moved[np.linalg.norm(gradients[moved], axis=1) > _KEEP_HESSIAN_BELOW * norms[moved]]
        for s in slow:
            factors[s] = _factorise(batch, s, weights[s])
        steps[moved] = -_precondition(factors, gradients, moved)


def _evaluate(batch: _Batch, weights: FloatArray, which: npt.NDArray[np.intp]) -> tuple[FloatArray, FloatArray]:
    """Return objectives ``(k,)`` and gradients ``(k, d)`` of the subsets ``which`` at ``weights`` ``(k, d)``."""
    losses, gradients = np.zeros(len(which)), np.zeros_like(weights)
    for i, rows in enumerate(batch.problem.rows):
        members = np.flatnonzero(batch.membership[which, i])
        if members.size:
            task_losses, task_gradients = sum_losses(rows, weights[members])
            losses[members] += task_losses
            gradients[members] += task_gradients
    totals, ridges = batch.totals[which], batch.ridges[which]
    losses = losses / totals + 0.5 * ridges * np.einsum("kd,kd->k", weights, weights)
    return losses, gradients / totals[:, None] + ridges[:, None] * weights


def _factorise_at_start(batch: _Batch) -> list[FloatArray]:
    """Factorise every subset's Hessian at the common start, computing each task's part once."""
    start = batch.problem.start
    hessians = np.zeros((len(batch.subsets), start.size, start.size))
    for i, rows in enumerate(batch.problem.rows):
        members = np.flatnonzero(batch.membership[:, i])
        if members.size:
            part = compute_hessian(rows, start)
            for s in members:
                hessians[s] += part
    return [_cholesky(hessians[s] / batch.totals[s], batch.ridges[s]) for s in range(len(batch.subsets))]


def _factorise(batch: _Batch, s: int, weights: FloatArray) -> FloatArray:
    hessian = sum(compute_hessian(batch.problem.rows[i], weights) for i in batch.subsets[s])
    return _cholesky(hessian / batch.totals[s], batch.ridges[s])


def _cholesky(hessian: FloatArray, ridge: float) -> FloatArray:
    hessian[np.diag_indices_from(hessian)] += ridge
    try:
        factor, _ = cho_factor(hessian, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        raise SolverError(
            f"the Hessian of a subset fit is not positive definite at ridge {ridge:.1e}; raise estimation.l2_penalty"
        ) from None
    return np.asarray(factor)


def _precondition(factors: list[FloatArray], gradients: FloatArray, which: npt.NDArray[np.intp]) -> FloatArray:
    """Solve each subset's Hessian against its gradient, shape ``(len(which), d)``."""
    solved = [cho_solve((factors[s], True), gradients[s], check_finite=False) for s in which]
    return np.array(solved).reshape(len(which), gradients.shape[1])


def _split(subsets: Sequence[Subset], size: int) -> Iterator[Sequence[Subset]]:
    for first in range(0, len(subsets), size):
        yield subsets[first : first + size]


def _join(blocks: Sequence[Fit], dimension: int) -> Fit:
    if not blocks:
        empty = np.zeros(0)
        return Fit(np.zeros((0, dimension)), np.zeros(0, bool), empty, np.zeros(0, np.int64), empty)
    return Fit(
        *(
            np.concatenate([getattr(block, name) for block in blocks])
            for name in ("weights", "converged", "gradient_norms", "iterations", "penalties")
        )
    )
