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
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

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
    """one record per evaluation: step, mean validation NLL, last logged training loss"""


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
        meter: Told how many tokens were read.

    Raises:
        TrainingError: If the loss stops being finite.
    """
    add_adapter(adapted, name)
    schedule = schedule_training(train, config, seed=seed_for(seed, "batches", name))
    dataset = _Steps(train, schedule, adapted.base.pad_token_id)
    with activate(adapted, name, trainable=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        trainer = _GroupTrainer(
            adapted, name, dataset, validation, config, seed=seed_for(seed, "training", name) % 2**31, folder=checkpoints, meter=meter
        )
        trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
        trainer._load_best_model()
    state = trainer.state
    adapted.peft.eval()
    shutil.rmtree(checkpoints, ignore_errors=True)
    history = tuple(
        {"step": float(entry["step"]), "validation_nll": -float(entry[_METRIC])} for entry in state.log_history if _METRIC in entry
    )
    return TrainedAdapter(
        name=name,
        tasks=tuple(split.task for split in train),
        n_steps=len(schedule),
        best_step=int(state.best_global_step or len(schedule)),
        best_validation_nll=-float(state.best_metric if state.best_metric is not None else math.nan),
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
        *,
        seed: int,
        folder: Path,
        meter: Meter,
    ) -> None:
        self._adapted, self._name, self._meter = adapted, name, meter
        self._validation, self._config = validation, config
        super().__init__(
            model=adapted.peft,  # type: ignore[arg-type]
            args=_arguments(config, len(dataset), seed=seed, folder=folder, on_cpu=adapted.device.type == "cpu"),
            train_dataset=dataset,
            callbacks=[_Watch(name, len(dataset), config.num_train_epochs * config.evaluations_per_epoch)],
        )

    def get_train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=lambda items: {"batch": items[0]})  # type: ignore[arg-type]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        batch: Batch = inputs["batch"]
        count_training(self._meter, self._adapted.costs, batch)
        z = score_batch(self._adapted.network, batch, normalize=self._config.loss == "vocab_softmax").z
        return cross_entropy(z, batch, loss=self._config.loss).mean()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._adapted.peft.eval()
        tokens = 2 * self._config.max_tokens_per_batch
        score = -measure_validation_nll(self._adapted, self._name, self._validation, max_tokens=tokens, meter=self._meter)
        metrics = {_METRIC: score}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        save_adapter(self._adapted, self._name, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self._adapted, self._name, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint:
            load_adapter(self._adapted, self._name, Path(self.state.best_model_checkpoint))


class _Watch(TrainerCallback):
    """Evaluates and saves at evenly spaced steps (the last included), moves the bar, stops on a broken loss."""

    def __init__(self, name: str, n_steps: int, n_evaluations: int) -> None:
        self._stops = {max(1, round(n_steps * (i + 1) / n_evaluations)) for i in range(n_evaluations)}
        self._name, self._n_steps = name, n_steps
        self._bar: Iterator[int] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = track(range(self._n_steps - state.global_step + 1), f"train {self._name}")
        next(self._bar)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            next(self._bar, None)
        control.should_evaluate = control.should_save = state.global_step in self._stops

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise TrainingError(
                f"adapter {self._name!r}: training loss became {loss} at step {state.global_step}; lower training.learning_rate"
            )


def _arguments(config: TrainingConfig, n_steps: int, *, seed: int, folder: Path, on_cpu: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=n_steps,
        per_device_train_batch_size=1,  # an item is a whole planned batch
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=round(config.warmup_ratio * n_steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=min(10, n_steps),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=n_steps + 1,  # the callback decides when
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
        seed=seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=False,
    )


def _last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; a half-written one (no trainer state, which comes last) is removed."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        if (path / "trainer_state.json").is_file():
            found.append((int(path.name.rpartition("-")[2]), path))
        else:
            shutil.rmtree(path)
    return str(max(found)[1]) if found else None
