"""Other ways to find groups: by chance, by gradients, by lookahead, by trained adapters, by texts, form or kind.

Each gives a partition of the tasks, and :func:`~.grouped.train_groups` an adapter a group, so that what differs from
ours is the partition alone. All have the number of groups of our plan, which is given to them: what the plan cost is
not charged. Those that measure how alike tasks are use the plan's clustering, and meet the config's constraints. Those
that learn it from the data (gradients, lookahead, trained adapters, texts) may also say that tasks are not to be
grouped, as our plan may: they train one adapter for all besides, and keep what has the lower validation loss
(:mod:`.chosen`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, adapter_state
from ensemblelora.comparison.candidate import NOTHING, Candidate, Costs
from ensemblelora.comparison.chosen import Option, train_best
from ensemblelora.comparison.grouped import train_groups
from ensemblelora.comparison.likeness import compare_adapters, compare_formats, compare_texts, find_categories
from ensemblelora.comparison.lookahead import level_gains, measure_lookahead
from ensemblelora.comparison.matched import match_steps
from ensemblelora.comparison.planned import charge_features, make_plan
from ensemblelora.comparison.pool import Pool, Wish
from ensemblelora.errors import ConfigError
from ensemblelora.grouping import Partition, cluster
from ensemblelora.planning.demand import read_constraints
from ensemblelora.planning.judge import make_judge
from ensemblelora.planning.search import measure_gradient_cosines, sample_partition
from ensemblelora.seeding import generator_for

__all__ = [
    "Wanted",
    "choose_number",
    "draw_groups",
    "group_by_adapters",
    "group_by_category",
    "group_by_chance",
    "group_by_format",
    "group_by_gradients",
    "group_by_lookahead",
    "group_by_texts",
]

FloatArray = npt.NDArray[np.float64]

_TEXTS = 64  # rows of a task; their mean moves little with more
_MAX_DRAWS = 1000


@dataclass(frozen=True)
class Wanted:
    """How many groups other ways to group are to find, and of which sizes where they can't tell themselves."""

    sizes: tuple[int, ...]
    source: str
    """where the number is from"""

    @property
    def n_groups(self) -> int:
        """Their number."""
        return len(self.sizes)


def group_by_chance(pool: Pool, draw: int, *, matches_steps: bool = False) -> Candidate:
    """Random groups of the same sizes as the plan's, uniformly among those that meet the config's constraints.

    Args:
        pool: The seed's.
        draw: Which one; each is another, and another in every seed.
        matches_steps: Train every group for as many optimiser steps as one adapter for all takes.

    Raises:
        ConfigError: If a thousand draws meet the constraints in none.
    """
    settle = partial(match_steps, pool) if matches_steps else None
    candidate = train_groups(pool, draw_groups(pool, draw), settle=settle)
    return _note(candidate, n_groups_from=choose_number(pool).source)


def draw_groups(pool: Pool, draw: int) -> Partition:
    """Draw the groups of :func:`group_by_chance`.

    Raises:
        ConfigError: If a thousand draws meet the constraints in none.
    """
    wanted, constraints = choose_number(pool), read_constraints(pool.config.grouping, pool.rows.names)
    generator = generator_for(pool.config.seed, "random groups", draw)
    for _ in range(_MAX_DRAWS):
        groups = sample_partition(wanted.sizes, generator)
        if constraints.allows(groups):
            return groups
    raise ConfigError(f"random groups: none of {_MAX_DRAWS} draws meets the constraints on groups; leave them out")


def group_by_gradients(pool: Pool) -> Candidate:
    """Clusters by the cosine of the tasks' mean projected loss gradients at theta0 (paper, sections 3.1 and 5).

    Costs the gradient pass over the training rows, which is less than ours, that takes validation rows too; and one
    adapter for all, or the groups, whichever is not kept.
    """
    planned = make_plan(pool)
    cosines = measure_gradient_cosines(make_judge(planned.oracle, seed=pool.config.seed))
    return _cluster_or_not(pool, cosines, charge_features(pool, planned))


def group_by_lookahead(pool: Pool, *, matches_steps: bool = False) -> Candidate:
    """Clusters by TAG's affinity (paper, sections 3.1 and 5): what a step on one task does to the others' losses.

    Costs a training of an adapter for all, and what is looked at meanwhile; see :mod:`.lookahead`. That adapter is the
    shared one but for the order of its rows, which stands for it where tasks are not to be grouped.

    Args:
        pool: The seed's.
        matches_steps: Train every group for as many optimiser steps as one adapter for all takes.
    """
    found = measure_lookahead(pool)
    select = Costs(
        0,
        select_flops=found["flops"],
        seconds=found["seconds"],
        peak_memory_bytes=found["peak_memory_bytes"],
        added_memory_bytes=found.get("added_memory_bytes", 0),
    )
    candidate = _cluster_or_not(
        pool, level_gains(found["gains"]), select, paid=[(pool.everyone,)], matches_steps=matches_steps
    )
    return _note(candidate, gains=found["gains"], n_looks=found["n_looks"])


def group_by_adapters(pool: Pool) -> Candidate:
    """Clusters of trained adapters, one a task, by the cosine of the changes that they make to the weights.

    Costs a fine-tuning a task, before the groups' own; one adapter per task, which is there already, is kept where
    neither groups nor one adapter for all have a lower validation loss.
    """
    singles = pool.train_each([Wish((task,)) for task in pool.everyone])
    states = []
    for single in singles:
        pool.load([single.name])
        states.append(adapter_state(pool.probe, single.name))
    adapter = pool.config.adapter
    cosines = compare_adapters(states, adapter_state(pool.probe, THETA0), scale=adapter.lora_alpha / adapter.r)
    select = Costs.of(singles, kept=[]).as_choosing()
    return _cluster_or_not(pool, cosines, select, paid=[tuple((task,) for task in pool.everyone)])


def group_by_texts(pool: Pool) -> Candidate:
    """Clusters by the cosine of the tasks' mean embeddings of some training rows, by the base model itself.

    Costs a forward pass over 64 rows of every task; and one adapter for all, or the groups, whichever is not kept.
    """
    seed, max_tokens = pool.config.seed, pool.config.training.max_tokens_per_batch

    def measure() -> dict[str, Any]:
        options: dict[str, Any] = {"n_rows": _TEXTS, "max_tokens": max_tokens, "seed": seed}
        with Meter("texts") as meter:
            cosines = compare_texts(pool.probe, pool.rows.train, **options, meter=meter)
        spent = meter.record
        return {"cosines": cosines.tolist(), "flops": spent.flops, "seconds": spent.wall_seconds}

    inputs = (pool.rows.learning_fingerprint(), pool.probe.base.fingerprint, _TEXTS, seed)
    found = pool.recall("texts", inputs, measure)
    select = Costs(0, select_flops=found["flops"], seconds=found["seconds"])
    return _cluster_or_not(pool, np.array(found["cosines"]), select)


def group_by_format(pool: Pool) -> Candidate:
    """Clusters by form alone: kind of scoring, number of choices, labels. Costs nothing."""
    likeness, wanted = compare_formats(pool.rows.train), choose_number(pool)
    candidate = train_groups(pool, _cluster(pool, likeness, wanted.n_groups))
    return _note(candidate, n_groups_from=wanted.source, likeness=likeness.tolist())


def group_by_category(pool: Pool) -> Candidate:
    """The paper's five categories (section 2.1), as many as the tasks have, whatever the plan's number. Costs nothing.

    Raises:
        DataError: If a task is none of the paper's ten datasets.
    """
    return _note(train_groups(pool, find_categories(pool.rows.names)), n_groups_from="the categories")


def choose_number(pool: Pool) -> Wanted:
    """The plan's number of groups and their sizes; of the best grouping on its curve if the plan itself is none.

    One adapter for all, and one a task, leave no choice of groups, and so nothing to compare.
    """
    plan, n_tasks = make_plan(pool).plan, pool.n_tasks
    if 1 < len(plan.groups) < n_tasks:
        return Wanted(tuple(len(group) for group in plan.groups), "the plan")
    proper = [point for point in plan.curve if 1 < point.n_groups < n_tasks]
    if proper:
        best = max(proper, key=lambda point: (point.allowed, point.gain))
        name = "one adapter for all" if len(plan.groups) == 1 else "one adapter per task"
        source = f"the best grouping on the plan's curve, as the plan is {name}"
        return Wanted(tuple(len(group) for group in best.groups), source)
    n_groups = min(2, n_tasks)
    return Wanted(tuple(len(part) for part in np.array_split(np.arange(n_tasks), n_groups)), "nothing: halves")


def _cluster_or_not(
    pool: Pool,
    likeness: FloatArray,
    select: Costs = NOTHING,
    *,
    paid: Sequence[Partition] = (),
    matches_steps: bool = False,
) -> Candidate:
    """Train the clusters, and one adapter for all, and keep what is better; ``paid`` were trained to find them."""
    wanted, constraints = choose_number(pool), read_constraints(pool.config.grouping, pool.rows.names)
    every = [_cluster(pool, likeness, wanted.n_groups), (pool.everyone,), *paid]
    options = [Option(g, g in paid) for g in dict.fromkeys(every) if constraints.allows(g) or g == every[0]]
    settle = partial(match_steps, pool) if matches_steps else None
    candidate = train_best(pool, options, select=select, settle=settle)
    return _note(candidate, n_groups_from=wanted.source, likeness=likeness.tolist())


def _cluster(pool: Pool, likeness: FloatArray, n_groups: int) -> Partition:
    """Cluster the tasks as the plan does."""
    config = pool.config.grouping
    return cluster(
        likeness,
        n_groups,
        constraints=read_constraints(config, pool.rows.names),
        n_restarts=config.n_restarts,
        seed=pool.config.seed,
        is_bound_needed=False,
    ).groups


def _note(candidate: Candidate, **notes: Any) -> Candidate:
    known: Mapping[str, Any] = candidate.notes
    return replace(candidate, notes={**known, **notes})
