"""The statistics of a comparison: against slow twins, and the laws that hold for any numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ensemblelora.comparison.draws import adjust_holm, draw_sample
from ensemblelora.comparison.ledger import add_costs
from ensemblelora.comparison.pareto import draw_pareto
from ensemblelora.comparison.pooled import list_draws, list_pooled, pool_draws
from ensemblelora.comparison.record import Primary, StudyRecord, read_study
from ensemblelora.comparison.statistics import PairedResult, compute_statistics, find_chance_tasks
from ensemblelora.comparison.uncertainty import Error, RowSpread, join_errors, measure_rows
from ensemblelora.evaluation.metrics import compare_paired_tasks, resample_means
from ensemblelora.report.pareto import find_front
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
        assert (result.difference, result.rows_low, result.rows_high) == pytest.approx(
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
    figure = ours.mean["nll"]
    assert figure.low < figure.rows_low < figure.value < figure.rows_high < figure.high, "trainings vary, too"
    assert figure.ends == (figure.low, figure.high)


def test_draws_of_several_columns_are_those_of_each_alone() -> None:
    rng = np.random.default_rng(0)
    columns, groups = rng.random((30, 4)), rng.integers(0, 9, 30)
    together = resample_means(columns, groups, n_bootstrap=50, seed=3, task=2)
    for column in range(4):
        alone = resample_means(columns[:, column : column + 1], groups, n_bootstrap=50, seed=3, task=2)
        np.testing.assert_allclose(together[:, column], alone[:, 0])
    assert np.isnan(resample_means(columns, np.zeros(30), n_bootstrap=5)).all()


def test_the_error_of_rows_is_that_of_a_bootstrap_by_groups() -> None:
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 40, 150)
    values = rng.normal(0, 1, 150) + rng.normal(0, 1, 40)[groups]  # rows of a group are alike
    drawn = resample_means(values[:, None], groups, n_bootstrap=20_000)[:, 0]
    found, alone = measure_rows(values, groups), measure_rows(values, np.arange(150))
    assert found.variance * 39 / 40 == pytest.approx(drawn.var(), rel=0.06)
    assert found.n_groups == 40 and found.variance > 1.5 * alone.variance
    assert alone.variance == pytest.approx(values.var(ddof=1) / 150), "of single rows, the textbook's"
    assert measure_rows(values, np.zeros(150)) is None


def test_with_rows_alone_it_is_a_t_test_of_rows_and_with_seeds_alone_one_of_seeds() -> None:
    rng = np.random.default_rng(2)
    rows, seeds = rng.normal(0.2, 1.0, 30), rng.normal(0.5, 1.0, 4)
    of_rows = join_errors([measure_rows(rows, np.arange(30))], 1, [rows.mean()] * 3)
    of_seeds = join_errors([RowSpread(0.0, 30)], 1, seeds)
    for error, values in ((of_rows, rows), (of_seeds, seeds)):
        test = stats.ttest_1samp(values, 0.0)
        assert error.degrees == pytest.approx(len(values) - 1)
        assert error.p_value(values.mean()) == pytest.approx(test.pvalue)
        assert error.interval(values.mean(), 0.9) == pytest.approx(tuple(test.confidence_interval(0.9)))
    assert join_errors([RowSpread(1.0, 30)], 1, [0.5]) is None, "one seed says nothing of others"
    assert join_errors([], 1, seeds) is None


NOISE = {"rows": (1.0, 0.0, 0.0), "trainings": (0.1, 0.2, 0.0), "both": (1.0, 0.1, 0.0), "crossed": (0.5, 0.05, 1.0)}


@pytest.mark.parametrize("noise", NOISE)
def test_of_studies_with_three_seeds_as_many_intervals_hold_the_truth_as_they_say(noise: str) -> None:
    """Simulated studies without any difference; rows alone would call far too many of them found."""
    of_rows, of_seeds, of_both = NOISE[noise]
    rng, n_studies, n_tasks, n_rows, n_seeds = np.random.default_rng(3), 1500, 3, 50, 3
    held, held_by_rows = [], []
    for _ in range(n_studies):
        rows = of_rows * rng.normal(size=(1, n_tasks, n_rows))
        trainings = of_seeds * rng.normal(size=(n_seeds, 1, 1)) + of_both * rng.normal(size=(n_seeds, n_tasks, n_rows))
        values = rows + trainings
        spreads = [measure_rows(values[:, t].mean(axis=0), np.arange(n_rows)) for t in range(n_tasks)]
        error = join_errors(spreads, n_tasks, values.mean(axis=(1, 2)))
        low, high = error.interval(values.mean(), 0.95)
        held.append(low <= 0 <= high)
        assert held[-1] == (error.p_value(values.mean()) >= 0.05), "interval and p-value are of one mind"
        held_by_rows.append(abs(values.mean()) <= 1.96 * np.sqrt(sum(s.variance for s in spreads)) / n_tasks)
    assert 0.91 <= np.mean(held) <= 0.995
    assert np.mean(held_by_rows) < {"rows": 1.0, "trainings": 0.5, "both": 0.9, "crossed": 0.95}[noise]


def test_a_difference_that_one_lucky_training_makes_is_not_found(tmp_path: Path) -> None:
    """Many rows and seeds that disagree: rows alone are sure, and the three trainings are not."""
    tasks = make_tasks(n_tasks=2, n_rows=400)
    study = read_study(make_study(tmp_path / "lucky", skills={"shared": 0.7, "ours": 0.7}, tasks=tasks))
    gains = {0: 0.0, 1: 0.02, 2: -0.4}  # of each seed's loss

    def shift(nll: dict[str, tuple[float, ...]], by: float) -> dict[str, tuple[float, ...]]:
        return {task: tuple(np.add(values, by)) for task, values in nll.items()}

    shared = study.of("shared")
    ours = [replace(record, method="ours", nll=shift(record.nll, gains[record.seed])) for record in shared]
    found = compute_statistics(replace(study, records=(*shared, *ours)), n_bootstrap=500)
    result = found.find("ours", "shared", "nll")
    assert (result.rows_low, result.rows_high) == pytest.approx((result.difference,) * 2)
    assert result.low < 0 < result.high and result.p_value > 0.3
    assert result.degrees == pytest.approx(2) and result.detectable > 0.5
    assert result.se == pytest.approx(np.std(list(gains.values()), ddof=1) / np.sqrt(3))


def test_one_seed_gives_an_interval_over_rows_and_no_p_value(study: StudyRecord) -> None:
    found = compute_statistics(replace(study, records=tuple(r for r in study.records if r.seed == 0)), n_bootstrap=200)
    for result in (*found.primary, *found.others):
        assert (result.low, result.p_value, result.p_holm, result.se, result.detectable) == (None,) * 5
        assert result.rows_low < result.difference < result.rows_high
    figure = found.methods["ours"].mean["nll"]
    assert figure.low is None and figure.ends == (figure.rows_low, figure.rows_high)


@given(st.floats(0.001, 5), st.floats(1e-3, 3), st.floats(1, 100))
def test_a_p_value_has_no_side_and_falls_with_distance(difference: float, se: float, degrees: float) -> None:
    error = Error(se, degrees)
    assert 0 <= error.p_value(difference) == error.p_value(-difference) <= 1
    assert error.p_value(2 * difference) <= error.p_value(difference) <= error.p_value(0.0) == 1
    low, _ = error.interval(difference, 0.95)
    assert abs(low) < 1e-9 or (low < 0) == (error.p_value(difference) > 0.05)
    assert Error(0.0, 1.0).p_value(difference) is None and Error(0.0, 1.0).p_value(0.0) == 1


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


def test_what_was_named_and_failed_still_counts(study: StudyRecord) -> None:
    more = (*study.head.primary, Primary("ours", "tag"), Primary("grouped", "random"))
    found, before = (
        compute_statistics(replace(study, head=replace(study.head, primary=primary)), n_bootstrap=200)
        for primary in (more, study.head.primary)
    )
    assert (found.n_primary, before.n_primary) == (8, 4) and len(found.primary) == 4
    assert [r.p_value for r in found.primary] == [r.p_value for r in before.primary]
    smallest, same = (min(s.primary, key=lambda r: r.p_value) for s in (found, before))
    assert smallest.p_holm == pytest.approx(min(1.0, 8 * smallest.p_value))
    assert same.p_holm == pytest.approx(min(1.0, 4 * same.p_value))
    assert smallest.detectable_corrected > same.detectable_corrected
    assert adjust_holm([0.01, 0.02], n_more=1) == pytest.approx((0.03, 0.04))


def test_what_could_be_found_follows_from_the_standard_error(study: StudyRecord) -> None:
    result = compute_statistics(study).primary[0]
    t = stats.t(result.degrees)
    assert result.detectable == pytest.approx((t.ppf(0.975) + t.ppf(0.8)) * result.se)
    assert result.detectable_corrected == pytest.approx((t.ppf(1 - 0.025 / 4) + t.ppf(0.8)) * result.se)
    assert result.high - result.low == pytest.approx(2 * t.ppf(0.975) * result.se)
    power = stats.nct.sf(t.ppf(0.975), result.degrees, result.detectable / result.se)
    assert power == pytest.approx(0.8, abs=0.04), "of the exact test"


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


def with_chance(study: StudyRecord, p_values: dict[str, dict[str, float]], seed: int = 0) -> StudyRecord:
    """The study with other p-values on validation rows of one seed, by method and task."""
    return replace(
        study,
        records=tuple(
            replace(r, chance=r.chance | p_values.get(r.method, {})) if r.seed == seed else r for r in study.records
        ),
    )


def test_tasks_at_chance_are_fixed_by_validation_rows_of_base_and_shared(study: StudyRecord) -> None:
    doubtful = with_chance(study, {name: {"task0": 0.4, "task1": 0.02} for name in SKILLS})
    assert find_chance_tasks(study) == ()
    assert find_chance_tasks(doubtful) == ("task0",)
    one_of_two = with_chance(study, {"base": {"task1": 0.9}, "shared": {"task1": 0.04}})
    assert find_chance_tasks(one_of_two) == ("task1",), "the smaller of two is corrected for"
    for few in (("base", "shared"), ("shared", "base", "ours", "single")):
        part = replace(doubtful, records=tuple(r for r in doubtful.records if r.method in few))
        assert find_chance_tasks(part) == ("task0",), "whatever else is compared"
    assert find_chance_tasks(with_chance(study, {name: {"task0": 0.9} for name in SKILLS}, seed=1)) == ()
    assert find_chance_tasks(with_chance(study, {"ours": {"task2": 0.9}, "single": {"task2": 0.9}})) == ()
    alone = replace(doubtful, records=doubtful.of("base"))
    assert find_chance_tasks(alone) == (), "of what can be learnt nothing is known"
    poisoned = replace(
        doubtful, records=tuple(replace(r, correct=dict.fromkeys(r.correct, (0,) * 40)) for r in doubtful.records)
    )
    assert find_chance_tasks(poisoned) == ("task0",), "test rows don't matter"


def test_primary_comparisons_are_made_over_all_tasks_and_over_those_above_chance(study: StudyRecord) -> None:
    doubtful = with_chance(study, {name: {"task0": 0.4} for name in SKILLS})
    found = compute_statistics(doubtful, n_bootstrap=200)
    lines = [(r.metric, r.is_above_chance, r.n_tasks) for r in found.primary[:4]]
    assert lines == [("accuracy", False, 3), ("accuracy", True, 2), ("nll", False, 4), ("nll", True, 3)]
    assert found.n_primary == len(found.primary) == 8 and not any(r.is_above_chance for r in found.others)
    above: PairedResult = found.primary[1]
    rows = [[average(study, name, task, "accuracy") for task in ("task1", "task2")] for name in ("ours", "shared")]
    assert above.difference == pytest.approx(np.mean([a.mean() - b.mean() for a, b in zip(*rows, strict=True)]))
    assert found.find("ours", "shared", "accuracy") is found.primary[0]
    shared = found.methods["shared"]
    assert shared.mean_above_chance["accuracy"].n_tasks == 2


def test_a_task_with_one_group_of_rows_is_in_the_mean_and_not_in_the_draws(tmp_path: Path) -> None:
    tasks = list(make_tasks(n_tasks=3))
    tasks[1] = replace(tasks[1], groups=(0,) * 40)
    study = read_study(make_study(tmp_path / "lone", tasks=tasks))
    found = compute_statistics(study, n_bootstrap=400)
    assert found.undrawn == ("task1",)
    result = found.find("ours", "shared", "nll")
    gaps = [average(study, "ours", t.name, "nll") - average(study, "shared", t.name, "nll") for t in tasks]
    assert result.difference == pytest.approx(np.mean([gap.mean() for gap in gaps])) and result.p_value is not None
    spreads = [measure_rows(gap, task.groups) for gap, task in zip(gaps, tasks, strict=True)]
    assert spreads[1] is None
    rows = sum(spread.variance for spread in spreads if spread) / 9
    assert result.se == pytest.approx(np.sqrt(rows + result.seed_sd**2 / 3))
    assert result.low < result.rows_low < result.difference < result.rows_high < result.high
    figure = found.methods["ours"].per_task["task1"]["nll"]
    assert figure.value == pytest.approx(average(study, "ours", "task1", "nll").mean())
    assert (figure.low, figure.rows_low) == (None, None)


def test_draws_of_one_thing_are_one_method(tmp_path: Path) -> None:
    skills = {"shared": 0.7, "grouped": 0.8, "random-1": 0.5, "random-2": 0.9, "random-ours-1": 0.6}
    folder = make_study(tmp_path / "draws", skills=skills, primary=[Primary("grouped", "random")])
    study = read_study(folder)
    assert list_pooled(study.methods) == ("random", "random-ours")
    assert list_draws("random", study.methods) == ("random-1", "random-2") and list_draws("tag", ["x"]) == ("tag",)
    fewer = replace(study, records=tuple(r for r in study.records if (r.method, r.seed) != ("random-2", 1)))
    assert [record.seed for record in pool_draws(fewer).of("random")] == [0, 2], "seeds that all draws have"
    found = compute_statistics(study, n_bootstrap=200)
    both = [average(study, f"random-{k}", "task0", "accuracy").mean() for k in (1, 2)]
    assert found.methods["random"].per_task["task0"]["accuracy"].value == pytest.approx(np.mean(both))
    assert [(r.a, r.b) for r in found.primary] == [("grouped", "random")] * 2
    gap = found.primary[0].difference
    apart = [found.find(f"random-{k}", "shared", "accuracy").difference for k in (1, 2)]
    ours = found.find("grouped", "shared", "accuracy").difference
    assert gap == pytest.approx(ours - np.mean(apart))
    costs = found.methods["random"].costs
    assert costs.train_flops == 2.5e9 and costs.peak_memory_bytes == 1e9 + 2
    assert "random" not in study.methods, "records are of what was carried out"


def test_costs_are_means_over_seeds_and_the_search_stands_apart(study: StudyRecord) -> None:
    costs = add_costs(study.head.tasks, study.of("ours"))
    assert (costs.train_flops, costs.select_flops, costs.seconds) == (4e9, 1e8, 11.0)
    assert (costs.peak_memory_bytes, costs.added_memory_bytes) == (1e9 + 2, 1e8 + 2)
    assert costs.infer_flops == 100 + 4 * 50
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
