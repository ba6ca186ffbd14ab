"""Run the model once over every example and write the features the oracle works on.

In: the adapted model at theta0 and encoded splits. Out: a feature store and a :class:`FeatureHealth`.
Examples don't interact in evaluation mode, so one backward pass of a sum gives every example's own gradient; hooks
on the adapter's linear layers turn ``(input, output gradient)`` into the weight's gradient, combine and project it
at once. Nothing of size examples x parameters, or parameters x proj_dim, ever exists.

Where every choice is a row of its own (``options``), one backward pass serves all classes; tasks with one row an
example take one pass per output.

Cost: (forward + passes x backward to the lowest adapted layer) per row + 2 p' proj_dim per output row, where p'
counts the coordinates whose gradient at theta0 is not structurally zero (LoRA: B only).
Slow twin: autograd, one example at a time, in tests/test_collect.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel, activate, trainable_linears
from ensemblelora.blocks import OutputMode
from ensemblelora.config import GradientsConfig
from ensemblelora.counting import count_gradients
from ensemblelora.data.batching import Batch, collate, plan_batches
from ensemblelora.data.encoding import EncodedSplit, Layout
from ensemblelora.errors import ModelError
from ensemblelora.gradients.output import choose_modes, compute_outputs, label_of_mode
from ensemblelora.gradients.projection import Projector
from ensemblelora.gradients.tap import layer_parts, tapped
from ensemblelora.passes import score, without_cache
from ensemblelora.progress import track
from ensemblelora.scoring import check_output_layer
from ensemblelora.seeding import seed_for
from ensemblelora.store import FeatureStore

__all__ = [
    "FeatureHealth",
    "Features",
    "collect_features",
    "compute_features",
    "count_coordinates",
    "find_active_linears",
    "make_projector",
]

_CHUNK = 4096  # examples sorted by length at a time; also what a writer holds before it appends
_PRECISION_BYTES = 2**31  # larger models are not copied to float32 for the precision check
_DISTORTION_SPLITS, _DISTORTION_EXAMPLES = 4, 11  # 55 pairs each, 220 in all: the distortion of a projection
_BATCH_TOLERANCE = 0.02  # 1 - cosine; bf16 rounding stays well below, a wrong attention mask does not


@dataclass(frozen=True, eq=False)
class Features:
    """Outputs and projected gradients of a few examples."""

    outputs: np.ndarray
    """(n, c) float32"""
    features: np.ndarray
    """(n, c, proj_dim) float32"""
    squared_norms: np.ndarray
    """(n,) squared norm of the unprojected gradients, summed over outputs"""
    gram: np.ndarray
    """(c, n, n) exact inner products of the unprojected gradients of each output; empty unless asked for"""


@dataclass(frozen=True)
class FeatureHealth:
    """What was checked while the features were taken."""

    n_coordinates: int
    """p': coordinates with a gradient at theta0"""
    proj_dim: int
    batch_error: float
    """largest 1 - cosine between features taken in one batch and one at a time"""
    precision_cosine: float | None
    """smallest cosine between the features and their float32 twins; none: not measured, or already float32"""
    projection_error: float | None
    """median error of inner products of some 200 pairs of gradients, over the product of their norms; expected
    about 0.67/sqrt(proj_dim); none: no pair in the data"""


def make_projector(config: GradientsConfig, *, seed: int) -> Projector:
    """Return the run's projector, all of its projections side by side; its seed is the run's, by name."""
    return Projector(config.proj_type, config.n_projections * config.proj_dim, seed_for(seed, "gradients"))


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

    Args:
        adapted: The model; gradients are taken at its adapter theta0.
        splits: Encoded train and validation splits; all of a task's together, since they get the same outputs.
        store: Where the features go; complete blocks with the same fingerprint are not computed again.
        config: Outputs, projection, batch size.
        seed: The run's root seed.
        fingerprints: Identity of each (task, split): data, model, adapter, config, outputs.
        meter: Told what every pass costs.

    Raises:
        ModelError: If an example's gradient depends on what else is in its batch, or the model makes its logits in a
            way that the scores here don't follow.
    """
    projector = make_projector(config, seed=seed)
    modes = choose_modes(splits, config.output)
    with activate(adapted, THETA0):
        linears = find_active_linears(adapted, splits)
        kinds = [(split, modes[split.task]) for split in splits]
        health = _check_health(adapted, linears, projector, kinds, config.max_tokens_per_batch)
        for split in splits:
            mode, identity = modes[split.task], fingerprints[split.task, split.split]
            if store.has(split.task, split.split, identity):
                continue
            with store.writer(split.task, split.split, identity, mode=mode) as writer:
                for rows, features in _iterate_features(adapted, linears, projector, split, mode, config, meter):
                    writer.append(
                        outputs=features.outputs,
                        features=features.features,
                        labels=label_of_mode(split.labels[rows], mode),
                        n_choices=split.n_choices[rows].astype(np.int64),
                        squared_norms=features.squared_norms,
                        groups=split.groups[rows],
                        ids=[split.ids[row] for row in rows],
                    )
    return health


def find_active_linears(adapted: AdaptedModel, splits: Sequence[EncodedSplit]) -> dict[str, nn.Linear]:
    """Keep the adapter's linear layers whose gradient at theta0 is not identically zero (LoRA: the B matrices).

    Args:
        adapted: The model; its adapter theta0 is looked at.
        splits: Any rows; the longest of the first split are tried, since queries of a lone token have no gradient.

    Raises:
        ModelError: If no layer has a gradient.
    """
    linears = trainable_linears(adapted, THETA0)
    longest = np.argsort(splits[0].example_lengths, kind="stable")[-2:]
    batch = collate([(splits[0], int(e)) for e in longest], adapted.base.pad_token_id)
    with activate(adapted, THETA0, trainable=True), torch.enable_grad():
        z = score(without_cache(adapted), batch).z
        z.masked_fill(torch.isinf(z), 0.0).pow(2).sum().backward()
        active = {name: m for name, m in linears.items() if m.weight.grad is not None and bool(m.weight.grad.any())}
        adapted.peft.zero_grad(set_to_none=True)
    if not active:
        raise ModelError("no adapter weight has a gradient at the start point; check adapter.target_modules")
    return active


def count_coordinates(linears: Mapping[str, nn.Linear]) -> int:
    """p': how many numbers the layers of :func:`find_active_linears` hold, an example's gradient unprojected."""
    return sum(math.prod(shape) for name, module in linears.items() for _, shape in layer_parts(name, module))


def compute_features(
    adapted: AdaptedModel,
    linears: Mapping[str, nn.Linear],
    projector: Projector,
    batch: Batch,
    mode: OutputMode,
    *,
    with_gram: bool = False,
    meter: Meter | None = None,
) -> Features:
    """Features of one batch: one forward pass, one backward pass per output (one in all where choices are rows).

    Args:
        adapted: The model, theta0 active.
        linears: Layers from :func:`find_active_linears`.
        projector: The random projection.
        batch: Examples of one task, in the layout that :func:`feature_layout` names.
        mode: Which outputs to differentiate.
        with_gram: Also sum up the exact inner products (costs examples squared times p').
        meter: Told what the blocks below the adapted ones cost, where they ran.

    Returns:
        Rows in the batch's own order of examples.
    """
    with tapped(linears, projector) as tap, torch.enable_grad():
        z = score(adapted, batch, meter=meter).z
        labels, n_choices = (torch.from_numpy(a).to(z.device) for a in (batch.labels, batch.n_choices))
        outputs = compute_outputs(z, labels, n_choices, mode)  # (n, c)
        n, c = outputs.shape
        tap.start(n, c, torch.from_numpy(batch.positions[:, 0]).to(z.device), with_gram=with_gram)
        for objective, combine, is_last in _backward_passes(z, outputs, batch, mode, labels, n_choices):
            tap.start_pass(combine)
            objective.backward(retain_graph=not is_last)
    return Features(
        outputs=outputs.detach().float().cpu().numpy(),
        features=tap.features.reshape(n, c, -1).cpu().numpy(),
        squared_norms=tap.squared_norms.reshape(n, c).sum(1).cpu().numpy(),
        gram=tap.gram.cpu().numpy(),
    )


def feature_layout(adapted: AdaptedModel, split: EncodedSplit) -> Layout:
    """Two choices share their context; with more, a row a choice gives every choice's gradient in one backward pass."""
    return adapted.layout if int(split.n_choices.max(initial=0)) <= 2 else "rows"


def _backward_passes(
    z: Tensor, outputs: Tensor, batch: Batch, mode: OutputMode, labels: Tensor, n_choices: Tensor
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield (scalar to differentiate, matrix (n c, rows) from row gradients to output gradients, is it the last)."""
    n, c = outputs.shape
    rows = len(batch.row_example)
    row_example = torch.from_numpy(batch.row_example).to(z.device)
    if rows > n and outputs.shape[1] > 1:
        # A row a choice: rows don't interact, so one pass gives every dz/dtheta; du/dz is a small matrix.
        choice_index = torch.from_numpy(batch.choice_index).to(z.device)
        leaf = z.detach().clone().requires_grad_(True)
        u = compute_outputs(leaf, labels, n_choices, mode)
        slopes = torch.stack([torch.autograd.grad(u[:, k].sum(), leaf, retain_graph=True)[0] for k in range(c)], dim=1)
        combine = z.new_zeros(n, c, rows)
        index = torch.arange(rows, device=z.device)
        combine[row_example, :, index] = slopes[row_example, :, choice_index]
        yield z[row_example, choice_index].sum(), combine.reshape(n * c, rows), True
        return
    for k in range(c):
        combine = z.new_zeros(n, c, rows)
        combine[row_example, k, torch.arange(rows, device=z.device)] = 1.0
        yield outputs[:, k].sum(), combine.reshape(n * c, rows), k == c - 1


def _iterate_features(
    adapted: AdaptedModel,
    linears: Mapping[str, nn.Linear],
    projector: Projector,
    split: EncodedSplit,
    mode: OutputMode,
    config: GradientsConfig,
    meter: Meter | None,
) -> Iterator[tuple[np.ndarray, Features]]:
    """Yield examples in their own order, a chunk at a time, each chunk computed in batches of similar length."""
    layout = feature_layout(adapted, split)
    lengths, counts = split.measure(layout)
    for start in range(0, split.n_examples, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, split.n_examples))
        plan = plan_batches(lengths[rows], counts[rows], config.max_tokens_per_batch)
        pieces: list[Features] = []
        for members in track(plan, f"features {split.task} ({split.split})"):
            batch = collate([(split, int(rows[m])) for m in members], adapted.base.pad_token_id, layout=layout)
            pieces.append(compute_features(adapted, linears, projector, batch, mode, meter=meter))
            _, n_outputs, proj_dim = pieces[-1].features.shape
            count_gradients(
                meter,
                adapted.costs,
                batch,
                n_backwards=1 if split.kind == "options" else n_outputs,
                n_outputs=pieces[-1].outputs.size,
                proj_dim=proj_dim,
            )
        back = np.argsort(np.concatenate(plan))
        yield rows, _concatenate(pieces, back, int(split.n_choices.max()) - 1 if mode == "contrast" else 1)


def _concatenate(pieces: Sequence[Features], order: np.ndarray, width: int) -> Features:
    # A batch whose examples all have few choices has few contrasts; the split's other ones are zero for it.
    missing = [(0, width - piece.outputs.shape[1]) for piece in pieces]
    outputs = np.concatenate([np.pad(p.outputs, ((0, 0), m)) for p, m in zip(pieces, missing, strict=True)])
    features = np.concatenate([np.pad(p.features, ((0, 0), m, (0, 0))) for p, m in zip(pieces, missing, strict=True)])
    norms = np.concatenate([piece.squared_norms for piece in pieces])
    return Features(outputs[order], features[order], norms[order], gram=np.empty((0, 0, 0)))


def _check_health(
    adapted: AdaptedModel,
    linears: Mapping[str, nn.Linear],
    projector: Projector,
    splits: Sequence[tuple[EncodedSplit, OutputMode]],
    max_tokens: int,
) -> FeatureHealth:
    """Try a few rows: batch and padding invariance of every kind of task; precision of one, projection of some."""
    if adapted.base.head == "lm":
        check_output_layer(adapted.network, collate([(splits[0][0], 0)], adapted.base.pad_token_id))

    uncached = without_cache(adapted)

    def features_of(split: EncodedSplit, mode: OutputMode, examples: Sequence[int]) -> Features:
        layout = feature_layout(uncached, split)
        batch = collate([(split, int(e)) for e in examples], uncached.base.pad_token_id, layout=layout)
        return compute_features(uncached, linears, projector, batch, mode, with_gram=True)

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
    return FeatureHealth(
        n_coordinates=count_coordinates(linears),
        proj_dim=low.features.shape[2],
        batch_error=worst,
        precision_cosine=_measure_precision(adapted, low, partial(features_of, *splits[0], few)),
        projection_error=_measure_distortion(
            features_of(split, mode, examples)
            for split, mode in splits[:: -(-len(splits) // _DISTORTION_SPLITS)]
            for examples in _pair_up(split, feature_layout(uncached, split), max_tokens)
        ),
    )


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
    tensors = [*adapted.network.parameters(), *adapted.network.buffers()]
    dtypes = [tensor.dtype for tensor in tensors]
    is_quantized = getattr(adapted.base.model.config, "quantization_config", None) is not None
    is_exact = all(p.dtype == torch.float32 for p in adapted.network.parameters())
    if is_exact or is_quantized or 4 * sum(t.numel() for t in tensors) > _PRECISION_BYTES:
        return None
    adapted.network.float()  # exact, and undone exactly below
    try:
        high = recompute()
    finally:
        for tensor, dtype in zip([*adapted.network.parameters(), *adapted.network.buffers()], dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
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
