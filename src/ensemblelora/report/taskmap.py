"""The groups as a picture: tasks on a circle, group by group, each joined with the partners it does best with.

Where most lines stay inside the arcs, the groups follow the affinity; lines across say what a group gave up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora.report.document import Figure
from ensemblelora.report.plotting import LEGEND_ABOVE, N_GROUP_COLOURS, SYMBOLS, complete, safe, short_labels
from ensemblelora.report.wording import count, group_letter

__all__ = ["N_PARTNERS", "draw_tasks", "find_partners"]

Matrix = npt.NDArray[np.float64]

N_PARTNERS = 2
_MAX_NAMED = 40
_GAP = 0.6  # between two arcs, in tasks


def find_partners(values: Matrix, n_partners: int = N_PARTNERS) -> list[tuple[int, int]]:
    """Pairs in which one task does best with the other, ascending; only those that do better than usual.

    Args:
        values: ``(n, n)`` symmetric affinities without levels; NaN where unknown.
        n_partners: Of each task, at most.
    """
    filled = np.where(np.isfinite(values) & ~np.eye(len(values), dtype=bool), values, -np.inf)
    best = np.argsort(-filled, axis=1, kind="stable")[:, :n_partners]
    return sorted(
        {
            (min(task, int(other)), max(task, int(other)))
            for task, others in enumerate(best)
            for other in others
            if filled[task, other] > 0
        }
    )


def draw_tasks(values: Matrix, names: Sequence[str], groups: Sequence[Sequence[int]]) -> Figure:
    """Draw every task, its group by colour and sign, and lines to the partners it does best with.

    Args:
        values: ``(n, n)`` affinities without levels.
        names: Of the tasks.
        groups: Indices of tasks.
    """
    places = _place(groups)
    group_of = {task: group for group, tasks in enumerate(groups) for task in tasks}
    pairs = find_partners(values)
    inside = [pair for pair in pairs if group_of[pair[0]] == group_of[pair[1]]]
    across = [pair for pair in pairs if group_of[pair[0]] != group_of[pair[1]]]
    traces = [_lines(across, places, "var(--line-strong)", "dot")]
    for group, tasks in enumerate(groups):
        colour = f"var(--group-{group % N_GROUP_COLOURS})"
        own = [pair for pair in inside if group_of[pair[0]] == group]
        traces += [_lines(own, places, colour, "solid"), _marks(places, names, tasks, group)]
    hidden = {"showticklabels": False, "showgrid": False, "zeroline": False, "ticks": ""}
    layout = {
        "xaxis": {**hidden, "range": [-1.75, 1.75]},
        "yaxis": {**hidden, "range": [-1.2, 1.2], "scaleanchor": "x"},
        "showlegend": 1 < len(groups) <= 12,
        "legend": LEGEND_ABOVE,
        "hovermode": "closest",
    }
    alt = (
        f"{len(names)} tasks in {count(len(groups), 'group')} on a circle, each joined with the partners it does best "
        f"with: {len(inside)} of {count(len(pairs), 'line')} stay inside a group."
    )
    return Figure("tasks", "The groups", alt, complete(traces, layout), height=420)


def _place(groups: Sequence[Sequence[int]]) -> dict[int, tuple[float, float]]:
    """Points on a circle, clockwise from the top, with a gap between groups."""
    gap = _GAP if len(groups) > 1 else 0.0
    whole = sum(map(len, groups)) + gap * len(groups)
    places, at = {}, gap / 2
    for tasks in groups:
        for task in tasks:
            angle = 2 * math.pi * (at + 0.5) / whole
            places[task] = (round(math.sin(angle), 4), round(math.cos(angle), 4))
            at += 1
        at += gap
    return places


def _lines(
    pairs: Sequence[tuple[int, int]], places: dict[int, tuple[float, float]], colour: str, dash: str
) -> dict[str, Any]:
    x: list[float | None] = []
    y: list[float | None] = []
    for pair in pairs:
        ends = [places[task] for task in pair]
        x += [*(end[0] for end in ends), None]
        y += [*(end[1] for end in ends), None]
    line = {"color": colour, "width": 1.5, "dash": dash}
    return {
        "type": "scatter", "mode": "lines", "x": x, "y": y, "line": line, "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip


def _marks(
    places: dict[int, tuple[float, float]], names: Sequence[str], tasks: Sequence[int], group: int
) -> dict[str, Any]:
    is_named, labels = len(names) <= _MAX_NAMED, short_labels(names)
    return {
        "type": "scatter",
        "mode": "markers+text" if is_named else "markers",
        "name": f"group {group_letter(group)}",
        "x": [places[task][0] for task in tasks],
        "y": [places[task][1] for task in tasks],
        "text": [labels[task] for task in tasks],
        "customdata": [safe(names[task]) for task in tasks],
        "textposition": list(_sides(places, tasks)),
        "textfont": {"size": 12 if len(names) <= 20 else 10, "color": "var(--ink)"},
        "cliponaxis": False,
        "marker": {
            "color": f"var(--group-{group % N_GROUP_COLOURS})",
            "size": 13 if is_named else 6,
            "symbol": SYMBOLS[group % len(SYMBOLS)],
            "line": {"color": "var(--surface)", "width": 1},
        },
        "hovertemplate": f"<b>%{{customdata}}</b><br>group {group_letter(group)}<extra></extra>",
    }


def _sides(places: dict[int, tuple[float, float]], tasks: Sequence[int]) -> Iterator[str]:
    """Names stand outside the circle."""
    for task in tasks:
        x, y = places[task]
        if abs(x) < 0.2:
            yield "top center" if y > 0 else "bottom center"
        else:
            yield f"middle {'right' if x > 0 else 'left'}"
