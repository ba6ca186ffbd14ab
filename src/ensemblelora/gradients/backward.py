"""Outputs of one batch of examples and their gradients: one forward pass, and the backward passes.

Examples don't interact in evaluation mode, so one backward pass of a sum gives every example's own gradient; hooks
on the adapter's layers turn ``(input, output gradient)`` into the weight's gradient, combine and project it at once.
Nothing of size examples x parameters, or parameters x proj_dim, ever exists.

Where every choice is a row of its own (``options``), one backward pass serves all classes; tasks with one row an
example take one pass per output.

Slow twin: autograd, one example at a time, in tests/test_collect.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ensemblelora.accounting.meter import Meter
from ensemblelora.adaptermethods import TrainedLayer
from ensemblelora.adapters import THETA0, AdaptedModel, activate, trainable_layers
from ensemblelora.blocks import OutputMode
from ensemblelora.data.batching import Batch, collate
from ensemblelora.data.encoding import EncodedSplit, Layout
from ensemblelora.errors import ModelError
from ensemblelora.gradients.output import compute_outputs
from ensemblelora.gradients.projection import Projector
from ensemblelora.gradients.silent import find_silent
from ensemblelora.gradients.tap import layer_parts, tapped
from ensemblelora.passes import blocks_run_again, score, without_cache

__all__ = [
    "Features",
    "compute_features",
    "count_coordinates",
    "count_outputs",
    "feature_layout",
    "find_active_layers",
    "list_parts",
]


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


def find_active_layers(adapted: AdaptedModel, splits: Sequence[EncodedSplit]) -> dict[str, TrainedLayer]:
    """Keep the adapter's layers whose gradient at theta0 is not identically zero.

    Of LoRA those are the B matrices, of a bottleneck the up-projections with their biases; vectors that scale all are.

    Args:
        adapted: The model; its adapter theta0 is looked at.
        splits: Any rows; the longest of the first split are tried, since queries of a lone token have no gradient.

    Raises:
        ModelError: If no layer has a gradient.
    """
    layers = trainable_layers(adapted, THETA0)
    longest = np.argsort(splits[0].example_lengths, kind="stable")[-2:]
    batch = collate([(splits[0], int(e)) for e in longest], adapted.base.pad_token_id)
    with activate(adapted, THETA0, trainable=True), blocks_run_again(adapted), torch.enable_grad():
        z = score(without_cache(adapted), batch).z
        z.masked_fill(torch.isinf(z), 0.0).pow(2).sum().backward()
        active = {name: layer for name, layer in layers.items() if _has_gradient(layer)}
        adapted.peft.zero_grad(set_to_none=True)
    if not active:
        raise ModelError("no adapter weight has a gradient at the start point; check adapter.target_modules")
    return active


def list_parts(layers: Mapping[str, TrainedLayer]) -> list[tuple[str, tuple[int, ...]]]:
    """Names by which the layers' parameters are projected, and their shapes."""
    return [part for name, layer in layers.items() for part in layer_parts(name, layer)]


def count_coordinates(layers: Mapping[str, TrainedLayer]) -> int:
    """p': how many numbers the layers of :func:`find_active_layers` hold, an example's gradient unprojected."""
    return sum(math.prod(shape) for _, shape in list_parts(layers))


def count_outputs(split: EncodedSplit, mode: OutputMode) -> int:
    """c: differentiated numbers of an example with the most choices."""
    return int(split.n_choices.max()) - 1 if mode == "contrast" else 1


def compute_features(
    adapted: AdaptedModel,
    layers: Mapping[str, TrainedLayer],
    projector: Projector,
    batch: Batch,
    mode: OutputMode,
    *,
    with_gram: bool = False,
    into: Tensor | None = None,
    meter: Meter | None = None,
) -> Features:
    """Features of one batch: one forward pass, one backward pass per output (one in all where choices are rows).

    Args:
        adapted: The model, theta0 active.
        layers: From :func:`find_active_layers`.
        projector: The random projection.
        batch: Examples of one task, in the layout that :func:`feature_layout` names.
        mode: Which outputs to differentiate.
        with_gram: Also sum up the exact inner products (costs examples squared times p').
        into: Zeros to write the features to, at least one row for each output, such as a file mapped to memory;
            none: new ones.
        meter: Told what the blocks below the adapted ones cost, where they ran.

    Returns:
        Rows in the batch's own order of examples.
    """
    silent = find_silent(adapted, layers)
    with tapped(layers, projector, silent) as tap, blocks_run_again(adapted), torch.enable_grad():
        z = score(adapted, batch, meter=meter).z
        labels, n_choices = (torch.from_numpy(a).to(z.device) for a in (batch.labels, batch.n_choices))
        outputs = compute_outputs(z, labels, n_choices, mode)  # (n, c)
        n, c = outputs.shape
        tap.start(n, c, torch.from_numpy(batch.positions[:, 0]).to(z.device), with_gram=with_gram, into=into)
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


def _has_gradient(layer: TrainedLayer) -> bool:
    """Whether any number of the layer has one: of a bottleneck whose units are all off, only the bias does."""
    return any(
        part is not None and part.grad is not None and bool(part.grad.any()) for part in (layer.weight, layer.bias)
    )
