"""The linear model of one task's rows: logits, cross-entropy, gradient and curvature for many weight vectors at once.

Class logits of an example are ``decoder @ (u + J w)`` with the outputs u and projected gradients J taken at the base
model (paper, section 2.2: first-order expansion). One loss serves every output mode: softmax cross-entropy over the
classes an example has, which is log(1 + exp(-y h)) for two classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.store import FeatureBlock

__all__ = [
    "LinearRows",
    "compute_curvature_trace",
    "compute_hessian",
    "compute_logits",
    "compute_row_nll",
    "sum_losses",
]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LinearRows:
    """One task's rows in float64, in the layout the products need.

    Attributes:
        outputs: u, shape ``(n, c)``.
        jacobian: J, one row per example and output, shape ``(n * c, d)``.
        decoder: Outputs to class logits, shape ``(K, c)``.
        class_offsets: 0 where an example has the class, minus infinity where not, shape ``(n, K)``.
        labels: Class indices, shape ``(n,)``.
        weights: Non-negative weight of each example in its task's sum, shape ``(n,)``.
    """

    outputs: FloatArray
    jacobian: FloatArray
    decoder: FloatArray
    class_offsets: FloatArray
    labels: npt.NDArray[np.int64]
    weights: FloatArray

    @classmethod
    def from_block(cls, block: FeatureBlock, weights: npt.ArrayLike | None = None, *, unit: float = 1.0) -> LinearRows:
        """Widen a block to float64, dividing its gradients by ``unit``."""
        n = len(block.ids)
        return cls(
            outputs=np.asarray(block.outputs, dtype=np.float64),
            jacobian=np.asarray(block.features, dtype=np.float64).reshape(n * block.n_outputs, -1) / unit,
            decoder=block.decoder,
            class_offsets=np.where(block.class_mask, 0.0, -np.inf),
            labels=np.asarray(block.labels),
            weights=np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64),
        )

    @property
    def total_weight(self) -> float:
        """Sum of the example weights."""
        return float(self.weights.sum())


def compute_logits(rows: LinearRows, weights: FloatArray) -> FloatArray:
    """Return class logits for every weight vector; minus infinity for classes an example does not have.

    Args:
        rows: n examples, c outputs, K classes.
        weights: Shape ``(k, d)``.

    Returns:
        Shape ``(n, K, k)``.
    """
    n, c = rows.outputs.shape
    u = (rows.jacobian @ weights.T).reshape(n, c, -1) + rows.outputs[:, :, None]  # (n, c, k)
    return np.asarray(np.matmul(rows.decoder, u) + rows.class_offsets[:, :, None])


def compute_row_nll(logits: FloatArray, labels: npt.NDArray[np.int64]) -> FloatArray:
    """Return each example's cross-entropy, shape ``(n, k)``, from logits of shape ``(n, K, k)``."""
    _, log_norm = compute_probabilities(logits)
    return np.asarray(log_norm - logits[np.arange(len(labels)), labels])


def compute_probabilities(logits: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return softmax probabilities, shape ``(n, K, k)``, and log-normalisers, shape ``(n, k)``, of ``(n, K, k)``."""
    top = logits.max(axis=1)
    probabilities = np.exp(logits - top[:, None])
    total = probabilities.sum(axis=1)
    probabilities /= total[:, None]
    return probabilities, top + np.log(total)


def sum_losses(rows: LinearRows, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the weighted sums of cross-entropy, shape ``(k,)``, and their gradients, shape ``(k, d)``."""
    n, c = rows.outputs.shape
    logits = compute_logits(rows, weights)  # (n, K, k)
    residual, log_norm = compute_probabilities(logits)
    picked = (np.arange(n), rows.labels)
    losses = rows.weights @ (log_norm - logits[picked])
    residual[picked] -= 1.0
    residual *= rows.weights[:, None, None]
    backward = np.matmul(rows.decoder.T, residual).reshape(n * c, -1)  # (n * c, k)
    return np.asarray(losses), np.asarray(backward.T @ rows.jacobian)


def compute_hessian(rows: LinearRows, weights: FloatArray) -> FloatArray:
    """Return the Hessian of the weighted sum of cross-entropies at one weight vector, shape ``(d, d)``."""
    n, c = rows.outputs.shape
    probabilities, _ = compute_probabilities(compute_logits(rows, weights[None]))
    p = probabilities[:, :, 0]  # (n, K)
    # A factor B of D^T (diag p - p p^T) D = B^T B keeps the big product symmetric, which BLAS does at half the cost.
    centred = rows.decoder - (p @ rows.decoder)[:, None]  # (n, K, c)
    factor = np.sqrt(p * rows.weights[:, None])[:, :, None] * centred
    if c == 1:
        scaled = np.linalg.norm(factor, axis=1) * rows.jacobian  # (n, d)
    else:
        scaled = np.matmul(factor, rows.jacobian.reshape(n, c, -1)).reshape(-1, rows.jacobian.shape[1])
    return np.asarray(scaled.T @ scaled)


def compute_curvature_trace(block: FeatureBlock) -> FloatArray:
    """Return each example's trace of the Hessian where all its classes are equally likely, shape ``(n,)``.

    This is ``0.25 ||g||^2`` for two classes and ``||J||_F^2 / K`` for contrasts.
    """
    present = block.class_mask / block.class_mask.sum(axis=1, keepdims=True)  # (n, K), uniform probabilities
    features = np.asarray(block.features, dtype=np.float64)
    gram = np.einsum("nad,nbd->nab", features, features)
    centred = block.decoder - (present @ block.decoder)[:, None]  # (n, K, c)
    return np.asarray(np.einsum("nk,nka,nkb,nab->n", present, centred, centred, gram, optimize=True))
