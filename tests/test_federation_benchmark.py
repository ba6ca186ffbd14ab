"""What the benchmark of a federation makes of one, and what the page of measurements makes of its record."""

from __future__ import annotations

import importlib
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
from measured import render_measured
from tests.federation_tiny import copy_finished, finished

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
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(config), encoding="utf-8")
    run(script, monkeypatch, "--recipe", str(recipe))
    record, known = read(tmp_path, "federated-cpu"), finished()[1]
    assert record["outcome"]["methods"]["ours"]["nll"] == known.methods["ours"].nll
    ratio = known.methods["ours"].nll / known.methods["global"].nll
    assert record["loss_over_global"] == pytest.approx(ratio) and record["memory_over_mtl-ft"] == pytest.approx(0.5)
    assert set(record["stages"]) >= {"features", "plan", "global", "groups-2"} and record["wall_seconds"] > 0
    assert record["chosen"]["sizes"]["2"] == [3, 3] and "out" not in record["config"]["recipe"]

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
