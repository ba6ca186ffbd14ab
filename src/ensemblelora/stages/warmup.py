"""The stage before features, where one is asked for (``gradients.linearize_at``): a short training on all tasks.

It takes a share of the epochs, which groups then don't train. In: the model at theta0, all tasks' rows. Out: the same
model, whose theta0 is where the warm-up ended. Leaves ``adapters/warmup/``. Cost: one training on all tasks for so many
epochs.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict

from ensemblelora import artifacts, training
from ensemblelora.adapters import AdaptedModel, save_adapter
from ensemblelora.config import RunConfig
from ensemblelora.stages.rows import Rows
from ensemblelora.startpoint import WARMUP, State, cut_training, is_warm, read_warmup, start_at
from ensemblelora.workspace import Workspace

__all__ = ["identify_start", "train_warmup", "warm_up"]


def identify_start(config: RunConfig, probe: AdaptedModel, rows: Rows | None = None) -> str:
    """Identity of theta0: model, adapter settings and seed, and of a warm-up its rows and settings.

    Args:
        config: The run's.
        probe: The model.
        rows: Of all tasks; none: of theta0 as it was before any warm-up.
    """
    start = artifacts.fingerprint(probe.base.fingerprint, config.adapter, config.seed)
    if rows is None or not is_warm(config):
        return start
    return artifacts.fingerprint(start, WARMUP, rows.learning_fingerprint(), cut_training(config)[0])


def warm_up(work: Workspace, probe: AdaptedModel, rows: Rows) -> AdaptedModel:
    """Move theta0 to where a warm-up ends, if one is asked for; the model is changed in place."""
    if not is_warm(work.config):
        work.drop_costs(WARMUP)
        return probe
    return start_at(probe, train_warmup(work, probe, rows))


def train_warmup(work: Workspace, probe: AdaptedModel, rows: Rows) -> State:
    """Fine-tune one adapter on all tasks for the epochs of the warm-up, or read it back; returns its tensors."""
    config, folder = work.config, work.folder.adapter(WARMUP)
    checkpoints = work.path / "checkpoints" / f"{WARMUP}-{work.start_fingerprint[:12]}"
    with work.stage(WARMUP, work.start_fingerprint) as stage:
        if stage.is_needed:
            trained = training.fine_tune(
                probe,
                WARMUP,
                rows.train,
                rows.validation,
                cut_training(config)[0],
                seed=config.seed,
                checkpoints=checkpoints,
                meter=stage.meter,
                keeps_last=True,
            )
            with artifacts.atomic_folder(folder) as scratch:
                save_adapter(probe, WARMUP, scratch)
                artifacts.write_json(scratch / "training.json", asdict(trained))
            shutil.rmtree(checkpoints, ignore_errors=True)
        stage.files.append(folder)
    return read_warmup(probe, folder)
