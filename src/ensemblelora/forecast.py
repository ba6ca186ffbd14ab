"""What a run would cost, before it starts: tokens and FLOPs by formula, seconds from a short measurement.

In: the encoded rows and the adapted model. Out: one record per stage. Nothing is written.
Training costs the same for any partition: every task's rows pass once an epoch, whichever group they are in.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from ensemblelora.accounting.formulas import feature_bytes
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel, activate, adapter_bytes
from ensemblelora.config import RunConfig
from ensemblelora.counting import count_forward, count_gradients, count_training
from ensemblelora.data.batching import Batch, collate, plan_batches
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.gradients.output import choose_mode
from ensemblelora.scoring import cross_entropy, score_batch
from ensemblelora.stages import Rows

__all__ = ["StageForecast", "forecast_run"]


@dataclass(frozen=True)
class StageForecast:
    """One stage's expected cost."""

    seconds: float
    flops: int
    n_tokens: int
    """tokens read, every pass counted"""
    disk_bytes: int
    memory_bytes: int
    """peak of the process: what is resident now, and the largest batch's activations"""


@dataclass(frozen=True)
class _Rates:
    forward: float
    """FLOPs a second of forward passes"""
    training: float
    bytes_per_token: float
    """of activations that a training step keeps for one padded token"""


def forecast_run(config: RunConfig, probe: AdaptedModel, rows: Rows) -> dict[str, StageForecast]:
    """Predict the cost of every stage and their total.

    Args:
        config: The run.
        probe: The model with its start adapter; a few seconds of passes are timed on it.
        rows: Encoded tasks.
    """
    rates = _measure_rates(probe, rows)
    epochs, tokens = config.training.num_train_epochs, config.evaluation.max_tokens_per_batch
    n_checks = epochs * config.training.evaluations_per_epoch
    most_members = min(config.grouping.max_groups, len(rows.names)) + config.boosting.n_rounds
    one = adapter_bytes(probe)
    learning, checking, testing = (
        _count(probe, splits, tokens, kind) for splits, kind in ((rows.train, "training"), (rows.validation, "forward"), (rows.test, "forward"))
    )
    gradients = _count_features(config, probe, rows)
    outputs = sum(_n_outputs(split, config) for split in (*rows.train, *rows.validation))
    passes = {
        "features": (gradients, rates.training, feature_bytes(outputs, config.gradients.proj_dim)),
        "train": (_scaled(learning, epochs), rates.training, most_members * one),
        "train: choosing checkpoints": (_scaled(checking, n_checks), rates.forward, 0),
        "combine": (_scaled(checking, most_members), rates.forward, 0),
        "baselines": (_scaled(learning, epochs), rates.training, one),
        "baselines: choosing checkpoints": (_scaled(checking, n_checks), rates.forward, 0),
        "evaluate": (_scaled(testing, most_members + 2), rates.forward, 0),
    }
    resident = psutil.Process().memory_info().rss
    widest = {"features": config.gradients.max_tokens_per_batch, "train": config.training.max_tokens_per_batch}
    widest["baselines"] = widest["train"]
    stages = {
        name: StageForecast(
            seconds=flops / rate,
            flops=flops,
            n_tokens=n_tokens,
            disk_bytes=disk,
            memory_bytes=resident + round(rates.bytes_per_token * widest.get(name, 0)),
        )
        for name, ((flops, n_tokens), rate, disk) in passes.items()
    }
    return stages | {"total": _add_up(list(stages.values()))}


def _add_up(stages: list[StageForecast]) -> StageForecast:
    return StageForecast(
        seconds=sum(stage.seconds for stage in stages),
        flops=sum(stage.flops for stage in stages),
        n_tokens=sum(stage.n_tokens for stage in stages),
        disk_bytes=sum(stage.disk_bytes for stage in stages),
        memory_bytes=max(stage.memory_bytes for stage in stages),
    )


def _count(probe: AdaptedModel, splits: tuple[EncodedSplit, ...], max_tokens: int, kind: str) -> tuple[int, int]:
    """FLOPs and tokens of one pass over some splits."""
    meter = Meter(kind)
    for split in splits:
        for indices in plan_batches(split.example_lengths, split.row_counts, max_tokens):
            batch = collate([(split, int(e)) for e in indices], probe.base.pad_token_id)
            (count_training if kind == "training" else count_forward)(meter, probe.costs, batch)
    return meter.record.flops, meter.record.n_tokens


def _count_features(config: RunConfig, probe: AdaptedModel, rows: Rows) -> tuple[int, int]:
    meter = Meter("features")
    for split in (*rows.train, *rows.validation):
        single_row = split.kind in ("verbalizer", "classification")
        width = _n_outputs(split, config) // split.n_examples
        for indices in plan_batches(split.example_lengths, split.row_counts, config.gradients.max_tokens_per_batch):
            batch = collate([(split, int(e)) for e in indices], probe.base.pad_token_id)
            n_backwards = width if single_row else 1
            count_gradients(
                meter, probe.costs, batch, n_backwards=n_backwards, n_outputs=width * len(indices), proj_dim=config.gradients.proj_dim
            )
    return meter.record.flops, meter.record.n_tokens


def _n_outputs(split: EncodedSplit, config: RunConfig) -> int:
    most = int(split.n_choices.max())
    mode = choose_mode(split.kind, most, config.gradients.output, task=split.task)
    return split.n_examples * (most - 1 if mode == "contrast" else 1)


def _scaled(cost: tuple[int, int], times: int) -> tuple[int, int]:
    return cost[0] * times, cost[1] * times


def _measure_rates(probe: AdaptedModel, rows: Rows) -> _Rates:
    """Time a forward pass and a training step on a few middling rows, after one of each to warm up."""
    split = max(rows.train, key=lambda s: s.n_examples)
    middle = np.argsort(split.example_lengths, kind="stable")[split.n_examples // 2 :][:8]
    batch = collate([(split, int(e)) for e in middle], probe.base.pad_token_id)
    before = psutil.Process().memory_info().rss
    seconds = {"forward": 0.0, "training": 0.0}
    for _ in range(2):
        for kind in seconds:
            started = time.perf_counter()
            _pass_once(probe, batch, is_training=kind == "training")
            seconds[kind] = time.perf_counter() - started
    meters = {kind: Meter(kind) for kind in seconds}
    count_forward(meters["forward"], probe.costs, batch)
    count_training(meters["training"], probe.costs, batch)
    grown = max(psutil.Process().memory_info().rss - before, 0)
    return _Rates(
        forward=max(meters["forward"].record.flops, 1) / seconds["forward"],
        training=max(meters["training"].record.flops, 1) / seconds["training"],
        bytes_per_token=grown / batch.n_padded_tokens,
    )


def _pass_once(probe: AdaptedModel, batch: Batch, *, is_training: bool) -> None:
    with activate(probe, THETA0, trainable=is_training), torch.set_grad_enabled(is_training):
        loss = cross_entropy(score_batch(probe.network, batch).z, batch).mean()
        if is_training:
            loss.backward()
            probe.peft.zero_grad(set_to_none=True)
