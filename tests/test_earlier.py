"""A finished run is set aside before it is done again with other inputs: once, whole, and usable."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ensemblelora import artifacts, earlier, pipeline
from ensemblelora.accounting.meter import Ledger
from ensemblelora.api import load_run
from ensemblelora.cli import main
from ensemblelora.config import RunConfig
from ensemblelora.contrast.measure import contrast_runs
from ensemblelora.earlier import (
    describe_missing,
    find_origin,
    foresee_place,
    hash_files,
    list_changed_files,
    list_changes,
    set_aside,
)
from ensemblelora.errors import UsageError
from ensemblelora.report.reading import load_record
from ensemblelora.summary import summarize
from ensemblelora.workspace import Workspace, open_workspace
from tests.tiny_run import TASKS, copy_run, edit_rows, finished_run, flip, read_config, read_json

OUTCOMES = {"group": "plan.json", "combine": "ensemble.json", "evaluate": "results.json", "report": "report.html"}


@contextmanager
def opened(folder: Path, **changes: Any) -> Iterator[Workspace]:
    config = RunConfig(out=str(folder), data={"tasks": ["a"]}, **changes)
    with open_workspace(config, until="", start_fingerprint="start") as work:
        yield work


def do_all(folder: Path, inputs: dict[str, int] | None = None, stop: str = "", **changes: Any) -> None:
    """Carry the stages out, or fail in one of them; a stage's inputs are its number."""
    with opened(folder, **changes) as work:
        for name, file in OUTCOMES.items():
            with work.stage(name, (inputs or {}).get(name, 0)) as stage:
                if name == stop:
                    raise ZeroDivisionError
                if stage.is_needed:
                    artifacts.write_json(work.path / file, {"made with": stage.fingerprint})
                    stage.files.append(work.path / file)


def list_kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "earlier").glob("*"))


def contents_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and "earlier" not in path.relative_to(folder).parts]
    kept = [path for path in files if not path.name.startswith(".lock") and path.name != "earlier.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}


def test_a_finished_run_is_kept_before_other_inputs_take_its_place(tmp_path, caplog):
    run = tmp_path / "run"
    do_all(run)
    before = contents_of(run)
    do_all(run)
    assert list_kept(run) == [] and not caplog.records, "nothing changed"
    do_all(run, {"group": 1}, seed=7)
    assert list_kept(run) == ["1"] and contents_of(run / "earlier" / "1") == before
    (told,) = [record.getMessage() for record in caplog.records]
    assert "seed 0 -> 7" in told and f"predict {run / 'earlier' / '1'}" in told and "--out" in told
    assert json.loads((run / "plan.json").read_text()) != json.loads(before["plan.json"])
    do_all(run, {"group": 2}, seed=8)
    assert list_kept(run) == ["1", "2"] and contents_of(run / "earlier" / "1") == before


def test_a_change_that_no_stage_asked_for_reads_is_told(tmp_path, caplog):
    run = tmp_path / "run"
    do_all(run)
    before = contents_of(run)
    do_all(run, seed=7)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "seed 0 -> 7" in told and "the finished run, as it was" in told
    assert list_kept(run) == [] and contents_of(run) == before
    do_all(run)
    assert len(caplog.records) == 1, "the request is that of the run again"


def test_only_what_would_be_lost_is_a_reason(tmp_path):
    run = tmp_path / "run"
    do_all(run, {"report": 0})
    do_all(run, {"report": 1})
    assert list_kept(run) == [], "a report is written again from the same"
    (run / "results.json").write_text("damaged", encoding="utf-8")
    do_all(run)
    assert list_kept(run) == [], "what is mended is the same run"
    do_all(run, {"evaluate": 1})
    assert list_kept(run) == ["1"], "test scores are worth keeping, too"
    unfinished = tmp_path / "unfinished"
    with pytest.raises(ZeroDivisionError):
        do_all(unfinished, stop="combine")
    do_all(unfinished, {"group": 1})
    assert list_kept(unfinished) == []


@pytest.mark.parametrize("moment", ["linking", "naming", "settling", "clearing", "stage"])
def test_a_run_broken_off_at_any_moment_is_kept_once_and_whole(moment, tmp_path, monkeypatch):
    run = tmp_path / "run"
    do_all(run)
    before = contents_of(run)

    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    places = {
        "linking": (earlier.os, "link"),
        "naming": (earlier.artifacts, "write_json"),
        "settling": (Workspace, "settle"),
        "clearing": (Workspace, "_clear_outcomes"),
    }
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        if moment in places:
            patched.setattr(*places[moment], fail)
        do_all(run, {"group": 1}, stop="group", seed=7)
    if moment != "stage":
        assert {name: before[name] for name in OUTCOMES.values()}.items() <= contents_of(run).items()
    do_all(run, {"group": 1}, seed=7)
    assert list_kept(run) == ["1"] and contents_of(run / "earlier" / "1") == before
    do_all(run, {"group": 1}, seed=7)
    assert list_kept(run) == ["1"]


def test_settings_of_a_finished_run_stay_until_something_is_done_with_others(tmp_path):
    run = tmp_path / "run"
    do_all(run)
    before = (run / "config.yaml").read_text()
    with opened(run, seed=7) as work, work.stage("group", 0):
        pass
    assert (run / "config.yaml").read_text() == before
    do_all(run, {"evaluate": 1}, seed=7)
    assert "seed: 7" in (run / "config.yaml").read_text() and "seed: 0" in (run / "earlier/1/config.yaml").read_text()


def test_a_config_that_was_edited_is_not_what_the_run_was_made_with(tmp_path, caplog):
    run = tmp_path / "run"
    do_all(run)
    made_with = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(made_with.replace("seed: 0", "seed: 7"), encoding="utf-8")
    do_all(run, {"group": 1}, seed=7)
    assert "seed 0 -> 7" in caplog.text and (run / "earlier/1/config.yaml").read_text() == made_with


def test_files_are_linked_and_journals_and_what_has_no_links_copied(tmp_path, monkeypatch):
    run = tmp_path / "run"
    do_all(run)
    for name in (
        "truth.jsonl",
        "cache/rows.npy",
        "checkpoints/group-0/x",
        "export/peft/x",
        "adapters/group-0/w",
        "a.lock",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x", encoding="utf-8")
    kept = set_aside(run)
    assert (kept / "plan.json").samefile(run / "plan.json"), "no disk twice"
    assert (kept / "adapters/group-0/w").samefile(run / "adapters/group-0/w")
    assert (kept / "truth.jsonl").exists() and not (kept / "truth.jsonl").samefile(run / "truth.jsonl")
    assert not [name for name in ("cache", "checkpoints", "export", "earlier", ".lock") if (kept / name).exists()]
    assert set_aside(run) == kept, "the same state once"
    (run / "stages" / "group.json").unlink()
    monkeypatch.setattr(earlier.os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "no links here")))
    other = set_aside(run)
    assert other.name == "2" and not (other / "plan.json").samefile(run / "plan.json")
    assert (other / "plan.json").read_bytes() == (run / "plan.json").read_bytes()


def test_what_is_missing_is_made_from_here_or_taken_from_the_run_that_was_kept(tmp_path, monkeypatch):
    run = tmp_path / "my run"
    do_all(run)
    assert foresee_place(run) == run / "earlier" / "1" == set_aside(run) == foresee_place(run)
    (run / "ensemble.json").unlink()
    told = describe_missing(run, "ensemble.json")
    assert f"make it with: ensemblelora run '{run}' (it goes on from here)" in told
    assert told.endswith(f"give '{run / 'earlier' / '1'}'")
    (run / "stages" / "group.json").unlink()
    assert foresee_place(run) == run / "earlier" / "2"
    set_aside(run)
    assert describe_missing(run, "ensemble.json") == told, "the last one that has it"
    assert "set aside" not in describe_missing(run, "other.json")
    monkeypatch.chdir(run)
    assert find_origin(Path("earlier/1")) == Path() and find_origin(run / "earlier" / "1") == run
    assert find_origin(run) == run and find_origin(Path()) == Path()


def test_a_report_of_a_kept_run_names_the_run_that_it_was_kept_from(tmp_path, capsys):
    run = copy_run(tmp_path).parent / "run"
    kept = set_aside(run)
    edit_rows(tmp_path / "tasks" / f"{TASKS[0]}.train.jsonl", lambda n, row: row | {"label": flip(row["label"])})
    tasks = artifacts.read_json(kept / "tasks.json")
    for entry in tasks["tasks"]:
        entry["files"] = {str(tmp_path / "tasks" / Path(file).name): digest for file, digest in entry["files"].items()}
    artifacts.write_json(kept / "tasks.json", tasks)
    assert main(["report", str(kept)]) == 0
    told = capsys.readouterr().err
    assert f"ensemblelora run {run} makes a new one" in told and "earlier" not in told.partition("ensemblelora run")[2]


def test_a_dry_run_foresees_what_would_be_set_aside_and_only_the_stages_it_is_asked_for(tmp_path):
    recipe = copy_run(tmp_path)
    run = tmp_path / "run"
    same = pipeline.foresee(read_config(recipe), until="group")
    assert (same.set_aside, same.changes, same.is_finished) == (None, (), True)
    assert list(same.stages) == ["features", "total"] and same.later_seconds > 0
    assert same.stages["total"] == same.stages["features"]
    other = pipeline.foresee(read_config(recipe, training={"num_train_epochs": 1}))
    assert other.set_aside == run / "earlier" / "1" and other.later_seconds == 0 and not other.is_finished
    assert other.changes == ("training.num_train_epochs 2 -> 1",)
    assert {"train", "baselines", "evaluate"} < other.stages.keys()
    assert not (run / "earlier").exists(), "nothing is written"


def test_changes_are_named(tmp_path):
    run = finished_run() / "run"
    read = {name: artifacts.read_json(run / name) for name in ("environment.json", "tasks.json")}
    text = (run / "config.yaml").read_text(encoding="utf-8")
    assert list_changes(run, {"config.yaml": text, **read}) == []
    entries = read["tasks.json"]["tasks"]
    moved = text.replace("seed: 0", "seed: 3").replace("num_train_epochs: 2", "num_train_epochs: 5")
    other = [entry | {"files": dict.fromkeys(entry["files"], "another")} for entry in entries[:1]] + entries[1:4]
    other.append(entries[3] | {"card": entries[3]["card"] | {"task": "arrived"}})
    model = read["environment.json"] | {"package_version": "99.0"}
    told = list_changes(run, {"config.yaml": moved, "environment.json": model, "tasks.json": {"tasks": other}})
    assert told[0] == "seed 0 -> 3 and training.num_train_epochs 2 -> 5" and told[1].endswith("-> 99.0")
    assert told[2:] == ["new task arrived", f"no task {TASKS[4]}", f"rows of {TASKS[0]}"]
    counted = [entries[0] | {"n_examples": {"train": 1}}, *entries[1:]]
    assert list_changes(run, {"config.yaml": text, "tasks.json": {"tasks": counted}}) == [f"rows of {TASKS[0]}"]
    card = [entries[0] | {"card": entries[0]["card"] | {"doc_to_text": "{{text}}"}}, *entries[1:]]
    assert list_changes(run, {"config.yaml": text, "tasks.json": {"tasks": card}}) == [f"card of {TASKS[0]}"]
    (tmp_path / "stages").mkdir()
    assert list_changes(tmp_path, {"config.yaml": text}) == [], "nothing is known of what it was made with"


def test_data_files_are_known_by_content(tmp_path, monkeypatch):
    file = tmp_path / "a.csv"
    file.write_text("text,label\n", encoding="utf-8")
    monkeypatch.setenv("PLACE", str(tmp_path))
    named = {"train": "${PLACE}/a.csv", "test": "https://host/b.csv", "validation": str(tmp_path / "gone.csv")}
    card = {"dataset_kwargs": {"data_files": named}}
    assert list(hash_files(card)) == ["${PLACE}/a.csv"]
    assert hash_files({"dataset_kwargs": {}}) == {}
    artifacts.write_json(tmp_path / "tasks.json", {"tasks": [{"files": hash_files(card)}, {}]})
    assert list_changed_files(tmp_path) == []
    file.write_text("text,label\nx,y\n", encoding="utf-8")
    assert list_changed_files(tmp_path) == ["a.csv"]
    monkeypatch.setattr(earlier, "_MOST_BYTES", 1)
    assert hash_files(card) == {}


def test_a_report_is_written_again_and_nothing_is_trained(tmp_path, capsys, monkeypatch):
    run = copy_run(tmp_path).parent / "run"
    tasks = read_json(tmp_path, "tasks.json")
    for entry in tasks["tasks"]:
        entry["files"] = {str(tmp_path / "tasks" / Path(file).name): digest for file, digest in entry["files"].items()}
    artifacts.write_json(run / "tasks.json", tasks)
    (run / "report.html").unlink()
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: pytest.fail("a report runs the pipeline"))
    assert main(["report", str(run)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{run / 'report.html'}\n" and (run / "report.html").exists() and "changed" not in shown.err
    edit_rows(tmp_path / "tasks" / f"{TASKS[0]}.train.jsonl", lambda n, row: row | {"label": flip(row["label"])})
    before = contents_of(run)
    assert main(["report", str(run / "config.yaml"), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"report": str(run / "report.html")}
    assert f"{TASKS[0]}.train.jsonl changed since this run" in shown.err and f"ensemblelora run {run}" in shown.err
    assert contents_of(run) == before


def test_what_no_report_can_be_of_is_refused_in_a_line(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("text,label\n", encoding="utf-8")
    artifacts.write_json(tmp_path / "begun" / "run.json", {"package": "ensemblelora", "format": 1})
    (tmp_path / "recipe.yaml").write_text("data: {tasks: [a]}", encoding="utf-8")
    for place, told in (
        (tmp_path, "report trains nothing: make a run first"),
        (tmp_path / "recipe.yaml", "no run folder"),
        (tmp_path / "begun", "not planned yet, so that there is nothing to report; go on with: ensemblelora run"),
    ):
        assert main(["report", str(place)]) == 2
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1
    assert main(["report", str(finished_run() / "run"), "--out", "x"]) == 2
    assert "--out is for two runs" in capsys.readouterr().err


@pytest.mark.slow
def test_the_run_that_was_kept_predicts_and_is_compared_as_any(tmp_path, caplog, capsys):
    recipe = copy_run(tmp_path)
    pipeline.run(read_config(recipe))  # its folder has moved
    assert list_kept(tmp_path / "run") == []
    asked = ["one two", "three"]
    before = load_run(tmp_path / "run").predict(TASKS[0], asked)
    adapters = {path.name: path.read_bytes() for path in (tmp_path / "run/adapters/group-0").iterdir()}
    record = tmp_path / "run" / "environment.json"
    artifacts.write_json(record, {**artifacts.read_json(record), "created": "long ago"})
    edit_rows(tmp_path / "tasks" / f"{TASKS[0]}.train.jsonl", lambda n, row: row | {"label": flip(row["label"])})
    with caplog.at_level(logging.WARNING, "ensemblelora"):
        assert main(["plan", str(recipe), "--set", "training.num_train_epochs=1", "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "ensemble.json").exists()
    (told,) = [record.getMessage() for record in caplog.records if "was finished" in record.getMessage()]
    assert "training.num_train_epochs 2 -> 1" in told and f"rows of {TASKS[0]}" in told
    kept = tmp_path / "run" / "earlier" / "1"
    dates = [json.loads((folder / "environment.json").read_text())["created"] for folder in (kept, tmp_path / "run")]
    assert dates[0] == "long ago" and dates[1].startswith("20")
    pipeline.run(read_config(recipe, training={"num_train_epochs": 1}))
    assert list_kept(tmp_path / "run") == ["1"]
    assert load_run(kept).predict(TASKS[0], asked) == before
    assert load_run(kept).ask([TASKS[0]])[TASKS[0]]["is_in_subset"], "its features are there, too"
    assert {path.name: path.read_bytes() for path in (kept / "adapters/group-0").iterdir()} == adapters
    found = contrast_runs(kept, tmp_path / "run")[2]
    assert [(one.a, one.b) for one in found.settings if one.name == "training.num_train_epochs"] == [("2", "1")]
    assert main(["export", str(kept), "--format", "peft", "--out", str(tmp_path / "out")]) == 0
    shutil.rmtree(tmp_path / "run" / "earlier")
    assert load_run(tmp_path / "run").predict(TASKS[0], asked)
    capsys.readouterr()


@pytest.mark.slow
def test_a_plan_in_place_of_a_finished_run_reports_nothing_of_that_run(tmp_path, capsys):
    recipe = copy_run(tmp_path)
    pipeline.run(read_config(recipe))
    run, place = tmp_path / "run", ["--out", str(tmp_path / "run")]
    edit_rows(tmp_path / "tasks" / f"{TASKS[0]}.train.jsonl", lambda n, row: row | {"label": flip(row["label"])})
    capsys.readouterr()
    assert main(["plan", str(recipe), *place, "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)["costs"]
    assert [record["stage"] for record in costs["stages"]] == ["features", "affinity", "group"]
    assert costs.keys() == {"stages", "methods"} and costs["methods"] == {}
    shown = Console(width=200)
    with shown.capture() as captured:
        shown.print(*summarize(run))
    assert main(["report", str(run)]) == 0
    record, page = load_record(run), (run / "report.md").read_text(encoding="utf-8")
    assert record.ensemble is record.results is None
    assert [one.stage for one in record.costs.stages][:3] == ["features", "affinity", "group"]
    costs_table = page.partition("What it cost")[2]
    for told in (captured.get(), costs_table):
        assert "group" in told
        assert not [name for name in ("train", "boost", "combine", "baselines", "evaluate") if f"{name} " in told]
    with pytest.raises(UsageError, match="no trained ensemble"):
        load_run(run).predict(TASKS[0], ["one two"])
    for command in (["export", str(run), "--format", "peft"], ["serve", str(run)]):
        assert main(command) == 2
        assert "no trained ensemble" in capsys.readouterr().err
    pipeline.run(read_config(recipe))
    before = _costs_of(run)
    assert {one.stage for one in before.stages} == {one.stage for one in _costs_of(run / "earlier" / "1").stages}
    other = read_config(recipe, grouping={"n_random_partitions": 3})
    pipeline.run(other, until="group")
    assert [one.stage for one in _costs_of(run).unconfirmed][:2] == ["train", "boost"]
    pipeline.run(other)
    ended = _costs_of(run)
    used = [[one for one in costs.stages if one.stage in ("train", "boost", "baselines")] for costs in (before, ended)]
    assert used[0] == used[1] and len(used[0]) == 3, "the trainings that are used again"
    assert not ended.unconfirmed and len(ended.stages) == len(before.stages)
    assert ended.methods["ensemble"].train_flops == before.methods["ensemble"].train_flops


def _costs_of(folder: Path) -> Ledger:
    return Ledger.from_dict(artifacts.read_json(folder / "costs.json"))
