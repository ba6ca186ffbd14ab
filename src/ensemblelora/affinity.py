"""Which subsets of tasks to ask about, and the task affinity matrix made of the answers.

Input: predicted scores ``(n_subsets, n_tasks)``, higher is better. Output: :class:`Affinity`: ``directed[i, j]`` is the
mean score of task i over the subsets that hold both i and j (paper, equation 1), ``matrix`` its symmetric part, for
clustering. Adding a constant to a row changes no clustering, so a task's difficulty drops out; its scale does not.

Invariants: subsets are distinct and of one size; every pair of tasks has an entry, from equation 1 where a subset holds
the pair, otherwise from a surrogate on equation 1's own level (:mod:`ensemblelora.surrogate`). Either way a task's row
is linear in its scores, with weights that :func:`weigh_scores` gives. Cost: 2 k_i n flops per task, k_i the number of
subsets that hold it, and where it is needed a surrogate's. No torch.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ensemblelora.config import AffinityConfig
from ensemblelora.errors import ConfigError, DataError
from ensemblelora.seeding import generator_for
from ensemblelora.surrogate import SurrogateKind, fit_row

__all__ = [
    "Affinity",
    "RowWeights",
    "SubsetDesign",
    "affinity_from_scores",
    "choose_subset_size",
    "compare_surrogates",
    "list_blind_tasks",
    "measure_spreads",
    "reference_subsets",
    "relative_affinity",
    "sample_subsets",
    "select_values",
    "symmetrize",
    "weigh_scores",
]

FloatArray = npt.NDArray[np.float64]
Subset = tuple[int, ...]

_logger = logging.getLogger(__name__)

_MAX_TASKS_FOR_PAIRS = 40
_MAX_TASKS_FOR_MEANS = 40


@dataclass(frozen=True)
class SubsetDesign:
    """Subsets whose scores make the affinity.

    Attributes:
        n_tasks: Number of tasks, n.
        subsets: Distinct, of one size, each sorted; in lexicographic order.
    """

    n_tasks: int
    subsets: tuple[Subset, ...]

    @property
    def membership(self) -> FloatArray:
        """1 where a subset holds a task, shape ``(n_subsets, n_tasks)``."""
        members = np.zeros((len(self.subsets), self.n_tasks))
        for s, subset in enumerate(self.subsets):
            members[s, list(subset)] = 1.0
        return members


@dataclass(frozen=True, eq=False)
class Affinity:
    """Task affinity, higher is better together.

    Attributes:
        directed: T, shape ``(n_tasks, n_tasks)``; row i holds scores of task i.
        matrix: Symmetric, for clustering: the mean of T, its rows scaled if asked, and its transpose.
        counts: Subsets that hold both tasks, int ``(n_tasks, n_tasks)``.
        surrogate: Which entries of ``directed`` come from the surrogate, bool ``(n_tasks, n_tasks)``.
    """

    directed: FloatArray
    matrix: FloatArray
    counts: npt.NDArray[np.int64]
    surrogate: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class RowWeights:
    """How one task's row of T is made of its scores: ``directed[i] = weights @ scores of subsets``.

    Attributes:
        subsets: Indices of the subsets that hold the task, shape ``(k_i,)``.
        weights: Shape ``(n_tasks, k_i)``; every row sums to 1.
        surrogate: Which entries come from the surrogate, bool ``(n_tasks,)``.
    """

    subsets: npt.NDArray[np.intp]
    weights: FloatArray
    surrogate: npt.NDArray[np.bool_]


def choose_subset_size(n_tasks: int, asked: int) -> int:
    """Return how many tasks a subset has: as many as asked, but one less than all.

    A single subset of all tasks could not tell pairs apart; two tasks have only that one, and one task itself.

    Example:
        >>> [choose_subset_size(n, 3) for n in (1, 2, 3, 4, 10)]
        [1, 2, 2, 3, 3]
    """
    return min(asked, max(n_tasks - 1, min(n_tasks, 2)))


def list_blind_tasks(design: SubsetDesign) -> list[int]:
    """Return the tasks whose subsets can't tell their partners apart: of three or more, those in fewer than two.

    Such a task has one score, so that all of its affinities are that one. Any two subsets tell some partners apart.
    """
    if design.n_tasks < 3:
        return []
    return np.flatnonzero(design.membership.sum(axis=0) < 2).tolist()


def sample_subsets(n_tasks: int, config: AffinityConfig, *, seed: int) -> SubsetDesign:
    """Choose the subsets that the affinity is averaged over.

    All subsets of the size where there are no more than ``n_subsets``; otherwise that many, distinct and uniform,
    topped up (by at most as many again) until every pair of tasks occurs ``min_pair_count`` times. The size is that of
    :func:`choose_subset_size`.

    The top-up needs no weights: every step treats all tasks alike, so given how often a pair occurs all subsets that
    hold it are equally likely, and equation 1's plain mean stays unbiased. Importance weights were tried: no less bias,
    5 to 10 % more error.

    Args:
        n_tasks: Number of tasks, at least 1.
        config: Size, number and coverage.
        seed: The run's seed.

    Raises:
        ConfigError: If the subsets hold one task only, although there are more.
    """
    if n_tasks < 1:
        raise ConfigError(f"{n_tasks} tasks: expected at least 1")
    if config.subset_size == 1 and n_tasks > 1:
        raise ConfigError("affinity.subset_size 1: such subsets never hold two tasks; use 2 or more")
    size = choose_subset_size(n_tasks, config.subset_size)
    if math.comb(n_tasks, size) <= config.n_subsets:
        return SubsetDesign(n_tasks, tuple(itertools.combinations(range(n_tasks), size)))
    drawn = _draw_uniform(n_tasks, size, config.n_subsets, generator_for(seed, "subsets"))
    generator = generator_for(seed, "subsets", "coverage")
    subsets = _top_up(n_tasks, size, drawn, config.min_pair_count, 2 * config.n_subsets, generator)
    return SubsetDesign(n_tasks, tuple(sorted(subsets)))


def reference_subsets(n_tasks: int) -> tuple[Subset, ...]:
    """Return subsets solved beside the design: singles, all tasks, and all pairs of up to 40 tasks.

    They serve the plan and maps of transfer, and stay out of the affinity's means.
    """
    pairs = itertools.combinations(range(n_tasks), 2) if n_tasks <= _MAX_TASKS_FOR_PAIRS else ()
    return tuple(dict.fromkeys([*((i,) for i in range(n_tasks)), *pairs, tuple(range(n_tasks))]))


def select_values(nll: FloatArray, accuracy: FloatArray, score: Literal["nll", "accuracy"]) -> FloatArray:
    """Return scores that are higher where better, shape ``(n_subsets, n_tasks)``.

    Raises:
        ConfigError: If accuracy is asked for and a task has none.
    """
    if score == "nll":
        return -nll
    if np.isnan(accuracy).any():
        missing = np.flatnonzero(np.isnan(accuracy).any(axis=0)).tolist()
        raise ConfigError(f"affinity.score accuracy: tasks {missing} answer with free text and have none; use nll")
    return accuracy


def affinity_from_scores(
    design: SubsetDesign,
    values: FloatArray,
    *,
    row_scale: Literal["none", "sd"] = "none",
    surrogate: SurrogateKind = "linear",
    surrogate_above: int = _MAX_TASKS_FOR_MEANS,
    weights: Iterable[RowWeights] | None = None,
) -> Affinity:
    """Turn scores of subsets into the affinity matrix (paper, equation 1).

    Args:
        design: The subsets, from :func:`sample_subsets`.
        values: Scores of every subset on every task, higher is better, shape ``(n_subsets, n_tasks)``; only scores of
            tasks in the subset are read.
        row_scale: ``sd`` divides each row by the spread of its entries, for losses of different magnitude.
        surrogate: What fills the entries that equation 1 can't, or should not; see :func:`weigh_scores`.
        surrogate_above: Number of tasks above which the surrogate gives the whole matrix.
        weights: What :func:`weigh_scores` gave for these very scores, where they are needed elsewhere, too.

    Raises:
        DataError: If the values don't fit the design or are not finite, or a task is in no subset.
    """
    scores, members = np.asarray(values, dtype=np.float64), design.membership
    directed, is_filled = np.empty((design.n_tasks,) * 2), np.zeros((design.n_tasks,) * 2, dtype=bool)
    if weights is None:
        weights = weigh_scores(design, scores, surrogate=surrogate, surrogate_above=surrogate_above)
    for i, row in enumerate(weights):
        directed[i], is_filled[i] = row.weights @ scores[row.subsets, i], row.surrogate
    if is_filled.any():
        _logger.info("%d of %d affinities come from the %s surrogate", is_filled.sum(), is_filled.size, surrogate)
    counts = (members.T @ members).astype(np.int64)
    return Affinity(directed, symmetrize(directed, row_scale=row_scale), counts, is_filled)


def weigh_scores(
    design: SubsetDesign,
    values: FloatArray,
    *,
    surrogate: SurrogateKind = "linear",
    surrogate_above: int = _MAX_TASKS_FOR_MEANS,
) -> Iterator[RowWeights]:
    """Yield, task by task, what each score counts for in the task's row of T.

    Equation 1 weighs the subsets that hold a pair alike. Pairs that no subset holds are left to the surrogate. With
    many tasks, where a pair's mean rests on a few subsets, the surrogate gives the whole matrix: on planted affinities
    of 60 to 200 tasks its error was half of equation 1's, which was as large as the affinities' own spread.

    Args:
        design: The subsets.
        values: Scores, as for :func:`affinity_from_scores`; they choose the surrogate's ridge.
        surrogate: Which surrogate.
        surrogate_above: Number of tasks above which it gives the whole matrix.

    Raises:
        DataError: If the values don't fit the design or are not finite, or a task is in no subset.
    """
    members = design.membership
    _check_values(members, values)
    for i in range(design.n_tasks):
        subsets = np.flatnonzero(members[:, i])
        held = members[subsets]  # (k_i, n)
        counts = held.sum(axis=0)
        weights = held.T / np.maximum(counts, 1.0)[:, None]
        is_filled = (counts == 0) | (design.n_tasks > surrogate_above)
        if is_filled.any():
            model = fit_row(held, values[subsets, i], i, surrogate)
            weights[is_filled] = model.weights[is_filled]
        yield RowWeights(subsets, weights, is_filled)


def compare_surrogates(design: SubsetDesign, values: FloatArray) -> dict[str, float | None]:
    """Return how well each surrogate predicts a subset's scores from the others, root mean square over all scores.

    Args:
        design: The subsets.
        values: Scores, as for :func:`affinity_from_scores`.

    Returns:
        Errors of ``linear``, ``kernel``, and of saying the ``mean`` of the task's other scores; none where every task
        is in a single subset.
    """
    members = design.membership
    totals, n_scores = {"mean": 0.0, "linear": 0.0, "kernel": 0.0}, 0
    for i in range(design.n_tasks):
        subsets = np.flatnonzero(members[:, i])
        k, scores = len(subsets), values[subsets, i]
        if k < 2:
            continue
        n_scores += k
        totals["mean"] += k * scores.var() * (k / (k - 1)) ** 2
        totals["linear"] += k * fit_row(members[subsets], scores, i, "linear").loo_error ** 2
        totals["kernel"] += k * fit_row(members[subsets], scores, i, "kernel").loo_error ** 2
    return {name: math.sqrt(total / n_scores) if n_scores else None for name, total in totals.items()}


def symmetrize(directed: FloatArray, *, row_scale: Literal["none", "sd"] = "none") -> FloatArray:
    """Return ``(T + T^T) / 2``, after dividing rows by the spread of their off-diagonal entries if asked."""
    if row_scale == "sd":
        directed = directed / measure_spreads(directed)[:, None]
    return np.asarray((directed + directed.T) / 2)


def measure_spreads(directed: FloatArray) -> FloatArray:
    """Return the standard deviation of each row off the diagonal, shape ``(n,)``; 1 where there is none."""
    n = len(directed)
    if n < 3:
        return np.ones(n)
    spread = directed[~np.eye(n, dtype=bool)].reshape(n, n - 1).std(axis=1)
    return np.where(spread > 0, spread, 1.0)


def relative_affinity(directed: FloatArray, single_scores: FloatArray) -> FloatArray:
    """Return ``T_ij - f_i({i})``: what i gains with j around over being alone, a question other than grouping.

    Args:
        directed: T, shape ``(n, n)``.
        single_scores: Score of each task fitted alone, higher is better, shape ``(n,)``.
    """
    return np.asarray(directed - np.asarray(single_scores)[:, None])


def _check_values(members: FloatArray, values: FloatArray) -> None:
    if values.shape != members.shape:
        raise DataError(f"scores of shape {values.shape} for {members.shape[0]} subsets of {members.shape[1]} tasks")
    if not np.isfinite(values[members > 0]).all():
        raise DataError("some subsets have no finite score for their own tasks; check the features")
    absent = np.flatnonzero(~members.any(axis=0)).tolist()
    if absent:
        raise DataError(f"tasks {absent} are in none of the {len(members)} subsets; raise affinity.n_subsets")


def _draw_uniform(n_tasks: int, size: int, n_subsets: int, generator: np.random.Generator) -> list[Subset]:
    """Draw distinct subsets, every set of ``n_subsets`` of them equally likely."""
    if math.comb(n_tasks, size) <= 4 * n_subsets:  # nearly all: drawing until new would wait long
        everything = list(itertools.combinations(range(n_tasks), size))
        chosen = generator.choice(len(everything), n_subsets, replace=False)
        return [everything[int(s)] for s in chosen]
    drawn: dict[Subset, None] = {}
    while len(drawn) < n_subsets:
        drawn[_draw_one(np.arange(n_tasks), size, generator)] = None
    return list(drawn)


def _draw_one(tasks: npt.NDArray[np.int64], size: int, generator: np.random.Generator) -> Subset:
    return tuple(sorted(generator.choice(tasks, size, replace=False).tolist()))


def _top_up(
    n_tasks: int, size: int, drawn: list[Subset], min_count: int, most: int, generator: np.random.Generator
) -> list[Subset]:
    """Add subsets around the rarest pair until every pair occurs often enough, or there are ``most`` subsets."""
    counts = np.zeros((n_tasks, n_tasks), dtype=np.int64)
    for subset in drawn:
        counts[np.ix_(subset, subset)] += 1
    np.fill_diagonal(counts, np.iinfo(np.int64).max)
    goal = min(min_count, math.comb(n_tasks - 2, size - 2))
    subsets = dict.fromkeys(drawn)
    while counts.min() < goal and len(subsets) < most:
        rarest = np.argwhere(np.triu(counts == counts.min()))
        i, j = (int(task) for task in rarest[generator.integers(len(rarest))])
        others = np.delete(np.arange(n_tasks), [i, j])
        subset = tuple(sorted((i, j, *_draw_one(others, size - 2, generator))))
        if subset not in subsets:  # a new one exists: the pair occurs less often than there are subsets that hold it
            subsets[subset] = None
            counts[np.ix_(subset, subset)] += ~np.eye(size, dtype=bool)
    return list(subsets)
