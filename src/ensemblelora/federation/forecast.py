"""What a federation would cost, before it starts: FLOPs by formula, seconds from a measurement, bytes by counting.

In: a config. Out: one :class:`StageForecast` a stage, and the total. Nothing is written and nobody is asked: clients'
texts must be readable here. Batches are the very ones that clients will make; boosting is counted at its most, in
groups of equal size. Time is that of one client after the other on this machine; the choice of groups takes seconds
and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ensemblelora.accounting.meter import Meter, StageRecord
from ensemblelora.config_federation import FederationConfig
from ensemblelora.counting import count_bodies, count_gradients, count_lower, count_training
from ensemblelora.data.batching import Batch, plan_batches
from ensemblelora.federation.clients import load_clients
from ensemblelora.federation.moments import count_moments
from ensemblelora.federation.protocol import PARTS, Part
from ensemblelora.federation.results import name_partition
from ensemblelora.federation.worker import Worker, open_worker
from ensemblelora.gradients.backward import list_parts
from ensemblelora.speed import measure_speed

__all__ = ["StageForecast", "forecast_federation"]

_NOTHING = StageRecord("")


@dataclass(frozen=True)
class StageForecast:
    """One stage's expected cost, all clients together.

    Attributes:
        seconds: One client after the other, on this machine.
        flops: Of clients.
        n_tokens: That they read, every pass counted.
        down_bytes: From the server to clients.
        up_bytes: From clients.
    """

    seconds: float
    flops: int
    n_tokens: int
    down_bytes: int
    up_bytes: int


@dataclass(frozen=True)
class _Work:
    """What a stage runs and sends."""

    training: StageRecord = _NOTHING
    forward: StageRecord = _NOTHING
    down: float = 0.0  # adapters
    up: float = 0.0
    up_bytes: int = 0


@dataclass(frozen=True)
class _Units:
    """What stages are made of, each once for all clients' rows."""

    features: StageRecord
    epoch: StageRecord
    """a pass of training"""
    lower: StageRecord
    """blocks below the adapted ones, all parts"""
    body: dict[Part, StageRecord]
    """one adapter's pass without the output layer"""
    head: dict[Part, StageRecord]
    """the output layer once"""


def forecast_federation(config: FederationConfig) -> dict[str, StageForecast]:
    """Predict every stage's cost.

    Raises:
        UsageError: If config, clients or model are wrong, as the federation would say.
    """
    clients = load_clients(config.clients, seed=config.seed)
    worker = open_worker(config, clients)
    speed = measure_speed(worker.adapted, [worker.rows.splits["train"]], config.training.max_tokens_per_batch)
    n, size = len(clients), worker.template.start.nbytes
    stages = {
        name: StageForecast(
            seconds=speed.predict_seconds(work.training, work.forward),
            flops=work.training.flops + work.forward.flops,
            n_tokens=work.training.n_tokens + work.forward.n_tokens,
            down_bytes=round(work.down * n * size),
            up_bytes=round(work.up * n * size) + work.up_bytes,
        )
        for name, work in _list_work(config, worker, n)
    }
    names = ("seconds", "flops", "n_tokens", "down_bytes", "up_bytes")
    total = {name: sum(getattr(stage, name) for stage in stages.values()) for name in names}
    return {**stages, "total": StageForecast(**total)}


def _list_work(config: FederationConfig, worker: Worker, n: int) -> Iterator[tuple[str, _Work]]:
    units, settings = _count_units(config, worker), config.training
    passes = settings.num_train_epochs * settings.local_passes
    whole = _Work(_times(units.epoch, passes), down=settings.num_train_epochs, up=settings.num_train_epochs)
    yield "features", _Work(units.features, units.lower, up_bytes=_count_feature_bytes(config, worker))
    if "global" in config.evaluation.baselines:
        yield "global", whole
    sizes = [m for m in config.groups.n_groups if m <= n]
    for m in sizes:
        yield name_partition(m), whole
    if "random" in config.evaluation.baselines:
        yield "random", whole
    n_boosters = max(config.boosting.n_rounds, default=0)
    for m in sizes if n_boosters else ():
        yield f"boost-{m}", _boost(config, units, n_boosters / m)
    yield "validate", _score(units, "validation", len(sizes), n_boosters, sizes, len(config.boosting.n_rounds))
    plain = sum(name in config.evaluation.baselines for name in ("base", "global", "random"))
    tests = _score(units, "test", len(sizes) + plain, n_boosters, sizes, len(config.boosting.n_rounds))
    extra = config.evaluation.n_candidates if config.evaluation.n_candidates > 1 else 0
    weighed = _join(_times(units.body["validation"], extra), _times(units.head["validation"], extra))
    yield "evaluate", replace(tests, forward=_join(tests.forward, weighed))
    for name in ("mtl-ft", "local"):
        if name in config.evaluation.baselines:
            scored = [units.body[part] for part in ("validation", "test")] + [
                units.head[part] for part in ("validation", "test")
            ]
            yield name, _Work(_times(units.epoch, passes), _join(*scored), down=1)


def _boost(config: FederationConfig, units: _Units, per_group: float) -> _Work:
    """Boosters of one partition: a share of all clients each, with the adapters so far in every pass."""
    epochs = config.boosting.num_train_epochs
    passes = epochs * config.training.local_passes
    members = 2 + per_group / 2  # the group's own and theta0, and on average half of its boosters
    fixed = _times(units.body["train"], per_group * passes * members)
    checked = _join(
        _times(units.body["validation"], per_group * (members + 1)), _times(units.head["validation"], 2 * per_group)
    )
    down = per_group * (epochs * (1 + members) + members + 1)
    return _Work(_times(units.epoch, per_group * passes), _join(fixed, checked), down=down, up=per_group * epochs)


def _score(units: _Units, part: Part, n_plain: int, n_boosters: int, sizes: list[int], n_counts: int) -> _Work:
    """Losses of methods without boosters, and of each partition with some."""
    extra = sum(n_boosters / m + min(1.0, n_boosters / m) for m in sizes)
    heads = n_plain + sum(n_counts * min(1.0, n_boosters / m) for m in sizes)
    forward = _join(_times(units.body[part], n_plain + extra), _times(units.head[part], heads))
    return _Work(forward=forward, down=n_plain + sum(n_boosters / m for m in sizes))


def _count_units(config: FederationConfig, worker: Worker) -> _Units:
    costs, rows = worker.adapted.costs, worker.rows
    features, epoch, lower = (Meter(name) for name in ("features", "epoch", "lower"))
    body, head = ({part: Meter(part) for part in PARTS} for _ in range(2))
    flops = worker.projector.count_flops(list_parts(worker.layers))
    for client in range(len(rows.names)):
        for part in ("train", "validation"):
            for places, batch in worker.list_batches(client, part, max_tokens=config.features.max_tokens_per_batch):
                n = len(places)
                count_gradients(features, costs, batch, n_backwards=1, n_outputs=n, projection_flops=flops)
        for batch in _list_steps(config, worker, client):
            count_training(epoch, costs, batch)
        for part in PARTS:
            for _, batch in worker.list_batches(client, part, max_tokens=config.training.max_tokens_per_batch):
                if worker.adapted.prefix is not None:
                    count_lower(lower, costs, batch)
                count_bodies(body[part], costs, batch, n_bodies=1, n_heads=0)
                count_bodies(head[part], costs, batch, n_bodies=0, n_heads=1)
    return _Units(
        features=features.record,
        epoch=epoch.record,
        lower=lower.record,
        body={part: meter.record for part, meter in body.items()},
        head={part: meter.record for part, meter in head.items()},
    )


def _list_steps(config: FederationConfig, worker: Worker, client: int) -> Iterator[Batch]:
    """Batches of one pass of training, up to the order of rows."""
    split, rows, settings = worker.rows.splits["train"], worker.rows.find(client, "train"), config.training
    plan = plan_batches(
        split.input_lengths[rows],
        np.ones(len(rows), np.int64),
        settings.max_tokens_per_batch,
        max_examples=settings.max_examples_per_batch,
    )
    return (worker.collate("train", rows[places]) for places in plan)


def _count_feature_bytes(config: FederationConfig, worker: Worker) -> int:
    d = config.features.proj_dim
    if config.features.send == "moments":
        return 2 * 4 * count_moments(d) * len(worker.rows.names)
    return 4 * (1 + d) * sum(worker.rows.splits[part].n_examples for part in ("train", "validation"))


def _times(record: StageRecord, times: float) -> StageRecord:
    names = ("flops", "n_tokens", "n_padded_tokens", "dequantization_flops")
    return replace(record, **{name: round(getattr(record, name) * times) for name in names})


def _join(*records: StageRecord) -> StageRecord:
    total = _NOTHING
    for record in records:
        total = total.joined(record)
    return total
