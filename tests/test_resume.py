"""A run killed without warning (SIGKILL) goes on where it was and ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensemblelora import pipeline
from tests.tiny_run import finished_run, make_inputs, read_config, read_json, tensors_of

ROOT = Path(__file__).resolve().parent.parent
OUTCOMES = ("affinity.npz", "oracle.json", "plan.json", "boosting.json", "ensemble.json", "results.json")

# A process that has imported everything, and forks a child for every order: importing takes longer than a tiny run.
# The child kills itself at a given pass through the model, or when a stage is about to be marked done.
SERVER = """
import json, os, signal, sys
from ensemblelora import pipeline
from ensemblelora.accounting.meter import Meter
from ensemblelora.artifacts import RunFolder
from ensemblelora.cli import main

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def arm(stage, n_passes):
    if n_passes is None:
        mark_done = RunFolder.mark_done
        RunFolder.mark_done = lambda self, name, *a, **k: die() if name == stage else mark_done(self, name, *a, **k)
        return
    add_tokens, passes = Meter.add_tokens, []
    def counted(self, *args):
        passes.extend([1] if self.record.stage == stage else [])
        die() if len(passes) == n_passes else add_tokens(self, *args)
    Meter.add_tokens = counted

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        sink = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1), os.dup2(sink, 2)
        arm(order["stage"], order["n_passes"])
        os._exit(main(["run", order["recipe"]]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SERVER], text=True, env=environment(), **pipes) as process:
        yield process
        process.stdin.close()


def run_and_kill(server, recipe: Path, stage: str, n_passes: int | None) -> None:
    """Run until SIGKILL at the n-th pass of a stage, or just before the stage is marked done."""
    log = recipe.parent / "log.txt"
    order = {"recipe": str(recipe), "log": str(log), "stage": stage, "n_passes": n_passes}
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    code = int(server.stdout.readline())
    assert code == -signal.SIGKILL, f"not killed in {stage}, exit code {code}: {log.read_text(encoding='utf-8')}"


def has(folder: Path, pattern: str) -> bool:
    return any((folder / "run").glob(pattern))


def assert_ended_alike(folder: Path) -> None:
    assert tensors_of(folder) == tensors_of(finished_run()), "an adapter differs in some bit"
    for name in OUTCOMES:
        assert (folder / "run" / name).read_bytes() == (finished_run() / "run" / name).read_bytes(), name
    left = [path for path in (folder / "run").rglob("*") if path.name.endswith((".tmp", ".begun.json"))]
    assert left == [] and not has(folder, "checkpoints")
    assert has(folder, "report.html")


# What must be there, and what must not, shows that the kill fell where it was meant to.
MOMENTS = [
    ("features", 4, "features/manifest.json", "affinity.npz"),
    ("train", 16, "checkpoints/group-0-*/checkpoint-*", "adapters/group-0"),
    ("boost", 8, "stages/train.json", "boosting.json"),
    ("evaluate", 5, "adapters/shared", "results.json"),
]
MORE_MOMENTS = [
    ("affinity", None, "affinity.npz", "stages/affinity.json"),
    ("group", None, "plan.json", "stages/group.json"),
    ("train", 1, "stages/group.json", "checkpoints/*/checkpoint-*"),
    ("train", 16, "checkpoints/group-0-*/checkpoint-*", "adapters/group-0"),
    ("train", 14, "stages/group-0.json", "stages/train.json"),
    ("boost", None, "boosting.json", "stages/boost.json"),
    ("combine", 3, "boosting.json", "ensemble.json"),
    ("combine", None, "ensemble.json", "stages/combine.json"),
    ("baselines", 24, "checkpoints/shared-*/checkpoint-*", "adapters/shared"),
    ("evaluate", None, "results.json", "stages/evaluate.json"),
    ("report", None, "report.html", "stages/report.json"),
]


@pytest.mark.slow
@pytest.mark.parametrize("moments", [MOMENTS, MORE_MOMENTS], ids=["few", "many"])
def test_a_run_killed_again_and_again_ends_bit_by_bit_as_if_nothing_had_happened(tmp_path, server, moments):
    recipe = make_inputs(tmp_path)
    for stage, n_passes, there, missing in moments:
        run_and_kill(server, recipe, stage, n_passes)
        assert has(tmp_path, there) and not has(tmp_path, missing), f"the kill in {stage} came at another moment"
    costs = {record["stage"]: record["flops"] for record in read_json(tmp_path, "costs.json")["stages"]}
    pipeline.run(read_config(recipe))
    assert_ended_alike(tmp_path)
    once = {record["stage"]: record["flops"] for record in read_json(finished_run(), "costs.json")["stages"]}
    once["group"] += once["affinity"]  # in a new process it first solves again what the affinity stage had in memory
    for stage in ("features", "affinity", "group"):  # each was done again from its start, or not at all
        assert 0 < costs[stage] <= 2 * once[stage]
    spent = {record["stage"]: record["flops"] for record in read_json(tmp_path, "costs.json")["stages"]}
    assert spent["features"] >= once["features"], "of tasks that were done before a kill, too"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_command_killed_from_outside_at_any_time_ends_alike(tmp_path, seed):
    recipe = make_inputs(tmp_path)
    command = [sys.executable, "-m", "ensemblelora", "run", str(recipe), "--quiet"]
    started = time.monotonic()
    subprocess.run(command, env=environment(), check=True, capture_output=True, cwd=tmp_path)
    seconds = time.monotonic() - started
    (tmp_path / "run").rename(tmp_path / "uninterrupted")
    drawn = random.Random(seed)
    for _ in range(4):
        with subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
            time.sleep(seconds * drawn.uniform(0.3, 1.0))
            process.kill()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_ended_alike(tmp_path)
