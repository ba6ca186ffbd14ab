"""How well predicted values of subsets of tasks agree with truly measured ones.

In: true values ``(n_seeds, n_subsets, n_tasks)``, predictions ``(n_subsets, n_tasks)``, values of the base model. Out:
:class:`Agreement`, plain floats with intervals. A relative error flatters, since a predictor that knows each task's
level has a small one; what grouping needs is within tasks: which partners make this task better or worse. So every
figure stands beside what predicting the base model's value, or the task's mean, would give, and beside the most that
a perfect predictor could reach against truths that carry the noise of their seeds.

Noise is that between seeds. The rows that are scored are the same for all subsets, so their choice shifts a task's
level, not the differences within it. Correction for noise assumes that predictions know nothing of the seeds.

Invariants: the order of subsets changes nothing, nor does the numbering of tasks, but for which draws are drawn. Cost:
``n_bootstrap x n_cells`` numbers, some 50 times over. No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from ensemblelora.errors import DataError
from ensemblelora.seeding import generator_for
from ensemblelora.validation.cells import Cells, FloatArray, IntArray, Subset, collect_cells, find_starts, select_cells
from ensemblelora.validation.moments import NEGLIGIBLE, correlate, estimate_run_variance, rank, spread
from ensemblelora.validation.resampling import Estimate, bootstrap, divide, units_of_subsets
from ensemblelora.validation.signs import OneOrAll, TransferSigns, compare_one_or_all, compare_transfer

__all__ = ["Agreement", "Estimate", "Figures", "OneOrAll", "TransferSigns", "compare_predictions", "describe_cells"]

_UNDEFINED = Estimate(None, None, None)
_ONE_BLOCK = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True)
class Figures:
    """Agreement on some cells; a cell is one task of one subset, f its mean over seeds and f^ its prediction.

    "Within tasks" means after taking off each task's own mean over these cells, of f and of f^; tasks with one cell
    say nothing there. A number that does not exist is none.

    Attributes:
        n_cells: Cells compared.
        n_subsets: Subsets they come from.
        noise_degrees: Degrees of freedom behind the noise, ``sum (seeds of the cell - 1)``.
        relative_error: Mean of ``|f^ - f| / |f|`` (paper, section 2.2), without cells where f is 0.
        rmse: Root of the mean of ``(f^ - f)^2``.
        bias: Mean of ``f^ - f``.
        pearson: Over all cells, levels of tasks included.
        spearman: The same of ranks.
        within_pearson: Within tasks, sums of squares pooled over tasks, so tasks that vary more count more.
        within_spearman: Of ranks within tasks: the tasks' coefficients, weighted by cells, whatever their scales.
        corrected_within_pearson: ``within_pearson / sqrt(reliability)``, cut at -1 and 1: what it would be against
            truths without noise. None without a positive reliability; draws without one count as -1 or 1.
        reliability: 1 - noise variance of f / variance of f, within tasks. None under 5 ``noise_degrees``.
        noise_sd: Of one run, between seeds; a task's is taken to be the same in all cells.
        mean_noise_sd: Of f, the mean over the seeds there are.
        signal_sd: Of f within tasks, without the noise.
        ceiling_within_pearson: Of a perfect predictor, ``sqrt(reliability)``; 0 where that is negative.
        ceiling_r2_over_task_mean: The same of ``r2_over_task_mean``; of ``r2_of_differences`` it is ``reliability``.
        r2_over_base: ``1 - sum (f^ - f)^2 / sum (base - f)^2``.
        r2_over_task_mean: Over the task's mean of these same f, the best constant in hindsight.
        r2_over_other_mean: Over the task's mean of the other cells' f, which has not seen the cell: what knowing the
            truth of all other subsets but nothing of partners gives.
        r2_of_differences: ``r2_over_task_mean`` after each task's mean error is taken off f^.
        slope: b in ``f - task mean = b (f^ - task mean)``, by least squares; 1 is calibrated, below 1 exaggerates.
    """

    n_cells: int
    n_subsets: int
    noise_degrees: int
    relative_error: Estimate
    rmse: Estimate
    bias: Estimate
    pearson: Estimate
    spearman: Estimate
    within_pearson: Estimate
    within_spearman: Estimate
    corrected_within_pearson: Estimate
    reliability: Estimate
    noise_sd: Estimate
    mean_noise_sd: Estimate
    signal_sd: Estimate
    ceiling_within_pearson: Estimate
    ceiling_r2_over_task_mean: Estimate
    r2_over_base: Estimate
    r2_over_task_mean: Estimate
    r2_over_other_mean: Estimate
    r2_of_differences: Estimate
    slope: Estimate


@dataclass(frozen=True)
class Agreement:
    """Predicted against true values.

    Attributes:
        overall: All cells of tasks that are not marked. Between sizes a task varies by its partners and by the mere
            number of rows; the figures of one size show partners alone.
        by_size: The same by subset size.
        per_task: By task index, marked ones included.
        one_or_all: All tasks in one adapter against an adapter each; none where either was not measured.
        transfer: Whether partners help or hurt, overall (key 0) and by subset size; empty where tasks alone were not
            measured.
        marked: Tasks left out of everything but ``per_task``.
        n_bootstrap: Draws behind each interval.
        confidence: Share of draws inside an interval.
    """

    overall: Figures
    by_size: dict[int, Figures]
    per_task: dict[int, Figures]
    one_or_all: OneOrAll | None
    transfer: dict[int, TransferSigns]
    marked: tuple[int, ...]
    n_bootstrap: int
    confidence: float


def compare_predictions(
    truth: npt.ArrayLike,
    predicted: npt.ArrayLike,
    subsets: Sequence[Subset],
    base: npt.ArrayLike,
    *,
    marked: Collection[int] = (),
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Compare predicted with measured values of subsets of tasks, such as losses or accuracies.

    Intervals are percentile bootstraps over subsets, drawn within each size with all their seeds; where a size has
    one subset only, as that of all tasks, its tasks are drawn.

    Args:
        truth: Values after fine-tuning, shape ``(n_seeds, n_subsets, n_tasks)``; NaN where not measured: tasks outside
            the subset, seeds not run.
        predicted: Shape ``(n_subsets, n_tasks)``; read where the truth was measured.
        subsets: Distinct, each a sorted tuple of task indices.
        base: Values of the base model without fine-tuning, shape ``(n_tasks,)``, the zero-order prediction.
        marked: Tasks, such as those at chance, that are reported apart and left out of pooled figures.
        n_bootstrap: Draws behind each interval.
        confidence: Share of draws inside an interval.
        seed: Root seed of the draws.

    Raises:
        DataError: If shapes, subsets or marked tasks are wrong, a subset was measured on a task that is not its own, a
            value that is read is not finite, or nothing was measured.
    """
    cells = collect_cells(truth, predicted, subsets, base)
    n_tasks = np.shape(base)[0]
    unknown = sorted(set(marked) - set(range(n_tasks)))
    if unknown:
        raise DataError(f"marked tasks {unknown}: expected indices from 0 to {n_tasks - 1}")

    def describe(part: Cells, *name: str | int) -> Figures:
        generator = generator_for(seed, "agreement", *name)
        return describe_cells(part, n_bootstrap=n_bootstrap, confidence=confidence, generator=generator)

    pooled = select_cells(cells, ~np.isin(cells.task, sorted(marked)))
    return Agreement(
        overall=describe(pooled, "overall"),
        by_size={
            int(size): describe(select_cells(pooled, pooled.size == size), "size", int(size))
            for size in np.unique(pooled.size)
        },
        per_task={
            int(task): describe(select_cells(cells, cells.task == task), "task", int(task))
            for task in np.unique(cells.task)
        },
        one_or_all=compare_one_or_all(pooled, n_tasks, n_bootstrap=n_bootstrap, confidence=confidence, seed=seed),
        transfer=compare_transfer(pooled, n_bootstrap=n_bootstrap, confidence=confidence, seed=seed),
        marked=tuple(sorted(set(marked))),
        n_bootstrap=n_bootstrap,
        confidence=confidence,
    )


def describe_cells(cells: Cells, *, n_bootstrap: int, confidence: float, generator: np.random.Generator) -> Figures:
    """Return all figures of the given cells, which may be none; arguments as in :func:`compare_predictions`."""
    if not len(cells):
        names = [field.name for field in fields(Figures) if field.name not in ("n_cells", "n_subsets", "noise_degrees")]
        return Figures(n_cells=0, n_subsets=0, noise_degrees=0, **dict.fromkeys(names, _UNDEFINED))
    estimates = bootstrap(
        lambda weights: _measure_levels(cells, weights) | _measure_within(cells, weights),
        [units_of_subsets(cells)],
        n_bootstrap=n_bootstrap,
        confidence=confidence,
        generator=generator,
    )
    if (estimates["reliability"].value or 0.0) <= 0:
        estimates["corrected_within_pearson"] = _UNDEFINED
    return Figures(
        n_cells=len(cells),
        n_subsets=len(np.unique(cells.subset)),
        noise_degrees=int((cells.n_runs - 1).sum()),
        **estimates,
    )


def _measure_levels(cells: Cells, weights: FloatArray) -> dict[str, FloatArray]:
    """Return the figures in which tasks' levels take part, each ``(draws,)``."""
    error = cells.predicted - cells.truth
    squared = weights @ error**2
    total = weights.sum(axis=1)
    is_scale = cells.truth != 0
    relative = np.abs(error) / np.where(is_scale, np.abs(cells.truth), 1.0)
    predicted_rank, true_rank = (rank(weights, values, _ONE_BLOCK) for values in (cells.predicted, cells.truth))
    return {
        "relative_error": divide(weights @ (relative * is_scale), weights @ is_scale),
        "rmse": np.sqrt(divide(squared, total)),
        "bias": divide(weights @ error, total),
        "pearson": correlate(weights, cells.predicted, cells.truth, _ONE_BLOCK),
        "spearman": correlate(weights, predicted_rank, true_rank, _ONE_BLOCK),
        "r2_over_base": 1 - _divide_squares(cells, weights, squared, weights @ (cells.base - cells.truth) ** 2),
    }


def _measure_within(cells: Cells, weights: FloatArray) -> dict[str, FloatArray]:
    """Return the figures within tasks, each ``(draws,)``.

    In sums of squares, a task's mean is that of all cells in every draw: the sums are stationary in it, so to first
    order nothing changes, and a draw's copies of a cell don't make its variance look smaller than it is.
    """
    starts = find_starts(cells.task)
    n_alike = spread(np.diff(starts, append=len(cells)), starts, len(cells))  # cells of the same task
    is_many = n_alike > 1
    truth = _centre_by_task(cells.truth, starts) * is_many
    predicted = _centre_by_task(cells.predicted, starts) * is_many
    squares = weights @ truth**2
    predicted_squares = weights @ predicted**2
    missed = weights @ ((cells.predicted - cells.truth) ** 2 * is_many)
    other = n_alike / np.maximum(n_alike - 1, 1)  # from the mean of all to the mean of the others
    pearson = correlate(weights, cells.predicted, cells.truth, starts)
    predicted_rank, true_rank = (rank(weights, values, starts) for values in (cells.predicted, cells.truth))
    ratio = {
        "r2_over_task_mean": (missed, squares),
        "r2_over_other_mean": (missed, weights @ (truth * other) ** 2),
        "r2_of_differences": (weights @ (predicted - truth) ** 2, squares),
    }
    flat = NEGLIGIBLE * (weights @ cells.predicted**2)
    return {
        "within_pearson": pearson,
        "within_spearman": correlate(weights, predicted_rank, true_rank, starts),
        **{name: 1 - _divide_squares(cells, weights, *parts) for name, parts in ratio.items()},
        "slope": divide(weights @ (predicted * truth), predicted_squares, floor=flat),
        **_measure_noise(cells, weights, n_alike, squares, pearson),
    }


def _measure_noise(
    cells: Cells, weights: FloatArray, n_alike: IntArray, squares: FloatArray, pearson: FloatArray
) -> dict[str, FloatArray]:
    """Return what the noise between seeds is, and what it leaves to explain, each ``(draws,)``.

    A cell's share in the degrees of freedom is ``1 - 1 / n_alike``: that of its squared distance from a mean which it
    is part of. It is so for the truth's variance and for the noise in it alike.

    Args:
        cells: What is compared.
        weights: Shape ``(draws, n_cells)``.
        n_alike: Cells of the same task, ``(n_cells,)``.
        squares: Sums of squares of the truth within tasks, ``(draws,)``.
        pearson: Correlation within tasks, ``(draws,)``.
    """
    run = estimate_run_variance(weights, cells.run_squares, cells.n_runs, find_starts(cells.task))  # (draws, n_cells)
    mean, weight = run / cells.n_runs, weights.sum(axis=1)
    share = weights * (1 - 1 / n_alike)
    degrees = share.sum(axis=1)
    noise = (share * mean).sum(axis=1)
    reliability = 1 - _divide_squares(cells, weights, noise, squares)
    return {
        # As the reliability falls to 0 this is cut at 1 or -1, and stays there for draws below: all is possible then.
        "corrected_within_pearson": np.clip(pearson / np.sqrt(np.maximum(reliability, 1e-12)), -1.0, 1.0),
        "reliability": reliability,
        "noise_sd": np.sqrt(divide((weights * run).sum(axis=1), weight)),
        "mean_noise_sd": np.sqrt(divide((weights * mean).sum(axis=1), weight)),
        "signal_sd": np.sqrt(np.maximum(divide(squares - noise, degrees), 0.0)),
        "ceiling_within_pearson": np.sqrt(np.maximum(reliability, 0.0)),
        "ceiling_r2_over_task_mean": 1
        - _divide_squares(cells, weights, (weights * mean * (n_alike > 1)).sum(axis=1), squares),
    }


def _centre_by_task(values: FloatArray, starts: IntArray) -> FloatArray:
    means = np.add.reduceat(values, starts) / np.diff(starts, append=len(values))
    return np.asarray(values - spread(means, starts, len(values)))


def _divide_squares(cells: Cells, weights: FloatArray, part: FloatArray, whole: FloatArray) -> FloatArray:
    """Return the quotient of sums of squares, NaN where the truth's spread is nothing but rounding errors."""
    return divide(part, whole, floor=NEGLIGIBLE * (weights @ cells.truth**2))
