"""One run at work: its folder, its ledger, and the rule by which a finished stage is not run again.

A stage is described by a name and the values it depends on. Their fingerprint, with the package version, decides:
if the run folder's marker has the same one and the files are intact, the stage's body is passed over.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ensemblelora import __version__, artifacts, progress
from ensemblelora.accounting.meter import Ledger, Meter, MethodCosts
from ensemblelora.config import RunConfig, dump_config
from ensemblelora.data.encoding import EncodedSplit

__all__ = ["StageRun", "Workspace", "describe_environment", "fingerprint_split", "open_workspace"]


class _LastStageReached(Exception):
    """Leaves the pipeline after the stage the user asked for."""


@dataclass(eq=False)
class StageRun:
    """One stage about to run, or to be passed over."""

    fingerprint: str
    is_needed: bool
    meter: Meter
    files: list[Path] = field(default_factory=list)
    """what the stage leaves; recorded with checksums when it ends"""


@dataclass(eq=False)
class Workspace:
    """The open run folder of one config."""

    config: RunConfig
    folder: artifacts.RunFolder
    until: str
    ledger: Ledger = field(default_factory=Ledger)
    start_fingerprint: str = ""
    """identity of model, adapter and seed: of the point theta0"""

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @contextmanager
    def stage(self, name: str, *inputs: object, is_part: bool = False) -> Iterator[StageRun]:
        """Announce a stage, measure it, and mark it done if its body ends well.

        Args:
            name: The stage's name; its marker's too.
            inputs: Everything its result depends on.
            is_part: A piece of a larger stage, such as one adapter: never the one to stop after.
        """
        identity = artifacts.fingerprint(__version__, name, *inputs)
        is_needed = not self.folder.is_done(name, identity)
        was_begun = self._begun(name) == identity
        run = StageRun(identity, is_needed, Meter(name))
        if is_needed:
            self.folder.forget(name)
            artifacts.write_json(self._note(name), identity)
            try:
                with progress.stage(name), run.meter:
                    yield run
            finally:
                self._enter(run.meter, is_continued=was_begun)
            self.folder.mark_done(name, identity, files=run.files)
            self._note(name).unlink(missing_ok=True)
        else:
            progress.note(f"{name}: done before")
            yield run
        if name == self.until and not is_part:
            raise _LastStageReached

    def enter_method(self, name: str, costs: MethodCosts) -> None:
        """Write one method's costs to the ledger."""
        self.ledger = self.ledger.with_method(name, costs)
        artifacts.write_json(self.path / artifacts.COSTS_FILE, self.ledger.to_dict())

    def flops_of(self, *stages: str) -> int:
        """FLOPs of the named stages so far."""
        return sum(record.flops for record in self.ledger.stages if record.stage in stages)

    def seconds_of(self, *stages: str) -> float:
        """Wall seconds of the named stages so far."""
        return sum(record.wall_seconds for record in self.ledger.stages if record.stage in stages)

    def _enter(self, meter: Meter, *, is_continued: bool) -> None:
        self.ledger = self.ledger.with_stage(meter.record, is_continued=is_continued)
        artifacts.write_json(self.path / artifacts.COSTS_FILE, self.ledger.to_dict())

    def _note(self, name: str) -> Path:
        return self.path / artifacts.STAGES_FOLDER / f"{name}.begun.json"

    def _begun(self, name: str) -> Any:
        path = self._note(name)
        return artifacts.read_json(path) if path.exists() else None


@contextmanager
def open_workspace(config: RunConfig, *, until: str) -> Iterator[Workspace]:
    """Make or take up the run folder, hold its lock, and leave after the stage ``until``.

    Raises:
        OutputError: If the folder can't be written, is no run folder, or is in use.
    """
    folder = artifacts.RunFolder.create(Path(config.out))
    with folder.lock():
        artifacts.write_text(folder.path / artifacts.CONFIG_FILE, dump_config(config))
        costs = folder.path / artifacts.COSTS_FILE
        ledger = Ledger.from_dict(artifacts.read_json(costs)) if costs.exists() else Ledger()
        workspace = Workspace(config, folder, until, ledger)
        try:
            yield workspace
        except _LastStageReached:
            progress.note(f"stopped after {until}, as asked")


def describe_environment(model: dict[str, Any], device: str) -> dict[str, Any]:
    """Versions and machine, for ``environment.json``."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "numpy", "cvxpy")}
    return {
        "package_version": __version__,
        "python": platform.python_version(),
        **versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "model": model,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def fingerprint_split(split: EncodedSplit) -> str:
    """Identity of one encoded split: tokens, answers, labels, order."""
    arrays = (split.tokens, split.row_starts, split.answer_starts, split.example_rows, split.labels, split.n_choices)
    more = (split.label_tokens, split.divisors, split.groups, np.array(split.ids))
    return artifacts.fingerprint(split.task, split.split, split.kind, *arrays, *more)
