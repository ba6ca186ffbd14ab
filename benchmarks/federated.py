"""The extension to 500 clients, measured: groups and boosters against one adapter for all, random groups, each alone.

    python benchmarks/federated.py --minutes 45   # recipes/federated-cpu.yaml; its budget is written there
    python benchmarks/federated.py --factors      # the same with means of factors; one for all and the fewest groups

The recipe is carried out in steps, the most telling first, each of which goes on from what the last one left: the
fewest groups beside one adapter for all and random groups; all numbers of groups; few boosters; each client alone; more
boosters; weights. After each, the record is written anew, ``results/federated-cpu.json``, which says what is still to
come. Stopped, or out of ``--minutes``, the same command goes on where it was. ``--factors`` writes
``results/federated-factors.json``, and needs the folder of the first.

* Clients are drawn again for the intervals. Test rows are scored once for each method; nothing is chosen by them.
* ``--engine process`` (the default here) and ``--engine simulation`` give the same losses; the second is Flower's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import keep_record

from ensemblelora import artifacts
from ensemblelora.config import load_as
from ensemblelora.config_federation import Baseline, FederationConfig
from ensemblelora.evaluation.metrics import compare_paired
from ensemblelora.federation.conclusion import LOSSES_FILE
from ensemblelora.federation.engines import run_federation, settle_paths
from ensemblelora.federation.record import FederationRecord, read_record
from ensemblelora.federation.results import name_partition
from ensemblelora.recipe import read_federation
from ensemblelora.reproduction.exhibit import Row
from ensemblelora.reproduction.tables import reproduce

RECIPE = Path(__file__).parents[1] / "recipes" / "federated-cpu.yaml"


_ALONE: tuple[Baseline, ...] = ("mtl-ft", "local")
_TIME_FILE = "benchmark.json"


class OutOfMinutes(KeyboardInterrupt):
    """The time that was asked for is over."""


@dataclass(frozen=True)
class Step:
    """A federation that is the last one and something more."""

    name: str
    config: FederationConfig


def main() -> None:
    """Carry out the federation, or go on with it, and keep its record."""
    arguments = read_arguments()
    overrides = (*arguments.set, f"engine.kind={arguments.engine}")
    config = read_federation(arguments.recipe, overrides)
    if arguments.minutes is not None:
        stop_after(arguments.minutes)
    told: list[str] = []
    try:
        for text in carry_out(config, arguments):
            told.append(text)  # one by one: what was told stays when the time is over
    except OutOfMinutes:
        if not told:
            raise SystemExit("nothing more was finished in time; the same command goes on") from None
        print("out of minutes: the record says what is still to come; the same command goes on", file=sys.stderr)
    print(told[-1], end="")


def carry_out(config: FederationConfig, arguments: argparse.Namespace) -> Iterator[str]:
    """Carry out what is left, and keep a record after each step; yields what there is to print of it."""
    name = "federated-factors" if arguments.factors else "federated-cpu"
    steps = [Step("factors", with_factors(config))] if arguments.factors else list_steps(config)
    first = find_begun(steps)
    for k, step in enumerate(steps[first:], start=first):
        print(f"step {k + 1} of {len(steps)}: {step.name}", file=sys.stderr, flush=True)
        with timed(Path(step.config.out)):
            run_federation(step.config, keeps_cache=k + 1 < len(steps))
        record = read_record(Path(step.config.out))
        if arguments.factors:
            result = compare_ways(read_record(Path(config.out)), record)
        else:
            result = summarize(record) | {"left": [later.name for later in steps[k + 1 :]]}
        recipe = config.model_dump(mode="json", exclude={"out"})
        with contextlib.redirect_stdout(io.StringIO()) as told:
            keep_record(name, {"recipe": recipe}, result, as_json=arguments.json, is_kept=not arguments.leave_record)
        yield told.getvalue()


def list_steps(config: FederationConfig) -> list[Step]:
    """Ever larger federations, the last of them the config's own; what is trained in one serves all later ones."""
    sizes, counts = config.groups.n_groups, sorted(config.boosting.n_rounds)
    fewest = config.evaluation.random_groups or sizes[0]
    grown: list[tuple[str, Sequence[int], Sequence[int], bool, int]] = [
        (f"{fewest} groups", (fewest,), (), False, 1),
        (f"{', '.join(map(str, sizes))} groups", sizes, (), False, 1),
        (f"boosters: {', '.join(map(str, counts[:1]))}", sizes, counts[:1], False, 1),
        ("each client alone", sizes, counts[:1], True, 1),
        *((f"boosters: {count}", sizes, counts[: k + 1], True, 1) for k, count in enumerate(counts) if k),
        ("weights", sizes, counts, True, config.evaluation.n_candidates),
    ]
    steps: list[Step] = []
    for name, *sizes_now in grown:
        step = Step(name, _shrink(config, *sizes_now))
        if not steps or step.config != steps[-1].config:
            steps.append(step)
    return steps


def _shrink(
    config: FederationConfig, n_groups: Sequence[int], n_rounds: Sequence[int], has_alone: bool, n_candidates: int
) -> FederationConfig:
    """Leave out what comes in a later step."""
    values = config.model_dump()
    values["groups"]["n_groups"], values["boosting"]["n_rounds"] = list(n_groups), list(n_rounds)
    values["evaluation"]["n_candidates"] = n_candidates
    if not has_alone:
        values["evaluation"]["baselines"] = [name for name in config.evaluation.baselines if name not in _ALONE]
    return FederationConfig.model_validate(values)


def find_begun(steps: Sequence[Step]) -> int:
    """The step that the run folder is at; what came before it is there."""
    place = Path(steps[0].config.out) / artifacts.CONFIG_FILE
    if not place.exists():
        return 0
    config = load_as(FederationConfig, place)
    return next((k for k, step in enumerate(steps) if settle_paths(step.config) == config), 0)


@contextlib.contextmanager
def timed(folder: Path) -> Iterator[None]:
    """Add the seconds inside to those of earlier attempts, in the run folder."""
    began = time.monotonic()
    try:
        yield
    finally:
        if (folder / artifacts.RUN_FILE).exists():
            spent = read_seconds(folder) + time.monotonic() - began
            artifacts.write_json(folder / _TIME_FILE, {"wall_seconds": spent})


def read_seconds(folder: Path) -> float:
    """Seconds of all attempts so far."""
    place = folder / _TIME_FILE
    return float(artifacts.read_json(place)["wall_seconds"]) if place.exists() else 0.0


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
        raise OutOfMinutes

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
        "wall_seconds": read_seconds(record.folder),
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
