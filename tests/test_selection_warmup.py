"""Features after a warm-up, in the whole pipeline: where groups start, what they train, and what stays the base's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ensemblelora import artifacts, pipeline, training
from ensemblelora.adapters import THETA0, adapter_state
from ensemblelora.api import load_run
from ensemblelora.comparison.request import check_request, hold_folder
from ensemblelora.config import parse_config
from ensemblelora.errors import ConfigError, UsageError
from ensemblelora.startpoint import cut_training, settle_training, start_at, started_at
from ensemblelora.training import trainer
from ensemblelora.validation.validate import collect_truth
from tests.tiny import disturb, make_adapted
from tests.tiny_run import TASKS, copy_run, make_inputs, read_config, read_json

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own

WARM = {"proj_dim": 24, "linearize_at": "warmup"}


class Recorder:
    """Remembers every fine-tuning."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: list[tuple[Any, Any, dict[str, torch.Tensor]]] = []
        self._carry_out = training.fine_tune_together
        for place in ("ensemblelora.training.fine_tune_together", "ensemblelora.training.tuning.fine_tune_together"):
            monkeypatch.setattr(place, self)

    def __call__(self, adapted: Any, jobs: Any, config: Any, **options: Any) -> Any:
        for job in jobs:
            start = adapter_state(adapted, THETA0) if job.start is None else job.start
            self.jobs.append((job, config, start))
        return self._carry_out(adapted, jobs, config, **options)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    """A whole run that starts from a warm-up, and every fine-tuning it took."""
    folder = tmp_path_factory.mktemp("warm")
    recipe = make_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        pipeline.run(read_config(recipe, gradients=WARM))
    return folder, recorder


def weights_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "adapters" / name / "adapter_model.safetensors")


def test_the_warm_up_and_its_groups_take_the_epochs_of_one_training(warm):
    folder, recorder = warm
    first, second = cut_training(read_config(folder / "recipe.yaml", gradients=WARM))
    assert (first.num_train_epochs, second.num_train_epochs) == (1, 1)
    by_name = {job.name: (job, config, start) for job, config, start in recorder.jobs}
    job, config, cold = by_name["warmup"]
    assert config == first and [split.task for split in job.train] == list(TASKS)
    assert not any(cold[key].any() for key in cold if "lora_B" in key)
    moved = weights_of(folder, "warmup")
    assert any(not torch.equal(moved[key], cold[key]) for key in moved)
    for name in ("group-0", "group-1"):
        job, config, start = by_name[name]
        assert config == second and all(torch.equal(start[key], moved[key]) for key in moved)


def test_one_adapter_for_all_starts_at_the_base_and_takes_all_epochs(warm):
    _, recorder = warm
    _, config, start = next(entry for entry in recorder.jobs if entry[0].name == "shared")
    assert config.num_train_epochs == 2
    assert not any(start[key].any() for key in start if "lora_B" in key)


def test_base_and_shared_are_what_they_are_without_a_warm_up(warm, tmp_path):
    folder, _ = warm
    copy_run(tmp_path)
    cold, found = read_json(tmp_path, "results.json"), read_json(folder, "results.json")
    for method in ("base", "shared"):
        for task in TASKS:
            a, b = (results["methods"][method]["per_task"][task]["nll"] for results in (cold, found))
            assert a == pytest.approx(b, abs=1e-5), (method, task)
    assert found["linearity"]["distances"]["shared"]["absolute"] == pytest.approx(
        cold["linearity"]["distances"]["shared"]["absolute"], rel=1e-4
    )


def test_a_has_a_gradient_at_the_warm_up_and_the_rest_of_the_training_is_simulated(warm, tmp_path):
    folder, _ = warm
    copy_run(tmp_path)
    cold, found = (read_json(where, "feature_health.json")["n_coordinates"] for where in (tmp_path, folder))
    assert found > cold
    budget = read_json(folder, "oracle.json")["budget"]
    assert budget["num_train_epochs"] == 1 and budget["n_trained"] == budget["n_coordinates"] == found


def test_the_warm_up_is_in_the_ledger_and_charged_to_the_groups(warm):
    folder, _ = warm
    costs = read_json(folder, "costs.json")
    spent = {record["stage"]: record["flops"] for record in costs["stages"]}
    assert next(iter(spent)) == "warmup" and spent["warmup"] > 0
    assert costs["methods"]["own group"]["train_flops"] == spent["warmup"] + spent["train"]
    if "boosted group" in costs["methods"]:
        boosted = costs["methods"]["boosted group"]["train_flops"]
        assert boosted == spent["warmup"] + spent["train"] + spent["boost"]
    assert spent["warmup"] + spent["train"] == pytest.approx(spent["baselines"], rel=0.2)
    assert costs["methods"]["shared"]["train_flops"] == spent["baselines"]
    assert "warmup" in (folder / "run" / "report.md").read_text(encoding="utf-8")


def test_a_finished_run_is_opened_with_its_own_start(warm):
    folder, _ = warm
    run = load_run(folder / "run")
    results = read_json(folder, "results.json")
    adapted, _ = run._model
    assert adapted.origin != THETA0
    state, moved = adapter_state(adapted, THETA0), weights_of(folder, "warmup")
    assert all(torch.equal(state[key], moved[key]) for key in moved)
    rows = [json.loads(line) for line in (folder / "tasks" / f"{TASKS[0]}.test.jsonl").read_text().splitlines()]
    found = run.predict(TASKS[0], rows)
    share = np.mean([answer.label == row["label"] for answer, row in zip(found, rows, strict=True)])
    assert share == pytest.approx(results["methods"]["ensemble"]["per_task"][TASKS[0]]["accuracy"])


def test_nothing_is_done_twice(warm, monkeypatch):
    folder, _ = warm
    recorder = Recorder(monkeypatch)
    pipeline.run(read_config(folder / "recipe.yaml", gradients=WARM))
    assert recorder.jobs == []


def test_a_warm_up_that_was_broken_off_ends_where_an_unbroken_one_does(warm, tmp_path, monkeypatch):
    recipe = make_inputs(tmp_path)
    step, n_steps = trainer.AdapterTrainer.training_step, []

    def stop_at_third(self, *args, **options):
        if len(n_steps) == 3:
            raise KeyboardInterrupt
        n_steps.append(1)
        return step(self, *args, **options)

    monkeypatch.setattr(trainer.AdapterTrainer, "training_step", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(read_config(recipe, gradients=WARM), until="features")
    assert not (tmp_path / "run" / "adapters" / "warmup").exists()
    monkeypatch.undo()
    pipeline.run(read_config(recipe, gradients=WARM), until="features")
    mine, theirs = weights_of(tmp_path, "warmup"), weights_of(warm[0], "warmup")
    assert all(torch.allclose(mine[key], theirs[key], atol=1e-6) for key in theirs)


def test_a_run_changes_its_start_and_changes_it_back(tmp_path):
    recipe = copy_run(tmp_path)
    cold = read_json(tmp_path, "plan.json")
    pipeline.run(read_config(recipe, gradients=WARM), until="group")
    assert (tmp_path / "run" / "adapters" / "warmup").exists()
    assert read_json(tmp_path, "plan.json")["predicted"] != cold["predicted"]
    pipeline.run(read_config(recipe), until="group")
    assert read_json(tmp_path, "plan.json") == cold
    assert "warmup" not in {record["stage"] for record in read_json(tmp_path, "costs.json")["stages"]}


def test_truth_is_measured_from_the_warm_up(warm, tmp_path, monkeypatch):
    folder, _ = warm
    shutil.copytree(folder / "run", tmp_path / "run")
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr("ensemblelora.validation.validate.choose_subsets", lambda *_, **__: ((0, 2),))
    config = read_config(folder / "recipe.yaml", gradients=WARM)
    (found,), _ = collect_truth(tmp_path / "run", config, n_subsets=1, n_seeds=1)
    moved = weights_of(folder, "warmup")
    ((_, settings, start),) = recorder.jobs
    assert settings.num_train_epochs == 1 and all(torch.equal(start[key], moved[key]) for key in moved)
    assert found.tasks == (TASKS[0], TASKS[2]) and found.distance > 0


def test_the_export_of_members_holds_the_start_that_boosters_are_measured_from(warm, tmp_path):
    folder, _ = warm
    run = load_run(folder / "run")
    boosted = [member for member in artifacts.read_json(folder / "run" / "ensemble.json")["members"]
               if member["kind"] == "booster"]  # fmt: skip
    run.export(tmp_path / "peft", format="peft")
    assert (tmp_path / "peft" / THETA0).exists() == bool(boosted)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training": {"num_train_epochs": 1}}, "num_train_epochs 1: a warm-up takes half of the epochs"),
        ({"gradients": WARM | {"warmup_epochs": 2}}, r"gradients\.warmup_epochs 2: none of 2 .* is left"),
    ],
)
def test_a_warm_up_that_leaves_nothing_is_refused_before_the_model_is_loaded(tmp_path, changes, told, monkeypatch):
    recipe = make_inputs(tmp_path)
    monkeypatch.setattr("ensemblelora.stages.request.load_base", None)
    with pytest.raises(ConfigError, match=told):
        pipeline.run(read_config(recipe, **{"gradients": WARM} | changes))
    assert not (tmp_path / "run").exists()


def test_epochs_of_the_warm_up_can_be_set():
    config = parse_config({"data": {"tasks": ["a"]}, "training": {"num_train_epochs": 5},
                           "gradients": {"linearize_at": "warmup", "warmup_epochs": 1}})  # fmt: skip
    assert [part.num_train_epochs for part in cut_training(config)] == [1, 4]
    half = config.model_copy(update={"gradients": config.gradients.model_copy(update={"warmup_epochs": "auto"})})
    assert [part.num_train_epochs for part in cut_training(half)] == [2, 3]
    for place in ("auto", "base"):
        cold = config.model_copy(update={"gradients": config.gradients.model_copy(update={"linearize_at": place})})
        assert settle_training(cold) == config.training


def test_a_comparison_has_methods_of_its_own_for_it(tmp_path):
    config = parse_config({"data": {"tasks": ["a", "b"]}, "gradients": {"linearize_at": "warmup"}})
    with pytest.raises(UsageError, match="a comparison has methods of its own for that, warm and warm-plan"):
        check_request(config, ["core"], 1, [], tmp_path, None)


def test_a_comparison_begun_before_a_key_was_there_goes_on(tmp_path):
    """A folder's config lacks keys that came later: they have their defaults, and are no other config."""
    config = parse_config({"data": {"tasks": ["a", "b"]}, "gradients": {"proj_dim": 24}})
    request = check_request(config, ["core"], 1, [], tmp_path, None)
    values = request.config.model_dump(mode="json")
    del values["gradients"]["linearize_at"], values["gradients"]["warmup_epochs"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    (tmp_path / "study.json").write_text("{}", encoding="utf-8")
    with hold_folder(request):
        pass
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | {"seed": 5}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"holds a comparison of another config \(seed\)"), hold_folder(request):
        pass


def test_a_start_is_lent_or_given():
    adapted = make_adapted()
    cold = adapter_state(adapted, THETA0)
    disturb(adapted)
    moved = adapter_state(adapted, THETA0)
    back = {key: tensor for key, tensor in cold.items()}
    with started_at(adapted, back):
        assert all(torch.equal(adapter_state(adapted, THETA0)[key], cold[key]) for key in cold)
    assert all(torch.equal(adapter_state(adapted, THETA0)[key], moved[key]) for key in moved)
    fresh = make_adapted()
    given = start_at(fresh, moved)
    assert given.origin != THETA0 and fresh.origin == THETA0
    assert all(torch.equal(adapter_state(given, given.origin)[key], cold[key]) for key in cold)
    assert all(torch.equal(adapter_state(given, THETA0)[key], moved[key]) for key in moved)
