"""How a run uses bottleneck adapters: after the attention and the MLP of every chosen block.

Several members share one pass through the base. Their products are computed in its precision, as LoRA's are; the slow
twin is the layer's own forward pass with one adapter active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ensemblelora.accounting.adapter_shapes import AdapterShape, bottleneck_shape
from ensemblelora.accounting.shapes import ModelShape
from ensemblelora.adaptermethods.method import AbstractMethod, task_type_of
from ensemblelora.adaptermethods.targets import find_outputs
from ensemblelora.bottleneck import ACTIVATIONS, BottleneckConfig, BottleneckLayer
from ensemblelora.config import AdapterConfig
from ensemblelora.models import BaseModel
from ensemblelora.switch import MemberSwitch

__all__ = ["BottleneckMethod"]


@final
@dataclass(frozen=True)
class BottleneckMethod(AbstractMethod):
    """``h + scaling * Up(act(Down(h)))`` with h a sub-block's output before the residual is added (Houlsby et al.)."""

    layer_type: ClassVar[type[BaseTunerLayer]] = BottleneckLayer
    settings: ClassVar[tuple[str, ...]] = ("reduction", "non_linearity", "scaling", "modules_to_save")

    def find_targets(self, base: BaseModel, layers: Sequence[int] | None) -> list[str]:
        """Full names of the modules that give the output of attention and MLP."""
        return find_outputs(base.model, layers)

    def make_settings(self, base: BaseModel, config: AdapterConfig, targets: list[str]) -> PeftConfig:
        """The up-projection begins at zero: only its weights and its bias have a gradient there."""
        return BottleneckConfig(
            task_type=task_type_of(base),
            target_modules=targets,
            reduction=config.reduction,
            non_linearity=config.non_linearity,
            scaling=config.scaling,
        )

    def read_shape(self, shape: ModelShape, config: AdapterConfig, targets: Sequence[str]) -> AdapterShape:
        """Two products after every target."""
        return bottleneck_shape(shape, config.reduction, targets)

    def can_share(self, layer: Any) -> bool:
        """Every such layer can."""
        return True

    def run_shared(self, switch: MemberSwitch, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's output, and what each member adds to its own rows."""

        def read(name: str) -> tuple[Tensor, ...]:
            down, up, scaling = layer.bottleneck_down[name], layer.bottleneck_up[name], layer.scaling[name]
            return down.weight.T, down.bias[None], up.weight.T * scaling, up.bias[None] * scaling

        def change(hidden: Tensor) -> Tensor:
            down, down_bias, up, up_bias = switch.stack(layer, hidden.dtype, read)  # (m, h, k) (m, 1, k) (m, k, h) ...
            flat = hidden.reshape(-1, hidden.shape[-1])  # (tokens, h)
            low = ACTIVATIONS[layer.non_linearity[switch.members[0]]](switch.multiply(flat, down, down_bias))
            return hidden + switch.multiply(low, up, up_bias).view(hidden.shape)

        return layer.adapt(layer.base_layer(*args, **kwargs), change)
