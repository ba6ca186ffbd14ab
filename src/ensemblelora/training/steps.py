"""What is computed in each optimiser step: every adapter's own batch, and which of these share a pass.

In: the jobs and a config. Out: a list of steps, each a few passes; a step's gradients are the sum of its passes'.
An adapter's batches are the same however many others train beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ensemblelora.adapters import AdaptedModel
from ensemblelora.config import TrainingConfig
from ensemblelora.data.batching import Batch, collate, schedule_training
from ensemblelora.data.encoding import EncodedSplit, Layout
from ensemblelora.seeding import seed_for
from ensemblelora.sharding import take_share

__all__ = ["StepPlan", "TrainingJob", "TrainingPass", "choose_layout", "plan_passes"]

_BUDGETS_PER_PASS = 4
"""Padded tokens of a shared pass, in token budgets of one adapter's step: its activations are kept at the same time."""
_MAX_WASTE = 0.25
"""Share of a shared pass's tokens that may be padding which the batches would not have alone."""


@dataclass(frozen=True, eq=False)
class TrainingJob:
    """One adapter to train."""

    name: str
    train: Sequence[EncodedSplit]
    """training splits of the group's tasks"""
    validation: Sequence[EncodedSplit]
    """their validation splits, for the choice of the checkpoint"""
    start: dict[str, Tensor] | None = None
    """the adapter's tensors to begin with; none: theta0's"""
    weights: Sequence[NDArray[np.float64]] | None = None
    """what each training example's loss is multiplied with, ``(n_examples,)`` a task; none: one"""
    title: str = ""
    """what messages call it; empty: its name"""


@dataclass(frozen=True, eq=False)
class TrainingPass:
    """A batch that holds the rows of one adapter, or of several in turn."""

    members: tuple[str, ...]
    batch: Batch
    row_counts: tuple[int, ...]
    """each member's rows in the batch"""
    example_counts: tuple[int, ...]
    """each member's examples"""
    weights: NDArray[np.float32] | None = None
    """of the examples' losses, ``(examples,)``; none: one"""


class StepPlan(Dataset[list[TrainingPass]]):
    """The planned optimiser steps of all jobs; item i is everything that step i computes."""

    def __init__(
        self,
        jobs: Sequence[TrainingJob],
        config: TrainingConfig,
        *,
        seed: int,
        layout: Layout,
        pad_token_id: int,
        is_shared_out: bool = False,
    ) -> None:
        """Plan the steps; shared out, this process takes its part of each of them."""
        self._is_shared_out = is_shared_out
        self._jobs, self._layout, self._pad_token_id = tuple(jobs), layout, pad_token_id
        self._max_tokens = _BUDGETS_PER_PASS * config.max_tokens_per_batch
        self._sizes = [[split.measure(layout) for split in job.train] for job in jobs]
        self._schedules = [
            schedule_training(job.train, config, seed=seed_for(seed, "batches", job.name), layout=layout)
            for job in jobs
        ]

    @property
    def step_counts(self) -> dict[str, int]:
        """How many steps each adapter has."""
        return {job.name: len(steps) for job, steps in zip(self._jobs, self._schedules, strict=True)}

    def __len__(self) -> int:
        return max(self.step_counts.values())

    def __getitem__(self, step: int) -> list[TrainingPass]:
        at_work = [j for j, steps in enumerate(self._schedules) if step < len(steps)]
        plan = plan_passes([self._measure(j, step) for j in at_work], self._max_tokens)
        return [self._make_pass([at_work[i] for i in indices], step) for indices in plan]

    def _measure(self, j: int, step: int) -> tuple[int, int]:
        """Rows and width of one job's own batch."""
        sizes = [
            (int(lengths[e]), int(counts[e]))
            for task, e in self._take(j, step)[0]
            for lengths, counts in (self._sizes[j][task],)
        ]
        return sum(count for _, count in sizes), max(length for length, _ in sizes)

    def _make_pass(self, jobs: Sequence[int], step: int) -> TrainingPass:
        parts = [[(self._jobs[j].train[task], e) for task, e in self._take(j, step)[0]] for j in jobs]
        batch = collate([part for own in parts for part in own], self._pad_token_id, layout=self._layout)
        n_examples = [len(own) for own in parts]
        rows = np.bincount(batch.row_example, minlength=sum(n_examples))
        return TrainingPass(
            members=tuple(self._jobs[j].name for j in jobs),
            batch=batch,
            row_counts=tuple(int(own.sum()) for own in np.split(rows, np.cumsum(n_examples)[:-1])),
            example_counts=tuple(n_examples),
            weights=self._weigh(jobs, step),
        )

    def _weigh(self, jobs: Sequence[int], step: int) -> NDArray[np.float32] | None:
        """Weights of the examples of a pass, where some job has any."""
        parts = [(self._jobs[j].weights, *self._take(j, step)) for j in jobs]
        if all(own is None and factor == 1 for own, _, factor in parts):
            return None
        weights = [
            factor * (1.0 if own is None else own[task][e]) for own, examples, factor in parts for task, e in examples
        ]
        return np.array(weights, np.float32)

    def _take(self, j: int, step: int) -> tuple[Sequence[tuple[int, int]], float]:
        """A job's examples of a step that are run here, and what their mean loss is multiplied with."""
        examples = self._schedules[j][step]
        return take_share(examples) if self._is_shared_out else (examples, 1.0)


def plan_passes(sizes: Sequence[tuple[int, int]], max_tokens: int) -> list[list[int]]:
    """Choose which batches share a pass: those of similar width, while they fit.

    Args:
        sizes: Rows and width of each batch.
        max_tokens: Padded tokens of a shared pass.

    Returns:
        Indices of each pass's batches, in ascending order; every batch occurs once.

    Example:
        >>> plan_passes([(8, 20), (8, 100), (4, 24)], max_tokens=2000)
        [[1], [0, 2]]
    """
    passes: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][1]):
        if passes and _can_share([sizes[j] for j in (*passes[-1], i)], max_tokens):
            passes[-1].append(i)
        else:
            passes.append([i])
    return [sorted(indices) for indices in passes]


def choose_layout(adapted: AdaptedModel, config: TrainingConfig) -> Layout:
    """Options train side by side; where the loss looks at the right answer alone, nothing else is run."""
    return "answer" if config.loss == "vocab_softmax" else adapted.layout


def _can_share(sizes: Sequence[tuple[int, int]], max_tokens: int) -> bool:
    n_padded = sum(rows for rows, _ in sizes) * max(width for _, width in sizes)
    n_own = sum(rows * width for rows, width in sizes)
    return n_padded <= max_tokens and n_own >= (1 - _MAX_WASTE) * n_padded
