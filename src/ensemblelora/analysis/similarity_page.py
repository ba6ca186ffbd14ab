"""The page of adapter similarity, from its plain values alone. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ensemblelora.analysis.charts import Axis, Series, draw_series
from ensemblelora.report.document import Block, Cell, Column, Figure, FigureRow, Row, Section, Table, Text
from ensemblelora.report.wording import format_interval, format_number, format_signed

__all__ = ["headline_similarity", "write_similarity"]

_COLUMNS = {
    "overlap": "Overlap",
    "left": "What is written",
    "right": "What is read",
    "cosine": "Cosine of the changes",
}
_KINDS = {"together": "fine-tuned together", "averaged": "averaged", "apart": "single ones, of each other"}
_HOW = (
    "Overlap: mean over modules of how much of the top singular vectors' spaces two adapters share, of what the "
    "changes write and of what they read. All adapters of a seed begin with the same values of what reads, so that "
    "side is alike whatever was learnt; what is written begins at zero. Cosine: between all changes together. Averaged "
    "adapters are the exact averages of LoRA's changes, or of a bottleneck's tensors; of their singular vectors as "
    "many count as one adapter has."
)


def headline_similarity(result: Mapping[str, Any]) -> str:
    """Say in one sentence how the similarity of adapters fine-tuned together goes with the number of tasks."""
    told = []
    for base in dict.fromkeys(record["base"] for record in result["by_size"]):
        own = [record for record in result["by_size"] if (record["base"], record["kind"]) == (base, "together")]
        if not own:
            continue
        first, last = own[0], own[-1]
        values = " to ".join(format_number(record["overlap"]["value"], 2) for record in (first, last))
        told.append(f"{base}: {values} from {first['size']} to {last['size']} tasks")
    if not told:
        return "No adapter for several tasks can be compared: none moved from where it began."
    return f"Overlap of adapters trained together with their tasks' own, {'; '.join(told)}."


def write_similarity(result: Mapping[str, Any]) -> Iterable[Section]:
    """Write the sections: a picture, the numbers by size, and how similarity goes with size."""
    figures = tuple(_draw(result["by_size"], name) for name in ("overlap", "left", "cosine"))
    blocks: list[Block] = [
        Text(_HOW),
        FigureRow(figures, "Similarity with the tasks' own adapters, by number of tasks"),
    ]
    yield Section("similarity", "Adapters for several tasks and for one", [*blocks, _write_sizes(result)])
    yield Section("trend", "As the tasks become more", [_write_trends(result["trends"])])


def _draw(records: Sequence[Mapping[str, Any]], name: str) -> Figure:
    """Draw a field over the number of tasks, a line for each base method and kind."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        lines.setdefault(f"{record['base']}, {_KINDS[record['kind']]}", []).append(record)
    series = [
        Series(
            line,
            [record["size"] for record in own],
            [record[name]["value"] for record in own],
            [record[name]["low"] for record in own],
            [record[name]["high"] for record in own],
        )
        for line, own in lines.items()
    ]
    title = _COLUMNS[name]
    alt = f"{title} between adapters for several tasks and for one, over the number of tasks, {len(lines)} lines."
    return draw_series(f"similarity-{name}", title, alt, series, Axis("tasks"), Axis(title.lower()))


def _write_sizes(result: Mapping[str, Any]) -> Table:
    columns = (
        Column("Adapters", is_number=False),
        Column("Tasks"),
        Column("Compared"),
        *(map(Column, _COLUMNS.values())),
        Column("By chance"),
    )
    rows = tuple(
        Row(
            (
                Cell(f"{record['base']}, {_KINDS[record['kind']]}"),
                Cell(str(record["size"])),
                Cell(str(record["n"])),
                *(_estimate(record[name]) for name in _COLUMNS),
                Cell(format_number(record["chance"])),
            )
        )
        for record in result["by_size"]
    )
    note = f"{result['confidence']:.0%} intervals over subsets. By chance: the overlap of random subspaces."
    return Table("By number of tasks", columns, rows, note)


def _write_trends(records: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("Adapters", is_number=False),
        Column("Of", is_number=False),
        Column("Points"),
        Column("Spearman"),
        Column("Pearson"),
    )
    rows = tuple(
        Row(
            (
                Cell(f"{record['base']}, {_KINDS[record['kind']]}"),
                Cell(_COLUMNS[record["field"]]),
                Cell(str(record["n_points"])),
                *(_estimate(record[name], digits=2, is_signed=True) for name in ("spearman", "pearson")),
            )
        )
        for record in records
    )
    return Table("Correlation with the number of tasks", columns, rows, "Intervals by drawing subsets, with all seeds.")


def _estimate(estimate: Mapping[str, Any], *, digits: int = 3, is_signed: bool = False) -> Cell:
    text = (format_signed if is_signed else format_number)(estimate["value"], digits)
    return Cell(text, format_interval(estimate["low"], estimate["high"], digits=digits))
