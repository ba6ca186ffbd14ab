"""Methods that train one after the other: all tasks first, then each one or each group from there.

In: a pool. Out: candidates of adapters that start from another adapter instead of theta0.
"""

from __future__ import annotations

from collections.abc import Sequence

from ensemblelora.comparison.candidate import NOTHING, Candidate, Costs, make_candidate, make_ensemble
from ensemblelora.comparison.combined import Weighting, weigh_members
from ensemblelora.comparison.matched import match_steps
from ensemblelora.comparison.planned import make_plan, make_warm_plan
from ensemblelora.comparison.pool import Pool, Trained, Wish
from ensemblelora.ensemble import Member
from ensemblelora.grouping import Partition, to_labels
from ensemblelora.startpoint import halve_epochs

__all__ = ["train_continued", "train_warm", "train_warm_plan"]


def train_continued(pool: Pool, *, weights: Weighting = "own", matches_steps: bool = False) -> Candidate:
    """MTL-FT: one adapter on all tasks, then one a task that goes on from it with the same settings.

    Costs one training for all and one more for each task's rows (2 T), n adapters, and one pass at inference; as an
    ensemble (``weights: task``) a pass of every adapter over the validation rows, and up to n at inference.

    Args:
        pool: The seed's.
        weights: ``own``: each task is scored by its own adapter. ``task``: all n, by weights fitted for each task.
        matches_steps: Let each continuation take as many optimiser steps as the one for all did.

    Reference:
        Paper, section 3.1 (MTL-FT) and section 2.1 (the ensemble of its adapters).
    """
    shared = pool.train(pool.everyone)
    singles = tuple((task,) for task in pool.everyone)
    settings = [match_steps(pool, group) if matches_steps else None for group in singles]
    wishes = [Wish(group, start=shared, settings=own) for group, own in zip(singles, settings, strict=True)]
    trained = pool.train_each(wishes)
    return _put_together(pool, singles, trained, [shared], weights, NOTHING)


def train_warm(pool: Pool) -> Candidate:
    """Groups that start from a short warm-up on all tasks: half the epochs shared, half in the plan's groups.

    Costs the plan, taken at theta0, and one training's length (T / 2 + T / 2); one pass at inference.
    """
    first, second = halve_epochs(pool.config.training)
    planned = make_plan(pool)
    warm = pool.train(pool.everyone, settings=first)
    trained = pool.train_each([Wish(group, start=warm, settings=second) for group in planned.plan.groups])
    return _put_together(pool, planned.plan.groups, trained, [warm], "own", planned.costs)


def train_warm_plan(pool: Pool, *, weights: Weighting | None = None) -> Candidate:
    """Half the epochs shared; features, oracle and plan at that warm adapter; the other half in the groups it names.

    Costs as :func:`train_warm`, and what fitting the weights takes. Where the plan is one group, the second half
    goes on with all tasks.

    Args:
        pool: The seed's.
        weights: None: the config's.
    """
    first, second = halve_epochs(pool.config.training)
    warm = pool.train(pool.everyone, settings=first)
    planned = make_warm_plan(pool, warm, second)
    trained = pool.train_each([Wish(group, start=warm, settings=second) for group in planned.plan.groups])
    return _put_together(pool, planned.plan.groups, trained, [warm], weights, planned.costs)


def _put_together(
    pool: Pool,
    groups: Partition,
    trained: Sequence[Trained],
    before: Sequence[Trained],
    weights: Weighting | None,
    select: Costs,
) -> Candidate:
    """One adapter a group, combined by weights; ``before`` were trained on the way, and are not kept."""
    names = [one.name for one in trained]
    members = tuple(Member(name, g, "group", 1.0) for g, name in enumerate(names))
    rows, weighed = weigh_members(pool, members, to_labels(groups).tolist(), weights)
    costs = Costs.of([*before, *trained], kept=trained).plus(weighed, select)
    ensemble = make_ensemble(pool, names, rows, groups=groups)
    n_steps = {"before": [one.n_steps for one in before], "groups": [one.n_steps for one in trained]}
    return make_candidate(pool, ensemble, costs, groups=groups, n_steps=n_steps)
