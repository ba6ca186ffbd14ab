"""The sections on the plan: the groups, the affinity behind them, and what each number of groups would give."""

from __future__ import annotations

import numpy as np

from ensemblelora.report.cells import task_cell
from ensemblelora.report.charts import draw_curve
from ensemblelora.report.departure import explain_departure, explain_unmoved, is_by_cosine, part_pairs
from ensemblelora.report.document import (
    Block,
    Cell,
    Column,
    FigureRow,
    GroupCard,
    Groups,
    Legend,
    Row,
    Section,
    Table,
    Text,
)
from ensemblelora.report.heatmaps import MAX_LABELLED_TASKS, draw_affinity, draw_hierarchy, remove_levels
from ensemblelora.report.plotting import N_GROUP_COLOURS
from ensemblelora.report.records import AffinityRecord, PlanRecord, Prediction, RunRecord
from ensemblelora.report.taskmap import N_PARTNERS, draw_tasks
from ensemblelora.report.wording import (
    count,
    describe_coverage,
    format_bytes,
    format_number,
    format_percent,
    format_ratio,
    format_signed,
    group_letter,
    join_names,
)

__all__ = ["describe_validation", "write_affinity", "write_curve", "write_plan"]

_MAX_MATRIX_TABLE = 24
_MAX_TREE = 100  # a second map of more tasks says no more than the first, and costs a megabyte
_MIN_MAPPED = 4
_FOUND_BY_COSINE = (
    "These groups were found by gradient cosine (which tasks' gradients point the same way), not from these "
    "affinities, so that the lines need not follow them."
)
_WHAT_LEVELS_ARE = "its difficulty, and how well it goes with everything"


def write_plan(run: RunRecord) -> Section:
    """Show the groups, the reason, and the predicted performance of the plan beside its rivals."""
    plan = run.plan
    decisions = {
        "group": f"Train {count(len(plan.groups), 'adapter')}, one for each group of tasks.",
        "one adapter": "Train one adapter for all tasks.",
        "one per task": "Train one adapter per task.",
    }
    opening = decisions.get(plan.decision, plan.decision)
    blocks: list[Block] = [Text(_join(opening, plan.reason, explain_departure(run))), Groups(_cards(plan))]
    if (picture := _draw_groups(run)) is not None:
        blocks.append(picture)
    table = _prediction_table(plan)
    return Section("plan", "The plan", [*blocks, table] if table else blocks)


def describe_validation(plan: PlanRecord) -> str:
    """Say how many validation rows the plan's predictions rest on, where it says so."""
    if not plan.n_validation:
        return "validation rows"
    text = count(sum(plan.n_validation), "validation row")
    return text if plan.n_tasks == 1 else f"{text}, {_range_of(np.array(plan.n_validation))} a task"


def _draw_groups(run: RunRecord) -> FigureRow | None:
    """The groups on a map, where there are pairs enough to make one of."""
    n_tasks = run.plan.n_tasks
    if run.affinity is None or not _MIN_MAPPED <= n_tasks <= _MAX_TREE or len(run.plan.groups) < 2:
        return None
    values = remove_levels(run.affinity.matrix)
    if not np.isfinite(values).any():
        return None
    figure = draw_tasks(values, run.plan.task_names, run.plan.groups)
    caption = (
        f"Lines join each task with the {N_PARTNERS} it does best with, if better than usual (affinity without own "
        "levels): drawn through inside a group, dotted across. The affinity map below shows all pairs."
    )
    if is_by_cosine(run.plan):
        caption += f" {_FOUND_BY_COSINE}"
    return FigureRow((figure,), caption)


def write_affinity(run: RunRecord) -> Section | None:
    """Show how well the tasks go together, before and after ordering them by group."""
    affinity, plan = run.affinity, run.plan
    if affinity is None or plan.n_tasks < 2:
        return None
    if plan.n_tasks == 2:
        text = (
            "Two tasks are one pair, and there is no other to compare its affinity with. Whether they help each other "
            "is predicted by one adapter for both against one for each."
        )
        return Section("affinity", "Which tasks go together", [Text(text)])
    values = remove_levels(affinity.matrix)
    reach = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    figures = [draw_affinity(affinity, plan.task_names, plan.groups)]
    if plan.n_tasks <= _MAX_TREE:
        figures.insert(0, draw_hierarchy(affinity, plan.task_names, plan.groups))
    legend = Legend(f"worse together {format_signed(-reach)}", f"{format_signed(reach)} better together", "diverging")
    level = "its mean over all its training sets" if plan.n_tasks == 3 else _WHAT_LEVELS_ARE
    caption = (
        "Each cell: how much better the two tasks do in training sets that hold both than each of them usually does "
        f"({level}); 0 is as usual. So it ranks partners, and a pair above 0 may still lose by training together: see "
        "who helps whom."
    )
    if len(figures) > 1:
        caption += (
            " The first map is ordered by a tree of average linkage, in which the closest join first (over it, with "
            "the groups' colours at its leaves); the tree knows nothing of the groups."
        )
    text = _join(_explain_affinity(values, affinity, plan), explain_departure(run))
    blocks: list[Block] = [Text(text), FigureRow(tuple(figures), caption, legend)]
    if plan.n_tasks <= _MAX_MATRIX_TABLE:
        blocks.append(_matrix_table(values, affinity.se, plan))
    elif plan.n_tasks > MAX_LABELLED_TASKS:
        blocks.append(Text("Hover over a cell for the names; there are too many tasks to label.", is_quiet=True))
    return Section("affinity", "Which tasks go together", blocks)


def write_curve(run: RunRecord) -> Section | None:
    """Show what each number of groups is predicted to give, and other ways of grouping beside it."""
    plan = run.plan
    if plan.n_tasks < 2:
        return None
    blocks: list[Block] = []
    if any(point.gain is not None for point in plan.curve):
        caption = (
            "Mean validation loss saved against one adapter for all tasks (above 0 is better), with one standard "
            "error, judged on rows that did not choose the groups. It covers validation rows, not training seeds."
        )
        if is_by_cosine(plan):
            caption += " The plan's groups were found by gradient cosine, all others from the affinities."
        blocks.append(FigureRow((draw_curve(plan.curve, len(plan.groups)),), caption))
    if plan.curve:
        blocks.append(_curve_table(plan))
    if plan.comparisons:
        blocks.append(_comparison_table(plan))
    return Section("curve", "How many groups", blocks) if blocks else None


def _cards(plan: PlanRecord) -> tuple[GroupCard, ...]:
    return tuple(
        GroupCard(
            group_letter(group),
            group % N_GROUP_COLOURS,
            tuple(plan.task_names[task] for task in tasks),
            f"{count(len(tasks), 'task')}, adapter group-{group}",
        )
        for group, tasks in enumerate(plan.groups)
    )


def _prediction_table(plan: PlanRecord) -> Table | None:
    ways = {
        "The plan": plan.predicted.plan,
        "One adapter for all": plan.predicted.shared,
        "One adapter per task": plan.predicted.singles,
        "Base model": plan.predicted.base,
    }
    if len(plan.groups) == 1:
        ways.pop("One adapter for all")  # it is the plan
    if plan.n_tasks == 1:
        ways.pop("One adapter per task")
    known = {label: way for label, way in ways.items() if way.mean_nll is not None}
    if not known:
        return None
    lowest = min(way.mean_nll for way in known.values() if way.mean_nll is not None)
    rows = tuple(Row((Cell(label), _loss_cell(way, lowest), _accuracy_cell(way))) for label, way in known.items())
    coverage = describe_coverage(plan.predicted.plan.n_accuracies, plan.n_tasks)
    columns = (Column("Training", is_number=False), Column("Mean loss"), Column(f"Mean accuracy {coverage}".strip()))
    note = "Means over tasks, ± one standard error. Predicted from gradients at the base model, before any training."
    note = _join(note, explain_unmoved(plan))
    return Table(f"Predicted performance on {describe_validation(plan)}", columns, rows, note)


def _loss_cell(way: Prediction, lowest: float) -> Cell:
    return Cell(format_number(way.mean_nll), _plus_minus(way.mean_nll_se), is_best=way.mean_nll == lowest)


def _accuracy_cell(way: Prediction) -> Cell:
    error = "" if way.mean_accuracy_se is None else f"± {format_number(100 * way.mean_accuracy_se, 1)}"
    return Cell(format_percent(way.mean_accuracy), error)


def _plus_minus(error: float | None) -> str:
    return f"± {format_number(error)}" if error else ""


def _explain_affinity(values: np.ndarray, affinity: AffinityRecord, plan: PlanRecord) -> str:
    is_pair = np.triu(np.isfinite(values), k=1)
    inside, outside = part_pairs(values, plan.groups)
    text = f"All {count(plan.n_tasks * (plan.n_tasks - 1) // 2, 'pair')} of tasks"
    if affinity.counts is not None and plan.n_tasks > 2:
        met = affinity.counts[np.triu_indices(plan.n_tasks, k=1)]
        text += f", each met in {_range_of(met)} of the training sets asked about"
        if (met == 0).any():
            text += f" ({count(int((met == 0).sum()), 'pair')} in none, where a surrogate fills in)"
    if len(inside) and len(outside) and not is_by_cosine(plan):
        means = f"{format_signed(inside.mean())} inside the groups and {format_signed(outside.mean())} across them"
        text += f". The mean affinity is {means}"
    if affinity.se is not None and is_pair.any():
        spread, error = values[is_pair].std(), np.nanmedian(affinity.se[is_pair])
        text += f". Pairs differ by {format_number(spread)} (standard deviation); {format_number(error)} is the "
        text += "standard error of a typical one"
    return f"{text}."


def _join(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def _range_of(numbers: np.ndarray) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _matrix_table(values: np.ndarray, errors: np.ndarray | None, plan: PlanRecord) -> Table:
    order = [task for group in plan.groups for task in group]
    names = [plan.task_names[task] for task in order]
    groups = plan.group_by_name
    rows = tuple(
        Row(
            (
                task_cell(name, groups[name]),
                *(_affinity_cell(values[i, j], None if errors is None else errors[i, j]) for j in order),
            )
        )
        for name, i in zip(names, order, strict=True)
    )
    columns = (Column("Task", is_number=False), *(Column(name) for name in names))
    return Table("Affinity without own levels, ordered by group", columns, rows, summary="The affinities as a table")


def _affinity_cell(value: float, error: float | None) -> Cell:
    known = None if error is None or not np.isfinite(value) else _number(error)
    return Cell(format_signed(_number(value)), _plus_minus(known))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _curve_table(plan: PlanRecord) -> Table:
    n_chosen, by_cosine = len(plan.groups), is_by_cosine(plan)
    rows = tuple(
        Row(
            (
                Cell(str(point.n_groups), tag="the plan" if point.n_groups == n_chosen else ""),
                Cell(format_number(point.predicted_nll), _plus_minus(point.predicted_nll_se)),
                Cell(format_signed(point.gain), _plus_minus(point.gain_se)),
                Cell(format_number(None if by_cosine and point.n_groups == n_chosen else point.gap)),
                Cell(format_bytes(point.adapter_bytes)),
                Cell(_times(point.latency_ratio), tag="" if point.allowed else "not allowed"),
            )
        )
        for point in plan.curve
    )
    labels = ("Predicted loss", "Saved", "Gap to bound", "Adapters, at most", "Forward passes, at most")
    columns = (Column("Groups", is_number=False), *(Column(label) for label in labels))
    note = (
        "± one standard error; most of a predicted loss's is common to all rows, and drops out of what is saved. Gap "
        "to bound: by how much a better clustering of that number could still beat this one; at 0 there is none. "
        "At most: with every booster that may be added and every group's adapter asked for every row."
    )
    return Table("What each number of groups would give and cost", columns, rows, note)


def _times(ratio: float | None) -> str:
    return format_ratio(ratio) if ratio is None else f"{format_ratio(ratio)}\u00d7"


def _comparison_table(plan: PlanRecord) -> Table:
    chosen = plan.predicted.plan
    gain = next((point for point in plan.curve if point.n_groups == len(plan.groups)), None)
    own = Row(
        (
            Cell("the plan"),
            Cell(str(len(plan.groups))),
            Cell(format_number(chosen.mean_nll), _plus_minus(chosen.mean_nll_se)),
            Cell(format_signed(gain.gain if gain else None), _plus_minus(gain.gain_se if gain else None)),
        ),
        is_summary=True,
    )
    rows = [
        Row(
            (
                Cell(item.name),
                Cell("" if item.n_groups is None else str(item.n_groups)),
                Cell(format_number(item.predicted_nll), _plus_minus(item.predicted_nll_se)),
                Cell(format_signed(item.gain), _plus_minus(item.gain_se)),
            )
        )
        for item in plan.comparisons
    ]
    columns = (Column("Grouping", is_number=False), Column("Groups"), Column("Predicted loss"), Column("Saved"))
    note = f"Judged by the same prediction on the same rows: {join_names([item.name for item in plan.comparisons])}."
    spreads = [item for item in plan.comparisons if item.predicted_nll_sd is not None]
    note += " ± one standard error." + "".join(
        f" The {item.name} drawn differ in loss by {format_number(item.predicted_nll_sd)} (standard deviation)."
        for item in spreads
    )
    return Table("Other ways of grouping", columns, (*rows, own), note)
