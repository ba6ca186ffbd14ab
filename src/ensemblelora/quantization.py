"""Base models in 4 bits (QLoRA): how they are loaded, and what packed weights hold.

bitsandbytes keeps the weight of a linear layer as NF4 codes, two in a byte, with a scale for every 64 of them; double
quantisation keeps the scales as 8-bit codes, too. Every pass unpacks one layer after the other and computes in the
precision of its input, so that features, training and scores see one fixed function of the adapter. Only the
transformer's blocks are packed: embeddings, output layers and classification heads stay as they were.

LLM.int8() is not offered: it rounds activations, and columns with an outlier anywhere in a batch are computed apart, so
that a row's scores and gradients depend on its batch; on a processor it even trains another function than it evaluates.

In: a :class:`~ensemblelora.config.ModelConfig` and a model's architecture, or a loaded model. Out: what transformers is
told, or the numbers behind packed weights, one weight at a time.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ensemblelora.config import ModelConfig
from ensemblelora.errors import MissingExtraError, ModelError
from ensemblelora.placement import iterate_parameters

__all__ = [
    "check_installed",
    "choose_loading",
    "count_numbers",
    "count_weight_bytes",
    "dequantize_layers",
    "dequantize_weight",
    "describe_quantization",
    "find_packed_layers",
    "leave_file",
    "list_tensors",
    "measure_packing_error",
    "on_one_thread",
    "settle_layers",
    "squared_norm",
]

_INSTALL = "run: pip install 'ensemblelora[quantization]'"


def check_installed(config: ModelConfig) -> None:
    """Refuse a 4-bit base where the package for it is missing.

    Raises:
        MissingExtraError: With the command that installs it.
    """
    if config.quantization != "none" and not _is_installed():
        raise MissingExtraError(
            f"model.quantization {config.quantization}: package bitsandbytes is not installed; {_INSTALL}"
        )


def choose_loading(
    config: ModelConfig,
    architecture: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    list_kept: Callable[[], list[str]],
) -> dict[str, Any]:
    """Say what ``from_pretrained`` is to be told beside name and precision; nothing for weights that stay as they are.

    Args:
        config: Asks for a quantisation, or for none.
        architecture: The model's own config, which says whether its files are quantised already.
        device: Where each layer is packed as soon as it is read: the whole model is never there in full precision.
        dtype: What the layers compute in.
        list_kept: Gives the names of the layers that are not to be packed.

    Raises:
        ModelError: If the files are quantised in a way that is not supported, or quantised already.
        MissingExtraError: If they are in 4 bits, and bitsandbytes is not installed.
    """
    if (own := _read_own(architecture)) is not None:
        _check_own(config, own)
        return {"device_map": str(device)}
    if config.quantization == "none":
        return {}
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list_kept(),  # named so for 4 bits, too
    )
    return {"quantization_config": settings, "device_map": str(device)}


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Inside, weights are packed to the same numbers on any machine.

    Double quantisation takes the mean of a weight's scales, which torch adds up in as many parts as it has threads.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def settle_layers(model: nn.Module) -> None:
    """Let every packed layer compute one function, in its input's precision, in all passes and on all processors.

    Left alone, bitsandbytes 0.50 rearranges a layer's weight in its first pass without gradients on a processor with
    AVX-512 BF16. Scales are rounded to bfloat16 in place (undoing it does not bring double quantisation back), and
    autograd does not know the kernel that is used from then on: no gradient passes the layer in later training. Moving
    such a weight corrupts it (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078).

    The kernel that unpacks on processors takes wrong scales where a row of weights is no multiple of 64: refused.

    Raises:
        ModelError: If a weight has been rearranged already, or would be unpacked wrongly on its device.
    """
    for name, layer in find_packed_layers(model).items():
        state = layer.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            raise ModelError(f"model: the weight of {name} was rearranged by bitsandbytes in a pass; load it anew")
        if layer.weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
            raise ModelError(
                f"model: {name} reads {state.shape[-1]} numbers, no multiple of {state.blocksize}, and bitsandbytes "
                "unpacks such weights wrongly on a processor; set model.quantization to none, or use a GPU"
            )
        layer.support_avx512bf16_for_cpu = False
        layer.compute_dtype, layer.compute_type_is_set = None, True


def leave_file(model: nn.Module) -> None:
    """Copy the tensors that were not packed: as views of their file they would keep all of it in memory."""
    for parameter in model.parameters():
        if _state_of(parameter) is None:
            parameter.data = parameter.data.clone()


def find_packed_layers(model: nn.Module) -> dict[str, Any]:
    """The layers whose weights are kept in 4 bits, by name; asks nothing of bitsandbytes."""
    own = ((name, module, dict(module.named_parameters(recurse=False))) for name, module in model.named_modules())
    return {name: module for name, module, parameters in own if _state_of(parameters.get("weight")) is not None}


def list_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the model's weights consist of, by name: parameters, and the scales of packed ones."""
    for name, parameter in iterate_parameters(model):
        yield name, parameter.detach()
        yield from ((f"{name}.{key}", tensor) for key, tensor in _scales_of(parameter).items())


def count_numbers(parameter: Tensor) -> int:
    """How many weights a parameter holds, whether packed or not."""
    state = _state_of(parameter)
    return parameter.numel() if state is None else math.prod(state.shape)


def count_weight_bytes(parameter: Tensor) -> int:
    """Bytes that a parameter takes in memory, the scales of a packed one included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (parameter, *_scales_of(parameter).values()))


def dequantize_weight(parameter: Tensor) -> Tensor:
    """A parameter's weights as numbers of its shape: unpacked, or itself where it is not packed."""
    if (state := _state_of(parameter)) is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(parameter.data, state)
    return weight


def squared_norm(parameter: Tensor) -> float:
    """Sum of the squares of a parameter's weights, in float32; a packed one is unpacked for it and let go again."""
    return float(dequantize_weight(parameter).float().pow(2).sum())


def measure_packing_error(device: torch.device) -> float:
    """Pack and unpack a small random weight: its relative error, about 0.09 wherever bitsandbytes works."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    unpacked = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    return float((unpacked - weight).norm() / weight.norm())


def dequantize_layers(model: PreTrainedModel) -> None:
    """Put linear layers with unpacked weights in place of the packed ones, so that adapters can be merged into them.

    The weights keep the values to which they were rounded: the model computes what it computed before.

    Args:
        model: Changed in place; it is no quantised model afterwards, and is saved as any other.
    """
    dtype = model.dtype
    for name, packed in find_packed_layers(model).items():
        weight = dequantize_weight(packed.weight).to(dtype)
        is_transposed = getattr(packed, "source_cls", None) is Conv1D  # as GPT-2's files have it
        n_out, n_in = weight.shape
        with torch.device("meta"):
            plain = Conv1D(n_out, n_in) if is_transposed else nn.Linear(n_in, n_out, bias=packed.bias is not None)
        plain.weight = nn.Parameter(weight.T.contiguous() if is_transposed else weight, requires_grad=False)
        plain.bias = packed.bias
        model.set_submodule(name, plain.train(packed.training))
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    vars(model)["is_loaded_in_4bit"] = False


def describe_quantization(model: PreTrainedModel) -> dict[str, Any] | None:
    """What a ``BitsAndBytesConfig`` takes to load the same weights; none for a model that is not quantised."""
    own = _read_own(model.config)
    if own is None:
        return None
    keys = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "llm_int8_skip_modules")
    return {"load_in_4bit": True, **{key: own[key] for key in keys if own.get(key) is not None}}


def _state_of(parameter: object) -> Any:
    """What bitsandbytes needs to unpack a weight; none if it is not packed."""
    return getattr(parameter, "quant_state", None)


def _scales_of(parameter: Tensor) -> dict[str, Tensor]:
    """What is kept beside the codes of a packed weight, in an order of its own; nothing for any other."""
    state = _state_of(parameter)
    return {} if state is None else dict(sorted(state.as_dict(packed=True).items()))


def _is_installed() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _read_own(architecture: PretrainedConfig) -> Mapping[str, Any] | None:
    own = getattr(architecture, "quantization_config", None)
    return own if own is None or isinstance(own, Mapping) else own.to_dict()


def _check_own(config: ModelConfig, own: Mapping[str, Any]) -> None:
    """Refuse files that are quantised in another way, or that would have to be quantised twice."""
    if not own.get("load_in_4bit"):
        method = "LLM.int8()" if own.get("load_in_8bit") else own.get("quant_method", "an unknown method")
        raise ModelError(
            f"model {config.name!r}: its files are quantised by {method}; give a model in full precision, with "
            "model.quantization nf4 for 4 bits, or one in bitsandbytes' 4 bits"
        )
    if config.quantization != "none":
        raise ModelError(
            f"model {config.name!r}: its files are in 4 bits already ({own.get('bnb_4bit_quant_type')}); set "
            "model.quantization to none, which leaves them as they are"
        )
    if not _is_installed():
        raise MissingExtraError(
            f"model {config.name!r}: its files are in 4 bits, and package bitsandbytes is not installed; {_INSTALL}"
        )
