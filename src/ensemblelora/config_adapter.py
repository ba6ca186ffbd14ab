"""The section of a config that says which kind of adapter is trained, and which keys belong to which kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, model_validator

from ensemblelora.config_stage import Stage

__all__ = ["AdapterConfig", "keep_own_keys"]

_Layers = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1, title="a list of one or more layer numbers")]

_OWN_KEYS: Mapping[str, tuple[str, ...]] = {
    "lora": ("r", "lora_alpha", "lora_dropout", "train_A"),
    "dora": ("r", "lora_alpha"),
    "ia3": (),
    "bottleneck": ("reduction", "non_linearity", "scaling"),
}
"""keys of an adapter that not every method has"""
_ALL_KEYS = tuple(dict.fromkeys(key for keys in _OWN_KEYS.values() for key in keys))


class AdapterConfig(Stage):
    """The adapter, in PEFT's own words."""

    method: Literal["lora", "dora", "ia3", "bottleneck"] = Field(
        "lora",
        description="dora: LoRA with trained magnitudes; ia3: vectors that scale activations; bottleneck: two small "
        "layers after attention and MLP.",
    )
    r: int = Field(8, ge=1, description="Of lora, dora. The paper uses 4 on 8B models; small models need more.")
    lora_alpha: float = Field(16.0, gt=0, description="Of lora, dora: the scale of the adapter is lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Of lora: in training only; features are taken without.")
    reduction: int = Field(
        256,
        ge=1,
        description="Of bottleneck: the model's width over its own. Paper: 256, for 4,096 and wider; small models need "
        "8 to 64.",
    )
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = Field("relu", description="Of bottleneck.")
    scaling: float = Field(1.0, gt=0, description="Of bottleneck: factor of what it adds.")
    target_modules: Literal["auto"] | tuple[str, ...] = Field(
        "auto",
        description="auto: the attention projections (lora, dora), PEFT's choice for the family (ia3), the outputs of "
        "attention and MLP (bottleneck).",
    )
    layers_to_transform: Literal["top_half", "top_third"] | _Layers | None = Field(
        None, description="Adapt only these layers; none: all. What lies below is then computed once a row."
    )
    train_A: bool = Field(True, description="Of lora. False: every adapter keeps theta0's A and trains B alone.")

    @model_validator(mode="after")
    def _refuse_keys_of_others(self) -> AdapterConfig:
        """Refuse what the method would not heed; a default is no wish, since a resolved config states every key."""
        faults = []
        for key in _ALL_KEYS:
            if key not in _OWN_KEYS[self.method] and getattr(self, key) != type(self).model_fields[key].default:
                owners = [method for method, keys in _OWN_KEYS.items() if key in keys]
                faults.append(f"{key} {getattr(self, key)!r} is for method {' or '.join(owners)}")
        if faults:
            raise ValueError(f"{', '.join(faults)}, and method is {self.method}; leave that out")
        return self


def keep_own_keys(preset: Mapping[str, Any], method: Any) -> dict[str, Any]:
    """Leave out of a preset what another kind of adapter than ``method`` has."""
    own = _OWN_KEYS.get(str(method), ())
    return {key: value for key, value in preset.items() if key in own or key not in _ALL_KEYS}
