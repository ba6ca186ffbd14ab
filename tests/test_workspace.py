"""The rule by which stages are done again or not, and how their costs are kept."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from ensemblelora import artifacts, attempts, progress, workspace
from ensemblelora.accounting.meter import MethodCosts, StageRecord
from ensemblelora.artifacts import RunFolder, write_json
from ensemblelora.config import RunConfig
from ensemblelora.data.identity import fingerprint_split
from ensemblelora.errors import OutputError
from ensemblelora.workspace import Workspace, check_place, open_workspace
from tests.tiny import make_split


@contextmanager
def opened(folder: Path, until: str = "report") -> Iterator[Workspace]:
    config = RunConfig(out=str(folder), data={"tasks": ["a"]})
    with open_workspace(config, until=until, start_fingerprint="start") as work:
        yield work


def do(work: Workspace, name: str, *inputs: object, file: str | None = None, flops: int = 10, **options) -> bool:
    """Carry a stage out if it is needed, and say whether it was."""
    with work.stage(name, *inputs, **options) as stage:
        if stage.is_needed:
            stage.meter.add_flops(flops)
            if file is not None:
                write_json(work.path / file, "an outcome")
                stage.files.append(work.path / file)
    return stage.is_needed


def flops_of(work: Workspace) -> dict[str, int]:
    costs = json.loads((work.path / "costs.json").read_text(encoding="utf-8"))
    return {record["stage"]: record["flops"] for record in costs["stages"]}


def test_a_stage_is_done_once_for_the_same_inputs(tmp_path):
    with opened(tmp_path / "run") as work:
        assert do(work, "group", 1, file="plan.json")
        assert not do(work, "group", 1, file="plan.json")
        assert do(work, "group", 2, file="plan.json"), "other inputs"
        (work.path / "plan.json").write_text("damaged", encoding="utf-8")
        assert do(work, "group", 2, file="plan.json"), "a damaged file"
        assert do(work, "group", 2, file="plan.json", is_complete=False), "something unwatched is missing"
    with opened(tmp_path / "run") as work:
        assert not do(work, "group", 2, file="plan.json"), "in another process too"


def test_another_version_does_every_stage_again(tmp_path, monkeypatch):
    with opened(tmp_path / "run") as work:
        assert do(work, "train", 1) and not do(work, "train", 1)
        monkeypatch.setattr(workspace, "__version__", "99.0")
        assert do(work, "train", 1)


def test_outcomes_of_later_stages_go_before_an_earlier_one_is_made_anew(tmp_path):
    with opened(tmp_path / "run") as work:
        for name, file in (("affinity", "affinity.npz"), ("group", "plan.json"), ("evaluate", "results.json")):
            do(work, name, 1, file=file)
        with pytest.raises(ZeroDivisionError), work.stage("group", 2):
            assert (work.path / "affinity.npz").exists()
            assert not (work.path / "plan.json").exists() and not (work.path / "results.json").exists()
            raise ZeroDivisionError
        assert not do(work, "affinity", 1)
        assert do(work, "group", 1, file="plan.json")
        assert do(work, "evaluate", 1, file="results.json"), "its outcome belonged to another plan"


def test_the_last_stage_asked_for_ends_the_work_quietly(tmp_path):
    reached = []
    with opened(tmp_path / "run", until="affinity") as work:
        do(work, "features", 1)
        reached.append("features")
        do(work, "affinity", 1)
        reached.append("affinity")
    assert reached == ["features"]


def test_a_failed_stage_is_not_done_and_goes_on_counting(tmp_path):
    with opened(tmp_path / "run") as work:
        for attempt in (1, 2):
            with pytest.raises(ZeroDivisionError), work.stage("train", 1) as stage:
                stage.meter.add_flops(100)
                stage.meter.add_tokens(3, 4)
                raise ZeroDivisionError
            assert flops_of(work) == {"train": 100 * attempt}
    with opened(tmp_path / "run") as work:
        assert do(work, "train", 1, flops=7)
        assert flops_of(work) == {"train": 207}
        assert work.flops_of("train", "boost") == 207 and work.seconds_of("train") > 0
        assert do(work, "train", 2, flops=5), "other inputs start at nothing"
        assert flops_of(work) == {"train": 5}


def test_what_a_killed_process_spent_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "_SAVING_SECONDS", 0.005)
    note = tmp_path / "run" / "stages" / "train.begun.json"
    with opened(tmp_path / "run") as work:
        do(work, "features", 1, flops=1)
        before = (work.path / "costs.json").read_text(encoding="utf-8")
        with pytest.raises(ZeroDivisionError), work.stage("train", 1) as stage:
            stage.meter.add_flops(100)
            deadline = time.monotonic() + 20
            while '"flops": 100' not in (killed := note.read_text(encoding="utf-8")) and time.monotonic() < deadline:
                time.sleep(0.005)
            raise ZeroDivisionError
    # As a kill leaves it: nothing was written after the last saving.
    (tmp_path / "run" / "costs.json").write_text(before, encoding="utf-8")
    note.write_text(killed, encoding="utf-8")
    with opened(tmp_path / "run") as work:
        assert do(work, "train", 1, flops=11)
        assert flops_of(work) == {"features": 1, "train": 111}
        assert work.seconds_of("train") > 0.005
    assert not note.exists()


def make(work: Workspace, parts: dict[str, int], missing: str, *, fails: bool = False) -> None:
    """Carry out a stage that consists of parts, of which some are there already."""
    with suppress(ZeroDivisionError), work.stage("train", sorted(parts), is_complete=False, parts=parts) as stage:
        for name in missing:
            with stage.meter.part({name: 1}):
                stage.meter.add_flops(parts[name])
        stage.meter.add_flops(1)
        if fails:
            raise ZeroDivisionError


def test_each_part_of_a_stage_counts_once_at_what_it_cost_when_it_was_made(tmp_path):
    folder = tmp_path / "run"
    with opened(folder) as work:
        make(work, {"a": 10, "b": 20}, "ab")
        assert flops_of(work) == {"train": 31}
        make(work, {"a": 10, "c": 40}, "c")
        assert flops_of(work) == {"train": 51}, "b is no part of it any more"
        make(work, {"a": 10, "d": 80}, "d", fails=True)
    with opened(folder) as work:
        make(work, {"a": 10, "d": 80}, "")
        assert flops_of(work) == {"train": 92}, "what was made before it was broken off is not made again"
        make(work, {"a": 10, "e": 160}, "e", fails=True)
        make(work, {"e": 160, "f": 320}, "f")
        assert flops_of(work) == {"train": 481}, "made for other inputs, by an attempt that was broken off"
        make(work, {"b": 20, "e": 160}, "")
        assert flops_of(work) == {"train": 181}, "b was there all the time"
        make(work, {"b": 25, "e": 160}, "b")
        assert flops_of(work) == {"train": 186}


def test_parts_made_side_by_side_take_no_longer_than_their_stage(tmp_path):
    elsewhere = {name: StageRecord("job", 100.0, 5) for name in "ab"}
    with opened(tmp_path / "run") as work:
        with work.stage("train", 1, parts="ab") as stage:
            for name, spent in elsewhere.items():
                stage.meter.add_record(replace(spent, parts={name: spent}))
        (record,) = work.ledger.stages
    assert record.flops == 10 and record.wall_seconds < 50
    assert record.parts["a"].wall_seconds == pytest.approx(record.wall_seconds / 2)


def test_costs_of_a_stage_that_the_plan_does_without_are_dropped(tmp_path):
    with opened(tmp_path / "run") as work:
        do(work, "train", 1)
        do(work, "baselines", 1)
        work.drop_costs("baselines")
        work.drop_costs("baselines")
        assert flops_of(work) == {"train": 10}


def test_costs_of_later_stages_count_once_these_are_done_for_the_present_inputs(tmp_path):
    everything = {"group": 1, "train": 2, "boost": 3, "evaluate": 4}
    with opened(tmp_path / "run") as work:
        for name, flops in everything.items():
            do(work, name, 1, flops=flops)
        work.enter_methods({"shared": MethodCosts(train_flops=9)})
    with opened(tmp_path / "run", until="group") as work, pytest.raises(ZeroDivisionError), work.stage("group", 2):
        assert flops_of(work) == {}, "a kill leaves nothing of the old plan"
        raise ZeroDivisionError
    with opened(tmp_path / "run", until="group") as work:
        do(work, "group", 2, flops=5)
    assert flops_of(work) == {"group": 5}
    with opened(tmp_path / "run") as work:
        assert work.ledger.methods == {} and work.flops_of(*everything) == 5
        assert not do(work, "group", 2) and not do(work, "train", 1)
        assert flops_of(work) == {"group": 5, "train": 2}, "what is used again has its cost"
        assert do(work, "boost", 2, flops=7)
        assert flops_of(work) == {"group": 5, "train": 2, "boost": 7}
    assert "evaluate" in [record.stage for record in work.ledger.unconfirmed]


def test_a_cost_that_the_plan_did_without_counts_again_with_what_is_used_again(tmp_path):
    with opened(tmp_path / "run") as work:
        do(work, "warmup", 1)
        do(work, "features", 1)
        work.drop_costs("warmup")
        assert flops_of(work) == {"features": 10}
        assert not do(work, "warmup", 1)
        assert sorted(flops_of(work)) == ["features", "warmup"]


def test_stages_are_announced(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(progress, "note", said.append)
    with opened(tmp_path / "run") as work:
        do(work, "train", 1)
        do(work, "train", 1)
    assert said == ["train: done before"]


def test_the_folder_keeps_the_config_and_is_locked(tmp_path):
    with opened(tmp_path / "run") as work:
        assert "tasks:" in (work.path / artifacts.CONFIG_FILE).read_text(encoding="utf-8")
        with pytest.raises(OutputError, match=f"in use by process {os.getpid()}"), opened(tmp_path / "run"):
            pass
        with pytest.raises(OutputError, match="in use by process"):
            check_place(tmp_path / "run")


def test_a_place_is_checked_without_being_made(tmp_path):
    check_place(tmp_path / "deep" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    check_place(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
    RunFolder.create(tmp_path / "run")
    check_place(tmp_path / "run")


@pytest.mark.parametrize("place", ["file", "file/run", "full"])
def test_a_place_that_can_not_be_a_run_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("text", encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("text", encoding="utf-8")
    with pytest.raises(OutputError, match="choose a"):
        check_place(tmp_path / place)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "thesis.tex"]


@pytest.mark.parametrize("field", ["tokens", "labels", "answer_starts", "groups", "divisors", "ids", "task"])
def test_every_part_of_a_split_is_in_its_fingerprint(field):
    split, other = make_split("options", seed=0), make_split("options", seed=0)
    assert fingerprint_split(split) == fingerprint_split(other)
    value = getattr(other, field)
    changed = value[::-1] if field in ("ids", "task") else value + 1
    object.__setattr__(other, field, "u" if field == "task" else changed)
    assert fingerprint_split(split) != fingerprint_split(other)
