"""Who helps whom: rates of positive transfer by base method and by method, their price, and whether the oracle knows.

In: a request. Out: plain values. Single tasks, pairs of tasks and all tasks are fine-tuned under every base method;
beside them stand averages of single tasks' adapters and methods of a comparison. Rates are of losses of test rows,
which no training was chosen by; the map of who helps whom is of validation rows, which the oracle predicts.

Cost: fine-tunings of n single tasks, n (n - 1) / 2 pairs and all tasks for every base method and seed; the methods'.
Source: paper, section 2.1 and appendix B.6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import combinations
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveInt

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0
from ensemblelora.analysis.bases import BASE_METHODS, FULL, choose_bases, list_base_changes, name_base_method
from ensemblelora.analysis.losses import Losses, score_adapter
from ensemblelora.analysis.request import AnalysisRequest, Work
from ensemblelora.analysis.transfer_map import Together, compare_gains, compare_with_alone
from ensemblelora.analysis.transfer_runs import (
    AVERAGE,
    SHARED,
    SINGLE,
    Gathered,
    Subset,
    Wanted,
    gather,
    measure_memory,
)
from ensemblelora.analysis.variant import Changes
from ensemblelora.comparison.methods import METHODS
from ensemblelora.comparison.pool import Part, Pool
from ensemblelora.config_stage import Stage
from ensemblelora.errors import UsageError
from ensemblelora.estimation import Oracle
from ensemblelora.seeding import generator_for
from ensemblelora.stages import Rows
from ensemblelora.validation.agreement import Agreement, compare_predictions

__all__ = ["TransferOptions", "choose_pairs", "forecast", "run"]


class TransferOptions(Stage):
    """What can be set."""

    base_methods: tuple[str, ...] = Field(
        (), description=f"Some of {', '.join(BASE_METHODS)}; none: the config's own adapter."
    )
    pairs: int | None = Field(None, ge=0, description="Pairs of tasks, drawn by seed; none: all. Paper: all 45.")
    shortest: bool = Field(False, description="Take the pairs of the shortest texts in place of drawing them.")
    pair_seeds: int | None = Field(
        None, ge=1, description="Seeds of pairs and methods; none: all. Single tasks and all tasks have all seeds."
    )
    methods: tuple[str, ...] = Field(
        ("mtl-ft", "ours"), description="Methods of `compare` whose rates over all tasks are told besides."
    )
    averages: tuple[Literal["plain", "exact"], ...] = Field(
        ("plain",), description="Of two tasks' adapters: plain averages A and B, exact their product B A."
    )
    part: Literal["test", "validation"] = Field("test", description="Rows that rates are of.")
    tolerance: float = Field(0.0, ge=0, description="Nats by which a loss must differ. Paper: 0.")
    reduction: int = Field(16, ge=1, description="Of bottleneck adapters, where the config has none.")
    n_adapters: tuple[PositiveInt, ...] = Field((1, 2, 4, 8), description="Whose memory is measured.")


Request = AnalysisRequest[TransferOptions]


def choose_pairs(
    n_tasks: int, n_pairs: int | None, *, seed: int, lengths: Sequence[int] | None = None
) -> tuple[Subset, ...]:
    """Choose pairs of tasks: all, or as many as asked for, every task about equally often; fewer are some of more.

    Args:
        n_tasks: There are.
        n_pairs: None: all.
        seed: Root of the choice.
        lengths: Of each task's texts: the pairs of the shortest are chosen instead.

    Returns:
        Sorted pairs, in the order of all pairs.
    """
    every = list(combinations(range(n_tasks), 2))
    if n_pairs is None or n_pairs >= len(every):
        return tuple(every)
    if lengths is not None:
        return tuple(sorted(sorted(every, key=lambda pair: sum(lengths[i] for i in pair))[:n_pairs]))
    order = [every[k] for k in generator_for(seed, "analysis", "pairs").permutation(len(every))]
    chosen: list[Subset] = []
    while len(chosen) < n_pairs:
        counts = np.bincount([task for pair in chosen for task in pair], minlength=n_tasks)
        chosen.append(min((pair for pair in order if pair not in chosen), key=lambda pair: sum(counts[list(pair)])))
    return tuple(sorted(chosen))


def run(request: Request) -> dict[str, Any]:
    """Train, measure and sum up."""
    options, config = request.options, request.config
    _check_methods(options.methods)
    own = name_base_method(config)
    bases = choose_bases(options.base_methods or (own,), (*BASE_METHODS, own))
    found: dict[str, Any] = {"bases": {}, "memory": {}, "map": None}
    for base in bases:
        changes = list_base_changes(config, base, reduction=options.reduction)
        pool = request.open_pool(changes=changes)
        names, rows = pool.rows.names, pool.rows
        pairs = _list_pairs(request, rows)
        wanted = Wanted(pairs, options.averages, () if base == FULL else options.methods, options.pair_seeds)
        gathered = gather(request, base, changes, wanted)
        found["bases"][base] = _describe_base(request, gathered, wanted, rows)
        if base != FULL:
            found["memory"][base] = measure_memory(request, changes, options.n_adapters)
        if base != FULL and found["map"] is None and wanted.pairs:
            found["map"] = {"base": base} | _draw_map(request, changes, gathered, wanted.pairs)
        found |= {"tasks": list(names), "n_pairs": len(pairs), "n_all_pairs": len(names) * (len(names) - 1) // 2}
    return found | {"part": options.part, "confidence": config.evaluation.confidence}


def forecast(request: Request, rows: Rows) -> Mapping[str, Work]:
    """Say what every base method would take."""
    options, config = request.options, request.config
    own, n = name_base_method(config), len(rows.names)
    pairs = _list_pairs(request, rows)
    sizes = [split.n_examples for split in rows.train]
    scored = [v.n_examples + t.n_examples for v, t in zip(rows.validation, rows.test, strict=True)]
    epochs, n_seeds = config.training.num_train_epochs, len(request.seeds)
    n_repeats = min(n_seeds, options.pair_seeds or n_seeds)  # of pairs and methods
    found = {}
    for base in choose_bases(options.base_methods or (own,), (*BASE_METHODS, own)):
        # What a method trains for itself: going on from the shared adapter, groups; copies are as many again.
        kinds = [kind for name in options.methods if base != FULL for kind in METHODS[name].work]
        more = sum(kind in ("continued", "groups", "copies") for kind in kinds)
        paired = sum(sizes[i] for pair in pairs for i in pair)
        averages = len(options.averages) if base != FULL else 0
        touched = sum(scored[i] for pair in pairs for i in pair)
        is_planned = base != FULL and (base == own or any(METHODS[name].is_planned for name in options.methods))
        found[base] = Work(
            fine_tunings=n_seeds * (n + 1) + n_repeats * (len(pairs) + more * n),
            trained_rows=epochs * (n_seeds * 2 * sum(sizes) + n_repeats * (paired + more * sum(sizes))),
            gradient_rows=n_repeats * sum(split.n_examples for split in rows.learning) * is_planned,
            forward_rows=n_seeds * 2 * sum(scored) + n_repeats * ((1 + averages) * touched + more * sum(scored)),
            changes=list_base_changes(config, base, reduction=options.reduction),
            is_full=base == FULL,
        )
    return found


def _list_pairs(request: Request, rows: Rows) -> tuple[Subset, ...]:
    """Pairs of the tasks; how long their texts are is counted in training tokens."""
    lengths = [len(split.tokens) for split in rows.train] if request.options.shortest else None
    seed = request.config.data.seed or 0
    return choose_pairs(len(rows.names), request.options.pairs, seed=seed, lengths=lengths)


def _check_methods(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise UsageError(f"unknown methods {', '.join(unknown)}: expected some of {', '.join(METHODS)}")


def _describe_base(request: Request, gathered: Gathered, wanted: Wanted, rows: Rows) -> dict[str, Any]:
    """Rates of one base method: pairs, all tasks, averages and methods; what each way to serve all tasks costs."""
    compare = _comparer(request, gathered, rows, request.options.part)
    everyone, names = tuple(range(len(rows.names))), rows.names
    found: dict[str, Any] = {
        "n_seeds": len(request.seeds),
        "n_kept": gathered.n_kept,
        "base_bytes": gathered.base_bytes,
        "all": compare({everyone: gathered.runs[everyone]}),
        "pairs": compare({pair: gathered.runs[pair] for pair in wanted.pairs}) if wanted.pairs else None,
        "averages": {},
        "methods": {},
    }
    for kind, runs in gathered.averages.items():
        pairs = {pair: runs[pair] for pair in wanted.pairs}
        found["averages"][kind] = {
            "pairs": compare(pairs) if pairs else None,
            "all": compare({everyone: runs[everyone]}) if everyone in runs else None,
        }
    plain = gathered.averages.get("plain", {}).get(everyone)
    by_method = {SHARED: gathered.runs[everyone], **({AVERAGE: plain} if plain else {}), **gathered.methods}
    for name, costs in gathered.costs.items():
        transfer = compare({everyone: by_method[name]}) if name in by_method else None
        found["methods"][name] = {
            "transfer": transfer,
            "loss": None if name not in by_method else _mean_loss(by_method[name], names, request.options.part),
            **_sum_costs(costs, gathered.base_bytes),
        }
    singles = [gathered.runs[task,] for task in everyone]
    if SINGLE in found["methods"]:
        losses = [_mean_loss(runs, [names[i]], request.options.part) for i, runs in enumerate(singles)]
        found["methods"][SINGLE]["loss"] = float(np.mean(losses))
    return found


def _comparer(
    request: Request, gathered: Gathered, rows: Rows, part: Part
) -> Callable[[Mapping[Subset, Sequence[Losses]]], dict[str, Any]]:
    """Make what compares runs of subsets with their tasks alone, on one part's rows."""
    names, evaluation = rows.names, request.config.evaluation
    alone = {task: [np.array(losses[part][name]) for losses in gathered.runs[task,]] for task, name in enumerate(names)}
    groups = [split.groups for split in getattr(rows, part)]

    def compare(runs: Mapping[Subset, Sequence[Losses]]) -> dict[str, Any]:
        together = [
            Together(subset, [{i: np.array(losses[part][names[i]]) for i in subset} for losses in own])
            for subset, own in runs.items()
        ]
        found = compare_with_alone(
            together,
            alone,
            groups,
            tolerance=request.options.tolerance,
            n_bootstrap=evaluation.n_bootstrap,
            confidence=evaluation.confidence,
            seed=request.config.seed,
        )
        return found.to_dict(names)

    return compare


def _mean_loss(runs: Sequence[Losses], names: Sequence[str], part: Part) -> float:
    return float(np.mean([[np.mean(losses[part][name]) for name in names] for losses in runs]))


def _sum_costs(costs: Sequence[Mapping[str, float]], base_bytes: int) -> dict[str, float]:
    """Means over seeds; memory is of the weights that answer, base included."""
    mean = {key: float(np.mean([one[key] for one in costs])) for key in costs[0]}
    return {
        "flops": mean["train_flops"] + mean["select_flops"],
        "seconds": mean["seconds"],
        "forward_passes": mean["forward_passes"],
        "adapter_bytes": mean["n_bytes"],
        "weight_bytes": base_bytes + mean["n_bytes"],
        "peak_memory_bytes": mean["peak_memory_bytes"],
    }


def _draw_map(request: Request, changes: Changes, gathered: Gathered, pairs: Sequence[Subset]) -> dict[str, Any]:
    """Gains of every task by every partner, predicted and true, and how well they agree."""
    pool = request.open_pool(changes=changes)
    names, everyone = pool.rows.names, pool.everyone
    subsets = tuple(dict.fromkeys((*((task,) for task in everyone), *pairs, everyone)))
    predicted = _predict(request, pool, subsets)
    compare = _comparer(request, gathered, pool.rows, "validation")
    cells = compare({pair: gathered.runs[pair] for pair in pairs})["cells"]
    place, index = {subset: k for k, subset in enumerate(subsets)}, {name: i for i, name in enumerate(names)}
    rows = []
    for cell in cells:
        i, pair = index[cell["task"]], tuple(index[name] for name in cell["subset"])
        gain = float(predicted[place[i,], i] - predicted[place[pair], i])
        rows.append({**cell, "partner": names[pair[0] if pair[1] == i else pair[1]], "predicted_gain": gain})
    settings: dict[str, Any] = {
        "n_bootstrap": request.config.evaluation.n_bootstrap,
        "confidence": request.config.evaluation.confidence,
        "seed": request.config.seed,
    }
    gains = compare_gains(
        [index[row["task"]] for row in rows],
        [place[tuple(index[name] for name in row["subset"])] for row in rows],
        [row["predicted_gain"] for row in rows],
        [-row["difference"] for row in rows],
        **settings,
    )
    agreement = compare_predictions(
        _tabulate(gathered, subsets, names), predicted, subsets, _score_base(request, pool), **settings
    )
    return {"cells": rows, "gains": asdict(gains), **_describe_agreement(agreement, names)}


def _predict(request: Request, pool: Pool, subsets: Sequence[Subset]) -> Any:
    """The oracle's losses of every subset, ``(k, n)``."""
    load = request.prepare_oracle(pool)

    def compute(meter: Meter, load: Callable[[], Oracle]) -> list[list[float]]:
        return [[float(value) for value in row] for row in load().score(subsets).nll]

    config = pool.config
    inputs = (pool.start_fingerprint, pool.rows.learning_fingerprint(), subsets, config.gradients, config.estimation)
    return np.array(request.measure("predicted", (*inputs, config.training), partial(compute, load=load)))


def _score_base(request: Request, pool: Pool) -> Any:
    losses = score_adapter(request, pool, THETA0, pool.everyone)
    return np.array([np.mean(losses["validation"][name]) for name in pool.rows.names])


def _tabulate(gathered: Gathered, subsets: Sequence[Subset], names: Sequence[str]) -> Any:
    """True validation losses ``(seeds, subsets, tasks)``; NaN where there is none."""
    n_seeds = max(len(gathered.runs[subset]) for subset in subsets)
    truth = np.full((n_seeds, len(subsets), len(names)), np.nan)
    for k, subset in enumerate(subsets):
        for s, losses in enumerate(gathered.runs[subset]):
            for i in subset:
                truth[s, k, i] = np.mean(losses["validation"][names[i]])
    return truth


def _describe_agreement(agreement: Agreement, names: Sequence[str]) -> dict[str, Any]:
    """Plain values of pairs, and of all tasks against one each."""
    pairs, signs, all_tasks = agreement.by_size.get(2), agreement.transfer.get(2), agreement.one_or_all
    return {
        "losses": None if pairs is None else asdict(pairs),
        "signs": None if signs is None else asdict(signs),
        "one_or_all": None if all_tasks is None else asdict(all_tasks) | {"tasks": [names[i] for i in all_tasks.tasks]},
    }
