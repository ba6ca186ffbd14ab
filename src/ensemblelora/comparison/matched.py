"""Steps matched instead of epochs: an adapter on few tasks trained as long as the one on all.

At equal epochs every row is seen equally often, and an adapter of a few tasks takes a few of the steps; the shared
adapter then had more of them to move away from its start. At equal steps that excuse is gone, and the rows of small
groups are seen many times.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ensemblelora.comparison.candidate import Candidate
from ensemblelora.comparison.grouped import train_groups
from ensemblelora.comparison.planned import make_plan
from ensemblelora.comparison.pool import Pool
from ensemblelora.config import TrainingConfig
from ensemblelora.data.batching import schedule_training
from ensemblelora.seeding import seed_for
from ensemblelora.training import choose_layout

__all__ = ["match_steps", "train_planned_longer", "train_shared_longer", "train_singles_longer"]


def match_steps(pool: Pool, tasks: Sequence[int], *, target: Sequence[int] | None = None) -> TrainingConfig:
    """Settings with so many whole epochs that an adapter takes about as many optimiser steps as one on other tasks.

    Args:
        pool: The seed's.
        tasks: What the adapter trains on.
        target: What the other one trains on; none: all tasks.

    Returns:
        The config's settings with another number of epochs; the steps differ by half an epoch's at most, beyond what
        the order of the rows changes.
    """
    settings = pool.config.training
    wanted = settings.num_train_epochs * _count_steps(pool, pool.everyone if target is None else target)
    n_epochs = max(1, round(wanted / _count_steps(pool, tasks)))
    return settings.model_copy(update={"num_train_epochs": n_epochs})


def train_singles_longer(pool: Pool) -> Candidate:
    """One adapter a task, for as many steps as one for all takes: n trainings of that length, T each."""
    return train_groups(pool, tuple((task,) for task in pool.everyone), settle=partial(match_steps, pool))


def train_planned_longer(pool: Pool) -> Candidate:
    """The plan's groups without boosting or weights, each for as many steps as one adapter for all takes."""
    planned = make_plan(pool)
    return train_groups(pool, planned.plan.groups, select=planned.costs, settle=partial(match_steps, pool))


def train_shared_longer(pool: Pool) -> Candidate:
    """One adapter for all tasks for twice the epochs: what MTL-FT costs, without its second stage."""
    settings = pool.config.training
    doubled = settings.model_copy(update={"num_train_epochs": 2 * settings.num_train_epochs})
    return train_groups(pool, (pool.everyone,), settle=lambda _: doubled)


def _count_steps(pool: Pool, tasks: Sequence[int]) -> int:
    """Optimiser steps of one epoch."""
    epoch = pool.config.training.model_copy(update={"num_train_epochs": 1})
    splits, layout = [pool.split(task, "train") for task in tasks], choose_layout(pool.probe, epoch)
    return len(schedule_training(splits, epoch, seed=seed_for(pool.config.seed, "steps"), layout=layout))
