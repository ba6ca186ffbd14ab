"""Which modules carry an adapter: found by structure, or by the names and layers that a config gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from ensemblelora.adaptermethods.method import AbstractMethod
from ensemblelora.bottleneck import find_width
from ensemblelora.config import AdapterConfig
from ensemblelora.errors import ModelError
from ensemblelora.models import BaseModel, find_blocks, find_target_modules

__all__ = ["choose_targets", "find_outputs", "names_among", "uses_conv1d"]


def choose_targets(base: BaseModel, config: AdapterConfig, method: AbstractMethod) -> list[str]:
    """Name the modules to adapt, by their last names where these say it all, as PEFT's own configs do.

    Raises:
        ModelError: If the model has no such module or layer.
    """
    layers = _choose_layers(base.model, config.layers_to_transform)
    if config.target_modules == "auto":
        names = method.find_targets(base, layers)
    else:
        names = _find_named_modules(base, config.target_modules, layers, method)
    short = sorted({name.rpartition(".")[2] for name in names})
    matches = {name for name, _ in base.model.named_modules() if name.rpartition(".")[2] in short}
    return short if matches == set(names) else names


def find_outputs(model: nn.Module, layers: Sequence[int] | None = None) -> list[str]:
    """Find what gives the output of each sub-block, attention and MLP, by structure and not by a list of names.

    That is its last linear layer as wide as the residual stream. Families agree on it where they don't agree on which
    module adds the residual: BERT's and BLOOM's sub-blocks do so themselves. A mixture of experts has no such layer:
    there it is the whole sub-block.

    Args:
        model: Any transformer whose blocks sit in one list of modules.
        layers: Keep only these block indices; none: all.

    Returns:
        Full module names, in order.

    Raises:
        ModelError: If the model has no list of blocks, ``layers`` names one that isn't there, or a block has no such
            layers.
    """
    find_target_modules(model, layers)  # refuses layers that the model does not have
    prefix, blocks = find_blocks(model)
    chosen = range(len(blocks)) if layers is None else sorted(set(layers))
    return [f"{prefix}.{i}.{name}" for i in chosen for name in _list_outputs(blocks[i], model)]


def names_among(model: nn.Module, targets: Iterable[str], layers: Sequence[int] | None) -> list[str]:
    """Full names of the modules that are called so or end so, in order; within some blocks, or anywhere."""
    wanted = tuple(targets)
    every = (name for name, _ in model.named_modules())
    found = [name for name in every if any(name == target or name.endswith(f".{target}") for target in wanted)]
    return found if layers is None else [name for name in found if _layer_index(name) in layers]


def uses_conv1d(model: nn.Module, targets: Sequence[str]) -> bool:
    """Whether a target is one of GPT-2's transposed layers."""
    return any(isinstance(m, Conv1D) and name.endswith(tuple(targets)) for name, m in model.named_modules())


def _list_outputs(block: nn.Module, model: nn.Module) -> list[str]:
    linear = [(name, module) for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    width, has_experts = find_width(block, model), any("expert" in name for name, _ in block.named_modules())
    outputs: list[str] = []
    for is_attention in (True, False):
        own = [n for n, m in linear if _is_in_attention(n) == is_attention and find_width(m, model) == width]
        if own and (is_attention or not has_experts):
            outputs.append(own[-1])
        elif has_experts and not is_attention:
            parts = {name: child for name, child in block.named_children() if "att" not in name}
            outputs.append(max(parts, key=lambda name: sum(p.numel() for p in parts[name].parameters())))
        else:
            raise ModelError(
                f"model {type(model).__name__}: a block without {'attention' if is_attention else 'MLP'} that ends in "
                f"a linear layer {width} wide; name adapter.target_modules"
            )
    return outputs


def _is_in_attention(name: str) -> bool:
    return "att" in name.rpartition(".")[0]


def _choose_layers(model: nn.Module, layers: str | Sequence[int] | None) -> Sequence[int] | None:
    if not isinstance(layers, str):
        return layers
    n_blocks = len(find_blocks(model)[1])
    n_adapted = -(-n_blocks // {"top_half": 2, "top_third": 3}[layers])
    return range(n_blocks - n_adapted, n_blocks)


def _find_named_modules(
    base: BaseModel, targets: Sequence[str], layers: Sequence[int] | None, method: AbstractMethod
) -> list[str]:
    missing = [target for target in targets if not names_among(base.model, [target], None)]
    if missing:
        known = sorted({name.rpartition(".")[2] for name in method.find_targets(base, None)})
        raise ModelError(f"adapter.target_modules: no module is named {missing}; auto would take {known}")
    if layers is not None:
        find_target_modules(base.model, layers)  # refuses layers that the model does not have
    names = names_among(base.model, targets, layers)
    if not names:
        raise ModelError(f"adapter.target_modules: none of {list(targets)} is in layers {list(layers or ())}")
    return names


def _layer_index(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
