"""Passes through the model, entered in the meter: tokens read, and FLOPs by formula, padding included.

In: a meter and one batch. Nothing is measured here; the formulas are accounting.formulas', the sizes the model's.
A family without a formula is counted in tokens only. Passes are counted from the lowest adapted block up; what lies
below is entered by :func:`count_lower` where it was run, which for a kept row is once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ensemblelora.accounting.adapter_shapes import AdapterShape
from ensemblelora.accounting.formulas import (
    Workload,
    count_dequantization_flops,
    count_forward_flops,
    count_full_step_flops,
    count_gradient_pass_flops,
    count_gram_flops,
    count_training_step_flops,
    measure_workload,
)
from ensemblelora.accounting.meter import Meter
from ensemblelora.accounting.shapes import ModelShape, model_shape
from ensemblelora.data.batching import Batch
from ensemblelora.errors import ModelError

__all__ = [
    "PassCosts",
    "count_bodies",
    "count_forward",
    "count_full_training",
    "count_generation",
    "count_gradients",
    "count_gram",
    "count_lower",
    "count_training",
    "read_costs",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassCosts:
    """The sizes that decide what a pass costs."""

    shape: ModelShape
    adapter: AdapterShape
    n_lower: int = 0
    """blocks below the lowest adapted one, which are run and counted apart"""
    is_packed: bool = False
    """whether every pass unpacks the weights of its blocks from 4 bits"""

    @property
    def upper(self) -> PassCosts:
        """The part of the model that runs for every member and in every step."""
        layers = self.adapter.layers[self.n_lower :]
        return replace(
            self,
            shape=replace(self.shape, n_layers=self.shape.n_layers - self.n_lower),
            adapter=replace(self.adapter, layers=layers),
            n_lower=0,
        )

    @property
    def lower(self) -> ModelShape:
        """The blocks below, without an output layer."""
        return replace(self.shape, n_layers=self.n_lower, has_pooler=False)


def read_costs(
    config: Mapping[str, Any], read_adapter: Callable[[ModelShape], AdapterShape], *, n_lower: int = 0
) -> PassCosts | None:
    """Read the sizes off a model's config; none, with a warning, where there is no formula.

    Args:
        config: The model's.
        read_adapter: Gives the adapter's sizes, which depend on the model's.
        n_lower: Blocks below the lowest adapted one.
    """
    try:
        shape = model_shape(config)
        return PassCosts(shape, read_adapter(shape), n_lower, is_packed=bool(config.get("quantization_config")))
    except ModelError as error:
        logger.warning("FLOPs are not counted: %s", error)
        return None


def count_lower(meter: Meter | None, costs: PassCosts | None, batch: Batch) -> None:
    """Enter a pass through the blocks below the lowest adapted one; its tokens are counted with the pass above."""
    if meter is not None and costs is not None:
        rows, width = batch.input_ids.shape
        meter.add_flops(count_forward_flops(costs.lower, measure_workload(np.full(rows, width), n_logits=0)))
        _count_unpacking(meter, costs, costs.lower)


def count_forward(
    meter: Meter | None,
    costs: PassCosts | None,
    batch: Batch,
    *,
    times: int = 1,
    n_passes: int | None = None,
    normalize: bool = False,
) -> None:
    """Enter forward passes of one batch.

    Args:
        meter: What is told.
        costs: Sizes; none counts tokens only.
        batch: What is run.
        times: How often, such as once for each member.
        n_passes: In how many passes, where members share them: what each unpacks of a 4-bit base; none: ``times``.
        normalize: As in :func:`count_training`.
    """
    if meter is None:
        return
    meter.add_tokens(times * batch.n_real_tokens, times * batch.n_padded_tokens)
    if costs is not None:
        upper = costs.upper
        work = _workload(upper, batch, normalize=normalize)
        meter.add_flops(times * (count_forward_flops(upper.shape, work, upper.adapter) + upper.adapter.flops_per_pass))
        _count_unpacking(meter, costs, upper.shape, times if n_passes is None else n_passes)


def count_bodies(meter: Meter | None, costs: PassCosts | None, batch: Batch, *, n_bodies: int, n_heads: int) -> None:
    """Enter passes without the output layer, and the output layer on sums of what they give.

    Args:
        meter: What is told.
        costs: Sizes; none counts tokens only.
        batch: What is run.
        n_bodies: Passes, one an adapter.
        n_heads: How often the output layer is run.
    """
    if meter is None:
        return
    meter.add_tokens(n_bodies * batch.n_real_tokens, n_bodies * batch.n_padded_tokens)
    if costs is not None:
        upper = costs.upper
        work = _workload(upper, batch)
        body = count_forward_flops(upper.shape, replace(work, n_logits=0), upper.adapter) + upper.adapter.flops_per_pass
        meter.add_flops(n_bodies * body + n_heads * 2 * upper.shape.hidden_size * work.n_logits)
        _count_unpacking(meter, costs, upper.shape, n_bodies)


def count_training(meter: Meter | None, costs: PassCosts | None, batch: Batch, *, normalize: bool = False) -> None:
    """Enter a forward and a backward pass that train the adapter.

    Args:
        meter: What is told.
        costs: Sizes; none counts tokens only.
        batch: What is trained on.
        normalize: Whether label tokens meet the whole vocabulary, as for the loss ``vocab_softmax``, or only each
            other.
    """
    if meter is None:
        return
    meter.add_tokens(batch.n_real_tokens, batch.n_padded_tokens)
    if costs is not None:
        upper = costs.upper
        work = _workload(upper, batch, normalize=normalize)
        meter.add_flops(count_training_step_flops(upper.shape, work, upper.adapter) + upper.adapter.flops_per_pass)
        _count_unpacking(meter, costs, upper.shape, 2)


def count_full_training(meter: Meter | None, costs: PassCosts | None, batch: Batch, *, normalize: bool = False) -> None:
    """Enter a forward and a backward pass that train every weight; arguments as in :func:`count_training`."""
    if meter is None:
        return
    meter.add_tokens(batch.n_real_tokens, batch.n_padded_tokens)
    if costs is not None:
        meter.add_flops(count_full_step_flops(costs.shape, _workload(costs, batch, normalize=normalize)))


def count_gradients(
    meter: Meter | None,
    costs: PassCosts | None,
    batch: Batch,
    *,
    n_backwards: int,
    n_outputs: int,
    projection_flops: int,
    n_coordinates: int = 0,
) -> None:
    """Enter a forward pass, its backward passes, and the projection of ``n_outputs`` gradients.

    Args:
        meter: What is told.
        costs: Sizes; none counts tokens only.
        batch: What is differentiated.
        n_backwards: Backward passes.
        n_outputs: Differentiated numbers, all examples together.
        projection_flops: Of projecting one gradient; see :meth:`Projector.count_flops`.
        n_coordinates: p', the numbers with a gradient; more than there are at a fresh start, where LoRA's B is zero,
            mean that A has one, too.
    """
    if meter is None:
        return
    meter.add_tokens(batch.n_real_tokens, batch.n_padded_tokens)
    if costs is not None:
        upper = costs.upper
        work = _workload(upper, batch)
        flops = count_gradient_pass_flops(
            upper.shape,
            work,
            upper.adapter,
            n_backwards=n_backwards,
            n_outputs=n_outputs,
            projection_flops=projection_flops,
            reaches_down=n_coordinates > upper.adapter.n_output_parameters,
        )
        meter.add_flops(flops + upper.adapter.flops_per_pass)
        _count_unpacking(meter, costs, upper.shape, 1 + n_backwards)


def count_gram(meter: Meter | None, costs: PassCosts | None, *, n_rows: int, n_coordinates: int) -> None:
    """Enter the inner products of all pairs of gradients, once; nothing where passes are counted in tokens only."""
    if meter is not None and costs is not None:
        meter.add_flops(count_gram_flops(n_rows, n_coordinates))


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
        passes = count_forward_flops(costs.shape, work, costs.adapter) + n_steps * costs.adapter.flops_per_pass
        meter.add_flops(times * passes)
        _count_unpacking(meter, costs, costs.shape, times * n_steps)


def _count_unpacking(meter: Meter, costs: PassCosts, shape: ModelShape, n_passes: int = 1) -> None:
    if costs.is_packed:
        meter.add_dequantization(count_dequantization_flops(shape, n_passes))


def _workload(costs: PassCosts, batch: Batch, *, normalize: bool = False) -> Workload:
    rows, width = batch.input_ids.shape
    is_whole = normalize | (batch.targets >= 0)  # positions that compute every token's logit
    spelled = int(is_whole.sum()) * costs.shape.vocab_size
    labelled = int(batch.n_choices[batch.choice_example[batch.position_choice[~is_whole]]].sum())
    classified = int(batch.n_choices.sum()) if not len(batch.targets) else 0
    return measure_workload(np.full(rows, width), n_logits=spelled + labelled + classified)
