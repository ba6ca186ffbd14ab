"""Read and check a run folder for the report.

Every file but the plan may be missing: a run is reported as far as it has come.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from ensemblelora.artifacts import (
    AFFINITY_FILE,
    CHANGE_FILE,
    CONFIG_FILE,
    COSTS_FILE,
    ENSEMBLE_FILE,
    ENVIRONMENT_FILE,
    FEATURE_HEALTH_FILE,
    PLAN_FILE,
    RESULTS_FILE,
    TASKS_FILE,
    load_arrays,
    read_json,
)
from ensemblelora.errors import StoreError, UsageError
from ensemblelora.evaluation.rows import BOOSTED_GROUP, OWN_GROUP, name_methods
from ensemblelora.report.asked_record import ConfigRecord, TasksRecord
from ensemblelora.report.feature_record import FeatureRecord
from ensemblelora.report.records import (
    AffinityRecord,
    CostsRecord,
    EnsembleRecord,
    EnvironmentRecord,
    PlanRecord,
    ResultsRecord,
    RunRecord,
)
from ensemblelora.yamltext import YamlError, parse_yaml

__all__ = ["leave_out_repeats", "load_record"]

Record = TypeVar("Record", bound=BaseModel)


def load_record(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UsageError: If there is no plan yet.
        StoreError: If a file is damaged, holds a value of the wrong type, or does not fit the plan.
    """
    plan = _read(folder / PLAN_FILE, PlanRecord)
    if plan is None:
        raise UsageError(
            f"{folder}: no {PLAN_FILE} to report; plan first with `ensemblelora plan` or `ensemblelora run`"
        )
    _check_plan(folder / PLAN_FILE, plan)
    ensemble = _read(folder / ENSEMBLE_FILE, EnsembleRecord)
    if ensemble is not None:
        _check_ensemble(folder / ENSEMBLE_FILE, ensemble, plan)
    config, origin = _read_config(folder / CONFIG_FILE), _read_origin(folder / CHANGE_FILE)
    if origin and config.grouping.groups is not None:  # which no hand has written
        grouping = config.grouping.model_copy(update={"origin": origin})
        config = config.model_copy(update={"grouping": grouping})
        given = "Groups were given by hand (grouping.groups)"
        plan = plan.model_copy(update={"reason": plan.reason.replace(given, f"Groups are {origin}")})
    results, costs = _read(folder / RESULTS_FILE, ResultsRecord), _read(folder / COSTS_FILE, CostsRecord)
    if results is not None and ensemble is not None and any(member.kind == "booster" for member in ensemble.members):
        results, costs = _part_boosters(results, costs)
    return RunRecord(
        name=folder.resolve().name,
        plan=plan,
        config=config,
        environment=_read(folder / ENVIRONMENT_FILE, EnvironmentRecord) or EnvironmentRecord(),
        features=_read(folder / FEATURE_HEALTH_FILE, FeatureRecord),
        affinity=_read_affinity(folder / AFFINITY_FILE, plan.n_tasks),
        ensemble=ensemble,
        results=results,
        costs=costs,
        tasks=_read(folder / TASKS_FILE, TasksRecord),
    )


def leave_out_repeats(run: RunRecord) -> RunRecord:
    """Show one adapter for all once where it is the plan: there it is the group's own adapter, too.

    With its boosters it is the ensemble.
    """
    if run.results is None or len(run.plan.groups) > 1 or "ensemble" not in run.results.methods:
        return run
    repeated = {BOOSTED_GROUP, *([OWN_GROUP] if "shared" in run.results.methods else [])}
    methods = {name: scores for name, scores in run.results.methods.items() if name not in repeated}
    costs = run.costs
    if costs is not None:
        spent = {name: item for name, item in costs.methods.items() if name not in repeated}
        costs = costs.model_copy(update={"methods": spent})
    return replace(run, results=run.results.model_copy(update={"methods": methods}), costs=costs)


def _read(path: Path, kind: type[Record]) -> Record | None:
    if not path.exists():
        return None
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StoreError(f"{path}: can't be read ({error.strerror}); check the file's permissions") from None
    except ValidationError as error:
        raise _damaged(path, error) from None


def _part_boosters(results: ResultsRecord, costs: CostsRecord | None) -> tuple[ResultsRecord, CostsRecord | None]:
    """Name the methods of an ensemble with boosters as they are named now.

    Where the boosters were in all that was measured, nothing is known of what the plan predicted: the adapters alone.
    """
    names = name_methods(results.methods, has_boosters=True)
    if all(name == now for name, now in names.items()):
        return results, costs
    changes = {
        "methods": {names[name]: scores for name, scores in results.methods.items()},
        "differences": tuple(
            item.model_copy(update={"a": names.get(item.a, item.a), "b": names.get(item.b, item.b)})
            for item in results.differences
        ),
        "predicted_vs_measured": (),
    }
    if costs is not None:
        methods = {names.get(name, name): spent for name, spent in costs.methods.items()}
        costs = costs.model_copy(update={"methods": methods})
    return results.model_copy(update=changes), costs


def _read_config(path: Path) -> ConfigRecord:
    if not path.exists():
        return ConfigRecord()
    try:
        text = path.read_text(encoding="utf-8")
        values = parse_yaml(text)
        if not isinstance(values, dict):
            raise StoreError(f"{path}: expected a mapping of stages, got {type(values).__name__}; run again")
        return ConfigRecord.model_validate({**values, "text": text})
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise StoreError(f"{path}: can't be read as YAML ({' '.join(str(error).split())}); run again") from None
    except ValidationError as error:
        raise _damaged(path, error) from None


def _read_origin(path: Path) -> str:
    """Whose groups a run has that goes on from an earlier one."""
    if not path.exists():
        return ""
    values = read_json(path)
    try:
        earlier, task = Path(values["source"]).name, values["task"]
        became = {"add": f"{task} added", "drop": f"{task} dropped", "update": f"other rows of {task}"}
        return f"those of the earlier run {earlier}, with {became[values['action']]}"
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path}: no record of a change ({error!r}); delete it, and report again") from None


def _read_affinity(path: Path, n_tasks: int) -> AffinityRecord | None:
    if not path.exists():
        return None
    arrays = load_arrays(path)
    names = ("matrix", "counts", "matrix_se", "directed")
    for name in names:
        values = arrays.get(name)
        if values is None and name != "matrix":
            continue
        if values is None or values.shape != (n_tasks, n_tasks) or values.dtype.kind not in "fiu":
            found = "nothing" if values is None else f"{values.dtype} {values.shape}"
            raise StoreError(
                f"{path}: expected numbers of shape {(n_tasks, n_tasks)} under {name!r}, got {found}; "
                "delete it and run again"
            )
    matrix, counts, errors, directed = (
        None if (values := arrays.get(name)) is None else values.astype(np.float64) for name in names
    )
    return AffinityRecord(np.asarray(matrix), counts, errors, directed)


def _check_plan(path: Path, plan: PlanRecord) -> None:
    """Refuse a plan in which a task is in no group or in two, since every table is read off the groups."""
    fault = None
    if len(set(plan.task_names)) < plan.n_tasks:
        fault = f"task names {list(plan.task_names)} are not distinct"
    elif not all(plan.groups) or sorted(itertools.chain(*plan.groups)) != list(range(plan.n_tasks)):
        fault = f"groups {[list(group) for group in plan.groups]} don't hold each of {plan.n_tasks} tasks once"
    predictions = plan.predicted
    for way in (predictions.plan, predictions.shared, predictions.singles, predictions.base):
        if any(len(values) not in (0, plan.n_tasks) for values in (way.nll, way.nll_se, way.accuracy, way.accuracy_se)):
            fault = f"predictions are not one per task for {plan.n_tasks} tasks"
    if fault:
        raise StoreError(f"{path}: {fault}; delete it and run again")


def _check_ensemble(path: Path, ensemble: EnsembleRecord, plan: PlanRecord) -> None:
    n_groups = len(plan.groups)
    wanted = (plan.n_tasks, n_groups)
    if ensemble.weights and (len(ensemble.weights), *{len(row) for row in ensemble.weights}) != wanted:
        raise StoreError(f"{path}: weights are not of shape {wanted}, tasks by groups; delete it and run again")
    named = [*(item.group for item in ensemble.members), *(item.group for item in ensemble.boosting)]
    strays = [group for group in named if not 0 <= group < n_groups]
    if strays:
        raise StoreError(f"{path}: names group {strays[0]}, the plan has {n_groups}; delete it and run again")


def _damaged(path: Path, error: ValidationError) -> StoreError:
    faults = error.errors(include_url=False, include_context=False)
    first = faults[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    got = repr(first["input"])
    got = got if len(got) <= 60 else f"{got[:57]}..."
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    reason = first["msg"][0].lower() + first["msg"][1:]
    return StoreError(f"{path}: {where}: got {got}: {reason}{more}; delete the file and run again")
