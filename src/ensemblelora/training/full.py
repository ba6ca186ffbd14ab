"""Full fine-tuning of the base model, through transformers' Trainer: the baseline without adapters.

In: the adapted model, one job, a config. Out: how it went, and the base's weights at the best checkpoint. Batches,
schedule, losses and the choice of the checkpoint are those of adapters. Every weight of the base is trained, embeddings
and output layer included, in float32 masters beside a base in half precision, which would swallow small steps.
Adapters are switched off meanwhile, and the base is afterwards bit by bit what it was.

Cost: three forward passes' FLOPs a token (accounting.formulas). Memory: weights, gradients, the weights of before and
of the best checkpoint in the base's precision; masters and AdamW's two moments in float32. There are no checkpoints to
go on from, which would take twelve bytes a weight: a killed training begins again.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel
from ensemblelora.config import TrainingConfig
from ensemblelora.counting import PassCosts, count_full_training
from ensemblelora.data.batching import plan_evaluations
from ensemblelora.errors import ModelError, TrainingError
from ensemblelora.placement import refuse_waiting
from ensemblelora.seeding import seed_for
from ensemblelora.training.steps import StepPlan, TrainingJob, TrainingPass, choose_layout
from ensemblelora.training.trainer import (
    StepWatch,
    load_steps,
    make_arguments,
    make_schedule,
    measure_row_losses,
    measure_validation_nll,
)
from ensemblelora.training.tuning import TrainedAdapter, checkpointed_activations, summarize

__all__ = ["base_weights", "fine_tune_full", "replaced_weights"]

_EVALUATION = "eval_nll_full"

Weights = dict[str, Tensor]
"""the base model's trained tensors, by their paths in the model, in its own precision"""


def fine_tune_full(
    adapted: AdaptedModel, job: TrainingJob, config: TrainingConfig, *, seed: int, folder: Path, meter: Meter
) -> tuple[TrainedAdapter, Weights]:
    """Train every weight of the base model, and put it back as it was.

    Args:
        adapted: The model.
        job: Rows and their weights; its name seeds the order of batches, its start is not looked at.
        config: Optimiser, schedule, batches.
        seed: The run's root seed.
        folder: Scratch folder; removed at the end.
        meter: Told what every pass costs, validation included.

    Returns:
        How it went, and the weights of the best checkpoint, on the processor.

    Raises:
        ModelError: If the base is quantised.
        TrainingError: If a training or validation loss is not finite.
    """
    layout = choose_layout(adapted, config)
    plan = StepPlan([job], config, seed=seed, layout=layout, pad_token_id=adapted.base.pad_token_id)
    arguments = make_arguments(
        adapted, config, len(plan), seed=seed_for(seed, "training", job.name), folder=folder, saves=False
    )
    with replaced_weights(adapted, {}) as bare, checkpointed_activations(bare, config):
        parameters = base_weights(bare)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        trainer = _FullTrainer(bare, job, parameters, plan, config, arguments, meter)
        trainer.train()
        bare.peft.zero_grad(set_to_none=True)
    shutil.rmtree(folder, ignore_errors=True)
    return summarize(job, len(plan), trainer.history), trainer.best


@contextmanager
def replaced_weights(adapted: AdaptedModel, weights: Mapping[str, Tensor]) -> Iterator[AdaptedModel]:
    """Put other weights into the base model, adapters switched off; on leaving, it is bit by bit what it was.

    Args:
        adapted: The model; theta0 must be its active adapter.
        weights: By path, of :func:`fine_tune_full`; those not named stay.

    Yields:
        The model without adapters, all of its blocks run each time; it is scored under the name theta0.

    Raises:
        ModelError: If the base is quantised.
    """
    parameters = base_weights(adapted)
    before = {path: parameter.detach().clone() for path, parameter in parameters.items()}
    were_trainable = {path: parameter.requires_grad for path, parameter in adapted.peft.named_parameters()}
    try:
        with adapted.peft.disable_adapter():
            _copy(parameters, weights)
            bare = replace(adapted, prefix=None, costs=_without_adapter(adapted.costs))
            vars(bare)["adapter_layers"] = ()  # no fast path that would run the adapters after all
            yield bare
    finally:
        _copy(parameters, before)
        for path, parameter in adapted.peft.named_parameters():
            parameter.requires_grad_(were_trainable[path])
        adapted.peft.eval()


def base_weights(adapted: AdaptedModel) -> dict[str, nn.Parameter]:
    """The base model's own parameters, by their paths in the model with adapters.

    Raises:
        ModelError: If the base is quantised: codes of four bits have no gradient; or if some weights are only there
            while their layer runs.
    """
    refuse_waiting(adapted.base.model, f"full fine-tuning of model {adapted.base.name!r}")
    adapters = set(adapted.peft.peft_config)
    found = {path: p for path, p in adapted.peft.named_parameters() if adapters.isdisjoint(path.split("."))}
    packed = [path for path, p in found.items() if not p.is_floating_point() or hasattr(p, "quant_state")]
    if packed:
        raise ModelError(
            f"full fine-tuning of model {adapted.base.name!r}: {len(packed)} of its weights are quantised and can't be "
            "trained; set model.quantization to none, or leave this method out"
        )
    return found


class _FullTrainer(Trainer):
    """Trainer that feeds planned passes to the bare model, and steps in float32."""

    def __init__(
        self,
        bare: AdaptedModel,
        job: TrainingJob,
        parameters: Mapping[str, nn.Parameter],
        plan: StepPlan,
        config: TrainingConfig,
        arguments: TrainingArguments,
        meter: Meter,
    ) -> None:
        self._bare, self._job, self._parameters, self._plan = bare, job, parameters, plan
        self._config, self._meter = config, meter
        self._masters = {path: p.detach().float().clone() for path, p in parameters.items()}
        self.best: Weights = {}
        stops = plan_evaluations(len(plan), config.num_train_epochs * config.evaluations_per_epoch)
        watch = StepWatch(f"train {job.name}", len(plan), stops, saves=False)
        super().__init__(model=bare.peft, args=arguments, train_dataset=plan, callbacks=[watch])
        self.remove_callback(PrinterCallback)  # it prints to stdout, where only results belong

    @property
    def history(self) -> tuple[dict[str, float], ...]:
        """Evaluations so far: ``step`` and ``validation_nll``."""
        found = [entry for entry in self.state.log_history if _EVALUATION in entry]
        return tuple({"step": float(one["step"]), "validation_nll": float(one[_EVALUATION])} for one in found)

    def get_train_dataloader(self) -> DataLoader[list[TrainingPass]]:
        """Give the planned steps as they are, in their order."""
        return load_steps(self._plan)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Let the optimiser step in float32: gradients are handed to the masters, and weights are cast from them."""
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self._bare.peft))
            groups = [
                {
                    "params": [master for path, master in self._masters.items() if (path in decayed) == is_decayed],
                    "weight_decay": self.args.weight_decay if is_decayed else 0.0,
                }
                for is_decayed in (True, False)
            ]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **options)
            self.optimizer.register_step_pre_hook(self._hand_down)
            self.optimizer.register_step_post_hook(self._hand_back)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        """Give the learning rates that an adapter would have."""
        if self.lr_scheduler is None:
            chosen: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(chosen, make_schedule(len(self._plan), self._config))
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Add up the gradients of a step's passes; one job has one."""
        losses = [super(_FullTrainer, self).training_step(model, {"pass": one}) for one in inputs["passes"]]
        return torch.stack(losses).sum()

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the mean loss over a pass's examples; refuse one that is not finite."""
        one: TrainingPass = inputs["pass"]
        normalize = self._config.loss == "vocab_softmax"
        count_full_training(self._meter, self._bare.costs, one.batch, normalize=normalize)
        loss = measure_row_losses(self._bare, one, self._config, meter=self._meter).mean()
        self._check_finite(float(loss.detach()), "training")
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the weights on the validation rows, and keep a copy of the best."""
        self._bare.peft.eval()
        tokens = 2 * self._config.max_tokens_per_batch
        nll = measure_validation_nll(self._bare, THETA0, self._job.validation, max_tokens=tokens, meter=self._meter)
        self._check_finite(nll, "validation")
        if nll < min((record["validation_nll"] for record in self.history), default=math.inf):
            self.best = {path: p.detach().to("cpu", copy=True) for path, p in self._parameters.items()}
        for parameter in self._parameters.values():  # PEFT's switch may have been at work
            parameter.requires_grad_(True)
        self.log({_EVALUATION: nll})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {_EVALUATION: nll})
        return {_EVALUATION: nll}

    def _hand_down(self, *_: Any) -> None:
        for path, master in self._masters.items():
            gradient = self._parameters[path].grad
            master.grad = None if gradient is None else gradient.float()
        clip_grad_norm_(self._masters.values(), self._config.max_grad_norm)

    def _hand_back(self, *_: Any) -> None:
        _copy(self._parameters, self._masters)

    def _check_finite(self, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"full fine-tuning: {what} loss became {loss} after {self.state.global_step} steps; "
                "lower training.learning_rate"
            )


def _copy(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for path, value in values.items():
            parameters[path].copy_(value)


def _without_adapter(costs: PassCosts | None) -> PassCosts | None:
    """Sizes of the bare model, whose blocks are all counted with each pass."""
    if costs is None:
        return None
    bare = replace(costs.adapter, layers=tuple(() for _ in costs.adapter.layers))
    return replace(costs, adapter=bare, n_lower=0)
