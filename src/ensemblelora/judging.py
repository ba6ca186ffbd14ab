"""The stages that judge: the baseline, the final table on the test rows, the report.

In: the ensemble and the test splits, which nothing before has read. Out: ``results.json``, ``costs.json``, the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ensemblelora import artifacts
from ensemblelora.accounting.meter import Meter, MethodCosts
from ensemblelora.adapters import THETA0, AdaptedModel, adapter_bytes, load_adapter, measure_distance
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.ensemble import Ensemble, combined_scores, group_scores
from ensemblelora.evaluation.evaluate import compare_methods
from ensemblelora.evaluation.linearity import measure_linearity
from ensemblelora.generation import generate_answers, matches_exactly
from ensemblelora.planning import Plan
from ensemblelora.prediction import MemberScores, predict_members
from ensemblelora.report import write_report as compose_report
from ensemblelora.stages import Rows, train_adapter, training_inputs
from ensemblelora.workspace import Workspace, fingerprint_split

__all__ = ["evaluate_methods", "train_baselines", "write_report"]

_SHARED = "shared"
_LINEARITY_ROWS = 48  # per task; a gradient pass each


def train_baselines(work: Workspace, probe: AdaptedModel, plan: Plan, rows: Rows) -> str:
    """Fine-tune one adapter for all tasks, at the same number of epochs; returns its name.

    Where the plan is one adapter for all, that adapter is the baseline.
    """
    if len(plan.groups) == 1:
        return "group-0"
    with work.stage("baselines", training_inputs(work, rows)) as stage:
        if stage.is_needed:
            train_adapter(work, probe, _SHARED, range(len(rows.names)), rows, stage)
    load_adapter(probe, _SHARED, work.folder.adapter(_SHARED))
    return _SHARED


def evaluate_methods(
    work: Workspace, probe: AdaptedModel, ensemble: Ensemble, shared: str, plan: Plan, rows: Rows
) -> dict[str, Any]:
    """Score base model, one adapter for all, and the ensemble on the test rows. Leaves ``results.json``.

    The test rows are read here for the first time. Routing each task to its own group alone costs no further pass,
    so it stands in the table too.
    """
    config, path = work.config, work.path / artifacts.RESULTS_FILE
    tests = [fingerprint_split(split) for split in rows.test]
    inputs = (training_inputs(work, rows), asdict(ensemble), shared, tests, config.evaluation)
    with work.stage("evaluate", *inputs) as stage:
        if stage.is_needed:
            table = _score_tests(work, probe, ensemble, shared, rows, stage.meter)
            health = _measure_health(work, probe, ensemble, shared, rows, stage.meter)
            table |= {"linearity": health, "predicted_vs_measured": _compare_with_plan(work, plan, ensemble, table)}
            artifacts.write_json(path, table)
            stage.files.append(path)
            _enter_costs(work, probe, ensemble, shared)
    return dict(artifacts.read_json(path))


def write_report(work: Workspace) -> None:
    """Write ``report.html`` and ``report.md`` from what the run folder holds."""
    made_of = [name for name in _REPORTED if (work.path / name).exists()]
    with work.stage("report", [artifacts.file_sha256(work.path / name) for name in made_of]) as stage:
        if stage.is_needed:
            compose_report(work.path)
            stage.files += [work.path / artifacts.REPORT_HTML_FILE, work.path / artifacts.REPORT_MARKDOWN_FILE]


_REPORTED = (
    artifacts.CONFIG_FILE,
    artifacts.PLAN_FILE,
    artifacts.AFFINITY_FILE,
    artifacts.ENSEMBLE_FILE,
    artifacts.RESULTS_FILE,
)


def _score_tests(
    work: Workspace, probe: AdaptedModel, ensemble: Ensemble, shared: str, rows: Rows, meter: Meter
) -> dict[str, Any]:
    config = work.config.evaluation
    scores: dict[str, list[np.ndarray]] = {name: [] for name in ("base", "shared", "own group", "ensemble")}
    exact: dict[str, dict[int, np.ndarray]] = {name: {} for name in scores}
    layouts: list[MemberScores] = []
    for task, split in enumerate(rows.test):
        plain = predict_members(probe, split, [THETA0, shared], max_tokens=config.max_tokens_per_batch, meter=meter)
        groups = range(len(ensemble.groups))
        grouped = group_scores(probe, split, ensemble.members, groups, max_tokens=config.max_tokens_per_batch, meter=meter)
        own = ensemble.group_of[task]
        scores["base"].append(plain.values[0].astype(np.float64))
        scores["shared"].append(plain.values[1].astype(np.float64))
        scores["own group"].append(grouped.values[own].astype(np.float64))
        scores["ensemble"].append(combined_scores(grouped, ensemble.weights[task], ensemble.combine))
        layouts.append(plain)
        if split.kind == "sequence":
            for name, (members, weights) in _mixtures(ensemble, task, shared).items():
                answers = generate_answers(probe, split, members, weights, max_tokens=config.max_tokens_per_batch)
                exact[name][task] = matches_exactly(probe, split, answers)
    return compare_methods(scores, layouts, rows.test, config, seed=work.config.seed, exact=exact)


def _mixtures(ensemble: Ensemble, task: int, shared: str) -> dict[str, tuple[list[str], list[float]]]:
    """Which adapters, with which shares, write each method's free-text answers."""
    names = [ensemble.members_of(g)[0].name for g in range(len(ensemble.groups))]
    weights = ensemble.weights[task]
    used = [g for g, weight in enumerate(weights) if weight > 0]
    return {
        "base": ([THETA0], [1.0]),
        "shared": ([shared], [1.0]),
        "own group": ([names[ensemble.group_of[task]]], [1.0]),
        "ensemble": ([names[g] for g in used], [weights[g] for g in used]),
    }


def _measure_health(
    work: Workspace, probe: AdaptedModel, ensemble: Ensemble, shared: str, rows: Rows, meter: Meter
) -> dict[str, Any]:
    """How far every adapter moved, and how linear its outputs are, on validation rows."""
    own = [ensemble.members_of(g)[0].name for g in ensemble.group_of]
    found = measure_linearity(
        probe, rows.validation, own, work.config.gradients, max_rows=_LINEARITY_ROWS, meter=meter
    )
    names = dict.fromkeys([*(member.name for member in ensemble.members), shared])
    return {
        "tasks": {name: asdict(entry) for name, entry in zip(rows.names, found, strict=True)},
        "distances": {name: measure_distance(probe, name) for name in names},
    }


def _compare_with_plan(work: Workspace, plan: Plan, ensemble: Ensemble, table: dict[str, Any]) -> list[dict[str, Any]]:
    """The plan's predictions beside what its adapters gave: on the validation rows it spoke of, and on the test rows."""
    measured = artifacts.read_json(work.path / artifacts.ENSEMBLE_FILE)["own_validation_nll"]
    return [
        {
            "task": name,
            "group": ensemble.group_of[task],
            "predicted_nll": plan.predicted.plan.nll[task],
            "measured_nll": table["methods"]["own group"]["per_task"][name]["nll"],
            "measured_validation_nll": measured[task],
            "base_nll": plan.predicted.base.nll[task],
        }
        for task, name in enumerate(ensemble.task_names)
    ]


def _enter_costs(work: Workspace, probe: AdaptedModel, ensemble: Ensemble, shared: str) -> None:
    one = adapter_bytes(probe)
    used = np.asarray(ensemble.weights) > 0
    boosted = {member.group for member in ensemble.members if member.kind == "booster"}
    passes = [
        sum(len(ensemble.members_of(int(g))) for g in np.flatnonzero(row)) + bool(boosted & set(np.flatnonzero(row).tolist()))
        for row in used
    ]
    selecting, grouping = ("features", "affinity", "group"), ("train", "boost", "combine")
    shared_stage = "train" if shared == "group-0" else "baselines"
    work.enter_method("base", MethodCosts())
    work.enter_method(
        "shared",
        MethodCosts(
            train_flops=work.flops_of(shared_stage), adapter_bytes=one, train_seconds=work.seconds_of(shared_stage)
        ),
    )
    work.enter_method(
        "ensemble",
        MethodCosts(
            train_flops=work.flops_of(*grouping),
            select_flops=work.flops_of(*selecting),
            inference_forward_passes=float(np.mean(passes)),
            adapter_bytes=one * len(ensemble.members),
            train_seconds=work.seconds_of(*grouping),
        ),
    )
