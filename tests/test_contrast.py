"""Two runs side by side: differences row by row against the definition, and what is said where rows are missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from ensemblelora.artifacts import read_json, write_json
from ensemblelora.cli import main
from ensemblelora.contrast.measure import contrast_runs
from ensemblelora.contrast.page import compose_page, write_contrast, write_headline
from ensemblelora.errors import StoreError, UsageError
from ensemblelora.evaluation.metrics import compare_paired, compare_paired_tasks
from ensemblelora.evaluation.rows import TaskRows, read_rows, save_rows
from tests.report_runs import TASKS, make_planned_run, make_run
from tests.test_report import Page

METHODS = ("base", "shared", "ensemble")


def draw_rows(seed: int, *, n: int = 30, skip: int = 0, shift: float = 0.0) -> dict[str, TaskRows]:
    """Scores of test rows ``skip`` to ``n``; the same row has the same label and group whatever the seed."""
    rng = np.random.default_rng(seed)
    tasks = {}
    for place, name in enumerate(TASKS):
        ids = tuple(f"test:{i}" for i in range(skip, n))
        numbers = np.arange(skip, n)
        values = {
            method: {
                "nll": rng.gamma(2.0, 0.3, len(ids)) + shift,
                "accuracy": (rng.random(len(ids)) < 0.6).astype(np.float64),
            }
            for method in METHODS
        }
        tasks[name] = TaskRows(ids, (numbers + place) % 2, numbers // 2, values)
    return tasks


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    folders = (make_run(tmp_path / "first"), make_run(tmp_path / "second"))
    for seed, folder in enumerate(folders):
        save_rows(folder / "test_rows.npz", draw_rows(seed))
    return folders


def edit_config(folder: Path, **changes) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    (folder / "config.yaml").write_text(yaml.safe_dump(config | changes), encoding="utf-8")


class TestRows:
    def test_what_is_saved_is_read_back(self, tmp_path):
        rows = draw_rows(3)
        rows["boolq"] = TaskRows(("a",), np.array([0]), np.array([0]), {"base": {"nll": np.array([1.5])}})
        save_rows(tmp_path / "rows.npz", rows)
        found = read_rows(tmp_path / "rows.npz")
        assert list(found) == list(TASKS)
        for name, own in rows.items():
            assert found[name].ids == own.ids
            np.testing.assert_array_equal(found[name].labels, own.labels)
            np.testing.assert_array_equal(found[name].groups, own.groups)
            assert {m: set(v) for m, v in found[name].values.items()} == {m: set(v) for m, v in own.values.items()}
            for method, metrics in own.values.items():
                for metric, values in metrics.items():
                    np.testing.assert_array_equal(found[name].values[method][metric], values)

    def test_a_damaged_file_is_named(self, tmp_path):
        np.savez(tmp_path / "rows.npz", tasks=np.array(["a"]), metrics=np.array(["nll"]))
        with pytest.raises(StoreError, match=r"rows\.npz: no scores of test rows"):
            read_rows(tmp_path / "rows.npz")


class TestPairedRows:
    @pytest.mark.parametrize("metric", ["nll", "accuracy"])
    def test_differences_are_those_of_one_row_at_a_time(self, runs, metric):
        *_, found = contrast_runs(*runs)
        a, b = (read_rows(folder / "test_rows.npz") for folder in runs)
        for task in TASKS:
            pairs = [
                b[task].values["ensemble"][metric][j] - a[task].values["ensemble"][metric][i]
                for i, name in enumerate(a[task].ids)
                for j, other in enumerate(b[task].ids)
                if name == other
            ]
            score = found.find("ensemble", metric, task)
            assert score.difference == pytest.approx(np.mean(pairs)) and score.n_rows == len(pairs) == 30
            assert score.b - score.a == pytest.approx(score.difference), "columns and difference are of the same rows"
            slow = compare_paired(pairs, np.zeros(30), a[task].groups, n_bootstrap=2000, seed=0)
            assert (score.low, score.high) == pytest.approx((slow.low, slow.high))
        mean = found.find("ensemble", metric)
        assert mean.difference == pytest.approx(np.mean([found.find("ensemble", metric, t).difference for t in TASKS]))

    def test_only_rows_of_the_same_name_and_label_are_compared(self, runs):
        rows = draw_rows(1, n=40, skip=10)
        rows["cb"] = TaskRows(rows["cb"].ids, 1 - rows["cb"].labels, rows["cb"].groups, rows["cb"].values)
        save_rows(runs[1] / "test_rows.npz", rows)
        *_, found = contrast_runs(*runs)
        assert found.find("ensemble", "nll", "boolq").n_rows == 20
        assert not found.find("ensemble", "nll", "cb").is_paired, "other labels are other rows"

    def test_turned_round_the_signs_turn(self, runs):
        forth, back = (contrast_runs(*order)[2] for order in (runs, runs[::-1]))
        for score in forth.scores:
            turned = back.find(score.method, score.metric, score.task)
            assert turned.difference == pytest.approx(-score.difference)
            assert (turned.a, turned.b) == (score.b, score.a)

    def test_a_run_against_its_copy_shows_no_difference(self, tmp_path):
        folders = [make_run(tmp_path / name) for name in "ab"]
        for folder in folders:
            save_rows(folder / "test_rows.npz", draw_rows(0))
        *_, found = contrast_runs(*folders)
        assert {score.difference for score in found.scores} == {0.0}
        assert not found.settings and found.share_alike == 1.0 and found.affinity_correlation == pytest.approx(1.0)
        assert "no difference shown" in write_headline(found)

    def test_a_clear_difference_is_told_with_its_direction(self, runs):
        save_rows(runs[1] / "test_rows.npz", draw_rows(0, shift=1.0))
        *_, found = contrast_runs(*runs)
        page = Page(write_contrast(*runs)[0].read_text(encoding="utf-8"))
        score = found.find("ensemble", "nll")
        assert score.low > 0.9 and "worse" in page.text


class TestWithoutRows:
    def test_intervals_are_those_of_unrelated_samples(self, runs):
        (runs[0] / "test_rows.npz").unlink()
        a, b, found = contrast_runs(*runs)
        halves = []
        for task in TASKS:
            score = found.find("ensemble", "accuracy", task)
            own = [run.results.methods["ensemble"].per_task[task] for run in (a, b)]
            half = np.hypot(*[(one.accuracy_high - one.accuracy_low) / 2 for one in own])
            assert (score.low, score.high) == pytest.approx((score.difference - half, score.difference + half))
            assert score.difference == pytest.approx(own[1].accuracy - own[0].accuracy) and score.n_rows == 0
            halves.append(half)
        mean = found.find("ensemble", "accuracy")
        assert (mean.high - mean.low) / 2 == pytest.approx(np.sqrt(np.sum(np.square(halves))) / len(TASKS))
        assert "rows not paired" in write_headline(found)

    def test_plans_alone_are_compared_as_plans(self, tmp_path):
        folders = [make_planned_run(tmp_path / name) for name in "ab"]
        path, found = write_contrast(*folders)
        assert not found.scores
        names = [section["id"] for section in Page(path.read_text(encoding="utf-8")).all("section")]
        assert names == ["settings", "groups", "limits", "again"]


class TestWhatDiffers:
    def test_settings_and_versions_are_named_and_places_are_not(self, runs):
        edit_config(runs[1], seed=7, out="elsewhere")
        environment = read_json(runs[1] / "environment.json")
        write_json(runs[1] / "environment.json", environment | {"torch": "9.9", "created": "later"})
        *_, found = contrast_runs(*runs)
        assert [(one.name, one.a, one.b) for one in found.settings] == [("seed", "0", "7"), ("torch", "2.13.0", "9.9")]

    def test_pairs_are_alike_where_both_plans_join_or_part_them(self, runs):
        plan = read_json(runs[1] / "plan.json")
        write_json(runs[1] / "plan.json", plan | {"groups": [[i] for i in range(10)]})
        for name in ("ensemble", "results"):
            (runs[1] / f"{name}.json").unlink()
        *_, found = contrast_runs(*runs)
        together = 6 + 3 + 3  # pairs inside groups of 4, 3 and 3
        assert found.share_alike == pytest.approx(1 - together / 45)

    def test_tasks_that_one_run_alone_has_are_left_out_and_named(self, tmp_path):
        other = tuple(name if name != "copa" else "a new one" for name in TASKS)
        folders = (make_run(tmp_path / "a"), make_run(tmp_path / "b", other))
        *_, found = contrast_runs(*folders)
        assert found.only == (("copa",), ("a new one",)) and len(found.tasks) == 9
        assert found.find("ensemble", "accuracy", "copa") is None
        text = Page(write_contrast(*folders)[0].read_text(encoding="utf-8")).text
        assert "Only a has copa" in text and "Only b has a new one" in text

    def test_names_tell_runs_of_the_same_name_apart(self, tmp_path):
        folders = [make_planned_run(tmp_path / place / "run") for place in ("x", "y")]
        assert contrast_runs(*folders)[2].names == ("x/run", "y/run")

    @pytest.mark.parametrize("kind", ["same", "strangers", "empty"])
    def test_what_can_not_be_compared_is_said(self, kind, tmp_path):
        first = make_planned_run(tmp_path / "a")
        (tmp_path / "empty").mkdir()
        second = {
            "same": first,
            "strangers": make_planned_run(tmp_path / "b", tuple(f"{name}-2" for name in TASKS)),
            "empty": tmp_path / "empty",
        }[kind]
        told = {"same": "the same run twice", "strangers": "no task in common", "empty": "no plan.json"}[kind]
        with pytest.raises(UsageError, match=told):
            contrast_runs(first, second)


class TestCommand:
    def test_writes_three_files_beside_the_first_run(self, runs, capsys):
        assert main(["report", str(runs[0]), str(runs[1] / "config.yaml")]) == 0
        shown = capsys.readouterr().out
        folder = runs[0].parent / "first-against-second"
        assert {path.name for path in folder.iterdir()} == {"contrast.html", "contrast.md", "contrast.json"}
        assert shown.splitlines()[-1] == str(folder / "contrast.html") and "ensemble, accuracy" in shown
        assert json.loads((folder / "contrast.json").read_text(encoding="utf-8"))["names"] == ["first", "second"]

    def test_json_and_out(self, runs, tmp_path, capsys):
        assert main(["report", *map(str, runs), "--json", "--out", str(tmp_path / "x")]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["page"] == str(tmp_path / "x" / "contrast.html") and len(shown["scores"]) == 6 * 11

    def test_a_folder_that_is_none(self, runs, capsys):
        assert main(["report", str(runs[0]), "nowhere"]) == 2
        assert "nowhere: no run folder" in capsys.readouterr().err


def test_the_page_is_whole_and_escapes_names(tmp_path):
    evil = tuple(f"<script>alert({i})</script>" for i in range(10))
    folders = tuple(make_run(tmp_path / name, evil) for name in "ab")
    a, b, found = contrast_runs(*folders)
    path, _ = write_contrast(*folders)
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.all("script")) == 3 and evil[0] in page.text
    names = [section["id"] for section in page.all("section")]
    assert names == ["settings", "means", "tasks", "groups", "costs", "limits", "again"]
    assert compose_page((a, b), found, folders).headline in page.texts["h1"][0]


def test_means_of_paired_rows_draw_tasks_as_the_evaluation_does(runs):
    *_, found = contrast_runs(*runs)
    a, b = (read_rows(folder / "test_rows.npz") for folder in runs)
    values = [[one[task].values["ensemble"]["nll"] for task in TASKS] for one in (b, a)]
    slow = compare_paired_tasks(*values, [a[task].groups for task in TASKS], n_bootstrap=2000, seed=0)
    score = found.find("ensemble", "nll")
    assert (score.difference, score.low, score.high) == pytest.approx((slow.difference, slow.low, slow.high))
