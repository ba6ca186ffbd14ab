"""The extension to 500 clients, measured: groups and boosters against one adapter for all, random groups, each alone.

    python benchmarks/federated.py             # recipes/federated-cpu.yaml, about an hour on two cores
    python benchmarks/federated.py --factors   # the same with means of factors; one for all and the fewest groups

Stopped, or out of ``--minutes``, the same command goes on where it was. A record is written when all is done,
``results/federated-cpu.json`` or ``results/federated-factors.json``; the second needs the folder of the first.

* Clients are drawn again for the intervals; test rows are scored once, after everything was chosen by validation rows.
* ``--engine process`` (the default here) and ``--engine simulation`` give the same losses; the second is Flower's.
"""

from __future__ import annotations

import argparse
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import keep_record

from ensemblelora import artifacts
from ensemblelora.config_federation import FederationConfig
from ensemblelora.evaluation.metrics import compare_paired
from ensemblelora.federation.conclusion import LOSSES_FILE
from ensemblelora.federation.engines import run_federation
from ensemblelora.federation.record import FederationRecord, read_record
from ensemblelora.federation.results import name_partition
from ensemblelora.recipe import read_federation
from ensemblelora.reproduction.exhibit import Row
from ensemblelora.reproduction.tables import reproduce

RECIPE = Path(__file__).parents[1] / "recipes" / "federated-cpu.yaml"


def main() -> None:
    """Carry out the federation, or go on with it, and keep its record."""
    arguments = read_arguments()
    overrides = (*arguments.set, f"engine.kind={arguments.engine}")
    config = read_federation(arguments.recipe, overrides)
    name = "federated-cpu"
    if arguments.factors:
        exact, config, name = config, with_factors(config), "federated-factors"
    if arguments.minutes is not None:
        stop_after(arguments.minutes)
    run_federation(config)
    record = read_record(Path(config.out))
    result = compare_ways(read_record(Path(exact.out)), record) if arguments.factors else summarize(record)
    recipe = config.model_dump(mode="json", exclude={"out"})
    keep_record(name, {"recipe": recipe}, result, as_json=arguments.json, is_kept=not arguments.leave_record)


def read_arguments() -> argparse.Namespace:
    """What to measure, and for how long."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--engine", choices=("process", "simulation"), default="process")
    parser.add_argument("--factors", action="store_true", help="means of factors in place of exact means")
    parser.add_argument("--minutes", type=float, help="stop after so many; the same command goes on")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--json", action="store_true", help="print the record")
    parser.add_argument("--leave-record", action="store_true", help="write none")
    return parser.parse_args()


def stop_after(minutes: float) -> None:
    """Interrupt this process as a user would, also in the background, where shells have SIGINT ignored."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)


def with_factors(config: FederationConfig) -> FederationConfig:
    """The same clients, rows and steps; adapters are averaged factor by factor, and what is compared is trained."""
    values = config.model_dump()
    values["out"] = f"{config.out}-factors"
    values["training"]["aggregation"] = "factors"
    values["groups"]["n_groups"] = [min(config.groups.n_groups)]
    values["boosting"]["n_rounds"] = []
    values["evaluation"] |= {"baselines": ["global"], "random_groups": None, "n_candidates": 1}
    return FederationConfig.model_validate(values)


def summarize(record: FederationRecord) -> dict[str, Any]:
    """What a federation found, and the paper's four ratios."""
    outcome, found = record.outcome, record.plan
    ratios = {f"{row['row']} {row['column']}".replace(" ours ", " "): row["ours"] for row in _list_ratios(record)}
    return {
        **{name.replace(" ", "_"): ratio for name, ratio in ratios.items() if ratio is not None},
        "wall_seconds": sum(stage["wall_seconds"] for stage in record.costs["stages"]),
        "stages": {stage["stage"]: stage for stage in record.costs["stages"]},
        "outcome": asdict(outcome),
        "chosen": {
            "predicted": {**found.predicted, **{name_partition(m.n_groups): m.predicted_nll for m in found.found}},
            "sizes": {str(one.n_groups): [len(group) for group in one.groups] for one in found.found},
            "share_uncovered": found.share_uncovered,
            "surrogate_errors": dict(found.surrogate_errors),
            "l2_penalty": found.l2_penalty,
        },
    }


def compare_ways(exact: FederationRecord, factors: FederationRecord) -> dict[str, Any]:
    """Test loss under exact means less that under means of factors, client by client."""
    own, other = (artifacts.load_arrays(record.folder / LOSSES_FILE) for record in (exact, factors))
    settings = exact.config.evaluation
    differences = {}
    for name in ("global", name_partition(factors.plan.found[0].n_groups)):
        pairs = own[name], other[name]
        counted = np.isfinite(pairs[0]) & np.isfinite(pairs[1])
        values = [losses[counted] for losses in pairs]
        codes = np.arange(int(counted.sum()))
        found = compare_paired(
            *values, codes, n_bootstrap=settings.n_bootstrap, confidence=settings.confidence, seed=exact.config.seed
        )
        differences[name] = {
            "exact": float(values[0].mean()),
            "factors": float(values[1].mean()),
            "difference": found.difference,
            "low": found.low,
            "high": found.high,
            "cut_off": exact.outcome.residuals[name],
        }
    return {"ways": differences, "n_clients": int(counted.sum())}


def _list_ratios(record: FederationRecord) -> tuple[Row, ...]:
    return reproduce("extension", [record.folder]).rows


if __name__ == "__main__":
    main()
