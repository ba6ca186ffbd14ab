"""What measured remainders say together: relative errors by distance, the order of the remainder, where it breaks.

In: cells, plain values, one an adapter and point: sums over rows by task, as :class:`~.approximation.Remainder` has
them. Out: plain values with intervals, which are percentile bootstraps over adapters (a subset of tasks and a seed
each); the rows are the same for all points of an adapter. No torch.

Every task counts once in an adapter and every adapter once; R2 pools sums, so that outputs that move far count more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora.seeding import generator_for
from ensemblelora.validation.resampling import Estimate, Units, bootstrap, divide

__all__ = ["VARIANT_KEYS", "describe_law", "find_break", "summarise_cells", "summarise_distances"]

FloatArray = npt.NDArray[np.float64]
Cell = Mapping[str, Any]

VARIANT_KEYS = ("base", "r", "epochs", "precision")
"""what tells one variant's cells from another's"""

_SLOPE_FLOOR = 1e-30


def summarise_cells(
    cells: Sequence[Cell], keys: Sequence[str], *, n_bootstrap: int, confidence: float, seed: int
) -> list[dict[str, Any]]:
    """Average cells that agree in some keys.

    Args:
        cells: Each with ``tasks``: by name, ``missed``, ``moved``, ``size`` and ``n_outputs``.
        keys: Of the cells, such as kind and distance.
        n_bootstrap: Draws behind each interval.
        confidence: Share of draws inside an interval.
        seed: Root of the draws.

    Returns:
        A row for each combination, in the order of their first cells: the keys, ``n_adapters``, the mean ``distance``,
        and estimates ``squared_relative`` (mean of sum e^2 / sum u_X^2, the paper's), ``rms_relative`` (mean of its
        root) and ``r2_over_zero_order`` (1 - sum e^2 / sum (u_X - u*)^2).
    """
    rows = []
    for values, own in _group(cells, keys).items():
        columns = {name: np.array([_read(cell)[name] for cell in own]) for name in _read(own[0])}

        def measure(weights: FloatArray, columns: Mapping[str, FloatArray] = columns) -> dict[str, FloatArray]:
            total = weights.sum(axis=1)
            return {
                "squared_relative": divide(weights @ columns["squared"], total),
                "rms_relative": divide(weights @ columns["root"], total),
                "r2_over_zero_order": 1 - divide(weights @ columns["missed"], weights @ columns["moved"]),
            }

        found = _estimate(measure, own, n_bootstrap=n_bootstrap, confidence=confidence, seed=seed, name=str(values))
        mean = float(np.mean([cell["distance"] for cell in own]))
        rows.append(dict(zip(keys, values, strict=True)) | {"distance": mean, "n_adapters": len(own)} | found)
    return rows


def summarise_distances(
    cells: Sequence[Cell], *, n_bootstrap: int, confidence: float, seed: int
) -> list[dict[str, Any]]:
    """Average how far trained adapters went, by variant, on both denominators (paper, table 2)."""
    ends = [cell for cell in cells if cell["kind"] == "end" and cell["precision"] == "float32"]
    rows = []
    for values, own in _group(ends, VARIANT_KEYS[:3]).items():
        columns = {name: np.array([cell[name] for cell in own]) for name in ("distance", "distance_adapter")}

        def measure(weights: FloatArray, columns: Mapping[str, FloatArray] = columns) -> dict[str, FloatArray]:
            return {name: divide(weights @ column, weights.sum(axis=1)) for name, column in columns.items()}

        found = _estimate(measure, own, n_bootstrap=n_bootstrap, confidence=confidence, seed=seed, name=str(values))
        sd = float(np.std(columns["distance"], ddof=1)) if len(own) > 1 else None
        rows.append(dict(zip(VARIANT_KEYS, values, strict=False)) | {"n_adapters": len(own), "sd": sd} | found)
    return rows


def describe_law(cells: Sequence[Cell], *, n_bootstrap: int, confidence: float, seed: int) -> list[dict[str, Any]]:
    """Say how the remainder grows along straight lines: with the square of the distance, while second order rules.

    Returns:
        For each kind of line, variant and pair of neighbouring distances: ``from`` and ``to``; the estimated
        ``exponent``, slope of the logarithm of the RMS remainder, 2 in theory and 0 where rounding is all there is; and
        ``constant``, the median over adapters of the RMS remainder over the square of the longer distance.
    """
    rows = []
    lines = [cell for cell in cells if cell["kind"] not in ("path", "end") and not cell["is_natural"]]
    for values, own in _group(lines, ("kind", *VARIANT_KEYS)).items():
        by_distance = {distance[0]: part for distance, part in _group(own, ("asked",)).items()}
        for near, far in pairwise(sorted(by_distance)):
            first, second = (_index(by_distance[distance]) for distance in (near, far))
            both = [key for key in first if key in second]
            slopes = np.array([(second[key] - first[key]) / np.log(far / near) for key in both])
            constant = float(np.median([np.exp(second[key]) / far**2 for key in both]))

            def measure(weights: FloatArray, slopes: FloatArray = slopes) -> dict[str, FloatArray]:
                return {"exponent": divide(weights @ slopes, weights.sum(axis=1))}

            found = _estimate(
                measure, both, n_bootstrap=n_bootstrap, confidence=confidence, seed=seed, name=f"{values} {far}"
            )
            head = dict(zip(("kind", *VARIANT_KEYS), values, strict=True))
            rows.append(head | {"from": near, "to": far, "n_adapters": len(both), "constant": constant} | found)
    return rows


def find_break(summary: Iterable[Mapping[str, Any]], level: float) -> float | None:
    """Find the distance at which R2 over the zero-order prediction falls below a level, between two that were measured.

    Args:
        summary: Rows of :func:`summarise_cells` along lines, of one kind and variant.
        level: Such as 0.5.

    Returns:
        Interpolated in the logarithm of the distance; none where it never does.

    Example:
        >>> rows = [{"distance": d, "r2_over_zero_order": {"value": r}} for d, r in ((0.01, 0.9), (0.1, 0.1))]
        >>> round(find_break(rows, 0.5), 4)
        0.0316
    """
    known = [(row["distance"], row["r2_over_zero_order"]["value"]) for row in summary]
    points = sorted((distance, r2) for distance, r2 in known if r2 is not None)
    if points and points[0][1] < level:
        return float(points[0][0])
    for (near, high), (far, low) in pairwise(points):
        if low < level:
            share = (high - level) / (high - low)
            return float(near * (far / near) ** share)
    return None


def _group(cells: Iterable[Cell], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Cell]]:
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[key] for key in keys), []).append(cell)
    return groups


def _read(cell: Cell) -> dict[str, float]:
    """One adapter's numbers at a point."""
    tasks = list(cell["tasks"].values())
    shares = [task["missed"] / task["size"] for task in tasks if task["size"]]
    return {
        "squared": float(np.mean(shares)),
        "root": float(np.mean(np.sqrt(shares))),
        "missed": float(sum(task["missed"] for task in tasks)),
        "moved": float(sum(task["moved"] for task in tasks)),
    }


def _index(cells: Sequence[Cell]) -> dict[tuple[Any, ...], float]:
    """Logarithm of the RMS remainder of each adapter."""
    found = {}
    for cell in cells:
        tasks = cell["tasks"].values()
        mean_square = sum(t["missed"] for t in tasks) / sum(t["n_outputs"] for t in tasks)
        found[tuple(cell["subset"]), cell["seed"]] = 0.5 * float(np.log(max(mean_square, _SLOPE_FLOOR)))
    return found


def _estimate(
    measure: Any, units: Sequence[Any], *, n_bootstrap: int, confidence: float, seed: int, name: str
) -> dict[str, dict[str, float | None]]:
    n = len(units)
    found: dict[str, Estimate] = bootstrap(
        measure,
        [Units(np.arange(n), np.zeros(n, dtype=np.int64))],
        n_bootstrap=n_bootstrap,
        confidence=confidence,
        generator=generator_for(seed, "remainders", name),
    )
    return {key: asdict(estimate) for key, estimate in found.items()}
