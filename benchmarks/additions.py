"""Datasets that arrive later: what adding one costs and gives, beside a run of all of them from the beginning.

    python benchmarks/additions.py recipes/additions-cpu.yaml \
        --arrivals demo_sciq,recipes/cards/story_cloze_plain.yaml,demo_sst2_turned

The recipe's run is made once. Each arrival is added to it, and beside that all its tasks and the arrival are run from
the beginning, with the same settings; the one adapter for all tasks is left out of both. ``--set`` changes the recipe,
as of ``ensemblelora run``. Everything is kept under ``--out``: the same command goes on where it was, one with other
settings measures anew, and one that ran out of minutes says what is left.

* cost: FLOPs of the ledgers of both, of what chooses, trains and combines; and with tests.
* accuracy: mean over tasks of the ensemble's test accuracy, the difference row by row, its standard error over groups
  of test rows; of all tasks, of the arrival, and of the others. Not in it: seeds of training; ``--seeds`` repeats all.

An arrival that is predicted to belong nowhere is put where most is predicted, and the record says so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import keep_record, spread

from ensemblelora import artifacts, pipeline
from ensemblelora.accounting.meter import Ledger
from ensemblelora.additions import Change, add_task
from ensemblelora.additions.costs import compare_costs
from ensemblelora.config import RunConfig, load_config
from ensemblelora.estimation import compute_clustered_se
from ensemblelora.evaluation.rows import TaskRows, read_rows
from ensemblelora.journal import Journal

_JOURNAL = "journal.jsonl"
_METHOD = "ensemble"


def main() -> None:
    """Measure what there is time for, and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path, help="of the run that datasets are added to")
    parser.add_argument("--arrivals", required=True, help="names or files of cards, with commas between")
    parser.add_argument("--out", type=Path, default=Path("runs/additions"), help="where everything is kept")
    parser.add_argument("--training", choices=("onward", "whole"), default="onward", help="of the group it joins")
    parser.add_argument("--seeds", type=int, default=1, help="runs of everything")
    parser.add_argument("--minutes", type=float, default=240.0, help="nothing new is begun after so many")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes the recipe")
    parser.add_argument("--json", action="store_true", help="print the record")
    parser.add_argument("--leave-record", action="store_true", help="print the record and leave the kept one as it is")
    measure(parser.parse_args())


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Run what is missing, and return what is known of every arrival."""
    stop = time.monotonic() + 60 * asked.minutes
    known: dict[str, Mapping[str, Any]] = {}
    journal = Journal(asked.out / _JOURNAL)
    arrivals, left = asked.arrivals.split(","), []
    for seed in range(asked.seeds):
        config = load_config(asked.recipe, (*asked.set, f"seed={seed}", "evaluation.baselines=[base]"))
        for arrival in arrivals:
            name = f"seed {seed}, {Path(arrival).stem}, {asked.training}"
            identity = f"{name}, {artifacts.fingerprint(config)}"
            found = journal.find(identity)
            if found is None and time.monotonic() > stop:
                left.append(name)
                continue
            known[name] = found or journal.add(identity, _measure_one(config, arrival, asked, seed))
    result = {"arrivals": known, "summary": _summarize(list(known.values()))}
    settings = {"recipe": asked.recipe.name, "set": asked.set, "training": asked.training, "seeds": asked.seeds}
    if known:
        keep_record("additions", settings, result, as_json=asked.json, is_kept=not asked.leave_record)
    if left:
        print(f"left for another time: {'; '.join(left)}", file=sys.stderr)
    return result


def _measure_one(config: RunConfig, arrival: str, asked: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Add one dataset, run all from the beginning, and compare."""
    folder, stem = asked.out / f"seed-{seed}", Path(arrival).stem
    base = folder / "run"
    pipeline.run(config.model_copy(update={"out": str(base)}))
    change, is_forced = _add(base, arrival, folder / f"add-{stem}-{asked.training}", asked.training)
    data = config.data.model_copy(update={"tasks": (*config.data.tasks, arrival)})
    rerun = folder / f"rerun-{stem}"
    pipeline.run(config.model_copy(update={"out": str(rerun), "data": data}))
    costs = compare_costs(_read_flops(change.folder), _read_flops(rerun))
    added, whole = (read_rows(run / artifacts.TEST_ROWS_FILE) for run in (change.folder, rerun))
    return {
        "task": change.task,
        "place": change.place,
        "is_forced": is_forced,
        "groups": change.groups,
        "rerun_groups": _read_groups(rerun),
        "learning_share": costs.learning_share,
        "total_share": costs.total_share,
        "forecast_share": change.costs.learning_share,
        "flops": dict(costs.flops),
        "rerun_flops": dict(costs.rerun_flops),
        **compare_runs(added, whole, change.task),
    }


def _add(base: Path, arrival: str, out: Path, training: Any) -> tuple[Change, bool]:
    change = add_task(base, arrival, out, training=training)
    if change.place != "nowhere":
        return change, False
    best = max(change.options[:-1], key=lambda option: (option.is_allowed, option.gain))
    return add_task(base, arrival, out, training=training, place=best.place), True


def compare_runs(one: Mapping[str, TaskRows], other: Mapping[str, TaskRows], arrival: str) -> dict[str, Any]:
    """By how much one run's ensemble answers more test rows right than another's, with standard errors.

    Args:
        one: Rows of the run that the dataset was added to.
        other: Rows of the run from the beginning.
        arrival: The dataset.
    """
    tasks = [name for name in one if "accuracy" in one[name].values[_METHOD]]
    parts = {"all": tasks, "arrival": [arrival], "others": [name for name in tasks if name != arrival]}
    found: dict[str, Any] = {}
    for part, names in parts.items():
        means, ses, levels = [], [], []
        for name in names:
            rows = [run[name].values[_METHOD]["accuracy"] for run in (one, other)]
            if one[name].ids != other[name].ids:
                raise SystemExit(f"{name}: the two runs tested other rows")
            means.append(float((rows[0] - rows[1]).mean()))
            ses.append(float(compute_clustered_se(rows[0] - rows[1], one[name].groups)))
            levels.append([float(own.mean()) for own in rows])
        added, rerun = np.mean(levels, axis=0)
        found[part] = {
            "accuracy": float(added),
            "rerun_accuracy": float(rerun),
            "difference": float(np.mean(means)),
            "se": float(np.sqrt(np.sum(np.square(ses))) / len(ses)),
        }
    return {"accuracy": found}


def _read_flops(folder: Path) -> dict[str, int]:
    ledger = Ledger.from_dict(artifacts.read_json(folder / artifacts.COSTS_FILE))
    return {record.stage: record.flops for record in ledger.stages}


def _read_groups(folder: Path) -> list[list[str]]:
    plan = artifacts.read_json(folder / artifacts.PLAN_FILE)
    return [[plan["task_names"][task] for task in group] for group in plan["groups"]]


def _summarize(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not entries:
        return {}
    return {
        "learning_share": spread([entry["learning_share"] for entry in entries]),
        "total_share": spread([entry["total_share"] for entry in entries]),
        "difference": spread([entry["accuracy"]["all"]["difference"] for entry in entries]),
    }


if __name__ == "__main__":
    main()
