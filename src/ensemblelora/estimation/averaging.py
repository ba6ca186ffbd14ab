"""The linear model trained as federated averaging would train it: round by round, client by client.

In each round the clients that take part begin at their group's weights and take their own optimiser steps
(:mod:`.steps`: rate, AdamW begun anew, cut gradients); the mean of where they end, weighted with their rows, is the
group's next weights. The last ones are what is predicted with, since federated averaging chooses no checkpoint. In:
what stands for each client's rows, who takes part when, a :class:`TrainingBudget`. Out: weights ``(k, d)``. No torch.

Steps on the pooled rows would not do: an optimiser's step is as long whatever its gradient, so the mean of the steps of
n clients that have little in common is shorter than a pooled one by sqrt(n), and has a bit of each one's direction.

Cost: 4 c d flops for each row of every pass, for many subsets side by side. Memory: 40 d bytes for every client of a
round of the subsets that are simulated at once, and its batch (``block_bytes``). Slow twin: one client after the other,
in tests/test_averaging.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ensemblelora.estimation.steps import (
    Optimizer,
    TrainingBudget,
    TrainingRows,
    count_steps,
    deal_rows,
    find_rates,
    mean_gradients,
    split_blocks,
)
from ensemblelora.seeding import generator_for
from ensemblelora.store import FeatureBlock

__all__ = ["AbstractClients", "RowClients", "simulate_averaging"]

FloatArray = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Rounds = Sequence[Indices]


class AbstractClients(Protocol):
    """What stands for clients' training rows."""

    @property
    def proj_dim(self) -> int:
        """Width of the features, d."""

    @property
    def counts(self) -> FloatArray:
        """Training rows of each client."""

    @property
    def bytes_per_batch(self) -> int:
        """Memory that the gradient of one batch takes."""

    def deal(self, client: int, n_steps: int, generator: np.random.Generator) -> Sequence[Indices]:
        """Cut a pass over a client's rows into batches; what their indices mean is up to this class."""

    def mean_gradients(self, batches: Sequence[Indices], weights: FloatArray) -> FloatArray:
        """Return gradients of batches' mean losses, each at its own weights, ``(a, d)``."""


class RowClients:
    """Clients of whom every row's projected gradient is known."""

    def __init__(self, train: Sequence[FeatureBlock]) -> None:
        """Take a block for each client."""
        self._rows = TrainingRows(train)
        self.proj_dim = train[0].proj_dim
        self.counts = self._rows.counts.astype(np.float64)
        self.bytes_per_batch = int(self.counts.max()) * self._rows.bytes_per_row  # at most: a whole pass

    def deal(self, client: int, n_steps: int, generator: np.random.Generator) -> list[Indices]:
        """Cut a pass over a client's rows, in random order, into batches."""
        return deal_rows(self._rows, (client,), n_steps, generator)

    def mean_gradients(self, batches: Sequence[Indices], weights: FloatArray) -> FloatArray:
        """Return gradients of the mean cross-entropy."""
        return mean_gradients(self._rows, batches, weights)


def simulate_averaging(
    clients: AbstractClients, rounds: Sequence[Rounds], budget: TrainingBudget, *, block_bytes: int = 2**28
) -> FloatArray:
    """Train the linear model by federated averaging inside every subset.

    Args:
        clients: What stands for their rows.
        rounds: Of every subset, the clients of each round.
        budget: What a client does in a round: ``num_train_epochs`` passes of ``steps_per_epoch`` steps each. The rate
            falls from round to round. A subset's order of rows depends on the budget's seed and its rounds alone.
        block_bytes: Memory for the clients of a round of the subsets that are simulated at once.

    Returns:
        Weights in the units of the features, shape ``(k, d)``.
    """
    widths = [max(map(len, own)) for own in rounds]
    found = np.zeros((len(rounds), clients.proj_dim))
    for which in split_blocks(widths, 40 * clients.proj_dim + clients.bytes_per_batch, block_bytes):
        found[which] = _simulate(clients, [rounds[s] for s in which], budget)
    return found


def _simulate(clients: AbstractClients, rounds: Sequence[Rounds], budget: TrainingBudget) -> FloatArray:
    weights, n_rounds = np.zeros((len(rounds), clients.proj_dim)), np.array([len(own) for own in rounds])
    orders = [generator_for(budget.seed, "simulated rounds", *(str(part.tolist()) for part in own)) for own in rounds]
    for t in range(int(n_rounds.max())):
        subsets = np.flatnonzero(n_rounds > t).tolist()
        sizes = np.array([len(rounds[s][t]) for s in subsets])
        members, owners = np.concatenate([rounds[s][t] for s in subsets]), np.repeat(subsets, sizes)
        rates = find_rates(np.full(len(owners), t), n_rounds[owners], budget)
        batches = [
            _deal_passes(clients, client, orders[s], budget) for client, s in zip(members.tolist(), owners, strict=True)
        ]
        ends = _train_clients(clients, batches, weights[owners], rates, budget)
        shares, starts = clients.counts[members], np.cumsum(sizes) - sizes
        totals = np.add.reduceat(shares[:, None] * ends, starts)
        weights[subsets] = totals / np.add.reduceat(shares, starts)[:, None]
    return weights


def _deal_passes(
    clients: AbstractClients, client: int, generator: np.random.Generator, budget: TrainingBudget
) -> list[Indices]:
    n_steps = count_steps((client,), budget)
    return [batch for _ in range(budget.num_train_epochs) for batch in clients.deal(client, n_steps, generator)]


def _train_clients(
    clients: AbstractClients,
    batches: Sequence[Sequence[Indices]],
    starts: FloatArray,
    rates: FloatArray,
    budget: TrainingBudget,
) -> FloatArray:
    """Take the steps of clients side by side, each from its own weights with an optimiser of its own."""
    optimizer, n_steps = Optimizer(starts.copy(), budget), np.array([len(own) for own in batches])
    for j in range(int(n_steps.max())):
        active = np.flatnonzero(n_steps > j)
        gradients = clients.mean_gradients([batches[a][j] for a in active.tolist()], optimizer.weights[active])
        optimizer.step(active, gradients, np.full(len(active), j), rates[active])
    return optimizer.weights
