"""Between partitions of the tasks that are all trained: the one with the least validation loss, and the others' price.

In: a pool and partitions. Out: a candidate of the best one. This is how a way to group that predicts nothing can say
that tasks are not to be grouped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ensemblelora.comparison.candidate import NOTHING, Candidate, Costs
from ensemblelora.comparison.grouped import train_groups
from ensemblelora.comparison.pool import Pool, Trained, Wish
from ensemblelora.config import TrainingConfig
from ensemblelora.grouping import Partition, sort_groups

__all__ = ["Option", "train_best"]


@dataclass(frozen=True)
class Option:
    """A partition that could be kept."""

    groups: Partition
    is_paid: bool = False
    """whether its trainings are part of what finding the options took"""


def train_best(
    pool: Pool,
    options: Sequence[Option],
    *,
    select: Costs = NOTHING,
    settle: Callable[[Sequence[int]], TrainingConfig] | None = None,
) -> Candidate:
    """Train every option, and keep the one with the least validation loss, in the mean over tasks.

    The others' trainings are charged as the price of choosing. Losses are those that chose each adapter's checkpoint,
    so that no row is scored for it.

    Args:
        pool: The seed's.
        options: The first of equals is kept.
        select: What finding them took, trainings of paid ones included; these count as training if one is kept.
        settle: Gives a group's settings; none: the config's.
    """
    found = [_train(pool, option.groups, settle) for option in options]
    losses = [sum(len(one.tasks) * one.validation_nll for one in trained) / pool.n_tasks for trained in found]
    best = min(range(len(options)), key=lambda k: losses[k])
    tried = [
        Costs.of(trained, kept=[]).as_choosing()
        for k, trained in enumerate(found)
        if k != best and not options[k].is_paid
    ]
    spent = select.plus(*tried)
    if options[best].is_paid:
        spent = replace(
            spent,
            select_flops=max(0, spent.select_flops - sum(one.flops for one in found[best])),
            seconds=max(0.0, spent.seconds - sum(one.seconds for one in found[best])),
        )
    candidate = train_groups(pool, options[best].groups, select=spent, settle=settle)
    told = [{"n_groups": len(o.groups), "validation_nll": loss} for o, loss in zip(options, losses, strict=True)]
    return replace(candidate, notes={**candidate.notes, "tried": told})


def _train(pool: Pool, groups: Partition, settle: Callable[[Sequence[int]], TrainingConfig] | None) -> list[Trained]:
    return pool.train_each([Wish(group, settings=settle and settle(group)) for group in sort_groups(groups)])
