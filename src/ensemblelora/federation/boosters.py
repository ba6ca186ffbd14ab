"""Boosting in a federation: adapters added to the group that still errs most, trained by its clients.

In: a partition's trained adapters. Out: :class:`Booster` records and their vectors. A round takes the group with the
largest training loss, as its clients last reported it, trains a fresh adapter from theta0 on

    cross-entropy of F + rate (z - z_theta0)

by federated averaging in that group, F being the group's outputs so far, and keeps it if the mean loss on the clients'
validation rows drops. A group whose round was rejected is left alone. What lies on disk of finished rounds is taken up.

Cost of a round: a training of the group's clients, with a forward pass more for each adapter in F; two losses of their
validation rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ensemblelora import artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.config_federation import FederationConfig
from ensemblelora.federation.adapters import Template, Vector
from ensemblelora.federation.exchange import Exchange
from ensemblelora.federation.protocol import Term
from ensemblelora.federation.rounds import Base, Plan, Trained, train_groups
from ensemblelora.federation.scores import Method, Sum, score_methods
from ensemblelora.progress import note

__all__ = ["Booster", "Boosters", "boost_groups"]

Groups = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Booster:
    """One round of boosting, kept or not.

    Attributes:
        group: Which was boosted.
        is_kept: Whether its clients' validation loss dropped.
        before: That loss before, in the mean over clients, in nats.
        after: With the booster.
        train_loss: The clients' own, with the booster in training.
        flops: Of the round.
        n_updates: Most adapters that one client sent.
    """

    group: int
    is_kept: bool
    before: float
    after: float
    train_loss: float
    flops: int
    n_updates: int


@dataclass(frozen=True, eq=False)
class Boosters:
    """A partition's boosters.

    Attributes:
        rounds: In their order, rejected ones among them.
        vectors: Of the kept ones, ``(n_kept, p)``.
        rate: What their change is multiplied with.
    """

    rounds: tuple[Booster, ...]
    vectors: npt.NDArray[np.float32]
    rate: float

    @property
    def kept(self) -> tuple[Booster, ...]:
        """Rounds whose adapter was kept."""
        return tuple(one for one in self.rounds if one.is_kept)

    def add_to(self, own: Vector, group: int, n_rounds: int) -> Sum:
        """A group's sum of adapters after the first so many kept rounds of all groups.

        Args:
            own: The group's adapter.
            group: Its index.
            n_rounds: Kept rounds, of whatever groups.
        """
        terms: list[tuple[Vector | None, float]] = [(own, 1.0)]
        for k, one in enumerate(self.kept[:n_rounds]):
            if one.group == group:
                terms += [(self.vectors[k], self.rate), (None, -self.rate)]
        return terms

    def count_flops(self, n_rounds: int) -> int:
        """FLOPs up to the last of so many kept rounds, rejected ones on the way included."""
        total, n_kept = 0, 0
        for one in self.rounds:
            if n_kept == n_rounds:
                break
            total, n_kept = total + one.flops, n_kept + one.is_kept
        return total


def boost_groups(
    exchange: Exchange,
    name: str,
    groups: Groups,
    trained: Trained,
    template: Template,
    config: FederationConfig,
    *,
    n_rounds: int,
    folder: Path,
    identity: str,
    meter: Meter,
) -> Boosters:
    """Add boosters to a partition, until so many are kept or every group was left alone.

    Args:
        exchange: Reaches the clients.
        name: Of the stage.
        groups: Clients of each.
        trained: Their adapters and training losses.
        template: Of adapters.
        config: Rate, epochs, rounds of averaging.
        n_rounds: Boosters to keep, at most.
        folder: Where finished rounds are kept.
        identity: Of everything the partition depends on.
        meter: Told what clients spent.
    """
    rate, losses = config.boosting.boosting_rate, dict(enumerate(trained.losses.tolist()))
    rounds: list[Booster] = []
    vectors: list[Vector] = []
    while losses and sum(one.is_kept for one in rounds) < n_rounds:
        group = max(losses, key=lambda g: (losses[g], len(groups[g])))
        so_far = Boosters(tuple(rounds), _stack(vectors, template), rate)
        t = len(rounds) + 1
        booster, vector = _carry_out(
            exchange, f"{name}-{t}", group, groups, trained, so_far, template, config,
            folder=folder, identity=artifacts.fingerprint(identity, name, t), stage=name, meter=meter,
        )  # fmt: skip
        rounds.append(booster)
        note(f"{name}, round {t}: group {group}, loss {booster.before:.4f} to {booster.after:.4f}")
        if booster.is_kept:
            vectors.append(vector)
            losses[group] = booster.train_loss
        else:
            del losses[group]
    return Boosters(tuple(rounds), _stack(vectors, template), rate)


def _carry_out(
    exchange: Exchange,
    name: str,
    group: int,
    groups: Groups,
    trained: Trained,
    so_far: Boosters,
    template: Template,
    config: FederationConfig,
    *,
    folder: Path,
    identity: str,
    stage: str,
    meter: Meter,
) -> tuple[Booster, Vector]:
    """One round, or what it left when it was carried out before."""
    record = folder / f"{name}.npz"
    if record.exists():
        arrays = artifacts.load_arrays(record)
        if str(arrays.get("identity", "")) == identity:
            return _read(arrays), arrays["vector"]
    before_flops, clients = meter.record.flops, tuple(groups[group])
    now = so_far.add_to(trained.vectors[group], group, len(so_far.kept))
    base = _make_base(now, so_far.rate, template)
    plan = Plan(name, [clients], [template.start], config.boosting.num_train_epochs, base)
    found = train_groups(
        exchange, plan, template, config,
        checkpoint=folder / f"{name}.rounds.npz", identity=identity, stage=stage, meter=meter,
    )  # fmt: skip
    vector = found.vectors[0]
    with_it: Sum = [*now, (vector, so_far.rate), (None, -so_far.rate)]
    methods = [
        Method("before", lambda client: now, ("validation",)),
        Method("after", lambda client: with_it, ("validation",)),
    ]
    before, after = _compare(
        exchange, methods, clients, template, folder / f"{name}.scores.npz", identity, stage, meter
    )
    booster = Booster(
        group=group,
        is_kept=after < before,  # written so that a loss that is not a number keeps nothing
        before=before,
        after=after,
        train_loss=float(found.losses[0]),
        flops=meter.record.flops - before_flops,
        n_updates=int(found.n_updates.max()),
    )
    _write(record, booster, vector, identity)
    for scratch in (folder / f"{name}.rounds.npz", folder / f"{name}.scores.npz"):
        scratch.unlink(missing_ok=True)
    return booster, vector


def _write(record: Path, booster: Booster, vector: Vector, identity: str) -> None:
    numbers = {key: np.array(value) for key, value in asdict(booster).items()}
    artifacts.save_arrays(record, {**numbers, "vector": vector, "identity": np.array(identity)})


def _compare(
    exchange: Exchange,
    methods: Sequence[Method],
    clients: Sequence[int],
    template: Template,
    keep: Path,
    identity: str,
    stage: str,
    meter: Meter,
) -> tuple[float, float]:
    """Mean validation losses of the group's clients that answered, before and after."""
    own = Exchange(
        exchange.cohort, tuple(exchange.clients[c] for c in clients), exchange.order, exchange.seconds, exchange.traffic
    )
    found = score_methods(
        own, methods, size=template.size, stage=stage, keep=keep, identity=identity, meter=meter
    ).losses["validation"]
    answered = np.isfinite(found["before"]) & np.isfinite(found["after"])
    if not answered.any():
        return float("nan"), float("nan")
    return float(found["before"][answered].mean()), float(found["after"][answered].mean())


def _make_base(terms: Sum, rate: float, template: Template) -> Base:
    """Number a sum's adapters."""
    vectors = [vector for vector, _ in terms if vector is not None]
    numbers = iter(range(1, len(vectors) + 1))
    own: tuple[Term, ...] = tuple((0 if vector is None else next(numbers), share) for vector, share in terms)
    return Base(_stack(vectors, template), own, rate)


def _stack(vectors: Sequence[Vector], template: Template) -> npt.NDArray[np.float32]:
    return np.stack(vectors) if vectors else np.zeros((0, template.size), np.float32)


def _read(arrays: Mapping[str, npt.NDArray[np.generic]]) -> Booster:
    return Booster(
        group=int(arrays["group"]),
        is_kept=bool(arrays["is_kept"]),
        before=float(arrays["before"]),
        after=float(arrays["after"]),
        train_loss=float(arrays["train_loss"]),
        flops=int(arrays["flops"]),
        n_updates=int(arrays["n_updates"]),
    )
