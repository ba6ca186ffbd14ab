"""Whether predictions get the signs right: all tasks in one adapter or one each, partners that help or hurt.

In: :class:`~ensemblelora.validation.cells.Cells` of all sizes. Differences are of the values as they came: for a loss,
above 0 means worse than alone. Cost: ``n_bootstrap x n_cells`` numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ensemblelora.seeding import generator_for
from ensemblelora.validation.cells import BoolArray, Cells, FloatArray, find_starts, select_cells
from ensemblelora.validation.moments import estimate_run_variance
from ensemblelora.validation.resampling import Estimate, bootstrap, divide, units_of_subsets, units_of_tasks

__all__ = ["OneOrAll", "TransferSigns", "compare_one_or_all", "compare_transfer"]

_CLEAR = 2.0
_PRIOR_DEGREES = 4.0  # as usual for variances moderated across groups (Smyth 2004)


@dataclass(frozen=True)
class OneOrAll:
    """``f_i([n]) - f_i({i})``: what one adapter for all tasks changes over one adapter per task.

    Attributes:
        tasks: Tasks compared.
        predicted: Each task's predicted difference.
        true: Each task's measured difference.
        predicted_mean: Over tasks; intervals are over tasks, drawn in pairs of predicted and true.
        true_mean: The same of the measured differences.
        mean_error: Predicted less true.
        share_agreeing: Share of tasks whose sign is predicted rightly.
        is_sign_right: Whether the means have the same sign.
    """

    tasks: tuple[int, ...]
    predicted: tuple[float, ...]
    true: tuple[float, ...]
    predicted_mean: Estimate
    true_mean: Estimate
    mean_error: Estimate
    share_agreeing: Estimate
    is_sign_right: bool


@dataclass(frozen=True)
class TransferSigns:
    """Signs of ``f_i(S) - f_i({i})``, whether partners help or hurt, over subsets S of two tasks or more.

    Cells whose true difference is 0 have no sign and are left out; a predicted 0 is wrong.

    Attributes:
        n_cells: Cells with a sign.
        share_agreeing: Share whose sign is predicted rightly.
        share_of_commoner: What always naming the commoner true sign would reach.
        weighted_share: ``share_agreeing``, each cell weighted by ``|true difference| / noise sd`` of that difference;
            none, as what follows, where too few seeds were run twice.
        n_clear: Cells whose true difference is above 2 noise sd.
        clear_share: ``share_agreeing`` of these.
        clear_share_of_commoner: ``share_of_commoner`` of these.
    """

    n_cells: int
    share_agreeing: Estimate
    share_of_commoner: Estimate
    weighted_share: Estimate
    n_clear: int | None
    clear_share: Estimate
    clear_share_of_commoner: Estimate


def compare_one_or_all(
    cells: Cells, n_tasks: int, *, n_bootstrap: int, confidence: float, seed: int
) -> OneOrAll | None:
    """Compare predicted and true differences between all tasks together and each alone.

    Args:
        cells: What was measured; tasks left out don't count, though they were trained with the others.
        n_tasks: Number of all tasks, the size of the full subset.
        n_bootstrap: Draws behind each interval.
        confidence: Share of draws inside an interval.
        seed: Root seed of the draws.

    Returns:
        None where no task was measured both ways.
    """
    together, alone = _pair(cells, cells.size == n_tasks)
    if n_tasks == 1 or not len(together):
        return None
    predicted, true = together.predicted - alone.predicted, together.truth - alone.truth
    columns = {
        "predicted_mean": predicted,
        "true_mean": true,
        "mean_error": predicted - true,
        "share_agreeing": (np.sign(predicted) == np.sign(true)).astype(np.float64),
    }
    estimates = bootstrap(
        lambda weights: {name: divide(weights @ column, weights.sum(axis=1)) for name, column in columns.items()},
        [units_of_tasks(together)],
        n_bootstrap=n_bootstrap,
        confidence=confidence,
        generator=generator_for(seed, "agreement", "one or all"),
    )
    return OneOrAll(
        tasks=tuple(together.task.tolist()),
        predicted=tuple(predicted.tolist()),
        true=tuple(true.tolist()),
        is_sign_right=bool(np.sign(predicted.mean()) == np.sign(true.mean())),
        **estimates,
    )


def compare_transfer(cells: Cells, *, n_bootstrap: int, confidence: float, seed: int) -> dict[int, TransferSigns]:
    """Compare predicted and true signs of what partners change, overall (key 0) and by subset size.

    Intervals draw subsets and tasks at once, since all of a task's differences share its run alone; arguments as in
    :func:`compare_one_or_all`.

    Returns:
        Empty where no task was measured both alone and with others.
    """
    pairs, alone = _pair(cells, cells.size > 1)
    if not len(pairs):
        return {}
    noise = _estimate_noise(cells, pairs, alone)
    found = {}
    for size in (0, *np.unique(pairs.size).tolist()):
        is_kept = (pairs.truth != alone.truth) & ((pairs.size == size) | (size == 0))
        found[size] = _describe(
            select_cells(pairs, is_kept),
            select_cells(alone, is_kept),
            None if noise is None else noise[is_kept],
            n_bootstrap=n_bootstrap,
            confidence=confidence,
            generator=generator_for(seed, "agreement", "transfer", size),
        )
    return found


def _pair(cells: Cells, is_wanted: BoolArray) -> tuple[Cells, Cells]:
    """Return the wanted cells of tasks that were also measured alone, and those lone cells beside them."""
    lone = np.flatnonzero(cells.size == 1)  # ascending in task
    wanted = np.flatnonzero(is_wanted & np.isin(cells.task, cells.task[lone]))
    partner = lone[np.searchsorted(cells.task[lone], cells.task[wanted])]
    return select_cells(cells, wanted), select_cells(cells, partner)


def _estimate_noise(cells: Cells, pairs: Cells, alone: Cells) -> FloatArray | None:
    """Return the noise sd of each difference, from all cells' repeats; none if there are too few."""
    starts, once = find_starts(cells.task), np.ones((1, len(cells)))
    run = estimate_run_variance(once, cells.run_squares, cells.n_runs, starts, prior_degrees=_PRIOR_DEGREES)[0]
    if np.isnan(run).any():
        return None
    by_task = run[starts][np.searchsorted(cells.task[starts], pairs.task)]
    return np.asarray(np.sqrt(by_task * (1 / pairs.n_runs + 1 / alone.n_runs)))


def _describe(
    pairs: Cells,
    alone: Cells,
    noise: FloatArray | None,
    *,
    n_bootstrap: int,
    confidence: float,
    generator: np.random.Generator,
) -> TransferSigns:
    predicted, true = pairs.predicted - alone.predicted, pairs.truth - alone.truth
    is_right = np.sign(predicted) == np.sign(true)
    unknown = np.full(len(pairs), np.nan)
    size = np.abs(true)
    ratio = unknown if noise is None else size / np.maximum(noise, 1e-9 * size.max(initial=0.0))
    is_clear = ratio > _CLEAR

    def measure(weights: FloatArray) -> dict[str, FloatArray]:
        def share(claim: BoolArray, weight: FloatArray) -> FloatArray:
            return divide(weights @ (claim * weight), weights @ weight)

        every = np.ones(len(pairs))
        clear = unknown if noise is None else is_clear.astype(np.float64)
        return {
            "share_agreeing": share(is_right, every),
            "share_of_commoner": share(_is_commoner(true, every), every),
            "weighted_share": share(is_right, ratio),
            "clear_share": share(is_right, clear),
            "clear_share_of_commoner": share(_is_commoner(true, clear), clear),
        }

    estimates = bootstrap(
        measure,
        [units_of_subsets(pairs, split_lone=False), units_of_tasks(pairs)],
        n_bootstrap=n_bootstrap,
        confidence=confidence,
        generator=generator,
    )
    n_clear = None if noise is None else int(is_clear.sum())
    return TransferSigns(n_cells=len(pairs), n_clear=n_clear, **estimates)


def _is_commoner(differences: FloatArray, weight: FloatArray) -> BoolArray:
    is_rise = differences > 0
    return is_rise if weight @ is_rise >= weight @ ~is_rise else ~is_rise
