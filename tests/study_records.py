"""Comparisons made of drawn numbers, written as a real one is: for statistics, pages and tables without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ensemblelora import artifacts
from ensemblelora.comparison.record import (
    MethodRecord,
    Primary,
    RateTrial,
    StudyHead,
    TaskRows,
    identify_record,
    write_head,
    write_record,
)
from ensemblelora.config import dump_config, parse_config

RATES = (0.001, 0.01)
SKILLS = {"base": 0.5, "shared": 0.7, "single": 0.6, "mtl-ft": 0.78, "ours": 0.8}


def make_tasks(*, n_tasks: int = 3, n_rows: int = 40, free_text: bool = False, seed: int = 0) -> tuple[TaskRows, ...]:
    """Two-class tasks whose rows come in groups of one to three, and if asked for one of free text."""
    rng = np.random.default_rng(seed)
    tasks = []
    for i in range(n_tasks + free_text):
        groups = np.sort(rng.integers(0, n_rows // 2, n_rows))
        labels = rng.integers(0, 2, n_rows)
        tasks.append(
            TaskRows(
                name=f"task{i}" if i < n_tasks else "written",
                kind="verbalizer" if i < n_tasks else "sequence",
                n_train=90 + i,
                n_validation=30,
                groups=tuple(groups.tolist()),
                labels=tuple(labels.tolist()),
                lower_flops=100.0,
                upper_flops=50.0,
            )
        )
    return tuple(tasks)


def make_study(
    folder: Path,
    *,
    skills: Mapping[str, float] = SKILLS,
    n_seeds: int = 3,
    tasks: Sequence[TaskRows] | None = None,
    primary: Sequence[Primary] = (Primary("ours", "shared"), Primary("ours", "mtl-ft")),
    failures: Mapping[str, str] | None = None,
    config: Mapping[str, object] | None = None,
) -> Path:
    """Write a comparison in which a method is right with the chance given."""
    tasks = make_tasks() if tasks is None else tuple(tasks)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"data": {"tasks": [task.name for task in tasks], "seed": 0}, "evaluation": {"n_bootstrap": 200}}
    artifacts.write_text(folder / artifacts.CONFIG_FILE, dump_config(parse_config(settings | dict(config or {}))))
    artifacts.write_json(
        folder / artifacts.ENVIRONMENT_FILE, {"package_version": "0.1.0", "created": "2026-01-01", "device": "cpu"}
    )
    head = StudyHead(
        identity="this one",
        tasks=tasks,
        methods=tuple(skills),
        seeds=tuple(range(n_seeds)),
        learning_rates=RATES,
        primary=tuple(primary),
        failures=dict(failures or {}),
        lower={"flops": 1e9, "seconds": 2.0},
    )
    write_head(folder, head)
    for place, (method, skill) in enumerate(skills.items()):
        for seed in range(n_seeds):
            write_record(folder, make_record(head, method, skill, seed, place))
    return folder


def make_record(head: StudyHead, method: str, skill: float, seed: int, place: int) -> MethodRecord:
    """One method on one seed; what it costs grows with its place."""
    rng = np.random.default_rng([seed, place])
    correct = {t.name: tuple((rng.random(len(t.groups)) < skill).astype(int).tolist()) for t in head.tasks}
    nll = {
        task.name: tuple(np.round(np.where(correct[task.name], 0.3, 1.2) + 0.2 * rng.random(len(task.groups)), 5))
        for task in head.tasks
    }
    trials = tuple(RateTrial(rate, 1.0 - rate, 10**9 * (place + 1), 10**8, 3.0) for rate in RATES)
    return MethodRecord(
        identity=identify_record(head.identity, method, seed, head.learning_rates),
        method=method,
        title=f"the method {method}",
        seed=seed,
        learning_rate=None if method == "base" else 0.01,
        trials=trials if seed == 0 and method != "base" else (),
        validation_nll=0.9,
        costs={
            "train_flops": 10**9 * place,
            "select_flops": 10**8 * (method == "ours"),
            "seconds": 10.0 + seed,
            "peak_memory_bytes": 10**9 + seed,
            "added_memory_bytes": 10**8 + seed,
            "n_bytes": 1000 * place,
            "forward_passes": float(max(1, place)),
        },
        groups=(tuple(task.name for task in head.tasks),),
        notes={},
        nll=nll,
        correct={t.name: None if t.kind == "sequence" else correct[t.name] for t in head.tasks},
        chance={t.name: None if t.kind == "sequence" else 0.001 for t in head.tasks},
    )
