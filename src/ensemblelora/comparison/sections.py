"""The sections of a comparison's page, as the values that a run's report is made of. No torch.

In: a :class:`~.record.StudyRecord` and its :class:`~.statistics.Statistics`. Out: sections. Methods stand in the order
of their mean, the best first; those that lost stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ensemblelora.comparison.pareto import draw_pareto
from ensemblelora.comparison.record import StudyRecord
from ensemblelora.comparison.statistics import LEVEL, Figure, MethodResult, PairedResult, Statistics
from ensemblelora.report.document import Block, Cell, Column, FigureRow, Row, Section, Table, Text
from ensemblelora.report.wording import (
    count,
    format_bytes,
    format_flops,
    format_interval,
    format_number,
    format_ratio,
    format_seconds,
    format_signed,
    join_names,
)

__all__ = [
    "describe_change",
    "format_p_value",
    "rank_methods",
    "write_costs",
    "write_groups",
    "write_pareto",
    "write_primary",
    "write_scores",
]

_SMALLEST_P = 0.001


@dataclass(frozen=True)
class _Metric:
    key: str
    title: str
    unit: str
    scale: float
    digits: int
    is_higher_better: bool


_METRICS = {
    "accuracy": _Metric("accuracy", "Accuracy, %", " points", 100.0, 1, True),
    "nll": _Metric("nll", "Loss (NLL, nats)", "", 1.0, 3, False),
}


def rank_methods(found: Statistics) -> list[MethodResult]:
    """Methods by mean accuracy, or by loss where there is none; the best first."""

    def key(method: MethodResult) -> tuple[float, float]:
        accuracy, nll = (method.mean.get(metric) for metric in ("accuracy", "nll"))
        return (-accuracy.value if accuracy else 0.0, nll.value if nll else 0.0)

    return sorted(found.methods.values(), key=key)


def format_p_value(p_value: float | None) -> str:
    """Write a p-value; those that no number of draws could tell apart, as a bound.

    Example:
        >>> format_p_value(0.0234), format_p_value(0.0002)
        ('0.023', '< 0.001')
    """
    is_small = p_value is not None and p_value < _SMALLEST_P
    return f"< {_SMALLEST_P}" if is_small else format_number(p_value, 3)


def describe_change(result: PairedResult, confidence: float) -> str:
    """Write a difference with its interval, over the test rows alone where there is one seed: points, or nats."""
    metric = _METRICS[result.metric]
    change = f"{format_signed(metric.scale * result.difference, metric.digits)}{metric.unit}"
    if interval := _interval(metric, result.low, result.high):
        return f"{change} ({confidence:.0%} interval {interval})"
    interval = _interval(metric, result.rows_low, result.rows_high)
    return f"{change} ({confidence:.0%} interval over these trainings {interval})" if interval else change


def write_primary(study: StudyRecord, found: Statistics) -> Section | None:
    """The comparisons that were named beforehand, corrected for their number."""
    if not found.primary:
        return None
    columns = (
        Column("Comparison", is_number=False),
        Column("Difference"),
        Column("Over these trainings"),
        Column("Over seeds"),
        Column("p"),
        Column("p, corrected"),
        Column("Could be found"),
    )
    rows = tuple(_primary_row(result) for result in found.primary)
    n_late = len({(result.a, result.b) for result in found.primary if result.is_late})
    late = f" {count(n_late, 'pair')} marked late: named when both had been tested." if n_late else ""
    note = (
        f"Accuracy in points, loss in nats, with {found.confidence:.0%} intervals: over test rows and trainings "
        "together (Student's t, Satterthwaite's degrees of freedom), and, over these trainings, over groups of test "
        f"rows alone. p: two-sided, of rows and trainings; corrected by Holm's method for all {found.n_primary} lines "
        "that were named, those without a result too. Over seeds: standard deviation of the difference. Could be "
        f"found: the true difference that 80% of such studies would find, at {LEVEL:.0%} alone and, below, at the "
        f"strictest level of the correction.{late}"
    )
    return Section("primary", "Comparisons named beforehand", [Table("Primary comparisons", columns, rows, note)])


def write_scores(study: StudyRecord, found: Statistics) -> Section:
    """Accuracy and loss of every method on every task."""
    n_rows = sum(len(task.groups) for task in study.head.tasks)
    seeds = study.head.seeds
    text = (
        f"{count(n_rows, 'test row')} of {count(len(found.tasks), 'task')}, the same for all methods and "
        f"{count(len(seeds), 'seed')}; none was read before its method was settled. Means of seeds; beside them the "
        "standard deviation over seeds, under means over tasks the interval over test rows and trainings, or of one "
        "seed over test rows."
    )
    if found.at_chance:
        text += (
            f" On {join_names(list(found.at_chance))} neither the base model nor the shared adapter is above always "
            "giving the most frequent answer, by validation rows of the first seed: they are marked, and left out of "
            "the second mean, whatever other methods do there."
        )
    blocks: list[Block] = [Text(text)]
    blocks += [_score_table(metric, found) for metric in _METRICS.values() if _has(found, metric)]
    if note := _tell_rounding(study):
        blocks.append(Text(note, is_quiet=True))
    return Section("results", "Test results", blocks)


def write_costs(study: StudyRecord, found: Statistics) -> Section:
    """What each method took to make and takes to use."""
    ranked = rank_methods(found)
    reference = found.methods.get(found.reference or "")
    base = reference.costs.flops if reference else 0.0
    labels = [
        "Learning rate", "Training", "Choosing", "Of one adapter", "Inference", "Passes", "Time", "Peak memory",
        "Adapters", "Search of the rate",
    ]  # fmt: skip
    rows = tuple(_cost_row(method, base) for method in ranked)
    note = (
        "Everything that a method needs is charged to it, also where another needed it too. FLOPs by formula; its "
        "inference for a test row in the mean over tasks. Of one adapter: training and choosing, over those of one "
        "adapter for all. Time and the process's peak memory as measured; below, the most above what was resident when "
        "a training or another part of it began. Search of the rate: the other learning rates tried on the first seed; "
        "not in the other columns. Edge of the grid: the best rate was the smallest or the largest tried."
    )
    columns = (Column("Method", is_number=False), *map(Column, labels))
    blocks: list[Block] = [Table("Costs", columns, rows, note)]
    if study.head.lower["flops"]:
        shared = format_flops(study.head.lower["flops"])
        text = f"In each method's training: {shared} of the layers below the adapted ones, run once for all methods."
        blocks.append(Text(text, is_quiet=True))
    return Section("costs", "What it cost", blocks)


def write_pareto(study: StudyRecord, found: Statistics) -> Section | None:
    """Error against each kind of cost."""
    figures = draw_pareto(found)
    if not figures:
        return None
    caption = (
        "Dotted: methods that no other beats in both. Bars: intervals over test rows and trainings. What costs nothing "
        "of a kind is left out of that picture."
    )
    return Section("pareto", "Error against cost", [FigureRow(figures, caption)])


def write_groups(study: StudyRecord, found: Statistics) -> Section | None:
    """Which tasks each method trained together, seed by seed."""
    rows = []
    for method in found.methods.values():
        for seed, groups in zip(method.seeds, method.groups, strict=True):
            if groups is not None:
                told = " | ".join(", ".join(group) for group in groups)
                rows.append(Row((Cell(method.name), Cell(str(seed)), Cell(str(len(groups))), Cell(told))))
    if not rows:
        return None
    columns = (Column("Method", is_number=False), Column("Seed"), Column("Groups"), Column("Tasks", is_number=False))
    table = Table("Groups", columns, tuple(rows), summary="Of every method and seed")
    return Section("groups", "Who trained together", [table])


def _has(found: Statistics, metric: _Metric) -> bool:
    return any(metric.key in method.mean for method in found.methods.values())


def _primary_row(result: PairedResult) -> Row:
    metric = _METRICS[result.metric]
    gain = result.difference if metric.is_higher_better else -result.difference
    is_shown = result.p_holm is not None and result.p_holm < LEVEL
    tags = [*(["better" if gain > 0 else "worse"] if is_shown else []), *(["late"] if result.is_late else [])]
    what = [metric.key.replace("nll", "loss"), *(["tasks above chance"] if result.is_above_chance else [])]
    strict, alone = (_scaled(metric, value) for value in (result.detectable_corrected, result.detectable))
    return Row(
        (
            Cell(f"{result.a} against {result.b}", ", ".join(what), tag=", ".join(tags)),
            Cell(
                format_signed(metric.scale * result.difference, metric.digits),
                _interval(metric, result.low, result.high),
            ),
            Cell(_interval(metric, result.rows_low, result.rows_high) or format_number(None)),
            Cell(_scaled(metric, result.seed_sd)),
            Cell(format_p_value(result.p_value)),
            Cell(format_p_value(result.p_holm), is_best=is_shown),
            Cell(alone, strict),
        )
    )


def _score_table(metric: _Metric, found: Statistics) -> Table:
    ranked = [method for method in rank_methods(found) if metric.key in method.mean]
    tasks = [task for task in found.tasks if any(metric.key in m.per_task[task] for m in ranked)]
    able = [task for task in tasks if task not in found.at_chance]
    has_both = 0 < len(able) < len(tasks)
    columns: list[tuple[str, list[Figure | None], bool]] = [
        (f"Mean of {len(tasks)}", [m.mean.get(metric.key) for m in ranked], True),
        (f"Mean of {len(able)} above chance", [m.mean_above_chance.get(metric.key) for m in ranked], True),
        *((task, [m.per_task[task].get(metric.key) for m in ranked], False) for task in tasks),
    ]
    if not has_both:
        del columns[1]
    rows = [[Cell(method.title, method.name)] for method in ranked]
    for label, figures, is_mean in columns:
        at_chance = label in found.at_chance and metric.is_higher_better
        best = None if at_chance else _find_best(metric, figures)
        for row, figure in zip(rows, figures, strict=True):
            row.append(_score_cell(metric, figure, best, is_mean=is_mean))
    heads = [f"{label} (at chance)" if label in found.at_chance else label for label, *_ in columns]
    rows = _add_differences(metric, found, ranked, rows)
    extra = [f"Against {found.reference}", "Over these trainings"] if found.reference else []
    arrow = "Higher is better" if metric.is_higher_better else "Lower is better"
    note = f"{arrow}; a star marks the best of a column."
    if extra:
        note += " Against one adapter for all: not corrected for the number of lines."
    return Table(
        metric.title,
        (Column("Method", is_number=False), *map(Column, heads), *map(Column, extra)),
        tuple(Row(tuple(row)) for row in rows),
        note,
    )


def _add_differences(
    metric: _Metric, found: Statistics, ranked: Sequence[MethodResult], rows: Sequence[list[Cell]]
) -> list[list[Cell]]:
    """Add each method's difference to the reference, with its interval, and that over test rows alone."""
    if found.reference is None:
        return list(rows)
    longer = []
    for method, row in zip(ranked, rows, strict=True):
        result = found.find(method.name, found.reference, metric.key)
        if result is None:
            longer.append([*row, *[Cell(format_number(None))] * 2])
            continue
        text = format_signed(metric.scale * result.difference, metric.digits)
        rows_alone = _interval(metric, result.rows_low, result.rows_high) or format_number(None)
        longer.append([*row, Cell(text, _interval(metric, result.low, result.high)), Cell(rows_alone)])
    return longer


def _score_cell(metric: _Metric, figure: Figure | None, best: str | None, *, is_mean: bool) -> Cell:
    if figure is None:
        return Cell(format_number(None))
    text = _scaled(metric, figure.value)
    spread = "" if figure.seed_sd is None else f"± {_scaled(metric, figure.seed_sd)}"
    detail = spread
    if is_mean:
        detail = "; ".join(part for part in (spread, _interval(metric, *figure.ends)) if part)
    return Cell(text, detail, is_best=text == best)


def _find_best(metric: _Metric, figures: Sequence[Figure | None]) -> str | None:
    """The best value as it is written, so that equals are all marked; none where there is nothing to beat."""
    values = [figure.value for figure in figures if figure is not None]
    if len(values) < 2:
        return None
    return _scaled(metric, max(values) if metric.is_higher_better else min(values))


def _cost_row(method: MethodResult, base: float) -> Row:
    costs = method.costs
    texts: list[str] = [
        format_flops(costs.train_flops),
        format_flops(costs.select_flops),
        f"{format_ratio(costs.flops / base)}\u00d7" if base else format_number(None),
        format_flops(costs.infer_flops),
        format_ratio(costs.forward_passes),
        format_seconds(costs.seconds),
    ]
    rate = format_number(None) if method.learning_rate is None else f"{method.learning_rate:g}"
    peak = format_bytes(costs.peak_memory_bytes) if costs.peak_memory_bytes else format_number(None)
    cells = (
        Cell(method.title, method.name),
        Cell(rate, tag="edge of the grid" if method.is_rate_at_edge else ""),
        *map(Cell, texts),
        Cell(peak, f"+{format_bytes(costs.added_memory_bytes)}" if costs.added_memory_bytes else ""),
        Cell(format_bytes(costs.n_bytes)),
        Cell(format_flops(costs.grid_flops) if costs.grid_flops else format_number(None)),
    )
    return Row(cells)


def _interval(metric: _Metric, low: float | None, high: float | None) -> str:
    return format_interval(low, high, scale=metric.scale, digits=metric.digits)


def _scaled(metric: _Metric, value: float | None) -> str:
    return format_number(None if value is None else metric.scale * value, metric.digits)


def _tell_rounding(study: StudyRecord) -> str:
    """Say so where the base model's weights had been rounded before anything was compared on them."""
    name = study.config.model.name
    if name != type(study.config).model_fields["model"].default.name and not name.endswith(".gguf"):
        return ""
    return (
        f"The base model {name} is itself a dequantised 4-bit file: nothing here is full precision, and LoRA against "
        "QLoRA on it compares two quantised bases."
    )
