"""Records of what took long: a bit of a number flipped, so that the JSON stays JSON, or the end cut off."""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ensemblelora import pipeline
from ensemblelora.accounting.meter import Ledger, Meter, MethodCosts, StageRecord
from ensemblelora.analysis.record import read_result
from ensemblelora.api import load_run
from ensemblelora.artifacts import RunFolder, pinned_commits, pinned_revision
from ensemblelora.attempts import Attempt
from ensemblelora.comparison.pool import Pool
from ensemblelora.comparison.record import read_head, read_study
from ensemblelora.comparison.study import compare
from ensemblelora.config import RunConfig, dump_config
from ensemblelora.errors import OutputError, StoreError
from ensemblelora.federation.arrival import assign_client
from ensemblelora.federation.collection import find_known, load_features
from ensemblelora.federation.exchange import StageTraffic, Traffic
from ensemblelora.federation.record import read_record
from ensemblelora.files import read_json, write_json, write_text
from ensemblelora.reproduction.tables import reproduce
from ensemblelora.selection.question import read_prospect
from ensemblelora.validation.records import TrueRun, append_run
from ensemblelora.workspace import OpenRun, open_run
from tests.faults import ROOT, cut, flip_bit, flip_number
from tests.federation_tiny import finished
from tests.study_records import make_study
from tests.tiny_run import copy_run, read_config

VALUES: dict[str, Any] = {"a": 12, "b": [0.5, -3.25, None], "c": {"d": "text \u00e4", "e": True}, "f": 10}


def halve(path: Path) -> None:
    cut(path, path.stat().st_size // 2)


# The law: what is read is what was written, or an error that names the file


def test_no_flipped_bit_of_a_json_file_changes_what_it_says(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, VALUES)
    whole, n_refused = path.read_bytes(), 0
    of_the_key = range(8 * whole.index(b"checksum"), 8 * whole.index(b" of the rest"), 3)
    bits = {*random.Random(0).sample(range(8 * len(whole)), 150), *of_the_key}
    for bit in bits:
        flip_bit(path, bit)
        try:
            assert read_json(path) == VALUES
        except StoreError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            n_refused += 1
        path.write_bytes(whole)
    assert n_refused > 0.8 * len(bits), "a space between values may become another"


def test_no_cut_end_of_a_json_file_is_read(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, VALUES)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, 3):  # the last byte ends the line
        path.write_bytes(whole[:size])
        with pytest.raises(StoreError, match=r"a\.json"):
            read_json(path)


def test_what_was_read_is_written_again_with_a_new_checksum_and_earlier_versions_had_none(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, VALUES)
    raw = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, raw | {"a": 13})
    assert read_json(path) == VALUES | {"a": 13}
    assert list(json.loads(path.read_text(encoding="utf-8")))[-1] == "checksum of the rest"
    path.write_text(json.dumps(VALUES), encoding="utf-8")
    assert read_json(path) == VALUES
    write_json(path, [1, {"a": 2}])
    assert json.loads(path.read_text(encoding="utf-8")) == read_json(path) == [1, {"a": 2}]


def test_every_json_file_of_the_product_is_read_and_written_where_checksums_are():
    """Exceptions: data, lines and requests from outside; a model's own settings; blocks of features, with checksums."""
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "src" / "ensemblelora").rglob("*.py")}
    readers = {path for path, text in sources.items() if re.search(r"\bjson\.loads?\b", text)}
    assert not any(re.search(r"\bjson\.dump\b", text) for text in sources.values())
    given = {"questions.py", "sizing.py", "report/plotting.py"} | {
        f"federation/{name}.py" for name in ("transport", "clients", "apps")
    }
    names = {path.relative_to(ROOT / "src" / "ensemblelora").as_posix() for path in readers}
    assert {name for name in names if not name.startswith("data/")} == {"files.py", "journal.py", "store.py"} | given


# Each kind of record


def note_of_costs(path: Path) -> None:
    Attempt(path, "work", Meter("train"))


def make_pool(folder: Path) -> Pool:
    config = RunConfig(data={"tasks": ["a"]})
    return Pool(config, folder, None, None, start_fingerprint="start")  # type: ignore[arg-type]  # not asked here


def remember_failure(folder: Path) -> None:
    with make_pool(folder)._remembering("pool-x"):
        raise AssertionError("it is not tried again")


def of_study(folder: Path) -> Path:
    return make_study(folder / "study")


def plain(name: str, content: Any = VALUES) -> Callable[[Path], Path]:
    """A file of plain values, and the folder it lies in."""

    def make(folder: Path) -> Path:
        write_json(folder / name, content)
        return folder

    return make


def in_a_run(name: str, content: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = RunFolder.create(folder / "run").path
        write_json(path / name, content)
        return path

    return make


def validated(folder: Path) -> Path:
    run = RunFolder.create(folder / "run").path
    write_text(run / "config.yaml", dump_config(RunConfig(data={"tasks": ["a"]})))
    measured = TrueRun("one", ("a",), 0, {"a": [0.5]}, {"a": [1]}, {"a": 0.5}, 4, 2, 0.1, 0.001, 10, 1.5)
    append_run(run / "validation" / "truth.jsonl", measured)
    write_json(run / "validation" / "validation.json", {"costs": {}, "comparisons": [], "n": 3})
    return run


SPENT = asdict(StageRecord("train", wall_seconds=2.5, flops=10))
CARD = {"task": "a", "dataset_path": "owner/name", "dataset_kwargs": {"revision": "b" * 40}}
KINDS: dict[str, tuple[Callable[[Path], Path], str, Callable[[Path], object]]] = {
    "a method's record of a comparison": (of_study, "records/ours-seed-1.json", read_study),
    "the head of a comparison": (of_study, "study.json", read_head),
    "an expensive step of a comparison": (
        lambda folder: make_pool(folder).recall("wide", 1, lambda: [1, 2.5]) and folder, "kept/*.json",
        lambda folder: make_pool(folder).recall("wide", 1, lambda: pytest.fail("it was carried out again")),
    ),
    "why a training failed": (
        plain("failed/pool-x.json", {"reason": "loss became nan after 3 steps", "n": 3}), "failed/pool-x.json",
        remember_failure,
    ),
    "the result of an analysis": (
        plain("transfer/result.json", {"analysis": "transfer", "share": 0.25}), "transfer/result.json",
        lambda folder: read_result(folder, "transfer"),
    ),
    "the oracle of a selection": (
        in_a_run("selection/a/oracle.json", {"l2_penalty": 0.5, "tasks": ["a"]}), "selection/a/oracle.json",
        lambda folder: read_prospect(folder, "a"),
    ),
    "the result of a validation": (
        validated, "validation/validation.json", lambda folder: reproduce("table3", [folder]),
    ),
    "the clients whose features are kept": (
        plain("clients.json", {"clients": [], "n_lots": 1}), "clients.json",
        lambda folder: load_features(folder, None),
    ),
    "what a federation sent": (
        plain("traffic.json", {"rounds": asdict(StageTraffic(n_messages=3))}), "traffic.json",
        lambda folder: Traffic.load(folder / "traffic.json"),
    ),
    "the costs of an unfinished stage": (
        plain("train.begun.json", {"fingerprint": "work", "spent": SPENT}), "train.begun.json",
        lambda folder: note_of_costs(folder / "train.begun.json"),
    ),
    "the cards of a run": (in_a_run("tasks.json", {"tasks": [{"card": CARD, "n": 3}]}), "tasks.json", pinned_commits),
    "the model of a run": (
        in_a_run("environment.json", {"model": {"name": "owner/model", "revision": "a" * 40, "n_parameters": 123}}),
        "environment.json", lambda folder: pinned_revision(folder, "owner/model"),
    ),
    "a run folder itself": (lambda folder: RunFolder.create(folder / "run").path, "run.json", RunFolder.open),
}  # fmt: skip


@pytest.mark.parametrize("damage", [flip_number, halve])
@pytest.mark.parametrize(("make", "name", "read"), KINDS.values(), ids=KINDS)
def test_a_damaged_record_is_refused_by_its_name(tmp_path, make, name, read, damage):
    folder = make(tmp_path)
    (path,) = folder.glob(name)
    before = path.read_bytes()
    damage(path)
    with pytest.raises((StoreError, OutputError), match=path.name) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    path.write_bytes(before)
    if name not in ("selection/a/oracle.json", "clients.json", "failed/pool-x.json", "validation/validation.json"):
        read(folder)  # as it was, it is read


def test_clients_whose_list_is_damaged_are_asked_again(tmp_path):
    write_json(tmp_path / "clients.json", {"clients": [{"name": "a", "n_rows": {}, "n_tokens": {}, "check": 7}]})
    assert [client.name for client in find_known(tmp_path)] == ["a"]
    flip_number(tmp_path / "clients.json")
    assert find_known(tmp_path) == ()


def test_a_step_that_was_kept_comes_back_whatever_its_shape(tmp_path):
    pool = make_pool(tmp_path)
    for result in ([1, 2.5], {"a": 1}, {"result": 3}, 4.5, None):
        assert pool.recall("x", str(result), lambda result=result: result) == result
        assert pool.recall("x", str(result), lambda: pytest.fail("it was carried out again")) == result
    path = next((tmp_path / "kept").glob("*.json"))
    path.write_text('{"as": "an earlier version kept it"}', encoding="utf-8")
    found = [pool.recall("x", str(result), lambda: None) for result in ([1, 2.5], {"a": 1}, {"result": 3}, 4.5)]
    assert {"as": "an earlier version kept it"} in [*found, pool.recall("x", "None", lambda: None)]


# The ledger of costs


def spend(run: OpenRun) -> None:
    with run.stage("train", 1) as stage:
        if stage.is_needed:
            stage.meter.add_flops(37)
    run.enter_methods({"ours": MethodCosts(train_flops=37)})


@pytest.mark.parametrize("damage", [flip_number, halve])
def test_damaged_costs_are_named_and_written_anew_from_their_copy(tmp_path, caplog, damage):
    with open_run(tmp_path / "run", "") as run:
        spend(run)
        ledger = run.ledger
    path = tmp_path / "run" / "costs.json"
    before = path.read_bytes()
    damage(path)
    with caplog.at_level(logging.WARNING), open_run(tmp_path / "run", "") as run:
        assert run.ledger == ledger == Ledger.from_dict(read_json(path))
        spend(run)
    assert path.read_bytes() == before and f"{path}: " in caplog.text and "written anew from its copy" in caplog.text
    for name in ("costs.json", ".costs.json"):
        damage(tmp_path / "run" / name)
    with pytest.raises(StoreError, match=r"costs\.json"), open_run(tmp_path / "run", ""):
        pass


# Whole commands


@pytest.mark.slow
@pytest.mark.parametrize("name", ["environment.json", "costs.json", "run.json", "tasks.json", "stages/group.json"])
def test_every_json_file_of_a_run_is_watched(tmp_path, name, caplog):
    recipe, path = copy_run(tmp_path), tmp_path / "run" / name
    flip_number(path)
    if name in ("costs.json", "stages/group.json"):
        with caplog.at_level(logging.WARNING):
            pipeline.run(read_config(recipe))
        assert path.name in caplog.text
        return
    with pytest.raises((StoreError, OutputError), match=path.name):
        pipeline.run(read_config(recipe))
    with pytest.raises((StoreError, OutputError), match=path.name):
        load_run(tmp_path / "run").predict("family0_task0", ["x"])


@pytest.mark.slow
def test_a_comparison_refuses_a_damaged_record_and_measures_the_same_again(tmp_path):
    config = read_config(copy_run(tmp_path), training={"num_train_epochs": 1})
    folder = tmp_path / "compared"
    (before,) = compare(config, ["base"], 1, [], folder).record.records
    path = folder / "records" / "base-seed-0.json"
    for damage in (flip_number, halve):
        damage(path)
        with pytest.raises(StoreError, match=r"base-seed-0\.json"):
            compare(config, ["base"], 1, [], folder)
        path.unlink()
        (again,) = compare(config, ["base"], 1, [], folder).record.records
        assert again.nll == before.nll and again.correct == before.correct


@pytest.mark.slow
def test_what_a_federation_leaves_is_watched(tmp_path):
    shutil.copytree(finished()[0], tmp_path, dirs_exist_ok=True)
    run, client = tmp_path / "run", tmp_path / "texts" / "client0.txt"
    assert assign_client(run, client, is_measured=True).measured
    uses: dict[str, Callable[[], object]] = {
        "results.json": lambda: read_record(run),
        "plan.json": lambda: read_record(run),
        "served.json": lambda: assign_client(run, client),
        "environment.json": lambda: assign_client(run, client),
    }
    for name, use in uses.items():
        for damage in (flip_number, halve):
            whole = (run / name).read_bytes()
            damage(run / name)
            with pytest.raises(StoreError, match=name):
                use()
            (run / name).write_bytes(whole)
    for path in (run / "adapters").glob("group-*/adapter_model.safetensors"):
        flip_bit(path, -5)
    with pytest.raises(StoreError, match=r"adapter_model\.safetensors: altered since .*ensemblelora federate"):
        assign_client(run, client, is_measured=True)
