"""The report's pictures and lists against their definitions, one pair at a time, and pages of very many tasks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemblelora.artifacts import read_json, save_arrays, write_json
from ensemblelora.report import write_report
from ensemblelora.report.build import compose_document, render_html
from ensemblelora.report.differences import TaskDifference, draw_differences
from ensemblelora.report.document import Cell, Column, Document, Row, Section, Table
from ensemblelora.report.heatmaps import remove_levels
from ensemblelora.report.helping import measure_gains
from ensemblelora.report.hierarchy import build_tree, draw_tree
from ensemblelora.report.pareto import FLOPS, PASSES, Point, draw_front
from ensemblelora.report.pareto_section import measure_mean
from ensemblelora.report.plotting import short_label, short_labels
from ensemblelora.report.reading import load_record
from ensemblelora.report.records import MethodScores, TaskScore
from ensemblelora.report.story import write_steps
from ensemblelora.report.taskmap import draw_tasks, find_partners
from tests.report_runs import GROUPS, PREDICTED, TASKS, make_affinity, make_planned_run, make_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("parts"))


def draw_values(n: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(n, n))
    return values + values.T


def join_slowly(values: np.ndarray) -> list[tuple[frozenset[int], float]]:
    """Twin of ``build_tree``: look at every pair of sets each time, by the definition of average linkage."""
    sets = [frozenset({task}) for task in range(len(values))]
    joins = []
    while len(sets) > 1:
        means = {(a, b): np.mean([values[i, j] for i in a for j in b]) for a, b in itertools.combinations(sets, 2)}
        (a, b), affinity = max(means.items(), key=lambda item: item[1])
        sets = [one for one in sets if one not in (a, b)] + [a | b]
        joins.append((a | b, affinity))
    return joins


class TestTree:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(2, 9), st.integers(0, 2**32 - 1))
    def test_joins_are_those_of_the_slow_twin(self, n, seed):
        values = draw_values(n, seed)
        tree, slow = build_tree(values), join_slowly(values)
        assert [frozenset(join.first + join.second) for join in tree.joins] == [tasks for tasks, _ in slow]
        np.testing.assert_allclose([join.affinity for join in tree.joins], [affinity for _, affinity in slow])
        assert sorted(tree.order) == list(range(n))
        for join in tree.joins:
            places = sorted(tree.order.index(task) for task in join.first + join.second)
            assert places == list(range(places[0], places[0] + len(places))), "what joins stands together"

    @settings(max_examples=15, deadline=None)
    @given(st.integers(3, 8), st.integers(0, 2**32 - 1))
    def test_names_in_another_order_give_the_same_tree(self, n, seed):
        values, order = draw_values(n, seed), np.random.default_rng(seed).permutation(n)
        turned = build_tree(values[np.ix_(order, order)])
        found = [{int(order[task]) for task in join.first + join.second} for join in turned.joins]
        assert found == [set(join.first + join.second) for join in build_tree(values).joins]

    def test_unknown_pairs_join_last(self):
        values = np.full((3, 3), np.nan)
        values[0, 2] = values[2, 0] = 1.0
        assert set(build_tree(values).joins[0].first + build_tree(values).joins[0].second) == {0, 2}
        assert build_tree(np.zeros((1, 1))).order == (0,)

    def test_every_join_is_drawn_over_its_leaves(self):
        tree = build_tree(draw_values(6, 1))
        lines, leaves = draw_tree(tree, [f"t{i}" for i in range(6)], [0, 0, 1, 1, 2, 2], axis="2")
        tops = [y for y in lines["y"] if y is not None]
        assert max(tops) == len(tree.joins) == 5 and lines["x"].count(None) == 5
        assert leaves["marker"]["color"] == [f"var(--group-{task // 2})" for task in tree.order]
        assert min(x for x in lines["x"] if x is not None) >= 0 and max(x for x in lines["x"] if x is not None) <= 5


class TestCircle:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(3, 8), st.integers(0, 2**32 - 1))
    def test_partners_are_the_best_above_the_usual(self, n, seed):
        values = draw_values(n, seed)
        expected = set()
        for task in range(n):
            others = sorted((j for j in range(n) if j != task), key=lambda j: -values[task, j])[:2]
            expected |= {tuple(sorted((task, j))) for j in others if values[task, j] > 0}
        assert find_partners(values) == sorted(expected)

    def test_every_task_stands_on_the_circle_and_every_pair_is_a_line(self):
        values = remove_levels(make_affinity()["matrix"])
        figure = draw_tasks(values, TASKS, GROUPS)
        marks = [trace for trace in figure.spec["data"] if "markers" in trace["mode"]]
        places = [(x, y) for trace in marks for x, y in zip(trace["x"], trace["y"], strict=True)]
        np.testing.assert_allclose([np.hypot(*place) for place in places], 1, atol=1e-3)
        assert len(set(places)) == len(TASKS) and [len(trace["x"]) for trace in marks] == [4, 3, 3]
        lines = [trace for trace in figure.spec["data"] if trace["mode"] == "lines"]
        assert sum(trace["x"].count(None) for trace in lines) == len(find_partners(values))
        assert len({trace["marker"]["symbol"] for trace in marks}) == 3, "signs tell groups apart without colours"


class TestHelping:
    def test_gains_are_scores_together_less_scores_alone(self, finished):
        record = load_record(finished)
        gains, alone = measure_gains(record), record.plan.predicted.singles.nll
        for i, j in itertools.permutations(range(len(TASKS)), 2):
            assert gains[i, j] == pytest.approx(record.affinity.directed[i, j] + alone[i])
        assert np.isnan(np.diag(gains)).all()

    def test_a_run_that_does_not_say_has_no_such_section(self, tmp_path):
        folder = make_planned_run(tmp_path)
        arrays = {name: value for name, value in make_affinity().items() if name != "directed"}
        save_arrays(folder / "affinity.npz", arrays)
        assert "helping" not in [section.name for section in compose_document(load_record(folder)).sections]


class TestStory:
    def test_tells_what_was_asked_predicted_and_measured(self, finished):
        asked, predicted, outcome = (step.text for step in write_steps(load_record(finished)).steps)
        assert asked == "10 tasks with 1,045 training rows on smollm2-135m: lora of rank 8, 3 epochs."
        assert "3 groups: validation loss 0.723 against 0.751" in predicted and "4 warnings" in predicted, (
            "one is of the training, one of the rows"
        )
        assert "Accuracy 62.0% against 59.7% (one adapter for all): +2.3 points (95% interval 0.4 to 4.2)" in outcome

    def test_a_plan_claims_no_outcome(self, tmp_path):
        assert (
            write_steps(load_record(make_planned_run(tmp_path))).steps[2].text == "Nothing is trained and tested yet."
        )


class TestPareto:
    def test_means_have_the_interval_of_independent_tasks(self):
        scores = {f"t{i}": TaskScore(nll=1.0 + i, nll_low=0.9 + i, nll_high=1.1 + i) for i in range(4)}
        low, value, high = measure_mean(MethodScores(per_task=scores), "nll")
        assert value == 2.5 and (high - low) / 2 == pytest.approx(0.1 * np.sqrt(4) / 4)
        assert measure_mean(MethodScores(per_task=scores), "accuracy") is None

    def test_names_stand_beside_the_intervals_towards_the_middle(self):
        points = [Point(str(cost), str(cost), cost, 0.5, above=0.1) for cost in (1e9, 2e9, 1e12)]
        _, *marks = draw_front(FLOPS, points, "error", names_all=True).spec["data"]
        assert [mark["textposition"].split()[1] for mark in marks] == ["right", "right", "left"]

    def test_no_name_lies_on_another_or_on_a_mark(self):
        ways = {
            "one": (1.0, 0.5),
            "two by two": (9.0, 0.4),
            "three": (9.2, 0.401),
            "four": (9.1, 0.39),
            "five": (5, 0.4),
        }
        points = [Point(name, name, cost, error) for name, (cost, error) in ways.items()]
        _, *marks = draw_front(PASSES, points, "error", names_all=True).spec["data"]
        spots = {mark["text"][0]: mark["textposition"] for mark in marks}
        near = [spots[name] for name in ("two by two", "three", "four")]
        assert len(set(near)) == 3, "three marks side by side have their names at three places"
        assert all(spot.endswith("right") for spot in (spots["one"],)), "towards the middle where there is room"

    def test_every_mark_has_room_for_its_name(self):
        points = [Point(str(cost), str(cost), cost, 0.5) for cost in (1e9, 1e12)]
        low, high = draw_front(FLOPS, points, "error", names_all=True).spec["layout"]["xaxis"]["range"]
        assert low < 9 - 0.5 and high > 12 + 0.5
        alone = draw_front(FLOPS, points[:1], "error").spec["layout"]["xaxis"]["range"]
        assert alone[0] < 9 < alone[1]


class TestDifferences:
    ROWS = tuple(TaskDifference(f"t{i}", i % 2, i - 2.0, i - 2.6, i - 1.4) for i in range(5))

    def test_marks_are_filled_where_the_interval_leaves_out_0(self):
        (trace,) = draw_differences("d", self.ROWS, "Difference", digits=1).spec["data"]
        assert trace["text"] == ["t4", "t3", "t2", "t1", "t0"] and trace["x"] == [2, 1, 0, -1, -2]
        assert [symbol.endswith("-open") for symbol in trace["marker"]["symbol"]] == [False, False, True, False, False]

    def test_many_tasks_are_a_curve_without_names(self):
        rows = [TaskDifference(f"t{i}", 0, float(i), None, None) for i in range(200)]
        figure = draw_differences("d", rows, "Difference", digits=1)
        assert figure.spec["data"][0]["y"][0] == 199 and not figure.spec["layout"]["xaxis"]["showticklabels"]
        assert figure.height < 400


def make_table(n: int) -> Document:
    rows = [Row((Cell(f"r{i}"), Cell(str(i)))) for i in range(n)] + [Row((Cell("mean"), Cell("1")), is_summary=True)]
    table = Table("Many", (Column("Name", is_number=False), Column("Value")), tuple(rows))
    return Document("t", (), "h", (), [Section("s", "S", [table])])


def test_a_long_table_is_folded_and_its_summary_stays_open():
    assert "<details>" not in render_html(make_table(20))
    page = render_html(make_table(100))
    opened, _, folded = page.partition("<details>")
    assert ">mean" in opened and "r50" not in opened and "Many: all 101 rows" in folded and "r50" in folded


def make_large_run(folder: Path, n: int = 500) -> Path:
    """A finished run of many tasks, all of its numbers drawn."""
    rng = np.random.default_rng(0)
    make_run(folder)
    names = [f"role-{i} of the play" for i in range(n)]
    groups = [list(range(g, n, 10)) for g in range(10)]
    matrix = rng.normal(size=(n, n))
    directed = -np.full((n, n), PREDICTED[0]) + rng.normal(0, 0.01, (n, n))
    affinity = {
        "matrix": matrix + matrix.T,
        "directed": directed,
        "counts": np.full((n, n), 40),
        "matrix_se": np.full((n, n), 0.1),
    }
    save_arrays(folder / "affinity.npz", affinity)
    plan, results, ensemble = (read_json(folder / f"{name}.json") for name in ("plan", "results", "ensemble"))
    for way in plan["predicted"].values():
        way |= {key: [way[key][0]] * n for key in ("nll", "nll_se", "accuracy", "accuracy_se")}
    write_json(folder / "plan.json", plan | {"task_names": names, "groups": groups})
    for method in results["methods"].values():
        score = method["per_task"]["boolq"]
        method["per_task"] = {name: score for name in names}
    pairs = [
        {
            "a": "ensemble",
            "b": "shared",
            "metric": "accuracy",
            "task": name,
            "difference": x,
            "low": x - 0.1,
            "high": x + 0.1,
        }
        for name, x in zip(names, rng.normal(0, 0.1, n).tolist(), strict=True)
    ]
    results["differences"] = [item for item in results["differences"] if item["task"] is None] + pairs
    shape = results["linearity"]["tasks"]["boolq"]
    results["linearity"]["tasks"] = {name: shape for name in names}
    point = results["predicted_vs_measured"][0]
    results["predicted_vs_measured"] = [point | {"task": name, "group": i % 10} for i, name in enumerate(names)]
    write_json(folder / "results.json", results)
    weights = np.full((n, 10), 0.02)
    weights[np.arange(n), np.arange(n) % 10] = 0.82
    write_json(folder / "ensemble.json", ensemble | {"weights": weights.tolist(), "routed": [], "members": []})
    (folder / "tasks.json").unlink()
    return folder


def test_a_page_of_500_tasks_stays_small_and_its_long_lists_are_folded(tmp_path):
    page = write_report(make_large_run(tmp_path))
    assert page.stat().st_size < 7_000_000
    source = page.read_text(encoding="utf-8")
    opened = source
    while "<details>" in opened:
        head, _, rest = opened.partition("<details>")
        opened = head + rest.partition("</details>")[2]
    assert opened.count("<tr") < 250, "what is open can be read"
    specs = json.loads(source.split('id="figures">')[1].split("</script>")[0])
    assert "affinity-grouped" in specs and "affinity-tree" not in specs and "differences" in specs
    assert len(specs["helping"]["data"][0]["z"]) == 10, "groups in place of tasks"


def test_labels_keep_the_ends_that_tell_them_apart():
    long = "a_very_long_name_of_a_dataset_in_all_its_detail_plain"
    assert short_label(long).startswith("a_very") and short_label(long).endswith("_plain") and "…" in short_label(long)
    assert short_labels(["demo_sst2_plain", "demo_sst2_turned"]) == ["plain", "turned"]
    assert short_labels(["ab", "ac"]) == ["ab", "ac"] and short_labels(["a_", "a_"]) == ["a_", "a_"]
