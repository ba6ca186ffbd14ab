"""What a run was asked, what its plan predicted, and what came out: in three sentences, and in detail."""

from __future__ import annotations

from collections.abc import Iterator

from ensemblelora.affinity import choose_subset_size
from ensemblelora.config import GroupingConfig
from ensemblelora.report.asked_record import ConfigRecord, TaskRecord
from ensemblelora.report.cells import task_cell
from ensemblelora.report.document import Block, Cell, Column, Row, Section, Step, Steps, Table, Text
from ensemblelora.report.headline import describe_difference, find_rival, method_label
from ensemblelora.report.records import ResultsRecord, RunRecord
from ensemblelora.report.result_sections import list_warnings
from ensemblelora.report.wording import (
    NOTHING,
    count,
    format_number,
    format_percent,
    format_ratio,
    group_letter,
)

__all__ = ["write_asked", "write_steps"]

_KINDS = {
    "verbalizer": "label words",
    "options": "option texts",
    "sequence": "free text",
    "classification": "classes of a head",
}
_PARTS = {"train": "Training rows", "validation": "Validation rows", "test": "Test rows"}


def write_steps(run: RunRecord) -> Steps:
    """Tell the run in three sentences."""
    return Steps(
        (
            Step("Asked", _tell_asked(run)),
            Step("Predicted before training", _tell_predicted(run)),
            Step("Came out", _tell_outcome(run)),
        )
    )


def write_asked(run: RunRecord) -> Section | None:
    """Name model, adapter, settings and tasks with their rows; none where the run keeps none of it."""
    facts = list(_list_facts(run))
    blocks: list[Block] = []
    if facts:
        columns = (Column("What", is_number=False), Column("Asked for", is_number=False))
        blocks.append(Table("Settings", columns, tuple(Row((Cell(name), Cell(value))) for name, value in facts)))
    if run.tasks is not None and run.tasks.tasks:
        blocks.append(_task_table(run))
    if not blocks:
        return None
    question = (
        "Which of these tasks should be fine-tuned together, one adapter for each group, and what does that give "
        "against one adapter for all? The plan is made before any training, from gradients at the base model."
    )
    return Section("asked", "What was asked", [Text(question), *blocks])


def _tell_asked(run: RunRecord) -> str:
    config, tasks = run.config, run.tasks
    rows = f" with {count(tasks.count_rows('train'), 'training row')}" if tasks and tasks.tasks else ""
    model = run.environment.model.name or config.model.name
    on = f" on {model}" if model else ""
    adapter = f": {_name_adapter(config)}" if config.adapter.method else ""
    epochs = config.training.num_train_epochs
    trained = f", {format_ratio(epochs)} {'epoch' if epochs == 1 else 'epochs'}" if epochs else ""
    return f"{count(run.plan.n_tasks, 'task')}{rows}{on}{adapter}{trained}."


def _tell_predicted(run: RunRecord) -> str:
    plan, warnings = run.plan, list_warnings(run)
    n_groups = count(len(plan.groups), "group")
    chosen = next((point for point in plan.curve if point.n_groups == len(plan.groups)), None)
    ours, shared = plan.predicted.plan.mean_nll, plan.predicted.shared.mean_nll
    warned = f" {count(len(warnings), 'warning')}: see below." if warnings else ""
    if ours is None:
        return f"{n_groups}; the plan names no loss.{warned}"
    if len(plan.groups) == 1:
        base = plan.predicted.base.mean_nll
        against = "" if base is None else f" against {format_number(base)} of the base model"
        return f"one adapter for all: validation loss {format_number(ours)}{against}.{warned}"
    text = f"{n_groups}: validation loss {format_number(ours)}"
    if shared is None:
        return f"{text}.{warned}"
    text += f" against {format_number(shared)} with one adapter for all"
    if chosen is not None and chosen.gain is not None:
        error = "" if chosen.gain_se is None else f" ± {format_number(chosen.gain_se)}"
        direction = "better" if chosen.gain >= 0 else "worse"
        text += f", {format_number(abs(chosen.gain))}{error} {direction} on rows that did not choose the groups"
    return f"{text}.{warned}"


def _tell_outcome(run: RunRecord) -> str:
    results = run.results
    if results is None or "ensemble" not in results.methods:
        return "Nothing is trained and tested yet."
    names = run.plan.task_names
    loss = results.methods["ensemble"].mean("nll", names)
    text = f"Test loss {format_number(loss)}"
    text += _against(results, run, "nll")
    accuracy = results.methods["ensemble"].mean("accuracy", names)
    if accuracy is not None:
        text += f". Accuracy {format_percent(accuracy)}{_against(results, run, 'accuracy')}"
    return f"{text}."


def _against(results: ResultsRecord, run: RunRecord, metric: str) -> str:
    """Name the rival's mean, and the difference where it is known."""
    rival = find_rival(run.plan)
    if rival not in results.methods:
        return ""
    theirs = results.methods[rival].mean(metric, run.plan.task_names)
    show = format_percent if metric == "accuracy" else format_number
    text = f" against {show(theirs)} ({method_label(rival).lower()})"
    difference = results.find_difference("ensemble", rival, metric)
    return (
        text if difference is None else f"{text}: {describe_difference(difference, run.config.evaluation.confidence)}"
    )


def _name_adapter(config: ConfigRecord) -> str:
    rank = "" if config.adapter.r is None else f" of rank {config.adapter.r}"
    return f"{config.adapter.method}{rank}"


def _list_facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    config, grouping = run.config, run.config.grouping
    if config.model.name:
        bits = config.model.quantization
        yield "Base model", config.model.name + (f", blocks in {bits}" if bits not in (None, "none") else "")
    if config.adapter.method:
        layers = config.adapter.layers_to_transform
        where = f", layers: {str(layers).replace('_', ' ')}" if layers is not None else ""
        yield "Adapter", f"{_name_adapter(config)}{where}"
    if config.training.num_train_epochs is not None:
        rate = config.training.learning_rate
        rated = "" if rate is None else f", learning rate {rate:g}"
        epochs = config.training.num_train_epochs
        yield "Training", f"{format_ratio(epochs)} {'epoch' if epochs == 1 else 'epochs'}{rated}"
    if grouping.groups is not None:
        yield "Groups", grouping.origin or "given by hand"
    elif grouping.n_groups == "auto":
        yield "Groups", f"as many as are predicted best, {_bound(grouping.max_groups, run.plan.n_tasks)}"
    elif grouping.n_groups is not None:
        yield "Groups", f"{grouping.n_groups}, as asked"
    if config.affinity.subset_size is not None:
        asked = config.affinity.subset_size
        size = choose_subset_size(run.plan.n_tasks, asked)
        why = f" (affinity.subset_size asks for {asked}; a set leaves a task out)" if 1 < size < asked else ""
        yield "Asked of the oracle", f"training sets of {count(size, 'task')}{why}"


def _bound(max_groups: int | str | None, n_tasks: int) -> str:
    if max_groups is None:
        return f"at most {NOTHING}"
    numbers = GroupingConfig.model_validate({"max_groups": max_groups}).list_numbers(n_tasks)
    if n_tasks == numbers[-1] > len(numbers):
        return f"at most {numbers[-2]}, or one a task"
    return f"at most {numbers[-1]}"


def _task_table(run: RunRecord) -> Table:
    tasks = run.tasks.by_name if run.tasks else {}
    groups = run.plan.group_by_name
    is_cut = any(task.cut_share for task in tasks.values())
    rows = []
    for name in run.plan.ordered_names:
        if name in tasks:
            numbers = [tasks[name].n_examples.get(part) for part in _PARTS]
            cells = [Cell(NOTHING if n is None else f"{n:,}") for n in numbers]
            kind = Cell(_KINDS.get(tasks[name].kind, tasks[name].kind))
            cut = [_cut_cell(tasks[name])] if is_cut else []
            rows.append(Row((task_cell(name, groups[name]), kind, *cells, *cut)))
    totals = [Cell(f"{run.tasks.count_rows(part):,}") for part in _PARTS] if run.tasks else []
    totals += [Cell("")] if is_cut else []
    rows.append(Row((Cell("All tasks"), Cell(""), *totals), is_summary=True))
    labels = (*_PARTS.values(), *(["Rows cut"] if is_cut else []))
    columns = (Column("Task", is_number=False), Column("Answers", is_number=False), *map(Column, labels))
    note = f"Letters: groups of the plan; {group_letter(0)} is group-0 among the adapters, and so on."
    if is_cut:
        note += (
            " Rows cut: those longer than data.max_length, which lost the start of their text; beside it, the "
            "data.max_length that would keep 99% of the task's rows whole."
        )
    return Table("Tasks and their rows", columns, tuple(rows), note)


def _cut_cell(task: TaskRecord) -> Cell:
    needed = f"{task.fitting_length:,} tokens" if task.fitting_length else ""
    return Cell(format_percent(task.cut_share), needed)
