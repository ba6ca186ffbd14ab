"""Which subsets of tasks to ask about, and the task affinity matrix made of the answers.

Input: predicted scores ``(n_subsets, n_tasks)``, higher is better. Output: :class:`Affinity`: ``directed[i, j]`` is the
mean score of task i over the subsets that hold both i and j (paper, equation 1), ``matrix`` its symmetric part, for
clustering. Adding a constant to a row changes no clustering, so a task's difficulty drops out; its scale does not.

Invariants: subsets are distinct and of one size; every pair of tasks has an entry, from equation 1 where a subset holds
the pair, otherwise from a linear surrogate on equation 1's own level. Cost: 2 k n^2 flops, and for a surrogate
``min(k_i, n)^2 max(k_i, n)`` per task, k_i the number of subsets that hold it. No torch.
"""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ensemblelora.config import AffinityConfig
from ensemblelora.errors import ConfigError, DataError
from ensemblelora.seeding import generator_for

__all__ = [
    "Affinity",
    "SubsetDesign",
    "affinity_from_scores",
    "average_over_subsets",
    "fit_surrogate",
    "reference_subsets",
    "relative_affinity",
    "sample_subsets",
    "select_values",
    "symmetrize",
]

FloatArray = npt.NDArray[np.float64]
Subset = tuple[int, ...]

_logger = logging.getLogger(__name__)

_MAX_TASKS_FOR_PAIRS = 40
_RIDGES = np.logspace(3, -3, 25)  # of equal errors the largest wins


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


def sample_subsets(n_tasks: int, config: AffinityConfig, *, seed: int) -> SubsetDesign:
    """Choose the subsets that the affinity is averaged over.

    All subsets of the size where there are no more than ``n_subsets``; otherwise that many, distinct and uniform,
    topped up (by at most as many again) until every pair of tasks occurs ``min_pair_count`` times. The size is cut to
    ``n_tasks - 1``, since a single subset of all tasks could not tell pairs apart (two tasks have only that one).

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
    size = min(config.subset_size, max(n_tasks - 1, min(n_tasks, 2)))
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
    surrogate_above: int = 40,
) -> Affinity:
    """Turn scores of subsets into the affinity matrix (paper, equation 1).

    Entries of pairs that no subset holds are filled by :func:`fit_surrogate`. With many tasks, where a pair's mean
    rests on a few subsets, the surrogate gives the whole matrix: on planted affinities of 60 to 200 tasks its error was
    half of equation 1's, which was as large as the affinities' own spread.

    Args:
        design: The subsets, from :func:`sample_subsets`.
        values: Scores of every subset on every task, higher is better, shape ``(n_subsets, n_tasks)``; only scores of
            tasks in the subset are read.
        row_scale: ``sd`` divides each row by the spread of its entries, for losses of different magnitude.
        surrogate_above: Number of tasks above which the surrogate gives the whole matrix.

    Raises:
        DataError: If the values don't fit the design or are not finite, or a task is in no subset.
    """
    scores = np.asarray(values, dtype=np.float64)
    _check_values(design.membership, scores)
    directed, counts = average_over_subsets(design, scores)
    surrogate = (counts == 0) | (design.n_tasks > surrogate_above)
    if surrogate.any():
        directed = np.where(surrogate, fit_surrogate(design, scores), directed)
        _logger.info("%d of %d affinities come from the linear surrogate", int(surrogate.sum()), surrogate.size)
    return Affinity(directed, symmetrize(directed, row_scale=row_scale), counts, surrogate)


def average_over_subsets(design: SubsetDesign, values: FloatArray) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Return T of equation 1, NaN for pairs never seen, and how many subsets hold each pair, both ``(n, n)``."""
    members = design.membership  # (k, n)
    sums = (members * np.where(members > 0, values, 0.0)).T @ members
    counts = members.T @ members
    directed = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return directed, counts.astype(np.int64)


def fit_surrogate(design: SubsetDesign, values: FloatArray) -> FloatArray:
    """Return T from a linear model of the scores, on the level of equation 1, shape ``(n, n)``.

    Per task i, ``f_i(S) ~ mu_i + sum_{j in S, j != i} beta_ij`` by ridge over the subsets that hold i (a linear
    datamodel), the ridge by leave-one-out error. The mean of that model over all subsets of size c that hold i and j is
    ``mu_i + beta_ij + (c - 2) / (n - 2) sum_{l != i, j} beta_il``, and over all that hold i
    ``mu_i + (c - 1) / (n - 1) sum_{l != i} beta_il``.
    """
    n, c = design.n_tasks, len(design.subsets[0])
    members = design.membership
    directed = np.empty((n, n))
    for i in range(n):
        rows = members[:, i] > 0
        others = members[rows]
        others[:, i] = 0.0
        mu, beta = _fit_ridge(others, values[rows, i])
        total = beta.sum()
        directed[i] = mu + beta + (c - 2) / max(n - 2, 1) * (total - beta)
        directed[i, i] = mu + (c - 1) / max(n - 1, 1) * total
    return directed


def symmetrize(directed: FloatArray, *, row_scale: Literal["none", "sd"] = "none") -> FloatArray:
    """Return ``(T + T^T) / 2``, after dividing rows by the spread of their off-diagonal entries if asked."""
    n = len(directed)
    if row_scale == "sd" and n > 2:
        spread = directed[~np.eye(n, dtype=bool)].reshape(n, n - 1).std(axis=1)
        directed = directed / np.where(spread > 0, spread, 1.0)[:, None]
    return np.asarray((directed + directed.T) / 2)


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


def _fit_ridge(design: FloatArray, target: FloatArray) -> tuple[float, FloatArray]:
    """Ridge with a free intercept; of a grid of penalties the one with the least leave-one-out error.

    Args:
        design: Shape ``(k, n)``.
        target: Shape ``(k,)``.

    Returns:
        The intercept and the coefficients ``(n,)``.
    """
    centre, level = design.mean(axis=0), float(target.mean())
    left, singular, right = np.linalg.svd(design - centre, full_matrices=False)
    residual = target - level
    projected, energy = left.T @ residual, singular**2
    if energy.max(initial=0.0) <= 1e-12:  # all rows alike: nothing to learn
        return level, np.zeros(design.shape[1])
    ridges = _RIDGES * energy.max()
    errors = []
    for ridge in ridges:
        shrink = energy / (energy + ridge)
        leverage = 1 / len(target) + (left**2) @ shrink
        errors.append((((residual - left @ (shrink * projected)) / np.maximum(1.0 - leverage, 1e-9)) ** 2).sum())
    ridge = float(ridges[np.argmin(errors)])
    beta = right.T @ (singular / (energy + ridge) * projected)
    return level - float(centre @ beta), beta
