"""One adapter's fine-tuning as a job: in this process, or on a cluster beside others."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ensemblelora import __version__, artifacts, training
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel, adapter_state, remove_adapter, save_adapter
from ensemblelora.config import TrainingConfig
from ensemblelora.scheduling import Job
from ensemblelora.stages.bench import Bench, equip, measure_job, run_measured
from ensemblelora.stages.rows import Rows
from ensemblelora.workspace import Workspace

__all__ = [
    "CHECKPOINTS",
    "SHARED",
    "drop_checkpoints",
    "finish_whole",
    "identify_adapter",
    "train_elsewhere",
    "train_one",
    "write_adapter",
]

CHECKPOINTS = "checkpoints"
"""folder of a run, for trainings that were broken off"""
SHARED = "shared"
"""the baseline: one adapter for all tasks"""


def train_one(
    bench: Bench,
    name: str,
    group: Sequence[int],
    settings: TrainingConfig,
    identity: str,
    meter: Meter,
    *,
    is_whole: bool = False,
) -> None:
    """Train one adapter and write it.

    Args:
        bench: Model, rows and run folder.
        name: The adapter's.
        group: Its tasks.
        settings: Of the training.
        identity: Everything it depends on.
        meter: Told what every pass costs.
        is_whole: From the base model, whether or not groups go on from a warm-up.
    """
    bench.folder.forget(name)
    probe, rows = bench.probe, bench.rows
    train, validation = ([part[task] for task in group] for part in (rows.train, rows.validation))
    start = adapter_state(probe, probe.origin) if is_whole else None
    checkpoints = bench.folder.path / CHECKPOINTS / f"{name}-{identity[:12]}"
    with meter.part({identity: 1}):
        (trained,) = training.fine_tune_together(
            probe,
            [training.TrainingJob(name, train, validation, start=start)],
            settings,
            seed=bench.config.seed,
            checkpoints=checkpoints,
            meter=meter,
            keeps_last=True,
        )
    write_adapter(bench.folder, probe, trained, identity)
    shutil.rmtree(checkpoints, ignore_errors=True)


def train_elsewhere(
    work: Workspace,
    probe: AdaptedModel,
    groups: Mapping[str, Sequence[int]],
    identities: Mapping[str, str],
    rows: Rows,
    settings: TrainingConfig,
    meter: Meter,
) -> None:
    """Have a cluster train the adapters that are not there yet, those with most rows first.

    The baseline of all tasks, if it will be asked for, is longer than any and goes before them; nobody waits for it
    until :func:`finish_whole`.

    Args:
        work: Keeps them.
        probe: The model at its start point.
        groups: Tasks of every adapter, by its name.
        identities: Everything that each depends on.
        rows: Of all tasks.
        settings: Of the trainings.
        meter: Of the stage.
    """
    sizes = {name: sum(int(rows.train[task].tokens.size) for task in group) for name, group in groups.items()}
    jobs = [
        Job(f"adapter {name}", (name, tuple(groups[name]), settings, identities[name], False))
        for name in sorted(groups, key=lambda name: -sizes[name])
        if not work.folder.is_done(name, identities[name])
    ]
    if len(groups) > 1 and SHARED in work.config.evaluation.baselines and work.reaches("baselines"):
        _begin_whole(work, probe, rows)
    equipment = equip(work.config, work.path, rows, probe, work.start_fingerprint)
    for _ in run_measured(work.scheduler, _train_in_worker, jobs, equipment, meter, what="adapters"):
        pass
    if not work.begun:  # which has a checkpoint of its own
        drop_checkpoints(work.path)


def finish_whole(work: Workspace, probe: AdaptedModel, rows: Rows, meter: Meter) -> None:
    """Wait for a cluster to train the baseline of all tasks; nothing if it is there.

    Args:
        work: Keeps it.
        probe: The model.
        rows: Of all tasks.
        meter: Of the stage; the time is that of the job, from wherever in the run it began.
    """
    _begin_whole(work, probe, rows)
    started = time.perf_counter()
    for _, (_, spent) in work.begun.pop(SHARED, ()):
        meter.add_record(spent)
        meter.add_seconds(max(0.0, spent.wall_seconds - (time.perf_counter() - started)))
    drop_checkpoints(work.path)


def _begin_whole(work: Workspace, probe: AdaptedModel, rows: Rows) -> None:
    everyone, settings = range(len(rows.names)), work.config.training
    identity = identify_adapter(work, SHARED, everyone, rows, settings)
    if SHARED in work.begun or work.folder.is_done(SHARED, identity):
        return
    job = Job(f"adapter {SHARED}", (SHARED, tuple(everyone), settings, identity, True))
    equipment = equip(work.config, work.path, rows, probe, work.start_fingerprint)
    work.begun[SHARED] = work.scheduler.run(partial(measure_job, _train_in_worker), [job], equipment, what="baseline")


def identify_adapter(work: Workspace, name: str, group: Sequence[int], rows: Rows, settings: TrainingConfig) -> str:
    """Everything a trained adapter depends on; its name too, since that seeds the order of its batches."""
    return artifacts.fingerprint(__version__, name, rows.learning_fingerprint(group), work.start_fingerprint, settings)


def write_adapter(
    run: artifacts.RunFolder, probe: AdaptedModel, trained: training.TrainedAdapter, identity: str
) -> None:
    """Write an adapter's folder, and the marker that says it is whole."""
    folder = run.adapter(trained.name)
    with artifacts.atomic_folder(folder) as scratch:
        save_adapter(probe, trained.name, scratch)
        artifacts.write_json(scratch / "training.json", asdict(trained))
    run.mark_done(trained.name, identity, files=[folder])


def drop_checkpoints(folder: Path) -> None:
    """Remove what trainings that were broken off have left in a run folder, those of plans given up, too."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _train_in_worker(
    bench: Bench, name: str, group: Sequence[int], settings: TrainingConfig, identity: str, is_whole: bool, meter: Meter
) -> None:
    if bench.folder.is_done(name, identity):  # by a worker that was lost before it could say so
        return
    train_one(bench, name, group, settings, identity, meter, is_whole=is_whole)
    remove_adapter(bench.probe, name)
