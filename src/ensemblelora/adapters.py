"""Adapters on one shared base: attach, copy, switch, save, load.

Every adapter of a run starts from the same point theta0, the adapter named :data:`THETA0`, at which the features
are taken. What differs by the kind of adapter is asked of :mod:`ensemblelora.adaptermethods`. Files are plain PEFT
folders; ``peft.PeftModel.from_pretrained`` reads them without this package, except that bottlenecks, which PEFT does
not bring, need ``import ensemblelora.bottleneck`` first.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ensemblelora.adaptermethods import METHODS, AbstractMethod, TrainedLayer, choose_targets
from ensemblelora.config import AdapterConfig
from ensemblelora.counting import PassCosts, read_costs
from ensemblelora.data.encoding import Layout
from ensemblelora.errors import ModelError, StoreError
from ensemblelora.gguf import find_origin
from ensemblelora.models import BaseModel, forked_generators
from ensemblelora.placement import iterate_parameters, refuse_waiting, standing_in
from ensemblelora.prefix import FrozenPrefix, find_prefix
from ensemblelora.quantization import squared_norm
from ensemblelora.seeding import seed_for
from ensemblelora.sharing import can_share_context
from ensemblelora.tensors import save_tensors

__all__ = [
    "THETA0",
    "AdaptedModel",
    "activate",
    "adapter_bytes",
    "adapter_state",
    "add_adapter",
    "attach",
    "count_trained",
    "draw_start",
    "is_at_start",
    "keep_head_in_float32",
    "load_adapter",
    "measure_distance",
    "remove_adapter",
    "save_adapter",
    "set_adapter_state",
    "trainable_layers",
]

THETA0 = "theta0"
_WEIGHTS_FILE = "adapter_model.safetensors"
_SETTINGS_FILE = "adapter_config.json"


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A base model carrying named adapters; exactly one is active at a time."""

    base: BaseModel
    peft: PeftModel
    method: AbstractMethod
    """the kind of adapter"""
    frozen: tuple[str, ...]
    """parts of the paths of tensors that are never trained, such as an A that all adapters share"""
    costs: PassCosts | None
    """what a pass costs; none for a family without a formula"""
    prefix: FrozenPrefix | None
    """the blocks below the lowest adapted one; none if that is the first"""
    shares_context: bool
    """whether the choices of a question can share a row"""
    origin: str = THETA0
    """the adapter that computes what the base computes: theta0, unless that was moved to where a warm-up ended"""

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
    def adapter_layers(self) -> tuple[Any, ...]:
        """The layers that carry adapters, any number of them."""
        return tuple(module for module in self.network.modules() if isinstance(module, self.method.layer_type))

    @cached_property
    def trains_whole_modules(self) -> bool:
        """Whether an adapter comes with modules of its own beside its layers, such as a classifier head."""
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
    """Put the start adapter theta0 on the base model; it computes what the base computes.

    Args:
        base: Frozen base model; it is changed in place (adapter layers are inserted).
        config: Adapter settings in PEFT's words.
        seed: The run's root seed; what does not begin at zero or one is drawn from it (LoRA's A, a bottleneck's
            down-projection).

    Raises:
        ModelError: If a named target module is not in the model, or is not of a kind that the method adapts, or the
            method needs weights that are only there while their layer runs.
    """
    method = METHODS[config.method]
    if config.method == "dora":
        refuse_waiting(base.model, "adapter.method dora")
    targets = choose_targets(base, config, method)
    shares_context = base.head == "lm" and can_share_context(base.model)
    try:
        with forked_generators(base.device), standing_in(base.model), _without_known_warnings():
            torch.manual_seed(seed_for(seed, "adapter", THETA0) % 2**31)
            model = get_peft_model(base.model, method.make_settings(base, config, targets), adapter_name=THETA0)
    except ValueError as error:
        raise ModelError(f"adapter.target_modules {config.target_modules!r}: {str(error).splitlines()[0]}") from error
    model.eval()
    prefix = None if base.is_sharded else find_prefix(base.model)  # a pass left half-way would part the processes
    adapted = AdaptedModel(
        base=base,
        peft=model,
        method=method,
        frozen=method.list_frozen(config),
        costs=read_costs(
            base.model.config.to_dict(),
            lambda shape: method.read_shape(shape, config, targets),
            n_lower=prefix.depth if prefix else 0,
        ),
        prefix=prefix,
        shares_context=shares_context,
    )
    for layer in adapted.adapter_layers:
        method.settle(layer, THETA0)
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
        with activate(adapted, THETA0), _adding(adapted):
            adapted.peft.add_adapter(name, settings)
        adapted.peft.eval()
        keep_head_in_float32(adapted, name)
    set_adapter_state(adapted, name, start)


def draw_start(adapted: AdaptedModel, *, seed: int) -> dict[str, Tensor]:
    """Draw an adapter's tensors as :func:`attach` draws theta0's; the model is left as it was.

    Args:
        adapted: The model; its theta0 says of what shape.
        seed: Of the draw itself.

    Returns:
        Tensors of an adapter that computes what the base computes, from which it would train otherwise.
    """
    name, settings = "drawn", _copy_settings(adapted, THETA0)
    settings.modules_to_save = None  # PEFT adds the head's names itself, each time
    with activate(adapted, THETA0), _adding(adapted):
        torch.manual_seed(seed % 2**31)
        adapted.peft.add_adapter(name, settings)
    for layer in adapted.adapter_layers:
        adapted.method.settle(layer, name)
    state = adapter_state(adapted, name)
    remove_adapter(adapted, name)
    return state


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


def is_at_start(adapted: AdaptedModel, name: str) -> bool:
    """Whether an adapter is theta0 still: no step of its training was kept."""
    own, start = _live_state(adapted, name), _live_state(adapted, THETA0)
    return all(torch.equal(own[key], start[key]) for key in start)


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
    save_tensors(folder / _WEIGHTS_FILE, adapter_state(adapted, name), metadata={"format": "pt"})
    settings = _copy_settings(adapted, name)
    settings.inference_mode = True
    for key, value in list(vars(settings).items()):
        if isinstance(value, set):  # would be written in any order
            setattr(settings, key, sorted(value))
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
    for key in ("peft_type", *adapted.method.settings):
        found, expected = (_as_written(getattr(some, key, None)) for some in (settings, ours))
        if found != expected:
            raise StoreError(f"adapter folder {folder}: made with {key} {found!r}, this run has {expected!r}")
    add_adapter(adapted, name, state)


def trainable_layers(adapted: AdaptedModel, name: str) -> dict[str, TrainedLayer]:
    """What makes up one adapter, by names that don't depend on the adapter's own: linear layers, and scaling vectors.

    Raises:
        ModelError: If the adapter trains anything else, whose gradient blocks are not known here.
    """
    with activate(adapted, name, trainable=True):
        wanted = {id(p) for p in adapted.peft.parameters() if p.requires_grad}
    layers: dict[str, TrainedLayer] = {}
    for path, module in adapted.network.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) in wanted:
            layers[_neutral_name(path, name)] = module
            wanted -= {id(p) for p in module.parameters(recurse=False)}
        elif isinstance(module, adapted.method.layer_type):
            for inner, scaling in adapted.method.find_scalings(module, name):
                layers[_neutral_name(f"{path}.{inner}", name)] = scaling
                wanted.discard(id(scaling.weight))
    if wanted:
        raise ModelError(
            f"adapter {name!r}: {len(wanted)} of its tensors are neither weights of linear layers nor vectors that "
            "scale activations; adapt linear layers alone"
        )
    return layers


def adapter_bytes(adapted: AdaptedModel, name: str = THETA0) -> int:
    """Bytes of one adapter's tensors as saved."""
    return sum(t.numel() * t.element_size() for t in adapter_state(adapted, name).values())


def count_trained(adapted: AdaptedModel, name: str = THETA0) -> int:
    """How many numbers of an adapter are trained."""
    with activate(adapted, name, trainable=True):
        return sum(p.numel() for p in adapted.peft.parameters() if p.requires_grad)


def measure_distance(adapted: AdaptedModel, name: str, *, start: str = THETA0) -> dict[str, float]:
    """How far an adapter moved from theta0, or from another start, as Frobenius norms (paper, Table 2).

    Returns:
        ``absolute``; ``relative_to_model`` (over the norm of all base weights); ``relative_to_adapter_init``.
    """
    first, end = adapter_state(adapted, start), adapter_state(adapted, name)
    moved = sum(float((end[key].double() - first[key].double()).pow(2).sum()) for key in first) ** 0.5
    init = sum(float(tensor.double().pow(2).sum()) for tensor in first.values()) ** 0.5
    adapters = set(adapted.peft.peft_config)
    squares = [
        squared_norm(parameter)
        for path, parameter in iterate_parameters(adapted.peft)
        if adapters.isdisjoint(path.split("."))
    ]
    full = sum(squares) ** 0.5
    return {"absolute": moved, "relative_to_model": moved / full, "relative_to_adapter_init": moved / init}


def _switch(adapted: AdaptedModel, name: str, *, trainable: bool) -> None:
    adapted.peft.set_adapter(name, inference_mode=not trainable)
    if trainable and adapted.frozen:
        for path, parameter in adapted.peft.named_parameters():
            if any(part in path for part in adapted.frozen):
                parameter.requires_grad_(False)


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


def _copy_settings(adapted: AdaptedModel, name: str) -> Any:
    return copy.deepcopy(adapted.peft.peft_config[name])


def _as_written(value: Any) -> Any:
    """A setting as its file has it."""
    return value.value if isinstance(value, Enum) else value


def _live_state(adapted: AdaptedModel, name: str) -> dict[str, Tensor]:
    return dict(get_peft_model_state_dict(adapted.peft, adapter_name=name, save_embedding_layers=False))


@contextmanager
def _adding(adapted: AdaptedModel) -> Iterator[None]:
    """Inside, PEFT may add an adapter; what it draws shifts nobody else's numbers."""
    with forked_generators(adapted.device), standing_in(adapted.network), _without_known_warnings():
        yield


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
