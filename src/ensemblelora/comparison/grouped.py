"""Methods that are a partition of the tasks: one adapter a group, each task scored by its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ensemblelora.adapters import THETA0
from ensemblelora.comparison.candidate import Candidate, Costs, make_candidate, make_ensemble
from ensemblelora.comparison.planned import make_plan
from ensemblelora.comparison.pool import Pool
from ensemblelora.config import TrainingConfig
from ensemblelora.grouping import Partition, sort_groups

__all__ = ["own_weights", "score_base", "train_groups", "train_planned", "train_shared", "train_singles"]


def score_base(pool: Pool) -> Candidate:
    """No training."""
    return make_candidate(pool, make_ensemble(pool, [THETA0], np.ones((pool.n_tasks, 1))), Costs(train_flops=0))


def train_shared(pool: Pool) -> Candidate:
    """One adapter, all tasks."""
    return train_groups(pool, (pool.everyone,))


def train_singles(pool: Pool) -> Candidate:
    """As many adapters as tasks."""
    return train_groups(pool, tuple((task,) for task in pool.everyone))


def train_planned(pool: Pool) -> Candidate:
    """The groups that the plan names, without boosting or weights."""
    planned = make_plan(pool)
    return train_groups(pool, planned.plan.groups, select_flops=planned.select_flops, seconds=planned.seconds)


def train_groups(
    pool: Pool,
    groups: Partition,
    *,
    select_flops: int = 0,
    seconds: float = 0.0,
    settle: Callable[[Sequence[int]], TrainingConfig] | None = None,
) -> Candidate:
    """One adapter a group, each task scored by its own group's.

    Args:
        pool: The seed's.
        groups: A partition of the tasks.
        select_flops: What finding it took.
        seconds: The same in time.
        settle: Gives a group's settings; none: the config's.
    """
    groups = sort_groups(groups)
    trained = [pool.train(group, settings=settle and settle(group)) for group in groups]
    ensemble = make_ensemble(pool, [one.name for one in trained], own_weights(groups), groups=groups)
    costs = Costs.of(trained, select_flops=select_flops, seconds=seconds)
    return make_candidate(pool, ensemble, costs, groups=groups, n_steps=[one.n_steps for one in trained])


def own_weights(groups: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
    """Weights ``(n_tasks, n_groups)`` by which every task is scored by its own group alone."""
    weights = np.zeros((sum(map(len, groups)), len(groups)))
    for g, group in enumerate(groups):
        weights[list(group), g] = 1.0
    return weights
