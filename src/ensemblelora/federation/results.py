"""What came out: losses of every method over clients, what each cost, and what was sent. No torch.

In: losses by method and client, the ledger, the traffic. Out: :class:`Outcome`, plain values that JSON keeps. Clients
are what is drawn again for an interval: each counts once, by the mean loss of its own test rows. Only clients that
every method has a loss of are counted, so that all means are of the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora.config_federation import FederationConfig
from ensemblelora.errors import StoreError, TrainingError
from ensemblelora.evaluation.metrics import compare_paired
from ensemblelora.federation.exchange import StageTraffic, Traffic

__all__ = [
    "LOSSES_FILE",
    "MethodCost",
    "MethodOutcome",
    "Outcome",
    "add_traffic",
    "describe_traffic",
    "judge_methods",
    "list_refused",
    "name_partition",
    "read_outcome",
]

FloatArray = npt.NDArray[np.float64]
LOSSES_FILE = "losses.npz"
"""test loss of every client by method, NaN where there is none"""


@dataclass(frozen=True)
class MethodCost:
    """What a method takes.

    Attributes:
        flops: To make it: features and choice of groups, training, boosting; of clients, as they count them.
        adapter_bytes: Of all adapters it needs.
        bytes_per_client: Sent to and from a client to make it, in the mean over clients.
        passes: Forward passes of a prediction, in the mean over clients.
    """

    flops: int
    adapter_bytes: int
    bytes_per_client: float
    passes: float = 1.0


@dataclass(frozen=True)
class MethodOutcome:
    """How a method does on clients' test rows.

    Attributes:
        nll: Mean over clients, in nats.
        low: Lower end of its interval over clients.
        high: Upper end.
        difference: Mean of the loss less that of one global adapter; none without it.
        difference_low: Lower end of its interval.
        difference_high: Upper end.
        share_better: Of clients, for whom it is better than the global adapter.
        cost: What it takes; none for what costs nothing.
    """

    nll: float
    low: float
    high: float
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    share_better: float | None
    cost: MethodCost | None


@dataclass(frozen=True)
class Outcome:
    """Everything the page is made of, beside the plan and the ledger.

    Attributes:
        n_clients: Whose losses are in the table.
        n_registered: That took part at all.
        n_rows: Rows of each part, of all clients.
        methods: By name; ``ours`` is the partition that serves.
        served: Name of that partition in ``methods``.
        validation: Mean validation loss of each partition, by which it was chosen.
        weights: Mean weights of a client's group, the global adapter and the next best groups; empty if not weighed.
        residuals: What rank r could not hold of a round's mean change, by training.
        kept_boosters: Kept and tried boosters of each number of groups.
        traffic: Bytes and messages by stage.
        refused: Stage, client and reason of replies that could not be used, the first of each client and stage.
        privacy: Epsilons; see :class:`~.privacy.Guarantee`.
        server: Peak memory of the server's process, and bytes it holds of features and adapters.
        confidence: Of intervals.
    """

    n_clients: int
    n_registered: int
    n_rows: Mapping[str, int]
    methods: Mapping[str, MethodOutcome]
    served: str
    validation: Mapping[str, float]
    weights: Sequence[float]
    residuals: Mapping[str, float]
    kept_boosters: Mapping[str, tuple[int, int]]
    traffic: Mapping[str, Mapping[str, float]]
    refused: Sequence[tuple[str, str, str]]
    privacy: Mapping[str, Any]
    server: Mapping[str, int]
    confidence: float


def name_partition(n_groups: int, n_boosters: int = 0) -> str:
    """Name a partition in tables.

    Example:
        >>> name_partition(10), name_partition(10, 5)
        ('groups-10', 'groups-10-boost-5')
    """
    return f"groups-{n_groups}" + (f"-boost-{n_boosters}" if n_boosters else "")


def judge_methods(
    losses: Mapping[str, FloatArray], costs: Mapping[str, MethodCost], config: FederationConfig
) -> tuple[dict[str, MethodOutcome], npt.NDArray[np.bool_]]:
    """Average losses over clients, and compare each method with the global adapter on the same clients.

    Args:
        losses: Test loss of every client by method, ``(n_clients,)``, NaN where there is none.
        costs: By method.
        config: Intervals.

    Returns:
        Outcomes by method, and which clients were counted.

    Raises:
        TrainingError: If fewer than two clients have a loss of every method.
    """
    counted = np.all([np.isfinite(values) for values in losses.values()], axis=0)
    if counted.sum() < 2:
        raise TrainingError(f"{int(counted.sum())} clients sent test losses of every method, expected 2 or more")
    settings: dict[str, Any] = {
        "n_bootstrap": config.evaluation.n_bootstrap,
        "confidence": config.evaluation.confidence,
        "seed": config.seed,
    }
    codes = np.arange(int(counted.sum()))
    reference = losses["global"][counted] if "global" in losses else None
    found = {}
    for name, values in losses.items():
        own = values[counted]
        mean = compare_paired(own, np.zeros_like(own), codes, **settings)
        paired = None if reference is None or name == "global" else compare_paired(own, reference, codes, **settings)
        found[name] = MethodOutcome(
            nll=mean.difference,
            low=mean.low,
            high=mean.high,
            difference=None if paired is None else paired.difference,
            difference_low=None if paired is None else paired.low,
            difference_high=None if paired is None else paired.high,
            share_better=None if paired is None or reference is None else float((own < reference).mean()),
            cost=costs.get(name),
        )
    return found, counted


def add_traffic(traffic: Traffic, stages: Sequence[str], n_clients: int) -> float:
    """Bytes to and from a client in some stages, in the mean over clients."""
    records = [traffic.stages[stage] for stage in stages if stage in traffic.stages]
    return sum(sum(record.down.values()) + sum(record.up.values()) for record in records) / n_clients


def describe_traffic(record: StageTraffic) -> dict[str, float]:
    """A stage's totals, and the most that one client sent."""
    return {
        "n_messages": record.n_messages,
        "n_missing": record.n_missing,
        "n_refused": len(record.refused),
        "down_bytes": sum(record.down.values()),
        "up_bytes": sum(record.up.values()),
        "most_up_of_a_client_bytes": max(record.up.values(), default=0),
    }


def list_refused(traffic: Traffic) -> list[tuple[str, str, str]]:
    """Stage, client and reason of what was refused, the first of each client and stage."""
    seen: dict[tuple[str, str], str] = {}
    for stage, record in traffic.stages.items():
        for client, reason in record.refused:
            seen.setdefault((stage, client), reason)
    return [(stage, client, reason) for (stage, client), reason in seen.items()]


def read_outcome(values: Mapping[str, Any]) -> Outcome:
    """Take back what ``dataclasses.asdict`` gave and JSON kept.

    Raises:
        StoreError: If it is no outcome of a federation.
    """
    try:
        methods = {
            name: MethodOutcome(**{**one, "cost": one["cost"] and MethodCost(**one["cost"])})
            for name, one in values["methods"].items()
        }
        boosters = {name: (int(pair[0]), int(pair[1])) for name, pair in values["kept_boosters"].items()}
        refused = [tuple(entry) for entry in values["refused"]]
        return Outcome(**{**values, "methods": methods, "kept_boosters": boosters, "refused": refused})
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"results.json: no outcome of a federation ({error!r}); delete it and run again") from None
