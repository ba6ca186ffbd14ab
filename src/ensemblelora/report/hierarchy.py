"""Which tasks join first: the tree of average linkage over affinities, and how it is drawn.

The tree knows nothing of the groups, so where both agree, the groups are no accident of the search. Two sets of tasks
join at the mean affinity of their pairs, the closest sets first; leaves stand so that sets which join are neighbours.
Cost: n^2 log n. Slow twin in the tests: the definition, pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import linkage

from ensemblelora.report.plotting import N_GROUP_COLOURS, safe
from ensemblelora.report.wording import count, format_signed, join_names

__all__ = ["Join", "Tree", "build_tree", "draw_tree"]

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Join:
    """Two sets of tasks that become one.

    Attributes:
        first: Tasks of the set that stands first.
        second: Tasks of the other.
        affinity: Mean over their pairs.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    affinity: float


@dataclass(frozen=True)
class Tree:
    """All joins, the closest first, and the tasks in an order in which no two branches cross."""

    joins: tuple[Join, ...]
    order: tuple[int, ...]


def build_tree(values: Matrix) -> Tree:
    """Join tasks by average linkage.

    Args:
        values: ``(n, n)`` symmetric affinities, higher is closer; NaN counts as less than any.
    """
    n = len(values)
    if n < 2:
        return Tree((), tuple(range(n)))
    above = np.triu_indices(n, k=1)
    pairs = values[above]
    known = pairs[np.isfinite(pairs)]
    top, bottom = (float(known.max()), float(known.min())) if len(known) else (0.0, 0.0)
    filled = np.where(np.isfinite(pairs), pairs, bottom - (top - bottom or 1.0))
    sets: list[tuple[int, ...]] = [(task,) for task in range(n)]
    joins = []
    for left, right, distance, _ in linkage(top - filled, method="average"):
        first, second = sorted((sets[int(left)], sets[int(right)]), key=lambda tasks: (-len(tasks), min(tasks)))
        joins.append(Join(first, second, top - float(distance)))
        sets.append(first + second)
    return Tree(tuple(joins), sets[-1])


def draw_tree(tree: Tree, names: Sequence[str], group_of: Sequence[int], *, axis: str) -> list[dict[str, Any]]:
    """Return traces of the tree over the leaves 0, 1, ... in its order, and of a mark for each leaf's group.

    Heights are the numbers of joins before, not affinities: those would crowd at one end.

    Args:
        tree: Of at least two tasks.
        names: Of the tasks.
        group_of: Each task's group, whose colour its leaf has.
        axis: Number of the axes to draw on, such as ``2``.
    """
    places = {task: place for place, task in enumerate(tree.order)}
    at: dict[tuple[int, ...], tuple[float, float]] = {(task,): (float(places[task]), 0.0) for task in tree.order}
    x: list[float | None] = []
    y: list[float | None] = []
    texts: list[str] = []
    for height, join in enumerate(tree.joins, start=1):
        (x0, y0), (x1, y1) = at[join.first], at[join.second]
        x += [x0, x0, x1, x1, None]
        y += [y0, height, height, y1, None]
        texts += [_tell_join(join, names)] * 5
        at[join.first + join.second] = ((x0 + x1) / 2, float(height))
    colours = [f"var(--group-{group_of[task] % N_GROUP_COLOURS})" for task in tree.order]
    lines = {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": y,
        "text": texts,
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": "var(--ink-soft)", "width": 1},
    }
    leaves = {
        "type": "scatter",
        "mode": "markers",
        "x": list(range(len(tree.order))),
        "y": [0.0] * len(tree.order),
        "hoverinfo": "skip",
        "marker": {"color": colours, "size": 9 if len(names) <= 60 else 3, "symbol": "square"},
        "cliponaxis": False,
    }
    axes = {"xaxis": f"x{axis}", "yaxis": f"y{axis}", "showlegend": False}
    return [lines | axes, leaves | axes]


def _tell_join(join: Join, names: Sequence[str]) -> str:
    sides = [join_names([safe(names[task]) for task in side], limit=4) for side in (join.first, join.second)]
    n = len(join.first) + len(join.second)
    return f"{sides[0]} <br>with {sides[1]}:<br>{count(n, 'task')} at {format_signed(join.affinity, 4)}"
