"""What this machine has, what is missing, and whether the method runs on it."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil  # type: ignore[import-untyped]  # ships no types

from ensemblelora import __version__, progress
from ensemblelora.config import RunConfig, parse_config
from ensemblelora.recipe import DEMO_PACKAGES, missing_demo_packages

__all__ = ["Finding", "examine", "make_tiny_run", "render_findings"]

_logger = logging.getLogger(__name__)
_PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy", "scipy")
# Below these, even a small run may break off half-way.
_MIN_MEMORY_BYTES = 4 * 10**9
_MIN_DISK_BYTES = 5 * 10**9
_SCANNING_SECONDS = 2.0  # of each cache; some hold a quarter of a million files


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        state: ``ok``, ``note`` where something optional is missing or short, ``fail`` where runs will fail.
        detail: What was found.
        remedy: What to do, or an empty text.
    """

    name: str
    state: Literal["ok", "note", "fail"]
    detail: str
    remedy: str = ""


def examine(*, device: str = "auto", self_test: bool = True) -> list[Finding]:
    """Look at everything a run depends on.

    Args:
        device: Where the self-test runs, as in ``model.device``.
        self_test: Whether to run the method on a tiny random model, which takes some seconds.
    """
    findings = [
        *_find_versions(),
        _find_quantization(),
        _find_device(),
        _find_memory(),
        _find_disk(),
        *_find_caches(),
        _find_demo(),
    ]
    findings.append(_find_data())
    if self_test:
        findings.append(_run_self_test(device))
    return findings


def render_findings(findings: Sequence[Finding]) -> str:
    """Write findings as lines of text, what to do under what was found."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<4}  {finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<{width + 6}}  {finding.remedy}")
    return "\n".join(lines)


def make_tiny_run(folder: Path, *, device: str = "auto") -> RunConfig:
    """Write two tiny tasks and a tiny random Llama under ``folder``.

    Args:
        folder: An existing, empty folder.
        device: Where the run is to happen, as in ``model.device``.

    Returns:
        The config of a run on them that takes seconds.
    """
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [(noun, colour) for noun in _NOUNS for colour in ("red", "blue")]
    for asked, question in (("red", "the {} is {}"), ("blue", "is a {} {}")):
        lines = [f"{question.format(noun, colour)},{'yes' if colour == asked else 'no'}" for noun, colour in rows]
        (tasks / f"{asked}.csv").write_text("\n".join(["text,label", *lines, ""]), encoding="utf-8")
    _save_tiny_model(folder / "model", [f"the {noun} is {colour}: yes, no" for noun, colour in rows])
    return parse_config(
        {
            "out": str(folder / "run"),
            "data": {"tasks": [str(tasks)], "validation_fraction": 0.25, "test_fraction": 0.25},
            "model": {"name": str(folder / "model"), "dtype": "float32", "device": device},
            "gradients": {"proj_dim": 16},
            "training": {"num_train_epochs": 1, "learning_rate": 1e-3},
        },
        source="self-test",
    )


_NOUNS = ("boat", "cart", "door", "flag", "gate", "hat", "kite", "lamp", "mug", "pen", "ring", "sail")


def _save_tiny_model(folder: Path, texts: list[str]) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    shape = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(folder)
    fast.save_pretrained(folder)


def _find_versions() -> Iterator[Finding]:
    where = f"{__version__} in {Path(__file__).parent}"
    yield Finding("ensemblelora", "ok", f"{where}, Python {platform.python_version()}, {platform.platform()}")
    found, missing = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    remedy = f"run: {sys.executable} -m pip install {' '.join(missing)}" if missing else ""
    yield Finding("packages", "fail" if missing else "ok", ", ".join(found), remedy)


def _find_quantization() -> Finding:
    """Say whether a base model can be packed in 4 bits, by doing it to one small weight."""
    name, remedy = "4-bit bases", "for model.quantization: pip install 'ensemblelora[quantization]'"
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "note", "bitsandbytes is not installed", remedy)
    try:
        import torch

        from ensemblelora.quantization import measure_packing_error

        error = measure_packing_error(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as fault:  # a native library that does not fit this machine fails in many ways
        return Finding(name, "note", f"bitsandbytes {version} does not work here: {fault}", f"reinstall it; {remedy}")
    return Finding(name, "ok", f"bitsandbytes {version}; a weight packed and unpacked is off by {error:.0%}")


def _find_device() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("device", "fail", f"torch can't be imported: {error}", "reinstall torch")
    cores = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} used by torch"
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{device.name} with {device.total_memory / 1e9:.0f} GB" for device in devices)
        return Finding("device", "ok", f"{names}; {cores}")
    if torch.backends.mps.is_available():
        return Finding("device", "ok", f"Apple GPU (mps); {cores}")
    return Finding("device", "note", f"no accelerator; {cores}", "models of a billion parameters and more need one")


def _find_memory() -> Finding:
    memory = psutil.virtual_memory()
    short = memory.available < _MIN_MEMORY_BYTES
    detail = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    return Finding("memory", "note" if short else "ok", detail, "close other programs" if short else "")


def _find_disk() -> Finding:
    disk = shutil.disk_usage(Path.cwd())
    short = disk.free < _MIN_DISK_BYTES
    return Finding(
        "disk", "note" if short else "ok", f"{disk.free / 1e9:.1f} GB free here", "clear a cache below" if short else ""
    )


def _find_caches() -> Iterator[Finding]:
    from datasets import config as datasets_config
    from huggingface_hub import constants

    from ensemblelora.gguf import cache_folder

    caches = {
        "converted models": cache_folder(),
        "downloaded models": Path(constants.HF_HUB_CACHE),
        "prepared datasets": Path(datasets_config.HF_DATASETS_CACHE),
    }
    for name, folder in caches.items():
        if folder.is_dir():
            n_bytes, is_whole = _measure_bytes(folder)
            size = f"{'' if is_whole else 'at least '}{n_bytes / 1e6:,.0f} MB"
            yield Finding(name, "ok", f"{size} in {folder}", f"to clear: rm -r {folder}")


def _find_demo() -> Finding:
    missing = [DEMO_PACKAGES[name] for name in missing_demo_packages()]
    if not missing:
        return Finding("demo packages", "ok", " and ".join(DEMO_PACKAGES.values()))
    return Finding(
        "demo packages", "note", f"missing: {', '.join(missing)}", f"run: pip install --no-deps {' '.join(missing)}"
    )


def _find_data() -> Finding:
    folder = os.environ.get("ENSEMBLELORA_DATA")
    if folder is None:
        return Finding("benchmark data", "note", "ENSEMBLELORA_DATA is not set", "set it to use the benchmark's cards")
    if not Path(folder).is_dir():
        return Finding("benchmark data", "note", f"ENSEMBLELORA_DATA={folder}: no such folder", "correct or unset it")
    return Finding("benchmark data", "ok", folder)


def _run_self_test(device: str) -> Finding:
    from ensemblelora import pipeline

    started = time.perf_counter()
    try:
        with progress.stage("self-test"), tempfile.TemporaryDirectory() as folder:
            pipeline.run(make_tiny_run(Path(folder), device=device))
    except Exception as error:  # whatever it is, it is what the doctor was asked to find
        _logger.debug("self-test", exc_info=True)
        return Finding("self-test", "fail", f"{type(error).__name__}: {error}", "doctor --debug shows where")
    seconds = time.perf_counter() - started
    return Finding("self-test", "ok", f"features to report on a tiny random model in {seconds:.0f} s")


def _measure_bytes(folder: Path) -> tuple[int, bool]:
    """Bytes of all files below a folder, and whether all were reached in the time that this may take."""
    deadline, n_bytes, waiting = time.monotonic() + _SCANNING_SECONDS, 0, [str(folder)]
    while waiting:
        if time.monotonic() > deadline:
            return n_bytes, False
        with suppress(OSError), os.scandir(waiting.pop()) as entries:  # others may be clearing it meanwhile
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif not entry.is_symlink():  # a hub cache links its snapshots to its blobs: these count, once
                    n_bytes += entry.stat(follow_symlinks=False).st_size
    return n_bytes, True
