"""The rows of a run, encoded, and what is written about them before anything is learnt."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ensemblelora import artifacts
from ensemblelora.adapters import THETA0, AdaptedModel
from ensemblelora.config import RunConfig
from ensemblelora.data.encoding import EncodedSplit, encode_split
from ensemblelora.data.identity import fingerprint_split
from ensemblelora.data.task import SPLITS, TaskSet
from ensemblelora.earlier import hash_files
from ensemblelora.errors import DataError
from ensemblelora.models import BaseModel
from ensemblelora.passes import choose_max_tokens, with_cache
from ensemblelora.quantization import count_numbers, count_weight_bytes, describe_quantization
from ensemblelora.workspace import Workspace, describe_environment

__all__ = [
    "Rows",
    "describe_run",
    "drop_lower_layers",
    "encode_tasks",
    "keep_lower_layers",
    "make_records",
    "share_lower_layers",
]

_CACHE_FOLDER = "cache"


@dataclass(frozen=True, eq=False)
class Rows:
    """Every task's encoded splits, in the order that task indices refer to."""

    train: tuple[EncodedSplit, ...]
    validation: tuple[EncodedSplit, ...]
    test: tuple[EncodedSplit, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Task names."""
        return tuple(split.task for split in self.train)

    @property
    def learning(self) -> tuple[EncodedSplit, ...]:
        """What may be learnt from: train and validation, never test."""
        return (*self.train, *self.validation)

    @cached_property
    def identities(self) -> dict[tuple[str, str], str]:
        """Fingerprint of every split that may be learnt from, by task and split."""
        return {(split.task, split.split): fingerprint_split(split) for split in self.learning}

    def learning_fingerprint(self, tasks: Iterable[int] | None = None) -> str:
        """Identity of what may be learnt from of some tasks; none: of all."""
        chosen = range(len(self.train)) if tasks is None else tasks
        return artifacts.fingerprint(
            *(self.identities[splits[task].task, splits[task].split] for task in chosen for splits in self._learnt)
        )

    @property
    def _learnt(self) -> Sequence[tuple[EncodedSplit, ...]]:
        return (self.train, self.validation)


def encode_tasks(tasks: TaskSet, base: BaseModel, *, max_length: int) -> Rows:
    """Turn every split of every task into token ids.

    Raises:
        DataError: The first fault of every task that can't be encoded, joined by ``"; "``.
    """
    encoded: dict[str, list[EncodedSplit]] = {split: [] for split in SPLITS}
    faults: list[str] = []
    for task in tasks.tasks:
        try:
            for split in SPLITS:
                encoded[split].append(encode_split(task, split, base.tokenizer, max_length=max_length))
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("; ".join(faults))
    return Rows(**{split: tuple(found) for split, found in encoded.items()})


def describe_run(work: Workspace, tasks: TaskSet, rows: Rows, probe: AdaptedModel) -> None:
    """Write what the run is made of: ``environment.json``, and ``tasks.json`` with every card."""
    for name, record in make_records(work.config, work.path, tasks, rows, probe).items():
        work.write_record(name, record)


def make_records(
    config: RunConfig, folder: Path, tasks: TaskSet, rows: Rows, probe: AdaptedModel
) -> dict[str, dict[str, Any]]:
    """What :func:`describe_run` writes into a run folder, by the files' names."""
    base, path = probe.base, folder / artifacts.ENVIRONMENT_FILE
    weights = [p for name, p in probe.network.named_parameters() if f".{THETA0}." not in name]
    model = {
        "name": base.name,
        "n_parameters": sum(count_numbers(p) for p in weights),
        "weight_bytes": sum(map(count_weight_bytes, weights)),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "quantization": describe_quantization(base.model),
        "fingerprint": base.fingerprint,
        "revision": base.revision,
    }
    before = artifacts.read_json(path) if path.exists() else {}
    max_tokens = choose_max_tokens(probe, config.evaluation.max_tokens_per_batch)
    cards = [
        {
            "card": task.card.model_dump(mode="json"),
            "kind": splits[1].kind,
            "n_examples": {name: len(task.splits[name]) for name in SPLITS},
            "n_truncated": {one.split: one.n_truncated for one in splits},
            "fitting_length": max(one.fitting_length for one in splits),
            "validation_fingerprint": fingerprint_split(splits[1]),
            "files": hash_files(task.card.model_dump(mode="json")),
        }
        for task, splits in zip(tasks.tasks, zip(rows.train, rows.validation, rows.test, strict=True), strict=True)
    ]
    overlaps = [asdict(overlap) for overlap in tasks.overlaps]
    digest = artifacts.fingerprint(cards)
    return {
        path.name: describe_environment(model, str(base.device), max_tokens, before),
        artifacts.TASKS_FILE: {
            "tasks": cards,
            "overlaps": overlaps,
            "warnings": list(tasks.warnings),
            "sha256": digest,
        },
    }


def keep_lower_layers(
    config: RunConfig, folder: Path, probe: AdaptedModel, rows: Rows, *, with_tests: bool = False
) -> AdaptedModel:
    """Let what enters the lowest adapted block be kept for the rows that are learnt from, training rows first.

    Args:
        config: Says how many bytes may be kept.
        folder: Of the run.
        probe: The model.
        rows: Of all tasks.
        with_tests: Also for test rows, where many models will be tested on them; each row when it is first scored.
    """
    max_bytes = int(config.model.prefix_cache_gb * 1e9)
    splits = (*rows.learning, *rows.test) if with_tests else rows.learning
    return with_cache(probe, folder / _CACHE_FOLDER, splits, max_bytes=max_bytes)


def share_lower_layers(
    config: RunConfig, folder: Path, probe: AdaptedModel, rows: Rows, *, most_examples: int
) -> AdaptedModel:
    """Let another process of the run fill and read the same files as :func:`keep_lower_layers`.

    Args:
        config: Says how many bytes may be kept.
        folder: Of the run.
        probe: The model of that process.
        rows: Of all tasks.
        most_examples: Of a split that one job runs as a whole; of larger ones every job would run all.
    """
    max_bytes = int(config.model.prefix_cache_gb * 1e9)
    splits = [split for split in rows.learning if split.n_examples <= most_examples]
    return with_cache(probe, folder / _CACHE_FOLDER, splits, max_bytes=max_bytes, cleans=False)


def drop_lower_layers(folder: Path) -> None:
    """Free the disk that :func:`keep_lower_layers` took, in a run folder that is finished."""
    shutil.rmtree(folder / _CACHE_FOLDER, ignore_errors=True)
