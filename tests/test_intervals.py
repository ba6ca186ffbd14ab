"""No prediction without its interval: in the run's files, in the report, and in what the commands say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemblelora import load_run
from ensemblelora.artifacts import load_arrays, read_json, save_arrays, write_json
from ensemblelora.report.build import compose_document
from ensemblelora.report.document import Table, Tiles
from ensemblelora.report.reading import load_record
from ensemblelora.report.wording import NOTHING
from tests.report_runs import make_planned_run, make_run
from tests.tiny_run import TASKS, finished_run
from tests.tiny_run import read_json as read_run_json

PREDICTED = ("nll", "accuracy", "mean_nll", "mean_accuracy", "predicted_nll", "gain", "gain_over_plan")
"""keys of predictions; a plan's search_nll is the number that the search itself went by, and no prediction"""


def list_predictions(values: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where every prediction of a JSON file stands, with its value and its error."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key in PREDICTED:
                yield f"{place}.{key}", value, values.get(f"{key}_se")
            yield from list_predictions(value, f"{place}.{key}")
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from list_predictions(value, f"{place}[{index}]")


def assert_has_errors(values: Any) -> int:
    found = list(list_predictions(values))
    for place, value, error in found:
        pairs = zip(value, error, strict=True) if isinstance(value, list) and error else [(value, error)]
        for one, se in pairs:
            assert (one is None) == (se is None), f"{place}: {one} ± {se}"
            assert se is None or se >= 0
    return len(found)


def test_every_prediction_in_the_files_has_its_error():
    assert assert_has_errors(read_run_json(finished_run(), "plan.json")) > 20
    checked = read_run_json(finished_run(), "results.json")["predicted_vs_measured"]
    assert assert_has_errors(checked) == len(TASKS)
    assert assert_has_errors(load_run(finished_run() / "run").ask(TASKS[:2])) == 2 * len(TASKS)


def test_the_affinity_has_an_error_for_every_pair():
    arrays = load_arrays(finished_run() / "run" / "affinity.npz")
    off = ~np.eye(len(TASKS), dtype=bool)
    assert (arrays["matrix_se"][off] > 0).all() and np.array_equal(arrays["matrix_se"], arrays["matrix_se"].T)


@pytest.fixture(scope="module", params=[make_run, make_planned_run], ids=["finished", "planned"])
def folder(request, tmp_path_factory) -> Path:
    return request.param(tmp_path_factory.mktemp("run"))


def find_tables(folder: Path) -> dict[str, Table]:
    sections = compose_document(load_record(folder)).sections
    return {block.caption: block for section in sections for block in section.blocks if isinstance(block, Table)}


@pytest.mark.parametrize(
    ("caption", "columns"),
    [
        ("Predicted performance on 600 validation rows, 60 a task", (1, 2)),
        ("What each number of groups would give and cost", (1, 2)),
        ("Other ways of grouping", (2, 3)),
        ("Affinity without own levels, ordered by group", range(1, 11)),
    ],
)
def test_tables_of_predictions_say_how_sure_they_are(folder, caption, columns):
    table = find_tables(folder)[caption]
    for row in table.rows:
        for column in columns:
            cell = row.cells[column]
            # A thing compared with itself differs by nothing, without error; and no task has an affinity with itself.
            is_exact = cell.text in ("0", "0.000", NOTHING)
            assert is_exact or re.fullmatch(r"± \d\.\d+", cell.detail), (row.cells[0].text, cell)


def test_charts_and_sentences_carry_errors(folder):
    document = compose_document(load_record(folder))
    figures = {figure.name: figure for figure in document.figures}
    curve = figures["curve"].spec["data"][0]
    assert all(len(point) == 3 and point[2] > 0 for point in curve["customdata"])
    hover = figures["affinity-grouped"].spec["data"][0]
    assert "±" in hover["hovertemplate"]
    assert {point[2] for row in hover["customdata"] for point in row} <= {0.004, 0.005}
    if "predicted-loss" in figures:
        for trace in figures["predicted-loss"].spec["data"]:
            assert trace["error_x"]["array"] == [0.02] * len(trace["x"])
    (tiles,) = (block.tiles for block in document.opening if isinstance(block, Tiles))
    predicted = [tile for tile in tiles if tile.label.startswith("Predicted")]
    assert all("±" in tile.value and "±" in tile.detail for tile in predicted)
    assert bool(predicted) == ("predicted-loss" not in figures), "before training, the prediction is the news"


def test_the_text_compares_the_affinities_with_their_error(folder):
    (section,) = (s for s in compose_document(load_record(folder)).sections if s.name == "affinity")
    assert re.search(
        r"Pairs differ by 0\.\d+ \(standard deviation\); 0\.00[45] is the standard", section.blocks[0].text
    )


def test_a_run_from_before_there_were_errors_is_still_reported(tmp_path):
    make_planned_run(tmp_path)
    plan = read_json(tmp_path / "plan.json")
    arrays = {k: v for k, v in load_arrays(tmp_path / "affinity.npz").items() if k != "matrix_se"}
    for entry in (*plan["curve"], *plan["comparisons"]):
        for key in ("predicted_nll_se", "gain_over_plan", "gain_over_plan_se"):
            entry.pop(key, None)
    write_json(tmp_path / "plan.json", plan)
    save_arrays(tmp_path / "affinity.npz", arrays)
    assert len(find_tables(tmp_path)) == len(find_tables(make_planned_run(tmp_path / "now")))
