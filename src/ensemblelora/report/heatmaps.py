"""The report's heat maps: the affinity between tasks, and the weights of the ensemble."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora.report.document import Figure
from ensemblelora.report.hierarchy import build_tree, draw_tree
from ensemblelora.report.plotting import complete, or_none, safe, short_labels
from ensemblelora.report.records import AffinityRecord
from ensemblelora.report.wording import count, format_signed, group_letter, join_names

__all__ = [
    "MAX_LABELLED_TASKS",
    "draw_affinity",
    "draw_helping",
    "draw_hierarchy",
    "draw_weights",
    "remove_levels",
]

Matrix = npt.NDArray[np.float64]

# More labels than this can't be read; such a heat map shows colours and keeps its names for the table.
MAX_LABELLED_TASKS = 60
_N_SCALE_STEPS = 7
_STANDOFF = 16  # pixels from an axis's labels to its title


def remove_levels(matrix: Matrix) -> Matrix:
    """Return what is left of a symmetric affinity after each task's own level: A_ij - a_i - a_j, blank diagonal.

    Clustering into whole groups ignores a constant added to a row (docs/paper.md), yet such constants, the tasks'
    difficulties, are most of what the raw matrix would show. The levels are the least-squares fit of a_i + a_j to
    the pairs. Three pairs would be fitted exactly: of three tasks, a level is half the task's mean over all its
    subsets, which is on the diagonal, and what is left of a pair is what joining it adds to clustering's objective.

    Args:
        matrix: (n_tasks, n_tasks); NaN where unknown.
    """
    n = len(matrix)
    pairs = np.where(np.eye(n, dtype=bool), np.nan, (matrix + matrix.T) / 2)
    is_known = np.isfinite(pairs)
    if n < 3 or not is_known.any():
        return pairs
    if n == 3:
        halves = np.diag(matrix) / 2
        return np.asarray(pairs - halves[:, None] - halves[None, :])
    # The normal equations of one unknown a task and one equation a pair: each level meets every partner's once.
    met = is_known.astype(np.float64)
    levels = np.linalg.lstsq(np.diag(met.sum(axis=1)) + met, np.nansum(pairs, axis=1), rcond=None)[0]
    return np.asarray(pairs - levels[:, None] - levels[None, :])


def draw_affinity(affinity: AffinityRecord, names: Sequence[str], groups: Sequence[Sequence[int]]) -> Figure:
    """Draw the affinity map ordered by group, groups framed."""
    order = [task for group in groups for task in group]
    values = remove_levels(affinity.matrix)
    heat_map = _draw_pairs(affinity, values, order, names)
    spec = complete([heat_map], {**_task_axes([names[task] for task in order]), "shapes": _frames(groups)})
    alt = f"{_describe_affinity(values, names, 'ordered by group')} "
    alt += f"{'The frame shows' if len(groups) == 1 else 'Frames show'} {count(len(groups), 'group')}."
    return Figure("affinity-grouped", "Ordered by group", alt, spec)


def draw_hierarchy(affinity: AffinityRecord, names: Sequence[str], groups: Sequence[Sequence[int]]) -> Figure:
    """Draw the affinity map in the order of a tree of average linkage, the tree above it, leaves in groups' colours."""
    values = remove_levels(affinity.matrix)
    tree = build_tree(values)
    group_of = np.empty(len(names), dtype=int)
    for group, tasks in enumerate(groups):
        group_of[list(tasks)] = group
    heat_map = _draw_pairs(affinity, values, tree.order, names)
    axes = _task_axes([names[task] for task in tree.order])
    axes["yaxis"]["domain"] = [0, 0.82]
    plain = {"showgrid": False, "zeroline": False, "showticklabels": False, "ticks": ""}
    axes["xaxis2"] = {**plain, "anchor": "y2", "range": [-0.5, len(names) - 0.5]}
    axes["yaxis2"] = {**plain, "anchor": "x2", "domain": [0.84, 1], "range": [-0.5, len(names) - 0.5]}
    spec = complete([heat_map, *draw_tree(tree, names, group_of.tolist(), axis="2")], axes)
    alt = f"{_describe_affinity(values, names, 'ordered by a tree of who joins first')}"
    return Figure("affinity-tree", "Ordered by likeness", alt, spec)


def _draw_pairs(affinity: AffinityRecord, values: Matrix, order: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Return the map of all pairs in an order, and what hovering says of them."""
    reach = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    heat_map = _heat_map(values[np.ix_(order, order)], "diverging", reach=reach or 1.0)
    if len(names) <= MAX_LABELLED_TASKS:
        return heat_map | _pair_hover(affinity, order)
    return heat_map | {"hovertemplate": "%{y} with %{x}: %{z:+.4f}<extra></extra>"}


def draw_helping(gains: Matrix, names: Sequence[str], groups: Sequence[Sequence[int]], *, noun: str = "task") -> Figure:
    """Draw what each task gains by each partner: rows are helped, columns help; tasks in the order of groups.

    Args:
        gains: ``(n, n)`` above 0 helps, NaN where unknown or of a task with itself.
        names: Of the tasks.
        groups: Indices of tasks.
        noun: What they are.
    """
    order = [task for group in groups for task in group]
    reach = float(np.nanmax(np.abs(gains))) if np.isfinite(gains).any() else 0.0
    heat_map = _heat_map(gains[np.ix_(order, order)], "diverging", reach=reach or 1.0)
    heat_map["hovertemplate"] = "<b>%{x}</b> in <b>%{y}</b>'s training set:<br>%{z:+.4f}<extra></extra>"
    axes = _task_axes([names[task] for task in order])
    axes["xaxis"]["title"] = {"text": "what trains with it", "standoff": _STANDOFF}
    axes["yaxis"]["title"] = {"text": noun, "standoff": _STANDOFF}
    spec = complete([heat_map], {**axes, "shapes": _frames(groups)})
    known = gains[np.isfinite(gains)]
    n_helped = int((known > 0).sum())
    alt = f"Map of what {count(len(names), noun)} gain by each other: {n_helped:,} of {len(known):,} pairs above 0."
    return Figure("helping", "Who helps whom", alt, spec)


def draw_weights(
    weights: Sequence[Sequence[float]], names: Sequence[str], groups: Sequence[Sequence[int]], routed: Sequence[bool]
) -> Figure:
    """Draw the weight every task gives every group, tasks ordered by group, own groups framed."""
    order = [task for group in groups for task in group]
    values = np.array([weights[task] for task in order], dtype=np.float64)
    heat_map = _heat_map(values, "sequential", reach=1.0)
    heat_map.update(hovertemplate="<b>%{y}</b>: %{z:.3f} on group %{x}<extra></extra>", zmin=0)
    if len(names) <= MAX_LABELLED_TASKS:
        # Weights near 1 stand on the darkest colour, where only the inverse of the text colour can be read.
        heat_map.update(texttemplate="%{text}", text=[[f"{value:.2f}" for value in row] for row in values])
    letters = [group_letter(group) for group in range(len(groups))]
    axes = _task_axes([names[task] for task in order])
    axes["xaxis"] = {"type": "category", "side": "top", "title": {"text": "group"}, "showgrid": False, "ticks": ""}
    heat_map.update(x=letters)
    spec = complete([heat_map], {**axes, "shapes": _own_frames(groups)})
    strays = [names[task] for task in range(len(names)) if not _leads_own_group(weights[task], task, groups)]
    lead = f"{join_names(strays)} weigh another group more" if strays else "every task weighs its own group most"
    n_alone = sum(routed) or "none"
    shape = f"{len(names)} tasks on {len(groups)} groups"
    alt = f"Weights of {shape}: {lead}; {n_alone} could be answered by one group alone."
    row = max(24, 34 - len(names) // 4) if len(names) <= MAX_LABELLED_TASKS else 520 / len(names)
    return Figure("weights", "Ensemble weights", alt, spec, height=90 + round(row * len(names)))


def _heat_map(values: Matrix, scale: str, *, reach: float) -> dict[str, Any]:
    steps = [[step / (_N_SCALE_STEPS - 1), f"var(--{scale}-{step})"] for step in range(_N_SCALE_STEPS)]
    # Four digits of single precision are more than a colour shows, and a quarter of the bytes.
    rounded = np.round(values, 5).astype(np.float32) if len(values) > MAX_LABELLED_TASKS else np.round(values, 5)
    z = rounded if len(values) > MAX_LABELLED_TASKS else [[or_none(value) for value in row] for row in rounded]
    return {"type": "heatmap", "z": z, "zmin": -reach, "zmax": reach, "colorscale": steps, "showscale": False} | (
        {"xgap": 1, "ygap": 1} if len(values) <= MAX_LABELLED_TASKS else {}
    )


def _task_axes(names: Sequence[str]) -> dict[str, Any]:
    """Return category axes with a task per row and column, the first row on top."""
    n = len(names)
    axis = {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": [safe(name) for name in names],
        "showgrid": False,
        "ticks": "",
        "showticklabels": n <= MAX_LABELLED_TASKS,
        "tickmode": "array",
        "tickvals": list(range(n)),
        "ticktext": short_labels(names),
        "tickfont": {"size": 11 if n <= 30 else 8},
        "range": [-0.5, n - 0.5],
    }
    return {"xaxis": {**axis, "tickangle": -60}, "yaxis": {**axis, "range": [n - 0.5, -0.5]}}


def _pair_hover(affinity: AffinityRecord, order: Sequence[int]) -> dict[str, Any]:
    """Return what hovering over a pair says: its affinity, raw and without levels, and how often it met."""
    counts, errors = affinity.counts, affinity.se
    cells = [
        [
            [
                or_none(round(affinity.matrix[i, j], 5)),
                None if counts is None else int(counts[i, j]),
                None if errors is None else or_none(round(errors[i, j], 5)),
            ]
            for j in order
        ]
        for i in order
    ]
    lines = ["<b>%{y}</b> with <b>%{x}</b>", "affinity without own levels %{z:+.4f}", "mean score %{customdata[0]:.4f}"]
    if errors is not None:
        lines[1] += " ± %{customdata[2]:.4f}"
    if counts is not None:
        lines.append("met in %{customdata[1]} subsets")
    return {"customdata": cells, "hovertemplate": "<br>".join(lines) + "<extra></extra>"}


def _frames(groups: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Return a frame around each group's block on the diagonal."""
    ends = np.cumsum([0, *(len(group) for group in groups)]) - 0.5
    return [_frame(float(low), float(high), float(low), float(high)) for low, high in itertools.pairwise(ends)]


def _own_frames(groups: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    ends = np.cumsum([0, *(len(group) for group in groups)]) - 0.5
    return [
        _frame(group - 0.5, group + 0.5, float(ends[group]), float(ends[group + 1])) for group in range(len(groups))
    ]


def _frame(x0: float, x1: float, y0: float, y1: float) -> dict[str, Any]:
    line = {"color": "var(--ink)", "width": 2}
    return {"type": "rect", "x0": x0, "x1": x1, "y0": y0, "y1": y1, "line": line}


def _describe_affinity(values: Matrix, names: Sequence[str], ordered: str) -> str:
    start = f"Affinity of {len(names)} tasks, {ordered}"
    upper = np.where(np.triu(np.ones_like(values, dtype=bool), k=1) & np.isfinite(values), values, np.nan)
    if not np.isfinite(upper).any():
        return f"{start}; no pair has a value."
    best, worst = (divmod(int(place), len(names)) for place in (np.nanargmax(upper), np.nanargmin(upper)))
    pair = f"{names[best[0]]} and {names[best[1]]} go best together ({format_signed(upper[best])})"
    return f"{start}; {pair}, {names[worst[0]]} and {names[worst[1]]} worst ({format_signed(upper[worst])})."


def _leads_own_group(row: Sequence[float], task: int, groups: Sequence[Sequence[int]]) -> bool:
    own = next(group for group, members in enumerate(groups) if task in members)
    return row[own] >= max(row)
