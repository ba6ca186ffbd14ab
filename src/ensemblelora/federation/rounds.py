"""Rounds of federated averaging in several groups at once, broken off and taken up between any two rounds.

In: groups of clients, each with an adapter to begin with. Out: :class:`Trained`. In a round a share of every group's
clients train from their group's adapter, all at the same time; a group's new adapter is the mean of what comes back,
weighted with numbers of rows that no client can claim to be larger than it registered. Epoch after epoch each group's
clients are dealt to rounds anew, so that each takes part once an epoch.

A round in which too few of a group's clients answer leaves its adapter as it was. Cost: the clients' steps; the server
holds the adapters of the groups and those of one round. Slow twin: a plain loop over clients, in
tests/test_federation_rounds.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ensemblelora import artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.config_federation import FederationConfig
from ensemblelora.errors import TrainingError
from ensemblelora.federation.adapters import Template, Vector
from ensemblelora.federation.aggregation import aggregate
from ensemblelora.federation.dealing import deal_clients
from ensemblelora.federation.exchange import Exchange
from ensemblelora.federation.protocol import Refusal, Reply, Term, check_reply, read_count, read_number
from ensemblelora.progress import note, track

__all__ = ["Base", "Plan", "Trained", "train_groups"]

Groups = Sequence[Sequence[int]]
_LARGEST = 1e6  # of an adapter's numbers: beyond it, nothing was learnt and the others' share would be lost
_KEPT = ("vectors", "client_losses", "residuals", "n_rounds", "n_updates")


@dataclass(frozen=True, eq=False)
class Base:
    """What a booster is trained on top of: members ``(k, p)``, their terms, and the booster's rate."""

    members: npt.NDArray[np.float32]
    terms: tuple[Term, ...]
    rate: float


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be trained.

    Attributes:
        name: Of the training; it seeds who takes part when, and the order of clients' rows.
        groups: Clients of each.
        starts: An adapter for each to begin with.
        n_epochs: How often each client takes part.
        base: Of a booster; none: adapters are trained by themselves.
    """

    name: str
    groups: Groups
    starts: Sequence[Vector]
    n_epochs: int
    base: Base | None = None


@dataclass(frozen=True, eq=False)
class Trained:
    """What came of it.

    Attributes:
        vectors: Each group's adapter, ``(n_groups, p)``.
        losses: Mean training loss of each group's clients when they last took part, before their steps ``(n_groups,)``.
        residuals: What rank r could not hold, over the whole change, in the mean over each group's rounds.
        n_rounds: Rounds of each group that changed its adapter.
        n_updates: How often each client's adapter was asked for, ``(n_clients,)``.
    """

    vectors: npt.NDArray[np.float32]
    losses: npt.NDArray[np.float64]
    residuals: npt.NDArray[np.float64]
    n_rounds: npt.NDArray[np.int64]
    n_updates: npt.NDArray[np.int64]


@dataclass(eq=False)
class _State:
    """Everything that the next round depends on."""

    vectors: npt.NDArray[np.float32]
    client_losses: npt.NDArray[np.float64]  # (n_clients,), NaN before the first
    residuals: npt.NDArray[np.float64]  # sums over rounds
    n_rounds: npt.NDArray[np.int64]
    n_updates: npt.NDArray[np.int64]
    done: int = 0

    def save(self, path: Path, identity: str) -> None:
        arrays = {name: getattr(self, name) for name in _KEPT}
        artifacts.save_arrays(path, {**arrays, "done": np.int64(self.done), "identity": np.array(identity)})

    def take_up(self, path: Path, identity: str) -> None:
        """Go on from a file, if it is of this very training."""
        if path.exists():
            arrays = artifacts.load_arrays(path)
            if str(arrays.get("identity", "")) == identity:
                for name in _KEPT:
                    setattr(self, name, arrays[name])
                self.done = int(arrays["done"])


def train_groups(
    exchange: Exchange,
    plan: Plan,
    template: Template,
    config: FederationConfig,
    *,
    checkpoint: Path,
    identity: str,
    stage: str,
    meter: Meter,
) -> Trained:
    """Train an adapter for each group.

    Args:
        exchange: Reaches the clients.
        plan: What to train.
        template: Of the adapters.
        config: Rates, shares, aggregation.
        checkpoint: File that a broken-off training goes on from.
        identity: Of everything the training depends on; a checkpoint of another is not looked at.
        stage: Under which traffic is entered.
        meter: Told what clients spent.

    Raises:
        TrainingError: If a group has no round in which enough clients answered.
    """
    settings = config.training
    dealt = deal_clients(
        plan.groups, participation=settings.participation, n_epochs=plan.n_epochs, seed=config.seed, name=plan.name
    )
    state = _start(plan, len(exchange.clients))
    state.take_up(checkpoint, identity)
    n_rounds = max(map(len, dealt))
    for t in track(range(state.done, n_rounds), plan.name, total=n_rounds - state.done):
        asked = {g: rounds[t] for g, rounds in enumerate(dealt) if t < len(rounds)}
        rates = {g: _find_rate(config, t, len(dealt[g])) for g in asked}
        for clients in asked.values():
            state.n_updates[clients] += 1
        if config.privacy.update_noise_multiplier:
            state.save(checkpoint, identity)  # before: what is broken off was sent, too, and counts
        replies = _run_round(exchange, plan, state, asked, rates, t, template, stage, meter)
        for g, clients in asked.items():
            _move(state, g, clients, replies, exchange, template, config, plan.name)
        state.done = t + 1
        state.save(checkpoint, identity)
    _check_trained(state, plan)
    losses = np.array([np.nanmean(state.client_losses[list(group)]) for group in plan.groups])
    residuals = state.residuals / np.maximum(state.n_rounds, 1)
    return Trained(state.vectors, losses, residuals, state.n_rounds, state.n_updates)


def _start(plan: Plan, n_clients: int) -> _State:
    n_groups = len(plan.groups)
    return _State(
        vectors=np.stack(plan.starts).astype(np.float32),
        client_losses=np.full(n_clients, np.nan),
        residuals=np.zeros(n_groups),
        n_rounds=np.zeros(n_groups, np.int64),
        n_updates=np.zeros(n_clients, np.int64),
    )


def _find_rate(config: FederationConfig, t: int, n_rounds: int) -> float:
    falling = config.training.lr_scheduler_type == "linear"
    return config.training.learning_rate * (1 - t / n_rounds if falling else 1.0)


def _run_round(
    exchange: Exchange,
    plan: Plan,
    state: _State,
    asked: Mapping[int, npt.NDArray[np.int64]],
    rates: Mapping[int, float],
    t: int,
    template: Template,
    stage: str,
    meter: Meter,
) -> dict[int, tuple[Vector, int, float]]:
    """Ask all groups' clients of a round at once; adapter, rows and loss of each that answered well."""
    requests = {}
    for g, clients in asked.items():
        arrays = {"start": state.vectors[g]}
        values = {"name": f"{plan.name} {t}", "learning_rate": rates[g]}
        if plan.base is not None:
            arrays["members"] = plan.base.members
            values |= {"terms": [list(term) for term in plan.base.terms], "rate": plan.base.rate}
        for client in clients.tolist():
            requests[client] = exchange.make("train", arrays=arrays, values=values)

    def read(client: int, reply: Reply) -> tuple[Vector, int, float]:
        vector = check_reply(reply, {"adapter": (template.size,)}).arrays["adapter"]
        if (largest := float(np.abs(vector).max())) > _LARGEST:
            raise Refusal(f"adapter: numbers up to {largest:.3g}, expected none above {_LARGEST:g}")
        n_rows = read_count(reply, "n_examples", exchange.clients[client].n_rows["train"])
        return np.asarray(vector, np.float32), n_rows, read_number(reply, "loss")

    return exchange.ask(stage, requests, read, meter=meter, description=f"{plan.name}, round {t + 1}")


def _move(
    state: _State,
    g: int,
    clients: npt.NDArray[np.int64],
    replies: Mapping[int, tuple[Vector, int, float]],
    exchange: Exchange,
    template: Template,
    config: FederationConfig,
    name: str,
) -> None:
    """Put the mean of a group's replies in its adapter's place, if there are enough."""
    answered = [client for client in clients.tolist() if client in replies]
    if not answered or len(answered) < config.training.min_reply_share * len(clients):
        note(f"{name}: {len(answered)} of {len(clients)} clients of group {g} answered; the round changes nothing")
        return
    adapter = config.adapter
    found = aggregate(
        [replies[client][0] for client in answered],
        [replies[client][1] for client in answered],
        template,
        how=config.training.aggregation,
        scale=adapter.lora_alpha / adapter.r,
        trains_a=adapter.train_A,
    )
    state.vectors[g] = found.vector
    state.residuals[g] += found.residual
    state.n_rounds[g] += 1
    for client in answered:
        state.client_losses[client] = replies[client][2]


def _check_trained(state: _State, plan: Plan) -> None:
    idle = np.flatnonzero(state.n_rounds == 0)
    if len(idle):
        g = int(idle[0])
        raise TrainingError(
            f"{plan.name}: in no round of group {g} ({len(plan.groups[g])} clients) enough clients answered; lower "
            "training.min_reply_share, or see traffic.json for what they said"
        )
