"""What all subset fits of one set of features share: rows, units, ridges, and the loss and curvature at the base model.

The objective of subset S (paper, section 2.2, with a fixed offset and no intercept) is

    L_S(w) = sum_s a_s CE(softmax(decoder (u_s + J_s w)), y_s) / sum_s a_s + (lambda_S / 2) ||w||^2
    lambda_S = l2_penalty * c * N_ref / N_S

c is the mean curvature per coordinate (trace of one example's Hessian at equally likely classes, over d), N_ref the
mean number of training examples of a task and N_S the subset's. E epochs of gradient steps are a ridge that falls as
1/N_S, so one relative ridge serves subsets of every size. Weights in curvature units are ``sqrt(c) w``.

Every fit starts at w = 0, the base model, where each task's loss, gradient and curvature are measured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ensemblelora.config import MAX_PROJ_DIM
from ensemblelora.errors import ConfigError, DataError, UsageError
from ensemblelora.estimation.curvature import TaskCurvatures, measure_curvatures
from ensemblelora.estimation.loss import AnyFloatArray, LinearRows, compute_curvature_trace, sum_losses
from ensemblelora.store import FeatureBlock

__all__ = [
    "Batch",
    "Subset",
    "SubsetProblem",
    "check_subsets",
    "compute_penalties",
    "evaluate_batch",
    "make_batch",
    "prepare_problem",
]

FloatArray = npt.NDArray[np.float64]
Subset = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class SubsetProblem:
    """Rows and settings of all fits; made by :func:`prepare_problem`.

    Attributes:
        rows: The tasks' rows, gradients divided by ``unit``.
        unit: Square root of the mean curvature c.
        counts: Training examples of each task, those without features included, shape ``(n_tasks,)``.
        l2_penalty: Relative ridge.
        max_iter: Most objective evaluations per subset.
        tolerance: Of the gradient norm.
        start_losses: Each task's weighted sum of losses at the base model, shape ``(n_tasks,)``.
        start_gradients: Their gradients, in curvature units, shape ``(n_tasks, d)``.
        curvatures: Each task's curvature at the base model.
        start_iterations: Objective evaluations over all rows that this took.
    """

    rows: tuple[LinearRows, ...]
    unit: float
    counts: FloatArray
    l2_penalty: float
    max_iter: int
    tolerance: float
    start_losses: FloatArray
    start_gradients: FloatArray
    curvatures: TaskCurvatures
    start_iterations: int = 1

    @property
    def dimension(self) -> int:
        """d, the length of a projected gradient."""
        return len(self.curvatures.basis)

    @property
    def bytes_per_subset(self) -> int:
        """What the solver holds of a subset: steps, gradients and their history, and three blocks of curvature."""
        return 160 * self.dimension + 12 * len(self.curvatures.blocks[0]) ** 2

    def ridges(self, membership: npt.NDArray[np.bool_]) -> FloatArray:
        """Return lambda_S / c, the ridge in curvature units, of subsets given by their tasks ``(k, n_tasks)``."""
        return np.asarray(self.l2_penalty * self.counts.mean() / (membership @ self.counts))


@dataclass(frozen=True, eq=False)
class Batch:
    """Subsets that are solved side by side; made by :func:`make_batch`.

    Attributes:
        problem: What they share.
        subsets: Their tasks.
        membership: Which tasks each holds, bool ``(k, n_tasks)``.
        totals: Sum of the example weights of each, shape ``(k,)``.
        ridges: lambda_S / c of each, shape ``(k,)``.
    """

    problem: SubsetProblem
    subsets: tuple[Subset, ...]
    membership: npt.NDArray[np.bool_]
    totals: FloatArray
    ridges: FloatArray

    def take(self, which: npt.NDArray[np.intp]) -> Batch:
        """Return a batch of some of the subsets."""
        return Batch(
            self.problem,
            tuple(self.subsets[s] for s in which),
            self.membership[which],
            self.totals[which],
            self.ridges[which],
        )


def prepare_problem(
    train: Sequence[FeatureBlock],
    *,
    l2_penalty: float,
    balance: Literal["example", "task"] = "example",
    example_weights: Sequence[npt.ArrayLike] | None = None,
    n_train: Sequence[int] | None = None,
    max_iter: int = 100,
    tolerance: float = 1e-6,
) -> SubsetProblem:
    """Check the blocks, choose the unit, and measure every task at the base model.

    Args:
        train: One block per task, all of the same ``proj_dim``.
        l2_penalty: Relative ridge, above 0, in curvature units.
        balance: Whether every example or every task has the same weight in a subset's loss.
        example_weights: Weights a_s of each task's examples instead, such as AdaBoost's; multiplied into ``balance``.
        n_train: Training examples of each task, where the blocks hold a share of them that stands for all: examples
            then weigh as many as they stand for, and ridges fall with all of them; none: the blocks hold all.
        max_iter: Most objective evaluations per subset.
        tolerance: Stop where the gradient norm is at most this times ``max(1, |L_S|)``, in curvature units.

    Raises:
        DataError: If blocks are empty, differ in dimension, or hold values that are not finite.
        ConfigError: If the penalty is not positive.
    """
    if not (np.isfinite(l2_penalty) and l2_penalty > 0):
        raise ConfigError(f"estimation.l2_penalty {l2_penalty}: expected a positive number, or auto")
    _check_shapes(train)
    unit = float(np.sqrt(_mean_curvature(train)))
    weights: Sequence[npt.ArrayLike | None] = [None] * len(train) if example_weights is None else example_weights
    counts = np.array([len(block.ids) for block in train] if n_train is None else n_train, dtype=np.float64)
    rows = tuple(
        _weigh_rows(block, given, balance, unit, count)
        for block, given, count in zip(train, weights, counts, strict=True)
    )
    base = np.zeros((1, train[0].proj_dim), dtype=np.float32)
    measured = [sum_losses(task, base) for task in rows]
    return SubsetProblem(
        rows,
        unit,
        counts,
        l2_penalty,
        max_iter,
        tolerance,
        start_losses=np.concatenate([losses for losses, _ in measured]),
        start_gradients=np.concatenate([gradients for _, gradients in measured], dtype=np.float64),
        curvatures=measure_curvatures(rows, least=l2_penalty),
    )


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


def make_batch(problem: SubsetProblem, subsets: Sequence[Subset]) -> Batch:
    """Lay out subsets for :func:`evaluate_batch`."""
    membership = np.zeros((len(subsets), len(problem.rows)), dtype=bool)
    for s, subset in enumerate(subsets):
        membership[s, list(subset)] = True
    task_totals = np.array([rows.total_weight for rows in problem.rows])
    return Batch(problem, tuple(subsets), membership, membership @ task_totals, problem.ridges(membership))


def evaluate_batch(
    batch: Batch, weights: FloatArray, which: npt.NDArray[np.intp], dtype: npt.DTypeLike
) -> tuple[FloatArray, FloatArray]:
    """Return objectives ``(m,)`` and gradients ``(m, d)`` of the subsets ``which``, each at its own weights.

    Args:
        batch: The subsets.
        weights: In curvature units, shape ``(m, d)``.
        which: Indices of m of the subsets.
        dtype: Precision of the sums over rows; the ridge is added in float64.
    """
    losses, gradients = np.zeros(len(which)), np.zeros(weights.shape, dtype)
    asked: AnyFloatArray = weights.astype(dtype)
    holders = np.ascontiguousarray(batch.membership[which].T)  # (n_tasks, m)
    for i in np.flatnonzero(holders.any(axis=1)):
        (members,) = holders[i].nonzero()
        task_losses, task_gradients = sum_losses(batch.problem.rows[i], asked[members])
        losses[members] += task_losses
        gradients[members] += task_gradients
    totals, ridges = batch.totals[which], batch.ridges[which]
    losses = losses / totals + 0.5 * ridges * np.einsum("kd,kd->k", weights, weights)
    return losses, gradients / totals[:, None] + ridges[:, None] * weights


def _weigh_rows(
    block: FeatureBlock, given: npt.ArrayLike | None, balance: Literal["example", "task"], unit: float, count: float
) -> LinearRows:
    """Weigh a block's rows, which stand for ``count`` rows."""
    n = len(block.ids)
    weights = np.ones(n) if given is None else np.asarray(given, dtype=np.float64)
    if weights.shape != (n,) or not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
        raise DataError(f"task {block.task!r}: example weights must be {n} non-negative numbers, not all 0")
    return LinearRows.from_block(block, weights / n if balance == "task" else weights * (count / n), unit=unit)


def _check_shapes(train: Sequence[FeatureBlock]) -> None:
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


def _mean_curvature(train: Sequence[FeatureBlock]) -> float:
    """c: mean over all examples of the trace of the Hessian at equally likely classes, divided by d.

    Raises:
        DataError: If a row is not finite, or all are zero.
    """
    traces = [compute_curvature_trace(block) for block in train]
    for block, trace in zip(train, traces, strict=True):
        n_bad = int((~(np.isfinite(trace) & np.isfinite(block.outputs).all(axis=1))).sum())
        if n_bad:
            raise DataError(
                f"features of task {block.task!r}, {block.split}: {n_bad} of {len(block.ids)} rows are not finite; "
                "collect them in float32"
            )
    curvature = float(np.concatenate(traces).mean()) / train[0].proj_dim
    if curvature <= 0:
        raise DataError(
            "all features are zero: the adapter has no gradient at the base model; check its target modules"
        )
    return curvature
