"""TAG: how much a step on one task lowers the loss of another, looked at while one adapter for all is trained.

    Z_ij = 1 - L_j(theta - rate grad L_i) / L_j(theta), averaged over training

(Fifty et al., "Efficiently identifying task groupings for multi-task learning", 2021; the paper's baseline, section
3.1). In: a pool. Out: the directed matrix, and what it cost: the whole training, and at every tenth step of it n
gradients and n^2 forward passes over batches.

The rate: AdamW takes steps of about its learning rate in every coordinate, along the signs of the gradient. A step of
plain gradient descent with the same number would be lost in rounding, so its rate is the one by which it lowers the
loss of its own task, to first order and averaged over tasks, as much as AdamW's would.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ensemblelora import training
from ensemblelora.accounting.meter import Meter, StageRecord
from ensemblelora.adapters import AdaptedModel, remove_adapter
from ensemblelora.comparison.pool import Pool
from ensemblelora.config import TrainingConfig
from ensemblelora.counting import count_forward, count_training
from ensemblelora.data.batching import Batch, collate, schedule_training
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import TrainingError
from ensemblelora.fusion import can_fuse, fused
from ensemblelora.passes import score
from ensemblelora.scoring import cross_entropy
from ensemblelora.seeding import seed_for

__all__ = ["STEPS_BETWEEN", "Lookahead", "count_looks", "level_gains", "match_rate", "measure_lookahead"]

FloatArray = npt.NDArray[np.float64]

STEPS_BETWEEN = 10
_NAME = "lookahead"
_LEAST_LOSS = 1e-4  # nats; below it, a loss's relative change is rounding


def measure_lookahead(pool: Pool) -> dict[str, Any]:
    """Train one adapter for all tasks, and look ahead from it; or read back what was seen.

    Broken off, it begins anew.

    Args:
        pool: The seed's.

    Returns:
        ``gains`` Z ``(n, n)``, row i for the step on task i; ``n_looks``; ``flops``, ``seconds``,
        ``peak_memory_bytes`` and ``added_memory_bytes`` of training and looking.

    Raises:
        TrainingError: If a loss becomes something else than a number.
    """
    inputs = (pool.rows.learning_fingerprint(), pool.start_fingerprint, pool.config.training, STEPS_BETWEEN)
    found: dict[str, Any] = pool.recall(_NAME, inputs, lambda: _train_looking(pool))
    return found


def level_gains(gains: npt.ArrayLike) -> FloatArray:
    """Turn Z into an affinity: ``(Z + Z^T) / 2``, its diagonal on the level of each task's other entries.

    ``Z_ii``, what a step does to its own batch, is no affinity to anyone, and many times the others. In the clustering
    it would count by one over the size of its group, and make a group of its own of every task that learns fast.

    Args:
        gains: Z ``(n, n)``; its diagonal is not looked at.

    Example:
        >>> level_gains([[9.0, 1.0, 3.0], [1.0, 0.0, 0.0], [3.0, 0.0, 5.0]])
        array([[2. , 1. , 3. ],
               [1. , 0.5, 0. ],
               [3. , 0. , 1.5]])
    """
    measured = np.asarray(gains, dtype=np.float64)
    found, n_others = (measured + measured.T) / 2, max(1, len(measured) - 1)
    np.fill_diagonal(found, 0.0)
    np.fill_diagonal(found, found.sum(axis=1) / n_others)
    return np.asarray(found)


def match_rate(gradients: Sequence[Sequence[Tensor]], learning_rate: float) -> float:
    """Return the rate of a gradient step that lowers its loss, to first order, as AdamW's step does.

    ``rate |g|_2^2 = learning_rate |g|_1``, summed over tasks: a step along the signs lowers the loss by the sum of the
    gradient's absolute values.

    Args:
        gradients: One list of tensors a task.
        learning_rate: AdamW's.
    """
    absolute = sum(float(part.abs().sum()) for own in gradients for part in own)
    squared = sum(float(part.square().sum()) for own in gradients for part in own)
    return learning_rate * absolute / squared if squared else learning_rate


class Lookahead(TrainerCallback):
    """After every tenth step, from the first on, tries a step on each task's batch and sees what it does to all."""

    def __init__(
        self,
        adapted: AdaptedModel,
        name: str,
        splits: Sequence[EncodedSplit],
        config: TrainingConfig,
        *,
        seed: int,
        meter: Meter,
    ) -> None:
        """Plan every task's batches.

        Args:
            adapted: The model that is trained.
            name: The adapter.
            splits: Training rows, one split a task.
            config: Batches, loss and learning rate.
            seed: The run's seed.
            meter: Told what every pass costs.
        """
        self._adapted, self._name, self._config, self._meter = adapted, name, config, meter
        self._batches = _LookBatches(adapted, splits, config, seed=seed)
        self._total = np.zeros((len(splits), len(splits)))
        self.n_looks = 0
        """how often it looked"""

    @property
    def gains(self) -> FloatArray:
        """Z, averaged over the looks so far."""
        return self._total / max(self.n_looks, 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look, if it is time."""
        if _is_time(state.global_step):
            self._total += self.look()
            self.n_looks += 1

    def look(self) -> FloatArray:
        """Z at the adapter as it is, ``(n, n)``; the adapter is left so.

        Raises:
            TrainingError: If a loss is not finite.
        """
        parameters = [p for p in self._adapted.peft.parameters() if p.requires_grad]
        batches = self._batches.take(self.n_looks)
        with _evaluating(self._adapted.peft), _kept(parameters) as start:
            before, gradients = zip(*(self._differentiate(batch, parameters) for batch in batches), strict=True)
            rate, after = match_rate(gradients, self._config.learning_rate), []
            for own in gradients:
                with torch.no_grad():
                    for parameter, value, gradient in zip(parameters, start, own, strict=True):
                        parameter.copy_(value - rate * gradient)
                    with self._alone():
                        after.append([self._measure(batch, is_trained=False).item() for batch in batches])
        losses = np.array(before)
        gains = (losses - np.array(after)) / np.maximum(losses, _LEAST_LOSS)
        if not np.isfinite(gains).all():
            raise TrainingError("a loss after a lookahead step is not finite; lower training.learning_rate")
        return np.asarray(gains)

    def _differentiate(self, batch: Batch, parameters: Sequence[nn.Parameter]) -> tuple[float, list[Tensor]]:
        with torch.enable_grad(), self._alone():
            loss = self._measure(batch, is_trained=True)
            return loss.item(), list(torch.autograd.grad(loss, parameters, materialize_grads=True))

    def _measure(self, batch: Batch, *, is_trained: bool) -> Tensor:
        """Mean loss over a batch, entered in the meter."""
        normalize, costs = _normalizes(self._config), self._adapted.costs
        count = count_training if is_trained else count_forward
        count(self._meter, costs, batch, normalize=normalize)
        z = score(self._adapted, batch, meter=self._meter, normalize=normalize).z
        return cross_entropy(z, batch, loss=self._config.loss).mean()

    def _alone(self) -> AbstractContextManager[Any]:
        """Run this adapter as it is now: without gradients, layers keep the weights that they met first."""
        return fused(self._adapted, [self._name]) if can_fuse(self._adapted) else nullcontext()


class _LookBatches:
    """A batch of every task for each look, one after the other and round again."""

    def __init__(
        self, adapted: AdaptedModel, splits: Sequence[EncodedSplit], config: TrainingConfig, *, seed: int
    ) -> None:
        once, self._layout = config.model_copy(update={"num_train_epochs": 1}), training.choose_layout(adapted, config)
        self._splits, self._pad_token_id = splits, adapted.base.pad_token_id
        self._schedules = [
            schedule_training([split], once, seed=seed_for(seed, _NAME, split.task), layout=self._layout)
            for split in splits
        ]

    def take(self, look: int) -> list[Batch]:
        """The batches of a look, counted from 0, in the order of tasks."""
        return [
            collate([(split, e) for _, e in schedule[look % len(schedule)]], self._pad_token_id, layout=self._layout)
            for split, schedule in zip(self._splits, self._schedules, strict=True)
        ]


def count_looks(
    adapted: AdaptedModel, splits: Sequence[EncodedSplit], config: TrainingConfig, *, seed: int
) -> tuple[StageRecord, StageRecord]:
    """Count what looking ahead costs besides the training, from the lowest adapted block up, without doing it.

    Args:
        adapted: The model.
        splits: Training rows, one split a task.
        config: Batches, loss, epochs.
        seed: The pool's root seed.

    Returns:
        Passes with a backward pass, and forward passes.
    """
    own_seed, layout = seed_for(seed, _NAME), training.choose_layout(adapted, config)
    schedule = schedule_training(splits, config, seed=seed_for(own_seed, "batches", _NAME), layout=layout)
    batches = _LookBatches(adapted, splits, config, seed=own_seed)
    trained, forward, normalize = Meter("train"), Meter("forward"), _normalizes(config)
    for look in range(sum(_is_time(step + 1) for step in range(len(schedule)))):
        for batch in batches.take(look):
            count_training(trained, adapted.costs, batch, normalize=normalize)
            count_forward(forward, adapted.costs, batch, times=len(splits), normalize=normalize)
    return trained.record, forward.record


def _is_time(step: int) -> bool:
    """Whether to look after a step, counted from 1."""
    return (step - 1) % STEPS_BETWEEN == 0


def _normalizes(config: TrainingConfig) -> bool:
    return config.loss == "vocab_softmax"


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Leave dropout out, and its random numbers to the training."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _kept(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Give the parameters' values, and put them back in the end, to the bit."""
    before = [p.detach().clone() for p in parameters]
    try:
        yield before
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def _train_looking(pool: Pool) -> dict[str, Any]:
    config, seed = pool.config.training, seed_for(pool.config.seed, _NAME)
    checkpoints = pool.folder / "checkpoints" / _NAME
    shutil.rmtree(checkpoints, ignore_errors=True)  # what had been seen up to there is gone
    try:
        with Meter("train") as meter:
            looking = Lookahead(pool.probe, _NAME, pool.rows.train, config, seed=seed, meter=meter)
            training.fine_tune_together(
                pool.probe,
                [training.TrainingJob(_NAME, pool.rows.train, pool.rows.validation)],
                config,
                seed=seed,
                checkpoints=checkpoints,
                meter=meter,
                callbacks=[looking],
            )
    finally:
        remove_adapter(pool.probe, _NAME)
    spent = meter.record
    return {
        "gains": looking.gains.tolist(),
        "n_looks": looking.n_looks,
        "flops": spent.flops,
        "seconds": spent.wall_seconds,
        "peak_memory_bytes": spent.peak_memory_bytes,
        "added_memory_bytes": spent.added_memory_bytes,
    }
