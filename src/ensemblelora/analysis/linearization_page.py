"""The page of analysis ``linearization``, from its plain values alone. No torch.

In: ``result.json``. Out: sections: the error by distance, where it breaks, its order, ends of fine-tunings by base
method, rank and epochs, and how far they went.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ensemblelora.analysis.charts import Axis, Series, draw_series
from ensemblelora.report.document import Block, Bullets, Cell, Column, Figure, FigureRow, Row, Section, Table, Text
from ensemblelora.report.wording import format_number, format_percent

__all__ = ["headline_linearization", "name_variant", "write_linearization"]

_KINDS = {
    "line": "to the fine-tuned adapter",
    "dual": "the oracle's fit, by the rows' gradients",
    "projected": "the oracle's fit, expanded (P w)",
}
_LOWEST_R2 = -1.0
"""drawn; far away it falls without bound"""
_DIRECTIONS, _BASES = "along several lines", "by base method"
_WITH_ERROR = (_DIRECTIONS, _BASES)
_MEASURES = {
    "squared_relative": "Mean squared relative error",
    "rms_relative": "RMS relative error",
    "r2_over_zero_order": "R2 over zero order",
}

Result = Mapping[str, Any]


def write_linearization(result: Result) -> list[Section]:
    """Compose the page's sections."""
    return [
        _write_distances(result),
        _write_law(result),
        _write_ends(result),
        _write_lengths(result),
        _write_paths(result),
        _list_limits(result),
    ]


def headline_linearization(result: Result) -> str:
    """Say in one sentence how well fine-tuned adapters are described, and where that ends."""
    own = next((row for row in result["ends"] if row["precision"] == "float32"), None)
    if own is None or own["r2_over_zero_order"]["value"] is None:
        return "No fine-tuned adapter has moved any output."
    broken = next((row for row in result["breaks"] if row["kind"] == "line" and _is_like(row, own)), None)
    end = None if broken is None else broken.get("r2_below_0.5")
    told = f"; half of it is lost at {format_percent(end, 2)}" if end is not None else ""
    r2, error = own["r2_over_zero_order"]["value"], own["rms_relative"]["value"]
    return (
        f"Where fine-tuning ends, at {format_percent(own['distance'], 2)} of the model's norm, the expansion explains "
        f"{format_percent(r2)} of what outputs changed, within {format_percent(error)} of them{told}."
    )


def name_variant(row: Result) -> str:
    """What a variant is called: base method, rank, epochs, and the precision where it is not float32.

    Example:
        >>> name_variant({"base": "lora", "r": 8, "epochs": 3, "precision": "native"})
        'lora, r 8, 3 epochs, native precision'
    """
    parts = [str(row["base"]), *([f"r {row['r']}"] if row["r"] is not None else [])]
    parts.append(f"{row['epochs']} epoch{'s' if row['epochs'] != 1 else ''}")
    return ", ".join([*parts, *(["native precision"] if row.get("precision") == "native" else [])])


def _write_distances(result: Result) -> Section:
    families = _split_families(result["by_distance"])
    figures = [
        _draw_errors(f"error-{place}-{measure}", family, measure, series)
        for place, (family, series) in enumerate(families.items())
        for measure in ("r2_over_zero_order", *(["squared_relative"] if family in _WITH_ERROR else []))
    ]
    blocks: list[Block] = [
        Text(
            "The expansion at theta0 against the model itself, along straight lines from theta0, on validation rows. "
            "Distances are over the norm of all weights. R2 over zero order: 1 is exact, 0 no better than to say that "
            "nothing changes."
        )
    ]
    if figures:
        blocks.append(FigureRow(tuple(figures), f"{_say_intervals(result)} R2 is cut off at {_LOWEST_R2:g}."))
    blocks.append(_tabulate_breaks(result))
    return Section("distance", "The error by distance", blocks)


def _draw_errors(name: str, family: str, measure: str, series: Mapping[str, Sequence[Result]]) -> Figure:
    title, told = _MEASURES[measure], _tell([row for own in series.values() for row in own], measure)
    return draw_series(
        name,
        f"{title}, {family}",
        f"{title} against relative distance, {family}: {told}.",
        [_make_series(line, own, measure) for line, own in series.items()],
        Axis("distance over the norm of the model", "log", ".2~%"),
        Axis(title, marks=(0.0,)) if measure.startswith("r2") else Axis(title, "log", ".2~g"),
    )


def _write_law(result: Result) -> Section:
    rows = [row for row in result["law"] if row["exponent"]["value"] is not None]
    text = Text(
        "A remainder of second order grows with the square of the distance: exponent 2, and a constant quotient of the "
        "RMS remainder by the square of the distance. Where rounding is all there is, the exponent is 0: that is so "
        "for small distances in the model's own precision."
    )
    families = {family: series for family, series in _split_families(rows).items() if family in _WITH_ERROR}
    figures = tuple(
        draw_series(
            f"law-{place}",
            f"Exponent of the remainder, {family}",
            f"Slope of the remainder's logarithm between neighbouring distances: {_tell(rows, 'exponent')}.",
            [
                Series(
                    name,
                    [row["to"] for row in own],
                    [row["exponent"]["value"] for row in own],
                    [row["exponent"]["low"] for row in own],
                    [row["exponent"]["high"] for row in own],
                )
                for name, own in series.items()
            ],
            Axis("distance over the norm of the model", "log", ".2~%"),
            Axis("exponent", marks=(2.0,)),
        )
        for place, (family, series) in enumerate(families.items())
    )
    blocks: list[Block] = [text, *([FigureRow(figures, _say_intervals(result))] if figures else [])]
    return Section("law", "The order of the remainder", blocks)


def _split_families(rows: Sequence[Result]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What is compared: lines of the config's own adapter; base methods; ranks; epochs. Of each, series by name."""
    if not rows:
        return {}
    own = {key: rows[0][key] for key in ("base", "r", "epochs")}
    lines = [row for row in rows if row["kind"] == "line" and row["precision"] == "float32"]
    lines = sorted(lines, key=lambda row: (row["r"] or 0, row["epochs"]))

    def like(row: Result, *keys: str) -> bool:
        return all(row[key] == own[key] or (key == "r" and row[key] is None) for key in keys)

    families = {
        _DIRECTIONS: [(_name_line(row), row) for row in rows if like(row, "base", "r", "epochs")],
        _BASES: [(str(row["base"]), row) for row in lines if like(row, "r", "epochs")],
        "by rank": [(f"r {row['r']}", row) for row in lines if like(row, "base", "epochs")],
        "by epochs": [(f"{row['epochs']} epochs", row) for row in lines if like(row, "base", "r")],
    }
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for family, named in families.items():
        series: dict[str, list[dict[str, Any]]] = {}
        for name, row in named:
            series.setdefault(name, []).append(dict(row))
        if len(series) > 1 or family == _DIRECTIONS:
            found[family] = series
    return found


def _name_line(row: Result) -> str:
    return f"{_KINDS[str(row['kind'])]}{', native precision' if row['precision'] == 'native' else ''}"


def _write_ends(result: Result) -> Section:
    columns = (Column("Fine-tuning", is_number=False), Column("Distance"), *map(Column, _MEASURES.values()))
    rows = tuple(
        Row(
            (
                Cell(name_variant(row), _count_adapters(row)),
                Cell(format_percent(row["distance"], 3)),
                _write_estimate(row["squared_relative"], _scientific),
                _write_estimate(row["rms_relative"], format_percent),
                _write_estimate(row["r2_over_zero_order"], format_number),
            )
        )
        for row in result["ends"]
    )
    blocks: list[Block] = [Table("Where fine-tuning ended", columns, rows, _say_intervals(result))]
    if result["oracle_points"]:
        fits = tuple(
            Row(
                (
                    Cell(_KINDS[str(row["kind"])], name_variant(row)),
                    Cell(format_percent(row["distance"], 3)),
                    _write_estimate(row["squared_relative"], _scientific),
                    _write_estimate(row["rms_relative"], format_percent),
                    _write_estimate(row["r2_over_zero_order"], format_number),
                )
            )
            for row in result["oracle_points"]
        )
        note = "How good a prediction of the model is at the very point that the oracle's fit stands for."
        columns = (Column("Point", is_number=False), *columns[1:])
        blocks.append(Table("Where the oracle's fits are", columns, fits, note))
    return Section("ends", "Where fine-tuning ends", blocks)


def _write_lengths(result: Result) -> Section:
    columns = (
        Column("Fine-tuning", is_number=False),
        Column("Over the model's norm"),
        Column("Standard deviation"),
        Column("Over the adapter's initial norm"),
    )
    rows = tuple(
        Row(
            (
                Cell(name_variant(row), _count_adapters(row)),
                _write_estimate(row["distance"], lambda value: format_percent(value, 3)),
                Cell(format_percent(row["sd"], 3)),
                _write_estimate(row["distance_adapter"], lambda value: format_percent(value, 1)),
            )
        )
        for row in result["distances"]
    )
    note = "The paper's table 2 is said to have the first; published code divides by the adapter's own norm."
    return Section("lengths", "How far fine-tuning goes", [Table("Distance from theta0", columns, rows, note)])


def _write_paths(result: Result) -> Section:
    cells = [c for c in result["cells"] if c["kind"] in ("path", "end") and c["precision"] == "float32"]
    series = []
    for group in _group(cells, ("base", "r", "epochs")):
        points = sorted(group, key=lambda cell: float(cell["distance"]))
        series.append(
            Series(
                name_variant(group[0]),
                [point["distance"] for point in points],
                [_compute_r2(point) for point in points],
                texts=[_name_point(point) for point in points],
                has_line=False,
            )
        )
    if not series:
        return Section("paths", "Along the way", [])
    figure = draw_series(
        "paths",
        "R2 over zero order of every checkpoint",
        f"R2 over zero order of {len(cells)} checkpoints against their distance.",
        series,
        Axis("distance over the norm of the model", "log", ".2~%"),
        Axis("R2 over zero order", marks=(0.0, 1.0)),
    )
    caption = "Tensors after 1, 2, 4, 8, ... steps and after the last; a point an adapter and step."
    return Section("paths", "Along the way", [FigureRow((figure,), caption)])


def _list_limits(result: Result) -> Section:
    n = max((row["n_adapters"] for row in result["ends"]), default=0)
    items = (
        f"At most {n} adapters behind each number; intervals are over them, for these tasks and rows.",
        f"{result['options']['max_rows']} validation rows of each task.",
        "A straight line to an adapter is not the way that training took: at equal distance they differ.",
    )
    return Section("limits", "What this can't say", [Bullets(items)])


def _tabulate_breaks(result: Result) -> Table:
    levels = [key for key in (result["breaks"][0] if result["breaks"] else {}) if key.startswith("r2_below_")]
    columns = (
        Column("Line", is_number=False),
        *(Column(f"R2 below {key.removeprefix('r2_below_')}") for key in levels),
    )
    rows = tuple(
        Row(
            (
                Cell(_KINDS[str(row["kind"])], name_variant(row)),
                *(Cell("not reached" if row[key] is None else format_percent(row[key], 2)) for key in levels),
            )
        )
        for row in result["breaks"]
    )
    return Table("Where the expansion breaks", columns, rows, "Between two measured distances, by logarithm.")


def _make_series(name: str, group: Sequence[Result], measure: str) -> Series:
    ordered = sorted(group, key=lambda row: float(row["distance"]))
    ends = {end: [_cut(row[measure][end], measure) for row in ordered] for end in ("value", "low", "high")}
    return Series(name, [row["distance"] for row in ordered], ends["value"], ends["low"], ends["high"])


def _cut(value: float | None, measure: str) -> float | None:
    return value if value is None or not measure.startswith("r2") else max(value, _LOWEST_R2)


def _group(rows: Sequence[Result], keys: Sequence[str]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(dict(row))
    return list(groups.values())


def _is_like(row: Result, other: Result) -> bool:
    return all(row[key] == other[key] for key in ("base", "r", "epochs", "precision"))


def _compute_r2(cell: Result) -> float | None:
    tasks = cell["tasks"].values()
    moved = sum(task["moved"] for task in tasks)
    return 1 - sum(task["missed"] for task in tasks) / moved if moved else None


def _name_point(cell: Result) -> str:
    where = "the last step" if cell["step"] is None else f"step {cell['step']}"
    return f"{', '.join(cell['subset'])}; seed {cell['seed']}, {where}"


def _tell(rows: Sequence[Result], measure: str) -> str:
    values = [row[measure]["value"] for row in rows if row[measure]["value"] is not None]
    return f"from {min(values):.3g} to {max(values):.3g}" if values else "nothing"


def _say_intervals(result: Result) -> str:
    return f"With {result['confidence']:.0%} intervals over adapters, where there are two or more."


def _count_adapters(row: Result) -> str:
    return f"{row['n_adapters']} adapter{'s' if row['n_adapters'] != 1 else ''}"


def _write_estimate(estimate: Result, write: Callable[[float | None], str]) -> Cell:
    low, high = (estimate[end] for end in ("low", "high"))
    return Cell(write(estimate["value"]), "" if low is None or high is None else f"{write(low)} to {write(high)}")


def _scientific(value: float | None) -> str:
    return format_number(None) if value is None else f"{value:.2g}"
