"""The closing screen of a run: decision and groups, what each method gave and took, and where the report is.

It fits the terminal, 80 by 24 where that is not known: what does not fit is left out, and the report has all of it.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ensemblelora.artifacts import REPORT_HTML_FILE
from ensemblelora.evaluation.rows import BOOSTED_GROUP, OWN_GROUP
from ensemblelora.report.departure import explain_departure, explain_unmoved
from ensemblelora.report.headline import describe_shape, write_headline
from ensemblelora.report.plan_sections import describe_validation
from ensemblelora.report.reading import leave_out_repeats, load_record
from ensemblelora.report.records import CostsRecord, PlanRecord, Prediction, ResultsRecord, RunRecord, TaskScore
from ensemblelora.report.result_sections import STAYED, list_unmoved, list_warnings
from ensemblelora.report.wording import (
    NOTHING,
    count,
    describe_coverage,
    format_bytes,
    format_flops,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
    format_signed,
    group_letter,
)

__all__ = ["summarize"]

_WIDTH, _HEIGHT = 80, 24
_MAX_GROUPS = (10_000, 12, 6, 4, 2)  # tried in turn
_MAX_WARNINGS = (10_000, 6, 3, 1, 0)
Part = Text | Table


def summarize(folder: Path, *, size: tuple[int, int] | None = None) -> list[Part]:
    """Read a run folder, and say on one screen what came out so far.

    Args:
        folder: A run folder with at least a plan.
        size: Columns and lines of the screen; by default the terminal's.

    Returns:
        Lines and tables for :func:`ensemblelora.console.show_table`.

    Raises:
        UsageError: If the run has no plan yet.
        StoreError: If one of its files is damaged.
    """
    record = leave_out_repeats(load_record(folder))
    width, height = size or shutil.get_terminal_size((_WIDTH, _HEIGHT))
    console = Console(width=width, highlight=False)
    shown: list[Part] = []
    for has_tasks in (True, False):
        for n_groups, n_warnings in zip(_MAX_GROUPS, _MAX_WARNINGS, strict=True):
            shown = _compose(record, folder, has_tasks=has_tasks, n_groups=n_groups, n_warnings=n_warnings)
            if sum(len(console.render_lines(part, pad=False)) for part in shown) < height:  # a line is the prompt's
                return shown
    return shown


def _compose(record: RunRecord, folder: Path, *, has_tasks: bool, n_groups: int, n_warnings: int) -> list[Part]:
    plan, results = record.plan, _leave_out_boosted(record.results)
    # Before there are results, the plan's reason says all that the headline would.
    headline = f"{describe_shape(plan)}." if results is None else write_headline(record)
    parts: list[Part] = [Text(headline, style="bold")]
    gap = [Text()] if has_tasks or results is None else []
    if has_tasks or results is None:
        parts.append(Text(" ".join(filter(None, (plan.reason, explain_unmoved(plan), explain_departure(record))))))
    parts += [Text(), _list_groups(record, n_groups), Text()]
    if results is None:
        parts += [_tabulate_predictions(plan), *gap]
    else:
        if has_tasks:
            parts += [_tabulate_accuracy(plan, results), *_explain_dashes(results), *gap]
        parts += [_tabulate_methods(record, results)]
        parts += [_one_line(line) for line in _tell_extremes(plan, results)]
        parts += [_one_line(line) for line in _tell_cheaper(record)]
        parts += gap
    parts += [_one_line(line) for line in _list_costs(record.costs)]
    parts += [Text(line, style="yellow") for line in _list_warnings(list_warnings(record), n_warnings)]
    report = folder / REPORT_HTML_FILE
    parts.append(Text(f"report: {report}" if report.exists() else f"run folder: {folder}", no_wrap=True))
    parts.append(Text(f"next: {_tell_next(folder, plan, is_planned=results is None)}", no_wrap=True))
    return parts


def _tell_next(folder: Path, plan: PlanRecord, *, is_planned: bool) -> str:
    """The command that goes on from here; tasks may look alike, so that it names one."""
    if is_planned:
        return f"ensemblelora {shlex.join(['run', str(folder)])}"
    return f"ensemblelora {shlex.join(['predict', str(folder), '--task', plan.task_names[0]])} --text ..."


def _leave_out_boosted(results: ResultsRecord | None) -> ResultsRecord | None:
    """A fifth method has no place in 80 columns, and the ensemble beside it has the boosters, too."""
    if results is None or OWN_GROUP not in results.methods:
        return results
    shown = {name: scores for name, scores in results.methods.items() if name != BOOSTED_GROUP}
    return results.model_copy(update={"methods": shown})


def _one_line(text: str) -> Table:
    """A line that is cut where the screen ends."""
    grid = Table.grid()
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_row(Text(text))
    return grid


def _list_warnings(warnings: Sequence[str], n_shown: int) -> Iterator[str]:
    yield from (f"warning: {warning}" for warning in warnings[:n_shown])
    if len(warnings) > n_shown:
        more = " more" if n_shown else ""
        yield f"{'and ' if n_shown else ''}{count(len(warnings) - n_shown, 'warning')}{more}: see the report"


def _list_groups(record: RunRecord, n_shown: int) -> Table:
    plan, stayed = record.plan, _find_unmoved(record)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(no_wrap=True, overflow="ellipsis")
    for index, group in enumerate(plan.groups[:n_shown]):
        names = ", ".join(plan.task_names[task] for task in group)
        table.add_row(
            f"group {group_letter(index)} (group-{index})", Text(f"{names} ({STAYED})" if index in stayed else names)
        )
    if len(plan.groups) > n_shown:
        table.add_row("", f"and {count(len(plan.groups) - n_shown, 'group')} more")
    return table


def _find_unmoved(record: RunRecord) -> frozenset[int]:
    """Groups whose own adapter is the base model itself."""
    if record.ensemble is None or record.results is None:
        return frozenset()
    stayed = list_unmoved(record.results.linearity)
    members = record.ensemble.members
    return frozenset(one.group for one in members if one.kind == "group" and one.name in stayed)


def _tabulate_predictions(plan: PlanRecord) -> Table:
    coverage = describe_coverage(plan.predicted.plan.n_accuracies, plan.n_tasks)
    table = _new_table(f"predicted on {describe_validation(plan)}", "loss", "±", f"accuracy {coverage}".strip(), "±")
    ways = {
        "this plan": plan.predicted.plan,
        "one adapter for all": plan.predicted.shared,
        "one per task": plan.predicted.singles,
        "the base model": plan.predicted.base,
    }
    for name, predicted in ways.items():
        if name == "this plan" and len(plan.groups) == 1:
            continue  # it is one adapter for all
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
    for task in plan.ordered_names:
        scores = [method.per_task.get(task, TaskScore()) for method in results.methods.values()]
        table.add_row(
            Text(task),
            str(max((score.n_examples for score in scores), default=0)),
            format_percent(next((score.majority for score in scores if score.majority is not None), None)),
            *_write_best([score.accuracy for score in scores]),
        )
    return table


def _explain_dashes(results: ResultsRecord) -> Iterator[Text]:
    if any(score.kind == "sequence" for method in results.methods.values() for score in method.per_task.values()):
        yield Text(f"{NOTHING}: free text has no classes; its accuracy is the share of exact matches", style="dim")


def _tell_extremes(plan: PlanRecord, results: ResultsRecord) -> Iterator[str]:
    """Name the tasks that gained most and least against one adapter for all."""
    found = [
        (item.difference, name)
        for name in plan.task_names
        if (item := results.find_difference("ensemble", "shared", "accuracy", name)) and item.difference is not None
    ]
    if len(found) > 1 and len(plan.groups) > 1:
        (low, worst), (high, best) = min(found), max(found)
        most, least = (f"{name} {format_signed(100 * value, 1)}" for value, name in ((high, best), (low, worst)))
        yield f"accuracy points over one adapter: most {most}, least {least}"


def _tell_cheaper(record: RunRecord) -> Iterator[str]:
    """Say where each task's own group, with its boosters, does as well as the ensemble: a way of its own, left out.

    It is no advice: who chooses a method by its test rows has none left to judge it by.
    """
    results, costs = record.results, record.costs
    if results is None or BOOSTED_GROUP not in results.methods or OWN_GROUP not in results.methods:
        return
    if record.config.ensemble.weights == "own":
        return  # that is what serves
    metric = "accuracy" if results.methods[BOOSTED_GROUP].count("accuracy", record.plan.task_names) else "nll"
    ours, theirs = (results.methods[name].mean(metric, record.plan.task_names) for name in ("ensemble", BOOSTED_GROUP))
    if ours is None or theirs is None or (ours > theirs if metric == "accuracy" else ours < theirs):
        return
    spent = costs.methods.get(BOOSTED_GROUP) if costs else None
    passes = spent.inference_forward_passes if spent else None
    price = f" in {format_ratio(passes)} passes" if passes is not None else ""
    score = format_percent(theirs) if metric == "accuracy" else f"loss {format_number(theirs)}"
    yield f"own group and boosters only, without weights: {score}{price}"


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
        "forward passes a prediction": ("inference_forward_passes", format_ratio),
    }
    for title, (field, write) in rows.items():
        spent = [getattr(ledger.get(method), field, None) for method in results.methods]
        if any(value is not None for value in spent):
            table.add_row(title, *map(write, spent))
    return table


def _list_costs(costs: CostsRecord | None) -> Iterator[str]:
    if costs is None or costs.wall_seconds is None:
        return
    stages = [stage for stage in costs.stages if stage.wall_seconds is not None]
    longest = sorted(stages, key=lambda stage: -(stage.wall_seconds or 0))[:2]
    parts = ", ".join(f"{stage.stage} {format_seconds(stage.wall_seconds)}" for stage in longest)
    peaks = [stage.peak_memory_bytes for stage in stages if stage.peak_memory_bytes is not None]
    peak = f"; {format_bytes(max(peaks))} of memory at most" if peaks else ""
    yield f"{format_seconds(costs.wall_seconds)} in all ({parts}){peak}"


def _new_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _write_best(values: Sequence[float | None]) -> list[Text]:
    known = [value for value in values if value is not None]
    best = max(known) if len(set(known)) > 1 else None  # no method stands out among equals
    return [Text(format_percent(value), style="bold" if value and value == best else "") for value in values]
