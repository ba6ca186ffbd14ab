"""How precisely the affinity is known: standard errors over validation rows and projection seeds.

An entry of the affinity averages predicted scores of many subsets on the same validation rows, so their errors don't
average out over subsets. Every entry is a weighted mean of a task's scores, by ``affinity.weigh_scores``; the same
weights on the scores of single validation rows show how the entry varies from row to row.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ensemblelora.affinity import RowWeights, SubsetDesign, measure_spreads, weigh_scores
from ensemblelora.config import AffinityConfig
from ensemblelora.estimation import Oracle, average_outcomes

__all__ = ["estimate_affinity_errors"]

FloatArray = npt.NDArray[np.float64]


def estimate_affinity_errors(
    oracle: Oracle,
    design: SubsetDesign,
    values: FloatArray,
    config: AffinityConfig,
    weights: Iterable[RowWeights] | None = None,
) -> FloatArray:
    """Return the standard error of each pair's affinity, apart from the tasks' own levels.

    A task's level, the mean of its row, is known least and matters least: no clustering sees it. Tasks have validation
    rows of their own, so the two directions of a pair count as independent. Left out is which subsets were drawn.

    Args:
        oracle: Predicts the rows; the design's fits are solved.
        design: The subsets.
        values: Their scores, as the affinity was made from, shape ``(n_subsets, n_tasks)``.
        config: How it was made from them.
        weights: What ``affinity.weigh_scores`` gave for the scores; none: it is asked.

    Returns:
        Symmetric, shape ``(n_tasks, n_tasks)``; NaN where a task's validation rows all belong together, and for a
        task alone.
    """
    n = design.n_tasks
    directed, errors = np.empty((n, n)), np.full((n, n), np.nan)
    if weights is None:
        weights = weigh_scores(design, values, surrogate=config.surrogate)
    for i, row in enumerate(weights):
        directed[i] = row.weights @ values[row.subsets, i]
        others = np.arange(n) != i
        if not others.any():
            continue
        outcomes = oracle.row_outcomes([design.subsets[s] for s in row.subsets], i)
        scores = np.stack([o.nll if config.score == "nll" else o.correct for o in outcomes])  # (seeds, k_i, n_val)
        entries = row.weights @ scores  # (seeds, n, n_val)
        level = entries[:, others].mean(axis=1, keepdims=True)
        _, errors[i] = average_outcomes(entries - level, oracle.validation_groups(i))
    if config.row_scale == "sd":
        errors /= measure_spreads(directed)[:, None]
    return np.asarray(np.sqrt(errors**2 + errors.T**2) / 2)
