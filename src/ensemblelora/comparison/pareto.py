"""Pictures of a comparison's methods: error against cost. No torch.

In: :class:`~.statistics.Statistics`. Out: figures for the page. A method that costs nothing of a kind has no place on a
scale of powers of ten, and is left out of that picture.
"""

from __future__ import annotations

from collections.abc import Callable

from ensemblelora.comparison.record import OURS
from ensemblelora.comparison.statistics import MethodResult, Statistics
from ensemblelora.report.document import Figure
from ensemblelora.report.pareto import BYTES, FLOPS, MEMORY, PASSES, CostAxis, ErrorKind, Point, draw_front

__all__ = ["draw_pareto"]

_AXES: tuple[tuple[CostAxis, Callable[[MethodResult], float]], ...] = (
    (FLOPS, lambda method: method.costs.flops),
    (PASSES, lambda method: method.costs.forward_passes),
    (BYTES, lambda method: method.costs.n_bytes),
    (MEMORY, lambda method: method.costs.peak_memory_bytes),
)


def draw_pareto(found: Statistics) -> tuple[Figure, ...]:
    """Draw error, or where no task has an accuracy loss, against each kind of cost."""
    metric = "accuracy" if any("accuracy" in method.mean for method in found.methods.values()) else "nll"
    methods = [method for method in found.methods.values() if metric in method.mean]
    kind: ErrorKind = "error" if metric == "accuracy" else "loss"
    figures = []
    for axis, read in _AXES:
        points = [_make_point(method, metric, kind, read(method)) for method in methods if read(method) > 0]
        if points:
            figures.append(draw_front(axis, points, kind))
    return tuple(figures)


def _make_point(method: MethodResult, metric: str, kind: ErrorKind, cost: float) -> Point:
    figure = method.mean[metric]
    low, high = (figure.value if end is None else end for end in figure.ends)
    score = (low, figure.value, high)
    return Point.of_score(method.name, method.title, cost, score, kind, is_ours=method.name == OURS)
