"""What the benchmark of a federation makes of one, and what the page of measurements makes of its record."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ensemblelora import artifacts
from ensemblelora.config import dump_config
from ensemblelora.config_federation import FederationConfig
from ensemblelora.federation.engines import settle_paths
from measured import render_measured
from tests.federation_tiny import copy_finished, finished, make_config

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, which finds its neighbours as it does when it is run, and keeps its records elsewhere."""
    sys.path.insert(0, str(FOLDER))
    module = importlib.import_module("federated")
    monkeypatch.setattr(sys.modules["common"], "RESULTS", tmp_path / "results")
    yield module
    sys.path.remove(str(FOLDER))
    for name in ("federated", "common"):
        sys.modules.pop(name)


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["federated.py", *arguments])
    script.main()


def read(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / "results" / f"{name}.json").read_text(encoding="utf-8")))


def test_a_record_is_kept_and_shown(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = copy_finished(tmp_path)
    (tmp_path / "run" / "config.yaml").write_text(dump_config(settle_paths(config)), encoding="utf-8")  # it was moved
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(config), encoding="utf-8")
    run(script, monkeypatch, "--recipe", str(recipe))
    record, known = read(tmp_path, "federated-cpu"), finished()[1]
    assert record["outcome"]["methods"]["ours"]["nll"] == known.methods["ours"].nll
    ratio = known.methods["ours"].nll / known.methods["global"].nll
    assert record["loss_over_global"] == pytest.approx(ratio) and record["memory_over_mtl-ft"] == pytest.approx(0.5)
    assert set(record["stages"]) >= {"features", "plan", "global", "groups-2"} and record["wall_seconds"] > 0
    assert sum(record["chosen"]["sizes"]["2"]) == 6 and "out" not in record["config"]["recipe"]
    assert record["left"] == [] and set(record["outcome"]["methods"]) == set(known.methods), "its last step was there"

    run(script, monkeypatch, "--recipe", str(recipe), "--factors")
    ways = read(tmp_path, "federated-factors")
    losses = {
        name: artifacts.load_arrays(tmp_path / folder / "losses.npz")
        for name, folder in (("exact", "run"), ("factors", "run-factors"))
    }
    for name, one in ways["ways"].items():
        assert one["difference"] == pytest.approx(float(np.mean(losses["exact"][name] - losses["factors"][name])))
        assert one["low"] <= one["difference"] <= one["high"]
        assert np.abs(losses["exact"][name] - losses["factors"][name]).max() > 0
    assert set(ways["ways"]) == {"global", "groups-2"} and ways["n_clients"] == 6

    page = "\n".join(render_measured({"federated-cpu": record, "federated-factors": ways}))
    for told in ("## Groups of 500 clients", "| 2 groups, 1 booster |", "| random groups |", "## Averaging adapters"):
        assert told in page
    assert "the paper: 0.91" in page and "None" not in page


def test_steps_only_add_and_end_with_all_of_the_recipe(script: ModuleType, tmp_path: Path) -> None:
    config = make_config(tmp_path, boosting={"n_rounds": [1, 5]}, evaluation={"random_groups": 3})
    steps = script.list_steps(config)
    assert [step.name for step in steps] == [
        "3 groups", "2, 3 groups", "boosters: 1", "each client alone", "boosters: 5", "weights",
    ]  # fmt: skip
    assert steps[-1].config == config
    for one, other in itertools.pairwise(step.config for step in steps):
        assert {*one.groups.n_groups} <= {*other.groups.n_groups}
        assert {*one.boosting.n_rounds} <= {*other.boosting.n_rounds}
        assert {*one.evaluation.baselines} <= {*other.evaluation.baselines}
        assert one.training == other.training and one.evaluation.random_groups == other.evaluation.random_groups
    (only,) = script.list_steps(
        make_config(
            tmp_path,
            groups={"n_groups": [2]},
            boosting={"n_rounds": []},
            evaluation={"baselines": ["global"], "n_candidates": 1},
        )
    )
    assert only.name == "2 groups"


@pytest.mark.slow
def test_out_of_minutes_leaves_a_record_that_says_what_is_missing(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, begun, carry_out = tmp_path / "recipe.yaml", [], script.run_federation
    recipe.write_text(dump_config(make_config(tmp_path)), encoding="utf-8")

    def stop_third(config: FederationConfig, **how: Any) -> Any:
        begun.append(config)
        if len(begun) == 3:
            raise script.OutOfMinutes
        return carry_out(config, **how)

    monkeypatch.setattr(script, "run_federation", stop_third)
    run(script, monkeypatch, "--recipe", str(recipe), "--json")
    told = capsys.readouterr()
    partial = read(tmp_path, "federated-cpu")
    assert "out of minutes" in told.err and json.loads(told.out) == partial, "the last record alone is printed"
    assert partial["left"] == ["boosters: 1", "each client alone", "weights"]
    assert set(partial["outcome"]["methods"]) == {"base", "global", "random", "groups-2", "groups-3", "ours"}
    page = "\n".join(render_measured({"federated-cpu": partial}))
    assert "**Partial**" in page and "each client alone; weights" in page.replace("\n", " ") and "None" not in page

    run(script, monkeypatch, "--recipe", str(recipe))
    whole, known = read(tmp_path, "federated-cpu"), finished()[1]
    assert begun[3] == begun[1] and len(begun) == 7, "the step that was finished last is read back"
    assert whole["left"] == [] and whole["wall_seconds"] > partial["wall_seconds"]
    assert {name: one["nll"] for name, one in whole["outcome"]["methods"].items()} == {
        name: one.nll for name, one in known.methods.items()
    }
    costs = {name: one["cost"]["flops"] for name, one in whole["outcome"]["methods"].items()}
    assert costs == {name: one.cost.flops for name, one in known.methods.items() if one.cost}
    assert not (tmp_path / "run" / "cache").exists()


def test_out_of_minutes_is_as_interrupted(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal
    import time

    before = signal.getsignal(signal.SIGALRM)
    try:
        script.stop_after(0.001)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
