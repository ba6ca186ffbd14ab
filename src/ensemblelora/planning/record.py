"""What a plan says, as plain values: ``dataclasses.asdict`` of a plan is JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ensemblelora.errors import StoreError

__all__ = ["Candidate", "Comparison", "Decision", "Groups", "Plan", "Prediction", "Predictions", "read_plan"]

Groups = tuple[tuple[int, ...], ...]
Decision = Literal["group", "one adapter", "one per task"]


@dataclass(frozen=True)
class Prediction:
    """Predicted validation performance of one way to train the tasks; ``None`` where a number can't be had.

    Attributes:
        nll: Negative log-likelihood of each task, lower is better.
        nll_se: Its standard error over validation rows (clustered) and projection seeds.
        accuracy: Accuracy of each task; a lower bound for ``logodds`` tasks, none for ``sequence`` tasks.
        accuracy_se: Its standard error.
        mean_nll: Mean over tasks.
        mean_nll_se: Its standard error.
        mean_accuracy: Mean over the tasks that have an accuracy.
        mean_accuracy_se: Its standard error.
    """

    nll: tuple[float, ...]
    nll_se: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    accuracy_se: tuple[float | None, ...]
    mean_nll: float
    mean_nll_se: float | None
    mean_accuracy: float | None
    mean_accuracy_se: float | None


@dataclass(frozen=True)
class Predictions:
    """The plan beside the ways it is compared with.

    Attributes:
        plan: The chosen groups, judged on validation rows that did not choose them.
        shared: One adapter for all tasks.
        singles: One adapter per task.
        base: The base model as it is.
    """

    plan: Prediction
    shared: Prediction
    singles: Prediction
    base: Prediction


@dataclass(frozen=True)
class Candidate:
    """One number of groups on the curve.

    Attributes:
        n_groups: Number of groups, m.
        groups: The partition found on all validation rows.
        predicted_nll: Mean over tasks, judged on rows that did not choose the partition (cross-fitted).
        gain: All-in-one's predicted nll minus this one; positive is better than one adapter.
        gain_se: Paired standard error of the gain.
        search_nll: The nll of ``groups`` on the very rows that chose them; optimistic.
        objective: Sum over groups of the affinity density, higher is better.
        bound: No partition into m groups has a larger objective.
        gap: ``bound`` minus the largest objective found by clustering; 0 means proven best.
        density: Mean density of the groups after shifting affinities to a zero-mean diagonal.
        adapter_bytes: Memory of the adapters, boosters included.
        latency_ratio: Forward passes at inference against one adapter.
        allowed: Whether the memory and latency budgets and the constraints on groups allow it.
        predicted_nll_se: Standard error of ``predicted_nll``; most of it is common to all numbers of groups.
    """

    n_groups: int
    groups: Groups
    predicted_nll: float
    gain: float
    gain_se: float | None
    search_nll: float
    objective: float
    bound: float
    gap: float
    density: float
    adapter_bytes: int
    latency_ratio: float
    allowed: bool
    predicted_nll_se: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Another way to train the tasks, predicted by the same oracle on the same rows.

    Attributes:
        name: ``one adapter``, ``one per task``, ``random groups`` or ``gradient cosine``.
        n_groups: Its number of groups.
        groups: Its partition; none for random groups, of which there are several.
        predicted_nll: Mean over tasks (and over random draws).
        predicted_nll_sd: Spread over random draws; none elsewhere.
        gain: All-in-one's predicted nll minus this one.
        gain_se: Paired standard error of the gain.
        predicted_nll_se: Standard error of ``predicted_nll``.
        gain_over_plan: The plan's predicted nll minus this one; positive is better than the plan.
        gain_over_plan_se: Paired standard error of that.
    """

    name: str
    n_groups: int
    groups: Groups | None
    predicted_nll: float
    predicted_nll_sd: float | None
    gain: float
    gain_se: float | None
    predicted_nll_se: float | None = None
    gain_over_plan: float | None = None
    gain_over_plan_se: float | None = None


@dataclass(frozen=True)
class Plan:
    """Which tasks to train together, and what that is predicted to give.

    Attributes:
        task_names: Names, in the order that indices refer to.
        groups: The chosen partition: tuples of task indices, largest first, ties by smallest index.
        decision: ``group``, ``one adapter`` or ``one per task``.
        reason: Why, in a sentence.
        predicted: Predicted performance of the plan and of what it is compared with.
        curve: One entry per number of groups that was looked at.
        comparisons: Other partitions, judged the same way.
        l2_penalty: Relative ridge of the oracle.
        warnings: What to keep in mind, in sentences.
        n_groups_asked: The number of groups where it was set, by itself or with the groups; none where it was left to
            the prediction.
        n_groups_auto: The number of groups that the prediction chooses.
        n_validation: Validation rows of each task that the predictions rest on; empty in records of older versions.
        by_group: Every task's predicted mean validation loss under every group, ``(n_tasks, n_groups)``; empty in
            records of older versions.
    """

    task_names: tuple[str, ...]
    groups: Groups
    decision: Decision
    reason: str
    predicted: Predictions
    curve: tuple[Candidate, ...]
    comparisons: tuple[Comparison, ...]
    l2_penalty: float
    warnings: tuple[str, ...]
    n_groups_asked: int | None = None
    n_groups_auto: int | None = None
    n_validation: tuple[int, ...] = ()
    by_group: tuple[tuple[float, ...], ...] = ()


def read_plan(values: Any) -> Plan:
    """Return the plan that ``dataclasses.asdict`` turned into JSON.

    Raises:
        StoreError: If the values are not those of a plan.
    """
    try:
        return TypeAdapter(Plan).validate_python(values)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise StoreError(f"plan: {where}: {fault['msg'].lower()}; run the group stage again") from None
