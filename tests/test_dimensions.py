"""Predictions from other numbers of dimensions: those of a run that had kept so much of its gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ensemblelora import artifacts, pipeline, stages
from ensemblelora.blocks import slice_projections
from ensemblelora.config import RunConfig, load_config
from ensemblelora.estimation import Oracle, TaskFeatures
from ensemblelora.gradients import collect, exact
from ensemblelora.validation import dimensions
from ensemblelora.validation.dimensions import DIMENSIONS, collect_wider, list_predictors
from ensemblelora.validation.validate import VALIDATION_FOLDER, validate_run
from tests.tiny_run import TASKS, copy_run, make_inputs, read_config

SUBSETS = [(0,), (1, 3), (0, 1, 2, 3, 4)]
NAMES = [f"d={d}" for d in DIMENSIONS]


def open_run(folder: Path) -> tuple[Path, Oracle, RunConfig]:
    copy_run(folder)
    config = load_config(folder / "run" / artifacts.CONFIG_FILE)
    return folder / "run", stages.read_oracle(folder / "run", TASKS, config.estimation), config


def collect_all(run: Path, oracle: Oracle, config: RunConfig) -> dict[str, TaskFeatures]:
    return dict(collect_wider(run, run / VALIDATION_FOLDER, oracle, config))


@pytest.mark.slow
def test_every_dimension_is_there_and_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, oracle, config = open_run(tmp_path)
    wider = collect_all(run, oracle, config)
    predictors = dict(list_predictors(oracle, config, wider))
    assert list(predictors) == ["d=24", *NAMES, "exact"]
    assert predictors["d=24"] is oracle and predictors["exact"].budget == oracle.budget
    widths = [predictors[name].replicates[0].train[0].proj_dim for name in NAMES]
    assert widths == list(DIMENSIONS) and not (run / "cache").exists()
    scores = {name: other.score(SUBSETS).nll for name, other in predictors.items()}
    errors = [np.abs(scores[name] - scores["exact"]).mean() for name in ("d=800", "d=100", "d=24")]
    assert errors[0] < errors[2] and errors[1] < errors[2], "the wider, the nearer to whole gradients"
    monkeypatch.setattr(collect, "compute_features", None)  # nothing is taken twice
    again = dict(list_predictors(oracle, config, collect_all(run, oracle, config)))
    np.testing.assert_array_equal(again["exact"].score(SUBSETS).nll, scores["exact"])


@pytest.mark.slow
def test_predictions_are_those_of_a_run_that_kept_as_much(tmp_path: Path) -> None:
    run, oracle, config = open_run(tmp_path / "one")
    predictors = dict(list_predictors(oracle, config, collect_all(run, oracle, config)))
    for name, gradients in (("exact", {"proj_type": "none"}), ("d=800", {"proj_dim": 800})):
        place = tmp_path / name
        place.mkdir()
        other = read_config(make_inputs(place), gradients=gradients)
        pipeline.run(other, until="affinity")
        twin = stages.read_oracle(place / "run", TASKS, other.estimation)
        found, expected = predictors[name].score(SUBSETS), twin.score(SUBSETS)
        np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-6)
        np.testing.assert_array_equal(found.accuracy, expected.accuracy)


def test_what_is_too_large_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, oracle, config = open_run(tmp_path)
    said: list[str] = []
    monkeypatch.setattr(dimensions, "note", said.append)
    monkeypatch.setattr(exact, "MAX_GRAM_ROWS", 10)
    monkeypatch.setattr(exact, "MAX_PROJ_DIM", 10)
    wider = collect_all(run, oracle, config)
    assert list(wider) == ["projected"]
    (line,) = said
    assert line.startswith("predictions from exact gradients are left out: gradients.proj_type none: 140 rows")


def test_without_gradients_taken_anew_only_narrower_ones_are_there(tmp_path: Path) -> None:
    _, oracle, config = open_run(tmp_path)
    assert [name for name, _ in list_predictors(oracle, config)] == ["d=24"]
    wide = replace(oracle, replicates=tuple(map(repeat_columns, oracle.replicates)), _memories=())
    found = dict(list_predictors(wide, config))
    assert list(found) == ["d=240", "d=200", "d=100"]
    (features,) = found["d=100"].replicates
    expected = slice_projections(wide.replicates[0].validation[1], 100)
    np.testing.assert_array_equal(features.validation[1].features, expected.features)
    sparse = config.model_copy(update={"gradients": config.gradients.model_copy(update={"proj_type": "sjlt"})})
    assert [name for name, _ in list_predictors(wide, sparse)] == ["d=240"], "its columns are no projection"


def repeat_columns(features: TaskFeatures) -> TaskFeatures:
    """Ten times as many columns."""
    train, validation = (
        tuple(replace(block, features=np.tile(block.features, (1, 1, 10))) for block in blocks)
        for blocks in (features.train, features.validation)
    )
    return TaskFeatures(train, validation)


@pytest.mark.slow
def test_a_validation_compares_every_dimension(tmp_path: Path) -> None:
    run, _, _ = open_run(tmp_path)
    found = validate_run(run, n_subsets=6, all_dimensions=True)
    assert [entry.predictor for entry in found.comparisons] == ["d=24", *NAMES, "exact"]
    assert len({entry.nll.overall.relative_error.value for entry in found.comparisons}) == 6
