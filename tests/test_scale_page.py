"""The page about scale: its commands for clusters, carried out on this machine as far as it can stand in for them.

Programs that are not here (srun, scontrol) are played by scripts that run what they are given; accelerators by numbers
that Ray is told. The cluster is a real one, of processes that are started as the page says.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.snippets import DOCS, ROOT, Block, list_blocks, list_commands
from tests.test_scheduling import assert_same_run
from tests.tiny_run import finished_run, make_inputs

SHELLS = ("sh", "bash")
PAGE = DOCS / "scale.md"


def find_block(text: str, *languages: str) -> Block:
    (found,) = (block for block in list_blocks(PAGE, *languages) if text in block.text)
    return found


def read_options(name: str) -> set[str]:
    """What a command of Ray's takes."""
    from ray.scripts import scripts

    return {option for parameter in getattr(scripts, name).params for option in parameter.opts}


@pytest.mark.slow
def test_every_option_of_ray_that_the_page_names_is_one() -> None:
    commands = [shlex.join(c.words) for block in list_blocks(PAGE, *SHELLS) for c in list_commands(block)]
    starts = [shlex.split(line[line.index("ray start") :]) for line in commands if "ray start" in line]
    assert len(starts) == 3
    for words in starts:
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= read_options("start")
    cluster = yaml.safe_load(find_block("RayCluster", "yaml").text)["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert {f"--{key}" for key in group["rayStartParams"]} <= read_options("start")


def test_head_and_workers_of_the_manifest_see_the_run_folder_under_one_path() -> None:
    cluster = yaml.safe_load(find_block("RayCluster", "yaml").text)
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    groups = (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"])
    seen = set()
    for group in groups:
        pod = group["template"]["spec"]
        (container,), (volume,) = pod["containers"], pod["volumes"]
        (mount,) = container["volumeMounts"]
        assert mount["name"] == volume["name"]
        seen.add((container["image"], mount["mountPath"], volume["persistentVolumeClaim"]["claimName"]))
    ((_, place, _),) = seen
    (command,) = (c for c in list_commands(find_block("kubectl exec", *SHELLS)) if "exec" in c.words)
    assert command.words[command.words.index("--out") + 1].startswith(f"{place}/")


# On a real cluster


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment in which Ray has a place of its own, and programs that are not here are played by others."""
    own, programs = tempfile.mkdtemp(prefix="el", dir="/tmp"), tmp_path / "bin"  # sockets have short paths
    programs.mkdir()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    scripts = {
        "scontrol": "echo 127.0.0.1; echo another",
        "srun": 'while [[ $1 == -* ]]; do [[ $1 == -w ]] && shift; shift; done; exec "$@"',
        "sleep": f"until (echo > /dev/tcp/127.0.0.1/{port}) 2> /dev/null; do /bin/sleep 0.5; done; /bin/sleep 8",
        "ray": '[[ "$*" == *num-gpus* ]] || set -- "$@" --num-cpus=$CORES --num-gpus=1\n'
        f'exec "{sys.executable}" -m ray.scripts.scripts "$@"',
        "ensemblelora": f'exec "{sys.executable}" -m ensemblelora "$@"',
    }
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    paths = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "RAY_TMPDIR": own}
    numbers = {"PORT": str(port), "CORES": "1", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    yield {**os.environ, **paths, **numbers}
    for process in psutil.process_iter():  # not by `ray stop`, which ends all that Ray has on a machine
        with suppress(psutil.Error):
            if process.environ().get("RAY_TMPDIR") == own:
                process.kill()
    shutil.rmtree(own, ignore_errors=True)


def carry_out(script: str, env: dict[str, str], log: Path) -> str:
    """Run a script, and give what it said on both streams."""
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(["bash", "-c", script], env=env, stdout=stream, stderr=stream, check=False, timeout=900)
    told = log.read_text(encoding="utf-8")
    assert done.returncode == 0, told[-3000:]
    return told


@pytest.mark.slow
def test_the_script_for_slurm_starts_two_machines_and_leaves_what_one_process_leaves(
    tmp_path: Path, stage: dict[str, str]
) -> None:
    recipe, script = make_inputs(tmp_path), find_block("#SBATCH", *SHELLS).text
    changes = {
        "1,2,3,4,5,6,7": "1",
        "--num-cpus=56 --num-gpus=7": "--num-cpus=1 --num-gpus=1",
        "6379": stage["PORT"],
        "CONFIG --out /shared/runs/mine": str(recipe),
    }
    for before, after in changes.items():
        assert before in script
        script = script.replace(before, after)
    told = carry_out(script, stage, tmp_path / "log.txt")
    assert "cluster: 2 jobs at once, each holds cpus=1,gpus=1" in told, told[-3000:]
    assert_same_run(tmp_path, finished_run())


SHARE = """
import json, os, sys, time
from ensemblelora.scheduling import Equipment, Job, open_scheduler, read_cluster
from tests.test_scale_page import hold
found = {}
for name, gpus, on_gpu in (("half", 0.5, True), ("whole", 1, True), ("none", 1, False)):
    with open_scheduler(read_cluster("auto", f"cpus=1,gpus={gpus}")) as cluster:
        jobs = [Job(f"job {i}", (3.0,)) for i in range(2)]
        list(cluster.run(hold, jobs, Equipment(None, "none", dict), what="start"))
        ran = cluster.run(hold, jobs, Equipment(None, "none", dict), what="jobs", on_gpu=on_gpu)
        found[name] = [cluster.n_workers, [result for _, result in ran]]
print(json.dumps(found))
"""


def hold(_: Any, seconds: float) -> tuple[float, float, str]:
    """When a job began and ended, and which accelerators it was given."""
    began = time.time()
    time.sleep(seconds)
    return began, time.time(), os.environ.get("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.slow
def test_two_jobs_share_an_accelerator_that_each_holds_half_of(tmp_path: Path, stage: dict[str, str]) -> None:
    script = find_block("--cluster auto\nray stop", *SHELLS).text
    start = script[: script.index("CUDA_VISIBLE_DEVICES=0")]
    carry_out(start, stage | {"CORES": "2"}, tmp_path / "log.txt")
    done = subprocess.run([sys.executable, "-c", SHARE], env=stage, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    expected = {"half": (2, "1", True), "whole": (1, "1", False), "none": (1, "", True)}
    for name, (n_workers, devices, is_shared) in expected.items():
        at_once, ((began, ended, one), (later, last, other)) = found[name]
        assert (at_once, one, other) == (n_workers, devices, devices), name
        assert (max(began, later) < min(ended, last)) == is_shared, name
