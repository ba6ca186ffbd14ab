"""Rounds of boosting: choose a group, find a step, find its length, keep it or stop there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import (
    THETA0,
    AdaptedModel,
    adapter_state,
    add_adapter,
    remove_adapter,
    set_adapter_state,
)
from ensemblelora.boosting.direction import find_direction
from ensemblelora.boosting.state import BoostTask, GroupState, Scores, Setup
from ensemblelora.config import BoostingConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.gradients.projection import Projector
from ensemblelora.progress import note

__all__ = ["BoostRound", "Boosting", "boost", "boost_once", "search_length", "start_boosting"]

_MOST_LENGTHS = 4  # forward passes over the training rows in one line search


@dataclass(frozen=True)
class BoostRound:
    """One round, kept or not; losses are means over the rows of the group's tasks, in nats."""

    name: str
    group: int
    rate: float
    """what the change ``z_new - z_theta0`` is multiplied with"""
    step_length: float
    train_nll_before: float
    train_nll_after: float
    heldout_nll_before: float
    heldout_nll_after: float
    accepted: bool
    reason: str
    train_error_before: float | None = None
    """share of training rows answered wrongly, which the paper's 18 % are of (section 3.3); unknown in older records"""
    train_error_after: float | None = None


@dataclass(eq=False)
class Boosting:
    """Groups that are being boosted; made by :func:`start_boosting`."""

    setup: Setup
    members: tuple[str, ...]
    states: dict[int, GroupState]
    """groups that may still be boosted"""
    suffix: str
    rounds: list[BoostRound] = field(default_factory=list)

    def enter(self, entry: BoostRound) -> None:
        """Add a round to the record; a group whose round was rejected is left alone from then on."""
        self.rounds.append(entry)
        if not entry.accepted:
            del self.states[entry.group]


def boost(
    adapted: AdaptedModel,
    members: Sequence[str],
    groups: Sequence[Sequence[BoostTask]],
    config: BoostingConfig,
    *,
    projector: Projector,
    max_tokens: int,
    seed: int,
    meter: Meter,
) -> tuple[BoostRound, ...]:
    """Carry out at most ``config.n_rounds`` rounds; kept adapters stay in the model under their names.

    A group is left alone once a round of its own was rejected.

    Args:
        adapted: The model with every member.
        members: The group adapters' names.
        groups: Each group's tasks; free-text tasks are passed over.
        config: Rounds, rate, direction, ridge.
        projector: The projection the features were made with.
        max_tokens: Padded tokens in a forward pass.
        seed: The run's root seed.
        meter: Told what every pass costs.

    Returns:
        Every round tried, in order.

    Raises:
        StoreError: If a task's features are not in the order of its rows.
        SolverError: If features are all zero or not finite.
    """
    if not config.n_rounds:
        return ()
    boosting = start_boosting(Setup(adapted, config, projector, max_tokens, seed, meter), members, groups)
    while len(boosting.rounds) < config.n_rounds and boost_once(boosting) is not None:
        pass
    return tuple(boosting.rounds)


def start_boosting(
    setup: Setup,
    members: Sequence[str],
    groups: Sequence[Sequence[BoostTask]],
    *,
    earlier: Sequence[BoostRound] = (),
    suffix: str = "boost",
) -> Boosting:
    """Score every group, for rounds that are then carried out one by one.

    Args:
        setup: The model with every member, and what :func:`boost` is told besides; the number of rounds in its config
            is not looked at.
        members: The group adapters' names.
        groups: Each group's tasks; free-text tasks are passed over.
        earlier: Rounds carried out before, in their order, whose kept boosters are in the model. What comes next is
            what would have come without a break.
        suffix: In the boosters' names, between member and number.
    """
    states = {
        g: GroupState(setup, members[g], tasks)
        for g, every in enumerate(groups)
        if (tasks := [task for task in every if task.train.kind != "sequence"])
    }
    boosting = Boosting(setup, tuple(members), states, suffix)
    if earlier:
        _choose_group(states)  # rows are scored in the order of an unbroken run: rounding depends on what shares a pass
    for entry in earlier:
        if entry.accepted:
            states[entry.group].add(entry.name, entry.rate)
        boosting.enter(entry)
    return boosting


def boost_once(boosting: Boosting) -> BoostRound | None:
    """Carry out the next round; none if every group was left alone. A kept adapter stays in the model."""
    states, members = boosting.states, boosting.members
    if not states:
        return None
    g = _choose_group(states)
    n_before = sum(entry.group == g for entry in boosting.rounds)
    result = _try_round(boosting.setup, f"{members[g]}-{boosting.suffix}-{n_before + 1}", g, states[g])
    note(f"boosting {result.name}: {result.reason}")
    if not result.accepted:
        remove_adapter(boosting.setup.adapted, result.name)
    boosting.enter(result)
    return result


def _choose_group(states: dict[int, GroupState]) -> int:
    """The group with the largest training loss; the larger one of equals."""
    if len(states) == 1:
        return next(iter(states))  # nothing to compare, so that no row is scored for it
    return max(states, key=lambda g: (states[g].nll("train"), states[g].n_rows))


def search_length(loss_at: Callable[[float], float], loss_at_zero: float, *, guess: float = 1.0) -> float:
    """Find a good step length: double it while that helps, or quarter it until it does.

    Args:
        loss_at: The loss after a step of a given length; infinite where it is not a number.
        loss_at_zero: The loss of no step.
        guess: The first length to try.

    Returns:
        The best positive length tried, after at most four; its loss may still be above ``loss_at_zero``.
    """
    losses = {guess: loss_at(guess)}
    length, factor = guess, 2.0 if losses[guess] < loss_at_zero else 0.25
    while len(losses) < _MOST_LENGTHS:
        losses[length * factor] = loss_at(length * factor)
        is_worse = losses[length * factor] >= losses[length]
        if is_worse and min(losses.values()) < loss_at_zero:
            break
        length *= factor
    return min(losses, key=lambda tried: losses[tried])


def _try_round(setup: Setup, name: str, group: int, state: GroupState) -> BoostRound:
    for part in ("train", "validation"):
        state.base(part)  # F in the same pass, where it is not known yet
    before, heldout_before = state.nll("train"), state.nll("validation")
    error_before = state.error("train")
    add_adapter(setup.adapted, name)
    step, guess = find_direction(setup, name, state)
    tried: dict[float, Scores] = {}

    def loss_at(length: float) -> float:
        # The whole change is searched with; the rate then shrinks what is added, as in gradient boosting.
        tried[length] = _scores_at(setup, name, step, state.splits("train"), length)
        loss = state.nll("train", state.moved("train", tried[length], 1.0))
        return loss if math.isfinite(loss) else math.inf

    length = search_length(loss_at, before, guess=guess) if setup.config.line_search else 1.0
    rate = setup.config.boosting_rate
    found = tried[length] if length in tried else _scores_at(setup, name, step, state.splits("train"), length)
    train = state.moved("train", found, rate)
    new = _scores_at(setup, name, step, state.splits("validation"), length)
    heldout = state.moved("validation", new, rate)
    after, heldout_after = state.nll("train", train), state.nll("validation", heldout)
    error = state.drop_error("validation", heldout)
    reason = _find_objection(setup.config, before, after, heldout_before, heldout_after, error)
    if reason is None:
        state.replace({"train": train, "validation": heldout})
    return BoostRound(
        name=name,
        group=group,
        rate=rate,
        step_length=length,
        train_nll_before=before,
        train_nll_after=after,
        heldout_nll_before=heldout_before,
        heldout_nll_after=heldout_after,
        accepted=reason is None,
        reason=reason or f"held-out loss drops ({heldout_before:.4f} to {heldout_after:.4f})",
        train_error_before=error_before,
        train_error_after=state.error("train", train),
    )


def _scores_at(
    setup: Setup, name: str, step: dict[str, Tensor], splits: Sequence[EncodedSplit], length: float
) -> Scores:
    """Scores of the adapter ``theta0 + length x step``, which is left in the model."""
    start = adapter_state(setup.adapted, THETA0)
    set_adapter_state(setup.adapted, name, {key: start[key] + length * step[key] for key in start})
    return [values[0] for values in setup.predict(splits, [name])]


def _find_objection(
    config: BoostingConfig, before: float, after: float, heldout_before: float, heldout_after: float, error: float
) -> str | None:
    # Written so that a loss that is not a number is an objection too.
    if not after < before * (1 - config.tolerance):
        return f"training loss does not drop ({before:.4f} to {after:.4f})"
    if not heldout_after < heldout_before:
        return f"held-out loss does not drop ({heldout_before:.4f} to {heldout_after:.4f})"
    if config.min_errors and not heldout_before - heldout_after >= config.min_errors * error:
        drop = f"{heldout_before - heldout_after:.4f} ± {error:.4f}"
        return f"held-out loss drops by no more than chance ({heldout_before:.4f} to {heldout_after:.4f}: {drop})"
    return None
