"""Pictures of error against cost: which ways no other beats in both. No torch.

In: points with an error, its interval and one kind of cost. Out: figures. What costs nothing of a kind has no place on
a scale of powers of ten; whoever draws leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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

__all__ = ["BYTES", "FLOPS", "MEMORY", "PASSES", "CostAxis", "ErrorKind", "Point", "draw_front", "find_front"]

_Box = tuple[float, float, float, float]
"""left, lower, right and upper end, in parts of a picture"""
ErrorKind = Literal["error", "loss"]
_LETTER, _LINE, _MARK = 0.018, 0.07, 0.015
"""of a name beside a mark, and half a mark, in parts of a picture's width and height"""
_FEW_DECADES, _MANY_DECADES = 0.6, 3.0


@dataclass(frozen=True)
class CostAxis:
    """One kind of cost.

    Attributes:
        name: In the figure's name.
        title: With its unit.
        write: How a cost is written.
        is_log: Whether its scale is of powers of ten.
    """

    name: str
    title: str
    write: Callable[[float | None], str]
    is_log: bool = True


FLOPS = CostAxis("flops", "FLOPs to make, choosing included", format_flops)
PASSES = CostAxis("passes", "forward passes a prediction", format_ratio, is_log=False)
BYTES = CostAxis("bytes", "bytes kept beside the base", format_bytes)
MEMORY = CostAxis("memory", "peak memory of training", format_bytes, is_log=False)


@dataclass(frozen=True)
class Point:
    """One way to fine-tune.

    Attributes:
        name: Short, beside its mark where it has one.
        title: What hovering says.
        cost: Of the axis' kind, above 0.
        error: One less accuracy, or a loss; lower is better.
        above: From the error to the upper end of its interval.
        below: From the lower end to the error.
        is_ours: Whether it is what the page is about.
    """

    name: str
    title: str
    cost: float
    error: float
    above: float = 0.0
    below: float = 0.0
    is_ours: bool = False

    @classmethod
    def of_score(
        cls, name: str, title: str, cost: float, score: tuple[float, float, float], kind: ErrorKind, *, is_ours: bool
    ) -> Point:
        """Make a point of a score and the ends of its interval: accuracies become errors."""
        low, value, high = score if kind == "loss" else (1 - score[2], 1 - score[1], 1 - score[0])
        return cls(name, title, cost, value, max(0.0, high - value), max(0.0, value - low), is_ours)


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


def draw_front(axis: CostAxis, points: Sequence[Point], kind: ErrorKind, *, names_all: bool = False) -> Figure:
    """Draw error or loss against one kind of cost, and join the ways that no other beats in both.

    Args:
        axis: Kind of cost.
        points: At least one.
        kind: What the points' errors are.
        names_all: Whether every mark is named, and not only the front's and ours.
    """
    front = [points[i] for i in find_front([(point.cost, point.error) for point in points])]
    named = {point.name for point in points if names_all or point.is_ours} | {point.name for point in front}
    write = format_percent if kind == "error" else format_number
    scale = _scale([point.cost for point in points], is_log=axis.is_log)
    places = [math.log10(point.cost) if axis.is_log else point.cost for point in points]
    spots = _place_names(points, [(place - scale["range"][0]) / _width(scale) for place in places], named)
    traces = [
        _front_trace(front),
        *(_point_trace(axis, point, spots.get(point.name, ""), kind) for point in points),
    ]
    layout = {
        "xaxis": {
            "title": {"text": axis.title},
            "type": "log" if axis.is_log else "linear",
            "tickformat": "~s" if axis.write is not format_ratio else None,
            "zeroline": False,
            "tickangle": 0,  # numbers that turn and turn back with the margin would never come to rest
            **scale,
        },
        "yaxis": {"title": {"text": f"mean test {kind}"}, "zeroline": False}
        | ({"tickformat": ".1~%"} if kind == "error" else {}),
        "showlegend": False,
    }
    listed = join_names([f"{p.name} ({write(p.error)} at {axis.write(p.cost)})" for p in front], limit=12)
    alt = f"Mean test {kind} against {axis.title} of {len(points)} methods; no other beats {listed} in both."
    title = f"{kind.capitalize()} against {axis.title}"
    return Figure(f"pareto-{axis.name}", title, alt, complete(traces, layout), height=340)


def _scale(costs: Sequence[float], *, is_log: bool) -> dict[str, Any]:
    """The axis' range, in powers of ten on such a scale: names beside marks need room at both sides; and its ticks."""
    ends = [math.log10(cost) if is_log else cost for cost in (min(costs), max(costs))]
    room = 0.3 * (ends[1] - ends[0]) or 0.5 * (1 if is_log else ends[1])
    span = [round(ends[0] - room, 5), round(ends[1] + room, 5)]
    decades = span[1] - span[0]
    if not is_log or decades < _FEW_DECADES:
        return {"range": span}
    return {"range": span, "dtick": "D2" if decades < _MANY_DECADES else 1}  # D2: 1, 2, 5, 10, ...


def _width(scale: Mapping[str, Any]) -> float:
    low, high = scale["range"]
    return float(high - low)


def _place_names(points: Sequence[Point], across: Sequence[float], named: Collection[str]) -> dict[str, str]:
    """Find where beside its mark each name is read best: towards the middle, and not over a name that has its place.

    Args:
        points: All of them.
        across: How far each is from the picture's left, of its width.
        named: Which have names.

    Returns:
        By name, as plotly says it: ``top right``.
    """
    low, high = min(point.error - point.below for point in points), max(point.error + point.above for point in points)
    height = [(point.error - low) / ((high - low) or 1.0) for point in points]
    marks = [(x - _MARK, y - _MARK, x + _MARK, y + _MARK) for x, y in zip(across, height, strict=True)]
    taken: list[_Box] = []
    spots = {}
    for i in sorted(range(len(points)), key=lambda i: points[i].error):
        point, x, y = points[i], across[i], height[i]
        if point.name not in named:
            continue
        width, others = _LETTER * len(short_label(point.name)), marks[:i] + marks[i + 1 :]
        sides = ("right", "left") if x <= 0.5 else ("left", "right")
        boxes = {}
        for side in sides:
            for level, shift in (("top", _LINE), ("bottom", -_LINE), ("middle", 0.0)):
                left = x if side == "right" else x - width
                boxes[f"{level} {side}"] = (left, y + shift - _LINE / 2, left + width, y + shift + _LINE / 2)
        faults = {spot: _count_faults(box, taken, others) for spot, box in boxes.items()}
        spots[point.name] = spot = min(faults, key=lambda spot: faults[spot])  # of equals the first
        taken.append(boxes[spot])
    return spots


def _count_faults(box: _Box, names: Sequence[_Box], marks: Sequence[_Box]) -> tuple[int, int]:
    """Names that one lies on; and marks, or an edge of the picture."""
    is_out = box[0] < 0 or box[2] > 1
    return sum(_overlap(box, other) for other in names), sum(_overlap(box, other) for other in marks) + is_out


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _front_trace(front: Sequence[Point]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [point.cost for point in front],
        "y": [round(point.error, 5) for point in front],
        "line": {"color": "var(--line-strong)", "width": 1.5, "dash": "dot", "shape": "hv"},
        "hoverinfo": "skip",
    }


def _point_trace(axis: CostAxis, point: Point, spot: str, kind: ErrorKind) -> dict[str, Any]:
    """A mark, its interval, and beside it its name where it has a spot."""
    colour = "var(--accent)" if point.is_ours else "var(--method-other)" if spot else "var(--method-base)"
    form = "%{y:.1%}" if kind == "error" else "%{y:.3f}"
    return {
        "type": "scatter",
        "mode": "markers+text" if spot else "markers",
        "x": [point.cost],
        "y": [round(point.error, 5)],
        "text": [short_label(point.name) if spot else ""],
        "textposition": spot or "top right",
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
        "marker": {"color": colour, "size": 9, "symbol": "square" if point.is_ours else "circle"},
        "hovertemplate": f"<b>{safe(point.title)}</b><br>{form}<br>{safe(axis.write(point.cost))}<extra></extra>",
    }
