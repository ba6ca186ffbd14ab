"""Which tasks no method is shown to be above chance on, and whether that says something of the methods or of the rows.

Chance is what always answering the most frequent class of the test rows gives; the test is the one of
:func:`~ensemblelora.evaluation.metrics.compute_chance_p_value`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist

from ensemblelora.report.records import ResultsRecord, TaskScore
from ensemblelora.report.wording import join_names

__all__ = ["Chance", "estimate_rows_needed", "judge_chance"]

_LEVEL, _POWER = 0.05, 0.8


@dataclass(frozen=True)
class Chance:
    """Tasks on which no method is shown to be above chance.

    Attributes:
        at_chance: Where no method is right more often than the most frequent class is.
        undecided: Where the rows are too few to tell, and what it would take, as far as that can be said.
    """

    at_chance: tuple[str, ...]
    undecided: Mapping[str, str]

    def __contains__(self, task: object) -> bool:
        """Whether no method is shown to be above chance on a task."""
        return task in self.at_chance or task in self.undecided

    def mark(self, task: str) -> str:
        """What a table says beside a task's name."""
        return "at chance" if task in self.at_chance else "too few rows" if task in self.undecided else ""

    def tell(self) -> Iterator[str]:
        """Say it in sentences; none where every task is decided."""
        if self.at_chance:
            names = join_names(list(self.at_chance))
            yield f"On {names} no method is above what always answering the most frequent class gives."
        if self.undecided:
            needed = [f"{name} ({remark})" if remark else name for name, remark in self.undecided.items()]
            yield (
                "Too few test rows to tell whether a method is above what always answering the most frequent class "
                f"gives: {join_names(needed)}."
            )


def judge_chance(results: ResultsRecord, tasks: Collection[str]) -> Chance:
    """Find the tasks on which no method is known to be above chance, though at least one was tested.

    Args:
        results: Scores of all methods.
        tasks: Those to look at, in the order to name them.
    """
    at_chance, undecided = [], {}
    for task in tasks:
        scores = [method.per_task[task] for method in results.methods.values() if task in method.per_task]
        tested = [score for score in scores if score.is_above_chance is not None]
        if not tested or any(score.is_above_chance for score in tested):
            continue
        best = max(tested, key=lambda score: score.accuracy or 0.0)
        majority, n_units = best.majority or 0.0, best.n_groups or best.n_examples
        could_show = 0.5 ** round((1 - majority) * n_units) < _LEVEL
        if could_show and (best.accuracy or 0.0) <= majority:
            at_chance.append(task)
        else:
            undecided[task] = _say_needed(best, majority, n_units)
    return Chance(tuple(at_chance), undecided)


def estimate_rows_needed(accuracy: float, majority: float) -> int | None:
    """Estimate how many rows the test needs to show an accuracy to be above chance in four of five draws.

    The usual approximation for paired answers (McNemar's test, one-sided, at 5 %), taking the two ways to answer to be
    right independently. Where the accuracy is no higher, what a faultless method would need.

    Args:
        accuracy: Of the method, in [0, 1].
        majority: Of always answering the most frequent class.

    Returns:
        Rows; none where all have one answer.

    Example:
        >>> estimate_rows_needed(0.8, 0.6), estimate_rows_needed(1.0, 0.6), estimate_rows_needed(1.0, 1.0)
        (66, 14, None)
    """
    if majority >= 1:
        return None
    rate = accuracy if accuracy > majority else 1.0
    gain = rate - majority
    differ = rate * (1 - majority) + majority * (1 - rate)
    found, missed = (NormalDist().inv_cdf(level) for level in (1 - _LEVEL, _POWER))
    return math.ceil(((found * math.sqrt(differ) + missed * math.sqrt(differ - gain**2)) / gain) ** 2)


def _say_needed(score: TaskScore, majority: float, n_units: int) -> str:
    """Say how many rows it would take, where groups of rows count once."""
    needed = estimate_rows_needed(score.accuracy or 0.0, majority)
    if needed is None:
        return "all have one answer"
    if needed <= n_units:  # as many should do, had the draw been kinder
        return ""
    rounded = float(f"{needed * score.n_examples / max(1, n_units):.2g}")
    return f"{score.n_examples:,} of about {rounded:,.0f} needed"
