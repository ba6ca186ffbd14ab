"""The benchmark of the forecasts on a tiny model, and what it makes of made-up numbers."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from ensemblelora.data.catalog import resolve_cards
from measured import render_measured
from tests.tiny_run import SETTINGS, TASKS, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, which finds its neighbours as it does when it is run, with records elsewhere."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("forecast")
    monkeypatch.setattr(module, "FACTORS", (1, 2))
    monkeypatch.setattr(sys.modules["common"], "RESULTS", tmp_path / "results")
    yield module
    for name in ("forecast", "common"):
        sys.modules.pop(name)


@pytest.fixture
def tiny(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with the tests' model and one of their tasks."""
    recipe = make_inputs(tmp_path)
    source = recipe.parent / "tasks" / f"{TASKS[0]}.yaml"
    card = yaml.safe_load(source.read_text(encoding="utf-8"))
    rows = "".join(path.read_text(encoding="utf-8") for path in sorted(source.parent.glob(f"{TASKS[0]}.*.jsonl")))
    (source.parent / "all.jsonl").write_text(rows * 2, encoding="utf-8")
    card["dataset_kwargs"] = {"data_files": {"train": "all.jsonl"}}
    source.write_text(yaml.safe_dump({k: v for k, v in card.items() if k not in ("validation_split", "test_split")}))
    numbers = {"MODEL": str(tmp_path / "model"), "SOURCE": str(source), "ROWS": 4, "N_PARTS": 4, "LEAST_SECONDS": 0.0}
    for name, value in numbers.items():
        monkeypatch.setattr(script, name, value)
    sections = ("model", "adapter", "gradients", "training")
    changes = {name: dict(SETTINGS[name]) for name in sections}
    del changes["training"]["num_train_epochs"]
    monkeypatch.setattr(script, "CHANGES", changes)
    return script


def make_stage(seconds: float, flops: int = 1000) -> dict[str, Any]:
    return {"seconds": seconds, "flops": flops, "memory_bytes": 10**9, "disk_bytes": 0}


def test_ratios_are_predicted_over_true_and_the_worst_is_the_farthest(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "forecast.py"))
    asked: list[list[str]] = []

    def measure(self: Any, path: str, arguments: list[str]) -> dict[str, Any]:
        asked.append(arguments)
        kind, _, name = arguments[0].partition(" ")
        true = 1.0 if name == "rows-1" else 2.0
        stages = {stage: make_stage(true) for stage in script.STAGES}
        stages["combine"] = make_stage(0.1)
        if kind == "run":
            stages["train"]["disk_bytes"] = 10
            return {"stages": stages}
        for stage in stages.values():
            stage |= {"seconds": 2.0 if name == "rows-1" else 1.0, "memory_bytes": 2 * 10**9}
        stages["train"]["disk_bytes"] = 12
        return {"speed": {"forward": math.inf}, "stages": stages, "sized_flops": dict.fromkeys(stages, 4000)}

    monkeypatch.setattr(script.Journal, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["forecast.py", "--json"])
    script.main()
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "results" / "forecast.json").read_text(encoding="utf-8"))
    assert [arguments[0] for arguments in asked] == ["speed"] + [
        f"{kind} {name}" for name in ("rows-1", "rows-2", "tasks-2") for kind in ("predict", "run")
    ]
    assert {arguments[2] for arguments in asked if arguments[0].startswith("predict")} == {'{"forward": Infinity}'}
    # Four stages of each size: twice what is true once, half of it twice.
    assert record["time_ratio"] == pytest.approx((2 * 0.5 * 0.5) ** (1 / 3))
    assert record["time_ratio_worst"] in (2.0, 0.5) and record["memory_ratio"] == pytest.approx(2.0)
    assert record["disk_ratio"] == pytest.approx(1.2) and "disk_ratio" not in record["sizes"]["rows-2"]["features"]
    assert record["sized_time_ratio"] == pytest.approx(2.0), "4,000 FLOPs at a thousand a second, where two were true"
    assert "time_ratio" not in record["sizes"]["rows-1"]["combine"]
    page = "\n".join(render_measured({"forecast": record}))
    assert "| time (`--dry-run`) | 0.79x |" in page and "| 2 x tasks | 0.50x |" in page

    monkeypatch.setattr(sys, "argv", ["forecast.py", "--minutes", "0"])
    script.main()
    assert "out of time before rows-1" in capsys.readouterr().err


def test_the_shipped_card_that_is_measured_is_found(script: ModuleType, tmp_path: Path) -> None:
    config = script.make_config("tasks-2", tmp_path)
    parts = [card.task for card in resolve_cards(config.data.tasks)]
    assert parts == ["part_00", "part_01", "part_02", "part_03"], "the fixture's sizes go to twice the tasks"


@pytest.mark.slow
def test_a_size_is_predicted_and_carried_out(tiny: ModuleType, tmp_path: Path) -> None:
    speed = tiny.work("speed", None)["speed"]
    predicted, true = {}, {}
    for name in tiny.list_sizes()[:2]:
        predicted[name] = tiny.work(f"predict {name}", json.dumps(speed))
        assert predicted[name]["speed"] == speed, "measured once"
        true[name] = [tiny.work(f"run {name}", None)]
    found = tiny.summarize(predicted, true)
    for name, stages in found["sizes"].items():
        flops = {stage: predicted[name]["stages"][stage]["flops"] for stage in ("features", "baselines")}
        assert flops == {stage: stages[stage]["flops"] for stage in flops}
        assert set(stages) == set(tiny.STAGES)
        assert all(0.05 < stages[stage]["disk_ratio"] < 3 for stage in tiny.PLACES)  # of files that are mostly heads
    assert found["sizes"]["rows-2"]["train"]["flops"] == pytest.approx(
        2 * found["sizes"]["rows-1"]["train"]["flops"], rel=0.3
    )
    assert found["time_ratio"] > 0 and found["memory_ratio"] > 0.3 and found["sized_time_ratio"] > 0
