"""The closing screen of a run: decision and groups, accuracy per method, cost, and where the report is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ensemblelora.artifacts import PLAN_FILE, REPORT_HTML_FILE
from ensemblelora.report.headline import write_headline
from ensemblelora.report.reading import load_record
from ensemblelora.report.records import CostsRecord, PlanRecord, Prediction, ResultsRecord, RunRecord, TaskScore
from ensemblelora.report.wording import (
    NOTHING,
    count,
    describe_coverage,
    format_bytes,
    format_flops,
    format_number,
    format_percent,
    format_seconds,
    group_letter,
)

__all__ = ["summarize"]

# More rows than these would push the headline off a screen of 40 lines; the report has them all.
_MAX_TASKS = 12
_MAX_GROUPS = 8
_MAX_WARNINGS = 6


def summarize(folder: Path) -> list[Text | Table]:
    """Read a run folder, and say on one screen what came out so far.

    Args:
        folder: A run folder with at least a plan.

    Returns:
        Lines and tables for :func:`ensemblelora.console.show_table`.

    Raises:
        UsageError: If the run has no plan yet.
        StoreError: If one of its files is damaged.
    """
    record = load_record(folder)
    parts: list[Text | Table] = [Text(write_headline(record), style="bold"), Text(record.plan.reason), Text()]
    parts += [_list_groups(record.plan), Text()]
    if record.results is None:
        parts += [_tabulate_predictions(record.plan), Text()]
    else:
        parts += [_tabulate_accuracy(record.plan, record.results), *_explain_dashes(record.results), Text()]
        parts += [_tabulate_methods(record, record.results), Text()]
    parts += [Text(line) for line in _list_costs(record.costs)]
    parts += [Text(line, style="yellow") for line in _list_warnings(record.plan.warnings)]
    report = folder / REPORT_HTML_FILE
    parts.append(Text(f"report: {report}" if report.exists() else f"run folder: {folder}", no_wrap=True))
    return parts


def _list_warnings(warnings: Sequence[str]) -> Iterator[str]:
    yield from (f"warning: {warning}" for warning in warnings[:_MAX_WARNINGS])
    if len(warnings) > _MAX_WARNINGS:
        yield f"and {count(len(warnings) - _MAX_WARNINGS, 'warning')} more: see {PLAN_FILE}"


def _list_groups(plan: PlanRecord) -> Table:
    table = _new_table("group", "tasks")
    for index, group in enumerate(plan.groups[:_MAX_GROUPS]):
        table.add_row(group_letter(index), Text(", ".join(plan.task_names[task] for task in group)))
    if len(plan.groups) > _MAX_GROUPS:
        table.add_row("", f"and {count(len(plan.groups) - _MAX_GROUPS, 'group')} more")
    return table


def _tabulate_predictions(plan: PlanRecord) -> Table:
    coverage = describe_coverage(plan.predicted.plan.n_accuracies, plan.n_tasks)
    table = _new_table("predicted on validation rows", "loss", "±", f"accuracy {coverage}".strip(), "±")
    ways = {
        "this plan": plan.predicted.plan,
        "one adapter for all": plan.predicted.shared,
        "one per task": plan.predicted.singles,
        "the base model": plan.predicted.base,
    }
    for name, predicted in ways.items():
        table.add_row(name, *_write_prediction(predicted))
    return table


def _write_prediction(predicted: Prediction) -> tuple[str, str, str, str]:
    return (
        format_number(predicted.mean_nll),
        format_number(predicted.mean_nll_se),
        format_percent(predicted.mean_accuracy),
        format_percent(predicted.mean_accuracy_se),
    )


def _tabulate_accuracy(plan: PlanRecord, results: ResultsRecord) -> Table:
    table = _new_table("test accuracy", "rows", "majority", *results.methods)
    for task in plan.task_names[:_MAX_TASKS]:
        scores = [method.per_task.get(task, TaskScore()) for method in results.methods.values()]
        table.add_row(
            Text(task),
            str(max((score.n_examples for score in scores), default=0)),
            format_percent(next((score.majority for score in scores if score.majority is not None), None)),
            *_write_best([score.accuracy for score in scores]),
        )
    if plan.n_tasks > _MAX_TASKS:
        table.add_row(f"and {count(plan.n_tasks - _MAX_TASKS, 'task')} more")
    return table


def _explain_dashes(results: ResultsRecord) -> Iterator[Text]:
    if any(score.kind == "sequence" for method in results.methods.values() for score in method.per_task.values()):
        yield Text(f"{NOTHING}: free text has no classes; its accuracy is the share of exact matches", style="dim")


def _tabulate_methods(record: RunRecord, results: ResultsRecord) -> Table:
    table = _new_table("mean over tasks", *results.methods)
    scores = [list(method.per_task.values()) for method in results.methods.values()]
    for name, title in {"accuracy": "accuracy", "macro_f1": "macro F1", "nll": "loss"}.items():
        known = [[value for score in method if (value := getattr(score, name)) is not None] for method in scores]
        means = [sum(some) / len(some) if some else None for some in known]
        coverage = describe_coverage(max(map(len, known), default=0), record.plan.n_tasks)
        written = _write_best(means) if name == "accuracy" else map(format_number, means)
        table.add_row(f"{title} {coverage}".strip(), *written)
    ledger = record.costs.methods if record.costs else {}
    rows = {
        "training": ("train_flops", format_flops),
        "choosing": ("select_flops", format_flops),
        "training time": ("train_seconds", format_seconds),
        "adapters": ("adapter_bytes", format_bytes),
        "forward passes a prediction": ("inference_forward_passes", lambda value: format_number(value, 1)),
    }
    for title, (field, write) in rows.items():
        spent = [getattr(ledger.get(method), field, None) for method in results.methods]
        if any(value is not None for value in spent):
            table.add_row(title, *map(write, spent))
    return table


def _list_costs(costs: CostsRecord | None) -> Iterator[str]:
    stages = [stage for stage in costs.stages if stage.wall_seconds is not None] if costs else []
    if not stages:
        return
    longest = sorted(stages, key=lambda stage: -(stage.wall_seconds or 0))[:4]
    total = sum(stage.wall_seconds or 0 for stage in stages)
    parts = ", ".join(f"{stage.stage} {format_seconds(stage.wall_seconds)}" for stage in longest)
    peaks = [stage.peak_memory_bytes for stage in stages if stage.peak_memory_bytes is not None]
    peak = f"; at most {format_bytes(max(peaks))} of memory" if peaks else ""
    yield f"{format_seconds(total)} in all ({parts}){peak}"


def _new_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or column == "tasks" else "right")
    return table


def _write_best(values: Sequence[float | None]) -> list[Text]:
    known = [value for value in values if value is not None]
    best = max(known) if len(set(known)) > 1 else None  # no method stands out among equals
    return [Text(format_percent(value), style="bold" if value and value == best else "") for value in values]
