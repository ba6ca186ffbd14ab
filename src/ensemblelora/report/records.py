"""What a run folder's files hold, as far as the report needs it: one frozen record per file.

Unknown and missing keys are passed over, so that a newer or older run can still be read; a value of the wrong type
is an error, never guessed at.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from ensemblelora.report.asked_record import ConfigRecord, TasksRecord
from ensemblelora.report.feature_record import FeatureRecord

__all__ = [
    "AffinityRecord",
    "BoostingRound",
    "Comparison",
    "CostsRecord",
    "CurvePoint",
    "Difference",
    "Distance",
    "EnsembleRecord",
    "EnvironmentRecord",
    "GroupPrediction",
    "Linearity",
    "Member",
    "MethodCosts",
    "MethodScores",
    "ModelRecord",
    "PlanRecord",
    "Prediction",
    "Predictions",
    "ResultsRecord",
    "RunRecord",
    "StageCosts",
    "TaskLinearity",
    "TaskScore",
]

Matrix = npt.NDArray[np.float64]
# JSON has no NaN: a number that does not exist arrives as null, or as NaN from other writers.
Number = Annotated[float | None, AfterValidator(lambda value: value if value is None or math.isfinite(value) else None)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class ModelRecord(_Record):
    """The base model, as environment.json names it."""

    name: str | None = None
    n_parameters: int | None = None
    dtype: str | None = None
    fingerprint: str | None = None


class EnvironmentRecord(_Record):
    """environment.json: where and with what the run was made."""

    package_version: str | None = None
    python: str | None = None
    torch: str | None = None
    transformers: str | None = None
    peft: str | None = None
    platform: str | None = None
    device: str | None = None
    max_tokens_per_batch: int | None = None
    model: ModelRecord = ModelRecord()
    created: str | None = None


class CurvePoint(_Record):
    """The best partition into one number of groups, and what it is predicted to give.

    ``predicted_nll`` is judged on rows that did not choose the partition, ``search_nll`` on the rows that did;
    ``gain`` is the loss saved against one adapter for all.
    """

    n_groups: int
    predicted_nll: Number = None
    predicted_nll_se: Number = None
    gain: Number = None
    gain_se: Number = None
    search_nll: Number = None
    objective: Number = None
    bound: Number = None
    gap: Number = None
    density: Number = None
    adapter_bytes: Number = None
    latency_ratio: Number = None
    allowed: bool = True


class Prediction(_Record):
    """Predicted validation performance of every task, and their mean, under one way to train."""

    nll: tuple[Number, ...] = ()
    nll_se: tuple[Number, ...] = ()
    accuracy: tuple[Number, ...] = ()
    accuracy_se: tuple[Number, ...] = ()
    mean_nll: Number = None
    mean_nll_se: Number = None
    mean_accuracy: Number = None
    mean_accuracy_se: Number = None

    @property
    def n_accuracies(self) -> int:
        """Number of tasks that have an accuracy; free text has none."""
        return sum(value is not None for value in self.accuracy)


class Predictions(_Record):
    """The plan beside the ways it is compared with."""

    plan: Prediction = Prediction()
    shared: Prediction = Prediction()
    singles: Prediction = Prediction()
    base: Prediction = Prediction()


class Comparison(_Record):
    """Another way of grouping, judged by the same prediction."""

    name: str
    n_groups: int | None = None
    predicted_nll: Number = None
    predicted_nll_se: Number = None
    predicted_nll_sd: Number = None
    gain: Number = None
    gain_se: Number = None


class PlanRecord(_Record):
    """plan.json: the groups, why, and what they are predicted to give."""

    task_names: tuple[str, ...] = Field(min_length=1)
    groups: tuple[tuple[int, ...], ...] = Field(min_length=1)
    decision: str = ""
    reason: str = ""
    predicted: Predictions = Predictions()
    curve: tuple[CurvePoint, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    l2_penalty: Number = None
    warnings: tuple[str, ...] = ()
    n_validation: tuple[int, ...] = ()

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return len(self.task_names)

    @property
    def ordered_names(self) -> list[str]:
        """Task names, group by group."""
        return [self.task_names[task] for group in self.groups for task in group]

    @property
    def group_by_name(self) -> dict[str, int]:
        """Group of each task."""
        return {self.task_names[task]: group for group, tasks in enumerate(self.groups) for task in tasks}


class Member(_Record):
    """One adapter of the ensemble."""

    name: str
    group: int
    kind: str = "group"
    rate: Number = None


class BoostingRound(_Record):
    """One attempt to add an adapter to the group that errs most."""

    round: int
    group: int
    train_loss_before: Number = None
    train_loss_after: Number = None
    heldout_before: Number = None
    heldout_after: Number = None
    rate: Number = None
    accepted: bool = False
    reason: str = ""


class EnsembleRecord(_Record):
    """ensemble.json: members, weights of every task, boosting."""

    members: tuple[Member, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    routed: tuple[bool, ...] = ()
    """tasks that one group alone could answer; the weights say so only where ensemble.route was on"""
    boosting: tuple[BoostingRound, ...] = ()


class TaskScore(_Record):
    """One method on one task's test rows."""

    kind: str = "verbalizer"
    n_examples: int = 0
    n_groups: int | None = None
    nll: Number = None
    nll_low: Number = None
    nll_high: Number = None
    accuracy: Number = None
    accuracy_low: Number = None
    accuracy_high: Number = None
    macro_f1: Number = None
    macro_f1_low: Number = None
    macro_f1_high: Number = None
    majority: Number = None
    is_above_chance: bool | None = None


class MethodScores(_Record):
    """One method on every task."""

    per_task: dict[str, TaskScore] = {}

    def mean(self, metric: str, tasks: Collection[str]) -> float | None:
        """Return the mean of a metric over those of ``tasks`` that have it; none where none has."""
        known = self._known(metric, tasks)
        return sum(known) / len(known) if known else None

    def count(self, metric: str, tasks: Collection[str]) -> int:
        """Return how many of ``tasks`` have a metric."""
        return len(self._known(metric, tasks))

    def _known(self, metric: str, tasks: Collection[str]) -> list[float]:
        values = [getattr(score, metric) for task, score in self.per_task.items() if task in tasks]
        return [value for value in values if value is not None]


class Difference(_Record):
    """``a`` minus ``b`` in one metric, with its interval; ``task`` is empty for the mean over tasks.

    A bootstrap whose every draw says the same has too few rows to say how sure it is: an interval of no width is none.
    """

    a: str
    b: str
    metric: str
    task: str | None = None
    difference: Number = None
    low: Number = None
    high: Number = None

    @model_validator(mode="before")
    @classmethod
    def _drop_point(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("low") == values.get("high"):
            return {**values, "low": None, "high": None}
        return values

    def turned(self) -> Difference:
        """Return ``b`` minus ``a``."""
        difference, low, high = (None if value is None else -value for value in (self.difference, self.high, self.low))
        return self.model_copy(update={"a": self.b, "b": self.a, "difference": difference, "low": low, "high": high})


class TaskLinearity(_Record):
    """How well the linear model predicts one task's trained outputs."""

    r2_over_zero_order: Number = None
    rms_relative_error: Number = None
    n_rows: int | None = None


class Distance(_Record):
    """How far training moved one adapter."""

    relative_to_model: Number = None
    relative_to_adapter_init: Number = None


class Linearity(_Record):
    """Measurements behind the plan's linear model."""

    tasks: dict[str, TaskLinearity] = {}
    distances: dict[str, Distance] = {}


class GroupPrediction(_Record):
    """One task's loss as planned, on validation rows, and as measured on test rows; the base model's on both."""

    task: str
    group: int | None = None
    predicted_nll: Number = None
    predicted_nll_se: Number = None
    measured_nll: Number = None
    measured_validation_nll: Number = None
    base_nll: Number = None
    measured_base_nll: Number = None


class ResultsRecord(_Record):
    """results.json: the test table."""

    methods: dict[str, MethodScores] = {}
    differences: tuple[Difference, ...] = ()
    linearity: Linearity = Linearity()
    predicted_vs_measured: tuple[GroupPrediction, ...] = ()
    note: str | None = None

    @property
    def ordered_methods(self) -> dict[str, MethodScores]:
        """The methods, the base model first and the ensemble last."""
        places = {"base": 0, "shared": 1, "ensemble": 3}
        return dict(sorted(self.methods.items(), key=lambda item: places.get(item[0], 2)))

    def find_difference(self, a: str, b: str, metric: str, task: str | None = None) -> Difference | None:
        """Return ``a`` minus ``b`` on a task, or in the mean over tasks, in whichever order the file has the two."""
        for item in self.differences:
            if item.task == task and item.metric == metric and item.difference is not None:
                if (item.a, item.b) == (a, b):
                    return item
                if (item.a, item.b) == (b, a):
                    return item.turned()
        return None


class StageCosts(_Record):
    """What one stage cost."""

    stage: str
    wall_seconds: Number = None
    flops: Number = None
    n_tokens: Number = None
    n_padded_tokens: Number = None
    peak_memory_bytes: Number = None
    peak_accelerator_bytes: Number = None


class MethodCosts(_Record):
    """What one method costs to make and to use."""

    train_flops: Number = None
    select_flops: Number = None
    inference_forward_passes: Number = None
    adapter_bytes: Number = None
    train_seconds: Number = None


class CostsRecord(_Record):
    """costs.json: the ledger, without the stage that writes the report: a page can't say what it took itself."""

    stages: tuple[StageCosts, ...] = ()
    methods: dict[str, MethodCosts] = {}

    @field_validator("stages")
    @classmethod
    def _leave_report_out(cls, stages: tuple[StageCosts, ...]) -> tuple[StageCosts, ...]:
        return tuple(stage for stage in stages if stage.stage != "report")

    @property
    def wall_seconds(self) -> float | None:
        """Of all stages together; none where no stage has a time."""
        known = [stage.wall_seconds for stage in self.stages if stage.wall_seconds is not None]
        return sum(known) if known else None


@dataclass(frozen=True, eq=False)
class AffinityRecord:
    """affinity.npz: how well tasks go together.

    Attributes:
        matrix: (n_tasks, n_tasks) higher is better together; NaN where unknown.
        counts: (n_tasks, n_tasks) in how many subsets each pair met; None where the file does not say.
        se: (n_tasks, n_tasks) standard errors, the tasks' own levels taken off; None where the file does not say.
        directed: (n_tasks, n_tasks) row i holds scores of task i; None where the file does not say.
    """

    matrix: Matrix
    counts: Matrix | None
    se: Matrix | None = None
    directed: Matrix | None = None


@dataclass(frozen=True, eq=False)
class RunRecord:
    """Everything the report is made of; None for a file that is not there yet."""

    name: str
    plan: PlanRecord
    config: ConfigRecord
    environment: EnvironmentRecord
    features: FeatureRecord | None
    affinity: AffinityRecord | None
    ensemble: EnsembleRecord | None
    results: ResultsRecord | None
    costs: CostsRecord | None
    tasks: TasksRecord | None = None
