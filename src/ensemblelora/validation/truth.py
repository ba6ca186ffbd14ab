"""What the oracle predicts, measured: subsets of tasks are fine-tuned as a run would, and scored.

In: a run's rows and model, subsets, seeds. Out: :class:`~ensemblelora.validation.records.TrueRun` in ``truth.jsonl``,
and the adapters beside it, for what is asked about them later.
Scored are the validation rows of the subset's own tasks, those that the oracle predicts on, so that which rows were
drawn is no part of the difference. A seed changes the order of the training rows; theta0 is the run's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ensemblelora import __version__, artifacts, training
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel, measure_distance, remove_adapter, save_adapter
from ensemblelora.config import RunConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.prediction import member_nll, predict_members
from ensemblelora.progress import note
from ensemblelora.scheduling import HERE, Job, Scheduler
from ensemblelora.seeding import generator_for, seed_for
from ensemblelora.stages import Bench, Rows, equip
from ensemblelora.startpoint import settle_training
from ensemblelora.validation.records import TrueRun, append_run, read_runs

__all__ = ["Subset", "choose_subsets", "measure_base", "measure_subsets", "plan_measurements"]

Subset = tuple[int, ...]
_NAME = "validated"


def choose_subsets(n_tasks: int, n_subsets: int, size: int, *, seed: int) -> tuple[Subset, ...]:
    """Every single task, all tasks together, and for the rest subsets of one size, each task about equally often.

    Args:
        n_tasks: Number of tasks, n.
        n_subsets: How many in all; at least n + 1 are returned.
        size: Of those in between.
        seed: Root of the choice.

    Returns:
        Distinct sorted subsets; the full set first, then singles, then the others. More asked for only adds to them.

    Example:
        >>> choose_subsets(3, 5, 2, seed=0)[:4]
        ((0, 1, 2), (0,), (1,), (2,))
    """
    chosen: dict[Subset, None] = {tuple(range(n_tasks)): None} | {(i,): None for i in range(n_tasks)}
    generator = generator_for(seed, "validation", "subsets")
    n_left = 50 * n_subsets  # tries; small n has few subsets
    while len(chosen) < n_subsets and n_left:
        for block in _deal(n_tasks, size, generator):  # every task once
            n_left -= 1
            if len(chosen) < n_subsets:
                chosen.setdefault(block)
    return tuple(chosen)


def plan_measurements(
    subsets: Sequence[Subset], n_seeds: int, rows: Rows, start_fingerprint: str, config: RunConfig
) -> dict[str, tuple[Subset, int]]:
    """List the fine-tunings by identity: every subset with the first seed before any with the second."""
    settings = settle_training(config)
    return {
        artifacts.fingerprint(
            __version__, "truth", subset, rows.learning_fingerprint(subset), start_fingerprint, settings, seed
        ): (subset, seed)
        for seed in range(n_seeds)
        for subset in subsets
    }


def measure_subsets(
    path: Path,
    wanted: dict[str, tuple[Subset, int]],
    adapted: AdaptedModel,
    rows: Rows,
    config: RunConfig,
    *,
    scheduler: Scheduler = HERE,
    start_fingerprint: str = "",
) -> dict[str, TrueRun]:
    """Fine-tune and score what is not in the file yet; stopped at any moment, it goes on from there.

    Args:
        path: ``truth.jsonl``, in a folder of the run's.
        wanted: From :func:`plan_measurements`.
        adapted: The model; it is left as it was.
        rows: Of all tasks.
        config: The run's.
        scheduler: Carries out fine-tunings.
        start_fingerprint: Identity of the model at its start point; for other processes than this one.

    Returns:
        All that was wanted, by identity.

    Raises:
        TrainingError: If a loss is not finite.
        OutputError: If the file can't be written.
        StoreError: If the file is damaged.
    """
    found = read_runs(path, wanted)
    missing = [identity for identity in wanted if identity not in found]
    if found and missing:
        note(f"{len(found)} of {len(wanted)} fine-tunings were measured before")
    jobs = [
        Job(f"subset {'+'.join(map(str, subset))}, seed {seed}", (identity, subset, seed, path.parent.resolve()))
        for identity in missing
        for subset, seed in [wanted[identity]]
    ]
    equipment = equip(config, path.parent.parent, rows, adapted, start_fingerprint)
    for _, run in scheduler.run(_measure, jobs, equipment, what="true fine-tunings"):
        found[run.identity] = run
        append_run(path, run)
    return {identity: found[identity] for identity in wanted}


def measure_base(path: Path, start_fingerprint: str, adapted: AdaptedModel, rows: Rows, config: RunConfig) -> TrueRun:
    """Score the base model, or where a warm-up ended: what no training at all would give; or read that back."""
    identity = artifacts.fingerprint(__version__, "base", rows.learning_fingerprint(), start_fingerprint)
    found = read_runs(path, [identity])
    if not found:
        started, meter = time.perf_counter(), Meter("truth")
        nll, correct = _score(adapted, THETA0, rows.validation, config, meter)
        chance, seconds = _find_chance(rows.validation), time.perf_counter() - started
        found[identity] = TrueRun(identity, (), 0, nll, correct, chance, 0, 0, 0.0, 0.0, meter.record.flops, seconds)
        append_run(path, found[identity])
    return found[identity]


def _measure(bench: Bench, identity: str, subset: Subset, seed: int, folder: Path) -> TrueRun:
    adapted, rows, config = bench.probe, bench.rows, bench.config
    started, meter = time.perf_counter(), Meter("truth")
    train, validation = ([splits[i] for i in subset] for splits in (rows.train, rows.validation))
    try:
        trained = training.fine_tune(
            adapted,
            _NAME,
            train,
            validation,
            settle_training(config),
            seed=seed_for(config.seed, "validation", str(seed), *(str(i) for i in subset)),
            checkpoints=folder / "checkpoints" / identity[:12],
            meter=meter,
        )
        flops = meter.record.flops  # what scoring costs is no part of the training
        nll, correct = _score(adapted, _NAME, validation, config, meter)
        moved = measure_distance(adapted, _NAME)
        with artifacts.atomic_folder(folder / "adapters" / identity[:16]) as scratch:
            save_adapter(adapted, _NAME, scratch)
            artifacts.seal_folder(scratch)
    finally:
        remove_adapter(adapted, _NAME)
    return TrueRun(
        identity=identity,
        tasks=tuple(split.task for split in train),
        seed=seed,
        nll=nll,
        correct=correct,
        chance=_find_chance(validation),
        n_steps=trained.n_steps,
        best_step=trained.best_step,
        distance=moved["absolute"],
        relative_distance=moved["relative_to_model"],
        flops=flops,
        seconds=time.perf_counter() - started,
    )


def _score(
    adapted: AdaptedModel, name: str, splits: Iterable[EncodedSplit], config: RunConfig, meter: Meter
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Every row's loss, and whether it is answered right."""
    nll, correct = {}, {}
    for split in splits:
        scores = predict_members(adapted, split, [name], max_tokens=config.evaluation.max_tokens_per_batch, meter=meter)
        nll[split.task] = [round(float(value), 7) for value in member_nll(scores, split.labels)[0]]
        is_text = split.kind == "sequence"
        correct[split.task] = [] if is_text else (scores.values[0].argmax(axis=1) == split.labels).astype(int).tolist()
    return nll, correct


def _find_chance(splits: Iterable[EncodedSplit]) -> dict[str, float]:
    return {s.task: float(np.bincount(s.labels).max() / s.n_examples) for s in splits if s.kind != "sequence"}


def _deal(n_tasks: int, size: int, generator: np.random.Generator) -> Iterator[Subset]:
    """Cut a shuffled list of all tasks into subsets; what is left over at its end is dropped."""
    order = generator.permutation(n_tasks).tolist()
    for first in range(0, n_tasks - size + 1, size):
        yield tuple(sorted(order[first : first + size]))
