"""A whole selection on a tiny model: what it leaves, what it does again, what it refuses, what the command shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ensemblelora import artifacts, training
from ensemblelora.adapters import THETA0, adapter_state, attach
from ensemblelora.cli import main
from ensemblelora.comparison.pool import Pool
from ensemblelora.config import EstimationConfig, RunConfig
from ensemblelora.console import round_floats
from ensemblelora.data.batching import collate
from ensemblelora.errors import ConfigError, OutputError, StoreError, UsageError
from ensemblelora.models import load_base
from ensemblelora.prediction import member_nll
from ensemblelora.selection.costs import count_true_search, list_asked
from ensemblelora.selection.page import group_methods
from ensemblelora.selection.question import read_prospect
from ensemblelora.selection.record import SAMPLES_FILE, SelectionRecord
from ensemblelora.selection.request import check_request
from ensemblelora.selection.search import SearchSettings
from ensemblelora.selection.select import open_bench, select_sources
from ensemblelora.selection.strategies import STRATEGIES, Selection, select
from ensemblelora.startpoint import cut_training
from ensemblelora.store import FeatureStore
from tests.tiny_run import make_mixed_inputs, read_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own

TASKS = ("family0", "family1", "spelled", "written")
TARGET, WRITTEN = "family0", "written"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a task of the opposed rule, one of that rule with longer answers, and one of free text."""
    return make_mixed_inputs(tmp_path_factory.mktemp("inputs"), TASKS, n_test=10)


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, SelectionRecord]:
    """One selection by every strategy; not to be changed."""
    config = read_config(inputs, out=str(tmp_path_factory.mktemp("run") / "select"))
    return config, select_sources(config, TARGET, ["all"], wants_samples=True)


@pytest.fixture
def copied(run: tuple[RunConfig, SelectionRecord], tmp_path: Path) -> RunConfig:
    shutil.copytree(run[0].out, tmp_path / "copy")
    return run[0].model_copy(update={"out": str(tmp_path / "copy")})


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, ...]]]:
    """The tasks of every fine-tuning that is carried out."""
    seen: list[tuple[str, ...]] = []
    carry_out = training.fine_tune_together

    def remember(adapted: Any, jobs: Any, *args: Any, **options: Any) -> Any:
        seen.extend(tuple(split.task for split in job.train) for job in jobs)
        return carry_out(adapted, jobs, *args, **options)

    monkeypatch.setattr(training, "fine_tune_together", remember)
    monkeypatch.setattr("ensemblelora.training.tuning.fine_tune_together", remember)
    yield seen


def read(config: RunConfig, target: str = TARGET) -> dict[str, Any]:
    return artifacts.read_json(Path(config.out) / "selection" / target / "selection.json")


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "seconds" not in k and k != "folder"}
    return [without_times(v) for v in value] if isinstance(value, list) else value


# What it leaves


def test_every_strategy_and_baseline_is_trained_tested_and_written_down(run):
    config, record = run
    assert record.name_sources((0, 1, 2)) == ["family1", "spelled", "written"]
    methods = {final.method for final in record.finals}
    assert methods == {"none", "all", "gradients", "texts", *STRATEGIES}
    assert set(record.test.scores) == methods | {"base"}
    found = read(config)
    assert found["baselines"]["all"] == ["family1", "spelled", "written"] and found["baselines"]["none"] == []
    assert len(found["baselines"]["gradients"]) == max(1, len(record.strategies[0].sources))
    assert found["linearize_at"] == "warmup" and found["estimation"] == "steps" and found["includes_target"]
    pairs = {(change["a"], change["b"], change["metric"]) for change in found["test"]["changes"]}
    assert ("forward", "none", "accuracy") in pairs and ("beam", "texts", "nll") in pairs
    assert all(0 <= score["accuracy"] <= 1 and score["n_examples"] == 10 for score in found["test"]["scores"].values())
    page = (record.folder / "selection.md").read_text(encoding="utf-8")
    assert "What each strategy chose" in page and "family1" in page and "How it tested" in page
    grouped = group_methods(record)
    assert sorted(name for names in grouped for name in names) == sorted({*methods, "base"})
    chosen = {final.method: final.sources for final in record.finals}
    assert all(len({chosen[name] for name in names}) == 1 for names in grouped if names != ("base",))
    assert "the same" in page, "two methods chose alike"


def test_equal_choices_share_an_adapter_and_only_the_target_chooses_its_checkpoint(run):
    config, record = run
    by_choice: dict[tuple[int, ...], set[str]] = {}
    for final in record.finals:
        by_choice.setdefault(final.sources, set()).add(final.adapter)
    assert all(len(adapters) == 1 for adapters in by_choice.values())
    folders = {path.name for path in (record.folder / "adapters").iterdir()}
    assert folders == {adapter for adapters in by_choice.values() for adapter in adapters}
    request = check_request(config, TARGET, ["forward"])
    with open_bench(request) as bench:
        for final in record.finals[:2]:
            scores = bench.pool.score([final.adapter], 0, "validation")
            nll = member_nll(scores, bench.pool.split(0, "validation").labels)[0].mean()
            assert final.validation_nll == pytest.approx(nll, abs=1e-5)


def test_features_are_taken_at_the_warm_up_and_adapters_start_at_the_base(run):
    config, record = run
    out = Path(config.out)
    health = artifacts.read_json(out / "feature_health.json")
    first = artifacts.read_json(out / "adapters" / "warmup" / "training.json")
    assert set(first["tasks"]) == set(TASKS) and {e["step"] for e in first["history"]} == {0, first["n_steps"]}
    with open_bench(check_request(config, TARGET, ["forward"])) as bench:
        n_trained = bench.prospect.oracle.budget.n_trained
        assert health["n_coordinates"] == n_trained, "A has a gradient there, too"
        assert bench.prospect.oracle.budget.num_train_epochs == 1, "what the warm-up has left of two"
        assert not bench.prospect.oracle.budget.keeps_start, "else all sets that do harm are alike"
        probe = bench.pool.probe
        fresh = adapter_state(attach_fresh(config), THETA0)
        now = adapter_state(probe, THETA0)
        assert all(torch.equal(now[key], fresh[key]) for key in fresh), "theta0 is the base model again"
    none = next(final for final in record.finals if final.method == "none")
    assert none.n_steps == 2 * 2, "two epochs of sixteen rows, eight a step"


def attach_fresh(config: RunConfig) -> Any:
    return attach(load_base(config.model, max_length=config.data.max_length), config.adapter, seed=config.seed)


def test_costs_are_counted(run):
    _, record = run
    costs = record.costs
    assert costs.warmup_flops > 0 < costs.feature_flops and set(costs.search_flops) == set(STRATEGIES)
    assert all(flops > 0 for flops in costs.search_flops.values())
    assert costs.speed_up == pytest.approx(
        costs.true_forward_flops / (costs.warmup_flops + costs.feature_flops + costs.search_flops["forward"])
    )
    assert all(final.train_flops > 0 and final.n_steps > 0 for final in record.finals)
    none, everything = (next(f for f in record.finals if f.method == name) for name in ("none", "all"))
    assert everything.train_flops > 2 * none.train_flops


def test_true_fine_tunings_are_counted_set_by_set(run):
    config, record = run
    with open_bench(check_request(config, TARGET, ["forward"])) as bench:
        forward = next(found for found in record.strategies if found.strategy == "forward")
        asked = list_asked(bench.prospect, forward, None)
        steps = [len(bench.prospect.everything) - k for k in range(len(forward.sources) + 1)]
        assert len(asked) == 1 + sum(steps) == forward.n_asked
        # Two adapters were truly trained: the formula comes close to their ledger.
        both = [next(f for f in record.finals if f.method == name) for name in ("none", "all")]
        sets = Selection(**vars(forward) | {"moves": (), "sources": ()})
        one = count_true_search(bench.pool, bench.prospect, sets, config.training, max_sources=1)
        assert both[0].train_flops < one / 4 < both[1].train_flops
        assert 1.4 < (one - both[0].train_flops) / 3 / both[0].train_flops < 4


def test_rows_are_valued_one_by_one(run):
    _, record = run
    lines = [json.loads(line) for line in (record.folder / SAMPLES_FILE).read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 4 * 16 and {line["source"] for line in lines} == set(TASKS)
    assert all(np.isfinite(line["value"]) and line["se"] > 0 for line in lines)
    assert [summary.source for summary in record.rows] == list(TASKS)
    assert record.rows[0].n_rows == 16


def test_it_can_be_searched_again_without_a_model(run, monkeypatch):
    config, record = run
    monkeypatch.setattr("ensemblelora.models.load_base", None)
    prospect, question = read_prospect(config.out, TARGET)
    assert question.source_names == ("family1", "spelled", "written")
    for found in record.strategies:
        again = select(prospect, found.strategy, SearchSettings(seed=config.seed))
        assert again.sources == found.sources
        assert again.nll == pytest.approx(found.nll, abs=1e-9)
    with pytest.raises(UsageError, match="nothing was selected for 'other' here"):
        read_prospect(config.out, "other")


# What is done again


def test_the_same_call_trains_nothing_again_and_says_the_same(copied, trainings):
    before = read(copied)
    select_sources(copied, TARGET, ["all"], wants_samples=True)
    assert trainings == []
    after = read(copied)
    assert (after["costs"]["new_warmup_flops"], after["costs"]["new_feature_flops"]) == (0, 0)
    for one in (before, after):
        one["costs"] = {name: value for name, value in one["costs"].items() if not name.startswith("new_")}
    assert without_times(after) == without_times(before)


def test_a_selection_that_was_broken_off_goes_on(run, inputs, tmp_path, monkeypatch):
    config = read_config(inputs, out=str(tmp_path / "broken"))
    train, done = Pool.train, []

    def stop_at_third(self, *args, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(args[0])
        return train(self, *args, **options)

    monkeypatch.setattr(Pool, "train", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        select_sources(config, TARGET, ["forward"])
    assert not (Path(config.out) / "selection" / TARGET / "selection.json").exists()
    first = load_file(Path(config.out) / "adapters" / "warmup" / "adapter_model.safetensors")
    monkeypatch.setattr(Pool, "train", train)
    seen: list[str] = []
    carry_out = training.fine_tune_together
    monkeypatch.setattr(
        training,
        "fine_tune_together",
        lambda a, jobs, *r, **o: seen.append(jobs[0].name) or carry_out(a, jobs, *r, **o),
    )
    select_sources(config, TARGET, ["forward"])
    assert "warmup" not in seen and len(seen) == len(list((record_folder(config) / "adapters").iterdir())) - 2
    after = load_file(Path(config.out) / "adapters" / "warmup" / "adapter_model.safetensors")
    assert all(torch.equal(first[key], after[key]) for key in first)
    found, before = read(config), read(run[0])
    assert found["test"]["scores"]["forward"] == before["test"]["scores"]["forward"]
    (same,) = (one for one in before["strategies"] if one["strategy"] == "forward")
    fits = {"row_iterations": 0}  # of sets that an earlier strategy asked about, none
    alike = without_times(found["strategies"][0]) | fits == without_times(same) | fits
    assert alike, "two runs of a config agree"


def record_folder(config: RunConfig, target: str = TARGET) -> Path:
    return Path(config.out) / "selection" / target


def test_another_target_takes_the_warm_up_as_it_is_and_adds_features_of_its_validation_rows_alone(copied, trainings):
    store, warm_up = FeatureStore(Path(copied.out) / "features"), Path(copied.out) / "stages" / "warmup.json"
    before, flops = warm_up.read_bytes(), read(copied)["costs"]["feature_flops"]
    kept = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*.npy")}
    store.read(TARGET, "validation")
    with pytest.raises(StoreError, match="no features"):
        store.read(WRITTEN, "validation")  # a source is never judged
    record = select_sources(copied, WRITTEN, ["forward"])
    assert warm_up.read_bytes() == before and all(WRITTEN in tasks for tasks in trainings)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "nothing is computed again"
    assert store.read(WRITTEN, "validation").mode == "sequence"
    assert record.costs.feature_flops != flops and 0.5 < record.costs.feature_flops / flops < 2, "other validation rows"
    assert [source.name for source in record.sources] == ["family0", "family1", "spelled"]
    assert {change.metric for change in record.test.changes} == {"nll"}, "free text has a loss alone"
    scores = record.test.scores["none"]
    assert np.isnan(scores.accuracy) and scores.nll < record.test.scores["base"].nll


def test_only_the_search_can_be_asked_for(copied, trainings):
    shutil.rmtree(record_folder(copied))
    record = select_sources(copied, TARGET, ["forward"], wants_final=False)
    assert trainings == [] and record.test is None and record.finals == ()
    assert not (record_folder(copied) / "adapters").exists()
    assert "How it tested" not in (record.folder / "selection.md").read_text(encoding="utf-8")


# Clusters, the target's own rows, other starts


def test_clusters_of_all_sources(copied):
    record = select_sources(copied, TARGET, ["forward", "scores"], n_clusters=2, wants_final=False)
    names = [source.name for source in record.sources]
    assert names == [f"{task}/{k}" for task in ("family1", "spelled", "written") for k in (0, 1)]
    assert sum(source.n_rows for source in record.sources) == 3 * 16
    assert record.n_clusters == 2
    again, question = read_prospect(copied.out, TARGET)
    assert [s.rows.tolist() for s in question.sources[:2]] and again.n_sources == 6


def test_clusters_of_the_one_task_there_is(inputs, tmp_path):
    config = read_config(inputs, out=str(tmp_path / "alone"))
    card = str(inputs.parent / "tasks" / "family0.yaml")
    config = config.model_copy(update={"data": config.data.model_copy(update={"tasks": (card,)})})
    with pytest.raises(UsageError, match="target 'family0': no sources, the config has no other task"):
        select_sources(config, TARGET)
    assert not Path(config.out).exists(), "refused before anything is written"
    record = select_sources(config, TARGET, ["backward"], n_clusters=3)
    assert not record.includes_target and [s.task for s in record.sources] == [TARGET] * 3
    none = next(final for final in record.finals if final.method == "none")
    assert none.adapter == THETA0 and none.validation_nll is None
    assert record.test.scores["none"] == record.test.scores["base"]


def test_the_targets_own_rows_may_be_a_source_like_others(copied):
    record = select_sources(copied, TARGET, ["forward"], includes_target=False, wants_final=False)
    assert [source.name for source in record.sources] == list(TASKS)
    assert record.strategies[0].gain >= 0


def test_without_a_warm_up_the_whole_training_is_simulated(inputs, tmp_path):
    config = read_config(inputs, out=str(tmp_path / "base"), gradients={"proj_dim": 24, "linearize_at": "base"})
    record = select_sources(config, TARGET, ["forward"], wants_final=False)
    assert record.linearize_at == "base" and record.costs.warmup_flops == 0
    assert not (tmp_path / "base" / "adapters" / "warmup").exists()
    prospect, _ = read_prospect(config.out, TARGET)
    assert prospect.oracle.budget.num_train_epochs == config.training.num_train_epochs


def test_the_convex_fit_chooses_its_ridge_by_the_target(copied):
    config = copied.model_copy(update={"estimation": EstimationConfig(method="ridge")})
    record = select_sources(config, TARGET, ["forward", "backward"], wants_final=False)
    assert record.estimation == "ridge"
    prospect, _ = read_prospect(config.out, TARGET)
    assert prospect.oracle.penalty_table and prospect.oracle.judges == (0,)
    assert select(prospect, "forward", SearchSettings()).sources == record.strategies[0].sources


def test_a_share_of_the_rows_stands_for_all(copied):
    gradients = copied.gradients.model_copy(update={"train_fraction": 0.5})
    config = copied.model_copy(update={"gradients": gradients})
    record = select_sources(config, TARGET, ["forward"], wants_final=False)
    prospect, question = read_prospect(config.out, TARGET)
    assert question.n_train == (16, 16, 16, 16) and prospect.oracle.replicates[0].train[0].n_examples < 16
    assert [source.n_rows for source in record.sources] == [16, 16, 16]
    with pytest.raises(ConfigError, match=r"gradients\.train_fraction 0\.5: clusters need the features of all"):
        check_request(config, TARGET, ["forward"], n_clusters=2)


def test_what_is_kept_of_the_lower_blocks_serves_clusters_too(inputs, tmp_path):
    adapter = {"r": 4, "lora_alpha": 8, "layers_to_transform": [1]}
    config = read_config(inputs, out=str(tmp_path / "top"), adapter=adapter, gradients={"linearize_at": "base"})
    with open_bench(check_request(config, TARGET, ["forward"], n_clusters=2)) as bench:
        probe, parts = bench.pool.probe, bench.pool.rows.train[1:]
        assert len(parts) == 6 and probe.prefix.cache is not None
        for part in parts:
            batch = collate([(part, e) for e in range(part.n_examples)], probe.base.pad_token_id, layout=probe.layout)
            hidden, is_kept = probe.prefix.cache.read(batch, probe.device)
            assert is_kept.all()
            mask = torch.from_numpy(batch.attention_mask).bool()
            torch.testing.assert_close(hidden[mask], probe.prefix.run(batch)[mask], rtol=1e-4, atol=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--target", "other"], "--target 'other': expected one of the tasks family0, family1, spelled, written"),
        (["--target", TARGET, "--strategy", "greedy"], "unknown strategy 'greedy': expected all, or some of forward"),
        (["--target", TARGET, "--by-cluster", "0"], "--by-cluster 0: expected 1 or more"),
        (["--target", TARGET, "--max-sources", "0"], "error: --max-sources 0: expected 1 or more"),
        (["--target", TARGET, "--by-cluster", "17"], "more clusters than training rows in family1 (16), spelled (16) "),
        (["--target", TARGET, "--by-cluster", "17", "--dry-run"], "--by-cluster 17: more clusters than training rows"),
        (
            ["--target", TARGET, "--set", "training.num_train_epochs=1"],
            "at least 2, or leave the warm-up out with --set gradients.linearize_at=base",
        ),
        (["--target", TARGET, "--set", "gradients.warmup_epochs=2"], "gradients.warmup_epochs 2: none of 2"),
    ],
)
def test_what_can_not_be_is_refused_in_a_line_before_anything_is_written(inputs, tmp_path, capsys, arguments, told):
    out = tmp_path / "new"
    assert main(["select", str(inputs), "--out", str(out), "--quiet", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and told in shown.err and len(shown.err.strip().splitlines()) == 1
    assert not out.exists()


def test_a_folder_of_something_else_is_left_alone(inputs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    config = read_config(inputs, out=str(tmp_path))
    with pytest.raises(OutputError, match="not empty and not a run folder"):
        select_sources(config, TARGET)


# The command


def test_the_command_shows_and_writes_json(copied, capsys):
    out = copied.out
    assert main(["select", out, "--target", TARGET, "--strategy", "forward,shapley", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "forward" in shown and "the target's rows alone" in shown and "selection.md" in shown
    assert main(["select", out, "--target", TARGET, "--strategy", "forward", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == TARGET and found["strategies"][0]["strategy"] == "forward"
    assert without_times(found) == round_floats(without_times(read(copied)))


def test_a_selection_has_a_folder_of_its_own_beside_the_run(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(
        "ensemblelora.selection.select.select_sources", lambda config, *a, **o: seen.append(config.out) or stop()
    )

    def stop():
        raise UsageError("enough")

    assert main(["select", str(inputs), "--target", TARGET, "--quiet"]) == 2
    assert main(["select", str(inputs), "--target", TARGET, "--out", "mine", "--quiet"]) == 2
    assert seen == [str(Path("runs/recipe-select")), "mine"]
    assert "error: enough" in capsys.readouterr().err


def test_a_dry_run_says_what_it_would_cost(inputs, tmp_path, capsys):
    out = tmp_path / "dry"
    assert main(["select", str(inputs), "--target", TARGET, "--out", str(out), "--dry-run", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["warmup", "features", "final, at most", "total"] and not out.exists()
    assert found["total"]["flops"] == sum(found[name]["flops"] for name in list(found)[:-1])
    one = cut_training(read_config(inputs))[0].num_train_epochs
    assert found["warmup"]["flops"] == pytest.approx(found["final, at most"]["flops"] / 5 * one / 2, rel=0.02)


def test_a_record_is_plain_values(run):
    _, record = run
    assert json.loads(json.dumps(record.to_dict(), default=str))["target"] == TARGET
    assert asdict(record)["target"] == TARGET
