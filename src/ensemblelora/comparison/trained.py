"""A fine-tuning of a pool: what is asked for, how it went, and who carries out several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ensemblelora import training
from ensemblelora.accounting.meter import StageRecord
from ensemblelora.config import TrainingConfig

__all__ = ["Crew", "Errand", "Trained", "Wish"]


@dataclass(frozen=True)
class Trained:
    """One fine-tuning, whose adapter the pool holds under its name."""

    name: str
    tasks: tuple[int, ...]
    flops: int
    """of this fine-tuning alone, without those that it started from; validation of checkpoints included, and what was
    done before it was broken off"""
    seconds: float
    peak_memory_bytes: int
    n_steps: int
    validation_nll: float
    """mean over its tasks, or over those that chose the checkpoint, of the one kept"""
    n_bytes: int
    added_memory_bytes: int = 0
    """of the peak, what was not resident when it began"""

    @classmethod
    def of(
        cls, name: str, tasks: tuple[int, ...], run: training.TrainedAdapter, spent: StageRecord, n_bytes: int
    ) -> Trained:
        """Say of a fine-tuning how it went and what it cost."""
        return cls(
            name=name,
            tasks=tasks,
            flops=spent.flops,
            seconds=spent.wall_seconds,
            peak_memory_bytes=spent.peak_memory_bytes,
            added_memory_bytes=spent.added_memory_bytes,
            n_steps=run.n_steps,
            validation_nll=run.best_validation_nll,
            n_bytes=n_bytes,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trained:
        """Take back what ``dataclasses.asdict`` gave and JSON kept."""
        return cls(**{**values, "tasks": tuple(values["tasks"])})


@dataclass(frozen=True, eq=False)
class Wish:
    """A fine-tuning that is asked for: what :meth:`Pool.train` takes, but for a watch."""

    tasks: tuple[int, ...]
    start: Trained | None = None
    copy: int = 0
    settings: TrainingConfig | None = None
    weights: Sequence[NDArray[np.float64]] | None = None
    judges: tuple[int, ...] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What :meth:`Pool.train` takes beside the tasks."""
        return {key: value for key, value in vars(self).items() if key != "tasks"}

    def settled(self, settings: TrainingConfig) -> Wish:
        """The same with its tasks in order, and with these settings where it names none."""
        return replace(self, tasks=tuple(sorted(self.tasks)), settings=self.settings or settings)


class Errand(NamedTuple):
    """A fine-tuning that is to be done: the folder of its pool, its name, and what it is."""

    folder: Path
    name: str
    wish: Wish


class Crew(Protocol):
    """Carries out fine-tunings that need nothing of each other, in other processes."""

    def train(self, errands: Sequence[Errand]) -> None:
        """Leave every adapter in its pool's folder, or a note of why there is none.

        Raises:
            ClusterError: If a worker is lost again and again.
        """
