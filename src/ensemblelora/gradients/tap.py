"""Gradients of a layer's weight for every row of a batch, taken from one backward pass by hooks.

A linear layer's weight gradient is ``sum_t delta_t (x) x_t``, with x its input and delta the gradient of its output.
Rows of a batch don't interact, so both can be read off per row while the backward pass of a sum goes by. Each layer's
gradients are combined from rows to outputs, projected and let go at once.

Cost: T n_out n_in multiply-adds for a weight's gradient over T tokens, then those of :mod:`.projection`.
"""

from __future__ import annotations

import math
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
    position_row: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """(n_scored,): the row of each scored position; an adapted output layer sees these positions alone"""
    features: Tensor = field(default_factory=lambda: torch.empty(0))
    """(n c, width)"""
    squared_norms: Tensor = field(default_factory=lambda: torch.empty(0))
    """(n c,)"""
    gram: Tensor = field(default_factory=lambda: torch.empty(0))
    """(c, n, n) inner products of each output's gradients, where asked for"""
    _n_rows: int = 0
    _touched: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """which outputs the pass differentiates; the others get no gradient and cost no projection"""
    _combine: Tensor | None = None
    """(touched outputs, rows): from gradients of rows to those of outputs; none: they are the same"""

    def start(
        self, n_examples: int, n_outputs: int, position_row: Tensor, *, with_gram: bool, into: Tensor | None = None
    ) -> None:
        """Clear the sums for a batch; features are added to the first rows of ``into``, where that is given."""
        device, self.position_row = position_row.device, position_row
        n_rows = n_examples * n_outputs
        self.features = torch.zeros(n_rows, self.width, device=device) if into is None else into[:n_rows]
        self.squared_norms = torch.zeros(n_examples * n_outputs, device=device)
        self.gram = torch.zeros((n_outputs, n_examples, n_examples) if with_gram else (0, 0, 0), device=device)

    def start_pass(self, combine: Tensor) -> None:
        """Prepare for a backward pass; ``combine`` ``(n c, rows)`` takes gradients of rows to those of outputs."""
        self._n_rows = combine.shape[1]
        self._touched = combine.any(dim=1).nonzero().squeeze(1)
        touched = combine[self._touched]
        is_identity = len(touched) == self._n_rows and torch.equal(touched, torch.eye(self._n_rows).to(touched))
        self._combine = None if is_identity else touched

    def add(self, part: str, row_gradients: Tensor) -> None:
        """Take a part's gradients, float32 ``(rows, *shape)``, or ``(n_scored, *shape)`` of scored positions."""
        shape = row_gradients.shape[1:]
        row_gradients = row_gradients.flatten(1)
        if len(row_gradients) != self._n_rows:
            by_row = row_gradients.new_zeros(self._n_rows, row_gradients.shape[1])
            row_gradients = by_row.index_add(0, self.position_row, row_gradients)
        gradients = row_gradients if self._combine is None else self._combine @ row_gradients  # (touched, size)
        self.squared_norms[self._touched] += torch.linalg.vector_norm(gradients, dim=1).square()
        if self.gram.numel():
            self._add_gram(gradients)
        projected = self.projector.project(part, gradients.unflatten(1, shape))
        start, place = self.offsets.get(part, 0), self.features.device
        self.features[self._touched.to(place), start : start + projected.shape[1]] += projected.to(place)

    def _add_gram(self, gradients: Tensor) -> None:
        c, n, _ = self.gram.shape
        by_output = gradients.new_zeros(n * c, gradients.shape[1])
        by_output[self._touched] = gradients
        by_output = by_output.reshape(n, c, -1).transpose(0, 1)  # (c, n, size)
        self.gram += by_output @ by_output.transpose(1, 2)


@contextmanager
def tapped(linears: Mapping[str, nn.Linear], projector: Projector) -> Iterator[Tap]:
    """Hook the layers; inside, a backward pass feeds the tap and no parameter gets a gradient."""
    width, offsets = projector.proj_dim, dict[str, int]()
    if projector.proj_type == "none":
        shapes = dict(part for name, module in linears.items() for part in layer_parts(name, module))
        starts = np.cumsum([0, *map(math.prod, shapes.values())])
        width, offsets = int(starts[-1]), dict(zip(shapes, map(int, starts), strict=False))
    tap = Tap(projector, width, offsets)
    handles = [module.register_forward_hook(_make_hook(tap, name)) for name, module in linears.items()]
    try:
        yield tap
    finally:
        for handle in handles:
            handle.remove()


def layer_parts(name: str, module: nn.Linear) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names by which a layer's parameters are projected, and their shapes."""
    yield f"{name}.weight", tuple(module.weight.shape)
    if module.bias is not None:
        yield f"{name}.bias", tuple(module.bias.shape)


def _make_hook(tap: Tap, name: str) -> _Hook:
    def after_forward(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].detach().float()
        if not output.requires_grad:  # nothing below is trainable: the graph starts here
            output = output.detach().requires_grad_(True)

        def on_backward(delta: Tensor) -> None:
            delta = delta.float()
            tap.add(f"{name}.weight", _multiply_outer(delta, x))
            if module.bias is not None:
                tap.add(f"{name}.bias", delta if delta.dim() == 2 else delta.sum(1))

        output.register_hook(on_backward)
        return output

    return after_forward


def _multiply_outer(delta: Tensor, x: Tensor) -> Tensor:
    """``sum_t delta_t (x) x_t`` of each row: ``(b, [t,] n_out)`` and ``(b, [t,] n_in)`` to ``(b, n_out, n_in)``."""
    if delta.dim() == 2:
        return delta.unsqueeze(2) * x.unsqueeze(1)
    if delta.shape[2] > x.shape[2]:  # the narrow side first: for ranks up to 8, four times faster on a processor
        return torch.einsum("bti,bto->bio", x, delta).transpose(1, 2)
    return torch.einsum("bto,bti->boi", delta, x)
