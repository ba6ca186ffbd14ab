"""What may not matter: which tasks come first, and which other tasks there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ensemblelora import pipeline
from ensemblelora.store import FeatureStore
from tests.tiny_run import TASKS, finished_run, make_inputs, read_config, read_json

pytestmark = pytest.mark.slow

TOLERANCE = 0.1
"""nats of a task's mean test loss; docs/trust.md says so"""


def features_of(folder: Path, task: str) -> list[bytes]:
    store = FeatureStore(folder / "run" / "features")
    return [store.read(task, split).features.tobytes() for split in ("train", "validation")]


def cards_of(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    return {"tasks": [str(folder / "tasks" / f"{name}.yaml") for name in names]}


def test_the_order_of_the_tasks_is_no_more_than_an_order_of_rows(tmp_path):
    """Features and the base model's scores are the same to the bit; trainings see their rows in another order."""
    make_inputs(tmp_path)
    config = read_config(tmp_path / "recipe.yaml", data=cards_of(tmp_path, TASKS[::-1]))
    found, before = pipeline.run(config, until="evaluate").results, read_json(finished_run(), "results.json")
    assert all(features_of(tmp_path, task) == features_of(finished_run(), task) for task in TASKS)
    for method, table in before["methods"].items():
        for task in TASKS:
            mine, other = found["methods"][method]["per_task"][task]["nll"], table["per_task"][task]["nll"]
            assert mine == other if method == "base" else abs(mine - other) < TOLERANCE, (method, task)


def test_other_tasks_change_nothing_of_a_tasks_rows_and_features(tmp_path):
    make_inputs(tmp_path)
    config = read_config(tmp_path / "recipe.yaml", data=cards_of(tmp_path, TASKS[3:0:-1]))
    pipeline.run(config, until="features")
    assert all(features_of(tmp_path, task) == features_of(finished_run(), task) for task in TASKS[1:4])
