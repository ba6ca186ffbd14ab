"""Other ways to find groups: by chance, by gradients, by lookahead, by trained adapters, by texts, form or kind.

Each gives a partition of the tasks, and :func:`~.grouped.train_groups` an adapter a group, so that what differs from
ours is the partition alone. All have the number of groups of our plan, which is given to them: what the plan cost is
not charged. Those that measure how alike tasks are use the plan's clustering, and meet the config's constraints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, adapter_state
from ensemblelora.comparison.candidate import Candidate
from ensemblelora.comparison.grouped import train_groups
from ensemblelora.comparison.likeness import compare_adapters, compare_formats, compare_texts, find_categories
from ensemblelora.comparison.lookahead import measure_lookahead
from ensemblelora.comparison.planned import make_plan
from ensemblelora.comparison.pool import Pool
from ensemblelora.errors import ConfigError
from ensemblelora.grouping import Partition, cluster
from ensemblelora.planning.demand import read_constraints
from ensemblelora.planning.judge import make_judge
from ensemblelora.planning.search import measure_gradient_cosines, sample_partition
from ensemblelora.seeding import generator_for

__all__ = [
    "Wanted",
    "choose_number",
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


def group_by_chance(pool: Pool, draw: int) -> Candidate:
    """Random groups of the same sizes as the plan's, uniformly among those that meet the config's constraints.

    Args:
        pool: The seed's.
        draw: Which one; each is another, and another in every seed.

    Raises:
        ConfigError: If a thousand draws meet the constraints in none.
    """
    wanted, constraints = choose_number(pool), read_constraints(pool.config.grouping, pool.rows.names)
    generator = generator_for(pool.config.seed, "random groups", draw)
    for _ in range(_MAX_DRAWS):
        groups = sample_partition(wanted.sizes, generator)
        if constraints.allows(groups):
            return _train(pool, groups, wanted)
    raise ConfigError(f"random groups: none of {_MAX_DRAWS} draws meets the constraints on groups; leave them out")


def group_by_gradients(pool: Pool) -> Candidate:
    """Clusters by the cosine of the tasks' mean projected loss gradients at theta0 (paper, sections 3.1 and 5).

    Costs the gradient pass over the training rows: their share, by tokens, of ours, which takes validation rows too.
    """
    planned = make_plan(pool)
    cosines = measure_gradient_cosines(make_judge(planned.oracle, seed=pool.config.seed))
    n_train, n_all = (sum(int(s.input_lengths.sum()) for s in some) for some in (pool.rows.train, pool.rows.learning))
    share = n_train / n_all
    flops, seconds = round(share * planned.feature_flops), share * planned.feature_seconds
    return _cluster(pool, cosines, select_flops=flops, seconds=seconds)


def group_by_lookahead(pool: Pool) -> Candidate:
    """Clusters by TAG's affinity (paper, sections 3.1 and 5): what a step on one task does to the others' losses.

    Costs a training of the shared adapter, and what is looked at meanwhile; see :mod:`.lookahead`.
    """
    found = measure_lookahead(pool)
    gains = np.array(found["gains"])
    candidate = _cluster(pool, (gains + gains.T) / 2, select_flops=found["flops"], seconds=found["seconds"])
    candidate = replace(candidate, notes={**candidate.notes, "n_looks": found["n_looks"]})
    return _raise_peak(candidate, found["peak_memory_bytes"])


def group_by_adapters(pool: Pool) -> Candidate:
    """Clusters of trained adapters, one a task, by the cosine of the changes that they make to the weights.

    Costs a fine-tuning a task, before the groups' own.
    """
    singles = [pool.train((task,)) for task in pool.everyone]
    states = []
    for single in singles:
        pool.load([single.name])
        states.append(adapter_state(pool.probe, single.name))
    adapter = pool.config.adapter
    cosines = compare_adapters(states, adapter_state(pool.probe, THETA0), scale=adapter.lora_alpha / adapter.r)
    flops, seconds = sum(single.flops for single in singles), sum(single.seconds for single in singles)
    candidate = _cluster(pool, cosines, select_flops=flops, seconds=seconds)
    return _raise_peak(candidate, max(single.peak_memory_bytes for single in singles))


def group_by_texts(pool: Pool) -> Candidate:
    """Clusters by the cosine of the tasks' mean embeddings of some training rows, by the base model itself.

    Costs a forward pass over 64 rows of every task.
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
    return _cluster(pool, np.array(found["cosines"]), select_flops=found["flops"], seconds=found["seconds"])


def group_by_format(pool: Pool) -> Candidate:
    """Clusters by form alone: kind of scoring, number of choices, labels. Costs nothing."""
    return _cluster(pool, compare_formats(pool.rows.train))


def group_by_category(pool: Pool) -> Candidate:
    """The paper's five categories (section 2.1), as many as the tasks have, whatever the plan's number. Costs nothing.

    Raises:
        DataError: If a task is none of the paper's ten datasets.
    """
    groups = find_categories(pool.rows.names)
    return _train(pool, groups, Wanted(tuple(len(group) for group in groups), "the categories"))


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


def _cluster(pool: Pool, likeness: FloatArray, *, select_flops: int = 0, seconds: float = 0.0) -> Candidate:
    """Cluster the tasks as the plan does, and train the groups."""
    wanted, constraints = choose_number(pool), read_constraints(pool.config.grouping, pool.rows.names)
    n_restarts, seed = pool.config.grouping.n_restarts, pool.config.seed
    found = cluster(
        likeness, wanted.n_groups, constraints=constraints, n_restarts=n_restarts, seed=seed, is_bound_needed=False
    )
    likeness_notes = {"likeness": likeness.tolist()}
    return _train(pool, found.groups, wanted, select_flops=select_flops, seconds=seconds, notes=likeness_notes)


def _train(
    pool: Pool,
    groups: Partition,
    wanted: Wanted,
    *,
    select_flops: int = 0,
    seconds: float = 0.0,
    notes: Mapping[str, Any] | None = None,
) -> Candidate:
    candidate = train_groups(pool, groups, select_flops=select_flops, seconds=seconds)
    return replace(candidate, notes={**candidate.notes, "n_groups_from": wanted.source, **(notes or {})})


def _raise_peak(candidate: Candidate, peak_memory_bytes: int) -> Candidate:
    """Count the memory of what was trained to find the groups."""
    costs = candidate.costs
    peak = max(costs.peak_memory_bytes, peak_memory_bytes)
    return replace(candidate, costs=replace(costs, peak_memory_bytes=peak))
