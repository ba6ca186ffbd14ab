"""Where adapters start and features are taken: theta0 as it was attached, or where a warm-up ended.

At theta0 only the matrices that begin at zero have a gradient (LoRA's B); after a short training on all tasks every
trained number has one. Groups then go on from there, for the epochs that the warm-up has left. In: the model and the
tensors of a warm-up. Out: the model with theta0 there, for a while or for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ensemblelora.adapters import (
    THETA0,
    AdaptedModel,
    adapter_state,
    add_adapter,
    load_adapter,
    remove_adapter,
    set_adapter_state,
)
from ensemblelora.artifacts import RunFolder
from ensemblelora.config import RunConfig, TrainingConfig
from ensemblelora.errors import ConfigError

__all__ = [
    "WARMUP",
    "State",
    "cut_training",
    "halve_epochs",
    "is_warm",
    "load_start",
    "read_warmup",
    "settle_training",
    "start_at",
    "started_at",
]

WARMUP = "warmup"
"""name of the stage, and of the adapter that it leaves"""
_ORIGIN = "pretrained"

State = Mapping[str, Tensor]
"""an adapter's tensors, keyed as PEFT saves them"""


def is_warm(config: RunConfig) -> bool:
    """Whether features are taken after a warm-up, which groups go on from."""
    return config.gradients.linearize_at == "warmup"


def halve_epochs(settings: TrainingConfig, n_first: int | None = None) -> tuple[TrainingConfig, TrainingConfig]:
    """Cut a training in two, each with a schedule of its own.

    Args:
        settings: The whole.
        n_first: Epochs of the first part; none: half, and of an odd number the second has the epoch more.

    Raises:
        ConfigError: If nothing is left for one of them.
    """
    n_epochs = settings.num_train_epochs
    if n_epochs < 2:
        raise ConfigError("training.num_train_epochs 1: a warm-up takes half of the epochs; give at least 2")
    first = n_epochs // 2 if n_first is None else n_first
    if first >= n_epochs:
        raise ConfigError(
            f"gradients.warmup_epochs {first}: none of {n_epochs} (training.num_train_epochs) is left after the "
            "warm-up; lower it"
        )
    return (
        settings.model_copy(update={"num_train_epochs": first}),
        settings.model_copy(update={"num_train_epochs": n_epochs - first}),
    )


def cut_training(config: RunConfig) -> tuple[TrainingConfig, TrainingConfig]:
    """The settings of a warm-up, and of what goes on from there.

    Raises:
        ConfigError: If nothing is left for one of them.
    """
    n_first = config.gradients.warmup_epochs
    return halve_epochs(config.training, None if n_first == "auto" else n_first)


def settle_training(config: RunConfig) -> TrainingConfig:
    """How a group is fine-tuned from the start point: the config's training, less what a warm-up has taken of it."""
    return cut_training(config)[1] if is_warm(config) else config.training


@contextmanager
def started_at(probe: AdaptedModel, state: State) -> Iterator[None]:
    """Let theta0 hold another adapter's tensors inside."""
    before = adapter_state(probe, THETA0)
    set_adapter_state(probe, THETA0, dict(state))
    try:
        yield
    finally:
        set_adapter_state(probe, THETA0, before)


def start_at(probe: AdaptedModel, state: State) -> AdaptedModel:
    """Move theta0 for good; the model's ``origin`` is then an adapter of its own that computes what the base does."""
    add_adapter(probe, _ORIGIN, adapter_state(probe, probe.origin))
    set_adapter_state(probe, THETA0, dict(state))
    return replace(probe, origin=_ORIGIN)


def read_warmup(probe: AdaptedModel, folder: Path) -> State:
    """Read the tensors of a warm-up's adapter; the model is left as it was.

    Raises:
        StoreError: If the folder is missing, damaged, or of another model or adapter.
    """
    load_adapter(probe, WARMUP, folder)
    state = adapter_state(probe, WARMUP)
    remove_adapter(probe, WARMUP)
    return state


def load_start(config: RunConfig, folder: RunFolder, probe: AdaptedModel) -> AdaptedModel:
    """Give a freshly attached model the start point of a run: its warm-up, where it has one.

    Raises:
        StoreError: If the warm-up's adapter is missing or damaged.
    """
    return start_at(probe, read_warmup(probe, folder.adapter(WARMUP))) if is_warm(config) else probe
