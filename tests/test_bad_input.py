"""Wrong requests by the command line: one line that says what to do, exit code 2, and no run folder begun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaForCausalLM

from ensemblelora.artifacts import RunFolder
from ensemblelora.cli import main
from ensemblelora.data.loading import load_tasks
from ensemblelora.stages import check_request
from tests import test_bad_corpus as corpus
from tests.tiny_run import finished_run, make_inputs, read_config

ROOT = Path(__file__).resolve().parent.parent
FIRST = "family0_task0"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture
def project(inputs, tmp_path, monkeypatch) -> Path:
    """A folder with a recipe, tasks of its own, and the shared model; the working folder too."""
    for path in (inputs / "tasks").iterdir():
        target = tmp_path / "tasks" / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    recipe = yaml.safe_load((inputs / "recipe.yaml").read_text(encoding="utf-8"))
    recipe |= {"out": str(tmp_path / "run"), "data": {"tasks": [str(tmp_path / "tasks")]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(capsys, *arguments: str) -> str:
    """Run a command that must be refused, and return its one line."""
    code = main(list(arguments))
    shown = capsys.readouterr()
    talk = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert (code, shown.out) == (2, ""), shown.err
    assert "Traceback" not in shown.err and len(talk) == 1, shown.err
    assert shown.err.splitlines()[-1] == talk[0]
    return talk[0]


def change_card(project: Path, task: str = FIRST, **keys: Any) -> None:
    path = project / "tasks" / f"{task}.yaml"
    card = yaml.safe_load(path.read_text(encoding="utf-8")) | keys
    path.write_text(yaml.safe_dump({k: v for k, v in card.items() if v is not None}), encoding="utf-8")


def write_rows(project: Path, rows: list[dict[str, Any]], split: str = "train", task: str = FIRST) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (project / "tasks" / f"{task}.{split}.jsonl").write_text(text, encoding="utf-8")


def drop_file(project: Path) -> None:
    (project / "tasks" / f"{FIRST}.test.jsonl").unlink()


BAD_DATA: list[tuple[str, Callable[[Path], None], str]] = [
    ("missing file", drop_file, f"{FIRST}.test.jsonl: not found"),
    (
        "label outside the choices",
        lambda p: write_rows(p, [{"text": "a", "label": "no"}, {"text": "b", "label": "maybe"}]),
        "label 'maybe' is not one of ['no', 'yes']",
    ),
    ("empty split", lambda p: write_rows(p, [], "test"), f"{FIRST}.test.jsonl: empty"),
    ("one class", lambda p: write_rows(p, [{"text": w, "label": "no"} for w in "abcd"]), "only one class in 4"),
    (
        "colliding label tokens",
        lambda p: change_card(p, doc_to_choice=["no", "no way"], doc_to_target="{{ 0 if label == 'no' else 1 }}",
                              scoring="verbalizer"),
        "begin with the same token",
    ),
    ("unknown column", lambda p: change_card(p, doc_to_text="{{ txet }}"), "unknown column 'txet'"),
    ("unknown card key", lambda p: change_card(p, doc_to_txt="text"), "doc_to_txt: unknown key"),
    (
        "regression",
        lambda p: write_rows(p, [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}]),
        "regression is not supported",
    ),
    (
        "multi-label",
        lambda p: write_rows(p, [{"text": "a", "label": ["no", "yes"]}, {"text": "b", "label": ["no"]}]),
        "multi-label tasks are not supported",
    ),
    (
        "an answer too long to learn",
        lambda p: write_rows(p, [{"text": "a", "label": "so it is " * 400}], task="written"),
        "answers are never cut",
    ),
    (
        "mixed heads",
        lambda p: change_card(p, head="sequence_classification"),
        f"'{FIRST}' has head: sequence_classification",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), [case[1:] for case in BAD_DATA], ids=[case[0] for case in BAD_DATA])
def test_bad_data_is_refused(project, capsys, spoil, message):
    spoil(project)
    assert message in refuse(capsys, "run", "recipe.yaml")
    assert not (project / "run").exists()


def test_faults_of_several_tasks_are_told_together(project, capsys):
    change_card(project, FIRST, doc_to_text="{{ txet }}")
    drop_second = project / "tasks" / "family1_task0.train.jsonl"
    drop_second.unlink()
    line = refuse(capsys, "run", "recipe.yaml")
    assert "unknown column 'txet'" in line and "family1_task0.train.jsonl: not found" in line


def test_tasks_that_the_tokenizer_can_not_score_are_told_together(project, capsys):
    same = {"doc_to_choice": ["no", "no way"], "doc_to_target": "{{ 0 if label == 'no' else 1 }}"}
    for task in (FIRST, "family1_task0"):
        change_card(project, task, **same, scoring="verbalizer")
    line = refuse(capsys, "run", "recipe.yaml")
    assert f"task '{FIRST}': of the labels" in line and "task 'family1_task0': of the labels" in line


BAD_SETTINGS = [
    (["grouping.n_groups=6"], ["grouping.n_groups 6: expected 1 to 5, the number of tasks"]),
    (
        ["training.epochs=1", "seeds=3", "adapter.r=0"],
        ["training.epochs: unknown key", "seeds: unknown key", "adapter.r"],
    ),
    (["model.name=./nowhere"], ["model './nowhere'"]),
    (["model.name=nobody/nothing"], ["model 'nobody/nothing'"]),
    (["adapter.target_modules=[w_q]"], ["adapter.target_modules", "w_q"]),
    (["affinity.score=accuracy"], ["affinity.score accuracy", "written"]),
    (["affinity.subset_size=1"], ["affinity.subset_size 1"]),
    (["estimation.method=ridge", "estimation.l2_penalty=0"], ["estimation.l2_penalty 0.0"]),
    (["estimation.l2_penalty=3"], ["estimation.l2_penalty 3.0: method steps", "estimation.method: ridge"]),
    (["estimation.balance=task"], ["estimation.balance task: method steps"]),
    (["estimation.l2_grid=[]"], ["estimation.l2_grid []"]),
    (["ensemble.kl_penalty=-1"], ["ensemble.kl_penalty"]),
    (["gradients.output=margin"], ["gradients.output 'margin' does not fit task 'written'"]),
    (["gradients.proj_dim=20001"], ["gradients.proj_dim: got 20001", "less than or equal to 20000"]),
    (["gradients.proj_type=none", "boosting.direction=projected"], ["boosting.direction projected: with gradients"]),
    (["affinity.n_subsets=1"], ["affinity.n_subsets 1: 1 of 5 tasks would be in no subset"]),
    (
        ["training.report_to=[nothing, wandb]"],
        [
            "training.report_to 'nothing': nothing is not supported",
            "training.report_to 'wandb': WandbCallback requires",
        ],
    ),
    (["ensemble.weights=global", "ensemble.own_group_prior=1"], ["ensemble.own_group_prior 1"]),
    (["grouping.max_memory_bytes=10000"], ["grouping.n_groups 2 takes", "grouping.max_memory_bytes is 10000"]),
    (["data.tasks=[nowhere]"], ["task 'nowhere': neither a shipped card nor a file or folder"]),
    (["data.validation_fraction=0.9"], ["must stay below 1"]),
    (["novalue"], ["--set 'novalue': expected KEY=VALUE"]),
    (["seed.deep=1"], ["--set 'seed.deep=1'"]),
    (["training.learning_rate=[1"], ["--set 'training.learning_rate=[1': the value is not valid YAML"]),
    (["training.learning_rate=fast"], ["training.learning_rate: got 'fast'"]),
]


@pytest.mark.parametrize(("changes", "messages"), BAD_SETTINGS, ids=[" ".join(case[0]) for case in BAD_SETTINGS])
def test_bad_settings_are_refused(project, capsys, changes, messages):
    flags = [part for change in changes for part in ("--set", change)]
    line = refuse(capsys, "run", "recipe.yaml", *flags)
    assert all(message in line for message in messages), line
    assert not (project / "run").exists()


def test_rows_longer_than_the_model_are_refused(project, capsys):
    write_rows(project, [{"text": w * 300, "label": label} for w, label in (("a ", "no"), ("b ", "yes"))], "test")
    line = refuse(capsys, "run", "recipe.yaml", "--set", "data.max_length=1000")
    assert f"data.max_length 1000: a row of task '{FIRST}' has" in line and "the model takes 256" in line
    assert not (project / "run").exists()


def test_activations_that_a_model_can_not_recompute_are_refused(project, capsys, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    line = refuse(capsys, "run", "recipe.yaml", "--set", "training.gradient_checkpointing=true")
    assert "training.gradient_checkpointing: LlamaForCausalLM can't recompute activations" in line
    assert not (project / "run").exists()


@pytest.mark.parametrize("trackers", [[], ["all"], ["none"]])
def test_words_for_any_tracker_are_no_faults(project, trackers):
    config = read_config(project / "recipe.yaml", training={"report_to": trackers})
    check_request(config, load_tasks(config.data, seed=config.seed))


def test_an_encoder_can_not_score_label_words(project, capsys):
    encoder = project / "encoder"
    encoder.mkdir()
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    (encoder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    line = refuse(capsys, "run", "recipe.yaml", "--model", str(encoder))
    assert "bert is no decoder" in line and "head: sequence_classification" in line
    assert not (project / "run").exists()


@pytest.mark.parametrize(
    "arguments", [["nowhere.yaml"], ["tasks/family0_task0.train.jsonl"], ["recipe.yaml", "--seed", "x"]]
)
def test_a_recipe_that_is_none_is_refused(project, capsys, arguments):
    refuse(capsys, "run", *arguments)
    assert not (project / "run").exists()


def test_an_unknown_stage_is_no_command(project, capsys):
    assert "No such command 'finetune'" in refuse(capsys, "finetune", "recipe.yaml")


def test_places_that_can_not_be_a_run_folder_are_refused_before_any_model_is_loaded(project, capsys, monkeypatch):
    monkeypatch.setattr("ensemblelora.stages.request.load_base", lambda *a, **k: pytest.fail("the model was loaded"))
    (project / "file").write_text("text", encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
    assert "can't be used as the run folder" in refuse(capsys, "run", "recipe.yaml", "--out", "file/run")
    assert "not empty and not a run folder" in refuse(capsys, "run", "recipe.yaml", "--out", "tasks")
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*")} == before


def test_a_run_in_use_is_left_alone(project, capsys):
    folder = RunFolder.create(project / "run")
    with folder.lock():
        before = sorted(path.name for path in folder.path.iterdir())
        line = refuse(capsys, "run", "recipe.yaml")
        assert f"in use by process {os.getpid()}" in line
        assert sorted(path.name for path in folder.path.iterdir()) == before


@pytest.mark.parametrize(
    "changes", [["--model", "./nowhere"], ["--set", "grouping.n_groups=9"], ["--set", "data.tasks=[nowhere]"]]
)
def test_a_wrong_request_leaves_a_finished_run_as_it_was(capsys, changes):
    run = finished_run() / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock" and path.is_file()}
    refuse(capsys, "run", str(run), *changes)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_dry_run_refuses_alike_and_writes_nothing(project, capsys):
    assert "grouping.n_groups 9" in refuse(capsys, "run", "recipe.yaml", "--dry-run", "--set", "grouping.n_groups=9")
    assert main(["run", "recipe.yaml", "--dry-run", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["flops"] > 0
    assert not (project / "run").exists()


def test_a_run_without_an_ensemble_can_not_predict(project, capsys):
    RunFolder.create(project / "run")
    assert "nothing was done yet" in refuse(capsys, "predict", "run", "--task", FIRST, "--text", "x")
    assert "not a run folder" in refuse(capsys, "ask", "tasks", "--subset", FIRST)


def list_bad_requests(project: Path) -> Iterator[tuple[object, str]]:
    """The corpus of bad requests as files of a project, one after the other: what it is, and the recipe to run."""
    good = yaml.safe_load((project / "recipe.yaml").read_text(encoding="utf-8"))
    recipe, rows, card = project / "bad.yaml", project / "rows.jsonl", project / "card.yaml"
    rows.write_bytes(corpus.lines(corpus.LABELS_OF_ROWS))
    card.touch(), recipe.touch()

    def write(**changes: Any) -> str:
        recipe.write_text(yaml.safe_dump(good | changes), encoding="utf-8")
        return recipe.name

    for name, content in corpus.RECIPES.items():
        recipe.write_bytes(content)
        yield name, recipe.name
    for key, value in corpus.BAD_SETTINGS:
        section, _, inner = key.rpartition(".")
        yield (key, value), write(**({section: good.get(section, {}) | {inner: value}} if section else {inner: value}))
    for key, value in corpus.BAD_CARDS:
        entries = {**corpus.GOOD_CARD, "dataset_kwargs": {"data_files": {"train": rows.name}}, key: value}
        card.write_text(yaml.safe_dump(entries), encoding="utf-8")
        yield (key, value), write(data={"tasks": [str(card)]})
    for name, (file, content, _) in corpus.FAULTY.items():
        (project / file).write_bytes(content)
        yield name, write(data={"tasks": [str(project / file)]})
        (project / file).unlink()


@pytest.mark.slow
def test_no_bad_request_of_the_corpus_begins_a_run(project, capsys, monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    requests, there, n_refused = list_bad_requests(project), set(), 0
    for what, recipe in requests:
        there = {path.name for path in project.iterdir()}
        code = main(["run", recipe])
        shown = capsys.readouterr()
        talk = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert (code, shown.out, len(talk)) == (2, "", 1) and "Traceback" not in shown.err, (what, code, shown.err)
        assert {path.name for path in project.iterdir()} == there, f"{what}: something was begun"
        n_refused += 1
    assert n_refused >= 200


def test_the_program_itself_exits_with_2_and_one_line(project):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "ensemblelora", "run", "recipe.yaml", "--set", "training.epochs=1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=project)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --set training.epochs: unknown key") and done.stderr.count("\n") == 1
