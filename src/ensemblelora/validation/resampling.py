"""Percentile bootstrap of statistics that are functions of how often each cell counts.

A statistic is written once, for weights ``(draws, n_cells)``: all ones give the estimate, drawn counts its interval.
Seeds travel with their subset: a subset's mean over seeds already differs from another's by their noise, and drawing
seeds again within it counts that noise twice. On simulated runs with three seeds, intervals at 95 % then held the true
RMSE in 57 % of cases, against 88 % with subsets alone. Cost: draws x cells numbers at a time, in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ensemblelora.validation.cells import BoolArray, Cells, FloatArray, IntArray

__all__ = ["Estimate", "Units", "bootstrap", "divide", "units_of_subsets", "units_of_tasks"]

Statistic = Callable[[FloatArray], Mapping[str, FloatArray]]

_MAX_DRAWN_NUMBERS = 2**22
# Fewer: the statistic is so near to undefined that the draws left over say little about it.
_MIN_DEFINED_DRAWS = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its confidence interval; none where it, or they, do not exist."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, eq=False)
class Units:
    """What is drawn with replacement.

    Attributes:
        unit: Each cell's unit, ``(n_cells,)``, from 0.
        stratum: Each unit's stratum, ``(n_units,)``; as many units are drawn from a stratum as it has.
    """

    unit: IntArray
    stratum: IntArray

    @property
    def can_vary(self) -> bool:
        """Whether some stratum has two units to draw from."""
        return len(np.unique(self.stratum)) < len(self.stratum)


def units_of_subsets(cells: Cells, *, split_lone: bool = True) -> Units:
    """Return subsets as units, drawn within their size, since the design fixes how many there are of each size.

    Args:
        cells: What is counted.
        split_lone: Where a size has one subset, as that of all tasks has, draw its tasks instead.
    """
    pairs = np.unique(np.stack([cells.size, cells.subset]), axis=1)
    sizes, counts = np.unique(pairs[0], return_counts=True)
    is_lone = split_lone & np.isin(cells.size, sizes[counts == 1])
    names = np.where(is_lone, cells.subset.max(initial=0) + 1 + np.arange(len(cells)), cells.subset)
    _, first, unit = np.unique(names, return_index=True, return_inverse=True)
    return Units(unit, cells.size[first])


def units_of_tasks(cells: Cells) -> Units:
    """Return tasks as units of one stratum."""
    tasks, unit = np.unique(cells.task, return_inverse=True)
    return Units(unit, np.zeros(len(tasks), dtype=np.int64))


def bootstrap(
    statistic: Statistic,
    factors: Sequence[Units],
    *,
    n_bootstrap: int,
    confidence: float,
    generator: np.random.Generator,
) -> dict[str, Estimate]:
    """Estimate every number of a statistic, with an interval.

    Args:
        statistic: Maps weights ``(draws, n_cells)`` to named numbers ``(draws,)``, NaN where undefined.
        factors: What is drawn. Of several, a cell's weight is the product: drawing subsets and tasks at once allows
            for dependence along both (Owen 2007, the pigeonhole bootstrap), and is rather too wide than too narrow.
        n_bootstrap: Draws; none: no intervals.
        confidence: Share of draws inside an interval.
        generator: Source of the draws.
    """
    n_cells = len(factors[0].unit)
    point = statistic(np.ones((1, n_cells)))
    if not any(units.can_vary for units in factors) or not n_bootstrap:
        return {name: Estimate(_to_float(values[0]), None, None) for name, values in point.items()}
    block = max(1, _MAX_DRAWN_NUMBERS // n_cells)
    draws: dict[str, list[FloatArray]] = {name: [] for name in point}
    for start in range(0, n_bootstrap, block):
        weights = np.ones((min(block, n_bootstrap - start), n_cells))
        for units in factors:
            weights *= _draw_counts(units, len(weights), generator)
        for name, values in statistic(weights).items():
            draws[name].append(values)
    return {
        name: _to_estimate(float(values[0]), np.concatenate(draws[name]), confidence) for name, values in point.items()
    }


def divide(numerator: FloatArray, denominator: FloatArray, *, floor: FloatArray | float = 0.0) -> FloatArray:
    """Return the quotient, NaN where the denominator is not above the floor."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    is_defined: BoolArray = denominator > floor
    return np.asarray(np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=is_defined))


def _draw_counts(units: Units, n_draws: int, generator: np.random.Generator) -> FloatArray:
    counts = np.empty((n_draws, len(units.stratum)))
    for stratum in np.unique(units.stratum):
        members = np.flatnonzero(units.stratum == stratum)
        counts[:, members] = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), n_draws)
    return np.asarray(counts[:, units.unit])


def _to_estimate(value: float, draws: FloatArray, confidence: float) -> Estimate:
    defined = draws[~np.isnan(draws)]
    if np.isnan(value) or len(defined) < _MIN_DEFINED_DRAWS * len(draws):
        return Estimate(_to_float(value), None, None)
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high))


def _to_float(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
