"""The sections on cost, warnings, and how to make the run again."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable

from ensemblelora.artifacts import CONFIG_FILE
from ensemblelora.report.document import Block, Bullets, Cell, Column, Fold, Row, Section, Table, Text
from ensemblelora.report.headline import method_label
from ensemblelora.report.records import CostsRecord, MethodCosts, RunRecord, StageCosts
from ensemblelora.report.result_sections import list_warnings
from ensemblelora.report.wording import (
    format_bytes,
    format_flops,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
)

__all__ = ["write_costs", "write_reproduction", "write_warnings"]


def write_costs(run: RunRecord) -> Section | None:
    """Show FLOPs, memory and time by stage and by method, each with a bar against the largest of its column."""
    costs = run.costs
    if costs is None or not (costs.stages or costs.methods):
        return None
    blocks: list[Block] = [Text(_summarize(costs))]
    if costs.stages:
        blocks.append(_stage_table(costs))
    if costs.methods:
        blocks.append(_method_table(costs.methods))
    return Section("costs", "What it cost", blocks)


def write_warnings(run: RunRecord) -> Section:
    """List what to keep in mind before believing the plan."""
    if warnings := list_warnings(run):
        return Section("warnings", "Warnings", [Bullets(warnings, is_warning=True)])
    return Section("warnings", "Warnings", [Text("None were raised.")])


def write_reproduction(run: RunRecord) -> Section:
    """Say how to make the run again: command, environment, and the config folded away."""
    place = run.config.out or run.name
    command = f"ensemblelora run {shlex.quote(f'{place}/{CONFIG_FILE}')}"
    blocks: list[Block] = [
        Text(
            "The run folder's config holds every setting, defaults included. A finished stage is not run again; give "
            "another folder with --out to start afresh. Paths in it that do not begin with / count from the folder "
            "that the run was started in."
        ),
        Fold(command, language="sh"),
    ]
    facts = _environment(run)
    if facts:
        columns = (Column("What", is_number=False), Column("Used here", is_number=False))
        rows = tuple(Row((Cell(name), Cell(value))) for name, value in facts)
        blocks.append(Table("Environment", columns, rows))
    if run.config.text:
        blocks.append(Fold(run.config.text.strip(), summary=f"The config ({CONFIG_FILE})", language="yaml"))
    return Section("reproduce", "Make it again", blocks)


def _summarize(costs: CostsRecord) -> str:
    flops = sum(stage.flops or 0.0 for stage in costs.stages)
    peak = max((stage.peak_memory_bytes or 0.0 for stage in costs.stages), default=0.0)
    parts = [format_seconds(costs.wall_seconds), format_flops(flops), f"at most {format_bytes(peak)} of memory"]
    text = f"In all {', '.join(parts)}." if costs.stages else ""
    shared, ours = costs.methods.get("shared"), costs.methods.get("ensemble")
    if shared and ours and shared.train_flops and ours.train_flops is not None:
        extra = (ours.train_flops + (ours.select_flops or 0.0)) / shared.train_flops
        text += (
            f" Against one adapter for all, the ensemble took {format_ratio(extra)} times the FLOPs to make, "
            "choosing the groups included."
        )
        if shared.inference_forward_passes and ours.inference_forward_passes:
            passes = ours.inference_forward_passes / shared.inference_forward_passes
            text += f" It takes {format_ratio(passes)} times as many forward passes to use."
    return text.strip() or "The ledger is still empty."


def _stage_table(costs: CostsRecord) -> Table:
    stages = costs.stages
    memory = [stage.peak_memory_bytes for stage in stages]
    accelerator = [stage.peak_accelerator_bytes for stage in stages]
    cells = [
        _bars([stage.wall_seconds for stage in stages], format_seconds),
        _bars([stage.flops or None for stage in stages], format_flops),
        _bars(memory, format_bytes),
        *([_bars(accelerator, format_bytes)] if any(accelerator) else []),
        [_token_cell(stage) for stage in stages],
    ]
    total = (
        Cell("All stages"),
        Cell(format_seconds(costs.wall_seconds)),
        Cell(format_flops(_total(stage.flops for stage in stages))),
        _largest_cell(memory),
        *([_largest_cell(accelerator)] if any(accelerator) else []),
        Cell(_format_tokens(_total(stage.n_tokens for stage in stages))),
    )
    labels = ("Wall time", "FLOPs", "Peak memory", *(("Accelerator memory",) if any(accelerator) else ()), "Tokens")
    columns = (Column("Stage", is_number=False), *map(Column, labels))
    rows = [Row((Cell(stage.stage), *row)) for stage, *row in zip(stages, *cells, strict=True)]
    note = "FLOPs by formula; memory and time as measured, writing this report left out. Bars compare within a column."
    return Table("By stage", columns, (*rows, Row(total, is_summary=True)), note)


def _method_table(methods: dict[str, MethodCosts]) -> Table:
    places = {"base": 0, "shared": 1, "ensemble": 3}
    names = sorted(methods, key=lambda name: places.get(name, 2))
    items = [methods[name] for name in names]
    cells = [
        _bars([item.train_flops for item in items], format_flops),
        _bars([item.select_flops for item in items], format_flops),
        _bars([item.train_seconds for item in items], format_seconds),
        _bars([item.inference_forward_passes for item in items], format_ratio),
        _bars([item.adapter_bytes for item in items], format_bytes),
    ]
    rows = tuple(Row((Cell(method_label(name)), *row)) for name, *row in zip(names, *cells, strict=True))
    labels = ("Training", "Choosing groups", "Training time", "Forward passes", "Adapters")
    columns = (Column("Method", is_number=False), *map(Column, labels))
    note = (
        "Forward passes: what one prediction takes, in passes of the base model, averaged over tasks: one for each "
        "group's adapter and booster that has a weight, and where there are boosters one of the start they are "
        "measured from."
    )
    return Table("By method", columns, rows, note)


def _bars(values: list[float | None], show: Callable[[float | None], str]) -> list[Cell]:
    largest = max((value for value in values if value is not None), default=0.0)
    return [Cell(show(value), share=value / largest if value is not None and largest > 0 else None) for value in values]


def _largest_cell(values: list[float | None]) -> Cell:
    return Cell(format_bytes(max((value for value in values if value is not None), default=None)), "largest")


def _token_cell(stage: StageCosts) -> Cell:
    if not stage.n_tokens:
        return Cell(format_number(None))
    padding = None
    if stage.n_padded_tokens is not None and stage.n_padded_tokens > 0:
        padding = 1 - stage.n_tokens / stage.n_padded_tokens
    return Cell(_format_tokens(stage.n_tokens), "" if padding is None else f"{format_percent(padding, 0)} padding")


def _format_tokens(value: float | None) -> str:
    return format_number(None) if value is None else f"{value:,.0f}"


def _total(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _environment(run: RunRecord) -> list[tuple[str, str]]:
    environment, model = run.environment, run.environment.model
    counts = (model.n_parameters, environment.max_tokens_per_batch)
    parameters, largest = (None if n is None else f"{n:,}" for n in counts)
    facts = [
        ("Model", model.name),
        ("Parameters", parameters),
        ("Precision", model.dtype),
        ("Model fingerprint", model.fingerprint),
        ("Seed", None if run.config.seed is None else str(run.config.seed)),
        ("ensemblelora", environment.package_version),
        ("Python", environment.python),
        ("PyTorch", environment.torch),
        ("transformers", environment.transformers),
        ("peft", environment.peft),
        ("Device", environment.device),
        ("Platform", environment.platform),
        ("Tokens of a forward pass", largest and f"up to {largest}, padding included"),
        ("Made", environment.created),
    ]
    return [(name, value) for name, value in facts if value]
