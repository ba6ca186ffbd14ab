"""Where the plan goes against what the map of affinities shows, and why: a sentence for a reader who sees both.

The map shows pairs, apart from tasks' own levels; the plan is chosen for what whole groups are predicted to give. The
two need not agree, and nothing is said where they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ensemblelora.report.heatmaps import remove_levels
from ensemblelora.report.hierarchy import build_tree
from ensemblelora.report.records import PlanRecord, RunRecord
from ensemblelora.report.wording import format_number, format_signed, join_names

__all__ = ["explain_departure", "explain_unmoved", "is_by_cosine", "part_pairs"]

Matrix = npt.NDArray[np.float64]
_Blocks = Sequence[Sequence[int]]

_STRONG = 0.5
"""share of the map's largest value from which a pair's colour catches the eye"""
_CLEAR = 2.0
"""standard errors of a typical pair by which blocks must stand out: sorted noise has blocks, too"""
_WHAT_THE_MAP_SAYS = "affinities say who goes better with whom than usual"


def explain_departure(run: RunRecord) -> str:
    """Say why the plan goes against the map of affinities; nothing where it doesn't, or where there is no map."""
    if run.affinity is None or run.plan.n_tasks < 3:
        return ""
    values = remove_levels(run.affinity.matrix)
    if not np.isfinite(values).any():
        return ""
    return _explain_one(run, values) if len(run.plan.groups) == 1 else _explain_groups(run, values)


def explain_unmoved(plan: PlanRecord) -> str:
    """Say why one adapter for all is predicted as the base model, digit for digit, where it is."""
    shared, base = plan.predicted.shared.nll, plan.predicted.base.nll
    if not shared or shared != base:
        return ""
    return (
        "One adapter for all is predicted to stay the base model: no step of its simulated training lowers the mean "
        "validation loss."
    )


def is_by_cosine(plan: PlanRecord) -> bool:
    """Whether the plan's groups were found by gradient cosine, and not from the affinities."""
    return "by gradient cosine" in plan.reason


def part_pairs(values: Matrix, groups: _Blocks) -> tuple[Matrix, Matrix]:
    """Return the known values of pairs inside the groups, and of those across them, each pair once."""
    group_of = np.empty(len(values), dtype=int)
    for group, tasks in enumerate(groups):
        group_of[list(tasks)] = group
    is_pair = np.triu(np.isfinite(values), k=1)
    is_inside = group_of[:, None] == group_of[None, :]
    return values[is_pair & is_inside], values[is_pair & ~is_inside]


def _explain_groups(run: RunRecord, values: Matrix) -> str:
    pair = _find_parted(values, run.plan.groups)
    if pair is None:
        return ""
    one, other = (run.plan.task_names[task] for task in pair)
    error = None if run.affinity is None or run.affinity.se is None else run.affinity.se[pair]
    known = f" ± {format_number(float(error))}" if error is not None and np.isfinite(error) else ""
    return (
        f"On the map of affinities {one} and {other} do well together ({format_signed(values[pair])}{known}), but the "
        f"plan parts them: {_say_what_decided(run)}."
    )


def _find_parted(values: Matrix, groups: _Blocks) -> tuple[int, int] | None:
    """Find the strongest pair across groups whose tasks both do better with each other than in their own groups."""
    filled, n = np.where(np.isfinite(values), values, -np.inf), len(values)
    own, is_across = np.zeros(n), np.ones((n, n), dtype=bool)
    for group in groups:
        block = np.ix_(group, group)
        is_across[block] = False
        known = np.isfinite(values[block])
        sums, counts = np.where(known, values[block], 0.0).sum(axis=1), known.sum(axis=1)
        own[list(group)] = sums / np.maximum(counts, 1)  # alone: as usual, which is 0
    is_better = is_across & (filled > own[:, None]) & (filled > own[None, :])
    candidates = np.where(is_better & (filled >= _STRONG * np.nanmax(np.abs(values))), filled, -np.inf)
    first, second = divmod(int(np.argmax(candidates)), n)
    return (first, second) if candidates[first, second] > 0 else None


def _say_what_decided(run: RunRecord) -> str:
    if run.config.grouping.groups is not None:
        origin = run.config.grouping.origin
        return f"the groups are {origin}" if origin else "the groups were given by hand"
    if len(run.plan.groups) == run.plan.n_tasks:
        return f"{_WHAT_THE_MAP_SAYS}, not whether training together pays, which the predicted loss tells"
    if is_by_cosine(run.plan):
        return "affinities are estimates with errors, and groups by gradient cosine are predicted to do better"
    return (
        "affinities are estimates with errors, of a pair at a time, and groups are chosen as a whole, by affinity and "
        "by predicted loss"
    )


def _explain_one(run: RunRecord, values: Matrix) -> str:
    block = _find_block(values, None if run.affinity is None else run.affinity.se)
    if not block:
        return ""
    grouping, points = run.config.grouping, [point for point in run.plan.curve if point.n_groups > 1 and point.allowed]
    if grouping.groups is not None or isinstance(grouping.n_groups, int):
        told = "one adapter was asked for"
    elif not points:
        told = "no grouping was open to choice"
    else:
        told = "the predicted loss, which does, has to fall by more than its error"
    names = join_names([run.plan.task_names[task] for task in sorted(block)], limit=3)
    return (
        f"The map of affinities shows blocks (such as {names}), but the plan is one adapter for all: "
        f"{_WHAT_THE_MAP_SAYS}, not whether parting tasks pays; {told}."
    )


def _find_block(values: Matrix, errors: Matrix | None) -> Sequence[int]:
    """Return the closest block of the map, if its blocks stand out from the errors; else nothing."""
    known = np.array([]) if errors is None else errors[np.triu(np.isfinite(values) & np.isfinite(errors), k=1)]
    if not len(known):
        return ()
    for blocks in _list_cuts(values):
        inside, across = part_pairs(values, blocks)
        if len(inside) and len(across) and inside.mean() - across.mean() > _CLEAR * np.median(known):
            means = {tuple(block): part_pairs(values[np.ix_(block, block)], [range(len(block))])[0] for block in blocks}
            return max((block for block in means if len(means[block])), key=lambda block: float(means[block].mean()))
    return ()


def _list_cuts(values: Matrix) -> Iterator[_Blocks]:
    """Cut the map's tree into two blocks, then into three."""
    *_, below, top = build_tree(values).joins
    yield top.first, top.second
    parted = below.first + below.second
    yield below.first, below.second, *(block for block in (top.first, top.second) if block != parted)
