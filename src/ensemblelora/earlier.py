"""Finished runs that are set aside, whole, before a stage of theirs is done again with other inputs.

In: a run folder with a composed ensemble. Out: ``earlier/1``, ``earlier/2``, ... in it, each a run folder to predict
with, serve, export, ask, and compare. Files are linked, since those of a run are replaced by renaming and never changed
in place: what stays the same takes no disk twice. No torch.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ensemblelora import artifacts
from ensemblelora.config import load_config
from ensemblelora.errors import EnsembleLoraError, StoreError
from ensemblelora.files import is_temporary
from ensemblelora.report.wording import join_names

__all__ = [
    "EARLIER_FOLDER",
    "MADE_WITH_FILE",
    "describe_missing",
    "find_origin",
    "foresee_place",
    "hash_files",
    "list_changed_files",
    "list_changes",
    "list_settings",
    "set_aside",
]

EARLIER_FOLDER = "earlier"
MADE_WITH_FILE = ".config.yaml"
"""a copy of the config that a run was made with, whose owner may edit the other one"""
_CONTENTS = {
    artifacts.ENSEMBLE_FILE: "trained ensemble",
    artifacts.RESULTS_FILE: "test results",
    artifacts.PLAN_FILE: "plan",
    "oracle.json": "plan",  # the stages before it leave it
}
"""what files hold, in the words of those who miss it"""
_IDENTITY_FILE = "earlier.json"
_LEFT_OUT = frozenset({EARLIER_FOLDER, "cache", "checkpoints", "export"})
_APPENDED = ".jsonl"  # journals grow in place, so that a link would grow, too
_SAME_ANYWHERE = frozenset({"out", "data.tasks"})  # where a run lies is no difference, and cards say what tasks are
_MOST_BYTES = 2**30  # of a data file that is read for its checksum alone


def set_aside(run: Path) -> Path:
    """Keep a run folder as it is under ``earlier/N``, at once or not at all; the same state of it is kept once.

    Args:
        run: The folder, locked.

    Returns:
        Where it is kept.

    Raises:
        OutputError: If that can't be written.
    """
    identity, place = _identify(run), foresee_place(run)
    if place.exists():
        return place
    with artifacts.atomic_folder(place) as scratch:
        for entry in sorted(run.iterdir()):
            if entry.name not in _LEFT_OUT and not entry.name.startswith(".lock") and not is_temporary(entry):
                _link(entry, scratch / entry.name)
        if (run / MADE_WITH_FILE).exists():
            (scratch / artifacts.CONFIG_FILE).unlink(missing_ok=True)
            _link(run / MADE_WITH_FILE, scratch / artifacts.CONFIG_FILE)
        artifacts.write_json(scratch / _IDENTITY_FILE, {"identity": identity})
    return place


def foresee_place(run: Path) -> Path:
    """Where :func:`set_aside` would keep a run folder as it is now."""
    identity, kept = _identify(run), _list_kept(run)
    known = [number for number, folder in kept.items() if _read_identity(folder) == identity]
    return run / EARLIER_FOLDER / str(known[0] if known else max(kept, default=0) + 1)


def find_origin(run: Path) -> Path:
    """The run folder in which a run was set aside; a run that was not is its own."""
    is_kept = run.absolute().parent.name == EARLIER_FOLDER and (run / _IDENTITY_FILE).exists()
    return Path(os.path.normpath(run / ".." / "..")) if is_kept else run


def describe_missing(run: Path, name: str, command: str = "run") -> str:
    """Say that a run has no such file yet, what makes it, and which finished run with it was set aside.

    Args:
        run: The folder.
        name: Of the file.
        command: Which makes it, from what the run has.
    """
    text = f"{run}: no {_CONTENTS.get(name, name)} yet; make it with: ensemblelora {command} {shlex.quote(str(run))}"
    kept = [number for number, folder in _list_kept(run).items() if (folder / name).exists()]
    if not kept:
        return text
    place = run / EARLIER_FOLDER / str(max(kept))
    return f"{text} (it goes on from here), or use the finished run that was set aside: give {shlex.quote(str(place))}"


def list_changes(run: Path, news: Mapping[str, Any]) -> list[str]:
    """Say in a few words each what differs from what a run was made with; nothing where that can't be told.

    Args:
        run: The folder.
        news: What its config (a text), its environment and its tasks (values) would be now.
    """
    environment = _read(run / artifacts.ENVIRONMENT_FILE), news.get(artifacts.ENVIRONMENT_FILE, {})
    changes = [*_compare_settings(run, news[artifacts.CONFIG_FILE]), *_compare_versions(*environment)]
    before, now = _read(run / artifacts.TASKS_FILE), news.get(artifacts.TASKS_FILE)
    return [*changes, *_compare_tasks(before.get("tasks", []), now["tasks"], by_rows=not changes)] if now else changes


def list_changed_files(run: Path) -> list[str]:
    """The data files of a run, by name, that are others by now, or gone; those that it has no checksum of are not told.

    Raises:
        StoreError: If the run's record of its tasks is damaged.
    """
    path = run / artifacts.TASKS_FILE
    entries = artifacts.read_json(path)["tasks"] if path.exists() else []
    known = {file: digest for entry in entries for file, digest in entry.get("files", {}).items()}
    return [Path(file).name for file, digest in known.items() if _hash_file(file) != digest]


def hash_files(card: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the data files on this machine that a card names, as it names them; very large ones are left out."""
    named = card["dataset_kwargs"].get("data_files")
    files = named.values() if isinstance(named, dict) else [named]
    digests = {file: _hash_file(file) for file in files if isinstance(file, str)}
    return {file: digest for file, digest in digests.items() if digest}


def list_settings(values: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """Name every value of a config by its keys joined with dots; lists are values, ``None`` is none.

    Example:
        >>> dict(list_settings({"seed": 0, "model": {"name": "x", "revision": None}}))
        {'seed': 0, 'model.name': 'x'}
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from list_settings(value, f"{head}{key}.")
        elif value is not None:
            yield f"{head}{key}", value


def _identify(run: Path) -> str:
    """What tells a state of a run from another: its stages' marks, but for the report's, which says nothing new."""
    markers = sorted((run / artifacts.STAGES_FOLDER).glob("*.json"))
    kept = [path for path in markers if path.name != "report.json" and not path.name.endswith(".begun.json")]
    return artifacts.fingerprint({path.name: path.read_bytes() for path in kept})


def _list_kept(run: Path) -> dict[int, Path]:
    return {int(path.name): path for path in (run / EARLIER_FOLDER).glob("*") if path.name.isdecimal()}


def _read_identity(folder: Path) -> str | None:
    return _read(folder / _IDENTITY_FILE).get("identity")


def _link(source: Path, target: Path) -> None:
    """Give a file, or all that a folder holds, a second name; a copy where there are no links, or one file grows."""
    if source.is_dir():
        target.mkdir()
        for entry in source.iterdir():
            if not is_temporary(entry) and not entry.name.endswith((".begun.json", ".lock")):
                _link(entry, target / entry.name)
        return
    try:
        if source.suffix == _APPENDED:
            raise OSError
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(artifacts.read_json(path))
    except (StoreError, TypeError, ValueError):
        return {}


def _compare_settings(run: Path, text: str) -> Iterator[str]:
    path = next((path for path in (run / MADE_WITH_FILE, run / artifacts.CONFIG_FILE) if path.exists()), run)
    try:
        # Read as a config: keys that it does not name yet have their defaults.
        before = dict(list_settings(load_config(path).model_dump(mode="json")))
    except EnsembleLoraError:
        return
    now = dict(list_settings(yaml.safe_load(text)))
    changed = [key for key in dict.fromkeys((*now, *before)) if now.get(key) != before.get(key)]
    told = [f"{key} {before.get(key)} -> {now.get(key)}" for key in changed if key not in _SAME_ANYWHERE]
    if told:
        yield join_names(told)


def _compare_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """The software and the model's weights; where the model has another name, the settings say so."""
    versions = [one.get("package_version") for one in (before, now)]
    if None not in versions and versions[0] != versions[1]:
        yield "ensemblelora {} -> {}".format(*versions)
    models = [one.get("model") or {} for one in (before, now)]
    names, weights = ([model.get(key) for model in models] for key in ("name", "fingerprint"))
    if names[0] == names[1] and None not in weights and weights[0] != weights[1]:
        yield f"weights of {names[0]}"


def _compare_tasks(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], *, by_rows: bool
) -> Iterator[str]:
    """Tasks that came, went, or have another card or other rows.

    Args:
        before: Of the run.
        now: As they are.
        by_rows: Whether what the model reads of the rows counts, too, which settings and models change as well.
    """
    old, new = ({entry["card"]["task"]: entry for entry in entries} for entries in (before, now))
    both = [name for name in new if name in old]
    files = {name: [sorted(one[name].get("files", {}).values()) for one in (old, new)] for name in both}
    rows = {name for name, (was, is_now) in files.items() if was and was != is_now}
    if by_rows:
        keys = ("n_examples", "validation_fingerprint")
        rows |= {name for name in both if any(old[name].get(key) != new[name].get(key) for key in keys)}
    cards = [name for name in both if name not in rows and _strip(old[name]["card"]) != _strip(new[name]["card"])]
    for what, names in (
        ("new task", [name for name in new if name not in old] if old else []),
        ("no task", [name for name in old if name not in new]),
        ("rows of", [name for name in both if name in rows]),
        ("card of", cards),
    ):
        if names:
            yield f"{what} {join_names(names)}"


def _strip(card: Mapping[str, Any]) -> dict[str, Any]:
    """A card without the places of its files, which say nothing about what is in them."""
    options = {key: value for key, value in card["dataset_kwargs"].items() if key != "data_files"}
    return {**card, "dataset_kwargs": options}


def _hash_file(named: str) -> str | None:
    """The checksum of a file as a card names it; none where it is not there, elsewhere, or very large."""
    path = Path(os.path.expandvars(named)).expanduser()
    try:
        return artifacts.file_sha256(path) if path.stat().st_size <= _MOST_BYTES else None
    except OSError:
        return None
