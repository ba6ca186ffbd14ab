"""The page of analysis ``transfer``, from its plain values alone. No torch.

In: ``result.json``. Out: sections: rates of positive transfer, their price, the map of who helps whom, what the oracle
knew of it, and memory against the number of adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ensemblelora.analysis.charts import Axis, Series, draw_map, draw_series
from ensemblelora.report.document import Block, Bullets, Cell, Column, FigureRow, Legend, Row, Section, Table, Text
from ensemblelora.report.wording import (
    count,
    format_bytes,
    format_flops,
    format_interval,
    format_number,
    format_percent,
    format_ratio,
    format_signed,
)

__all__ = ["headline_transfer", "list_rates", "write_transfer"]

_KINDS = {"plain": "averaged A and B", "exact": "averaged B A"}
_MOST_NAMED = 10

Result = Mapping[str, Any]


def write_transfer(result: Result) -> list[Section]:
    """Compose the page's sections."""
    sections = [_write_rates(result), _write_price(result)]
    if result["map"] is not None:
        sections += [_write_map(result), _write_agreement(result)]
    return [*sections, _write_memory(result), _list_limits(result)]


def headline_transfer(result: Result) -> str:
    """Say in one sentence how often tasks gain by others."""
    base, found = next(iter(result["bases"].items()))
    parts = []
    for what, record in (("pairs", found["pairs"]), ("all tasks together", found["all"])):
        if record is not None:
            rate = record["rate"]
            interval = format_interval(rate["low"], rate["high"], scale=100, digits=0)
            told = f" ({interval})" if interval else ""
            parts.append(f"{format_percent(rate['value'], 0)}{told} of {what}")
    return f"With {base}, a task gains by its partners in {' and in '.join(parts)}."


def list_rates(result: Result) -> Iterator[tuple[str, str, Result]]:
    """Yield every rate of positive transfer: base method, what was fine-tuned or made, and the rate."""
    for base, found in result["bases"].items():
        if found["pairs"] is not None:
            yield base, "pairs", found["pairs"]["rate"]
        yield base, "all tasks", found["all"]["rate"]
        for kind, own in found["averages"].items():
            for what, record in (("pairs", own["pairs"]), ("all tasks", own["all"])):
                if record is not None:
                    yield base, f"{what}, {_KINDS[kind]}", record["rate"]
        for name, method in found["methods"].items():
            if name not in ("shared", "average", "single") and method["transfer"] is not None:
                yield base, f"all tasks, {name}", method["transfer"]["rate"]


def _write_rates(result: Result) -> Section:
    columns = (
        Column("Base method", is_number=False),
        Column("Fine-tuned on", is_number=False),
        Column("Positive"),
        Column("If the undecided were"),
        Column("Decided positive"),
        Column("Decided negative"),
        Column("Undecided"),
    )
    rows = tuple(
        Row(
            (
                Cell(base),
                Cell(what, count(rate["n_subsets"], "subset")),
                Cell(format_percent(rate["value"], 0), format_interval(rate["low"], rate["high"], scale=100, digits=0)),
                Cell(format_interval(rate["decided_low"], rate["decided_high"], scale=100, digits=0)),
                *(Cell(str(rate[key])) for key in ("n_positive", "n_negative", "n_undecided")),
            )
        )
        for base, what, rate in list_rates(result)
    )
    text = Text(
        f"A task gains where its {result['part']} loss together is below its loss alone. Counted by the sign of the "
        f"measured difference; with {result['confidence']:.0%} intervals over rows and, where there are several, "
        "seeds. A cell is decided where its own interval leaves zero out. Noise turns signs and pulls a rate towards a "
        "half, so the range in the fourth column is what holds in any case."
    )
    return Section("rates", "How often others help", [text, Table("Positive transfer, %", columns, rows)])


def _write_price(result: Result) -> Section:
    columns = (
        Column("Method", is_number=False),
        Column("Positive, %"),
        Column("Mean loss"),
        Column("FLOPs"),
        Column("Passes"),
        Column("Weights that answer"),
    )
    rows, points = [], []
    for base, found in result["bases"].items():
        for name, method in found["methods"].items():
            rate = None if method["transfer"] is None else method["transfer"]["rate"]
            rows.append(_price_row(base, name, method, rate))
            if rate is not None:
                points.append((f"{base}, {name}", method, rate))
    blocks: list[Block] = (
        [
            FigureRow(
                tuple(
                    draw_series(
                        f"price-{key}",
                        f"Positive transfer against {title}",
                        f"Rates of {len(points)} methods against {title}.",
                        [
                            Series(name, [method[key]], [100 * rate["value"]], *_ends(rate), has_line=False)
                            for name, method, rate in points
                        ],
                        Axis(title, "log", "~s"),
                        Axis("positive transfer, %"),
                    )
                    for key, title in (("flops", "FLOPs to make"), ("weight_bytes", "bytes of weights that answer"))
                ),
                "All tasks together.",
            )
        ]
        if points
        else []
    )
    note = "single: an adapter a task, with which the others are compared. Passes: forward passes of a prediction."
    blocks.append(Table("Price of positive transfer", columns, tuple(rows), note))
    return Section("price", "What it costs", blocks)


def _price_row(base: str, name: str, method: Result, rate: Result | None) -> Row:
    positive = Cell(format_number(None))
    if rate is not None:
        interval = format_interval(rate["low"], rate["high"], scale=100, digits=0)
        positive = Cell(format_number(100 * rate["value"], 0), interval)
    return Row(
        (
            Cell(name, base),
            positive,
            Cell(format_number(method["loss"])),
            Cell(format_flops(method["flops"])),
            Cell(format_ratio(method["forward_passes"])),
            Cell(format_bytes(method["weight_bytes"])),
        )
    )


def _ends(rate: Result) -> tuple[list[float | None], list[float | None]]:
    low, high = (None if rate[end] is None else 100 * rate[end] for end in ("low", "high"))
    return [low], [high]


def _write_map(result: Result) -> Section:
    tasks, cells = result["tasks"], result["map"]["cells"]
    true, predicted = _arrange(tasks, cells, "difference", -1.0), _arrange(tasks, cells, "predicted_gain", 1.0)
    known = [abs(value) for grid in (true, predicted) for row in grid for value in row if value is not None]
    figures = tuple(
        draw_map(name, title, tasks, grid, reach=max(known, default=0.0) or 1.0, hover=_hover(tasks, cells))
        for name, title, grid in (
            ("map-true", "Measured gain", true),
            ("map-predicted", "Gain the oracle predicts", predicted),
        )
    )
    decided = [cell for cell in cells if cell["verdict"] != "undecided"]
    ranked = sorted(decided, key=lambda cell: float(cell["difference"]))
    items = [*ranked[: _MOST_NAMED // 2], *ranked[len(ranked) - min(len(ranked), _MOST_NAMED // 2) :]]
    rows = tuple(
        Row(
            (
                Cell(cell["task"]),
                Cell(cell["partner"]),
                Cell(format_signed(-cell["difference"]), format_interval(-cell["high"], -cell["low"])),
                Cell(format_signed(cell["predicted_gain"])),
            )
        )
        for cell in dict((_key(cell), cell) for cell in items).values()
    )
    columns = (
        Column("Task", is_number=False),
        Column("Trained with", is_number=False),
        Column("Gain"),
        Column("Predicted"),
    )
    note = f"{len(decided)} of {len(cells)} ordered pairs are decided."
    text = Text(
        "Gain: validation loss of the row's task alone, less that of the pair with the column's task, in nats; blue "
        f"helps. Base method: {result['map']['base']}."
    )
    legend = Legend("hurts", "helps", "diverging")
    blocks: list[Block] = [text, FigureRow(figures, "The same colours in both.", legend)]
    last = Table("Decided cells, the farthest", columns, rows, note) if rows else Text(note)
    return Section("map", "Who helps whom", [*blocks, last])


def _write_agreement(result: Result) -> Section:
    found, cells = result["map"], result["map"]["cells"]
    gains = found["gains"]
    figure = draw_series(
        "gains",
        "Predicted and measured gain of every task by every partner",
        f"Scatter of {len(cells)} gains; correlation {format_number(gains['pearson']['value'], 2)}.",
        [
            Series(
                verdict,
                [cell["predicted_gain"] for cell in own],
                [-cell["difference"] for cell in own],
                texts=[f"{cell['task']} with {cell['partner']}" for cell in own],
                has_line=False,
            )
            for verdict in ("positive", "undecided", "negative")
            if (own := [cell for cell in cells if cell["verdict"] == verdict])
        ],
        Axis("predicted gain, nats"),
        Axis("measured gain, nats"),
        has_diagonal=True,
    )
    rows = [(title, gains[key]) for key, title in _GAINS.items()]
    if found["losses"] is not None:
        rows += [(title, found["losses"][key]) for key, title in _LOSSES.items()]
    if found["signs"] is not None:
        rows += [(title, found["signs"][key]) for key, title in _SIGNS.items()]
    if found["one_or_all"] is not None:
        rows += [(title, found["one_or_all"][key]) for key, title in _ONE_OR_ALL.items()]
    table = Table(
        "The oracle against true fine-tunings",
        (Column("What", is_number=False), Column("Value")),
        tuple(
            Row((Cell(title), Cell(format_number(one["value"]), format_interval(one["low"], one["high"]))))
            for title, one in rows
        ),
        "Gains: intervals draw pairs and tasks at once.",
    )
    return Section("agreement", "Does the oracle know", [FigureRow((figure,), "A point a task and partner."), table])


_GAINS = {
    "pearson": "Gains: correlation",
    "spearman": "Gains: rank correlation",
    "within_pearson": "Gains: correlation within tasks",
    "sign_share": "Gains: share of signs",
}
_LOSSES = {
    "within_pearson": "Losses of pairs: correlation within tasks",
    "ceiling_within_pearson": "The most that a perfect predictor could reach",
    "r2_over_task_mean": "Losses of pairs: R2 over the task's mean",
    "slope": "Slope of true on predicted",
}
_SIGNS = {
    "share_agreeing": "Signs: share agreeing",
    "share_of_commoner": "Always naming the commoner sign",
    "clear_share": "Signs of clear differences: share agreeing",
}
_ONE_OR_ALL = {
    "true_mean": "All together less alone, measured",
    "predicted_mean": "All together less alone, predicted",
    "share_agreeing": "All together or alone: share of tasks whose sign agrees",
}


def _write_memory(result: Result) -> Section:
    columns = (
        Column("Base method", is_number=False),
        Column("Adapters"),
        Column("Weights"),
        Column("Added to the process"),
        Column("Peak of the accelerator"),
    )
    rows = tuple(
        Row(
            (
                Cell(base),
                Cell(str(one["n_adapters"])),
                Cell(format_bytes(one["weight_bytes"])),
                Cell(format_bytes(one["added_memory_bytes"])),
                Cell(format_bytes(one["peak_accelerator_bytes"])),
            )
        )
        for base, measured in result["memory"].items()
        for one in measured
    )
    note = (
        "Added: by the adapters and by predicting a batch of four rows with all of them, at its peak; a process that "
        "has memory to spare from before adds less than it needs."
    )
    return Section("memory", "Memory against the number of adapters", [Table("Memory", columns, rows, note)])


def _list_limits(result: Result) -> Section:
    items = ["Intervals are for these tasks and the rows drawn; which rows were learnt from is the same throughout."]
    if not any(found["all"]["has_seed_noise"] for found in result["bases"].values()):
        items.append("One seed: intervals know of rows alone, and too many cells are decided.")
    chance = 1 - result["confidence"]
    n_cells = sum(_count_cells(rate) for _, what, rate in list_rates(result) if what == "pairs")
    if n_cells:
        items.append(
            f"Each cell is decided by itself: of {n_cells} cells of pairs, about {chance * n_cells:.0f} would be if "
            "nothing helped or hurt at all."
        )
    if 0 < result["n_pairs"] < result["n_all_pairs"]:
        which = "those of the shortest texts" if result["options"]["shortest"] else "drawn so that tasks occur alike"
        items.append(f"{result['n_pairs']} of {result['n_all_pairs']} pairs, {which}: the rate of pairs is theirs.")
    items.append(
        f"The map is of validation rows, by which checkpoints were chosen too; rates are of {result['part']} rows."
    )
    return Section("limits", "What this can't say", [Bullets(tuple(items))])


def _count_cells(rate: Result) -> int:
    return int(rate["n_positive"] + rate["n_negative"] + rate["n_undecided"])


def _arrange(tasks: Sequence[str], cells: Sequence[Result], key: str, sign: float) -> list[list[float | None]]:
    grid: list[list[float | None]] = [[None] * len(tasks) for _ in tasks]
    for cell in cells:
        grid[tasks.index(cell["task"])][tasks.index(cell["partner"])] = sign * cell[key]
    return grid


def _hover(tasks: Sequence[str], cells: Sequence[Result]) -> list[list[str]]:
    texts = [["" for _ in tasks] for _ in tasks]
    for cell in cells:
        low, high = (None if cell[end] is None else -cell[end] for end in ("high", "low"))
        gain = f"{format_signed(-cell['difference'])} ({format_interval(low, high)})"
        told = f"{cell['task']} with {cell['partner']}: {gain}, {cell['verdict']}"
        texts[tasks.index(cell["task"])][tasks.index(cell["partner"])] = (
            f"{told}; predicted {format_signed(cell['predicted_gain'])}"
        )
    return texts


def _key(cell: Result) -> tuple[str, str]:
    return cell["task"], cell["partner"]
