"""Gradients of a layer's weight for every row of a batch, taken from one backward pass by hooks.

A linear layer's weight gradient is ``sum_t delta_t (x) x_t``, with x its input and delta the gradient of its output.
Rows of a batch don't interact, so both can be read off per row while the backward pass of a sum goes by. Each layer's
gradients are combined from rows to outputs, projected and let go at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ensemblelora.gradients.projection import Projector

__all__ = ["Tap", "layer_parts", "tapped"]

_Hook = Callable[[nn.Linear, tuple[Tensor, ...], Tensor], Tensor]


@dataclass(eq=False)
class Tap:
    """What the hooks add to during a backward pass; rows of the results are (example, output) pairs."""

    projector: Projector
    width: int
    """numbers kept per gradient"""
    offsets: Mapping[str, int]
    """where a layer part's numbers begin; empty where projections of all parts add up"""
    combine: Tensor = field(default_factory=lambda: torch.empty(0))
    """(n c, rows): from gradients of a batch's rows to those of its outputs; set before each backward pass"""
    position_row: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """(n_scored,): the row of each scored position; an adapted output layer sees these positions alone"""
    features: Tensor = field(default_factory=lambda: torch.empty(0))
    """(n c, width)"""
    squared_norms: Tensor = field(default_factory=lambda: torch.empty(0))
    """(n c,)"""
    gram: Tensor = field(default_factory=lambda: torch.empty(0))
    """(c, n, n) inner products of each output's gradients, where asked for"""

    def start(self, n_examples: int, n_outputs: int, position_row: Tensor, *, with_gram: bool) -> None:
        """Clear the sums for a batch."""
        device, self.position_row = position_row.device, position_row
        self.features = torch.zeros(n_examples * n_outputs, self.width, device=device)
        self.squared_norms = torch.zeros(n_examples * n_outputs, device=device)
        self.gram = torch.zeros((n_outputs, n_examples, n_examples) if with_gram else (0, 0, 0), device=device)

    def add(self, part: str, row_gradients: Tensor) -> None:
        """Take one layer part's gradients, float32 ``(rows, size)``, or ``(n_scored, size)`` of scored positions."""
        n_rows = self.combine.shape[1]
        if len(row_gradients) != n_rows:
            by_row = row_gradients.new_zeros(n_rows, row_gradients.shape[1])
            row_gradients = by_row.index_add(0, self.position_row, row_gradients)
        gradients = self.combine @ row_gradients  # (n c, size)
        self.squared_norms += gradients.pow(2).sum(1)
        if self.gram.numel():
            by_output = gradients.reshape(self.gram.shape[1], self.gram.shape[0], -1).transpose(0, 1)  # (c, n, size)
            self.gram += by_output @ by_output.transpose(1, 2)
        projected = self.projector.project(part, gradients)
        start = self.offsets.get(part, 0)
        self.features[:, start : start + projected.shape[1]] += projected


@contextmanager
def tapped(linears: Mapping[str, nn.Linear], projector: Projector) -> Iterator[Tap]:
    """Hook the layers; inside, a backward pass feeds the tap and no parameter gets a gradient."""
    width, offsets = projector.proj_dim, dict[str, int]()
    if projector.proj_type == "none":
        sizes = dict(part for name, module in linears.items() for part in layer_parts(name, module))
        starts = np.cumsum([0, *sizes.values()])
        width, offsets = int(starts[-1]), dict(zip(sizes, map(int, starts), strict=False))
    tap = Tap(projector, width, offsets)
    handles = [module.register_forward_hook(_make_hook(tap, name)) for name, module in linears.items()]
    try:
        yield tap
    finally:
        for handle in handles:
            handle.remove()


def layer_parts(name: str, module: nn.Linear) -> Iterator[tuple[str, int]]:
    """Yield the names by which a layer's parameters are projected, and their sizes."""
    yield f"{name}.weight", module.weight.numel()
    if module.bias is not None:
        yield f"{name}.bias", module.bias.numel()


def _make_hook(tap: Tap, name: str) -> _Hook:
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
