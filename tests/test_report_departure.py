"""Where a plan goes against the map of affinities, the report says why; where it doesn't, it says nothing of it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from ensemblelora.artifacts import CHANGE_FILE, CONFIG_FILE, PLAN_FILE, read_json, save_arrays, write_json
from ensemblelora.errors import StoreError
from ensemblelora.report.build import compose_document, render_markdown
from ensemblelora.report.departure import _find_parted, explain_departure, part_pairs
from ensemblelora.report.document import Section, Text
from ensemblelora.report.headline import _tile_of_flops
from ensemblelora.report.heatmaps import remove_levels
from ensemblelora.report.reading import load_record
from ensemblelora.report.records import MethodCosts
from ensemblelora.report.story import _list_facts
from ensemblelora.summary import summarize
from tests.report_runs import GROUPS, TASKS, make_affinity, make_planned_run
from tests.test_plan_rivals import INSTEAD_OF_FOUND, plan_of

ALL = (tuple(range(10)),)
SWAPPED = ((0, 6, 7, 8), (5, 1, 2), (3, 4, 9))  # boolq and copa have changed places
SINGLES = tuple((task,) for task in range(10))


def make(folder: Path, groups: tuple[tuple[int, ...], ...] = GROUPS, **changes: Any) -> Path:
    """A planned run with other groups than the affinities have, or other entries of its plan."""
    make_planned_run(folder)
    write_json(folder / PLAN_FILE, {**read_json(folder / PLAN_FILE), "groups": groups, **changes})
    return folder


def ask_for(folder: Path, **grouping: Any) -> None:
    values = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    values["grouping"] |= grouping
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(values), encoding="utf-8")


def explain(folder: Path) -> str:
    return explain_departure(load_record(folder))


def test_one_adapter_that_stays_the_base_model_is_told(tmp_path: Path) -> None:
    for name, is_told in (("base", True), ("singles", False)):
        predicted = read_json(make(tmp_path / name) / PLAN_FILE)["predicted"]
        make(tmp_path / name, predicted={**predicted, "shared": predicted[name]})
        screen = Console(width=300, file=io.StringIO(), record=True)
        for part in summarize(tmp_path / name, size=(300, 80)):
            screen.print(part)
        told = "One adapter for all is predicted to stay the base model"
        assert (told in screen.export_text()) == is_told
        page = render_markdown(compose_document(load_record(tmp_path / name)))
        assert (told in page) == is_told


def test_nothing_is_said_where_map_and_plan_agree(tmp_path: Path) -> None:
    assert explain(make(tmp_path)) == ""
    assert "map of affinities" not in compose_text(tmp_path)


def compose_text(folder: Path) -> str:
    sections: list[Section] = compose_document(load_record(folder)).sections
    return " ".join(block.text for section in sections for block in section.blocks if isinstance(block, Text))


def test_a_good_pair_that_is_parted_is_named_beside_the_map_and_in_the_plan(tmp_path: Path) -> None:
    told = explain(make(tmp_path, SWAPPED))
    values = remove_levels(make_affinity()["matrix"])
    pairs = {(task, mate): values[task, mate] for task, mates in ((0, (1, 2)), (5, (6, 7, 8))) for mate in mates}
    one, other = max(pairs, key=lambda pair: pairs[pair])
    names = " and ".join(TASKS[task] for task in sorted((one, other)))
    assert told.startswith(f"On the map of affinities {names} do well together (+{values[one, other]:.3f} ± 0.005)")
    assert "the plan parts them: affinities are estimates with errors, of a pair at a time, and groups are" in told
    assert compose_text(tmp_path).count(told) == 2
    screen = Console(width=400, file=io.StringIO(), record=True)
    screen.print(*summarize(tmp_path, size=(400, 60)))
    assert " ".join(screen.export_text().split()).count(told) == 1


@pytest.mark.parametrize(
    ("groups", "reason", "grouping", "expected"),
    [
        (SWAPPED, "Groups were given by hand.", {"groups": [["boolq"]]}, "the groups were given by hand."),
        (SWAPPED, plan_of(INSTEAD_OF_FOUND).reason, {}, "groups by gradient cosine are predicted to do better."),
        (SINGLES, "", {}, "not whether training together pays, which the predicted loss tells."),
    ],
)
def test_the_cause_is_what_chose_the_groups(
    groups: tuple[tuple[int, ...], ...], reason: str, grouping: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    ask_for(make(tmp_path, groups, reason=reason), **grouping)
    assert explain(tmp_path).endswith(expected)


@pytest.mark.parametrize(
    ("allowed", "n_groups", "expected"),
    [
        (True, "auto", "the predicted loss, which does, has to fall by more than its error."),
        (False, "auto", "no grouping was open to choice."),
        (True, 1, "one adapter was asked for."),
    ],
)
def test_blocks_that_one_adapter_passes_over_are_named(
    allowed: bool, n_groups: int | str, expected: str, tmp_path: Path
) -> None:
    curve = [{"n_groups": m, "gain": 0.001, "gain_se": 0.01, "allowed": allowed} for m in (1, 2)]
    ask_for(make(tmp_path, ALL, curve=curve, decision="one adapter"), n_groups=n_groups)
    told = explain(tmp_path)
    assert told.startswith("The map of affinities shows blocks (such as ") and told.endswith(f"; {expected}")
    block = told.partition("such as ")[2].partition(")")[0]
    assert any({TASKS[task] for task in group} >= set(block.split(" and ")[0].split(", ")) for group in GROUPS)


def test_noise_has_no_blocks(tmp_path: Path) -> None:
    make(tmp_path, ALL)
    assert explain(tmp_path)
    affinity = make_affinity()
    save_arrays(tmp_path / "affinity.npz", {**affinity, "matrix_se": np.full((10, 10), 0.03)})
    assert explain(tmp_path) == ""
    save_arrays(tmp_path / "affinity.npz", {name: affinity[name] for name in ("matrix", "counts")})
    assert explain(tmp_path) == "", "of errors nothing is known"


def test_without_a_map_there_is_nothing_to_explain(tmp_path: Path) -> None:
    (make(tmp_path, SWAPPED) / "affinity.npz").unlink()
    assert explain(tmp_path) == ""


@pytest.mark.parametrize("n", [3, 4, 7, 12])
def test_the_parted_pair_is_that_of_the_definition(n: int) -> None:
    """Slow twin: the definition, pair by pair."""
    generator = np.random.default_rng(n)
    for _ in range(30):
        values = generator.normal(size=(n, n))
        values = values + values.T
        np.fill_diagonal(values, np.nan)
        labels = generator.integers(0, 3, n)
        groups = [np.flatnonzero(labels == label).tolist() for label in range(3) if (labels == label).any()]
        own = [
            np.mean([values[i, j] for j in range(n) if j != i and labels[j] == labels[i]] or [0.0]) for i in range(n)
        ]
        reach = np.nanmax(np.abs(values))
        found = {
            (i, j): values[i, j]
            for i in range(n)
            for j in range(i + 1, n)
            if labels[i] != labels[j] and values[i, j] > max(own[i], own[j]) and values[i, j] >= reach / 2
        }
        assert _find_parted(values, groups) == (max(found, key=lambda pair: found[pair]) if found else None)
        inside, across = part_pairs(values, groups)
        assert len(inside) + len(across) == n * (n - 1) // 2


def test_groups_that_grew_are_not_said_to_be_given_by_hand(tmp_path: Path) -> None:
    reason = "Groups were given by hand (grouping.groups); auto would choose the same."
    folder = make(tmp_path, SWAPPED, reason=reason)
    ask_for(folder, groups=[["boolq"]])
    assert "by hand" in compose_text(folder)
    change = {"action": "add", "task": "boolq", "source": "/there/before"}
    write_json(folder / CHANGE_FILE, change)
    origin = "those of the earlier run before, with boolq added"
    assert explain(folder).endswith(f"the plan parts them: the groups are {origin}.")
    assert f"Groups are {origin}; auto would choose" in compose_text(folder) and "by hand" not in compose_text(folder)
    assert ("Groups", origin) in list(_list_facts(load_record(folder)))
    for action, told in (("drop", "with boolq dropped"), ("update", "with other rows of boolq")):
        write_json(folder / CHANGE_FILE, change | {"action": action})
        assert explain(folder).endswith(f"{told}.")
    write_json(folder / CHANGE_FILE, {"task": "boolq"})
    with pytest.raises(StoreError, match="no record of a change"):
        load_record(folder)


def test_a_training_that_cost_nothing_here_is_no_measure_of_compute() -> None:
    spent = {"shared": MethodCosts(train_flops=0.0), "ensemble": MethodCosts(train_flops=5.0)}
    assert _tile_of_flops(spent) is None
    tile = _tile_of_flops(spent | {"shared": MethodCosts(train_flops=2.0)})
    assert tile is not None and tile.value.startswith("2.5")
