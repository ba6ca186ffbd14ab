"""Fine-tuning from theta0 to the best checkpoint, of one adapter or of several that share the base.

In: the adapted model, jobs, a config. Out: a :class:`TrainedAdapter` each; the best state stays in the model. The slow
twin of training together is training one by one.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ensemblelora import progress
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel, activate, add_adapter, set_adapter_state
from ensemblelora.artifacts import find_seal_fault
from ensemblelora.config import TrainingConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import ModelError
from ensemblelora.fusion import can_fuse, can_mix, fused
from ensemblelora.passes import blocks_run_again
from ensemblelora.seeding import seed_for
from ensemblelora.switch import MemberSwitch
from ensemblelora.training.steps import StepPlan, TrainingJob, choose_layout
from ensemblelora.training.trainer import AdapterTrainer, make_arguments

__all__ = ["TrainedAdapter", "checkpointed_activations", "fine_tune", "fine_tune_together", "summarize"]

_logger = logging.getLogger(__name__)

_TRACKED, _TRACKED_PLACE = "tensorboard", "TENSORBOARD_LOGGING_DIR"


@dataclass(frozen=True)
class TrainedAdapter:
    """How one fine-tuning went."""

    name: str
    tasks: tuple[str, ...]
    n_steps: int
    best_step: int
    best_validation_nll: float
    history: tuple[dict[str, float], ...]
    """one record per evaluation: ``step``, ``validation_nll``"""


def fine_tune(
    adapted: AdaptedModel,
    name: str,
    train: Sequence[EncodedSplit],
    validation: Sequence[EncodedSplit],
    config: TrainingConfig,
    *,
    seed: int,
    checkpoints: Path,
    meter: Meter,
    keeps_last: bool = False,
) -> TrainedAdapter:
    """Train the adapter ``name`` from theta0 and leave its best checkpoint in the model.

    Args:
        adapted: The model; the adapter is added to it.
        name: The adapter's name.
        train: Training splits of the group's tasks.
        validation: Their validation splits, for the choice of the checkpoint.
        config: Optimiser, schedule, batches.
        seed: The run's root seed; the adapter's own is derived from it and the name.
        checkpoints: Scratch folder; a run that finds one goes on from there. Removed at the end.
        meter: Told what every pass costs, validation included.
        keeps_last: Leave the last checkpoint: who removes it once the adapter is on disk never trains it twice.

    Raises:
        TrainingError: If a training or validation loss is not finite.
        OutputError: If a checkpoint can't be written; the last one is kept, and a new run goes on from there.
        StoreError: If a checkpoint found in the scratch folder is whole, but of another training.
    """
    job = TrainingJob(name, train, validation)
    (trained,) = fine_tune_together(
        adapted, [job], config, seed=seed, checkpoints=checkpoints, meter=meter, keeps_last=keeps_last
    )
    return trained


def fine_tune_together(
    adapted: AdaptedModel,
    jobs: Sequence[TrainingJob],
    config: TrainingConfig,
    *,
    seed: int,
    checkpoints: Path,
    meter: Meter,
    keeps_last: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[TrainedAdapter, ...]:
    """Train several adapters in lock step, and leave the best checkpoint of each in the model.

    In every step each adapter that still has steps contributes the batch it would have alone. Batches of similar
    width share a pass through the base; the others get passes of their own in the same step.

    Args:
        adapted: The model; the adapters are added to it.
        jobs: One an adapter, each with a name of its own.
        config: Optimiser, schedule, batches; the same for all.
        seed: The run's root seed; each adapter's own order of batches is derived from it and the name.
        checkpoints: Scratch folder; a run with the same jobs that finds one goes on from there. Removed at the end.
        meter: Told what every pass costs, validation included.
        keeps_last: Leave the last checkpoint, as of :func:`fine_tune`.
        callbacks: More of transformers' own, called after each step; they leave the adapters as they are.

    Returns:
        How it went, one record a job and in their order.

    Raises:
        ModelError: If there are several jobs and the model can't serve several adapters in one pass.
        TrainingError: If a training or validation loss is not finite; names the adapter.
        OutputError: If a checkpoint can't be written; the last one is kept, and a new run goes on from there.
        StoreError: If a checkpoint found in the scratch folder is whole, but of another training.
    """
    names = [job.name for job in jobs]
    if len(names) > 1 and not can_mix(adapted):
        listed = ", ".join(names)
        raise ModelError(f"adapters {listed}: can't share a pass (by kind or output layer); train them one by one")
    for job in jobs:
        add_adapter(adapted, job.name, job.start)
    layout = choose_layout(adapted, config)
    plan = StepPlan(
        jobs,
        config,
        seed=seed,
        layout=layout,
        pad_token_id=adapted.base.pad_token_id,
        is_shared_out=adapted.base.is_sharded,
    )
    dropout_seed = seed_for(seed, "training", *names)
    arguments = make_arguments(adapted, config, len(plan), seed=dropout_seed, folder=checkpoints)
    try:
        with (
            _all_trainable(adapted, names) as parameters,
            _sped_up(adapted, names, config) as switch,
            _tracked(config, checkpoints.parent.with_name(_TRACKED) / "-".join(names)),
        ):
            trainer = AdapterTrainer(adapted, jobs, parameters, plan, config, arguments, meter, switch)
            for callback in callbacks:
                trainer.add_callback(callback)
            trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
    finally:
        adapted.peft.eval()
    for name, state in trainer.best.items():
        set_adapter_state(adapted, name, state)
    if not keeps_last:
        shutil.rmtree(checkpoints)
    found = tuple(summarize(job, plan.step_counts[job.name], trainer.history(job.name)) for job in jobs)
    for job, one in zip(jobs, found, strict=True):
        if one.best_step == 0:
            title = job.title or one.name
            progress.note(f"{title}: training never lowered the validation loss; what it started from is kept")
    return found


def summarize(job: TrainingJob, n_steps: int, history: tuple[dict[str, float], ...]) -> TrainedAdapter:
    """How a training went, whose steps and evaluations are given."""
    best = min(history, key=lambda record: record["validation_nll"])  # the first of equals
    return TrainedAdapter(
        name=job.name,
        tasks=tuple(split.task for split in job.train),
        n_steps=n_steps,
        best_step=int(best["step"]),
        best_validation_nll=best["validation_nll"],
        history=history,
    )


@contextmanager
def _all_trainable(adapted: AdaptedModel, names: Sequence[str]) -> Iterator[dict[str, dict[str, nn.Parameter]]]:
    """Let gradients reach several adapters, of which PEFT can have one active; give each one's tensors by path."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name in names:
        with activate(adapted, name, trainable=True):
            found[name] = {path: p for path, p in adapted.peft.named_parameters() if p.requires_grad}
    with activate(adapted, names[0], trainable=True):
        for parameters in found.values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        yield found


@contextmanager
def _sped_up(adapted: AdaptedModel, names: Sequence[str], config: TrainingConfig) -> Iterator[MemberSwitch | None]:
    """Everything that changes how fast a step is, and not what it computes."""
    body: Any = adapted.network.base_model
    with ExitStack() as stack:
        stack.enter_context(checkpointed_activations(adapted, config))
        switch = stack.enter_context(fused(adapted, names)) if can_fuse(adapted) else None
        if config.compile:
            if adapted.device.type == "cpu":
                progress.note("compiling takes minutes on a processor; it pays in long runs on a GPU")
            body.compile(dynamic=True)
            stack.callback(setattr, body, "_compiled_call_impl", None)
        yield switch


@contextmanager
def _tracked(config: TrainingConfig, folder: Path) -> Iterator[None]:
    """Let TensorBoard write where its files stay: by itself it takes the scratch folder, which goes at the end."""
    if _TRACKED_PLACE in os.environ or not {"tensorboard", "all"} & set(config.report_to):
        yield
        return
    os.environ[_TRACKED_PLACE] = str(folder)
    try:
        yield
    finally:
        del os.environ[_TRACKED_PLACE]


@contextmanager
def checkpointed_activations(adapted: AdaptedModel, config: TrainingConfig) -> Iterator[None]:
    """Recompute activations in the backward pass, if asked for; saves memory and costs a forward pass.

    Where weights wait in memory or on disk, each block's are let go in between, asked for or not.
    """
    if adapted.base.is_waiting:
        with blocks_run_again(adapted):
            yield
        return
    if not config.gradient_checkpointing:
        yield
        return
    network = adapted.base.model
    enable = getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)
    disable = getattr(network, "activation_checkpointing_disable", network.gradient_checkpointing_disable)
    enable({"use_reentrant": False})  # the other kind gives frozen inputs no gradient
    try:
        yield
    finally:
        disable()


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole; one that is not, to the bit, is removed, and what it held trained again."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        if fault := find_seal_fault(path):
            _logger.warning("checkpoint %s is not used, and its steps are done again: %s", path, fault)
            shutil.rmtree(path)
        else:
            found.append((int(path.name.rpartition("-")[2]), path))
    return str(max(found)[1]) if found else None
