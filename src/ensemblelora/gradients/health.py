"""What is tried on a few rows before all are run: batches, padding, precision, and the projection.

In: the adapted model at theta0 and encoded splits. Out: a :class:`FeatureHealth`. Cost: some sixty examples' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ensemblelora.accounting.meter import release_memory
from ensemblelora.adaptermethods import TrainedLayer
from ensemblelora.adapters import AdaptedModel
from ensemblelora.blocks import OutputMode
from ensemblelora.data.batching import collate, plan_batches
from ensemblelora.data.encoding import EncodedSplit, Layout
from ensemblelora.errors import ModelError
from ensemblelora.gradients.backward import Features, compute_features, count_coordinates, feature_layout
from ensemblelora.gradients.exact import FeatureForm
from ensemblelora.gradients.projection import Projector
from ensemblelora.models import in_float32
from ensemblelora.passes import without_cache
from ensemblelora.scoring import check_output_layer

__all__ = ["FeatureHealth", "check_health"]

_PRECISION_BYTES = 2**31  # larger models are not copied to float32 for the precision check
_DISTORTION_SPLITS, _DISTORTION_EXAMPLES = 4, 11  # 55 pairs each, 220 in all: the distortion of a projection
_BATCH_TOLERANCE = 0.02  # 1 - cosine; bf16 rounding stays well below, a wrong attention mask does not


@dataclass(frozen=True)
class FeatureHealth:
    """What was checked while the features were taken."""

    n_coordinates: int
    """p': coordinates with a gradient at theta0"""
    form: FeatureForm
    """what is kept of them"""
    proj_dim: int
    """d: numbers kept of each gradient"""
    batch_error: float
    """largest 1 - cosine between features taken in one batch and one at a time"""
    precision_cosine: float | None
    """smallest cosine between the features and their float32 twins; none: not measured, or already float32"""
    projection_error: float | None
    """median error of inner products of some 200 pairs of gradients, over the product of their norms; expected
    about 0.67/sqrt(proj_dim) where they are projected, and 0 elsewhere; none: not measured, or no pair in the data"""


def check_health(
    adapted: AdaptedModel,
    layers: Mapping[str, TrainedLayer],
    projector: Projector,
    splits: Sequence[tuple[EncodedSplit, OutputMode]],
    max_tokens: int,
) -> FeatureHealth:
    """Try a few rows: batch and padding invariance of every kind of task; precision of one, projection of some.

    Args:
        adapted: The model, theta0 active.
        layers: Layers with a gradient.
        projector: The random projection.
        splits: All splits, and which of their outputs are differentiated.
        max_tokens: Padded tokens of a batch, where two examples fit.

    Raises:
        ModelError: If an example's gradient depends on what else is in its batch, or the model makes its logits in a
            way that the scores here don't follow.
    """
    if adapted.base.head == "lm":
        check_output_layer(adapted.network, collate([(splits[0][0], 0)], adapted.base.pad_token_id))

    uncached = without_cache(adapted)

    def features_of(split: EncodedSplit, mode: OutputMode, examples: Sequence[int]) -> Features:
        layout = feature_layout(uncached, split)
        batch = collate([(split, int(e)) for e in examples], uncached.base.pad_token_id, layout=layout)
        return compute_features(uncached, layers, projector, batch, mode, with_gram=True)

    kinds = {(split.kind, mode): (split, mode) for split, mode in reversed(splits)}
    errors = [
        _measure_batch_error(partial(features_of, split, mode), _spread(split, 3)) for split, mode in kinds.values()
    ]
    worst = float(np.max(errors))  # NaN if any is
    if not worst <= _BATCH_TOLERANCE:
        raise ModelError(
            f"model {adapted.base.name!r}: an example's gradient changes with its batch (1 - cosine = "
            f"{worst:.2g}, expected below {_BATCH_TOLERANCE}); padding or attention masks are not respected, "
            "try model.dtype=float32"
        )
    few = _spread(splits[0][0], 6)
    low = features_of(*splits[0], few)
    health = FeatureHealth(
        n_coordinates=count_coordinates(layers),
        form="coordinates" if projector.proj_type == "none" else "projected",
        proj_dim=low.features.shape[2],
        batch_error=worst,
        precision_cosine=_measure_precision(adapted, low, partial(features_of, *splits[0], few)),
        projection_error=_measure_distortion(
            features_of(split, mode, examples)
            for split, mode in splits[:: -(-len(splits) // _DISTORTION_SPLITS)]
            for examples in _pair_up(split, feature_layout(uncached, split), max_tokens)
        ),
    )
    release_memory()  # the weights in float32 were far more than a pass will need
    return health


def _spread(split: EncodedSplit, n: int) -> list[int]:
    """Pick examples from the shortest to the longest."""
    by_length = np.argsort(split.example_lengths, kind="stable")
    places = np.linspace(0, len(by_length) - 1, min(n, len(by_length))).astype(int)
    return [int(e) for e in by_length[places]]


def _measure_batch_error(features_of: Callable[[Sequence[int]], Features], examples: Sequence[int]) -> float:
    """Largest 1 - cosine between features taken together, the shortest padded most, and one example at a time."""
    ends = (0, len(examples) - 1)
    together = features_of(examples).features[list(ends)]
    alone = [features_of([examples[end]]).features for end in ends]
    width = max(together.shape[1], *(a.shape[1] for a in alone))  # a lone example may have fewer contrasts
    padded = [np.pad(a, ((0, 0), (0, width - a.shape[1]), (0, 0))) for a in alone]
    return float(1 - _cosines(together, np.concatenate(padded)).min())


def _measure_precision(adapted: AdaptedModel, low: Features, recompute: Callable[[], Features]) -> float | None:
    network = adapted.network
    if adapted.base.is_waiting or adapted.base.is_sharded:
        return None
    tensors = [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()]
    is_exact = all(p.dtype == torch.float32 for p in network.parameters() if p.is_floating_point())
    if is_exact or 4 * sum(t.numel() for t in tensors) > _PRECISION_BYTES:
        return None
    with in_float32(network):
        high = recompute()
    return float(_cosines(low.features, high.features).min())


def _pair_up(split: EncodedSplit, layout: Layout, max_tokens: int) -> list[list[int]]:
    """Batches of two or more of a split's examples, within the limit on tokens where two are."""
    few = np.array(_spread(split, _DISTORTION_EXAMPLES))
    lengths, counts = (sizes[few] for sizes in split.measure(layout))
    at_least = 2 * int(lengths.max() * counts.max())
    plan = plan_batches(lengths, counts, max(max_tokens, at_least))
    return [few[batch].tolist() for batch in plan if len(batch) > 1]


def _measure_distortion(batches: Iterable[Features]) -> float | None:
    """Median over all pairs within a batch, output by output."""
    errors = []
    for batch in batches:
        projected = batch.features.astype(np.float64).transpose(1, 0, 2)  # (c, n, proj_dim)
        norms = np.sqrt(np.einsum("cnn->cn", batch.gram))
        scale = np.maximum(norms[:, :, None] * norms[:, None, :], 1e-30)
        error = np.abs(projected @ projected.transpose(0, 2, 1) - batch.gram) / scale
        upper = np.triu_indices(error.shape[1], k=1)
        errors.append(error[:, upper[0], upper[1]].ravel())
    return float(np.median(np.concatenate(errors))) if errors else None


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    cosines: np.ndarray = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
    return cosines
