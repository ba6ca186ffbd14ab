"""One adapter from many clients', held against dense matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemblelora.errors import TrainingError
from ensemblelora.federation.adapters import Template, Vector
from ensemblelora.federation.aggregation import aggregate

SCALE = 2.0
SIZES = {"block.q": (5, 7), "block.v": (6, 4)}
"""out and in of two modules"""


def make_template(rank: int, seed: int = 0) -> Template:
    rng, shapes, parts = np.random.default_rng(seed), {}, []
    for module, (n_out, n_in) in SIZES.items():
        shapes[f"{module}.lora_A.weight"], shapes[f"{module}.lora_B.weight"] = (rank, n_in), (n_out, rank)
        parts += [rng.normal(size=rank * n_in), np.zeros(n_out * rank)]
    return Template(np.concatenate(parts).astype(np.float32), shapes, "start", 1)


def draw_clients(template: Template, n: int, seed: int = 1) -> list[Vector]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=template.size).astype(np.float32) for _ in range(n)]


def list_changes(vector: Vector, template: Template) -> dict[str, np.ndarray]:
    """What an adapter adds to each module's weight, as a dense matrix."""
    state = {name: tensor.double().numpy() for name, tensor in template.unpack(vector).items()}
    return {module: SCALE * state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"] for module in SIZES}


def average(vectors: Sequence[Vector], weights: Sequence[float], template: Template) -> dict[str, np.ndarray]:
    """The mean change, dense."""
    changes = [list_changes(vector, template) for vector in vectors]
    return {m: sum(w * own[m] for w, own in zip(weights, changes, strict=True)) / sum(weights) for m in SIZES}


def average_exactly(vectors: Sequence[Vector], weights: Sequence[float], template: Template):
    return aggregate(vectors, weights, template, how="exact", scale=SCALE)


@given(st.integers(1, 5), st.integers(0, 50))
def test_at_full_rank_it_is_the_mean_of_the_changes(n: int, seed: int) -> None:
    template = make_template(rank=5)
    vectors, weights = draw_clients(template, n, seed), list(range(1, n + 1))
    found = average_exactly(vectors, weights, template)
    dense = average(vectors, weights, template)
    for module, change in list_changes(found.vector, template).items():
        assert change == pytest.approx(dense[module], abs=2e-5)
    assert found.residual == pytest.approx(0.0, abs=1e-6)


def test_the_mean_of_factors_is_another_change() -> None:
    template = make_template(rank=5)
    vectors = draw_clients(template, 3)
    found = aggregate(vectors, [1, 1, 1], template, how="factors", scale=SCALE)
    assert found.vector == pytest.approx(np.mean(vectors, axis=0), abs=1e-6)
    dense = average(vectors, [1, 1, 1], template)
    errors = [
        np.linalg.norm(own - dense[m]) / np.linalg.norm(dense[m])
        for m, own in list_changes(found.vector, template).items()
    ]
    assert min(errors) > 0.3, "cross terms of clients that never met"


def test_below_full_rank_it_is_the_nearest_and_says_how_far() -> None:
    template = make_template(rank=2)
    vectors, weights = draw_clients(template, 4), [3, 1, 2, 2]
    found = average_exactly(vectors, weights, template)
    dense, lost, whole = average(vectors, weights, template), 0.0, 0.0
    for module, change in list_changes(found.vector, template).items():
        left, singular, right = np.linalg.svd(dense[module], full_matrices=False)
        assert change == pytest.approx((left[:, :2] * singular[:2]) @ right[:2], abs=1e-4)
        lost, whole = lost + (singular[2:] ** 2).sum(), whole + (singular**2).sum()
    assert found.residual == pytest.approx((lost / whole) ** 0.5) and found.residual > 0.1


def test_rows_of_a_are_orthogonal_and_as_long_as_the_start_ones_together() -> None:
    template = make_template(rank=3)
    found = template.unpack(average_exactly(draw_clients(template, 4), [1] * 4, template).vector)
    start = template.unpack(template.start)
    for module in SIZES:
        a = found[f"{module}.lora_A.weight"].double().numpy()
        length = start[f"{module}.lora_A.weight"].norm().item() ** 2 / 3
        assert a @ a.T == pytest.approx(length * np.eye(3), abs=1e-4)


def test_clients_that_did_nothing_leave_the_start_adapter() -> None:
    template = make_template(rank=2)
    found = average_exactly([template.start] * 3, [1, 2, 3], template)
    assert found.vector.tolist() == template.start.tolist() and found.residual == 0.0


def test_a_client_counts_as_often_as_it_has_rows() -> None:
    template = make_template(rank=2)
    one, other = draw_clients(template, 2)
    for how in ("exact", "factors"):
        twice = aggregate([one, one, other], [1, 1, 1], template, how=how, scale=SCALE)
        weighed = aggregate([one, other], [2, 1], template, how=how, scale=SCALE)
        for module, change in list_changes(twice.vector, template).items():
            assert change == pytest.approx(list_changes(weighed.vector, template)[module], abs=1e-5)


def test_a_lone_client_keeps_its_change_and_order_does_not_matter() -> None:
    template = make_template(rank=2)
    vectors = draw_clients(template, 3)
    alone = average_exactly(vectors[:1], [7], template)
    assert alone.residual == pytest.approx(0.0, abs=1e-6)
    for module, change in list_changes(alone.vector, template).items():
        assert change == pytest.approx(list_changes(vectors[0], template)[module], abs=1e-5)
    forwards = average_exactly(vectors, [1, 2, 3], template)
    backwards = average_exactly(vectors[::-1], [3, 2, 1], template)
    for module, change in list_changes(forwards.vector, template).items():
        assert change == pytest.approx(list_changes(backwards.vector, template)[module], abs=1e-5)


def test_where_all_share_a_the_mean_of_b_is_exact_and_a_stays() -> None:
    template = make_template(rank=2)
    vectors = draw_clients(template, 3)
    shared = template.unpack(template.start)
    for k, vector in enumerate(vectors):
        state = template.unpack(vector) | {name: shared[name] for name in shared if name.endswith("lora_A.weight")}
        vectors[k] = template.pack(state)
    found = aggregate(vectors, [1, 2, 1], template, how="exact", scale=SCALE, trains_a=False)
    dense = average(vectors, [1, 2, 1], template)
    for module, change in list_changes(found.vector, template).items():
        assert change == pytest.approx(dense[module], abs=1e-5)
    a = template.unpack(found.vector)["block.q.lora_A.weight"]
    np.testing.assert_allclose(a.numpy(), shared["block.q.lora_A.weight"].numpy(), rtol=1e-6)


def test_nothing_to_average_is_refused() -> None:
    template = make_template(rank=2)
    for vectors, weights in (([], []), ([template.start], [0])):
        with pytest.raises(TrainingError, match="no client's adapter to average"):
            average_exactly(vectors, weights, template)
