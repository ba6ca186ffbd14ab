"""Adapters trained on the target's rows and what was chosen, and their test scores, all with the same settings.

In: a pool whose task 0 is the target, and chosen sets by method. Out: :class:`~.record.Final` records and a
:class:`~.record.FinalTable`. Every adapter starts at the base model, takes each of its rows through all epochs, and
keeps the checkpoint with the least loss on the target's validation rows. Methods that chose the same sources share an
adapter. Test rows are read when every adapter is there. Cost: a fine-tuning for each distinct set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora.adapters import THETA0
from ensemblelora.comparison.pool import Pool, Trained, Wish
from ensemblelora.evaluation.evaluate import score_method
from ensemblelora.evaluation.metrics import compare_paired, compute_row_correct
from ensemblelora.prediction import member_nll
from ensemblelora.selection.prospect import Choice, Prospect, unless_nan
from ensemblelora.selection.record import Change, Final, FinalTable

__all__ = ["score_finals", "train_finals"]

FloatArray = npt.NDArray[np.float64]


def train_finals(pool: Pool, prospect: Prospect, chosen: Mapping[str, Choice]) -> tuple[Final, ...]:
    """Fine-tune an adapter for each method, equal sets once, or read it back.

    Args:
        pool: Task 0 is the target, the others are the sources.
        prospect: Says whether the target's rows are in every set.
        chosen: Sources by method.
    """
    subsets = {method: prospect.subset_of(sources) for method, sources in chosen.items()}
    distinct = dict.fromkeys(tasks for tasks in subsets.values() if tasks)
    wishes = [Wish(tuple(tasks), judges=(0,)) for tasks in distinct]
    trained = dict(zip(distinct, pool.train_each(wishes), strict=True))
    return tuple(_describe(method, chosen[method], trained.get(tasks)) for method, tasks in subsets.items())


def score_finals(pool: Pool, finals: Sequence[Final], pairs: Sequence[tuple[str, str]]) -> FinalTable:
    """Score the target's test rows with every adapter, and with the base model (``base``).

    Args:
        pool: Task 0 is the target.
        finals: The adapters.
        pairs: Methods whose difference matters.
    """
    split, config = pool.split(0, "test"), pool.config.evaluation
    names = {"base": THETA0} | {final.method: final.adapter for final in finals}
    with pool.open_tests():
        found = {name: pool.score([name], 0, "test") for name in dict.fromkeys(names.values())}
    scores = {
        method: score_method(
            found[name].values[0].astype(np.float64), found[name], split, config, seed=pool.config.seed
        )
        for method, name in names.items()
    }
    rows: dict[str, dict[str, FloatArray]] = {}
    for method, name in names.items():
        rows[method] = {"nll": member_nll(found[name], split.labels)[0]}
        if split.kind != "sequence":
            correct = compute_row_correct(found[name].values[0], split.labels, split.n_choices)
            rows[method]["accuracy"] = correct.astype(np.float64)
    options: dict[str, Any] = {"n_bootstrap": config.n_bootstrap, "confidence": config.confidence}
    changes = [
        _compare(a, b, metric, rows, split.groups, options | {"seed": pool.config.seed})
        for a, b in pairs
        for metric in rows[a]
    ]
    return FinalTable(scores, tuple(changes))


def _describe(method: str, sources: Choice, trained: Trained | None) -> Final:
    if trained is None:
        return Final(method, sources, THETA0)
    return Final(
        method=method,
        sources=sources,
        adapter=trained.name,
        train_flops=trained.flops,
        train_seconds=trained.seconds,
        n_steps=trained.n_steps,
        validation_nll=trained.validation_nll,
    )


def _compare(
    a: str,
    b: str,
    metric: str,
    rows: Mapping[str, Mapping[str, FloatArray]],
    groups: npt.NDArray[np.int64],
    options: Mapping[str, Any],
) -> Change:
    found = compare_paired(rows[a][metric], rows[b][metric], groups, **options)
    return Change(a, b, metric, found.difference, unless_nan(found.low), unless_nan(found.high))
