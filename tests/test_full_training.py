"""Full fine-tuning: it trains the base and puts it back; and weights of training rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel, activate, adapter_state, add_adapter, attach
from ensemblelora.config import AdapterConfig, TrainingConfig
from ensemblelora.counting import count_forward, count_full_training
from ensemblelora.data.batching import collate
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import ModelError, TrainingError
from ensemblelora.models import prepare_base
from ensemblelora.prediction import predict_members
from ensemblelora.scoring import score_batch
from ensemblelora.training import TrainingJob, fine_tune_together, measure_validation_nll
from ensemblelora.training.full import base_weights, fine_tune_full, replaced_weights
from tests.tiny import PadOnly, disturb, make_adapted, make_base, make_learnable_split, make_network

CONFIG = TrainingConfig(learning_rate=5e-3, num_train_epochs=3, max_examples_per_batch=8)
METHODS = ("lora", "dora", "ia3", "bottleneck")


def make_job(kinds: tuple[str, ...] = ("verbalizer", "options", "sequence"), n: int = 16) -> TrainingJob:
    def make(split: str, size: int, seed: int) -> list[EncodedSplit]:
        return [
            make_learnable_split(kind, n=size, seed=seed + i, task=f"task-{i}", split=split)
            for i, kind in enumerate(kinds)
        ]

    return TrainingJob("full", make("train", n, 0), make("validation", 8, 50))


def make_learner(method: str = "lora", family: str = "llama", *, head: str = "lm", **adapter: Any) -> AdaptedModel:
    """Random weights large enough for attention to matter, and a second adapter that computes something."""
    settings = {"method": method} | ({"reduction": 8} if method == "bottleneck" else {}) | adapter
    adapted = attach(make_base(family, head=head, initializer_range=0.15), AdapterConfig(**settings), seed=0)
    add_adapter(adapted, "other")
    disturb(adapted, "other")
    return adapted


def tune(
    adapted: AdaptedModel, folder: Path, config: TrainingConfig = CONFIG, job: TrainingJob | None = None
) -> tuple[Any, dict[str, torch.Tensor], Meter]:
    meter = Meter("train")
    found, weights = fine_tune_full(adapted, job or make_job(), config, seed=0, folder=folder / "scratch", meter=meter)
    return found, weights, meter


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_leaves_the_model_as_it_was(method: str, tmp_path: Path) -> None:
    adapted = make_learner(method)
    before = {path: (p.detach().clone(), p.requires_grad) for path, p in adapted.peft.named_parameters()}
    job = make_job()
    nll = measure_validation_nll(adapted, THETA0, job.validation, max_tokens=500)
    found, weights, _ = tune(adapted, tmp_path)
    assert found.best_validation_nll < 0.8 * nll
    after = {path: (p.detach(), p.requires_grad) for path, p in adapted.peft.named_parameters()}
    assert before.keys() == after.keys()
    for path, (values, was_trainable) in before.items():
        assert torch.equal(values, after[path][0]) and was_trainable == after[path][1], path
    assert all(p.grad is None for p in adapted.peft.parameters())
    assert (adapted.peft.active_adapter, adapted.peft.training) == (THETA0, False)
    assert list(tmp_path.iterdir()) == []
    moved = [path for path, weight in weights.items() if not torch.equal(weight, before[path][0])]
    assert len(moved) == len(weights) == len(base_weights(adapted)), "every weight is trained"


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_score_as_a_plain_model_with_them_does(method: str, tmp_path: Path) -> None:
    adapted, job = make_learner(method), make_job()
    found, weights, _ = tune(adapted, tmp_path)
    plain = make_network("llama", initializer_range=0.15)
    base = prepare_base("plain", plain, PadOnly())  # type: ignore[arg-type]
    renamed = {path.removeprefix("base_model.model.").replace("base_layer.", ""): w for path, w in weights.items()}
    named = dict(base.model.named_parameters())
    assert renamed.keys() == named.keys()
    for path, parameter in named.items():
        parameter.data.copy_(renamed[path])
    with replaced_weights(adapted, weights) as bare:
        nll = measure_validation_nll(bare, THETA0, job.validation, max_tokens=500)
        scores = [predict_members(bare, split, [THETA0], max_tokens=500).values[0] for split in job.validation[:2]]
    assert nll == pytest.approx(found.best_validation_nll, rel=1e-6)
    for split, values in zip(job.validation, scores, strict=False):
        for e in range(split.n_examples):
            batch = collate([(split, e)], 0)
            with torch.no_grad():
                z = score_batch(base.model, batch).z[0].numpy()
            np.testing.assert_allclose(values[e][: len(z)], z, rtol=1e-4, atol=1e-4)


def test_what_breaks_inside_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    adapted = make_learner()
    before = {path: p.detach().clone() for path, p in adapted.peft.named_parameters()}
    with pytest.raises(
        TrainingError, match=r"full fine-tuning: .* loss became (nan|inf).*lower training.learning_rate"
    ):
        tune(adapted, tmp_path, CONFIG.model_copy(update={"learning_rate": 1e9, "max_grad_norm": 1e9}))
    assert all(torch.equal(before[path], p) for path, p in adapted.peft.named_parameters())


def test_a_head_is_trained_and_put_back(tmp_path: Path) -> None:
    adapted, job = make_learner(family="bert", head="sequence_classification"), make_job(("classification",), n=64)
    before = {path: p.detach().clone() for path, p in adapted.peft.named_parameters()}
    found, weights, _ = tune(adapted, tmp_path, job=job)
    assert any("classifier" in path and not torch.equal(w, before[path]) for path, w in weights.items())
    assert found.best_validation_nll < np.log(3)
    assert all(torch.equal(before[path], p) for path, p in adapted.peft.named_parameters())


def test_small_steps_are_not_lost_in_half_precision(tmp_path: Path) -> None:
    """No single step is as large as half the distance of two neighbouring weights; together they are."""
    base = make_base("llama", initializer_range=0.15)
    base.model.to(torch.bfloat16)
    adapted = attach(base, AdapterConfig(r=4), seed=0)
    rate = 2e-5
    config = CONFIG.model_copy(update={"learning_rate": rate, "num_train_epochs": 8, "lr_scheduler_type": "constant"})
    before = {path: p.detach().clone() for path, p in base_weights(adapted).items()}
    _, weights, _ = tune(adapted, tmp_path, config)
    found = 0
    for path, weight in weights.items():
        is_large = before[path].abs() > 0.125  # neighbours are 2**-10 apart and more, 24 of the largest steps
        found += int((weight != before[path])[is_large].sum())
        assert weight.dtype == torch.bfloat16
    assert found > 0


def test_it_costs_three_forward_passes(tmp_path: Path) -> None:
    adapted, job = make_learner(), make_job()
    *_, meter = tune(adapted, tmp_path)
    batch = collate([(job.train[0], 0), (job.train[1], 3)], 0, layout="shared")
    step, forward = Meter("step"), Meter("forward")
    with replaced_weights(adapted, {}) as bare:
        count_full_training(step, bare.costs, batch)
        count_forward(forward, bare.costs, batch)
    assert step.record.flops == 3 * forward.record.flops
    with_adapter = Meter("forward")
    count_forward(with_adapter, adapted.costs, batch)
    assert forward.record.flops < with_adapter.record.flops
    train, validation = (
        sum(collate([(s, e)], 0, layout="shared").n_real_tokens for s in part for e in range(s.n_examples))
        for part in (job.train, job.validation)
    )
    assert meter.record.n_tokens == validation + CONFIG.num_train_epochs * (train + validation)


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    adapted = make_learner()
    parameter = next(iter(base_weights(adapted).values()))
    parameter.quant_state = object()  # as bitsandbytes marks a packed weight
    with pytest.raises(ModelError, match=r"'tiny-llama': 1 of its weights are quantised .* model.quantization to none"):
        tune(adapted, tmp_path)


# Weights of training rows


def train_adapter(folder: Path, job: TrainingJob) -> dict[str, torch.Tensor]:
    adapted = make_adapted("llama", initializer_range=0.15)
    fine_tune_together(adapted, [job], CONFIG, seed=0, checkpoints=folder / "scratch", meter=Meter("train"))
    return adapter_state(adapted, job.name)


def ones(job: TrainingJob) -> list[np.ndarray]:
    return [np.ones(split.n_examples) for split in job.train]


def test_equal_weights_change_nothing(tmp_path: Path) -> None:
    job = make_job()
    plain, weighted = train_adapter(tmp_path, job), train_adapter(tmp_path, replace(job, weights=ones(job)))
    assert all(torch.equal(plain[key], weighted[key]) for key in plain)


def test_rows_without_weight_teach_nothing(tmp_path: Path) -> None:
    """Whatever their labels say, the adapter is the same; and with no weight at all it stays where it started."""
    job, weights = make_job(), ones(make_job())
    wrong = [replace(split, labels=split.labels.copy()) for split in job.train]
    for split, own in zip(wrong[:2], weights, strict=False):
        own[::3] = 0.0
        split.labels[::3] = (split.labels[::3] + 1) % 3
    right = train_adapter(tmp_path, replace(job, weights=weights))
    other = train_adapter(tmp_path, replace(job, train=wrong, weights=weights))
    assert all(torch.equal(right[key], other[key]) for key in right)
    start = adapter_state(make_adapted("llama", initializer_range=0.15), THETA0)
    nothing = train_adapter(tmp_path, replace(job, weights=[0 * own for own in weights]))
    assert all(torch.equal(start[key], nothing[key]) for key in start)
    assert any(not torch.equal(start[key], right[key]) for key in start)


def test_a_weight_of_two_counts_a_row_twice(tmp_path: Path) -> None:
    """The gradient of a step is the weighted mean: checked against autograd on the batch's own losses."""
    from ensemblelora.training.steps import StepPlan
    from ensemblelora.training.trainer import measure_row_losses

    job = make_job(n=8)
    weights = [np.arange(1.0, 9.0) for _ in job.train]
    adapted = make_adapted("llama", initializer_range=0.15)
    plan = StepPlan([replace(job, weights=weights)], CONFIG, seed=0, layout=adapted.layout, pad_token_id=0)
    (one,) = plan[0]
    assert one.weights is not None
    with activate(adapted, THETA0), torch.no_grad():
        weighted = measure_row_losses(adapted, one, CONFIG, meter=Meter("x"))
        plain = measure_row_losses(adapted, replace(one, weights=None), CONFIG, meter=Meter("x"))
    np.testing.assert_allclose(weighted / plain, 1.0 + one.batch.examples, rtol=1e-5)
