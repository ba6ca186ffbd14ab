"""Where a dataset that arrives later belongs: what the oracle predicts of it in each group, alone, and nowhere.

In: the oracle of the run's tasks and the new one, the groups as they are. Out: a list of :class:`Option`. Joining a
group changes it for its tasks, too, so an option is worth what it saves over all tasks that it touches:

    gain(g)     = [nll_new(base) - nll_new(g + new)] + sum of i in g: [nll_i(g) - nll_i(g + new)]
    gain(alone) =  nll_new(base) - nll_new(alone)
    gain(nowhere) = 0

Differences are taken row by row, with the errors of paired rows and of projections. Of the options that gain more than
a standard error the largest gain wins; where that is an adapter of its own, and not better than the best group among
them by more than a standard error of the difference, the dataset joins that group; where nothing gains more than a
standard error, it belongs nowhere. As many options are looked at as there are groups, on the same rows, so the winner's
gain is a little too good. Cost: two fits a group. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from ensemblelora.errors import UsageError
from ensemblelora.estimation import Oracle, average_outcomes, compute_wilson_interval
from ensemblelora.grouping import Partition
from ensemblelora.planning.describe import is_above_error

__all__ = ["ALONE", "NOWHERE", "Option", "choose_option", "find_option", "list_options", "place_task"]

ALONE, NOWHERE = "alone", "nowhere"

FloatArray = npt.NDArray[np.float64]
_Gains = Mapping[int, FloatArray]
"""by task: what each validation row's loss is lowered by, (seeds, n)"""


@dataclass(frozen=True)
class Option:
    """One place for the dataset.

    Attributes:
        place: ``group-G``, ``alone`` or ``nowhere``.
        tasks: Who is there already.
        nll: Predicted loss of its validation rows there, in nats.
        nll_low: Lower end of the interval of that.
        nll_high: Upper end.
        accuracy: Predicted accuracy; a lower bound where the outputs tell no class, none for free text.
        accuracy_low: Lower end of Wilson's interval.
        accuracy_high: Upper end.
        untrained_nll: Predicted loss under the group's adapter as it is, before anything is trained.
        gain: Loss saved over all tasks it touches, against leaving the dataset out, in nats.
        gain_se: Its standard error; none where rows can't tell it.
        others: Of the gain, what the group's own tasks have of it; negative where they lose.
        is_allowed: Whether the run's budgets and constraints on groups allow it.
        is_chosen: Whether this is where it goes.
        behind: By how much its gain is below that of the chosen one, in nats.
        behind_se: Standard error of that difference; none where rows can't tell it.
    """

    place: str
    tasks: tuple[str, ...]
    nll: float
    nll_low: float | None
    nll_high: float | None
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    untrained_nll: float | None
    gain: float
    gain_se: float | None
    others: float
    is_allowed: bool = True
    is_chosen: bool = False
    behind: float = 0.0
    behind_se: float | None = 0.0


def list_options(
    oracle: Oracle,
    groups: Partition,
    task: int,
    *,
    confidence: float,
    allows: Callable[[Partition], bool] = lambda _: True,
    wanted: str | None = None,
    n_epochs: int | None = None,
) -> tuple[tuple[Option, ...], str]:
    """Predict what every place would give, and choose one.

    Args:
        oracle: Of all tasks, the new one among them.
        groups: Of the other tasks.
        task: The new one.
        confidence: Of the intervals.
        allows: Says whether a partition of all tasks may be had.
        wanted: A place that is taken whatever is predicted.
        n_epochs: Of a training of the task alone, where the oracle simulates steps; none: as of all others.

    Returns:
        Every option, groups in their order first, and why one was chosen.

    Raises:
        UsageError: If the place asked for is none, or no place is allowed.
    """
    gains: list[_Gains] = [_gain_in_group(oracle, group, task) for group in groups]
    longer = _lengthen(oracle, n_epochs)
    gains += [{task: _lower(longer, (), (task,), task)}, {}]
    places = [*(f"group-{g}" for g in range(len(groups))), ALONE, NOWHERE]
    options = [
        _describe(
            longer if place == ALONE else oracle, place, groups[g] if g < len(groups) else (), task, gain, confidence
        )
        for g, (place, gain) in enumerate(zip(places, gains, strict=True))
    ]
    options = [
        replace(option, is_allowed=option.place == NOWHERE or allows(place_task(groups, task, option.place)))
        for option in options
    ]
    if wanted is not None:
        chosen, reason = find_option(options, wanted), "This place was asked for."
    else:
        chosen, reason = choose_option(options, lambda a, b: _compare(oracle, gains[a], gains[b]))
    behind = [_compare(oracle, gains[chosen], gain) if i != chosen else (0.0, 0.0) for i, gain in enumerate(gains)]
    marked = tuple(
        replace(option, is_chosen=i == chosen, behind=behind[i][0], behind_se=behind[i][1])
        for i, option in enumerate(options)
    )
    return marked, reason


def choose_option(
    options: Sequence[Option], compare: Callable[[int, int], tuple[float, float | None]]
) -> tuple[int, str]:
    """Choose a place by the rule of this module.

    Args:
        options: Of :func:`list_options`; the last one is ``nowhere``.
        compare: By how much one option's gain exceeds another's, and the standard error of that.

    Returns:
        Its number, and why.
    """
    nowhere = len(options) - 1
    allowed = [i for i, option in enumerate(options) if option.is_allowed and i != nowhere]
    if not allowed:
        return nowhere, "The run's budgets and constraints leave no place for it."
    clear = [i for i in allowed if is_above_error(options[i].gain, options[i].gain_se)]
    if not clear:
        return nowhere, "No place is predicted to save more than a standard error over leaving it out."
    best = max(clear, key=lambda i: options[i].gain)
    of_which = _say_of_which(options, allowed, best)
    if options[best].place != ALONE:
        return best, f"{options[best].place} is predicted to save most{of_which}."
    rival = max((i for i in clear if i != best), key=lambda i: options[i].gain, default=None)
    if rival is None:
        has_groups = any(i != best for i in allowed)
        why = "no group saves more than a standard error over leaving it out" if has_groups else "no group is allowed"
        return best, f"An adapter of its own is predicted to save most{of_which}: {why}."
    more, se = compare(best, rival)
    told = f"{options[rival].place} by {more:.4f}" + ("" if se is None else f" ± {se:.4f}") + " nats"
    if is_above_error(more, se):
        return best, f"An adapter of its own is predicted to save more than {told}."
    told += ", which is no more than a standard error: it joins that group"
    return rival, f"An adapter of its own is predicted to save more than {told}."


def _say_of_which(options: Sequence[Option], allowed: Sequence[int], best: int) -> str:
    """What the best option is the best of, where another one's gain is larger."""
    larger = [i for i in range(len(options)) if options[i].gain > options[best].gain]
    if not set(larger) <= set(allowed):
        return " of the places that the run's budgets and constraints allow"
    return " of those that save more than a standard error" if larger else ""


def find_option(options: Sequence[Option], wanted: str) -> int:
    """Return the number of the place that was asked for.

    Raises:
        UsageError: If there is no such place, or budgets or constraints rule it out.
    """
    places = [option.place for option in options if option.place != NOWHERE]
    if wanted not in places:
        raise UsageError(f"place {wanted!r}: expected one of {', '.join(places)}")
    found = next(i for i, option in enumerate(options) if option.place == wanted)
    if not options[found].is_allowed:
        raise UsageError(
            f"place {wanted!r} (--to): the run's budgets or constraints on groups rule it out; change them"
        )
    return found


def place_task(groups: Partition, task: int, place: str) -> Partition:
    """Return the groups with a task in its place."""
    if place == ALONE:
        return (*groups, (task,))
    return tuple(tuple(sorted((*group, task))) if place == f"group-{g}" else group for g, group in enumerate(groups))


def _lengthen(oracle: Oracle, n_epochs: int | None) -> Oracle:
    """The oracle of longer trainings; itself where that changes nothing that it predicts."""
    if n_epochs is None or oracle.budget is None or n_epochs == oracle.budget.num_train_epochs:
        return oracle
    return replace(oracle, budget=replace(oracle.budget, num_train_epochs=n_epochs), _memories=())


def _gain_in_group(oracle: Oracle, group: tuple[int, ...], task: int) -> _Gains:
    joined = tuple(sorted((*group, task)))
    return {task: _lower(oracle, (), joined, task)} | {i: _lower(oracle, group, joined, i) for i in group}


def _lower(oracle: Oracle, before: tuple[int, ...], after: tuple[int, ...], task: int) -> FloatArray:
    """By how much a task's rows lose less after one training than after another, ``(seeds, n)``."""
    outcomes = oracle.row_outcomes([before, after], task)
    return np.stack([outcome.nll[0] - outcome.nll[1] for outcome in outcomes])


def _compare(oracle: Oracle, one: _Gains, other: _Gains) -> tuple[float, float | None]:
    """By how much one gain exceeds another; tasks have rows of their own, so that their errors add in squares."""
    total, variance = 0.0, 0.0
    for task in {*one, *other}:
        difference = one.get(task, 0.0) - other.get(task, 0.0)
        mean, se = average_outcomes(np.asarray(difference)[:, None, :], oracle.validation_groups(task))
        total, variance = total + float(mean[0]), variance + float(se[0]) ** 2
    return total, None if np.isnan(variance) else float(np.sqrt(variance))


def _describe(
    oracle: Oracle, place: str, group: tuple[int, ...], task: int, gains: _Gains, confidence: float
) -> Option:
    subset = () if place == NOWHERE else tuple(sorted((*group, task)))
    scores = oracle.score([subset, group])
    nll, se = float(scores.nll[0, task]), float(scores.nll_se[0, task])
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * se
    accuracy, low, high = float(scores.accuracy[0, task]), None, None
    if np.isfinite(accuracy):
        low, high = compute_wilson_interval(accuracy, len(np.unique(oracle.validation_groups(task))), confidence)
    gain, gain_se = _compare(oracle, gains, {}) if gains else (0.0, 0.0)
    return Option(
        place=place,
        tasks=tuple(oracle.task_names[i] for i in group),
        nll=nll,
        nll_low=nll - reach if np.isfinite(reach) else None,
        nll_high=nll + reach if np.isfinite(reach) else None,
        accuracy=accuracy if np.isfinite(accuracy) else None,
        accuracy_low=low,
        accuracy_high=high,
        untrained_nll=float(scores.nll[1, task]) if group else None,
        gain=gain,
        gain_se=gain_se,
        others=sum(float(rows.mean()) for i, rows in gains.items() if i != task),
    )
