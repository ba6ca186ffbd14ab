"""LoRA layers whose B is zero: they add nothing, so the gradient pass leaves their low-rank terms out.

What B's gradient needs, ``scale * A x``, is taken beside the graph, and the backward pass goes through the base's own
weights alone. PEFT's layers with hooks on them (:mod:`.tap`) give the same numbers and are the slow twin in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ensemblelora.adaptermethods import TrainedLayer
from ensemblelora.adapters import THETA0, AdaptedModel

__all__ = ["find_silent", "make_silent_forward"]


def find_silent(adapted: AdaptedModel, layers: Mapping[str, TrainedLayer]) -> dict[str, Any]:
    """Return the LoRA layers that hold one of ``layers`` as a B which is all zero at theta0, by its name."""
    names = {id(layer): name for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    held: dict[str, Any] = {}
    are_moved: list[Tensor] = []
    for parent in adapted.adapter_layers:
        if isinstance(parent, LoraLayer) and THETA0 in parent.lora_B and adapted.method.can_share(parent):
            up: Any = parent.lora_B[THETA0]
            if id(up) in names and up.bias is None:
                held[names[id(up)]] = parent
                are_moved.append(up.weight.any().to(adapted.device))  # layers may lie on several
    if not held:
        return {}
    answers = torch.stack(are_moved).tolist()  # one question to the device: this is asked for every batch
    return {name: parent for (name, parent), is_moved in zip(held.items(), answers, strict=True) if not is_moved}


def make_silent_forward(layer: Any, watch: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a forward pass of the base layer alone, which tells what B's gradient needs.

    Args:
        layer: Of :func:`find_silent`.
        watch: Given the output ``(..., n_out)`` and what B would be multiplied with, ``(..., r)`` float32; returns the
            output that goes on.
    """
    down: Tensor = layer.lora_A[THETA0].weight.detach() * layer.scaling[THETA0]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            low = nn.functional.linear(x.float(), down.float())
        return watch(layer.base_layer(x, *args, **kwargs), low)

    return forward
