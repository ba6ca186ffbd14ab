"""Predicted against true affinity, and whether the groups that they lead to are the same or as good.

In: predicted and true values of the same subsets. Out: :class:`GroupingAgreement`. Both affinities are equation 1 on
those subsets, so they differ by the predictions alone. Entries are compared after taking off each row's mean, since a
constant added to a row changes no clustering; pairs that no subset holds, filled by the linear surrogate, take part
in the clustering and not in the correlation. Cost: two clusterings per number of groups. No torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.affinity import SubsetDesign, affinity_from_scores
from ensemblelora.errors import DataError
from ensemblelora.grouping import Partition, cluster, compute_objective, sort_groups, to_labels
from ensemblelora.seeding import generator_for
from ensemblelora.validation.cells import FloatArray, IntArray, Subset, find_starts
from ensemblelora.validation.moments import correlate, rank
from ensemblelora.validation.resampling import Estimate, Units, bootstrap, divide

__all__ = ["GroupCount", "GroupingAgreement", "compare_groupings"]


@dataclass(frozen=True)
class GroupCount:
    """The groups that both affinities lead to, for one number of groups.

    Attributes:
        n_groups: Number of groups.
        predicted_groups: From the predicted affinity.
        true_groups: From the true affinity.
        adjusted_rand_index: 1 for the same groups, 0 on average for unrelated ones.
        predicted_objective: Sum of the groups' densities (paper, appendix A) of ``predicted_groups`` under the true
            affinity, higher is better.
        true_objective: The same of ``true_groups``, what could be reached.
        random_objective: Mean over random groups of the sizes of ``predicted_groups``.
        share_of_gain: ``(predicted - random) / (true - random)``: 1 is as good as knowing the truth, 0 as not looking.
            None where random groups are as good as the true ones.
        share_of_random_beaten: Share of random groups whose objective is below the predicted ones'.
    """

    n_groups: int
    predicted_groups: Partition
    true_groups: Partition
    adjusted_rand_index: float
    predicted_objective: float
    true_objective: float
    random_objective: float
    share_of_gain: float | None
    share_of_random_beaten: float


@dataclass(frozen=True)
class GroupingAgreement:
    """Predicted against true affinity.

    Attributes:
        n_subsets: Subsets both rest on.
        n_pairs: Ordered pairs of different tasks that some subset holds.
        n_pairs_filled: Ordered pairs whose affinity comes from the surrogate.
        pearson: Of the entries of these ``n_pairs``, centred by row; interval by drawing subsets.
        spearman: Of their ranks within rows.
        groupings: For each number of groups.
        marked: Tasks left out of rows and columns, though subsets hold them.
    """

    n_subsets: int
    n_pairs: int
    n_pairs_filled: int
    pearson: Estimate
    spearman: float | None
    groupings: tuple[GroupCount, ...]
    marked: tuple[int, ...]


def compare_groupings(
    predicted: npt.ArrayLike,
    truth_mean: npt.ArrayLike,
    subsets: Sequence[Subset],
    *,
    higher_is_better: bool,
    subset_size: int,
    marked: Collection[int] = (),
    group_counts: Sequence[int] = (2, 3, 4, 5),
    n_random: int = 1000,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> GroupingAgreement:
    """Compare the affinities that predicted and true values give, and the groups that these lead to.

    Args:
        predicted: Shape ``(n_subsets, n_tasks)``; only values of a subset's own tasks are read.
        truth_mean: The same, measured, mean over seeds; subsets with a NaN among their own tasks are passed
            over.
        subsets: Each a sorted tuple of task indices; those of other sizes than ``subset_size`` are passed over, as
            they are in equation 1.
        higher_is_better: Whether the values are accuracies rather than losses; affinity is always higher for better.
        subset_size: Tasks in a subset, from 2 to ``n_tasks``.
        marked: Tasks, such as those at chance, that are left out.
        group_counts: Numbers of groups; those that leave less than one task more than groups are passed over.
        n_random: Random groups to compare with.
        n_bootstrap: Draws behind the interval.
        confidence: Share of draws inside the interval.
        seed: Root seed of the draws.

    Raises:
        DataError: If the shapes disagree, or some task is in no measured subset of that size.
    """
    guesses, truth = (np.asarray(values, dtype=np.float64) for values in (predicted, truth_mean))
    if guesses.shape != truth.shape or guesses.ndim != 2 or len(guesses) != len(subsets) or subset_size < 2:
        raise DataError(
            f"predicted {guesses.shape}, true {truth.shape}, {len(subsets)} subsets, of size {subset_size}: expected "
            "two arrays (n_subsets, n_tasks) and a size of 2 or more"
        )
    sign = 1.0 if higher_is_better else -1.0
    kept = np.setdiff1d(np.arange(truth.shape[1]), sorted(marked))
    design, scores, true_scores = _select_measured(sign * guesses, sign * truth, subsets, subset_size, kept)
    affinities = [affinity_from_scores(design, values) for values in (scores, true_scores)]
    matrices = [affinity.matrix[np.ix_(kept, kept)] for affinity in affinities]
    filled = affinities[1].surrogate[np.ix_(kept, kept)] & ~np.eye(len(kept), dtype=bool)
    pairs = _collect_pairs(design, scores, true_scores, kept)
    return GroupingAgreement(
        n_subsets=len(design.subsets),
        n_pairs=len(pairs.starts),
        n_pairs_filled=int(filled.sum()),
        pearson=_correlate_pairs(
            pairs,
            len(design.subsets),
            n_bootstrap=n_bootstrap,
            confidence=confidence,
            generator=generator_for(seed, "agreement", "affinity"),
        ),
        spearman=_correlate_ranks(pairs),
        groupings=tuple(
            _compare_groups(matrices[0], matrices[1], m, kept, n_random=n_random, seed=seed)
            for m in group_counts
            if 1 <= m < len(kept)
        ),
        marked=tuple(sorted(set(marked))),
    )


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Every subset's value of i with j in it, i and j different, sorted by i, then j."""

    subset: IntArray
    """(n_triples,)"""
    predicted: FloatArray
    true: FloatArray
    starts: IntArray
    """where each pair begins, (n_pairs,)"""
    row_starts: IntArray
    """where each i begins among the pairs"""


def _select_measured(
    scores: FloatArray, true_scores: FloatArray, subsets: Sequence[Subset], size: int, kept: IntArray
) -> tuple[SubsetDesign, FloatArray, FloatArray]:
    """Return the measured subsets of one size in their order, and both scores of theirs."""
    rows = [s for s, subset in enumerate(subsets) if len(subset) == size and _is_measured(true_scores[s], subset, kept)]
    if not rows:
        raise DataError(f"no subset of size {size} is measured on all its tasks; fine-tune some first")
    rows.sort(key=lambda s: subsets[s])
    design = SubsetDesign(scores.shape[1], tuple(subsets[s] for s in rows))
    # A task's row of the affinity is made of its own values alone, so those of tasks left out may be anything.
    is_kept = np.isin(np.arange(design.n_tasks), kept)
    return design, np.where(is_kept, scores[rows], 0.0), np.where(is_kept, true_scores[rows], 0.0)


def _is_measured(values: FloatArray, subset: Subset, kept: IntArray) -> bool:
    return bool(np.isfinite(values[np.intersect1d(subset, kept)]).all())


def _collect_pairs(design: SubsetDesign, scores: FloatArray, true_scores: FloatArray, kept: IntArray) -> _Pairs:
    is_kept = set(kept.tolist())
    triples = sorted(
        (i, j, s)
        for s, subset in enumerate(design.subsets)
        for i, j in itertools.permutations(subset, 2)
        if i in is_kept and j in is_kept
    )
    i, j, subset = np.array(triples, dtype=np.int64).reshape(-1, 3).T
    starts = find_starts(i * design.n_tasks + j)
    return _Pairs(subset, scores[subset, i], true_scores[subset, i], starts, find_starts(i[starts]))


def _average(pairs: _Pairs, weights: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return each pair's predicted and true affinity, 0 where a draw has no subset that holds it, and whether it has.

    Args:
        pairs: What is averaged.
        weights: How often each triple counts, ``(draws, n_triples)``.
    """
    totals = np.add.reduceat(weights, pairs.starts, axis=1)
    means = [
        np.nan_to_num(divide(np.add.reduceat(weights * values, pairs.starts, axis=1), totals))
        for values in (pairs.predicted, pairs.true)
    ]
    return means[0], means[1], (totals > 0).astype(np.float64)


def _correlate_pairs(
    pairs: _Pairs, n_subsets: int, *, n_bootstrap: int, confidence: float, generator: np.random.Generator
) -> Estimate:
    if not len(pairs.starts):
        return Estimate(None, None, None)

    def measure(weights: FloatArray) -> dict[str, FloatArray]:
        predicted, true, is_seen = _average(pairs, weights)
        return {"pearson": correlate(is_seen, predicted, true, pairs.row_starts)}

    units = Units(pairs.subset, np.zeros(n_subsets, dtype=np.int64))
    found = bootstrap(measure, [units], n_bootstrap=n_bootstrap, confidence=confidence, generator=generator)
    return found["pearson"]


def _correlate_ranks(pairs: _Pairs) -> float | None:
    if not len(pairs.starts):
        return None
    predicted, true, is_seen = _average(pairs, np.ones((1, len(pairs.subset))))
    ranks = [rank(is_seen, values[0], pairs.row_starts) for values in (predicted, true)]
    found = float(correlate(is_seen, ranks[0], ranks[1], pairs.row_starts)[0])
    return None if np.isnan(found) else found


def _compare_groups(
    predicted: FloatArray, true: FloatArray, n_groups: int, kept: IntArray, *, n_random: int, seed: int
) -> GroupCount:
    from sklearn.metrics import adjusted_rand_score

    groups, best = (cluster(matrix, n_groups, seed=seed, is_bound_needed=False).groups for matrix in (predicted, true))
    labels = to_labels(groups)
    reached, possible = compute_objective(true, groups), compute_objective(true, best)
    generator = generator_for(seed, "agreement", "random groups", n_groups)
    random = _judge_random_groups(true, labels, n_random, generator)
    gain = possible - random.mean()
    is_gain = gain > 1e-12 * float(np.abs(true).max())
    return GroupCount(
        n_groups=n_groups,
        predicted_groups=_rename(groups, kept),
        true_groups=_rename(best, kept),
        adjusted_rand_index=float(adjusted_rand_score(to_labels(best), labels)),
        predicted_objective=reached,
        true_objective=possible,
        random_objective=float(random.mean()),
        share_of_gain=float((reached - random.mean()) / gain) if is_gain else None,
        share_of_random_beaten=float((random < reached).mean()),
    )


def _judge_random_groups(
    affinity: FloatArray, labels: IntArray, n_random: int, generator: np.random.Generator
) -> FloatArray:
    """Return the objectives of groups of the same sizes with the tasks dealt at random, ``(n_random,)``."""
    dealt = generator.permuted(np.tile(labels, (n_random, 1)), axis=1)
    objectives = np.zeros(n_random)
    for label, size in enumerate(np.bincount(labels)):
        members = (dealt == label).astype(np.float64)  # (n_random, n_tasks)
        objectives += ((members @ affinity) * members).sum(axis=1) / size
    return objectives


def _rename(groups: Partition, kept: IntArray) -> Partition:
    return sort_groups(kept[list(group)].tolist() for group in groups)
