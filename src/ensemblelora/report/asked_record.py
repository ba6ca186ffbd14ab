"""config.yaml and tasks.json: what a run was asked, as far as the report tells it.

A config of a newer or older version is read as far as it is known; a value of the wrong type is an error.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["ConfigRecord", "TaskRecord", "TasksRecord"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class AdapterSettings(_Record):
    """Which adapter was trained."""

    method: str = ""
    r: int | None = None
    layers_to_transform: str | list[int] | None = None


class AffinitySettings(_Record):
    """What entered the affinity matrix."""

    subset_size: int | None = None
    score: str = "nll"
    row_scale: str = "none"


class GroupingSettings(_Record):
    """How the number of groups was bound."""

    n_groups: int | str | None = None
    max_groups: int | str | None = None
    groups: list[list[str]] | None = None
    origin: str = ""
    """whose groups these are, where the run goes on from another; of that run's own record of it"""


class TrainingSettings(_Record):
    """How long, and with what steps."""

    learning_rate: float | None = None
    num_train_epochs: float | None = None


class BoostingSettings(_Record):
    """What share of a step is added."""

    boosting_rate: float | None = None


class EvaluationSettings(_Record):
    """What the wording needs of the intervals."""

    confidence: float = 0.95
    n_bootstrap: int = 2000


class EnsembleSettings(_Record):
    """What answers."""

    weights: str | None = None


class ModelSettings(_Record):
    """The base model, and whether it is held in four bits."""

    name: str | None = None
    quantization: str | None = None


class ConfigRecord(_Record):
    """config.yaml: the few values the wording needs, and the file itself."""

    out: str | None = None
    seed: int | None = None
    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    affinity: AffinitySettings = AffinitySettings()
    grouping: GroupingSettings = GroupingSettings()
    training: TrainingSettings = TrainingSettings()
    boosting: BoostingSettings = BoostingSettings()
    ensemble: EnsembleSettings = EnsembleSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    text: str = ""


class CardRecord(_Record):
    """The part of a task's card that names it."""

    task: str


class TaskRecord(_Record):
    """One task as it was read: its kind of answer, and its rows."""

    card: CardRecord
    kind: str = ""
    n_examples: dict[str, int] = {}
    n_truncated: dict[str, int] = {}
    fitting_length: int = 0

    @property
    def cut_share(self) -> float:
        """Share of all rows that lost the start of their text."""
        return sum(self.n_truncated.values()) / max(1, sum(self.n_examples.values()))


class TasksRecord(_Record):
    """tasks.json: the tasks in their order."""

    tasks: tuple[TaskRecord, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def by_name(self) -> dict[str, TaskRecord]:
        """Each task by its name."""
        return {task.card.task: task for task in self.tasks}

    def count_rows(self, part: str) -> int:
        """Number of rows of ``train``, ``validation`` or ``test`` over all tasks."""
        return sum(task.n_examples.get(part, 0) for task in self.tasks)
