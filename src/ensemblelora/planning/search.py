"""Partitions into each number of groups: clustered by affinity, then improved on predicted loss itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.affinity import SubsetDesign, affinity_from_scores
from ensemblelora.config import AffinityConfig, GroupingConfig
from ensemblelora.estimation import mean_loss_gradients
from ensemblelora.grouping import Clustering, Constraints, Partition, cluster, compute_objective, sort_groups
from ensemblelora.planning.judge import Judge

__all__ = [
    "Found",
    "estimate_half_affinity",
    "measure_gradient_cosines",
    "refine_partition",
    "sample_partition",
    "search_partitions",
]

FloatArray = npt.NDArray[np.float64]
Group = tuple[int, ...]

_STEPS_LOOKED_AT = 40  # of each kind, the ones that affinity likes best
_MAX_TASKS_FOR_SWAPS = 60  # of more, listing pairs costs more than predicting steps
_SMALLEST_GAIN = 1e-6  # nats; the fits' tolerance moves losses by less


@dataclass(frozen=True)
class Found:
    """A partition, and the clustering it started from."""

    groups: Partition
    clustering: Clustering


def search_partitions(
    affinity: FloatArray,
    judge: Judge,
    half: int | None,
    sizes: Sequence[int],
    config: GroupingConfig,
    *,
    seed: int,
    max_solves: int,
    constraints: Constraints | None = None,
) -> dict[int, Found]:
    """Find a partition for every number of groups, on what one half of the validation rows says.

    Args:
        affinity: Symmetric, from the same half, shape ``(n_tasks, n_tasks)``.
        judge: Predicts losses.
        half: Which half; none: all rows, and the clusterings carry proper bounds.
        sizes: Numbers of groups to look for.
        config: How to round, and whether to refine.
        seed: The run's seed.
        max_solves: Most subset fits that refining may add, over all sizes.
        constraints: What partitions must meet; one group for all, which the others are compared with, need not.
    """
    found = {}
    for m in sizes:
        binding = None if m == 1 else constraints
        clustering = cluster(
            affinity,
            m,
            constraints=binding,
            rounding=config.rounding,
            threshold=config.threshold,
            n_restarts=config.n_restarts,
            seed=seed,
            is_bound_needed=half is None,
        )
        groups = clustering.groups
        if config.refine and config.rounding == "best":
            # One a task leaves nothing to search, and takes no share.
            share = max_solves // max(1, sum(m < judge.oracle.n_tasks for m in sizes))
            groups = refine_partition(groups, affinity, judge, half, max_solves=share, constraints=binding)
        found[m] = Found(groups, clustering)
    return found


def refine_partition(
    groups: Partition,
    affinity: FloatArray,
    judge: Judge,
    half: int | None,
    *,
    max_solves: int,
    constraints: Constraints | None = None,
) -> Partition:
    """Improve a partition by moves and swaps of tasks while the predicted mean loss falls.

    The number of groups stays. Of the moves, and where none helps of the swaps, those that affinity likes best are
    predicted together and the best is made.

    Args:
        groups: Where to start.
        affinity: Ranks the steps worth predicting.
        judge: Predicts losses.
        half: Rows to predict on; none: all.
        max_solves: Most subset fits to add.
        constraints: What the partition meets and goes on to meet; tasks that stay together are moved together.
    """
    constraints = constraints or Constraints(judge.oracle.n_tasks)
    is_free = constraints.is_free
    limit = judge.oracle.n_fits + max_solves * len(judge.oracle.replicates)
    losses = dict(zip(groups, judge.search_losses(groups, half), strict=True))
    while judge.oracle.n_fits < limit:
        for steps in (_list_moves(groups, constraints), _list_swaps(groups, constraints)):
            allowed = steps if is_free else [step for step in steps if constraints.allows(step.values())]
            better = _take_best_step(groups, _rank_steps(allowed, affinity), losses, judge, half)
            if better is not None:
                break
        if better is None:
            return groups
        groups = better
    return groups


def estimate_half_affinity(judge: Judge, design: SubsetDesign, half: int, config: AffinityConfig) -> FloatArray:
    """Return the symmetric affinity that one half of the validation rows gives."""
    judge.oracle.solve(design.subsets)
    nll = np.full((len(design.subsets), design.n_tasks), np.nan)
    correct = np.full_like(nll, np.nan)
    seeds = judge.seeds_of(half)
    for task in range(design.n_tasks):
        held = [s for s, subset in enumerate(design.subsets) if task in subset]
        outcomes = judge.oracle.take_replicates(seeds).row_outcomes([design.subsets[s] for s in held], task)
        rows = judge.searchable[task][half]
        nll[held, task] = np.mean([outcome.nll[:, rows].mean(axis=1) for outcome in outcomes], axis=0)
        correct[held, task] = np.mean([outcome.correct[:, rows].mean(axis=1) for outcome in outcomes], axis=0)
    values = -nll if config.score == "nll" else correct
    return affinity_from_scores(design, values, row_scale=config.row_scale, surrogate=config.surrogate).matrix


def measure_gradient_cosines(judge: Judge) -> FloatArray:
    """Return cosines between the tasks' mean projected loss gradients, averaged over projection seeds, ``(n, n)``."""
    cosines = []
    for replicate in judge.oracle.replicates:
        gradients = mean_loss_gradients(replicate.train)
        norms = np.linalg.norm(gradients, axis=1, keepdims=True)
        unit = gradients / np.where(norms > 0, norms, 1.0)
        cosines.append(unit @ unit.T)
    return np.asarray(np.mean(cosines, axis=0))


def sample_partition(sizes: Sequence[int], generator: np.random.Generator) -> Partition:
    """Return a uniformly random partition with groups of the given sizes."""
    order = generator.permutation(sum(sizes))
    ends = np.cumsum(sizes)
    return sort_groups(order[end - size : end].tolist() for size, end in zip(sizes, ends, strict=True))


def _take_best_step(
    groups: Partition,
    steps: Sequence[dict[Group, Group]],
    losses: dict[Group, float],
    judge: Judge,
    half: int | None,
) -> Partition | None:
    """Predict the steps, each a map from old groups to new, and return the partition after the best if it helps."""
    unknown = list(dict.fromkeys(new for step in steps for new in step.values() if new not in losses))
    losses.update(zip(unknown, judge.search_losses(unknown, half), strict=True))
    changes = [sum(losses[new] - losses[old] for old, new in step.items()) for step in steps]
    if not changes or min(changes) > -_SMALLEST_GAIN:
        return None
    step = steps[int(np.argmin(changes))]
    return sort_groups(step.get(group, group) for group in groups)


def _rank_steps(steps: Sequence[dict[Group, Group]], affinity: FloatArray) -> list[dict[Group, Group]]:
    gains = [
        compute_objective(affinity, tuple(step.values())) - compute_objective(affinity, tuple(step)) for step in steps
    ]
    return [steps[k] for k in np.argsort(-np.array(gains), kind="stable")[:_STEPS_LOOKED_AT]]


def _list_moves(groups: Partition, constraints: Constraints) -> list[dict[Group, Group]]:
    """List the ways to move a task, or tasks that stay together, to another group."""
    homes = _find_homes(groups, constraints)
    return [
        {old: tuple(i for i in old if i not in unit), new: tuple(sorted((*new, *unit)))}
        for unit, old in homes.items()
        for new in groups
        if new != old and len(old) > len(unit)
    ]


def _list_swaps(groups: Partition, constraints: Constraints) -> list[dict[Group, Group]]:
    """List the ways to exchange two tasks of different groups, or pieces of tasks that stay together."""
    homes = _find_homes(groups, constraints)
    if len(homes) > _MAX_TASKS_FOR_SWAPS:
        return []
    swaps = []
    for (a, one), (b, other) in itertools.combinations(homes.items(), 2):
        if one != other and len(one) + len(other) > len(a) + len(b):
            exchanged = [tuple(sorted({*a, *b} ^ set(group))) for group in (one, other)]
            swaps.append({one: exchanged[0], other: exchanged[1]})
    return swaps


def _find_homes(groups: Partition, constraints: Constraints) -> dict[Group, Group]:
    """Map each piece of tasks that stay together to its group."""
    group_of = {task: group for group in groups for task in group}
    return {unit: group_of[unit[0]] for unit in constraints.units}
