"""Fine-tune one adapter on one group of tasks, through transformers' Trainer.

In: the adapted model, the group's encoded splits, a config. Out: a :class:`TrainedAdapter`; the adapter itself
stays in the model under its name. Every adapter starts at theta0, where the features were taken.
The checkpoint kept is the one with the best mean validation score over the group's own tasks.

The steps of all epochs are planned before the first one as a plain list (a pure function of data, config and
seed), so a killed run skips what it had done and ends with the same adapter.
Cost: (4 P_m + 3 attention + 6 P_a) FLOPs per token and epoch; see accounting.formulas.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel, activate, add_adapter, load_adapter, save_adapter
from ensemblelora.config import TrainingConfig
from ensemblelora.counting import count_training
from ensemblelora.data.batching import Batch, collate, schedule_training
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import TrainingError
from ensemblelora.prediction import member_nll, predict_members
from ensemblelora.progress import track
from ensemblelora.scoring import cross_entropy, score_batch
from ensemblelora.seeding import seed_for

__all__ = ["TrainedAdapter", "fine_tune", "measure_validation_nll"]

_METRIC = "eval_score"


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

    Raises:
        TrainingError: If a training or validation loss is not finite.
        StoreError: If a checkpoint found in the scratch folder is damaged.
    """
    add_adapter(adapted, name)
    schedule = schedule_training(train, config, seed=seed_for(seed, "batches", name))
    dataset = _Steps(train, schedule, adapted.base.pad_token_id)
    arguments = _arguments(adapted, config, len(dataset), seed=seed_for(seed, "training", name), folder=checkpoints)
    try:
        with activate(adapted, name, trainable=True), _checkpointed_activations(adapted, config):
            trainer = _GroupTrainer(adapted, name, dataset, validation, config, arguments, meter)
            trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
    finally:
        adapted.peft.eval()
    state = trainer.state
    load_adapter(adapted, name, checkpoints / f"checkpoint-{state.best_global_step}")
    shutil.rmtree(checkpoints)
    history = tuple(
        {"step": float(entry["step"]), "validation_nll": -float(entry[_METRIC])}
        for entry in state.log_history
        if _METRIC in entry
    )
    return TrainedAdapter(
        name=name,
        tasks=tuple(split.task for split in train),
        n_steps=len(schedule),
        best_step=int(state.best_global_step or 0),
        best_validation_nll=-float(state.best_metric or 0.0),
        history=history,
    )


def measure_validation_nll(
    adapted: AdaptedModel, name: str, validation: Sequence[EncodedSplit], *, max_tokens: int, meter: Meter | None = None
) -> float:
    """Mean over tasks of the mean validation NLL of one adapter (nats)."""
    means = [
        member_nll(predict_members(adapted, split, [name], max_tokens=max_tokens, meter=meter), split.labels).mean()
        for split in validation
    ]
    return float(sum(means) / len(means))


class _Steps(Dataset[Batch]):
    """The planned optimiser steps; item i is the whole batch of step i."""

    def __init__(self, splits: Sequence[EncodedSplit], schedule: Sequence[Sequence[tuple[int, int]]], pad: int) -> None:
        self._splits, self._schedule, self._pad = splits, schedule, pad

    def __len__(self) -> int:
        return len(self._schedule)

    def __getitem__(self, step: int) -> Batch:
        return collate([(self._splits[task], example) for task, example in self._schedule[step]], self._pad)


class _GroupTrainer(Trainer):
    """Trainer that feeds planned batches, scores labels only, and saves nothing but the one adapter."""

    def __init__(
        self,
        adapted: AdaptedModel,
        name: str,
        dataset: _Steps,
        validation: Sequence[EncodedSplit],
        config: TrainingConfig,
        arguments: TrainingArguments,
        meter: Meter,
    ) -> None:
        self._adapted, self._name, self._meter = adapted, name, meter
        self._steps, self._validation, self._config = dataset, validation, config
        watch = _Watch(name, len(dataset), config.num_train_epochs * config.evaluations_per_epoch)
        super().__init__(model=adapted.peft, args=arguments, train_dataset=dataset, callbacks=[watch])
        self.remove_callback(PrinterCallback)  # it prints to stdout, where only results belong

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Give the planned steps as they are, in their order."""
        return DataLoader(self._steps, batch_size=1, shuffle=False, collate_fn=_as_inputs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the mean loss over one step's examples; refuse one that is not finite."""
        batch: Batch = inputs["batch"]
        count_training(self._meter, self._adapted.costs, batch)
        z = score_batch(self._adapted.network, batch, normalize=self._config.loss == "vocab_softmax").z
        loss = cross_entropy(z, batch, loss=self._config.loss).mean()
        self._check_finite(float(loss.detach()), "training")
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the adapter on the group's own validation rows."""
        self._adapted.peft.eval()
        tokens = 2 * self._config.max_tokens_per_batch
        nll = measure_validation_nll(self._adapted, self._name, self._validation, max_tokens=tokens, meter=self._meter)
        self._check_finite(nll, "validation")
        metrics = {_METRIC: -nll}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _check_finite(self, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"adapter {self._name!r}: {what} loss became {loss} after {self.state.global_step} steps; "
                "lower training.learning_rate"
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        save_adapter(self._adapted, self._name, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self._adapted, self._name, Path(resume_from_checkpoint))


class _Watch(TrainerCallback):
    """Evaluates and saves at evenly spaced steps (the last included), and moves the bar."""

    def __init__(self, name: str, n_steps: int, n_evaluations: int) -> None:
        self._stops = {max(1, round(n_steps * (i + 1) / n_evaluations)) for i in range(n_evaluations)}
        self._name, self._n_steps = name, n_steps
        self._bar: Iterator[int] = iter(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar at the first step that is left to do."""
        self._bar = track(range(self._n_steps - state.global_step), f"train {self._name}")
        next(self._bar, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for an evaluation and a checkpoint where one is due."""
        next(self._bar, None)
        control.should_evaluate = control.should_save = state.global_step in self._stops


def _as_inputs(items: list[Batch]) -> dict[str, Batch]:
    return {"batch": items[0]}


def _arguments(
    adapted: AdaptedModel, config: TrainingConfig, n_steps: int, *, seed: int, folder: Path
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=n_steps,
        per_device_train_batch_size=1,  # an item is a whole planned batch
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=round(config.warmup_ratio * n_steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_steps=min(10, n_steps),
        logging_nan_inf_filter=False,
        eval_strategy="no",  # the callback decides when
        save_strategy="steps",
        save_steps=n_steps + 1,
        save_total_limit=2,
        metric_for_best_model=_METRIC,
        greater_is_better=True,
        load_best_model_at_end=False,  # done after train(), from the adapter's own folder
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=True,
        report_to=list(config.report_to) or "none",
        seed=seed % 2**31,
        use_cpu=adapted.device.type == "cpu",
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # the model stays on its device, however many there are
    return arguments


@contextmanager
def _checkpointed_activations(adapted: AdaptedModel, config: TrainingConfig) -> Iterator[None]:
    """Recompute activations in the backward pass, if asked for; saves memory and costs a forward pass."""
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
    """The newest complete checkpoint; a half-written one (no trainer state, which comes last) is removed."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        if (path / "trainer_state.json").is_file():
            found.append((int(path.name.rpartition("-")[2]), path))
        else:
            shutil.rmtree(path)
    return str(max(found)[1]) if found else None
