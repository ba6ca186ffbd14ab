"""The forecast against the ledger of the run it speaks of; and that it writes nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ensemblelora import pipeline, stages
from ensemblelora.data.batching import collate, schedule_training
from ensemblelora.errors import ConfigError, DataError
from ensemblelora.forecast import forecast_run, list_stages, make_forecaster
from ensemblelora.gradients.plan import iterate_pass
from ensemblelora.pace import divide_work
from ensemblelora.prefix import count_slots
from ensemblelora.speed import Speed, choose_timed
from ensemblelora.training import choose_layout
from tests.tiny import make_split
from tests.tiny_run import TASKS, copy_run, finished_run, make_inputs, read_config, read_json


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


def test_memory_is_of_the_largest_batch_there_is_and_not_of_what_a_step_may_hold():
    # Of rows that fill a tenth of a step, ten times the activations were foreseen.
    config = read_config(finished_run() / "recipe.yaml")
    _, rows, probe = stages.prepare(config)
    speed = Speed(1e9, 1e9, math.inf, bytes_per_token=1e6, forward_bytes_per_token=1.0)

    def foresee(**limits):
        training = config.training.model_copy(update=limits)
        run = make_forecaster(config.model_copy(update={"training": training}), probe, rows, speed)
        layout = choose_layout(probe, training)
        schedule = schedule_training(rows.train, training, seed=0, layout=layout)
        parts = [[(rows.train[task], example) for task, example in step] for step in schedule]
        largest = max(collate(part, 0, layout=layout).n_padded_tokens for part in parts)
        return (list_stages(run)["train"].memory_bytes - run.resident) / 1e6, largest

    roomy, largest = foresee(max_tokens_per_batch=10**6)
    assert largest <= roomy <= 2 * largest
    assert foresee(max_tokens_per_batch=2 * 10**6)[0] == roomy
    tight, largest = foresee(max_tokens_per_batch=int(roomy) // 2)
    assert largest <= tight <= roomy / 2
    run = make_forecaster(config, probe, rows, dataclasses.replace(speed, forward_bytes_per_token=1e6))
    found = {name: (stage.memory_bytes - run.resident) / 1e6 for name, stage in list_stages(run).items()}
    passes = iterate_pass(probe, rows.learning, config.gradients, seed=config.seed)
    assert found["features"] == max(batch.n_padded_tokens for batch, _ in passes)
    assert found["combine"] > found["features"], "several members share a pass"


@pytest.mark.parametrize(("n_choices", "n_timed"), [(2, 8), (60, 1)])
def test_what_is_timed_stays_within_a_step(n_choices, n_timed):
    # Sixty classes of several tokens made eight examples 480 rows, and a dry run minutes.
    split = make_split("options", n=30, n_choices=n_choices)
    chosen = choose_timed(split, 1000)
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


_TAKE_MEMORY = """
import json, sys
from pathlib import Path
from dataclasses import replace
import numpy as np
import psutil
from ensemblelora.accounting.meter import Meter
from ensemblelora.config import parse_config
from ensemblelora.forecast import forecast_run
from ensemblelora.stages import Rows
from ensemblelora.training import fine_tune
from tests.tiny import make_adapted, make_split

def lengthen(split, width):
    heads = np.tile(np.arange(1, 90, dtype=np.int32), 9)[:width]
    rows = [np.concatenate([heads, split.tokens[a:b]]) for a, b in zip(split.row_starts, split.row_starts[1:])]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return replace(split, tokens=np.concatenate(rows), row_starts=starts, answer_starts=split.answer_starts + width)

sizes = dict(hidden_size=128, intermediate_size=512, max_position_embeddings=512)
probe = make_adapted("llama", **sizes)
train, validation = (lengthen(make_split("verbalizer", n=n, seed=n), 240) for n in (32, 16))
rows = Rows((train,), (validation,), (validation,))
changes = {"num_train_epochs": 1, "max_tokens_per_batch": 4096}
config = parse_config({"data": {"tasks": ["t"]}, "training": changes, "out": sys.argv[1]})
before = psutil.Process().memory_info().rss
found = forecast_run(config, probe, rows)["train"].memory_bytes
with Meter("train") as meter:
    folder = Path(sys.argv[1])
    fine_tune(probe, "one", [train], [validation], config.training, seed=0, checkpoints=folder, meter=meter)
print(json.dumps({"before": before, "foreseen": found, "peak": meter.record.peak_memory_bytes}))
"""


@pytest.mark.slow
def test_the_memory_that_is_foreseen_is_what_training_takes(tmp_path):
    root = Path(__file__).parent.parent  # a process of its own: a used one has memory to spare that shows nowhere
    environment = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    made = subprocess.run(
        [sys.executable, "-c", _TAKE_MEMORY, str(tmp_path / "checkpoints")],
        cwd=root, env=environment, check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    found = json.loads(made.stdout.splitlines()[-1])
    assert found["peak"] - found["before"] > 60e6, "the activations are large enough to be seen"
    # Never less than half of what it takes beyond the model, and the whole process to a quarter.
    assert found["foreseen"] - found["before"] > 0.5 * (found["peak"] - found["before"]), found
    assert found["foreseen"] == pytest.approx(found["peak"], rel=0.25), found


@pytest.fixture(scope="module")
def top_run(tmp_path_factory):
    """A run with adapters in the upper half, whose training rows' activations fit the disk and the others don't."""
    folder = tmp_path_factory.mktemp("top")
    recipe = make_inputs(folder)
    changes = {"adapter": {"layers_to_transform": "top_half"}, "training": {"num_train_epochs": 1}}
    config = read_config(recipe, **changes)
    _, rows, _ = stages.prepare(config)
    sizes = [count_slots(split) * 32 * 4 for split in rows.learning]
    some = read_config(recipe, **changes, model={"prefix_cache_gb": (sum(sizes[:3]) + 1) / 1e9})
    pipeline.run(some)
    return some, folder, sizes


def test_lower_blocks_are_counted_with_every_pass_of_rows_that_are_not_kept(top_run):
    config, folder, sizes = top_run
    found, kept = pipeline.estimate(config), pipeline.estimate(with_cache_of(config, 4.0))
    spent = {record["stage"]: record for record in read_json(folder, "costs.json")["stages"]}
    for stage in ("features", "baselines", "combine"):
        # A booster is tried and dropped, which the forecast counts at its most: it and theta0 beside two groups.
        most = 2 if stage == "combine" else 1
        assert spent[stage]["flops"] <= found[stage]["flops"] <= most * spent[stage]["flops"]
        assert found[stage]["flops"] >= kept[stage]["flops"]
    assert found["baselines"]["flops"] > kept["baselines"]["flops"], "rows that don't fit run there again"
    assert found["boost"]["flops"] > max(kept["boost"]["flops"], spent["boost"]["flops"])
    _, rows, probe = stages.prepare(config)
    run = make_forecaster(config, probe, rows)
    assert run.kept_bytes == sum(sizes[:3]) and len(run.unkept) == len(rows.learning) - 3
    assert make_forecaster(with_cache_of(config, 0.0), probe, rows).unkept == {(s.task, s.split) for s in rows.learning}


def with_cache_of(config, gigabytes):
    return config.model_copy(update={"model": config.model.model_copy(update={"prefix_cache_gb": gigabytes})})


@pytest.mark.parametrize(
    ("changes", "error"), [({"grouping": {"n_groups": 9}}, ConfigError), ({"data": {"tasks": ["nowhere"]}}, DataError)]
)
def test_it_refuses_what_a_run_refuses(changes, error, tmp_path):
    shutil.copytree(finished_run() / "tasks", tmp_path / "tasks")
    with pytest.raises(error):
        pipeline.estimate(read_config(finished_run() / "recipe.yaml", **changes))


def test_shares_of_the_work_are_those_of_the_ledger(tmp_path):
    """Told from tokens alone, within a factor of two of what a run was charged; its tests write free text, too."""
    recipe = copy_run(tmp_path)
    config = read_config(recipe)
    tasks, rows, _ = stages.prepare(config)
    work = divide_work(config, rows)
    spent = {record["stage"]: record["flops"] for record in read_json(tmp_path, "costs.json")["stages"]}
    assert set(work) <= set(spent) and len(tasks.names) == 5
    pace = {name: spent[name] / work[name] for name in ("features", "train", "baselines", "combine")}
    assert max(pace.values()) < 2 * min(pace.values()), pace
