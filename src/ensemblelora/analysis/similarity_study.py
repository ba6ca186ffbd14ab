"""How alike an adapter for several tasks is to its tasks' own, as the tasks become more.

In: a request. Out: plain values. Random subsets of growing size are fine-tuned together, and beside them each task
alone, from one theta0; compared are also the plain averages of the single adapters. An adapter whose best checkpoint is
theta0 itself spans nothing and is left out. Cost: one fine-tuning a task and subset, base method and seed, and small
products.
Source: paper, appendix B.6, figure 12.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import combinations
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, adapter_state
from ensemblelora.analysis.bases import choose_bases, list_base_changes
from ensemblelora.analysis.generalization import correlate_within
from ensemblelora.analysis.request import AnalysisRequest, Work
from ensemblelora.analysis.similarity import Similarity, average_states, measure_similarity
from ensemblelora.analysis.variant import change_config
from ensemblelora.bottleneck import count_hidden
from ensemblelora.comparison.pool import Pool, Trained
from ensemblelora.config import RunConfig
from ensemblelora.config_stage import Stage
from ensemblelora.errors import UsageError
from ensemblelora.progress import track
from ensemblelora.seeding import generator_for
from ensemblelora.stages import Rows
from ensemblelora.validation.resampling import Units, bootstrap, divide

__all__ = ["FIELDS", "KINDS", "SimilarityOptions", "draw_subsets", "forecast", "run", "summarise"]

Subset = tuple[int, ...]
State = dict[str, Tensor]

KINDS: Mapping[str, str] = {
    "together": "fine-tuned together, against each of its tasks alone",
    "averaged": "single adapters averaged, against each of them",
    "apart": "single adapters against each other",
}
FIELDS = ("overlap", "left", "right", "cosine")
_ADAPTED = ("lora", "bottleneck", "qlora", "quantised bottleneck")


class SimilarityOptions(Stage):
    """What to train and compare."""

    base_methods: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        ("lora", "bottleneck"), description=f"Some of {', '.join(_ADAPTED)}. Paper: the last two."
    )
    sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = Field(
        (2, 4, 6, 8, 10),
        description="Tasks of a subset; larger ones than there are tasks are left out. Paper: 2 to 10.",
    )
    n_subsets: int = Field(3, ge=1, description="Of each size; fewer where there are no more.")
    reduction: int = Field(16, ge=1, description="Of bottleneck adapters, where the config has none.")


Request = AnalysisRequest[SimilarityOptions]


def run(request: Request) -> dict[str, Any]:
    """Train, compare and sum up.

    Raises:
        UsageError: If a base method or size does not fit.
    """
    options, config = request.options, request.config
    cells: list[dict[str, Any]] = []
    for base in track(choose_bases(options.base_methods, _ADAPTED), "base methods"):
        for seed in request.seeds:
            pool = request.open_pool(seed, list_base_changes(config, base, reduction=options.reduction))
            singles = [pool.train((task,)) for task in pool.everyone]
            own = [*_compare_singles(request, pool, singles)]
            for subset in draw_subsets(pool.n_tasks, options, _rows_seed(config)):
                own += _compare_subset(request, pool, subset, singles)
            cells += [{"base": base, "seed": seed, **cell} for cell in own]
    n_bootstrap, confidence = config.evaluation.n_bootstrap, config.evaluation.confidence
    found = summarise(cells, n_bootstrap=n_bootstrap, confidence=confidence, seed=config.seed)
    return {**found, "cells": cells, "confidence": confidence}


def forecast(request: Request, rows: Rows) -> Mapping[str, Work]:
    """Say what every base method would take."""
    options, config = request.options, request.config
    n_rows = [split.n_examples for split in rows.train]
    subsets: list[Subset] = [(task,) for task in range(len(n_rows))]
    subsets += draw_subsets(len(n_rows), options, _rows_seed(config))
    found: dict[str, Work] = {}
    for base in choose_bases(options.base_methods, _ADAPTED):
        changes = list_base_changes(config, base, reduction=options.reduction)
        epochs = change_config(config, changes).training.num_train_epochs
        found[base] = Work(
            fine_tunings=len(request.seeds) * len(subsets),
            trained_rows=len(request.seeds) * epochs * sum(n_rows[task] for subset in subsets for task in subset),
            changes=changes,
        )
    return found


def draw_subsets(n_tasks: int, options: SimilarityOptions, seed: int) -> list[Subset]:
    """Draw distinct subsets of every size, the same for all base methods and seeds.

    Args:
        n_tasks: There are.
        options: Sizes, and how many of each.
        seed: The root.

    Raises:
        UsageError: If every size is larger than the number of tasks, or is one.
    """
    sizes = [size for size in sorted(set(options.sizes)) if 1 < size <= n_tasks]
    if not sizes:
        raise UsageError(f"sizes {list(options.sizes)}: expected some from 2 to {n_tasks}, the number of tasks")
    chosen: list[Subset] = []
    for size in sizes:
        every = list(combinations(range(n_tasks), size))
        order = generator_for(seed, "similarity", "subsets", size).permutation(len(every))
        chosen += [every[k] for k in order[: options.n_subsets]]
    return chosen


def summarise(
    cells: Sequence[Mapping[str, Any]], *, n_bootstrap: int, confidence: float, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Average over subsets by base method, kind and size, and say how similarity goes with size.

    Args:
        cells: One a subset, kind, base method and seed.
        n_bootstrap: Draws of subsets behind the intervals.
        confidence: Share of them inside.
        seed: Their root.
    """
    draw: dict[str, Any] = {"n_bootstrap": n_bootstrap, "confidence": confidence}
    by_size, trends = [], []
    for base, kind in dict.fromkeys((cell["base"], cell["kind"]) for cell in cells):
        own = [cell for cell in cells if (cell["base"], cell["kind"]) == (base, kind)]
        for size in sorted({cell["size"] for cell in own}):
            some = [cell for cell in own if cell["size"] == size]
            means = _average(some, generator=generator_for(seed, "similarity", base, kind, size), **draw)
            chance = float(np.mean([cell["chance"] for cell in some]))
            by_size.append({"base": base, "kind": kind, "size": size, "n": len(some), "chance": chance, **means})
        if len({cell["size"] for cell in own}) > 1:
            trends += [{"base": base, "kind": kind, "field": name, **_trend(own, name, seed, draw)} for name in FIELDS]
    return {"by_size": by_size, "trends": trends}


def _average(cells: Sequence[Mapping[str, Any]], **draw: Any) -> dict[str, Any]:
    """Mean of every field, with its interval over subsets."""
    _, unit = np.unique([str(cell["subset"]) for cell in cells], return_inverse=True)
    values = {name: np.array([cell[name] for cell in cells], dtype=np.float64) for name in FIELDS}

    def statistic(weights: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        return {name: divide(weights @ column, weights.sum(axis=1)) for name, column in values.items()}

    units = Units(unit, np.zeros(int(unit.max()) + 1, dtype=np.int64))
    return {name: asdict(found) for name, found in bootstrap(statistic, [units], **draw).items()}


def _trend(cells: Sequence[Mapping[str, Any]], name: str, seed: int, draw: Mapping[str, Any]) -> dict[str, Any]:
    """How a field goes with the number of tasks, over subsets."""
    sizes, values = ([cell[key] for cell in cells] for key in ("size", name))
    seeds, subsets = ([str(cell[key]) for cell in cells] for key in ("seed", "subset"))
    return asdict(correlate_within(sizes, values, seeds, subsets, seed=seed, **draw))


def _compare_singles(request: Request, pool: Pool, singles: Sequence[Trained]) -> Iterator[dict[str, Any]]:
    """Single adapters against each other, a pair of tasks a cell."""
    for pair in combinations(range(len(singles)), 2):
        inputs = ("apart", [singles[task].name for task in pair], _rank(pool))
        yield from request.measure("similarity", inputs, partial(_measure_pair, pool, pair, singles))


def _measure_pair(pool: Pool, pair: Sequence[int], singles: Sequence[Trained], meter: Meter) -> list[dict[str, Any]]:
    start, (one, other) = adapter_state(pool.probe, THETA0), _read(pool, [singles[task] for task in pair])
    if not (_has_moved(one, start) and _has_moved(other, start)):
        return []
    return [_write_cell(pool, pair, 1, "apart", [measure_similarity(one, other, start, rank=_rank(pool))])]


def _compare_subset(request: Request, pool: Pool, subset: Subset, singles: Sequence[Trained]) -> list[dict[str, Any]]:
    """A subset's adapter, and the average of its tasks' own, against each of these."""
    together, own = pool.train(subset), [singles[task] for task in subset]
    inputs = ("subset", together.name, [one.name for one in own], _rank(pool))
    return list(request.measure("similarity", inputs, partial(_measure_subset, pool, subset, together, own)))


def _measure_subset(
    pool: Pool, subset: Subset, together: Trained, own: Sequence[Trained], meter: Meter
) -> list[dict[str, Any]]:
    start, rank = adapter_state(pool.probe, THETA0), _rank(pool)
    (joint,), alone = _read(pool, [together]), _read(pool, own)
    moved = [state for state in alone if _has_moved(state, start)]
    compared = {"together": joint, "averaged": average_states(alone)}
    return [
        _write_cell(
            pool, subset, len(subset), kind, [measure_similarity(state, one, start, rank=rank) for one in moved]
        )
        for kind, state in compared.items()
        if moved and _has_moved(state, start)
    ]


def _has_moved(state: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> bool:
    """Whether an adapter is another than theta0, which is kept where no step lowered the validation loss."""
    return any(key not in start or not torch.equal(state[key], start[key]) for key in state)


def _write_cell(pool: Pool, subset: Sequence[int], size: int, kind: str, found: Sequence[Similarity]) -> dict[str, Any]:
    """Means over a subset's tasks."""
    return {
        "subset": [pool.rows.names[task] for task in subset],
        "size": size,
        "kind": kind,
        "n_modules": found[0].n_modules,
        **{name: float(np.mean([getattr(one, name) for one in found])) for name in (*FIELDS, "chance")},
    }


def _read(pool: Pool, trained: Sequence[Trained]) -> list[State]:
    """The tensors of adapters."""
    states = []
    for one in trained:
        pool.load([one.name])
        states.append(adapter_state(pool.probe, one.name))
    return states


def _rank(pool: Pool) -> int:
    """LoRA's r, or the width of a bottleneck."""
    adapter = pool.config.adapter
    if adapter.method != "bottleneck":
        return adapter.r
    return count_hidden(int(pool.probe.base.model.config.hidden_size), adapter.reduction)


def _rows_seed(config: RunConfig) -> int:
    return config.seed if config.data.seed is None else config.data.seed
