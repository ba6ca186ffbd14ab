"""(IA)^3: trained vectors that multiply keys, values, and what enters the MLP's last layer.

PEFT brings the layers, and says which modules of a family they belong to. The vectors begin at one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from peft import IA3Config, PeftConfig
from peft.tuners.ia3.layer import Conv2d, Conv3d, IA3Layer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from torch import Tensor

from ensemblelora.accounting.adapter_shapes import AdapterShape, scaling_shape
from ensemblelora.accounting.shapes import ModelShape
from ensemblelora.adaptermethods.method import AbstractMethod, Scaling, task_type_of
from ensemblelora.adaptermethods.targets import names_among, uses_conv1d
from ensemblelora.config import AdapterConfig
from ensemblelora.errors import ModelError
from ensemblelora.models import BaseModel, find_target_modules
from ensemblelora.switch import MemberSwitch

__all__ = ["IA3Method"]

_UNLIKE_LINEAR = (Conv2d, Conv3d)


@final
@dataclass(frozen=True)
class IA3Method(AbstractMethod):
    """Vectors on the output of some linear layers, and on the input of others, which PEFT calls feedforward modules."""

    layer_type: ClassVar[type[BaseTunerLayer]] = IA3Layer
    settings: ClassVar[tuple[str, ...]] = ("modules_to_save",)

    def find_targets(self, base: BaseModel, layers: Sequence[int] | None) -> list[str]:
        """Full names of the modules that PEFT takes in this family."""
        find_target_modules(base.model, layers)  # refuses layers that the model does not have
        family = base.model.config.model_type
        known = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
        if family not in known:
            raise ModelError(
                f"adapter.method ia3: PEFT does not know which modules of {family} to scale; name "
                "adapter.target_modules"
            )
        return names_among(base.model, known[family], layers)

    def make_settings(self, base: BaseModel, config: AdapterConfig, targets: list[str]) -> PeftConfig:
        """Vectors begin at one, so that they leave the base as it is."""
        return IA3Config(
            task_type=task_type_of(base),
            target_modules=targets,
            feedforward_modules=_find_scaled_inputs(base.model.config.model_type, targets),
            fan_in_fan_out=uses_conv1d(base.model, targets),
        )

    def read_shape(self, shape: ModelShape, config: AdapterConfig, targets: Sequence[str]) -> AdapterShape:
        """A number for each feature of every target's output, or of its input."""
        return scaling_shape(shape, targets, scaled_inputs=_find_scaled_inputs(shape.family, targets))

    def can_share(self, layer: Any) -> bool:
        """Whether the layer is a linear one."""
        return not isinstance(layer, _UNLIKE_LINEAR)

    def run_shared(self, switch: MemberSwitch, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """The base layer, with its input or output multiplied by each row's own member's vector."""
        x: Tensor = args[0]

        def read(name: str) -> tuple[Tensor, ...]:
            return (layer.ia3_l[name].flatten(),)

        (vectors,) = switch.stack(layer, x.dtype, read)  # (m, n)
        if layer.is_feedforward:
            return layer.base_layer(switch.scale(x, vectors), *args[1:], **kwargs)
        return switch.scale(layer.base_layer(*args, **kwargs), vectors)

    def find_scalings(self, layer: Any, adapter: str) -> Iterator[tuple[str, Scaling]]:
        """The layer's vector, if it carries the adapter."""
        if adapter in layer.ia3_l:
            weight = layer.ia3_l[adapter]
            scaled = (
                Scaling(weight, layer.base_layer, "input") if layer.is_feedforward else Scaling(weight, layer, "output")
            )
            yield f"ia3_l.{adapter}", scaled


def _find_scaled_inputs(family: str, targets: Sequence[str]) -> list[str]:
    """Which targets are scaled at their input: those that PEFT says are, in families that it knows."""
    ends = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(family, [])
    return [target for target in targets if any(f".{target}".endswith(f".{end}") for end in ends)]
