"""One run at work: its folder, its ledger, and the rule by which a finished stage is not run again.

A stage is described by a name and the values it depends on. Their fingerprint, with the package version, decides:
if the run folder's marker has the same one and the files are intact, the stage's body is passed over.
Where a stage does run, what later stages made of its old outcome goes first (trained adapters stay: they are judged
by their own markers), so that what lies in a run folder always belongs together.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from ensemblelora import __version__, artifacts, progress
from ensemblelora.accounting.meter import Ledger, Meter, MethodCosts
from ensemblelora.attempts import Attempt
from ensemblelora.config import RunConfig, dump_config
from ensemblelora.errors import OutputError
from ensemblelora.files import is_temporary

__all__ = [
    "ORACLE_FILE",
    "OpenRun",
    "StageRun",
    "Workspace",
    "check_place",
    "describe_environment",
    "open_run",
    "open_workspace",
]

ORACLE_FILE = "oracle.json"
"""the ridge that the subset oracle uses, and what it was chosen from"""

# Every stage in its order, and the files in which others read its outcome.
_OUTCOMES: Mapping[str, tuple[str, ...]] = {
    "warmup": (),
    "features": (),
    "affinity": (artifacts.AFFINITY_FILE, ORACLE_FILE),
    "group": (artifacts.PLAN_FILE,),
    "train": (),
    "boost": (),
    "combine": (artifacts.ENSEMBLE_FILE,),
    "baselines": (),
    "evaluate": (artifacts.RESULTS_FILE,),
    "report": (artifacts.REPORT_HTML_FILE, artifacts.REPORT_MARKDOWN_FILE),
}


class _LastStageReached(Exception):
    """Leaves the pipeline after the stage the user asked for."""


@dataclass(eq=False)
class StageRun:
    """One stage about to run, or to be passed over."""

    name: str
    fingerprint: str
    is_needed: bool
    meter: Meter
    files: list[Path] = field(default_factory=list)
    """what the stage leaves; recorded with checksums when it ends"""


@dataclass(eq=False, kw_only=True)
class OpenRun:
    """An open run folder: its stages, none of which is run twice, and what they cost."""

    folder: artifacts.RunFolder
    until: str = ""
    """the last stage to run; none: all"""
    ledger: Ledger = field(default_factory=Ledger)
    outcomes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """stages whose files go before they or an earlier one is run again, in their order"""

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @contextmanager
    def stage(self, name: str, *inputs: object, is_complete: bool = True) -> Iterator[StageRun]:
        """Announce a stage, measure it, and mark it done if its body ends well.

        A stage that is broken off goes on counting where it was: its costs are in the ledger once, all attempts
        together.

        Args:
            name: The stage's name; its marker's too.
            inputs: Everything its result depends on.
            is_complete: False if something it leaves is missing that its marker does not watch.
        """
        identity = artifacts.fingerprint(__version__, name, *inputs)
        is_needed = not (self.folder.is_done(name, identity) and is_complete)
        run = StageRun(name, identity, is_needed, Meter(name))
        if is_needed:
            yield from self._carry_out(run)
        else:
            progress.note(f"{name}: done before")
            yield run
        self._note(name).unlink(missing_ok=True)
        if name == self.until:
            raise _LastStageReached

    def adapter_digest(self, name: str) -> str:
        """Identity of a trained adapter: the checksum of its weights."""
        return artifacts.file_sha256(self.folder.adapter(name) / "adapter_model.safetensors")

    def enter_methods(self, costs: Mapping[str, MethodCosts]) -> None:
        """Write the methods' costs to the ledger, in place of earlier ones."""
        self._write_ledger(replace(self.ledger, methods=dict(costs)))

    def drop_costs(self, stage: str) -> None:
        """Take a stage out of the ledger that the present plan does without."""
        kept = tuple(record for record in self.ledger.stages if record.stage != stage)
        if len(kept) < len(self.ledger.stages):
            self._write_ledger(replace(self.ledger, stages=kept))

    def flops_of(self, *stages: str) -> int:
        """FLOPs of the named stages so far."""
        return sum(record.flops for record in self.ledger.stages if record.stage in stages)

    def seconds_of(self, *stages: str) -> float:
        """Wall seconds of the named stages so far."""
        return sum(record.wall_seconds for record in self.ledger.stages if record.stage in stages)

    def peaks_of(self, *stages: str) -> tuple[int, int]:
        """Highest memory of the process in the named stages, and the most above what a stage began with."""
        found = [record for record in self.ledger.stages if record.stage in stages]
        peaks = [(record.peak_memory_bytes, record.added_memory_bytes) for record in found]
        return max((peak for peak, _ in peaks), default=0), max((added for _, added in peaks), default=0)

    def _carry_out(self, run: StageRun) -> Iterator[StageRun]:
        attempt = Attempt(self._note(run.name), run.fingerprint, run.meter)
        self._clear_outcomes(run.name)
        try:
            with progress.stage(run.name), attempt.measured():
                yield run
        finally:
            self._write_ledger(self.ledger.with_stage(attempt.spent))
        self.folder.mark_done(run.name, run.fingerprint, files=run.files)

    def _clear_outcomes(self, name: str) -> None:
        """Drop what this stage and later ones left of other inputs."""
        stages = list(self.outcomes)
        self.folder.forget(name)
        for later in stages[stages.index(name) :] if name in self.outcomes else ():
            found = [path for file in self.outcomes[later] if (path := self.path / file).exists()]
            if found:
                self.folder.forget(later)
            for path in found:
                path.unlink()

    def _write_ledger(self, ledger: Ledger) -> None:
        self.ledger = ledger
        artifacts.write_json(self.path / artifacts.COSTS_FILE, ledger.to_dict())

    def _note(self, name: str) -> Path:
        return self.path / artifacts.STAGES_FOLDER / f"{name}.begun.json"


@dataclass(eq=False, kw_only=True)
class Workspace(OpenRun):
    """The open run folder of one config."""

    config: RunConfig
    start_fingerprint: str
    """identity of model, adapter settings and seed: of the point theta0"""
    outcomes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _OUTCOMES)


def check_place(path: Path) -> None:
    """Refuse a place that :func:`open_workspace` would refuse; makes nothing.

    Raises:
        OutputError: If the folder can't be written, is no run folder, or is in use.
    """
    try:
        if (path / artifacts.RUN_FILE).exists():
            with artifacts.RunFolder.open(path).lock():
                return
        ground = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not ground.is_dir() or not os.access(ground, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: can't be used as the run folder ({ground} can't be written to); choose another")
        entries = path.iterdir() if ground == path else ()
        strangers = sorted(e.name for e in entries if not (e.name.startswith(".lock") or is_temporary(e)))
    except OSError as error:
        raise OutputError(f"{path}: can't be used as the run folder ({error.strerror}); choose another") from None
    if strangers:
        raise OutputError(
            f"{path}: not empty and not a run folder (holds {strangers[0]!r}); choose a new or empty folder"
        )


@contextmanager
def open_run(path: Path, config: str) -> Iterator[OpenRun]:
    """Make or take up a run folder, whatever kind of run it is of, and hold its lock.

    Args:
        path: The folder.
        config: The run's, as it is written to the folder.

    Raises:
        OutputError: If the folder can't be written, is no run folder, or is in use.
    """
    folder = artifacts.RunFolder.create(path)
    with folder.lock():
        artifacts.write_text(folder.path / artifacts.CONFIG_FILE, config)
        costs = folder.path / artifacts.COSTS_FILE
        ledger = Ledger.from_dict(artifacts.read_json(costs)) if costs.exists() else Ledger()
        yield OpenRun(folder=folder, ledger=ledger)


@contextmanager
def open_workspace(config: RunConfig, *, until: str, start_fingerprint: str) -> Iterator[Workspace]:
    """Make or take up the run folder, hold its lock, and leave after the stage ``until``.

    Args:
        config: The run; written to the folder.
        until: The last stage to run.
        start_fingerprint: Identity of model, adapter settings and seed.

    Raises:
        OutputError: If the folder can't be written, is no run folder, or is in use.
    """
    with open_run(Path(config.out), dump_config(config)) as run, suppress(_LastStageReached):
        yield Workspace(
            config=config, folder=run.folder, until=until, start_fingerprint=start_fingerprint, ledger=run.ledger
        )


def describe_environment(
    model: Mapping[str, Any], device: str, max_tokens: int, before: Mapping[str, Any]
) -> dict[str, Any]:
    """Versions and machine, for ``environment.json``.

    Args:
        model: What is known of the base model.
        device: Where it runs.
        max_tokens: Padded tokens of a pass that keeps no activations, as found for this machine or as asked for.
        before: What the file says so far, whose date of creation stays.
    """
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "numpy")}
    return {
        "package_version": __version__,
        "python": platform.python_version(),
        **versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "model": dict(model),
        "max_tokens_per_batch": max_tokens,
        "created": before.get("created") or datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
