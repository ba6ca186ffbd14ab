"""What an ensemble of four members costs at inference, against one adapter on the same rows.

    ENSEMBLELORA_DATA=../shared/data python benchmarks/inference.py --json

Four adapters in the top third of the layers are trained on four groups of the ten datasets, their weights fitted on
validation rows. Then the test rows are scored with

* ``one``: one adapter; what the ratios are against.
* ``exact``: all four members for every row, lower layers once.
* ``booster``: three members and a booster, which is measured from the base and so takes a fifth pass.
* ``routed``: each task's best single member.
* ``folded``: one adapter of the same rank for all tasks, as ``ensemblelora export --format folded`` makes it, from the
  tasks' mean weights.
* ``folded-per-task``: one such adapter for each task, from its own weights (``--task NAME``): ten adapters.
* ``one-all-layers``, ``exact-all-layers``: the default layout, every layer adapted, so that nothing is shared by the
  members; the second is against the first. Their adapters are untrained copies of theta0, since the cost does not
  depend on the values, and no accuracy is taken.

Peak memory is compared apart (``one-memory``, ``exact-memory``): the two tasks with the longest rows, in several more
processes each, since one process's peak is up to a quarter off another's.

``batch`` scores whole tasks, ``single`` one question at a time. In one process all systems score the same task one
after the other, beginning with another one at every task, so that what slows the machine or process slows all of
them; a repeat is a new process. Accuracy and loss are against ``exact`` on the same test rows, with 95 % intervals over
these rows, not over trainings.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    GROUPS,
    Journal,
    finish_worker,
    keep_record,
    load_model,
    load_rows,
    make_parser,
    spread,
    take_examples,
)

MAX_LENGTH = 256
AGAINST = {
    "exact": "one",
    "booster": "one",
    "routed": "one",
    "folded": "one",
    "folded-per-task": "one",
    "exact-all-layers": "one-all-layers",
}
"""whose latency each system's is divided by"""
SYSTEMS = tuple(dict.fromkeys(system for pair in AGAINST.items() for system in reversed(pair)))
LAYOUTS = {
    "top-third": tuple(system for system in SYSTEMS if not system.endswith("-all-layers")),
    "all-layers": tuple(system for system in SYSTEMS if system.endswith("-all-layers")),
}
"""systems that are measured in one process, since they share a model"""
MEMORY = "-memory"
MEMORY_REPEATS = 5
CHEAPER = ("routed", "folded", "folded-per-task")
"""what stands in for the exact ensemble, so that its accuracy is of interest"""
HERE = Path(__file__).parent


def main() -> None:
    """Train the members once, then measure every system in turn."""
    parser = make_parser(__doc__, rows=48, repeats="repeats", n_repeats=2)
    parser.add_argument("--test-rows", type=int, default=80, help="scored rows of each dataset")
    arguments = parser.parse_args()
    sizes = {"n_train": arguments.rows, "n_validation": 32, "n_test": arguments.test_rows}
    folder = HERE / ".journal" / "inference"
    if arguments.worker:
        longest = arguments.worker.endswith(MEMORY)
        measure = train_members if arguments.worker == "train" else score_longest if longest else score_all
        finish_worker(measure(folder, sizes, arguments.worker))
        return
    journal = Journal(folder / "journal.jsonl", fresh=arguments.fresh)  # beside the adapters it measures
    where = ["--rows", str(arguments.rows), "--test-rows", str(arguments.test_rows)]
    journal.measure(__file__, ["train", *where])
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    for repeat in range(arguments.repeats):
        for layout, systems in LAYOUTS.items():
            entry = journal.measure(__file__, [layout, *where, "--seed", str(repeat)])
            for system in systems:
                found[system].append(entry[system])
    peaks: dict[str, list[float]] = {"one": [], "exact": []}
    for repeat in range(MEMORY_REPEATS):
        for system, values in peaks.items():
            entry = journal.measure(__file__, [system + MEMORY, *where, "--seed", str(repeat)])
            values.append(entry["peak_memory_bytes"])
    config = sizes | {"max_length": MAX_LENGTH, "groups": GROUPS, "layers": "top_third", "repeats": arguments.repeats}
    keep_record("inference", config, compare(found) | compare_peaks(peaks), as_json=arguments.json)


def compare(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over processes of their own ratios; accuracy in points, loss in nats, both against the exact ensemble."""
    ratios: dict[str, list[float]] = {}
    for name, key in (("latency", "batch_seconds"), ("single_latency", "single_seconds")):
        for system, other in AGAINST.items():
            pairs = zip(found[system], found[other], strict=True)
            ratios[f"{name}_ratio_{_as_key(system)}"] = [one[key] / against[key] for one, against in pairs]
    measured = {name: statistics.median(values) for name, values in ratios.items()}
    prices = {key: value for system in CHEAPER for key, value in _compare_rows(found, system).items()}
    spreads = {
        system: {key: spread([entry[key] for entry in entries]) for key in entries[0] if key != "rows"}
        for system, entries in found.items()
    }
    spread_of_ratios = {name: spread(values) for name, values in ratios.items()}
    return {**measured, **prices, "ratios": spread_of_ratios, "systems": spreads}


def compare_peaks(peaks: dict[str, list[float]]) -> dict[str, Any]:
    """The exact ensemble's peak memory over one adapter's, by medians over processes."""
    medians = {system: statistics.median(values) for system, values in peaks.items()}
    return {
        "memory_ratio_exact": medians["exact"] / medians["one"],
        "peak_memory_bytes": {system: spread(values) for system, values in peaks.items()},
    }


def _compare_rows(found: dict[str, list[dict[str, Any]]], system: str) -> dict[str, Any]:
    """What a system loses against the exact ensemble on the same rows; all repeats score them alike."""
    from ensemblelora.evaluation.metrics import compare_paired_tasks

    exact, ours = found["exact"][0]["rows"], found[system][0]["rows"]
    right = compare_paired_tasks(exact["right"], ours["right"], exact["groups"])
    loss = compare_paired_tasks(ours["nll"], exact["nll"], exact["groups"])
    name = _as_key(system)
    return {
        f"accuracy_points_lost_{name}": 100 * right.difference,
        f"accuracy_points_lost_{name}_interval": [100 * right.low, 100 * right.high],
        f"nll_rise_{name}": loss.difference,
        f"nll_rise_{name}_interval": [loss.low, loss.high],
    }


def _as_key(system: str) -> str:
    return system.replace("-", "_")


def train_members(folder: Path, sizes: dict[str, int], _: str) -> dict[str, Any]:
    """Train four adapters and a booster's stand-in, fit the weights, and keep them as plain files."""
    from ensemblelora.accounting.meter import Meter
    from ensemblelora.adapters import adapter_state, add_adapter, save_adapter
    from ensemblelora.config import EnsembleConfig, TrainingConfig
    from ensemblelora.ensemble import Ensemble, Member, save_ensemble
    from ensemblelora.passes import with_cache
    from ensemblelora.prediction import predict_members
    from ensemblelora.training import fine_tune
    from ensemblelora.weighting import MemberLogits, fit_weights

    adapted, rows = _load(sizes)
    cached = with_cache(adapted, folder / "cache", rows.learning, max_bytes=4 * 10**9)
    members = tuple(Member(f"group-{g}", g, "group", 1.0) for g in range(len(GROUPS)))
    for member, group in zip(members, GROUPS, strict=True):
        train, validation = ([splits[i] for i in group] for splits in (rows.train, rows.validation))
        scratch = folder / "checkpoints"
        fine_tune(
            cached, member.name, train, validation, TrainingConfig(), seed=0, checkpoints=scratch, meter=Meter("")
        )
        save_adapter(cached, member.name, folder / member.name)
    # Its scores enter no accuracy that is reported; its pass costs what any booster's does.
    add_adapter(cached, "booster", adapter_state(cached, "group-3"))
    save_adapter(cached, "booster", folder / "booster")
    names = [member.name for member in members]
    logits = [
        MemberLogits(predict_members(cached, split, names, max_tokens="auto").values, split.labels, split.groups)
        for split in rows.validation
    ]
    owners = [next(g for g, group in enumerate(GROUPS) if i in group) for i in range(len(rows.names))]
    fitted = fit_weights(logits, owners, EnsembleConfig(), seed=0)
    ensemble = Ensemble(
        task_names=rows.names,
        groups=GROUPS,
        members=members,
        weights=tuple(map(tuple, fitted.weights.tolist())),
        routed=tuple(bool(is_routed) for is_routed in fitted.routed),
        combine="logits",
    )
    save_ensemble(ensemble, folder / "ensemble.json", routes=fitted.routes.tolist())
    return {"mean_weight_of_own_group": float(np.mean([fitted.weights[i, g] for i, g in enumerate(owners)]))}


def score_all(folder: Path, sizes: dict[str, int], layout: str) -> dict[str, Any]:
    """Load what the systems of one layout need, warm up, and score the test rows with each in turn."""
    from ensemblelora.ensemble import load_ensemble, predict_ensemble
    from ensemblelora.files import read_json

    if layout == "all-layers":  # four times the price a row, and compared with each other alone
        sizes = sizes | {"n_test": sizes["n_test"] // 4}
    adapted, rows = _load(sizes, layers=None if layout == "all-layers" else "top_third")
    ensemble = load_ensemble(folder / "ensemble.json")
    routes = read_json(folder / "ensemble.json")["routes"]
    systems = LAYOUTS[layout]
    _load_members(adapted, folder, ensemble, rows, layout)

    def answer(system: str, task: int, split: Any) -> np.ndarray:
        served = _serve(ensemble, task, system, routes[task])
        return predict_ensemble(adapted, served, task, split, max_tokens="auto")

    for system in systems:
        answer(system, 0, rows.validation[0])
    scores, batch_seconds = _time_in_turn(systems, answer, list(enumerate(rows.test)))
    questions = [(task, take_examples(split, 1, first=e)) for task, split in enumerate(rows.test) for e in range(3)]
    _, seconds = _time_in_turn(systems, answer, questions)
    return {
        system: {"batch_seconds": batch_seconds[system], "single_seconds": seconds[system] / len(questions)}
        | ({} if layout == "all-layers" else _judge(scores[system], rows.test))
        for system in systems
    }


def _time_in_turn(
    systems: tuple[str, ...], answer: Callable[[str, int, Any], np.ndarray], asked: list[tuple[int, Any]]
) -> tuple[dict[str, list[np.ndarray]], dict[str, float]]:
    """Have every system answer before the next is asked; another one begins each time."""
    scores: dict[str, list[np.ndarray]] = {system: [] for system in systems}
    seconds = dict.fromkeys(systems, 0.0)
    for i, (task, split) in enumerate(asked):
        first = i % len(systems)
        for system in (*systems[first:], *systems[:first]):
            started = time.perf_counter()
            scores[system].append(answer(system, task, split))
            seconds[system] += time.perf_counter() - started
    return scores, seconds


def score_longest(folder: Path, sizes: dict[str, int], system: str) -> dict[str, Any]:
    """Score the two tasks with the longest rows, for the peak of memory."""
    from ensemblelora.ensemble import load_ensemble, predict_ensemble

    name = system.removesuffix(MEMORY)
    adapted, rows = _load(sizes)
    ensemble = load_ensemble(folder / "ensemble.json")
    _load_members(adapted, folder, ensemble, rows, name)
    order = np.argsort([-float(split.example_lengths.mean()) for split in rows.test])
    for task in order[:2]:
        served = _serve(ensemble, int(task), name, 0)
        predict_ensemble(adapted, served, int(task), rows.test[int(task)], max_tokens="auto")
    return {"tasks": [rows.names[int(task)] for task in order[:2]]}


def _judge(scores: list[np.ndarray], splits: Any) -> dict[str, Any]:
    """Accuracy, loss, and both for every row."""
    from ensemblelora.evaluation.metrics import compute_row_correct, compute_row_nll

    pairs = list(zip(scores, splits, strict=True))
    right = [compute_row_correct(z, split.labels, split.n_choices).astype(int).tolist() for z, split in pairs]
    nll = [compute_row_nll(z, split.labels, split.n_choices).tolist() for z, split in pairs]
    return {
        "accuracy": statistics.fmean(map(statistics.fmean, right)),
        "test_nll": statistics.fmean(map(statistics.fmean, nll)),
        "rows": {"right": right, "nll": nll, "groups": [split.groups.tolist() for split in splits]},
    }


def _load(sizes: dict[str, int], *, layers: str | None = "top_third") -> tuple[Any, Any]:
    from ensemblelora.adapters import attach
    from ensemblelora.config import AdapterConfig

    base = load_model(MAX_LENGTH)
    rows = load_rows(base, **sizes, max_length=MAX_LENGTH, seed=0)
    return attach(base, AdapterConfig.model_validate({"layers_to_transform": layers}), seed=0), rows


def _load_members(adapted: Any, folder: Path, ensemble: Any, rows: Any, served: str) -> None:
    """The adapters of a layout, or those that one system serves, so that its memory is its own."""
    from ensemblelora.adapters import add_adapter, load_adapter
    from ensemblelora.config import AdapterConfig
    from ensemblelora.exporting.fold import add_fold, fold_members, weigh_adapters

    members = [member.name for member in ensemble.members]
    if served == "all-layers":
        for name in members:
            add_adapter(adapted, name)
        return
    for name in {"one": members[:1], "exact": members}.get(served, [*members, "booster"]):
        load_adapter(adapted, name, folder / name)
    if served != "top-third":
        return
    splits, config = dict(enumerate(rows.validation)), AdapterConfig()
    parts = {"folded": [splits], "folded-per-task": [{task: split} for task, split in splits.items()]}
    for system, each in parts.items():
        for part in each:
            weights = weigh_adapters(ensemble, part)  # the mean of these tasks'
            add_fold(adapted, _name_fold(system, min(part)), fold_members(adapted, weights, config, config.r).cut.state)


def _name_fold(system: str, task: int) -> str:
    return "folded" if system == "folded" else f"folded-{task}"


def _serve(ensemble: Any, task: int, system: str, route: int) -> Any:
    """The ensemble as one system sees it, for one task."""
    from ensemblelora.ensemble import Member

    def alone(name: str) -> Any:
        weights = tuple((1.0,) for _ in ensemble.task_names)
        every = tuple(range(len(ensemble.task_names)))
        return replace(ensemble, groups=(every,), members=(Member(name, 0, "group", 1.0),), weights=weights)

    system = system.removesuffix("-all-layers")
    if system == "one":
        return alone("group-0")
    if system == "routed":
        return alone(f"group-{route}")
    if system in ("folded", "folded-per-task"):
        return alone(_name_fold(system, task))
    if system == "booster":
        members = (*ensemble.members[:3], Member("booster", 2, "booster", 0.3))
        merged = (*GROUPS[:2], (*GROUPS[2], *GROUPS[3]))
        weights = tuple((1 / 3, 1 / 3, 1 / 3) for _ in ensemble.task_names)
        return replace(ensemble, groups=merged, members=members, weights=weights)
    # A weight of zero would spare its member's pass; a millionth is no score's concern.
    weights = np.maximum(ensemble.weights, 1e-6)
    weights /= weights.sum(axis=1, keepdims=True)
    return replace(ensemble, weights=tuple(map(tuple, weights.tolist())))


if __name__ == "__main__":
    main()
