"""Folding is exact at full rank, best below it, and never forms a matrix of the module's own size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ensemblelora.errors import ModelError, StoreError, TrainingError, UsageError
from ensemblelora.folding import list_averaged, rank_of, stack_adapters, truncate

SHAPES = {"layers.0.q": (7, 5), "layers.0.v": (3, 12), "layers.1.q": (7, 5)}  # (out, in)
SCALE = 2.0


def make_state(seed: int, r: int = 2, *, shapes=SHAPES, frozen: bool = False, head: bool = False):
    """Random factors; frozen ones share A among all seeds."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(99) if frozen else generator
    state = {}
    for module, (n_out, n_in) in shapes.items():
        state[f"{module}.lora_A.weight"] = torch.randn(r, n_in, generator=shared)
        state[f"{module}.lora_B.weight"] = torch.randn(n_out, r, generator=generator)
    if head:
        state["score.weight"] = torch.randn(4, 5, generator=generator)
    return state


def without_change(state):
    return {key: torch.zeros_like(tensor) if ".lora_B." in key else tensor for key, tensor in state.items()}


def dense(state, module, scale=1.0):
    """The slow twin: the module's whole change (out, in)."""
    a, b = (state[f"{module}.lora_{part}.weight"].double().numpy() for part in "AB")
    return scale * b @ a


def assert_is_sum(folded, states, weights, scale=SCALE):
    for module in SHAPES:
        expected = sum(w * dense(state, module, scale) for state, w in zip(states, weights, strict=True))
        np.testing.assert_allclose(dense(folded, module), expected, atol=1e-5)


def test_a_stack_is_the_weighted_sum_of_the_changes_and_ranks_add_up():
    states, weights = [make_state(1), make_state(2, r=3), make_state(3, r=1)], [0.7, -0.4, 1.5]
    folded = stack_adapters(states, weights, SCALE)
    assert_is_sum(folded, states, weights)
    assert rank_of(folded) == 6 and folded.keys() == states[0].keys()
    assert all(tensor.dtype == torch.float32 for tensor in folded.values())


def test_the_order_of_the_adapters_does_not_matter():
    states, weights = [make_state(seed) for seed in range(4)], [0.4, 0.3, 0.2, 0.1]
    turned = stack_adapters(states[::-1], weights[::-1], SCALE)
    assert_is_sum(turned, states, weights)
    assert rank_of(turned) == rank_of(stack_adapters(states, weights, SCALE))


def test_adapters_that_share_a_do_not_grow_in_rank():
    states, weights = [make_state(seed, frozen=True) for seed in range(4)], [0.4, 0.3, 0.2, -0.1]
    folded = stack_adapters(states, weights, SCALE)
    assert_is_sum(folded, states, weights)
    assert rank_of(folded) == 2
    torch.testing.assert_close(folded["layers.0.q.lora_A.weight"], states[0]["layers.0.q.lora_A.weight"])
    two = [*states, make_state(5)]
    assert rank_of(stack_adapters(two, [*weights, 1.0], SCALE)) == 4


def test_an_adapter_without_change_adds_nothing():
    start = without_change(make_state(0))
    states, weights = [make_state(1), start], [1.0, -0.3]
    folded = stack_adapters(states, weights, SCALE)
    assert_is_sum(folded, states, weights)
    assert rank_of(folded) == 2
    nothing = stack_adapters([start, start], [0.5, 0.5], SCALE)
    assert rank_of(nothing) == 2 and not any(dense(nothing, module).any() for module in SHAPES)


def test_modules_of_different_ranks_are_filled_up_with_zeros():
    first, second = make_state(1), make_state(2)
    second["layers.0.v.lora_B.weight"].zero_()
    folded = stack_adapters([first, second], [1.0, 1.0], SCALE)
    assert_is_sum(folded, [first, second], [1.0, 1.0])
    assert {len(folded[f"{module}.lora_A.weight"]) for module in SHAPES} == {4}
    assert not folded["layers.0.v.lora_B.weight"][:, 2:].any()


def test_a_head_is_the_weighted_mean():
    states, weights = [make_state(seed, head=True) for seed in (1, 2, 3)], [0.8, 0.5, -0.3]
    folded = stack_adapters(states, weights, SCALE)
    assert list_averaged(folded) == ["score.weight"]
    expected = sum(w * state["score.weight"] for state, w in zip(states, weights, strict=True))
    torch.testing.assert_close(folded["score.weight"], expected)
    assert truncate(folded, 1).state["score.weight"].equal(folded["score.weight"])


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6, 9])
def test_a_truncation_is_the_best_of_its_rank(rank):
    stack = stack_adapters([make_state(seed) for seed in (1, 2, 3)], [0.7, -0.4, 1.5], SCALE)
    cut = truncate(stack, rank)
    lost, whole = 0.0, 0.0
    for module in SHAPES:
        left, singular, right = np.linalg.svd(dense(stack, module), full_matrices=False)
        best = (left[:, :rank] * singular[:rank]) @ right[:rank]
        np.testing.assert_allclose(dense(cut.state, module), best, atol=1e-5)
        tail = float((singular[rank:] ** 2).sum())
        assert cut.residuals[module] == pytest.approx((tail / (singular**2).sum()) ** 0.5, abs=1e-6)
        lost, whole = lost + tail, whole + float((singular**2).sum())
    assert cut.residual == pytest.approx((lost / whole) ** 0.5, abs=1e-6)
    assert rank_of(cut.state) == min(rank, 5), "no module has more than five directions"
    assert cut.state.keys() == stack.keys()


def test_at_full_rank_nothing_is_lost():
    stack = stack_adapters([make_state(1), make_state(2)], [0.6, 0.4], SCALE)
    for rank in (4, 100):
        cut = truncate(stack, rank)
        assert cut.residual == 0 and rank_of(cut.state) == 4
        for module in SHAPES:
            np.testing.assert_allclose(dense(cut.state, module), dense(stack, module), atol=1e-5)


def test_one_adapter_of_rank_one_is_its_own_truncation():
    state = make_state(1, r=1)
    cut = truncate(stack_adapters([state], [1.0], SCALE), 1)
    assert cut.residual == 0
    assert_is_sum(cut.state, [state], [1.0])


def test_the_new_factors_share_the_change_evenly():
    cut = truncate(stack_adapters([make_state(1), make_state(2)], [100.0, 100.0], SCALE), 2)
    for module in SHAPES:
        a, b = (cut.state[f"{module}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_nothing_of_nothing_is_lost():
    cut = truncate(stack_adapters([without_change(make_state(1))], [1.0], SCALE), 1)
    assert cut.residual == 0 and set(cut.residuals.values()) == {0.0}


def test_modules_too_large_for_a_dense_change_are_folded():
    shapes = {"embed": (60_000, 50_000)}  # 24 GB as one float64 matrix
    states = [make_state(seed, r=2, shapes=shapes) for seed in (1, 2)]
    cut = truncate(stack_adapters(states, [0.5, 0.5], 1.0), 2)
    assert rank_of(cut.state) == 2 and 0.5 < cut.residual < 0.9  # of four alike directions, two are kept


def test_what_can_not_be_folded_is_refused():
    state = make_state(1)
    with pytest.raises(StoreError, match="2 adapters and 1 weights"):
        stack_adapters([state, state], [1.0], SCALE)
    with pytest.raises(StoreError, match="0 adapters"):
        stack_adapters([], [], SCALE)
    fewer = {key: tensor for key, tensor in make_state(2).items() if "layers.1" not in key}
    with pytest.raises(StoreError, match=r"adapter 1: other modules than adapter 0, such as 'layers\.1\.q\.lora_A"):
        stack_adapters([state, fewer], [0.5, 0.5], SCALE)
    with pytest.raises(ModelError, match=r"not 'layers\.0\.q\.lora_magnitude_vector'"):
        stack_adapters([state | {"layers.0.q.lora_magnitude_vector": torch.ones(7)}], [1.0], SCALE)
    with pytest.raises(TrainingError, match="is not finite: it diverged"):
        stack_adapters([state | {"layers.0.q.lora_B.weight": torch.full((7, 2), torch.nan)}], [1.0], SCALE)
    with pytest.raises(UsageError, match="rank 0: expected"):
        truncate(state, 0)
