"""A plan predicts its groups' adapters alone: by that it is measured; boosters stand beside, under their own name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemblelora import judging, load_run, pipeline
from ensemblelora.adapters import THETA0
from ensemblelora.artifacts import COSTS_FILE, ENSEMBLE_FILE, RESULTS_FILE, read_json, write_json
from ensemblelora.contrast.measure import contrast_runs
from ensemblelora.data.encoding import EncodedSplit, encode_split
from ensemblelora.data.loading import load_tasks
from ensemblelora.ensemble import needed_adapters
from ensemblelora.evaluation.rows import name_methods, read_rows
from ensemblelora.prediction import MemberScores, member_nll, predict_members
from ensemblelora.report.build import compose_document
from ensemblelora.report.document import Table
from ensemblelora.report.reading import load_record
from ensemblelora.report.wording import NOTHING
from ensemblelora.summary import summarize
from tests.report_runs import make_run
from tests.tiny_run import TASKS, copy_run, finished_run, read_config
from tests.tiny_run import read_json as read_run_json

BOOSTER = "group-1-boost-1"
"""the finished run keeps this one"""


def losses_of(split: EncodedSplit, scores: MemberScores, values: np.ndarray) -> np.ndarray:
    """Every row's loss under scores of one way to answer."""
    return np.asarray(member_nll(replace(scores, values=values[None]), split.labels)[0])


def test_what_the_plan_is_measured_by_is_each_groups_adapter_alone() -> None:
    folder = finished_run()
    config, run = read_config(folder / "recipe.yaml"), load_run(folder / "run")
    adapted, ensemble = run._model
    assert BOOSTER in [member.name for member in ensemble.members]
    results, kept = read_run_json(folder, RESULTS_FILE), read_rows(folder / "run" / "test_rows.npz")
    said = {row["task"]: row for row in results["predicted_vs_measured"]}
    for task in load_tasks(config.data, seed=config.seed).tasks:
        group = ensemble.group_of[TASKS.index(task.name)]
        names = [f"group-{group}", BOOSTER, THETA0]
        for part, key in (("test", "measured_nll"), ("validation", "measured_validation_nll")):
            split = encode_split(task, part, adapted.base.tokenizer, max_length=config.data.max_length)
            scores = predict_members(adapted, split, names, max_tokens=256)
            alone = losses_of(split, scores, scores.values[0])
            assert said[task.name][key] == pytest.approx(alone.mean(), abs=1e-5), (task.name, part)
            if part == "test":
                np.testing.assert_allclose(kept[task.name].values["own group"]["nll"], alone, atol=1e-5)
                added = scores.values[0] + 0.3 * (scores.values[1] - scores.values[2])
                is_boosted = group == 1 and split.kind != "sequence"
                boosted = losses_of(split, scores, added if is_boosted else scores.values[0])
                np.testing.assert_allclose(kept[task.name].values["boosted group"]["nll"], boosted, atol=1e-5)
                assert (np.abs(boosted - alone).max() > 1e-4) == is_boosted
        scored = results["methods"]["own group"]["per_task"][task.name]["nll"]
        assert said[task.name]["measured_nll"] == scored


def test_every_method_is_charged_what_it_takes() -> None:
    folder = finished_run()
    costs, ensemble = read_run_json(folder, COSTS_FILE), read_run_json(folder, ENSEMBLE_FILE)
    spent = {record["stage"]: record["flops"] for record in costs["stages"]}
    own, boosted = costs["methods"]["own group"], costs["methods"]["boosted group"]
    assert own["train_flops"] == spent["train"] and boosted["train_flops"] == spent["train"] + spent["boost"]
    assert own["train_flops"] < boosted["train_flops"] < costs["methods"]["ensemble"]["train_flops"]
    one = costs["methods"]["shared"]["adapter_bytes"]
    assert own["adapter_bytes"] == one * len(ensemble["groups"])
    assert boosted["adapter_bytes"] == costs["methods"]["ensemble"]["adapter_bytes"] == one * len(ensemble["members"])
    assert own["inference_forward_passes"] == 1.0
    with_labels = [task for task in ensemble["groups"][1] if TASKS[task] != "written"]  # free text has no boosters
    assert boosted["inference_forward_passes"] == pytest.approx(1 + 2 * len(with_labels) / len(TASKS))
    assert own["select_flops"] == boosted["select_flops"] > 0


@pytest.mark.slow
def test_scoring_without_boosters_takes_no_further_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    score = judging.score_members

    def spy(path: Path, probe: Any, split: EncodedSplit, names: Any, *rest: Any, **more: Any) -> MemberScores:
        asked.append(tuple(names))
        return score(path, probe, split, names, *rest, **more)

    monkeypatch.setattr(judging, "score_members", spy)
    result = pipeline.run(read_config(copy_run(tmp_path), evaluation={"n_bootstrap": 101}))
    assert result.results is not None and "boosted group" in result.results["methods"]
    ensemble = load_run(tmp_path / "run")._model[1]
    assert len(asked) == len(TASKS)
    for task, names in enumerate(asked):
        groups = sorted({ensemble.group_of[task], *np.flatnonzero(ensemble.weights[task]).tolist()})
        kind = "sequence" if TASKS[task] == "written" else "verbalizer"
        assert sorted(names) == sorted({THETA0, "shared", *needed_adapters(ensemble.members, groups, kind)})


def make_boosted_run(folder: Path, *, is_old: bool, has_boosters: bool = True) -> Path:
    """A finished run of the report's tests with the methods that are about its groups."""
    make_run(folder)
    results, costs, ensemble = (read_json(folder / name) for name in (RESULTS_FILE, COSTS_FILE, ENSEMBLE_FILE))
    if not has_boosters:
        ensemble["members"] = [member for member in ensemble["members"] if member["kind"] == "group"]
        write_json(folder / ENSEMBLE_FILE, ensemble)
    new = ("own group",) if is_old or not has_boosters else ("own group", "boosted group")
    for record in (results, costs):
        methods = record["methods"]
        last = methods.pop("ensemble")
        record["methods"] = {**methods, **dict.fromkeys(new, last), "ensemble": last}
    results["differences"].append(
        {"a": "ensemble", "b": "own group", "metric": "nll", "task": None, "difference": 0.1, "low": 0.0, "high": 0.2}
    )
    write_json(folder / RESULTS_FILE, results)
    write_json(folder / COSTS_FILE, costs)
    return folder


def find_sections(folder: Path) -> Mapping[str, Any]:
    return {section.name: section for section in compose_document(load_record(folder)).sections}


def test_the_report_sets_the_adapters_alone_beside_the_plan(tmp_path: Path) -> None:
    sections = find_sections(make_boosted_run(tmp_path, is_old=False))
    table = next(block for block in sections["prediction"].blocks if isinstance(block, Table))
    rows = {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in table.rows}
    predicted = {name: values[0] for name, values in rows.items()}
    assert predicted["The plan, each task by its own group's adapter"] == "0.723"
    assert predicted["The plan with boosters"] == predicted["The plan with weights and boosters"] == NOTHING
    assert all(values[1] != NOTHING for values in rows.values())
    screen = summarize(tmp_path, size=(80, 40))
    heads = [column.header for part in screen if hasattr(part, "columns") for column in part.columns]
    assert "own group" in heads and "boosted group" not in heads, "five methods have no place in 80 columns"


@pytest.mark.parametrize("has_boosters", [True, False])
def test_runs_from_before_boosters_were_told_apart_are_read_for_what_they_were(
    has_boosters: bool, tmp_path: Path
) -> None:
    old = make_boosted_run(tmp_path / "old", is_old=True, has_boosters=has_boosters)
    record = load_record(old)
    assert record.results is not None and record.costs is not None
    kept = "boosted group" if has_boosters else "own group"
    assert list(record.results.methods) == list(record.costs.methods) == ["base", "shared", kept, "ensemble"]
    assert record.results.find_difference("ensemble", kept, "nll") is not None
    assert ("prediction" in find_sections(old)) == (not has_boosters), "nobody measured what that plan predicted"
    new = make_boosted_run(tmp_path / "new", is_old=False)
    compared = {score.method for score in contrast_runs(old, new)[2].scores}
    assert kept in compared and len(compared & {"own group", "boosted group"}) == 1


def test_names_stay_where_both_are_told_apart_or_there_is_nothing_to_tell() -> None:
    both = ["base", "own group", "boosted group", "ensemble"]
    assert name_methods(both, has_boosters=True) == {name: name for name in both}
    assert name_methods(["own group"], has_boosters=False) == {"own group": "own group"}
    assert name_methods(["base"], has_boosters=True) == {"base": "base"}
