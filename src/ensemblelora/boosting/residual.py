"""What the current scores still get wrong, and its regression on the features: plain arrays, no model.

Source: paper, appendix A.3, which regresses ``1 - p``; here every class has its residual, so a step can't trade one
class's loss for another's unseen.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve
from scipy.special import log_softmax

from ensemblelora.blocks import OutputMode, helmert
from ensemblelora.errors import SolverError

__all__ = ["fit_residual", "guess_length", "mean_nll", "residual_targets", "row_nll"]


def mean_nll(scores: npt.NDArray[np.floating], labels: npt.NDArray[np.int64]) -> float:
    """Mean cross-entropy of class scores ``(n, K)``, -inf past an example's choices, in nats."""
    return float(row_nll(scores, labels).mean())


def row_nll(scores: npt.NDArray[np.floating], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Cross-entropy of each row ``(n,)``, as in :func:`mean_nll`."""
    log_p = log_softmax(scores.astype(np.float64), axis=1)
    return np.asarray(-log_p[np.arange(len(labels)), labels])


def residual_targets(
    scores: npt.NDArray[np.floating], labels: npt.NDArray[np.int64], mode: OutputMode
) -> npt.NDArray[np.float64]:
    """Negative gradient of the cross-entropy with respect to the differentiated outputs.

    Args:
        scores: F, ``(n, K)``, -inf past an example's choices.
        labels: ``(n,)`` class indices.
        mode: Which outputs the features belong to.

    Returns:
        ``(n, c)``: ``p_y - 1`` with its sign turned for ``logodds``; the class residual ``onehot - softmax(F)`` seen
        through the outputs' decoder otherwise.
    """
    log_p = log_softmax(scores.astype(np.float64), axis=1)
    rows = np.arange(len(labels))
    if mode == "logodds":
        wrong: npt.NDArray[np.float64] = -np.expm1(log_p[rows, labels])[:, None]
        return wrong
    residual = -np.exp(log_p)
    residual[rows, labels] += 1.0
    decoder = np.array([[-0.5], [0.5]]) if mode == "margin" else helmert(scores.shape[1]).T
    targets: npt.NDArray[np.float64] = residual @ decoder
    return targets


def fit_residual(
    features: npt.NDArray[np.float32], targets: npt.NDArray[np.float64], l2_penalty: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Ridge fit of the targets: ``min_w mean ||t - J w||^2 + lambda ||w||^2``.

    The smaller of the two equivalent systems is solved, d x d or (n c) x (n c).

    Args:
        features: J, ``(n, c, d)``.
        targets: t, ``(n, c)``.
        l2_penalty: lambda in curvature units: over the mean squared feature norm per dimension.

    Returns:
        ``w (d,)`` and the dual variables ``alpha (n, c)`` with ``w = sum alpha J``.

    Raises:
        SolverError: If every feature is zero, or the numbers are not finite.
    """
    n, c, d = features.shape
    jacobian = features.reshape(n * c, d).astype(np.float64)
    flat = targets.reshape(n * c)
    ridge = l2_penalty * float((jacobian**2).sum()) / d  # n lambda
    if not (np.isfinite(ridge) and ridge > 0 and np.isfinite(flat).all()):
        raise SolverError(
            f"residual fit of {n} examples: features or residuals are zero or not finite; take the features again, "
            "or set boosting.n_rounds=0"
        )
    if n * c < d:
        alpha = solve(jacobian @ jacobian.T + ridge * np.eye(n * c), flat, assume_a="pos")
        return jacobian.T @ alpha, alpha.reshape(n, c)
    w = solve(jacobian.T @ jacobian + ridge * np.eye(d), jacobian.T @ flat, assume_a="pos")
    return w, ((flat - jacobian @ w) / ridge).reshape(n, c)


def guess_length(
    features: npt.NDArray[np.float32], targets: npt.NDArray[np.float64], w: npt.NDArray[np.float64]
) -> float:
    """Length at which a step along ``w`` should lower the cross-entropy most, by its slope and largest curvature.

    Costs no forward pass; with curvature at its bound of 1/4 it rather falls short, which doubling mends.

    Args:
        features: J, ``(n, c, d)``.
        targets: The negative slope of the loss in each output, ``(n, c)``.
        w: The direction, ``(d,)``.
    """
    change = features.reshape(-1, features.shape[2]).astype(np.float64) @ w
    slope, curvature = float(targets.reshape(-1) @ change), 0.25 * float(change @ change)
    return slope / curvature if slope > 0 and curvature > 0 else 1.0
