"""Processes that share a model's weights out (FSDP) leave what one process leaves; here two on a processor, by gloo."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from ensemblelora import load_run, pipeline
from ensemblelora.errors import ConfigError, ModelError
from ensemblelora.models import load_base
from ensemblelora.scheduling import read_cluster
from ensemblelora.sharding import Team, join_team, take_share
from ensemblelora.store import FeatureStore
from tests.tiny_run import TASKS, make_inputs, read_config

ROOT = Path(__file__).resolve().parent.parent
SHARDED = {"device_map": "fsdp"}
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run_in_two(command: str, recipe: Path) -> subprocess.CompletedProcess[str]:
    """As it is documented."""
    return subprocess.run(
        [*LAUNCH, "-m", "ensemblelora", command, str(recipe), "--json", "--set", "model.device_map=fsdp"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def read_losses(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "adapters" / name / "training.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks by an old name
def test_two_processes_leave_what_one_leaves(tmp_path: Path) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    for folder in (alone, both):
        folder.mkdir()
        make_inputs(folder)
    pipeline.run(read_config(alone / "recipe.yaml"))
    for command in ("plan", "run"):  # the second goes on where the first ended
        ended = run_in_two(command, both / "recipe.yaml")
        assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads(ended.stdout)["folder"] == str(both / "run"), "the first process alone writes results"
    names = sorted(path.name for path in (alone / "run" / "adapters").iterdir())
    assert sorted(path.name for path in (both / "run" / "adapters").iterdir()) == names
    for name in names:
        if "boost" not in name:  # found by a line search, and not by steps
            first, second = (read_losses(folder / "run", name) for folder in (alone, both))
            assert first["n_steps"] == second["n_steps"]
            for one, other in zip(first["history"], second["history"], strict=True):
                assert one == pytest.approx(other, abs=1e-5)
        weights, others = (
            load_file(folder / "run" / "adapters" / name / "adapter_model.safetensors") for folder in (alone, both)
        )
        assert weights.keys() == others.keys()
        for key in weights:
            np.testing.assert_allclose(weights[key], others[key], atol=2e-5)
    stores = [FeatureStore(folder / "run" / "features") for folder in (alone, both)]
    for task, split in itertools.product(TASKS, ("train", "validation")):
        first, second = (np.asarray(store.read(task, split).features) for store in stores)
        assert np.abs(first).max() > 0
        np.testing.assert_allclose(first, second, atol=1e-4 * float(np.abs(first).max()), err_msg=task)
    ledgers = [json.loads((folder / "run" / "costs.json").read_text(encoding="utf-8")) for folder in (alone, both)]
    spent = [[(stage["stage"], stage["n_tokens"]) for stage in ledger["stages"]] for ledger in ledgers]
    assert spent[0] == spent[1], "work is counted once"
    base = AutoModelForCausalLM.from_pretrained(both / "model")
    PeftModel.from_pretrained(base, both / "run" / "adapters" / names[0])  # an ordinary folder of PEFT's
    load_run(both / "run").load()  # one process has the whole model


def test_in_one_process_weights_stay_whole(tmp_path: Path) -> None:
    assert join_team() == Team(rank=0, size=1)
    assert take_share([4, 7, 9]) == ([4, 7, 9], 1.0)
    config = read_config(make_inputs(tmp_path), model=SHARDED, training={"together": True})
    with pytest.raises(ConfigError, match=r"training\.together: not where processes share the work out"):
        pipeline.run(config)
    with pytest.raises(ConfigError, match=r"--cluster: not with model\.device_map fsdp"):
        pipeline.run(config, cluster=read_cluster("local:2", None))


def test_packed_weights_are_not_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemblelora.models.join_team", lambda: Team(0, 2))
    config = read_config(make_inputs(tmp_path), model={**SHARDED, "quantization": "nf4"})
    with pytest.raises(ModelError, match=r"model\.device_map fsdp: not for weights in 4 bits"):
        load_base(config.model)


@pytest.mark.parametrize(("n", "size"), [(7, 2), (8, 3), (2, 4)])
def test_parts_of_a_step_add_up_to_its_mean(n: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = np.random.default_rng(0).normal(size=n)
    total = 0.0
    for rank in range(size):
        monkeypatch.setattr("ensemblelora.sharding.join_team", lambda rank=rank: Team(rank, size))
        own, factor = take_share(range(n))
        total += factor * losses[list(own)].mean()
    assert total == pytest.approx(losses.mean())
