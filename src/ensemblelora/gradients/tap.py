"""Gradients of a layer's weight for every row of a batch, taken from one backward pass by hooks.

A linear layer's weight gradient is ``sum_t delta_t (x) x_t``, with x its input and delta the gradient of its output;
that of a vector v which multiplies activations, y = v * x, is ``sum_t delta_t * x_t``, elementwise. Rows of a batch
don't interact, so both can be read off per row while the backward pass of a sum goes by. Each layer's gradients are
combined from rows to outputs, projected and let go at once.

Cost: T n_out n_in multiply-adds for a weight's gradient over T tokens, then those of :mod:`.projection`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ensemblelora.adaptermethods import Scaling, TrainedLayer
from ensemblelora.forwards import replaced_forwards
from ensemblelora.gradients.projection import Projector
from ensemblelora.gradients.silent import make_silent_forward

__all__ = ["Tap", "layer_parts", "tapped"]

_Take = Callable[[Tensor], None]
"""receives the gradient of an activation, float32"""


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
        row_gradients = row_gradients.flatten(1).to(self.position_row.device)  # the layer may lie on another one
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
def tapped(
    layers: Mapping[str, TrainedLayer], projector: Projector, silent: Mapping[str, Any] | None = None
) -> Iterator[Tap]:
    """Hook the layers; inside, a backward pass feeds the tap and no parameter gets a gradient.

    Args:
        layers: Whose gradients are taken, by name.
        projector: The random projection.
        silent: Of :func:`~ensemblelora.gradients.silent.find_silent`: those of them that a pass can do without.
    """
    width, offsets = projector.proj_dim, dict[str, int]()
    if projector.proj_type == "none":
        shapes = dict(part for name, layer in layers.items() for part in layer_parts(name, layer))
        starts = np.cumsum([0, *map(math.prod, shapes.values())])
        width, offsets = int(starts[-1]), dict(zip(shapes, map(int, starts), strict=False))
    tap = Tap(projector, width, offsets)
    left_out = silent or {}
    with ExitStack() as stack:
        stack.enter_context(_silenced(tap, left_out))
        for name, layer in layers.items():
            if name in left_out:
                continue
            handle = _hook_scaling(tap, name, layer) if isinstance(layer, Scaling) else _hook_linear(tap, name, layer)
            stack.callback(handle.remove)
        yield tap


def layer_parts(name: str, layer: TrainedLayer) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names by which a layer's parameters are projected, and their shapes."""
    yield f"{name}.weight", tuple(layer.weight.shape)
    if layer.bias is not None:
        yield f"{name}.bias", tuple(layer.bias.shape)


@contextmanager
def _silenced(tap: Tap, layers: Mapping[str, Any]) -> Iterator[None]:
    names = {id(layer): name for name, layer in layers.items()}

    def make(layer: Any) -> Callable[..., Tensor]:
        part = f"{names[id(layer)]}.weight"

        def watch(output: Tensor, low: Tensor) -> Tensor:
            return _watch(output, lambda delta: tap.add(part, _multiply_outer(delta, low)))

        return make_silent_forward(layer, watch)

    with replaced_forwards(list(layers.values()), make):
        yield


def _hook_linear(tap: Tap, name: str, layer: Any) -> RemovableHandle:
    def after_forward(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].detach().float()

        def take(delta: Tensor) -> None:
            tap.add(f"{name}.weight", _multiply_outer(delta, x))
            if module.bias is not None:
                tap.add(f"{name}.bias", delta if delta.dim() == 2 else delta.sum(1))

        return _watch(output, take)

    handle: RemovableHandle = layer.register_forward_hook(after_forward)
    return handle


def _hook_scaling(tap: Tap, name: str, layer: Scaling) -> RemovableHandle:
    """Hook where the product y = v * x is seen; x is y / v, since no vector has a zero at the start point."""

    def take_from(product: Tensor, seen: Tensor) -> Tensor:
        x = product.detach().float() / layer.weight.detach().float().flatten()

        def take(delta: Tensor) -> None:
            gradients = delta * x  # ([b,] t, n)
            tap.add(f"{name}.weight", (gradients if delta.dim() == 2 else gradients.sum(1)).unflatten(1, shape))

        return _watch(seen, take)

    def before_forward(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return take_from(inputs[0], inputs[0]), *inputs[1:]

    def after_forward(module: Any, inputs: Any, options: Mapping[str, Any], output: Tensor) -> Tensor:
        if layer.place == "output":
            return take_from(output, output)
        base, bias = options["base_result"], options["base_layer"].bias
        return take_from(output + (base if bias is None else base - bias), output)

    shape = tuple(layer.weight.shape)
    if layer.place == "input":
        return layer.module.register_forward_pre_hook(before_forward)
    return layer.module.register_forward_hook(after_forward, with_kwargs=True)


def _watch(activation: Tensor, take: _Take) -> Tensor:
    """Have an activation's gradient told when the backward pass comes by."""
    if not activation.requires_grad:  # nothing below is trainable: the graph starts here
        activation = activation.detach().requires_grad_(True)
    activation.register_hook(lambda delta: take(delta.float()))
    return activation


def _multiply_outer(delta: Tensor, x: Tensor) -> Tensor:
    """``sum_t delta_t (x) x_t`` of each row: ``(b, [t,] n_out)`` and ``(b, [t,] n_in)`` to ``(b, n_out, n_in)``."""
    if delta.dim() == 2:
        return delta.unsqueeze(2) * x.unsqueeze(1)
    if delta.shape[2] > x.shape[2]:  # the narrow side first: for ranks up to 8, four times faster on a processor
        return torch.einsum("bti,bto->bio", x, delta).transpose(1, 2)
    return torch.einsum("bto,bti->boi", delta, x)
