"""Adapters on one shared base: attach, copy, switch, save, load.

Every adapter of a run starts from the same point theta0, the adapter named :data:`THETA0`, at which the features
are taken. Files are plain PEFT folders; ``peft.PeftModel.from_pretrained`` reads them without this package.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ensemblelora.config import AdapterConfig
from ensemblelora.counting import PassCosts, read_costs
from ensemblelora.data.encoding import Layout
from ensemblelora.errors import ModelError, StoreError
from ensemblelora.models import BaseModel, find_blocks, find_origin, find_target_modules, forked_generators
from ensemblelora.prefix import FrozenPrefix, find_prefix
from ensemblelora.seeding import seed_for
from ensemblelora.sharing import can_share_context

__all__ = [
    "THETA0",
    "AdaptedModel",
    "activate",
    "adapter_bytes",
    "adapter_state",
    "add_adapter",
    "attach",
    "keep_head_in_float32",
    "load_adapter",
    "measure_distance",
    "remove_adapter",
    "save_adapter",
    "set_adapter_state",
    "trainable_linears",
]

THETA0 = "theta0"
_WEIGHTS_FILE = "adapter_model.safetensors"
_SETTINGS_FILE = "adapter_config.json"
_SETTINGS = ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "modules_to_save", "rank_pattern", "alpha_pattern")
"""settings that change what the same tensors compute"""


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A base model carrying named adapters; exactly one is active at a time."""

    base: BaseModel
    peft: PeftModel
    costs: PassCosts | None
    """what a pass costs; none for a family without a formula"""
    prefix: FrozenPrefix | None
    """the blocks below the lowest adapted one; none if that is the first"""
    shares_context: bool
    """whether the choices of a question can share a row"""
    trains_a: bool
    """whether A is trained, or B alone"""

    @property
    def network(self) -> nn.Module:
        """The transformers model itself, with adapter layers in place; forward passes go here."""
        network: nn.Module = self.peft.get_base_model()
        return network

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.base.device

    @cached_property
    def lora_layers(self) -> tuple[Any, ...]:
        """The layers that carry adapters, any number of them."""
        return tuple(module for module in self.network.modules() if isinstance(module, LoraLayer))

    @cached_property
    def trains_whole_modules(self) -> bool:
        """Whether an adapter comes with modules of its own beside LoRA, such as a classifier head."""
        return any(isinstance(module, ModulesToSaveWrapper) for module in self.peft.modules())

    @cached_property
    def has_experts(self) -> bool:
        """Whether some layers see tokens sorted by expert, and no longer row by row."""
        return any("expert" in name for name, _ in self.network.named_modules())

    @property
    def layout(self) -> Layout:
        """How options become rows where nothing needs a row for each choice."""
        return "shared" if self.shares_context else "rows"


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
    shares_context = base.head == "lm" and can_share_context(base.model)
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM if base.head == "lm" else TaskType.SEQ_CLS,
        r=config.r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it by r; fractions are fine
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=_uses_conv1d(base.model, targets),
    )
    try:
        with forked_generators(base.device), _without_known_warnings():
            torch.manual_seed(seed_for(seed, "adapter", THETA0) % 2**31)
            model = get_peft_model(base.model, settings, adapter_name=THETA0)
    except ValueError as error:
        raise ModelError(f"adapter.target_modules {config.target_modules!r}: {str(error).splitlines()[0]}") from error
    model.eval()
    prefix = find_prefix(base.model)
    depth = prefix.depth if prefix else 0
    adapted = AdaptedModel(
        base=base,
        peft=model,
        costs=read_costs(base.model.config.to_dict(), config.r, targets, trains_a=config.train_A, n_lower=depth),
        prefix=prefix,
        shares_context=shares_context,
        trains_a=config.train_A,
    )
    keep_head_in_float32(adapted, THETA0)
    _switch(adapted, THETA0, trainable=True)
    return adapted


def add_adapter(adapted: AdaptedModel, name: str, state: dict[str, Tensor] | None = None) -> None:
    """Add an adapter that starts at theta0, or at a given state; one that is there already is set back to it.

    Raises:
        StoreError: If the state does not fit the adapter's tensors; nothing is added then.
    """
    start = adapter_state(adapted, THETA0) if state is None else state
    _check_shapes(adapted, name, start)
    if name not in adapted.peft.peft_config:
        settings = _copy_settings(adapted, THETA0)
        settings.modules_to_save = None  # PEFT adds the head's names itself, each time
        # PEFT makes the active adapter trainable when it adds one; leaving the context sets it back.
        with activate(adapted, THETA0), forked_generators(adapted.device), _without_known_warnings():
            adapted.peft.add_adapter(name, settings)
        adapted.peft.eval()
        keep_head_in_float32(adapted, name)
    set_adapter_state(adapted, name, start)


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
    if (before, was_trainable) == (name, trainable):
        yield
        return
    _switch(adapted, name, trainable=trainable)
    try:
        yield
    finally:
        if before in adapted.peft.peft_config:
            _switch(adapted, before, trainable=was_trainable)


def adapter_state(adapted: AdaptedModel, name: str) -> dict[str, Tensor]:
    """Copy an adapter's tensors, keyed as PEFT saves them, on the CPU."""
    state = _live_state(adapted, name)
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in state.items()}


def set_adapter_state(adapted: AdaptedModel, name: str, state: dict[str, Tensor]) -> None:
    """Overwrite an adapter's tensors.

    Raises:
        StoreError: If a tensor is missing, unknown, or of another shape.
    """
    _check_shapes(adapted, name, state)
    set_peft_model_state_dict(adapted.peft, state, adapter_name=name)


def save_adapter(adapted: AdaptedModel, name: str, folder: Path) -> None:
    """Write a plain PEFT folder: ``adapter_config.json`` and ``adapter_model.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_state(adapted, name), folder / _WEIGHTS_FILE, metadata={"format": "pt"})
    settings = _copy_settings(adapted, name)
    settings.inference_mode = True
    settings.target_modules = sorted(settings.target_modules or ())  # a set would be written in any order
    if (origin := find_origin(adapted.base.name)) is not None:  # PEFT would name a folder of this machine's cache
        settings.base_model_name_or_path = origin
    settings.save_pretrained(str(folder))


def load_adapter(adapted: AdaptedModel, name: str, folder: Path) -> None:
    """Read a folder of :func:`save_adapter` into the adapter ``name``, adding it when needed.

    Raises:
        StoreError: If the folder is incomplete, damaged, or was made for another model or adapter shape.
    """
    try:
        # Looked at first: for a folder without settings, PEFT would ask the model hub.
        (folder / _SETTINGS_FILE).stat()
        settings = PeftConfig.from_pretrained(str(folder))
        state = load_file(folder / _WEIGHTS_FILE)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StoreError(f"adapter folder {folder}: can't be read ({error}); train it again") from error
    ours = _copy_settings(adapted, THETA0)
    for key in _SETTINGS:
        found, expected = getattr(settings, key, None), getattr(ours, key)
        if found != expected:
            raise StoreError(f"adapter folder {folder}: made with {key} {found!r}, this run has {expected!r}")
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
    adapters = tuple(f".{adapter}." for adapter in adapted.peft.peft_config)
    squares = [
        float(parameter.detach().float().pow(2).sum())
        for path, parameter in adapted.peft.named_parameters()
        if not any(adapter in path for adapter in adapters)
    ]
    full = sum(squares) ** 0.5
    return {"absolute": moved, "relative_to_model": moved / full, "relative_to_adapter_init": moved / init}


def _switch(adapted: AdaptedModel, name: str, *, trainable: bool) -> None:
    adapted.peft.set_adapter(name, inference_mode=not trainable)
    if trainable and not adapted.trains_a:
        for path, parameter in adapted.peft.named_parameters():
            if ".lora_A." in path:
                parameter.requires_grad_(False)


def _target_modules(base: BaseModel, config: AdapterConfig) -> list[str]:
    """The adapted modules, by their last names where these say it all, as PEFT's own configs do."""
    layers = _choose_layers(base, config.layers_to_transform)
    if config.target_modules == "auto":
        names = find_target_modules(base.model, layers)
    else:
        names = _find_named_modules(base, config.target_modules, layers)
    short = sorted({name.rpartition(".")[2] for name in names})
    matches = {name for name, _ in base.model.named_modules() if name.rpartition(".")[2] in short}
    return short if matches == set(names) else names


def _choose_layers(base: BaseModel, layers: str | Sequence[int] | None) -> Sequence[int] | None:
    if not isinstance(layers, str):
        return layers
    n_blocks = len(find_blocks(base.model)[1])
    n_adapted = -(-n_blocks // {"top_half": 2, "top_third": 3}[layers])
    return range(n_blocks - n_adapted, n_blocks)


def _find_named_modules(base: BaseModel, targets: Sequence[str], layers: Sequence[int] | None) -> list[str]:
    every = [name for name, _ in base.model.named_modules()]
    found = {target: [n for n in every if n == target or n.endswith(f".{target}")] for target in targets}
    missing = [target for target, names in found.items() if not names]
    if missing:
        known = sorted({name.rpartition(".")[2] for name in find_target_modules(base.model)})
        raise ModelError(f"adapter.target_modules: no module is named {missing}; auto would take {known}")
    names = [name for name in every if any(name in group for group in found.values())]
    if layers is None:
        return names
    find_target_modules(base.model, layers)  # refuses layers that the model does not have
    kept = [name for name in names if _layer_index(name) in layers]
    if not kept:
        raise ModelError(f"adapter.target_modules: none of {list(targets)} is in layers {list(layers)}")
    return kept


def _layer_index(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _uses_conv1d(model: nn.Module, targets: Sequence[str]) -> bool:
    return any(isinstance(m, Conv1D) and name.endswith(tuple(targets)) for name, m in model.named_modules())


def keep_head_in_float32(adapted: AdaptedModel, name: str) -> None:
    """Train an output layer in float32, as PEFT does with LoRA's own weights: bfloat16 swallows small steps."""
    for wrapper in adapted.peft.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapted.base.model.dtype != torch.float32:
            head = wrapper.modules_to_save[name]
            head.float()
            head.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))


def _check_shapes(adapted: AdaptedModel, name: str, state: dict[str, Tensor]) -> None:
    expected = {key: tensor.shape for key, tensor in _live_state(adapted, THETA0).items()}
    arrived = {key: tensor.shape for key, tensor in state.items()}
    if expected != arrived:
        wrong = sorted(key for key in expected.keys() | arrived.keys() if expected.get(key) != arrived.get(key))
        raise StoreError(
            f"adapter {name!r}: {len(wrong)} tensors missing, unknown or of another shape, first {wrong[0]!r}; "
            "train it again"
        )


def _copy_settings(adapted: AdaptedModel, name: str) -> LoraConfig:
    return copy.deepcopy(cast("LoraConfig", adapted.peft.peft_config[name]))


def _live_state(adapted: AdaptedModel, name: str) -> dict[str, Tensor]:
    return dict(get_peft_model_state_dict(adapted.peft, adapter_name=name, save_embedding_layers=False))


@contextmanager
def _without_known_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by a name that it deprecates.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # A model may mix GPT-2's transposed layers with ordinary ones; PEFT corrects each layer by itself.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        yield


def _neutral_name(path: str, adapter: str) -> str:
    return ".".join(part for part in path.split(".") if part != adapter)
