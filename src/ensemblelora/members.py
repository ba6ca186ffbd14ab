"""A finished run's model, loaded again: the base with every member's adapter, and proof that they are the run's."""

from __future__ import annotations

from pathlib import Path

from ensemblelora import artifacts
from ensemblelora.adapters import AdaptedModel, attach, load_adapter
from ensemblelora.config import RunConfig
from ensemblelora.ensemble import Ensemble
from ensemblelora.errors import UsageError
from ensemblelora.models import Head, load_base
from ensemblelora.startpoint import WARMUP, load_start

__all__ = ["load_members"]


def load_members(path: Path, config: RunConfig, ensemble: Ensemble, *, head: Head, n_labels: int) -> AdaptedModel:
    """Load the base model of a run, put theta0 on it, and beside it every member of the ensemble.

    Args:
        path: The run folder.
        config: The run's; its device may be another than the one it ran on.
        ensemble: Names the members.
        head: What the tasks' cards ask for.
        n_labels: Width of a classification head.

    Raises:
        UsageError: If the base model is not the one that the run was made with.
        ModelError: If the base model can't be loaded.
        StoreError: If an adapter is not as it was written, or was made for another model.
    """
    folder = artifacts.RunFolder.open(path)
    folder.check(*(f"{artifacts.ADAPTERS_FOLDER}/{name}" for name in (WARMUP, *(m.name for m in ensemble.members))))
    revision = config.model.revision or artifacts.pinned_revision(path, config.model.name)
    model = config.model.model_copy(update={"revision": revision})
    base = load_base(model, head=head, n_labels=n_labels, max_length=config.data.max_length)
    made_with = artifacts.read_json(path / artifacts.ENVIRONMENT_FILE)["model"]["fingerprint"]
    if base.fingerprint != made_with:
        raise UsageError(
            f"{path}: made with another version of {config.model.name!r} or another model.dtype than the "
            f"one loaded now{_say_packed(config)}; give the original, or run again"
        )
    adapted = load_start(config, folder, attach(base, config.adapter, seed=config.seed))
    for member in ensemble.members:
        load_adapter(adapted, member.name, folder.adapter(member.name))
    return adapted


def _say_packed(config: RunConfig) -> str:
    if config.model.quantization == "none":
        return ""
    return ", or packed in 4 bits on another kind of device, whose rounding differs"
