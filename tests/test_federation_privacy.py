"""Clipping, noise and what they guarantee, against integrals and laws of composition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from ensemblelora.config_federation import PrivacyConfig
from ensemblelora.federation.privacy import add_noise, clip_rows, compute_delta, compute_epsilon, state_guarantee


@pytest.mark.parametrize(("mu", "epsilon"), [(0.5, 0.0), (0.5, 1.0), (1.0, 0.5), (2.0, 3.0), (3.0, 12.0)])
def test_delta_is_the_integral_of_what_exceeds_the_bound(mu: float, epsilon: float) -> None:
    first, second = stats.norm(mu, 1).pdf, stats.norm(0, 1).pdf
    edge = epsilon / mu + mu / 2  # beyond it, the first density is more than exp(epsilon) times the second
    slow, _ = integrate.quad(lambda x: first(x) - np.exp(epsilon) * second(x), edge, mu + 12, epsabs=1e-14)
    assert compute_delta(epsilon, mu) == pytest.approx(slow, rel=1e-6, abs=1e-13)


@given(st.floats(0.01, 20), st.floats(1e-12, 0.1))
def test_epsilon_gives_back_its_delta(mu: float, delta: float) -> None:
    epsilon = compute_epsilon(mu, delta)
    if epsilon == 0:
        assert compute_delta(0.0, mu) <= delta
    else:
        assert compute_delta(epsilon, mu) == pytest.approx(delta, rel=1e-6)
        assert compute_epsilon(mu, delta / 2) > epsilon and compute_epsilon(1.1 * mu, delta) > epsilon


def test_releases_compose_as_one_with_less_noise() -> None:
    four = state_guarantee(PrivacyConfig(update_clip_norm=1, update_noise_multiplier=2.0), 4)
    one = state_guarantee(PrivacyConfig(update_clip_norm=1, update_noise_multiplier=1.0), 1)
    assert four.updates == pytest.approx(one.updates) and four.n_updates == 4
    both = state_guarantee(
        PrivacyConfig(clip_norm=1, noise_multiplier=2.0, update_clip_norm=9, update_noise_multiplier=2.0), 3
    )
    assert both.together == pytest.approx(one.updates), "three updates and the features, all at twice the noise"
    assert both.features == pytest.approx(compute_epsilon(0.5, 1e-5))


def test_without_noise_there_is_no_guarantee_but_for_what_is_not_sent() -> None:
    assert state_guarantee(PrivacyConfig(), 2).together is None
    twice = state_guarantee(PrivacyConfig(clip_norm=1, noise_multiplier=2.0), 0, n_features=4)
    found = state_guarantee(PrivacyConfig(clip_norm=1, noise_multiplier=1.0), 0)
    assert twice.features == pytest.approx(found.features) and twice.n_features == 4
    assert found.features == found.together and found.updates == 0.0


def test_long_rows_are_cut_and_short_ones_left() -> None:
    rows = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert clip_rows(rows, 1.0) == pytest.approx(np.array([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    assert clip_rows(rows, None) is rows


def test_noise_has_the_spread_that_the_guarantee_counts_on() -> None:
    rng = np.random.default_rng(0)
    noisy = add_noise(np.zeros(200_000), 0.7, 1.5, rng)
    assert noisy.std() == pytest.approx(0.7 * 2 * 1.5, rel=0.01) and abs(noisy.mean()) < 0.02
    same = np.ones(3)
    assert add_noise(same, 0.0, 1.0, rng) is same


def test_noise_without_a_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="noise is measured in units of clip_norm; set that, too"):
        PrivacyConfig(noise_multiplier=1.0)
