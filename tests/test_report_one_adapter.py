"""What a run of one adapter for all shows, and that page and screen say the same of a run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ensemblelora.artifacts import COSTS_FILE, ENSEMBLE_FILE, PLAN_FILE, RESULTS_FILE, read_json, write_json
from ensemblelora.report.build import compose_document, render_markdown
from ensemblelora.report.headline import write_tiles
from ensemblelora.report.reading import leave_out_repeats, load_record
from ensemblelora.report.wording import format_seconds
from ensemblelora.summary import summarize
from tests.report_runs import TASKS, make_planned_run, make_run
from tests.test_own_group import make_boosted_run


def change(folder: Path, name: str, **values: Any) -> None:
    write_json(folder / name, read_json(folder / name) | values)


def show(folder: Path) -> str:
    screen = Console(width=200, file=io.StringIO(), record=True)
    for part in summarize(folder, size=(200, 80)):
        screen.print(part)
    return screen.export_text()


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A finished run of one adapter with a booster."""
    make_boosted_run(tmp_path, is_old=False)
    change(tmp_path, PLAN_FILE, groups=[list(range(10))], decision="one adapter")
    members = [{"name": f"m{i}", "group": 0, "kind": kind} for i, kind in enumerate(("group", "booster"))]
    change(tmp_path, ENSEMBLE_FILE, members=members, weights=[[1.0]] * 10, boosting=[], routed=[])
    return tmp_path


def test_one_adapter_is_shown_once(one: Path) -> None:
    record = load_record(one)
    assert {"own group", "boosted group"} <= set(record.results.methods)
    shown = leave_out_repeats(record)
    assert list(shown.results.methods) == ["base", "shared", "ensemble"] and set(shown.costs.methods) <= set(
        shown.results.methods
    )
    page = render_markdown(compose_document(record))
    assert "own group" not in page.partition("## Words")[0].lower().replace("by its own group's adapter", "")
    assert "The plan is one adapter for all: the ensemble is that adapter with its boosters." in page
    assert "| The plan, one adapter for all |" in page and "| The plan with boosters |" in page
    assert "own group" not in show(one)


def test_own_group_stays_where_it_is_all_there_is_of_the_adapter(one: Path) -> None:
    results = read_json(one / RESULTS_FILE)
    del results["methods"]["shared"]
    write_json(one / RESULTS_FILE, results)
    assert list(leave_out_repeats(load_record(one)).results.methods) == ["base", "own group", "ensemble"]


def test_one_adapter_is_measured_against_the_base_model_throughout(one: Path) -> None:
    page = render_markdown(compose_document(load_record(one)))
    assert "one adapter for all: validation loss 0.723 against 0.863 of the base model" in page
    assert "Accuracy 62.0% against 49.3% (base model)" in page
    assert "Difference in accuracy between the ensemble and base model" in page
    assert "task by task" not in page, "no such pair was compared task by task"
    tile = next(tile for tile in write_tiles(load_record(one)) if tile.label.startswith("Mean test"))
    assert tile.detail == "ensemble; 49.3% base model"


def test_a_plan_of_one_adapter_is_set_against_the_base_model(tmp_path: Path) -> None:
    change(make_planned_run(tmp_path), PLAN_FILE, groups=[list(range(10))], decision="one adapter")
    (tile,) = (tile for tile in write_tiles(load_record(tmp_path)) if tile.label == "Predicted loss")
    assert tile.detail.endswith("with the base model")
    shown = show(tmp_path)
    assert "one adapter for all  " in shown and "this plan" not in shown
    assert "| One adapter for all |" not in render_markdown(compose_document(load_record(tmp_path)))


def test_the_tile_names_the_ensemble_first_and_none_of_its_parts(tmp_path: Path) -> None:
    make_boosted_run(tmp_path, is_old=False)
    (tile,) = (tile for tile in write_tiles(load_record(tmp_path)) if tile.label.startswith("Mean test"))
    assert tile.detail == "ensemble; 59.7% one adapter for all; 49.3% base model"


def test_page_and_screen_have_one_wall_time_and_the_reports_own_is_not_in_it(tmp_path: Path) -> None:
    stages = read_json(make_run(tmp_path) / COSTS_FILE)["stages"]
    total = format_seconds(sum(stage["wall_seconds"] for stage in stages))
    written = {"stage": "report", "wall_seconds": 31.0, "peak_memory_bytes": 9e9}
    before = render_markdown(compose_document(load_record(tmp_path)))
    change(tmp_path, COSTS_FILE, stages=[*stages, written])
    page = render_markdown(compose_document(load_record(tmp_path)))
    assert page == before, "a page can't know what it took itself, and must not change when it is made again"
    assert f"Wall time: **{total}**" in page and f"In all {total}, " in page and f"| All stages | {total} |" in page
    assert f"{total} in all" in show(tmp_path) and "9.0\u00a0GB" not in show(tmp_path)


def test_tasks_stand_in_one_order_on_page_and_screen(tmp_path: Path) -> None:
    plan = load_record(make_run(tmp_path)).plan
    lines = show(tmp_path).partition("\ntest accuracy")[2].splitlines()[1:11]
    assert [line.split()[0] for line in lines] == plan.ordered_names != list(TASKS)


def test_pairs_without_the_ensemble_are_folded_away(tmp_path: Path) -> None:
    make_run(tmp_path)
    results = read_json(tmp_path / RESULTS_FILE)
    pair = {"a": "shared", "b": "base", "metric": "nll", "task": None, "difference": -0.1, "low": -0.2, "high": 0.1}
    turned = [{**item, "a": item["b"], "b": item["a"]} for item in results["differences"]]
    turned = [{**i, "difference": -i["difference"], "low": -i["high"], "high": -i["low"]} for i in turned]
    for differences in (results["differences"], turned):
        change(tmp_path, RESULTS_FILE, differences=[*differences, pair])
        (scores,) = (part for part in compose_document(load_record(tmp_path)).sections if part.name == "results")
        own, rest = (block for block in scores.blocks if getattr(block, "caption", "").startswith("Differences in"))
        assert [row.cells[0].text for row in own.rows] == [
            "Ensemble less one adapter for all",
            "Ensemble less base model",
        ]
        assert [row.cells[0].text for row in rest.rows] == ["One adapter for all less base model"]
        assert rest.summary and not own.summary and own.rows[0].cells[1].text == "+2.3"
