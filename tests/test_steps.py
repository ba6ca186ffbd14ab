"""Simulated training against torch's own optimiser, plain loops, and the convex fit that it tends to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from ensemblelora import pipeline
from ensemblelora.api import load_run
from ensemblelora.config import EstimationConfig
from ensemblelora.errors import DataError
from ensemblelora.estimation import TrainingBudget, build_oracle, fit_subsets, predict_outcomes, simulate_training
from ensemblelora.store import FeatureBlock
from tests import selection_toys
from tests.test_estimation import make_features
from tests.tiny_run import copy_run, read_config, read_json

MODES = ("margin", "contrast", "logodds")


def make_budget(n_tasks: int, **changes) -> TrainingBudget:
    own = {"learning_rate": 0.05, "num_train_epochs": 6, "warmup_ratio": 0.2, "n_coordinates": 1.0}
    return selection_toys.make_budget(n_tasks, **own | {"steps_per_epoch": (1.0,) * n_tasks} | changes)


def mean_loss(blocks: list[FeatureBlock], w: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the linear model, differentiable in ``w``."""
    losses = []
    for block in blocks:
        u = torch.from_numpy(block.outputs).double() + torch.from_numpy(block.features).double() @ w
        logits = u @ torch.from_numpy(block.decoder).T
        logits = logits.masked_fill(~torch.from_numpy(block.class_mask), -torch.inf)
        losses.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(block.labels), reduction="none"))
    return torch.cat(losses).mean()


def train_with_torch(features, subset, budget, n_steps) -> list[np.ndarray]:
    """The weights after each full-batch step of torch's AdamW, one coordinate."""
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([w], lr=budget.learning_rate, weight_decay=budget.weight_decay)
    n_warmup = round(budget.warmup_ratio * n_steps)
    scheduler = get_scheduler(budget.lr_scheduler_type, optimizer, n_warmup, n_steps)
    path = []
    for _ in range(n_steps):
        optimizer.zero_grad()
        mean_loss([features.train[i] for i in subset], w).backward()
        torch.nn.utils.clip_grad_norm_([w], budget.max_grad_norm)
        optimizer.step()
        scheduler.step()
        path.append(w.detach().numpy().copy())
    return path


def test_numbers_without_a_gradient_lengthen_the_way() -> None:
    features = make_features(*MODES, d=5)
    subsets = [(0,), (0, 2)]

    def train(**changes) -> np.ndarray:
        return simulate_training(features.train, features.validation, subsets, make_budget(3, **changes))

    np.testing.assert_array_equal(train(n_coordinates=2.0, n_trained=8.0), train(n_coordinates=2.0, learning_rate=0.1))
    np.testing.assert_array_equal(train(n_coordinates=2.0, n_trained=2.0), train(n_coordinates=2.0))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("clip", [1e9, 0.1])
@pytest.mark.parametrize("keeps_start", [True, False])
def test_one_coordinate_is_trained_as_torch_would(schedule: str, clip: float, keeps_start: bool) -> None:
    features = make_features(*MODES, d=1)
    # A share of a step each: the subset's rows all go into one.
    budget = make_budget(
        3,
        lr_scheduler_type=schedule,
        max_grad_norm=clip,
        steps_per_epoch=(0.4,) * 3,
        weight_decay=0.1,
        keeps_start=keeps_start,
    )
    for subset in [(0,), (1, 2)]:
        start = [np.zeros(1)] if keeps_start else []
        path = [*start, *train_with_torch(features, subset, budget, budget.num_train_epochs)]
        losses = [np.mean([predict_outcomes(features.validation[i], w[None]).nll.mean() for i in subset]) for w in path]
        found = simulate_training(features.train, features.validation, [subset], budget)
        np.testing.assert_allclose(found[0], path[int(np.argmin(losses))], rtol=1e-5)


def test_trainings_that_only_harm_are_told_apart_where_the_start_is_not_kept() -> None:
    features = selection_toys.plant_features([0.0, 0.5])
    judge = replace(features.validation[0], labels=1 - features.validation[0].labels)
    held, subsets, budget = [judge] * 3, [(1,), (2,)], selection_toys.make_budget(3)
    kept = simulate_training(features.train, held, subsets, budget)
    left = simulate_training(features.train, held, subsets, replace(budget, keeps_start=False))
    assert not kept.any(), "no step towards right labels lowers the loss of wrong ones"
    losses = predict_outcomes(judge, np.vstack([kept[:1], left])).nll.mean(axis=1)
    assert losses[0] < losses[2] < losses[1], "half of the labels wrong do less harm than none"


def test_the_second_moment_is_the_mean_over_all_coordinates() -> None:
    features = make_features("margin", d=5)
    budget = make_budget(1, num_train_epochs=1, warmup_ratio=0.0, n_coordinates=1000.0)
    (found,) = simulate_training(features.train, features.validation, [(0,)], budget)
    # The first step of AdamW has unit root mean square in every coordinate, and the gradient's own direction here.
    assert np.linalg.norm(found) == pytest.approx(budget.learning_rate * 1000**0.5, rel=1e-5)
    w = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    mean_loss([features.train[0]], w).backward()
    gradient = w.grad.numpy()
    np.testing.assert_allclose(found / np.linalg.norm(found), -gradient / np.linalg.norm(gradient), rtol=1e-5)


def test_many_steps_reach_the_convex_fit() -> None:
    features = make_features("margin", "contrast", n=120, d=4)
    subsets = [(0,), (1,), (0, 1)]
    exact = fit_subsets(features.train, subsets, l2_penalty=1e-9, tolerance=1e-10)
    budget = make_budget(2, num_train_epochs=400, n_coordinates=4.0, steps_per_epoch=(2.0, 3.0), learning_rate=0.2)
    # Judged on the training rows, the last evaluation is the best.
    found = simulate_training(features.train, features.train, subsets, budget)
    np.testing.assert_allclose(found, exact.weights, atol=0.05 * np.abs(exact.weights).max())


def test_a_subset_is_trained_alike_in_any_company() -> None:
    features = make_features(*MODES, d=7)
    subsets = [(0,), (1,), (2,), (0, 2), (0, 1, 2)]
    budget = make_budget(3, steps_per_epoch=(4.0, 2.0, 3.0), n_coordinates=7.0)
    together = simulate_training(features.train, features.validation, subsets, budget)
    for subset, expected in zip(subsets, together, strict=True):
        alone = simulate_training(features.train, features.validation, [subset], budget, block_bytes=1)
        np.testing.assert_allclose(alone[0], expected, rtol=1e-4, atol=1e-6)
    in_pieces = simulate_training(features.train, features.validation, subsets, budget, block_bytes=600)
    np.testing.assert_allclose(in_pieces, together, rtol=1e-4, atol=1e-6)


def test_the_weights_with_the_least_validation_loss_are_kept() -> None:
    features = make_features("margin", n=24, d=7)
    budget = make_budget(1, num_train_epochs=30, steps_per_epoch=(3.0,), n_coordinates=7.0, learning_rate=0.3)
    flipped = tuple(
        FeatureBlock(
            b.task, b.split, b.mode, b.outputs, b.features, 1 - b.labels, b.n_choices, b.squared_norms, b.groups, b.ids
        )
        for b in features.validation
    )
    long, first = (
        simulate_training(
            features.train, flipped, [(0,)], replace(budget, num_train_epochs=n, lr_scheduler_type="constant")
        )
        for n in (30, 1)
    )
    (kept, one) = (predict_outcomes(flipped[0], w).nll.mean() for w in (long, first))
    assert kept <= one + 1e-9, "what is learnt is wrong here: the first evaluation is the best"


def test_a_run_simulates_the_training_that_it_would_do(tmp_path: Path) -> None:
    recipe = copy_run(tmp_path)
    estimation = {"method": "steps"}
    pipeline.run(read_config(recipe, estimation=estimation), until="group")
    record = read_json(tmp_path, "oracle.json")
    budget, epochs = record["budget"], read_config(recipe).training.num_train_epochs
    assert record["penalty_table"] == [] and budget["num_train_epochs"] == epochs
    assert budget["n_coordinates"] == read_json(tmp_path, "feature_health.json")["n_coordinates"]
    # Without labels of different lengths, a task alone takes the steps that its rows fill.
    steps = read_json(tmp_path, "adapters/group-0/training.json")["n_steps"]
    group = read_json(tmp_path, "adapters/group-0/training.json")["tasks"]
    names = [entry["card"]["task"] for entry in read_json(tmp_path, "tasks.json")["tasks"]]
    assert steps == pytest.approx(
        epochs * sum(budget["steps_per_epoch"][names.index(task)] for task in group), abs=epochs
    )
    first = load_run(tmp_path / "run").ask(names[:2])
    assert all(np.isfinite(found["nll"]) for found in first.values())
    pipeline.run(read_config(recipe, estimation=estimation, training={"learning_rate": 0.02}), until="group")
    assert read_json(tmp_path, "oracle.json")["budget"]["learning_rate"] == 0.02
    assert load_run(tmp_path / "run").ask(names[:2]) != first


def test_an_oracle_answers_by_simulated_steps() -> None:
    features = make_features("margin", "contrast", d=7)
    config, budget = EstimationConfig(method="steps"), make_budget(2, n_coordinates=7.0)
    oracle = build_oracle([features], config, budget=budget)
    scores = oracle.score([(), (0,), (0, 1)])
    weights = simulate_training(features.train, features.validation, [(0,), (0, 1)], budget)
    expected = predict_outcomes(features.validation[0], weights).nll.mean(axis=1)
    np.testing.assert_allclose(scores.nll[1:, 0], expected, rtol=1e-6)
    base = predict_outcomes(features.validation[0], np.zeros((1, 7))).nll.mean()
    assert scores.nll[0, 0] == pytest.approx(base)
    assert oracle.n_fits == 2
    rows = [b.outputs.size for b in features.train]
    assert oracle.row_iterations == budget.num_train_epochs * (rows[0] + sum(rows))
    with pytest.raises(DataError, match="needs the training budget"):
        build_oracle([features], config)
