"""What the report and the plan say of the features that predictions were made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ensemblelora import pipeline
from ensemblelora.artifacts import FEATURE_HEALTH_FILE, write_json
from ensemblelora.errors import StoreError
from ensemblelora.gradients import collect
from ensemblelora.report import write_report
from ensemblelora.report.feature_record import FeatureRecord, describe_features
from ensemblelora.stages.choosing import _list_distortion
from tests.report_runs import make_planned_run, make_run
from tests.tiny_run import copy_run, finished_run, read_config, read_json

HEALTH = {"n_coordinates": 48384, "proj_dim": 400, "form": "projected", "projection_error": 0.0341, "batch_error": 0.0}


def report_of(run: Path, **changes: object) -> str:
    write_json(run / FEATURE_HEALTH_FILE, HEALTH | changes)
    write_report(run)
    return (run / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("make", [make_run, make_planned_run])
def test_the_measured_distortion_stands_beside_the_linearity(make, tmp_path: Path) -> None:
    section = report_of(make(tmp_path)).partition("## Does the linear model hold")[2].partition("\n## ")[0]
    assert "Gradients of 48,384 numbers were projected to 400 at random." in section
    assert "off by 3.4% of their lengths" in section and "to 400 numbers is expected to be off by 3.4%" in section
    assert ("R²" in section) == (make is make_run)


def test_a_run_without_the_record_is_reported_without_it(tmp_path: Path) -> None:
    run = make_planned_run(tmp_path)
    write_report(run)
    assert "linear model hold" not in (run / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"form": "gram", "proj_dim": 1234, "projection_error": 2e-8}, "in 1,234 numbers each. They are off by 0.0%"),
        ({"form": "gram", "projection_error": None}, "all inner products were kept, in 400 numbers each."),
        ({"form": "coordinates"}, "The predictions were made from all 48,384 numbers of each gradient."),
        ({"projection_error": None}, "Gradients of 48,384 numbers were projected to 400 at random."),
        ({"proj_dim": 100, "projection_error": 0.5}, "off by 50.0% of their lengths' product in the median; a random "
         "projection to 100 numbers is expected to be off by 6.7%."),
    ],
)  # fmt: skip
def test_every_form_has_its_words(changes: dict[str, object], told: str) -> None:
    assert told in describe_features(FeatureRecord.model_validate(HEALTH | changes))


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"feature_health\.json: proj_dim: got 'many'"):
        report_of(make_run(tmp_path), proj_dim="many")


@pytest.mark.parametrize(("error", "n_warnings"), [(None, 0), (0.034, 0), (0.149, 0), (0.151, 1)])
def test_what_no_projection_can_do_is_a_warning(error: float | None, n_warnings: int) -> None:
    found = list(_list_distortion(HEALTH | {"projection_error": error}))
    assert len(found) == n_warnings
    assert all("off by 15.1% of the norms in the median, more than 3/sqrt(400) allows" in line for line in found)


def test_a_run_with_wrong_features_says_so_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, real = copy_run(tmp_path), collect.check_health
    monkeypatch.setattr(collect, "check_health", lambda *a: replace(real(*a), projection_error=0.9))
    pipeline.run(read_config(recipe, gradients={"proj_dim": 16}), until="group")
    assert read_json(tmp_path, "plan.json")["warnings"][0].startswith("Inner products of the 16 numbers")
    assert not any("Inner products" in line for line in read_json(finished_run(), "plan.json")["warnings"])
