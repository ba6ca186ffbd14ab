"""Ours with a temperature: how sure its answers are is settled on validation rows, task by task.

In: a pool. Out: a candidate that answers as ours does, and whose losses differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ensemblelora.comparison.candidate import Candidate
from ensemblelora.comparison.combined import train_ours
from ensemblelora.comparison.pool import Part, Pool
from ensemblelora.prediction import MemberScores
from ensemblelora.weighting import fit_temperature

__all__ = ["train_tempered"]


def train_tempered(pool: Pool) -> Candidate:
    """Ours, its combined class scores divided by a temperature for each task; free text is left as it is.

    Costs what ours does, and a pass of its members over the validation rows where the weights did not take one.

    Reference:
        docs/paper.md, row "temperature".
    """
    ours = train_ours(pool)
    temperatures = {
        found.task: fit_temperature(found.values[0], pool.split(task, "validation").labels)
        for task, found in enumerate(ours.predict("validation"))
        if found.kind != "sequence"
    }

    def predict(part: Part) -> list[MemberScores]:
        return [_divide(found, temperatures) for found in ours.predict(part)]

    flops = ours.costs.train_flops + (0 if _are_weights_fitted(pool, ours) else _count_validation(pool, ours))
    costs = replace(ours.costs, train_flops=flops)
    return replace(ours, predict=predict, costs=costs, notes={**ours.notes, "temperatures": temperatures})


def _divide(found: MemberScores, temperatures: Mapping[str, float]) -> MemberScores:
    if found.task not in temperatures:
        return found
    return replace(found, values=found.values.astype(np.float64) / temperatures[found.task])


def _are_weights_fitted(pool: Pool, ours: Candidate) -> bool:
    """Whether the validation rows were scored, and charged for, already."""
    return pool.config.ensemble.weights in ("task", "global") and len(ours.groups or ()) > 1


def _count_validation(pool: Pool, ours: Candidate) -> int:
    n_members = max(1, round(ours.costs.forward_passes))
    return sum(pool.count_scoring(task, "validation", n_members) for task in pool.everyone)
