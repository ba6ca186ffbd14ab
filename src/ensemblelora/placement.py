"""A base model whose blocks lie on several devices, in the processor's memory, and on disk.

accelerate chooses the places, and its hooks bring activations to each block's device, and to blocks on disk their
weights for the time of a pass. Only whole blocks are laid elsewhere: embeddings, output layer and classifier head stay
on the first device, so that whoever reads their weights finds them. What reads the weights of blocks other than by
running them asks here: :func:`iterate_parameters` loads each layer's while it is looked at, :func:`refuse_waiting`
says that all would be needed at once.

In: a model's skeleton without weights, and the config. Out: what ``from_pretrained`` takes as ``device_map``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import (  # type: ignore[import-untyped]  # ships no types
    CustomDtype,
    align_module_device,
    get_balanced_memory,
    get_max_memory,
    has_offloaded_params,
    infer_auto_device_map,
)
from torch import nn

from ensemblelora.config import ModelConfig
from ensemblelora.errors import ModelError
from ensemblelora.sharding import gather, is_sharded

__all__ = [
    "DeviceMap",
    "has_waiting_weights",
    "iterate_parameters",
    "plan_placement",
    "refuse_waiting",
    "standing_in",
    "without_dispatch_notes",
]

DeviceMap = dict[str, int | str]
"""names of modules, and where each is kept: an accelerator's number, ``mps``, ``cpu`` or ``disk``"""

_SHARE_OF_FREE = 0.9


def plan_placement(
    config: ModelConfig,
    model: nn.Module,
    prefix: str,
    blocks: nn.ModuleList,
    device: torch.device,
    *,
    is_packed: bool = False,
) -> DeviceMap | None:
    """Choose where each block of a model is kept.

    Args:
        config: Says how, and how much each device may hold.
        model: Its skeleton, of the precision that it will be loaded in.
        prefix: Name of the list of blocks.
        blocks: That list.
        device: ``cpu`` uses no accelerator.
        is_packed: Whether the blocks will be in 4 bits.

    Returns:
        None where everything fits the first device.

    Raises:
        ModelError: If a device is named that is not there, if the first device has no room for what is outside the
            blocks, or if blocks in 4 bits would have to wait elsewhere.
    """
    room = _find_room(config, device)
    main = next(iter(room))
    outside = [p for name, p in model.named_parameters() if not name.startswith(f"{prefix}.")]
    n_bytes = sum(p.numel() * p.element_size() for p in outside)
    if n_bytes > room[main]:
        raise ModelError(
            f"model.max_memory: embeddings and output layer take {n_bytes / 1e6:.4g} MB, and device {main} may hold "
            f"{room[main] / 1e6:.4g} MB; raise it, or choose a larger device"
        )
    room[main] -= n_bytes
    sizes: dict[str, Any] = {"no_split_module_classes": sorted({type(block).__name__ for block in blocks})}
    sizes |= {"dtype": CustomDtype.INT4} if is_packed else {}
    if config.device_map == "auto":
        room = get_balanced_memory(blocks, max_memory=room, **sizes)
    found = infer_auto_device_map(blocks, max_memory=room, **sizes)
    places = [found.get(str(index), found.get("")) for index in range(len(blocks))]
    if set(places) == {main}:
        return None
    waiting = sum(place == "disk" or (place == "cpu" and main != "cpu") for place in places)
    if is_packed and waiting:
        raise ModelError(
            f"model.device_map {config.device_map}: {waiting} of {len(places)} blocks in 4 bits fit no device, and "
            "packed weights can't wait elsewhere; raise model.max_memory, use more devices, or set model.quantization "
            "to none"
        )
    return {**dict.fromkeys(_list_outside(model, prefix), main), **{f"{prefix}.{i}": p for i, p in enumerate(places)}}


def has_waiting_weights(model: nn.Module) -> bool:
    """Whether some weights are only there while their layer runs."""
    return any(map(has_offloaded_params, model.modules()))


def refuse_waiting(model: nn.Module, what: str) -> None:
    """Say that something needs all weights at once.

    Args:
        model: Any.
        what: Begins the message.

    Raises:
        ModelError: If some of its weights are only there while their layer runs.
    """
    if has_waiting_weights(model) or is_sharded(model):
        raise ModelError(
            f"{what}: needs weights that model.device_map keeps elsewhere until their layer runs; use larger or more "
            "devices, or leave this out"
        )


def iterate_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what ``named_parameters`` does, in its order, each weight loaded while it is looked at."""
    names = {name for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        with align_module_device(module):
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if name in names:
                    yield name, gather(parameter)


@contextmanager
def standing_in(model: nn.Module) -> Iterator[None]:
    """Inside, weights that wait elsewhere look as they do when their layer runs: of its device, without values.

    PEFT puts an adapter where the weight of its layer is.
    """
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        if has_offloaded_params(module):
            hook: Any = module._hf_hook
            for name, parameter in module.named_parameters(recurse=False):
                before.append((module, name, parameter))
                one = torch.empty((), dtype=parameter.dtype, device=hook.execution_device)  # expanded, it takes no room
                setattr(module, name, nn.Parameter(one.expand(parameter.shape), requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in before:
            setattr(module, name, parameter)


@contextmanager
def without_dispatch_notes() -> Iterator[None]:
    """Keep accelerate from saying of every such model that parts of it wait elsewhere."""
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _find_room(config: ModelConfig, device: torch.device) -> dict[int | str, float]:
    """Bytes of weights each device may hold, accelerators first."""
    asked = {int(key) if key.isdigit() else key: size for key, size in (config.max_memory or {}).items()}
    if absent := [key for key in asked if isinstance(key, int) and key >= torch.accelerator.device_count()]:
        raise ModelError(
            f"model.max_memory: names device {absent[0]}, and this machine has {torch.accelerator.device_count()} "
            "accelerators; leave it out"
        )
    room: dict[int | str, float] = get_max_memory(asked or None)
    if device.type == "cpu":
        room = {key: size for key, size in room.items() if key == "cpu"}
    if not room:
        raise ModelError("model.max_memory: names no device that model.device allows; give cpu, or set device to auto")
    return room if asked else {key: size * _SHARE_OF_FREE for key, size in room.items()}


def _list_outside(model: nn.Module, prefix: str) -> list[str]:
    """Names of what a model has besides its blocks: modules, and tensors of the modules around the blocks."""
    names: list[str] = []
    module, path = model, ""
    for part in prefix.split("."):
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False), *module.named_children())
        names += [f"{path}{name}" for name, _ in own if name != part]
        module, path = module.get_submodule(part), f"{path}{part}."
    return names
