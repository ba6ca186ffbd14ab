from __future__ import annotations

import numpy as np
import pytest
import torch

from ensemblelora.adapters import THETA0, adapter_state, attach
from ensemblelora.analysis.similarity import average_states, measure_similarity
from ensemblelora.analysis.similarity_study import SimilarityOptions, draw_subsets, summarise
from ensemblelora.config import AdapterConfig
from ensemblelora.errors import ModelError, StoreError, UsageError
from tests.tiny import make_base

SIZES = {"layer.q": (12, 10), "layer.v": (6, 10)}  # (n_out, n_in)
RANK = 3


def make_lora(seed: int, *, rank: int = RANK, is_start: bool = False):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, (n_out, n_in) in SIZES.items():
        state[f"{name}.lora_A.weight"] = torch.randn(rank, n_in, generator=generator)
        b = torch.randn(n_out, rank, generator=generator)
        state[f"{name}.lora_B.weight"] = torch.zeros_like(b) if is_start else b
    return state


START = make_lora(99, is_start=True)


def slow_bases(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    left, values, right = np.linalg.svd(matrix)
    kept = min(rank, int((values > 1e-6 * values[0]).sum()))
    return left[:, :kept], right[:kept].T


def changes(state) -> dict[str, np.ndarray]:
    return {
        name: (state[f"{name}.lora_B.weight"].double() @ state[f"{name}.lora_A.weight"].double()).numpy()
        for name in SIZES
    }


def slow_similarity(one, other, rank):
    """The formula on dense changes, module by module."""
    lefts, rights = [], []
    for name in SIZES:
        (u, v), (u2, v2) = (slow_bases(changes(state)[name], rank) for state in (one, other))
        lefts.append(np.square(u.T @ u2).sum() / rank)
        rights.append(np.square(v.T @ v2).sum() / rank)
    flat = [np.concatenate([m.ravel() for m in changes(state).values()]) for state in (one, other)]
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    return np.mean(lefts), np.mean(rights), cosine


@pytest.mark.parametrize("rank", [1, 2, RANK])
def test_subspaces_and_directions_are_those_of_the_whole_changes(rank):
    one, other = make_lora(0), make_lora(1)
    found = measure_similarity(one, other, START, rank=rank)
    left, right, cosine = slow_similarity(one, other, rank)
    assert (found.left, found.right, found.cosine) == pytest.approx((left, right, cosine), abs=1e-6)
    assert found.overlap == pytest.approx((left + right) / 2)
    assert found.n_modules == len(SIZES)


def test_an_adapter_is_like_itself_whatever_its_length_sign_and_factors():
    one = make_lora(0)
    mixer = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(5))
    turned = {
        key: -2.0 * tensor @ torch.linalg.inv(mixer) if "lora_B" in key else mixer @ tensor
        for key, tensor in one.items()
    }
    found = measure_similarity(one, turned, START, rank=RANK)
    assert (found.overlap, found.left, found.right) == pytest.approx((1, 1, 1), abs=1e-5)
    assert found.cosine == pytest.approx(-1, abs=1e-5)


def test_similarity_is_symmetric():
    one, other = make_lora(0), make_lora(1)
    there, back = (measure_similarity(*pair, START, rank=2) for pair in ((one, other), (other, one)))
    assert (there.overlap, there.cosine) == pytest.approx((back.overlap, back.cosine))


def test_adapters_with_the_same_a_are_alike_in_what_they_read():
    one, other = make_lora(0), make_lora(1)
    same = {key: one[key] if "lora_A" in key else tensor for key, tensor in other.items()}
    found = measure_similarity(one, same, START, rank=RANK)
    assert found.right == pytest.approx(1, abs=1e-5)
    assert found.left < 0.9


def test_random_subspaces_overlap_by_chance_as_stated():
    found = [measure_similarity(make_lora(i), make_lora(1000 + i), START, rank=RANK) for i in range(200)]
    assert np.mean([one.overlap for one in found]) == pytest.approx(found[0].chance, abs=0.02)
    assert found[0].chance == pytest.approx(np.mean([(3 / n_out + 3 / n_in) / 2 for n_out, n_in in SIZES.values()]))


def test_averages_are_exact_and_compared_without_a_dense_matrix():
    states = [make_lora(seed) for seed in range(4)]
    average = average_states(states)
    dense = {name: np.mean([changes(state)[name] for state in states], axis=0) for name in SIZES}
    for name in SIZES:
        np.testing.assert_allclose(changes(average)[name], dense[name], atol=1e-5)
    found = measure_similarity(average, states[0], START, rank=RANK)
    lefts = []
    for name in SIZES:
        (u, _), (u2, _) = (slow_bases(matrix, RANK) for matrix in (dense[name], changes(states[0])[name]))
        lefts.append(np.square(u.T @ u2).sum() / RANK)
    assert found.left == pytest.approx(np.mean(lefts), abs=1e-5)
    flat = [np.concatenate([m[name].ravel() for name in SIZES]) for m in (dense, changes(states[0]))]
    assert found.cosine == pytest.approx(flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]))


def test_bottlenecks_are_compared_by_what_they_read_and_write():
    adapted = attach(make_base(), AdapterConfig(method="bottleneck", reduction=8), seed=0)
    start = adapter_state(adapted, THETA0)
    generator = torch.Generator().manual_seed(0)
    one, other = ({k: t + torch.randn(t.shape, generator=generator) for k, t in start.items()} for _ in range(2))
    found = measure_similarity(one, other, start, rank=4)
    ups = sorted(key for key in start if key.endswith("bottleneck_up.weight"))
    lefts = []
    for key in ups:
        (u, _), (u2, _) = (slow_bases(state[key].double().numpy(), 4) for state in (one, other))
        lefts.append(np.square(u.T @ u2).sum() / 4)
    assert found.n_modules == len(ups) > 0
    assert found.left == pytest.approx(np.mean(lefts), abs=1e-5)
    assert found.chance == pytest.approx(4 / 32)
    moved = [torch.cat([(state[k] - start[k]).flatten() for k in start]).double() for state in (one, other)]
    assert found.cosine == pytest.approx(float(moved[0] @ moved[1] / moved[0].norm() / moved[1].norm()), abs=1e-5)
    mean = average_states([one, other])
    torch.testing.assert_close(mean[ups[0]], (one[ups[0]] + other[ups[0]]) / 2)


def test_what_can_not_be_compared_is_refused():
    with pytest.raises(StoreError, match="changes nothing"):
        measure_similarity(make_lora(0), START, START, rank=RANK)
    with pytest.raises(ModelError, match="LoRA and bottleneck"):
        measure_similarity({"x.weight": torch.ones(2)}, {"x.weight": torch.ones(2)}, {}, rank=1)
    other = {key.replace("layer.q", "layer.k"): t for key, t in make_lora(1).items()}
    with pytest.raises(StoreError, match="different modules"):
        measure_similarity(make_lora(0), other, START, rank=RANK)
    with pytest.raises(StoreError, match="0 adapters to average"):
        average_states([])


def test_subsets_are_distinct_of_every_size_and_more_only_add_to_them():
    few, more = (draw_subsets(6, SimilarityOptions(sizes=(2, 4, 6, 9), n_subsets=n), seed=0) for n in (2, 5))
    assert [len(subset) for subset in few] == [2, 2, 4, 4, 6]
    assert set(few) < set(more) and len(set(more)) == len(more) == 11
    assert draw_subsets(6, SimilarityOptions(), seed=1) != draw_subsets(6, SimilarityOptions(), seed=0)
    with pytest.raises(UsageError, match=r"sizes \[8\]: expected some from 2 to 6"):
        draw_subsets(6, SimilarityOptions(sizes=(8,)), seed=0)


def test_similarity_that_falls_with_size_is_seen_to_fall():
    cells = [
        {"base": "lora", "seed": seed, "kind": "together", "size": size, "subset": [size, k], "chance": 0.1,
         **dict.fromkeys(("overlap", "left", "right", "cosine"), 1 / size + 0.001 * k)}
        for seed in (0, 1) for size in (2, 4, 6) for k in range(3)
    ]  # fmt: skip
    found = summarise(cells, n_bootstrap=500, confidence=0.95, seed=0)
    means = [record["overlap"]["value"] for record in found["by_size"]]
    assert [record["size"] for record in found["by_size"]] == [2, 4, 6]
    assert means == pytest.approx([1 / size + 0.001 for size in (2, 4, 6)])
    assert all(r["overlap"]["low"] <= r["overlap"]["value"] <= r["overlap"]["high"] for r in found["by_size"])
    trend = next(t for t in found["trends"] if t["field"] == "overlap")
    assert trend["spearman"]["high"] < 0
