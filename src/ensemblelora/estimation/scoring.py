"""Predicted performance of fitted subsets on validation rows, without a forward pass of the model.

Input: validation blocks and weights ``(k, d)``. Output: :class:`RowOutcomes` per row, :class:`SubsetScores` per subset
and task. f-hat is the negative log-likelihood or accuracy of the linear model (paper, section 2.2). Standard errors
treat rows of one ``group`` as one observation. Cost: 2 k n c d flops per task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from ensemblelora.estimation.loss import LinearRows, compute_logits, compute_loss_slopes, compute_row_nll
from ensemblelora.store import FeatureBlock

__all__ = [
    "RowOutcomes",
    "SubsetScores",
    "average_outcomes",
    "compute_clustered_se",
    "compute_macro_f1",
    "compute_wilson_interval",
    "mean_loss_gradients",
    "predict_outcomes",
    "predict_rows",
    "score_outcomes",
]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SubsetScores:
    """f-hat of every subset on every task, in the subset or not; all arrays are float64 unless said.

    Attributes:
        subsets: Sorted task indices; ``()`` is the base model.
        nll: Mean negative log-likelihood, shape ``(n_subsets, n_tasks)``; per answer token for ``sequence``.
        accuracy: Share of right rows; a lower bound for ``logodds`` (p > 1/2), NaN for ``sequence``.
        macro_f1: Mean of the classes' F1; only for ``margin`` and ``contrast``, otherwise NaN.
        nll_se: Standard error of ``nll`` over validation rows, clustered, and projection seeds.
        accuracy_se: Standard error of ``accuracy``.
        distances: Norm of the fitted weights, the fine-tuning distance they stand for, shape ``(n_subsets,)``.
        converged: Whether the fit met its tolerance (in every projection seed), bool ``(n_subsets,)``.
        l2_penalty: Relative ridge of the fits.
    """

    subsets: tuple[tuple[int, ...], ...]
    nll: FloatArray
    accuracy: FloatArray
    macro_f1: FloatArray
    nll_se: FloatArray
    accuracy_se: FloatArray
    distances: FloatArray
    converged: npt.NDArray[np.bool_]
    l2_penalty: float


@dataclass(frozen=True, eq=False)
class RowOutcomes:
    """What the linear model says of each row of one task, under k weight vectors.

    Attributes:
        nll: Shape ``(k, n)``.
        correct: 1 where the row is predicted right, 0 where not, NaN where the mode can't tell, shape ``(k, n)``.
        macro_f1: NaN where the mode can't tell, shape ``(k,)``.
    """

    nll: FloatArray
    correct: FloatArray
    macro_f1: FloatArray


def predict_rows(block: FeatureBlock, weights: FloatArray) -> FloatArray:
    """Return class logits of the linear model, minus infinity for classes a row does not have.

    Args:
        block: n rows of one task.
        weights: Fitted weights, shape ``(k, d)``.

    Returns:
        Shape ``(k, n, K)``.
    """
    return np.moveaxis(compute_logits(LinearRows.from_block(block), np.asarray(weights, dtype=np.float64)), 2, 0)


def predict_outcomes(block: FeatureBlock, weights: FloatArray, *, block_bytes: int = 2**27) -> RowOutcomes:
    """Return the linear model's loss and hits on every row, in bounded memory.

    Args:
        block: n rows of one task.
        weights: Fitted weights, shape ``(k, d)``.
        block_bytes: Memory for logits that are held at once.
    """
    rows = LinearRows.from_block(block)
    size = max(1, block_bytes // max(1, 24 * rows.class_offsets.size))
    parts = [_judge(block, rows, weights[first : first + size]) for first in range(0, len(weights), size)]
    if not parts:
        return RowOutcomes(np.zeros((0, len(block.ids))), np.zeros((0, len(block.ids))), np.zeros(0))
    return RowOutcomes(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("nll", "correct", "macro_f1"))
    )


def score_outcomes(
    outcomes: Sequence[RowOutcomes], groups: npt.NDArray[np.int64]
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
    """Average one task's outcomes over rows and projection seeds.

    Args:
        outcomes: One entry per projection seed, of the same rows.
        groups: Codes of rows that belong together, shape ``(n,)``.

    Returns:
        nll, its standard error, accuracy, its standard error, macro-F1, each of shape ``(k,)``.
    """
    nll = np.stack([outcome.nll for outcome in outcomes])  # (seeds, k, n)
    correct = np.stack([outcome.correct for outcome in outcomes])
    macro_f1 = np.mean([outcome.macro_f1 for outcome in outcomes], axis=0)
    return *average_outcomes(nll, groups), *average_outcomes(correct, groups), macro_f1


def average_outcomes(values: FloatArray, groups: npt.NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
    """Average over projection seeds and rows; the seeds add their share to the rows' standard error.

    Args:
        values: Shape ``(n_seeds, k, n)``.
        groups: Codes of rows that belong together, shape ``(n,)``.

    Returns:
        Means and standard errors, both ``(k,)``; errors are NaN where all rows are of one group.
    """
    by_seed = values.mean(axis=2)  # (seeds, k)
    se = compute_clustered_se(values.mean(axis=0), groups)
    n_seeds = len(values)
    if n_seeds > 1:
        se = np.sqrt(se**2 + by_seed.var(axis=0, ddof=1) / n_seeds)
    return np.asarray(by_seed.mean(axis=0)), np.asarray(se)


def compute_clustered_se(values: FloatArray, groups: npt.NDArray[np.int64]) -> FloatArray:
    """Return the standard error of the mean over the last axis, with one observation per group of rows.

    Args:
        values: Shape ``(..., n)``.
        groups: Codes of rows that belong together, shape ``(n,)``.

    Returns:
        Shape ``(...)``; NaN where there is only one group, since its spread is unknown.
    """
    _, codes = np.unique(groups, return_inverse=True)
    n_groups, n = int(codes.max()) + 1 if codes.size else 0, len(codes)
    if n_groups < 2:
        return np.full(values.shape[:-1], np.nan)
    sums = values - values.mean(axis=-1, keepdims=True)
    if n_groups < n:
        indicator = np.zeros((n, n_groups))
        indicator[np.arange(n), codes] = 1.0
        sums = sums @ indicator
    return np.asarray(np.sqrt(n_groups / (n_groups - 1) * (sums**2).sum(axis=-1)) / n)


def compute_wilson_interval(share: float, n: int, confidence: float) -> tuple[float, float]:
    """Return Wilson's score interval of a share, which keeps a width where all or none of few rows are right.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    Args:
        share: Share of hits, in [0, 1].
        n: Independent observations, one or more.
        confidence: Such as 0.95.

    Example:
        >>> [round(end, 3) for end in compute_wilson_interval(1.0, 20, 0.95)]
        [0.839, 1.0]
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle, width = share + z**2 / (2 * n), z * sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = ((middle + side * width) / (1 + z**2 / n) for side in (-1, 1))
    return max(min(low, share), 0.0), min(max(high, share), 1.0)  # rounding would leave the share out


def compute_macro_f1(predicted: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], n_classes: int) -> FloatArray:
    """Return the mean F1 of the classes that occur among labels or predictions, per weight vector.

    Args:
        predicted: Class indices, shape ``(k, n)``.
        labels: Class indices, shape ``(n,)``.
        n_classes: K.

    Returns:
        Shape ``(k,)``.
    """
    hits, both = np.zeros((2, len(predicted), n_classes))
    for label in range(n_classes):  # one at a time: arrays of (k, n, K) are slower
        guessed, actual = predicted == label, labels == label
        hits[:, label] = (guessed & actual).sum(axis=1)
        both[:, label] = guessed.sum(axis=1) + actual.sum()
    f1 = np.divide(2.0 * hits, both, out=np.zeros(both.shape), where=both > 0)
    return np.asarray(f1.sum(axis=1) / (both > 0).sum(axis=1))


def mean_loss_gradients(train: Sequence[FeatureBlock]) -> FloatArray:
    """Return each task's mean projected loss gradient at the base model, shape ``(n_tasks, d)``."""
    gradients = []
    for block in train:
        rows = LinearRows.from_block(block)
        gradients.append(compute_loss_slopes(rows).reshape(-1) @ rows.jacobian / len(block.ids))
    return np.array(gradients)


def _judge(block: FeatureBlock, rows: LinearRows, weights: FloatArray) -> RowOutcomes:
    logits = compute_logits(rows, weights)  # (n, K, k)
    nll = compute_row_nll(logits, rows.labels).T
    unknown = np.full(len(weights), np.nan)
    if block.mode == "sequence":
        return RowOutcomes(nll, np.full(nll.shape, np.nan), unknown)
    # (k, n), ties to the smaller class; argmax is slow across so short an axis
    predicted = ((logits[:, 1] > logits[:, 0]) * 1 if logits.shape[1] == 2 else logits.argmax(axis=1)).T
    if block.mode == "logodds":
        # p > 1/2 is sure to be right; the class with the largest p may be right below that, which h can't tell.
        return RowOutcomes(nll, (logits[:, 0] > logits[:, 1]).T.astype(np.float64), unknown)
    correct = (predicted == rows.labels).astype(np.float64)
    return RowOutcomes(nll, correct, compute_macro_f1(predicted, rows.labels, rows.decoder.shape[0]))
