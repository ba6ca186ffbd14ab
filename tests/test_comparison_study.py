"""The study around the methods: what is measured, kept, refused and shown."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ensemblelora import artifacts, stages
from ensemblelora.adapters import THETA0, adapter_state, load_adapter
from ensemblelora.cli import main
from ensemblelora.comparison import methods as known
from ensemblelora.comparison.bench import Bench
from ensemblelora.comparison.candidate import Candidate, Costs
from ensemblelora.comparison.grouped import score_base, train_shared
from ensemblelora.comparison.methods import METHODS, Method
from ensemblelora.comparison.page import COMPARISON_FILES, write_headline, write_page
from ensemblelora.comparison.planned import make_plan
from ensemblelora.comparison.pool import Pool
from ensemblelora.comparison.record import Primary, place_record, read_head, read_study
from ensemblelora.comparison.request import check_request, choose_methods, choose_primary
from ensemblelora.comparison.study import compare
from ensemblelora.config import RunConfig
from ensemblelora.data.loading import load_tasks
from ensemblelora.errors import ConfigError, DataError, OutputError, TrainingError, UsageError
from ensemblelora.evaluation.metrics import compute_chance_p_value
from ensemblelora.prediction import member_nll, predict_members
from ensemblelora.study_forecast import count_fine_tunings, forecast_study
from tests.study_records import RATES, make_study, make_tasks
from tests.tiny_run import TASKS, make_inputs, read_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own

CHOSEN = TASKS[1], TASKS[3], TASKS[4]
QUICK = {"training": {"num_train_epochs": 1}, "grouping": {"n_groups": 2, "n_random_partitions": 0}}


@cache
def inputs(root: Path) -> Path:
    return make_inputs(root)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classifications, one with answers of several tokens, and free text; the model has two layers."""
    return inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def config(recipe: Path) -> RunConfig:
    return read_config(
        recipe, data={"tasks": [str(recipe.parent / "tasks" / f"{name}.yaml") for name in CHOSEN]}, **QUICK
    )


@pytest.fixture(scope="module")
def done(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of what needs no plan, two seeds, two rates."""
    folder = tmp_path_factory.mktemp("done") / "compared"
    study = compare(config, ["base", "shared"], 2, RATES, folder)
    assert study.failures == {}
    return folder


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, int, float]]]:
    """Put methods that train nothing in the place of all others; give a list of their calls."""

    def install(**methods: Callable[[Pool], Candidate]) -> list[tuple[str, int, float]]:
        calls: list[tuple[str, int, float]] = []

        def wrap(name: str, run: Callable[[Pool], Candidate]) -> Method:
            def call(pool: Pool) -> Candidate:
                calls.append((name, pool.config.seed, pool.config.training.learning_rate))
                return run(pool)

            return Method(name, name, call, is_core=True)

        for name in list(METHODS):
            monkeypatch.delitem(METHODS, name)
        for name, run in methods.items():
            monkeypatch.setitem(METHODS, name, wrap(name, run))
        return calls

    return install


def spoil(candidate: Candidate, by: float) -> Candidate:
    """A candidate that is so much less sure of everything."""

    def predict(part: str) -> list:
        return [replace(scores, values=scores.values * by) for scores in candidate.predict(part)]

    return replace(candidate, predict=predict)


def test_every_method_is_measured_on_every_seed_with_the_same_rows(done: Path, config: RunConfig) -> None:
    study = read_study(done)
    assert study.methods == ("base", "shared") and study.head.seeds == (0, 1)
    assert [task.name for task in study.head.tasks] == list(CHOSEN)
    base, shared = study.of("base"), study.of("shared")
    assert base[0].nll == base[1].nll, "the base model knows no seed, and rows have their own"
    assert shared[0].nll != shared[1].nll, "another seed starts elsewhere"
    assert base[0].correct[TASKS[4]] is None and set(base[0].correct[CHOSEN[0]]) <= {0, 1}
    assert (done / "config.yaml").exists() and artifacts.read_json(done / "tasks.json")["tasks"]
    assert study.config.data.seed == config.seed
    assert not (done / "cache").exists()


def test_the_rate_is_the_best_of_the_first_seed_for_all_seeds(done: Path) -> None:
    first, second = read_study(done).of("shared")
    assert [trial.learning_rate for trial in first.trials] == list(RATES)
    best = min(first.trials, key=lambda trial: trial.validation_nll)
    assert first.learning_rate == second.learning_rate == best.learning_rate
    assert first.validation_nll == best.validation_nll and second.trials == ()
    assert {record.learning_rate for record in read_study(done).of("base")} == {None}
    assert {record.trials for record in read_study(done).of("base")} == {()}


def test_a_record_is_what_the_adapter_gives_on_a_model_of_that_seed(done: Path, config: RunConfig) -> None:
    record = read_study(done).of("shared")[1]
    seeded = config.model_copy(update={"seed": 1, "data": config.data.model_copy(update={"seed": 0})})
    _, rows, probe = stages.prepare(seeded)
    folder = done / "seed-1" / f"lr-{record.learning_rate:g}" / "adapters"
    (adapter,) = folder.iterdir()
    load_adapter(probe, "loaded", adapter)
    for split in rows.test:
        scores = predict_members(probe, split, ["loaded"], max_tokens=4096)
        np.testing.assert_allclose(record.nll[split.task], member_nll(scores, split.labels)[0], atol=2e-5)
    trained = artifacts.read_json(adapter / "trained.json")
    assert record.costs["train_flops"] == trained["flops"] and record.costs["n_bytes"] == trained["n_bytes"]


def test_a_bench_gives_each_seed_the_start_that_a_run_has(config: RunConfig, tmp_path: Path) -> None:
    bench = Bench(config, tmp_path)
    pools = [bench.open_pool(0, 0.01), bench.open_pool(1, 0.01)]
    back = bench.open_pool(0, 0.02)
    alone = stages.prepare(config.model_copy(update={"seed": 1}))[2]
    start = adapter_state(alone, THETA0)
    found = adapter_state(bench.open_pool(1, 0.02).probe, THETA0)
    assert all((start[key] == found[key]).all() for key in start) and start.keys() == found.keys()
    assert pools[0].start_fingerprint == back.start_fingerprint != pools[1].start_fingerprint
    assert pools[0].rows is pools[1].rows is back.rows
    assert len({pool.folder for pool in (*pools, back)}) == 3


def test_the_same_call_again_measures_nothing_and_more_only_adds(
    done: Path, config: RunConfig, tmp_path: Path, fakes: Callable[..., list[tuple[str, int, float]]]
) -> None:
    folder = shutil.copytree(done, tmp_path / "compared")
    before = {path.name: path.read_bytes() for path in (folder / "records").iterdir()}
    calls = fakes(base=score_base, shared=train_shared, other=score_base)
    assert compare(config, ["base", "shared"], 2, RATES, folder).failures == {}
    assert calls == []
    study = compare(config, ["other"], 3, RATES, folder, primary=()).record
    assert calls == [("other", 0, RATES[0]), ("other", 0, RATES[1]), ("other", 1, 0.001), ("other", 2, 0.001)]
    assert study.methods == ("base", "shared", "other") and study.head.seeds == (0, 1, 2)
    after = {path.name: path.read_bytes() for path in (folder / "records").iterdir()}
    assert before.items() <= after.items() and len(after) == len(before) + 3


def test_other_rates_settle_methods_again_on_the_trainings_there_are(
    done: Path, config: RunConfig, tmp_path: Path
) -> None:
    folder = shutil.copytree(done, tmp_path / "compared")
    adapters = {path: path.stat().st_mtime_ns for path in folder.glob("seed-*/*/adapters/*/trained.json")}
    study = compare(config, ["shared"], 1, [RATES[0]], folder).record
    assert [record.learning_rate for record in study.of("shared")] == [RATES[0]]
    assert study.of("base") == (), "not asked for with these rates"
    assert {path: path.stat().st_mtime_ns for path in folder.glob("seed-*/*/adapters/*/trained.json")} == adapters


def test_a_method_that_fails_is_said_and_the_others_go_on(
    config: RunConfig,
    tmp_path: Path,
    fakes: Callable[..., list[tuple[str, int, float]]],
    capsys: pytest.CaptureFixture[str],
    recipe: Path,
) -> None:
    def fail(pool: Pool) -> Candidate:
        raise ZeroDivisionError("one over\nnothing")

    def peek(pool: Pool) -> Candidate:
        pool.score([THETA0], 0, "test")
        return score_base(pool)

    calls = fakes(bad=fail, good=score_base, cheat=peek)
    tasks = json.dumps(list(config.data.tasks))
    command = ["compare", str(recipe), "--out", str(tmp_path / "c"), "--methods", "all", "--seeds", "2", "--quiet"]
    assert main([*command, "--set", f"data.tasks={tasks}"]) == 1
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: bad failed, seed 0: ZeroDivisionError: one over; the others")
    assert lines[1].startswith("error: cheat failed, seed 0: test rows asked for before the method was settled")
    assert "good" in shown.out and "failed: bad, seed 0" in shown.out
    assert [call[:2] for call in calls] == [("bad", 0), ("good", 0), ("cheat", 0), ("good", 1)]
    assert set(read_head(tmp_path / "c").failures) == {"bad", "cheat"}
    assert "bad failed: seed 0" in (tmp_path / "c" / "compare.md").read_text(encoding="utf-8")
    fakes(bad=score_base, good=score_base, cheat=score_base)
    study = compare(read_config(recipe, data={"tasks": list(config.data.tasks)}), ["bad"], 2, [], tmp_path / "c")
    assert study.failures == {} and set(study.record.head.failures) == {"cheat"}
    assert study.record.methods == ("bad", "good")


def test_a_comparison_that_is_stopped_goes_on_where_it_was(
    config: RunConfig, tmp_path: Path, fakes: Callable[..., list[tuple[str, int, float]]]
) -> None:
    def stop(pool: Pool) -> Candidate:
        raise KeyboardInterrupt

    fakes(first=score_base, second=stop)
    with pytest.raises(KeyboardInterrupt):
        compare(config, ["all"], 2, [], tmp_path / "c")
    assert [path.name for path in (tmp_path / "c" / "records").iterdir()] == ["first-seed-0.json"]
    calls = fakes(first=score_base, second=score_base)
    assert len(compare(config, ["all"], 2, [], tmp_path / "c").record.records) == 4
    assert [call[:2] for call in calls] == [("second", 0), ("first", 1), ("second", 1)]


def test_a_rate_that_diverges_leaves_the_others(
    config: RunConfig, tmp_path: Path, fakes: Callable[..., list[tuple[str, int, float]]]
) -> None:
    def diverge(pool: Pool) -> Candidate:
        if pool.config.training.learning_rate > 0.005:
            raise TrainingError("the loss is not finite")
        return score_base(pool)

    def vanish(pool: Pool) -> Candidate:
        return spoil(score_base(pool), float("nan"))

    def sharpen(pool: Pool) -> Candidate:
        return spoil(score_base(pool), 1.0 if pool.config.training.learning_rate > 0.005 else 3.0)

    fakes(some=diverge, none=vanish, best=sharpen)
    study = compare(config, ["all"], 1, RATES, tmp_path / "c")
    assert study.record.of("some")[0].learning_rate == RATES[0]
    assert [trial.learning_rate for trial in study.record.of("some")[0].trials] == [RATES[0]]
    assert "is not finite: the model diverged" in study.failures["none"]
    assert study.record.of("best")[0].learning_rate == RATES[1], "the base model is sure of the wrong things"


def test_features_are_taken_once_a_seed_even_where_plans_differ_by_rate(config: RunConfig, tmp_path: Path) -> None:
    simulated = config.model_copy(update={"estimation": config.estimation.model_copy(update={"method": "steps"})})
    bench = Bench(simulated, tmp_path)
    first, second = (make_plan(bench.open_pool(0, rate)) for rate in RATES)
    ways = [tmp_path / "seed-0" / f"lr-{rate:g}" / "plan" for rate in RATES]
    blocks = [sorted((way / "features").rglob("*.npy")) for way in ways]
    assert [path.stat().st_ino for path in blocks[0]] == [path.stat().st_ino for path in blocks[1]] != []
    ledgers = [{e["stage"]: e for e in artifacts.read_json(way / "costs.json")["stages"]} for way in ways]
    assert ledgers[0]["features"] == ledgers[1]["features"]
    assert ledgers[0]["affinity"]["wall_seconds"] != ledgers[1]["affinity"]["wall_seconds"]
    assert first.oracle.budget.learning_rate, second.oracle.budget.learning_rate == RATES
    ridge = config.model_copy(update={"estimation": config.estimation.model_copy(update={"method": "ridge"})})
    plain = Bench(ridge, tmp_path / "plain")
    assert len({plain.open_pool(0, rate).plan_folder for rate in RATES}) == 1
    assert plain.open_pool(1, RATES[0]).plan_folder != plain.open_pool(0, RATES[0]).plan_folder


def test_each_method_pays_for_the_layers_below_once(config: RunConfig, tmp_path: Path) -> None:
    top = config.model_copy(update={"adapter": config.adapter.model_copy(update={"layers_to_transform": (1,)})})
    study = compare(top, ["base", "shared", "single"], 1, [], tmp_path / "c").record
    lower = study.head.lower["flops"]
    assert lower > 0 and all(task.lower_flops > 0 for task in study.head.tasks)
    for name in ("shared", "single"):
        trained = [artifacts.read_json(path) for path in (tmp_path / "c").glob("seed-0/*/adapters/*/trained.json")]
        own = sum(one["flops"] for one in trained if (len(one["tasks"]) == 3) == (name == "shared"))
        assert study.of(name)[0].costs["train_flops"] == own + lower
    assert study.of("base")[0].costs["train_flops"] == 0
    assert not (tmp_path / "c" / "cache").exists(), "freed at the end"


def test_what_can_not_be_compared_is_refused_in_one_line(
    done: Path, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    folder = shutil.copytree(done, tmp_path / "compared")
    longer = config.model_copy(update={"training": config.training.model_copy(update={"num_train_epochs": 7})})
    with pytest.raises(UsageError, match=r"holds a comparison of another config \(training\.num_train_epochs\)"):
        compare(longer, ["base"], 1, [], folder)
    with pytest.raises(UsageError, match=r"another config \(data\.seed, seed\); choose another folder"):
        compare(config.model_copy(update={"seed": 4}), ["base"], 1, [], folder)
    head = artifacts.read_json(folder / "study.json")
    artifacts.write_json(folder / "study.json", head | {"identity": "another"})
    with pytest.raises(UsageError, match="compared with other rows, another model or another version"):
        compare(config, ["single"], 1, [], folder)
    nowhere = config.model_copy(update={"data": config.data.model_copy(update={"tasks": ("nowhere",)})})
    with pytest.raises(DataError, match="neither a shipped card"):
        compare(nowhere, ["base"], 1, [], tmp_path / "begun")
    assert [path.name for path in (tmp_path / "begun").iterdir()] == [".lock"], "the next config is as good as any"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(OutputError, match=r"not empty and no comparison \(holds 'letter.txt'\)"):
        compare(config, ["base"], 1, [], tmp_path / "full")
    with artifacts.RunFolder(folder).lock(), pytest.raises(OutputError, match="in use by"):
        compare(config, ["base"], 1, [], folder)
    for wrong, told in (
        (["--methods", "shraed"], f"unknown methods shraed: expected all, core, or some of {', '.join(METHODS)}"),
        (["--methods", ","], "no methods: expected all, core, or some of"),
        (["--seeds", "0"], "0 seeds: expected 1 to 100"),
        (["--learning-rates", "1e-3,fast"], "expected numbers, such as 2.5e-4,5e-4,1e-3"),
        (["--learning-rates", "-1"], "learning rates -1.0: expected positive numbers"),
        (["--primary", "shared"], "--primary 'shared': expected two methods, such as ours:shared"),
        (
            ["--methods", "base", "--primary", "base:tag"],
            "primary comparison base:tag: expected two of the methods base",
        ),
    ):
        assert main(["compare", str(recipe), "--out", str(tmp_path / "new"), *wrong]) == 2
        line = capsys.readouterr().err
        assert told in line and line.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_methods_and_primary_comparisons_are_chosen_by_name() -> None:
    assert [method.name for method in choose_methods(["all"])] == list(METHODS)
    core = choose_methods(["core"])
    assert {method.name for method in core} >= {"base", "shared", "single"} and all(method.is_core for method in core)
    chosen = choose_methods(["shared", "base", "shared"])
    assert [method.name for method in chosen] == ["base", "shared"], "in the order of the list"
    assert choose_primary(chosen, None) == (), "without ours there is nothing to compare"
    ours = Method("ours", "ours", score_base)
    of_groups = (("grouped", "random"), ("grouped", "gradient-cosine"), ("grouped", "tag"), ("ours", "random-ours"))
    assert choose_primary(choose_methods(["all"]), None) == (
        *(("ours", method.name) for method in METHODS.values() if method.is_rival),
        *of_groups,
    ), "and what the groups alone are worth"
    assert choose_primary([*chosen, ours], None) == (("ours", "shared"),), "as far as they are there"
    some = choose_methods(["grouped", "random-2", "shared"])
    assert choose_primary(some, None) == (("grouped", "random"),)
    assert choose_primary(some, [("random", "shared")]) == (("random", "shared"),), "draws as one method"
    with pytest.raises(UsageError, match="primary comparison grouped:random-ours: expected two of the methods"):
        choose_primary(some, [("grouped", "random-ours")])
    assert choose_primary(chosen, [("base", "shared")] * 2) == (("base", "shared"),)


def test_what_is_refused_leaves_the_model_and_what_fails_does_not(
    config: RunConfig,
    tmp_path: Path,
    fakes: Callable[..., list[tuple[str, int, float]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(pool: Pool) -> Candidate:
        raise ConfigError("6 groups: the plan looked at 1, 2; raise grouping.max_groups, or leave the method out")

    def fail(pool: Pool) -> Candidate:
        raise TrainingError("the loss is not finite")

    loads: list[int] = []
    monkeypatch.setattr(Bench, "reload", lambda self: loads.append(1))
    fakes(asked=refuse, good=score_base)
    assert set(compare(config, ["all"], 2, [], tmp_path / "c").failures) == {"asked"} and loads == []
    fakes(bad=fail, good=score_base)
    assert set(compare(config, ["all"], 2, [], tmp_path / "d").failures) == {"bad"} and loads == [1]


def test_records_say_whether_validation_rows_are_above_chance_and_whether_the_rate_is_at_an_edge(
    done: Path, config: RunConfig, tmp_path: Path, fakes: Callable[..., list[tuple[str, int, float]]]
) -> None:
    study = read_study(done)
    _, rows, probe = stages.prepare(config)
    for split in rows.validation:
        recorded = study.of("base")[0].chance[split.task]
        if split.kind == "sequence":
            assert recorded is None
            continue
        values = predict_members(probe, split, [THETA0], max_tokens=4096).values[0]
        right = values.argmax(axis=1) == split.labels
        assert recorded == pytest.approx(compute_chance_p_value(right, split.labels, split.groups))
    assert {record.is_rate_at_edge for record in study.of("base")} == {False}, "nothing was chosen"
    assert {record.is_rate_at_edge for record in study.of("shared")} == {True}, "one of two is always at an edge"

    def sharpen(pool: Pool) -> Candidate:
        return spoil(score_base(pool), 1.0 if pool.config.training.learning_rate == 0.002 else 3.0)

    fakes(middle=sharpen, alone=score_base)
    found = compare(config, ["middle"], 2, [0.001, 0.002, 0.004], tmp_path / "c").record.of("middle")
    assert [(record.learning_rate, record.is_rate_at_edge) for record in found] == [(0.002, False)] * 2
    found = compare(config, ["alone"], 1, [0.001], tmp_path / "d").record.of("alone")
    assert found[0].is_rate_at_edge is False, "of one rate nothing was asked"


def test_a_comparison_named_after_the_fact_is_marked(
    done: Path, config: RunConfig, tmp_path: Path, fakes: Callable[..., list[tuple[str, int, float]]]
) -> None:
    folder = shutil.copytree(done, tmp_path / "compared")
    fakes(base=score_base, shared=train_shared, other=score_base)
    study = compare(config, ["all"], 2, RATES, folder, primary=[("shared", "base"), ("other", "base")]).record
    assert study.head.primary == (Primary("shared", "base", is_late=True), Primary("other", "base"))
    again = compare(config, ["all"], 2, RATES, folder, primary=[("other", "base")]).record
    assert again.head.primary == study.head.primary, "what was named stays"
    page = write_page(folder)
    markdown = (folder / "compare.md").read_text(encoding="utf-8")
    late = [(result.a, result.b) for result in page.statistics.primary if result.is_late]
    assert set(late) == {("shared", "base")} and markdown.count("late*") == len(late) >= 2
    assert "1 pair marked late" in markdown and len(page.statistics.primary) == 2 * len(late)


def test_the_seed_of_the_rows_is_its_own(config: RunConfig) -> None:
    def ids(seed: int, rows: int | None) -> list[tuple[str, ...]]:
        few = config.data.model_copy(update={"seed": rows, "max_train_examples": 6})
        return [tuple(e.id for e in task.splits["train"]) for task in load_tasks(few, seed=seed).tasks]

    assert ids(0, 3) == ids(1, 3) == ids(3, None) != ids(1, None)
    request = check_request(config, ["base"], 2, [], "out", None)
    assert request.config.data.seed == config.seed and request.seeds == (0, 1)
    assert request.learning_rates == (config.training.learning_rate,)


def test_the_headline_says_where_nothing_was_learnt(tmp_path: Path) -> None:
    def headline(name: str, **skills: float) -> str:
        return write_headline(write_page(make_study(tmp_path / name, skills=skills)).statistics)

    learnt = headline("learnt", base=0.5, shared=0.75, ours=0.9)
    assert "No training" not in learnt and "at chance" not in learnt
    vain = headline("vain", base=0.95, shared=0.75, ours=0.9)
    assert re.search(r" No training is better than the model as it is \(9\d\.\d%\)\.$", vain)
    study = make_study(tmp_path / "chance", skills={"base": 0.5, "shared": 0.5, "ours": 0.52})
    statistics = write_page(study).statistics
    at_chance = replace(statistics, at_chance=statistics.tasks)
    assert write_headline(at_chance).endswith("means anything: give more rows or epochs.")
    assert "at chance" not in write_headline(replace(statistics, at_chance=statistics.tasks[:1]))


def test_the_page_holds_every_method_and_all_numbers(tmp_path: Path) -> None:
    skills = {"base": 0.5, "shared": 0.75, "single": 0.6, "<b>tag</b>": 0.65, "mtl-ft": 0.8, "ours": 0.9}
    folder = make_study(
        tmp_path / "study",
        skills={name.replace("/", ""): skill for name, skill in skills.items()},
        tasks=make_tasks(n_rows=120, free_text=True),
        failures={"full": "seed 0: out of memory"},
    )
    page = write_page(folder)
    assert {path.name for path in folder.iterdir()} >= set(COMPARISON_FILES)
    html, markdown = (page.path.with_suffix(end).read_text(encoding="utf-8") for end in (".html", ".md"))
    assert "https://" not in markdown and "<b>tag<b>" not in html and "&lt;b&gt;tag" in html
    for name in ("base", "single", "mtl-ft", "ours"):
        assert f"the method {name} ({name})" in markdown, "what lost stays"
    assert "full failed: seed 0: out of memory" in markdown
    assert markdown.startswith("# Ours: mean test accuracy ") and ", the best of 2 rivals, corrected p" in markdown
    assert "dequantised 4-bit file" in markdown, "beside every table that could compare LoRA with QLoRA"
    assert markdown.count("*Figure: ") == 4 and "--primary ours:shared,ours:mtl-ft" in markdown
    numbers = artifacts.read_json(folder / "compare.json")
    assert numbers["methods"]["ours"]["mean"]["accuracy"]["value"] == pytest.approx(
        page.statistics.methods["ours"].mean["accuracy"].value
    )
    assert numbers["study"]["n_train"] == {"task0": 90, "task1": 91, "task2": 92, "written": 93}
    assert numbers["primary"][0]["p_holm"] is not None and numbers["primary"][0]["degrees"] > 1
    assert "Over these trainings" in markdown and "over test rows and trainings" in markdown
    assert "(+100\xa0MB)" in markdown.split("## What it cost")[1], "memory above what was resident"
    again = write_page(folder).path.read_bytes()
    assert again == html.encode(), "the same records give the same bytes"


def test_a_page_needs_a_result(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no comparison \(study.json is missing\)"):
        write_page(tmp_path)
    folder = make_study(tmp_path / "study", failures={"ours": "seed 0: no"})
    for path in (folder / "records").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match=r"no method has a result \(ours: seed 0: no\)"):
        write_page(folder)


def test_the_command_shows_what_was_found_and_goes_on_from_its_folder(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(done, tmp_path / "compared")
    flags = ["--methods", "base,shared", "--seeds", "2", "--learning-rates", "0.001,0.01", "--quiet"]
    assert main(["compare", str(folder), *flags]) == 0
    shown = capsys.readouterr().out
    assert "shared" in shown and str(folder / "compare.html") in shown.replace("\n", "")
    assert main(["compare", str(folder / "config.yaml"), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["methods"]) == {"base", "shared"} and found["study"]["seeds"] == [0, 1]
    told = "the folder has shared from earlier, too; all are shown and corrected for"
    for names, is_told in (("base", True), ("base,shared", False)):
        assert main(["compare", str(folder), "--methods", names, *flags[2:-1]]) == 0
        assert (told in capsys.readouterr().err) == is_told
    assert not place_record(tmp_path, "base", 0).exists()


def test_a_dry_run_counts_fine_tunings_and_writes_nothing(
    recipe: Path, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], done: Path
) -> None:
    found = forecast_study(config, ["base", "shared", "single"], 3, RATES, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    times = 2 + 3 - 1
    assert found["base"] == {"fine_tunings": 0, "flops": 0, "seconds": 0}
    assert found["shared"]["fine_tunings"] == times and found["single"]["fine_tunings"] == 3 * times
    first = read_study(done).of("shared")[0]
    assert found["shared"]["flops"] == pytest.approx(times * first.costs["train_flops"], rel=1e-6)
    assert found["total"]["fine_tunings"] == 4 * times
    assert found["total"]["flops"] == found["shared"]["flops"] + found["single"]["flops"]
    shared_twice = forecast_study(config, ["shared", "mtl-ft", "grouped"], 1, [], tmp_path / "c")
    assert shared_twice["total"]["fine_tunings"] == 1 + 3 + 2, "one adapter for all is trained once for both"
    plan = shared_twice["grouped"]["flops"] - shared_twice["shared"]["flops"]
    assert (
        plan > 0
        and shared_twice["total"]["flops"] == shared_twice["mtl-ft"]["flops"] + shared_twice["grouped"]["flops"]
    )
    tasks = json.dumps(list(config.data.tasks))
    assert main(["compare", str(recipe), "--dry-run", "--methods", "shared", "--set", f"data.tasks={tasks}", "-q"]) == 0
    assert "fine-tunings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("work", "expected"),
    [((), (0, 0)), (("one",), (1, 1)), (("one", "continued"), (11, 2)), (("groups",), (3, 1)), (("copies",), (3, 3))],
)
def test_work_is_counted_in_fine_tunings_and_in_trainings_of_all_rows(
    work: Sequence[known.Work], expected: tuple[int, int]
) -> None:
    assert count_fine_tunings(work, n_tasks=10, n_groups=3) == expected


def test_every_method_says_what_it_is_for_the_tables() -> None:
    assert all(name == method.name and method.title for name, method in METHODS.items())
    assert len({method.title for method in METHODS.values()}) == len(METHODS)
    for name in METHODS:
        assert name == name.lower() and not set(name) & set(" ,:/"), (
            "a file name, and a part of --methods and --primary"
        )


def test_costs_need_no_model_to_be_charged(config: RunConfig, tmp_path: Path) -> None:
    def train_nothing(pool: Pool) -> Iterator[Candidate]:
        return replace(score_base(pool), costs=Costs(train_flops=7, seconds=1.0))

    method = Method("paid", "paid", train_nothing, is_whole=True)
    METHODS["paid"] = method
    try:
        top = config.model_copy(update={"adapter": config.adapter.model_copy(update={"layers_to_transform": (1,)})})
        study = compare(top, ["paid"], 1, [], tmp_path / "c").record
    finally:
        del METHODS["paid"]
    assert study.head.lower["flops"] > 0 and study.of("paid")[0].costs["train_flops"] == 7, (
        "it runs those layers itself"
    )
