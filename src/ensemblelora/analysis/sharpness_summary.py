"""From measured adapters to what the study of sharpness says: changes against a reference, and correlations. No torch.

In: :class:`Point`, an adapter or ensemble of one task and seed each. Out: plain values for ``result.json``.
Adapters of different tasks differ in loss and sharpness for reasons of the task: everything is compared within tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ensemblelora.analysis.generalization import (
    GapChange,
    RowLosses,
    average_losses,
    compare_gaps,
    correlate_within,
    gap_of,
    measure_gap,
)
from ensemblelora.analysis.outofdomain import Shifted, relate_to_targets
from ensemblelora.validation.resampling import Estimate

__all__ = ["ALL", "MEASURES", "Point", "read_measures", "summarise"]

ALL = "all"
"""the scope of every adapter, each once, and the name of the mean over tasks"""

MEASURES: Mapping[str, tuple[str, str]] = {
    "largest trace": ("adapter", "greatest"),
    "mean trace": ("adapter", "mean"),
    "largest GGN trace": ("adapter", "greatest_ggn"),
    "largest eigenvalue": ("adapter", "largest_eigenvalue"),
    "largest trace, rescaled": ("adapter", "greatest_rescaled"),
    "largest trace, first member": ("adapter", "first_greatest"),
    "largest trace of the weights": ("weights", "greatest"),
    "mean trace of the weights": ("weights", "mean"),
}
"""coordinates, and the field of :class:`~.sharpness.Sharpness`"""
_ERROR_OF = {"greatest": "greatest_se", "mean": "mean_se"}
_PAPER_RANK = 16
_NORMAL = 1.959964
"""half the width of a 95 % interval in standard errors"""


@dataclass(frozen=True)
class Point:
    """An adapter or ensemble of one task and seed.

    Attributes:
        part: The study.
        label: How it was made.
        size: What the study varies.
        scaling: The rule for lora_alpha, or nothing.
        task: What it was trained on.
        seed: Of its first member.
        members: Names of its adapters.
        losses: Of single rows.
        accuracy: On the test rows.
        sharpness: By coordinates, the fields of :class:`~.sharpness.Sharpness`.
        targets: By name of a task not trained on, ``nll`` and ``base_nll``.
    """

    part: str
    label: str
    size: float
    scaling: str
    task: str
    seed: int
    members: tuple[str, ...]
    losses: RowLosses
    accuracy: float
    sharpness: Mapping[str, Mapping[str, Any]]
    targets: Mapping[str, Mapping[str, float]]

    @property
    def scope(self) -> str:
        """The study, and its rule for lora_alpha where it has several."""
        return f"{self.part}, {self.scaling}" if self.part == "rank" else self.part


def summarise(points: Sequence[Point], *, n_bootstrap: int, confidence: float, seed: int) -> dict[str, Any]:
    """Turn points into tables.

    Args:
        points: Of any studies, tasks and seeds; those of one task were measured on the same rows.
        n_bootstrap: Draws behind the intervals of gaps and correlations.
        confidence: Share of them inside.
        seed: Their root.

    Returns:
        ``points``; ``changes`` of gap and sharpness against each study's reference, by task and in the mean;
        ``correlations`` of sharpness with the gap; ``out_of_domain``.
    """
    draw: dict[str, Any] = {"n_bootstrap": n_bootstrap, "confidence": confidence, "seed": seed}
    return {
        "points": [_write_point(point, draw) for point in points],
        "changes": [change for scope in _list_scopes(points) for change in _list_changes(points, scope, draw)],
        "correlations": _correlate(points, draw),
        "out_of_domain": relate_to_targets(_list_shifted(points), **draw),
        "confidence": confidence,
    }


def read_measures(sharpness: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Give every measure of sharpness that there is, by its name in :data:`MEASURES`."""
    found = {name: sharpness.get(place, {}).get(key) for name, (place, key) in MEASURES.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _write_point(point: Point, draw: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in asdict(point).items() if name != "losses"}
    return {**plain, "scope": point.scope, **asdict(measure_gap(point.losses, **draw))}


def _list_scopes(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.scope for point in points))


def _list_changes(points: Sequence[Point], scope: str, draw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every variant of a scope against its references, by task and in the mean over tasks; seeds averaged."""
    own = [point for point in points if point.scope == scope]
    labels, tasks = (list(dict.fromkeys(getattr(point, name) for point in own)) for name in ("label", "task"))
    found = []
    for reference in _choose_references(own):
        for task in (*tasks, ALL) if len(tasks) > 1 else tasks:
            chosen = tasks if task == ALL else [task]
            for label in labels:
                one, other = (_collect(own, name, chosen) for name in (label, reference))
                change = compare_gaps(*([_average(some) for some in cells] for cells in (one, other)), **draw)
                found.append(_write_change(scope, task, label, reference, one, other, change))
    return found


def _choose_references(own: Sequence[Point]) -> list[str]:
    """What a study's variants are compared with: the paper's best rank; one and two adapters; LoRA; or the first."""
    wanted = {"rank": (_PAPER_RANK,), "ensemble": (1, 2), "quantization": (16,)}.get(own[0].part, ())
    found = [point.label for size in wanted for point in own if point.size == size]
    return list(dict.fromkeys(found)) or [own[0].label]


def _collect(own: Sequence[Point], label: str, tasks: Sequence[str]) -> list[list[Point]]:
    """Points of a variant, all seeds of each task."""
    return [[point for point in own if (point.label, point.task) == (label, task)] for task in tasks]


def _average(points: Sequence[Point]) -> RowLosses:
    return average_losses([point.losses for point in points])


def _write_change(
    scope: str,
    task: str,
    label: str,
    reference: str,
    one: Sequence[Sequence[Point]],
    other: Sequence[Sequence[Point]],
    change: GapChange,
) -> dict[str, Any]:
    gaps = [float(np.mean([gap_of(_average(points)) for points in cells])) for cells in (one, other)]
    return {
        "scope": scope,
        "task": task,
        "label": label,
        "size": one[0][0].size,
        "reference": reference,
        "gap": gaps[0],
        "reference_gap": gaps[1],
        "gap_seed_sd": _spread(one),
        "gap_change": asdict(change.difference),
        "relative_gap_change": change.relative and asdict(change.relative),
        "sharpness_changes": {
            name: asdict(found) for name in MEASURES if (found := _compare_measure(one, other, name)) is not None
        },
    }


def _spread(cells: Sequence[Sequence[Point]]) -> float | None:
    """Standard deviation over seeds of the mean gap over tasks."""
    seeds = sorted({point.seed for points in cells for point in points})
    if len(seeds) < 2:
        return None
    gaps = [np.mean([gap_of(p.losses) for points in cells for p in points if p.seed == seed]) for seed in seeds]
    return float(np.std(gaps, ddof=1))


def _compare_measure(one: Sequence[Sequence[Point]], other: Sequence[Sequence[Point]], name: str) -> Estimate | None:
    """Mean over tasks of a measure's relative change; its interval holds the error of the random vectors alone."""
    ratios, variances = [], []
    for points, references in zip(one, other, strict=True):
        (value, error), (base, base_error) = (_average_measure(some, name) for some in (points, references))
        if value is None or base is None or base <= 0:
            return None
        ratios.append(value / base)
        variances.append((error / base) ** 2 + (base_error * value / base**2) ** 2)
    ratio, half = float(np.mean(ratios)), _NORMAL * float(np.sqrt(np.sum(variances))) / len(ratios)
    has_error = MEASURES[name][1] in _ERROR_OF
    return Estimate(ratio - 1, ratio - 1 - half if has_error else None, ratio - 1 + half if has_error else None)


def _average_measure(points: Sequence[Point], name: str) -> tuple[float | None, float]:
    """A measure's mean over seeds, and the standard error that random vectors give it."""
    place, key = MEASURES[name]
    records = [point.sharpness.get(place, {}) for point in points]
    values = [float(record[key]) for record in records if record.get(key) is not None]
    if len(values) < len(records):
        return None, 0.0
    errors = [float(record.get(_ERROR_OF.get(key, ""), 0.0)) for record in records]
    return float(np.mean(values)), float(np.sqrt(np.sum(np.square(errors)))) / len(errors)


def _correlate(points: Sequence[Point], draw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Sharpness, and what is varied, against the gap: within every scope, and over all adapters."""
    scopes = {scope: [point for point in points if point.scope == scope] for scope in _list_scopes(points)}
    if len(scopes) > 1:
        scopes[ALL] = _list_distinct(points)
    found = []
    for scope, own in scopes.items():
        measures = [read_measures(point.sharpness) for point in own]
        names = [name for name in MEASURES if all(name in one for one in measures)]
        columns = {name: [one[name] for one in measures] for name in names}
        if scope != ALL:
            columns["size"] = [point.size for point in own]
        for name, values in columns.items():
            gaps, tasks = [gap_of(point.losses) for point in own], [point.task for point in own]
            related = correlate_within(values, gaps, tasks, [_name_unit(point) for point in own], **draw)
            found.append({"scope": scope, "measure": name, "outcome": "gap"} | asdict(related))
    return found


def _list_distinct(points: Sequence[Point]) -> list[Point]:
    """Every adapter or ensemble once, whichever studies it is part of."""
    return list({(point.members, point.task): point for point in reversed(points)}.values())


def _list_shifted(points: Sequence[Point]) -> list[Shifted]:
    return [
        Shifted(
            source=point.task,
            target=target,
            unit=_name_unit(point),
            measures=read_measures(point.sharpness)
            | {"gap": gap_of(point.losses), "own test loss": float(np.mean(point.losses.test))},
            nll=losses["nll"],
            base_nll=losses["base_nll"],
        )
        for point in _list_distinct(points)
        for target, losses in point.targets.items()
    ]


def _name_unit(point: Point) -> str:
    return f"{point.part} {point.label}"
