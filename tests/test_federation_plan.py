"""Moments against rows, the quadratic oracle against scipy, and groups of planted clients."""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from ensemblelora.artifacts import read_json, write_json
from ensemblelora.config_federation import FederationConfig
from ensemblelora.errors import ConfigError, StoreError
from ensemblelora.federation import partition
from ensemblelora.federation.collection import ClientFeatures
from ensemblelora.federation.exchange import Registered
from ensemblelora.federation.gradients import sum_rows
from ensemblelora.federation.moments import (
    MomentOracle,
    Moments,
    choose_moment_penalty,
    count_moments,
    list_row_moments,
    read_moments,
)
from ensemblelora.federation.partition import read_plan

D = 5


def make_rows(n: int, seed: int, *, d: int = D) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.hstack([rng.normal(size=(n, 1)), rng.normal(size=(n, d))]).astype(np.float32)


def make_features(send: str, n_clients: int = 9, *, noise: float = 0.2) -> ClientFeatures:
    """Clients of three kinds, whose gradients have a little in common and otherwise cancel out."""
    angles = 2 * np.pi * np.arange(3) / 3
    directions = np.zeros((3, D))
    directions[:, 0], directions[:, 1], directions[:, 2] = 2 * np.cos(angles), 2 * np.sin(angles), 0.7
    values: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
    for part, n in (("train", 6), ("validation", 5)):
        for client in range(n_clients):
            rng = np.random.default_rng([client, n])
            gradients = directions[client % 3] + noise * rng.normal(size=(n, D))
            rows = np.hstack([np.full((n, 1), -1.0), gradients]).astype(np.float32)
            values[part].append(rows if send == "rows" else sum_rows(rows, None)[None].astype(np.float32))
    clients = tuple(
        Registered(f"c{i}", {"train": 6, "validation": 5, "test": 1}, {"train": 6, "validation": 5, "test": 1}, 0)
        for i in range(n_clients)
    )
    return ClientFeatures(clients, send, {part: np.concatenate(own) for part, own in values.items()})  # type: ignore[arg-type]


def make_config(**changes: Any) -> FederationConfig:
    values: dict[str, Any] = {
        "clients": {"source": "texts"},
        "features": {"proj_dim": D},
        "groups": {"n_groups": [3], "subset_size": 3, "n_subsets": 40},
    }
    return FederationConfig.model_validate(
        {key: values.get(key, {}) | changes.get(key, {}) for key in {*values, *changes}}
    )


def choose_groups(features: ClientFeatures, config: FederationConfig) -> Any:
    return partition.choose_groups(features, config, n_coordinates=D)


def test_moments_are_the_sums_over_rows() -> None:
    rows = make_rows(7, 0)
    u, g = rows[:, 0].astype(np.float64), rows[:, 1:].astype(np.float64)
    loss, gradient, curvature = 0.0, np.zeros(D), np.zeros((D, D))
    for i in range(7):  # one row at a time
        p = 1 / (1 + np.exp(-u[i]))
        loss += np.log1p(np.exp(-u[i]))
        gradient -= (1 - p) * g[i]
        curvature += p * (1 - p) * np.outer(g[i], g[i])
    found = read_moments(sum_rows(rows, None)[None], [7], D)
    assert found.losses[0] == pytest.approx(loss)
    assert found.gradients[0] == pytest.approx(gradient)
    assert found.curvatures[0] == pytest.approx(curvature)
    assert count_moments(D) == sum_rows(rows, None).size


def test_a_rows_vector_is_as_long_as_its_moments_together() -> None:
    rows = make_rows(4, 1)
    vectors = list_row_moments(rows[:, 0], rows[:, 1:])
    for i, vector in enumerate(vectors):
        own = read_moments(vector[None], [1], D)
        squares = own.losses[0] ** 2 + (own.gradients[0] ** 2).sum() + (own.curvatures[0] ** 2).sum()
        assert np.linalg.norm(vector) ** 2 == pytest.approx(squares), i
    clipped = sum_rows(rows, 0.5)
    assert clipped == pytest.approx(sum(v * min(1, 0.5 / np.linalg.norm(v)) for v in vectors))


def test_clients_moments_add_up() -> None:
    one, other = make_rows(3, 2), make_rows(5, 3)
    assert sum_rows(one, None) + sum_rows(other, None) == pytest.approx(sum_rows(np.concatenate([one, other]), None))


def test_the_quadratic_oracle_is_scipys_minimum() -> None:
    train, held = ([make_rows(n, 10 * n + k) for k in range(4)] for n in (6, 4))
    sums = [
        read_moments(np.array([sum_rows(r, None) for r in rows]), [len(r) for r in rows], D) for rows in (train, held)
    ]
    oracle, subsets = MomentOracle(*sums, l2_penalty=0.3), [(0, 2), (1,), (0, 1, 2, 3)]
    curvature = float(np.einsum("ndd->", sums[0].curvatures)) / 24 / D
    predicted = oracle.predict(subsets)
    for s, subset in enumerate(subsets):
        rows = np.concatenate([train[i] for i in subset])
        ridge = 0.3 * curvature * 6 / len(rows)

        def objective(w: np.ndarray, rows: np.ndarray = rows, ridge: float = ridge) -> float:
            return quadratic_loss(rows, w) + 0.5 * ridge * float(w @ w)

        slow = minimize(objective, np.zeros(D), method="BFGS", options={"gtol": 1e-10})
        assert oracle.fit(subsets)[s] == pytest.approx(slow.x, abs=1e-5)
        for i in range(4):
            if i in subset:
                assert predicted[s, i] == pytest.approx(quadratic_loss(held[i], slow.x), abs=1e-5)
            else:
                assert np.isnan(predicted[s, i])
    assert oracle.predict_at(oracle.fit(subsets))[0, 2] == pytest.approx(predicted[0, 2])


def quadratic_loss(rows: np.ndarray, w: np.ndarray) -> float:
    """Mean second-order loss of rows, one at a time."""
    total = 0.0
    for row in rows.astype(np.float64):
        u, step = row[0], row[1:] @ w
        p = 1 / (1 + np.exp(-u))
        total += np.log1p(np.exp(-u)) - (1 - p) * step + 0.5 * p * (1 - p) * step**2
    return total / len(rows)


def test_near_the_base_model_the_quadratic_is_the_loss_itself() -> None:
    rows, w = make_rows(6, 5), 1e-3 * np.random.default_rng(0).normal(size=D)
    exact = np.logaddexp(0.0, -(rows[:, 0] + rows[:, 1:] @ w)).mean()
    assert quadratic_loss(rows, w) == pytest.approx(exact, abs=1e-8)


def test_the_ridge_is_the_best_of_the_grid_and_of_equals_the_largest() -> None:
    features = make_features("moments")
    train, held = features.moments("train", D), features.moments("validation", D)
    subsets, grid = list(combinations(range(9), 3)), (0.01, 0.1, 1.0, 10.0)
    chosen = choose_moment_penalty(train, held, subsets[:30], grid)
    means = {
        penalty: np.mean([MomentOracle(train, held, penalty).predict([s])[0, list(s)].mean() for s in subsets[:30]])
        for penalty in grid
    }
    assert means[chosen] == min(means.values())
    blind = Moments(held.counts, held.losses, 0 * held.gradients, 0 * held.curvatures)  # whatever the weights are
    assert choose_moment_penalty(train, blind, subsets, grid) == 10.0


def test_noise_that_turns_a_curvature_negative_does_not_turn_the_step_around() -> None:
    rows = make_rows(3, 7)
    sums = read_moments(sum_rows(rows, None)[None], [3], D)
    sums.curvatures[0] -= 5 * np.eye(D)
    weights = MomentOracle(sums, sums, 1.0, is_noisy=True).fit([(0,)])[0]
    assert np.isfinite(weights).all() and weights @ sums.gradients[0] < 0, "downhill"


@pytest.mark.parametrize("method", ["steps", "ridge"])
@pytest.mark.parametrize("send", ["rows", "moments"])
def test_planted_clients_are_grouped_by_kind(send: str, method: str) -> None:
    config = make_config(features={"send": send}, groups={"method": method})
    plan, matrix, oracle = choose_groups(make_features(send), config)
    assert (plan.l2_penalty is None) == (method == "steps")
    assert {frozenset(group) for group in plan.found[0].groups} == {frozenset(range(k, 9, 3)) for k in range(3)}
    assert plan.found[0].predicted_nll < plan.predicted["global"] < plan.predicted["base"]
    assert plan.found[0].predicted_nll < plan.predicted["random"]
    assert matrix == pytest.approx(matrix.T) and oracle.count_flops() > 0
    own = oracle.at(oracle.weights(plan.found[0].groups))
    assert all(own[:, i].argmin() == g for g, group in enumerate(plan.found[0].groups) for i in group)


def test_rows_and_moments_predict_alike() -> None:
    subsets = [(0, 3, 6), (0, 1, 2)]
    found = {}
    for send in ("rows", "moments"):
        config = make_config(features={"send": send}, groups={"method": "ridge", "l2_penalty": 300.0})
        _, _, oracle = choose_groups(make_features(send, noise=0.05), config)
        found[send] = oracle.own(subsets)[:, 0]
    assert found["moments"] == pytest.approx(found["rows"], rel=0.1)
    assert found["rows"][0] < found["rows"][1] and found["moments"][0] < found["moments"][1]


def test_random_groups_have_the_sizes_of_those_they_stand_beside() -> None:
    config = make_config(groups={"n_groups": [3, 4]}, evaluation={"random_groups": 4})
    plan, _, _ = choose_groups(make_features("rows"), config)
    assert sorted(map(len, plan.random)) == sorted(map(len, plan.found[1].groups))
    assert sorted(client for group in plan.random for client in group) == list(range(9))
    without = make_config(evaluation={"baselines": ["global"]})
    assert choose_groups(make_features("rows"), without)[0].random == ()


def test_a_plan_comes_back_from_json(tmp_path: Any) -> None:
    plan, _, _ = choose_groups(make_features("rows"), make_config())
    write_json(tmp_path / "plan.json", asdict(plan))
    assert read_plan(read_json(tmp_path / "plan.json")) == plan
    with pytest.raises(StoreError, match="no plan of a federation"):
        read_plan({"names": []})


def test_more_groups_than_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"groups\.n_groups 10: there are 9 clients"):
        choose_groups(make_features("rows"), make_config(groups={"n_groups": [10]}))


def test_subsets_that_miss_a_client_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"groups\.n_subsets 2: [3-6] of 9 clients are in no subset, such as 'c\d'; ask"
    ):
        choose_groups(make_features("rows"), make_config(groups={"n_subsets": 2}))
