"""Sharpness and the generalisation gap of adapters trained in different ways, each on one task.

In: a request. Out: plain values (:func:`~.sharpness_summary.summarise`). Every way to train is trained on every task
and seed; losses of training and test rows, and of other tasks' test rows where asked, are those of the combined scores.
Test rows are looked at and nothing is chosen by them. What is measured is a training's end: the checkpoint of least
validation loss comes before the gap opens, and is the base model itself where training only does harm. The members of
an ensemble have seeds of their own, which differ in theta0 and in the order of rows.

Cost: one fine-tuning a member, task and seed; at each of some training rows, some fifty times two backward passes.
Source: paper, section 4, figures 6 and 9, appendix B.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora import artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, load_adapter, remove_adapter
from ensemblelora.analysis.generalization import RowLosses, choose_rows
from ensemblelora.analysis.jointloss import Coordinates
from ensemblelora.analysis.outofdomain import LIMITS
from ensemblelora.analysis.paths import train_to_end
from ensemblelora.analysis.request import AnalysisRequest, Work
from ensemblelora.analysis.sharpness import measure_sharpness
from ensemblelora.analysis.sharpness_summary import Point, summarise
from ensemblelora.analysis.sharpness_variants import SharpnessOptions, Variant, list_variants, read_targets
from ensemblelora.analysis.variant import change_config, join_changes
from ensemblelora.bottleneck import count_hidden
from ensemblelora.comparison.pool import Pool
from ensemblelora.config import RunConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.identity import fingerprint_split
from ensemblelora.ensemble import combined_scores
from ensemblelora.errors import DataError, UsageError
from ensemblelora.evaluation.metrics import compute_row_correct
from ensemblelora.prediction import member_nll, predict_members
from ensemblelora.progress import track
from ensemblelora.stages import Rows

__all__ = ["choose_tasks", "forecast", "run"]

Request = AnalysisRequest[SharpnessOptions]
Crew = Mapping[str, Path]
"""an ensemble's adapters: names, and where they lie"""

_SEED_STEP = 100
"""between the seeds of an ensemble's members; a study has fewer"""
_DIGITS = 6  # of a row's loss


def run(request: Request) -> dict[str, Any]:
    """Train, measure and sum up.

    Raises:
        UsageError: If an option does not fit the config's tasks.
        DataError: If a task's answers are free text.
    """
    options, config = request.options, request.config
    variants = {variant: _identify(variant, config) for variant in list_variants(options, config)}
    measured = {
        identity: [point for seed in request.seeds for point in _measure_variant(request, first, seed)]
        for identity, first in track(_list_distinct(variants), "ways to train")
    }
    points = [_rename(point, variant) for variant, identity in variants.items() for point in measured[identity]]
    settings = config.evaluation
    made = summarise(points, n_bootstrap=settings.n_bootstrap, confidence=settings.confidence, seed=config.seed)
    return made | {"limits": LIMITS if options.targets else ()}


def forecast(request: Request, rows: Rows) -> Mapping[str, Work]:
    """Say what every way to train would take."""
    options, config, found = request.options, request.config, dict[str, Work]()
    tasks, targets = choose_tasks(options, rows)
    n_seeds = len(request.seeds)
    n_train = sum(rows.train[task].n_examples for task in tasks)
    others = [other for task in tasks for other in targets.get(task, ())]
    n_scored = n_train + sum(rows.test[task].n_examples for task in (*tasks, *others))
    for _, variant in _list_distinct({one: _identify(one, config) for one in list_variants(options, config)}):
        epochs = change_config(config, variant.changes).training.num_train_epochs
        times, name = n_seeds * variant.n_members, f"{variant.part}: {variant.label}"
        found[name] = Work(
            fine_tunings=times * len(tasks),
            trained_rows=times * n_train * epochs,
            forward_rows=times * n_scored,
            changes=variant.changes,
        )
        n_looks = len(tasks) * (options.n_examples + 1) * len(_list_coordinates(options, variant))
        found[f"{name}, Hessian"] = Work(
            gradient_rows=times * n_looks * (options.n_probes + 2),
            changes=join_changes(variant.changes, {"model": {"dtype": "float32"}}),
        )
    return found


def choose_tasks(options: SharpnessOptions, rows: Rows) -> tuple[tuple[int, ...], dict[int, tuple[int, ...]]]:
    """Find the tasks to measure, and the targets of each, by index.

    Raises:
        UsageError: If a name is unknown.
        DataError: If a task's answers are free text.
    """
    names = rows.names
    wanted = options.tasks or tuple(name for name in names if name not in _list_target_names(options))
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        told = f"tasks {', '.join(unknown)}" if unknown else "no task is left to measure beside the targets"
        raise UsageError(f"{told}: expected some of {', '.join(names)}")
    targets = read_targets(options.targets, wanted, names)
    free_text = [name for name in (*wanted, *_list_target_names(options)) if _find(rows, name).kind == "sequence"]
    if free_text:
        raise DataError(f"tasks {', '.join(free_text)}: free text has no class scores; leave them out of `tasks`")
    chosen = tuple(names.index(name) for name in wanted)
    return chosen, {names.index(one): tuple(map(names.index, others)) for one, others in targets.items()}


def _identify(variant: Variant, config: RunConfig) -> str:
    """What variants have in common that are the same adapters."""
    return artifacts.fingerprint(change_config(config, variant.changes), variant.n_members)


def _list_distinct(variants: Mapping[Variant, str]) -> list[tuple[str, Variant]]:
    """The first variant of every identity."""
    found: dict[str, Variant] = {}
    for variant, identity in variants.items():
        found.setdefault(identity, variant)
    return list(found.items())


def _list_target_names(options: SharpnessOptions) -> tuple[str, ...]:
    return tuple(dict.fromkeys(pair.partition(":")[2] for pair in options.targets))


def _find(rows: Rows, name: str) -> EncodedSplit:
    return rows.train[rows.names.index(name)]


def _measure_variant(request: Request, variant: Variant, seed: int) -> list[Point]:
    """Train the members of every task, each of a seed of its own, and measure."""
    crews: dict[int, dict[str, Path]] = {}
    for j in range(variant.n_members):
        pool = request.open_pool(seed + _SEED_STEP * j, variant.changes)
        for task in choose_tasks(request.options, pool.rows)[0]:
            name, folder = _train(request.options, pool, task)
            crews.setdefault(task, {})[name] = folder
    return [_measure_point(request, pool, variant, seed, task, crew) for task, crew in crews.items()]


def _train(options: SharpnessOptions, pool: Pool, task: int) -> tuple[str, Path]:
    """One member on one task: its name, and where it lies."""
    if options.checkpoint == "last":
        return train_to_end(pool, (task,))
    name = pool.train((task,)).name
    return name, pool.folder / "adapters" / name


def _measure_point(request: Request, pool: Pool, variant: Variant, seed: int, task: int, crew: Crew) -> Point:
    """Score and look at one task's adapter or ensemble, or read both back."""
    options, train, test = request.options, pool.rows.train[task], pool.rows.test[task]
    targets = choose_tasks(options, pool.rows)[1].get(task, ())
    seed_of_rows = _rows_seed(request)
    chosen = choose_rows(train.n_examples, test.n_examples, seed=seed_of_rows, task=train.task)
    looked_at = choose_rows(train.n_examples, options.n_examples, seed=seed_of_rows, task=train.task).tolist()
    splits = [fingerprint_split(split) for split in (train, test, *(pool.rows.test[other] for other in targets))]

    def score(meter: Meter) -> dict[str, Any]:
        return _score(pool, task, targets, crew, chosen, meter)

    def look(coordinates: Coordinates, meter: Meter) -> dict[str, Any]:
        return _look(request, pool, task, crew, looked_at, coordinates, meter)

    found = request.measure("losses", (list(crew), splits, chosen.tolist()), score)
    settings = (looked_at, options.n_probes, options.n_eigenvalues, request.config.seed, splits[0])
    sharpness: dict[str, Any] = {
        one: request.measure("sharpness", (list(crew), one, *settings), partial(look, one))
        for one in _list_coordinates(options, variant)
    }
    for name in crew:
        remove_adapter(pool.probe, name)
    return Point(
        part=variant.part,
        label=variant.label,
        size=_find_size(variant, pool),
        scaling=variant.scaling,
        task=train.task,
        seed=seed,
        members=tuple(crew),
        losses=RowLosses(found["train"], train.groups[chosen].tolist(), found["test"], test.groups.tolist()),
        accuracy=found["accuracy"],
        sharpness=sharpness,
        targets=found["targets"],
    )


def _score(
    pool: Pool, task: int, targets: Sequence[int], crew: Crew, chosen: npt.NDArray[np.int64], meter: Meter
) -> dict[str, Any]:
    """Losses of training and test rows, and mean losses on the targets."""
    _load(pool, crew)
    train, test = pool.rows.train[task], pool.rows.test[task]
    train_nll, _ = _score_rows(pool, train, list(crew), meter)  # all rows: their lower layers are kept
    test_nll, correct = _score_rows(pool, test, list(crew), meter)
    return {
        "train": train_nll[chosen].round(_DIGITS).tolist(),
        "test": test_nll.round(_DIGITS).tolist(),
        "accuracy": float(correct.mean()),
        "targets": {
            pool.rows.names[other]: {
                "nll": float(_score_rows(pool, pool.rows.test[other], list(crew), meter)[0].mean()),
                "base_nll": float(_score_rows(pool, pool.rows.test[other], [THETA0], meter)[0].mean()),
            }
            for other in targets
        },
    }


def _score_rows(
    pool: Pool, split: EncodedSplit, names: Sequence[str], meter: Meter
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Loss of every row under the mean of some adapters' scores, and whether it is answered right."""
    max_tokens = pool.config.evaluation.max_tokens_per_batch
    found = predict_members(pool.probe, split, names, max_tokens=max_tokens, meter=meter)
    combined = combined_scores(found, [1 / len(names)] * len(names), "logits")
    nll = member_nll(replace(found, values=combined[None]), split.labels)[0]
    return nll, compute_row_correct(combined, split.labels, split.n_choices)


def _look(
    request: Request,
    pool: Pool,
    task: int,
    crew: Crew,
    examples: Sequence[int],
    coordinates: Coordinates,
    meter: Meter,
) -> dict[str, Any]:
    """Traces at some training rows, the same for all adapters of a task."""
    _load(pool, crew)
    found = measure_sharpness(
        pool.probe,
        pool.rows.train[task],
        examples,
        list(crew),
        [1 / len(crew)] * len(crew),
        coordinates=coordinates,
        n_probes=request.options.n_probes,
        n_eigenvalues=request.options.n_eigenvalues,
        seed=request.config.seed,
        meter=meter,
    )
    return asdict(found)


def _load(pool: Pool, crew: Crew) -> None:
    for name, folder in crew.items():
        if name not in pool.probe.peft.peft_config:
            load_adapter(pool.probe, name, folder)


def _list_coordinates(options: SharpnessOptions, variant: Variant) -> tuple[Coordinates, ...]:
    return ("adapter", "weights") if options.weight_coordinates and variant.has_lora else ("adapter",)


def _find_size(variant: Variant, pool: Pool) -> float:
    """What is varied; of a bottleneck its width."""
    if variant.part != "width":
        return float(variant.size)
    return float(count_hidden(int(pool.probe.base.model.config.hidden_size), int(variant.size)))


def _rename(point: Point, variant: Variant) -> Point:
    """The same adapters as part of another study."""
    if variant.part == point.part:
        return replace(point, label=variant.label, scaling=variant.scaling)
    return replace(point, part=variant.part, label=variant.label, scaling=variant.scaling, size=float(variant.size))


def _rows_seed(request: Request) -> int:
    seed = request.config.data.seed
    return request.config.seed if seed is None else seed
