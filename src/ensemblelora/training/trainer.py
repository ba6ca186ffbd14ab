"""transformers' Trainer for adapters in lock step; one adapter alone is a list of one.

In: the planned steps and each job's trainable tensors. Out: the trainer, whose ``train`` leaves every adapter's best
state in :attr:`AdapterTrainer.best` and its evaluations in the log. A step's gradients are added up over its passes;
an adapter whose steps are done has none, so the optimiser leaves it alone.

A checkpoint holds every adapter as it is and as it was at its best, beside the optimiser's and the generators' state.
It counts once it is sealed; the one before it goes only then.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler

from ensemblelora import artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel, adapter_state, load_adapter, save_adapter
from ensemblelora.config import TrainingConfig
from ensemblelora.counting import count_training
from ensemblelora.data.batching import plan_evaluations
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import TrainingError
from ensemblelora.passes import score
from ensemblelora.prediction import member_nll, predict_members
from ensemblelora.progress import track
from ensemblelora.scoring import cross_entropy
from ensemblelora.sharding import Team, join_team
from ensemblelora.switch import MemberSwitch
from ensemblelora.tensors import load_tensors, save_tensors
from ensemblelora.training import state
from ensemblelora.training.steps import StepPlan, TrainingJob, TrainingPass

__all__ = [
    "AdapterTrainer",
    "StepWatch",
    "load_steps",
    "make_arguments",
    "make_schedule",
    "measure_row_losses",
    "measure_validation_nll",
]

_BEST_FILE = "best.safetensors"


class AdapterTrainer(Trainer):
    """Trainer that feeds planned passes, scores labels only, and saves nothing but the adapters."""

    def __init__(
        self,
        adapted: AdaptedModel,
        jobs: Sequence[TrainingJob],
        parameters: Mapping[str, Mapping[str, nn.Parameter]],
        plan: StepPlan,
        config: TrainingConfig,
        arguments: TrainingArguments,
        meter: Meter,
        switch: MemberSwitch | None,
    ) -> None:
        """Put the parts together.

        Args:
            adapted: The model.
            jobs: Adapters to train; they are in the model.
            parameters: Each adapter's trainable tensors, by their paths in the model.
            plan: The steps.
            config: Optimiser, schedule, loss.
            arguments: Of :func:`make_arguments`.
            meter: Told what every pass costs, validation included.
            switch: Sends a batch's rows to their adapters; none where PEFT's own layers run the one adapter.
        """
        self._adapted, self._jobs, self._parameters, self._plan = adapted, tuple(jobs), parameters, plan
        self._config, self._meter, self._switch = config, meter, switch
        self._team = join_team() if adapted.base.is_sharded else Team()
        n_stops = config.num_train_epochs * config.evaluations_per_epoch
        self._stops = {name: plan_evaluations(n_steps, n_stops) for name, n_steps in plan.step_counts.items()}
        self.best: dict[str, dict[str, Tensor]] = {job.name: {} for job in jobs}
        """each adapter's tensors at its best evaluation so far; none before the first"""
        watch = StepWatch(_describe(self._jobs), len(plan), frozenset().union(*self._stops.values()))
        super().__init__(model=adapted.peft, args=arguments, train_dataset=plan, callbacks=[watch])
        self.remove_callback(PrinterCallback)  # it prints to stdout, where only results belong

    def history(self, name: str) -> tuple[dict[str, float], ...]:
        """One adapter's evaluations so far: ``step`` and ``validation_nll``."""
        key = _log_key(name)
        return tuple(
            {"step": float(entry["step"]), "validation_nll": float(entry[key])}
            for entry in self.state.log_history
            if key in entry
        )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leave the model where it was put when it was loaded."""

    def get_train_dataloader(self) -> DataLoader[list[TrainingPass]]:
        """Give the planned steps as they are, in their order."""
        return load_steps(self._plan)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make parameter groups for every adapter, so that each can have its own learning rate."""
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self._adapted.peft))
            groups = [
                {
                    "params": [p for path, p in parameters.items() if (path in decayed) == is_decayed],
                    "weight_decay": self.args.weight_decay if is_decayed else 0.0,
                }
                for parameters in self._parameters.values()
                for is_decayed in (True, False)
            ]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        """Give every adapter the learning rates of its own number of steps."""
        if self.lr_scheduler is None:
            chosen: Any = self.optimizer if optimizer is None else optimizer
            step_counts = self._plan.step_counts
            rates = [make_schedule(step_counts[name], self._config) for name in self._parameters]
            self.lr_scheduler = LambdaLR(chosen, [rate for rate in rates for _ in range(2)])  # two groups an adapter
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Add up the gradients of a step's passes, and cut each adapter's to its own norm."""
        losses: list[Tensor] = []
        for one in inputs["passes"]:
            losses.append(super().training_step(model, {"pass": one}, num_items_in_batch))
        if self._team.size > 1:
            self._team.add_up(p.grad for own in self._parameters.values() for p in own.values())
        for parameters in self._parameters.values():
            clip_grad_norm_(parameters.values(), self._config.max_grad_norm)
        return torch.stack(losses).sum()

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the sum over adapters of the mean loss over their examples; refuse one that is not finite."""
        one: TrainingPass = inputs["pass"]
        if self._switch is not None:
            self._switch.use(one.members, one.row_counts)
        for _ in range(self._team.size):  # the others run as much
            count_training(self._meter, self._adapted.costs, one.batch, normalize=_normalizes(self._config))
        losses = measure_row_losses(self._adapted, one, self._config, meter=self._meter).split(one.example_counts)
        means = torch.stack([own.mean() for own in losses])
        for name, loss in zip(one.members, means.detach().tolist(), strict=True):
            self._check_finite(name, loss, "training")
        return means.sum()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the adapters whose turn it is on their groups' own validation rows."""
        self._adapted.peft.eval()
        with _kept_trainable(self._parameters), _uncompiled(self._config):
            due = [job for job in self._jobs if self._is_due(job.name)]
            found = {_log_key(job.name): self._validate(job) for job in due}
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _is_due(self, name: str) -> bool:
        # A training that goes on from a checkpoint begins with an evaluation that was made before.
        step = self.state.global_step
        return step in self._stops[name] and all(record["step"] != step for record in self.history(name))

    def _validate(self, job: TrainingJob) -> float:
        tokens = 2 * self._config.max_tokens_per_batch
        nll = measure_validation_nll(self._adapted, job.name, job.validation, max_tokens=tokens, meter=self._meter)
        self._check_finite(job.name, nll, "validation")
        if nll < min((record["validation_nll"] for record in self.history(job.name)), default=math.inf):
            self.best[job.name] = adapter_state(self._adapted, job.name)
        return nll

    def _check_finite(self, name: str, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"adapter {name!r}: {what} loss became {loss} after {self.state.global_step} steps; "
                "lower training.learning_rate"
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        shutil.rmtree(folder, ignore_errors=True)
        with artifacts.atomic_folder(folder) as scratch:
            self._save(str(scratch))
            state.save_optimizer(scratch, self.optimizer, self.lr_scheduler)
            state.save_random(scratch)
            self.state.save_to_json(str(scratch / "trainer_state.json"))
            artifacts.seal_folder(scratch)
        for path in folder.parent.glob("checkpoint-*"):
            if path != folder:
                shutil.rmtree(path, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        for job in self._jobs:
            folder = Path(output_dir or str(self.args.output_dir)) / job.name
            save_adapter(self._adapted, job.name, folder)
            save_tensors(folder / _BEST_FILE, self.best[job.name])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        for job in self._jobs:
            folder = Path(resume_from_checkpoint) / job.name
            load_adapter(self._adapted, job.name, folder)
            self.best[job.name] = load_tensors(folder / _BEST_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.load_random(Path(checkpoint))


def make_arguments(
    adapted: AdaptedModel, config: TrainingConfig, n_steps: int, *, seed: int, folder: Path, saves: bool = True
) -> TrainingArguments:
    """What transformers' Trainer is told; learning rates, clipping and the best checkpoint are each adapter's own.

    Args:
        adapted: The model.
        config: Optimiser and schedule.
        n_steps: Optimiser steps.
        seed: Of dropout.
        folder: For checkpoints.
        saves: Whether there are any.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=n_steps,
        per_device_train_batch_size=1,  # an item is a whole planned step
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        max_grad_norm=0.0,  # done before, adapter by adapter
        logging_steps=min(10, n_steps),
        logging_nan_inf_filter=False,
        eval_strategy="no",  # the callback decides when,
        eval_on_start=True,  # but for the start
        save_strategy="steps" if saves else "no",
        save_steps=n_steps + 1,
        load_best_model_at_end=False,  # every adapter has a best of its own
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


def load_steps(plan: StepPlan) -> DataLoader[list[TrainingPass]]:
    """Give the planned steps as they are, in their order."""
    return DataLoader(plan, batch_size=1, shuffle=False, collate_fn=_as_inputs)


def measure_row_losses(adapted: AdaptedModel, one: TrainingPass, config: TrainingConfig, *, meter: Meter) -> Tensor:
    """Loss of every example of a pass, times its weight, ``(examples,)``; the active adapter's or the switch's."""
    z = score(adapted, one.batch, meter=meter, normalize=_normalizes(config)).z
    losses = cross_entropy(z, one.batch, loss=config.loss)
    return losses if one.weights is None else losses * torch.from_numpy(one.weights).to(losses.device)


def measure_validation_nll(
    adapted: AdaptedModel, name: str, validation: Sequence[EncodedSplit], *, max_tokens: int, meter: Meter | None = None
) -> float:
    """Mean over tasks of the mean validation NLL of one adapter (nats)."""
    means = [
        member_nll(predict_members(adapted, split, [name], max_tokens=max_tokens, meter=meter), split.labels).mean()
        for split in validation
    ]
    return float(sum(means) / len(means))


class StepWatch(TrainerCallback):
    """Evaluates and saves where an adapter's turn comes, and moves the bar."""

    def __init__(self, title: str, n_steps: int, stops: frozenset[int], *, saves: bool = True) -> None:
        """Say how many steps there are, and after which ones something is due."""
        self._title, self._n_steps, self._stops, self._saves = title, n_steps, stops, saves
        self._bar: Iterator[int] = iter(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar at the first step that is left to do."""
        self._bar = track(range(self._n_steps - state.global_step), self._title)
        next(self._bar, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for an evaluation and a checkpoint where one is due."""
        next(self._bar, None)
        control.should_evaluate = state.global_step in self._stops
        control.should_save = control.should_evaluate and self._saves


@contextmanager
def _kept_trainable(parameters: Mapping[str, Mapping[str, nn.Parameter]]) -> Iterator[None]:
    """Let gradients reach all adapters again, however PEFT's switch was set inside."""
    try:
        yield
    finally:
        for own in parameters.values():
            for parameter in own.values():
                parameter.requires_grad_(True)


@contextmanager
def _uncompiled(config: TrainingConfig) -> Iterator[None]:
    """Leave a compiled model's code to the training steps: it is made again for every new way the model is run."""
    if not config.compile:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def make_schedule(n_steps: int, config: TrainingConfig) -> Any:
    """What the learning rate is multiplied by at each step: transformers' function of the step's number."""
    stand_in = torch.optim.SGD([torch.zeros(1)])  # a schedule is only made around an optimiser
    n_warmup = round(config.warmup_ratio * n_steps)
    schedule: Any = get_scheduler(config.lr_scheduler_type, stand_in, n_warmup, n_steps)
    return schedule.lr_lambdas[0]


def _describe(jobs: Sequence[TrainingJob]) -> str:
    return f"train {jobs[0].title or jobs[0].name}" if len(jobs) == 1 else f"train {len(jobs)} adapters"


def _normalizes(config: TrainingConfig) -> bool:
    return config.loss == "vocab_softmax"


def _log_key(name: str) -> str:
    return f"eval_nll_{name}"


def _as_inputs(items: list[list[TrainingPass]]) -> dict[str, list[TrainingPass]]:
    return {"passes": items[0]}
