"""Run the model once over every example and write the features the oracle works on.

In: the adapted model at theta0 and encoded splits. Out: a feature store and a :class:`FeatureHealth`. What is stored of
a gradient is its random projection; with ``gradients.proj_type: none``, all coordinates or, where there are fewer rows
than coordinates, exact inner products (:mod:`.exact`). The blocks of the last form belong together: new rows need all
of them to be made again.

Cost: (forward + passes x backward to the lowest adapted layer) per row + the projection of each output row
(:mod:`.projection`), or 2 p' for each pair of rows, where p' counts the coordinates whose gradient at theta0 is not
structurally zero (LoRA: B only).
Slow twin: autograd, one example at a time, in tests/test_collect.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ensemblelora.accounting.meter import Meter
from ensemblelora.adaptermethods import TrainedLayer
from ensemblelora.adapters import THETA0, AdaptedModel, activate
from ensemblelora.blocks import OutputMode
from ensemblelora.config import GradientsConfig
from ensemblelora.counting import count_gradients, count_gram
from ensemblelora.data.batching import collate, plan_batches
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import StoreError
from ensemblelora.gradients.backward import (
    Features,
    compute_features,
    count_coordinates,
    count_outputs,
    feature_layout,
    find_active_layers,
    list_parts,
)
from ensemblelora.gradients.exact import (
    FeatureForm,
    Scratch,
    choose_form,
    clear_scratch,
    compute_gram,
    factor_gram,
    measure_error,
    open_scratch,
)
from ensemblelora.gradients.health import FeatureHealth, check_health
from ensemblelora.gradients.output import choose_modes, label_of_mode
from ensemblelora.gradients.projection import Projector
from ensemblelora.progress import track
from ensemblelora.seeding import seed_for
from ensemblelora.store import FeatureStore

__all__ = [
    "FeatureHealth",
    "FeaturePlan",
    "Features",
    "collect_features",
    "compute_features",
    "count_coordinates",
    "count_outputs",
    "feature_layout",
    "find_active_layers",
    "make_projector",
    "plan_features",
]

_CHUNK = 4096  # examples sorted by length at a time; also what a writer holds before it appends


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


@dataclass(frozen=True, eq=False)
class _Rows:
    """One split's gradients, in its own order of examples."""

    outputs: npt.NDArray[np.float32]
    """(n, c)"""
    features: npt.NDArray[np.float32]
    """(n, c, d)"""
    squared_norms: npt.NDArray[np.float32]
    """(n,)"""


@dataclass(frozen=True, eq=False)
class _Pass:
    """What every batch of the gradient pass shares."""

    adapted: AdaptedModel
    layers: Mapping[str, TrainedLayer]
    projector: Projector
    plan: FeaturePlan
    max_tokens: int
    meter: Meter | None

    def run(
        self, split: EncodedSplit, examples: npt.NDArray[np.int64], mode: OutputMode, into: Tensor | None = None
    ) -> Features:
        """Differentiate a batch and enter its cost."""
        adapted, layout = self.adapted, feature_layout(self.adapted, split)
        batch = collate([(split, int(e)) for e in examples], adapted.base.pad_token_id, layout=layout)
        found = compute_features(adapted, self.layers, self.projector, batch, mode, into=into, meter=self.meter)
        count_gradients(
            self.meter,
            adapted.costs,
            batch,
            n_backwards=1 if split.kind == "options" else found.outputs.shape[1],
            n_outputs=found.outputs.size,
            projection_flops=self.plan.projection_flops,
        )
        return found

    def chunks(self, split: EncodedSplit) -> Iterator[tuple[range, list[npt.NDArray[np.int64]]]]:
        """Yield examples in their own order, a chunk at a time, and the batches of similar length it is cut into."""
        lengths, counts = split.measure(feature_layout(self.adapted, split))
        for start in range(0, split.n_examples, _CHUNK):
            chunk = range(start, min(start + _CHUNK, split.n_examples))
            own = slice(chunk.start, chunk.stop)
            yield chunk, [start + members for members in plan_batches(lengths[own], counts[own], self.max_tokens)]


def make_projector(config: GradientsConfig, *, seed: int) -> Projector:
    """Return the run's projector, all of its projections side by side; its seed is the run's, by name."""
    return Projector(config.proj_type, config.n_projections * config.proj_dim, seed_for(seed, "gradients"))


def plan_features(
    layers: Mapping[str, TrainedLayer], splits: Sequence[EncodedSplit], config: GradientsConfig
) -> FeaturePlan:
    """Decide what is kept of the gradients, before any is taken.

    Args:
        layers: From :func:`find_active_layers`.
        splits: All train and validation splits of a run.
        config: Outputs and projection.

    Raises:
        ConfigError: If exact inner products are asked for, and there are too many rows and coordinates; or
            ``gradients.output`` does not fit a task.
    """
    modes = choose_modes(splits, config.output)
    n_rows = sum(count_outputs(split, modes[split.task]) * split.n_examples for split in splits)
    n_coordinates, projector = count_coordinates(layers), make_projector(config, seed=0)
    form = choose_form(config.proj_type, n_coordinates=n_coordinates, n_rows=n_rows)
    widths = {"projected": projector.proj_dim, "coordinates": n_coordinates, "gram": n_rows}
    return FeaturePlan(form, n_rows, n_coordinates, widths[form], projector.count_flops(list_parts(layers)))


def collect_features(
    adapted: AdaptedModel,
    splits: Sequence[EncodedSplit],
    store: FeatureStore,
    config: GradientsConfig,
    *,
    seed: int,
    fingerprints: Mapping[tuple[str, str], str],
    meter: Meter | None = None,
) -> FeatureHealth:
    """Compute the features of every split that the store does not have yet.

    Where exact inner products are kept (``proj_type: none`` and fewer rows than coordinates), one split that is missing
    means that all are computed: rows can't be added to such a store.

    Args:
        adapted: The model; gradients are taken at its adapter theta0.
        splits: Encoded train and validation splits; all of a task's together, since they get the same outputs.
        store: Where the features go; complete blocks with the same fingerprint are not computed again.
        config: Outputs, projection, batch size.
        seed: The run's root seed.
        fingerprints: Identity of each (task, split): data, model, adapter, config, outputs; for exact inner products
            from :func:`~ensemblelora.gradients.exact.join_fingerprints`.
        meter: Told what every pass costs.

    Raises:
        ModelError: If an example's gradient depends on what else is in its batch, or the model makes its logits in a
            way that the scores here don't follow.
        ConfigError: If exact inner products are asked for, and there are too many rows and coordinates.
        OutputError: If the disk has no room for gradients whose inner products are to be taken.
        StoreError: If a gradient is not finite.
    """
    modes = choose_modes(splits, config.output)
    kinds = [(split, modes[split.task]) for split in splits]
    clear_scratch(store.folder)
    with activate(adapted, THETA0):
        layers = find_active_layers(adapted, splits)
        plan, projector = plan_features(layers, splits, config), make_projector(config, seed=seed)
        job = _Pass(adapted, layers, projector, plan, config.max_tokens_per_batch, meter)
        if plan.form == "gram":
            return _collect_gram(job, kinds, store, fingerprints)
        health = check_health(adapted, layers, projector, kinds, config.max_tokens_per_batch)
        for split, mode in kinds:
            identity = fingerprints[split.task, split.split]
            if not store.has(split.task, split.split, identity):
                _write_block(store, split, mode, identity, _iterate_rows(job, split, mode))
    return health


def _collect_gram(
    job: _Pass,
    kinds: Sequence[tuple[EncodedSplit, OutputMode]],
    store: FeatureStore,
    fingerprints: Mapping[tuple[str, str], str],
) -> FeatureHealth:
    """Keep exact inner products of all splits' rows, if any split is missing."""
    adapted = job.adapted
    # A few rows are tried with a projection: whole gradients of theirs might not fit the memory.
    few = replace(job.projector, proj_type="rademacher")
    is_kept = [store.has(s.task, s.split, fingerprints[s.task, s.split]) for s, _ in kinds]
    if all(is_kept):
        health, first = check_health(adapted, job.layers, few, kinds, job.max_tokens), kinds[0][0]
        width = store.read(first.task, first.split).proj_dim
        return replace(health, form="gram", proj_dim=width, projection_error=None)
    cache = adapted.prefix.cache if adapted.prefix else None
    reserved = cache.bytes_to_come if cache else 0
    sizes = {"n_rows": job.plan.n_rows, "n_coordinates": job.plan.n_coordinates}
    with open_scratch(store.folder, **sizes, reserved_bytes=reserved) as scratch:
        health = check_health(adapted, job.layers, few, kinds, job.max_tokens)
        parts: list[_Written] = []
        start = 0
        for split, mode in kinds:
            parts.append(_write_gradients(job, split, mode, scratch, start))
            start += parts[-1].slots.size
        features = factor_gram(compute_gram(scratch))
        count_gram(job.meter, adapted.costs, **sizes)
        error = measure_error(scratch, features)
    # Blocks of two computations don't fit together. Until the last that was missing is there, none count; so those go
    # last, or a process killed in between could leave a new one beside an old one with nothing missing.
    for i in sorted(range(len(kinds)), key=lambda i: not is_kept[i]):
        (split, mode), part = kinds[i], parts[i]
        rows = _Rows(part.outputs, features[part.slots], part.squared_norms)
        _write_block(store, split, mode, fingerprints[split.task, split.split], [(range(split.n_examples), rows)])
    return replace(health, form="gram", proj_dim=features.shape[1], projection_error=error)


@dataclass(frozen=True, eq=False)
class _Written:
    """One split's share of a scratch file, in its own order of examples."""

    outputs: npt.NDArray[np.float32]
    squared_norms: npt.NDArray[np.float32]
    slots: npt.NDArray[np.int64]
    """(n, c): rows of the file"""


def _write_gradients(job: _Pass, split: EncodedSplit, mode: OutputMode, scratch: Scratch, start: int) -> _Written:
    """Fill rows of the file from ``start`` on, batch after batch."""
    shape = (split.n_examples, count_outputs(split, mode))
    written = _Written(np.zeros(shape, np.float32), np.zeros(shape[0], np.float32), np.zeros(shape, np.int64))
    for _, batches in job.chunks(split):
        for examples in track(batches, f"gradients {split.task} ({split.split})"):
            stop = start + len(examples) * shape[1]
            found = job.run(split, examples, mode, into=torch.from_numpy(scratch.map_rows(start, stop)))
            _check_finite(split, examples, found)
            n, c = found.outputs.shape
            written.outputs[examples, :c], written.squared_norms[examples] = found.outputs, found.squared_norms
            # Of a batch whose examples all have few choices, the last rows stay zero: contrasts that it lacks.
            own, others = np.split(np.arange(start, stop), [n * c])
            written.slots[examples] = np.concatenate([own.reshape(n, c), others.reshape(n, -1)], axis=1)
            start = stop
    return written


def _check_finite(split: EncodedSplit, examples: npt.NDArray[np.int64], found: Features) -> None:
    is_finite = np.isfinite(found.squared_norms) & np.isfinite(found.outputs).all(axis=1)
    if not is_finite.all():
        first = split.ids[int(examples[int(np.argmin(is_finite))])]
        raise StoreError(
            f"features of task {split.task!r}, {split.split}: the gradient of example {first!r} is not finite; use a "
            "wider dtype"
        )


def _iterate_rows(job: _Pass, split: EncodedSplit, mode: OutputMode) -> Iterator[tuple[range, _Rows]]:
    """Yield a split's rows in their own order, a chunk at a time."""
    width = count_outputs(split, mode)
    for chunk, batches in job.chunks(split):
        shape = (len(chunk), width)
        features = np.zeros((*shape, job.plan.proj_dim), np.float32)
        rows = _Rows(np.zeros(shape, np.float32), features, np.zeros(shape[0], np.float32))
        for examples in track(batches, f"features {split.task} ({split.split})"):
            found, places = job.run(split, examples, mode), examples - chunk.start
            c = found.outputs.shape[1]  # a batch whose examples all have few choices has few contrasts
            rows.outputs[places, :c], rows.features[places, :c] = found.outputs, found.features
            rows.squared_norms[places] = found.squared_norms
        yield chunk, rows


def _write_block(
    store: FeatureStore,
    split: EncodedSplit,
    mode: OutputMode,
    identity: str,
    pieces: Iterable[tuple[range, _Rows]],
) -> None:
    with store.writer(split.task, split.split, identity, mode=mode) as writer:
        for chunk, rows in pieces:
            own = slice(chunk.start, chunk.stop)
            writer.append(
                outputs=rows.outputs,
                features=rows.features,
                labels=label_of_mode(split.labels[own], mode),
                n_choices=split.n_choices[own].astype(np.int64),
                squared_norms=rows.squared_norms,
                groups=split.groups[own],
                ids=split.ids[own],
            )
