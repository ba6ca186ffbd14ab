"""The linear model of one task's rows: logits, cross-entropy, gradient and curvature for many weight vectors at once.

Class logits of an example are ``decoder @ (u + J w)`` with the outputs u and projected gradients J taken at the base
model (paper, section 2.2: first-order expansion). One loss serves every output mode: softmax cross-entropy over the
classes an example has, which is log(1 + exp(-y h)) for two classes.

Sums are as precise as the weights they are asked at: float32 weights are answered in float32, at half the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ensemblelora.store import FeatureBlock

__all__ = [
    "LinearRows",
    "compute_curvature_factor",
    "compute_curvature_trace",
    "compute_hessian",
    "compute_logits",
    "compute_loss_gradients",
    "compute_loss_slopes",
    "compute_probabilities",
    "compute_row_nll",
    "sum_losses",
]

FloatArray = npt.NDArray[np.float64]
AnyFloatArray = npt.NDArray[np.floating[Any]]
_Float = TypeVar("_Float", bound="np.floating[Any]")

_BLOCK_BYTES = 2**21  # rows that are widened at once, and what is computed of them, stay in the cache


@dataclass(frozen=True, eq=False)
class LinearRows:
    """One task's rows in the layout the products need.

    Attributes:
        outputs: u, shape ``(n, c)``.
        jacobian: J times ``unit``, one row per example and output, float32 as the block holds it, ``(n * c, d)``.
        decoder: Outputs to class logits, shape ``(K, c)``.
        class_offsets: 0 where an example has the class, minus infinity where not, shape ``(n, K)``.
        labels: Class indices, shape ``(n,)``.
        weights: Non-negative weight of each example in its task's sum, shape ``(n,)``.
        unit: What gradients are divided by; the products divide the weight vectors instead, which are fewer.
    """

    outputs: FloatArray
    jacobian: npt.NDArray[np.float32]
    decoder: FloatArray
    class_offsets: FloatArray
    labels: npt.NDArray[np.int64]
    weights: FloatArray
    unit: float = 1.0

    @classmethod
    def from_block(cls, block: FeatureBlock, weights: npt.ArrayLike | None = None, *, unit: float = 1.0) -> LinearRows:
        """Take a block's rows without copying its gradients."""
        n = len(block.ids)
        return cls(
            outputs=np.asarray(block.outputs, dtype=np.float64),
            jacobian=np.asarray(block.features).reshape(n * block.n_outputs, -1),
            decoder=block.decoder,
            class_offsets=np.where(block.class_mask, 0.0, -np.inf),
            labels=np.asarray(block.labels),
            weights=np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64),
            unit=unit,
        )

    @cached_property
    def total_weight(self) -> float:
        """Sum of the example weights."""
        return float(self.weights.sum())

    @cached_property
    def has_two_classes(self) -> bool:
        """Whether every example has the two classes that one output decides between."""
        return self.decoder.shape == (2, 1) and not np.isneginf(self.class_offsets).any()

    @cached_property
    def half_slopes(self) -> FloatArray:
        """Of two classes, half of d(other logit - label's logit) / du, shape ``(n,)``."""
        span = float(self.decoder[1, 0] - self.decoder[0, 0])
        return 0.5 * span * np.where(self.labels == 0, 1.0, -1.0)

    @cached_property
    def _columns(self) -> dict[str, tuple[AnyFloatArray, ...]]:
        """What the loss of two classes needs of every row, by the precision's character."""
        slopes = self.half_slopes[:, None]
        columns = (slopes, slopes * self.outputs, slopes * self.weights[:, None], self.weights)
        return {char: tuple(column.astype(char) for column in columns) for char in "fd"}

    def split(self, size: int) -> Iterator[LinearRows]:
        """Cut the rows into parts of about a size, the last with up to half as much more; one part is the rows."""
        n = len(self.labels)
        starts = range(0, max(n - size // 2, 1), size)
        if len(starts) == 1:
            yield self
            return
        for first in starts:
            yield self.take(slice(first, n if first == starts[-1] else first + size))

    def take(self, which: slice) -> LinearRows:
        """Return some of the rows, as views."""
        c = self.outputs.shape[1]
        start, stop, step = which.indices(len(self.labels))
        jacobian = self.jacobian.reshape(len(self.labels), c, -1)[start:stop:step]
        return LinearRows(
            self.outputs[which],
            jacobian.reshape(-1, self.jacobian.shape[1]),
            self.decoder,
            self.class_offsets[which],
            self.labels[which],
            self.weights[which],
            self.unit,
        )


def compute_logits(rows: LinearRows, weights: FloatArray) -> FloatArray:
    """Return class logits for every weight vector; minus infinity for classes an example does not have.

    Args:
        rows: n examples, c outputs, K classes.
        weights: Shape ``(k, d)``.

    Returns:
        Shape ``(n, K, k)``.
    """
    return np.asarray(_decode(rows, _compute_outputs(rows, weights)))


def compute_row_nll(logits: FloatArray, labels: npt.NDArray[np.int64]) -> FloatArray:
    """Return each example's cross-entropy, shape ``(n, k)``, from logits of shape ``(n, K, k)``."""
    every = np.arange(len(labels))
    picked = logits[every, labels]
    if logits.shape[1] == 2:
        margins = logits[every, 1 - labels] - picked
        return np.asarray(np.maximum(margins, 0.0) + np.log1p(np.exp(-np.abs(margins))))
    _, log_norm = compute_probabilities(logits)
    return np.asarray(log_norm - picked)


def compute_loss_slopes(rows: LinearRows, weights: FloatArray | None = None) -> FloatArray:
    """Return the derivative of each example's cross-entropy by its outputs, shape ``(n, c)``.

    Args:
        rows: n examples, c outputs.
        weights: w, shape ``(d,)``; none: zero.
    """
    at = np.zeros(rows.jacobian.shape[1]) if weights is None else weights
    residual = compute_probabilities(compute_logits(rows, at[None]))[0][:, :, 0]  # (n, K)
    residual[np.arange(len(rows.labels)), rows.labels] -= 1.0
    return np.asarray(residual @ rows.decoder)


def compute_loss_gradients(rows: LinearRows, weights: FloatArray | None = None) -> FloatArray:
    """Return the gradient of each example's cross-entropy at one weight vector, shape ``(n, d)``.

    Args:
        rows: n examples, c outputs, as they are stored (``unit`` 1).
        weights: w, shape ``(d,)``; none: zero.
    """
    slopes = compute_loss_slopes(rows, weights)
    return np.asarray(np.einsum("nc,ncd->nd", slopes, rows.jacobian.reshape(*slopes.shape, -1)))


def compute_probabilities(logits: npt.NDArray[_Float]) -> tuple[npt.NDArray[_Float], npt.NDArray[_Float]]:
    """Return softmax probabilities, shape ``(n, K, k)``, and log-normalisers, shape ``(n, k)``, of ``(n, K, k)``."""
    top = logits.max(axis=1)
    probabilities = np.exp(logits - top[:, None])
    total = probabilities.sum(axis=1)
    probabilities /= total[:, None]
    return probabilities, top + np.log(total)


def sum_losses(rows: LinearRows, weights: AnyFloatArray) -> tuple[FloatArray, AnyFloatArray]:
    """Return the weighted sums of cross-entropy and their gradients, in the precision of the weight vectors.

    Args:
        rows: n examples.
        weights: Float64 or float32, shape ``(k, d)``.

    Returns:
        The sums, float64 ``(k,)``, and the gradients, shape and precision of ``weights``.
    """
    unit = weights.dtype.type(rows.unit)
    columns = (weights / unit).T
    losses: FloatArray | float = 0.0
    gradients: AnyFloatArray | float = 0.0
    for part in _split(rows, len(weights), weights.dtype.itemsize):
        jacobian = part.jacobian.astype(weights.dtype, copy=False)
        add = _sum_two_classes if part.has_two_classes else _sum
        part_losses, backward = add(part, jacobian @ columns)  # (k,), (n * c, k)
        losses = losses + part_losses
        gradients = gradients + backward.T @ jacobian
    return np.asarray(losses), np.asarray(gradients / unit)


def compute_hessian(rows: LinearRows, weights: FloatArray) -> FloatArray:
    """Return the Hessian of the weighted sum of cross-entropies at one weight vector, shape ``(d, d)``."""
    hessian = np.zeros((weights.size, weights.size))
    for part in _split(rows, 1, 8):
        factor = compute_curvature_factor(part, part.jacobian.astype(np.float64), weights)
        hessian += factor.T @ factor  # a product with itself, which BLAS does at half the cost
    return hessian


def compute_curvature_factor(
    rows: LinearRows, jacobian: AnyFloatArray, weights: FloatArray | None = None
) -> AnyFloatArray:
    """Return B with ``B^T B`` the Hessian of the weighted sum of cross-entropies, in any basis.

    Args:
        rows: n examples, c outputs, K classes.
        jacobian: The rows' jacobian, or its product with a matrix Q for ``Q^T H Q``, shape ``(n * c, r)``.
        weights: w, shape ``(d,)``; none: zero.

    Returns:
        In the precision of ``jacobian``, shape ``(n, r)`` for one output, ``(n * K, r)`` for several.
    """
    n, c = rows.outputs.shape
    outputs = rows.outputs[:, :, None] if weights is None else _compute_outputs(rows, weights[None])
    if rows.has_two_classes:  # p (1 - p) = sech(t / 2)^2 / 4
        spans = np.abs(rows.half_slopes) / rows.unit
        roots = np.sqrt(rows.weights) * spans / np.cosh(rows.half_slopes * outputs[:, 0, 0])
        return roots.astype(jacobian.dtype)[:, None] * jacobian
    probabilities, _ = compute_probabilities(_decode(rows, outputs))
    p = probabilities[:, :, 0]  # (n, K)
    # B^T B = D^T (diag p - p p^T) D, the curvature of one example in its outputs
    centred = rows.decoder - (p @ rows.decoder)[:, None]  # (n, K, c)
    factor = np.sqrt(p * rows.weights[:, None])[:, :, None] * centred / rows.unit
    parts = np.matmul(factor.astype(jacobian.dtype), jacobian.reshape(n, c, -1))  # (n, K, r)
    return np.asarray(parts.reshape(-1, jacobian.shape[1]))


def compute_curvature_trace(block: FeatureBlock) -> FloatArray:
    """Return each example's trace of the Hessian where all its classes are equally likely, shape ``(n,)``.

    This is ``0.25 ||g||^2`` for two classes and ``||J||_F^2 / K`` for contrasts; single precision, like the features.
    Not finite where a feature is not.
    """
    if block.n_outputs == 1:
        span = float(block.decoder[1, 0] - block.decoder[0, 0])
        features = np.asarray(block.features[:, 0])
        return np.asarray(0.25 * span**2 * np.einsum("nd,nd->n", features, features), dtype=np.float64)
    present = block.class_mask / block.class_mask.sum(axis=1, keepdims=True)  # (n, K), uniform probabilities
    centred = block.decoder - (present @ block.decoder)[:, None]  # (n, K, c)
    metric = np.einsum("nk,nka,nkb->nab", present, centred, centred)
    gram = np.matmul(block.features, block.features.transpose(0, 2, 1))
    return np.asarray((metric * gram).sum(axis=(1, 2)))


def _split(rows: LinearRows, n_vectors: int, itemsize: int) -> Iterator[LinearRows]:
    """Cut rows into parts whose gradients, and classes under all weight vectors, fit the cache."""
    n_classes = rows.class_offsets.shape[1]
    per_row = itemsize * max(rows.jacobian.shape[1] * rows.outputs.shape[1], 3 * n_classes * n_vectors)
    return rows.split(max(32, _BLOCK_BYTES // max(1, per_row)))


def _compute_outputs(rows: LinearRows, weights: FloatArray) -> FloatArray:
    """Return u + J w of every weight vector, shape ``(n, c, k)``."""
    u = (rows.jacobian @ (weights.T / rows.unit)).reshape(*rows.outputs.shape, -1)
    return np.asarray(u + rows.outputs[:, :, None])


def _decode(rows: LinearRows, outputs: AnyFloatArray) -> AnyFloatArray:
    """Return the logits of outputs ``(n, c, k)``, shape ``(n, K, k)``."""
    dtype = outputs.dtype
    logits = np.matmul(rows.decoder.astype(dtype, copy=False), outputs)
    logits += rows.class_offsets.astype(dtype, copy=False)[:, :, None]
    return np.asarray(logits)


def _sum(rows: LinearRows, changes: AnyFloatArray) -> tuple[FloatArray, AnyFloatArray]:
    """Return sums of losses and their derivatives by the outputs, from J w.

    Args:
        rows: n examples.
        changes: J w of every weight vector, shape ``(n * c, k)``.

    Returns:
        Float64 ``(k,)``, and like ``changes``.
    """
    n, c = rows.outputs.shape
    dtype = changes.dtype
    logits = _decode(rows, changes.reshape(n, c, -1) + rows.outputs.astype(dtype, copy=False)[:, :, None])
    residual, log_norm = compute_probabilities(logits)
    picked = (np.arange(n), rows.labels)
    losses = rows.weights @ (log_norm - logits[picked])
    residual[picked] -= 1.0
    residual *= rows.weights.astype(dtype, copy=False)[:, None, None]
    return losses, np.matmul(rows.decoder.T.astype(dtype, copy=False), residual).reshape(changes.shape)


def _sum_two_classes(rows: LinearRows, changes: AnyFloatArray) -> tuple[FloatArray, AnyFloatArray]:
    """The same where there are two classes, without arrays of classes; overwrites ``changes``.

    With t the other logit less the label's, the loss is softplus(t) = max(t, 0) - log(sigmoid(|t|)), its derivative
    sigmoid(t) = (1 + tanh(t / 2)) / 2; one tanh serves both.
    """
    slopes, offsets, weighted_slopes, weights = rows._columns[changes.dtype.char]
    changes *= slopes
    changes += offsets  # t / 2
    derivative = np.tanh(changes)
    certainty = np.abs(derivative)
    certainty += 1.0  # 2 sigmoid(|t|)
    np.log(certainty, out=certainty)
    np.maximum(changes, 0.0, out=changes)
    losses = 2.0 * (weights @ changes) - weights @ certainty
    derivative += 1.0
    derivative *= weighted_slopes
    return losses + np.log(2.0) * rows.total_weight, derivative
