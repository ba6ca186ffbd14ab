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

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel, activate, trainable_linears
from ensemblelora.config import GradientsConfig
from ensemblelora.counting import count_gradients
from ensemblelora.data.batching import Batch, collate, plan_batches
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import ModelError
from ensemblelora.gradients.output import choose_mode, compute_outputs, label_of_mode
from ensemblelora.gradients.projection import Projector
from ensemblelora.progress import track
from ensemblelora.scoring import score_batch
from ensemblelora.seeding import seed_for
from ensemblelora.store import FeatureStore, OutputMode

__all__ = ["FeatureHealth", "Features", "collect_features", "compute_features", "find_active_linears", "make_projector"]

logger = logging.getLogger(__name__)

_CHUNK = 4096  # examples sorted by length at a time; also what a writer holds before it appends
_PRECISION_BYTES = 2**31  # larger models are not copied to float32 for the precision check
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
    projection_error: float
    """median relative error of inner products of random pairs, against the product of their norms"""


def make_projector(config: GradientsConfig, *, seed: int) -> Projector:
    """Return the run's projector; its seed is the run's, by name."""
    return Projector(config.proj_type, config.proj_dim, seed_for(seed, "gradients"))


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
        splits: Encoded train and validation splits.
        store: Where the features go; complete blocks with the same fingerprint are not computed again.
        config: Outputs, projection, batch size.
        seed: The run's root seed.
        fingerprints: Identity of each (task, split): data, model, adapter, config.
        meter: Told what every pass costs.

    Raises:
        ModelError: If an example's gradient depends on what else is in its batch.
    """
    projector = make_projector(config, seed=seed)
    modes = {id(s): choose_mode(s.kind, int(s.n_choices.max()), config.output, task=s.task) for s in splits}
    with activate(adapted, THETA0):
        linears = find_active_linears(adapted, splits)
        health = _check_health(adapted, linears, projector, splits, modes)
        for split in splits:
            identity = fingerprints[split.task, split.split]
            if not store.has(split.task, split.split, identity):
                with store.writer(split.task, split.split, identity, mode=modes[id(split)]) as writer:
                    for rows, features in _iterate_features(adapted, linears, projector, split, modes[id(split)], config, meter):
                        writer.append(
                            outputs=features.outputs,
                            features=features.features,
                            labels=label_of_mode(split.labels[rows], modes[id(split)]),
                            n_choices=split.n_choices[rows].astype(np.int64),
                            squared_norms=features.squared_norms,
                            groups=split.groups[rows],
                            ids=[split.ids[row] for row in rows],
                        )
    return health


def find_active_linears(adapted: AdaptedModel, splits: Sequence[EncodedSplit]) -> dict[str, nn.Linear]:
    """Keep the adapter's linear layers whose gradient at theta0 is not identically zero (LoRA: the B matrices)."""
    linears = trainable_linears(adapted, THETA0)
    split = splits[0]
    batch = collate([(split, 0), (split, split.n_examples - 1)], adapted.base.pad_token_id)
    with activate(adapted, THETA0, trainable=True), torch.enable_grad():
        z = score_batch(adapted.network, batch).z
        z.masked_fill(torch.isinf(z), 0.0).pow(2).sum().backward()
        active = {name: m for name, m in linears.items() if m.weight.grad is not None and bool(m.weight.grad.any())}
        adapted.peft.zero_grad(set_to_none=True)
    if not active:
        raise ModelError("no adapter weight has a gradient at the start point; check adapter.target_modules")
    return active


def compute_features(
    adapted: AdaptedModel, linears: Mapping[str, nn.Linear], projector: Projector, batch: Batch, mode: OutputMode, *, with_gram: bool = False
) -> Features:
    """Features of one batch: one forward pass, one backward pass per output (one in all where choices are rows).

    Args:
        adapted: The model, theta0 active.
        linears: Layers from :func:`find_active_linears`.
        projector: The random projection.
        batch: Examples of one task.
        mode: Which outputs to differentiate.
        with_gram: Also sum up the exact inner products (costs examples squared times p').
    """
    with _tapped(linears, projector) as tap, torch.enable_grad():
        z = score_batch(adapted.network, batch).z
        labels, n_choices = (torch.from_numpy(a).to(z.device) for a in (batch.labels, batch.n_choices))
        outputs = compute_outputs(z, labels, n_choices, mode)  # (n, c)
        tap.start(*outputs.shape, with_gram=with_gram)
        for objective, combine, is_last in _backward_passes(z, outputs, batch, mode, labels, n_choices):
            tap.combine = combine
            objective.backward(retain_graph=not is_last)
    n, c = outputs.shape
    return Features(
        outputs=outputs.detach().float().cpu().numpy(),
        features=tap.features.reshape(n, c, -1).cpu().numpy(),
        squared_norms=tap.squared_norms.reshape(n, c).sum(1).cpu().numpy(),
        gram=tap.gram.cpu().numpy(),
    )


def _backward_passes(
    z: Tensor, outputs: Tensor, batch: Batch, mode: OutputMode, labels: Tensor, n_choices: Tensor
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield (scalar to differentiate, matrix (n c, rows) from row gradients to output gradients, is it the last)."""
    n, c = outputs.shape
    rows = len(batch.row_example)
    row_example = torch.from_numpy(batch.row_example).to(z.device)
    if rows > n:
        # A row a choice: rows don't interact, so one pass gives every dz/dtheta; du/dz is a small matrix.
        row_choice = torch.from_numpy(batch.row_choice).to(z.device)
        leaf = z.detach().clone().requires_grad_(True)
        u = compute_outputs(leaf, labels, n_choices, mode)
        slopes = torch.stack([torch.autograd.grad(u[:, k].sum(), leaf, retain_graph=True)[0] for k in range(c)], dim=1)
        combine = z.new_zeros(n, c, rows)
        index = torch.arange(rows, device=z.device)
        combine[row_example, :, index] = slopes[row_example, :, row_choice]
        yield z[row_example, row_choice].sum(), combine.reshape(n * c, rows), True
        return
    for k in range(c):
        combine = z.new_zeros(n, c, rows)
        combine[row_example, k, torch.arange(rows, device=z.device)] = 1.0
        yield outputs[:, k].sum(), combine.reshape(n * c, rows), k == c - 1


@dataclass(eq=False)
class _Tap:
    """What the hooks add to during a backward pass."""

    projector: Projector
    combine: Tensor = field(default_factory=lambda: torch.empty(0))
    features: Tensor = field(default_factory=lambda: torch.empty(0))
    squared_norms: Tensor = field(default_factory=lambda: torch.empty(0))
    gram: Tensor = field(default_factory=lambda: torch.empty(0))
    offsets: dict[str, int] = field(default_factory=dict)
    width: int = 0

    def start(self, n_examples: int, n_outputs: int, *, with_gram: bool) -> None:
        self.features = torch.zeros(n_examples * n_outputs, self.width)
        self.squared_norms = torch.zeros(n_examples * n_outputs)
        self.gram = torch.zeros((n_outputs, n_examples, n_examples) if with_gram else (0, 0, 0))

    def add(self, name: str, row_gradients: Tensor) -> None:
        """Take one layer's gradients of the batch's rows, ``(rows, size)``."""
        combine = self.combine.to(row_gradients.dtype)
        gradients = combine @ row_gradients  # (n c, size)
        self.squared_norms = self.squared_norms.to(gradients.device) + gradients.pow(2).sum(1)
        if self.gram.numel():
            by_output = gradients.reshape(self.gram.shape[1], self.gram.shape[0], -1).transpose(0, 1)  # (c, n, size)
            self.gram = self.gram.to(gradients.device) + by_output @ by_output.transpose(1, 2)
        projected = self.projector.project(name, gradients)
        start = self.offsets.get(name, 0)
        self.features = self.features.to(gradients.device)
        self.features[:, start : start + projected.shape[1]] += projected


@contextmanager
def _tapped(linears: Mapping[str, nn.Linear], projector: Projector) -> Iterator[_Tap]:
    """Hook the layers; inside, a backward pass feeds the tap and no parameter gets a gradient."""
    sizes = {part: size for name, module in linears.items() for part, size in _parts(name, module)}
    tap = _Tap(projector, width=projector.proj_dim)
    if projector.proj_type == "none":
        ends = np.cumsum(list(sizes.values()))
        tap.offsets = dict(zip(sizes, [0, *map(int, ends[:-1])], strict=True))
        tap.width = int(ends[-1])
    handles = [module.register_forward_hook(_make_hook(tap, name)) for name, module in linears.items()]
    try:
        yield tap
    finally:
        for handle in handles:
            handle.remove()


def _make_hook(tap: _Tap, name: str) -> object:
    def after_forward(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].detach().float()
        if not output.requires_grad:  # nothing below is trainable: the graph starts here
            output = output.detach().requires_grad_(True)

        def on_backward(delta: Tensor) -> None:
            delta = delta.float()
            pattern = "bo,bi->boi" if delta.dim() == 2 else "bto,bti->boi"
            tap.add(f"{name}.weight", torch.einsum(pattern, delta, x).flatten(1))
            if module.bias is not None:
                tap.add(f"{name}.bias", delta if delta.dim() == 2 else delta.sum(1))

        output.register_hook(on_backward)
        return output

    return after_forward


def _parts(name: str, module: nn.Linear) -> Iterator[tuple[str, int]]:
    yield f"{name}.weight", module.weight.numel()
    if module.bias is not None:
        yield f"{name}.bias", module.bias.numel()


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
    backwards = 1 if split.kind in ("options", "sequence") or mode in ("margin", "logodds") else int(split.n_choices.max()) - 1
    for start in range(0, split.n_examples, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, split.n_examples))
        counts = np.diff(split.example_rows)[rows]
        plan = plan_batches(split.example_lengths[rows], counts, config.max_tokens_per_batch)
        pieces, order = [], []
        for members in track(plan, f"features {split.task} ({split.split})"):
            batch = collate([(split, int(rows[m])) for m in members], adapted.base.pad_token_id)
            pieces.append(compute_features(adapted, linears, projector, batch, mode))
            order.append(members)
            count_gradients(
                meter, adapted.costs, batch, n_backwards=backwards, n_outputs=pieces[-1].outputs.size, proj_dim=pieces[-1].features.shape[2]
            )
        back = np.argsort(np.concatenate(order))
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
    splits: Sequence[EncodedSplit],
    modes: Mapping[int, OutputMode],
) -> FeatureHealth:
    """Check batch and padding invariance and precision, and measure the projection, on a few rows of the first split."""
    split, mode = splits[0], modes[id(splits[0])]
    longest = np.argsort(split.example_lengths, kind="stable")
    chosen = longest[np.linspace(0, len(longest) - 1, min(8, len(longest))).astype(int)]

    def features_of(examples: Sequence[int]) -> Features:
        batch = collate([(split, int(e)) for e in examples], adapted.base.pad_token_id)
        return compute_features(adapted, linears, projector, batch, mode, with_gram=True)

    together = features_of([*chosen])
    alone = np.concatenate([features_of([e]).features for e in (chosen[0], chosen[-1])])
    batch_error = float(1 - _cosines(together.features[[0, -1]], alone).min())
    if batch_error > _BATCH_TOLERANCE:
        raise ModelError(
            f"model {adapted.base.name!r}: an example's gradient changes with its batch (1 - cosine = {batch_error:.2g}, "
            f"expected below {_BATCH_TOLERANCE}); padding or attention masks are not respected, try model.dtype=float32"
        )
    return FeatureHealth(
        n_coordinates=sum(size for name, module in linears.items() for _, size in _parts(name, module)),
        proj_dim=together.features.shape[2],
        batch_error=batch_error,
        precision_cosine=_measure_precision(adapted, together, lambda: features_of([*chosen])),
        projection_error=_measure_distortion(together),
    )


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


def _measure_distortion(features: Features) -> float:
    projected = features.features.astype(np.float64).transpose(1, 0, 2)  # (c, n, proj_dim)
    norms = np.sqrt(np.einsum("cnn->cn", features.gram))
    scale = np.maximum(norms[:, :, None] * norms[:, None, :], 1e-30)
    error = np.abs(projected @ projected.transpose(0, 2, 1) - features.gram) / scale
    upper = np.triu_indices(error.shape[1], k=1)
    return float(np.median(error[:, upper[0], upper[1]])) if len(upper[0]) else 0.0


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    cosines: np.ndarray = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
    return cosines
