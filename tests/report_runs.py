"""Run folders as the stages write them, for the tests of the report."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from ensemblelora.artifacts import (
    AFFINITY_FILE,
    CONFIG_FILE,
    COSTS_FILE,
    ENSEMBLE_FILE,
    ENVIRONMENT_FILE,
    PLAN_FILE,
    RESULTS_FILE,
    TASKS_FILE,
    read_json,
    save_arrays,
    write_json,
    write_text,
)
from ensemblelora.config import dump_config, parse_config
from ensemblelora.evaluation.metrics import TaskScores
from ensemblelora.planning import Candidate, Comparison, Plan, Prediction, Predictions
from ensemblelora.seeding import generator_for

TASKS = ("boolq", "rte", "cb", "mrpc", "sst2", "copa", "hellaswag", "piqa", "social_i_qa", "winogrande")
GROUPS = ((5, 6, 7, 8), (0, 1, 2), (3, 4, 9))
ROWS = (200, 139, 28, 200, 200, 50, 200, 200, 200, 200)
MAJORITY = (0.62, 0.53, 0.50, 0.68, 0.51, 0.55, 0.26, 0.52, 0.35, 0.51)
ACCURACY = {
    "base": (0.55, 0.50, 0.43, 0.33, 0.62, 0.60, 0.38, 0.60, 0.40, 0.52),
    "shared": (0.64, 0.56, 0.68, 0.69, 0.84, 0.60, 0.39, 0.63, 0.43, 0.51),
    "ensemble": (0.66, 0.60, 0.71, 0.71, 0.86, 0.64, 0.41, 0.65, 0.44, 0.52),
}
PREDICTED = (0.63, 0.66, 0.71, 0.60, 0.38, 0.66, 1.23, 0.64, 1.03, 0.69)


def make_plan(names: tuple[str, ...] = TASKS) -> Plan:
    """A plan of three groups as the planning stage writes it."""
    means = {1: 0.751, 2: 0.739, 3: 0.723, 4: 0.721, 5: 0.724, 6: 0.733}
    errors = {1: 0.0, 2: 0.0048, 3: 0.0061, 4: 0.0069, 5: 0.0075, 6: 0.0089}
    curve = tuple(
        Candidate(
            n_groups=m,
            groups=GROUPS if m == 3 else (*((task,) for task in range(m - 1)), tuple(range(m - 1, 10))),
            predicted_nll=nll,
            gain=0.751 - nll,
            gain_se=errors[m],
            search_nll=nll - 0.004,
            objective=-7.0 + 0.02 * m,
            bound=-7.0 + 0.02 * m + (0.0 if m < 4 else 0.003),
            gap=0.0 if m < 4 else 0.003,
            density=0.01 * m,
            adapter_bytes=1_900_000 * (m + 1),
            latency_ratio=float(m + 1),
            allowed=m < 6,
            predicted_nll_se=0.011,
        )
        for m, nll in means.items()
    )

    def predict(shift: float) -> Prediction:
        nll = tuple(value + shift for value in PREDICTED)
        accuracy = tuple(min(0.95, math.exp(-value)) for value in nll)
        return Prediction(nll, (0.02,) * 10, accuracy, (0.03,) * 10, sum(nll) / 10, 0.011, sum(accuracy) / 10, 0.012)

    comparisons = (
        Comparison("one adapter", 1, (tuple(range(10)),), 0.751, None, 0.0, 0.0, 0.012, -0.028, 0.006),
        Comparison("one per task", 10, tuple((task,) for task in range(10)), 0.762, None, -0.011, 0.012, 0.013),
        Comparison("random groups", 3, None, 0.756, 0.008, -0.005, 0.004, 0.014),
        Comparison("gradient cosine", 3, GROUPS, 0.729, None, 0.022, 0.006, 0.015, -0.006, 0.003),
    )
    reason = (
        "Three groups are the fewest whose predicted loss is within one standard error of the best, and they beat one "
        "adapter for all by 4.6 standard errors."
    )
    warnings = (
        "cb has 25 validation rows: its predicted loss is uncertain by 0.12.",
        "winogrande: no method is predicted to leave chance.",
    )
    predictions = Predictions(plan=predict(0.0), shared=predict(0.028), singles=predict(0.039), base=predict(0.14))
    return Plan(names, GROUPS, "group", reason, predictions, curve, comparisons, 0.1, warnings, n_validation=(60,) * 10)


def make_affinity(n: int = 10) -> dict[str, np.ndarray]:
    """Affinities with the planted groups under strong task levels, and how often each pair met."""
    generator = generator_for(0, "report", "affinity")
    group_of = np.empty(n, dtype=int)
    for group, tasks in enumerate(GROUPS):
        group_of[list(tasks)] = group
    levels = -np.asarray(PREDICTED) / 2
    noise = generator.normal(0, 0.006, (n, n))
    matrix = levels[:, None] + levels[None, :] + 0.03 * (group_of[:, None] == group_of[None, :]) + (noise + noise.T) / 2
    counts = generator.integers(7, 10, (n, n))
    errors = 0.004 + 0.001 * (group_of[:, None] == group_of[None, :])
    helped = generator_for(0, "report", "directed").normal(-0.005, 0.01, (n, n))
    helped += 0.02 * (group_of[:, None] == group_of[None, :])
    return {
        "matrix": matrix,
        "directed": helped - np.asarray(PREDICTED)[:, None] - 0.039,
        "matrix_se": errors,
        "counts": np.triu(counts, 1) + np.triu(counts, 1).T + 36 * np.eye(n, dtype=int),
    }


def make_scores(accuracy: float, task: int) -> dict[str, Any]:
    """One method's scores on one task as the evaluation stage writes them."""
    n = ROWS[task]
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / n)
    nll = PREDICTED[task] + 0.9 * (ACCURACY["ensemble"][task] - accuracy) + 0.01 * math.sin(task)
    scores = TaskScores(
        n_examples=n,
        n_groups=n if task % 3 else n - 9,
        nll=nll,
        nll_low=nll - half,
        nll_high=nll + half,
        accuracy=accuracy,
        accuracy_low=accuracy - half,
        accuracy_high=accuracy + half,
        macro_f1=accuracy - 0.04,
        macro_f1_low=accuracy - 0.04 - half,
        macro_f1_high=accuracy - 0.04 + half,
        majority=MAJORITY[task],
        chance_p_value=0.5,
        is_above_chance=accuracy - half / 1.2 > MAJORITY[task],
    )
    return {"kind": "verbalizer" if task < 5 else "options", **dataclasses.asdict(scores)}


def make_results(names: tuple[str, ...] = TASKS) -> dict[str, Any]:
    methods = {
        method: {"per_task": {name: make_scores(values[task], task) for task, name in enumerate(names)}}
        for method, values in ACCURACY.items()
    }
    overall = [
        ("shared", "accuracy", 0.023, 0.004, 0.042),
        ("shared", "nll", -0.021, -0.034, -0.007),
        ("base", "accuracy", 0.127, 0.098, 0.156),
    ]
    differences = [
        {"a": "ensemble", "b": b, "metric": metric, "task": None, "difference": value, "low": low, "high": high}
        for b, metric, value, low, high in overall
    ]
    for metric in ("accuracy", "nll"):
        for task, name in enumerate(names):
            ours, theirs = (methods[method]["per_task"][name][metric] for method in ("ensemble", "shared"))
            half = 0.25 / math.sqrt(ROWS[task])
            interval = {"difference": ours - theirs, "low": ours - theirs - half, "high": ours - theirs + half}
            differences.append({"a": "ensemble", "b": "shared", "metric": metric, "task": name, **interval})
    group_of = {task: group for group, tasks in enumerate(GROUPS) for task in tasks}
    measured = [methods["ensemble"]["per_task"][name]["nll"] for name in names]
    return {
        "methods": methods,
        "differences": differences,
        "linearity": {
            "tasks": {
                name: {"r2_over_zero_order": 0.93 - 0.06 * task, "rms_relative_error": 0.04 + 0.01 * task, "n_rows": 32}
                for task, name in enumerate(names)
            },
            "distances": {
                f"group-{group}": {"relative_to_model": 0.0031 + 0.0004 * group, "relative_to_adapter_init": 0.41}
                for group in range(3)
            },
        },
        "predicted_vs_measured": [
            {
                "task": name,
                "group": group_of[task],
                "predicted_nll": PREDICTED[task],
                "predicted_nll_se": 0.02,
                "measured_nll": measured[task],
                "base_nll": methods["base"]["per_task"][name]["nll"] + 0.01,
                "measured_base_nll": methods["base"]["per_task"][name]["nll"],
            }
            for task, name in enumerate(names)
        ],
        "note": "Test rows are official validation rows; the demo cuts its own splits from them.",
    }


def make_ensemble() -> dict[str, Any]:
    generator = generator_for(0, "report", "weights")
    weights = np.full((10, 3), 0.0)
    for group, tasks in enumerate(GROUPS):
        for task in tasks:
            other = generator.uniform(0.0, 0.25, 3)
            other[group] = 0
            weights[task] = other
            weights[task, group] = 1 - other.sum()
    boosting = [
        {
            "round": 1, "group": 0, "train_loss_before": 0.884, "train_loss_after": 0.861, "heldout_before": 0.889,
            "heldout_after": 0.874, "rate": 0.6, "accepted": True, "reason": "held-out loss dropped",
        },
        {
            "round": 2, "group": 1, "train_loss_before": 0.655, "train_loss_after": 0.648, "heldout_before": 0.668,
            "heldout_after": 0.671, "rate": 0.1, "accepted": False, "reason": "held-out loss did not drop",
        },
    ]  # fmt: skip
    members = [{"name": f"group-{group}", "group": group, "kind": "group", "rate": 1.0} for group in range(3)]
    members.append({"name": "booster-0", "group": 0, "kind": "booster", "rate": 0.6})
    routed = [task % 2 == 0 for task in range(10)]
    return {"members": members, "weights": weights.tolist(), "routed": routed, "boosting": boosting}


def make_costs() -> dict[str, Any]:
    rows = [
        ("features", 96.2, 3.1e14, 212_000, 229_000, 2.1e9),
        ("affinity", 4.1, 2.0e11, None, None, 1.4e9),
        ("group", 2.4, None, None, None, 1.4e9),
        ("train", 244.0, 9.8e14, 640_000, 671_000, 3.3e9),
        ("boost", 41.5, 1.6e14, 96_000, 104_000, 3.0e9),
        ("combine", 33.8, 7.4e13, 88_000, 97_000, 2.2e9),
        ("evaluate", 77.0, 2.2e14, 301_000, 322_000, 2.4e9),
    ]
    keys = ("stage", "wall_seconds", "flops", "n_tokens", "n_padded_tokens", "peak_memory_bytes")
    method = ("train_flops", "select_flops", "inference_forward_passes", "adapter_bytes", "train_seconds")
    return {
        "stages": [dict(zip(keys, row, strict=True)) for row in rows],
        "methods": {
            "base": dict(zip(method, (0.0, 0.0, 1.0, 0, 0.0), strict=True)),
            "shared": dict(zip(method, (9.3e14, 0.0, 1.0, 1_900_000, 231.0), strict=True)),
            "ensemble": dict(zip(method, (1.14e15, 3.1e14, 4.0, 7_600_000, 285.0), strict=True)),
        },
    }


def make_environment() -> dict[str, Any]:
    model = {"name": "smollm2-135m", "n_parameters": 134_515_008, "dtype": "bfloat16", "fingerprint": "9f2c1e"}
    return {
        "package_version": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.1.0", "peft": "0.21.0",
        "platform": "Linux x86_64, 2 cores", "device": "cpu", "model": model, "created": "2026-11-22 03:12 UTC",
    }  # fmt: skip


def make_tasks(names: tuple[str, ...] = TASKS) -> dict[str, Any]:
    """What was read of every task."""
    tasks = [
        {
            "card": {"task": name},
            "kind": "verbalizer" if task < 5 else "options",
            "n_examples": {"train": 100 + task, "validation": 60, "test": ROWS[task]},
        }
        for task, name in enumerate(names)
    ]
    return {"tasks": tasks, "overlaps": [], "warnings": ["3 texts of 'rte' are <b>odd</b>"]}


def make_run(folder: Path, names: tuple[str, ...] = TASKS) -> Path:
    """Write a run folder that has come to its end."""
    make_planned_run(folder, names)
    write_json(folder / ENSEMBLE_FILE, {"task_names": names, "groups": GROUPS, **make_ensemble()})
    write_json(folder / RESULTS_FILE, make_results(names))
    write_json(folder / COSTS_FILE, make_costs())
    return folder


def make_planned_run(folder: Path, names: tuple[str, ...] = TASKS) -> Path:
    """Write a run folder that has come as far as its plan."""
    config = parse_config({"out": "runs/demo", "data": {"tasks": list(names)}})
    write_text(folder / CONFIG_FILE, dump_config(config))
    write_json(folder / ENVIRONMENT_FILE, make_environment())
    write_json(folder / TASKS_FILE, make_tasks(names))
    save_arrays(folder / AFFINITY_FILE, make_affinity())
    write_json(folder / PLAN_FILE, make_plan(names))
    return folder


def write_free_text(folder: Path, name: str) -> None:
    """Turn a task of a finished run into one of free text, which has no classes and no predicted accuracy."""
    plan, results = (read_json(folder / file) for file in (PLAN_FILE, RESULTS_FILE))
    for way in plan["predicted"].values():
        way["accuracy"][plan["task_names"].index(name)] = None
    for method in results["methods"].values():
        method["per_task"][name] |= {"kind": "sequence", "macro_f1": None, "majority": None}
    write_json(folder / PLAN_FILE, plan)
    write_json(folder / RESULTS_FILE, results)
