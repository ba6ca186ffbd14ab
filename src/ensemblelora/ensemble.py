"""The composed model: one adapter per group, boosters added to their group, weights that combine the groups.

In: members, boosters, weights. Out: combined label scores of any split. A group's scores are its adapter's plus
``rate x (booster - theta0)`` for each of its boosters; a task's scores are the weighted mean of the groups'.
Groups whose weight for a task is zero are not run for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel
from ensemblelora.config import MaxTokens
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.task import Kind
from ensemblelora.errors import StoreError
from ensemblelora.files import read_json, write_json
from ensemblelora.prediction import MemberScores, predict_members
from ensemblelora.weighting import combine

__all__ = [
    "Combination",
    "Ensemble",
    "Member",
    "combined_scores",
    "group_scores",
    "list_members",
    "load_ensemble",
    "needed_adapters",
    "predict_ensemble",
    "predict_weighted",
    "save_ensemble",
    "sum_groups",
]

Combination = Literal["logits", "probabilities"]


@dataclass(frozen=True)
class Member:
    """One adapter of the ensemble."""

    name: str
    group: int
    kind: Literal["group", "booster"]
    rate: float
    """1 for a group's own adapter; what a booster's change is multiplied with"""


@dataclass(frozen=True)
class Ensemble:
    """Which adapters, of which groups, with which weights for which task."""

    task_names: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    members: tuple[Member, ...]
    weights: tuple[tuple[float, ...], ...]
    """(n_tasks, n_groups); each row is non-negative and sums to one"""
    routed: tuple[bool, ...]
    """tasks that could be routed: their weights are within one standard error of a single group's. What is run is what
    ``weights`` says, which ``ensemble.route`` changes for these tasks"""
    combine: Combination

    @property
    def group_of(self) -> tuple[int, ...]:
        """Each task's own group."""
        owner = {task: g for g, group in enumerate(self.groups) for task in group}
        return tuple(owner[task] for task in range(len(self.task_names)))

    @property
    def is_boosted(self) -> bool:
        """Whether some group has a booster."""
        return any(member.kind == "booster" for member in self.members)

    def members_of(self, group: int) -> tuple[Member, ...]:
        """The group's adapter, then its boosters."""
        return tuple(member for member in self.members if member.group == group)


def needed_adapters(members: Sequence[Member], groups: Sequence[int], kind: Kind) -> tuple[str, ...]:
    """Name the adapters that scoring some groups takes, theta0 among them where boosters are measured from it."""
    used = list_members(members, groups, kind)
    start = (THETA0,) if any(member.kind == "booster" for member in used) else ()
    return (*(member.name for member in used), *start)


def sum_groups(
    scores: MemberScores, names: Sequence[str], members: Sequence[Member], groups: Sequence[int]
) -> MemberScores:
    """Add boosters to their groups' own scores.

    Args:
        scores: Of the adapters ``names``, which hold all of :func:`needed_adapters`, ``(len(names), n_rows, K)``.
        names: What each of them is.
        members: The ensemble's.
        groups: Which groups to return.

    Returns:
        Values of shape ``(len(groups), n_rows, K)``. Free-text tasks have no boosters (see ``boosting``).
    """
    by_name = dict(zip(names, scores.values, strict=True))
    used = list_members(members, groups, scores.kind)
    return replace(scores, values=np.stack([_add_boosters(by_name, [m for m in used if m.group == g]) for g in groups]))


def group_scores(
    adapted: AdaptedModel,
    encoded: EncodedSplit,
    members: Sequence[Member],
    groups: Sequence[int],
    *,
    max_tokens: MaxTokens,
    meter: Meter | None = None,
) -> MemberScores:
    """Score a split with some groups, boosters included.

    Returns:
        Values of shape ``(len(groups), n_rows, K)``.
    """
    names = needed_adapters(members, groups, encoded.kind)
    return sum_groups(
        predict_members(adapted, encoded, names, max_tokens=max_tokens, meter=meter), names, members, groups
    )


def combined_scores(scores: MemberScores, weights: Sequence[float], how: Combination) -> npt.NDArray[np.float64]:
    """Weighted mean of the groups' scores, ``(n_rows, K)``; free-text tokens are always mixed as probabilities."""
    return combine(scores.values, np.asarray(weights), "mixture" if scores.kind == "sequence" else how)


def predict_ensemble(
    adapted: AdaptedModel,
    ensemble: Ensemble,
    task: int,
    encoded: EncodedSplit,
    *,
    max_tokens: MaxTokens,
    meter: Meter | None = None,
) -> npt.NDArray[np.float64]:
    """Combined scores of one task's rows, ``(n_rows, K)``; only groups with a weight are run."""
    weights = np.asarray(ensemble.weights[task])
    groups = [int(g) for g in np.flatnonzero(weights)]
    scores = group_scores(adapted, encoded, ensemble.members, groups, max_tokens=max_tokens, meter=meter)
    return combined_scores(scores, weights[groups].tolist(), ensemble.combine)


def predict_weighted(
    adapted: AdaptedModel,
    ensemble: Ensemble,
    encoded: EncodedSplit,
    weights: npt.NDArray[np.float64],
    *,
    max_tokens: MaxTokens,
) -> npt.NDArray[np.float64]:
    """Combined scores of rows that each have weights of their own, ``(n_rows, K)``; not of free text.

    Args:
        adapted: The model with every member.
        ensemble: Its groups and members; its weights are not looked at.
        encoded: The rows.
        weights: ``(n_rows, n_groups)``, each row on the simplex; groups that none gives a weight are not run.
        max_tokens: Padded tokens of a pass.
    """
    groups = [int(g) for g in np.flatnonzero(weights.any(axis=0))]
    scores = group_scores(adapted, encoded, ensemble.members, groups, max_tokens=max_tokens)
    combined = np.zeros(scores.values.shape[1:])
    for shares in np.unique(weights, axis=0):
        rows = (weights == shares).all(axis=1)
        some = replace(scores, values=scores.values[:, rows])
        combined[rows] = combined_scores(some, shares[groups].tolist(), ensemble.combine)
    return combined


def save_ensemble(ensemble: Ensemble, path: Path, **extra: Any) -> None:
    """Write ``ensemble.json``; ``extra`` keys go beside the record for people and the report."""
    write_json(path, asdict(ensemble) | extra)


def load_ensemble(path: Path) -> Ensemble:
    """Read ``ensemble.json``.

    Raises:
        StoreError: If the file is damaged or of another format.
    """
    content = read_json(path)
    try:
        return Ensemble(
            task_names=tuple(content["task_names"]),
            groups=tuple(tuple(group) for group in content["groups"]),
            members=tuple(Member(**member) for member in content["members"]),
            weights=tuple(tuple(row) for row in content["weights"]),
            routed=tuple(content["routed"]),
            combine=content["combine"],
        )
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path}: not an ensemble ({error!r}); run the combine stage again") from None


def list_members(members: Sequence[Member], groups: Sequence[int], kind: str) -> list[Member]:
    """Return the members that scoring some groups takes; free text is written without boosters."""
    return [m for m in members if m.group in groups and (m.kind == "group" or kind != "sequence")]


def _add_boosters(by_name: Mapping[str, npt.NDArray[np.float32]], members: Sequence[Member]) -> npt.NDArray[np.float32]:
    total = by_name[next(m.name for m in members if m.kind == "group")].copy()
    present = np.isfinite(total)
    for member in members:
        if member.kind == "booster":
            total[present] += member.rate * (by_name[member.name][present] - by_name[THETA0][present])
    return total
