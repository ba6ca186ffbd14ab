"""The section on test scores: every method on every task's test rows, and the differences between methods."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ensemblelora.report.cells import task_cell
from ensemblelora.report.chance import Chance, judge_chance
from ensemblelora.report.charts import draw_scores
from ensemblelora.report.differences import TaskDifference, draw_differences
from ensemblelora.report.document import Block, Cell, Column, FigureRow, Row, Section, Table, Text
from ensemblelora.report.headline import find_rival, method_label
from ensemblelora.report.records import Difference, MethodScores, ResultsRecord, RunRecord, TaskScore
from ensemblelora.report.wording import (
    count,
    describe_coverage,
    format_interval,
    format_number,
    format_signed,
)

__all__ = ["write_scores"]

_MAX_PLOTTED_TASKS = 60


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
    chance = judge_chance(results, tasks)
    blocks: list[Block] = [Text(_introduce(run, results, tasks, chance))]
    blocks += _mean_difference_tables(run, results)
    labels = {method: method_label(method) for method in results.methods}
    if 0 < len(tasks) <= _MAX_PLOTTED_TASKS and _has_metric(results, "accuracy"):
        caption = f"Bars: {run.config.evaluation.confidence:.0%} intervals. Dotted: share of the most frequent class."
        blocks.append(FigureRow((draw_scores(results.ordered_methods, tasks, labels),), caption))
    elif (picture := _draw_many(run, results, tasks)) is not None:
        blocks.append(picture)
    metrics = [metric for metric in _METRICS if _has_metric(results, metric.key)]
    blocks += [_score_table(metric, run, results, tasks, chance) for metric in metrics]
    table = _difference_table(run, results, tasks)
    if table:
        blocks.append(table)
    if results.note:
        blocks.append(Text(results.note, is_quiet=True))
    return Section("results", "Test results", blocks)


def _draw_many(run: RunRecord, results: ResultsRecord, tasks: list[str]) -> FigureRow | None:
    """What many tasks gained against the first rival, where a line a task and method could not be read."""
    metric = next((one for one in (_METRICS[0], _METRICS[2]) if _has_metric(results, one.key)), None)
    if metric is None:
        return None
    rival = find_rival(run.plan)
    rows = [
        TaskDifference(name, run.plan.group_by_name[name], item.difference, item.low, item.high)
        for name in tasks
        if (item := results.find_difference("ensemble", rival, metric.key, name)) is not None
        and item.difference is not None
    ]
    if not rows:
        return None
    what = "accuracy" if metric.key == "accuracy" else "loss"
    figure = draw_differences("differences", rows, f"Difference in {what}", digits=3)
    less = f"The ensemble less {method_label(rival).lower()}"
    caption = f"{less}, with intervals; marks are filled where these leave out 0."
    return FigureRow((figure,), caption)


def _has_metric(results: ResultsRecord, key: str) -> bool:
    scores = (score for method in results.methods.values() for score in method.per_task.values())
    return any(getattr(score, key) is not None for score in scores)


def _introduce(run: RunRecord, results: ResultsRecord, tasks: list[str], chance: Chance) -> str:
    rows = [
        max(item.per_task[name].n_examples for item in results.methods.values() if name in item.per_task)
        for name in tasks
    ]
    text = f"{count(sum(rows), 'test row')} of {count(len(tasks), 'task')}, seen by no stage before this one."
    if len(run.plan.groups) == 1 and {"shared", "ensemble"} <= set(results.methods):
        boosted = any(member.kind == "booster" for member in run.ensemble.members) if run.ensemble else False
        text += f" The plan is one adapter for all: the ensemble is that adapter{' with its boosters' * boosted}."
    doubtful = [name for name in tasks if name in chance]
    if doubtful:
        left_out = "; the second mean leaves them out" if len(doubtful) < len(tasks) else ""
        text += f" {' '.join(chance.tell())} These tasks are marked and have no best method{left_out}."
    if any(score.kind == "sequence" for item in results.methods.values() for score in item.per_task.values()):
        text += (
            " For free-text tasks, accuracy is the share of exact matches; they have no classes, and a dash stands for "
            "what needs them."
        )
    return text


def _score_table(metric: _Metric, run: RunRecord, results: ResultsRecord, tasks: list[str], chance: Chance) -> Table:
    methods = results.ordered_methods
    columns = [Column("Task", is_number=False), *(Column(method_label(method)) for method in methods)]
    rows = [_score_row(metric, name, run, results, chance) for name in tasks]
    if metric.key == "accuracy":
        columns.append(Column("Most frequent class"))
    rows.append(_mean_row(metric, f"Mean of {len(tasks)}", methods, tasks))
    able = [name for name in tasks if name not in chance]
    if 0 < len(able) < len(tasks):
        rows.append(_mean_row(metric, f"Mean of {len(able)} unmarked", methods, able))
    arrow = "higher is better" if metric.is_higher_better else "lower is better"
    kind = "Wilson's, one observation per group of rows" if metric.key == "accuracy" else "by bootstrap of the rows"
    confidence = f"{run.config.evaluation.confidence:.0%} intervals"
    note = f"{arrow.capitalize()}; with {confidence} ({kind}); a star marks the best of a row."
    return Table(metric.name, tuple(columns), tuple(rows), note)


def _score_row(metric: _Metric, task: str, run: RunRecord, results: ResultsRecord, chance: Chance) -> Row:
    scores = [item.per_task.get(task) for item in results.ordered_methods.values()]
    best = _best_value(metric, [None if score is None else getattr(score, metric.key) for score in scores])
    marks_best = not (task in chance and metric.is_higher_better)
    cells = [task_cell(task, run.plan.group_by_name[task], tag=chance.mark(task))]
    cells += [_score_cell(metric, score, best if marks_best else None) for score in scores]
    if metric.key == "accuracy":
        majority = next((score.majority for score in scores if score and score.majority is not None), None)
        cells.append(Cell(format_number(None if majority is None else 100 * majority, 1)))
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
    # Free text has no classes: a mean over fewer tasks than the label says must say so.
    n_known = max((scores.count(metric.key, tasks) for scores in methods.values()), default=0)
    cells = [Cell(label, describe_coverage(n_known, len(tasks)))]
    for mean in means:
        text = format_number(None if mean is None else metric.scale * mean, metric.digits)
        cells.append(Cell(text, is_best=mean is not None and mean == best))
    if metric.key == "accuracy":
        majority = next(iter(methods.values())).mean("majority", tasks)
        cells.append(Cell(format_number(None if majority is None else 100 * majority, 1)))
    return Row(tuple(cells), is_summary=True)


def _best_value(metric: _Metric, values: list[float | None]) -> float | None:
    """Return the best of at least two values; among equals, as alone, no method is the best of anything."""
    known = [value for value in values if value is not None]
    if len(set(known)) < 2:
        return None
    return max(known) if metric.is_higher_better else min(known)


def _mean_difference_tables(run: RunRecord, results: ResultsRecord) -> Iterator[Table]:
    """Compare methods in the mean over tasks, a pair a line, on the same rows; pairs without the ensemble folded."""
    others = sorted((name for name in results.ordered_methods if name != "ensemble"), key=lambda name: name != "shared")
    own = [("ensemble", other) for other in others]
    rest = list(itertools.combinations(reversed([name for name in results.ordered_methods if name != "ensemble"]), 2))
    caption, note = "Differences in the mean over tasks", "intervals; marked where they leave out 0."
    for summary, pairs in (("", own), ("Differences between the other methods", rest)):
        found = {pair: [results.find_difference(*pair, metric.key) for metric in _METRICS] for pair in pairs}
        metrics = [metric for place, metric in enumerate(_METRICS) if any(items[place] for items in found.values())]
        if not metrics:
            continue
        rows = tuple(
            Row(
                (
                    Cell(f"{method_label(a)} less {method_label(b).lower()}"),
                    *(_difference_cell(*both) for both in zip(_METRICS, items, strict=True) if both[0] in metrics),
                )
            )
            for (a, b), items in found.items()
            if any(items)
        )
        columns = (Column("Methods", is_number=False), *(Column(_name_difference(metric)) for metric in metrics))
        yield Table(
            f"{caption}, without the ensemble" if summary else caption,
            columns,
            rows,
            f"With {run.config.evaluation.confidence:.0%} {note}",
            summary,
        )


def _name_difference(metric: _Metric) -> str:
    return metric.name.replace(", %", ", points")


def _difference_table(run: RunRecord, results: ResultsRecord, tasks: list[str]) -> Table | None:
    """Compare the ensemble with its first rival task by task, on the same rows."""
    groups = run.plan.group_by_name
    rival = find_rival(run.plan)
    found = {
        name: [results.find_difference("ensemble", rival, metric.key, name) for metric in _METRICS] for name in tasks
    }
    metrics = [metric for place, metric in enumerate(_METRICS) if any(items[place] for items in found.values())]
    if not metrics:
        return None
    rows = tuple(
        Row(
            (
                task_cell(name, groups[name]),
                *(
                    _difference_cell(metric, item)
                    for metric, item in zip(_METRICS, items, strict=True)
                    if metric in metrics
                ),
            )
        )
        for name, items in found.items()
    )
    columns = (Column("Task", is_number=False), *(Column(_name_difference(metric)) for metric in metrics))
    note = "Marked where the interval leaves out 0; of many tasks a few do by chance alone, so the means weigh more."
    return Table(f"Ensemble minus {method_label(rival).lower()}, task by task", columns, rows, note)


def _difference_cell(metric: _Metric, item: Difference | None) -> Cell:
    if item is None or item.difference is None:
        return Cell(format_number(None))
    text = format_signed(metric.scale * item.difference, metric.digits)
    interval = format_interval(item.low, item.high, scale=metric.scale, digits=metric.digits)
    if item.low is None or item.high is None or item.low <= 0 <= item.high:
        return Cell(text, interval)
    return Cell(text, interval, tag="better" if (item.low > 0) == metric.is_higher_better else "worse")
