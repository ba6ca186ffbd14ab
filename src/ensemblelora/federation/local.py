"""What a client does with its own rows: a few optimiser steps, and losses under sums of adapters' outputs.

In: a :class:`~.worker.Worker`, a client's index, adapters as vectors. Out: a vector, or losses. Outputs are added as
last hidden states, which is the sum of logits where the output layer is linear, so that the vocabulary is computed
once for a sum, however many adapters it has.

Cost: a step is a forward and a backward pass of the adapted blocks; a loss a forward pass for each adapter and the
output layer for each sum. Slow twin: one adapter at a time, logits added, in tests/test_federation_local.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ensemblelora.accounting.meter import Meter
from ensemblelora.counting import count_bodies, count_training
from ensemblelora.data.batching import Batch, plan_batches
from ensemblelora.federation.adapters import Vector
from ensemblelora.federation.protocol import Part, Term
from ensemblelora.federation.worker import CLIENT, Worker
from ensemblelora.fusion import can_fuse, fused
from ensemblelora.models import forked_generators
from ensemblelora.passes import compute_hidden, run_lower
from ensemblelora.scoring import cross_entropy, score_hidden
from ensemblelora.seeding import generator_for, seed_for

__all__ = ["Leaning", "LocalRun", "TokenScores", "score_sums", "train_locally"]


@dataclass(frozen=True, eq=False)
class Leaning:
    """What a booster is added to: the outputs of other adapters, which stay as they are.

    Attributes:
        members: Adapters, ``(k, p)``.
        terms: Which of them, 0 being theta0, times what.
        rate: What the booster's change from theta0 is multiplied with.
    """

    members: NDArray[np.float32]
    terms: tuple[Term, ...]
    rate: float


@dataclass(frozen=True, eq=False)
class LocalRun:
    """How a client's training went.

    Attributes:
        vector: The adapter.
        loss: Mean over the client's rows, each before the first step that it took part in.
        n_rows: Training rows.
    """

    vector: Vector
    loss: float
    n_rows: int


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Log-probabilities of each predicted token of a client's rows of a part, under several sums of adapters.

    Attributes:
        values: ``(n_sums, n_tokens)`` float64.
        row_of: The row of each token, ``(n_tokens,)``.
    """

    values: NDArray[np.float64]
    row_of: NDArray[np.int64]

    def losses(self) -> NDArray[np.float64]:
        """Mean over rows of each row's mean loss, ``(n_sums,)`` in nats; the same whatever else is asked for."""
        sizes = np.bincount(self.row_of)
        shares = 1.0 / (sizes[self.row_of] * len(sizes))
        return np.asarray(-(self.values * shares).sum(axis=1))  # a matrix product rounds by its shape


def train_locally(
    worker: Worker,
    client: int,
    start: Vector,
    *,
    name: str,
    rates: Sequence[float],
    meter: Meter,
    leaning: Leaning | None = None,
) -> LocalRun:
    """Take optimiser steps on one client's training rows.

    Args:
        worker: Model and rows.
        client: Whose rows.
        start: The adapter to begin with.
        name: Of the training and the round; with the client's own it seeds the order of rows.
        rates: The learning rate of each pass over the rows.
        meter: Told what every pass costs.
        leaning: What a booster is added to; none: the adapter is trained by itself.
    """
    settings, seed = worker.config.training, worker.config.seed
    generator = generator_for(seed, "client training", name, worker.rows.names[client])
    passes = [_plan_pass(worker, client, generator) for _ in rates]
    steps = [(rate, batch) for rate, batches in zip(rates, passes, strict=True) for batch in batches]
    fixed = [None if leaning is None else _add_members(worker, batch, leaning, meter) for _, batch in steps]
    worker.load(start)
    parameters = [parameter for parameter in worker.tensors.values() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rates[0], weight_decay=settings.weight_decay)
    losses = []
    with forked_generators(worker.adapted.device), _training(worker, seed_for(seed, name, worker.rows.names[client])):
        for (rate, batch), lean in zip(steps, fixed, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            loss = _measure_step(worker, batch, lean, leaning, meter)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            losses.append(float(loss.detach()))
    optimizer.zero_grad(set_to_none=True)
    sizes = [len(batch.labels) for batch in passes[0]]
    return LocalRun(worker.read(), float(np.average(losses[: len(sizes)], weights=sizes)), sum(sizes))


def score_sums(
    worker: Worker,
    client: int,
    part: Part,
    members: NDArray[np.float32],
    sums: Sequence[Sequence[Term]],
    *,
    meter: Meter,
) -> TokenScores:
    """Score a client's rows of a part under sums of adapters' outputs; each adapter is run once.

    Args:
        worker: Model and rows.
        client: Whose rows.
        part: Which of them.
        members: Adapters, ``(k, p)``; 0 in a sum's terms is theta0, 1 the first of these.
        sums: Terms of each.
        meter: Told what every pass costs.
    """
    needed = sorted({member for terms in sums for member, _ in terms})
    answers = worker.rows.list_answers(client, part)
    starts = np.cumsum([0, *answers])
    values = np.empty((len(sums), int(starts[-1])))
    max_tokens = worker.config.training.max_tokens_per_batch
    for places, batch in worker.list_batches(client, part, max_tokens=max_tokens):
        with torch.no_grad():
            lower = run_lower(worker.adapted, batch, meter=meter)
            hidden = {member: _run_member(worker, members, member, batch, lower) for member in needed}
            where = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in places])
            for k, terms in enumerate(sums):
                total = torch.stack([share * hidden[member] for member, share in terms]).sum(0)
                found = score_hidden(worker.adapted.network, batch, total).token_logprobs
                values[k, where] = found.double().cpu().numpy()
        count_bodies(meter, worker.adapted.costs, batch, n_bodies=len(needed), n_heads=len(sums))
    return TokenScores(values, np.repeat(np.arange(len(answers)), answers))


def _plan_pass(worker: Worker, client: int, generator: np.random.Generator) -> list[Batch]:
    """One pass over a client's rows in random order, cut into steps."""
    split, settings = worker.rows.splits["train"], worker.config.training
    rows = generator.permutation(worker.rows.find(client, "train"))
    plan = plan_batches(
        split.input_lengths[rows],
        np.ones(len(rows), np.int64),
        settings.max_tokens_per_batch,
        max_examples=settings.max_examples_per_batch,
    )
    return [worker.collate("train", rows[plan[i]]) for i in generator.permutation(len(plan))]


def _measure_step(worker: Worker, batch: Batch, fixed: Tensor | None, leaning: Leaning | None, meter: Meter) -> Tensor:
    """Mean loss over a batch's rows, with a gradient."""
    adapted = worker.adapted
    lower = run_lower(adapted, batch, meter=meter)
    with torch.enable_grad(), _fast(worker):
        hidden = compute_hidden(adapted, batch, lower=lower)
        if fixed is not None and leaning is not None:
            hidden = fixed + leaning.rate * hidden.float()
        loss = cross_entropy(score_hidden(adapted.network, batch, hidden).z, batch).mean()
    count_training(meter, adapted.costs, batch)
    return loss


def _add_members(worker: Worker, batch: Batch, leaning: Leaning, meter: Meter) -> Tensor:
    """What a booster's own output is added to: the other adapters' sum, less theta0's output times the rate."""
    terms = [*leaning.terms, (0, -leaning.rate)]
    needed = sorted({member for member, _ in terms})
    with torch.no_grad():
        lower = run_lower(worker.adapted, batch, meter=meter)
        hidden = {member: _run_member(worker, leaning.members, member, batch, lower) for member in needed}
        count_bodies(meter, worker.adapted.costs, batch, n_bodies=len(needed), n_heads=0)
        return torch.stack([share * hidden[member] for member, share in terms]).sum(0)


def _run_member(
    worker: Worker, members: NDArray[np.float32], member: int, batch: Batch, lower: Tensor | None
) -> Tensor:
    """One adapter's last hidden states at the predicted tokens, float32 ``(n_tokens, h)``."""
    worker.load(worker.template.start if member == 0 else members[member - 1])
    with _fast(worker):
        return compute_hidden(worker.adapted, batch, lower=lower).float()


def _fast(worker: Worker) -> AbstractContextManager[Any]:
    """Adapter layers computed by ourselves where they can be; the state must stay the same inside."""
    return fused(worker.adapted, [CLIENT]) if can_fuse(worker.adapted) else nullcontext()


@contextmanager
def _training(worker: Worker, seed: int) -> Iterator[None]:
    """Dropout on, if there is any, from a seed; off again on leaving."""
    if not worker.config.adapter.lora_dropout:
        yield
        return
    torch.manual_seed(seed % 2**31)
    worker.adapted.peft.train()
    try:
        yield
    finally:
        worker.adapted.peft.eval()
