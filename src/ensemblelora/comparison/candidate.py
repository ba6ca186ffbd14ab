"""What a method made: adapters and weights, or anything else that scores rows, and what it cost.

In: a pool and an ensemble of its adapters. Out: :class:`Candidate`, whose ``predict`` gives each task's class scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora.comparison.pool import Part, Pool, Trained
from ensemblelora.ensemble import Ensemble, Member, combined_scores, needed_adapters, sum_groups
from ensemblelora.grouping import Partition
from ensemblelora.prediction import MemberScores

__all__ = ["NOTHING", "Candidate", "Costs", "make_candidate", "make_ensemble"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """What a method costs to choose, to train and to use.

    Attributes:
        train_flops: FLOPs of everything that is fine-tuned for it, boosting and weights included.
        select_flops: FLOPs spent on deciding what to train.
        seconds: Measured, both together.
        peak_memory_bytes: The process's highest in what is done for it.
        added_memory_bytes: The highest above what was resident when a part of it began.
        n_bytes: Of all tensors it keeps beside the base model.
        forward_passes: A prediction takes, averaged over tasks.
    """

    train_flops: int
    select_flops: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    added_memory_bytes: int = 0
    n_bytes: int = 0
    forward_passes: float = 1.0

    @classmethod
    def of(cls, trained: Sequence[Trained], *, kept: Sequence[Trained] | None = None, **more: Any) -> Costs:
        """Charge for fine-tunings, each as often as it is named.

        Args:
            trained: All that was fine-tuned for the method.
            kept: Those whose adapters are needed to predict; none: all.
            more: Other fields; ``seconds`` and ``train_flops`` are added to the sums.
        """
        return cls(
            train_flops=sum(one.flops for one in trained) + more.pop("train_flops", 0),
            seconds=sum(one.seconds for one in trained) + more.pop("seconds", 0.0),
            peak_memory_bytes=max((one.peak_memory_bytes for one in trained), default=0),
            added_memory_bytes=max((one.added_memory_bytes for one in trained), default=0),
            n_bytes=sum({one.name: one.n_bytes for one in (trained if kept is None else kept)}.values()),
            **more,
        )

    @classmethod
    def of_scoring(cls, pool: Pool, names: Mapping[int, Sequence[str]], part: Part) -> Costs:
        """Charge for scoring rows, which was done: FLOPs as if they were scored for this method alone.

        Args:
            pool: Holds the scores.
            names: Of each task, the adapters that score its rows together.
            part: Which rows.
        """
        return cls(
            train_flops=sum(pool.count_scoring(task, part, len(some)) for task, some in names.items()),
            seconds=sum(pool.time_scoring(some, task, part) for task, some in names.items()),
        )

    def as_choosing(self) -> Costs:
        """The same as the price of deciding what to train."""
        return replace(self, train_flops=0, select_flops=self.flops, n_bytes=0)

    @property
    def flops(self) -> int:
        """To make it: training and deciding."""
        return self.train_flops + self.select_flops

    def plus(self, *others: Costs) -> Costs:
        """Add what was done besides: sums and peaks; what is kept, and what a prediction takes, stay."""
        every = (self, *others)
        return replace(
            self,
            train_flops=sum(one.train_flops for one in every),
            select_flops=sum(one.select_flops for one in every),
            seconds=sum(one.seconds for one in every),
            peak_memory_bytes=max(one.peak_memory_bytes for one in every),
            added_memory_bytes=max(one.added_memory_bytes for one in every),
        )


NOTHING = Costs(0)
"""what a decision costs that needs neither a model nor time"""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A method's outcome on one seed.

    Attributes:
        predict: Scores of every task's rows of a part, values ``(1, n_rows, K)``; higher is likelier. Test rows only
            inside :meth:`Pool.open_tests`.
        costs: What it took.
        groups: The partition of tasks it trained, where there is one.
        notes: Plain values worth keeping: weights, what was chosen and why.
    """

    predict: Callable[[Part], list[MemberScores]]
    costs: Costs
    groups: Partition | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def make_ensemble(
    pool: Pool,
    names: Sequence[str],
    weights: npt.ArrayLike,
    *,
    groups: Partition | None = None,
    boosters: Sequence[Member] = (),
) -> Ensemble:
    """Combine adapters of the pool, one a group.

    Args:
        pool: Holds them.
        names: One adapter a group; theta0 is the base model.
        weights: ``(n_tasks, len(names))``, rows on the simplex.
        groups: Tasks of each adapter; none where adapters have no tasks of their own.
        boosters: Members beyond, by group.
    """
    rows = np.asarray(weights, dtype=np.float64)
    return Ensemble(
        task_names=pool.rows.names,
        groups=groups if groups is not None else tuple(pool.everyone for _ in names),
        members=(*(Member(name, g, "group", 1.0) for g, name in enumerate(names)), *boosters),
        weights=tuple(tuple(float(weight) for weight in row) for row in rows),
        routed=tuple(False for _ in rows),
        combine=pool.config.ensemble.combine,
    )


def make_candidate(
    pool: Pool, ensemble: Ensemble, costs: Costs, *, groups: Partition | None = None, **notes: Any
) -> Candidate:
    """Let an ensemble of the pool's adapters stand as a method's outcome; fills in its forward passes."""
    passes = [
        len(needed_adapters(ensemble.members, list(np.flatnonzero(row)), pool.split(task, "validation").kind))
        for task, row in enumerate(ensemble.weights)
    ]

    def predict(part: Part) -> list[MemberScores]:
        return [_score(pool, ensemble, task, part) for task in pool.everyone]

    described = {"weights": ensemble.weights, "members": [member.name for member in ensemble.members]}
    full = replace(costs, forward_passes=float(np.mean(passes)))
    return Candidate(predict, full, groups, {**described, **notes})


def _score(pool: Pool, ensemble: Ensemble, task: int, part: Part) -> MemberScores:
    """Combined scores of one task; only groups with a weight are run."""
    weights = np.asarray(ensemble.weights[task])
    used = [int(g) for g in np.flatnonzero(weights)]
    names = needed_adapters(ensemble.members, used, pool.split(task, part).kind)
    found = pool.score(names, task, part)
    grouped = sum_groups(found, names, ensemble.members, used)
    return replace(found, values=combined_scores(grouped, weights[used].tolist(), ensemble.combine)[None])
