"""Experiment trackers: what a training reports is what it did."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ensemblelora.accounting.meter import Meter
from ensemblelora.cli import main
from ensemblelora.config import TrainingConfig
from ensemblelora.training import fine_tune
from ensemblelora.training.trainer import make_arguments
from tests.tiny import make_adapted, make_learnable_split
from tests.tiny_run import make_inputs, read_json


def test_trackers_are_passed_on_and_none_is_the_usual(tmp_path: Path) -> None:
    adapted = make_adapted()
    for trackers, expected in (((), []), (("tensorboard",), ["tensorboard"])):
        settings = TrainingConfig(report_to=trackers)
        arguments = make_arguments(adapted, settings, 4, seed=0, folder=tmp_path)
        assert arguments.report_to == expected


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that TensorBoard's files hold: steps and values by tag."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in folder.rglob("events.*"):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("is_named", [False, True])
def test_tensorboard_files_hold_every_evaluation(
    is_named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie in the run folder, or where the user says."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    if is_named:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    adapted, names = make_adapted(), ("one", "two")
    settings = TrainingConfig(
        report_to=("tensorboard",), num_train_epochs=2, learning_rate=0.01, max_examples_per_batch=2
    )
    splits = [[make_learnable_split("verbalizer", n=8, split=s)] for s in ("train", "validation")]
    trained = [
        fine_tune(
            adapted, name, *splits, settings, seed=0, checkpoints=tmp_path / "checkpoints" / name, meter=Meter("t")
        )
        for name in names
    ]
    assert ("TENSORBOARD_LOGGING_DIR" in os.environ) == is_named
    found = read_events(tmp_path / ("events" if is_named else "tensorboard"))
    assert any(tag.endswith("/loss") for tag in found) and any("learning_rate" in tag for tag in found)
    for one in trained:
        (tag,) = [tag for tag in found if tag.endswith(f"nll_{one.name}")]
        values = dict(found[tag])
        assert values == {e["step"]: pytest.approx(e["validation_nll"]) for e in one.history}


@pytest.mark.slow
def test_a_run_hands_over_what_each_of_its_adapters_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    recipe = make_inputs(tmp_path)
    assert main(["train", str(recipe), "--set", "training.report_to=[tensorboard]", "--quiet"]) == 0
    for name in ("group-0", "group-1"):
        history = read_json(tmp_path, f"adapters/{name}/training.json")["history"]
        found = read_events(tmp_path / "run" / "tensorboard" / name)
        (tag,) = [tag for tag in found if tag.endswith(f"nll_{name}")]
        assert dict(found[tag]) == {e["step"]: pytest.approx(e["validation_nll"]) for e in history}
        assert any(tag.endswith("/loss") for tag in found)
