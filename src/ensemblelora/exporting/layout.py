"""Whether servers that hold many adapters beside one base can load a PEFT folder, by their own documented rules.

vLLM (its page "LoRA Adapters" and its checks of ``adapter_config.json``): LoRA without bias, DoRA or modules saved
whole; a rank up to ``--max-lora-rank``, 16 unless raised, to one of a few values; one scale for all layers; tensors
named ``base_model.model.LAYER.lora_A.weight`` and ``lora_B``.
LoRAX (its page "LoRA"): the same names; a kind of layer counts only where each block has it, and is left out silently
otherwise; and of each architecture the layers it lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from ensemblelora import artifacts
from ensemblelora.errors import StoreError
from ensemblelora.exporting.request import PEFT_FILES

__all__ = ["VLLM_RANKS", "Server", "list_layout_faults"]

Server = Literal["vllm", "lorax"]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""values that ``--max-lora-rank`` takes"""

_TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
_BLOCK = re.compile(r"\.(\d+)\.")
_LORAX_LAYERS: Mapping[str, frozenset[str]] = {
    "llama": frozenset("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head".split()),
    "mistral": frozenset("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head".split()),
    "mixtral": frozenset("q_proj k_proj v_proj o_proj lm_head".split()),
    "gemma": frozenset("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()),
    "phi3": frozenset("qkv_proj o_proj gate_up_proj down_proj lm_head".split()),
    "phi": frozenset("q_proj k_proj v_proj dense fc1 fc2 lm_head".split()),
    "qwen2": frozenset("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head".split()),
    "gpt2": frozenset("c_attn c_proj c_fc".split()),
    "bloom": frozenset("query_key_value dense dense_h_to_4h dense_4h_to_h lm_head".split()),
}


def list_layout_faults(
    folder: Path,
    server: Server,
    *,
    max_rank: int = 16,
    n_blocks: int | None = None,
    architecture: str | None = None,
) -> list[str]:
    """Say what keeps a server from loading an adapter, or from using all of it.

    Args:
        folder: A PEFT folder.
        server: Which one.
        max_rank: What vLLM is started with as ``--max-lora-rank``.
        n_blocks: Blocks of the base model, for LoRAX; none: as many as the adapter names.
        architecture: ``model_type`` of the base's config, for LoRAX's list of layers; none: not checked.

    Returns:
        Faults in words; none: it loads, and all of it is used.

    Raises:
        StoreError: If the folder is no PEFT adapter.
    """
    settings, shapes = _read(folder)
    faults = list(_list_setting_faults(settings))
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            faults.append(f"tensor {name}: no layer's lora_A or lora_B")
        else:
            layers.setdefault(match["layer"], {})[match["side"]] = shape
    faults += [f"layer {layer}: has only lora_{next(iter(s))}" for layer, s in layers.items() if len(s) == 1]
    ranks = {sides["A"][0] for sides in layers.values() if "A" in sides}
    if ranks - {settings.get("r")}:
        faults.append(f"ranks {sorted(ranks)}: the settings say {settings.get('r')} for all layers")
    if server == "vllm":
        faults += _list_rank_faults(max(ranks, default=0), max_rank)
    else:
        faults += _list_lorax_faults(list(layers), n_blocks, architecture)
    return faults


def _list_setting_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    if settings.get("peft_type") != "LORA":
        yield f"peft_type {settings.get('peft_type')}: only LORA is served"
    for key, fine in (("bias", "none"), ("use_dora", False), ("modules_to_save", None)):
        value = settings.get(key, fine)
        if value != fine and value:
            yield f"{key} {value}: has to be {fine}"
    for key in ("rank_pattern", "alpha_pattern", "layer_replication", "trainable_token_indices", "target_parameters"):
        if settings.get(key):
            yield f"{key}: is not looked at, so that the adapter would compute something else"
    for key in ("r", "lora_alpha", "target_modules"):
        if not settings.get(key):
            yield f"{key}: missing"


def _list_rank_faults(rank: int, max_rank: int) -> Iterator[str]:
    if max_rank not in VLLM_RANKS:
        yield f"--max-lora-rank {max_rank}: vLLM takes one of {', '.join(map(str, VLLM_RANKS))}"
    if rank > max_rank:
        enough = next((r for r in VLLM_RANKS if r >= rank), None)
        way = f"start vLLM with --max-lora-rank {enough}, or fold" if enough else "fold"
        yield f"rank {rank}: above --max-lora-rank {max_rank}; {way} to a smaller rank"


def _list_lorax_faults(layers: list[str], n_blocks: int | None, architecture: str | None) -> Iterator[str]:
    blocks: dict[str, set[int]] = {}
    for layer in layers:
        number = _BLOCK.search(layer)
        blocks.setdefault(layer.rpartition(".")[2], set()).update([int(number[1])] if number else [])
    wanted = n_blocks or 1 + max((max(own) for own in blocks.values() if own), default=0)
    for kind, own in blocks.items():
        if own and own != set(range(wanted)):
            yield f"{kind}: in {len(own)} of {wanted} blocks; LoRAX leaves a kind out that any block lacks"
    served = _LORAX_LAYERS.get(architecture or "")
    if architecture is not None and served is None:
        yield f"architecture {architecture}: not among those whose layers LoRAX lists"
    for kind in sorted(set(blocks) - (served or set(blocks))):
        yield f"{kind}: LoRAX leaves it out for {architecture}"


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    settings = artifacts.read_json(folder / PEFT_FILES[0])
    try:
        with safe_open(folder / PEFT_FILES[1], framework="numpy") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{folder / PEFT_FILES[1]}: can't be read ({error}); export again") from None
    return settings, shapes
