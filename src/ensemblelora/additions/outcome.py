"""What became of a change: the record that is handed back, kept in the changed run's folder, and read again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ensemblelora import artifacts
from ensemblelora.additions.carry import Training
from ensemblelora.additions.costs import Costs
from ensemblelora.additions.options import Option
from ensemblelora.additions.request import Action, Request, identify
from ensemblelora.additions.source import Source
from ensemblelora.data.task import TaskCard
from ensemblelora.earlier import hash_files
from ensemblelora.planning import Plan
from ensemblelora.planning.describe import is_above_error

__all__ = ["Change", "Outcome", "advise", "compare_tests", "recall_change", "write_change"]

_ERRORS_TO_ADVISE = 2.0
"""standard errors by which other groups must be better for the price of a new run to be worth naming"""


@dataclass(frozen=True)
class Outcome:
    """A task's test rows under the ensemble, as it is now and as it was in the earlier run.

    Attributes:
        accuracy: Now; none where it has none.
        nll: Mean loss now, in nats.
        accuracy_before: In the earlier run; none where the task was not there.
        nll_before: Its loss there.
    """

    accuracy: float | None
    nll: float | None
    accuracy_before: float | None = None
    nll_before: float | None = None


@dataclass(frozen=True)
class Change:
    """What became of a task, and what that cost.

    Attributes:
        action: ``add``, ``drop`` or ``update``.
        task: Its name.
        folder: The changed run's; the earlier run's own where the task went nowhere, which changes nothing.
        source: The earlier run's.
        options: Where it could go; empty for ``drop``.
        place: Where it went: a group of the earlier run, ``alone`` or ``nowhere``; none for ``drop``.
        reason: Why.
        groups: The changed run's groups, by the tasks' names.
        trained: Adapters that are trained.
        training: How.
        costs: What was spent, or about what will be, beside a run from the beginning.
        is_forecast: Whether this was only to be said, and nothing was trained.
        accuracy: Test accuracy of each task under the ensemble, where it was evaluated and has one.
        tests: The same beside the earlier run's, with losses.
        n_changes: How many there have been since the run that was made from the beginning, this one included.
        advice: What the plan of all tasks says against the groups that have grown; empty where it says nothing.
        is_known: Whether the very same change had been made before, so that there was nothing to do.
    """

    action: Action
    task: str
    folder: Path
    source: Path
    options: tuple[Option, ...]
    place: str | None
    reason: str
    groups: tuple[tuple[str, ...], ...]
    trained: tuple[str, ...]
    training: Training
    costs: Costs
    is_forecast: bool
    accuracy: Mapping[str, float | None]
    tests: Mapping[str, Outcome] = field(default_factory=dict)
    n_changes: int = 1
    advice: str = ""
    is_known: bool = False


def compare_tests(table: Mapping[str, Any], source: Source) -> dict[str, Outcome]:
    """Set every task's test beside the earlier run's, where that was evaluated.

    Args:
        table: The changed run's results.
        source: The earlier run.
    """
    path = source.path / artifacts.RESULTS_FILE
    before = artifacts.read_json(path)["methods"]["ensemble"]["per_task"] if path.exists() else {}
    found = {}
    for name, now in table["methods"]["ensemble"]["per_task"].items():
        old = before.get(name, {})
        found[name] = Outcome(now.get("accuracy"), now.get("nll"), old.get("accuracy"), old.get("nll"))
    return found


def advise(plan: Plan) -> str:
    """Advise a new run where other groups of all tasks are predicted to be better by more than two standard errors.

    The error of a difference on the same rows is at most the sum of both errors, which is taken for it.
    """
    own = next((one for one in plan.curve if one.groups == plan.groups), None)
    for rival in plan.curve:
        if own is None or rival.n_groups != plan.n_groups_auto or rival.groups == plan.groups or not rival.allowed:
            continue
        gain, errors = rival.gain - own.gain, (rival.gain_se, own.gain_se)
        error = None if None in errors else sum(filter(None, errors))
        if is_above_error(gain, error, n_errors=_ERRORS_TO_ADVISE):
            return (
                f"{rival.n_groups} groups chosen anew of all tasks are predicted to be better than these by {gain:.4f} "
                f"± {error:.4f} nats: it is time for a new run, from the beginning"
            )
    return ""


def write_change(folder: Path, request: Request, source: Source, change: Change) -> None:
    """Leave what became of a change in the run folder."""
    values = asdict(change)
    del values["folder"], values["source"], values["is_known"]
    asked = identify(request, source) | {"rerun_flops": change.costs.rerun_flops}
    artifacts.write_json(folder / artifacts.CHANGE_FILE, values | asked)


def recall_change(request: Request, source: Source, card: TaskCard | None) -> Change | None:
    """Return the very change that is asked for, where its folder holds it already, whole; else none.

    Args:
        request: What is asked for; its folder holds no other change.
        source: The earlier run.
        card: The task's, as its rows were just loaded; none: it is dropped.
    """
    path = request.out / artifacts.CHANGE_FILE
    if not path.exists():
        return None
    values = artifacts.read_json(path)
    if values.get("is_forecast", True) or "options" not in values or not _holds(request.out, card):
        return None
    return _read_change(values, request, source)


def _holds(folder: Path, card: TaskCard | None) -> bool:
    """Whether a run has a task's card, with files that are what they were."""
    if card is None:
        return True
    wanted = card.model_dump(mode="json")
    entries = artifacts.read_json(folder / artifacts.TASKS_FILE)["tasks"]
    return any(entry["card"] == wanted and entry["files"] == hash_files(wanted) for entry in entries)


def _read_change(values: Mapping[str, Any], request: Request, source: Source) -> Change:
    options = [Option(**{**option, "tasks": tuple(option["tasks"])}) for option in values["options"]]
    return Change(
        action=request.action,
        task=request.task,
        folder=request.out,
        source=source.path,
        options=tuple(options),
        place=values["place"],
        reason=values["reason"],
        groups=tuple(map(tuple, values["groups"])),
        trained=tuple(values["trained"]),
        training=values["training"],
        costs=Costs(**values["costs"]),
        is_forecast=False,
        accuracy=values["accuracy"],
        tests={name: Outcome(**entry) for name, entry in values.get("tests", {}).items()},
        n_changes=values.get("n_changes", 1),
        advice=values.get("advice", ""),
        is_known=True,
    )
