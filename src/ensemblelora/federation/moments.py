"""The quadratic model of clients' losses, and the moments that are all it takes. No torch.

A row's loss is ``phi(u + g.w)`` with ``phi(u) = log(1 + exp(-u))``, u its output at the base model and g the projected
gradient of that (gradients/output.py, ``sequence``). To second order in w the sum over a client's rows is

    sum phi(u) + (sum phi'(u) g).w + w.(sum phi''(u) g g^T) w / 2

whose three sums do not depend on w: a client can send them in place of its rows. They travel as one vector of ``1 + d
+ d (d + 1) / 2`` numbers in which off-diagonal entries are multiplied with sqrt(2), so that the vector's norm is the
sums' own, which is what is clipped. :class:`MomentOracle` answers as the subset oracle does, in closed form:

    w_S = -(H_S + lambda_S I)^-1 a_S,  lambda_S = l2_penalty c N_ref / N_S,  c the mean trace of a row's H over d

Cost: d^3 for each subset, 2 d^2 for each of its clients. Memory: 8 (d + 1)^2 bytes a client and split, 8 d^2 for each
subset of a block. Slow twin: sums over rows, one at a time, and scipy's minimiser, in tests/test_federation_plan.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from ensemblelora.errors import SolverError

__all__ = [
    "MomentClients",
    "MomentOracle",
    "Moments",
    "choose_moment_penalty",
    "count_moments",
    "list_row_moments",
    "read_moments",
]

FloatArray = npt.NDArray[np.float64]
Subset = tuple[int, ...]

_BLOCK_BYTES = 2**27
_MAX_TRIAL_SUBSETS = 40
_FLOOR = 1e-9  # of the ridge: the least curvature that a noisy sum may have


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over some clients' rows.

    Attributes:
        counts: Rows, ``(n,)``.
        losses: ``(n,)``.
        gradients: a, ``(n, d)``.
        curvatures: H, ``(n, d, d)``.
    """

    counts: FloatArray
    losses: FloatArray
    gradients: FloatArray
    curvatures: FloatArray


def count_moments(proj_dim: int) -> int:
    """Numbers of a client's moments of one split."""
    return 1 + proj_dim + proj_dim * (proj_dim + 1) // 2


def list_row_moments(outputs: npt.ArrayLike, features: npt.ArrayLike) -> FloatArray:
    """Return every row's own moments, whose sum is the client's, ``(n, 1 + d + d (d + 1) / 2)``.

    Args:
        outputs: u, ``(n,)``.
        features: g, ``(n, d)``.
    """
    u, g = np.asarray(outputs, np.float64), np.asarray(features, np.float64)
    wrong = expit(-u)  # 1 - p
    loss, slope, curvature = np.logaddexp(0.0, -u), -wrong, wrong * expit(u)
    rows, columns = np.triu_indices(g.shape[1])
    scale = np.where(rows == columns, 1.0, math.sqrt(2.0))
    products = g[:, rows] * g[:, columns] * scale
    return np.hstack([loss[:, None], slope[:, None] * g, curvature[:, None] * products])


def read_moments(sums: npt.ArrayLike, counts: npt.ArrayLike, proj_dim: int) -> Moments:
    """Take clients' vectors apart.

    Args:
        sums: ``(n, 1 + d + d (d + 1) / 2)``.
        counts: Rows of each client, ``(n,)``.
        proj_dim: d.
    """
    vectors = np.asarray(sums, np.float64)
    rows, columns = np.triu_indices(proj_dim)
    curvatures = np.zeros((len(vectors), proj_dim, proj_dim))
    curvatures[:, rows, columns] = vectors[:, 1 + proj_dim :] / np.where(rows == columns, 1.0, math.sqrt(2.0))
    curvatures[:, columns, rows] = curvatures[:, rows, columns]
    return Moments(np.asarray(counts, np.float64), vectors[:, 0], vectors[:, 1 : 1 + proj_dim], curvatures)


@dataclass(frozen=True, eq=False)
class MomentOracle:
    """Predicts the loss of clients trained together, from their moments.

    Attributes:
        train: Of training rows.
        validation: Of validation rows.
        l2_penalty: Relative ridge.
        is_noisy: Whether noise was added, which can make curvatures negative: they are then cut at zero.
    """

    train: Moments
    validation: Moments
    l2_penalty: float
    is_noisy: bool = False

    def fit(self, subsets: Sequence[Subset]) -> FloatArray:
        """Return w of each subset, ``(k, d)``.

        Raises:
            SolverError: If the ridge is zero and the curvature does not determine w.
        """
        d = self.train.gradients.shape[1]
        size = max(1, _BLOCK_BYTES // (8 * d * d))
        blocks = [self._fit_block(subsets[first : first + size]) for first in range(0, len(subsets), size)]
        return np.concatenate(blocks) if blocks else np.zeros((0, d))

    def predict(self, subsets: Sequence[Subset]) -> FloatArray:
        """Return the predicted mean validation loss of each subset's own clients, ``(k, n)`` in nats; NaN of others."""
        return self.predict_own(subsets, self.fit(subsets))

    def predict_own(self, subsets: Sequence[Subset], weights: FloatArray) -> FloatArray:
        """Return the same at weights found otherwise, ``(k, d)``."""
        n = len(self.validation.counts)
        found = np.full((len(subsets), n), np.nan)
        holders: list[list[int]] = [[] for _ in range(n)]
        for s, subset in enumerate(subsets):
            for i in subset:
                holders[i].append(s)
        for i, own in enumerate(holders):
            found[own, i] = self._measure(i, weights[own])
        return found

    def predict_at(self, weights: FloatArray) -> FloatArray:
        """Return the predicted mean validation loss of every client at some weights ``(k, d)``, as ``(k, n)``."""
        return np.stack([self._measure(i, weights) for i in range(len(self.validation.counts))], axis=1)

    def _measure(self, i: int, weights: FloatArray) -> FloatArray:
        held = self.validation
        bent = np.einsum("kd,kd->k", weights @ held.curvatures[i], weights)
        return np.asarray((held.losses[i] + weights @ held.gradients[i] + 0.5 * bent) / held.counts[i])

    def _fit_block(self, subsets: Sequence[Subset]) -> FloatArray:
        train, d = self.train, self.train.gradients.shape[1]
        unit = float(np.einsum("ndd->", train.curvatures) / train.counts.sum()) / d
        totals = np.array([train.counts[list(s)].sum() for s in subsets])
        slopes = np.array([train.gradients[list(s)].sum(axis=0) for s in subsets]) / totals[:, None]
        bends = np.array([train.curvatures[list(s)].sum(axis=0) for s in subsets]) / totals[:, None, None]
        ridges = self.l2_penalty * max(unit, 0.0) * train.counts.mean() / totals
        if self.is_noisy:
            return _solve_cut(bends, slopes, ridges)
        try:
            return np.asarray(-np.linalg.solve(bends + ridges[:, None, None] * np.eye(d), slopes[:, :, None])[:, :, 0])
        except np.linalg.LinAlgError:
            raise SolverError(
                f"moments: the curvature of {len(subsets)} subsets determines no step; raise groups.l2_penalty"
            ) from None


class MomentClients:
    """Clients of whom the moments are known, for simulated rounds: each step takes the mean over all of their rows.

    Single batches can't be told apart in sums; the gradient is that of the second-order model.
    """

    bytes_per_batch = 0  # moments are read where they lie

    def __init__(self, train: Moments) -> None:
        """Take the moments of training rows."""
        self._train = train
        self.proj_dim, self.counts = train.gradients.shape[1], train.counts

    def deal(self, client: int, n_steps: int, generator: np.random.Generator) -> list[npt.NDArray[np.int64]]:
        """Return the client's own index for each step."""
        return [np.array([client])] * n_steps

    def mean_gradients(self, batches: Sequence[npt.NDArray[np.int64]], weights: FloatArray) -> FloatArray:
        """Return ``(a + H w) / n`` of each step's client at its own weights."""
        members = np.concatenate(batches)
        found = self._train.gradients[members]
        for client in np.unique(members):
            own = members == client
            found[own] += weights[own] @ self._train.curvatures[client]
        return np.asarray(found / self.counts[members, None])


def choose_moment_penalty(
    train: Moments,
    validation: Moments,
    subsets: Sequence[Subset],
    grid: Sequence[float],
    *,
    is_noisy: bool = False,
) -> float:
    """Return the relative ridge that predicts the least validation loss of subsets' own clients, of equals the largest.

    Args:
        train: Of training rows.
        validation: Of validation rows.
        subsets: What it is chosen on; of many an evenly spaced part.
        grid: Candidates.
        is_noisy: See :class:`MomentOracle`.
    """
    step = max(1, -(-len(subsets) // _MAX_TRIAL_SUBSETS))
    asked = subsets[::step]

    def measure(penalty: float) -> float:
        found = MomentOracle(train, validation, penalty, is_noisy).predict(asked)
        return float(np.mean([found[s, list(subset)].mean() for s, subset in enumerate(asked)]))

    return min(sorted(set(grid), reverse=True), key=measure)


def _solve_cut(bends: FloatArray, slopes: FloatArray, ridges: FloatArray) -> FloatArray:
    """Solve with every curvature's negative part left out."""
    values, vectors = np.linalg.eigh(bends)
    stiff = np.maximum(values, 0.0) + np.maximum(ridges, _FLOOR)[:, None]  # (k, d)
    along = np.einsum("kde,kd->ke", vectors, slopes) / stiff
    return np.asarray(-np.einsum("kde,ke->kd", vectors, along))
