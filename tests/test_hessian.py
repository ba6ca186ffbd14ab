from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ensemblelora.analysis.hessian import (
    compute_ggn_traces,
    count_coordinates,
    draw_signs,
    evaluate_quadratic,
    expand,
    find_largest_eigenvalue,
    multiply,
)
from ensemblelora.errors import DataError, SolverError

SHAPES = ((4, 3), (4,), (3, 4))  # a net of 3 inputs, 4 units, 3 classes
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)
LABEL = 1
INPUT = torch.tensor([0.4, -1.0, 0.7], dtype=torch.float64)


def run_net(tensors) -> Tensor:
    first, bias, second = tensors
    return second @ torch.tanh(first @ INPUT + bias)


def make_member(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [draw.requires_grad_(True) for draw in draws]


def expand_ensemble(seeds=(0,), weights=(1.0,)):
    members = [make_member(seed) for seed in seeds]
    scores = sum(weight * run_net(member) for weight, member in zip(weights, members, strict=True))
    return expand(scores, LABEL, members), members


def slow_hessian(members, weights) -> np.ndarray:
    """All second derivatives of the loss, one function of one long vector."""
    start = torch.cat([t.detach().flatten() for member in members for t in member])

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([int(np.prod(shape)) for _ in members for shape in SHAPES])
        shaped = [piece.view(shape) for piece, shape in zip(pieces, SHAPES * len(members), strict=True)]
        own = [shaped[3 * m : 3 * m + 3] for m in range(len(members))]
        scores = sum(weight * run_net(member) for weight, member in zip(weights, own, strict=True))
        return -torch.log_softmax(scores, dim=0)[LABEL]

    return torch.autograd.functional.hessian(loss, start).numpy()


ENSEMBLES = [((0,), (1.0,)), ((0, 1), (0.5, 0.5)), ((2, 0, 1), (0.6, 0.1, 0.3))]


@pytest.mark.parametrize(("seeds", "weights"), ENSEMBLES)
def test_products_are_those_of_all_second_derivatives(seeds, weights):
    expansion, members = expand_ensemble(seeds, weights)
    exact = slow_hessian(members, weights)
    vector = np.random.default_rng(0).standard_normal(len(exact))
    np.testing.assert_allclose(multiply(expansion, vector), exact @ vector, rtol=1e-8, atol=1e-10)
    assert count_coordinates(expansion) == len(exact) == SIZE * len(seeds)


@pytest.mark.parametrize(("seeds", "weights"), ENSEMBLES)
def test_traces_over_unit_vectors_are_exact_and_add_up_by_member(seeds, weights):
    expansion, members = expand_ensemble(seeds, weights)
    exact = slow_hessian(members, weights)
    unit = np.eye(len(exact))
    vectors = [piece for piece in _split(expansion, unit)]
    forms = evaluate_quadratic(expansion, vectors)
    ggn = compute_ggn_traces(expansion)
    blocks = np.diag(exact).reshape(len(seeds), SIZE).sum(axis=1)
    np.testing.assert_allclose(ggn + forms.rest.sum(axis=0), blocks, rtol=1e-8)
    np.testing.assert_allclose(forms.ggn_own.sum(axis=0), ggn, rtol=1e-8)
    np.testing.assert_allclose(forms.ggn + forms.rest.sum(axis=1), np.diag(exact), rtol=1e-7, atol=1e-10)


def _split(expansion, rows: np.ndarray) -> list[Tensor]:
    pieces = torch.from_numpy(rows).split([tensor.numel() for tensor in expansion.tensors], dim=1)
    return [piece.reshape(-1, *t.shape) for piece, t in zip(pieces, expansion.tensors, strict=True)]


def test_the_loss_is_the_cross_entropy_of_the_combined_scores():
    expansion, (one, two) = expand_ensemble((0, 1), (0.25, 0.75))
    scores = (0.25 * run_net(one) + 0.75 * run_net(two)).detach()
    assert expansion.loss == pytest.approx(float(-torch.log_softmax(scores, 0)[LABEL]))


@pytest.mark.parametrize("n_members", [2, 4, 8])
def test_equal_members_divide_the_ggn_trace_by_their_number_and_one_of_them_shows_its_square(n_members):
    alone, _ = expand_ensemble((3,), (1.0,))
    copies, _ = expand_ensemble((3,) * n_members, (1 / n_members,) * n_members)
    one, several = compute_ggn_traces(alone), compute_ggn_traces(copies)
    assert several.sum() == pytest.approx(one.sum() / n_members)
    assert several[0] == pytest.approx(one.sum() / n_members**2)
    # The rest is weighted once, not twice: the sum over equal members is one's own.
    first, second = (evaluate_quadratic(e, _split(e, np.eye(count_coordinates(e)))).rest for e in (alone, copies))
    assert second.sum() == pytest.approx(first.sum())


def test_estimates_are_unbiased_and_vary_as_much_as_off_diagonal_entries_say():
    expansion, members = expand_ensemble((0, 1), (0.5, 0.5))
    exact = slow_hessian(members, (0.5, 0.5))
    forms = [
        evaluate_quadratic(expansion, vectors)
        for vectors in draw_signs(expansion.tensors, 4000, 500, seed=0, names=("test",))
    ]
    rest = np.concatenate([form.rest.sum(axis=1) for form in forms])
    plain = rest + np.concatenate([form.ggn for form in forms])
    jacobian = np.concatenate([slopes.flatten(1).numpy() for slopes in expansion.slopes], axis=1)
    ggn = jacobian.T @ expansion.curvature @ jacobian
    for matrix, values in ((exact - ggn, rest), (exact, plain)):
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert abs(values.mean() - np.trace(matrix)) < 3 * error
        off_diagonal = np.square(matrix).sum() - np.square(np.diag(matrix)).sum()
        assert values.var() == pytest.approx(2 * off_diagonal, rel=0.1)
    assert compute_ggn_traces(expansion).sum() == pytest.approx(np.trace(ggn))


def test_signs_do_not_depend_on_portions_and_are_plus_and_minus_one():
    like = [torch.zeros(3, 2), torch.zeros(5)]

    def draw(n, at_once, names=("a",)):
        portions = list(draw_signs(like, n, at_once, seed=1, names=names))
        return [torch.cat(parts) for parts in zip(*portions, strict=True)]

    together, apart = draw(7, 7), draw(7, 2)
    assert [t.shape for t in together] == [(7, 3, 2), (7, 5)]
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    assert all(torch.equal(a[:4], b) for a, b in zip(together, draw(4, 4), strict=True))
    assert set(torch.cat([t.flatten() for t in together]).tolist()) == {-1.0, 1.0}
    assert not torch.equal(together[0], draw(7, 7, names=("b",))[0])
    many = draw(2000, 500)[1]
    assert (many.T @ many / 2000 - torch.eye(5)).abs().max() < 0.1


@pytest.mark.parametrize(("seeds", "weights"), ENSEMBLES)
def test_the_largest_eigenvalue_is_that_of_the_whole_matrix(seeds, weights):
    expansion, members = expand_ensemble(seeds, weights)
    value, n_products = find_largest_eigenvalue(expansion, seed=0)
    assert value == pytest.approx(np.linalg.eigvalsh(slow_hessian(members, weights))[-1], rel=5e-3)
    assert n_products > 1


def test_an_eigenvalue_that_is_not_found_is_an_error(monkeypatch):
    monkeypatch.setattr("ensemblelora.analysis.hessian._MOST_RESTARTS", 1)
    monkeypatch.setattr("ensemblelora.analysis.hessian._KRYLOV", 3)
    monkeypatch.setattr("ensemblelora.analysis.hessian._TOLERANCE", 1e-14)
    expansion, _ = expand_ensemble((0, 1), (0.5, 0.5))
    with pytest.raises(SolverError, match=r"largest eigenvalue of 56 numbers: not found .* in \d+ products"):
        find_largest_eigenvalue(expansion, seed=0)


def test_scores_that_are_linear_have_no_second_term():
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    expansion = expand(weight @ INPUT, LABEL, [[weight]])
    forms = evaluate_quadratic(expansion, _split(expansion, np.eye(9)))
    assert not forms.rest.any()
    p = torch.softmax((weight @ INPUT).detach(), 0)
    assert compute_ggn_traces(expansion).sum() == pytest.approx(float((p * (1 - p)).sum() * INPUT @ INPUT))
    exact = np.kron((torch.diag(p) - torch.outer(p, p)).numpy(), np.outer(INPUT, INPUT))
    vector = np.arange(9.0)
    np.testing.assert_allclose(multiply(expansion, vector), exact @ vector, atol=1e-12)


def test_a_member_that_does_not_matter_has_no_curvature():
    expansion, _ = expand_ensemble((0, 1), (1.0, 0.0))
    alone, _ = expand_ensemble((0,), (1.0,))
    assert compute_ggn_traces(expansion)[1] == 0
    assert compute_ggn_traces(expansion)[0] == pytest.approx(compute_ggn_traces(alone)[0])


def test_one_score_is_no_class():
    weight = torch.ones(1, 3, requires_grad=True)
    with pytest.raises(DataError, match="1 label score"):
        expand(weight @ torch.ones(3), 0, [[weight]])
