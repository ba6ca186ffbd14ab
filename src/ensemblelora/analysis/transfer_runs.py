"""What transfer is measured from: one base method's fine-tunings of single tasks, pairs and all tasks, for every seed.

In: a request and a base method. Out: :class:`Gathered`, losses row by row and costs. Everything is found again where it
was made before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import adapter_bytes, add_adapter, remove_adapter
from ensemblelora.analysis.bases import FULL
from ensemblelora.analysis.losses import (
    Losses,
    average_exactly,
    average_plainly,
    find_kept,
    score_adapter,
    score_candidate,
    train_all_weights,
)
from ensemblelora.analysis.request import AnalysisRequest
from ensemblelora.analysis.variant import Changes
from ensemblelora.comparison.candidate import Costs
from ensemblelora.comparison.methods import METHODS
from ensemblelora.comparison.pool import Pool, Trained
from ensemblelora.data.subset import take_examples
from ensemblelora.prediction import predict_members
from ensemblelora.progress import track
from ensemblelora.quantization import count_weight_bytes

__all__ = ["AVERAGE", "SHARED", "SINGLE", "Gathered", "Wanted", "gather", "measure_memory"]

Subset = tuple[int, ...]

SINGLE, SHARED, AVERAGE = "single", "shared", "average"
"""one adapter a task, one for all, and the average of all that were trained on one task"""

_BATCH_ROWS = 4
"""paper, section 2.1: memory is measured with a batch of 4"""


@dataclass(frozen=True)
class Wanted:
    """What is to be gathered.

    Attributes:
        pairs: Of tasks.
        averages: ``plain``, ``exact`` or both.
        methods: Names of a comparison's methods.
        n_seeds: Under so many of the seeds; none: all. Single tasks and all tasks are of every seed.
    """

    pairs: tuple[Subset, ...]
    averages: tuple[str, ...]
    methods: tuple[str, ...]
    n_seeds: int | None = None

    def under(self, order: int) -> Wanted:
        """What is wanted of one seed, by its place among them."""
        return self if self.n_seeds is None or order < self.n_seeds else replace(self, pairs=(), methods=())


@dataclass(eq=False)
class Gathered:
    """One base method.

    Attributes:
        runs: Losses of each subset, a seed each.
        averages: By kind of average and subset.
        methods: By method, on all tasks.
        costs: Of what is trained for all tasks, by name, a seed each.
        base_bytes: Of the base model's weights.
        n_kept: Fine-tunings that a validated run had made.
    """

    runs: dict[Subset, list[Losses]] = field(default_factory=dict)
    averages: dict[str, dict[Subset, list[Losses]]] = field(default_factory=dict)
    methods: dict[str, list[Losses]] = field(default_factory=dict)
    costs: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    base_bytes: int = 0
    n_kept: int = 0


def gather(request: AnalysisRequest[Any], base: str, changes: Changes, wanted: Wanted) -> Gathered:
    """Train and score everything of one base method.

    Args:
        request: Gives pools and journals.
        base: Its name.
        changes: What makes it of the config.
        wanted: Beside single tasks and all tasks.
    """
    found, kept = Gathered(), dict[tuple[Subset, int], Losses]()
    for order, seed in enumerate(request.seeds):
        pool, own = request.open_pool(seed, changes), wanted.under(order)
        found.base_bytes = _count_base_bytes(pool)
        subsets = list(dict.fromkeys((*((task,) for task in pool.everyone), *own.pairs, pool.everyone)))
        if base == FULL:
            _gather_full(request, pool, subsets, found)
            continue
        if not order and not changes:
            kept = find_kept(request, pool, wanted.pairs, len(request.seeds))
            found.n_kept = len(kept)
        known = {subset: losses for (subset, k), losses in kept.items() if k == order}
        trained = _gather_adapters(request, pool, subsets, known, found)
        _gather_averages(request, pool, own, trained, found)
        for name in own.methods:
            candidate = METHODS[name].run(pool)
            if METHODS[name].is_planned:
                request.prepare_oracle(pool)  # enters the plan in the ledger
            found.methods.setdefault(name, []).append(score_candidate(pool, candidate))
            found.costs.setdefault(name, []).append(asdict(candidate.costs))
    return found


def measure_memory(
    request: AnalysisRequest[Any], changes: Changes, numbers: Sequence[int]
) -> list[dict[str, float | None]]:
    """Measure what some numbers of adapters take that answer together, and add up what their weights take.

    Args:
        request: Gives the pool.
        changes: What makes the base method of the config.
        numbers: Of adapters.

    Returns:
        For each number ``n_adapters``, ``weight_bytes`` of base and adapters, ``added_memory_bytes`` that the process
        takes to hold them and to predict a batch of four rows with all of them, and ``peak_accelerator_bytes`` where
        there is one.
    """
    pool = request.open_pool(changes=changes)
    one, base = adapter_bytes(pool.probe), _count_base_bytes(pool)
    longest = max(pool.rows.validation, key=lambda split: int(split.example_lengths.max()))
    part = take_examples(longest, np.argsort(longest.example_lengths, kind="stable")[-_BATCH_ROWS:])

    def compute(outer: Meter, n: int) -> dict[str, float | None]:
        names = [f"memory-{k}" for k in range(n)]
        try:
            with Meter("memory") as meter:
                for name in names:
                    add_adapter(pool.probe, name)
                predict_members(pool.probe, part, names, max_tokens=pool.config.evaluation.max_tokens_per_batch)
        finally:
            for name in names:
                remove_adapter(pool.probe, name)
        return {
            "n_adapters": n,
            "weight_bytes": base + n * one,
            "added_memory_bytes": meter.record.added_memory_bytes,
            "peak_accelerator_bytes": meter.record.peak_accelerator_bytes,
        }

    start = pool.start_fingerprint
    return [request.measure("memory", (start, n), partial(compute, n=n)) for n in sorted(numbers)]


def _gather_full(request: AnalysisRequest[Any], pool: Pool, subsets: Sequence[Subset], found: Gathered) -> None:
    spent: dict[Subset, float] = {}
    for subset in track(subsets, "full fine-tunings"):
        losses, spent[subset] = train_all_weights(request, pool, subset)
        found.runs.setdefault(subset, []).append(losses)
    found.costs.setdefault(SHARED, []).append(asdict(Costs(int(spent[pool.everyone]))))


def _gather_adapters(
    request: AnalysisRequest[Any],
    pool: Pool,
    subsets: Sequence[Subset],
    known: Mapping[Subset, Losses],
    found: Gathered,
) -> dict[Subset, Trained]:
    """Train and score adapters, but for subsets whose losses are known."""
    trained: dict[Subset, Trained] = {}
    for subset in track(subsets, "fine-tunings"):
        if subset not in known:
            trained[subset] = pool.train(subset)
        losses = known.get(subset) or score_adapter(request, pool, trained[subset].name, subset)
        found.runs.setdefault(subset, []).append(losses)
    singles = [trained[task,] for task in pool.everyone]
    found.costs.setdefault(SHARED, []).append(asdict(Costs.of([trained[pool.everyone]])))
    found.costs.setdefault(SINGLE, []).append(asdict(Costs.of(singles)))
    found.costs.setdefault(AVERAGE, []).append(asdict(Costs.of(singles, kept=singles[:1])))
    return trained


def _gather_averages(
    request: AnalysisRequest[Any],
    pool: Pool,
    wanted: Wanted,
    trained: Mapping[Subset, Trained],
    found: Gathered,
) -> None:
    pairs = [[trained[task,] for task in pair] for pair in wanted.pairs]
    if "plain" in wanted.averages:
        own = found.averages.setdefault("plain", {})
        for pair, parts in zip(wanted.pairs, pairs, strict=True):
            own.setdefault(pair, []).append(average_plainly(request, pool, parts))
        everyone = [trained[task,] for task in pool.everyone]
        own.setdefault(pool.everyone, []).append(average_plainly(request, pool, everyone))
    if "exact" in wanted.averages and pool.config.adapter.method == "lora" and pairs:
        own = found.averages.setdefault("exact", {})
        for pair, losses in zip(wanted.pairs, average_exactly(request, pool, pairs), strict=True):
            own.setdefault(pair, []).append(losses)


def _count_base_bytes(pool: Pool) -> int:
    adapters = set(pool.probe.peft.peft_config)
    return sum(
        count_weight_bytes(parameter)
        for path, parameter in pool.probe.peft.named_parameters()
        if adapters.isdisjoint(path.split("."))
    )
