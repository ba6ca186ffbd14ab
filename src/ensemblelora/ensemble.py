"""The composed model: one adapter per group, boosters added to their group, weights that combine the groups.

In: members, boosters, weights. Out: combined label scores of any split. A group's scores are its adapter's plus
``rate x (booster - theta0)`` for each of its boosters; a task's scores are the weighted mean of the groups'.
Groups whose weight for a task is zero are not run for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import StoreError
from ensemblelora.files import read_json, write_json
from ensemblelora.prediction import MemberScores, predict_members
from ensemblelora.weighting import combine

__all__ = ["Ensemble", "Member", "combined_scores", "group_scores", "load_ensemble", "predict_ensemble", "save_ensemble"]


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
    """tasks whose weights are within one standard error of a single group's"""
    combine: Literal["logits", "probabilities"]

    @property
    def group_of(self) -> tuple[int, ...]:
        """Each task's own group."""
        owner = {task: g for g, group in enumerate(self.groups) for task in group}
        return tuple(owner[task] for task in range(len(self.task_names)))

    def members_of(self, group: int) -> tuple[Member, ...]:
        """The group's adapter, then its boosters."""
        return tuple(member for member in self.members if member.group == group)


def group_scores(
    adapted: AdaptedModel,
    encoded: EncodedSplit,
    members: Sequence[Member],
    groups: Sequence[int],
    *,
    max_tokens: int,
    meter: Meter | None = None,
) -> MemberScores:
    """Score a split with some groups, boosters included.

    Returns:
        Values of shape ``(len(groups), n_rows, K)``. Free-text tasks have no boosters (see ``boosting``).
    """
    has_boosters = encoded.kind != "sequence"
    used = [m for m in members if m.group in groups and (m.kind == "group" or has_boosters)]
    names = [m.name for m in used]
    if any(m.kind == "booster" for m in used):
        names.append(THETA0)
    scores = predict_members(adapted, encoded, names, max_tokens=max_tokens, meter=meter)
    by_name = dict(zip(names, scores.values, strict=True))
    return MemberScores(
        task=scores.task,
        kind=scores.kind,
        values=np.stack([_add_boosters(by_name, [m for m in used if m.group == g]) for g in groups]),
        row_example=scores.row_example,
        row_weights=scores.row_weights,
    )


def combined_scores(scores: MemberScores, weights: Sequence[float], how: str) -> npt.NDArray[np.float64]:
    """Weighted mean of the groups' scores, ``(n_rows, K)``; free-text tokens are always mixed as probabilities."""
    return combine(scores.values, np.asarray(weights), "mixture" if scores.kind == "sequence" else how)


def predict_ensemble(
    adapted: AdaptedModel, ensemble: Ensemble, task: int, encoded: EncodedSplit, *, max_tokens: int, meter: Meter | None = None
) -> npt.NDArray[np.float64]:
    """Combined scores of one task's rows, ``(n_rows, K)``; only groups with a weight are run."""
    weights = np.asarray(ensemble.weights[task])
    groups = [int(g) for g in np.flatnonzero(weights)]
    scores = group_scores(adapted, encoded, ensemble.members, groups, max_tokens=max_tokens, meter=meter)
    return combined_scores(scores, weights[groups].tolist(), ensemble.combine)


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


def _add_boosters(by_name: Mapping[str, npt.NDArray[np.float32]], members: Sequence[Member]) -> npt.NDArray[np.float32]:
    total = by_name[next(m.name for m in members if m.kind == "group")].copy()
    present = np.isfinite(total)
    for member in members:
        if member.kind == "booster":
            total[present] += member.rate * (by_name[member.name][present] - by_name[THETA0][present])
    return total
