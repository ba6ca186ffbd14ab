"""What the number of groups and a booster are worth: from records to the page and to the paper's section 3.3."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ensemblelora import artifacts
from ensemblelora.boosting.state import GroupState
from ensemblelora.cli import main
from ensemblelora.comparison.ablation import (
    collect_first_rounds,
    collect_numbers,
    compare_boosting,
    rank_alike,
)
from ensemblelora.comparison.ablation_sections import write_boosting, write_numbers
from ensemblelora.comparison.page import write_page
from ensemblelora.comparison.record import StudyRecord, read_record, read_study, write_record
from ensemblelora.comparison.statistics import compute_statistics
from ensemblelora.errors import UsageError
from ensemblelora.report.document import Table
from ensemblelora.reproduction.tables import reproduce
from tests.study_records import make_study, make_tasks

SKILLS = {
    "shared": 0.6, "ours-m1": 0.6, "ours-m2": 0.75, "ours-m3": 0.85, "ours-m4": 0.8,
    "ours-boost-0": 0.8, "ours-boost-1": 0.83, "ours": 0.83,
}  # fmt: skip
PREDICTED = {1: 0.9, 2: 0.7, 3: 0.5, 4: 0.6}


def booster(seed: int, **changes: object) -> dict[str, object]:
    return {
        "name": "b", "group": 1, "rate": 0.3, "step_length": 1.0, "train_nll_before": 0.5, "train_nll_after": 0.4,
        "heldout_nll_before": 0.6, "heldout_nll_after": 0.5, "accepted": True, "reason": "",
        "train_error_before": 0.2, "train_error_after": 0.2 - 0.02 * (seed + 1),
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four numbers of groups, and ours with and without a booster, three seeds."""
    folder = make_study(tmp_path_factory.mktemp("parts") / "parts", skills=SKILLS, tasks=make_tasks(n_rows=120))
    for record in read_study(folder).records:
        notes: dict[str, object] = {}
        groups = record.groups
        if record.method.startswith("ours-m"):
            m = int(record.method[-1])
            notes["planned"] = {
                "n_groups": m, "predicted_nll": PREDICTED[m] + 0.01 * record.seed, "gain": 0.9 - PREDICTED[m],
                "gain_se": 0.01, "density": m / 10, "is_chosen": m == (3 if record.seed else 2),
            }  # fmt: skip
        elif record.method in ("ours", "ours-boost-1"):
            groups = (("task0",), ("task1", "task2"))
            rejected = {"accepted": False} if record.method == "ours" or record.seed == 2 else {}
            notes["boosting"] = [booster(record.seed, **rejected), booster(record.seed, train_nll_after=9.0)]
        write_record(folder, replace(record, notes=notes, groups=groups))
    return folder


@pytest.fixture(scope="module")
def study(folder: Path) -> StudyRecord:
    return read_study(folder)


def test_numbers_of_groups_are_listed_with_what_was_expected(study: StudyRecord) -> None:
    numbers = collect_numbers(study, compute_statistics(study, n_bootstrap=200))
    assert [number.n_groups for number in numbers] == [1, 2, 3, 4]
    assert [number.predicted_nll for number in numbers] == pytest.approx([p + 0.01 for p in PREDICTED.values()])
    assert [number.n_chosen for number in numbers] == [0, 1, 2, 0], "seeds whose plan has so many"
    assert numbers[2].method.name == "ours-m3" and numbers[2].validation_nll == pytest.approx(0.9)


def test_the_page_says_whether_the_number_was_foreseen(study: StudyRecord) -> None:
    found = compute_statistics(study, n_bootstrap=200)
    section = write_numbers(study, found)
    assert section is not None
    table, text, figures = section.blocks
    assert isinstance(table, Table) and [row.cells[0].text for row in table.rows] == ["1", "2", "3", "4"]
    assert [row.cells[0].tag for row in table.rows] == ["", "the plan's", "the plan's", ""]
    assert [row.cells[-1].text for row in table.rows] == ["0 of 3", "1 of 3", "2 of 3", "0 of 3"]
    losses = [number.method.mean["nll"].value for number in collect_numbers(study, found)]
    best = int(np.argmin(losses)) + 1
    assert text.text.startswith(f"The least test loss has {best} groups; the least predicted loss 3 groups.")
    assert f"{stats.spearmanr(list(PREDICTED.values()), losses).statistic:.2f} (Spearman)" in text.text
    test, predicted = figures.figures[0].spec["data"]
    assert test["x"] == predicted["x"] == [1, 2, 3, 4] and test["y"] == pytest.approx(losses, abs=1e-5)
    assert all(above > 0 for above in test["error_y"]["array"])
    without = replace(study, records=tuple(r for r in study.records if not r.method.startswith("ours-m")))
    assert write_numbers(without, compute_statistics(without, n_bootstrap=50)) is None


@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_correlated_as_scipy_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 4, 6).astype(float), rng.normal(size=6)
    assert rank_alike(x.tolist(), y.tolist()) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rank_alike([1.0, 2.0], [1.0, 2.0]) is None and rank_alike([1.0] * 4, [1.0, 2.0, 3.0, 4.0]) is None


def test_the_first_round_alone_counts_of_ours_with_one_booster(study: StudyRecord) -> None:
    rounds = collect_first_rounds(study)
    assert [one.error_reduction for one in rounds] == pytest.approx([0.1, 0.2, 0.3])
    assert [one.nll_reduction for one in rounds] == pytest.approx([0.2] * 3), "the second round is another's"
    assert [one.is_kept for one in rounds] == [True, True, False] and rounds[0].tasks == ("task1", "task2")
    alone = replace(study, records=study.of("ours"))
    assert [one.is_kept for one in collect_first_rounds(alone)] == [False] * 3, "ours, where there is nothing else"
    assert collect_first_rounds(replace(study, records=study.of("shared"))) == []
    entry = {key: value for key, value in booster(0).items() if "error" not in key}
    old = tuple(replace(record, notes={"boosting": [entry]}) for record in alone.records)
    (one, *_) = collect_first_rounds(replace(study, records=old))
    assert one.error_reduction is None and one.nll_reduction == pytest.approx(0.2), "records of before"


def test_a_booster_is_compared_on_the_test_rows_with_an_interval(study: StudyRecord) -> None:
    found = compute_statistics(study, n_bootstrap=200)
    change = compare_boosting(found, "accuracy")
    assert change is not None and (change.a, change.b) == ("ours-boost-1", "ours-boost-0")
    assert change.low < change.difference < change.high and change.rows_low < change.difference < change.rows_high
    section = write_boosting(study, found)
    assert section is not None
    table, text = section.blocks
    assert isinstance(table, Table) and len(table.rows) == 4
    assert [row.cells[4].text for row in table.rows] == ["10.0%", "20.0%", "30.0%", "20.0%"], "and their mean"
    assert table.rows[-1].cells[-1].text == "2 of 3"
    assert "ours-boost-1 against ours-boost-0: Accuracy: +" in text.text and "95% interval" in text.text
    fewer = replace(study, records=tuple(r for r in study.records if r.method != "ours-boost-1"))
    pair = compare_boosting(compute_statistics(fewer, n_bootstrap=50), "nll")
    assert pair is not None and (pair.a, pair.b) == ("ours", "ours-boost-0")
    without = replace(study, records=study.of("shared"))
    assert write_boosting(without, compute_statistics(without, n_bootstrap=50)) is None


def test_section_3_3_has_every_number_beside_the_papers(
    folder: Path, study: StudyRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    made = reproduce("section3.3", [folder])
    cells = {(str(row["row"]), str(row["column"])): row for row in made.rows}
    found = compute_statistics(study)
    for m in PREDICTED:
        column = "1 group" if m == 1 else f"{m} groups"
        mean = found.methods[f"ours-m{m}"].mean
        assert cells["test accuracy", column]["ours"] == mean["accuracy"].value
        assert cells["test accuracy", column]["sd"] == mean["accuracy"].seed_sd
        assert cells["test loss", column]["ours"] == mean["nll"].value
        assert cells["predicted loss", column]["ours"] == pytest.approx(PREDICTED[m] + 0.01)
    assert cells["training error, reduced by", "one booster"]["ours"] == pytest.approx(0.2)
    assert cells["training error, reduced by", "one booster"]["paper"] == 0.18
    gain = found.find("ours-boost-1", "ours-boost-0", "accuracy")
    assert gain is not None and cells["test accuracy, raised by", "one booster"]["ours"] == gain.difference
    assert cells["test accuracy, raised by", "one booster"]["paper"] == 0.004
    assert any("stable from 3 on" in note for note in made.notes)
    assert any("ours-boost-1 against ours-boost-0" in note and "interval" in note for note in made.notes)
    assert main(["reproduce", "section3.3", str(folder), "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "20.0% | 18.0%" in shown and "section3.3: The number of groups" in shown
    assert main(["reproduce", "section3.3", str(folder), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["exhibit"] == "section3.3"


def test_section_3_3_needs_its_methods(tmp_path: Path) -> None:
    bare = make_study(tmp_path / "bare", skills={"shared": 0.7})
    with pytest.raises(UsageError, match="compare the methods ours-m1 to ours-m6, or ours-boost-0 and ours-boost-1"):
        reproduce("section3.3", [bare])


def test_the_page_has_both_sections_and_the_command_names_the_primary_comparisons(folder: Path) -> None:
    page = write_page(folder)
    markdown = (folder / "compare.md").read_text(encoding="utf-8")
    assert "## Choosing the number of groups" in markdown and "## One step of boosting" in markdown
    assert "--primary ours:shared,ours:mtl-ft" in markdown, "so that the same are corrected for together"
    assert "edge of the grid" not in markdown.split("## What it cost")[1].split("Edge of the grid")[0]
    assert page.statistics.n_primary == 4 and len(page.statistics.primary) == 2, "mtl-ft has no result, and counts"


def test_a_rate_at_the_edge_is_marked(folder: Path, tmp_path: Path) -> None:
    edge = make_study(tmp_path / "edge", skills={"shared": 0.6, "ours": 0.8})
    head = read_study(edge).head
    for record in read_study(edge).of("ours"):
        write_record(edge, replace(record, is_rate_at_edge=True))
    again = read_record(edge, "ours", 0, read_study(edge).of("ours")[0].identity)
    assert again is not None and again.is_rate_at_edge and head.learning_rates == (0.001, 0.01)
    write_page(edge)
    markdown = (edge / "compare.md").read_text(encoding="utf-8")
    assert "0.01 *edge of the grid*" in markdown
    assert "The best learning rate was the smallest or the largest tried: ours. One beyond might be better." in markdown
    assert artifacts.read_json(edge / "compare.json")["methods"]["ours"]["is_rate_at_edge"] is True


def test_what_a_group_gets_wrong_is_counted_over_rows() -> None:
    class Split:
        def __init__(self, labels: list[int]) -> None:
            self.labels = np.array(labels)

    class Task:
        def __init__(self, labels: list[int]) -> None:
            self.train = self.validation = Split(labels)

    state = GroupState(None, "member", [Task([0, 1, 1]), Task([0])])  # type: ignore[arg-type, list-item]
    scores = [np.array([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0]]), np.array([[0.0, -np.inf]])]
    assert state.error("train", scores) == pytest.approx(1 / 4), "every row counts once, whatever its task"
