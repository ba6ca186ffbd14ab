"""Measured fine-tunings, one line of JSON each, appended as they come.

In: :class:`TrueRun`. Out: the same, read back. A line that a killed process left unfinished is cut off and its
fine-tuning measured again; lines of other rows, settings or seeds are kept and not returned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ensemblelora.journal import append_line, read_lines

__all__ = ["TrueRun", "append_run", "read_all_runs", "read_runs"]


@dataclass(frozen=True)
class TrueRun:
    """One subset of tasks, truly fine-tuned and scored on its own tasks' validation rows."""

    identity: str
    """fingerprint of rows, start point, training settings and seed"""
    tasks: tuple[str, ...]
    """none: the base model"""
    seed: int
    """0, 1, ...: of the order of its rows"""
    nll: Mapping[str, Sequence[float]]
    """of every validation row of each task, nats"""
    correct: Mapping[str, Sequence[float]]
    """1 where a row is answered right; empty for free text"""
    chance: Mapping[str, float]
    """share of rows that always giving the commonest answer gets right"""
    n_steps: int
    best_step: int
    """whose weights were scored"""
    distance: float
    """Euclidean, of the trained weights from theta0"""
    relative_distance: float
    """over the norm of all base weights"""
    flops: int
    seconds: float


def append_run(path: Path, run: TrueRun) -> None:
    """Add one line, and see to it that it is on disk.

    Raises:
        OutputError: If the file can't be written.
    """
    append_line(path, asdict(run))


def read_runs(path: Path, identities: Collection[str]) -> dict[str, TrueRun]:
    """Read the runs with these identities, by identity; cuts off an unfinished last line.

    Raises:
        StoreError: If another line is damaged.
    """
    return {run.identity: run for run in _iterate_lines(path) if run.identity in identities}


def read_all_runs(path: Path) -> tuple[TrueRun, ...]:
    """Read every fine-tuning in the file, of whatever settings; not the base model's record.

    Raises:
        StoreError: If a line is damaged.
    """
    return tuple(run for run in _iterate_lines(path) if run.tasks)


def _iterate_lines(path: Path) -> Iterator[TrueRun]:
    return read_lines(path, lambda entry: TrueRun(**entry | {"tasks": tuple(entry["tasks"])}))
