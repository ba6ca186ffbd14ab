"""What a finished federation left, read back, and the words for its methods. No torch.

In: ``results.json``, ``plan.json``, ``costs.json``, ``config.yaml``, ``environment.json`` of a run folder. Out:
:class:`FederationRecord`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemblelora import artifacts
from ensemblelora.config import load_as
from ensemblelora.config_federation import FederationConfig
from ensemblelora.federation.partition import GroupPlan, read_plan
from ensemblelora.federation.results import Outcome, read_outcome
from ensemblelora.report.wording import count

__all__ = ["METHOD_TITLES", "FederationRecord", "read_record", "title_of"]

METHOD_TITLES = {
    "base": "the model as it is",
    "global": "one adapter for all (FedAvg)",
    "random": "random groups (FedAvg)",
    "mtl-ft": "one for all, then each alone",
    "local": "each client alone",
    "ours": "ours: the groups that serve",
    "weighted": "ours, weighed by each client",
}


@dataclass(frozen=True, eq=False)
class FederationRecord:
    """What a finished federation left."""

    folder: Path
    config: FederationConfig
    plan: GroupPlan
    outcome: Outcome
    costs: dict[str, Any]
    environment: dict[str, Any]


def read_record(folder: Path) -> FederationRecord:
    """Read a run folder.

    Raises:
        OutputError: If it is none.
        StoreError: If a file is missing or damaged.
    """
    path = artifacts.RunFolder.open(folder).path
    outcome = read_outcome(artifacts.read_json(path / artifacts.RESULTS_FILE))
    costs = artifacts.read_json(path / artifacts.COSTS_FILE)
    present = {"plan", *outcome.traffic}  # the ledger has stages of a larger federation in this folder, too
    return FederationRecord(
        folder=path,
        config=load_as(FederationConfig, path / artifacts.CONFIG_FILE),
        plan=read_plan(artifacts.read_json(path / artifacts.PLAN_FILE)),
        outcome=outcome,
        costs={**costs, "stages": [stage for stage in costs["stages"] if stage["stage"] in present]},
        environment=artifacts.read_json(path / artifacts.ENVIRONMENT_FILE),
    )


def title_of(name: str) -> str:
    """A method's title.

    Example:
        >>> title_of("groups-10-boost-5"), title_of("local")
        ('10 groups, 5 boosters', 'each client alone')
    """
    if name in METHOD_TITLES:
        return METHOD_TITLES[name]
    numbers = [int(part) for part in name.split("-") if part.isdigit()]
    return ", ".join(count(n, noun) for n, noun in zip(numbers, ("group", "booster"), strict=False))
