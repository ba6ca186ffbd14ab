"""Inverse curvature for many subsets at once: what turns a gradient into a step.

:class:`SharedInverse` is made of the tasks' Hessians at the base model, which costs next to nothing per subset.
:class:`OwnInverse` holds whole Hessians at each subset's own weights, for the few fits that the first can't bring home.

Cost: a shared step is 4 d r + 2 r^2 flops a subset; an own Hessian N_S c d^2 + d^3 / 3 flops and 8 d^2 bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.lapack import spotrf, strtri

from ensemblelora.errors import SolverError
from ensemblelora.estimation.loss import compute_hessian
from ensemblelora.estimation.problem import Batch

__all__ = ["OwnInverse", "SharedInverse"]

FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]


class SharedInverse:
    """Inverse curvature of every subset from the tasks' Hessians at the base model; float32, and never renewed."""

    def __init__(self, batch: Batch) -> None:
        """Factorise every subset's block."""
        curvatures = batch.problem.curvatures
        self._basis = curvatures.basis
        n_tasks, rank, _ = curvatures.blocks.shape
        shares = (batch.membership / batch.totals[:, None]).astype(np.float32)
        blocks = (shares @ curvatures.blocks.reshape(n_tasks, -1)).reshape(-1, rank, rank)
        diagonals = blocks.reshape(len(blocks), -1)[:, :: rank + 1]
        # A smaller ridge would drown in the rounding of float32, and the factor might not exist.
        least = np.finfo(np.float32).eps * rank * diagonals.max(axis=1)
        diagonals += np.maximum(batch.ridges, least).astype(np.float32)[:, None]
        self._roots = np.array([_invert_root(block) for block in blocks])
        # What the basis leaves out, if anything; taken out of what it holds again, so that it must not be large there.
        others = 1.0 / (curvatures.rest + batch.ridges) if rank < len(self._basis) else np.zeros(len(blocks))
        self._others = others.astype(np.float32)[:, None]

    def solve(self, gradients: Float32Array, which: Indices) -> Float32Array:
        """Apply the inverse curvature of the subsets ``which`` to a vector each, shape ``(m, d)``."""
        inside, others = gradients @ self._basis, self._others[which]  # (m, r), (m, 1)
        if 2 * len(which) > len(self._roots):  # blocks are larger than vectors: better all of them than copies of most
            spread = np.zeros((len(self._roots), inside.shape[1]), np.float32)
            spread[which] = inside
            solved = _apply_roots(self._roots, spread)[which]
        else:
            solved = _apply_roots(self._roots[which], inside)
        return np.asarray(gradients * others + (solved - inside * others) @ self._basis.T)

    def renew(self, which: Indices, weights: FloatArray) -> Indices:
        """Renew nothing."""
        return which[:0]


class OwnInverse:
    """Inverse Hessians of every subset at its own weights, in float64; 8 d^2 bytes each."""

    def __init__(self, batch: Batch, weights: FloatArray) -> None:
        """Factorise every subset's Hessian at its weights, shape ``(k, d)``."""
        self._batch = batch
        self._factors = [self._factorise(s, own) for s, own in enumerate(weights)]

    def solve(self, gradients: Float32Array, which: Indices) -> Float32Array:
        """Apply the inverse Hessians of the subsets ``which`` to a vector each, shape ``(m, d)``."""
        pairs = zip(which, gradients, strict=True)
        solved = [cho_solve((self._factors[s], True), vector, check_finite=False) for s, vector in pairs]
        return np.array(solved, dtype=np.float32).reshape(gradients.shape)

    def renew(self, which: Indices, weights: FloatArray) -> Indices:
        """Factorise the Hessians of the subsets ``which`` at new weights, shape ``(m, d)``; return ``which``."""
        for s, own in zip(which, weights, strict=True):
            self._factors[s] = self._factorise(int(s), own)
        return which

    def _factorise(self, s: int, weights: FloatArray) -> FloatArray:
        batch = self._batch
        hessian = np.zeros((weights.size, weights.size))
        for i in batch.subsets[s]:
            hessian += compute_hessian(batch.problem.rows[i], weights)
        hessian /= batch.totals[s]
        hessian[np.diag_indices_from(hessian)] += batch.ridges[s]
        try:
            factor, _ = cho_factor(hessian, lower=True, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError:
            raise SolverError(
                f"the Hessian of a subset fit is not positive definite at ridge {batch.ridges[s]:.1e}; "
                "raise estimation.l2_penalty"
            ) from None
        return np.asarray(factor)


def _invert_root(block: Float32Array) -> Float32Array:
    """Return R, lower triangular, with ``R^T R`` the inverse of a positive definite block, which is overwritten."""
    # The transposed view is in LAPACK's order, so nothing is copied; an upper factor there is a lower one here.
    factor, _ = spotrf(block.T, lower=0, clean=1, overwrite_a=1)
    root, _ = strtri(factor, lower=0, overwrite_c=1)
    return np.asarray(root.T)


def _apply_roots(roots: Float32Array, vectors: Float32Array) -> Float32Array:
    """Return ``R^T R v`` of every root ``(m, r, r)`` and vector ``(m, r)``."""
    halves = np.matmul(roots, vectors[:, :, None])
    return np.asarray(np.matmul(halves.transpose(0, 2, 1), roots)[:, 0])
