"""Ours as a whole, groups with boosters and weights, and with each of its parts left out or put another way.

In: a pool. Out: candidates that share the groups' adapters and the boosters. Boosting goes on from the rounds that were
carried out before, so that asking for up to four of them costs four.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ensemblelora import __version__, artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import adapter_bytes
from ensemblelora.boosting import Boosting, BoostRound, Setup, boost_once, start_boosting
from ensemblelora.comparison.candidate import NOTHING, Candidate, Costs, make_candidate, make_ensemble
from ensemblelora.comparison.matched import match_steps
from ensemblelora.comparison.planned import Planned, charge_features, make_part_plan, make_plan
from ensemblelora.comparison.pool import Pool, Trained, Wish
from ensemblelora.ensemble import Member, needed_adapters, sum_groups
from ensemblelora.gradients.collect import make_projector
from ensemblelora.grouping import Partition, to_labels
from ensemblelora.stages import list_boost_tasks, settle_boosting, settle_weights
from ensemblelora.weighting import choose_candidates

__all__ = ["Boosted", "Weighting", "boost_members", "train_ours", "weigh_members"]

Weighting = Literal["task", "global", "uniform", "own"]
"""how an ensemble's weights are found, as in the config's ``ensemble.weights``"""


@dataclass(frozen=True)
class Boosted:
    """What boosting gave, and what it took."""

    rounds: tuple[BoostRound, ...] = ()
    spent: tuple[Trained, ...] = ()
    """one a round; only the boosters that were kept have an adapter in the pool"""

    @property
    def members(self) -> tuple[Member, ...]:
        """The boosters that were kept."""
        return tuple(Member(entry.name, entry.group, "booster", entry.rate) for entry in self.rounds if entry.accepted)

    @property
    def kept(self) -> tuple[Trained, ...]:
        """Their records."""
        return tuple(one for one, entry in zip(self.spent, self.rounds, strict=True) if entry.accepted)


def train_ours(
    pool: Pool,
    *,
    n_rounds: int | None = None,
    weights: Weighting | None = None,
    with_shared: bool = False,
    matches_steps: bool = False,
    train_fraction: float | None = None,
    regroup: Callable[[Pool], Partition] | None = None,
) -> Candidate:
    """The method as a whole: the plan's groups, boosters where a group still errs, convex weights.

    Costs the gradient pass and the plan, each row's training once an epoch, the rounds of boosting, and a pass of every
    member over the validation rows where weights are fitted.

    Args:
        pool: The seed's.
        n_rounds: Boosters at most; none: the config's (paper: 1).
        weights: None: the config's. ``global`` is the paper's reading.
        with_shared: Let the weights choose one adapter for all tasks, too; costs its training.
        matches_steps: Train every group for as many optimiser steps as one adapter for all takes.
        train_fraction: Share of the training rows that features are taken of; none: the config's.
        regroup: Gives other groups than the plan's, which is then not paid for; boosters need features all the same.

    Reference:
        Paper, algorithm 2 and section 2.3.
    """
    planned = make_plan(pool) if train_fraction is None else make_part_plan(pool, train_fraction)
    groups = planned.plan.groups if regroup is None else regroup(pool)
    settings = [match_steps(pool, group) if matches_steps else None for group in groups]
    trained = pool.train_each([Wish(group, settings=own) for group, own in zip(groups, settings, strict=True)])
    boosted = boost_members(pool, planned, groups, trained, n_rounds)
    shared = [pool.train(pool.everyone)] if with_shared else []
    added = [one for one in shared if one not in trained]  # where the plan is one group, it is there already
    names = [one.name for one in (*trained, *added)]
    members = (*(Member(name, g, "group", 1.0) for g, name in enumerate(names)), *boosted.members)
    predicted = planned.plan.by_group if regroup is None else ()
    rows, weighed = weigh_members(pool, members, to_labels(groups).tolist(), weights, predicted)
    select = planned.costs if regroup is None else charge_features(pool, planned) if boosted.rounds else NOTHING
    costs = Costs.of([*trained, *boosted.spent, *added], kept=[*trained, *boosted.kept, *added]).plus(weighed, select)
    tasks = (*groups, *(pool.everyone for _ in added))
    ensemble = make_ensemble(pool, names, rows, groups=tasks, boosters=boosted.members)
    notes: dict[str, Any] = {"boosting": [asdict(entry) for entry in boosted.rounds]}
    return make_candidate(pool, ensemble, costs, groups=groups, n_steps=[one.n_steps for one in trained], **notes)


def weigh_members(
    pool: Pool,
    members: Sequence[Member],
    own: Sequence[int],
    weights: Weighting | None = None,
    predicted: Sequence[Sequence[float]] = (),
) -> tuple[npt.NDArray[np.float64], Costs]:
    """Find every task's weights on validation rows.

    Args:
        pool: The seed's.
        members: One adapter a group, and boosters.
        own: The group each task was trained in.
        weights: None: the config's.
        predicted: Loss of every task under every group's adapter, by which candidates are chosen; of other groupings
            than the plan's none is known, and every group competes. So does what is added to the plan's groups.

    Returns:
        Weights ``(n_tasks, m)``, and what scoring the validation rows took, where that was needed.

    Reference:
        Paper, section 2.3; docs/paper.md, row "ensemble weights".
    """
    config = pool.config.ensemble
    if weights is not None:
        config = config.model_copy(update={"weights": weights})
    groups = range(sum(member.kind == "group" for member in members))
    if config.weights == "own" or len(groups) == 1:
        return np.eye(len(groups))[list(own)], NOTHING
    if config.weights == "uniform":
        return np.full((pool.n_tasks, len(groups)), 1 / len(groups)), NOTHING
    splits, n_groups = pool.rows.validation, len(groups)
    n_planned = len(predicted[0]) if predicted else n_groups
    chosen = choose_candidates(own, n_planned, config, predicted)
    candidates = [(*some, *range(n_planned, n_groups)) for some in chosen]
    names = {t: needed_adapters(members, candidates[t], split.kind) for t, split in enumerate(splits)}
    scores = [sum_groups(pool.score(some, t, "validation"), some, members, candidates[t]) for t, some in names.items()]
    fitted, _ = settle_weights(scores, splits, own, candidates, config, n_groups=n_groups, seed=pool.config.seed)
    return fitted, Costs.of_scoring(pool, names, "validation")


def boost_members(
    pool: Pool, planned: Planned, groups: Partition, trained: Sequence[Trained], n_rounds: int | None = None
) -> Boosted:
    """Add boosters to groups, as the pipeline does, or find those that were added.

    Args:
        pool: Takes the boosters up.
        planned: For its features; rows without any are passed over.
        groups: Tasks of each adapter; free-text tasks are passed over.
        trained: The groups' adapters.
        n_rounds: Rounds at most; none: the config's.

    Returns:
        As many rounds, or those until every group was left alone; the first round's cost holds that of scoring the
        groups.
    """
    wanted = pool.config.boosting.n_rounds if n_rounds is None else n_rounds
    if not wanted:
        return Boosted()
    settings = (pool.config.boosting.model_copy(update={"n_rounds": 0}), planned.gradients)
    suffix = f"boost-{artifacts.fingerprint(settings)[:8]}"
    identity = artifacts.fingerprint(__version__, [one.name for one in trained], groups, settings)
    path = pool.folder / "kept" / f"boosting-{identity[:16]}.json"
    found, is_over = _read_rounds(path)
    if len(found.rounds) < wanted and not is_over:
        found, is_over = _go_on(pool, planned, groups, trained, found, wanted, suffix)
        rounds, spent = [asdict(entry) for entry in found.rounds], [asdict(one) for one in found.spent]
        artifacts.write_json(path, {"rounds": rounds, "spent": spent, "is_over": is_over})
    return Boosted(found.rounds[:wanted], found.spent[:wanted])


def _read_rounds(path: Path) -> tuple[Boosted, bool]:
    """Rounds carried out before, and whether no other can follow."""
    if not path.exists():
        return Boosted(), False
    content = artifacts.read_json(path)
    spent = tuple(Trained.from_dict(one) for one in content["spent"])
    return Boosted(tuple(BoostRound(**entry) for entry in content["rounds"]), spent), bool(content["is_over"])


def _go_on(
    pool: Pool,
    planned: Planned,
    groups: Partition,
    trained: Sequence[Trained],
    known: Boosted,
    wanted: int,
    suffix: str,
) -> tuple[Boosted, bool]:
    """Carry out rounds until there were as many as wanted; say also whether no other can follow."""
    config, names = pool.config, [one.name for one in trained]
    pool.load([*names, *(one.name for one in known.kept)])
    with Meter("boost") as meter:
        setup = Setup(
            adapted=pool.probe,
            config=settle_boosting(config),
            projector=make_projector(config.gradients, seed=config.seed),
            max_tokens=config.gradients.max_tokens_per_batch,
            seed=config.seed,
            meter=meter,
        )
        clock = _Clock(meter)
        tasks = list_boost_tasks(groups, names, pool.rows, planned.store, pool.probe)
        boosting = start_boosting(setup, names, tasks, earlier=known.rounds, suffix=suffix)
        if known.rounds:
            clock.read()  # scoring them again is the price of asking twice, and not the method's
        readings = _carry_out(boosting, wanted, clock)
    spent = list(known.spent)
    for entry, (flops, seconds) in zip(boosting.rounds[len(spent) :], readings, strict=True):
        one = Trained(
            name=entry.name,
            tasks=groups[entry.group],
            flops=flops,
            seconds=seconds,
            peak_memory_bytes=meter.record.peak_memory_bytes,
            added_memory_bytes=meter.record.added_memory_bytes,
            n_steps=0,
            validation_nll=entry.heldout_nll_after,
            n_bytes=adapter_bytes(pool.probe),
        )
        spent.append(pool.keep(one) if entry.accepted else replace(one, n_bytes=0))
    return Boosted(tuple(boosting.rounds), tuple(spent)), not boosting.states


def _carry_out(boosting: Boosting, wanted: int, clock: _Clock) -> list[tuple[int, float]]:
    """Boost until there were as many rounds; FLOPs and seconds of each."""
    readings: list[tuple[int, float]] = []
    while len(boosting.rounds) < wanted and boost_once(boosting) is not None:
        readings.append(clock.read())
    return readings


class _Clock:
    """Reads off what was spent since the last reading."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._flops, self._time = meter, meter.record.flops, time.perf_counter()

    def read(self) -> tuple[int, float]:
        """FLOPs and seconds since."""
        flops, now = self._meter.record.flops, time.perf_counter()
        spent = flops - self._flops, now - self._time
        self._flops, self._time = flops, now
        return spent
