"""An earlier run as others go on from it: its config, cards, groups and adapters, checked before anything is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ensemblelora import artifacts
from ensemblelora.accounting.meter import Ledger
from ensemblelora.config import GroupingConfig, RunConfig, load_config
from ensemblelora.data.catalog import resolve_cards
from ensemblelora.data.folder import describe_source, is_data_file
from ensemblelora.data.reading import BUILDERS
from ensemblelora.data.remote import is_url, name_of
from ensemblelora.data.task import TaskCard
from ensemblelora.earlier import describe_missing
from ensemblelora.ensemble import Ensemble, load_ensemble
from ensemblelora.errors import DataError, StoreError, UsageError
from ensemblelora.startpoint import is_warm

__all__ = ["Source", "change_cards", "read_source", "settle_config", "write_cards"]

_CARDS = "cards"
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, eq=False)
class Source:
    """A finished run."""

    folder: artifacts.RunFolder
    config: RunConfig
    cards: tuple[TaskCard, ...]
    ensemble: Ensemble
    digests: Mapping[str, str]
    """checksum of every member's weights"""
    rerun_flops: Mapping[str, int]
    """by stage: what a run of these tasks from the beginning takes"""
    n_changes: int = 0
    """since the run that was made from the beginning"""

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @property
    def names(self) -> tuple[str, ...]:
        """Task names, in their order."""
        return tuple(card.task for card in self.cards)

    @property
    def named_groups(self) -> tuple[frozenset[str], ...]:
        """The tasks of each group, by name."""
        return tuple(frozenset(self.names[task] for task in group) for group in self.ensemble.groups)


def read_source(run: Path | str, *, device: str | None = None) -> Source:
    """Open a finished run.

    Args:
        run: Its folder.
        device: Where the model is to run; none: as before.

    Raises:
        OutputError: If it is no run folder.
        UsageError: If the run is not finished, or is one that nothing can be added to.
        StoreError: If a file of it is damaged.
    """
    folder = artifacts.RunFolder.open(run)
    path = folder.path
    if not (path / artifacts.ENSEMBLE_FILE).exists():
        raise UsageError(describe_missing(path, artifacts.ENSEMBLE_FILE))
    config = load_config(path / artifacts.CONFIG_FILE)
    if is_warm(config):
        raise UsageError(
            f"{path}: its groups start from a warm-up on all of its tasks (gradients.linearize_at), so another task "
            "would move every start; make a new run"
        )
    if config.gradients.proj_type == "none":
        raise UsageError(
            f"{path}: gradients.proj_type none keeps inner products of all rows together, to which none can be added; "
            "make a new run"
        )
    if device is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"device": device})})
    ensemble = load_ensemble(path / artifacts.ENSEMBLE_FILE)
    cards = _read_cards(path)
    return Source(folder, config, cards, ensemble, _check_adapters(folder, ensemble), *_read_before(path))


def change_cards(source: Source, action: str, *, task: str = "", entry: str = "") -> tuple[tuple[TaskCard, ...], str]:
    """Return the cards of the changed run, in their order, and the name of the task that changes.

    Args:
        source: The earlier run.
        action: ``add``, ``drop`` or ``update``.
        task: Of ``drop`` and ``update``.
        entry: Of ``add`` and ``update``: a shipped card's name, a card file, or a data file.

    Raises:
        UsageError: If the task is unknown, known already, or the last one.
        DataError: If the entry is no single task.
    """
    names = source.names
    if action == "add":
        card = _resolve_one(entry)
        if card.task in names:
            raise UsageError(
                f"task {card.task!r}: the run has one of that name; rename the card or file, or change its rows with: "
                f"ensemblelora update {source.path} {card.task} {entry}"
            )
        return (*source.cards, card), card.task
    if task not in names:
        raise UsageError(f"task {task!r}: not in {source.path}; its tasks are {', '.join(names)}")
    if action == "drop":
        if len(names) == 1:
            raise UsageError(f"task {task!r}: the only one of {source.path}; delete the run instead")
        return tuple(card for card in source.cards if card.task != task), task
    changed = _update_card(source.cards[names.index(task)], entry)
    return tuple(changed if card.task == task else card for card in source.cards), task


def write_cards(cards: Iterable[TaskCard], folder: Path) -> tuple[str, ...]:
    """Write every card into a run folder, whole, so that the run names its tasks itself; returns their paths."""
    paths = []
    for card in cards:
        path = folder / _CARDS / f"{card.task}.yaml"
        values = card.model_dump(mode="json", exclude_defaults=True)
        artifacts.write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        paths.append(str(path))
    return tuple(paths)


def settle_config(
    source: Source, out: Path, tasks: Sequence[str], names: Sequence[str], groups: Iterable[Iterable[str]] | None
) -> RunConfig:
    """Return the changed run's config: other tasks, and these groups given by hand.

    One adapter for all tasks, as a baseline, would be trained on all rows again, and is left to a new run.

    Args:
        source: The earlier run.
        out: The changed run's folder.
        tasks: Its cards.
        names: Its tasks.
        groups: Their groups, by name; none: not known yet.
    """
    before, given = source.config, None if groups is None else tuple(tuple(group) for group in groups)
    is_one = given is not None and len(given) == 1
    baselines = tuple(name for name in before.evaluation.baselines if name != "shared" or is_one)
    return before.model_copy(
        update={
            "out": str(out),
            "data": before.data.model_copy(update={"tasks": tuple(tasks)}),
            "grouping": _settle_grouping(before.grouping, names, given),
            "evaluation": before.evaluation.model_copy(update={"baselines": baselines}),
        }
    )


def _settle_grouping(
    config: GroupingConfig, names: Sequence[str], groups: tuple[tuple[str, ...], ...] | None
) -> GroupingConfig:
    """The same demands, of the tasks that are left."""
    lists = {
        key: tuple(kept for tasks in getattr(config, key) if len(kept := tuple(t for t in tasks if t in names)) > 1)
        for key in ("must_link", "cannot_link")
    }
    return config.model_copy(update={**lists, "groups": groups, "n_groups": "auto"})


def _resolve_one(entry: str) -> TaskCard:
    cards = resolve_cards([entry])
    if len(cards) != 1:
        raise DataError(f"{entry}: holds {len(cards)} tasks; add them one at a time, each by its card or file")
    return cards[0]


def _update_card(card: TaskCard, entry: str) -> TaskCard:
    """A card's replacement: another card of its name, or itself with other training rows."""
    place: Path | str = entry if is_url(entry) else Path(entry).expanduser()
    if not is_data_file(name_of(place)):
        found = _resolve_one(entry)
        return found.model_copy(update={"task": card.task})
    if isinstance(place, Path) and not place.is_file():
        raise DataError(f"data file {place}: not found")
    keys = describe_source(place)
    files = {card.training_split: keys["dataset_kwargs"]["data_files"]["train"]}
    if card.dataset_path in BUILDERS and card.dataset_path == keys["dataset_path"]:
        known = card.dataset_kwargs.get("data_files")
        before = known if isinstance(known, dict) else {}
        return card.model_copy(update={"dataset_kwargs": {**card.dataset_kwargs, "data_files": {**before, **files}}})
    return card.model_copy(
        update={
            "dataset_path": keys["dataset_path"],
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            "validation_split": None,
            "test_split": None,
        }
    )


def _read_cards(path: Path) -> tuple[TaskCard, ...]:
    entries = artifacts.read_json(path / artifacts.TASKS_FILE)["tasks"]
    return tuple(TaskCard.model_validate(entry["card"]) for entry in entries)


def _check_adapters(folder: artifacts.RunFolder, ensemble: Ensemble) -> dict[str, str]:
    """Checksums of all members' weights, which must be those that the ensemble's weights were fitted to."""
    fitted: dict[str, Any] = artifacts.read_json(folder.path / artifacts.ENSEMBLE_FILE).get("adapter_sha256", {})
    found: dict[str, str] = {}
    for member in ensemble.members:
        weights = folder.adapter(member.name) / _WEIGHTS
        if not weights.is_file() or artifacts.file_sha256(weights) != fitted.get(member.name):
            raise StoreError(
                f"{weights.parent}: damaged, or not what {artifacts.ENSEMBLE_FILE} was fitted to; mend it with: "
                f"ensemblelora run {folder.path}"
            )
        found[member.name] = fitted[member.name]
    return found


def _read_before(path: Path) -> tuple[dict[str, int], int]:
    """What its tasks cost from the beginning, and how many changes led here.

    The first by its own ledger, or, where it goes on from another run, by its record.
    """
    record = path / artifacts.CHANGE_FILE
    if record.exists():
        values = artifacts.read_json(record)
        rerun = {stage: int(flops) for stage, flops in values["rerun_flops"].items()}
        return rerun, int(values.get("n_changes", 1))
    ledger = Ledger.from_dict(artifacts.read_json(path / artifacts.COSTS_FILE))
    return {stage.stage: stage.flops for stage in ledger.stages}, 0
