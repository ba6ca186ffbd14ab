"""Whole commands under fire: killed at random moments, interrupted, two at once, on a full disk, in a closed folder."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import carry_out, serving, start
from tests.test_additions import write_late
from tests.tiny_run import copy_run, finished_run, make_inputs, read_json, tensors_of

pytestmark = pytest.mark.slow

N_MOMENTS = int(os.environ.get("ENSEMBLELORA_KILLS", "50"))
OUTCOMES = (
    *("affinity.npz", "oracle.json", "plan.json", "boosting.json", "ensemble.json", "results.json"),
    "test_rows.npz",
)
Server = subprocess.Popen[str]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as process:
        yield process


def talk_of(folder: Path) -> str:
    return (folder / "log.txt").read_text(encoding="utf-8")


def last_line(folder: Path) -> str:
    return talk_of(folder).splitlines()[-1]


def features_of(run: Path) -> dict[tuple[str, str], list[str]]:
    """The checksums of each block's files, whatever the folder is called that they are in."""
    blocks = read_json(run.parent, "features/manifest.json")["blocks"]
    return {
        (block["task"], block["split"]): [
            file["sha256"] for shard in block["shards"] for file in shard["files"].values()
        ]
        for block in blocks
    }


def assert_ended_as_if_nothing_had_happened(folder: Path) -> None:
    assert tensors_of(folder) == tensors_of(finished_run()), "an adapter differs in some bit"
    for name in OUTCOMES:
        assert (folder / "run" / name).read_bytes() == (finished_run() / "run" / name).read_bytes(), name
    left = [path.name for path in (folder / "run").rglob("*") if path.name.endswith((".tmp", ".begun.json"))]
    assert left == [] and not (folder / "run" / "checkpoints").exists()
    assert (folder / "run" / "report.html").read_text(encoding="utf-8").endswith("</html>")
    assert features_of(folder / "run") == features_of(finished_run() / "run"), "a feature differs in some bit"


# Killed


def markers_of(run: Path) -> dict[str, int]:
    """Finished stages and adapters, and when each was marked."""
    found = [path for path in (run / "stages").glob("*.json") if not path.name.endswith(".begun.json")]
    return {path.name: path.stat().st_mtime_ns for path in found}


def steps_of(run: Path) -> dict[str, int]:
    """The steps that each training's checkpoint holds."""
    found = (run / "checkpoints").glob("*/checkpoint-*/seal.json")
    return {path.parent.parent.name: int(path.parent.name.rpartition("-")[2]) for path in found}


def blocks_of(run: Path) -> dict[str, int]:
    """The folders of features that a store's manifest names, and when each was made."""
    if not (run / "features" / "manifest.json").exists():
        return {}
    blocks = read_json(run.parent, "features/manifest.json")["blocks"]
    return {block["folder"]: (run / "features" / block["folder"]).stat().st_mtime_ns for block in blocks}


def find_stage(run: Path) -> str:
    """The stage that a killed run was in."""
    begun = [path.name.removesuffix(".begun.json") for path in (run / "stages").glob("*.begun.json")]
    return begun[0] if begun else "between stages"


def test_a_run_killed_at_fifty_random_moments_ends_with_the_same_bits(tmp_path, server):
    """Each life is as long as a uniform share of a whole run; a run that outlives it is compared and begun anew."""
    finished_run()  # what it is compared with, made before the clock is read
    generator, moments = random.Random(0), Counter[str]()
    recipe = make_inputs(tmp_path)
    arguments, log, run = ["run", str(recipe), "--quiet"], tmp_path / "log.txt", tmp_path / "run"
    began = time.monotonic()
    assert carry_out(server, arguments, log) == 0, talk_of(tmp_path)
    seconds = time.monotonic() - began
    assert_ended_as_if_nothing_had_happened(tmp_path)
    shutil.rmtree(run)
    while moments.total() < N_MOMENTS:
        done, steps, blocks = markers_of(run), steps_of(run), blocks_of(run)
        child = start(server, arguments, log)
        time.sleep(generator.uniform(0.02, 0.7) * seconds)
        code = child.kill()
        after = markers_of(run)
        assert {name: after.get(name) for name in done} == done, "a finished stage was done again"
        for training, n_steps in steps.items():
            is_over = f"{training.rpartition('-')[0]}.json" in after
            assert is_over or steps_of(run).get(training, -1) >= n_steps, "a training fell behind its last checkpoint"
        assert blocks.items() <= blocks_of(run).items(), "features that were there were computed again"
        if code == 0:
            assert_ended_as_if_nothing_had_happened(tmp_path)
            shutil.rmtree(run)
        else:
            assert code == -signal.SIGKILL, talk_of(tmp_path)
            moments[find_stage(run)] += 1
    assert carry_out(server, arguments, log) == 0, talk_of(tmp_path)
    assert_ended_as_if_nothing_had_happened(tmp_path)
    assert len(moments) >= min(4, N_MOMENTS), f"the moments fell too close together: {moments}"


MOMENTS = ("features", "affinity", "group", "train", "boost", "combine")


def test_an_addition_killed_behind_each_stage_ends_with_the_same_bits(tmp_path, server):
    recipe, card = copy_run(tmp_path / "a"), write_late(tmp_path / "more")
    command = ["add", str(recipe.parent / "run"), str(card), "--to", "group-0", "--quiet", "--out"]
    log, whole, out = tmp_path / "log.txt", tmp_path / "whole", tmp_path / "killed"
    before, n_killed = tensors_of(recipe.parent), 0
    assert carry_out(server, [*command, str(whole)], log) == 0, talk_of(tmp_path)
    for stage in MOMENTS:
        child = start(server, [*command, str(out)], log)
        while not (out / "stages" / f"{stage}.json").exists() and is_alive(child.pid):
            time.sleep(0.002)
        code = child.kill()
        assert code in (0, -signal.SIGKILL), talk_of(tmp_path)
        n_killed += code != 0
    assert n_killed >= 4, "the others may have ended meanwhile"
    assert carry_out(server, [*command, str(out)], log) == 0, talk_of(tmp_path)
    for name in ("ensemble.json", "results.json", "boosting.json", "affinity.npz"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    files = [sorted(folder.glob("adapters/*/adapter_model.safetensors")) for folder in (out, whole)]
    assert [one.read_bytes() for one in files[0]] == [other.read_bytes() for other in files[1]] and files[0]
    assert tensors_of(recipe.parent) == before, "the earlier run is only read"
    assert not (out / "checkpoints").exists() and not list(out.rglob("*.begun.json"))


def is_alive(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"


# Interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_cleanly_and_says_how_to_go_on(number, tmp_path, server):
    recipe = make_inputs(tmp_path)
    child = start(server, ["run", str(recipe), "--quiet"], tmp_path / "log.txt")
    while not (tmp_path / "run" / "stages" / "features.json").exists():
        time.sleep(0.01)
    assert child.kill(number) == 130, talk_of(tmp_path)
    told = last_line(tmp_path)
    assert told == f"interrupted; continue with: ensemblelora run {tmp_path / 'run'}"
    assert "Traceback" not in talk_of(tmp_path)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert carry_out(server, ["run", str(tmp_path / "run" / "config.yaml"), "--quiet"], tmp_path / "log.txt") == 0
    assert_ended_as_if_nothing_had_happened(tmp_path)


# Two at once


def test_of_two_processes_on_one_folder_one_works_and_the_other_says_so(tmp_path, server):
    recipe = make_inputs(tmp_path)
    arguments = ["run", str(recipe), "--quiet"]
    (tmp_path / "second").mkdir()
    with serving() as other:
        assert carry_out(other, ["--version"], tmp_path / "second" / "log.txt") == 0  # it has imported everything
        first = start(server, arguments, tmp_path / "log.txt")
        second = start(other, arguments, tmp_path / "second" / "log.txt")
        codes = [first.wait(), second.wait()]
    assert sorted(codes) == [0, 2], (talk_of(tmp_path), talk_of(tmp_path / "second"))
    worker, folder = (first, tmp_path / "second") if codes[0] == 0 else (second, tmp_path)
    told = last_line(folder)
    assert told.startswith(f"error: {tmp_path / 'run'}: in use by process {worker.pid} on "), told
    assert_ended_as_if_nothing_had_happened(tmp_path)


# No room, no permission


STAGES = ("features", "affinity", "group", "train", "boost", "combine", "baselines", "evaluate", "report")
TRAINED = {"train": ("group-0", "group-1"), "baselines": ("shared",)}


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("disk")) as process:
        yield process


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_is_full_in_any_stage_is_told_and_nothing_finished_is_lost(stage, tmp_path, small_disk):
    home = Path(small_disk.disk or tmp_path) / stage
    recipe, run = copy_run(home), home / "run"
    for name in [*STAGES[STAGES.index(stage) :], *TRAINED.get(stage, ())]:
        (run / "stages" / f"{name}.json").unlink(missing_ok=True)
    if stage == "features":
        shutil.rmtree(run / "features")
    done = markers_of(run)
    arguments, log = ["run", str(recipe), "--quiet"], tmp_path / "log.txt"
    try:
        assert carry_out(small_disk, arguments, log, full_in=stage) == 2, talk_of(tmp_path)
        told, reason = last_line(tmp_path), "No space left on device" if small_disk.disk else "File too large"
        assert told.startswith("error: ") and "can't be written (" in told and reason in told, told
        assert "Traceback" not in talk_of(tmp_path)
        assert not [path for path in run.rglob("*.tmp") if path.is_file()]
        kept = {name: time for name, time in markers_of(run).items() if name in done}
        assert set(done) - set(kept) <= {f"{name}.json" for name in STAGES}, "an adapter's marker is gone"
        (home.parent / "filler").unlink(missing_ok=True)
        assert carry_out(small_disk, arguments, log) == 0, talk_of(tmp_path)
        assert_ended_as_if_nothing_had_happened(home)
    finally:
        (home.parent / "filler").unlink(missing_ok=True)
        shutil.rmtree(home)


def test_a_folder_that_can_not_be_written_is_refused_and_stays_as_it_is(tmp_path, server):
    recipe, run = copy_run(tmp_path), tmp_path / "run"
    (run / "report.html").unlink()  # so that there is something to do
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    folders = [run, *(path for path in run.rglob("*") if path.is_dir())]
    log = tmp_path / "log.txt"
    try:
        for folder in folders:
            folder.chmod(0o500)
        code = carry_out(server, ["run", str(recipe), "--quiet"], log, obeys=True)
    finally:
        for folder in folders:
            folder.chmod(0o700)
    assert code == 2, talk_of(tmp_path)
    told = last_line(tmp_path)
    assert told.startswith(f"error: {run}") and talk_of(tmp_path).count("\n") == 1, talk_of(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before
    (tmp_path / "closed").mkdir(mode=0o500)
    assert carry_out(server, ["run", str(recipe), "--out", str(tmp_path / "closed" / "new")], log, obeys=True) == 2
    assert "can't be used as the run folder" in last_line(tmp_path)
    assert not list((tmp_path / "closed").iterdir())


# A training that goes wrong


def test_a_training_that_diverges_ends_in_one_line_and_a_lower_rate_goes_on(tmp_path, server):
    recipe = make_inputs(tmp_path)
    log = tmp_path / "log.txt"
    wild = [
        "run",
        str(recipe),
        "--quiet",
        "--set",
        "training.learning_rate=1e30",
        "--set",
        "training.max_grad_norm=1e30",
    ]
    assert carry_out(server, wild, log) == 1, talk_of(tmp_path)
    told = last_line(tmp_path)
    assert told.startswith("error: adapter 'group-0': ") and told.endswith("lower training.learning_rate"), told
    assert not (tmp_path / "run" / "adapters").exists() or not list((tmp_path / "run" / "adapters").iterdir())
    begun = json.loads((tmp_path / "run" / "stages" / "features.json").read_text(encoding="utf-8"))
    assert carry_out(server, ["run", str(recipe), "--quiet"], log) == 0, talk_of(tmp_path)
    assert json.loads((tmp_path / "run" / "stages" / "features.json").read_text(encoding="utf-8")) == begun
    assert_ended_as_if_nothing_had_happened(tmp_path)
    assert read_json(tmp_path, "results.json")["methods"]
