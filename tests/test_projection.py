"""Random projections: unbiased, the same bits however they are cut, never held whole, and equal to their matrix."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch

from ensemblelora.accounting.meter import Meter
from ensemblelora.gradients import sketch
from ensemblelora.gradients.entries import draw_nonzeros
from ensemblelora.gradients.projection import Projector, choose_factors

DENSE = ("rademacher", "gaussian")
KINDS = (*DENSE, "sjlt", "kronecker")
SHAPE = (60, 5)
THOUSANDTHS = {
    "rademacher": [[-354, -354, -354, -354, -354, 354, 354, -354], [354, 354, 354, -354, 354, -354, 354, -354]],
    "gaussian": [[141, -383, -14, -375, -677, 449, -119, 34], [138, 332, -784, 26, 153, 174, -555, 305]],
    "sjlt": [[-500, 0, 0, -500, -500, 0, 500, 0], [0, 500, -500, 0, 0, 500, 500, 0]],
    "kronecker": [[-204, -204, -612, -204, 612, -204, 204, 204], [204, -204, 612, 204, 204, 612, -204, -204]],
}
"""rows 33 and 34 of the matrix of part "layer", 40 x 6, of each kind: they must never change"""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors_of(projector: Projector, parts: dict[str, torch.Tensor]) -> np.ndarray:
    """Errors of all inner products of distinct gradients, over the products of their norms."""
    projected = sum(projector.project(part, gradients) for part, gradients in parts.items()).double().numpy()
    exact = torch.cat([gradients.flatten(1) for gradients in parts.values()], dim=1).double().numpy()
    gram = exact @ exact.T
    norms = np.sqrt(np.diag(gram))
    errors = (projected @ projected.T - gram) / np.outer(norms, norms)
    return errors[np.triu_indices(len(exact), k=1)]


def rms(errors: np.ndarray) -> float:
    return float(np.sqrt((errors**2).mean()))


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [SHAPE, (5, 60), (20, 20), (300,)])
def test_inner_products_are_unbiased_over_seeds(kind: str, shape: tuple[int, ...]) -> None:
    gradients = normal(2, *shape)
    gradients[1] += gradients[0]
    true = float((gradients[0] * gradients[1]).sum())
    products = []
    for seed in range(200):
        a, b = Projector(kind, 16, seed).project("layer", gradients)
        products.append(float(a @ b))
    standard_error = np.std(products) / 200**0.5
    assert abs(np.mean(products) - true) < 4 * standard_error
    assert standard_error < 0.06 * float(gradients[0].norm() * gradients[1].norm()), "the mean says something"


@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
def test_a_gradient_of_one_coordinate_keeps_its_length_exactly(kind: str) -> None:
    """The hardest case for a sparse matrix: nothing else could make up for what it drops."""
    one = torch.zeros(1, *SHAPE)
    one[0, 7, 3] = 2.0
    for seed in range(20):
        assert float(Projector(kind, 16, seed).project("layer", one).norm()) == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("kind", [*DENSE, "sjlt"])
def test_error_of_inner_products_falls_as_one_over_the_root_of_the_dimension(kind: str) -> None:
    gradients = {"layer": normal(60, 1000, 5, seed=1)}
    for proj_dim in (100, 400, 1600):
        assert rms(errors_of(Projector(kind, proj_dim, 3), gradients)) == pytest.approx(proj_dim**-0.5, rel=0.15)


@pytest.mark.parametrize("shape", [(1000, 5), (5, 1000), (200, 200), (3000,)])
def test_error_of_kronecker_is_near_that_of_a_dense_matrix(shape: tuple[int, ...]) -> None:
    for proj_dim in (100, 400):
        error = rms(errors_of(Projector("kronecker", proj_dim, 3), {"layer": normal(60, *shape, seed=1)}))
        assert 0.85 < error * proj_dim**0.5 < 1.4


def test_error_of_kronecker_stays_below_its_bound_in_the_worst_case_and_falls_with_more_parts() -> None:
    """Parallel gradients of rank one in a lone part are the worst case; the factors of many parts are independent."""
    proj_dim, n_seeds, shape = 100, 60, (150, 8)
    k_out, k_in = choose_factors(*shape, proj_dim)
    assert (k_out, k_in) == (25, 8)
    worst = torch.outer(normal(shape[0], seed=2), normal(shape[1], seed=3))
    gradients = torch.stack([worst, 2 * worst])
    found = {}
    for n_parts in (1, 12):
        parts = {f"layer{i}": gradients for i in range(n_parts)}
        found[n_parts] = rms(np.array([errors_of(Projector("kronecker", proj_dim, s), parts) for s in range(n_seeds)]))
    bound = ((1 + 2 / k_out) * (1 + 2 / proj_dim) - 1) ** 0.5
    assert 0.7 * bound < found[1] < 1.25 * bound
    assert found[12] < 1.35 * (2 / proj_dim) ** 0.5, "for parallel gradients, 2/d is a dense matrix's variance"


def test_factors_leave_small_sides_alone_and_shrink_large_ones() -> None:
    assert choose_factors(576, 8, 400) == (100, 8)
    assert choose_factors(8, 576, 400) == (8, 100)
    assert choose_factors(100, 8, 400) == (100, 8), "small enough already"
    assert choose_factors(5000, 1, 400) == (800, 1), "a bias"
    assert choose_factors(4096, 4096, 400) == (29, 29)
    for n_out, n_in, proj_dim in [(7, 300, 3), (300, 7, 1), (64, 64, 16), (1, 1, 1), (2048, 33, 400), (9000, 2, 400)]:
        k_out, k_in = choose_factors(n_out, n_in, proj_dim)
        assert 1 <= k_out <= n_out and 1 <= k_in <= n_in
        assert min(2 * proj_dim, n_out * n_in) <= k_out * k_in <= 4 * proj_dim


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("proj_dim", [3, 7, 64, 130])
@pytest.mark.parametrize("shape", [SHAPE, (20, 20), (150,)])
def test_entries_are_the_same_bits_for_any_range_of_rows_in_any_order(
    kind: str, proj_dim: int, shape: tuple[int, ...]
) -> None:
    size = math.prod(shape)
    whole = Projector(kind, proj_dim, 5).matrix("layer", shape)
    assert whole.shape == (size, proj_dim) and whole.dtype == np.float32
    cuts = [0, 1, 2, 63, 64, 149, size]
    projector = Projector(kind, proj_dim, 5)
    projector.matrix("another", shape)
    with torch_threads(2):
        pieces = {
            start: projector.matrix("layer", shape, start, stop) for start, stop in reversed(list(pairwise(cuts)))
        }
    np.testing.assert_array_equal(np.concatenate([pieces[start] for start in cuts[:-1]]), whole)


def test_entries_are_the_same_on_every_machine() -> None:
    found = {
        kind: (Projector(kind, 8, 1).matrix("layer", (40, 6), 33, 35) * 1000).round().astype(int).tolist()
        for kind in KINDS
    }
    assert found == THOUSANDTHS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(100, 5), (5, 100), (22, 22), (500,)])
@pytest.mark.parametrize("proj_dim", [1, 33, 700])
def test_projecting_is_a_product_with_the_matrix_whatever_the_block_size(
    kind: str, shape: tuple[int, ...], proj_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    projector, gradients, weights = Projector(kind, proj_dim, 5), normal(4, *shape), normal(proj_dim, seed=1)
    matrix = projector.matrix("layer", shape)
    for entries in (33, 33 * 7, 2**20):
        monkeypatch.setattr(sketch, "_BLOCK_ENTRIES", entries)
        projected, step = projector.project("layer", gradients), projector.expand("layer", shape, weights)
        np.testing.assert_allclose(projected, gradients.flatten(1).numpy() @ matrix, atol=3e-4)
        assert step.shape == shape and step.dtype == torch.float32
        np.testing.assert_allclose(step.flatten(), matrix @ weights.numpy(), atol=3e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_projects_the_same_alone_and_in_a_batch_on_any_number_of_threads(kind: str) -> None:
    projector, gradients = Projector(kind, 48, 2), normal(70, 90, 6)
    together = projector.project("layer", gradients)
    for e in (0, 69):
        torch.testing.assert_close(
            projector.project("layer", gradients[e : e + 1])[0], together[e], atol=2e-5, rtol=1e-4
        )
    with torch_threads(2):
        torch.testing.assert_close(projector.project("layer", gradients), together, atol=2e-5, rtol=1e-4)
    assert torch.equal(projector.project("layer", gradients), together), "the same call gives the same bits"
    assert projector.project("layer", gradients[:0]).shape == (0, 48)


def test_sparse_rows_have_few_signs_in_distinct_columns_anywhere() -> None:
    for width, n_nonzeros in ((400, 4), (30, 4), (8, 4), (4, 4), (3, 3), (1, 1)):
        columns, signs = draw_nonzeros(9, width, 0, 4000)
        assert columns.shape == signs.shape == (4000, n_nonzeros)
        assert (np.diff(columns, axis=1) > 0).all() and columns.min() >= 0 and columns.max() < width
        assert set(np.unique(signs)) == {-1.0, 1.0} and abs(signs.mean()) < 0.06
        matrix = Projector("sjlt", width, 0).matrix("layer", (4000,))
        np.testing.assert_allclose((matrix**2).sum(1), 1.0, rtol=1e-6)
        filled = (matrix != 0).sum(0) / 4000
        np.testing.assert_allclose(filled, n_nonzeros / width, rtol=0.15, atol=0.01)


@pytest.mark.parametrize("width", [2, 30])
def test_on_accelerators_the_sparse_product_is_a_dense_one(width: int) -> None:
    gradients = normal(5, 200)
    columns, signs = draw_nonzeros(3, width, 0, 200)
    sparse, filled = (
        multiply(gradients, columns, signs, width) for multiply in (sketch._multiply_sparse, sketch._multiply_filled)
    )
    torch.testing.assert_close(filled, sparse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_seeds_have_matrices_of_their_own(kind: str) -> None:
    first = Projector(kind, 64, 0).matrix("a", SHAPE)
    for other in (Projector(kind, 64, 0).matrix("b", SHAPE), Projector(kind, 64, 1).matrix("a", SHAPE)):
        assert abs(float((first * other).sum())) / len(first) < 0.1, "independent signs agree as often as not"


def test_gaussian_entries_have_the_moments_of_a_normal() -> None:
    entries = Projector("gaussian", 50, 0).matrix("layer", (8000,)).astype(np.float64) * 50**0.5
    assert abs(entries.mean()) < 0.01
    assert entries.var() == pytest.approx(1.0, abs=0.01)
    assert (entries**3).mean() == pytest.approx(0.0, abs=0.03)
    assert (entries**4).mean() == pytest.approx(3.0, abs=0.06)


def test_rademacher_entries_are_signs_and_balanced() -> None:
    entries = Projector("rademacher", 50, 0).matrix("layer", (8000,)) * 50**0.5
    np.testing.assert_allclose(np.abs(entries), 1.0, rtol=1e-6)
    assert abs(entries.mean()) < 0.01


def test_none_keeps_every_coordinate() -> None:
    projector, gradients = Projector("none", 400, 0), normal(2, 5, 6)
    torch.testing.assert_close(projector.project("layer", gradients), gradients.flatten(1))
    torch.testing.assert_close(projector.expand("layer", (5, 6), gradients[0].flatten()), gradients[0])
    np.testing.assert_array_equal(projector.matrix("layer", (5, 6), 3, 9), np.eye(30, dtype=np.float32)[3:9])


@pytest.mark.parametrize("kind", KINDS)
def test_neither_the_matrix_nor_a_copy_of_the_gradients_is_ever_held(kind: str) -> None:
    """Whole, a dense matrix takes 1.6 GB, the nonzeros of a sparse one 32 MB, the gradients 64 MB."""
    shape = (62_500 if kind != "gaussian" else 1_000, 16)  # normals are dear to draw
    gradients, projector = torch.ones(16, *shape), Projector(kind, 400, 0)
    with Meter("before") as before:
        time.sleep(0.05)
    with Meter("project") as meter:
        projected = projector.project("layer", gradients)
    assert projected.shape == (16, 400)
    assert meter.record.peak_memory_bytes - before.record.peak_memory_bytes < 40e6
