"""One run at work: its folder, its ledger, and the rule by which a finished stage is not run again.

A stage is described by a name and the values it depends on. Their fingerprint, with the package version, decides:
if the run folder's marker has the same one and the files are intact, the stage's body is passed over.
Where a stage does run, what later stages made of its old outcome goes first (trained adapters stay: they are judged
by their own markers), so that what lies in a run folder always belongs together. What later stages cost counts again
once each is found to be done for the present inputs. A finished run is set aside whole before its first stage with
other inputs is done again (:mod:`ensemblelora.earlier`).
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from ensemblelora import __version__, artifacts, progress
from ensemblelora.accounting.meter import Ledger, Meter, MethodCosts, release_memory
from ensemblelora.attempts import Attempt, read_ledger, write_ledger
from ensemblelora.config import RunConfig, dump_config
from ensemblelora.earlier import MADE_WITH_FILE, list_changes, set_aside
from ensemblelora.errors import OutputError
from ensemblelora.files import is_temporary
from ensemblelora.scheduling import HERE, Scheduler

__all__ = [
    "ORACLE_FILE",
    "OpenRun",
    "StageRun",
    "Workspace",
    "check_place",
    "describe_environment",
    "open_run",
    "open_workspace",
    "reopen_run",
]

ORACLE_FILE = "oracle.json"
"""the ridge that the subset oracle uses, and what it was chosen from"""

_logger = logging.getLogger(__name__)

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
    "evaluate": (artifacts.RESULTS_FILE, artifacts.TEST_ROWS_FILE),
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
    parts: Collection[str] = ()
    """identities of what it consists of, where some of that may be used again and the rest made"""


@dataclass(eq=False, kw_only=True)
class OpenRun:
    """An open run folder: its stages, none of which is run twice, and what they cost."""

    folder: artifacts.RunFolder
    until: str = ""
    """the last stage to run; none: all"""
    ledger: Ledger = field(default_factory=Ledger)
    outcomes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """stages whose files go before they or an earlier one is run again, in their order"""
    _news: dict[str, Any] = field(default_factory=dict, init=False)
    """what a finished run would be made of now, which is not written yet"""

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @contextmanager
    def stage(
        self, name: str, *inputs: object, is_complete: bool = True, parts: Collection[str] = ()
    ) -> Iterator[StageRun]:
        """Announce a stage, measure it, and mark it done if its body ends well.

        A stage that is broken off goes on counting where it was: its costs are in the ledger once, all attempts
        together. Of parts that are used again, what they cost to make is in its costs, too.

        Args:
            name: The stage's name; its marker's too.
            inputs: Everything its result depends on.
            is_complete: False if something it leaves is missing that its marker does not watch.
            parts: Identities of what it consists of, under which its meter notes the cost of those that it makes.
        """
        identity = artifacts.fingerprint(__version__, name, *inputs)
        is_needed = not (self.folder.is_done(name, identity) and is_complete)
        run = StageRun(name, identity, is_needed, Meter(name), parts=parts)
        if is_needed:
            release_memory()
            yield from self._carry_out(run)
        else:
            progress.note(f"{progress.number(name)}: done before")
            self._change_ledger(self.ledger.confirming(name))
            yield run
        self._note(name).unlink(missing_ok=True)
        if name == self.until:
            raise _LastStageReached

    def write_record(self, name: str, value: object) -> None:
        """Write what the run is made of, a text or values, under a file's name.

        A finished run keeps its records until one of its stages is done again: they are what it was made with.
        """
        self._news[name] = value
        if not (self.path / artifacts.ENSEMBLE_FILE).exists():
            self.settle()

    def settle(self) -> None:
        """Write the records that wait: what the run holds now is made with them."""
        for name, value in self._news.items():
            write = artifacts.write_text if isinstance(value, str) else artifacts.write_json
            write(self.path / name, value)
        if made_with := self._news.get(artifacts.CONFIG_FILE):
            artifacts.write_text(self.path / MADE_WITH_FILE, str(made_with))
        self._news.clear()

    def adapter_digest(self, name: str) -> str:
        """Identity of a trained adapter: the checksum of its weights."""
        return artifacts.file_sha256(self.folder.adapter(name) / "adapter_model.safetensors")

    def enter_methods(self, costs: Mapping[str, MethodCosts]) -> None:
        """Write the methods' costs to the ledger, in place of earlier ones."""
        self._write_ledger(replace(self.ledger, methods=dict(costs)))

    def drop_costs(self, stage: str) -> None:
        """Take a stage out of the ledger that the present plan does without; of a finished run with its next stage."""
        self._change_ledger(self.ledger.doubting([stage]))

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
        attempt = Attempt(self._note(run.name), run.fingerprint, run.meter, parts=run.parts)
        if self._news:
            self._keep_finished(run)
            self.settle()
        self._clear_outcomes(run.name)
        try:
            with progress.stage(run.name), attempt.measured():
                yield run
        finally:
            self._write_ledger(self.ledger.with_stage(attempt.spent))
        self._change_ledger(self.ledger.with_stage(attempt.spent, parts=run.parts))
        self.folder.mark_done(run.name, run.fingerprint, files=run.files)

    def _keep_finished(self, run: StageRun) -> None:
        """Set a finished run aside if this stage, with other inputs than it had, would take something from it."""
        lost = [stage for stage, _ in self._list_outcomes(run.name) if stage != "report"]
        changes = list_changes(self.path, self._news) if lost else []
        if lost and (changes or self.folder.has_other_inputs(run.name, run.fingerprint)):
            place = set_aside(self.path)
            if environment := self._news.get(artifacts.ENVIRONMENT_FILE):
                self._news[artifacts.ENVIRONMENT_FILE] = {**environment, "created": _now()}
            _logger.warning(
                "%s was finished with other inputs (%s): it is done again from stage %s on. The finished run is kept, "
                "to be used as any: ensemblelora predict %s ... (another --out keeps both apart from the start)",
                self.path,
                "; ".join(changes) or "which, its records don't tell",
                run.name,
                place,
            )

    def _clear_outcomes(self, name: str) -> None:
        """Drop what this stage and later ones left of other inputs, and count none of their costs for now."""
        self.folder.forget(name)
        for later, path in [*self._list_outcomes(name)]:
            self.folder.forget(later)
            path.unlink()
        doubted = self._list_from(name)
        ledger = self.ledger.doubting(doubted)
        self._change_ledger(replace(ledger, methods={}) if "evaluate" in doubted else ledger)

    def _list_outcomes(self, name: str) -> Iterator[tuple[str, Path]]:
        """What a stage and those after it left, each with the stage's name."""
        for stage in self._list_from(name):
            yield from ((stage, path) for file in self.outcomes[stage] if (path := self.path / file).exists())

    def _list_from(self, name: str) -> list[str]:
        """A stage and those after it; none if their order is not known."""
        stages = list(self.outcomes)
        return stages[stages.index(name) :] if name in stages else []

    def _change_ledger(self, ledger: Ledger) -> None:
        """Take over a ledger, and write it; where a finished run still has its own, with its next stage."""
        if ledger != self.ledger:
            self.ledger = ledger
            if not self._news:
                self._write_ledger(ledger)

    def _write_ledger(self, ledger: Ledger) -> None:
        self.ledger = ledger
        write_ledger(self.path, ledger)

    def _note(self, name: str) -> Path:
        return self.path / artifacts.STAGES_FOLDER / f"{name}.begun.json"


@dataclass(eq=False, kw_only=True)
class Workspace(OpenRun):
    """The open run folder of one config."""

    config: RunConfig
    start_fingerprint: str
    """identity of model, adapter settings and seed: of the point theta0"""
    scheduler: Scheduler = HERE
    """carries out independent jobs"""
    begun: dict[str, Iterator[Any]] = field(default_factory=dict)
    """jobs that a later stage will wait for, by what they leave"""
    outcomes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _OUTCOMES)

    @property
    def is_spread(self) -> bool:
        """Whether independent jobs run in other processes."""
        return self.scheduler.n_workers > 0

    def tell_unread(self) -> None:
        """Say what has changed since a finished run was made, if no stage has read it: the run is as it was."""
        if changes := list_changes(self.path, self._news) if self._news else []:
            _logger.warning(
                "%s is finished, and was made otherwise (%s). No stage that was asked for depends on that: what is "
                "there is the finished run, as it was%s",
                self.path,
                "; ".join(changes),
                "" if self.reaches("report") else "; the stages after these: ensemblelora run, with the same request",
            )

    def reaches(self, stage: str) -> bool:
        """Whether a stage is among those to run."""
        stages = list(self.outcomes)
        return self.until not in stages or stages.index(stage) <= stages.index(self.until)


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
        StoreError: If the ledger of costs is damaged, and its copy, too.
    """
    with _hold(artifacts.RunFolder.create(path)) as run:
        artifacts.write_text(run.path / artifacts.CONFIG_FILE, config)
        yield run


@contextmanager
def reopen_run(path: Path) -> Iterator[OpenRun]:
    """Take up a run that is there, with the settings that it has, and hold its lock.

    Raises:
        OutputError: If the folder is no run folder, can't be written, or is in use.
        StoreError: As of :func:`open_run`.
    """
    with _hold(artifacts.RunFolder.open(path)) as run:
        yield run


@contextmanager
def open_workspace(
    config: RunConfig, *, until: str, start_fingerprint: str, scheduler: Scheduler = HERE
) -> Iterator[Workspace]:
    """Make or take up the run folder, hold its lock, and leave after the stage ``until``.

    Args:
        config: The run; written to the folder, of a finished run when one of its stages is done again.
        until: The last stage to run.
        start_fingerprint: Identity of model, adapter settings and seed.
        scheduler: Carries out independent jobs.

    Raises:
        OutputError: If the folder can't be written, is no run folder, or is in use.
    """
    with _hold(artifacts.RunFolder.create(Path(config.out))) as run:
        work = Workspace(
            config=config,
            folder=run.folder,
            until=until,
            start_fingerprint=start_fingerprint,
            scheduler=scheduler,
            ledger=run.ledger,
        )
        work.write_record(artifacts.CONFIG_FILE, dump_config(config))
        with suppress(_LastStageReached):
            yield work
        work.tell_unread()


@contextmanager
def _hold(folder: artifacts.RunFolder) -> Iterator[OpenRun]:
    with folder.lock():
        yield OpenRun(folder=folder, ledger=read_ledger(folder.path))


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
        "created": before.get("created") or _now(),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
