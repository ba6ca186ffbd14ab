"""The loss of several members' combined scores, as a function of all their numbers that can be differentiated twice.

In: the adapted model with its members, their weights, one example. Out: its :class:`~.hessian.Expansion`. Coordinates
are all trained numbers of all members, or the entries of the weights' changes, which do not depend on how an adapter is
put together (rank, scale). Everything in float32, without dropout, with attention by plain products.
Memory: the graphs of all members' passes over one example.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel, activate
from ensemblelora.analysis.hessian import Expansion, expand
from ensemblelora.data.batching import Batch
from ensemblelora.errors import ModelError
from ensemblelora.models import in_float32
from ensemblelora.passes import score

__all__ = ["Coordinates", "expanded", "twice_differentiable"]

Coordinates = Literal["adapter", "weights"]
"""what the loss is differentiated with respect to: the adapters' trained numbers, or the changes of the weights"""


@contextmanager
def twice_differentiable(adapted: AdaptedModel) -> Iterator[None]:
    """Inside, the model computes in float32, with attention by plain products.

    Raises:
        ModelError: If its attention is neither ``eager`` nor ``sdpa``.
    """
    attention = getattr(adapted.base.model.config, "_attn_implementation", "eager")
    if attention not in ("eager", "sdpa"):
        raise ModelError(
            f"model.attn_implementation {attention}: can't be differentiated twice; set it to eager or sdpa"
        )
    with in_float32(adapted.network), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        yield


@contextmanager
def expanded(
    adapted: AdaptedModel,
    batch: Batch,
    members: Sequence[str],
    weights: Sequence[float],
    *,
    coordinates: Coordinates = "adapter",
    meter: Meter | None = None,
) -> Iterator[Expansion]:
    """Expand the loss of one example under the combined scores of some members.

    Args:
        adapted: The model, inside :func:`twice_differentiable`.
        batch: One example.
        members: Adapters.
        weights: Of their scores.
        coordinates: See :data:`Coordinates`.
        meter: Told what the blocks below the adapted ones cost, where they run.

    Yields:
        The expansion; it holds the graph of all members' passes.
    """
    before = {parameter: parameter.requires_grad for parameter in adapted.peft.parameters()}
    try:
        passes = [_run_member(adapted, batch, name, coordinates, meter) for name in members]
        combined = sum(weight * z for weight, (z, _) in zip(weights, passes, strict=True))
        tensors = [own for _, own in passes]
        # PEFT lets one adapter's numbers have gradients at a time; the graphs of the others' passes are there already.
        for tensor in (tensor for own in tensors for tensor in own):
            tensor.requires_grad_(True)
        yield expand(combined, int(batch.labels[0]), tensors)  # type: ignore[arg-type]  # there is a member
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def _run_member(
    adapted: AdaptedModel, batch: Batch, name: str, coordinates: Coordinates, meter: Meter | None
) -> tuple[Tensor, list[Tensor]]:
    """One member's scores ``(K,)``, and the tensors they are looked at as a function of."""
    if coordinates == "weights":
        with activate(adapted, name), _added_matrices(adapted, name) as matrices:
            return score(adapted, batch, meter=meter).z[0], matrices
    with activate(adapted, name, trainable=True):
        z = score(adapted, batch, meter=meter).z[0]
        return z, [parameter for parameter in adapted.peft.parameters() if parameter.requires_grad]


@contextmanager
def _added_matrices(adapted: AdaptedModel, name: str) -> Iterator[list[Tensor]]:
    """Add a matrix of zeros to every adapted weight, and give these matrices.

    Raises:
        ModelError: If the adapter is not plain LoRA.
    """
    layers: list[Any] = [layer for layer in adapted.adapter_layers if name in getattr(layer, "lora_A", {})]
    if not layers or adapted.trains_whole_modules or any(layer.lora_variant for layer in layers):
        raise ModelError(
            "sharpness in the weights' own coordinates: defined for plain LoRA; use the adapter's coordinates"
        )
    matrices = []
    with ExitStack() as stack:
        for layer in layers:
            shape = len(layer.lora_B[name].weight), layer.lora_A[name].weight.shape[1]
            matrix = torch.zeros(shape, device=layer.lora_A[name].weight.device, requires_grad=True)
            stack.callback(layer.register_forward_hook(partial(_add_product, matrix)).remove)
            matrices.append(matrix)
        yield matrices


def _add_product(matrix: Tensor, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + linear(inputs[0], matrix)
