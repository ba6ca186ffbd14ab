"""Simulated federated averaging against plain loops over clients with torch's own optimiser, and its laws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ensemblelora.config_federation import FederationConfig
from ensemblelora.errors import ConfigError
from ensemblelora.estimation import RowClients, TrainingBudget, simulate_averaging
from ensemblelora.federation.collection import to_block
from ensemblelora.federation.exchange import Registered
from ensemblelora.federation.gradients import sum_rows
from ensemblelora.federation.moments import MomentClients, read_moments
from ensemblelora.federation.simulation import Simulation, plan_local_budget
from ensemblelora.recipe import read_federation
from tests import selection_toys
from tests.federation_tiny import write_clients

SIZES = (3, 5, 4, 2)
ROUNDS = ((np.array([0, 2]), np.array([1])), (np.array([3]), np.array([1, 2]), np.array([0])), (np.array([1]),))


def make_clients(d: int, sizes: Sequence[int] = SIZES) -> list[np.ndarray]:
    """Each client's outputs and gradients ``(n, 1 + d)``."""
    return [np.random.default_rng([d, c]).normal(size=(n, 1 + d)).astype(np.float32) for c, n in enumerate(sizes)]


def make_budget(n_clients: int = len(SIZES), **changes: object) -> TrainingBudget:
    own = {"warmup_ratio": 0.0, "num_train_epochs": 1, "steps_per_epoch": (1.0,) * n_clients, "n_coordinates": 1.0}
    return selection_toys.make_budget(n_clients, **own | changes)


def simulate(rows: Sequence[np.ndarray], rounds: Sequence[Sequence[np.ndarray]], budget: TrainingBudget) -> np.ndarray:
    blocks = [to_block(f"c{i}", "train", own) for i, own in enumerate(rows)]
    return simulate_averaging(RowClients(blocks), rounds, budget)


def average_plainly(rows: Sequence[np.ndarray], rounds: Sequence[np.ndarray], budget: TrainingBudget) -> np.ndarray:
    """One client after the other, each with torch's AdamW, all of its rows in each step."""
    weights = torch.zeros(rows[0].shape[1] - 1, dtype=torch.float64)
    for t, members in enumerate(rounds):
        falling = 1 - t / len(rounds) if budget.lr_scheduler_type == "linear" else 1.0
        ends, total = torch.zeros_like(weights), sum(len(rows[i]) for i in members)
        for i in members:
            own = torch.from_numpy(rows[i]).double()
            w = weights.clone().requires_grad_()
            optimizer = torch.optim.AdamW([w], lr=falling * budget.learning_rate, weight_decay=budget.weight_decay)
            for _ in range(budget.num_train_epochs):
                optimizer.zero_grad()
                torch.nn.functional.softplus(-(own[:, 0] + own[:, 1:] @ w)).mean().backward()
                torch.nn.utils.clip_grad_norm_([w], budget.max_grad_norm)
                optimizer.step()
            ends += len(own) / total * w.detach()
        weights = ends
    return weights.numpy()


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("clip", [1e9, 0.1])
def test_one_coordinate_is_averaged_as_a_loop_over_clients_would(schedule: str, clip: float) -> None:
    rows = make_clients(1)
    budget = make_budget(lr_scheduler_type=schedule, max_grad_norm=clip, weight_decay=0.1, num_train_epochs=3)
    found = simulate(rows, ROUNDS, budget)
    for s, rounds in enumerate(ROUNDS):
        np.testing.assert_allclose(found[s], average_plainly(rows, rounds, budget), rtol=1e-5)


def test_a_group_is_simulated_alike_in_any_company() -> None:
    blocks = [to_block(f"c{i}", "train", own) for i, own in enumerate(make_clients(6))]
    budget = make_budget(steps_per_epoch=(2.0, 3.0, 2.0, 1.0), num_train_epochs=2, n_coordinates=6.0)
    together = simulate_averaging(RowClients(blocks), ROUNDS, budget)
    for rounds, expected in zip(ROUNDS, together, strict=True):
        alone = simulate_averaging(RowClients(blocks), [rounds], budget)[0]
        np.testing.assert_allclose(alone, expected, rtol=1e-4, atol=1e-6)
    in_pieces = simulate_averaging(RowClients(blocks), ROUNDS, budget, block_bytes=1)
    np.testing.assert_allclose(in_pieces, together, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [1, 4, 9])
def test_steps_that_have_nothing_in_common_average_to_a_shorter_one(n: int) -> None:
    rows = [np.hstack([np.zeros((2, 1)), np.tile(np.eye(9)[c], (2, 1))]).astype(np.float32) for c in range(n)]
    found = simulate(rows, [[np.arange(n)]], make_budget(n, n_coordinates=100.0))[0]
    assert np.linalg.norm(found) == pytest.approx(0.1 * 10 / n**0.5, rel=1e-5)
    assert found[:n] == pytest.approx(found[0]) and (found[n:] == 0).all()


def test_moments_are_trained_as_rows_are_where_the_loss_is_nearly_quadratic() -> None:
    rows = make_clients(6)
    sums = read_moments(np.array([sum_rows(own, None) for own in rows]), SIZES, 6)
    for rate, tolerance in ((1e-3, 1e-3), (0.03, 0.1)):
        budget = make_budget(num_train_epochs=2, n_coordinates=6.0, learning_rate=rate)
        exact = simulate(rows, ROUNDS, budget)
        found = simulate_averaging(MomentClients(sums), ROUNDS, budget)
        np.testing.assert_allclose(found, exact, atol=tolerance * np.abs(exact).max())


def test_a_step_on_moments_is_downhill_on_the_quadratic_loss() -> None:
    rows, w = make_clients(4), np.random.default_rng(0).normal(size=(4, 4))
    sums = read_moments(np.array([sum_rows(own, None) for own in rows]), SIZES, 4)
    found = MomentClients(sums).mean_gradients([np.array([c]) for c in range(4)], w)

    def measure(c: int, at: np.ndarray) -> float:
        quadratic = sums.losses[c] + sums.gradients[c] @ at + 0.5 * at @ sums.curvatures[c] @ at
        return float(quadratic / SIZES[c])

    for c, gradient in enumerate(found):
        slow = [(measure(c, w[c] + 1e-5 * e) - measure(c, w[c] - 1e-5 * e)) / 2e-5 for e in np.eye(4)]
        assert gradient == pytest.approx(slow, abs=1e-5)


def make_simulation(rows: Sequence[np.ndarray], **training: object) -> tuple[Simulation, TrainingBudget]:
    config = FederationConfig.model_validate({"clients": {"source": "x"}, "training": training})
    clients = [
        Registered(f"c{i}", {"train": len(own)}, {"train": 20 * len(own)}, 0)  # type: ignore[typeddict-item]
        for i, own in enumerate(rows)
    ]
    budget = plan_local_budget(clients, config, n_coordinates=2)
    blocks = [to_block(client.name, "train", own) for client, own in zip(clients, rows, strict=True)]
    return Simulation(RowClients(blocks), config, budget), budget


def test_a_budget_is_what_clients_do_in_a_round() -> None:
    training = {"max_examples_per_batch": 2, "local_passes": 3, "learning_rate": 0.01, "max_grad_norm": 0.5}
    simulation, budget = make_simulation(make_clients(2), num_train_epochs=5, **training)
    assert budget.steps_per_epoch == (2, 3, 2, 1) and budget.num_train_epochs == 3
    assert (budget.learning_rate, budget.max_grad_norm, budget.reach) == (0.01, 0.5, 1.0)
    assert simulation.count_steps((0, 1)) == 2 * 5 * 3 * (2 + 3), "there and back"
    _, short = make_simulation(make_clients(2), max_tokens_per_batch=20)
    assert short.steps_per_epoch == SIZES, "a row fills a step"


def test_who_comes_first_does_not_count() -> None:
    """Two clients that are each other's mirror image, one a round, while the rate falls."""
    one = np.array([[0.0, 1.0, 0.2]] * 4, np.float32)
    simulation, _ = make_simulation([one, one[:, [0, 2, 1]]], participation=0.5, num_train_epochs=1)
    (found,) = simulation.fit([(0, 1)])
    assert found[0] == pytest.approx(found[1], rel=0.01) and found[0] > 0


def test_groups_are_simulated_once() -> None:
    simulation, _ = make_simulation(make_clients(2))
    first = simulation.fit([(0, 1), (2,)])
    np.testing.assert_array_equal(simulation.fit([(2,), (0, 1), (2,)]), first[[1, 0, 1]])
    assert simulation.fitted == ((0, 1), (2,)) and simulation.fit([]).shape == (0, 2)


def test_a_penalty_without_the_convex_fit_is_refused(tmp_path: Path) -> None:
    texts = write_clients(tmp_path / "texts")
    with pytest.raises(ConfigError, match=r"l2_penalty 3\.0: method steps has none; set groups\.method: ridge"):
        read_federation(texts, ("groups.l2_penalty=3.0",))
    assert read_federation(texts, ("groups.l2_penalty=3.0", "groups.method=ridge")).groups.l2_penalty == 3.0
