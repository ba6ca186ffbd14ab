"""Section 2.1 of the paper, first part: pairs of tasks that are trained together to worse than apart.

In: true fine-tunings of all single tasks and pairs. Out: counts. The paper counts pairs, of 45; its rates of positive
transfer in appendix B.6 give the same counts if each of a pair's two tasks counts half, which is what is done here.
Beside it stands how many pairs are worse in the mean of their two tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from ensemblelora.validation.records import TrueRun

__all__ = ["count_worse_pairs"]


def count_worse_pairs(runs: Sequence[TrueRun]) -> Mapping[str, float] | None:
    """Count pairs with a higher mean validation loss than their tasks have alone, seeds averaged.

    Args:
        runs: Fine-tunings of any subsets.

    Returns:
        ``pairs`` measured, ``worse`` by half a pair for each task, ``worse_in_mean`` of both tasks; none where no pair
        has both of its singles.
    """
    losses = _average(runs)
    tasks = sorted({subset[0] for subset in losses if len(subset) == 1})
    worse, worse_in_mean, n_pairs = 0.0, 0, 0
    for pair in combinations(tasks, 2):
        together = losses.get(pair)
        if together is None:
            continue
        rises = [together[task] - losses[task,][task] for task in pair]
        n_pairs += 1
        worse += sum(rise > 0 for rise in rises) / 2
        worse_in_mean += sum(rises) > 0
    return {"pairs": n_pairs, "worse": worse, "worse_in_mean": worse_in_mean} if n_pairs else None


def _average(runs: Sequence[TrueRun]) -> dict[tuple[str, ...], dict[str, float]]:
    """Mean validation loss of each task under each subset, over seeds."""
    found: dict[tuple[str, ...], list[TrueRun]] = {}
    for run in runs:
        found.setdefault(tuple(sorted(run.tasks)), []).append(run)
    return {
        subset: {task: float(np.mean([np.mean(run.nll[task]) for run in same])) for task in subset}
        for subset, same in found.items()
    }
