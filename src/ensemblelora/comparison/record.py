"""What a comparison leaves on disk: one file on what all methods share, and one a method and seed. No torch.

In: a comparison's folder. Out: :class:`StudyRecord`. Rows' losses and answers are kept one by one, so that any
statistic of them can be computed later, without a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ensemblelora import artifacts
from ensemblelora.config import RunConfig, load_config
from ensemblelora.errors import StoreError, UsageError

__all__ = [
    "OURS",
    "RECORDS_FOLDER",
    "STUDY_FILE",
    "MethodRecord",
    "Primary",
    "RateTrial",
    "StudyHead",
    "StudyRecord",
    "TaskRows",
    "identify_record",
    "place_record",
    "read_head",
    "read_record",
    "read_study",
    "write_head",
    "write_record",
]

OURS = "ours"
"""the method that the others are compared with, unless comparisons are named"""
STUDY_FILE = "study.json"
RECORDS_FOLDER = "records"


@dataclass(frozen=True)
class TaskRows:
    """One task, and its test rows as every method is scored on them.

    Attributes:
        name: The task's.
        kind: How it is scored; of a ``sequence`` only the loss is known.
        n_train: Rows learnt from.
        n_validation: Rows chosen by.
        groups: Code of each test row's group, the unit of resampling.
        labels: Its right class.
        lower_flops: Of the blocks below the lowest adapted one, for a test row, once however many members read it.
        upper_flops: Of a member's own pass over a test row.
    """

    name: str
    kind: str
    n_train: int
    n_validation: int
    groups: tuple[int, ...]
    labels: tuple[int, ...]
    lower_flops: float = 0.0
    upper_flops: float = 0.0


@dataclass(frozen=True)
class Primary:
    """A comparison of two methods that is named before its outcome is known."""

    a: str
    b: str
    is_late: bool = False
    """whether both had been tested when it was named"""


@dataclass(frozen=True)
class StudyHead:
    """What all methods of a comparison share.

    Attributes:
        identity: Of config, rows and model; a folder holds one.
        tasks: In the order of task indices.
        methods: Those asked for so far.
        seeds: Likewise.
        learning_rates: What each trained method's rate is chosen among.
        primary: Comparisons named beforehand.
        failures: Why methods could not be carried out, by name.
        lower: FLOPs and seconds of the blocks below the lowest adapted one, run once and charged to each method.
    """

    identity: str
    tasks: tuple[TaskRows, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    primary: tuple[Primary, ...]
    failures: Mapping[str, str]
    lower: Mapping[str, float]


@dataclass(frozen=True)
class RateTrial:
    """A method at one learning rate on the first seed."""

    learning_rate: float
    validation_nll: float
    """mean over tasks"""
    train_flops: int
    select_flops: int
    seconds: float


@dataclass(frozen=True)
class MethodRecord:
    """One method on one seed.

    Attributes:
        identity: Of everything it depends on; another one is measured anew.
        method: Its name.
        title: What tables call it.
        seed: The root of its randomness; rows are the same for all seeds.
        learning_rate: What it was trained with; none where nothing is trained.
        trials: The rates that this one was chosen among; empty on other seeds than the first.
        validation_nll: Mean over tasks.
        costs: As :class:`~.candidate.Costs` has them.
        groups: Tasks that were trained together, by name; none where there is no partition.
        notes: What the method keeps for the record.
        nll: Loss of each test row, by task (nats).
        correct: Whether each test row's answer is right, by task; none for free text. A share where draws are pooled.
        chance: How likely so many right answers to validation rows were, by task, if it were no better than always
            giving the most frequent one; none for free text.
        is_rate_at_edge: Whether the learning rate is the smallest or the largest of those that were tried.
    """

    identity: str
    method: str
    title: str
    seed: int
    learning_rate: float | None
    trials: tuple[RateTrial, ...]
    validation_nll: float
    costs: Mapping[str, float]
    groups: tuple[tuple[str, ...], ...] | None
    notes: Mapping[str, Any]
    nll: Mapping[str, tuple[float, ...]]
    correct: Mapping[str, tuple[float, ...] | None]
    chance: Mapping[str, float | None] = field(default_factory=dict)
    is_rate_at_edge: bool = False


@dataclass(frozen=True)
class StudyRecord:
    """A comparison as far as it has come.

    Attributes:
        folder: Where it lies.
        config: Of all its methods and seeds.
        environment: Model, versions and machine, as ``environment.json`` has them.
        head: What its methods share.
        records: In the order of methods, then seeds.
    """

    folder: Path
    config: RunConfig
    environment: Mapping[str, Any]
    head: StudyHead
    records: tuple[MethodRecord, ...]

    def of(self, method: str) -> tuple[MethodRecord, ...]:
        """One method's records, a seed each."""
        return tuple(record for record in self.records if record.method == method)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that have a record."""
        return tuple(dict.fromkeys(record.method for record in self.records))


def identify_record(study: str, method: str, seed: int, learning_rates: Sequence[float]) -> str:
    """Identity of a method's outcome on a seed.

    Args:
        study: The comparison's.
        method: Its name.
        seed: Root of its randomness.
        learning_rates: The grid that its rate is chosen from.
    """
    return artifacts.fingerprint("record", study, method, seed, tuple(learning_rates))


def place_record(folder: Path, method: str, seed: int) -> Path:
    """Where one method's record of one seed lies."""
    return folder / RECORDS_FOLDER / f"{method}-seed-{seed}.json"


def write_record(folder: Path, record: MethodRecord) -> None:
    """Write one method's record of one seed.

    Raises:
        OutputError: If the place can't be written.
        TypeError: If its notes are no plain values.
    """
    artifacts.write_json(place_record(folder, record.method, record.seed), asdict(record))


def read_record(folder: Path, method: str, seed: int, identity: str) -> MethodRecord | None:
    """Read one method's record of one seed; none where there is none of this identity.

    Raises:
        StoreError: If the file is damaged.
    """
    path = place_record(folder, method, seed)
    if not path.exists():
        return None
    content = artifacts.read_json(path)
    try:
        if content["identity"] != identity:
            return None
        return MethodRecord(
            **content
            | {
                "trials": tuple(RateTrial(**trial) for trial in content["trials"]),
                "groups": content["groups"] and tuple(map(tuple, content["groups"])),
                "nll": {task: tuple(values) for task, values in content["nll"].items()},
                "correct": {task: values and tuple(values) for task, values in content["correct"].items()},
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: no record of a method ({error}); delete it and compare again") from None


def write_head(folder: Path, head: StudyHead) -> None:
    """Write what all methods share.

    Raises:
        OutputError: If the place can't be written.
    """
    artifacts.write_json(folder / STUDY_FILE, asdict(head))


def read_head(folder: Path) -> StudyHead:
    """Read what :func:`write_head` wrote.

    Raises:
        UsageError: If the folder holds no comparison.
        StoreError: If the file is damaged or of another version.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        raise UsageError(f"{folder}: no comparison ({STUDY_FILE} is missing); make one with: ensemblelora compare")
    content = artifacts.read_json(path)
    try:
        tasks = [task | {"groups": tuple(task["groups"]), "labels": tuple(task["labels"])} for task in content["tasks"]]
        return StudyHead(
            **content
            | {name: tuple(content[name]) for name in ("methods", "seeds", "learning_rates")}
            | {"tasks": tuple(TaskRows(**task) for task in tasks)}
            | {"primary": tuple(Primary(**pair) for pair in content["primary"])}
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: not of this version ({error}); compare again in another folder") from None


def read_study(folder: Path | str) -> StudyRecord:
    """Read a comparison's folder, as far as it has come.

    Raises:
        UsageError: If it is none.
        StoreError: If a file in it is damaged.
    """
    folder = Path(folder)
    head = read_head(folder)
    found = [
        read_record(folder, method, seed, identify_record(head.identity, method, seed, head.learning_rates))
        for method in head.methods
        for seed in head.seeds
    ]
    environment = artifacts.read_json(folder / artifacts.ENVIRONMENT_FILE)
    config = load_config(folder / artifacts.CONFIG_FILE)
    return StudyRecord(folder, config, environment, head, tuple(record for record in found if record is not None))
