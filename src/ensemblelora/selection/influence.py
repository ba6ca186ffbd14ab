"""What each training row does to the target: how much the target's loss would rise if the row were left out.

In: a :class:`~.prospect.Prospect`. Out: :class:`Influence` for each source, row by row. The linear model is fitted to
the target's rows and all sources by the convex fit, whatever ``estimation.method`` is, and every row is taken out to
first order: with H the Hessian of the mean loss plus ridge at the fit w, leaving out row r of N moves w by
``H^-1 g_r / N``, and the loss of validation row v by ``g_v H^-1 g_r / N``.

Cost: one fit, a Hessian (N c d^2) and its factor, 2 N n_val d. Slow twin: fits without the row, in
tests/test_selection_rows.py. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve

from ensemblelora.estimation import TaskFeatures, choose_l2_penalty, compute_clustered_se, fit_subsets
from ensemblelora.estimation.loss import LinearRows, compute_hessian, compute_loss_gradients
from ensemblelora.selection.prospect import Prospect
from ensemblelora.store import FeatureBlock

__all__ = ["Influence", "measure_influence"]

FloatArray = npt.NDArray[np.float64]

_NUMBERS_AT_ONCE = 2**22


@dataclass(frozen=True, eq=False)
class Influence:
    """Rows of one source.

    Attributes:
        source: Its name.
        ids: Where each row comes from.
        values: By how much the target's mean validation loss would rise without the row, nats ``(n,)``; a row that
            harms has a negative one.
        errors: Standard errors over groups of validation rows, ``(n,)``; NaN where all are of one group.
    """

    source: str
    ids: tuple[str, ...]
    values: FloatArray
    errors: FloatArray

    @property
    def share_harmful(self) -> float:
        """Share of rows whose value is below zero."""
        return float((self.values < 0).mean())


def measure_influence(prospect: Prospect) -> tuple[Influence, ...]:
    """Value every training row of every source, and of the target where its rows are in every set.

    Projection seeds are averaged. Rows without features (``gradients.train_fraction``) have no value.

    Args:
        prospect: The target, its sources, and the settings of the fits.
    """
    oracle, tasks = prospect.oracle, prospect.subset_of(prospect.everything)
    by_seed = [_measure(features, tasks, prospect) for features in oracle.replicates]
    found = []
    for place, task in enumerate(tasks):
        block = oracle.replicates[0].train[task]
        values, errors = (np.mean([seed[place][part] for seed in by_seed], axis=0) for part in (0, 1))
        found.append(Influence(oracle.task_names[task], block.ids, values, errors))
    return tuple(found)


def _measure(features: TaskFeatures, tasks: Sequence[int], prospect: Prospect) -> list[tuple[FloatArray, FloatArray]]:
    """Values and errors of each task's rows under one projection seed."""
    train, config = [features.train[i] for i in tasks], prospect.oracle.config.model_copy(update={"method": "ridge"})
    penalty = config.l2_penalty
    if penalty == "auto":
        penalty, _ = choose_l2_penalty(features.train, features.validation, [tuple(tasks)], config, judges=(0,))
    fit = fit_subsets(
        train, [tuple(range(len(train)))], l2_penalty=penalty, max_iter=config.max_iter, tolerance=config.tolerance
    )
    weights, n_rows = fit.weights[0], sum(block.n_examples for block in train)
    hessian = np.eye(weights.size) * fit.penalties[0]
    for block in train:
        hessian += compute_hessian(LinearRows.from_block(block), weights) / n_rows
    wanted = compute_loss_gradients(LinearRows.from_block(features.validation[0]), weights)  # (n_val, d)
    pulls = cho_solve(cho_factor(hessian, lower=True), wanted.T) / n_rows  # (d, n_val)
    return [_judge(block, weights, pulls, prospect.validation_groups) for block in train]


def _judge(
    block: FeatureBlock, weights: FloatArray, pulls: FloatArray, groups: npt.NDArray[np.int64]
) -> tuple[FloatArray, FloatArray]:
    parts = list(_iterate_parts(block, weights, pulls))
    values = np.concatenate([part.mean(axis=1) for part in parts])
    return values, np.concatenate([compute_clustered_se(part, groups) for part in parts])


def _iterate_parts(block: FeatureBlock, weights: FloatArray, pulls: FloatArray) -> Iterator[FloatArray]:
    """Each training row's effect on each validation row, ``(rows, n_val)``, some rows at a time."""
    size = max(1, _NUMBERS_AT_ONCE // max(pulls.shape))
    for start in range(0, block.n_examples, size):
        part = block.take(np.arange(start, min(start + size, block.n_examples)))
        yield compute_loss_gradients(LinearRows.from_block(part), weights) @ pulls
