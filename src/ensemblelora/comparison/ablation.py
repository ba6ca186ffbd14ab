"""What two parts of ours are worth by themselves: the number of groups, and one step of boosting. No torch.

In: records of ``ours-m1``, ``ours-m2`` and so on, whose notes say what the plan expected of the number, and of methods
with boosters, whose notes hold every round. Out: plain values, for the page and for the paper's section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemblelora.comparison.record import OURS, StudyRecord
from ensemblelora.comparison.statistics import ABLATIONS, MethodResult, PairedResult, Statistics
from ensemblelora.validation.moments import correlate, rank

__all__ = ["FirstRound", "GroupNumber", "collect_first_rounds", "collect_numbers", "compare_boosting", "rank_alike"]

_BOOSTED = ("ours-boost-1", OURS)


@dataclass(frozen=True)
class GroupNumber:
    """What came of one number of groups, and what was expected of it; means over seeds.

    Attributes:
        n_groups: The number.
        method: Each task's own group, without boosters or weights.
        validation_nll: Measured.
        predicted_nll: By the oracle, before training; of validation rows that did not choose the groups.
        gain: Of it over one group, predicted.
        density: Mean affinity within groups, the paper's sign of a good number.
        n_chosen: Seeds whose plan has this number.
    """

    n_groups: int
    method: MethodResult
    validation_nll: float
    predicted_nll: float
    gain: float
    density: float
    n_chosen: int


@dataclass(frozen=True)
class FirstRound:
    """One seed's first step of boosting; errors are shares of training rows answered wrongly.

    Attributes:
        seed: Whose.
        tasks: Of the group that was boosted.
        is_kept: Whether held-out loss dropped, so that the booster stayed.
        error_before: None in records that lack it.
        error_after: Likewise.
        nll_before: Mean over the group's training rows.
        nll_after: Likewise.
    """

    seed: int
    tasks: tuple[str, ...]
    is_kept: bool
    error_before: float | None
    error_after: float | None
    nll_before: float
    nll_after: float

    @property
    def error_reduction(self) -> float | None:
        """Relative; none where there was no error to begin with."""
        if not self.error_before or self.error_after is None:
            return None
        return 1 - self.error_after / self.error_before

    @property
    def nll_reduction(self) -> float | None:
        """Relative."""
        return 1 - self.nll_after / self.nll_before if self.nll_before else None


def collect_numbers(study: StudyRecord, found: Statistics) -> list[GroupNumber]:
    """List the numbers of groups that were carried out, rising."""
    numbers = []
    for name, method in found.methods.items():
        records = [record for record in study.of(name) if "planned" in record.notes]
        if records:
            told = [record.notes["planned"] for record in records]
            predicted, gain, density = (
                float(np.mean([plan[key] for plan in told])) for key in ("predicted_nll", "gain", "density")
            )
            numbers.append(
                GroupNumber(
                    n_groups=int(told[0]["n_groups"]),
                    method=method,
                    validation_nll=float(np.mean([record.validation_nll for record in records])),
                    predicted_nll=predicted,
                    gain=gain,
                    density=density,
                    n_chosen=sum(bool(plan["is_chosen"]) for plan in told),
                )
            )
    return sorted(numbers, key=lambda number: number.n_groups)


def collect_first_rounds(study: StudyRecord) -> list[FirstRound]:
    """List each seed's first round of boosting, of ours with one booster, or of ours where that was not carried out."""
    for name in _BOOSTED:
        rounds = [
            FirstRound(
                seed=record.seed,
                tasks=() if record.groups is None else record.groups[first["group"]],
                is_kept=bool(first["accepted"]),
                error_before=first.get("train_error_before"),
                error_after=first.get("train_error_after"),
                nll_before=float(first["train_nll_before"]),
                nll_after=float(first["train_nll_after"]),
            )
            for record in study.of(name)
            for first in record.notes.get("boosting", [])[:1]
        ]
        if rounds:
            return rounds
    return []


def compare_boosting(found: Statistics, metric: str) -> PairedResult | None:
    """Ours with at most one booster against ours without; none where these were not carried out."""
    pairs = (found.find(*pair, metric) for pair in ABLATIONS)
    return next((pair for pair in pairs if pair is not None), None)


def rank_alike(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's correlation; none of fewer than three values, or where one side does not vary.

    Example:
        >>> rank_alike([1.0, 2.0, 3.0], [10.0, 20.0, 15.0])
        0.5
    """
    if len(x) < 3:
        return None
    weights, starts = np.ones((1, len(x))), np.zeros(1, dtype=np.int64)
    first, second = (rank(weights, np.asarray(values, dtype=np.float64), starts) for values in (x, y))
    found = float(correlate(weights, first, second, starts)[0])
    return round(found, 12) if np.isfinite(found) else None
