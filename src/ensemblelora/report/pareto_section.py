"""The section on error against cost: what each method of a run gives for what it takes."""

from __future__ import annotations

import math
from collections.abc import Callable

from ensemblelora.report.document import FigureRow, Section
from ensemblelora.report.headline import method_label
from ensemblelora.report.pareto import BYTES, FLOPS, PASSES, CostAxis, ErrorKind, Point, draw_front
from ensemblelora.report.records import MethodCosts, MethodScores, RunRecord

__all__ = ["AXES", "choose_kind", "list_points", "measure_mean", "write_pareto"]

AXES: tuple[tuple[CostAxis, Callable[[MethodCosts], float | None]], ...] = (
    (FLOPS, lambda costs: (costs.train_flops or 0.0) + (costs.select_flops or 0.0)),
    (PASSES, lambda costs: costs.inference_forward_passes),
    (BYTES, lambda costs: costs.adapter_bytes),
)


def write_pareto(run: RunRecord) -> Section | None:
    """Draw mean error, or loss where no task has classes, against each kind of cost."""
    points = {axis.name: list_points(run, read) for axis, read in AXES}
    kind = choose_kind(run)
    figures = [draw_front(axis, points[axis.name], kind, names_all=True) for axis, _ in AXES if points[axis.name]]
    if not any(len(shown) > 1 for shown in points.values()):
        return None
    caption = (
        "Lower and further left is better. Dotted: what no other method beats in both. Bars: intervals over test rows, "
        "tasks taken as independent. What costs nothing of a kind is left out of that picture."
    )
    return Section("pareto", "Error against cost", [FigureRow(tuple(figures), caption)])


def list_points(run: RunRecord, read: Callable[[MethodCosts], float | None], *, prefix: str = "") -> list[Point]:
    """Every method that has a score and costs something.

    Args:
        run: A finished run.
        read: Takes one kind of cost.
        prefix: Before the methods' names, such as a run's own.
    """
    if run.results is None or run.costs is None:
        return []
    kind, points = choose_kind(run), []
    for method, scores in run.results.ordered_methods.items():
        costs = run.costs.methods.get(method)
        cost = None if costs is None else read(costs)
        score = measure_mean(scores, "accuracy" if kind == "error" else "nll")
        if cost and score is not None:
            label = f"{prefix}{method_label(method)}"
            points.append(Point.of_score(label, label, cost, score, kind, is_ours=method == "ensemble"))
    return points


def measure_mean(scores: MethodScores, metric: str) -> tuple[float, float, float] | None:
    """Lower end, value and upper end of the mean over tasks of a metric; none where no task has it.

    Tasks have test rows of their own, so that half-widths add up in squares.
    """
    found = [
        (value, getattr(score, f"{metric}_low"), getattr(score, f"{metric}_high"))
        for score in scores.per_task.values()
        if (value := getattr(score, metric)) is not None
    ]
    if not found:
        return None
    mean = sum(value for value, _, _ in found) / len(found)
    halves = [0.0 if low is None or high is None else (high - low) / 2 for _, low, high in found]
    half = math.hypot(*halves) / len(found)
    return mean - half, mean, mean + half


def choose_kind(*runs: RunRecord) -> ErrorKind:
    """Errors where some task of some run has an accuracy, else losses."""
    methods = [scores for run in runs if run.results is not None for scores in run.results.methods.values()]
    has_accuracy = any(score.accuracy is not None for scores in methods for score in scores.per_task.values())
    return "error" if has_accuracy else "loss"
