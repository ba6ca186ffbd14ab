"""What a run was predicted to take, and what it took: 1, 2, 4 and 8 times the rows, and the tasks.

    python benchmarks/forecast.py --json            # some ten minutes on two cores, nothing else running

Tasks are parts of one dataset, so that more of them are more of the same. Rates of this machine are measured once, at
the smallest size; ``ensemblelora run --dry-run`` predicts every size from them, and the same run is then carried out in
a process of its own, whose ledger and files say what is true. Ratios are predicted over true: above 1, the forecast
was on the safe side.

* ``time_ratio``, ``memory_ratio``, ``disk_ratio``: geometric means over stages and sizes; ``..._worst`` is the ratio
  farthest from 1. A stage of less than half a second is no measurement of time; one that leaves no files, none of disk.
* ``sized_time_ratio``: the same for ``ensemblelora forecast``, which knows no more of the model than its config and of
  the rows than their number and mean length, at the rate of the smallest run's trainings; larger sizes alone.

The same command goes on where it was; ``--minutes`` begins nothing new after so many.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from common import Journal, finish_worker, keep_record, make_parser

MODEL, SOURCE = "smollm2-135m", "demo_boolq"
FACTORS = (1, 2, 4, 8)
TASKS, ROWS = 2, 12
"""tasks of the smallest run, and training rows of each; half as many validation rows, and test rows"""
N_PARTS = TASKS * max(FACTORS)
LENGTH = 128
CHANGES: Mapping[str, Mapping[str, Any]] = {}
"""of the config, beyond what is set here"""
LEAST_SECONDS = 0.5
STAGES = ("features", "train", "baselines", "combine", "evaluate")
PLACES = {"features": ("features",), "train": ("adapters/group*",), "baselines": ("adapters/shared",)}
"""files of the run folder that a stage leaves and a forecast counts"""


def main() -> None:
    """Predict every size, carry it out, and keep the ratios."""
    parser = make_parser(__doc__, rows=None, repeats="repeats", n_repeats=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="nothing new is begun after so many")
    parser.add_argument("--speed", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return finish_worker(work(arguments.worker, arguments.speed))
    stop = time.monotonic() + 60 * arguments.minutes
    journal = Journal(Path(__file__).parent / ".journal" / "forecast.jsonl", fresh=arguments.fresh)
    speed = json.dumps(journal.measure(__file__, ["speed"])["speed"])
    predicted: dict[str, dict[str, Any]] = {}
    true: dict[str, list[dict[str, Any]]] = {}
    for repeat, name in itertools.product(range(arguments.repeats), list_sizes()):
        if time.monotonic() > stop:
            print(f"out of time before {name}: the same command goes on there", file=sys.stderr)
            return
        predicted[name] = journal.measure(__file__, [f"predict {name}", "--speed", speed])
        true.setdefault(name, []).append(journal.measure(__file__, [f"run {name}", "--seed", str(repeat)]))
    config = {"model": MODEL, "rows": ROWS, "tasks": TASKS, "factors": FACTORS, "max_length": LENGTH}
    config |= {"repeats": arguments.repeats, "least_seconds": LEAST_SECONDS}
    keep_record("forecast", config, summarize(predicted, true), as_json=arguments.json)


def list_sizes() -> list[str]:
    """Names of the sizes; the smallest is the same for both axes."""
    return [f"{axis}-{factor}" for axis in ("rows", "tasks") for factor in FACTORS if axis == "rows" or factor > 1]


def work(task: str, speed: str | None) -> dict[str, Any]:
    """One worker's part: ``speed``, or a size to ``predict`` or to ``run``."""
    kind, _, name = task.partition(" ")
    with tempfile.TemporaryDirectory() as folder:
        if kind == "run":
            return {"stages": carry_out(name, Path(folder))}
        return predict(name or list_sizes()[0], Path(folder), speed and json.loads(speed))


def make_config(name: str, folder: Path) -> Any:
    """The config of a size, whose cards and run folder are in ``folder``."""
    from ensemblelora.config import parse_config

    axis, _, factor = name.partition("-")
    n_tasks, n_rows = (TASKS * int(factor), ROWS) if axis == "tasks" else (TASKS, ROWS * int(factor))
    cards = folder / f"cards-{n_tasks}"
    cards.mkdir(exist_ok=True)
    for part in range(n_tasks):
        card = {"include": SOURCE, "task": f"part_{part:02d}", "part": [part, N_PARTS]}
        (cards / f"part_{part:02d}.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    settings: dict[str, Any] = {
        "out": str(folder / name),
        "data": {
            "tasks": [str(cards)],
            "max_train_examples": n_rows,
            "max_validation_examples": n_rows // 2,
            "max_test_examples": n_rows // 2,
            "max_length": LENGTH,
        },
        "model": {"name": MODEL},
        "affinity": {"n_subsets": 20, "subset_size": 2},
        "training": {"num_train_epochs": 1, "evaluations_per_epoch": 1},
        "grouping": {"n_groups": 2, "n_random_partitions": 0},
        "boosting": {"n_rounds": 0},
        "evaluation": {"n_bootstrap": 100},
    }
    for section, values in CHANGES.items():
        settings[section] = settings.get(section, {}) | values
    return parse_config(settings)


def predict(name: str, folder: Path, speed: Mapping[str, float] | None) -> dict[str, Any]:
    """Forecast a size, by the rates given or by those that are measured now."""
    from ensemblelora import stages
    from ensemblelora.forecast import list_stages, make_forecaster
    from ensemblelora.speed import Speed

    config = make_config(name, folder)
    _, rows, probe = stages.prepare(config)
    run = make_forecaster(config, probe, rows, speed and Speed(**speed))
    costs = {stage: asdict(cost) for stage, cost in list_stages(run).items() if stage in STAGES}
    return {"speed": asdict(run.speed), "stages": costs, "sized_flops": size(config, rows, probe)}


def size(config: Any, rows: Any, probe: Any) -> dict[str, int]:
    """FLOPs of every stage by the model's config, and the rows' number and mean length."""
    from ensemblelora.accounting.shapes import model_shape
    from ensemblelora.machines import Machine
    from ensemblelora.sizing import DataSize, size_run

    counts = [sum(split.n_examples for split in part) for part in (rows.train, rows.validation, rows.test)]
    every = [split for part in (rows.train, rows.validation, rows.test) for split in part]
    length = sum(int(split.input_lengths.sum()) for split in every) / sum(split.n_rows for split in every)
    data = DataSize(len(rows.names), *counts, round(length))
    sized = size_run(config, model_shape(probe.base.model.config.to_dict()), data, Machine(1, 1e12, 80.0))
    return {stage: cost.flops for stage, cost in sized.items() if stage in STAGES}


def carry_out(name: str, folder: Path) -> dict[str, Any]:
    """What the run takes, by its own ledger and files."""
    from ensemblelora import pipeline

    config = make_config(name, folder)
    pipeline.run(config)
    out = Path(config.out)
    entries = json.loads((out / "costs.json").read_text(encoding="utf-8"))["stages"]
    costs = {entry["stage"]: entry for entry in entries if entry["stage"] in STAGES}
    return {
        stage: {
            "seconds": entry["wall_seconds"],
            "flops": entry["flops"],
            "memory_bytes": entry["peak_memory_bytes"],
            "disk_bytes": sum(map(_weigh, (place for pattern in PLACES.get(stage, ()) for place in out.glob(pattern)))),
        }
        for stage, entry in costs.items()
    }


def _weigh(folder: Path) -> int:
    """Bytes of the tensors in a folder; descriptions beside them are small."""
    kinds = (".npy", ".safetensors")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in kinds)


def summarize(predicted: Mapping[str, Any], true: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Ratios of every stage and size, and what they come to."""
    first = list_sizes()[0]
    flops, seconds = (sum(run["stages"]["train"][key] for run in true[first]) for key in ("flops", "seconds"))
    sizes: dict[str, dict[str, dict[str, float]]] = {}
    for name, runs in true.items():
        sizes[name] = {}
        for stage, cost in predicted[name]["stages"].items():
            found = [run["stages"][stage] for run in runs]
            mean = {key: sum(one[key] for one in found) / len(found) for key in found[0]}
            sized = predicted[name]["sized_flops"][stage] * seconds / flops
            sizes[name][stage] = dict(_list_ratios(cost, mean, sized, is_larger=name != first))
    result: dict[str, Any] = {}
    for key in ("time_ratio", "memory_ratio", "disk_ratio", "sized_time_ratio"):
        ratios = [stage[key] for size in sizes.values() for stage in size.values() if key in stage]
        if ratios:
            result[key] = math.exp(sum(map(math.log, ratios)) / len(ratios))
            result[f"{key}_worst"] = max(ratios, key=lambda ratio: abs(math.log(ratio)))
    return result | {"sizes": sizes}


def _list_ratios(
    cost: Mapping[str, float], true: Mapping[str, float], sized: float, *, is_larger: bool
) -> Iterator[tuple[str, float]]:
    """One stage's predicted over true, with the true numbers beside them."""
    yield from true.items()
    if true["seconds"] >= LEAST_SECONDS:
        yield "time_ratio", cost["seconds"] / true["seconds"]
        if is_larger:
            yield "sized_time_ratio", sized / true["seconds"]
    yield "memory_ratio", cost["memory_bytes"] / true["memory_bytes"]
    if cost["disk_bytes"] and true["disk_bytes"]:
        yield "disk_ratio", cost["disk_bytes"] / true["disk_bytes"]


if __name__ == "__main__":
    main()
