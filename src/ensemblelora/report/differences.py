"""A picture of differences task by task, with their intervals: named lines for few tasks, a sorted curve for many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ensemblelora.report.document import Figure
from ensemblelora.report.plotting import N_GROUP_COLOURS, SYMBOLS, complete, safe, short_labels
from ensemblelora.report.wording import format_signed

__all__ = ["TaskDifference", "draw_differences"]

_MAX_NAMED = 60


@dataclass(frozen=True)
class TaskDifference:
    """One task's difference.

    Attributes:
        task: Its name.
        group: Its group, for colour and sign.
        value: The difference.
        low: Lower end of its interval; none without.
        high: Upper end.
    """

    task: str
    group: int
    value: float
    low: float | None
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def draw_differences(name: str, rows: Sequence[TaskDifference], title: str, *, digits: int) -> Figure:
    """Draw differences around 0, the largest first; marks are filled where the interval leaves out 0.

    Args:
        name: Of the figure in its page.
        rows: At least one.
        title: Of the axis, with its unit.
        digits: Decimals of the sentence beside the picture.
    """
    rows = sorted(rows, key=lambda row: -row.value)
    is_named = len(rows) <= _MAX_NAMED
    value, place = ("x", "y") if is_named else ("y", "x")
    places = {"zeroline": False, "showgrid": False, "tickmode": "array", "tickvals": list(range(len(rows)))}
    if is_named:
        labels = {"ticktext": short_labels([row.task for row in rows]), "range": [len(rows) - 0.5, -0.5]}
    else:
        labels = {"showticklabels": False, "title": {"text": f"{len(rows)} tasks, by their difference"}}
    layout = {
        f"{value}axis": {"title": {"text": title}, "zeroline": True, "zerolinewidth": 2},
        f"{place}axis": {**places, **labels},
        "showlegend": False,
    }
    n_up, n_down = (sum(row.is_clear and sign * row.value > 0 for row in rows) for sign in (1, -1))
    least, most = (f"{format_signed(row.value, digits)} ({row.task})" for row in (rows[-1], rows[0]))
    alt = f"{title} of {len(rows)} tasks, from {least} to {most}; the interval is above 0 on {n_up}, below on {n_down}."
    figure = complete([_trace(rows, value, place)], layout)
    return Figure(name, title, alt, figure, height=90 + 26 * len(rows) if is_named else 360)


def _trace(rows: Sequence[TaskDifference], value: str, place: str) -> dict[str, Any]:
    is_few = len(rows) <= _MAX_NAMED
    symbols = [SYMBOLS[row.group % len(SYMBOLS)] + ("" if row.is_clear else "-open") for row in rows]
    up = [0.0 if row.high is None else round(row.high - row.value, 5) for row in rows]
    down = [0.0 if row.low is None else round(row.value - row.low, 5) for row in rows]
    return {
        "type": "scatter",
        "mode": "markers",
        value: [round(row.value, 5) for row in rows],
        place: list(range(len(rows))),
        "text": [safe(row.task) for row in rows],
        "marker": {
            "color": [f"var(--group-{row.group % N_GROUP_COLOURS})" for row in rows],
            "size": 9 if is_few else 5,
            "symbol": symbols,
        },
        f"error_{value}": {
            "type": "data",
            "symmetric": False,
            "array": up,
            "arrayminus": down,
            "color": "var(--ink-soft)",
            "thickness": 1.2 if is_few else 0.6,
            "width": 0,
        },
        "hovertemplate": f"<b>%{{text}}</b><br>%{{{value}:+.4f}}<extra></extra>",
    }
