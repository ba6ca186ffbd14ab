"""Targets and sources whose right choice is known: planted linear rows, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ensemblelora.config import EstimationConfig
from ensemblelora.estimation import Oracle, TaskFeatures, TrainingBudget
from ensemblelora.selection.prospect import Prospect
from ensemblelora.store import FeatureBlock

RIDGE = EstimationConfig(method="ridge", l2_penalty=1.0, tolerance=1e-9)
STEPS = EstimationConfig(method="steps")


def plant_block(
    name: str,
    truth: np.ndarray,
    *,
    n: int = 40,
    split: str = "train",
    noise: float = 0.0,
    mode: str = "margin",
    seed: int = 0,
    n_groups: int | None = None,
) -> FeatureBlock:
    """Rows of a linear model: two classes by the side of ``truth`` they are on, a share of the labels turned.

    Modes with one class, right, turn the gradient itself instead: what a wrong answer's gradient is.
    """
    rng = np.random.default_rng([seed, n, *name.encode(), *split.encode()])
    features = rng.normal(size=(n, 1, len(truth)))
    labels = (features[:, 0] @ truth + 0.3 * rng.logistic(size=n) > 0).astype(np.int64)
    labels = np.where(rng.random(n) < noise, 1 - labels, labels)
    if mode != "margin":
        features *= (2 * labels - 1)[:, None, None]
        labels = np.zeros(n, np.int64)
    return FeatureBlock(
        name,
        split,
        mode,
        np.zeros((n, 1), np.float32),
        features.astype(np.float32),
        labels,
        np.full(n, 2 if mode == "margin" else 1),
        (features**2).sum(axis=(1, 2)).astype(np.float32),
        np.arange(n) if n_groups is None else np.arange(n) % n_groups,
        tuple(f"{split}:{e}" for e in range(n)),
    )


def plant_features(
    noises: Sequence[float], *, d: int = 6, n: int = 40, n_validation: int = 60, mode: str = "margin", seed: int = 0
) -> TaskFeatures:
    """A target with few rows, and sources of the same rule with so many of their labels wrong."""
    truth = np.random.default_rng(seed).normal(size=d)
    names = ["target", *(f"source{j}" for j in range(len(noises)))]
    sizes = [max(8, n // 4), *(n for _ in noises)]
    train = [
        plant_block(name, truth, n=size, noise=noise, mode=mode, seed=seed)
        for name, size, noise in zip(names, sizes, (0.0, *noises), strict=True)
    ]
    held = plant_block("target", truth, n=n_validation, split="validation", mode=mode, seed=seed)
    return TaskFeatures(tuple(train), tuple(replace(held, task=name) for name in names))


def make_budget(n_tasks: int, **changes) -> TrainingBudget:
    budget = TrainingBudget(
        learning_rate=0.1,
        num_train_epochs=3,
        evaluations_per_epoch=1,
        warmup_ratio=0.1,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=1e9,
        steps_per_epoch=(3.0,) * n_tasks,
        n_coordinates=6.0,
    )
    return replace(budget, **changes)


def make_prospect(
    noises: Sequence[float], config: EstimationConfig = RIDGE, *, includes_target: bool = True, **sizes
) -> Prospect:
    features = plant_features(noises, **sizes)
    budget = make_budget(len(features.train)) if config.method == "steps" else None
    return Prospect(Oracle((features,), 1.0, config, (), budget, (0,)), includes_target)
