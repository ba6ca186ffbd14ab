"""The sections of a page on two runs, as the values that a run's report is made of. No torch.

In: both runs' records, and how they differ. Out: sections. Differences are B less A throughout.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from ensemblelora.contrast.measure import Contrast, Score
from ensemblelora.report.cells import task_cell
from ensemblelora.report.differences import TaskDifference, draw_differences
from ensemblelora.report.document import (
    Block,
    Bullets,
    Cell,
    Column,
    Figure,
    FigureRow,
    Fold,
    Row,
    Section,
    Table,
    Text,
)
from ensemblelora.report.headline import method_label
from ensemblelora.report.pareto import draw_front
from ensemblelora.report.pareto_section import AXES, choose_kind, list_points
from ensemblelora.report.records import Prediction, RunRecord
from ensemblelora.report.wording import (
    NOTHING,
    count,
    format_flops,
    format_interval,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
    format_signed,
    join_names,
)

__all__ = [
    "describe_score",
    "write_again",
    "write_costs",
    "write_groups",
    "write_limits",
    "write_means",
    "write_settings",
    "write_tasks",
]

_MAX_SETTING = 120
_TITLES = {"accuracy": "Accuracy, %", "nll": "Loss (NLL, nats)"}
Runs = tuple[RunRecord, RunRecord]


def describe_score(score: Score, confidence: float) -> str:
    """Write a difference with its interval."""
    scale, digits = _scale(score.metric)
    unit = " points" if score.metric == "accuracy" else " nats"
    change = f"{format_signed(scale * score.difference, digits)}{unit}"
    interval = format_interval(score.low, score.high, scale=scale, digits=digits)
    return f"{change} ({confidence:.0%} interval {interval})" if interval else change


def write_settings(runs: Runs, found: Contrast) -> Section:
    """List settings, versions and tasks that differ."""
    blocks: list[Block] = []
    for name, missing in zip(found.names, found.only, strict=True):
        if missing:
            blocks.append(Text(f"Only {name} has {join_names(list(missing), 12)}: left out of all that follows."))
    rows = tuple(Row((Cell(one.name), *map(_setting_cell, (one.a, one.b)))) for one in found.settings)
    if rows:
        columns = (Column("Setting or version", is_number=False), *_heads(found, is_number=False))
        blocks.append(Table("What was asked or made differently", columns, rows))
    else:
        blocks.append(Text("Settings, seed, model and versions are the same."))
    return Section("settings", "What was different", blocks)


def write_means(runs: Runs, found: Contrast) -> Section | None:
    """Show every method's mean in both runs, and the difference."""
    scores = [one for one in found.scores if one.task is None]
    if not scores:
        return None
    tables = []
    for metric, title in _TITLES.items():
        rows = tuple(_mean_row(one) for one in scores if one.metric == metric)
        if rows:
            columns = (Column("Method", is_number=False), *_heads(found), Column("B less A"))
            arrow = "Higher" if metric == "accuracy" else "Lower"
            note = (
                f"{arrow} is better; a star marks the better run where the interval leaves out 0. {_tell_rows(found)}"
            )
            tables.append(Table(f"{title}: means over tasks", columns, rows, note))
    return Section("means", "Both runs' means", tables)


def write_tasks(runs: Runs, found: Contrast) -> Section | None:
    """Show what one run's ensemble gave on every task less what the other's gave."""
    blocks: list[Block] = []
    groups = runs[0].plan.group_by_name
    for metric, title in _TITLES.items():
        scores = [one for one in found.scores if one.method == "ensemble" and one.metric == metric and one.task]
        if not scores:
            continue
        scale, digits = _scale(metric)
        if not blocks:
            blocks.append(FigureRow((_draw_tasks(scores, groups, metric),), _CAPTION))
        rows = tuple(_task_row(one, groups[one.task or ""], scale, digits) for one in scores)
        columns = (Column("Task", is_number=False), *_heads(found), Column("B less A"), Column("Rows compared"))
        note = "Marked where the interval leaves out 0; of many tasks a few do by chance alone."
        blocks.append(Table(f"{title}: the ensemble, task by task", columns, rows, note))
    return Section("tasks", "Task by task", blocks) if blocks else None


_CAPTION = (
    "The ensemble of B less that of A, with intervals; marks are filled where these leave out 0. Colours and signs: "
    "the groups of A."
)


def write_groups(runs: Runs, found: Contrast) -> Section:
    """Show which group each task has in both plans, what each plan expected, and how alike the affinities are."""
    blocks: list[Block] = []
    if found.share_alike is not None:
        text = f"Of all pairs of tasks, {format_percent(found.share_alike, 0)} are treated alike: together in both, or "
        text += "apart in both."
        if found.affinity_correlation is not None:
            alike = format_number(found.affinity_correlation, 2)
            text += f" The affinities of pairs, levels taken off, have a rank correlation of {alike}."
        blocks.append(Text(text))
    letters = [run.plan.group_by_name for run in runs]
    order = [name for name in runs[0].plan.ordered_names if name in found.tasks]
    rows = tuple(Row((Cell(name), *(task_cell("", groups[name]) for groups in letters))) for name in order)
    columns = (Column("Task", is_number=False), *_heads(found, is_number=False))
    blocks.append(Table("Groups", columns, rows, "Letters are each plan's own: what matters is who shares one."))
    if (table := _prediction_table(runs, found)) is not None:
        blocks.append(table)
    return Section("groups", "The two plans", blocks)


def write_costs(runs: Runs, found: Contrast) -> Section | None:
    """Show what both runs took, and error against cost of all their methods."""
    if any(run.costs is None for run in runs):
        return None
    blocks: list[Block] = [_cost_table(runs, found)]
    figures = []
    for axis, read in AXES[:2]:
        points = [
            point
            for letter, run in zip("AB", runs, strict=True)
            for point in list_points(run, read, prefix=f"{letter}: ")
        ]
        if len(points) > 1:
            figures.append(draw_front(axis, points, choose_kind(*runs)))
    if figures:
        blocks.append(FigureRow(tuple(figures), "Dotted: what no other way of either run beats in both."))
    return Section("costs", "What both cost", blocks)


def write_limits(runs: Runs, found: Contrast) -> Section:
    """Say what two runs can't show."""
    items = [
        "Each run is one training: what another seed would have given is in no interval. ensemblelora compare trains "
        "with several seeds.",
        "Test rows that were looked at to choose between runs are no longer unseen: the better of many runs looks "
        "better than it is.",
    ]
    scores = [one for one in found.scores if one.task is not None]
    if any(not one.is_paired for one in scores):
        items.append(
            "Some differences are of two samples taken as unrelated, since a run did not keep what each test row gave, "
            "or tested other rows: their intervals are wider than paired ones would be."
        )
    if any(one.name.startswith("model.") for one in found.settings):
        items.append(
            "The base models differ. Losses are over each model's own tokens; of free text, they can't be compared."
        )
    return Section("limits", "What this can't say", [Bullets(tuple(items))])


def write_again(folders: tuple[Path, Path]) -> Section:
    """Say how to make the page again."""
    command = shlex.join(["ensemblelora", "report", *map(str, folders)])
    return Section("again", "Make it again", [Fold(command, language="sh")])


def _heads(found: Contrast, *, is_number: bool = True) -> tuple[Column, Column]:
    first, second = (Column(f"{letter}: {name}", is_number) for letter, name in zip("AB", found.names, strict=True))
    return first, second


def _scale(metric: str) -> tuple[float, int]:
    return (100.0, 1) if metric == "accuracy" else (1.0, 3)


def _setting_cell(value: str | None) -> Cell:
    if value is None:
        return Cell(NOTHING)
    return Cell(value if len(value) <= _MAX_SETTING else f"{value[: _MAX_SETTING - 1]}…")


def _tell_rows(found: Contrast) -> str:
    paired = [one for one in found.scores if one.task is not None and one.is_paired and one.method == "ensemble"]
    if not paired:
        return f"{found.confidence:.0%} intervals of two unrelated samples."
    metric = paired[0].metric
    n_rows = sum(one.n_rows for one in paired if one.metric == metric)
    return f"{found.confidence:.0%} intervals over the {count(n_rows, 'test row')} that both runs scored, row by row."


def _mean_row(score: Score) -> Row:
    scale, digits = _scale(score.metric)
    is_clear = score.low is not None and score.high is not None and not score.low <= 0 <= score.high
    is_b_better = (score.difference > 0) == (score.metric == "accuracy")
    cells = [
        Cell(format_number(scale * value, digits), is_best=is_clear and is_best)
        for value, is_best in ((score.a, not is_b_better), (score.b, is_b_better))
    ]
    return Row((Cell(method_label(score.method)), *cells, _difference_cell(score, scale, digits)))


def _task_row(score: Score, group: int, scale: float, digits: int) -> Row:
    values = [Cell(format_number(scale * value, digits)) for value in (score.a, score.b)]
    rows = Cell(f"{score.n_rows:,}" if score.is_paired else "unrelated")
    return Row((task_cell(score.task or "", group), *values, _difference_cell(score, scale, digits), rows))


def _difference_cell(score: Score, scale: float, digits: int) -> Cell:
    text = format_signed(scale * score.difference, digits)
    interval = format_interval(score.low, score.high, scale=scale, digits=digits)
    if score.low is None or score.high is None or score.low <= 0 <= score.high:
        return Cell(text, interval)
    return Cell(text, interval, tag="better" if (score.low > 0) == (score.metric == "accuracy") else "worse")


def _draw_tasks(scores: list[Score], groups: dict[str, int], metric: str) -> Figure:
    scale, digits = _scale(metric)
    rows = [
        TaskDifference(
            one.task or "",
            groups[one.task or ""],
            scale * one.difference,
            *(None if end is None else scale * end for end in (one.low, one.high)),
        )
        for one in scores
    ]
    what = "accuracy, points" if metric == "accuracy" else "loss"
    return draw_differences("tasks", rows, f"Difference in {what}, B less A", digits=digits)


def _prediction_table(runs: Runs, found: Contrast) -> Table | None:
    ways = {
        "The plan": "plan",
        "One adapter for all": "shared",
        "One adapter per task": "singles",
        "Base model": "base",
    }
    rows = []
    for label, way in ways.items():
        predicted: list[Prediction] = [getattr(run.plan.predicted, way) for run in runs]
        if any(one.mean_nll is not None for one in predicted):
            rows.append(Row((Cell(label), *map(_predicted_cell, predicted))))
    if not rows:
        return None
    note = "Mean validation loss over each run's own tasks, ± one standard error, before any training."
    return Table("What each plan predicted", (Column("Training", is_number=False), *_heads(found)), tuple(rows), note)


def _predicted_cell(way: Prediction) -> Cell:
    return Cell(format_number(way.mean_nll), f"± {format_number(way.mean_nll_se)}" if way.mean_nll_se else "")


def _cost_table(runs: Runs, found: Contrast) -> Table:
    rows = tuple(_list_costs(runs))
    columns = (Column("In all", is_number=False), *_heads(found), Column("B over A"))
    return Table(
        "Costs of the whole runs", columns, rows, "FLOPs by formula; time as measured, of stages not repeated."
    )


def _list_costs(runs: Runs) -> Iterator[Row]:
    for label, field, write in (("Wall time", "wall_seconds", format_seconds), ("FLOPs", "flops", format_flops)):
        totals = [
            sum(getattr(stage, field) or 0.0 for stage in (run.costs.stages if run.costs else ())) for run in runs
        ]
        ratio = f"{format_ratio(totals[1] / totals[0])}\u00d7" if totals[0] else NOTHING
        yield Row((Cell(label), *(Cell(write(total)) for total in totals), Cell(ratio)))
