"""The page of the study of sharpness, from its plain values alone. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ensemblelora.analysis.charts import Axis, Series, draw_series
from ensemblelora.analysis.sharpness_summary import ALL, MEASURES, read_measures
from ensemblelora.report.document import Block, Bullets, Cell, Column, Figure, FigureRow, Row, Section, Table, Text
from ensemblelora.report.wording import NOTHING, count, format_interval, format_number, format_percent, format_signed

__all__ = ["headline_sharpness", "write_sharpness"]

_SHOWN = ("largest trace", "largest trace, rescaled", "largest trace, first member", "largest trace of the weights")


def headline_sharpness(result: Mapping[str, Any]) -> str:
    """Say in one sentence how sharpness goes with the gap, over all adapters or the one study there is."""
    records = [record for record in result["correlations"] if record["measure"] == _SHOWN[0]]
    record = next((one for one in records if one["scope"] == ALL), records[0])
    found = record["spearman"]
    interval = format_interval(found["low"], found["high"], digits=2)
    told = f" ({result['confidence']:.0%} interval {interval})" if interval else ""
    tasks = {point["task"] for point in result["points"]}
    return (
        f"Within {count(len(tasks), 'task')}, over {count(record['n_points'], 'adapter')} or ensembles, the Hessian's "
        f"largest trace and the generalisation gap have a rank correlation of {format_signed(found['value'], 2)}{told}."
    )


def write_sharpness(result: Mapping[str, Any]) -> Iterable[Section]:
    """Write the sections: pictures, changes, correlations, data that was not trained on, and every adapter."""
    yield Section("sharpness-gap", "Sharpness and the generalisation gap", _write_pictures(result))
    yield Section("changes", "What changes gap and sharpness", _write_changes(result))
    yield Section("correlations", "Does sharpness go with the gap?", [_write_correlations(result["correlations"])])
    if result["out_of_domain"]:
        table = _write_correlations(result["out_of_domain"])
        limits = Bullets(tuple(result["limits"]))
        yield Section("out-of-domain", "Does it say anything of data that was not trained on?", [table, limits])
    yield Section("adapters", "Every adapter", [_write_points(result["points"])])


def _write_pictures(result: Mapping[str, Any]) -> list[Block]:
    figures = tuple(_draw(result["points"], name) for name in ("largest trace", "largest trace of the weights"))
    text = (
        "Gap: mean loss of test rows less that of as many training rows. Trace: of the loss's Hessian at a training "
        "row, over all members jointly; its largest value over rows, found by some random vectors and estimated again "
        "by others. Averaging k adapters with weights 1/k takes a factor of k off the GGN part of it whatever the loss "
        "looks like, which `rescaled` puts back; the first member's own numbers alone would show k squared."
    )
    return [Text(text), FigureRow(tuple(figure for figure in figures if figure), "One mark an adapter or ensemble")]


def _draw(points: Sequence[Mapping[str, Any]], measure: str) -> Figure | None:
    """Draw the gap over a measure, a series for each study and task."""
    marks = [(point, value) for point in points if (value := read_measures(point["sharpness"]).get(measure))]
    if not marks:
        return None
    names = dict.fromkeys((point["scope"], point["task"]) for point, _ in marks)
    owned = {name: [mark for mark in marks if (mark[0]["scope"], mark[0]["task"]) == name] for name in names}
    series = [
        Series(
            f"{scope}, {task}",
            [value for _, value in own],
            [point["gap"] for point, _ in own],
            texts=[f"{point['label']}, seed {point['seed']}" for point, _ in own],
            has_line=False,
        )
        for (scope, task), own in owned.items()
    ]
    is_positive = all(value > 0 for _, value in marks)
    title = f"Gap over the {measure}"
    alt = f"Scatter of the generalisation gap over the {measure} of {len(marks)} adapters and ensembles."
    x = Axis(measure, kind="log" if is_positive else "linear")
    return draw_series(measure.replace(" ", "-"), title, alt, series, x, Axis("generalisation gap", marks=(0.0,)))


def _write_changes(result: Mapping[str, Any]) -> list[Block]:
    """A table a study, against its reference."""
    changes = result["changes"]
    studies = list(dict.fromkeys((change["scope"], change["reference"]) for change in changes))
    columns = (
        Column("Way to train", is_number=False),
        Column("Task", is_number=False),
        Column("Gap"),
        Column("Change of gap"),
        Column("Relative"),
        *(Column(_begin(name)) for name in _SHOWN),
    )
    note = (
        f"Changes against the reference of each study, with {result['confidence']:.0%} intervals over groups of rows, "
        "drawn together; those of traces hold the error of the random vectors alone. Relative change of the gap: a "
        "dash where the reference's is not surely above zero."
    )
    return [
        Table(
            f"{scope}, against {reference}",
            columns,
            tuple(_change_row(change) for change in changes if (change["scope"], change["reference"]) == study),
            note,
        )
        for study in studies
        for scope, reference in [study]
    ]


def _change_row(change: Mapping[str, Any]) -> Row:
    spread = "" if change["gap_seed_sd"] is None else f"± {format_number(change['gap_seed_sd'])} over seeds"
    is_reference = change["label"] == change["reference"]
    task = "mean over tasks" if change["task"] == ALL else change["task"]
    gap = change["gap_change"]
    relative = change["relative_gap_change"]
    cells = [Cell(NOTHING), Cell(NOTHING)] if is_reference else [_difference(gap), _percentage(relative)]
    traces = [Cell(NOTHING) if is_reference else _percentage(change["sharpness_changes"].get(name)) for name in _SHOWN]
    return Row(
        (Cell(change["label"]), Cell(task), Cell(format_number(change["gap"]), spread), *cells, *traces),
        is_summary=change["task"] == ALL,
    )


def _difference(estimate: Mapping[str, Any]) -> Cell:
    return Cell(format_signed(estimate["value"]), format_interval(estimate["low"], estimate["high"]))


def _percentage(estimate: Mapping[str, Any] | None) -> Cell:
    if estimate is None or estimate["value"] is None:
        return Cell(NOTHING)
    text = f"{format_signed(100 * estimate['value'], 0)}%"
    return Cell(text, format_interval(estimate["low"], estimate["high"], scale=100, digits=0))


def _write_correlations(records: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("Among", is_number=False),
        Column("Of", is_number=False),
        Column("With", is_number=False),
        Column("Points"),
        Column("Spearman"),
        Column("Pearson"),
    )
    rows = tuple(
        Row(
            (
                Cell(record["scope"]),
                Cell(record["measure"]),
                Cell(record["outcome"]),
                Cell(str(record["n_points"])),
                *(_coefficient(record[name]) for name in ("spearman", "pearson")),
            ),
            is_summary=record["scope"].startswith(ALL),
        )
        for record in records
    )
    note = (
        "Within tasks, or pairs of tasks, pooled; intervals by drawing ways to train, with all their tasks and seeds."
    )
    return Table("Correlations", columns, rows, note)


def _coefficient(estimate: Mapping[str, Any]) -> Cell:
    interval = format_interval(estimate["low"], estimate["high"], digits=2)
    return Cell(format_signed(estimate["value"], 2), interval)


def _write_points(points: Sequence[Mapping[str, Any]]) -> Table:
    shown = [name for name in MEASURES if any(name in read_measures(point["sharpness"]) for point in points)]
    columns = (
        Column("Adapter", is_number=False),
        Column("Task", is_number=False),
        Column("Seed"),
        *map(Column, ("Train loss", "Test loss", "Gap", "Accuracy")),
        *(Column(_begin(name)) for name in shown),
    )
    rows = tuple(
        Row(
            (
                Cell(point["label"], point["part"]),
                Cell(point["task"]),
                Cell(str(point["seed"])),
                Cell(format_number(point["train_nll"])),
                Cell(format_number(point["test_nll"])),
                Cell(format_number(point["gap"]), format_interval(point["low"], point["high"])),
                Cell(format_percent(point["accuracy"])),
                *(_measure_cell(point, name) for name in shown),
            )
        )
        for point in points
    )
    note = "Traces with the standard error that random vectors give them."
    return Table("Losses and traces", columns, rows, note, summary="Show every adapter")


def _measure_cell(point: Mapping[str, Any], name: str) -> Cell:
    value = read_measures(point["sharpness"]).get(name)
    place, key = MEASURES[name]
    error = point["sharpness"].get(place, {}).get(f"{key}_se")
    return Cell(NOTHING if value is None else f"{value:.4g}", "" if error is None else f"± {error:.2g}")


def _begin(name: str) -> str:
    """Begin with a capital, and leave the rest."""
    return name[0].upper() + name[1:]
