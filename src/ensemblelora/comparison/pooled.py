"""Methods that are draws of one thing, such as random groups, as one method: the mean of the draws. No torch.

A single draw of random groups may be a lucky one; what ours is compared with is what a draw gives in the mean. In: a
:class:`~.record.StudyRecord`. Out: one with a record more for each seed that all draws have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ensemblelora.comparison.record import MethodRecord, StudyRecord

__all__ = ["RANDOM", "RANDOM_OURS", "list_draws", "list_pooled", "pool_draws"]

RANDOM, RANDOM_OURS = "random", "random-ours"
_TITLES: Mapping[str, str] = {
    RANDOM: "random groups, mean of the draws",
    RANDOM_OURS: "random groups with boosting and weights, mean of the draws",
}


def list_draws(name: str, methods: Iterable[str]) -> tuple[str, ...]:
    """List the methods that are draws of a pooled one; of any other, itself.

    Example:
        >>> list_draws("random", ["shared", "random-1", "random-ours-1", "random-2"])
        ('random-1', 'random-2')
    """
    if name not in _TITLES:
        return (name,)
    return tuple(method for method in methods if re.fullmatch(rf"{name}-\d+", method))


def list_pooled(methods: Iterable[str]) -> tuple[str, ...]:
    """List the pooled methods that some methods are draws of."""
    every = tuple(methods)
    return tuple(name for name in _TITLES if list_draws(name, every))


def pool_draws(study: StudyRecord) -> StudyRecord:
    """Add every pooled method's records, a seed each that all of its draws have."""
    pooled = []
    for name in list_pooled(study.methods):
        by_draw = [{record.seed: record for record in study.of(draw)} for draw in list_draws(name, study.methods)]
        seeds = [seed for seed in by_draw[0] if all(seed in records for records in by_draw)]
        pooled += [_average(name, [records[seed] for records in by_draw]) for seed in seeds]
    return replace(study, records=(*study.records, *pooled))


def _average(name: str, draws: Sequence[MethodRecord]) -> MethodRecord:
    """Rows' values and costs in the mean over draws; the highest of their peaks."""
    first = draws[0]
    costs = {key: float(np.mean([draw.costs[key] for draw in draws])) for key in first.costs}
    peaks = {key: max(draw.costs[key] for draw in draws) for key in first.costs if key.endswith("memory_bytes")}
    rates = {draw.learning_rate for draw in draws}
    return replace(
        first,
        identity="",
        method=name,
        title=_TITLES[name],
        learning_rate=rates.pop() if len(rates) == 1 else None,
        trials=(),
        validation_nll=float(np.mean([draw.validation_nll for draw in draws])),
        costs=costs | peaks,
        groups=None,
        notes={"draws": [draw.method for draw in draws]},
        nll={task: _mean([draw.nll[task] for draw in draws]) for task in first.nll},
        correct={task: _average_answers(draws, task) for task in first.correct},
        chance={},
        is_rate_at_edge=any(draw.is_rate_at_edge for draw in draws),
    )


def _average_answers(draws: Sequence[MethodRecord], task: str) -> tuple[float, ...] | None:
    known = [values for draw in draws if (values := draw.correct[task]) is not None]
    return _mean(known) if known else None


def _mean(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(np.mean(rows, axis=0).tolist())
