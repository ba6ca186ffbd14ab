"""What a run would cost, before it starts: tokens and FLOPs by formula, seconds from a short measurement.

In: the encoded rows and the adapted model. Out: one record per stage, by the ledger's own names. Nothing is written.
``features`` and ``baselines`` count the very batches a run will take. Training in groups costs nearly the same for any
partition: every task's rows pass once an epoch, and only the padding depends on who shares a batch. What depends on
the plan or on the outcome (``boost``, ``combine``, ``evaluate``) is counted at its most.
The oracle's fits take seconds and no model, and are left out. Blocks below the lowest adapted one count once a row, as
if all rows fitted ``model.prefix_cache_gb``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import psutil  # type: ignore[import-untyped]  # ships no types
import torch

from ensemblelora.accounting.formulas import feature_bytes
from ensemblelora.accounting.meter import Meter, StageRecord
from ensemblelora.adapters import THETA0, AdaptedModel, activate, adapter_bytes
from ensemblelora.config import RunConfig, TrainingConfig
from ensemblelora.counting import (
    count_forward,
    count_generation,
    count_gradients,
    count_gram,
    count_lower,
    count_training,
)
from ensemblelora.data.batching import Batch, collate, iterate_batches, plan_batches, schedule_training
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.generation import list_contexts
from ensemblelora.gradients.collect import count_outputs, feature_layout, find_active_layers, plan_features
from ensemblelora.gradients.exact import gram_bytes, scratch_bytes
from ensemblelora.gradients.output import choose_modes
from ensemblelora.passes import FILL_TOKENS, choose_max_tokens, score
from ensemblelora.scoring import cross_entropy
from ensemblelora.seeding import seed_for
from ensemblelora.stages import Rows
from ensemblelora.training import choose_layout

__all__ = ["StageForecast", "forecast_run"]

_BOOST_LENGTHS = 4  # forward passes of a line search, at most
_NOTHING = StageRecord("")


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
    """How fast this machine is; work is FLOPs, or padded tokens for a family without a formula."""

    forward: float
    """work a second of forward passes"""
    training: float
    """work a second of training steps"""
    bytes_per_token: float
    """of activations that a training step keeps for one padded token"""
    forward_bytes_per_token: float
    """that a forward pass holds at its fullest, for one padded token"""


@dataclass(frozen=True)
class _Passes:
    """What a stage runs through the model."""

    training: StageRecord = _NOTHING
    """passes with a backward pass"""
    forward: StageRecord = _NOTHING
    disk_bytes: int = 0
    batch_tokens: int = 0
    """padded tokens of the largest batch that keeps activations"""
    forward_tokens: int = 0
    """padded tokens of the largest batch that keeps none"""
    held_bytes: int = 0
    """of what is in memory beside the model when there are no activations"""


def forecast_run(config: RunConfig, probe: AdaptedModel, rows: Rows) -> dict[str, StageForecast]:
    """Predict the cost of every stage and their total.

    Args:
        config: The run.
        probe: The model with its start adapter; a few seconds of passes are timed on it.
        rows: Encoded tasks.
    """
    step = config.training.max_tokens_per_batch
    rates, resident = _measure_rates(probe, rows, step), psutil.Process().memory_info().rss
    asked = config.grouping.n_groups_asked
    most_groups = min(config.grouping.max_groups, len(rows.names)) if asked is None else asked
    one, n_boosters = adapter_bytes(probe), config.boosting.n_rounds
    predicted = _prediction_tokens(config, probe)
    validated = _count_forward(probe, rows.validation, predicted)
    training, checking = _count_training(config, probe, rows)
    passes = {
        "features": _count_features(config, probe, rows),
        "train": _Passes(training, checking, most_groups * one, step, 2 * step),
        "boost": _count_boosting(config, probe, rows),
        "combine": _Passes(
            forward=_times(validated, most_groups + n_boosters + bool(n_boosters)), forward_tokens=predicted
        ),
        "baselines": _Passes(training, checking, one, step, 2 * step),
        "evaluate": _Passes(forward=_count_evaluation(config, probe, rows, most_groups), forward_tokens=predicted),
    }
    if "shared" not in config.evaluation.baselines:
        del passes["baselines"]
    stages = {name: _predict(stage, rates, resident) for name, stage in passes.items()}
    return stages | {"total": _add_up(list(stages.values()))}


def _predict(passes: _Passes, rates: _Rates, resident: int) -> StageForecast:
    both = passes.training.joined(passes.forward)
    return StageForecast(
        seconds=_measure_work(passes.training) / rates.training + _measure_work(passes.forward) / rates.forward,
        flops=both.flops,
        n_tokens=both.n_tokens,
        disk_bytes=passes.disk_bytes,
        memory_bytes=resident
        + max(
            round(rates.bytes_per_token * passes.batch_tokens),
            round(rates.forward_bytes_per_token * passes.forward_tokens),
            passes.held_bytes,
        ),
    )


def _add_up(stages: Sequence[StageForecast]) -> StageForecast:
    return StageForecast(
        seconds=sum(stage.seconds for stage in stages),
        flops=sum(stage.flops for stage in stages),
        n_tokens=sum(stage.n_tokens for stage in stages),
        disk_bytes=sum(stage.disk_bytes for stage in stages),
        memory_bytes=max(stage.memory_bytes for stage in stages),
    )


def _count_training(config: RunConfig, probe: AdaptedModel, rows: Rows) -> tuple[StageRecord, StageRecord]:
    """One adapter for all tasks: its optimiser steps, and the validation passes that choose a checkpoint."""
    settings = config.training
    layout = choose_layout(probe, settings)
    schedule = schedule_training(rows.train, settings, seed=seed_for(config.seed, "batches", "shared"), layout=layout)
    meter, pad = Meter("train"), probe.base.pad_token_id
    for step in schedule:
        batch = collate([(rows.train[task], example) for task, example in step], pad, layout=layout)
        count_training(meter, probe.costs, batch, normalize=settings.loss == "vocab_softmax")
    n_planned = settings.num_train_epochs * settings.evaluations_per_epoch
    stops = {max(1, round(len(schedule) * (i + 1) / n_planned)) for i in range(n_planned)}
    checking = _count_forward(probe, rows.validation, 2 * settings.max_tokens_per_batch)
    return meter.record, _times(checking, len(stops))


def _count_features(config: RunConfig, probe: AdaptedModel, rows: Rows) -> _Passes:
    settings, meter = config.gradients, Meter("features")
    plan = plan_features(find_active_layers(probe, rows.learning), rows.learning, settings)
    modes = choose_modes(rows.learning, settings.output)
    for split in rows.learning:
        width = count_outputs(split, modes[split.task])
        layout, pad = feature_layout(probe, split), probe.base.pad_token_id
        for batch in iterate_batches(split, settings.max_tokens_per_batch, pad, layout=layout):
            count_gradients(
                meter,
                probe.costs,
                batch,
                n_backwards=1 if split.kind == "options" else width,
                n_outputs=width * len(batch.examples),
                projection_flops=plan.projection_flops,
            )
    lower = _count_lower(probe, rows.learning)  # once for all stages that learn
    disk, held = feature_bytes(plan.n_rows, plan.proj_dim) + _measure_cache(config, probe, rows), 0
    if plan.form == "gram":
        count_gram(meter, probe.costs, n_rows=plan.n_rows, n_coordinates=plan.n_coordinates)
        disk, held = disk + scratch_bytes(plan.n_rows, plan.n_coordinates), gram_bytes(plan.n_rows)
    filled = FILL_TOKENS if probe.prefix else 0
    return _Passes(meter.record, lower, disk, settings.max_tokens_per_batch, filled, held)


def _count_boosting(config: RunConfig, probe: AdaptedModel, rows: Rows) -> _Passes:
    """At most: every task in the group that is boosted, and every step length tried."""
    n_rounds, tokens = config.boosting.n_rounds, config.gradients.max_tokens_per_batch
    train, validation = ([s for s in splits if s.kind != "sequence"] for splits in (rows.train, rows.validation))
    if not n_rounds or not train:
        return _Passes()
    start = _times(_count_forward(probe, [*train, *validation], tokens), 2)
    search = _times(_count_forward(probe, train, tokens), n_rounds * (_BOOST_LENGTHS + 1))
    checks = _times(_count_forward(probe, validation, tokens), n_rounds)
    backward = _times(_count_direction(config, probe, train), n_rounds)
    return _Passes(
        backward, start.joined(search).joined(checks), disk_bytes=n_rounds * adapter_bytes(probe), batch_tokens=tokens
    )


def _count_direction(config: RunConfig, probe: AdaptedModel, train: Sequence[EncodedSplit]) -> StageRecord:
    if config.boosting.direction == "projected":
        return _NOTHING
    if config.boosting.direction == "dual":
        return _count(probe, train, config.gradients.max_tokens_per_batch, count_training)
    settings = TrainingConfig(num_train_epochs=1)
    n_steps = len(schedule_training(train, settings, seed=0))
    return _times(
        _count(probe, train, settings.max_tokens_per_batch, count_training), config.boosting.n_steps / n_steps
    )


def _count_evaluation(config: RunConfig, probe: AdaptedModel, rows: Rows, most_groups: int) -> StageRecord:
    """At most: every member on every test row, and the answers of every method to free-text questions."""
    n_members = most_groups + config.boosting.n_rounds + len(config.evaluation.baselines)
    meter = Meter("evaluate")
    for split in rows.test:
        if split.kind == "sequence":
            n_steps = int((split.row_lengths - split.answer_starts).max())
            lengths = np.array([len(context) for context in list_contexts(split)])
            for batch in plan_batches(lengths + n_steps, split.row_counts, _prediction_tokens(config, probe)):
                times = len(config.evaluation.baselines) + 1 + most_groups
                count_generation(meter, probe.costs, lengths[batch].tolist(), n_steps=n_steps, times=times)
    scored = _count_forward(probe, rows.test, _prediction_tokens(config, probe))
    return _times(scored, n_members).joined(meter.record).joined(_count_lower(probe, rows.test))


def _count_forward(probe: AdaptedModel, splits: Iterable[EncodedSplit], max_tokens: int) -> StageRecord:
    return _count(probe, splits, max_tokens, count_forward)


def _count(
    probe: AdaptedModel, splits: Iterable[EncodedSplit], max_tokens: int, enter: Callable[..., None]
) -> StageRecord:
    """Cost of one pass over some splits."""
    meter = Meter("")
    for split in splits:
        for batch in iterate_batches(split, max_tokens, probe.base.pad_token_id, layout=probe.layout):
            enter(meter, probe.costs, batch)
    return meter.record


def _count_lower(probe: AdaptedModel, splits: Iterable[EncodedSplit]) -> StageRecord:
    """The blocks below the lowest adapted one, once a row."""
    return _count(probe, splits, FILL_TOKENS, count_lower) if probe.prefix else _NOTHING


def _measure_cache(config: RunConfig, probe: AdaptedModel, rows: Rows) -> int:
    """Bytes that the activations below the lowest adapted block take while the run lasts."""
    if probe.prefix is None:
        return 0
    n_tokens = sum(int(split.input_lengths.sum()) for split in rows.learning)  # shared contexts take a little less
    model = probe.base.model
    needed = n_tokens * int(model.config.hidden_size) * model.dtype.itemsize
    return min(needed, int(config.model.prefix_cache_gb * 1e9))


def _prediction_tokens(config: RunConfig, probe: AdaptedModel) -> int:
    return choose_max_tokens(probe, config.evaluation.max_tokens_per_batch)


def _times(record: StageRecord, n: float) -> StageRecord:
    return StageRecord(
        record.stage,
        flops=round(n * record.flops),
        n_tokens=round(n * record.n_tokens),
        n_padded_tokens=round(n * record.n_padded_tokens),
    )


def _measure_work(record: StageRecord) -> int:
    return record.flops or record.n_padded_tokens


def _measure_rates(probe: AdaptedModel, rows: Rows, max_tokens: int) -> _Rates:
    """Time a forward pass and a training step on a few middling rows, after one of each to warm up."""
    split = max(rows.train, key=lambda s: s.n_examples)
    batch = collate([(split, e) for e in _choose_timed(split, max_tokens)], probe.base.pad_token_id)
    before, peaks = psutil.Process().memory_info().rss, {"forward": 0, "training": 0}
    seconds = {"forward": 0.0, "training": 0.0}
    for _ in range(2):
        for kind in seconds:
            with Meter(kind) as meter:  # what a pass holds at its fullest is let go at its end
                _pass_once(probe, batch, is_training=kind == "training")
            seconds[kind] = meter.record.wall_seconds
            peaks[kind] = peaks[kind] or max(meter.record.peak_memory_bytes - before, 0)
    meters = {kind: Meter(kind) for kind in seconds}
    if probe.prefix:
        for meter in meters.values():
            count_lower(meter, probe.costs, batch)
    count_forward(meters["forward"], probe.costs, batch)
    count_training(meters["training"], probe.costs, batch)
    return _Rates(
        forward=_measure_work(meters["forward"].record) / seconds["forward"],
        training=_measure_work(meters["training"].record) / seconds["training"],
        bytes_per_token=peaks["training"] / batch.n_padded_tokens,
        forward_bytes_per_token=peaks["forward"] / batch.n_padded_tokens,
    )


def _choose_timed(split: EncodedSplit, max_tokens: int) -> list[int]:
    """Up to eight middling examples, no more than fit a step: one with sixty choices is sixty rows."""
    middle = np.argsort(split.example_lengths, kind="stable")[split.n_examples // 2 :][:8]
    lengths, n_rows = split.measure("rows")
    padded = np.maximum.accumulate(lengths[middle]) * np.cumsum(n_rows[middle])
    n_fitting = int((padded <= max_tokens).sum())
    return [int(example) for example in middle[: max(n_fitting, 1)]]


def _pass_once(probe: AdaptedModel, batch: Batch, *, is_training: bool) -> None:
    with activate(probe, THETA0, trainable=is_training), torch.set_grad_enabled(is_training):
        loss = cross_entropy(score(probe, batch).z, batch).mean()
        if is_training:
            loss.backward()
            probe.peft.zero_grad(set_to_none=True)
    if probe.device.type == "cuda":
        torch.cuda.synchronize()  # else the clock stops before the work does
