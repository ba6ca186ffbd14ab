"""Methods that are a partition of the tasks: one adapter a group, each task scored by its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from ensemblelora.adapters import THETA0
from ensemblelora.comparison.candidate import NOTHING, Candidate, Costs, make_candidate, make_ensemble
from ensemblelora.comparison.planned import make_plan
from ensemblelora.comparison.pool import Pool, Wish
from ensemblelora.config import TrainingConfig
from ensemblelora.errors import ConfigError
from ensemblelora.grouping import Partition, sort_groups

__all__ = [
    "own_weights",
    "score_base",
    "train_groups",
    "train_number",
    "train_planned",
    "train_sampled",
    "train_shared",
    "train_singles",
]


def score_base(pool: Pool) -> Candidate:
    """No training."""
    return make_candidate(pool, make_ensemble(pool, [THETA0], np.ones((pool.n_tasks, 1))), Costs(train_flops=0))


def train_shared(pool: Pool) -> Candidate:
    """One adapter, all tasks."""
    return train_groups(pool, (pool.everyone,))


def train_sampled(pool: Pool, sampling: Literal["proportional", "sqrt", "uniform"]) -> Candidate:
    """One adapter, all tasks, each with another share of an epoch than its rows have; epochs are as long as ever.

    Args:
        pool: The seed's.
        sampling: As the config's ``training.sampling``.
    """
    settings = pool.config.training.model_copy(update={"sampling": sampling})
    return train_groups(pool, (pool.everyone,), settle=lambda _: settings)


def train_singles(pool: Pool) -> Candidate:
    """As many adapters as tasks."""
    return train_groups(pool, tuple((task,) for task in pool.everyone))


def train_planned(pool: Pool) -> Candidate:
    """The groups that the plan names, without boosting or weights."""
    planned = make_plan(pool)
    return train_groups(pool, planned.plan.groups, select=planned.costs)


def train_number(pool: Pool, n_groups: int) -> Candidate:
    """The groups that the plan would have with another number of them, without boosting or weights; its own, too.

    Costs as :func:`train_planned`. What the plan said of the number is in the notes.

    Args:
        pool: The seed's.
        n_groups: One that the plan looked at.

    Raises:
        ConfigError: If it did not.

    Reference:
        Paper, section 3.3, "Determining the ensemble size".
    """
    planned = make_plan(pool)
    point = next((point for point in planned.plan.curve if point.n_groups == n_groups), None)
    if point is None:
        known = ", ".join(str(point.n_groups) for point in planned.plan.curve)
        raise ConfigError(
            f"{n_groups} groups: the plan looked at {known}; raise grouping.max_groups, or leave the method out"
        )
    told = {name: getattr(point, name) for name in ("n_groups", "predicted_nll", "gain", "gain_se", "density")}
    told["is_chosen"] = len(planned.plan.groups) == n_groups
    candidate = train_groups(pool, point.groups, select=planned.costs)
    return replace(candidate, notes={**candidate.notes, "planned": told})


def train_groups(
    pool: Pool,
    groups: Partition,
    *,
    select: Costs = NOTHING,
    settle: Callable[[Sequence[int]], TrainingConfig] | None = None,
) -> Candidate:
    """One adapter a group, each task scored by its own group's.

    Args:
        pool: The seed's.
        groups: A partition of the tasks.
        select: What finding it took.
        settle: Gives a group's settings; none: the config's.
    """
    groups = sort_groups(groups)
    trained = pool.train_each([Wish(group, settings=settle and settle(group)) for group in groups])
    ensemble = make_ensemble(pool, [one.name for one in trained], own_weights(groups), groups=groups)
    costs = Costs.of(trained).plus(select)
    return make_candidate(pool, ensemble, costs, groups=groups, n_steps=[one.n_steps for one in trained])


def own_weights(groups: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
    """Weights ``(n_tasks, n_groups)`` by which every task is scored by its own group alone."""
    weights = np.zeros((sum(map(len, groups)), len(groups)))
    for g, group in enumerate(groups):
        weights[list(group), g] = 1.0
    return weights
