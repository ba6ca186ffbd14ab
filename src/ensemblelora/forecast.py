"""What a run would cost, before it starts: tokens and FLOPs by formula, seconds from a short measurement.

In: the encoded rows and the adapted model. Out: one record per stage, by the ledger's own names. Nothing is written.
``features`` and ``baselines`` count the very batches a run will take. Training in groups costs nearly the same for any
partition: every task's rows pass once an epoch, and only the padding depends on who shares a batch. What depends on
the plan or on the outcome (``boost``, ``combine``, ``evaluate``) is counted at its most.
The oracle's fits take seconds and no model, and are left out. Blocks below the lowest adapted one count once a row that
fits ``model.prefix_cache_gb``, and with every pass of one that does not. Memory is that of the largest batch there is:
few rows, or short ones, don't fill what a step may hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]  # ships no types
from numpy.typing import NDArray

from ensemblelora.accounting.formulas import feature_bytes
from ensemblelora.accounting.meter import Meter, StageRecord
from ensemblelora.adapters import AdaptedModel, adapter_bytes
from ensemblelora.config import GradientsConfig, RunConfig, TrainingConfig
from ensemblelora.counting import count_forward, count_generation, count_lower, count_training
from ensemblelora.data.batching import (
    Batch,
    collate,
    iterate_batches,
    plan_batches,
    plan_evaluations,
    schedule_training,
)
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.subset import take_examples
from ensemblelora.generation import list_contexts
from ensemblelora.gradients.exact import gram_bytes, scratch_bytes
from ensemblelora.gradients.plan import choose_examples, count_pass
from ensemblelora.passes import FILL_TOKENS, choose_max_tokens
from ensemblelora.prefix import choose_kept, count_slots, find_room
from ensemblelora.seeding import seed_for
from ensemblelora.speed import Speed, measure_speed
from ensemblelora.stages import Rows
from ensemblelora.startpoint import cut_training, is_warm
from ensemblelora.training import choose_layout

__all__ = ["Forecaster", "Passes", "StageForecast", "add_up", "forecast_run", "list_stages", "make_forecaster"]

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
    dequantization_flops: int = 0
    """operations that unpack a 4-bit base; not in ``flops``"""


@dataclass(frozen=True)
class Passes:
    """What is run through the model."""

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


@dataclass(frozen=True, eq=False)
class Forecaster:
    """A run, and how fast this machine is; made by :func:`make_forecaster`.

    Attributes:
        config: The run's.
        probe: The model with its start adapter.
        rows: Of all tasks.
        speed: Of this machine.
        resident: Bytes of the process now.
        unkept: Task and split of the rows whose lower blocks are run with every pass.
        kept_bytes: Of activations below the lowest adapted block, while the run lasts.
    """

    config: RunConfig
    probe: AdaptedModel
    rows: Rows
    speed: Speed
    resident: int
    unkept: frozenset[tuple[str, str]]
    kept_bytes: int

    @property
    def most_groups(self) -> int:
        """As many groups as the plan may have."""
        asked = self.config.grouping.n_groups_asked
        return self.config.grouping.list_numbers(len(self.rows.names))[-1] if asked is None else asked

    def predict(self, passes: Passes) -> StageForecast:
        """Turn what is run into time and memory."""
        both = passes.training.joined(passes.forward)
        return StageForecast(
            seconds=self.speed.predict_seconds(passes.training, passes.forward),
            flops=both.flops,
            n_tokens=both.n_tokens,
            disk_bytes=passes.disk_bytes,
            memory_bytes=self.resident
            + max(
                round(self.speed.bytes_per_token * passes.batch_tokens),
                round(self.speed.forward_bytes_per_token * passes.forward_tokens),
                passes.held_bytes,
            ),
            dequantization_flops=both.dequantization_flops,
        )

    def boosting(self, n_rounds: int) -> StageForecast:
        """Boosting with some number of rounds, at its most."""
        return self.predict(_count_boosting(self, n_rounds))

    def features(
        self, train_fraction: float, *, is_moved: bool = False, judges: Collection[str] | None = None
    ) -> StageForecast:
        """The gradient pass over a share of the training rows, at theta0 or where a training has ended.

        ``judges`` are the tasks whose validation rows are passed, too; none: all.
        """
        settings = self.config.gradients.model_copy(update={"train_fraction": train_fraction})
        return self.predict(_count_features(self, settings, is_moved=is_moved, judges=judges))


def make_forecaster(config: RunConfig, probe: AdaptedModel, rows: Rows, speed: Speed | None = None) -> Forecaster:
    """Time a few seconds of passes, and see what of the lower blocks can be kept.

    Args:
        config: The run.
        probe: The model with its start adapter.
        rows: Encoded tasks.
        speed: Of this machine, where it is known; none: it is measured.
    """
    speed = speed or measure_speed(probe, rows.train, config.training.max_tokens_per_batch)
    resident = psutil.Process().memory_info().rss
    unkept: frozenset[tuple[str, str]] = frozenset()
    kept_bytes = 0
    if probe.prefix is not None:
        model = probe.base.model
        width = int(model.config.hidden_size) * model.dtype.itemsize
        sizes = [count_slots(split) * width for split in rows.learning]
        are_kept = choose_kept(sizes, find_room(Path(config.out), int(config.model.prefix_cache_gb * 1e9)))
        kept_bytes = sum(size for size, is_kept in zip(sizes, are_kept, strict=True) if is_kept)
        unkept = frozenset(
            (split.task, split.split) for split, is_kept in zip(rows.learning, are_kept, strict=True) if not is_kept
        )
    return Forecaster(config, probe, rows, speed, resident, unkept, kept_bytes)


def forecast_run(config: RunConfig, probe: AdaptedModel, rows: Rows) -> dict[str, StageForecast]:
    """Predict the cost of every stage and their total.

    Args:
        config: The run.
        probe: The model with its start adapter; a few seconds of passes are timed on it.
        rows: Encoded tasks.
    """
    return list_stages(make_forecaster(config, probe, rows))


def list_stages(run: Forecaster) -> dict[str, StageForecast]:
    """Predict the cost of every stage and their total."""
    config, probe, rows, n_boosters = run.config, run.probe, run.rows, run.config.boosting.n_rounds
    predicted = _prediction_tokens(run)
    n_members = config.ensemble.count_candidates(run.most_groups) + n_boosters
    step, check = _fill_step(run), _fill(run, rows.validation, 2 * config.training.max_tokens_per_batch)
    one, (training, checking) = adapter_bytes(probe), _count_training(run)
    validated = _times(_count_forward(run, rows.validation, predicted), n_members + bool(n_boosters))
    passes = {
        "features": _count_features(run, config.gradients, is_moved=is_warm(config)),
        "train": Passes(training, checking, run.most_groups * one, step, check),
        "boost": _count_boosting(run, n_boosters),
        "combine": Passes(
            forward=validated.joined(_count_unkept(run, rows.validation, predicted)),
            forward_tokens=_fill(run, rows.validation, predicted, n_members),
        ),
        "baselines": Passes(training, checking, one, step, check),
        "evaluate": Passes(
            forward=_count_evaluation(run), forward_tokens=_fill(run, rows.test, predicted, n_members + 1)
        ),
    }
    if is_warm(config):
        share = cut_training(config)[0].num_train_epochs / config.training.num_train_epochs
        parts = [(_times(training, part), _times(checking, part)) for part in (share, 1 - share)]
        passes = {"warmup": Passes(*parts[0], one, step, check), **passes}
        passes["train"] = Passes(*parts[1], run.most_groups * one, step, check)
    if "shared" not in config.evaluation.baselines:
        del passes["baselines"]
    stages = {name: run.predict(stage) for name, stage in passes.items()}
    return stages | {"total": add_up(list(stages.values()))}


def add_up(stages: Sequence[StageForecast]) -> StageForecast:
    """What stages take one after the other."""
    return StageForecast(
        seconds=sum(stage.seconds for stage in stages),
        flops=sum(stage.flops for stage in stages),
        n_tokens=sum(stage.n_tokens for stage in stages),
        disk_bytes=sum(stage.disk_bytes for stage in stages),
        memory_bytes=max((stage.memory_bytes for stage in stages), default=0),
        dequantization_flops=sum(stage.dequantization_flops for stage in stages),
    )


def _count_training(run: Forecaster) -> tuple[StageRecord, StageRecord]:
    """One adapter for all tasks: its optimiser steps, and the validation passes that choose a checkpoint."""
    settings, probe, train = run.config.training, run.probe, run.rows.train
    layout = choose_layout(probe, settings)
    schedule = schedule_training(train, settings, seed=seed_for(run.config.seed, "batches", "shared"), layout=layout)
    meter, lower, pad = Meter("train"), Meter("lower"), probe.base.pad_token_id
    for step in schedule:
        batch = collate([(train[task], example) for task, example in step], pad, layout=layout)
        count_training(meter, probe.costs, batch, normalize=settings.loss == "vocab_softmax")
        _enter_unkept(lower, run, batch)
    n_stops = len(plan_evaluations(len(schedule), settings.num_train_epochs * settings.evaluations_per_epoch))
    checking = _count_all(run, run.rows.validation, 2 * settings.max_tokens_per_batch)
    return meter.record, lower.record.joined(_times(checking, n_stops))


def _count_features(
    run: Forecaster, settings: GradientsConfig, *, is_moved: bool = False, judges: Collection[str] | None = None
) -> Passes:
    probe, learning, seed = run.probe, run.rows.learning, run.config.seed
    if judges is not None and settings.proj_type != "none":
        learning = tuple(split for split in learning if split.split == "train" or split.task in judges)
    meter, lower = Meter("features"), Meter("lower")
    largest = 0

    def enter_more(batch: Batch) -> None:
        nonlocal largest
        largest = max(largest, batch.n_padded_tokens)
        _enter_unkept(lower, run, batch)

    plan = count_pass(probe, learning, settings, seed=seed, meter=meter, is_moved=is_moved, enter_more=enter_more)
    kept = [split for split in learning if (split.task, split.split) not in run.unkept]
    filled = _count_lower(probe, kept)  # once for all stages that learn
    disk, held = feature_bytes(plan.n_rows, plan.proj_dim) + run.kept_bytes, 0
    if plan.form == "gram":
        disk, held = disk + scratch_bytes(plan.n_rows, plan.n_coordinates), gram_bytes(plan.n_rows)
    tokens = _fill(run, kept, FILL_TOKENS) if probe.prefix else 0
    return Passes(meter.record, lower.record.joined(filled), disk, largest, tokens, held)


def _count_boosting(run: Forecaster, n_rounds: int) -> Passes:
    """At most: every task in the group that is boosted, and every step length tried."""
    config, tokens = run.config, run.config.gradients.max_tokens_per_batch
    train, validation = (
        [s for s in splits if s.kind != "sequence"] for splits in (run.rows.train, run.rows.validation)
    )
    if not n_rounds or not train:
        return Passes()
    train = [take_examples(s, choose_examples(s, config.gradients, seed=config.seed)) for s in train]
    start = _times(_count_forward(run, [*train, *validation], tokens), 2)  # theta0 and the group's, in one go
    start = start.joined(_count_unkept(run, [*train, *validation], tokens))
    search = _times(_count_all(run, train, tokens), n_rounds * (_BOOST_LENGTHS + 1))
    checks = _times(_count_all(run, validation, tokens), n_rounds)
    backward, lower = (_times(record, n_rounds) for record in _count_direction(run, train))
    return Passes(
        backward,
        start.joined(search).joined(checks).joined(lower),
        disk_bytes=n_rounds * adapter_bytes(run.probe),
        batch_tokens=_fill(run, train, tokens),
    )


def _count_direction(run: Forecaster, train: Sequence[EncodedSplit]) -> tuple[StageRecord, StageRecord]:
    """One step of boosting: passes with a backward pass, and of lower blocks."""
    config = run.config
    if config.boosting.direction == "projected":
        return _NOTHING, _NOTHING
    tokens, share = config.gradients.max_tokens_per_batch, 1.0
    if config.boosting.direction == "steps":
        settings = TrainingConfig(num_train_epochs=1)
        tokens, share = (
            settings.max_tokens_per_batch,
            config.boosting.n_steps / len(schedule_training(train, settings, seed=0)),
        )
    return _times(_count(run, train, tokens, count_training), share), _times(_count_unkept(run, train, tokens), share)


def _count_evaluation(run: Forecaster) -> StageRecord:
    """At most: every member on every test row, and the answers of every method to free-text questions."""
    config, probe, tokens = run.config, run.probe, _prediction_tokens(run)
    n_candidates = config.ensemble.count_candidates(run.most_groups)
    n_members = n_candidates + config.boosting.n_rounds + len(config.evaluation.baselines)
    meter = Meter("evaluate")
    for split in run.rows.test:
        if split.kind == "sequence":
            n_steps = int((split.row_lengths - split.answer_starts).max())
            lengths = np.array([len(context) for context in list_contexts(split)])
            for batch in plan_batches(lengths + n_steps, split.row_counts, tokens):
                times = len(config.evaluation.baselines) + 1 + n_candidates
                count_generation(meter, probe.costs, lengths[batch].tolist(), n_steps=n_steps, times=times)
    scored = _times(_count_forward(run, run.rows.test, tokens), n_members)
    return scored.joined(meter.record).joined(_count_lower(probe, run.rows.test))


def _count_all(run: Forecaster, splits: Iterable[EncodedSplit], max_tokens: int) -> StageRecord:
    """A forward pass of one adapter, lower blocks included where they are not kept."""
    splits = tuple(splits)
    return _count_forward(run, splits, max_tokens).joined(_count_unkept(run, splits, max_tokens))


def _count_forward(run: Forecaster, splits: Iterable[EncodedSplit], max_tokens: int) -> StageRecord:
    return _count(run, splits, max_tokens, count_forward)


def _count_unkept(run: Forecaster, splits: Iterable[EncodedSplit], max_tokens: int) -> StageRecord:
    """The lower blocks of a pass, of rows whose activations are not kept; once for all members that read them."""
    meter = Meter("")
    for batch in _iterate(run.probe, splits, max_tokens):
        _enter_unkept(meter, run, batch)
    return meter.record


def _enter_unkept(meter: Meter, run: Forecaster, batch: Batch) -> None:
    rows = sorted({span.at[0] for span in batch.spans if (span.split.task, span.split.split) in run.unkept})
    if rows:
        count_lower(meter, run.probe.costs, replace(batch, input_ids=batch.input_ids[rows]))


def _count(run: Forecaster, splits: Iterable[EncodedSplit], max_tokens: int, enter: Callable[..., None]) -> StageRecord:
    """Cost of one pass over some splits."""
    meter = Meter("")
    for batch in _iterate(run.probe, splits, max_tokens):
        enter(meter, run.probe.costs, batch)
    return meter.record


def _count_lower(probe: AdaptedModel, splits: Iterable[EncodedSplit]) -> StageRecord:
    """The blocks below the lowest adapted one, once a row."""
    meter = Meter("")
    for batch in _iterate(probe, splits, FILL_TOKENS) if probe.prefix else ():
        count_lower(meter, probe.costs, batch)
    return meter.record


def _iterate(probe: AdaptedModel, splits: Iterable[EncodedSplit], max_tokens: int) -> Iterator[Batch]:
    for split in splits:
        yield from iterate_batches(split, max_tokens, probe.base.pad_token_id, layout=probe.layout)


def _fill(run: Forecaster, splits: Iterable[EncodedSplit], max_tokens: int, n_members: int = 1) -> int:
    """Padded tokens of the largest batch of a split, or of as many members' as share a pass."""
    sizes = [split.measure(run.probe.layout) for split in splits]
    largest = max((_find_largest(*size, plan_batches(*size, max_tokens)) for size in sizes), default=0)
    return max(largest, min(n_members * largest, max_tokens))


def _fill_step(run: Forecaster) -> int:
    """Padded tokens of the largest optimiser step that any group could have: of the longest rows of all tasks."""
    settings = run.config.training
    sizes = [split.measure(choose_layout(run.probe, settings)) for split in run.rows.train]
    lengths, counts = (np.concatenate(parts) for parts in zip(*sizes, strict=True))
    most = settings.max_examples_per_batch
    return _find_largest(
        lengths, counts, plan_batches(lengths, counts, settings.max_tokens_per_batch, max_examples=most)
    )


def _find_largest(lengths: NDArray[np.int64], counts: NDArray[np.int64], batches: Sequence[NDArray[np.int64]]) -> int:
    return max((int(lengths[batch].max() * counts[batch].sum()) for batch in batches), default=0)


def _prediction_tokens(run: Forecaster) -> int:
    return choose_max_tokens(run.probe, run.config.evaluation.max_tokens_per_batch)


def _times(record: StageRecord, n: float) -> StageRecord:
    return StageRecord(
        record.stage,
        flops=round(n * record.flops),
        n_tokens=round(n * record.n_tokens),
        n_padded_tokens=round(n * record.n_padded_tokens),
        dequantization_flops=round(n * record.dequantization_flops),
    )
