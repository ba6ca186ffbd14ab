"""What the benchmark of the analyses makes of them on a tiny model, and what the page makes of its records."""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ensemblelora.analysis.record import RESULT_FILE, find_result, read_result
from ensemblelora.artifacts import write_json
from ensemblelora.comparison.pool import Pool
from ensemblelora.config import dump_config
from ensemblelora.errors import StoreError, UsageError
from ensemblelora.reproduction.tables import reproduce
from measured import render_measured
from tests.tiny_run import make_inputs, read_config

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = ("family0_task0", "family1_task0", "family1_task1")
TINY = {
    "linearization": ("n_subsets=2", "subset_size=1", "max_rows=2", "reduction=4", "distances=[0.0005, 0.0025, 5.0]"),
    "transfer": ("shortest=true", "pair_seeds=1", "n_adapters=[1, 2]"),
    "sharpness": ("tasks=[family0_task0]", "targets=[family0_task0:family1_task0]", "ensemble_sizes=[1, 2]",
                  "total_rank=4", "n_examples=2", "weight_coordinates=false"),
    "similarity": ("base_methods=[lora]", "n_subsets=1"),
}  # fmt: skip
STEPS = {
    "linearization": (("base_methods=[]", "ranks=[]", "epochs=[]"), ("base_methods=[]", "ranks=[2]", "epochs=[]")),
    "transfer": (("pairs=0", "methods=[]"), ("pairs=2", "methods=[mtl-ft]")),
    "sharpness": (("parts=[rank]", "ranks=[4]", "scalings=[fixed]"), ("parts=[ensemble]",)),
    "similarity": (("sizes=[3]",), ("sizes=[2, 3]",)),
}
TITLES = {
    "linearization": "The first-order expansion",
    "transfer": "Who helps whom",
    "sharpness": "Sharpness and the generalisation gap",
    "similarity": "How alike adapters are",
}


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    """The script, which finds its neighbours as it does when it is run, with steps for a tiny model."""
    sys.path.insert(0, str(FOLDER))
    script = importlib.import_module("analysis")
    yield script
    sys.path.remove(str(FOLDER))
    for name in ("analysis", "common"):
        sys.modules.pop(name)


@pytest.fixture
def script(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Steps for a tiny model; records are kept elsewhere."""
    studies = {}
    for name, study in module.STUDIES.items():
        steps = tuple(module.Step(f"step {place}", options) for place, options in enumerate(STEPS[name]))
        studies[name] = replace(study, options=TINY[name], steps=steps)
    studies["transfer"] = replace(
        studies["transfer"], steps=(studies["transfer"].steps[0], replace(studies["transfer"].steps[1], n_seeds=2))
    )
    monkeypatch.setattr(module, "STUDIES", studies)
    monkeypatch.setattr(sys.modules["common"], "RESULTS", tmp_path / "results")
    return module


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks with few rows."""
    folder = tmp_path_factory.mktemp("inputs")
    full = make_inputs(folder)
    cards = [str(folder / "tasks" / f"{name}.yaml") for name in NAMES]
    config = read_config(full, data={"tasks": cards, "max_train_examples": 8}, out=str(folder / "run"))
    (folder / "few.yaml").write_text(dump_config(config), encoding="utf-8")
    return folder / "few.yaml"


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["analysis.py", *map(str, arguments)])
    script.main()


def read(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / "results" / f"analysis-{name}.json").read_text(encoding="utf-8")))


def test_every_step_of_every_study_can_be_asked_for(module: ModuleType, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    monkeypatch.setattr(sys, "argv", ["analysis.py", "--out", str(tmp_path)])
    arguments = module.read_arguments()
    for name, study in module.STUDIES.items():
        asked = [module.ask(name, step, arguments) for step in study.steps]
        assert len({(str(one.options), one.seeds) for one in asked}) == len(study.steps) > 2
        assert module.write_command(name, asked[-1], arguments).startswith(f"ensemblelora analyze {name} recipes/")
        assert module.count_finished(name, arguments) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_records_are_kept_rendered_and_reproduced(script, recipe, tmp_path: Path, monkeypatch) -> None:
    run(script, monkeypatch, "all", "--recipe", recipe, "--out", tmp_path / "home")
    records = {name: read(tmp_path, name) for name in STEPS}
    for record in records.values():
        assert record["is_whole"] and record["steps_done"] == ["step 0", "step 1"] and not record["steps_left"]
        assert record["n_fine_tunings"] > 0 < record["flops"] and record["seconds"] > 0 and record["commit"]
        assert record["config"]["threads"] == 1 and record["versions"]["torch"]
        assert "out" not in record["outcome"]["config"] and str(tmp_path) not in json.dumps(record["config"])
    assert set(records["linearization"]["exhibits"]) == {"table2", "table5", "figure2"}

    page = "\n".join(render_measured({f"analysis-{name}": record for name, record in records.items()}))
    assert all(f"## {title}" in page for title in TITLES.values()) and "None" not in page and "nan" not in page
    assert "| lora, r 4, 2 epochs |" in page and "| lora | pairs |" in page and "with one seed" not in page
    assert "| 2 x rank 2 | family0_task0 |" in page and "Beside the paper:" in page and "Partial" not in page
    assert "| 500.00% |" in page and "| below -1 |" in page and "the paper has 38%; ours" in page
    assert max(len(line) for line in page.splitlines() if not line.startswith(("|", "`"))) <= 120

    for name, exhibit in (("linearization", "table5"), ("transfer", "sectionB.6"), ("sharpness", "figure6"),
                          ("similarity", "figure12")):  # fmt: skip
        path = tmp_path / "results" / f"analysis-{name}.json"
        assert len(reproduce(exhibit, [path]).rows) == len(reproduce(exhibit, [tmp_path / "home"]).rows) > 0
    with pytest.raises(StoreError, match="no result of analysis transfer"):
        reproduce("figure11", [tmp_path / "results" / "analysis-similarity.json"])


@pytest.mark.slow
def test_out_of_time_leaves_what_is_finished_and_goes_on(script, recipe, tmp_path: Path, monkeypatch, capsys) -> None:
    real, given = Pool.train, ("similarity", "--recipe", recipe, "--out", tmp_path / "home")

    def stop(self: Pool, tasks: Any, **how: Any) -> Any:
        if len(tasks) == 2:
            raise script.OutOfTime
        return real(self, tasks, **how)

    monkeypatch.setattr(Pool, "train", stop)
    run(script, monkeypatch, *given, "--minutes", "9")
    record = read(tmp_path, "similarity")
    assert not record["is_whole"] and record["steps_left"] == ["step 1"]
    assert "1 of 2 steps are finished" in capsys.readouterr().err
    page = "\n".join(render_measured({"analysis-similarity": record}))
    assert "Partial, not measured yet: step 1." in page

    monkeypatch.setattr(Pool, "train", real)
    carry_out, asked = script.carry_out, []
    monkeypatch.setattr(script, "carry_out", lambda *request: asked.append(request) or carry_out(*request))
    run(script, monkeypatch, *given)
    assert len(asked) == 1 and read(tmp_path, "similarity")["is_whole"]
    run(script, monkeypatch, *given)
    assert len(asked) == 1, "nothing is left"
    monkeypatch.setattr(Pool, "train", stop)
    with pytest.raises(SystemExit, match="nothing was finished in time"):
        run(script, monkeypatch, *given[:3], "--out", tmp_path / "other", "--with", "sizes=[2]", "--minutes", "9")


def test_minutes_end_what_runs_and_leave_signals_as_they_were(script: ModuleType) -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(KeyboardInterrupt), script.ending_at(time.monotonic() + 0.01):
        time.sleep(5)
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    with script.ending_at(None):
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_values_are_written_short(script: ModuleType) -> None:
    assert script.shorten({"a": [1.23456789, 2, True], "b": (None,)}) == {"a": [1.23457, 2, True], "b": [None]}
    assert script.write_value(["quantised bottleneck", 2, True]) == "[quantised bottleneck, 2, true]"


def test_a_record_stands_for_a_folder(tmp_path: Path) -> None:
    outcome = {"analysis": "similarity", "costs": {}}
    write_json(tmp_path / "similarity" / RESULT_FILE, outcome)
    write_json(tmp_path / "record.json", {"outcome": outcome})
    write_json(tmp_path / "other.json", {"loss": 1})
    places = (tmp_path, tmp_path / "similarity", tmp_path / "record.json")
    assert [read_result(place, "similarity") for place in places] == [outcome] * 3
    assert find_result(tmp_path, "transfer") is None
    with pytest.raises(UsageError, match="no result of analysis transfer"):
        read_result(tmp_path, "transfer")
    with pytest.raises(StoreError, match="no result of analysis similarity"):
        read_result(tmp_path / "other.json", "similarity")
