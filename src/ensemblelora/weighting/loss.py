"""Cross-entropy of a weighted combination, as a function of the weights.

Logits are linear in the weights, so their cross-entropy is convex in them; so is -log sum_g w_g p_g(y), the loss of
a mixture of probabilities, which free-text tasks always get, token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ensemblelora.errors import DataError, TrainingError

__all__ = ["MemberLogits", "TaskLoss", "combine", "derive", "prepare", "row_losses", "take"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MemberLogits:
    """What every group's model says about one task's rows.

    Attributes:
        values: float ``(m, n_rows, K)``: class logits, -inf past a row's number of classes. K = 1 marks a free-text
            task, whose rows are answer tokens and whose values are the right tokens' log-probabilities.
        labels: Right classes ``(n_examples,)``; not looked at for a free-text task.
        groups: Codes of examples that belong together ``(n_examples,)``.
        row_example: The example of each row ``(n_rows,)``; none: a row is an example.
    """

    values: npt.NDArray[np.floating]
    labels: npt.NDArray[np.integer]
    groups: npt.NDArray[np.integer]
    row_example: npt.NDArray[np.integer] | None = None

    def __post_init__(self) -> None:
        """Refuse arrays that can't belong together.

        Raises:
            DataError: If shapes disagree or a label is out of range.
            TrainingError: If a score is not finite where a class exists.
        """
        self._check_shapes()
        n_classes = self.values.shape[2]
        absent = np.isneginf(self.values) & (n_classes > 1)
        if not np.isfinite(self.values[~absent]).all() or (absent != absent[0]).any():
            raise TrainingError("a group's scores are not finite: its adapter diverged; lower training.learning_rate")
        if n_classes > 1:
            self._check_labels(absent[0])

    def _check_shapes(self) -> None:
        n_rows = self.values.shape[1] if self.values.ndim == 3 else 0
        of_rows = np.arange(n_rows) if self.row_example is None else self.row_example
        is_complete = np.array_equal(np.unique(of_rows), np.arange(len(self.groups)))
        if not n_rows or of_rows.shape != (n_rows,) or not is_complete:
            raise DataError(
                f"values {self.values.shape}, groups {self.groups.shape}: expected (m, n_rows, K) and (n_examples,) "
                "with a row for every example"
            )

    def _check_labels(self, absent: npt.NDArray[np.bool_]) -> None:
        n_rows, n_classes = absent.shape
        in_range = self.labels.shape == (n_rows,) and bool(((self.labels >= 0) & (self.labels < n_classes)).all())
        if not in_range or absent[np.arange(n_rows), self.labels].any():
            raise DataError(f"labels {self.labels.shape}: expected ({n_rows},), each a class that its row has")


def combine(values: npt.ArrayLike, weights: npt.ArrayLike, how: Literal["logits", "probabilities", "mixture"]) -> Array:
    """Combine what the groups say about the same rows.

    Args:
        values: ``(m, n_rows, K)`` class logits, -inf past a row's number of classes; for ``mixture`` log-probabilities.
        weights: ``(m,)`` on the simplex.
        how: ``logits``: sum_g w_g F_g. ``probabilities``: log sum_g w_g softmax(F_g). ``mixture``: log sum_g w_g
            exp(F_g), for values that are log-probabilities already, such as those of right tokens.

    Returns:
        ``(n_rows, K)`` float64 logits or log-probabilities; -inf where the inputs are.

    Raises:
        DataError: If shapes disagree or the weights are not on the simplex.
    """
    scores, shares = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if scores.ndim != 3 or shares.shape != scores.shape[:1]:
        raise DataError(f"values {scores.shape} and weights {shares.shape}: expected (m, n_rows, K) and (m,)")
    if (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise DataError(f"weights {shares.tolist()}: expected non-negative numbers that sum to one")
    if how == "logits":
        absent = np.isneginf(scores).any(axis=0)
        total = np.tensordot(shares, np.where(absent, 0.0, scores), axes=1)
        return np.where(absent, -np.inf, total)
    if how == "probabilities":
        scores = scores - np.logaddexp.reduce(scores, axis=2, keepdims=True)
    return _mix(scores, shares)


@dataclass(frozen=True, eq=False)
class TaskLoss:
    """One task's mean cross-entropy as a function of the weights.

    ``scores`` are ``(m, n_rows, K)`` logits less the right class's; in a mixture, K = 1 and they are the right
    answer's log-probabilities less the best group's, which is what ``offsets`` holds, ``(n_rows,)``.
    ``row_weights`` sum to one: every example counts once, its rows share.
    """

    scores: Array
    absent: npt.NDArray[np.bool_]
    offsets: Array
    row_example: npt.NDArray[np.int64]
    row_weights: Array
    groups: npt.NDArray[np.int64]
    is_mixture: bool

    def mean(self, rows: Array) -> float:
        """Mean over examples of the mean over each one's rows."""
        return float(self.row_weights @ rows)


def prepare(task: MemberLogits, how: str) -> TaskLoss:
    """Put a task's scores into the form the solver works on, float64."""
    values = np.asarray(task.values, dtype=np.float64)
    n_rows, groups = values.shape[1], np.unique(task.groups, return_inverse=True)[1]
    row_example = np.arange(n_rows) if task.row_example is None else np.asarray(task.row_example, dtype=np.int64)
    shares = _share_rows(row_example)
    if values.shape[2] > 1:
        right = values[:, np.arange(n_rows), task.labels]
        if how == "logits":
            absent = np.isneginf(values[0])
            scores = np.where(absent, 0.0, values - right[:, :, None])
            return TaskLoss(scores, absent, np.zeros(n_rows), row_example, shares, groups, is_mixture=False)
        values = (right - np.logaddexp.reduce(values, axis=2))[:, :, None]
    best = values.max(axis=0)
    absent = np.zeros((n_rows, 1), dtype=bool)
    return TaskLoss(values - best, absent, best[:, 0], row_example, shares, groups, is_mixture=True)


def row_losses(loss: TaskLoss, weights: Array) -> Array:
    """Cross-entropy of each row ``(n_rows,)`` under the weights."""
    if loss.is_mixture:
        return -_mix(loss.scores[:, :, 0], weights) - loss.offsets
    combined = np.tensordot(weights, loss.scores, axes=1)
    combined[loss.absent] = -np.inf
    return np.asarray(np.logaddexp.reduce(combined, axis=1))


def derive(loss: TaskLoss, weights: Array) -> tuple[Array, Array]:
    """Gradient ``(m,)`` and Hessian ``(m, m)`` of the mean loss, at weights inside the simplex."""
    a = loss.row_weights
    if loss.is_mixture:
        members = np.exp(loss.scores[:, :, 0])
        shares = members / (weights @ members)  # p_g / sum_h w_h p_h
        return -(shares @ a), (shares * a) @ shares.T
    combined = np.tensordot(weights, loss.scores, axes=1)
    combined[loss.absent] = -np.inf
    p = np.exp(combined - np.logaddexp.reduce(combined, axis=1, keepdims=True))  # (n_rows, K)
    means = np.einsum("rk,grk->gr", p, loss.scores)
    spread = (loss.scores - means[:, :, None]) * np.sqrt(a[:, None] * p)
    flat = spread.reshape(len(weights), -1)
    return means @ a, flat @ flat.T


def take(loss: TaskLoss, keep: npt.NDArray[np.bool_]) -> TaskLoss:
    """Return the loss of some of the examples ``(n_examples,)``."""
    rows = keep[loss.row_example]
    row_example = (np.cumsum(keep) - 1)[loss.row_example[rows]]
    return TaskLoss(
        scores=loss.scores[:, rows],
        absent=loss.absent[rows],
        offsets=loss.offsets[rows],
        row_example=row_example,
        row_weights=_share_rows(row_example),
        groups=loss.groups[keep],
        is_mixture=loss.is_mixture,
    )


def _share_rows(row_example: npt.NDArray[np.int64]) -> Array:
    counts = np.bincount(row_example)
    return np.asarray(1.0 / (counts[row_example] * len(counts)))


def _mix(log_probabilities: Array, weights: Array) -> Array:
    used = weights > 0
    logs = np.log(weights[used]).reshape(-1, *[1] * (log_probabilities.ndim - 1))
    return np.asarray(np.logaddexp.reduce(logs + log_probabilities[used], axis=0))
