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
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora.store import FeatureBlock

__all__ = [
    "LinearRows",
    "compute_curvature_factor",
    "compute_curvature_trace",
    "compute_hessian",
    "compute_logits",
    "compute_probabilities",
    "compute_row_nll",
    "sum_losses",
]

FloatArray = npt.NDArray[np.float64]
AnyFloatArray = npt.NDArray[np.floating[Any]]

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

    @property
    def total_weight(self) -> float:
        """Sum of the example weights."""
        return float(self.weights.sum())

    @cached_property
    def half_slopes(self) -> FloatArray | None:
        """Half of d(other logit - label's logit) / du, shape ``(n,)``; none unless two classes share one output."""
        if self.decoder.shape != (2, 1) or np.isneginf(self.class_offsets).any():
            return None
        span = float(self.decoder[1, 0] - self.decoder[0, 0])
        return 0.5 * span * np.where(self.labels == 0, 1.0, -1.0)

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
    picked = logits[np.arange(len(labels)), labels]
    if logits.shape[1] == 2:
        return np.logaddexp(0.0, logits[np.arange(len(labels)), 1 - labels] - picked)
    _, log_norm = compute_probabilities(logits)
    return np.asarray(log_norm - picked)


def compute_probabilities(logits: FloatArray) -> tuple[FloatArray, FloatArray]:
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
    losses, gradients = np.zeros(len(weights)), np.zeros_like(weights)
    for part in _split(rows, len(weights), weights.dtype.itemsize):
        jacobian = part.jacobian.astype(weights.dtype, copy=False)
        outputs = _compute_outputs(part, weights, jacobian)  # (n, c, k)
        part_losses, backward = _sum_two_classes(part, outputs) if part.half_slopes is not None else _sum(part, outputs)
        losses += part_losses
        gradients += backward.T @ jacobian
    gradients /= weights.dtype.type(rows.unit)
    return losses, gradients


def compute_hessian(rows: LinearRows, weights: FloatArray) -> FloatArray:
    """Return the Hessian of the weighted sum of cross-entropies at one weight vector, shape ``(d, d)``."""
    hessian = np.zeros((weights.size, weights.size))
    for part in _split(rows, 1, 8):
        factor = compute_curvature_factor(part, weights, part.jacobian.astype(np.float64))
        hessian += factor.T @ factor  # a product with itself, which BLAS does at half the cost
    return hessian


def compute_curvature_factor(
    rows: LinearRows, weights: AnyFloatArray, jacobian: AnyFloatArray, *, scale: float = 1.0
) -> AnyFloatArray:
    """Return B with ``B^T B`` the Hessian at one weight vector, ``scale`` times, in any basis.

    Args:
        rows: n examples, c outputs, K classes.
        weights: w, shape ``(d,)``.
        jacobian: The rows' jacobian, or its product with a matrix Q for ``Q^T H Q``, shape ``(n * c, r)``.
        scale: Above 0.

    Returns:
        In the precision of ``jacobian``, shape ``(n, r)`` for one output, ``(n * K, r)`` for several.
    """
    n, c = rows.outputs.shape
    probabilities, _ = compute_probabilities(compute_logits(rows, np.asarray(weights, dtype=np.float64)[None]))
    p = probabilities[:, :, 0]  # (n, K)
    # B^T B = D^T (diag p - p p^T) D, the curvature of one example in its outputs
    centred = rows.decoder - (p @ rows.decoder)[:, None]  # (n, K, c)
    factor = np.sqrt(scale * p * rows.weights[:, None])[:, :, None] * centred / rows.unit
    if c == 1:
        return np.linalg.norm(factor, axis=1).astype(jacobian.dtype) * jacobian
    parts = np.matmul(factor.astype(jacobian.dtype), jacobian.reshape(n, c, -1))  # (n, K, r)
    return np.asarray(parts.reshape(-1, jacobian.shape[1]))


def compute_curvature_trace(block: FeatureBlock) -> FloatArray:
    """Return each example's trace of the Hessian where all its classes are equally likely, shape ``(n,)``.

    This is ``0.25 ||g||^2`` for two classes and ``||J||_F^2 / K`` for contrasts. Not finite where a feature is not.
    """
    present = block.class_mask / block.class_mask.sum(axis=1, keepdims=True)  # (n, K), uniform probabilities
    centred = block.decoder - (present @ block.decoder)[:, None]  # (n, K, c)
    metric = np.einsum("nk,nka,nkb->nab", present, centred, centred)
    traces = np.empty(len(block.ids))
    size = max(1, _BLOCK_BYTES // (8 * max(1, block.n_outputs * block.proj_dim)))
    for first in range(0, len(traces), size):
        features = block.features[first : first + size].astype(np.float64)
        gram = np.matmul(features, features.transpose(0, 2, 1)) if block.n_outputs > 1 else _square(features)
        traces[first : first + size] = (metric[first : first + size] * gram).sum(axis=(1, 2))
    return traces


def _square(features: FloatArray) -> FloatArray:
    """Gram matrices of one vector each, ``(n, 1, 1)`` from ``(n, 1, d)``; a batch of tiny products is slower."""
    return np.asarray(np.einsum("nad,nad->n", features, features)[:, None, None])


def _split(rows: LinearRows, n_vectors: int, itemsize: int) -> Iterator[LinearRows]:
    """Cut rows into parts whose gradients, and classes under all weight vectors, fit the cache."""
    n, n_classes = rows.class_offsets.shape
    per_row = itemsize * max(rows.jacobian.shape[1] * rows.outputs.shape[1], 3 * n_classes * n_vectors)
    size = max(32, _BLOCK_BYTES // max(1, per_row))
    if n <= size:
        yield rows
        return
    for first in range(0, n, size):
        yield rows.take(slice(first, first + size))


def _compute_outputs(rows: LinearRows, weights: AnyFloatArray, jacobian: AnyFloatArray | None = None) -> AnyFloatArray:
    """Return u + J w of every weight vector, in their precision, shape ``(n, c, k)``."""
    dtype = weights.dtype
    jacobian = rows.jacobian.astype(dtype, copy=False) if jacobian is None else jacobian
    u = (jacobian @ (weights / dtype.type(rows.unit)).T).reshape(*rows.outputs.shape, -1)
    u += rows.outputs.astype(dtype, copy=False)[:, :, None]
    return u


def _decode(rows: LinearRows, outputs: AnyFloatArray) -> AnyFloatArray:
    dtype = outputs.dtype
    logits = np.matmul(rows.decoder.astype(dtype, copy=False), outputs)
    logits += rows.class_offsets.astype(dtype, copy=False)[:, :, None]
    return np.asarray(logits)


def _sum(rows: LinearRows, outputs: AnyFloatArray) -> tuple[FloatArray, AnyFloatArray]:
    """Return the sums of losses ``(k,)`` and their derivatives by the outputs ``(n * c, k)``."""
    n, c = rows.outputs.shape
    logits = _decode(rows, outputs)  # (n, K, k)
    residual, log_norm = compute_probabilities(logits)
    picked = (np.arange(n), rows.labels)
    losses = rows.weights @ (log_norm - logits[picked])
    residual[picked] -= 1.0
    residual *= rows.weights.astype(outputs.dtype, copy=False)[:, None, None]
    return losses, np.matmul(rows.decoder.T.astype(outputs.dtype, copy=False), residual).reshape(n * c, -1)


def _sum_two_classes(rows: LinearRows, outputs: AnyFloatArray) -> tuple[FloatArray, AnyFloatArray]:
    """The same for two classes, without arrays of classes.

    With t the other logit less the label's, the loss is softplus(t) = max(t, 0) - log(sigmoid(|t|)), its derivative
    sigmoid(t) = (1 + tanh(t / 2)) / 2; one tanh serves both.
    """
    assert rows.half_slopes is not None
    dtype = outputs.dtype
    half = outputs[:, 0]  # (n, k), overwritten: t / 2
    half *= rows.half_slopes.astype(dtype)[:, None]
    derivative = np.tanh(half)
    certainty = np.abs(derivative)
    certainty += dtype.type(1.0)  # 2 sigmoid(|t|)
    np.log(certainty, out=certainty)
    np.maximum(half, dtype.type(0.0), out=half)
    weights = rows.weights.astype(dtype, copy=False)
    losses = 2.0 * (weights @ half) - weights @ certainty + np.log(2.0) * rows.total_weight
    derivative += dtype.type(1.0)
    derivative *= (rows.weights * rows.half_slopes).astype(dtype)[:, None]
    return losses.astype(np.float64), derivative
