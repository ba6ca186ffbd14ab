"""Bottleneck adapters (Houlsby et al., 2019) as a method of PEFT: ``h + scaling * Up(act(Down(h)))`` after a module.

Importing this module registers them, so that ``peft.PeftModel.from_pretrained`` loads a folder of theirs; PEFT's own
ways of saving, switching and deleting adapters then serve them like any other. The up-projection and its bias begin
at zero: a fresh adapter computes what the base computes, to the last bit. Its tensors are float32 whatever the base is,
and the base's weights are not looked at, so that they may be of any kind, quantised ones included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

__all__ = ["ACTIVATIONS", "BottleneckConfig", "BottleneckLayer", "BottleneckModel", "count_hidden", "find_width"]

_NAME = "bottleneck"

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


@dataclass
class BottleneckConfig(PeftConfig):
    """What PEFT is told of an adapter, and writes to ``adapter_config.json``.

    Attributes:
        target_modules: Modules whose output passes an adapter, by their names or the ends of these.
        reduction: Width of the module's output over that of the bottleneck, which is one number at least.
        non_linearity: A key of :data:`ACTIVATIONS`.
        scaling: Factor of what the adapter adds.
        exclude_modules: Names that are left out.
        modules_to_save: Modules trained and saved as a whole, such as a classifier head.
    """

    target_modules: list[str] | set[str] | str | None = field(default=None)
    reduction: int = field(default=256)
    non_linearity: str = field(default="relu")
    scaling: float = field(default=1.0)
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        """Check the values, which may come from anybody's file."""
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT has no types
        self.peft_type = PeftType[_NAME.upper()]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if self.reduction < 1:
            raise ValueError(f"reduction {self.reduction}: expected a whole number from 1 on")
        if self.non_linearity not in ACTIVATIONS:
            raise ValueError(f"non_linearity {self.non_linearity!r}: expected one of {', '.join(ACTIVATIONS)}")


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module and what any number of adapters add to its output.

    The output may be a tensor ``(..., width)`` or a tuple that begins with one, as attention gives.

    Args:
        base_layer: The module.
        width: Of its output.
        adapter_name: The first adapter, which is active.
        config: Its settings.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("scaling", "non_linearity")

    def __init__(self, base_layer: nn.Module, width: int, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.width = width
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.non_linearity: dict[str, str] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter, or set one back to its start."""
        hidden = count_hidden(self.width, config.reduction)
        down, up = nn.Linear(self.width, hidden), nn.Linear(hidden, self.width)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))  # as LoRA's A
        for start in (down.bias, up.weight, up.bias):
            nn.init.zeros_(start)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.scaling[adapter_name], self.non_linearity[adapter_name] = config.scaling, config.non_linearity
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, and add what the active adapters make of its output."""
        return self.adapt(self.base_layer(*args, **kwargs), self._add_changes)

    def adapt(self, output: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """Apply a function to a module's output, or to the first value of several."""
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def _add_changes(self, hidden: Tensor) -> Tensor:
        names = [name for name in self.active_adapters if name in self.bottleneck_up]
        if self.disable_adapters or not names:
            return hidden
        precision: torch.dtype = next(self.bottleneck_down.parameters()).dtype
        x = hidden.to(precision)
        # Added in the wider of both precisions, so that a change of zero leaves every bit as it is.
        return (hidden + sum(self._compute_change(name, x) for name in names)).to(hidden.dtype)

    def _compute_change(self, name: str, x: Tensor) -> Tensor:
        low = ACTIVATIONS[self.non_linearity[name]](self.bottleneck_down[name](x))
        change: Tensor = self.bottleneck_up[name](low) * self.scaling[name]
        return change

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        """PEFT asks for ``weight``, which a whole sub-block does not have, and would take its precision over."""
        return next(base_layer.parameters()).device, None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: a function that is not linear has no place in a weight."""
        raise ValueError("a bottleneck adapter is not linear and can't be merged into the base weights")


class BottleneckModel(BaseTuner):
    """Puts :class:`BottleneckLayer` in the place of the target modules; PEFT makes one for a model."""

    prefix = f"{_NAME}_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if not peft_config.target_modules:
            raise ValueError("bottleneck: name target_modules, such as the last linear layer of each sub-block")
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, find_width(target, self.model), adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise ValueError("bottleneck adapters are not linear and can't be merged into the base weights; use unload()")


def count_hidden(width: int, reduction: int) -> int:
    """Width of a bottleneck: that of the module's output over the reduction, at least one.

    Example:
        >>> count_hidden(576, 256), count_hidden(64, 256)
        (2, 1)
    """
    return max(1, width // reduction)


def find_width(module: nn.Module, model: nn.Module) -> int:
    """Width of a module's output: a linear layer's own, and the residual stream's for a whole sub-block."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, Conv1D):
        return int(module.nf)
    config: Any = model.config
    return int(config.hidden_size)


def _register() -> None:
    """Enter the method in PEFT's tables, once a process.

    ``register_peft_method`` takes only names of PEFT's own enumeration, and PEFT has no function that adds one.
    """
    name = _NAME.upper()
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    register_peft_method(
        name=_NAME, config_cls=BottleneckConfig, model_cls=BottleneckModel, prefix=BottleneckModel.prefix
    )


_register()
