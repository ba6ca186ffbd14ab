"""What the gradient pass will do, before it does it: of which rows, what is kept of each gradient, and the cost.

In: encoded splits and the section ``gradients`` of a config. Out: examples, batches and :class:`FeaturePlan`; the pass
itself is :mod:`.collect`'s. Where gradients are taken of a share of the rows (``train_fraction``), these are whole
groups, each label in proportion, so that they are a smaller data set of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.accounting.meter import Meter
from ensemblelora.adaptermethods import TrainedLayer
from ensemblelora.adapters import THETA0, AdaptedModel, trainable_layers
from ensemblelora.blocks import OutputMode
from ensemblelora.config import GradientsConfig
from ensemblelora.counting import count_gradients, count_gram
from ensemblelora.data.batching import Batch, collate, plan_batches
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.splitting import sample_by_group
from ensemblelora.gradients.backward import (
    count_coordinates,
    count_outputs,
    feature_layout,
    find_active_layers,
    list_parts,
)
from ensemblelora.gradients.exact import FeatureForm, choose_form
from ensemblelora.gradients.output import choose_modes
from ensemblelora.gradients.projection import Projector
from ensemblelora.seeding import seed_for

__all__ = [
    "CHUNK",
    "FeaturePlan",
    "choose_examples",
    "count_pass",
    "cut_batches",
    "enter_batch",
    "iterate_pass",
    "make_projector",
    "plan_features",
]

Indices = npt.NDArray[np.int64]

CHUNK = 4096
"""examples sorted by length at a time; also what a writer holds before it appends"""


@dataclass(frozen=True)
class FeaturePlan:
    """What will be kept of the gradients, and what that takes; made by :func:`plan_features`."""

    form: FeatureForm
    n_rows: int
    """N: examples of all splits, times their outputs"""
    n_coordinates: int
    """p'"""
    proj_dim: int
    """numbers kept of each gradient; for ``gram`` the most there can be"""
    projection_flops: int
    """of projecting one gradient"""


def make_projector(config: GradientsConfig, *, seed: int) -> Projector:
    """Return the run's projector, all of its projections side by side; its seed is the run's, by name."""
    return Projector(config.proj_type, config.n_projections * config.proj_dim, seed_for(seed, "gradients"))


def choose_examples(split: EncodedSplit, config: GradientsConfig, *, seed: int) -> Indices:
    """Choose the examples of a split whose gradients are taken: whole groups, each label in proportion.

    Args:
        split: Train or validation rows; of any other split all are taken.
        config: Its ``train_fraction`` and ``validation_fraction``.
        seed: The run's root seed.

    Returns:
        Ascending indices, at least one.
    """
    shares = {"train": config.train_fraction, "validation": config.validation_fraction}
    fraction, own_seed = shares.get(split.split, 1.0), seed_for(seed, "feature rows", split.task, split.split)
    kept = sample_by_group(split.labels.tolist(), split.groups.tolist(), fraction, seed=own_seed)
    return np.array(kept, np.int64)


def plan_features(
    layers: Mapping[str, TrainedLayer], splits: Sequence[EncodedSplit], config: GradientsConfig, *, seed: int
) -> FeaturePlan:
    """Decide what is kept of the gradients, before any is taken.

    Args:
        layers: From :func:`~ensemblelora.gradients.backward.find_active_layers`.
        splits: All train and validation splits of a run.
        config: Rows, outputs and projection.
        seed: The run's root seed.

    Raises:
        ConfigError: If exact inner products are asked for, and there are too many rows and coordinates; or
            ``gradients.output`` does not fit a task.
    """
    modes = choose_modes(splits, config.output)
    n_rows = sum(count_outputs(s, modes[s.task]) * len(choose_examples(s, config, seed=seed)) for s in splits)
    n_coordinates, projector = count_coordinates(layers), make_projector(config, seed=0)
    form = choose_form(config.proj_type, n_coordinates=n_coordinates, n_rows=n_rows)
    widths = {"projected": projector.proj_dim, "coordinates": n_coordinates, "gram": n_rows}
    return FeaturePlan(form, n_rows, n_coordinates, widths[form], projector.count_flops(list_parts(layers)))


def cut_batches(
    adapted: AdaptedModel, split: EncodedSplit, examples: Indices, max_tokens: int
) -> Iterator[tuple[range, list[Indices]]]:
    """Yield places in ``examples`` in their order, a chunk at a time, and the batches that each is cut into.

    Args:
        adapted: The model, for how rows are laid out in it.
        split: Whose examples.
        examples: Their indices in the split.
        max_tokens: Padded tokens of a batch.

    Yields:
        A range of places, and batches of similar length, each some of these places.
    """
    lengths, counts = (sizes[examples] for sizes in split.measure(feature_layout(adapted, split)))
    for start in range(0, len(examples), CHUNK):
        chunk = range(start, min(start + CHUNK, len(examples)))
        own = slice(chunk.start, chunk.stop)
        yield chunk, [start + members for members in plan_batches(lengths[own], counts[own], max_tokens)]


def enter_batch(meter: Meter | None, adapted: AdaptedModel, batch: Batch, mode: OutputMode, plan: FeaturePlan) -> None:
    """Enter what the gradients of a batch of one task cost, from the lowest adapted block up."""
    n_outputs = int(batch.n_choices.max()) - 1 if mode == "contrast" else 1
    count_gradients(
        meter,
        adapted.costs,
        batch,
        n_backwards=1 if batch.kinds[0] == "options" else n_outputs,
        n_outputs=n_outputs * len(batch.labels),
        projection_flops=plan.projection_flops,
        n_coordinates=plan.n_coordinates,
    )


def count_pass(
    adapted: AdaptedModel,
    splits: Sequence[EncodedSplit],
    config: GradientsConfig,
    *,
    seed: int,
    meter: Meter,
    is_moved: bool = False,
    enter_more: Callable[[Batch], None] | None = None,
) -> FeaturePlan:
    """Enter what taking the features of some splits would cost, from the lowest adapted block up.

    Args:
        adapted: The model; a few rows are tried for which layers have a gradient.
        splits: Train and validation splits.
        config: Rows, outputs, projection, batch size.
        seed: The run's root seed.
        meter: What is told.
        is_moved: Whether it will be taken where a training has ended, and all trained numbers have a gradient; else
            where the model is now.
        enter_more: Shown every batch.

    Returns:
        What would be kept of the gradients.
    """
    layers = trainable_layers(adapted, THETA0) if is_moved else find_active_layers(adapted, splits)
    plan = plan_features(layers, splits, config, seed=seed)
    for batch, mode in iterate_pass(adapted, splits, config, seed=seed):
        enter_batch(meter, adapted, batch, mode, plan)
        if enter_more is not None:
            enter_more(batch)
    if plan.form == "gram":
        count_gram(meter, adapted.costs, n_rows=plan.n_rows, n_coordinates=plan.n_coordinates)
    return plan


def iterate_pass(
    adapted: AdaptedModel, splits: Sequence[EncodedSplit], config: GradientsConfig, *, seed: int
) -> Iterator[tuple[Batch, OutputMode]]:
    """Yield the batches of the gradient pass over some splits, and which outputs of each are differentiated.

    Args:
        adapted: The model.
        splits: Train and validation splits.
        config: Rows, outputs, batch size.
        seed: The run's root seed.
    """
    modes = choose_modes(splits, config.output)
    for split in splits:
        examples, layout = choose_examples(split, config, seed=seed), feature_layout(adapted, split)
        for _, batches in cut_batches(adapted, split, examples, config.max_tokens_per_batch):
            for places in batches:
                chosen = [(split, int(e)) for e in examples[places]]
                yield collate(chosen, adapted.base.pad_token_id, layout=layout), modes[split.task]
