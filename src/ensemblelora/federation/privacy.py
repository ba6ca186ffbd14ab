"""Clipping and Gaussian noise on what a client sends, and what they guarantee. No torch.

Neighbours are two clients' data that differ in one row, which is replaced by any other. A row's share of what is sent
is cut to norm C, so replacing it moves the sum by at most 2 C; noise of standard deviation ``noise_multiplier x 2 C``
on every number makes one release Gaussian-differentially private with mu = 1 / noise_multiplier, and independent
releases about the same rows compose to the root of the sum of their squares. Epsilon at a delta is exact, not a bound
on tails.

What is not covered: how many rows and tokens a client has, which it states; losses and weights that it reports of its
own rows; what the same rows were used for with other settings.

Source: Balle and Wang (2018), "Improving the Gaussian mechanism", theorem 8; Dong, Roth and Su (2022), "Gaussian
differential privacy", corollary 2.13 and section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr

from ensemblelora.config_federation import PrivacyConfig

__all__ = ["Guarantee", "add_noise", "clip_rows", "compute_delta", "compute_epsilon", "state_guarantee"]

_STEPS = 200  # of bisection: to the last bit


@dataclass(frozen=True)
class Guarantee:
    """Epsilon of each kind of release, and of all together, at one delta; none: no guarantee.

    Attributes:
        delta: Of all of them.
        features: Of what is sent before training, by the client that was asked for it most often.
        updates: Of all changed adapters of the client that sent most.
        together: Of both.
        n_features: How often that client was asked for its features: once, if nothing was broken off.
        n_updates: How many changed adapters were asked of a client, at most.
    """

    delta: float
    features: float | None
    updates: float | None
    together: float | None
    n_features: int
    n_updates: int


def clip_rows(rows: npt.NDArray[np.floating], norm: float | None) -> npt.NDArray[np.floating]:
    """Shorten every row of a matrix ``(n, d)`` that is longer than ``norm`` to it; none: nothing is done."""
    if norm is None:
        return rows
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    shares = np.minimum(1.0, norm / np.maximum(lengths, 1e-300))
    return np.asarray(rows * shares[:, None].astype(rows.dtype))


def add_noise(
    values: npt.NDArray[np.floating], multiplier: float, norm: float | None, generator: np.random.Generator
) -> npt.NDArray[np.floating]:
    """Add independent Gaussian noise of standard deviation ``multiplier x 2 norm`` to every number.

    Args:
        values: What would be sent, of any shape.
        multiplier: 0: nothing is added.
        norm: To which shares of rows were cut.
        generator: Must not be one that the server can make again.
    """
    if not multiplier or norm is None:
        return values
    return np.asarray(values + generator.normal(0.0, 2.0 * norm * multiplier, values.shape).astype(values.dtype))


def compute_delta(epsilon: float, mu: float) -> float:
    """Return the least delta at which a mu-Gaussian mechanism is (epsilon, delta)-differentially private."""
    first = float(log_ndtr(-epsilon / mu + mu / 2))
    second = epsilon + float(log_ndtr(-epsilon / mu - mu / 2))
    return max(0.0, math.exp(first) - math.exp(min(second, first)))


def compute_epsilon(mu: float, delta: float) -> float:
    """Return the least epsilon at which a mu-Gaussian mechanism is (epsilon, delta)-differentially private.

    Args:
        mu: Sensitivity over standard deviation.
        delta: Above 0.

    Example:
        >>> round(compute_epsilon(1.0, 1e-5), 3)
        4.377
    """
    if mu <= 0 or compute_delta(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while compute_delta(high, mu) > delta:
        high *= 2.0
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if compute_delta(middle, mu) > delta else (low, middle)
    return high


def state_guarantee(config: PrivacyConfig, n_updates: int, *, n_features: int = 1) -> Guarantee:
    """Say what clipping and noise guarantee.

    Args:
        config: What is done to what is sent.
        n_updates: Changed adapters that one client sent, at most.
        n_features: How often one client sent its features, at most.
    """
    features = _square_mu(config.noise_multiplier, n_features)
    updates = _square_mu(config.update_noise_multiplier, n_updates)
    return Guarantee(
        delta=config.delta,
        features=_to_epsilon(features, config.delta),
        updates=_to_epsilon(updates, config.delta),
        together=_to_epsilon(features + updates, config.delta),
        n_features=n_features,
        n_updates=n_updates,
    )


def _square_mu(multiplier: float, n_releases: int) -> float:
    if n_releases == 0:
        return 0.0
    return n_releases / multiplier**2 if multiplier else math.inf


def _to_epsilon(squared_mu: float, delta: float) -> float | None:
    return compute_epsilon(math.sqrt(squared_mu), delta) if math.isfinite(squared_mu) else None
