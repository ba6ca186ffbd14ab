"""The statistics of a comparison: against slow twins, and the laws that hold for any numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ensemblelora.comparison.draws import adjust_holm, compute_bootstrap_p_value, draw_sample
from ensemblelora.comparison.ledger import add_costs
from ensemblelora.comparison.pareto import draw_pareto, find_front
from ensemblelora.comparison.record import Primary, StudyRecord, read_study
from ensemblelora.comparison.statistics import compute_statistics, find_chance_tasks
from ensemblelora.evaluation.metrics import compare_paired_tasks, compute_chance_p_value, resample_means
from tests.study_records import SKILLS, make_study, make_tasks


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyRecord:
    folder = tmp_path_factory.mktemp("study") / "compared"
    return read_study(make_study(folder, tasks=make_tasks(free_text=True)))


def average(study: StudyRecord, method: str, task: str, metric: str) -> np.ndarray:
    """Rows' values averaged over seeds, one by one."""
    values = [record.nll if metric == "nll" else record.correct for record in study.of(method)]
    return np.array([[float(x) for x in value[task]] for value in values]).mean(axis=0)


@pytest.mark.parametrize("metric", ["nll", "accuracy"])
def test_differences_are_those_of_one_pair_at_a_time(study: StudyRecord, metric: str) -> None:
    found = compute_statistics(study, n_bootstrap=500)
    tasks = [task for task in study.head.tasks if metric == "nll" or task.kind != "sequence"]
    for result in [r for r in (*found.primary, *found.others) if r.metric == metric]:
        rows = [[average(study, name, task.name, metric) for task in tasks] for name in (result.a, result.b)]
        slow = compare_paired_tasks(*rows, [task.groups for task in tasks], n_bootstrap=500, seed=study.config.seed)
        assert (result.difference, result.low, result.high) == pytest.approx(
            (slow.difference, slow.low, slow.high), abs=1e-9
        )
        assert result.n_seeds == 3
        per_seed = [
            np.mean(
                [
                    np.mean(getattr(one, "nll" if metric == "nll" else "correct")[task.name])
                    - np.mean(getattr(other, "nll" if metric == "nll" else "correct")[task.name])
                    for task in tasks
                ]
            )
            for one, other in zip(study.of(result.a), study.of(result.b), strict=True)
        ]
        assert result.seed_sd == pytest.approx(np.std(per_seed, ddof=1))


def test_means_of_a_method_count_tasks_equally(study: StudyRecord) -> None:
    ours = compute_statistics(study).methods["ours"]
    tasks = [task.name for task in study.head.tasks]
    by_seed = [[np.mean(record.nll[task]) for task in tasks] for record in study.of("ours")]
    assert ours.mean["nll"].value == pytest.approx(np.mean(by_seed))
    assert ours.mean["nll"].per_seed == pytest.approx(np.mean(by_seed, axis=1))
    assert ours.mean["nll"].seed_sd == pytest.approx(np.std(np.mean(by_seed, axis=1), ddof=1))
    assert ours.per_task["task1"]["nll"].value == pytest.approx(np.mean([row[1] for row in by_seed]))
    assert (ours.mean["nll"].n_tasks, ours.mean["accuracy"].n_tasks) == (4, 3)
    assert "accuracy" not in ours.per_task["written"] and "nll" in ours.per_task["written"]
    assert ours.mean["nll"].low < ours.mean["nll"].value < ours.mean["nll"].high


def test_draws_of_several_columns_are_those_of_each_alone() -> None:
    rng = np.random.default_rng(0)
    columns, groups = rng.random((30, 4)), rng.integers(0, 9, 30)
    together = resample_means(columns, groups, n_bootstrap=50, seed=3, task=2)
    for column in range(4):
        alone = resample_means(columns[:, column : column + 1], groups, n_bootstrap=50, seed=3, task=2)
        np.testing.assert_allclose(together[:, column], alone[:, 0])
    assert np.isnan(resample_means(columns, np.zeros(30), n_bootstrap=5)).all()


def test_the_p_value_is_that_of_a_t_test_where_that_holds() -> None:
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.05, 0.15, 0.3):
        values = rng.normal(shift, 1.0, 400)
        draws = resample_means(values[:, None], np.arange(400), n_bootstrap=4000)[:, 0]
        assert compute_bootstrap_p_value(values.mean(), draws) == pytest.approx(
            stats.ttest_1samp(values, 0.0).pvalue, abs=0.02
        )


def test_under_no_difference_p_values_are_uniform() -> None:
    rng = np.random.default_rng(2)
    found = []
    for _ in range(400):
        values = rng.normal(0.0, 1.0, 60)
        draws = resample_means(values[:, None], np.arange(60), n_bootstrap=300)[:, 0]
        found.append(compute_bootstrap_p_value(values.mean(), draws))
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(np.array(found) < 0.5) == pytest.approx(0.5, abs=0.08)


@given(st.floats(0.001, 5), st.lists(st.floats(-3, 3), min_size=5, max_size=50))
def test_a_p_value_has_no_side_and_is_never_zero(difference: float, noise: list[float]) -> None:
    draws = difference + np.array(noise)
    p_value = compute_bootstrap_p_value(difference, draws)
    assert 1 / (len(noise) + 1) <= p_value <= 1
    assert compute_bootstrap_p_value(-difference, -draws) == p_value
    assert compute_bootstrap_p_value(2 * difference, difference + draws) <= p_value, "farther from zero, same scatter"
    assert compute_bootstrap_p_value(0.0, np.array(noise)) == 1.0
    assert compute_bootstrap_p_value(difference, [math.nan, 1.0]) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_the_closed_bonferroni_test(p_values: list[float]) -> None:
    adjusted = adjust_holm(p_values)
    m = len(p_values)
    assert all(p <= q <= min(1.0, m * p) + 1e-12 for p, q in zip(p_values, adjusted, strict=True))
    order = sorted(range(m), key=lambda i: p_values[i])
    assert all(adjusted[i] <= adjusted[j] + 1e-12 for i, j in pairwise(order))
    # Step by step, as the procedure is told: reject while p <= level / (number left), then stop.
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, i in enumerate(order):
            if p_values[i] * (m - rank) > level:
                break
            rejected.add(i)
        assert {i for i, q in enumerate(adjusted) if q <= level} == rejected


def test_primary_comparisons_of_both_metrics_are_corrected_together(study: StudyRecord) -> None:
    found = compute_statistics(study)
    assert [(r.a, r.b) for r in found.primary] == [("ours", "shared")] * 2 + [("ours", "mtl-ft")] * 2
    assert [r.p_holm for r in found.primary] == pytest.approx(adjust_holm([r.p_value for r in found.primary]))
    assert {r.p_holm for r in found.others} == {None}
    assert {(r.a, r.b) for r in found.others} == {(name, "shared") for name in SKILLS if name not in ("shared", "ours")}
    assert found.find("ours", "mtl-ft", "nll") is found.primary[3]


def test_what_could_be_found_follows_from_the_standard_error(study: StudyRecord) -> None:
    result = compute_statistics(study).primary[0]
    normal = stats.norm
    assert result.detectable == pytest.approx((normal.ppf(0.975) + normal.ppf(0.8)) * result.se)
    assert result.detectable_corrected == pytest.approx((normal.ppf(1 - 0.025 / 4) + normal.ppf(0.8)) * result.se)
    assert result.se == pytest.approx((result.high - result.low) / (2 * 1.96), rel=0.1)


def test_equal_methods_differ_by_nothing(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "same", skills={"shared": 0.7, "ours": 0.7})
    study = read_study(folder)
    twin = [replace(record, method="ours", title="twin") for record in study.of("shared")]
    found = compute_statistics(replace(study, records=(*study.of("shared"), *twin)))
    for result in found.primary:
        assert (result.difference, result.p_value, result.p_holm, result.se) == (0, 1, 1, 0)
        assert result.detectable is None, "no rows that differ say nothing of what could be found"


def test_seeds_that_one_method_lacks_are_left_out_of_its_comparisons(study: StudyRecord) -> None:
    fewer = replace(study, records=tuple(r for r in study.records if (r.method, r.seed) != ("ours", 1)))
    found = compute_statistics(fewer, n_bootstrap=200)
    assert found.methods["ours"].seeds == (0, 2) and found.methods["shared"].seeds == (0, 1, 2)
    result = found.find("ours", "shared", "nll")
    tasks = [task.name for task in study.head.tasks]
    expected = [
        np.mean([np.mean(a.nll[task]) - np.mean(b.nll[task]) for task in tasks])
        for a, b in zip(study.of("ours"), study.of("shared"), strict=True)
        if a.seed != 1
    ]
    assert (result.n_seeds, result.difference) == (2, pytest.approx(np.mean(expected)))


def test_tasks_at_chance_are_those_where_no_method_beats_the_commonest_class(tmp_path: Path) -> None:
    tasks = make_tasks(n_tasks=2, n_rows=80)
    study = read_study(make_study(tmp_path / "chance", skills={"base": 0.5, "shared": 0.5}, tasks=tasks))
    blind = replace(study.records[0], correct={"task0": (0,) * 80, "task1": tasks[1].labels})
    right = replace(study.records[0], correct={"task0": (0,) * 80, "task1": (1,) * 80})
    assert find_chance_tasks(replace(study, records=(blind,))) == ("task0", "task1")
    assert find_chance_tasks(replace(study, records=(blind, replace(right, method="shared")))) == ("task0",)
    found = compute_statistics(replace(study, records=(blind, replace(right, method="shared"))))
    shared = found.methods["shared"]
    assert shared.mean["accuracy"].value == 0.5 and shared.mean_above_chance["accuracy"].value == 1.0


def test_a_task_is_above_chance_by_all_seeds_together(tmp_path: Path) -> None:
    tasks = make_tasks(n_tasks=1, n_rows=30)
    study = read_study(make_study(tmp_path / "seeds", skills={"shared": 0.7}, tasks=tasks))
    answers = [record.correct["task0"] for record in study.records]
    together = compute_chance_p_value(np.concatenate(answers), np.tile(tasks[0].labels, 3), np.tile(tasks[0].groups, 3))
    # A group's seeds are one value: thrice the same answers say no more than once.
    once = compute_chance_p_value(answers[0], tasks[0].labels, tasks[0].groups)
    thrice = compute_chance_p_value(answers[0] * 3, np.tile(tasks[0].labels, 3), np.tile(tasks[0].groups, 3))
    assert thrice == pytest.approx(once)
    assert (find_chance_tasks(study) == ()) == (together < 0.05)


def test_costs_are_means_over_seeds_and_the_search_stands_apart(study: StudyRecord) -> None:
    costs = add_costs(study.head.tasks, study.of("ours"))
    assert (costs.train_flops, costs.select_flops, costs.seconds) == (4e9, 1e8, 11.0)
    assert costs.peak_memory_bytes == 1e9 + 2 and costs.infer_flops == 100 + 4 * 50
    assert (costs.grid_flops, costs.grid_seconds) == (5e9 + 1e8, 3.0), "of the one rate not chosen"
    assert add_costs(study.head.tasks, study.of("base")).grid_flops == 0


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nobody_beats(points: list[tuple[int, int]]) -> None:
    front = find_front(points)

    def is_beaten(i: int) -> bool:
        return any(q[0] <= points[i][0] and q[1] <= points[i][1] and q != points[i] for q in points)

    assert {points[i] for i in front} == {p for i, p in enumerate(points) if not is_beaten(i)}
    assert all(points[i][0] < points[j][0] and points[i][1] > points[j][1] for i, j in pairwise(front))


def test_pictures_leave_out_what_costs_nothing(study: StudyRecord) -> None:
    figures = {figure.name: figure for figure in draw_pareto(compute_statistics(study, n_bootstrap=200))}
    assert set(figures) == {"pareto-flops", "pareto-passes", "pareto-bytes", "pareto-memory"}
    for name, n_points in (("pareto-flops", 4), ("pareto-passes", 5)):
        shown = [trace for trace in figures[name].spec["data"] if "markers" in trace["mode"]]
        assert len(shown) == n_points
    assert "no other beats shared (" in figures["pareto-flops"].alt and "base" not in figures["pareto-flops"].alt


def test_pairs_without_results_are_left_out(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "few", skills={"shared": 0.7, "ours": 0.8}, primary=[Primary("ours", "tag")])
    found = compute_statistics(read_study(folder), reference="tag")
    assert (found.primary, found.others, found.reference) == ((), (), None)
    sample = draw_sample(read_study(folder), [], n_bootstrap=10, seed=0)
    assert sample.list_tasks("accuracy") == ("task0", "task1", "task2")
