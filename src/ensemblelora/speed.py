"""How fast this machine runs a model, and what a pass holds in memory, from a few seconds of trying.

In: the adapted model and encoded rows. Out: :class:`Speed`. Unpacking the weights of a 4-bit base takes the same time
whatever the batch, so it is timed apart, and taken off the time of the passes that it is a part of.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil  # type: ignore[import-untyped]  # ships no types
import torch

from ensemblelora.accounting.meter import Meter, StageRecord
from ensemblelora.adapters import THETA0, AdaptedModel, activate
from ensemblelora.counting import count_forward, count_lower, count_training
from ensemblelora.data.batching import Batch, collate
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.passes import score
from ensemblelora.quantization import count_numbers, dequantize_weight, find_packed_layers
from ensemblelora.scoring import cross_entropy

__all__ = ["Speed", "choose_timed", "measure_speed", "measure_work"]

_TIMED_WEIGHTS = 2**25  # enough for a time that means something, unpacked in a fraction of a second
_LEAST_SHARE = 0.1  # of a pass's time; what is left of it when unpacking, timed alone, seems to take all


@dataclass(frozen=True)
class Speed:
    """How fast this machine is; work is FLOPs, or padded tokens for a family without a formula.

    Attributes:
        forward: Work a second of forward passes, unpacking apart.
        training: Work a second of training steps, unpacking apart.
        unpacking: Weights a second that are unpacked from 4 bits; infinite where none are packed.
        bytes_per_token: Of activations that a training step keeps for one padded token.
        forward_bytes_per_token: That a forward pass holds at its fullest, for one padded token.
    """

    forward: float
    training: float
    unpacking: float
    bytes_per_token: float
    forward_bytes_per_token: float

    def predict_seconds(self, training: StageRecord, forward: StageRecord) -> float:
        """Seconds of some passes with a backward pass, and of others without."""
        unpacked = training.dequantization_flops + forward.dequantization_flops
        worked = measure_work(training) / self.training + measure_work(forward) / self.forward
        return worked + unpacked / self.unpacking


def measure_work(record: StageRecord) -> int:
    """FLOPs, or padded tokens where FLOPs are not counted."""
    return record.flops or record.n_padded_tokens


def measure_speed(probe: AdaptedModel, train: Sequence[EncodedSplit], max_tokens: int) -> Speed:
    """Time a forward pass and a training step on a few middling rows, after one of each to warm up.

    Args:
        probe: The model with theta0.
        train: The tasks' training rows.
        max_tokens: Padded tokens of a step.
    """
    split = max(train, key=lambda s: s.n_examples)
    batch = collate([(split, e) for e in choose_timed(split, max_tokens)], probe.base.pad_token_id)
    before, peaks = psutil.Process().memory_info().rss, {"forward": 0, "training": 0}
    seconds = {"forward": 0.0, "training": 0.0}
    for _ in range(2):
        for kind in seconds:
            with Meter(kind) as meter:  # what a pass holds at its fullest is let go at its end
                _pass_once(probe, batch, is_training=kind == "training")
            seconds[kind] = meter.record.wall_seconds
            peaks[kind] = peaks[kind] or max(meter.record.peak_memory_bytes - before, 0)
    unpacking = _measure_unpacking(probe)

    def find_rate(kind: str) -> float:
        record = _count_pass(probe, batch, is_training=kind == "training")
        left = seconds[kind] - record.dequantization_flops / unpacking
        return measure_work(record) / max(left, _LEAST_SHARE * seconds[kind])

    return Speed(
        forward=find_rate("forward"),
        training=find_rate("training"),
        unpacking=unpacking,
        bytes_per_token=peaks["training"] / batch.n_padded_tokens,
        forward_bytes_per_token=peaks["forward"] / batch.n_padded_tokens,
    )


def choose_timed(split: EncodedSplit, max_tokens: int) -> list[int]:
    """Up to eight middling examples, no more than fit a step: one with sixty choices is sixty rows."""
    middle = np.argsort(split.example_lengths, kind="stable")[split.n_examples // 2 :][:8]
    lengths, n_rows = split.measure("rows")
    padded = np.maximum.accumulate(lengths[middle]) * np.cumsum(n_rows[middle])
    n_fitting = int((padded <= max_tokens).sum())
    return [int(example) for example in middle[: max(n_fitting, 1)]]


def _count_pass(probe: AdaptedModel, batch: Batch, *, is_training: bool) -> StageRecord:
    meter = Meter("")
    if probe.prefix:
        count_lower(meter, probe.costs, batch)
    (count_training if is_training else count_forward)(meter, probe.costs, batch)
    return meter.record


def _measure_unpacking(probe: AdaptedModel) -> float:
    """Weights a second, over the first layers of the model."""
    chosen: list[torch.Tensor] = []
    for layer in find_packed_layers(probe.network).values():
        if sum(map(count_numbers, chosen)) < _TIMED_WEIGHTS:
            chosen.append(layer.weight)
    if not chosen:
        return math.inf
    seconds = 0.0
    for _ in range(2):  # the first time loads the kernel
        started = time.perf_counter()
        for weight in chosen:
            dequantize_weight(weight)
        _synchronize(probe)
        seconds = time.perf_counter() - started
    return sum(map(count_numbers, chosen)) / seconds


def _pass_once(probe: AdaptedModel, batch: Batch, *, is_training: bool) -> None:
    with activate(probe, THETA0, trainable=is_training), torch.set_grad_enabled(is_training):
        loss = cross_entropy(score(probe, batch).z, batch).mean()
        if is_training:
            loss.backward()
            probe.peft.zero_grad(set_to_none=True)
    _synchronize(probe)


def _synchronize(probe: AdaptedModel) -> None:
    if probe.device.type == "cuda":
        torch.cuda.synchronize()  # else the clock stops before the work does
