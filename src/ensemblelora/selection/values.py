"""What each source is worth to the target: scores of random sets, leaving one out, and Shapley values.

In: a :class:`~.prospect.Prospect`. Out: :class:`Values`, one number a source, higher is better, with standard errors;
and :func:`choose_prefix`, which turns a ranking into a choice: the best few, how many by predicted validation loss.

Every value is a weighted sum of predicted losses. Its error is that of the validation rows and projection seeds and,
where sets or orders were drawn at random, that of the draw; the two are taken to be independent.

Cost: as many fits as distinct sets: ``n_subsets``; n + 1; at most ``n_permutations`` times n. No torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.affinity import sample_subsets
from ensemblelora.config import AffinityConfig
from ensemblelora.seeding import generator_for
from ensemblelora.selection.prospect import Choice, Estimates, Prospect, unless_nan
from ensemblelora.selection.search import Found, Move, SearchSettings

__all__ = ["VALUATIONS", "Values", "choose_prefix", "estimate_shapley", "leave_one_out", "score_random_sets"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Values:
    """What each source is worth.

    Attributes:
        values: Nats of the target's predicted loss, shape ``(n,)``.
        errors: Standard errors, shape ``(n,)``.
        n_asked: Distinct sets behind them.
    """

    values: FloatArray
    errors: FloatArray
    n_asked: int


def score_random_sets(prospect: Prospect, settings: SearchSettings) -> Values:
    """Score a source by how much better random sets that hold it are than random sets at large.

    All sets of the size where there are no more than asked for. A source that was in no set has no value: NaN.

    Reference:
        Li et al., "Scalable Fine-tuning from Multiple Data Sources", EMNLP Findings 2024, random ensembles.
    """
    sets = _draw_sets(prospect.n_sources, settings)
    members = np.zeros((prospect.n_sources, len(sets)))
    for s, chosen in enumerate(sets):
        members[list(chosen), s] = 1.0
    counts = members.sum(axis=1, keepdims=True)
    weights = np.full(members.shape, 1.0 / len(sets)) - members / np.maximum(counts, 1.0)
    found = _ask(prospect, sets, weights)
    means = prospect.score(sets).values
    is_whole = len(sets) == math.comb(prospect.n_sources, len(sets[0]))
    drawn = np.array([_spread_of_mean(means[members[j] > 0], is_whole) for j in range(prospect.n_sources)])
    is_unknown = counts[:, 0] == 0
    values, errors = (np.where(is_unknown, np.nan, part) for part in (found.values, np.hypot(found.errors, drawn)))
    return Values(values, errors, len(sets))


def leave_one_out(prospect: Prospect, settings: SearchSettings) -> Values:
    """Value a source by how much the loss under all sources rises when it alone is left out."""
    del settings
    whole = prospect.everything
    sets = [whole, *(whole[:j] + whole[j + 1 :] for j in whole)]
    weights = np.concatenate([np.full((len(whole), 1), -1.0), np.eye(len(whole))], axis=1)
    found = _ask(prospect, sets, weights)
    return Values(found.values, found.errors, len(sets))


def estimate_shapley(prospect: Prospect, settings: SearchSettings) -> Values:
    """Value a source by its mean gain over the sources before it, in random orders and their reverses.

    The values of all sources add up to the gain of all over none, whatever the orders. A source's error of the draw is
    the spread between pairs of an order and its reverse.
    """
    orders, is_whole = _draw_orders(prospect.n_sources, settings)
    places: dict[Choice, int] = {}
    before, after = np.zeros((2, len(orders), prospect.n_sources), dtype=np.intp)
    for o, order in enumerate(orders):
        for k, j in enumerate(order):
            earlier, later = (tuple(sorted(order[:end])) for end in (k, k + 1))
            before[o, j], after[o, j] = (places.setdefault(chosen, len(places)) for chosen in (earlier, later))
    sets = list(places)
    weights = np.zeros((prospect.n_sources, len(sets)))
    every = np.broadcast_to(np.arange(prospect.n_sources), before.shape)
    np.add.at(weights, (every, before), 1.0 / len(orders))
    np.add.at(weights, (every, after), -1.0 / len(orders))
    found, means = _ask(prospect, sets, weights), prospect.score(sets).values
    gains = means[before] - means[after]  # (orders, n)
    pairs = gains if is_whole else gains.reshape(-1, 2, prospect.n_sources).mean(axis=1)
    drawn = np.array([_spread_of_mean(column, is_whole) for column in pairs.T])
    return Values(found.values, np.hypot(found.errors, drawn), len(sets))


VALUATIONS: Mapping[str, Callable[[Prospect, SearchSettings], Values]] = {
    "scores": score_random_sets,
    "loo": leave_one_out,
    "shapley": estimate_shapley,
}


def choose_prefix(prospect: Prospect, values: npt.ArrayLike, settings: SearchSettings) -> Found:
    """Choose the best few sources of a ranking: the smallest number within a standard error of the best one's loss.

    Args:
        prospect: Predicts every number's loss.
        values: What the sources are ranked by, higher first, ``(n,)``; NaN comes last.
        settings: Tolerance and largest number.
    """
    worth = np.asarray(values, dtype=np.float64)
    order = np.argsort(-np.where(np.isnan(worth), -np.inf, worth), kind="stable").tolist()
    longest = min(prospect.n_sources, settings.max_sources or prospect.n_sources)
    sets: list[Choice] = [tuple(sorted(order[:k])) for k in range(longest + 1)]
    prospect.solve(sets)
    losses = prospect.score(sets).values
    best = int(np.argmin(losses))
    weights = np.eye(best + 1)
    weights[:, best] -= 1.0
    behind = prospect.combine(sets[: best + 1], weights)  # by how much each number is behind the best
    bars = np.maximum(np.nan_to_num(behind.errors), settings.tolerance)
    number = int(np.argmax(behind.values <= bars))
    moves = tuple(_take_step(prospect, sets, order, losses, k) for k in range(number))
    told = f"the {number} best of the ranking; {best} have the least predicted loss"
    return Found(sets[number], moves, told if number != best else f"the {best} best of the ranking", len(sets))


def _take_step(prospect: Prospect, sets: Sequence[Choice], order: Sequence[int], losses: FloatArray, k: int) -> Move:
    gain = prospect.compare([sets[k + 1]], over=sets[k])
    return Move((order[k],), (), float(gain.values[0]), unless_nan(gain.errors[0]), float(losses[k + 1]), 1)


def _ask(prospect: Prospect, sets: Sequence[Choice], weights: FloatArray) -> Estimates:
    prospect.solve(sets)
    return prospect.combine(sets, weights)


def _spread_of_mean(values: FloatArray, is_whole: bool) -> float:
    """Standard error of a mean of draws; none where all there are were taken, and unknown of a single one."""
    if is_whole or not values.size:
        return 0.0
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan


def _draw_sets(n_sources: int, settings: SearchSettings) -> list[Choice]:
    """Distinct sets of one size, as the affinity's are drawn; of one source each where two would be half of all."""
    size = min(settings.subset_size, max(1, n_sources // 2))
    if size == 1:
        return [(j,) for j in range(n_sources)]
    config = AffinityConfig(subset_size=size, n_subsets=settings.n_subsets, min_pair_count=0)
    return list(sample_subsets(n_sources, config, seed=settings.seed).subsets)


def _draw_orders(n_sources: int, settings: SearchSettings) -> tuple[list[list[int]], bool]:
    """Orders of the sources, each followed by its reverse, and whether these are all."""
    n_pairs = -(-settings.n_permutations // 2)
    if math.factorial(min(n_sources, 12)) <= 2 * n_pairs:
        return [list(order) for order in itertools.permutations(range(n_sources))], True
    return list(_draw_pairs(n_sources, n_pairs, settings.seed)), False


def _draw_pairs(n_sources: int, n_pairs: int, seed: int) -> Iterator[list[int]]:
    generator = generator_for(seed, "selection", "orders")
    for _ in range(n_pairs):
        order = generator.permutation(n_sources).tolist()
        yield order
        yield order[::-1]
