"""Passes through the model, entered in the meter: tokens read, and FLOPs by formula, padding included.

In: a meter and one batch. Nothing is measured here; the formulas are accounting.formulas', the sizes the model's.
A family without a formula is counted in tokens only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensemblelora.accounting.formulas import (
    Workload,
    count_forward_flops,
    count_gradient_pass_flops,
    count_training_step_flops,
    measure_workload,
)
from ensemblelora.accounting.meter import Meter
from ensemblelora.accounting.shapes import AdapterShape, ModelShape, adapter_shape, model_shape
from ensemblelora.data.batching import Batch
from ensemblelora.errors import ModelError

__all__ = ["PassCosts", "count_forward", "count_generation", "count_gradients", "count_training", "read_costs"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassCosts:
    """The sizes that decide what a pass costs."""

    shape: ModelShape
    adapter: AdapterShape


def read_costs(config: Mapping[str, Any], r: int, target_modules: Iterable[str]) -> PassCosts | None:
    """Read the sizes off a model's config; none, with a warning, for a family without a formula."""
    try:
        shape = model_shape(config)
        return PassCosts(shape, adapter_shape(shape, r, target_modules))
    except ModelError as error:
        logger.warning("FLOPs are not counted: %s", error)
        return None


def count_forward(meter: Meter | None, costs: PassCosts | None, batch: Batch, *, times: int = 1) -> None:
    """Enter forward passes of one batch, such as one for each member."""
    if meter is None:
        return
    meter.add_tokens(times * batch.n_real_tokens, times * batch.n_padded_tokens)
    if costs is not None:
        meter.add_flops(times * count_forward_flops(costs.shape, _workload(costs, batch), costs.adapter))


def count_training(meter: Meter | None, costs: PassCosts | None, batch: Batch) -> None:
    """Enter a forward and a backward pass that train the adapter."""
    if meter is None:
        return
    meter.add_tokens(batch.n_real_tokens, batch.n_padded_tokens)
    if costs is not None:
        meter.add_flops(count_training_step_flops(costs.shape, _workload(costs, batch), costs.adapter))


def count_gradients(
    meter: Meter | None, costs: PassCosts | None, batch: Batch, *, n_backwards: int, n_outputs: int, proj_dim: int
) -> None:
    """Enter a forward pass, its backward passes, and the projection of ``n_outputs`` gradients."""
    if meter is None:
        return
    meter.add_tokens(batch.n_real_tokens, batch.n_padded_tokens)
    if costs is not None:
        work = _workload(costs, batch)
        meter.add_flops(
            count_gradient_pass_flops(
                costs.shape, work, costs.adapter, n_backwards=n_backwards, n_outputs=n_outputs, proj_dim=proj_dim
            )
        )


def count_generation(
    meter: Meter | None, costs: PassCosts | None, context_lengths: Sequence[int], *, n_steps: int, times: int = 1
) -> None:
    """Enter the generation of one batch of answers with an attention cache.

    Args:
        meter: What is told.
        costs: Sizes; none counts tokens only.
        context_lengths: Tokens of each context; they are padded to the longest.
        n_steps: Tokens generated for every context; the first comes from the pass over the contexts.
        times: Members that generate together.
    """
    if meter is None:
        return
    rows, width = len(context_lengths), max(context_lengths)
    later = n_steps - 1  # passes over one new token each
    n_tokens = rows * (width + later)
    meter.add_tokens(times * (sum(context_lengths) + rows * later), times * n_tokens)
    if costs is not None:
        seen = width**2 + sum(width + step for step in range(1, n_steps))
        work = Workload(rows, n_tokens, n_pairs=rows * seen, n_logits=rows * n_steps * costs.shape.vocab_size)
        meter.add_flops(times * count_forward_flops(costs.shape, work, costs.adapter))


def _workload(costs: PassCosts, batch: Batch) -> Workload:
    rows, width = batch.input_ids.shape
    spelled = int((batch.targets >= 0).sum()) * costs.shape.vocab_size
    labelled = int(batch.n_choices[batch.row_example[batch.position_row[batch.targets < 0]]].sum())
    classified = int(batch.n_choices.sum()) if not len(batch.targets) else 0
    return measure_workload(np.full(rows, width), n_logits=spelled + labelled + classified)
