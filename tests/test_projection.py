"""Random projections: unbiased, the same bits however they are cut, and never held whole."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from ensemblelora.accounting.meter import Meter
from ensemblelora.gradients import projection
from ensemblelora.gradients.projection import Projector

KINDS = ("rademacher", "gaussian")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased_over_seeds(kind: str) -> None:
    gradients = normal(2, 300)
    true = float(gradients[0] @ gradients[1])
    products = []
    for seed in range(200):
        a, b = Projector(kind, 16, seed).project("layer", gradients)
        products.append(float(a @ b))
    standard_error = np.std(products) / 200**0.5
    assert abs(np.mean(products) - true) < 4 * standard_error


@pytest.mark.parametrize("kind", KINDS)
def test_error_of_inner_products_falls_as_one_over_the_root_of_the_dimension(kind: str) -> None:
    gradients = normal(60, 5000, seed=1)
    gram = (gradients @ gradients.T).numpy()
    norms = np.sqrt(np.diag(gram))
    pairs = np.triu_indices(60, k=1)
    for proj_dim in (100, 400, 1600):
        projected = Projector(kind, proj_dim, 3).project("layer", gradients).numpy()
        error = (projected @ projected.T - gram) / np.outer(norms, norms)
        rms = float(np.sqrt((error[pairs] ** 2).mean()))
        assert rms == pytest.approx(proj_dim**-0.5, rel=0.15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("proj_dim", [7, 64, 130])
def test_entries_are_the_same_bits_for_any_range_of_rows_in_any_order(kind: str, proj_dim: int) -> None:
    projector = Projector(kind, proj_dim, 5)
    whole = projector.matrix("layer", 0, 200)
    cuts = [0, 1, 2, 63, 64, 150, 200]
    pieces = {start: projector.matrix("layer", start, stop) for start, stop in reversed(list(pairwise(cuts)))}
    np.testing.assert_array_equal(np.concatenate([pieces[start] for start in cuts[:-1]]), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_block_size_does_not_change_what_is_projected(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    projector, gradients = Projector(kind, 33, 5), normal(4, 500)
    dense = gradients.numpy() @ projector.matrix("layer", 0, 500)
    for entries in (33, 33 * 7, 33 * 500):
        monkeypatch.setattr(projection, "_BLOCK_ENTRIES", entries)
        np.testing.assert_allclose(projector.project("layer", gradients).numpy(), dense, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_expand_is_the_transpose_of_project(kind: str) -> None:
    projector, gradients, weights = Projector(kind, 48, 2), normal(3, 700), normal(48, seed=9)
    step = projector.expand("layer", 700, weights)
    assert step.shape == (700,)
    torch.testing.assert_close(projector.project("layer", gradients) @ weights, gradients @ step, rtol=1e-4, atol=1e-3)


def test_modules_and_seeds_have_matrices_of_their_own() -> None:
    first = Projector("rademacher", 64, 0).matrix("a", 0, 100)
    for other in (
        Projector("rademacher", 64, 0).matrix("b", 0, 100),
        Projector("rademacher", 64, 1).matrix("a", 0, 100),
    ):
        assert abs(float((first * other).sum()) / 100) < 0.1, "independent signs agree as often as not"


def test_gaussian_entries_have_the_moments_of_a_normal() -> None:
    entries = Projector("gaussian", 50, 0).matrix("layer", 0, 8000).astype(np.float64) * 50**0.5
    assert abs(entries.mean()) < 0.01
    assert entries.var() == pytest.approx(1.0, abs=0.01)
    assert (entries**3).mean() == pytest.approx(0.0, abs=0.03)
    assert (entries**4).mean() == pytest.approx(3.0, abs=0.06)


def test_rademacher_entries_are_signs_and_balanced() -> None:
    entries = Projector("rademacher", 50, 0).matrix("layer", 0, 8000) * 50**0.5
    np.testing.assert_allclose(np.abs(entries), 1.0, rtol=1e-6)
    assert abs(entries.mean()) < 0.01


def test_none_keeps_every_coordinate() -> None:
    projector, gradients = Projector("none", 400, 0), normal(2, 30)
    torch.testing.assert_close(projector.project("layer", gradients), gradients)
    torch.testing.assert_close(projector.expand("layer", 30, gradients[0]), gradients[0])


def test_the_matrix_is_never_held_whole() -> None:
    n_coordinates, proj_dim = 4_000_000, 400  # whole: 6.4 GB
    gradients = torch.ones(1, n_coordinates)
    projector = Projector("rademacher", proj_dim, 0)
    with Meter("before") as before:
        time.sleep(0.05)
    with Meter("project") as meter:
        projected = projector.project("layer", gradients)
    assert projected.shape == (1, proj_dim)
    assert meter.record.peak_memory_bytes - before.record.peak_memory_bytes < 200e6
