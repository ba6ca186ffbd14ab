"""The whole pipeline on a tiny run: what it leaves, what it does again and what not, and what it must never look at."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from ensemblelora import pipeline, progress
from ensemblelora.adapters import attach, load_adapter
from ensemblelora.artifacts import load_arrays
from ensemblelora.config import parse_config
from ensemblelora.data.encoding import encode_split
from ensemblelora.data.loading import load_tasks
from ensemblelora.errors import ConfigError
from ensemblelora.estimation import Oracle
from ensemblelora.evaluation.rows import read_rows
from ensemblelora.gradients import collect
from ensemblelora.models import load_base
from ensemblelora.planning import read_plan
from ensemblelora.prediction import predict_members
from ensemblelora.stages import learning
from ensemblelora.store import FeatureStore
from ensemblelora.workspace import Workspace
from tests.tiny_run import (
    TASKS,
    copy_run,
    edit_rows,
    finished_run,
    flip,
    make_inputs,
    read_config,
    read_json,
    tensors_of,
)

EVERY_STAGE = ["features", "affinity", "group", "train", "boost", "combine", "baselines", "evaluate", "report"]
OUTCOMES = ("affinity.npz", "oracle.json", "plan.json", "boosting.json", "ensemble.json", "results.json")


@pytest.fixture
def carried_out(monkeypatch) -> list[str]:
    """Names of the stages whose body runs."""
    finished_run()  # its own stages don't count
    names: list[str] = []
    carry_out = Workspace._carry_out

    def spy(self, run):
        names.append(run.name)
        yield from carry_out(self, run)

    monkeypatch.setattr(Workspace, "_carry_out", spy)
    return names


def times_of(folder: Path, *patterns: str) -> dict[str, int]:
    """When the run's files were last written."""
    files = [file for pattern in patterns for file in (folder / "run").glob(pattern)]
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in files if file.is_file()}


def features_of(folder: Path) -> dict[tuple[str, str], bytes]:
    store = FeatureStore(folder / "run" / "features")
    return {
        (task, split): store.read(task, split).features.tobytes() for task in TASKS for split in ("train", "validation")
    }


def assert_same_outcome(folder: Path, other: Path, *names: str) -> None:
    assert tensors_of(folder) == tensors_of(other), "an adapter differs in some bit"
    for name in names or OUTCOMES:
        assert (folder / "run" / name).read_bytes() == (other / "run" / name).read_bytes(), name


def refuse_constant(name: str) -> Any:
    pytest.fail(f"{name} is no JSON")


def test_a_class_of_one_row_is_foreseen_and_carried_through(tmp_path):
    make_inputs(tmp_path)
    (tmp_path / "mix").mkdir()
    rows = "".join(f"row number {i},{('good', 'bad')[i % 2]}\n" for i in range(40))
    for name, rare in (("books", "a rare one,odd\n"), ("films", "")):
        (tmp_path / "mix" / f"{name}.csv").write_text(f"text,label\n{rows}{rare}", encoding="utf-8")
    config = read_config(tmp_path / "recipe.yaml", data={"tasks": [str(tmp_path / "mix")]})
    assert pipeline.foresee(config).stages["total"]["n_tokens"] > 0
    results = pipeline.run(config, until="evaluate").results
    assert results is not None and set(results["methods"]["ensemble"]["per_task"]) == {"books", "films"}


def test_stages_are_numbered_without_gaps_up_to_the_last_one_asked_for(tmp_path):
    recipe = copy_run(tmp_path)

    def list_said(until: str, **changes: Any) -> list[str]:
        stream = io.StringIO()
        with progress.announcing(Console(file=stream, force_terminal=False, width=200)):
            pipeline.run(read_config(recipe, **changes), until=until)
        return [line for line in stream.getvalue().splitlines() if line.startswith("[")]

    def number(names: list[str]) -> list[str]:
        return [f"[{i}/{len(names)}] {name}" for i, name in enumerate(names, 1)]

    def list_ended(said: list[str]) -> list[str]:
        return [line.partition(":")[0] for line in said if not line.endswith(" ...")]

    without = [name for name in EVERY_STAGE if name != "baselines"]
    assert list_ended(list_said("report")) == number(EVERY_STAGE)
    assert list_said("group") == [f"{title}: done before" for title in number(EVERY_STAGE[:3])]
    assert list_ended(list_said("evaluate", evaluation={"baselines": ["base"]})) == number(without[:7])
    one = list_said("evaluate", grouping={"n_groups": 1})
    assert list_ended(one) == number(EVERY_STAGE[:8])
    warm = read_config(recipe, gradients={"linearize_at": "warmup"})
    assert pipeline._list_stages(warm, "affinity") == ["warmup", "features", "affinity"]
    assert "[7/8] baselines: not needed, since the plan is one adapter for all" in one and "[4/8] train ..." in one


def test_a_finished_run_holds_every_file_whole_and_nothing_else():
    run = finished_run() / "run"
    groups = read_json(finished_run(), "plan.json")["groups"]
    adapters = {path.name for path in (run / "adapters").iterdir()}
    assert {f"group-{g}" for g in range(len(groups))} | {"shared"} <= adapters
    assert adapters - {"shared"} == {m["name"] for m in read_json(finished_run(), "ensemble.json")["members"]}
    for name in adapters:
        found = {path.name for path in (run / "adapters" / name).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= found <= {
            "adapter_config.json", "adapter_model.safetensors", "training.json",
        }  # fmt: skip
    files = {path.name for path in run.iterdir()}
    # Another test may have asked a question without a task's name, which makes the router.
    assert files - {".lock", "routing.json", "routing.npz"} == {
        ".config.yaml", ".costs.json", "adapters", "affinity.npz", "boosting.json", "config.yaml", "costs.json",
        "ensemble.json", "environment.json", "feature_health.json", "features", "oracle.json", "plan.json",
        "report.html", "report.md", "results.json", "run.json", "scores", "stages", "tasks.json", "test_rows.npz",
    }  # fmt: skip
    markers = {path.name for path in (run / "stages").iterdir()}
    assert markers == {f"{name}.json" for name in [*EVERY_STAGE, *(a for a in adapters if "-boost-" not in a)]}
    for path in run.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".tmp")]


def test_what_the_files_say_fits_together():
    folder = finished_run()
    plan = read_plan(read_json(folder, "plan.json"))
    assert plan.task_names == TASKS and len(plan.groups) == 2
    matrix = load_arrays(folder / "run" / "affinity.npz")["matrix"]
    assert matrix.shape == (5, 5) and np.array_equal(matrix, matrix.T)
    weights = np.array(read_json(folder, "ensemble.json")["weights"])
    assert weights.shape == (5, 2) and np.allclose(weights.sum(1), 1) and (weights >= 0).all()
    results = read_json(folder, "results.json")
    assert list(results["methods"]) == ["base", "shared", "own group", "boosted group", "ensemble"]
    for method in results["methods"].values():
        assert list(method["per_task"]) == list(TASKS)
        assert all(math.isfinite(method["mean"][name]) for name in ("nll", "accuracy", "macro_f1"))
    assert [entry["kind"] for entry in results["methods"]["base"]["per_task"].values()] == [
        "verbalizer", "verbalizer", "verbalizer", "options", "sequence",
    ]  # fmt: skip
    assert {(d["a"], d["b"]) for d in results["differences"]} >= {("ensemble", "shared"), ("ensemble", "base")}
    assert set(results["linearity"]["tasks"]) == set(TASKS)
    checked = results["predicted_vs_measured"]
    assert [row["predicted_nll"] for row in checked] == list(plan.predicted.plan.nll)
    for measured, method in (("measured_nll", "own group"), ("measured_base_nll", "base")):
        assert [row[measured] for row in checked] == [
            results["methods"][method]["per_task"][task]["nll"] for task in TASKS
        ]
    assert [row["base_nll"] for row in checked] == list(plan.predicted.base.nll), "of the rows that were predicted"
    assert "Linear" in (folder / "run" / "report.md").read_text(encoding="utf-8").title()


def test_the_rows_that_are_kept_give_the_tables_numbers():
    folder = finished_run()
    rows, results = read_rows(folder / "run" / "test_rows.npz"), read_json(folder, "results.json")
    assert tuple(rows) == TASKS
    for method, table in results["methods"].items():
        for task, score in table["per_task"].items():
            assert len(rows[task].ids) == score["n_examples"] and len(set(rows[task].groups)) == score["n_groups"]
            for metric, values in rows[task].values[method].items():
                assert values.mean() == pytest.approx(score[metric])
    one = next(d for d in results["differences"] if (d["a"], d["b"], d["metric"]) == ("ensemble", "shared", "nll"))
    pair = [rows[one["task"]].values[method]["nll"] for method in ("ensemble", "shared")]
    assert float(np.mean(pair[0] - pair[1])) == pytest.approx(one["difference"])


def test_the_environment_tells_the_base_model_apart_from_its_adapters():
    model = read_json(finished_run(), "environment.json")["model"]
    network = AutoModelForCausalLM.from_pretrained(finished_run() / "model")
    assert model["n_parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert model["dtype"] == "float32"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own, without our quieting
def test_adapters_load_with_peft_alone_and_give_the_same_label_scores():
    folder = finished_run()
    config = read_config(folder / "recipe.yaml")
    task = load_tasks(config.data, seed=config.seed).tasks[0]
    base = load_base(config.model)
    adapted = attach(base, config.adapter, seed=config.seed)
    split = encode_split(task, "test", base.tokenizer, max_length=config.data.max_length)
    for name in ("group-0", "shared"):
        load_adapter(adapted, name, folder / "run" / "adapters" / name)
        ours = predict_members(adapted, split, [name], max_tokens=256).values[0]
        plain = AutoModelForCausalLM.from_pretrained(folder / "model")
        with_peft = PeftModel.from_pretrained(plain, folder / "run" / "adapters" / name)
        rows = np.split(split.tokens.astype(np.int64), split.row_starts[1:-1])
        with torch.no_grad():
            logits = [with_peft(torch.from_numpy(row)[None]).logits[0, -1, split.label_tokens.tolist()] for row in rows]
        np.testing.assert_allclose(ours, torch.stack(logits).numpy(), rtol=1e-4, atol=1e-5)


def test_stage_by_stage_gives_what_one_go_gives_bit_by_bit(tmp_path, carried_out):
    config = read_config(make_inputs(tmp_path))
    done: list[str] = []
    for stage in pipeline.STAGES:
        result = pipeline.run(config, until=stage)
        done += ["baselines", stage] if stage == "evaluate" else [stage]
        assert carried_out == done, f"after {stage}"
        assert (result.plan is not None) == ("group" in done)
        assert (result.results is not None) == ("evaluate" in done)
        assert (result.report is not None) == ("report" in done)
    assert features_of(tmp_path) == features_of(finished_run())
    assert_same_outcome(tmp_path, finished_run())


def test_an_unknown_stage_is_refused_by_name(tmp_path):
    config = read_config(finished_run() / "recipe.yaml", out=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="stage 'training': expected one of features, affinity, group"):
        pipeline.run(config, until="training")
    assert not (tmp_path / "run").exists()


def test_a_second_run_does_nothing(tmp_path, carried_out, monkeypatch):
    recipe = copy_run(tmp_path)
    pipeline.run(read_config(recipe))  # the run folder's own path changed with the copy, which the report tells
    carried_out.clear()
    before = times_of(tmp_path, "adapters/**/*", "features/**/*", "report.*", "stages/*", *OUTCOMES)
    created = read_json(tmp_path, "environment.json")["created"]

    def refuse(*args, **kwargs):
        pytest.fail("a finished stage runs again")

    trains = (learning.training, "fine_tune_together")
    for module, name in (trains, (learning.boosting, "boost"), (collect, "compute_features")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(Oracle, "solve", refuse)
    pipeline.run(read_config(recipe))
    assert carried_out == []
    assert times_of(tmp_path, "adapters/**/*", "features/**/*", "report.*", "stages/*", *OUTCOMES) == before
    assert read_json(tmp_path, "environment.json")["created"] == created


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"evaluation": {"n_bootstrap": 120}}, ["evaluate", "report"]),
        ({"ensemble": {"weights": "uniform"}}, ["combine", "evaluate", "report"]),
        ({"boosting": {"l2_penalty": 3.0}}, ["boost", "combine", "evaluate", "report"]),
    ],
)
def test_a_changed_setting_runs_its_stage_again_and_what_follows(changes, again, tmp_path, carried_out):
    recipe = copy_run(tmp_path)
    before = times_of(tmp_path, "adapters/group-?/*", "adapters/shared/*", "features/**/*", "plan.json")
    pipeline.run(read_config(recipe, **changes))
    assert carried_out == again
    assert times_of(tmp_path, "adapters/group-?/*", "adapters/shared/*", "features/**/*", "plan.json") == before


def test_what_belongs_to_an_old_plan_is_gone_before_the_new_one_is_made(tmp_path, carried_out):
    recipe = copy_run(tmp_path)
    groups = [[TASKS[i] for i in group] for group in read_json(finished_run(), "plan.json")["groups"]]
    changes = {"estimation": {"method": "ridge", "l2_penalty": 3.0}, "grouping": {"groups": groups}}
    pipeline.run(read_config(recipe, **changes), until="affinity")
    assert carried_out == ["affinity"]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left.isdisjoint({"plan.json", "ensemble.json", "results.json", "report.html", "report.md"})
    carried_out.clear()
    pipeline.run(read_config(recipe, **changes))
    # The new plan has the same groups, so their adapters are as good as new; its predictions are not.
    assert carried_out == ["group", "combine", "evaluate", "report"]
    predicted = read_json(tmp_path, "plan.json")["predicted"]["plan"]["nll"]
    assert predicted != read_json(finished_run(), "plan.json")["predicted"]["plan"]["nll"]
    assert [row["predicted_nll"] for row in read_json(tmp_path, "results.json")["predicted_vs_measured"]] == predicted


def test_a_changed_training_row_costs_its_task_and_its_group(tmp_path, carried_out, monkeypatch):
    recipe = copy_run(tmp_path)
    file = tmp_path / "tasks" / f"{TASKS[0]}.train.jsonl"
    edit_rows(file, lambda number, row: row | {"label": flip(row["label"])} if number == 3 else row)
    written: list[tuple[str, str]] = []
    writer = FeatureStore.writer
    monkeypatch.setattr(
        FeatureStore,
        "writer",
        lambda self, task, split, *a, **k: written.append((task, split)) or writer(self, task, split, *a, **k),
    )
    before = times_of(tmp_path, "adapters/*/*.safetensors")
    pipeline.run(read_config(recipe))
    assert written == [(TASKS[0], "train")]
    assert carried_out == EVERY_STAGE
    plan, after = read_json(tmp_path, "plan.json"), times_of(tmp_path, "adapters/*/*.safetensors")
    assert plan["groups"] == read_json(finished_run(), "plan.json")["groups"]
    alone = next(g for g, group in enumerate(plan["groups"]) if 0 not in group)
    named = pipeline.read_result(finished_run() / "run").groups
    assert named == tuple(tuple(plan["task_names"][task] for task in group) for group in plan["groups"])
    unchanged = {path for path in before if after.get(path) == before[path]}
    assert unchanged == {f"run/adapters/group-{alone}/adapter_model.safetensors"}


def costs_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {record["stage"]: record for record in read_json(folder, "costs.json")["stages"]}


def lengthen(folder: Path) -> None:
    """Give the first task longer rows."""
    file = folder / "tasks" / f"{TASKS[0]}.train.jsonl"
    edit_rows(file, lambda number, row: row | {"text": row["text"] + " and more words"} if number < 9 else row)


def test_a_run_with_a_changed_file_costs_what_one_from_the_beginning_does(tmp_path):
    recipe = copy_run(tmp_path)
    before = costs_of(tmp_path)
    groups = [[TASKS[i] for i in group] for group in read_json(tmp_path, "plan.json")["groups"]]
    changes = {"grouping": {"groups": groups}}
    lengthen(tmp_path)
    weights = times_of(tmp_path, "adapters/group-?/*.safetensors")
    pipeline.run(read_config(recipe, **changes))
    assert sum(times_of(tmp_path, "adapters/group-?/*.safetensors")[path] == at for path, at in weights.items()) == 1
    fresh = tmp_path / "fresh"
    pipeline.run(read_config(recipe, **changes, out=str(fresh / "run")))
    after, twin = costs_of(tmp_path), costs_of(fresh)
    assert list(after) == list(twin) == EVERY_STAGE
    for stage in EVERY_STAGE:
        for count in ("flops", "n_tokens", "n_padded_tokens"):
            assert after[stage][count] == twin[stage][count], (stage, count)
    for stage in ("features", "train"):
        assert after[stage]["flops"] > before[stage]["flops"] > 0, "the rows are longer now"
    methods = [read_json(folder, "costs.json")["methods"]["ensemble"] for folder in (tmp_path, fresh)]
    assert all(methods[0][what] == methods[1][what] > 0 for what in ("train_flops", "select_flops"))


def test_of_adapters_that_were_trained_together_the_one_used_again_costs_its_share(tmp_path):
    recipe = make_inputs(tmp_path)
    changes = {"grouping": {"groups": [[*TASKS[:2]], [*TASKS[2:]]]}, "training": {"together": True}}
    pipeline.run(read_config(recipe, **changes), until="train")
    before = costs_of(tmp_path)["train"]
    assert len(before["parts"]) == 2 and sum(one["flops"] for one in before["parts"].values()) == before["flops"]
    lengthen(tmp_path)
    pipeline.run(read_config(recipe, **changes), until="train")
    after = costs_of(tmp_path)["train"]
    markers = [read_json(tmp_path, f"stages/group-{g}.json")["fingerprint"] for g in range(2)]
    assert [marker in before["parts"] for marker in markers].count(True) == 1
    parts = [after["parts"][marker]["flops"] for marker in markers]
    assert min(parts) > 0 and after["flops"] == sum(parts)


def test_what_is_made_again_after_damage_is_counted_beside_what_was_not(tmp_path):
    recipe = copy_run(tmp_path)
    (tmp_path / "run" / "feature_health.json").unlink()
    weights = tmp_path / "run" / "adapters" / "group-1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    before = costs_of(tmp_path)
    result = pipeline.run(read_config(recipe))
    for stage in ("features", "train"):
        assert costs_of(tmp_path)[stage]["flops"] == before[stage]["flops"] > 0
    assert not any("parts" in stage for stage in result.costs["stages"]), "which is for later runs"


def test_missing_and_damaged_files_are_made_again_as_they_were(tmp_path, carried_out):
    recipe = copy_run(tmp_path)
    run = tmp_path / "run"
    block = next(path for path in (run / "features").iterdir() if path.name.startswith(TASKS[1]))
    shutil.rmtree(block)
    weights = run / "adapters" / "group-1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    (run / "feature_health.json").unlink()
    pipeline.run(read_config(recipe))
    assert carried_out == ["features", "affinity", "group", "train", "combine", "evaluate", "report"]
    assert features_of(tmp_path) == features_of(finished_run())
    assert_same_outcome(tmp_path, finished_run())


def test_one_adapter_for_all_is_its_own_baseline_and_old_adapters_go(tmp_path):
    recipe = copy_run(tmp_path)
    pipeline.run(read_config(recipe, grouping={"n_groups": 1}), until="train")
    trained = {path.name for path in (tmp_path / "run" / "adapters").iterdir() if "-boost-" not in path.name}
    assert trained == {"group-0", "shared"}
    pipeline.run(read_config(recipe, grouping={"n_groups": 1}))
    members = {member["name"] for member in read_json(tmp_path, "ensemble.json")["members"]}
    assert {path.name for path in (tmp_path / "run" / "adapters").iterdir()} == members | {"shared"}
    assert not list((tmp_path / "run" / "stages").glob("group-1*"))
    costs, methods = read_json(tmp_path, "costs.json"), read_json(tmp_path, "results.json")["methods"]
    assert "baselines" not in [record["stage"] for record in costs["stages"]]
    train = next(record for record in costs["stages"] if record["stage"] == "train")
    assert costs["methods"]["shared"]["train_flops"] == train["flops"]
    assert methods["shared"] == methods["own group"], "no booster is in either"
    boosted = any("-boost-" in name for name in members)
    assert ("boosted group" in methods) == boosted
    assert boosted or methods["shared"] == methods["ensemble"]


@pytest.mark.parametrize("baselines", [[], ["base"]])
def test_only_the_baselines_asked_for_are_made(tmp_path, baselines, carried_out):
    recipe = copy_run(tmp_path)
    shutil.rmtree(tmp_path / "run" / "adapters" / "shared")
    result = pipeline.run(read_config(recipe, evaluation={"baselines": baselines}))
    assert carried_out == ["evaluate", "report"]
    assert list(result.results["methods"]) == [*baselines, "own group", "boosted group", "ensemble"]
    assert list(result.costs["methods"]) == [*baselines, "own group", "boosted group", "ensemble"]
    assert "shared" not in result.results["linearity"]["distances"]


def test_poisoned_test_labels_change_the_results_and_nothing_else(tmp_path):
    recipe = make_inputs(tmp_path)
    for file in (tmp_path / "tasks").glob("*.test.jsonl"):
        edit_rows(file, lambda _, row: row | {"label": flip(row["label"])})
    pipeline.run(read_config(recipe))
    assert features_of(tmp_path) == features_of(finished_run())
    learnt = [name for name in OUTCOMES if name != "results.json"]
    assert_same_outcome(tmp_path, finished_run(), *learnt)
    poisoned, true = (read_json(folder, "results.json")["methods"] for folder in (tmp_path, finished_run()))
    for task in TASKS[:4]:
        accuracies = [methods["base"]["per_task"][task]["accuracy"] for methods in (poisoned, true)]
        assert sum(accuracies) == pytest.approx(1.0)


def test_the_order_of_the_tasks_does_not_change_the_groups(tmp_path):
    make_inputs(tmp_path)
    cards = [str(tmp_path / "tasks" / f"{name}.yaml") for name in reversed(TASKS)]
    result = pipeline.run(read_config(tmp_path / "recipe.yaml", data={"tasks": cards}), until="group")
    groups = []
    for plan in (result.plan, read_json(finished_run(), "plan.json")):
        groups.append({frozenset(plan["task_names"][task] for task in group) for group in plan["groups"]})
    assert groups[0] == groups[1]


def test_a_single_task_runs_to_the_end(tmp_path):
    recipe = make_inputs(tmp_path)
    card = str(tmp_path / "tasks" / f"{TASKS[0]}.yaml")
    result = pipeline.run(read_config(recipe, data={"tasks": [card]}, grouping={"n_groups": "auto"}))
    assert result.plan["groups"] == [[0]]
    assert result.results["methods"]["ensemble"]["per_task"][TASKS[0]]["n_examples"] == 12


def test_a_choice_more_in_training_rows_changes_the_outputs_of_all_splits(tmp_path):
    recipe, folder = make_inputs(tmp_path), tmp_path / "tasks"
    card = yaml.safe_load((folder / f"{TASKS[0]}.yaml").read_text(encoding="utf-8"))
    (folder / f"{TASKS[0]}.yaml").write_text(yaml.safe_dump(card | {"doc_to_choice": "choices"}), encoding="utf-8")
    for file in folder.glob(f"{TASKS[0]}.*.jsonl"):
        edit_rows(file, lambda _, row: row | {"choices": ["no", "yes"]})
    cards = [str(folder / f"{name}.yaml") for name in TASKS[:2]]
    config = read_config(recipe, data={"tasks": cards}, grouping={"n_groups": 1}, training={"num_train_epochs": 1})
    pipeline.run(config, until="features")
    store = FeatureStore(tmp_path / "run" / "features")
    assert [store.read(TASKS[0], split).mode for split in ("train", "validation")] == ["margin", "margin"]
    more = {5: ["no", "yes", "maybe"]}
    edit_rows(folder / f"{TASKS[0]}.train.jsonl", lambda n, row: row | {"choices": more.get(n, row["choices"])})
    results = pipeline.run(config, until="evaluate").results
    assert [store.read(TASKS[0], split).mode for split in ("train", "validation")] == ["contrast", "contrast"]
    assert results["linearity"]["tasks"][TASKS[0]]["r2_over_zero_order"] is not None


def test_the_papers_values_run_to_the_end(tmp_path):
    recipe = make_inputs(tmp_path)
    config = parse_config(
        {
            "compat": "paper",
            "out": str(tmp_path / "run"),
            "data": {"tasks": [str(tmp_path / "tasks" / f"{name}.yaml") for name in TASKS[:4]]},
            "model": read_config(recipe).model.model_dump(),
            "gradients": {"proj_dim": 24},
            "training": {"num_train_epochs": 1, "learning_rate": 0.01},
            "evaluation": {"n_bootstrap": 100},
        }
    )
    result = pipeline.run(config)
    assert all(math.isfinite(method["mean"]["nll"]) for method in result.results["methods"].values())
    assert {entry["rate"] for entry in read_json(tmp_path, "boosting.json")} == {0.1}
    assert {entry["step_length"] for entry in read_json(tmp_path, "boosting.json")} == {1.0}
    weights = np.array(read_json(tmp_path, "ensemble.json")["weights"])
    assert (weights == weights[0]).all(), "one weight a group, for all tasks"
    store = FeatureStore(tmp_path / "run" / "features")
    assert {store.read(name, "train").mode for name in TASKS[:4]} == {"logodds"}


def test_only_groups_that_are_predicted_best_for_a_task_compete_for_it(tmp_path):
    recipe, found, spent = copy_run(tmp_path), {}, {}
    alone = {"grouping": {"n_groups": 5}, "boosting": {"n_rounds": 0}}
    for most in (None, 2):
        pipeline.run(
            read_config(recipe, **alone, ensemble={"max_candidates": most, "min_weight": 0.0}), until="combine"
        )
        found[most] = np.array(read_json(tmp_path, "ensemble.json")["weights"])
        stages = {record["stage"]: record for record in read_json(tmp_path, "costs.json")["stages"]}
        spent[most] = stages["combine"]["flops"]
    predicted = np.array(read_plan(read_json(tmp_path, "plan.json")).by_group)
    assert predicted.shape == (5, 5) and spent[2] == pytest.approx(2 / 5 * spent[None], rel=0.01)
    oracle = read_plan(read_json(tmp_path, "plan.json")).predicted.singles
    groups = read_plan(read_json(tmp_path, "plan.json")).groups
    for task, (row, whole) in enumerate(zip(found[2], found[None], strict=True)):
        own = next(g for g, group in enumerate(groups) if task in group)
        assert predicted[task, own] == pytest.approx(oracle.nll[task])
        best = min((g for g in range(5) if g != own), key=lambda g: predicted[task, g])
        assert set(np.flatnonzero(row)) <= {own, best} and (whole > 0).sum() > 2
        assert row.sum() == pytest.approx(1)


def test_the_fits_that_the_ridge_was_chosen_from_are_in_the_ledger(tmp_path):
    pipeline.run(read_config(copy_run(tmp_path), estimation={"method": "ridge"}), until="affinity")
    trials = read_json(tmp_path, "oracle.json")["penalty_table"]
    stages = {record["stage"]: record for record in read_json(tmp_path, "costs.json")["stages"]}
    spent = 4 * 24 * sum(trial["row_iterations"] for trial in trials)  # 24: the recipe's proj_dim
    assert stages["affinity"]["flops"] > spent > stages["affinity"]["flops"] / 2


def test_an_estimate_names_model_tasks_and_place():
    config = read_config(finished_run() / "recipe.yaml", out="runs/x")
    names = ["a", "b", *(f"t{i}" for i in range(20))]
    told = pipeline._describe_request(config, names)
    assert told.startswith(f"predicted for model {config.model.name} and 22 tasks (a, b, t0,") and "10 more" in told
    assert told.endswith("in runs/x")


class Interruption(KeyboardInterrupt):
    """Someone presses Ctrl-C."""


def test_every_stage_is_in_the_ledger_once_and_an_interrupted_one_goes_on_counting(tmp_path, monkeypatch, carried_out):
    recipe = copy_run(tmp_path)
    for name in ("train", "group-0", "group-1"):
        (tmp_path / "run" / "stages" / f"{name}.json").unlink()
    fine_tune = learning.training.fine_tune_together

    def interrupted(adapted, jobs, *args, **kwargs):
        if jobs[0].name == "group-1":
            raise Interruption
        return fine_tune(adapted, jobs, *args, **kwargs)

    monkeypatch.setattr(learning.training, "fine_tune_together", interrupted)
    with pytest.raises(Interruption):
        pipeline.run(read_config(recipe))
    broken_off = {record["stage"]: record for record in read_json(tmp_path, "costs.json")["stages"]}["train"]
    monkeypatch.setattr(learning.training, "fine_tune_together", fine_tune)
    pipeline.run(read_config(recipe))
    assert carried_out == ["train", "train", "combine", "evaluate", "report"]
    stages = read_json(tmp_path, "costs.json")["stages"]
    assert sorted(record["stage"] for record in stages) == sorted(EVERY_STAGE)
    after = {record["stage"]: record for record in stages}
    before = {record["stage"]: record for record in read_json(finished_run(), "costs.json")["stages"]}
    for stage in EVERY_STAGE:
        for count in ("flops", "n_tokens", "n_padded_tokens"):
            assert after[stage][count] == before[stage][count], (stage, count)
    assert 0 < broken_off["flops"] < after["train"]["flops"]
    assert after["train"]["wall_seconds"] > broken_off["wall_seconds"]
