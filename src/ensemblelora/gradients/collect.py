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

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ensemblelora.accounting.meter import Meter, release_memory
from ensemblelora.adaptermethods import TrainedLayer
from ensemblelora.adapters import THETA0, AdaptedModel, activate
from ensemblelora.blocks import OutputMode
from ensemblelora.config import GradientsConfig
from ensemblelora.counting import count_gram
from ensemblelora.data.batching import collate
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import StoreError
from ensemblelora.gradients.backward import (
    Features,
    compute_features,
    count_coordinates,
    count_outputs,
    feature_layout,
    find_active_layers,
)
from ensemblelora.gradients.exact import (
    Scratch,
    clear_scratch,
    compute_gram,
    factor_gram,
    measure_error,
    open_scratch,
)
from ensemblelora.gradients.health import FeatureHealth, check_health
from ensemblelora.gradients.output import choose_modes, label_of_mode
from ensemblelora.gradients.plan import (
    CHUNK,
    FeaturePlan,
    choose_examples,
    cut_batches,
    enter_batch,
    make_projector,
    plan_features,
)
from ensemblelora.gradients.projection import Projector
from ensemblelora.progress import track
from ensemblelora.store import FeatureStore

__all__ = [
    "FeatureHealth",
    "FeaturePiece",
    "FeaturePlan",
    "Features",
    "collect_features",
    "collect_piece",
    "compute_features",
    "count_coordinates",
    "count_outputs",
    "feature_layout",
    "find_active_layers",
    "make_projector",
    "plan_features",
]

Indices = npt.NDArray[np.int64]

_PIECES = "pieces"  # of splits that several processes work on, until they are joined


@dataclass(frozen=True, eq=False)
class _Rows:
    """Gradients of some of a split's examples, in its order."""

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

    def run(self, split: EncodedSplit, examples: Indices, mode: OutputMode, into: Tensor | None = None) -> Features:
        """Differentiate a batch and enter its cost."""
        adapted, layout = self.adapted, feature_layout(self.adapted, split)
        batch = collate([(split, int(e)) for e in examples], adapted.base.pad_token_id, layout=layout)
        found = compute_features(adapted, self.layers, self.projector, batch, mode, into=into, meter=self.meter)
        enter_batch(self.meter, adapted, batch, mode, self.plan)
        return found


@dataclass(frozen=True, eq=False)
class _Part:
    """What is taken of one split."""

    split: EncodedSplit
    mode: OutputMode
    examples: Indices
    """ascending"""

    @property
    def key(self) -> tuple[str, str]:
        return self.split.task, self.split.split


@dataclass(frozen=True)
class FeaturePiece:
    """Examples of one split, by their places among those that are taken of it."""

    task: str
    split: str
    first: int
    stop: int
    n_tokens: int
    mode: OutputMode
    plan: FeaturePlan


def collect_features(
    adapted: AdaptedModel,
    splits: Sequence[EncodedSplit],
    store: FeatureStore,
    config: GradientsConfig,
    *,
    seed: int,
    fingerprints: Mapping[tuple[str, str], str],
    meter: Meter | None = None,
    hand_out: Callable[[Sequence[FeaturePiece]], None] | None = None,
) -> FeatureHealth:
    """Compute the features of every split that the store does not have yet, or of a share of its examples.

    Where exact inner products are kept (``proj_type: none`` and fewer rows than coordinates), one split that is missing
    means that all are computed: rows can't be added to such a store.

    Args:
        adapted: The model; gradients are taken at its adapter theta0.
        splits: Encoded train and validation splits; all of a task's together, since they get the same outputs.
        store: Where the features go; complete blocks with the same fingerprint are not computed again.
        config: Rows, outputs, projection, batch size.
        seed: The run's root seed.
        fingerprints: Identity of each (task, split): rows, model, adapter, config, outputs; for exact inner products
            from :func:`~ensemblelora.gradients.exact.join_fingerprints`. A split that has none is not computed.
        meter: Told what every pass costs.
        hand_out: Has :func:`collect_piece` called for every piece that is missing, in other processes; none: all is
            done here. Exact inner products always are.

    Raises:
        ModelError: If an example's gradient depends on what else is in its batch, or the model makes its logits in a
            way that the scores here don't follow.
        ConfigError: If exact inner products are asked for, and there are too many rows and coordinates.
        OutputError: If the disk has no room for gradients whose inner products are to be taken.
        StoreError: If a gradient is not finite.
    """
    modes = choose_modes(splits, config.output)
    parts = [_Part(split, modes[split.task], choose_examples(split, config, seed=seed)) for split in splits]
    clear_scratch(store.folder)
    with activate(adapted, THETA0):
        layers = find_active_layers(adapted, splits)
        plan, projector = plan_features(layers, splits, config, seed=seed), make_projector(config, seed=seed)
        job = _Pass(adapted, layers, projector, plan, config.max_tokens_per_batch, meter)
        if plan.form == "gram":
            with _noted(meter, fingerprints[parts[0].key]):  # all blocks are of one piece
                return _collect_gram(job, parts, store, fingerprints)
        health = check_health(adapted, layers, projector, _list_kinds(parts), config.max_tokens_per_batch)
        wanted = [part for part in parts if part.key in fingerprints]
        missing = [part for part in wanted if not store.has(*part.key, fingerprints[part.key])]
        if hand_out is None:
            for part in missing:
                with _noted(meter, fingerprints[part.key]):
                    _write_block(store, part, fingerprints[part.key], _iterate_rows(job, part))
    if hand_out is not None:
        pieces = {part.key: _cut(part, plan) for part in missing}
        hand_out([piece for cut in pieces.values() for piece in cut])
        for key, cut in pieces.items():
            own = [_locate(store, piece, fingerprints[key]) for piece in cut]
            store.join(*key, fingerprints[key], own)
    shutil.rmtree(store.folder / _PIECES, ignore_errors=True)  # of a run that was broken off, too
    return health


def collect_piece(
    adapted: AdaptedModel,
    splits: Sequence[EncodedSplit],
    store: FeatureStore,
    config: GradientsConfig,
    *,
    seed: int,
    piece: FeaturePiece,
    fingerprint: str,
    meter: Meter | None = None,
) -> None:
    """Compute one piece of what :func:`collect_features` was asked for, if it is not there yet.

    Batches are those of a whole pass, so that the numbers are, too.

    Args:
        adapted: The model; gradients are taken at its adapter theta0.
        splits: All that were given there.
        store: The same.
        config: The same.
        seed: The run's root seed.
        piece: Of one split.
        fingerprint: Identity of that split.
        meter: Told what every pass costs.
    """
    own = _locate(store, piece, fingerprint)
    if own.has(piece.task, piece.split, fingerprint):
        return
    split = next(s for s in splits if (s.task, s.split) == (piece.task, piece.split))
    examples = choose_examples(split, config, seed=seed)[piece.first : piece.stop]
    part = _Part(split, piece.mode, examples)
    with activate(adapted, THETA0):
        layers, projector = find_active_layers(adapted, splits), make_projector(config, seed=seed)
        job = _Pass(adapted, layers, projector, piece.plan, config.max_tokens_per_batch, meter)
        with _noted(meter, fingerprint):
            _write_block(own, part, fingerprint, _iterate_rows(job, part))


def _noted(meter: Meter | None, identity: str) -> AbstractContextManager[None]:
    """Inside, what is counted is the cost of one block."""
    return nullcontext() if meter is None else meter.part({identity: 1})


def _cut(part: _Part, plan: FeaturePlan) -> list[FeaturePiece]:
    """Cut a split where a pass over it begins to sort its examples anew."""
    pieces, n = [], len(part.examples)
    for first in range(0, n, CHUNK):
        stop = min(first + CHUNK, n)
        n_tokens = int(part.split.example_lengths[part.examples[first:stop]].sum())
        pieces.append(FeaturePiece(*part.key, first, stop, n_tokens, part.mode, plan))
    return pieces


def _locate(store: FeatureStore, piece: FeaturePiece, fingerprint: str) -> FeatureStore:
    """The store of one piece alone."""
    return FeatureStore(store.folder / _PIECES / f"{fingerprint[:16]}-{piece.first}")


def _list_kinds(parts: Sequence[_Part]) -> list[tuple[EncodedSplit, OutputMode]]:
    return [(part.split, part.mode) for part in parts]


def _collect_gram(
    job: _Pass, parts: Sequence[_Part], store: FeatureStore, fingerprints: Mapping[tuple[str, str], str]
) -> FeatureHealth:
    """Keep exact inner products of all splits' rows, if any split is missing."""
    adapted, kinds = job.adapted, _list_kinds(parts)
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
        done: list[_Written] = []
        start = 0
        for part in parts:
            done.append(_write_gradients(job, part, scratch, start))
            start += done[-1].slots.size
        features = factor_gram(compute_gram(scratch))
        count_gram(job.meter, adapted.costs, **sizes)
        error = measure_error(scratch, features)
    # Blocks of two computations don't fit together. Until the last that was missing is there, none count; so those go
    # last, or a process killed in between could leave a new one beside an old one with nothing missing.
    for i in sorted(range(len(parts)), key=lambda i: not is_kept[i]):
        part, written = parts[i], done[i]
        rows = _Rows(written.outputs, features[written.slots], written.squared_norms)
        identity = fingerprints[part.split.task, part.split.split]
        _write_block(store, part, identity, [(range(len(part.examples)), rows)])
    return replace(health, form="gram", proj_dim=features.shape[1], projection_error=error)


@dataclass(frozen=True, eq=False)
class _Written:
    """One split's share of a scratch file, in its own order of examples."""

    outputs: npt.NDArray[np.float32]
    squared_norms: npt.NDArray[np.float32]
    slots: Indices
    """(n, c): rows of the file"""


def _write_gradients(job: _Pass, part: _Part, scratch: Scratch, start: int) -> _Written:
    """Fill rows of the file from ``start`` on, batch after batch."""
    split = part.split
    shape = (len(part.examples), count_outputs(split, part.mode))
    written = _Written(np.zeros(shape, np.float32), np.zeros(shape[0], np.float32), np.zeros(shape, np.int64))
    for _, batches in cut_batches(job.adapted, split, part.examples, job.max_tokens):
        for places in track(batches, f"gradients {split.task} ({split.split})"):
            stop, examples = start + len(places) * shape[1], part.examples[places]
            found = job.run(split, examples, part.mode, into=torch.from_numpy(scratch.map_rows(start, stop)))
            _check_finite(split, examples, found)
            n, c = found.outputs.shape
            written.outputs[places, :c], written.squared_norms[places] = found.outputs, found.squared_norms
            # Of a batch whose examples all have few choices, the last rows stay zero: contrasts that it lacks.
            own, others = np.split(np.arange(start, stop), [n * c])
            written.slots[places] = np.concatenate([own.reshape(n, c), others.reshape(n, -1)], axis=1)
            start = stop
    return written


def _check_finite(split: EncodedSplit, examples: Indices, found: Features) -> None:
    is_finite = np.isfinite(found.squared_norms) & np.isfinite(found.outputs).all(axis=1)
    if not is_finite.all():
        first = split.ids[int(examples[int(np.argmin(is_finite))])]
        raise StoreError(
            f"features of task {split.task!r}, {split.split}: the gradient of example {first!r} is not finite; use a "
            "wider dtype"
        )


def _iterate_rows(job: _Pass, part: _Part) -> Iterator[tuple[range, _Rows]]:
    """Yield a split's rows in their own order, a chunk at a time."""
    split, width = part.split, count_outputs(part.split, part.mode)
    for chunk, batches in cut_batches(job.adapted, split, part.examples, job.max_tokens):
        shape = (len(chunk), width)
        features = np.zeros((*shape, job.plan.proj_dim), np.float32)
        rows = _Rows(np.zeros(shape, np.float32), features, np.zeros(shape[0], np.float32))
        for places in track(batches, f"features {split.task} ({split.split})"):
            found, own = job.run(split, part.examples[places], part.mode), places - chunk.start
            c = found.outputs.shape[1]  # a batch whose examples all have few choices has few contrasts
            rows.outputs[own, :c], rows.features[own, :c] = found.outputs, found.features
            rows.squared_norms[own] = found.squared_norms
        release_memory()
        yield chunk, rows


def _write_block(store: FeatureStore, part: _Part, identity: str, pieces: Iterable[tuple[range, _Rows]]) -> None:
    split, mode = part.split, part.mode
    with store.writer(split.task, split.split, identity, mode=mode) as writer:
        for chunk, rows in pieces:
            own = part.examples[chunk.start : chunk.stop]
            writer.append(
                outputs=rows.outputs,
                features=rows.features,
                labels=label_of_mode(split.labels[own], mode),
                n_choices=split.n_choices[own].astype(np.int64),
                squared_norms=rows.squared_norms,
                groups=split.groups[own],
                ids=[split.ids[e] for e in own],
            )
