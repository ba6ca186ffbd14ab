"""Scores of predictions, with intervals that respect rows belonging together.

In: class logits, labels and group codes of one task's rows, plain numpy. Out: frozen records of floats.

Intervals are percentile bootstraps over groups, not rows: rows of one passage or one twin pair are drawn together. Of
an accuracy it is Wilson's, one observation a group: where all of a few rows are right, every draw would say the same.
Every metric here is a function of sums over rows, so one table of group sums gives all metrics of all draws by a
matrix product. Cost: n_bootstrap x n_groups random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.errors import DataError, TrainingError
from ensemblelora.estimation import compute_wilson_interval
from ensemblelora.seeding import generator_for

__all__ = [
    "Difference",
    "TaskScores",
    "compare_paired",
    "compare_paired_tasks",
    "compute_chance_p_value",
    "compute_row_correct",
    "compute_row_nll",
    "resample_means",
    "score_predictions",
    "score_sequences",
]

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]

_CHANCE_LEVEL = 0.05
# Up to so many unequal group sums the sign-flip test enumerates; beyond, its normal limit differs by less than 1e-3.
_MAX_EXACT_GROUPS = 2000
_MAX_DRAWN_NUMBERS = 2**22


@dataclass(frozen=True)
class TaskScores:
    """One method's scores on one task; a number that does not exist is NaN.

    Attributes:
        n_examples: Rows scored.
        n_groups: Groups they fall into, the unit of resampling.
        nll: Mean negative log-likelihood of the right class (for sequences: per answer token), in nats.
        nll_low: Lower end of its interval.
        nll_high: Upper end of its interval.
        accuracy: Share of right answers; for sequences, of exact matches.
        accuracy_low: Lower end of Wilson's interval, with one observation per group.
        accuracy_high: Upper end of its interval.
        macro_f1: Mean F1 over the classes that occur as label or prediction.
        macro_f1_low: Lower end of its interval.
        macro_f1_high: Upper end of its interval.
        majority: Accuracy of always answering the most frequent label of these rows.
        chance_p_value: See :func:`compute_chance_p_value`.
        is_above_chance: Whether that p-value is below 0.05; none for sequences.
    """

    n_examples: int
    n_groups: int
    nll: float
    nll_low: float
    nll_high: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    macro_f1: float
    macro_f1_low: float
    macro_f1_high: float
    majority: float
    chance_p_value: float
    is_above_chance: bool | None


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over the same rows, and its interval."""

    difference: float
    low: float
    high: float


def compute_row_nll(logits: npt.ArrayLike, labels: npt.ArrayLike, n_choices: npt.ArrayLike) -> Array:
    """Return each row's negative log-likelihood of the right class, float64 ``(n,)``, in nats.

    Args:
        logits: Class scores ``(n, K)``; classes past a row's ``n_choices`` are not looked at.
        labels: Right classes ``(n,)``.
        n_choices: Classes each row has ``(n,)``.

    Raises:
        DataError: If shapes disagree, there are no rows, or a label is not below its row's number of classes.
        TrainingError: If a logit that counts is not finite.
    """
    masked, gold = _check_predictions(logits, labels, n_choices)
    return np.asarray(np.logaddexp.reduce(masked, axis=1) - masked[np.arange(len(gold)), gold])


def compute_row_correct(
    logits: npt.ArrayLike, labels: npt.ArrayLike, n_choices: npt.ArrayLike
) -> npt.NDArray[np.bool_]:
    """Return whether each row's highest class is the right one, bool ``(n,)``; a tie goes to the lower class.

    Args and errors are those of :func:`compute_row_nll`.
    """
    masked, gold = _check_predictions(logits, labels, n_choices)
    return np.asarray(masked.argmax(axis=1) == gold)


def score_predictions(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    n_choices: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> TaskScores:
    """Score class predictions of one task.

    Args:
        logits: Class scores ``(n, K)``; classes past a row's ``n_choices`` are not looked at.
        labels: Right classes ``(n,)``.
        n_choices: Classes each row has ``(n,)``.
        groups: Codes of rows that belong together ``(n,)``.
        n_bootstrap: Draws behind each interval.
        confidence: Share of draws inside an interval.
        seed: Root seed of the draws.

    Raises:
        DataError: If shapes disagree, there are no rows, or a label is not below its row's number of classes.
        TrainingError: If a logit that counts is not finite.
    """
    masked, gold = _check_predictions(logits, labels, n_choices)
    guesses = masked.argmax(axis=1)
    correct = guesses == gold
    columns = (compute_row_nll(logits, labels, n_choices), correct, *_count_by_class(guesses, gold, masked.shape[1]))
    table = _sum_by_group(columns, groups)
    p_value = compute_chance_p_value(correct, gold, groups)
    return TaskScores(
        n_examples=len(gold),
        n_groups=len(table),
        **_with_intervals(table, n_bootstrap, confidence, seed),
        majority=float(np.bincount(gold).max() / len(gold)),
        chance_p_value=p_value,
        is_above_chance=p_value < _CHANCE_LEVEL,
    )


def score_sequences(
    nll: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    exact_match: npt.ArrayLike | None = None,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> TaskScores:
    """Score free-text answers of one task.

    Args:
        nll: Each example's mean negative log-likelihood per answer token ``(n,)``, in nats.
        groups: Codes of examples that belong together ``(n,)``.
        exact_match: Whether each generated answer is the right one ``(n,)``; none: accuracy is NaN.
        n_bootstrap: Draws behind each interval.
        confidence: Share of draws inside an interval.
        seed: Root seed of the draws.

    Returns:
        Scores with macro-F1 and chance level NaN, and ``is_above_chance`` none.

    Raises:
        DataError: If shapes disagree or there are no rows.
        TrainingError: If a likelihood is not finite.
    """
    losses = _check_rows("nll", nll, groups)
    matches = np.full(len(losses), np.nan) if exact_match is None else np.asarray(exact_match, dtype=np.float64)
    if matches.shape != losses.shape:
        raise DataError(f"exact_match has shape {matches.shape}, expected {losses.shape}, one per example")
    table = _sum_by_group((losses, matches), groups)
    return TaskScores(
        n_examples=len(losses),
        n_groups=len(table),
        **_with_intervals(table, n_bootstrap, confidence, seed),
        majority=np.nan,
        chance_p_value=np.nan,
        is_above_chance=None,
    )


def compare_paired(
    row_values_a: npt.ArrayLike,
    row_values_b: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Compare two methods on the same rows of one task: mean of a - b, interval clustered by group.

    Args:
        row_values_a: The first method's value on each row ``(n,)``, such as its NLL or whether it was right.
        row_values_b: The second method's.
        groups: Codes of rows that belong together ``(n,)``.
        n_bootstrap: Draws behind the interval.
        confidence: Share of draws inside the interval.
        seed: Root seed of the draws.

    Raises:
        DataError: If shapes disagree or there are no rows.
        TrainingError: If a value is not finite.
    """
    return compare_paired_tasks(
        [row_values_a], [row_values_b], [groups], n_bootstrap=n_bootstrap, confidence=confidence, seed=seed
    )


def compare_paired_tasks(
    row_values_a: Sequence[npt.ArrayLike],
    row_values_b: Sequence[npt.ArrayLike],
    groups: Sequence[npt.ArrayLike],
    *,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Compare two methods on several tasks: the mean over tasks of each task's mean of a - b.

    Every task counts once, whatever its number of rows, and is resampled on its own. The arguments are sequences
    over tasks of what :func:`compare_paired` takes.

    Raises:
        DataError: If shapes disagree, or there are no tasks or no rows.
        TrainingError: If a value is not finite.
    """
    if not row_values_a:
        raise DataError("no task to compare; expected at least one")
    points, draws = [], []
    for i, (a, b, codes) in enumerate(zip(row_values_a, row_values_b, groups, strict=True)):
        first, second = _check_rows("first values", a, codes), _check_rows("second values", b, codes)
        table = _sum_by_group((first - second,), codes)
        points.append(_from_sums(table.sum(axis=0, keepdims=True))[0, 0])
        draws.append(_bootstrap(table, n_bootstrap, seed, i)[:, 0])
    low, high = np.quantile(np.mean(draws, axis=0), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(difference=float(np.mean(points)), low=float(low), high=float(high))


def resample_means(
    columns: npt.ArrayLike, groups: npt.ArrayLike, *, n_bootstrap: int = 2000, seed: int = 0, task: int = 0
) -> Array:
    """Average columns ``(n, c)`` of one task's rows over draws of its groups, as :func:`compare_paired_tasks` draws.

    Args:
        columns: Each row's value under each of c methods.
        groups: Codes of rows that belong together ``(n,)``.
        n_bootstrap: Draws of groups with replacement.
        seed: Root seed of the draws.
        task: The task's place among those that are compared.

    Returns:
        Means ``(n_bootstrap, c)``; NaN where there is only one group to draw from.
    """
    table = _sum_by_group(list(np.asarray(columns, dtype=np.float64).T), groups)
    sums = _draw_sums(table, n_bootstrap, seed, task)
    return sums[:, 1:] / (sums[:, :1] if len(table) > 1 else np.nan)


def compute_chance_p_value(correct: npt.ArrayLike, labels: npt.ArrayLike, groups: npt.ArrayLike) -> float:
    """Return the one-sided p-value of being right more often than the most frequent label is.

    A sign-flip test on the groups' sums of ``correct - (label is the majority)``: under the null hypothesis each
    group's sum is as likely to be turned. With single rows it is McNemar's exact test. Pairing with the constant
    answer on the same rows accounts for the majority itself being an estimate; taking the majority of the scored
    rows, not of the training rows, favours the constant. Exact for up to 2,000 groups that differ, normal beyond.

    Args:
        correct: Whether each row's answer is right ``(n,)``.
        labels: Right classes ``(n,)``.
        groups: Codes of rows that belong together ``(n,)``.
    """
    gold = np.asarray(labels, dtype=np.int64)
    is_majority = gold == np.bincount(gold).argmax()
    sums = _sum_by_group((np.asarray(correct, dtype=np.float64) - is_majority,), groups)[:, 1]
    steps = np.abs(np.rint(sums)).astype(np.int64)
    steps, observed = steps[steps > 0], int(np.rint(sums.sum()))
    if len(steps) > _MAX_EXACT_GROUPS:
        correction = int(np.gcd.reduce(steps))  # half the distance between neighbouring sums
        return 0.5 * math.erfc((observed - correction) / math.sqrt(2 * float((steps**2).sum())))
    total = int(steps.sum())
    mass = np.zeros(2 * total + 1)  # probability of each sum in -total..total
    mass[total] = 1.0
    for step in steps:
        mass = 0.5 * (np.roll(mass, step) + np.roll(mass, -step))
    return float(min(mass[total + observed :].sum(), 1.0))


def _check_predictions(logits: npt.ArrayLike, labels: npt.ArrayLike, n_choices: npt.ArrayLike) -> tuple[Array, Codes]:
    """Return the logits with absent classes at -inf, and the labels."""
    z, gold, counts = np.array(logits, dtype=np.float64), np.asarray(labels), np.asarray(n_choices)
    if z.ndim != 2 or not len(z) or gold.shape != z.shape[:1] or counts.shape != z.shape[:1]:
        raise DataError(
            f"logits {z.shape}, labels {gold.shape}, n_choices {counts.shape}: expected (n, K), (n,), (n,) with n > 0"
        )
    if ((gold < 0) | (gold >= counts) | (counts > z.shape[1])).any():
        raise DataError(f"a label is not below its row's number of classes, or that is above {z.shape[1]}")
    absent = np.arange(z.shape[1]) >= counts[:, None]
    broken = ~np.isfinite(np.where(absent, 0.0, z)).all(axis=1)
    if broken.any():
        raise TrainingError(
            f"logits of row {int(broken.argmax())} are not finite: the model diverged; lower training.learning_rate"
        )
    z[absent] = -np.inf
    return z, gold.astype(np.int64)


def _check_rows(name: str, values: npt.ArrayLike, groups: npt.ArrayLike) -> Array:
    rows, codes = np.asarray(values, dtype=np.float64), np.asarray(groups)
    if rows.ndim != 1 or not len(rows) or codes.shape != rows.shape:
        raise DataError(f"{name} {rows.shape} and groups {codes.shape}: expected (n,) and (n,) with n > 0")
    if not np.isfinite(rows).all():
        raise TrainingError(f"{name} of row {int((~np.isfinite(rows)).argmax())} is not finite: the model diverged")
    return rows


def _count_by_class(guesses: Codes, gold: Codes, n_classes: int) -> tuple[Array, Array]:
    """Return, for each row and class, twice the true positives and guesses plus labels: F1 is their sums' ratio."""
    eye = np.eye(n_classes)
    return 2 * eye[guesses] * eye[gold], eye[guesses] + eye[gold]


def _sum_by_group(columns: Sequence[npt.ArrayLike], groups: npt.ArrayLike) -> Array:
    """Return sums over each group's rows, ``(n_groups, 1 + columns)``; the first column counts rows."""
    codes = np.unique(np.asarray(groups), return_inverse=True)[1]
    rows = np.column_stack([np.ones(len(codes)), *(np.asarray(column, dtype=np.float64) for column in columns)])
    table = np.zeros((int(codes.max()) + 1, rows.shape[1]))
    np.add.at(table, codes, rows)
    return table


def _from_sums(sums: Array) -> Array:
    """Turn sums ``(draws, 1 + columns)`` into metrics: mean of each of the first columns, then macro-F1.

    Columns past nll and accuracy come in two halves, numerators and denominators of the classes' F1; a class that is
    neither label nor guess in a draw does not count there.
    """
    means = sums[:, 1:3] / sums[:, :1]
    if sums.shape[1] <= 3:
        return means
    hits, marks = np.split(sums[:, 3:], 2, axis=1)
    f1 = np.divide(hits, marks, out=np.zeros_like(hits), where=marks > 0)
    return np.column_stack([means, f1.sum(axis=1) / (marks > 0).sum(axis=1)])


def _bootstrap(table: Array, n_bootstrap: int, seed: int, *names: int) -> Array:
    """Return the metrics of draws of groups with replacement; NaN where there is only one group to draw from."""
    drawn = _from_sums(_draw_sums(table, n_bootstrap, seed, *names))
    return drawn if len(table) > 1 else np.full_like(drawn, np.nan)


def _draw_sums(table: Array, n_bootstrap: int, seed: int, *names: int) -> Array:
    """Add up groups drawn with replacement, ``(n_bootstrap, 1 + columns)``."""
    n_groups = len(table)
    rng = generator_for(seed, "bootstrap", n_groups, *names)
    draws = []
    for size in _block_sizes(n_bootstrap, max(1, _MAX_DRAWN_NUMBERS // n_groups)):
        drawn = rng.integers(0, n_groups, (size, n_groups)) + n_groups * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n_groups).reshape(size, n_groups)
        draws.append(counts @ table)
    return np.concatenate(draws)


def _block_sizes(total: int, largest: int) -> list[int]:
    return [min(largest, total - start) for start in range(0, total, largest)]


def _with_intervals(table: Array, n_bootstrap: int, confidence: float, seed: int) -> dict[str, float]:
    """Return each metric and the ends of its interval, by the names of :class:`TaskScores`."""
    point = _from_sums(table.sum(axis=0, keepdims=True))[0]
    ends = np.quantile(_bootstrap(table, n_bootstrap, seed), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    names = ("nll", "accuracy", "macro_f1")
    columns = np.full((3, len(names)), np.nan)
    columns[:, : len(point)] = point, *ends
    if len(table) > 1 and np.isfinite(point[1]):
        columns[1:, 1] = compute_wilson_interval(float(point[1]), len(table), confidence)
    return {
        f"{name}{end}": float(columns[row, k])
        for k, name in enumerate(names)
        for row, end in enumerate(("", "_low", "_high"))
    }
