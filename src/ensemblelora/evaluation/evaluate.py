"""The final table: every method on the same test rows, with intervals clustered by group.

In: combined scores of each method per task and the test splits they belong to. Out: plain dicts for
``results.json``. Test data is read here and nowhere before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora.config import EvaluationConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.evaluation.metrics import (
    TaskScores,
    compare_paired,
    compare_paired_tasks,
    compute_row_correct,
    compute_row_nll,
    score_predictions,
    score_sequences,
)
from ensemblelora.evaluation.rows import TaskRows
from ensemblelora.prediction import MemberScores

__all__ = ["collect_rows", "compare_methods", "score_method"]

Array = npt.NDArray[np.float64]


def score_method(
    scores: Array,
    layout: MemberScores,
    encoded: EncodedSplit,
    config: EvaluationConfig,
    *,
    seed: int,
    exact: npt.NDArray[np.bool_] | None = None,
) -> TaskScores:
    """Score one method on one task.

    Args:
        scores: ``(n_rows, K)`` class scores, or log-probabilities of the right tokens for free text.
        layout: Says which example each row belongs to.
        encoded: The test split.
        config: Number of bootstrap draws, confidence.
        seed: The run's root seed.
        exact: For free text: whether each generated answer is the reference.
    """
    options: dict[str, Any] = {"n_bootstrap": config.n_bootstrap, "confidence": config.confidence, "seed": seed}
    if encoded.kind == "sequence":
        return score_sequences(_example_nll(scores, layout, encoded), encoded.groups, exact_match=exact, **options)
    return score_predictions(scores, encoded.labels, encoded.n_choices, encoded.groups, **options)


def compare_methods(
    scores: Mapping[str, Sequence[Array]],
    layouts: Sequence[MemberScores],
    splits: Sequence[EncodedSplit],
    config: EvaluationConfig,
    *,
    seed: int,
    exact: Mapping[str, Mapping[int, npt.NDArray[np.bool_]]],
) -> dict[str, Any]:
    """Build the table and the paired differences.

    Args:
        scores: Method -> one array per task.
        layouts: One per task.
        splits: The test splits.
        config: Bootstrap settings.
        seed: The run's root seed.
        exact: Method -> task index -> exact matches, for free-text tasks.

    Returns:
        ``methods`` (per task and mean), and ``differences`` of each pair of methods (per task, and mean over tasks).
        Accuracy of free text is the share of exact matches.
    """
    methods: dict[str, Any] = {}
    rows: dict[str, list[dict[str, Array]]] = {}
    for name, values in scores.items():
        matches = [exact.get(name, {}).get(task) for task in range(len(splits))]
        every = list(zip(values, layouts, splits, matches, strict=True))
        found = [score_method(*task[:3], config, seed=seed, exact=task[3]) for task in every]
        per_task = {
            split.task: {"kind": split.kind} | _without_nan(asdict(result))
            for split, result in zip(splits, found, strict=True)
        }
        methods[name] = {"per_task": per_task, "mean": _means(found)}
        rows[name] = [_row_values(*task) for task in every]
    differences = [
        difference
        for a, b in combinations(reversed(list(scores)), 2)
        for difference in _differences(a, b, rows, splits, config, seed)
    ]
    return {"methods": methods, "differences": differences}


def collect_rows(
    scores: Mapping[str, Sequence[Array]],
    layouts: Sequence[MemberScores],
    splits: Sequence[EncodedSplit],
    exact: Mapping[str, Mapping[int, npt.NDArray[np.bool_]]],
) -> dict[str, TaskRows]:
    """Say what each method gave on each row; the arguments are those of :func:`compare_methods`."""
    return {
        split.task: TaskRows(
            split.ids,
            split.labels,
            split.groups,
            {name: _row_values(own[i], layout, split, exact.get(name, {}).get(i)) for name, own in scores.items()},
        )
        for i, (layout, split) in enumerate(zip(layouts, splits, strict=True))
    }


def _differences(
    a: str,
    b: str,
    rows: Mapping[str, Sequence[Mapping[str, Array]]],
    splits: Sequence[EncodedSplit],
    config: EvaluationConfig,
    seed: int,
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    options: dict[str, Any] = {"n_bootstrap": config.n_bootstrap, "confidence": config.confidence, "seed": seed}
    for metric in ("nll", "accuracy"):
        head = {"a": a, "b": b, "metric": metric}
        known = [i for i in range(len(splits)) if metric in rows[a][i] and metric in rows[b][i]]
        first, second = ([rows[method][i][metric] for i in known] for method in (a, b))
        groups = [splits[i].groups for i in known]
        for i, *pair in zip(known, first, second, groups, strict=True):
            found.append(head | {"task": splits[i].task} | _without_nan(asdict(compare_paired(*pair, **options))))
        if known:
            overall = compare_paired_tasks(first, second, groups, **options)
            found.append(head | {"task": None} | _without_nan(asdict(overall)))
    return found


def _row_values(
    scores: Array, layout: MemberScores, split: EncodedSplit, exact: npt.NDArray[np.bool_] | None
) -> dict[str, Array]:
    if split.kind == "sequence":
        losses = {"nll": _example_nll(scores, layout, split)}
        return losses if exact is None else losses | {"accuracy": exact.astype(np.float64)}
    return {
        "nll": compute_row_nll(scores, split.labels, split.n_choices),
        "accuracy": compute_row_correct(scores, split.labels, split.n_choices).astype(np.float64),
    }


def _example_nll(scores: Array, layout: MemberScores, split: EncodedSplit) -> Array:
    nll = np.zeros(split.n_examples)
    np.add.at(nll, layout.row_example, -scores[:, 0] * layout.row_weights)
    return nll


def _means(found: Sequence[TaskScores]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in ("nll", "accuracy", "macro_f1"):
        known = [value for result in found if np.isfinite(value := getattr(result, name))]
        means[name] = float(np.mean(known)) if known else None
    return means


def _without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}
