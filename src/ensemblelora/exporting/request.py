"""What an export is asked for, checked as far as that goes without data and model."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ensemblelora import artifacts
from ensemblelora.config import RunConfig, load_config
from ensemblelora.earlier import describe_missing
from ensemblelora.ensemble import Ensemble, load_ensemble
from ensemblelora.errors import OutputError, StoreError, UsageError

__all__ = ["PEFT_FILES", "TOLERANCE", "Format", "Request", "holding", "read_request"]

Format = Literal["peft", "folded", "merged"]
TOLERANCE = 0.02
"""nats by which the mean validation loss may rise before a fold is refused"""
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
_FOLDER = "export"


@dataclass(frozen=True)
class Request:
    """A run, what to make of it, and where."""

    run: artifacts.RunFolder
    out: Path
    config: RunConfig
    ensemble: Ensemble
    format: Format
    task: str | None
    rank: int | None
    tolerance: float
    license: str | None = None
    """of the adapters, for their cards"""

    @property
    def indices(self) -> tuple[int, ...]:
        """The tasks whose weights are folded, and whose rows judge the fold."""
        names = self.ensemble.task_names
        return tuple(range(len(names))) if self.task is None else (names.index(self.task),)


def read_request(
    folder: Path | str,
    out: Path | str | None,
    *,
    format: Format,
    task: str | None,
    rank: int | None,
    tolerance: float,
    device: str | None,
) -> Request:
    """Open the run and check the arguments of :func:`~ensemblelora.exporting.export_run`.

    Raises:
        UsageError: If they contradict each other or the run, or the run has no ensemble yet.
        OutputError: If ``folder`` is no run, or ``out`` can't be written or holds something.
        StoreError: If a file of the run is damaged.
    """
    run = artifacts.RunFolder.open(folder)
    record = run.path / artifacts.ENSEMBLE_FILE
    if not record.exists():
        raise UsageError(describe_missing(run.path, record.name))
    run.check(record.name)
    config = load_config(run.path / artifacts.CONFIG_FILE)
    if device is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"device": device})})
    ensemble = load_ensemble(record)
    _check_arguments(ensemble.task_names, format, task, rank, tolerance)
    if format != "peft" and config.adapter.method != "lora":
        raise UsageError(
            f"format {format}: only LoRA adapters add up to one, and this run's are of method {config.adapter.method}; "
            "give --format peft"
        )
    place = run.path / _FOLDER / (format if task is None else f"{format}-{task}") if out is None else Path(out)
    place = place if place.name not in ("", "..") else place.resolve()
    _check_place(place)
    _check_adapters(run, ensemble)
    return Request(run, place, config, ensemble, format, task, rank, tolerance)


def holding(request: Request) -> AbstractContextManager[None]:
    """Keep other processes from a run folder that is written into; one that is only read may be read-only."""
    is_inside = request.out.resolve().is_relative_to(request.run.path.resolve())
    return request.run.lock() if is_inside else nullcontext()


def _check_arguments(names: tuple[str, ...], format: str, task: str | None, rank: int | None, tolerance: float) -> None:
    if format not in get_args(Format):
        raise UsageError(f"format {format!r}: expected one of {', '.join(get_args(Format))}")
    if format == "peft" and (task is not None or rank is not None):
        raise UsageError(
            "format peft keeps every member as it is: leave task and rank out, or take the format folded or merged"
        )
    if task is not None and task not in names:
        raise UsageError(f"task {task!r}: not in this run; its tasks are {', '.join(names)}")
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank}: expected a whole number from 1 on")
    if not tolerance >= 0:
        raise UsageError(f"tolerance {tolerance}: expected nats, 0 or more")


def _check_place(out: Path) -> None:
    try:
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(f"{out}: not an empty folder; remove it or choose another")
        ground = next(place for place in out.absolute().parents if place.exists())
        is_open = ground.is_dir() and os.access(ground, os.W_OK | os.X_OK)
    except OSError as error:
        raise OutputError(f"{out}: can't be used ({error.strerror}); choose another folder") from None
    if not is_open:
        raise OutputError(f"{out}: can't be used ({ground} can't be written to); choose another folder")


def _check_adapters(run: artifacts.RunFolder, ensemble: Ensemble) -> None:
    """Refuse adapters that are not those whose weights were fitted."""
    fitted = artifacts.read_json(run.path / artifacts.ENSEMBLE_FILE).get("adapter_sha256", {})
    for member in ensemble.members:
        settings, weights = (run.adapter(member.name) / name for name in PEFT_FILES)
        is_intact = settings.is_file() and weights.is_file()
        if not is_intact or artifacts.file_sha256(weights) != fitted.get(member.name):
            raise StoreError(
                f"{weights.parent}: damaged, or not what {artifacts.ENSEMBLE_FILE} was fitted to; "
                f"mend it with: ensemblelora run {run.path}"
            )
