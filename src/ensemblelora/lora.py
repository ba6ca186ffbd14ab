"""The low-rank terms of LoRA layers, computed in the base model's precision, for one adapter or several at once.

PEFT computes them in float32, the precision the adapter is kept in, which costs two conversions of every activation.
Here the weights are converted instead; gradients still arrive at the float32 weights. Several members share one pass
when a batch holds their rows one member after the other: each member's rows meet its own A and B.

In: the adapted model and member names. Out: a switch that says whose rows come next. Leaving the context puts PEFT's
own forward back, which is the slow twin in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ensemblelora.adapters import AdaptedModel
from ensemblelora.forwards import replaced_forwards

__all__ = ["MemberSwitch", "can_fuse", "can_mix", "fused"]

_UNLIKE_LINEAR = (Conv1d, Conv2d, Conv3d, Embedding)


class MemberSwitch:
    """Whose rows a batch holds: one member's, or several members' in turn."""

    def __init__(self, members: Sequence[str]) -> None:
        self._members: tuple[str, ...] = tuple(members)
        self._row_counts: tuple[int, ...] | None = None
        self._weights: dict[tuple[int, tuple[str, ...]], tuple[Tensor, Tensor]] = {}

    def use(self, members: Sequence[str], row_counts: Sequence[int] | None = None) -> None:
        """Say whose rows come next.

        Args:
            members: Their names, in the order of their rows.
            row_counts: How many rows of a batch belong to each; none: equally many.
        """
        self._members = tuple(members)
        is_even = row_counts is None or len(set(row_counts)) == 1
        self._row_counts = None if is_even else tuple(row_counts or ())

    def forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer gives: the base layer's output, and each member's ``scale * B A x`` on its own rows."""
        y: Tensor = layer.base_layer(x, *args, **kwargs)
        down, up = self._stack(layer, y.dtype)  # (m, in, r), (m, r, out)
        m = len(self._members)
        x = self._drop(layer, x).to(y.dtype)
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])  # (tokens, in), (tokens, out)
        if m == 1:
            return torch.addmm(flat_y, flat_x @ down[0], up[0]).view(y.shape)
        if self._row_counts is None:
            low = torch.bmm(flat_x.reshape(m, -1, x.shape[-1]), down)
            return torch.baddbmm(flat_y.reshape(m, -1, y.shape[-1]), low, up).view(y.shape)
        # One product a member, not one masked product for all: what overflows in one member stays there.
        width = len(flat_x) // sum(self._row_counts)
        sizes = [n_rows * width for n_rows in self._row_counts]
        pieces = zip(flat_x.split(sizes), flat_y.split(sizes), down, up, strict=True)
        return torch.cat([torch.addmm(own_y, own_x @ a, b) for own_x, own_y, a, b in pieces]).view(y.shape)

    def _drop(self, layer: Any, x: Tensor) -> Tensor:
        dropout = layer.lora_dropout[self._members[0]]
        if isinstance(dropout, nn.Identity) or not dropout.training:
            return x
        dropped: Tensor = dropout(x)
        return dropped

    def _stack(self, layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = (id(layer), self._members)
        if not torch.is_grad_enabled() and key in self._weights:
            return self._weights[key]
        downs: list[Tensor] = [layer.lora_A[name].weight.T for name in self._members]
        ups: list[Tensor] = [layer.lora_B[name].weight.T * layer.scaling[name] for name in self._members]
        down, up = torch.stack(downs).to(dtype), torch.stack(ups).to(dtype)
        if not torch.is_grad_enabled():
            self._weights[key] = (down, up)
        return down, up


def can_fuse(adapted: AdaptedModel) -> bool:
    """Whether every adapted layer is a linear layer with plain LoRA, and nothing but LoRA is trained."""
    layers = adapted.lora_layers
    is_plain = all(not layer.lora_variant and not isinstance(layer, _UNLIKE_LINEAR) for layer in layers)
    return bool(layers) and is_plain and not adapted.trains_whole_modules


def can_mix(adapted: AdaptedModel) -> bool:
    """Whether one pass can serve several members."""
    # An adapted output layer reads scored positions, which are not the batch's rows.
    has_adapted_output = isinstance(adapted.base.model.get_output_embeddings(), BaseTunerLayer)
    return can_fuse(adapted) and not adapted.has_experts and not has_adapted_output


@contextmanager
def fused(adapted: AdaptedModel, members: Sequence[str]) -> Iterator[MemberSwitch]:
    """Compute LoRA layers here instead of in PEFT, for these members until the switch says otherwise.

    The members' weights must not change inside unless gradients are on.
    """
    switch = MemberSwitch(members)
    with replaced_forwards(adapted.lora_layers, lambda layer: partial(switch.forward, layer)):
        yield switch
