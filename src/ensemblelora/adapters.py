"""Adapters on one shared base: attach, copy, switch, save, load.

Every adapter of a run starts from the same point theta0, the adapter named :data:`THETA0`, at which the features
are taken. Files are plain PEFT folders; ``peft.PeftModel.from_pretrained`` reads them without this package.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ensemblelora.config import AdapterConfig
from ensemblelora.counting import PassCosts, read_costs
from ensemblelora.errors import ModelError, StoreError
from ensemblelora.models import BaseModel, find_target_modules
from ensemblelora.seeding import seed_for

__all__ = [
    "THETA0",
    "AdaptedModel",
    "activate",
    "add_adapter",
    "adapter_bytes",
    "adapter_state",
    "attach",
    "load_adapter",
    "measure_distance",
    "remove_adapter",
    "save_adapter",
    "set_adapter_state",
    "trainable_linears",
]

THETA0 = "theta0"
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A base model carrying named adapters; exactly one is active at a time."""

    base: BaseModel
    peft: PeftModel
    costs: PassCosts | None
    """what a pass costs; none for a family without a formula"""

    @property
    def network(self) -> nn.Module:
        """The transformers model itself, with adapter layers in place; forward passes go here."""
        network: nn.Module = self.peft.get_base_model()
        return network

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.base.device


def attach(base: BaseModel, config: AdapterConfig, *, seed: int) -> AdaptedModel:
    """Put the start adapter theta0 on the base model.

    LoRA starts with B = 0, so theta0 computes what the base computes, and only B has a gradient there.

    Args:
        base: Frozen base model; it is changed in place (adapter layers are inserted).
        config: Adapter settings in PEFT's words.
        seed: The run's root seed; A is drawn from it.

    Raises:
        ModelError: If a named target module is not in the model.
    """
    targets = _target_modules(base, config)
    task_type = TaskType.CAUSAL_LM if base.head == "lm" else TaskType.SEQ_CLS
    settings = LoraConfig(
        task_type=task_type,
        r=config.r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT divides by r; fractions are fine
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=_uses_conv1d(base.model, targets),
    )
    torch.manual_seed(seed_for(seed, "adapter", THETA0) % 2**31)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(base.model, settings, adapter_name=THETA0)  # type: ignore[arg-type]
    except ValueError as error:
        raise ModelError(f"adapter.target_modules {config.target_modules!r}: {str(error).splitlines()[0]}") from error
    model.eval()
    costs = read_costs(base.model.config.to_dict(), config.r, targets)
    return AdaptedModel(base=base, peft=model, costs=costs)  # type: ignore[arg-type]


def add_adapter(adapted: AdaptedModel, name: str, state: dict[str, Tensor] | None = None) -> None:
    """Add an adapter that starts at theta0, or at a given state."""
    if name not in adapted.peft.peft_config:
        adapted.peft.add_adapter(name, adapted.peft.peft_config[THETA0])
    set_adapter_state(adapted, name, adapter_state(adapted, THETA0) if state is None else state)


def remove_adapter(adapted: AdaptedModel, name: str) -> None:
    """Drop an adapter from memory; theta0 stays active."""
    with activate(adapted, THETA0):
        if name in adapted.peft.peft_config:
            adapted.peft.delete_adapter(name)


@contextmanager
def activate(adapted: AdaptedModel, name: str, *, trainable: bool = False) -> Iterator[None]:
    """Make one adapter active inside the block; afterwards the former one, trainable if it was."""
    before = adapted.peft.active_adapter
    was_trainable = any(parameter.requires_grad for parameter in adapted.peft.parameters())
    adapted.peft.set_adapter(name, inference_mode=not trainable)
    try:
        yield
    finally:
        if before in adapted.peft.peft_config:
            adapted.peft.set_adapter(before, inference_mode=not was_trainable)


def adapter_state(adapted: AdaptedModel, name: str) -> dict[str, Tensor]:
    """Copy an adapter's tensors, keyed as PEFT saves them, on the CPU."""
    state = get_peft_model_state_dict(adapted.peft, adapter_name=name, save_embedding_layers=False)
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in state.items()}


def set_adapter_state(adapted: AdaptedModel, name: str, state: dict[str, Tensor]) -> None:
    """Overwrite an adapter's tensors.

    Raises:
        StoreError: If a tensor is missing, unknown, or of another shape.
    """
    expected = {key: tensor.shape for key, tensor in adapter_state(adapted, name).items()}
    arrived = {key: tensor.shape for key, tensor in state.items()}
    if expected != arrived:
        wrong = sorted(key for key in expected.keys() | arrived.keys() if expected.get(key) != arrived.get(key))
        raise StoreError(f"adapter {name!r}: {len(wrong)} tensors missing or of another shape, first {wrong[0]!r}; train it again")
    set_peft_model_state_dict(adapted.peft, state, adapter_name=name)


def save_adapter(adapted: AdaptedModel, name: str, folder: Path) -> None:
    """Write a plain PEFT folder: ``adapter_config.json`` and ``adapter_model.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_state(adapted, name), folder / _WEIGHTS, metadata={"format": "pt"})
    settings = adapted.peft.peft_config[name]
    was_inference = settings.inference_mode
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    settings.inference_mode = was_inference


def load_adapter(adapted: AdaptedModel, name: str, folder: Path) -> None:
    """Read a folder of :func:`save_adapter` into the adapter ``name``, adding it when needed.

    Raises:
        StoreError: If the folder is incomplete, damaged, or was made for another model or adapter shape.
    """
    try:
        PeftConfig.from_pretrained(str(folder))
        state = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(f"adapter folder {folder}: can't be read ({error}); train it again") from error
    add_adapter(adapted, name, state)


def trainable_linears(adapted: AdaptedModel, name: str) -> dict[str, nn.Linear]:
    """The linear layers that make up one adapter, by a name that doesn't depend on the adapter's own.

    Raises:
        ModelError: If the adapter trains anything but linear layers, whose gradient blocks are not known here.
    """
    with activate(adapted, name, trainable=True):
        wanted = {id(p) for p in adapted.peft.parameters() if p.requires_grad}
    linears: dict[str, nn.Linear] = {}
    for path, module in adapted.network.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) in wanted:
            linears[_neutral_name(path, name)] = module
            wanted -= {id(p) for p in module.parameters(recurse=False)}
    if wanted:
        raise ModelError(f"adapter {name!r}: {len(wanted)} of its tensors are not weights of linear layers; use LoRA")
    return linears


def adapter_bytes(adapted: AdaptedModel, name: str = THETA0) -> int:
    """Bytes of one adapter's tensors as saved."""
    return sum(t.numel() * t.element_size() for t in adapter_state(adapted, name).values())


def measure_distance(adapted: AdaptedModel, name: str) -> dict[str, float]:
    """How far an adapter moved from theta0, as Frobenius norms (paper, Table 2).

    Returns:
        ``absolute``; ``relative_to_model`` (over the norm of all base weights); ``relative_to_adapter_init``.
    """
    start, end = adapter_state(adapted, THETA0), adapter_state(adapted, name)
    moved = sum(float((end[key].double() - start[key].double()).pow(2).sum()) for key in start) ** 0.5
    init = sum(float(tensor.double().pow(2).sum()) for tensor in start.values()) ** 0.5
    adapter_ids = {id(p) for n, p in adapted.peft.named_parameters() if any(f".{a}." in n for a in adapted.peft.peft_config)}
    squares = [float(p.detach().float().pow(2).sum()) for p in adapted.peft.parameters() if id(p) not in adapter_ids]
    full = sum(squares) ** 0.5
    return {"absolute": moved, "relative_to_model": moved / full, "relative_to_adapter_init": moved / init}


def _target_modules(base: BaseModel, config: AdapterConfig) -> list[str]:
    if config.target_modules == "auto":
        names = find_target_modules(base.model, config.layers_to_transform)
    else:
        suffixes = tuple(config.target_modules)
        every = [name for name, _ in base.model.named_modules() if name.endswith(suffixes)]
        allowed = None if config.layers_to_transform is None else set(config.layers_to_transform)
        names = [name for name in every if allowed is None or _layer_index(name) in allowed]
    short = sorted({name.rpartition(".")[2] for name in names})
    matches = {name for name, _ in base.model.named_modules() if name.rpartition(".")[2] in short}
    return short if matches == set(names) else names or list(config.target_modules)


def _layer_index(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _uses_conv1d(model: nn.Module, targets: list[str]) -> bool:
    modules = dict(model.named_modules())
    return any(type(m).__name__ == "Conv1D" for name, m in modules.items() if name.endswith(tuple(targets)))


def _neutral_name(path: str, adapter: str) -> str:
    return path.removesuffix(f".{adapter}")
