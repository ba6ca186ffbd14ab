"""How far the first-order expansion can be relied on: by distance, rank, epochs and base method.

In: a request. Out: plain values: ``cells``, the sums over rows of every adapter and point, and what they say together.
Subsets of tasks are fine-tuned; measured are their checkpoints, the straight lines from theta0 through their ends, and
those along what the oracle's fits stand for, to distances where the expansion is worthless.

Cost: one fine-tuning a variant, subset and seed; for each a gradient pass and some thirty forward passes over a few
validation rows; for the oracle's lines one gradient pass over all rows, once a seed.
Source: paper, section 2.2, figure 2, tables 2 and 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from math import isfinite
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from ensemblelora.accounting.meter import Meter
from ensemblelora.analysis.approximation import (
    Point,
    Precision,
    State,
    measure_distances,
    measure_remainders,
    take_rows,
)
from ensemblelora.analysis.bases import BASE_METHODS, FULL, choose_bases, list_base_changes, name_base_method
from ensemblelora.analysis.linearization_page import name_variant
from ensemblelora.analysis.paths import TrainedPath, expand_oracle, load_steps, train_path
from ensemblelora.analysis.remainders import (
    VARIANT_KEYS,
    describe_law,
    find_break,
    summarise_cells,
    summarise_distances,
)
from ensemblelora.analysis.request import AnalysisRequest, Work
from ensemblelora.analysis.variant import Changes, change_config, join_changes
from ensemblelora.comparison.pool import Pool
from ensemblelora.config import RunConfig
from ensemblelora.config_stage import Stage
from ensemblelora.errors import UsageError
from ensemblelora.estimation import Oracle
from ensemblelora.gradients.output import choose_modes
from ensemblelora.progress import track
from ensemblelora.seeding import generator_for
from ensemblelora.stages import Rows

__all__ = ["LinearizationOptions", "Variant", "choose_tasks", "forecast", "list_variants", "run"]

_BREAKS = (0.9, 0.5, 0.0)
"""levels of R2 over the zero-order prediction whose distances are told"""
_ADAPTED = tuple(name for name in BASE_METHODS if name != FULL)
_MOST_STEPS = 8
"""checkpoints of a training, for the forecast: it has up to 255 steps"""
_LINE_KINDS = ("line", "dual", "projected")


class LinearizationOptions(Stage):
    """What can be set."""

    base_methods: tuple[str, ...] = Field(_ADAPTED, description=f"Some of {', '.join(_ADAPTED)}; all else as it is.")
    ranks: tuple[PositiveInt, ...] = Field((1, 8, 16, 32, 64), description="Of LoRA, at the same lora_alpha / r.")
    epochs: tuple[PositiveInt, ...] = Field((1, 3, 10, 30), description="Of the config's own adapter.")
    distances: tuple[PositiveFloat, ...] = Field(
        (0.0005, 0.001, 0.0015, 0.002, 0.0025, 0.005, 0.01, 0.02, 0.05),
        description="Along straight lines, over the norm of the model. Paper: 0.0005 to 0.0025.",
    )
    n_subsets: int = Field(4, ge=1, description="Random subsets of tasks for each variant and seed. Paper: 50.")
    subset_size: int | None = Field(None, ge=1, description="None: affinity.subset_size. Paper: 3.")
    max_rows: int = Field(8, ge=1, description="Validation rows of each of a subset's tasks.")
    reduction: int = Field(16, ge=1, description="Of bottleneck adapters, where the config has none.")
    oracle: bool = Field(True, description="Also along what the oracle's fits of the subsets stand for.")
    native: bool = Field(True, description="Also in the model's own precision, where rounding hides small changes.")


Request = AnalysisRequest[LinearizationOptions]


@dataclass(frozen=True)
class Variant:
    """One way to train."""

    base: str
    r: int | None
    """of LoRA"""
    epochs: int
    changes: Changes
    is_reference: bool
    """whether it is the config's own"""

    @property
    def keys(self) -> dict[str, Any]:
        """What tables call it."""
        return {"base": self.base, "r": self.r, "epochs": self.epochs}


def list_variants(config: RunConfig, options: LinearizationOptions) -> tuple[Variant, ...]:
    """List the config's own way to train, then the others by what is different: base method, rank, epochs.

    Raises:
        UsageError: If ranks are asked for and the adapter has none, or a base method is unknown.
    """
    own = name_base_method(config)
    bases = choose_bases(options.base_methods, _ADAPTED) if options.base_methods else ()
    # The model is loaded again for every other adapter or base: those that need none first.
    others: list[Changes] = [{"training": {"num_train_epochs": epochs}} for epochs in options.epochs]
    others += [list_base_changes(config, name, reduction=options.reduction) for name in bases]
    if options.ranks and config.adapter.method != "lora":
        raise UsageError(f"ranks: adapter.method {config.adapter.method} has none; give --with ranks=[]")
    scale = config.adapter.lora_alpha / config.adapter.r
    others += [{"adapter": {"r": r, "lora_alpha": scale * r}} for r in options.ranks]
    found: dict[str, Variant] = {}
    for changes in ({}, *others):
        changed = change_config(config, changes)
        adapter, epochs = changed.adapter, changed.training.num_train_epochs
        r = adapter.r if adapter.method == "lora" else None
        variant = Variant(name_base_method(changed), r, epochs, changes, is_reference=changed == config)
        found.setdefault(repr(changed), variant)
    if own not in _ADAPTED:
        raise UsageError(f"adapter.method {own}: expected one of {', '.join(_ADAPTED)}")
    return tuple(found.values())


def choose_tasks(n_tasks: int, options: LinearizationOptions, config: RunConfig) -> tuple[tuple[int, ...], ...]:
    """Draw distinct subsets of tasks, the same for every variant and seed.

    Args:
        n_tasks: There are.
        options: How many, and of which size.
        config: Its ``data.seed`` is the root of the draw; of a size that is not set, its ``affinity.subset_size``.

    Returns:
        Sorted subsets; all there are where these are no more than asked for.
    """
    size = min(options.subset_size or config.affinity.subset_size, n_tasks)
    every = list(combinations(range(n_tasks), size))
    order = generator_for(config.data.seed or 0, "analysis", "subsets").permutation(len(every))
    return tuple(every[k] for k in order[: options.n_subsets])


def run(request: Request) -> dict[str, Any]:
    """Train, measure and sum up."""
    options, config = request.options, request.config
    cells: list[dict[str, Any]] = []
    for variant in track(list_variants(config, options), "variants"):
        for seed in request.seeds:
            pool = request.open_pool(seed, variant.changes)
            load_oracle = request.prepare_oracle(pool) if variant.is_reference and options.oracle else None
            for subset in choose_tasks(pool.n_tasks, options, config):
                cells += _measure_adapter(request, pool, variant, load_oracle, subset)
    settings: dict[str, Any] = {
        "n_bootstrap": config.evaluation.n_bootstrap,
        "confidence": config.evaluation.confidence,
        "seed": config.seed,
    }
    ends = [cell for cell in cells if cell["kind"] == "end"]
    lines = [cell for cell in cells if cell["kind"] in _LINE_KINDS and not cell["is_natural"]]
    own = [cell for cell in cells if cell["is_natural"] and cell["kind"] in ("dual", "projected")]
    by_distance = summarise_cells(lines, ("kind", *VARIANT_KEYS, "asked"), **settings)
    return {
        "ends": summarise_cells(ends, VARIANT_KEYS, **settings),
        "by_distance": by_distance,
        "oracle_points": summarise_cells(own, ("kind", *VARIANT_KEYS), **settings),
        "breaks": _list_breaks(by_distance),
        "law": describe_law(cells, **settings),
        "distances": summarise_distances(cells, **settings),
        "confidence": config.evaluation.confidence,
        "cells": cells,
    }


def forecast(request: Request, rows: Rows) -> Mapping[str, Work]:
    """Say what every variant would take."""
    options, config, found = request.options, request.config, dict[str, Work]()
    subsets, n_seeds = choose_tasks(len(rows.names), options, config), len(request.seeds)
    n_trained = sum(rows.train[task].n_examples for subset in subsets for task in subset)
    n_measured = sum(min(options.max_rows, rows.validation[i].n_examples) for subset in subsets for i in subset)
    for variant in list_variants(config, options):
        has_oracle = variant.is_reference and options.oracle
        n_points = _MOST_STEPS + (3 if has_oracle else 1) * (1 + len(options.distances))
        times = n_seeds * (2 if variant.is_reference and options.native else 1)
        name = name_variant(variant.keys)
        found[name] = Work(
            fine_tunings=n_seeds * len(subsets),
            trained_rows=n_seeds * variant.epochs * n_trained,
            gradient_rows=n_seeds * sum(split.n_examples for split in rows.learning) if has_oracle else 0,
            changes=variant.changes,
        )
        found[f"{name}: measuring"] = Work(
            gradient_rows=times * n_measured,
            forward_rows=times * n_points * n_measured,
            changes=join_changes(variant.changes, {"model": {"dtype": "float32"}}),
        )
    return found


def _measure_adapter(
    request: Request, pool: Pool, variant: Variant, load_oracle: Callable[[], Oracle] | None, subset: Sequence[int]
) -> list[dict[str, Any]]:
    """Train a subset's adapter and measure along its way, or read both back."""
    options, config = request.options, pool.config
    path = train_path(pool, subset)
    fits = None if load_oracle is None else (config.gradients, config.estimation, config.affinity)
    precisions: tuple[Precision, ...] = (
        ("float32", "native") if variant.is_reference and options.native else ("float32",)
    )
    cells = []
    for precision in precisions:
        inputs = (path.trained.name, precision, options.distances, options.max_rows, config.gradients.output, fits)
        points = request.measure("expansion", inputs, partial(_measure, request, pool, path, load_oracle, precision))
        about = {**variant.keys, "precision": precision, "seed": config.seed}
        cells += [{**about, "subset": [pool.rows.names[i] for i in subset], **point} for point in points]
    return cells


def _measure(
    request: Request,
    pool: Pool,
    path: TrainedPath,
    load_oracle: Callable[[], Oracle] | None,
    precision: Precision,
    meter: Meter,
) -> list[dict[str, Any]]:
    """Every point of one adapter: what it is, how far away, and each task's sums."""
    options, subset = request.options, path.trained.tasks
    max_tokens = pool.config.gradients.max_tokens_per_batch
    steps = load_steps(pool, path)
    lines: dict[str, State] = {"line": steps.pop(path.steps[-1])}
    if load_oracle is not None:
        lines |= expand_oracle(pool, load_oracle(), subset, max_tokens=max_tokens, meter=meter)
    directions = [*steps.values(), *lines.values()]
    lengths = measure_distances(pool.probe, directions)
    plan: list[tuple[dict[str, Any], Point]] = [
        ({"kind": "path", "step": step, "asked": None, "is_natural": True}, Point(j, 1.0))
        for j, step in enumerate(steps)
    ]
    for j, kind in enumerate(lines, len(steps)):
        if not lengths[j].absolute:
            continue
        own = {"kind": "end" if kind == "line" else kind, "step": None, "asked": None, "is_natural": True}
        plan.append((own, Point(j, 1.0)))
        for distance in sorted(options.distances):
            about = {"kind": kind, "step": None, "asked": distance, "is_natural": False}
            plan.append((about, Point(j, distance / lengths[j].relative_to_model)))
    parts = [take_rows(pool.split(task, "validation"), options.max_rows) for task in subset]
    modes = choose_modes(pool.rows.learning, pool.config.gradients.output)
    found = measure_remainders(
        pool.probe,
        parts,
        modes,
        directions,
        [point for _, point in plan],
        max_tokens=max_tokens,
        precision=precision,
        meter=meter,
    )
    return [
        {
            **about,
            "distance": point.scale * lengths[point.direction].relative_to_model,
            "distance_adapter": point.scale * lengths[point.direction].relative_to_adapter_init,
            "tasks": {part.task: asdict(one) for part, one in zip(parts, by_task, strict=True)},
        }
        for (about, point), by_task in zip(plan, found, strict=True)
        if all(isfinite(one.missed + one.size) for one in by_task)  # so far away, a model may have no output at all
    ]


def _list_breaks(by_distance: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where R2 falls below some levels, for every kind of line and variant."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    keys = ("kind", *VARIANT_KEYS)
    for row in by_distance:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        dict(zip(keys, values, strict=True)) | {f"r2_below_{level:g}": find_break(rows, level) for level in _BREAKS}
        for values, rows in groups.items()
    ]
