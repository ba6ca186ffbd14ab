"""The linear model trained as the real one would be: the same number of optimiser steps, rate, schedule and batches.

A ridge stands for a training budget only as well as it was chosen. Here nothing is chosen: E epochs of AdamW are
simulated on the linear model, many subsets side by side, and the weights with the least validation loss among those
that the trainer would evaluate are kept, as it keeps its best checkpoint. In: training and validation blocks, subsets,
a :class:`TrainingBudget`. Out: weights ``(k, d)``. No torch.

AdamW divides every coordinate of the gradient by the root of its second moment. In projected coordinates only the mean
over coordinates is known, which is ``||g||^2 / p'``, so one number divides them all. It moves every trained number by
about the rate, also those that have no gradient at theta0 (LoRA's A) as soon as the others have moved, and these add to
what the training does. The expansion can't see them; going farther along the gradients by ``sqrt(p / p')``, so that the
distance is that of all p trained numbers, stands for them (docs/decisions/0009).

Where the blocks hold a share of the training rows, an epoch still has all of its steps, of as many rows: each row that
there is stands in for the others as often as any.

Cost: 6 E N_S c d flops a subset, linear in the rows. Memory: 4 c d bytes for each row of the batches of the subsets
that are simulated at once (``block_bytes``); training blocks are copied where they are small, and else read where they
lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ensemblelora.data.batching import plan_evaluations
from ensemblelora.estimation.loss import LinearRows, compute_logits, compute_probabilities, compute_row_nll
from ensemblelora.seeding import generator_for
from ensemblelora.store import FeatureBlock

__all__ = [
    "Optimizer",
    "TrainingBudget",
    "TrainingRows",
    "count_steps",
    "deal_rows",
    "find_rates",
    "mean_gradients",
    "simulate_training",
    "split_blocks",
]

FloatArray = npt.NDArray[np.float64]
Subset = tuple[int, ...]

_JOINED_BYTES = 2**28
"""of all tasks' gradients, up to which they are copied side by side: a batch of many tasks is then taken at once"""
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8  # AdamW's own, which transformers leaves as they are


@dataclass(frozen=True)
class TrainingBudget:
    """What a real fine-tuning does, as far as the linear model can follow it.

    Attributes:
        learning_rate: Peak.
        num_train_epochs: E.
        evaluations_per_epoch: After each of them the weights may be the ones that are kept.
        warmup_ratio: Share of the steps over which the rate rises.
        lr_scheduler_type: After the warm-up.
        weight_decay: AdamW's.
        max_grad_norm: Longer gradients are cut to this norm.
        steps_per_epoch: Optimiser steps that each task alone takes in one epoch; those of a subset add up.
        n_coordinates: p', the trained numbers that have a gradient.
        seed: Of the order of rows.
        n_trained: p, all trained numbers; none: those with a gradient.
        keeps_start: Whether the start is kept where no evaluation is better, as the trainer does. All trainings that do
            only harm are then predicted alike; a search among them needs to know which does less.
    """

    learning_rate: float
    num_train_epochs: int
    evaluations_per_epoch: int
    warmup_ratio: float
    lr_scheduler_type: Literal["linear", "cosine", "constant"]
    weight_decay: float
    max_grad_norm: float
    steps_per_epoch: tuple[float, ...]
    n_coordinates: float
    seed: int = 0
    n_trained: float | None = None
    keeps_start: bool = True

    @property
    def reach(self) -> float:
        """How much farther than the numbers with a gradient all trained numbers move, ``sqrt(p / p')``."""
        return 1.0 if self.n_trained is None else math.sqrt(self.n_trained / self.n_coordinates)


def simulate_training(
    train: Sequence[FeatureBlock],
    validation: Sequence[FeatureBlock],
    subsets: Sequence[Subset],
    budget: TrainingBudget,
    *,
    n_train: Sequence[int] | None = None,
    judges: Subset | None = None,
    block_bytes: int = 2**28,
) -> FloatArray:
    """Train the linear model on every subset of tasks.

    Args:
        train: One block per task.
        validation: One block per task; the epoch is chosen by the mean loss of the subset's own.
        subsets: Non-empty tuples of distinct task indices.
        budget: Steps, rate, schedule. A subset's order of rows depends on the budget's seed and the subset alone.
        n_train: Training rows of each task, where the blocks hold a share of them; none: the blocks hold all.
        judges: Tasks whose mean loss chooses the epoch instead, whatever the subset.
        block_bytes: Memory for the rows of the batches of the subsets that are simulated at once.

    Returns:
        Weights in the units of the features, shape ``(k, d)``.
    """
    rows, held = TrainingRows(train, n_train), [LinearRows.from_block(block) for block in validation]
    sizes = [_batch_size(rows, subset, budget) for subset in subsets]
    found = np.zeros((len(subsets), train[0].proj_dim))
    for which in split_blocks(sizes, rows.bytes_per_row, block_bytes):
        found[which] = _simulate(rows, held, [subsets[s] for s in which], budget, judges)
    return found


class TrainingRows:
    """All tasks' training rows, numbered one after the other, with classes and outputs padded to the largest."""

    def __init__(self, blocks: Sequence[FeatureBlock], n_train: Sequence[int] | None = None) -> None:
        self.blocks = blocks
        held = np.array([block.n_examples for block in blocks])
        self.counts = held if n_train is None else np.array(n_train)  # of an epoch
        self.starts = np.concatenate([[0], np.cumsum(held)])
        self.n_outputs = max(block.n_outputs for block in blocks)
        self.n_classes = max(block.decoder.shape[0] for block in blocks)
        n, task_of = int(self.starts[-1]), np.repeat(np.arange(len(blocks)), held)
        self.outputs = np.zeros((n, self.n_outputs))
        self.offsets = np.full((n, self.n_classes), -np.inf)
        decoders = np.zeros((len(blocks), self.n_classes, self.n_outputs))
        for i, block in enumerate(blocks):
            own = slice(self.starts[i], self.starts[i + 1])
            self.outputs[own, : block.n_outputs] = block.outputs
            self.offsets[own, : block.decoder.shape[0]] = np.where(block.class_mask, 0.0, -np.inf)
            decoders[i, : block.decoder.shape[0], : block.n_outputs] = block.decoder
        self.decoders, self.task_of = decoders, task_of
        self.labels = np.concatenate([np.asarray(block.labels) for block in blocks])
        self._joined = self._collect(np.arange(n)) if n * self.bytes_per_row <= _JOINED_BYTES else None

    @property
    def bytes_per_row(self) -> int:
        """Memory of a row's gradients."""
        return 4 * self.n_outputs * self.blocks[0].proj_dim

    def deal(self, task: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return one epoch's rows of a task: each one that is there, as often as it takes to make up all rows."""
        first, n = int(self.starts[task]), int(self.starts[task + 1] - self.starts[task])
        n_times, n_more = divmod(int(self.counts[task]), n)
        dealt = np.tile(np.arange(first, first + n), n_times)
        return np.append(dealt, first + generator.choice(n, n_more, replace=False)) if n_more else dealt

    def jacobians(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Projected gradients of some rows, ``(len(index), c, d)``."""
        return self._collect(index) if self._joined is None else self._joined[index]

    def _collect(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The same from where they lie, block by block."""
        found = np.zeros((len(index), self.n_outputs, self.blocks[0].proj_dim), np.float32)
        tasks = self.task_of[index]
        order = np.argsort(tasks, kind="stable")
        ends = np.searchsorted(tasks[order], np.arange(len(self.blocks) + 1))
        for i in np.unique(tasks):
            places = order[ends[i] : ends[i + 1]]
            block = self.blocks[i]
            found[places, : block.n_outputs] = block.features[index[places] - self.starts[i]]
        return found


def _simulate(
    rows: TrainingRows,
    held: Sequence[LinearRows],
    subsets: Sequence[Subset],
    budget: TrainingBudget,
    judges: Subset | None,
) -> FloatArray:
    per_epoch = np.array([count_steps(subset, budget) for subset in subsets])
    n_steps = per_epoch * budget.num_train_epochs
    n_stops = budget.num_train_epochs * budget.evaluations_per_epoch
    stops = [plan_evaluations(int(n), n_stops) for n in n_steps]
    generators = [generator_for(budget.seed, "simulated training", *map(str, subset)) for subset in subsets]
    optimizer = Optimizer(np.zeros((len(subsets), rows.blocks[0].proj_dim)), budget)
    best = np.zeros_like(optimizer.weights)
    least = np.full(len(subsets), np.inf)
    if budget.keeps_start:
        least = _validation_losses(held, [subset if judges is None else judges for subset in subsets], best)
    for epoch in range(budget.num_train_epochs):
        batches = [deal_rows(rows, *given) for given in zip(subsets, per_epoch, generators, strict=True)]
        for j in range(int(per_epoch.max())):
            active = np.flatnonzero(per_epoch > j)
            gradients = mean_gradients(rows, [batches[s][j] for s in active], optimizer.weights[active])
            done = epoch * per_epoch[active] + j  # steps before this one, (a,)
            optimizer.step(active, gradients, done, find_rates(done, n_steps[active], budget))
            due = np.array([s for s, n in zip(active, done, strict=True) if n + 1 in stops[s]], dtype=np.intp)
            judged = [subsets[s] if judges is None else judges for s in due]
            losses = _validation_losses(held, judged, optimizer.weights[due])
            is_better = losses < least[due]
            better = due[is_better]
            best[better], least[better] = optimizer.weights[better], losses[is_better]
    return best


class Optimizer:
    """AdamW in projected coordinates, many subsets side by side: one second moment each; changes ``weights``."""

    def __init__(self, weights: FloatArray, budget: TrainingBudget) -> None:
        self.weights, self._budget = weights, budget
        self._momentum, self._moment = np.zeros_like(weights), np.zeros(len(weights))

    def step(
        self, which: npt.NDArray[np.intp], gradients: FloatArray, done: npt.NDArray[np.int64], rates: FloatArray
    ) -> None:
        """Move the subsets ``which`` (a,) by one step at their rates (a,), after ``done`` others (a,)."""
        budget = self._budget
        norms = np.linalg.norm(gradients, axis=1)
        cut = np.minimum(1.0, budget.max_grad_norm / np.maximum(norms, _EPSILON))
        square = (cut * norms) ** 2 / budget.n_coordinates  # mean over the coordinates
        self._momentum[which] += (1 - _BETA_1) * (cut[:, None] * gradients - self._momentum[which])
        self._moment[which] += (1 - _BETA_2) * (square - self._moment[which])
        mean = self._momentum[which] / (1 - _BETA_1 ** (done + 1))[:, None]
        root = np.sqrt(self._moment[which] / (1 - _BETA_2 ** (done + 1))) + _EPSILON
        self.weights[which] -= rates[:, None] * (mean / root[:, None] + budget.weight_decay * self.weights[which])


def mean_gradients(rows: TrainingRows, batches: Sequence[npt.NDArray[np.int64]], weights: FloatArray) -> FloatArray:
    """Return gradients of batches' mean losses, each at its own weights, ``(a, d)``; equal sizes in one product."""
    sizes, width = np.array([len(batch) for batch in batches]), weights.shape[1]
    order = np.argsort(sizes, kind="stable")
    index, owned = np.concatenate([batches[s] for s in order]), np.repeat(sizes[order], sizes[order])
    ends = np.searchsorted(owned, np.unique(sizes), side="right")
    stacks = list(zip(np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1), (0, *ends[:-1]), ends, strict=True))
    jacobians = rows.jacobians(index)  # (b, c, d)
    u, small = rows.outputs[index], weights.astype(np.float32)  # (b, c), (a, d)
    for which, first, last in stacks:
        changes = np.matmul(jacobians[first:last].reshape(len(which), -1, width), small[which, :, None])
        u[first:last] += changes.reshape(last - first, -1)
    decoders = rows.decoders[rows.task_of[index]]  # (b, K, c)
    logits = np.einsum("bkc,bc->bk", decoders, u) + rows.offsets[index]
    residual = compute_probabilities(logits[:, :, None])[0][:, :, 0]  # (b, K)
    residual[np.arange(len(index)), rows.labels[index]] -= 1.0
    back = (np.einsum("bkc,bk->bc", decoders, residual) / owned[:, None]).astype(np.float32)
    found = np.zeros(weights.shape)
    for which, first, last in stacks:
        rows_back = back[first:last].reshape(len(which), 1, -1)
        found[which] = np.matmul(rows_back, jacobians[first:last].reshape(len(which), -1, width))[:, 0]
    return found


def _validation_losses(held: Sequence[LinearRows], subsets: Sequence[Subset], weights: FloatArray) -> FloatArray:
    """Mean over each subset's tasks of the mean loss, ``(k,)``."""
    losses = np.zeros(len(subsets))
    for i, rows in enumerate(held):
        members = [s for s, subset in enumerate(subsets) if i in subset]
        if members:
            losses[members] += compute_row_nll(compute_logits(rows, weights[members]), rows.labels).mean(axis=0)
    return losses / np.array([len(subset) for subset in subsets], dtype=np.float64)


def deal_rows(
    rows: TrainingRows, subset: Subset, n_steps: int, generator: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """Deal one epoch's rows of a subset to its steps, in random order."""
    own = np.concatenate([rows.deal(i, generator) for i in subset])
    return np.array_split(generator.permutation(own), n_steps)


def find_rates(step: npt.NDArray[np.int64], n_steps: npt.NDArray[np.int64], budget: TrainingBudget) -> FloatArray:
    """Return the learning rate of steps counted from 0, of so many, as transformers has it, times the reach."""
    # A constant rate has no warm-up there.
    n_warmup = np.round(budget.warmup_ratio * n_steps) * (budget.lr_scheduler_type != "constant")
    rising = step / np.maximum(1, n_warmup)
    share = np.clip((step - n_warmup) / np.maximum(1, n_steps - n_warmup), 0.0, 1.0)
    falling = {"linear": 1 - share, "cosine": 0.5 * (1 + np.cos(math.pi * share)), "constant": np.ones_like(share)}
    peak = budget.reach * budget.learning_rate
    return np.asarray(peak * np.where(step < n_warmup, rising, falling[budget.lr_scheduler_type]))


def count_steps(subset: Subset, budget: TrainingBudget) -> int:
    """Return the optimiser steps of one epoch on a subset."""
    return max(1, round(sum(budget.steps_per_epoch[i] for i in subset)))


def _batch_size(rows: TrainingRows, subset: Subset, budget: TrainingBudget) -> int:
    return -(-int(rows.counts[list(subset)].sum()) // count_steps(subset, budget))


def split_blocks(sizes: Sequence[int], bytes_per_row: int, block_bytes: int) -> Iterator[list[int]]:
    """Cut the subsets into blocks whose batches fit the memory together."""
    block: list[int] = []
    n_rows = 0
    for s, size in enumerate(sizes):
        if block and (n_rows + size) * bytes_per_row > block_bytes:
            yield block
            block, n_rows = [], 0
        block.append(s)
        n_rows += size
    if block:
        yield block
