"""What a federation leaves in its run folder: trained adapters as arrays, and as plain PEFT folders.

In: vectors and the template. Out: ``trained/NAME.npz`` for every training, ``adapters/NAME/`` for what serves. A server
that runs in a process of its own leaves its fault here, too, for the one that waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from ensemblelora import artifacts, errors
from ensemblelora.adapters import THETA0, AdaptedModel, save_adapter
from ensemblelora.federation.adapters import Template, Vector
from ensemblelora.federation.rounds import Trained
from ensemblelora.tensors import save_tensors

__all__ = ["keep_fault", "load_trained", "raise_fault", "save_start", "save_trained", "write_adapter"]

_FAULT_FILE = "fault.json"
_SETTINGS_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def save_start(adapted: AdaptedModel, folder: Path) -> None:
    """Write theta0's PEFT folder, whose settings are every adapter's."""
    with artifacts.atomic_folder(folder) as scratch:
        save_adapter(adapted, THETA0, scratch)


def write_adapter(folder: Path, vector: Vector, template: Template, start: Path) -> None:
    """Write an adapter's PEFT folder.

    Args:
        folder: Of the adapter.
        vector: The adapter.
        template: Of adapters.
        start: Folder of theta0.
    """
    settings = (start / _SETTINGS_FILE).read_text(encoding="utf-8")
    with artifacts.atomic_folder(folder) as scratch:
        artifacts.write_text(scratch / _SETTINGS_FILE, settings)
        save_tensors(scratch / _WEIGHTS_FILE, template.unpack(vector), metadata={"format": "pt"})
        artifacts.seal_folder(scratch)


def save_trained(path: Path, trained: Trained) -> None:
    """Keep a training's outcome."""
    artifacts.save_arrays(path, {field.name: getattr(trained, field.name) for field in fields(Trained)})


def load_trained(path: Path) -> Trained:
    """Read it back.

    Raises:
        StoreError: If the file is missing or damaged.
    """
    arrays = artifacts.load_arrays(path)
    return Trained(**{field.name: arrays[field.name] for field in fields(Trained)})


def keep_fault(folder: Path, error: errors.EnsembleLoraError) -> None:
    """Keep what ended a federation."""
    artifacts.write_json(folder / _FAULT_FILE, {"kind": type(error).__name__, "message": str(error)})


def raise_fault(folder: Path) -> None:
    """Raise what ended a federation elsewhere, if anything did, and forget it.

    Raises:
        EnsembleLoraError: As it was raised there.
    """
    path = folder / _FAULT_FILE
    if path.exists():
        told = artifacts.read_json(path)
        path.unlink()
        kinds = {kind.__name__: kind for kind in _list_kinds(errors.EnsembleLoraError)}
        raise kinds.get(told["kind"], errors.EnsembleLoraError)(told["message"])


def _list_kinds(kind: type[errors.EnsembleLoraError]) -> Iterator[type[errors.EnsembleLoraError]]:
    for own in kind.__subclasses__():
        yield own
        yield from _list_kinds(own)
