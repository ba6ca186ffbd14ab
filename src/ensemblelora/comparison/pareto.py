"""Pictures of error against cost: which methods no other beats in both. No torch.

In: :class:`~.statistics.Statistics`. Out: figures for the page. A method that costs nothing of a kind has no place on a
scale of powers of ten, and is left out of that picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ensemblelora.comparison.record import OURS
from ensemblelora.comparison.statistics import MethodResult, Statistics
from ensemblelora.report.document import Figure
from ensemblelora.report.plotting import complete, safe, short_label
from ensemblelora.report.wording import (
    format_bytes,
    format_flops,
    format_number,
    format_percent,
    format_ratio,
    join_names,
)

__all__ = ["draw_pareto", "find_front"]


@dataclass(frozen=True)
class _Axis:
    """One kind of cost."""

    name: str
    title: str
    read: Callable[[MethodResult], float]
    write: Callable[[float | None], str]
    is_log: bool = True


_AXES = (
    _Axis("flops", "FLOPs to make, choosing included", lambda method: method.costs.flops, format_flops),
    _Axis(
        "passes", "forward passes a prediction", lambda method: method.costs.forward_passes, format_ratio, is_log=False
    ),
    _Axis("bytes", "bytes kept beside the base", lambda method: method.costs.n_bytes, format_bytes),
    _Axis(
        "memory", "peak memory of training", lambda method: method.costs.peak_memory_bytes, format_bytes, is_log=False
    ),
)


def draw_pareto(found: Statistics) -> tuple[Figure, ...]:
    """Draw error, or where no task has an accuracy loss, against each kind of cost."""
    metric = "accuracy" if any("accuracy" in method.mean for method in found.methods.values()) else "nll"
    methods = [method for method in found.methods.values() if metric in method.mean]
    figures = []
    for axis in _AXES:
        points = [_Point.of(method, metric, axis.read(method)) for method in methods if axis.read(method) > 0]
        if points:
            figures.append(_draw(axis, points, metric))
    return tuple(figures)


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in one coordinate without losing in the other; by rising first one.

    Args:
        points: Two costs each; lower is better in both.

    Example:
        >>> find_front([(1.0, 3.0), (2.0, 4.0), (3.0, 1.0)])
        [0, 2]
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


@dataclass(frozen=True)
class _Point:
    name: str
    title: str
    cost: float
    error: float
    """one minus accuracy, or the loss"""
    above: float
    below: float

    @classmethod
    def of(cls, method: MethodResult, metric: str, cost: float) -> _Point:
        figure = method.mean[metric]
        ends = [figure.value if end is None else end for end in figure.ends]
        low, value, high = ends[0], figure.value, ends[1]
        if metric == "accuracy":
            low, value, high = 1 - high, 1 - value, 1 - low
        return cls(method.name, method.title, cost, value, max(0.0, high - value), max(0.0, value - low))


def _draw(axis: _Axis, points: Sequence[_Point], metric: str) -> Figure:
    front = [points[i] for i in find_front([(point.cost, point.error) for point in points])]
    named = {point.name for point in front} | {OURS}
    write = format_percent if metric == "accuracy" else format_number
    what = "error" if metric == "accuracy" else "loss"
    traces = [_front_trace(front), *(_point_trace(axis, point, point.name in named, metric) for point in points)]
    layout = {
        "xaxis": {
            "title": {"text": axis.title},
            "type": "log" if axis.is_log else "linear",
            "tickformat": "~s" if axis.write is not format_ratio else None,
            "zeroline": False,
        },
        "yaxis": {"title": {"text": f"mean test {what}"}, "zeroline": False}
        | ({"tickformat": ".0%"} if metric == "accuracy" else {}),
        "showlegend": False,
    }
    listed = join_names([f"{p.name} ({write(p.error)} at {axis.write(p.cost)})" for p in front], limit=12)
    alt = f"Mean test {what} against {axis.title} of {len(points)} methods; no other beats {listed} in both."
    title = f"{what.capitalize()} against {axis.title}"
    return Figure(f"pareto-{axis.name}", title, alt, complete(traces, layout), height=340)


def _front_trace(front: Sequence[_Point]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [point.cost for point in front],
        "y": [round(point.error, 5) for point in front],
        "line": {"color": "var(--line-strong)", "width": 1.5, "dash": "dot", "shape": "hv"},
        "hoverinfo": "skip",
    }


def _point_trace(axis: _Axis, point: _Point, is_named: bool, metric: str) -> dict[str, Any]:
    colour = "var(--accent)" if point.name == OURS else "var(--method-other)" if is_named else "var(--method-base)"
    form = "%{y:.1%}" if metric == "accuracy" else "%{y:.3f}"
    return {
        "type": "scatter",
        "mode": "markers+text" if is_named else "markers",
        "x": [point.cost],
        "y": [round(point.error, 5)],
        "text": [short_label(point.name) if is_named else ""],
        "textposition": "top center",
        "textfont": {"size": 11, "color": colour},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [round(point.above, 5)],
            "arrayminus": [round(point.below, 5)],
            "color": colour,
            "thickness": 1,
            "width": 0,
        },
        "marker": {"color": colour, "size": 9, "symbol": "square" if point.name == OURS else "circle"},
        "hovertemplate": f"<b>{safe(point.title)}</b><br>{form}<br>{safe(axis.write(point.cost))}<extra></extra>",
    }
