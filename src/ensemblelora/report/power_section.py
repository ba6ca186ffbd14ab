"""The section on what a run with so many rows can and can't show."""

from __future__ import annotations

import math
from statistics import NormalDist

from scipy.special import stdtrit

from ensemblelora.report.cells import task_cell
from ensemblelora.report.chance import judge_chance
from ensemblelora.report.document import Block, Bullets, Cell, Column, Row, Section, Table
from ensemblelora.report.headline import find_rival, method_label
from ensemblelora.report.records import ResultsRecord, RunRecord, TaskScore
from ensemblelora.report.wording import count, format_number, format_percent

__all__ = ["estimate_detectable_difference", "write_power"]

_POWER = 0.8


def write_power(run: RunRecord) -> Section:
    """Say which differences a run of this size could show, and which it can't."""
    confidence = run.config.evaluation.confidence
    items = _powers_of_plan(run, confidence) + _powers_of_results(run, confidence)
    items.append(
        "The intervals say how much the choice of rows matters. They do not cover other training seeds, prompts or "
        "base models: one run can't show how much those would change."
    )
    blocks: list[Block] = [Bullets(tuple(items))]
    table = _power_table(run, confidence)
    return Section("power", "What a run of this size can and can't show", [*blocks, table] if table else blocks)


def estimate_detectable_difference(
    standard_error: float, *, confidence: float, power: float = _POWER, degrees: float | None = None
) -> float:
    """Estimate the smallest true difference that a two-sided test finds with the given power.

    The usual approximation: (z_{(1 + confidence) / 2} + z_power) standard errors; with few degrees of freedom,
    quantiles of Student's t for those of the normal distribution.

    Args:
        standard_error: Of the measured difference, in its unit.
        confidence: Of the interval that must exclude 0, in (0, 1).
        power: Probability that it does.
        degrees: Of freedom of the standard error; none: as many as make no difference.

    Example:
        >>> round(estimate_detectable_difference(1.0, confidence=0.95), 2)
        2.8
    """
    levels = (1 + confidence) / 2, power
    if degrees is not None:
        return float(sum(stdtrit(degrees, level) for level in levels)) * standard_error
    return sum(NormalDist().inv_cdf(level) for level in levels) * standard_error


def _powers_of_plan(run: RunRecord, confidence: float) -> list[str]:
    chosen = next((point for point in run.plan.curve if point.n_groups == len(run.plan.groups)), None)
    errors = [point.gain_se for point in run.plan.curve if point.n_groups > 1 and point.gain_se]
    error = chosen.gain_se if chosen and chosen.gain_se else min(errors, default=None)
    if error is None:
        return []
    smallest = estimate_detectable_difference(error, confidence=confidence)
    return [
        f"Planning: with these validation rows, a gain in predicted loss under {format_number(smallest)} would be "
        f"missed in more than {1 - _POWER:.0%} of runs."
    ]


def _powers_of_results(run: RunRecord, confidence: float) -> list[str]:
    results = run.results
    if results is None:
        return ["Nothing is trained or tested yet: everything above is a prediction."]
    items = []
    rival = find_rival(run.plan)
    difference = results.find_difference("ensemble", rival, "accuracy")
    if difference is not None and difference.low is not None and difference.high is not None:
        error = _standard_error(difference.low, difference.high, confidence)
        smallest = estimate_detectable_difference(error, confidence=confidence)
        items.append(
            f"Testing: a true difference in mean accuracy of {format_number(100 * smallest, 1)} points between the "
            f"ensemble and {method_label(rival).lower()} would be found in {_POWER:.0%} of runs of this size, a "
            "smaller one less often."
        )
    told = list(judge_chance(results, run.plan.ordered_names).tell())
    if told:
        items.append(f"{' '.join(told)} Such tasks can't say whether grouping helps.")
    return items


def _power_table(run: RunRecord, confidence: float) -> Table | None:
    rival = find_rival(run.plan)
    if run.results is None or not {rival, "ensemble"} <= set(run.results.methods):
        return None
    ours = run.results.methods["ensemble"].per_task
    groups = run.plan.group_by_name
    rows = []
    for name in run.plan.ordered_names:
        error = _difference_error(run.results, rival, name, confidence)
        if error is None:
            continue
        smallest = estimate_detectable_difference(error, confidence=confidence)
        cells = (
            task_cell(name, groups[name]),
            Cell(f"{ours[name].n_examples:,}", _describe_groups(ours[name])),
            Cell(format_percent(ours[name].accuracy)),
            Cell(f"{format_number(100 * smallest, 1)} points", share=min(1.0, smallest)),
        )
        rows.append(Row(cells))
    if not rows:
        return None
    columns = (
        Column("Task", is_number=False),
        Column("Test rows"),
        Column("Accuracy"),
        Column("Smallest visible difference"),
    )
    note = (
        f"Difference in accuracy between the ensemble and {method_label(rival).lower()} that would be found in "
        f"{_POWER:.0%} of runs, from comparing the two row by row where that was done (with one more row on which they "
        "differ than there was), else as if they erred independently."
    )
    return Table("What one task's test rows could show", columns, tuple(rows), note)


def _describe_groups(score: TaskScore) -> str:
    """Say how many independent units the rows fall into, where that differs."""
    if score.n_groups is None or score.n_groups == score.n_examples:
        return ""
    return f"{count(score.n_groups, 'different one')}, others repeat them"


def _difference_error(results: ResultsRecord, rival: str, task: str, confidence: float) -> float | None:
    """Return the standard error of ensemble minus rival; none where the rows can't give one."""
    paired = results.find_difference("ensemble", rival, "accuracy", task)
    score = results.methods["ensemble"].per_task.get(task)
    n_rows = (score.n_groups or score.n_examples) if score else 0
    if paired is not None and n_rows:
        # Few rows on which the two differ, or none, say little about how many there will be: one more is added to them.
        width = 0.0 if paired.low is None or paired.high is None else paired.high - paired.low
        return math.hypot(_standard_error(0.0, width, confidence), 1 / n_rows)
    scores = [results.methods[method].per_task.get(task) for method in ("ensemble", rival)]
    errors = [_accuracy_error(score, confidence) for score in scores]
    return math.hypot(*(error or 0.0 for error in errors)) if all(errors) else None


def _accuracy_error(score: TaskScore | None, confidence: float) -> float | None:
    if score is None or score.accuracy_low is None or score.accuracy_high is None:
        return None
    return _standard_error(score.accuracy_low, score.accuracy_high, confidence)


def _standard_error(low: float, high: float, confidence: float) -> float:
    return (high - low) / (2 * NormalDist().inv_cdf((1 + confidence) / 2))
