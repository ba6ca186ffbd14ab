"""What a report says of what came out: on the same rows, and plainly where the plan was wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ensemblelora.artifacts import ENSEMBLE_FILE, PLAN_FILE, RESULTS_FILE, read_json, write_json
from ensemblelora.contrast.measure import contrast_runs
from ensemblelora.contrast.page import compose_page, write_headline
from ensemblelora.evaluation.rows import save_rows
from ensemblelora.report.build import compose_document, render_markdown
from ensemblelora.report.document import FigureRow, Text
from ensemblelora.report.headline import write_headline as write_run_headline
from ensemblelora.report.reading import load_record
from ensemblelora.report.result_sections import list_warnings
from ensemblelora.summary import summarize
from tests.report_runs import make_planned_run, make_run
from tests.test_contrast import draw_rows

WORSE = {"a": "ensemble", "b": "shared", "metric": "nll", "difference": 0.117, "low": 0.02, "high": 0.21}


EVEN = {"a": "ensemble", "b": "shared", "metric": "accuracy", "difference": 0.01, "low": -0.02, "high": 0.04}


def change(folder: Path, name: str, **values: Any) -> None:
    write_json(folder / name, read_json(folder / name) | values)


def figure_of(folder: Path, name: str) -> dict[str, Any]:
    sections = compose_document(load_record(folder)).sections
    rows = [block for section in sections for block in section.blocks if isinstance(block, FigureRow)]
    return next(figure.spec for row in rows for figure in row.figures if figure.name == name)


def test_a_change_from_the_base_model_is_taken_on_the_rows_that_measured_it(tmp_path: Path) -> None:
    make_run(tmp_path)
    points = read_json(tmp_path / RESULTS_FILE)["predicted_vs_measured"]
    drawn = {
        name: (x, y)
        for trace in figure_of(tmp_path, "predicted-change")["data"]
        for name, x, y in zip(trace.get("text", ()), trace["x"], trace["y"], strict=False)
    }
    for point in points:
        assert point["base_nll"] != point["measured_base_nll"]
        x, y = drawn[point["task"]]
        assert x == pytest.approx(point["predicted_nll"] - point["base_nll"], abs=1e-4)
        assert y == pytest.approx(point["measured_nll"] - point["measured_base_nll"], abs=1e-4)


def test_where_one_adapter_was_better_it_is_said_with_what_was_predicted_and_what_to_do(tmp_path: Path) -> None:
    make_run(tmp_path)
    change(tmp_path, RESULTS_FILE, differences=[EVEN, WORSE])
    record = load_record(tmp_path)
    told = write_run_headline(record)
    assert "made mean test loss worse by 0.117 against one adapter for all (95% interval 0.020 to 0.210)" in told
    chosen = next(point for point in record.plan.curve if point.n_groups == len(record.plan.groups))
    first = list_warnings(record)[0]
    assert first.startswith("One adapter for all has the lower test loss here, by 0.117: the plan predicted the opposi")
    assert f"({chosen.gain:.3f}"[:5] in first and first.endswith("--set grouping.n_groups=1 trains one.")
    for harmless in (WORSE | {"low": -0.01}, WORSE | {"difference": -0.1, "low": -0.2, "high": -0.05}):
        change(tmp_path, RESULTS_FILE, differences=[harmless])
        assert "One adapter for all has" not in " ".join(list_warnings(load_record(tmp_path)))
    change(tmp_path, RESULTS_FILE, differences=[WORSE])
    change(tmp_path, PLAN_FILE, groups=[list(range(10))], decision="one adapter")
    (tmp_path / ENSEMBLE_FILE).unlink()
    assert "One adapter for all has" not in " ".join(list_warnings(load_record(tmp_path)))


def test_tasks_that_could_be_routed_and_are_not_come_with_the_setting(tmp_path: Path) -> None:
    make_run(tmp_path)
    ensemble = read_json(tmp_path / ENSEMBLE_FILE)
    mixed = [[0.9, 0.05, 0.05] for _ in ensemble["weights"]]
    whole = [[1.0, 0.0, 0.0] for _ in ensemble["weights"]]
    for weights, is_advised in ((mixed, True), (whole, False)):
        change(tmp_path, ENSEMBLE_FILE, weights=weights, routed=[True] * len(weights))
        page = render_markdown(compose_document(load_record(tmp_path)))
        assert ("--set ensemble.route=true" in page) is is_advised


def test_pictures_of_affinities_say_so_where_the_groups_are_not_from_them(tmp_path: Path) -> None:
    make_run(tmp_path)
    plain = render_markdown(compose_document(load_record(tmp_path)))
    assert "found by gradient cosine" not in plain and "inside the groups and" in plain
    change(tmp_path, PLAN_FILE, reason="3 groups by gradient cosine: predicted mean validation loss 0.5 nats.")
    record = load_record(tmp_path)
    page = render_markdown(compose_document(record))
    assert "These groups were found by gradient cosine" in page, "beside the circle"
    assert "The plan's groups were found by gradient cosine, all others from the affinities." in page, "and the curve"
    assert "inside the groups and" not in page, "an average over groups that were found otherwise says nothing"
    assert "how much alike two tasks' mean gradients at the base model point" in page.partition("## Words")[2]
    chosen = next(line for line in page.splitlines() if line.startswith("|") and "the plan" in line and "MB" in line)
    assert "\u2013" in chosen, "the gap to the bound is of affinity's clusters"


def test_what_is_wrong_with_the_rows_is_told_with_the_results(tmp_path: Path) -> None:
    make_run(tmp_path)
    assert "3 texts of 'rte' are <b>odd</b>." in list_warnings(load_record(tmp_path))
    assert r"are \<b\>odd\</b\>." in render_markdown(compose_document(load_record(tmp_path)))


def test_every_screen_names_the_next_command(tmp_path: Path) -> None:
    for make, command in ((make_planned_run, "run"), (make_run, "predict")):
        folder = tmp_path / command
        make(folder)
        screen = Console(width=200, file=io.StringIO(), record=True)
        for part in summarize(folder, size=(200, 80)):
            screen.print(part)
        last = screen.export_text().splitlines()[-1]
        assert last.startswith(f"next: ensemblelora {command} {folder}")
        named = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["task_names"][0]
        assert (f"--task {named} --text ..." in last) == (command == "predict")


def test_two_runs_that_differ_in_loss_alone_are_told_apart(tmp_path: Path) -> None:
    for name, shift in (("a", 0.0), ("b", 0.3)):
        make_run(tmp_path / name)
        save_rows(tmp_path / name / "test_rows.npz", draw_rows(1, shift=shift))
    found = contrast_runs(tmp_path / "a", tmp_path / "b")[2]
    told = write_headline(found)
    assert "in mean test accuracy: no difference shown; +0.300 nats (95% interval" in told
    assert told.endswith("in mean test loss: A is better.")


def test_the_chart_of_two_runs_is_in_points(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        make_run(tmp_path / name)
        save_rows(tmp_path / name / "test_rows.npz", draw_rows(seed))
    a, b, found = contrast_runs(tmp_path / "a", tmp_path / "b")
    page = compose_page((a, b), found, (tmp_path / "a", tmp_path / "b"))
    (figure,) = (
        figure
        for section in page.sections
        for block in section.blocks
        if isinstance(block, FigureRow)
        for figure in block.figures
        if figure.name == "tasks"
    )
    assert figure.title == "Difference in accuracy, points, B less A"
    largest = max(abs(one.difference) for one in found.scores if one.metric == "accuracy" and one.task is not None)
    assert max(abs(x) for x in figure.spec["data"][0]["x"]) == pytest.approx(100 * largest, abs=0.01)
    assert not any(isinstance(block, Text) and "fraction" in block.text for s in page.sections for block in s.blocks)
