"""LoRA, and DoRA: LoRA with a trained magnitude for every output of an adapted layer.

PEFT computes the low-rank terms in float32, the precision the adapter is kept in, which costs two conversions of every
activation. :meth:`LoraMethod.run_shared` converts the weights instead. DoRA's layers are left to PEFT: a member's norms
belong to its own weights, so several members don't share a product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ensemblelora.accounting.adapter_shapes import AdapterShape, lora_shape
from ensemblelora.accounting.shapes import ModelShape
from ensemblelora.adaptermethods.method import AbstractMethod, Scaling, task_type_of
from ensemblelora.adaptermethods.targets import uses_conv1d
from ensemblelora.config import AdapterConfig
from ensemblelora.models import BaseModel, find_target_modules
from ensemblelora.switch import MemberSwitch

__all__ = ["LoraMethod"]

_UNLIKE_LINEAR = (Conv1d, Conv2d, Conv3d, Embedding)


@final
@dataclass(frozen=True)
class LoraMethod(AbstractMethod):
    """Low-rank terms ``scale * B A x`` beside linear layers, the attention projections unless others are named."""

    has_magnitudes: bool
    """DoRA: the sum of both is divided by the norms of its rows of weights, and multiplied by trained numbers"""

    layer_type: ClassVar[type[BaseTunerLayer]] = LoraLayer
    settings: ClassVar[tuple[str, ...]] = (
        "r", "lora_alpha", "use_rslora", "use_dora", "bias", "modules_to_save", "rank_pattern", "alpha_pattern",
    )  # fmt: skip

    def find_targets(self, base: BaseModel, layers: Sequence[int] | None) -> list[str]:
        """Full names of the linear layers of attention."""
        return find_target_modules(base.model, layers)

    def make_settings(self, base: BaseModel, config: AdapterConfig, targets: list[str]) -> PeftConfig:
        """LoRA begins with B = 0, so that it computes what the base computes, and only B has a gradient there."""
        return LoraConfig(
            task_type=task_type_of(base),
            r=config.r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it by r; fractions are fine
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            fan_in_fan_out=uses_conv1d(base.model, targets),
            use_dora=self.has_magnitudes,
        )

    def read_shape(self, shape: ModelShape, config: AdapterConfig, targets: Sequence[str]) -> AdapterShape:
        """A and B of every target, and DoRA's magnitudes."""
        return lora_shape(shape, config.r, targets, trains_a=config.train_A, has_magnitudes=self.has_magnitudes)

    def can_share(self, layer: Any) -> bool:
        """Whether the layer is a linear one with plain LoRA."""
        return not layer.lora_variant and not isinstance(layer, _UNLIKE_LINEAR)

    def run_shared(self, switch: MemberSwitch, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output, and each member's ``scale * B A x`` on its own rows."""
        x: Tensor = args[0]
        y: Tensor = layer.base_layer(*args, **kwargs)

        def read(name: str) -> tuple[Tensor, ...]:
            return layer.lora_A[name].weight.T, layer.lora_B[name].weight.T * layer.scaling[name]

        down, up = switch.stack(layer, y.dtype, read)  # (m, in, r), (m, r, out)
        x = _drop(layer.lora_dropout[switch.members[0]], x).to(y.dtype)
        low = switch.multiply(x.reshape(-1, x.shape[-1]), down)
        return switch.multiply(low, up, y.reshape(-1, y.shape[-1])).view(y.shape)

    def list_frozen(self, config: AdapterConfig) -> tuple[str, ...]:
        """A, where all adapters of a run share one."""
        return () if config.train_A else (".lora_A.",)

    def find_scalings(self, layer: Any, adapter: str) -> Iterator[tuple[str, Scaling]]:
        """DoRA's magnitudes: their module gives what is added to the base layer's output, without the bias."""
        if adapter in layer.lora_magnitude_vector:
            module = layer.lora_magnitude_vector[adapter]
            yield f"lora_magnitude_vector.{adapter}", Scaling(module.weight, module, "change")

    def settle(self, layer: Any, adapter: str) -> None:
        """Measure DoRA's magnitudes anew: PEFT takes them in the base's precision, and divides by norms in float32."""
        if adapter in layer.lora_magnitude_vector:
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            module = layer.lora_magnitude_vector[adapter]
            with torch.no_grad():
                base = dequantize_module_weight(layer.get_base_layer()).to(down.dtype)
                module.weight.copy_(module.get_weight_norm(base, up @ down, layer.scaling[adapter]))


def _drop(dropout: nn.Module, x: Tensor) -> Tensor:
    if isinstance(dropout, nn.Identity) or not dropout.training:
        return x
    dropped: Tensor = dropout(x)
    return dropped
