"""The sections on test scores, and on what a run with so many rows can and can't show."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from statistics import NormalDist

from ensemblelora.report.charts import draw_scores
from ensemblelora.report.document import Block, Bullets, Cell, Column, FigureRow, Row, Section, Table, Text
from ensemblelora.report.headline import describe_difference, method_label
from ensemblelora.report.plotting import N_GROUP_COLOURS
from ensemblelora.report.records import MethodScores, ResultsRecord, RunRecord, TaskScore
from ensemblelora.report.wording import count, format_interval, format_number, format_percent, join_names

__all__ = ["estimate_detectable_difference", "write_power", "write_scores"]

_MAX_PLOTTED_TASKS = 60
_POWER = 0.8


@dataclass(frozen=True)
class _Metric:
    """How one metric is written: its key, name, scale, decimals, and which way is better."""

    key: str
    name: str
    scale: float
    digits: int
    is_higher_better: bool


_METRICS = (
    _Metric("accuracy", "Accuracy, %", 100.0, 1, True),
    _Metric("macro_f1", "Macro-F1, %", 100.0, 1, True),
    _Metric("nll", "Loss (NLL, nats)", 1.0, 3, False),
)


def write_scores(run: RunRecord) -> Section | None:
    """Show accuracy, macro-F1 and loss of every method on every task's test rows, with intervals."""
    results = run.results
    if results is None or not results.methods:
        return None
    tasks = [name for name in run.plan.ordered_names if any(name in item.per_task for item in results.methods.values())]
    blocks: list[Block] = [Text(_introduce(run, results, tasks))]
    labels = {method: method_label(method) for method in results.methods}
    if 0 < len(tasks) <= _MAX_PLOTTED_TASKS and _has_metric(results, "accuracy"):
        caption = f"Bars: {run.config.evaluation.confidence:.0%} intervals. Dotted: share of the most frequent class."
        blocks.append(FigureRow((draw_scores(results.ordered_methods, tasks, labels),), caption))
    blocks += [_score_table(metric, run, results, tasks) for metric in _METRICS if _has_metric(results, metric.key)]
    if results.differences:
        blocks.append(_difference_list(run, results))
    if results.note:
        blocks.append(Text(results.note, is_quiet=True))
    return Section("results", "Test results", blocks)


def write_power(run: RunRecord) -> Section:
    """Say which differences a run of this size could show, and which it can't."""
    confidence = run.config.evaluation.confidence
    items = _powers_of_plan(run, confidence) + _powers_of_results(run, confidence)
    items.append(
        "The intervals say how much the choice of rows matters. They do not cover other training seeds, prompts or "
        "base models: one run can't show how much those would change."
    )
    blocks: list[Block] = [Bullets(tuple(items))]
    table = _power_table(run, confidence)
    return Section("power", "What a run of this size can and can't show", [*blocks, table] if table else blocks)


def estimate_detectable_difference(standard_error: float, *, confidence: float, power: float = _POWER) -> float:
    """Estimate the smallest true difference that a two-sided test finds with the given power.

    The usual normal approximation: (z_{(1 + confidence) / 2} + z_power) standard errors.

    Args:
        standard_error: Of the measured difference, in its unit.
        confidence: Of the interval that must exclude 0, in (0, 1).
        power: Probability that it does.

    Example:
        >>> round(estimate_detectable_difference(1.0, confidence=0.95), 2)
        2.8
    """
    normal = NormalDist()
    return (normal.inv_cdf((1 + confidence) / 2) + normal.inv_cdf(power)) * standard_error


def _has_metric(results: ResultsRecord, key: str) -> bool:
    scores = (score for method in results.methods.values() for score in method.per_task.values())
    return any(getattr(score, key) is not None for score in scores)


def _introduce(run: RunRecord, results: ResultsRecord, tasks: list[str]) -> str:
    rows = [
        max(item.per_task[name].n_examples for item in results.methods.values() if name in item.per_task)
        for name in tasks
    ]
    text = f"{count(sum(rows), 'test row')} of {count(len(tasks), 'task')}, seen by no stage before this one."
    chance = [name for name in tasks if name in results.chance_tasks]
    if chance:
        text += (
            f" On {join_names(chance)} no method is above what always answering the most frequent class gives: they "
            "are marked “at chance”, have no best method, and are left out of the second mean."
        )
    if any(score.kind == "sequence" for item in results.methods.values() for score in item.per_task.values()):
        text += " For free-text tasks, accuracy is the share of exact matches."
    return text


def _score_table(metric: _Metric, run: RunRecord, results: ResultsRecord, tasks: list[str]) -> Table:
    methods = results.ordered_methods
    columns = [Column("Task", is_number=False), *(Column(method_label(method)) for method in methods)]
    rows = [_score_row(metric, name, run, results) for name in tasks]
    if metric.key == "accuracy":
        columns.insert(1, Column("Most frequent class"))
    rows.append(_mean_row(metric, f"Mean of {len(tasks)}", methods, tasks))
    able = [name for name in tasks if name not in results.chance_tasks]
    if 0 < len(able) < len(tasks):
        rows.append(_mean_row(metric, f"Mean of {len(able)} above chance", methods, able))
    arrow = "higher is better" if metric.is_higher_better else "lower is better"
    note = f"{arrow.capitalize()}; with {run.config.evaluation.confidence:.0%} intervals; the best of a row in bold."
    return Table(metric.name, tuple(columns), tuple(rows), note)


def _score_row(metric: _Metric, task: str, run: RunRecord, results: ResultsRecord) -> Row:
    is_at_chance = task in results.chance_tasks
    scores = [item.per_task.get(task) for item in results.ordered_methods.values()]
    best = _best_value(metric, [None if score is None else getattr(score, metric.key) for score in scores])
    marks_best = not (is_at_chance and metric.is_higher_better)
    cells = [Cell(task, colour=run.plan.group_by_name[task] % N_GROUP_COLOURS, tag="at chance" if is_at_chance else "")]
    if metric.key == "accuracy":
        majority = next((score.majority for score in scores if score and score.majority is not None), None)
        cells.append(Cell(format_number(None if majority is None else 100 * majority, 1)))
    cells += [_score_cell(metric, score, best if marks_best else None) for score in scores]
    return Row(tuple(cells))


def _score_cell(metric: _Metric, score: TaskScore | None, best: float | None) -> Cell:
    value = None if score is None else getattr(score, metric.key)
    if score is None or value is None:
        return Cell(format_number(None))
    low, high = getattr(score, f"{metric.key}_low"), getattr(score, f"{metric.key}_high")
    interval = format_interval(low, high, scale=metric.scale, digits=metric.digits)
    return Cell(format_number(metric.scale * value, metric.digits), interval, is_best=value == best)


def _mean_row(metric: _Metric, label: str, methods: dict[str, MethodScores], tasks: Collection[str]) -> Row:
    means = [scores.mean(metric.key, tasks) for scores in methods.values()]
    best = _best_value(metric, means)
    cells = [Cell(label)]
    if metric.key == "accuracy":
        majority = next(iter(methods.values())).mean("majority", tasks)
        cells.append(Cell(format_number(None if majority is None else 100 * majority, 1)))
    cells += [
        Cell(
            format_number(None if mean is None else metric.scale * mean, metric.digits),
            is_best=mean is not None and mean == best,
        )
        for mean in means
    ]
    return Row(tuple(cells), is_summary=True)


def _best_value(metric: _Metric, values: list[float | None]) -> float | None:
    """Return the best of at least two values; one method alone is not the best of anything."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    return max(known) if metric.is_higher_better else min(known)


def _difference_list(run: RunRecord, results: ResultsRecord) -> Bullets:
    names = {metric.key: metric.name.split(",")[0].split(" (")[0].lower() for metric in _METRICS}
    names["macro_f1"] = "macro-F1"
    items = [
        f"{method_label(item.a)} against {method_label(item.b).lower()}, {names.get(item.metric, item.metric)}"
        f"{'' if item.task is None else f' on {item.task}'}: "
        f"{describe_difference(item, run.config.evaluation.confidence)}."
        for item in results.differences
        if item.difference is not None
    ]
    return Bullets(tuple(items))


def _powers_of_plan(run: RunRecord, confidence: float) -> list[str]:
    chosen = next((point for point in run.plan.curve if point.n_groups == len(run.plan.groups)), None)
    errors = [point.gain_se for point in run.plan.curve if point.n_groups > 1 and point.gain_se]
    error = chosen.gain_se if chosen and chosen.gain_se else min(errors, default=None)
    if error is None:
        return []
    smallest = estimate_detectable_difference(error, confidence=confidence)
    return [
        f"Planning: with these validation rows, a gain in predicted loss under {format_number(smallest)} would be "
        f"missed in more than {1 - _POWER:.0%} of runs."
    ]


def _powers_of_results(run: RunRecord, confidence: float) -> list[str]:
    results = run.results
    if results is None:
        return ["Nothing is trained or tested yet: everything above is a prediction."]
    items = []
    rival = "base" if len(run.plan.groups) == 1 else "shared"
    difference = results.find_difference("ensemble", rival, "accuracy")
    if difference is not None and difference.low is not None and difference.high is not None:
        error = _standard_error(difference.low, difference.high, confidence)
        smallest = estimate_detectable_difference(error, confidence=confidence)
        items.append(
            f"Testing: a true difference in mean accuracy of {format_number(100 * smallest, 1)} points between the "
            f"ensemble and {method_label(rival).lower()} would be found in {_POWER:.0%} of runs of this size, a "
            "smaller one less often."
        )
    chance = [name for name in run.plan.ordered_names if name in results.chance_tasks]
    if chance:
        items.append(
            f"{count(len(chance), 'task')} at chance ({join_names(chance)}) can't say anything about grouping: nothing "
            "was learnt there that sharing could help or harm."
        )
    return items


def _power_table(run: RunRecord, confidence: float) -> Table | None:
    if run.results is None or not {"shared", "ensemble"} <= set(run.results.methods):
        return None
    ours, theirs = (run.results.methods[method].per_task for method in ("ensemble", "shared"))
    groups = run.plan.group_by_name
    rows = []
    for name in run.plan.ordered_names:
        errors = [_accuracy_error(scores.get(name), confidence) for scores in (ours, theirs)]
        # Without a single miss the interval has no width, which says that rows are few, not that all is visible.
        if not all(errors):
            continue
        error = math.hypot(*(error or 0.0 for error in errors))
        smallest = estimate_detectable_difference(error, confidence=confidence)
        cells = (
            Cell(name, colour=groups[name] % N_GROUP_COLOURS),
            Cell(f"{ours[name].n_examples:,}", _describe_groups(ours[name])),
            Cell(format_percent(ours[name].accuracy)),
            Cell(f"{format_number(100 * smallest, 1)} points", share=min(1.0, smallest)),
        )
        rows.append(Row(cells))
    if not rows:
        return None
    columns = (
        Column("Task", is_number=False),
        Column("Test rows"),
        Column("Accuracy"),
        Column("Smallest visible difference"),
    )
    note = (
        f"Difference in accuracy between the ensemble and one adapter for all that would be found in {_POWER:.0%} of "
        "runs if the two erred independently; where they err on the same rows, a smaller one is visible."
    )
    return Table("What one task's test rows could show", columns, tuple(rows), note)


def _describe_groups(score: TaskScore) -> str:
    """Say how many independent units the rows fall into, where that differs."""
    if score.n_groups is None or score.n_groups == score.n_examples:
        return ""
    return f"in {count(score.n_groups, 'group')}"


def _accuracy_error(score: TaskScore | None, confidence: float) -> float | None:
    if score is None or score.accuracy_low is None or score.accuracy_high is None:
        return None
    return _standard_error(score.accuracy_low, score.accuracy_high, confidence)


def _standard_error(low: float, high: float, confidence: float) -> float:
    return (high - low) / (2 * NormalDist().inv_cdf((1 + confidence) / 2))
