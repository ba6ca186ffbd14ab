"""The run folder: one name per file, atomic writes, one process at a time, and markers of finished stages.

A stage is finished exactly when its marker, written last, names the fingerprint of the stage's inputs and the files
it left are still what they were.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from filelock import FileLock, Timeout

from ensemblelora.errors import OutputError, StoreError
from ensemblelora.files import (
    atomic_folder,
    describe_error,
    expand_folders,
    file_sha256,
    fingerprint,
    flush_to_disk,
    is_temporary,
    load_arrays,
    read_json,
    save_arrays,
    write_json,
    write_text,
)

__all__ = [
    "ADAPTERS_FOLDER",
    "AFFINITY_FILE",
    "CHANGE_FILE",
    "CONFIG_FILE",
    "COSTS_FILE",
    "ENSEMBLE_FILE",
    "ENVIRONMENT_FILE",
    "FEATURES_FOLDER",
    "FEATURE_HEALTH_FILE",
    "PLAN_FILE",
    "REPORT_HTML_FILE",
    "REPORT_MARKDOWN_FILE",
    "RESULTS_FILE",
    "RUN_FILE",
    "STAGES_FOLDER",
    "TASKS_FILE",
    "TEST_ROWS_FILE",
    "RunFolder",
    "atomic_folder",
    "file_sha256",
    "find_seal_fault",
    "fingerprint",
    "load_arrays",
    "pinned_commits",
    "pinned_revision",
    "read_json",
    "save_arrays",
    "seal_folder",
    "write_json",
    "write_text",
]

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
FEATURES_FOLDER = "features"
FEATURE_HEALTH_FILE = "feature_health.json"
AFFINITY_FILE = "affinity.npz"
PLAN_FILE = "plan.json"
ADAPTERS_FOLDER = "adapters"
ENSEMBLE_FILE = "ensemble.json"
CHANGE_FILE = "change.json"
"""what a run folder that goes on from another says of that"""
RESULTS_FILE = "results.json"
COSTS_FILE = "costs.json"
REPORT_HTML_FILE = "report.html"
REPORT_MARKDOWN_FILE = "report.md"
STAGES_FOLDER = "stages"
TASKS_FILE = "tasks.json"
TEST_ROWS_FILE = "test_rows.npz"
RUN_FILE = "run.json"

_FORMAT = 1
_LOCK_FILE = ".lock"
_HOLDER_FILE = ".lock.json"
_SEAL_FILE = "seal.json"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """A run's folder on disk; made by :meth:`create` or :meth:`open`.

    Attributes:
        path: The folder.
    """

    path: Path

    @classmethod
    def create(cls, path: Path | str) -> RunFolder:
        """Make the folder, or take up an existing run in it.

        Raises:
            OutputError: If the place can't be written, or holds something that is not a run.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            strangers = [entry.name for entry in path.iterdir() if not _is_ours(entry)]
        except OSError as error:
            raise OutputError(
                f"{path}: can't be used as the run folder ({describe_error(error)}); choose another"
            ) from None
        if (path / RUN_FILE).exists():
            return cls.open(path)
        if strangers:
            raise OutputError(
                f"{path}: not empty and not a run folder (holds {sorted(strangers)[0]!r}); choose a new or empty folder"
            )
        write_json(path / RUN_FILE, {"package": "ensemblelora", "format": _FORMAT})
        return cls(path)

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Open an existing run.

        Raises:
            OutputError: If there is no run, or one that another version wrote in another format.
        """
        path = Path(path)
        if not (path / RUN_FILE).is_file():
            raise OutputError(f"{path}: not a run folder ({RUN_FILE} is missing); make one with `ensemblelora run`")
        content = read_json(path / RUN_FILE)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise OutputError(f"{path}: {RUN_FILE} is not of format {_FORMAT}; make a new run in another folder")
        return cls(path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process and sweep away what a killed one left half-written.

        Raises:
            OutputError: At once, if another process holds it; the message says which.
        """
        lock = FileLock(self.path / _LOCK_FILE, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            holder = _read_holder(self.path / _HOLDER_FILE)
            raise OutputError(f"{self.path}: in use by {holder}; wait for it or choose another folder") from None
        except OSError as error:
            raise OutputError(
                f"{self.path}: can't be locked ({describe_error(error)}); choose another folder"
            ) from None
        try:
            write_json(self.path / _HOLDER_FILE, {"pid": os.getpid(), "host": socket.gethostname()})
            _sweep(self.path)
            yield
        finally:
            (self.path / _HOLDER_FILE).unlink(missing_ok=True)
            lock.release()

    def is_done(self, stage: str, fingerprint: str) -> bool:
        """Say whether a stage ended with these inputs and its files are still as it left them, by size and SHA-256.

        Damage is logged as a warning.
        """
        path = self._marker(stage)
        if not path.exists():
            return False
        try:
            marker = read_json(path)
            if marker["fingerprint"] != fingerprint:
                return False
            damage = (_find_damage(self.path / name, record) for name, record in marker["files"].items())
            fault = next((text for text in damage if text), None)
        except (StoreError, KeyError, TypeError, AttributeError):
            fault = f"{path}: unreadable marker"
        if fault:
            _logger.warning("stage %s is done again: %s", stage, fault)
        return fault is None

    def has_other_inputs(self, stage: str, fingerprint: str) -> bool:
        """Say whether a stage ended with inputs other than these; not where none did, or its marker is damaged."""
        try:
            return bool(read_json(self._marker(stage))["fingerprint"] != fingerprint)
        except (StoreError, KeyError, TypeError):
            return False

    def mark_done(self, stage: str, fingerprint: str, *, files: Iterable[Path] = ()) -> None:
        """Record that a stage ended; call it after everything else of the stage is on disk.

        Args:
            stage: The stage's name.
            fingerprint: Identity of the stage's inputs (see :func:`fingerprint`).
            files: Files, or folders taken with all they hold, that the stage left inside the run folder.

        Raises:
            OutputError: If one of the files is missing or lies outside the run folder.
        """
        records = {}
        for path in expand_folders(files):
            try:
                name = path.resolve().relative_to(self.path.resolve()).as_posix()
                records[name] = _describe(path)
            except (OSError, ValueError) as error:
                raise OutputError(f"stage {stage}: {path} can't be recorded as its result ({error})") from None
        write_json(self._marker(stage), {"stage": stage, "fingerprint": fingerprint, "files": records})

    def forget(self, stage: str) -> None:
        """Drop a stage's marker; call it before the stage begins to overwrite its files."""
        self._marker(stage).unlink(missing_ok=True)

    def check(self, *names: str) -> None:
        """Refuse files that are no longer what a stage recorded; what none has recorded is passed over.

        Args:
            names: Files of the run folder, or folders taken with all they hold.

        Raises:
            StoreError: If a file was altered or is gone, or a marker can't be read.
        """
        for marker in sorted((self.path / STAGES_FOLDER).glob("*.json")):
            if marker.name.endswith(".begun.json"):
                continue
            try:
                files: Mapping[str, Any] = read_json(marker)["files"]
                watched = {f: r for f, r in files.items() if any(f == n or f.startswith(f"{n}/") for n in names)}
                found = (_find_damage(self.path / file, record) for file, record in watched.items())
                fault = next((text for text in found if text), None)
            except (KeyError, TypeError, AttributeError):
                fault = f"{marker}: unreadable marker"
            if fault:
                raise StoreError(f"{fault}; it is made anew by: ensemblelora run {self.path}")

    def adapter(self, name: str) -> Path:
        """Return the folder of one adapter.

        Raises:
            OutputError: If the name is not a plain file name.
        """
        if name in ("", ".", "..") or PurePath(name).name != name or "\\" in name:
            raise OutputError(f"adapter name {name!r}: expected a plain name without folders, such as 'group-0'")
        return self.path / ADAPTERS_FOLDER / name

    def _marker(self, stage: str) -> Path:
        return self.path / STAGES_FOLDER / f"{stage}.json"


def pinned_revision(run: Path, model: str) -> str | None:
    """The hub's commit of a model that a run folder was begun with; none where it was not from a hub, or is another.

    A run goes on with that one, whatever the model's name stands for by then.

    Raises:
        StoreError: If the folder's record is damaged.
    """
    if not (run / ENVIRONMENT_FILE).exists():
        return None
    try:
        made_with = read_json(run / ENVIRONMENT_FILE)["model"]
        return str(made_with["revision"]) if made_with["name"] == model and made_with["revision"] else None
    except (KeyError, TypeError):
        return None


def pinned_commits(run: Path) -> dict[tuple[str, str], str]:
    """The revision of every hub's dataset that a run folder was begun with, by task and dataset.

    Raises:
        StoreError: If the folder's record is damaged.
    """
    if not (run / TASKS_FILE).exists():
        return {}
    try:
        cards = [entry["card"] for entry in read_json(run / TASKS_FILE)["tasks"]]
        options = [(card["task"], card["dataset_path"], card.get("dataset_kwargs", {})) for card in cards]
        return {(task, path): str(given["revision"]) for task, path, given in options if "revision" in given}
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{run / TASKS_FILE}: not the cards of a run ({error!r}); delete it and run again") from None


def seal_folder(folder: Path) -> None:
    """Record checksums of all that a folder holds, in a file that is written last; all of it is on disk then.

    Raises:
        OutputError: If the folder can't be written.
    """
    files = list(expand_folders([folder]))
    try:
        for file in files:
            flush_to_disk(file)
        records = {file.relative_to(folder).as_posix(): _describe(file) for file in files}
    except OSError as error:
        raise OutputError(f"{folder}: can't be sealed ({describe_error(error)}); free the place") from None
    write_json(folder / _SEAL_FILE, records)


def find_seal_fault(folder: Path, *, may_lack_seal: bool = False) -> str | None:
    """Say what is wrong with a folder that :func:`seal_folder` left; none if it is as it was, to the bit.

    Args:
        folder: Need not be there.
        may_lack_seal: Take one without a seal for whole, as earlier versions left it.
    """
    if may_lack_seal and folder.is_dir() and not (folder / _SEAL_FILE).exists():
        return None
    try:
        records = read_json(folder / _SEAL_FILE)
        return next((fault for name, record in records.items() if (fault := _find_damage(folder / name, record))), None)
    except (StoreError, KeyError, TypeError, AttributeError):
        return f"{folder}: not whole ({_SEAL_FILE} is missing or can't be read)"


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _find_damage(path: Path, record: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != record["bytes"]:
            return f"{path}: {size} bytes, {record['bytes']} when it was written"
        if record["sha256"] is not None and file_sha256(path) != record["sha256"]:
            return f"{path}: altered since it was written"
    except OSError as error:
        return f"{path}: {describe_error(error)}"
    return None


def _is_ours(entry: Path) -> bool:
    return entry.name in (_LOCK_FILE, _HOLDER_FILE) or is_temporary(entry)


def _sweep(folder: Path) -> None:
    for entry in [entry for entry in folder.rglob(".*") if is_temporary(entry)]:
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _read_holder(path: Path) -> str:
    try:
        content = read_json(path)
        return f"process {content['pid']} on {content['host']}"
    except (StoreError, KeyError, TypeError):
        return "another process"
