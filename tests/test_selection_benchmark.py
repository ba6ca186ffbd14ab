"""The benchmark of source selection on a tiny model: what it measures and keeps, and what it says of planted rows."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from ensemblelora.selection.search import SearchSettings, search_forward
from measured_selection import render_noise, render_search, render_targets, render_truth
from tests.tiny import make_split
from tests.tiny_run import make_inputs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script, which finds its neighbours as it does when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("selection")
        for name in ("selection", "common"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_inputs(tmp_path_factory.mktemp("inputs"))
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["data"]["tasks"] = [str(path.parent / "tasks" / f"family{k}_task0.yaml") for k in range(2)]
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


def ask(recipe: Path, out: Path, part: str, **changes: Any) -> Namespace:
    values = {"part": part, "recipe": recipe, "out": out, "targets": "family0_task0", "seeds": 1, "sets": 2}
    return Namespace(
        **values | {"clusters": 4, "minutes": 10.0, "set": [], "json": False, "leave_record": True} | changes
    )


@pytest.mark.slow
def test_targets_are_averaged_over_seeds_and_kept(script, recipe, out):
    asked = ask(recipe, out, "targets")
    ((config, result),) = script.measure_targets(asked, script.Clock(10))
    assert config["n_found"] == 1 and result["is_whole"]
    assert set(result["methods"]) == {"base", "none", "all", "gradients", "texts", *script.STRATEGIES}
    change = result["differences"]["forward - all"]["accuracy"]
    record = json.loads((out / "seed-0/selection/family0_task0/selection.json").read_text(encoding="utf-8"))
    measured = [c for c in record["test"]["changes"] if (c["a"], c["b"], c["metric"]) == ("forward", "all", "accuracy")]
    assert change["mean"] == measured[0]["difference"] and change["n"] == 1
    ((told, again),) = script.measure_targets(ask(recipe, out, "targets", seeds=2), script.Clock(0.0))
    assert again["methods"] == result["methods"], "what is there is read back when there is no time left"
    assert not again["is_whole"] and (told["n_found"], told["n_asked"]) == (1, 2)
    assert next(render_targets({"config": told, **again})).startswith("**Partial**: 1 of 2 targets and seeds")
    lines = list(render_targets({"config": config, **result}))
    assert sum(line.startswith(("| forward |", "| all |", "| base |")) for line in lines) == 3


def test_without_time_nothing_is_begun(script, recipe, tmp_path):
    for part in ("targets", "truth", "noise", "speed"):
        measure = getattr(script, f"measure_{part}")
        assert not list(measure(ask(recipe, tmp_path / "new", part), script.Clock(0.0)))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_predictions_are_held_against_true_fine_tunings(script, recipe, out):
    tasks = [
        str(recipe.parent / "tasks" / f"{name}.yaml") for name in ("family0_task0", "family0_task1", "family1_task0")
    ]
    asked = ask(recipe, out / "truth", "truth", sets=1, set=[f"data.tasks=[{', '.join(tasks)}]"])
    found = list(script.measure_truth(asked, script.Clock(10)))
    config, result = found[-1]
    assert [one["is_whole"] for _, one in found] == [False] * (len(found) - 1) + [True]
    assert next(render_truth({"config": found[0][0], **found[0][1]})).startswith("**Partial**")
    sets = result["targets"]["family0_task0"]["sets"]
    assert config["n_sets"] == {"family0_task0": len(sets)} and len(sets) >= 3
    names = [set(one["sources"]) for one in sets]
    assert set() in names and {"family0_task1", "family1_task0"} in names
    assert all(one["from_warmup"] > 0 < one["from_base"] and one["flops"] > 0 for one in sets)
    assert any(one["from_warmup"] != one["from_base"] for one in sets), "two starts"
    lines = list(render_truth({"config": config, **result}))
    assert any(line.startswith(f"| family0_task0 | {len(sets)} |") for line in lines)


def test_agreement_is_of_the_same_sets(script):
    sets = [script.TrueSet(("a",) * k, p, t, t + 1.0, 5) for k, p, t in ((0, 1.0, 1.1), (1, 0.8, 0.7), (2, 0.9, 1.0))]
    found = script.agree(sets)
    assert found["relative_error"] == pytest.approx(np.mean([0.1 / 1.1, 0.1 / 0.7, 0.1]))
    assert found["spearman"] == found["spearman_base"] == pytest.approx(1.0)
    assert found["regret"] == 0 and found["regret_of_all"] == pytest.approx(0.3)


def test_sets_to_fine_tune_are_distinct_and_hold_none_all_and_the_chosen(script):
    prospect = script.Prospect(script.make_planted(script.plant_sources(5, 8, 4), "ridge", 0).oracle)
    sets = script.list_sets(prospect, [(1, 3)], 8, seed=0)
    assert sets[:3] == [(), (0, 1, 2, 3, 4), (1, 3)] and len(set(sets)) == len(sets) == 11
    assert sum(len(chosen) == 1 for chosen in sets) >= 4
    assert len(script.list_sets(prospect, [], 99, seed=0)) == 32


def test_turned_labels_are_wrong_where_they_should_be(script):
    split = make_split("options", n=40, n_choices=4, ragged=True)
    is_wrong = np.arange(40) % 3 == 0
    turned = script.turn_labels(split, is_wrong, seed=0)
    assert ((turned.labels != split.labels) == is_wrong).all() and (turned.labels < split.n_choices).all()


def test_noise_is_looked_for_in_one_datasets_clusters(script, recipe, out):
    tasks = ("data.tasks=[" + str(recipe.parent / "tasks" / "family0_task0.yaml") + "]", "gradients.linearize_at=base")
    ((config, result),) = script.measure_noise(ask(recipe, out, "noise", set=list(tasks)), script.Clock(10))
    assert config["n_clusters"] == 4 and result["is_whole"]
    for name in ("auc_scores", "auc_loo", "auc_shapley", "auc_rows", "share_noisy_backward", "accuracy_clean"):
        assert 0 <= result[name]["mean"] <= 1
    lines = list(render_noise({"config": config, **result}))
    assert any(line.startswith("| shapley | ") for line in lines) and "Test accuracy" in " ".join(lines)


def test_a_search_over_planted_sources_takes_none_with_labels_at_random(script):
    features = script.plant_sources(12, 200, 20)
    for method in ("steps", "ridge"):
        found = search_forward(script.make_planted(features, method, 0), SearchSettings())
        assert found.choice and all(j % 4 < 2 for j in found.choice)


def test_a_search_is_timed_and_says_what_true_fine_tunings_would_take(script, monkeypatch, tmp_path, capsys):
    few = script.plant_sources(10, 40, 20)
    monkeypatch.setattr(script, "plant_sources", lambda: few)
    monkeypatch.setattr(
        script, "keep_record", lambda name, *found, **how: sys.stdout.write(f"{name} {found[1]['is_whole']}\n")
    )
    monkeypatch.setattr(sys, "argv", ["selection.py", "speed", "--seeds", "1"])
    script.main()
    assert capsys.readouterr().out == "selection-speed True\n", "the last record alone is printed"
    (_, first), (config, result) = script.measure_speed(ask(tmp_path, tmp_path, "speed"), script.Clock(10))
    assert not first["is_whole"] and result["is_whole"] and result["forward_steps_seconds"] > 0
    prospect = script.make_planted(few, "ridge", 0)
    found = search_forward(prospect, SearchSettings())
    n_chosen, sizes = len(found.choice), [1]  # sets asked about, by how many tasks they hold: at first the target alone
    sizes += [2 + step for step in range(n_chosen + 1) for _ in range(10 - step)]
    true, spent = 3 * 40 * sum(sizes), 11 * 40 * (1.5 + 1) + 200
    assert script.count_rows(prospect, found, 3) == pytest.approx(true / spent)
    assert "s by simulated training, " in "\n".join(render_search({"config": config, **result})).replace("\n", " ")


def test_its_help_needs_no_model(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["selection.py", "--help"])
    with pytest.raises(SystemExit) as done:
        script.main()
    assert done.value.code == 0 and "targets" in capsys.readouterr().out
