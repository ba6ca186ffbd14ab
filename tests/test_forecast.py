"""The forecast against the ledger of the run it speaks of; and that it writes nothing."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from ensemblelora import pipeline, stages
from ensemblelora.data.batching import collate
from ensemblelora.errors import ConfigError, DataError
from ensemblelora.forecast import _choose_timed, forecast_run
from tests.tiny import make_split
from tests.tiny_run import TASKS, finished_run, make_inputs, read_config, read_json


def read_tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def estimate():
    return pipeline.estimate(read_config(finished_run() / "recipe.yaml"))


@pytest.fixture(scope="module")
def ledger():
    return {record["stage"]: record for record in read_json(finished_run(), "costs.json")["stages"]}


@pytest.mark.parametrize("stage", ["features", "baselines"])
def test_what_does_not_depend_on_the_plan_is_counted_exactly(stage, estimate, ledger):
    assert estimate[stage]["flops"] == ledger[stage]["flops"]
    assert estimate[stage]["n_tokens"] == ledger[stage]["n_tokens"]


def test_training_in_groups_differs_by_its_padding_alone(estimate, ledger):
    # Every row passes as often as in one adapter for all; only who shares its batch is another.
    assert estimate["train"]["n_tokens"] == ledger["train"]["n_tokens"]
    assert estimate["train"]["flops"] == pytest.approx(ledger["train"]["flops"], rel=0.05)


@pytest.mark.parametrize("stage", ["boost", "combine", "evaluate"])
def test_what_depends_on_the_outcome_is_counted_at_its_most(stage, estimate, ledger):
    # The measured linearity of the evaluation, a pass over at most 48 rows a task, is left out of the forecast.
    assert estimate[stage]["flops"] >= ledger[stage]["flops"] * (0.6 if stage == "evaluate" else 1.0)
    assert estimate[stage]["flops"] <= 8 * ledger[stage]["flops"]


def test_the_total_adds_up(estimate):
    stages = [record for name, record in estimate.items() if name != "total"]
    for count in ("seconds", "flops", "n_tokens", "disk_bytes"):
        assert estimate["total"][count] == pytest.approx(sum(record[count] for record in stages))
    assert estimate["total"]["memory_bytes"] == max(record["memory_bytes"] for record in stages)
    assert all(record["seconds"] > 0 for record in stages)


def test_disk_space_is_that_of_features_and_adapters(estimate):
    run = finished_run() / "run"
    features = sum(path.stat().st_size for path in run.glob("features/*/features-*.npy"))
    assert estimate["features"]["disk_bytes"] == pytest.approx(features, rel=0.2)
    adapter = (run / "adapters" / "shared" / "adapter_model.safetensors").stat().st_size
    assert estimate["baselines"]["disk_bytes"] == pytest.approx(adapter, rel=0.5)


def test_nothing_is_written(tmp_path):
    recipe = make_inputs(tmp_path)
    before = read_tree(tmp_path)
    pipeline.estimate(read_config(recipe))
    assert read_tree(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "gone_or_zero"),
    [({"boosting": {"n_rounds": 0}}, "boost"), ({"evaluation": {"baselines": ["base"]}}, "baselines")],
)
def test_what_is_switched_off_costs_nothing(changes, gone_or_zero):
    found = pipeline.estimate(read_config(finished_run() / "recipe.yaml", **changes))
    assert found.get(gone_or_zero, {"flops": 0})["flops"] == 0


@pytest.mark.parametrize("direction", ["projected", "steps"])
def test_every_direction_of_boosting_has_a_forecast(direction):
    found = pipeline.estimate(read_config(finished_run() / "recipe.yaml", boosting={"direction": direction}))
    assert found["boost"]["flops"] > 0


def test_label_tokens_that_meet_the_whole_vocabulary_cost_more():
    folder = finished_run()
    cards = {"tasks": [str(folder / "tasks" / f"{name}.yaml") for name in TASKS[:2]]}  # verbalizers
    plain, whole = (
        pipeline.estimate(read_config(folder / "recipe.yaml", data=cards, training={"loss": f"{x}_softmax"}))
        for x in ("label", "vocab")
    )
    assert whole["train"]["flops"] > plain["train"]["flops"]
    assert whole["features"]["flops"] == plain["features"]["flops"]


@pytest.mark.parametrize(("n_choices", "n_timed"), [(2, 8), (60, 1)])
def test_what_is_timed_stays_within_a_step(n_choices, n_timed):
    # Sixty classes of several tokens made eight examples 480 rows, and a dry run minutes.
    split = make_split("options", n=30, n_choices=n_choices)
    chosen = _choose_timed(split, 1000)
    assert len(chosen) == n_timed
    assert n_timed == 1 or collate([(split, e) for e in chosen], 0).n_padded_tokens <= 1000


def test_a_family_without_a_formula_still_gets_seconds():
    config = read_config(finished_run() / "recipe.yaml")
    _, rows, probe = stages.prepare(config)
    known = forecast_run(config, probe, rows)
    blind = forecast_run(config, dataclasses.replace(probe, costs=None), rows)
    assert blind["train"].flops == blind["features"].flops == 0 and blind["train"].seconds > 0
    assert blind["train"].n_tokens == known["train"].n_tokens
    assert blind["features"].disk_bytes == known["features"].disk_bytes


def test_exact_inner_products_take_their_disk_and_memory():
    config = read_config(finished_run() / "recipe.yaml", gradients={"proj_type": "none"})
    _, rows, probe = stages.prepare(config)
    found = forecast_run(config, probe, rows)["features"]
    n_rows, n_coordinates = 5 * (16 + 12), probe.costs.adapter.n_output_parameters
    features = 4 * n_rows * (n_rows + 1)
    assert found.disk_bytes == 4 * n_rows * n_coordinates + features
    blind = forecast_run(config, dataclasses.replace(probe, costs=None), rows)["features"]
    assert (blind.flops, blind.disk_bytes) == (0, found.disk_bytes)
    assert found.memory_bytes > 12 * n_rows**2


@pytest.mark.parametrize(
    ("changes", "error"), [({"grouping": {"n_groups": 9}}, ConfigError), ({"data": {"tasks": ["nowhere"]}}, DataError)]
)
def test_it_refuses_what_a_run_refuses(changes, error, tmp_path):
    shutil.copytree(finished_run() / "tasks", tmp_path / "tasks")
    with pytest.raises(error):
        pipeline.estimate(read_config(finished_run() / "recipe.yaml", **changes))
