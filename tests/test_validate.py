"""True fine-tunings: what is measured, what is kept when it is broken off, and what they are compared with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ensemblelora import artifacts, pipeline, stages
from ensemblelora.cli import main
from ensemblelora.config import load_config
from ensemblelora.errors import StoreError, UsageError
from ensemblelora.prediction import member_nll, predict_members
from ensemblelora.reproduction.expansion import measure_expansion
from ensemblelora.reproduction.tables import reproduce
from ensemblelora.training import fine_tune
from ensemblelora.validation import truth
from ensemblelora.validation.records import TrueRun, append_run, read_all_runs, read_runs
from ensemblelora.validation.truth import choose_subsets
from ensemblelora.validation.validate import VALIDATION_FILE, validate_run
from ensemblelora.validation_forecast import forecast_validation
from tests.tiny_run import TASKS, copy_run

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own


def make_record(identity: str, **changes) -> TrueRun:
    values = {
        "tasks": ("a", "b"),
        "seed": 0,
        "nll": {"a": [0.5, 0.25], "b": [1.0]},
        "correct": {"a": [1, 0], "b": []},
        "chance": {"a": 0.5},
        "n_steps": 4,
        "best_step": 2,
        "distance": 0.1,
        "relative_distance": 0.001,
        "flops": 10,
        "seconds": 1.5,
    }
    return TrueRun(identity=identity, **values | changes)


def test_records_come_back_and_an_unfinished_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "new" / "truth.jsonl"
    runs = [make_record(name) for name in ("one", "two", "three")]
    for run in runs:
        append_run(path, run)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"identity": "fo')
    assert read_runs(path, ["three", "one", "elsewhere"]) == {"one": runs[0], "three": runs[2]}
    assert path.read_bytes() == whole
    assert read_runs(tmp_path / "none.jsonl", ["one"]) == {}


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"identity": "x"}', '{"identity": "x", "tasks": 3}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "truth.jsonl"
    append_run(path, make_record("one"))
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(StoreError, match=r"truth\.jsonl line 2: no measured run"):
        read_runs(path, ["one"])


@pytest.mark.parametrize(("n_tasks", "n_subsets", "size"), [(10, 50, 3), (5, 8, 2), (3, 40, 2), (4, 1, 3), (2, 9, 1)])
def test_subsets_are_distinct_balanced_and_only_grow(n_tasks: int, n_subsets: int, size: int) -> None:
    found = choose_subsets(n_tasks, n_subsets, size, seed=1)
    assert found[0] == tuple(range(n_tasks)) and found[1 : n_tasks + 1] == tuple((i,) for i in range(n_tasks))
    assert len(set(found)) == len(found) <= max(n_subsets, n_tasks + 1)
    others = found[n_tasks + 1 :]
    assert all(len(subset) == size and subset == tuple(sorted(set(subset))) for subset in others)
    counts = np.bincount([i for subset in others for i in subset], minlength=n_tasks)
    if len(others) >= 10:
        assert counts.max() - counts.min() <= max(3, 0.3 * counts.mean())
    assert choose_subsets(n_tasks, n_subsets + 5, size, seed=1)[: len(found)] == found


def test_the_last_subsets_are_found_where_there_are_few() -> None:
    assert len(choose_subsets(4, 100, 2, seed=0)) == 1 + 4 + 6


def make_run(folder: Path) -> Path:
    """A planned run without free text, whose fine-tunings take moments."""
    copy_run(folder)
    return folder / "run"


@pytest.mark.slow
def test_truth_is_what_fine_tuning_alone_gives_and_a_stopped_validation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    measured: list[tuple[int, ...]] = []
    measure = truth._measure

    def stop_at_third(bench, identity, subset, *rest):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(subset)
        return measure(bench, identity, subset, *rest)

    monkeypatch.setattr(truth, "_measure", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        validate_run(run, n_subsets=8)
    lines = (run / "validation" / "truth.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 2, "the base model and what was finished"
    assert not (run / "validation" / VALIDATION_FILE).exists()

    monkeypatch.setattr(truth, "_measure", lambda *rest: measured.append(rest[2]) or measure(*rest))
    found = validate_run(run, n_subsets=8)
    assert len(measured) == 8 == len(set(measured)) == found.n_true_runs
    assert found.tasks == TASKS and set(found.subsets) >= {(name,) for name in TASKS}

    config = load_config(run / artifacts.CONFIG_FILE)
    _, rows, probe = stages.prepare(config)
    records = [json.loads(line) for line in (run / "validation" / "truth.jsonl").read_text().splitlines()]
    record = next(r for r in records if r["tasks"] == [TASKS[0]])
    wanted = truth.plan_measurements([(0,)], 1, rows, stages.identify_start(config, probe), config)
    assert record["identity"] in wanted
    seed = truth.seed_for(config.seed, "validation", "0", "0")
    fine_tune(
        probe,
        "validated",
        rows.train[:1],
        rows.validation[:1],
        config.training,
        seed=seed,
        checkpoints=tmp_path / "scratch",
        meter=truth.Meter("train"),
    )
    scores = predict_members(probe, rows.validation[0], ["validated"], max_tokens=4096)
    np.testing.assert_allclose(record["nll"][TASKS[0]], member_nll(scores, rows.validation[0].labels)[0], atol=1e-5)
    assert (run / "validation" / "adapters" / record["identity"][:16] / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_more_seeds_add_and_the_command_shows_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    before = forecast_validation(run, n_subsets=7)
    assert before["true fine-tunings"]["fine_tunings"] == 7 == before["total"]["fine_tunings"]
    assert not (run / "validation").exists(), "a dry run writes nothing"
    assert main(["validate", str(run), "--subsets", "7", "--quiet"]) == 0
    first = capsys.readouterr().out
    assert "predictor" in first and "7 subsets of 5 tasks" in first and "1 seed" in first
    assert main(["validate", str(run), "--subsets", "7", "--seeds", "2", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_true_runs"] == 14 and found["n_seeds"] == 2
    overall = found["comparisons"][0]["nll"]["overall"]
    assert 0 < overall["noise_degrees"] <= overall["n_cells"], "two runs of each cell, tasks at chance left out"
    assert set(found["comparisons"][0]["nll"]["per_task"]) == set(TASKS)
    assert artifacts.read_json(run / "validation" / VALIDATION_FILE)["n_seeds"] == 2
    assert found["costs"]["estimation"] > 0 < found["costs"]["true_runs"]
    assert before["total"]["flops"] == pytest.approx(found["costs"]["true_runs"], rel=0.1), "both of one seed"
    assert main(["validate", str(run), "--subsets", "8", "--seeds", "2", "--dry-run", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["fine_tunings"] == 2, "what was measured is not told of again"


def test_what_can_not_be_validated_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(UsageError, match="0 subsets, 1 seeds: expected 1 or more"):
        validate_run(run, n_subsets=0)
    environment = artifacts.read_json(run / "environment.json")
    environment["model"]["fingerprint"] = "another"
    artifacts.write_json(run / "environment.json", environment)
    with pytest.raises(UsageError, match="made with another version of"):
        validate_run(run, n_subsets=8)
    (run / "oracle.json").unlink()
    with pytest.raises(UsageError, match="no oracle yet; make it with: ensemblelora plan"):
        validate_run(run, n_subsets=8)


@pytest.mark.slow
def test_a_validation_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    before = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    validate_run(run, n_subsets=6)
    shutil.rmtree(run / "validation")
    after = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before
    assert pipeline.read_result(run).results is not None


@pytest.mark.slow
def test_tables_of_the_paper_are_made_from_a_validated_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    with pytest.raises(UsageError, match="not validated yet; measure it with: ensemblelora validate"):
        reproduce("table2", [run])
    validate_run(run, n_subsets=9)
    with pytest.raises(UsageError, match=r"exhibit 'table9': expected one of extension, .*table2, table3, table4"):
        reproduce("table9", [run])
    records = [json.loads(line) for line in (run / "validation" / "truth.jsonl").read_text().splitlines()]
    moved = [record["relative_distance"] for record in records if len(record["tasks"]) == 3]
    (row,) = reproduce("table2", [run]).rows
    assert row["mean"] == pytest.approx(np.mean(moved)) and row["paper Llama-3-8B"] == 0.0012
    (row,) = reproduce("table3", [run]).rows
    found = artifacts.read_json(run / "validation" / VALIDATION_FILE)
    assert row["nll error"] == found["comparisons"][0]["nll"]["by_size"]["3"]["relative_error"]["value"]
    assert row["speed-up"] == pytest.approx(found["costs"]["design"] / found["costs"]["estimation"])
    assert main(["reproduce", "figure2", str(run), "--json", "--quiet"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert 0 < row["RMS relative"] and row["R2 over zero order"] <= 1


@pytest.mark.slow
def test_the_expansion_is_off_by_the_square_of_the_distance(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    validate_run(run, n_subsets=7)
    config = load_config(run / artifacts.CONFIG_FILE)
    runs = [r for r in read_all_runs(run / "validation" / "truth.jsonl") if len(r.tasks) == 3]
    way = runs[0].relative_distance
    near, far = measure_expansion(config, run / "validation", runs, [way / 16, way / 8])
    # The remainder is of second order: twice the distance, four times the error, sixteen times its square.
    assert far.squared_relative / near.squared_relative == pytest.approx(16, rel=0.4)
    assert near.r2_over_zero_order > far.r2_over_zero_order
    assert near.n_adapters == len(runs) == 1
