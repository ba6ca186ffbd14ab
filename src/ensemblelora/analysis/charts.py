"""Charts that several analyses draw: lines with intervals, points, and a map of tasks. No torch.

In: plain numbers. Out: figures of a page, in its own colours; names of tasks are made safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ensemblelora.report.document import Figure
from ensemblelora.report.plotting import LEGEND_ABOVE, N_GROUP_COLOURS, complete, safe, short_labels
from ensemblelora.report.wording import format_number, format_signed

__all__ = ["Axis", "Series", "draw_map", "draw_series"]

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down", "hexagon")
_N_SCALE_STEPS = 7
_DIGITS = 8


@dataclass(frozen=True)
class Series:
    """Points of one name.

    Attributes:
        name: In the legend; untrusted.
        x: Abscissas.
        y: Ordinates; none leaves a gap.
        low: Lower ends of intervals; none: no bars.
        high: Upper ends.
        texts: What hovering says of each point besides.
        has_line: Whether points are joined.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    texts: Sequence[str] = ()
    has_line: bool = True


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        title: What it is of, with its unit.
        kind: ``log`` for powers of ten.
        form: Of its numbers, in plotly's words.
        marks: Values that a line is drawn at.
    """

    title: str
    kind: Literal["linear", "log"] = "linear"
    form: str = ""
    marks: Sequence[float] = field(default_factory=tuple)


def draw_series(
    name: str, title: str, alt: str, series: Sequence[Series], x: Axis, y: Axis, *, has_diagonal: bool = False
) -> Figure:
    """Draw some series in one figure.

    Args:
        name: Of the figure in its page.
        title: What it shows.
        alt: What there is to see, in a sentence.
        series: At least one.
        x: Horizontal axis.
        y: Vertical axis.
        has_diagonal: Whether a line of equality is drawn.
    """
    traces = [_trace(one, place, x, y) for place, one in enumerate(series)]
    layout: dict[str, Any] = {
        "xaxis": _axis(x),
        "yaxis": _axis(y),
        "shapes": [
            *(_mark("x", value) for value in x.marks),
            *(_mark("y", value) for value in y.marks),
            *(_diagonal(series) if has_diagonal else []),
        ],
        "showlegend": len(series) > 1,
        "legend": LEGEND_ABOVE,
    }
    return Figure(name, title, alt, complete(traces, layout), height=360 + 12 * (len(series) // 3))


def draw_map(
    name: str,
    title: str,
    tasks: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    reach: float,
    hover: Sequence[Sequence[str]],
) -> Figure:
    """Draw a matrix of gains: a row a task that gains, a column a task that gives.

    Args:
        name: Of the figure in its page.
        title: What it shows.
        tasks: Names, of rows and columns.
        values: ``(n, n)``; none where unknown.
        reach: Where the colours end on both sides of zero; the same for maps that are compared.
        hover: What each cell says, ``(n, n)``.
    """
    steps = [[step / (_N_SCALE_STEPS - 1), f"var(--diverging-{step})"] for step in range(_N_SCALE_STEPS)]
    trace = {
        "type": "heatmap",
        "z": [[None if value is None else round(value, 5) for value in row] for row in values],
        "zmin": -reach,
        "zmax": reach,
        "colorscale": steps,
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "customdata": [[safe(text) for text in row] for row in hover],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    n = len(tasks)
    axis = {
        "tickmode": "array",
        "tickvals": list(range(n)),
        "ticktext": short_labels(tasks),
        "showgrid": False,
        "zeroline": False,
        "ticks": "",
    }
    layout = {
        "xaxis": {**axis, "tickangle": -60, "title": {"text": "trained with"}, "range": [-0.5, n - 0.5]},
        "yaxis": {**axis, "title": {"text": "task"}, "range": [n - 0.5, -0.5]},
    }
    return Figure(name, title, _describe_map(title, tasks, values), complete([trace], layout))


def _trace(one: Series, place: int, x: Axis, y: Axis) -> dict[str, Any]:
    colour = f"var(--group-{place % N_GROUP_COLOURS})"
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if one.has_line else "markers",
        "name": safe(one.name),
        "x": [round(float(value), _DIGITS) for value in one.x],
        "y": [None if value is None else float(f"{value:.6g}") for value in one.y],
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "size": 8, "symbol": _SYMBOLS[place % len(_SYMBOLS)]},
        "hovertemplate": "<b>%{fullData.name}</b><br>%{x}: %{y:.4g}<extra></extra>",
    }
    if one.texts:
        trace |= {"text": [safe(text) for text in one.texts]}
        trace["hovertemplate"] = "<b>%{fullData.name}</b><br>%{text}<br>%{x}: %{y:.4g}<extra></extra>"
    if one.low is not None and one.high is not None:
        above = [_reach(high, value) for high, value in zip(one.high, one.y, strict=True)]
        below = [_reach(value, low) for low, value in zip(one.low, one.y, strict=True)]
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": above,
            "arrayminus": below,
            "color": colour,
            "thickness": 1,
            "width": 3,
        }
    return trace


def _reach(high: float | None, low: float | None) -> float:
    return 0.0 if high is None or low is None else float(f"{max(0.0, high - low):.6g}")


def _axis(axis: Axis) -> dict[str, Any]:
    made: dict[str, Any] = {"title": {"text": axis.title}, "type": axis.kind, "zeroline": False}
    return made | ({"tickformat": axis.form} if axis.form else {})


def _mark(axis: str, value: float) -> dict[str, Any]:
    other = "y" if axis == "x" else "x"
    return {
        "type": "line",
        f"{axis}0": value,
        f"{axis}1": value,
        f"{other}0": 0,
        f"{other}1": 1,
        f"{other}ref": "paper",
        "line": {"color": "var(--ink-soft)", "width": 1, "dash": "dot"},
        "layer": "below",
    }


def _diagonal(series: Sequence[Series]) -> list[dict[str, Any]]:
    values = [value for one in series for value in (*one.x, *one.y) if value is not None]
    if not values:
        return []
    ends = {"x0": min(values), "y0": min(values), "x1": max(values), "y1": max(values)}
    line = {"color": "var(--ink-soft)", "width": 1, "dash": "dot"}
    return [{"type": "line", **ends, "line": line, "layer": "below"}]


def _describe_map(title: str, tasks: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    known = [
        (value, tasks[i], tasks[j]) for i, row in enumerate(values) for j, value in enumerate(row) if value is not None
    ]
    if not known:
        return f"{title}: no pair has a value."
    most, least = max(known), min(known)
    return (
        f"{title}: {most[1]} gains most, by {most[2]} ({format_signed(most[0])}); {least[1]} by {least[2]} "
        f"{format_signed(least[0])}; mean {format_signed(sum(value for value, *_ in known) / len(known))} over "
        f"{format_number(len(known), 0)} ordered pairs."
    )
