"""What an ensemble of four members costs at inference, against one adapter on the same rows.

    ENSEMBLELORA_DATA=../shared/data python benchmarks/inference.py --json

Four adapters in the top third of the layers are trained on four groups of the ten datasets, their weights fitted on
validation rows. Then, each in a process of its own, the test rows are scored with

* ``one``: one adapter; what the ratios are against.
* ``exact``: all four members for every row, lower layers once.
* ``booster``: three members and a booster, which is measured from the base and so takes a fifth pass.
* ``routed``: each task's best single member.
* ``folded``: the members of a task folded into one adapter of the same rank.

``batch`` scores whole tasks, ``single`` one question at a time. Processes alternate, several repeats each.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import GROUPS, Journal, finish_worker, keep_record, load_model, load_rows, make_parser, spread

MAX_LENGTH = 256
SYSTEMS = ("one", "exact", "booster", "routed", "folded")
HERE = Path(__file__).parent


def main() -> None:
    """Train the members once, then measure every system in turn."""
    parser = make_parser(__doc__, rows=48, repeats="repeats", n_repeats=2)
    parser.add_argument("--test-rows", type=int, default=80, help="scored rows of each dataset")
    arguments = parser.parse_args()
    sizes = {"n_train": arguments.rows, "n_validation": 32, "n_test": arguments.test_rows}
    folder = HERE / ".journal" / "inference"
    if arguments.worker:
        measure = train_members if arguments.worker == "train" else score
        finish_worker(measure(folder, sizes, arguments.worker))
        return
    journal = Journal(HERE / ".journal" / "inference.jsonl", fresh=arguments.fresh)
    where = ["--rows", str(arguments.rows), "--test-rows", str(arguments.test_rows)]
    journal.measure(__file__, ["train", *where])
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    for repeat in range(arguments.repeats):
        for system in SYSTEMS:
            found[system].append(journal.measure(__file__, [system, *where, "--seed", str(repeat)]))
    config = sizes | {"max_length": MAX_LENGTH, "groups": GROUPS, "layers": "top_third", "repeats": arguments.repeats}
    keep_record("inference", config, compare(found), as_json=arguments.json)


def compare(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Ratios against one adapter, of medians over repeats; accuracy in points."""

    def middle(system: str, key: str) -> float:
        return statistics.median(entry[key] for entry in found[system])

    def ratio(system: str, key: str) -> float:
        return middle(system, key) / middle("one", key)

    def lost(system: str) -> float:
        return 100 * (middle("exact", "accuracy") - middle(system, "accuracy"))

    return {
        "latency_ratio_exact": ratio("exact", "batch_seconds"),
        "latency_ratio_booster": ratio("booster", "batch_seconds"),
        "latency_ratio_routed": ratio("routed", "batch_seconds"),
        "latency_ratio_folded": ratio("folded", "batch_seconds"),
        "single_latency_ratio_exact": ratio("exact", "single_seconds"),
        "single_latency_ratio_routed": ratio("routed", "single_seconds"),
        "memory_ratio_exact": ratio("exact", "peak_memory_bytes"),
        "accuracy_points_lost_routed": lost("routed"),
        "accuracy_points_lost_folded": lost("folded"),
        "systems": {s: {key: spread([e[key] for e in entries]) for key in entries[0]} for s, entries in found.items()},
    }


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


def score(folder: Path, sizes: dict[str, int], system: str) -> dict[str, Any]:
    """Load what one system needs, warm up, and score the test rows."""
    from ensemblelora.ensemble import load_ensemble, predict_ensemble
    from ensemblelora.files import read_json

    adapted, rows = _load(sizes)
    ensemble = load_ensemble(folder / "ensemble.json")
    routes = read_json(folder / "ensemble.json")["routes"]
    _load_members(adapted, folder, ensemble, system)
    systems = [_serve(ensemble, task, system, routes[task]) for task in range(len(rows.names))]

    def answer(task: int, split: Any) -> np.ndarray:
        return predict_ensemble(adapted, systems[task], task, split, max_tokens="auto")

    answer(0, rows.validation[0])
    started = time.perf_counter()
    scores = [answer(task, split) for task, split in enumerate(rows.test)]
    batch_seconds = time.perf_counter() - started
    right = [float((z.argmax(1) == s.labels).mean()) for z, s in zip(scores, rows.test, strict=True)]
    questions = [(task, _pick(split, e)) for task, split in enumerate(rows.test) for e in range(3)]
    started = time.perf_counter()
    for task, question in questions:
        answer(task, question)
    single_seconds = (time.perf_counter() - started) / len(questions)
    return {"batch_seconds": batch_seconds, "single_seconds": single_seconds, "accuracy": float(np.mean(right))}


def _load(sizes: dict[str, int]) -> tuple[Any, Any]:
    from ensemblelora.adapters import attach
    from ensemblelora.config import AdapterConfig

    base = load_model(MAX_LENGTH)
    rows = load_rows(base, **sizes, max_length=MAX_LENGTH, seed=0)
    return attach(base, AdapterConfig(layers_to_transform="top_third"), seed=0), rows


def _load_members(adapted: Any, folder: Path, ensemble: Any, system: str) -> None:
    """Only the adapters that the system serves, so that its memory is its own."""
    from ensemblelora.adapters import load_adapter
    from ensemblelora.config import AdapterConfig
    from ensemblelora.exporting.fold import add_fold, fold_members

    names = {"one": ["group-0"], "booster": ["group-0", "group-1", "group-2", "booster"]}
    for name in names.get(system, [member.name for member in ensemble.members]):
        load_adapter(adapted, name, folder / name)
    if system == "folded":
        for task, weights in enumerate(ensemble.weights):
            shares = {member.name: weight for member, weight in zip(ensemble.members, weights, strict=True)}
            add_fold(adapted, f"folded-{task}", fold_members(adapted, shares, AdapterConfig(), 8).cut.state)


def _serve(ensemble: Any, task: int, system: str, route: int) -> Any:
    """The ensemble as one system sees it, for one task."""
    from ensemblelora.ensemble import Member

    def alone(name: str) -> Any:
        weights = tuple((1.0,) for _ in ensemble.task_names)
        every = tuple(range(len(ensemble.task_names)))
        return replace(ensemble, groups=(every,), members=(Member(name, 0, "group", 1.0),), weights=weights)

    if system == "one":
        return alone("group-0")
    if system == "routed":
        return alone(f"group-{route}")
    if system == "folded":
        return alone(f"folded-{task}")
    if system == "booster":
        members = (*ensemble.members[:3], Member("booster", 2, "booster", 0.3))
        merged = (*GROUPS[:2], (*GROUPS[2], *GROUPS[3]))
        weights = tuple((1 / 3, 1 / 3, 1 / 3) for _ in ensemble.task_names)
        return replace(ensemble, groups=merged, members=members, weights=weights)
    return ensemble


def _pick(split: Any, e: int) -> Any:
    """A split of one question."""
    first, last = int(split.example_rows[e]), int(split.example_rows[e + 1])
    begin, end = int(split.row_starts[first]), int(split.row_starts[last])
    return replace(
        split,
        tokens=split.tokens[begin:end],
        row_starts=split.row_starts[first : last + 1] - begin,
        answer_starts=split.answer_starts[first:last],
        example_rows=np.array([0, last - first]),
        labels=split.labels[e : e + 1],
        n_choices=split.n_choices[e : e + 1],
        divisors=split.divisors[first:last],
        groups=np.zeros(1, np.int64),
        ids=(split.ids[e],),
    )


if __name__ == "__main__":
    main()
