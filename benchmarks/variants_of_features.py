"""Features that differ in what is differentiated, in which coordinates, and where; for calibration.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from ensemblelora import artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel, activate, adapter_state, remove_adapter, set_adapter_state
from ensemblelora.config import RunConfig
from ensemblelora.estimation import TaskFeatures, TrainingBudget
from ensemblelora.gradients import collect
from ensemblelora.gradients.collect import collect_features, find_active_layers, make_projector
from ensemblelora.gradients.projection import Projector
from ensemblelora.passes import score
from ensemblelora.scoring import cross_entropy
from ensemblelora.seeding import seed_for
from ensemblelora.stages import Rows, plan_budget
from ensemblelora.store import FeatureStore
from ensemblelora.training import fine_tune
from ensemblelora.training.steps import StepPlan, TrainingJob, choose_layout

FEATURES = ("plain", "logodds", "adam", "warmup")
SAME_COORDINATES = ("plain", "logodds")
"""those whose distances are the adapter's own, from theta0"""
N_BATCHES = 24
"""for second moments"""
FLOOR = 1e-3
"""added to second moments, of their mean: coordinates that hardly ever move are not blown up"""


@dataclass(frozen=True, eq=False)
class Variant:
    """One kind of features of a run's rows, and the training they are to stand for."""

    features: TaskFeatures
    budget: TrainingBudget


@dataclass(frozen=True)
class ScaledProjector:
    """Projects gradients whose coordinates were multiplied beforehand; has what collecting uses of a Projector."""

    inner: Projector
    scales: dict[str, Tensor]
    """by part, in its shape"""

    @property
    def proj_dim(self) -> int:
        """Of the projection inside."""
        return self.inner.proj_dim

    @property
    def proj_type(self) -> str:
        """Of the projection inside."""
        return self.inner.proj_type

    def project(self, part: str, gradients: Tensor) -> Tensor:
        """``(gradients * scale) @ P_part``, as Projector has it."""
        return self.inner.project(part, gradients * self.scales[part])

    def count_flops(self, parts: object) -> int:
        """Nothing: this is for a comparison of accuracy."""
        del parts
        return 0


def make_variant(name: str, folder: Path, config: RunConfig, rows: Rows, probe: AdaptedModel) -> Variant:
    """Take the features of a variant, or read them back; ``plain`` ones are the run's own, in its features folder."""
    store, record = FeatureStore(folder), folder / "variant.json"
    known = folder.parent / artifacts.FEATURE_HEALTH_FILE if name == "plain" else record
    if not known.exists():
        settings = config.gradients.model_copy(update={"output": "logodds"} if name == "logodds" else {})
        names = {key: f"{name} {identity}" for key, identity in rows.identities.items()}
        with at_variant(name, folder, config, rows, probe) as n_effective:
            health = collect_features(probe, rows.learning, store, settings, seed=config.seed, fingerprints=names)
        record.write_text(json.dumps({"n_coordinates": n_effective or health.n_coordinates}), encoding="utf-8")
    train, validation = (tuple(store.read(task, split) for task in rows.names) for split in ("train", "validation"))
    n_coordinates = json.loads(known.read_text(encoding="utf-8"))["n_coordinates"]
    budget = plan_budget(config, rows, probe, n_coordinates=n_coordinates)
    if name == "adam":  # second moments take the place of p', and the reach is that of the plain coordinates
        n_plain = json.loads((folder.parents[2] / artifacts.FEATURE_HEALTH_FILE).read_text())["n_coordinates"]
        budget = replace(budget, n_trained=(budget.n_trained or n_plain) / n_plain * n_coordinates)
        # The longest gradient that is not cut, in the new coordinates.
        new = np.mean([(np.asarray(block.features, np.float64) ** 2).sum(axis=(1, 2)).mean() for block in train])
        old = np.mean([np.asarray(block.squared_norms).mean() for block in train])
        budget = replace(budget, max_grad_norm=budget.max_grad_norm * float((new / old) ** 0.5))
    return Variant(TaskFeatures(train, validation), budget)


@contextmanager
def at_variant(name: str, folder: Path, config: RunConfig, rows: Rows, probe: AdaptedModel) -> Iterator[float | None]:
    """Put the model where a variant's gradients are taken; yields p' where it is not the number of coordinates."""
    if name == "warmup":
        start = adapter_state(probe, THETA0)
        once = config.training.model_copy(update={"num_train_epochs": 1})
        seed = seed_for(config.seed, "warm-up")
        scratch, meter = folder / "checkpoints", Meter("warm-up")
        fine_tune(probe, "warmup", rows.train, rows.validation, once, seed=seed, checkpoints=scratch, meter=meter)
        set_adapter_state(probe, THETA0, adapter_state(probe, "warmup"))
        remove_adapter(probe, "warmup")
        yield None
        set_adapter_state(probe, THETA0, start)
    elif name == "adam":
        moments = measure_second_moments(config, rows, probe)
        scales = {f"{key}.weight": moment.pow(-0.25).float() for key, moment in moments.items()}
        projector = ScaledProjector(make_projector(config.gradients, seed=config.seed), scales)
        with patch.object(collect, "make_projector", lambda *_, **__: projector):
            yield float(sum(moment.sqrt().sum() for moment in moments.values()))
    else:
        yield None


def measure_second_moments(config: RunConfig, rows: Rows, probe: AdaptedModel) -> dict[str, Tensor]:
    """Mean square of every coordinate of the training gradient at theta0, over a few batches of all tasks."""
    job = TrainingJob("moments", rows.train, rows.validation)
    layout, seed = choose_layout(probe, config.training), seed_for(config.seed, "second moments")
    plan = StepPlan([job], config.training, seed=seed, layout=layout, pad_token_id=probe.base.pad_token_id)
    moments: dict[str, Tensor] = {}
    with activate(probe, THETA0, trainable=True), torch.enable_grad():
        linears = find_active_layers(probe, rows.learning)
        for step in range(N_BATCHES):
            probe.peft.zero_grad(set_to_none=True)
            batch = plan[step][0].batch
            cross_entropy(score(probe, batch).z, batch, loss=config.training.loss).mean().backward()
            for key, module in linears.items():
                square = module.weight.grad.double().pow(2) / N_BATCHES
                moments[key] = moments.get(key, torch.zeros_like(square)) + square
        probe.peft.zero_grad(set_to_none=True)
    floor = FLOOR * float(torch.cat([moment.flatten() for moment in moments.values()]).mean())
    return {key: moment + floor for key, moment in moments.items()}
