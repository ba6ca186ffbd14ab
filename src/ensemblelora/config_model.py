"""The section of a config that names the base model, and says where its weights are kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ensemblelora.config_stage import Stage

__all__ = ["ModelConfig"]

_Sizes = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^(\d+|mps|cpu)$")],
        Annotated[str, Field(pattern=r"^\d+(\.\d+)?(KB|KiB|MB|MiB|GB|GiB)$")],
    ],
    Field(min_length=1, title="sizes by device, such as {0: 20GiB, cpu: 60GiB}"),
]


class ModelConfig(Stage):
    """The base model: a hub id, a local folder, a .gguf file, or ``smollm2-135m``."""

    name: str = Field("smollm2-135m", description="Hub id, folder, .gguf file, or the embedded default.")
    revision: str | None = Field(None, description="Commit or tag of a hub model; none: its newest.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the processor computes in it; adapters stay float32."
    )
    quantization: Literal["none", "nf4"] = Field(
        "none",
        description="nf4: the blocks' weights in 4 bits, as in QLoRA, by bitsandbytes (extra `quantization`). "
        "`smollm2-135m` is a dequantised 4-bit file (Q4_1): on it, LoRA against QLoRA compares two quantised bases.",
    )
    bnb_4bit_use_double_quant: bool = Field(True, description="Of nf4: keep its scales in 8 bits, as in QLoRA.")
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps; auto takes the best.")
    device_map: Literal["one", "auto", "sequential", "fsdp"] = Field(
        "one",
        description="Of a model larger than a device. auto: its blocks in equal parts on all accelerators; sequential: "
        "one filled after the other. Blocks that fit none wait in memory, then on disk, and are loaded for each pass. "
        "fsdp: each process that torchrun starts has a part of every block; where it starts none, as auto.",
    )
    max_memory: _Sizes | None = Field(
        None,
        description="Of device_map: bytes of weights a device may hold, by its number, or cpu; those not named hold "
        "none. None: nine tenths of what is free.",
    )
    offload_folder: str | None = Field(
        None,
        description="Of device_map: disk for blocks that are rebuilt on loading, as those of mixtures of experts are; "
        "others are read from the model's own files.",
    )
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="auto: on a processor eager, which is faster there for rows of up to 1,024 tokens."
    )
    prefix_cache_gb: float = Field(
        4.0,
        ge=0,
        description="Disk for activations below the lowest adapted layer; 0: none. A whole run frees it at its end; "
        "after plan or a single stage it stays for the next one.",
    )

    @field_validator("max_memory", mode="before")
    @classmethod
    def _write_numbers_out(cls, value: Any) -> Any:
        """Take the numbers of devices as YAML reads them."""
        return {str(key): size for key, size in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _refuse_limits_of_one_device(self) -> ModelConfig:
        """Refuse what a model on one device would not heed."""
        idle = [key for key in ("max_memory", "offload_folder") if getattr(self, key) is not None]
        if self.device_map == "one" and idle:
            raise ValueError(f"{' and '.join(idle)} given, and device_map is one; set that to auto, or leave them out")
        return self
