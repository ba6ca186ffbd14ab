"""The section on who helps whom: what each task is predicted to gain by each other in its training set.

In: the directed affinity T, whose row i holds task i's mean score over the training sets that hold i and j, and the
scores of each task alone. Out: T_ij less task i's score alone. This is another question than grouping (docs/paper.md):
a task that gains by everything is no reason to train it with anything in particular.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ensemblelora.affinity import choose_subset_size
from ensemblelora.report.cells import task_cell
from ensemblelora.report.document import Block, Cell, Column, Figure, FigureRow, Legend, Row, Section, Table, Text
from ensemblelora.report.heatmaps import MAX_LABELLED_TASKS, draw_helping
from ensemblelora.report.records import PlanRecord, RunRecord
from ensemblelora.report.wording import count, format_number, format_percent, format_signed, group_letter

__all__ = ["measure_gains", "write_helping"]

Matrix = npt.NDArray[np.float64]


def write_helping(run: RunRecord) -> Section | None:
    """Show what each task is predicted to gain by each other, against training alone."""
    gains = measure_gains(run)
    if gains is None:
        return None
    plan = run.plan
    drawn, figure = _draw(gains, plan)
    known = np.isfinite(gains)
    largest = float(np.nanmax(np.abs(drawn)))
    legend = Legend(f"harms {format_signed(-largest)}", f"{format_signed(largest)} helps", "diverging")
    asked = run.config.affinity.subset_size
    sets = f"training sets of {count(choose_subset_size(plan.n_tasks, asked), 'task')}" if asked else "training sets"
    unit = "points of accuracy" if run.config.affinity.score == "accuracy" else "nats of loss saved"
    caption = (
        f"Rows gain, columns help, in {unit}: the task's mean score over the {sets} that hold both, less its score "
        "when it trains alone. Predicted before any training, on validation rows; it has no interval, so read it as an "
        "order."
    )
    share = float((gains[known] > 0).mean())
    text = (
        f"{format_percent(share, 0)} of the {count(int(known.sum()), 'directed pair')} are predicted to gain. "
        f"{_name_extremes(gains, plan)} Help need not be mutual: of two tasks one may gain and the other lose."
    )
    blocks: list[Block] = [Text(text), FigureRow((figure,), caption, legend), _partner_table(gains, plan)]
    return Section("helping", "Who helps whom", blocks)


def measure_gains(run: RunRecord) -> Matrix | None:
    """Return ``(n, n)`` what row's task gains by column's, NaN on the diagonal; none where the run does not say."""
    if run.affinity is None or run.affinity.directed is None or run.plan.n_tasks < 2:
        return None
    singles = run.plan.predicted.singles
    is_accuracy = run.config.affinity.score == "accuracy"
    values = singles.accuracy if is_accuracy else singles.nll
    if len(values) != run.plan.n_tasks or any(value is None for value in values):
        return None
    alone = np.array(values, dtype=np.float64) * (1 if is_accuracy else -1)
    gains = run.affinity.directed - alone[:, None]
    np.fill_diagonal(gains, np.nan)
    return gains if np.isfinite(gains).any() else None


def _draw(gains: Matrix, plan: PlanRecord) -> tuple[Matrix, Figure]:
    """Draw tasks, or where these are many groups; return what was drawn, too."""
    if plan.n_tasks <= MAX_LABELLED_TASKS:
        return gains, draw_helping(gains, plan.task_names, plan.groups)
    means = _average_by_group(gains, plan)
    letters = [f"group {group_letter(group)}" for group in range(len(plan.groups))]
    return means, draw_helping(means, letters, [(group,) for group in range(len(letters))], noun="group")


def _average_by_group(gains: Matrix, plan: PlanRecord) -> Matrix:
    """Average what tasks of a row's group gain by those of a column's; NaN where that is one task with itself."""
    means = np.full((len(plan.groups), len(plan.groups)), np.nan)
    for g, helped in enumerate(plan.groups):
        for h, helpers in enumerate(plan.groups):
            block = gains[np.ix_(helped, helpers)]
            if np.isfinite(block).any():
                means[g, h] = np.nanmean(block)
    return means


def _name_extremes(gains: Matrix, plan: PlanRecord) -> str:
    names = plan.task_names
    best, worst = (divmod(int(place), len(names)) for place in (np.nanargmax(gains), np.nanargmin(gains)))
    return (
        f"Most by a partner: {names[best[0]]} by {names[best[1]]} ({format_signed(gains[best])}); least: "
        f"{names[worst[0]]} by {names[worst[1]]} ({format_signed(gains[worst])})."
    )


def _partner_table(gains: Matrix, plan: PlanRecord) -> Table:
    groups = plan.group_by_name
    order = [task for group in plan.groups for task in group]
    rows = tuple(_partner_row(gains, plan, task, groups[plan.task_names[task]]) for task in order)
    columns = (
        Column("Task", is_number=False),
        Column("Best partner", is_number=False),
        Column("Worst partner", is_number=False),
        Column("Mean of all"),
        Column("Gains by"),
    )
    return Table("Each task's partners", columns, rows, summary="The best and the worst partner of every task")


def _partner_row(gains: Matrix, plan: PlanRecord, task: int, group: int) -> Row:
    own = gains[task]
    if not np.isfinite(own).any():
        return Row((task_cell(plan.task_names[task], group), *[Cell(format_number(None))] * 4))
    best, worst = int(np.nanargmax(own)), int(np.nanargmin(own))
    n_known = int(np.isfinite(own).sum())
    return Row(
        (
            task_cell(plan.task_names[task], group),
            Cell(plan.task_names[best], format_signed(float(own[best]))),
            Cell(plan.task_names[worst], format_signed(float(own[worst]))),
            Cell(format_signed(float(np.nanmean(own)))),
            Cell(f"{int((own > 0).sum())} of {n_known}"),
        )
    )
