"""The screens of a comparison, and of the paper's tables that are made from it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping

from rich.table import Table
from rich.text import Text

from ensemblelora.comparison.page import Page, write_headline
from ensemblelora.comparison.sections import describe_change, format_p_value, rank_methods
from ensemblelora.comparison.statistics import Figure
from ensemblelora.report.wording import (
    NOTHING,
    format_bytes,
    format_flops,
    format_interval,
    format_number,
    format_percent,
    format_ratio,
    join_names,
)
from ensemblelora.reproduction.exhibit import Reproduction, Row

__all__ = ["render_comparison", "render_exhibit", "render_lines"]

_NAMED = ("run", "model", "adapter")
"""columns whose values say by themselves what they are"""

_UNITS: Mapping[str, Callable[[float | None], str]] = {
    "accuracy": format_percent,
    "flops": format_flops,
    "bytes": format_bytes,
    "ratio": format_ratio,
    "nats": format_number,
    "points": lambda value: NOTHING if value is None else f"{format_number(100 * value, 1)} points",
}


def render_comparison(page: Page) -> list[Text | Table]:
    """Say on one screen what came out of a comparison so far.

    Args:
        page: What :func:`ensemblelora.comparison.page.write_page` wrote.

    Returns:
        Lines and tables for :func:`ensemblelora.console.show_table`.
    """
    parts: list[Text | Table] = [Text(write_headline(page.statistics), style="bold"), Text()]
    parts += [_tabulate(page), Text()]
    parts += [Text(line) for line in _list_primary(page)]
    if page.statistics.at_chance:
        told = join_names(list(page.statistics.at_chance), limit=12)
        parts.append(Text(f"at chance by validation rows: {told}", style="dim"))
    failures = page.study.head.failures
    parts += [Text(f"failed: {name}, {why}", style="yellow") for name, why in failures.items()]
    parts.append(Text(f"report: {page.path}", no_wrap=True))
    return parts


def _tabulate(page: Page) -> Table:
    found = page.statistics
    reference = found.methods.get(found.reference or "")
    base = reference.costs.flops if reference else 0.0
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in (
        "method",
        "accuracy",
        f"{found.confidence:.0%} interval",
        "loss",
        "FLOPs",
        "x one",
        "passes",
        "adapters",
    ):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method in rank_methods(found):
        accuracy = method.mean.get("accuracy")
        interval = format_interval(*accuracy.ends, scale=100, digits=1) if accuracy else ""
        table.add_row(
            Text(method.name),
            _write(accuracy, 100, 1),
            interval or NOTHING,
            _write(method.mean.get("nll"), 1, 3),
            format_flops(method.costs.flops),
            format_ratio(method.costs.flops / base) if base else NOTHING,
            format_ratio(method.costs.forward_passes),
            format_bytes(method.costs.n_bytes),
        )
    return table


def _write(figure: Figure | None, scale: float, digits: int) -> str:
    if figure is None:
        return NOTHING
    spread = "" if figure.seed_sd is None else f" ± {format_number(scale * figure.seed_sd, digits)}"
    return f"{format_number(scale * figure.value, digits)}{spread}"


def _list_primary(page: Page) -> Iterator[str]:
    found = page.statistics
    for result in found.primary:
        what = "accuracy" if result.metric == "accuracy" else "loss"
        change = describe_change(result, found.confidence)
        where = ", tasks above chance" if result.is_above_chance else ""
        p_value = f"corrected p {format_p_value(result.p_holm)}"
        yield f"{result.a} against {result.b}, {what}{where}: {change}, {p_value}"


def render_exhibit(made: Reproduction) -> list[Text | Table]:
    """Show cells of a table of the paper, a table a folder: ours, and after the bar the paper's.

    Args:
        made: With cells as rows, not lines of a run.
    """
    parts: list[Text | Table] = [Text(made.heading, style="bold")]
    for folder in dict.fromkeys(str(row["folder"]) for row in made.rows):
        cells = {(str(row["row"]), str(row["column"])): row for row in made.rows if row["folder"] == folder}
        parts += [Text(), _tabulate_cells(folder, cells)]
    return [*parts, Text("ours | the paper's"), *(Text(line) for line in made.notes)]


def render_lines(made: Reproduction) -> list[Text | Table]:
    """Show an exhibit whose rows are measurements: one table, and what is the same in all rows in one line above.

    Args:
        made: With at least one row.
    """
    columns = list(dict.fromkeys(name for row in made.rows for name in row))
    values = {name: [row.get(name) for row in made.rows] for name in columns}
    same = [name for name in columns if len(made.rows) > 1 and len(set(values[name])) == 1]
    told = [_write_figure(values[n][0]) if n in _NAMED else f"{n} {_write_figure(values[n][0])}" for n in same]
    shown = {name: [_write_figure(value) for value in values[name]] for name in columns if name not in same}
    if {"low", "high"} <= set(shown):  # one column; the interval says what the deviation would
        pairs = zip(shown["low"], shown["high"], strict=True)
        shown["low"] = [low if low == NOTHING else f"{low}\u2013{high}" for low, high in pairs]
        shown = {("interval" if n == "low" else n): cells for n, cells in shown.items() if n not in ("high", "sd")}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, cells in shown.items():
        is_text = any(isinstance(value, str) for value in values.get(name, ()))
        widest = max(len(part) for part in (*cells, *name.split()))
        table.add_column(textwrap.fill(name, widest), justify="left" if is_text else "right", no_wrap=True)
    for line in zip(*shown.values(), strict=True):
        table.add_row(*line)
    heading = [Text(made.heading, style="bold"), *([Text(f"all rows: {', '.join(told)}", style="dim")] if told else [])]
    return [*heading, Text(), table, Text(), *(Text(note) for note in made.notes)]


def _write_figure(value: float | str | None) -> str:
    """A name as it is, a number with three digits that count: distances are thousandths."""
    if value is None:
        return NOTHING
    return value if isinstance(value, str) else f"{value:.3g}"


def _tabulate_cells(folder: str, cells: Mapping[tuple[str, str], Row]) -> Table:
    columns = list(dict.fromkeys(column for _, column in cells))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(folder)
    for column in columns:
        table.add_column(column, justify="right")
    for name in dict.fromkeys(row for row, _ in cells):
        table.add_row(Text(name), *(_write_cell(cells.get((name, column))) for column in columns))
    return table


def _write_cell(cell: Row | None) -> str:
    if cell is None or (cell["ours"] is None and cell["paper"] is None):
        return NOTHING
    write = _UNITS[str(cell["unit"])]
    ours, printed = (value if isinstance(value, float) else None for value in (cell["ours"], cell["paper"]))
    return " | ".join(_drop_repeated(write(ours), write(printed)))


def _drop_repeated(left: str, right: str) -> tuple[str, str]:
    """Two quantities in as few characters as they need: what FLOPs are stands in front of the line, a unit once."""
    left, right = left.replace("FLOPs", ""), right.replace("FLOPs", "")
    units = [text.split()[1:] for text in (left, right)]
    return (left.split()[0] if units[0] == units[1] else left), right
