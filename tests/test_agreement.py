"""Agreement of predicted with true performance: against plain loops and scipy, and by laws on planted data."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import adjusted_rand_score

from ensemblelora.affinity import SubsetDesign, affinity_from_scores
from ensemblelora.errors import DataError
from ensemblelora.grouping import compute_objective, find_best_partition
from ensemblelora.validation.agreement import Estimate, Figures, compare_predictions, describe_cells
from ensemblelora.validation.cells import collect_cells
from ensemblelora.validation.groupings import _judge_random_groups, compare_groupings
from ensemblelora.validation.moments import correlate, estimate_run_variance, rank
from ensemblelora.validation.resampling import Units, bootstrap

WITHIN = ("within_pearson", "within_spearman", "corrected_within_pearson", "reliability", "slope", "r2_over_task_mean")


def membership(subsets, n_tasks: int) -> np.ndarray:
    return np.array([[i in subset for i in range(n_tasks)] for subset in subsets])


def simulate(seed: int = 0, *, n=6, n_triples=12, rho=0.8, signal=0.05, noise=0.05, n_seeds=3, share_repeated=0.5):
    """Values of singles, triples and all tasks: a task's level, a signal the prediction knows in part, and noise."""
    rng = np.random.default_rng(seed)
    triples = list(itertools.combinations(range(n), 3))
    chosen = [triples[s] for s in rng.choice(len(triples), n_triples, replace=False)]
    subsets = (*((i,) for i in range(n)), *chosen, tuple(range(n)))
    level, shape = 1 + np.linspace(0, 0.5, n), (len(subsets), n)
    known, unknown = signal * rng.normal(size=(2, *shape))
    predicted = level + 0.04 + rho * known + np.sqrt(1 - rho**2) * unknown
    truth = level + known + noise * rng.normal(size=(n_seeds, *shape))
    truth[:, ~membership(subsets, n)] = np.nan
    truth[1:, rng.permutation(len(subsets)) >= share_repeated * len(subsets)] = np.nan
    return truth, predicted, subsets, level + 0.7


def describe(truth, predicted, subsets, base, *, n_bootstrap=0, seed=0) -> Figures:
    cells = collect_cells(truth, predicted, subsets, base)
    generator = np.random.default_rng(seed)
    return describe_cells(cells, n_bootstrap=n_bootstrap, confidence=0.95, generator=generator)


def values_of(figures: Figures) -> dict[str, float | None]:
    return {name: part.value for name, part in vars(figures).items() if isinstance(part, Estimate)}


def average_seeds(truth) -> np.ndarray:
    counts = (~np.isnan(truth)).sum(axis=0)
    return np.where(counts > 0, np.nansum(truth, axis=0) / np.maximum(counts, 1), np.nan)


# --- plain twins ---------------------------------------------------------------------------------------------------


def slow_figures(truth, predicted, base) -> dict[str, float]:
    """Every figure by loops over tasks and cells."""
    _, k, n = truth.shape
    cells = [(s, i) for i in range(n) for s in range(k) if np.isfinite(truth[:, s, i]).any()]
    runs = {(s, i): (values := truth[:, s, i])[np.isfinite(values)] for s, i in cells}
    f = {cell: runs[cell].mean() for cell in cells}
    p = {cell: predicted[cell] for cell in cells}
    flat_f, flat_p = np.array([f[c] for c in cells]), np.array([p[c] for c in cells])
    found = {
        "relative_error": np.mean([abs(p[c] - f[c]) / abs(f[c]) for c in cells]),
        "rmse": np.sqrt(np.mean((flat_p - flat_f) ** 2)),
        "bias": np.mean(flat_p - flat_f),
        "pearson": stats.pearsonr(flat_p, flat_f)[0],
        "spearman": stats.spearmanr(flat_p, flat_f)[0],
        "r2_over_base": 1 - np.sum((flat_p - flat_f) ** 2) / sum((base[i] - f[s, i]) ** 2 for s, i in cells),
    }
    df, dp, rf, rp, others, variance, degrees, missed = [], [], [], [], [], {}, 0, 0.0
    for i in range(n):
        mine = [c for c in cells if c[1] == i]
        spare = [c for c in mine if len(runs[c]) > 1]
        if spare:
            variance[i] = sum(runs[c].var() * len(runs[c]) for c in spare) / sum(len(runs[c]) - 1 for c in spare)
        if len(mine) < 2:
            continue
        tf, tp = np.array([f[c] for c in mine]), np.array([p[c] for c in mine])
        df, dp = [*df, *(tf - tf.mean())], [*dp, *(tp - tp.mean())]
        rf.extend(stats.rankdata(tf) / len(mine) - (len(mine) + 1) / 2 / len(mine))
        rp.extend(stats.rankdata(tp) / len(mine) - (len(mine) + 1) / 2 / len(mine))
        others.extend(tf[s] - np.delete(tf, s).mean() for s in range(len(mine)))
        degrees += len(mine) - 1
        missed += sum((tp - tf) ** 2)
    pooled = sum(runs[c].var() * len(runs[c]) for c in cells) / sum(len(runs[c]) - 1 for c in cells)
    noise, whole, spread = 0.0, 0.0, np.sum(np.square(df))
    for i in range(n):
        mine = [c for c in cells if c[1] == i]
        of_means = [variance.get(i, pooled) / len(runs[c]) for c in mine]
        noise += sum(of_means) * (1 - 1 / len(mine)) if mine else 0.0
        whole += sum(of_means) if len(mine) > 1 else 0.0
    per_cell = [variance.get(i, pooled) for _, i in cells]
    reliability = 1 - noise / spread
    r = stats.pearsonr(df, dp)[0]
    return found | {
        "within_pearson": r,
        "within_spearman": np.dot(rf, rp) / np.sqrt(np.dot(rf, rf) * np.dot(rp, rp)),
        "corrected_within_pearson": np.clip(r / np.sqrt(reliability), -1, 1),
        "reliability": reliability,
        "noise_sd": np.sqrt(np.mean(per_cell)),
        "mean_noise_sd": np.sqrt(np.mean([v / len(runs[c]) for v, c in zip(per_cell, cells, strict=True)])),
        "signal_sd": np.sqrt((spread - noise) / degrees),
        "ceiling_within_pearson": np.sqrt(reliability),
        "ceiling_r2_over_task_mean": 1 - whole / spread,
        "r2_over_task_mean": 1 - missed / spread,
        "r2_over_other_mean": 1 - missed / np.sum(np.square(others)),
        "r2_of_differences": 1 - np.sum(np.subtract(df, dp) ** 2) / spread,
        "slope": stats.linregress(dp, df).slope,
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_triples", [2, 12])
def test_every_figure_is_what_plain_loops_give(seed, n_triples):
    truth, predicted, subsets, base = simulate(seed, n_triples=n_triples, noise=0.02, share_repeated=0.8)
    if n_triples == 2:
        truth[:, -1] = np.nan  # so that some tasks have a single cell
        assert 1 in np.isfinite(truth).any(axis=0).sum(axis=0)
    found = values_of(describe(truth, predicted, subsets, base))
    expected = slow_figures(truth, predicted, base)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-9)


numbers = st.integers(-4, 4).map(float)  # ties are common


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), numbers, numbers, st.integers(0, 3)), min_size=2, max_size=20))
def test_a_weight_of_two_is_a_copy(rows):
    block, x, y, weight = (np.array(column) for column in zip(*sorted(rows), strict=True))
    copies = np.repeat(np.arange(len(rows)), weight)
    starts = np.flatnonzero(np.diff(block, prepend=-1))
    weights = weight[None].astype(float)
    parts = [copies[block[copies] == b] for b in np.unique(block[copies])]
    ranks = [np.concatenate([stats.rankdata(v[part]) / len(part) for part in parts] or [[]]) for v in (x, y)]
    moved = [np.concatenate([v[part] - v[part].mean() for part in parts] or [[]]) for v in (x, y)]
    moved_ranks = [np.concatenate([r - r.mean() for r in np.split(v, np.cumsum([len(p) for p in parts])[:-1])])
                   for v in ranks] if parts else ranks  # fmt: skip
    for (a, b), found in [
        (moved, correlate(weights, x, y, starts)),
        (moved_ranks, correlate(weights, rank(weights, x, starts), rank(weights, y, starts), starts)),
    ]:
        norm = np.sqrt((a**2).sum() * (b**2).sum())
        if norm < 1e-12:
            assert np.isnan(found[0])
        else:
            assert found[0] == pytest.approx((a * b).sum() / norm, abs=1e-9)


def test_the_variance_between_seeds_is_unbiased_however_many_each_cell_has():
    rng = np.random.default_rng(0)
    n_runs, starts = np.array([1, 2, 3, 2, 5, 1, 1]), np.array([0, 3, 5])
    sd = np.repeat([1.0, 2.0, 1.5], [3, 2, 2])
    found = []
    for _ in range(3000):
        squares = np.array([np.var(s * rng.normal(size=r)) * r for s, r in zip(sd, n_runs, strict=True)])
        found.append(estimate_run_variance(np.ones((1, 7)), squares, n_runs, starts)[0])
    mean = np.mean(found, axis=0)
    pooled = (1 * 3 + 4 * 5) / 8  # by degrees of freedom; the last task has none of its own
    np.testing.assert_allclose(mean, [1] * 3 + [4] * 2 + [pooled] * 2, rtol=0.05)


def test_too_few_repeats_say_nothing_about_noise():
    once, squares, starts = np.ones((1, 6)), np.full(6, 0.1), np.zeros(1, dtype=int)
    assert np.isnan(estimate_run_variance(once, squares, np.array([2, 2, 2, 2, 1, 1]), starts)).all()
    assert np.isfinite(estimate_run_variance(once, squares, np.array([2, 2, 2, 2, 2, 1]), starts)).all()


# --- laws ----------------------------------------------------------------------------------------------------------


def test_a_perfect_predictor_is_perfect():
    truth, _, subsets, base = simulate(noise=0.0)
    found = values_of(describe(truth, np.nan_to_num(average_seeds(truth)), subsets, base))
    zeros = {"relative_error", "rmse", "bias", "noise_sd", "mean_noise_sd"}
    for name, value in found.items():
        if name != "signal_sd":
            assert value == pytest.approx(0.0 if name in zeros else 1.0, abs=1e-12), name


def test_the_correction_recovers_the_correlation_that_noise_hides():
    plain, corrected = [], []
    for seed in range(250):
        found = describe(*simulate(seed, n=10, n_triples=60, rho=0.8, signal=0.05, noise=0.06))
        plain.append(found.within_pearson.value)
        corrected.append(found.corrected_within_pearson.value)
    assert np.mean(plain) < 0.62, "the noise hides little: the test shows nothing"
    assert np.mean(corrected) == pytest.approx(0.8, abs=0.02)


def test_the_ceilings_are_what_a_perfect_predictor_reaches_against_noise():
    reached, ceiling, differences = [], [], []
    for seed in range(200):
        truth, predicted, subsets, base = simulate(seed, n=8, n_triples=40, rho=1.0, noise=0.05)
        found = describe(truth, predicted - 0.04, subsets, base)  # simulate() adds a bias
        reached.append((found.within_pearson.value, found.r2_over_task_mean.value))
        ceiling.append((found.ceiling_within_pearson.value, found.ceiling_r2_over_task_mean.value))
        differences.append(found.r2_of_differences.value - found.reliability.value)
    np.testing.assert_allclose(np.mean(reached, axis=0), np.mean(ceiling, axis=0), atol=0.015)
    assert np.mean(differences) == pytest.approx(0.0, abs=0.01)


def test_the_estimated_noise_and_signal_are_those_planted():
    found = [describe(*simulate(seed, n=10, n_triples=60, signal=0.04, noise=0.07)) for seed in range(60)]
    assert np.mean([figures.noise_sd.value for figures in found]) == pytest.approx(0.07, rel=0.03)
    assert np.mean([figures.signal_sd.value for figures in found]) == pytest.approx(0.04, rel=0.08)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rho, names = 0.8, ("rmse", "within_pearson", "corrected_within_pearson", "slope")
    options = {"n": 10, "n_triples": 50, "signal": 0.05, "noise": 0.04, "share_repeated": 1.0}
    many = [values_of(describe(*simulate(10_000 + seed, **options))) for seed in range(100)]
    expected = {name: np.mean([values[name] for values in many]) for name in names}
    expected["corrected_within_pearson"] = rho
    n_held = dict.fromkeys(names, 0)
    for seed in range(150):
        found = describe(*simulate(seed, **options), n_bootstrap=200, seed=seed)
        for name in names:
            estimate = getattr(found, name)
            n_held[name] += estimate.low <= expected[name] <= estimate.high
    for name, n in n_held.items():
        assert 130 <= n <= 149, f"{name}: intervals at 95 % held the truth in {n} of 150 data sets"


def test_predicting_each_tasks_mean_is_worth_nothing_within_tasks():
    truth, _, subsets, base = simulate()
    mean = np.nanmean(average_seeds(truth), axis=0)
    found = describe(truth, np.tile(mean, (len(subsets), 1)), subsets, base, n_bootstrap=50)
    for name in ("within_pearson", "within_spearman", "corrected_within_pearson", "slope"):
        assert getattr(found, name) == Estimate(None, None, None)
    assert found.r2_over_task_mean.value == pytest.approx(0.0, abs=1e-12)
    assert found.r2_of_differences.value == pytest.approx(0.0, abs=1e-12)
    assert found.r2_over_other_mean.value > 0, "the others' mean has not seen the cell, so it is the worse one"
    assert found.pearson.value > 0.8
    off = describe(truth, np.tile(mean + 0.1, (len(subsets), 1)), subsets, base)
    assert off.r2_over_task_mean.value < 0


def test_a_tasks_level_changes_nothing_within_tasks():
    truth, predicted, subsets, base = simulate()
    shift = np.random.default_rng(1).normal(size=len(base))
    found, moved = (describe(truth, p, subsets, base, n_bootstrap=50) for p in (predicted, predicted + shift))
    for name in (*WITHIN[:-1], "r2_of_differences"):
        for end in ("value", "low", "high"):
            assert getattr(getattr(moved, name), end) == pytest.approx(getattr(getattr(found, name), end), rel=1e-9)
    assert moved.rmse.value > found.rmse.value


def test_the_order_of_subsets_changes_nothing_at_all():
    truth, predicted, subsets, base = simulate()
    order = np.random.default_rng(2).permutation(len(subsets))
    shuffled = truth[:, order], predicted[order], tuple(subsets[s] for s in order), base
    assert compare_predictions(*shuffled, n_bootstrap=20) == compare_predictions(
        truth, predicted, subsets, base, n_bootstrap=20
    )


def test_the_numbering_of_tasks_changes_no_figure():
    truth, predicted, subsets, base = simulate()
    new = np.random.default_rng(3).permutation(len(base))  # task i is called new[i]
    old = np.argsort(new)
    renamed = tuple(tuple(sorted(new[list(subset)].tolist())) for subset in subsets)
    found = compare_predictions(truth, predicted, subsets, base, n_bootstrap=0, marked=[1])
    moved = compare_predictions(
        truth[:, :, old], predicted[:, old], renamed, base[old], n_bootstrap=0, marked=[int(new[1])]
    )
    assert values_of(moved.overall) == pytest.approx(values_of(found.overall), rel=1e-9)
    for i, figures in found.per_task.items():
        ours = {k: v for k, v in values_of(figures).items() if v is not None}
        theirs = {k: v for k, v in values_of(moved.per_task[int(new[i])]).items() if v is not None}
        assert theirs == pytest.approx(ours, rel=1e-9)
    assert moved.transfer[0].share_agreeing.value == pytest.approx(found.transfer[0].share_agreeing.value)
    assert moved.one_or_all.true_mean.value == pytest.approx(found.one_or_all.true_mean.value)


def test_equal_seeds_give_equal_intervals_and_others_others():
    data = simulate()
    first, again, other = (compare_predictions(*data, n_bootstrap=100, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.overall.rmse.value == other.overall.rmse.value and first.overall.rmse != other.overall.rmse


def test_drawing_in_blocks_gives_as_many_draws(monkeypatch):
    data = simulate()
    whole = describe(*data, n_bootstrap=300)
    monkeypatch.setattr("ensemblelora.validation.resampling._MAX_DRAWN_NUMBERS", 1000)
    parts = describe(*data, n_bootstrap=300)
    assert parts.rmse.low == pytest.approx(whole.rmse.low, rel=0.05) and parts.rmse.value == whole.rmse.value


def test_an_interval_that_mostly_does_not_exist_is_none():
    units = Units(np.arange(4), np.zeros(4, dtype=np.int64))

    def first_cell(weights):
        return {"x": np.where(weights[:, 0] > 0, 1.0, np.nan)}

    found = bootstrap(first_cell, [units], n_bootstrap=200, confidence=0.9, generator=np.random.default_rng(0))
    assert found["x"] == Estimate(1.0, None, None)


# --- what is missing -----------------------------------------------------------------------------------------------


def test_one_seed_gives_everything_but_the_noise():
    truth, predicted, subsets, base = simulate(n_seeds=1)
    found = compare_predictions(truth, predicted, subsets, base, n_bootstrap=50)
    assert found.overall.noise_degrees == 0
    for name in ("noise_sd", "mean_noise_sd", "signal_sd", "reliability", "corrected_within_pearson",
                 "ceiling_within_pearson", "ceiling_r2_over_task_mean"):  # fmt: skip
        assert getattr(found.overall, name) == Estimate(None, None, None), name
    assert found.overall.within_pearson.low < found.overall.within_pearson.value < found.overall.within_pearson.high
    assert found.transfer[0].weighted_share.value is None and found.transfer[0].n_clear is None
    assert found.transfer[0].clear_share.value is None and found.transfer[0].share_agreeing.value is not None


def test_noise_that_explains_all_there_is_leaves_no_correlation_to_correct():
    truth, predicted, subsets, base = simulate(5, signal=1e-4, noise=0.1, share_repeated=1.0)
    truth -= average_seeds(truth) - 1.0  # the means don't differ, the seeds do
    found = describe(truth + 1e-3 * predicted, predicted, subsets, base, n_bootstrap=50)
    assert found.reliability.value < 0 and found.corrected_within_pearson == Estimate(None, None, None)
    assert found.ceiling_within_pearson.value == 0.0 and found.signal_sd.value == 0.0


@pytest.mark.parametrize("subset", [(0,), (0, 2), (0, 1, 2)])
def test_one_subset_alone(subset):
    truth = np.full((2, 1, 3), np.nan)
    truth[:, 0, list(subset)] = 0.5
    found = compare_predictions(truth, np.full((1, 3), 0.6), [subset], np.ones(3), n_bootstrap=20)
    assert found.overall.relative_error.value == pytest.approx(0.2)
    assert found.overall.n_cells == len(subset) and found.by_size.keys() == {len(subset)}
    assert found.overall.r2_over_base.value == pytest.approx(1 - 0.01 / 0.25)
    assert all(getattr(found.overall, name).value is None for name in (*WITHIN, "pearson", "spearman"))
    assert found.one_or_all is None and found.transfer == {}


def test_one_task_is_neither_one_nor_all():
    found = compare_predictions(np.full((1, 1, 1), 0.5), np.ones((1, 1)), [(0,)], np.ones(1), n_bootstrap=20)
    assert found.one_or_all is None and found.overall.rmse == Estimate(0.5, None, None)


def test_the_subset_of_all_tasks_has_an_interval_over_its_tasks():
    found = compare_predictions(*simulate(), n_bootstrap=200)
    figures = found.by_size[6]
    assert (figures.n_subsets, figures.n_cells) == (1, 6)
    assert figures.relative_error.low < figures.relative_error.value < figures.relative_error.high


def test_seeds_may_be_missing_for_single_cells_and_subsets_for_all_seeds():
    truth, predicted, subsets, base = simulate()
    truth[:, 7] = np.nan  # not run yet
    truth[0, 8, subsets[8][0]] = np.nan  # one seed lacks one task
    predicted[7] = np.nan  # nor predicted
    predicted[~membership(subsets, 6)] = np.nan
    found = describe(truth, predicted, subsets, base)
    assert found.n_subsets == len(subsets) - 1
    expected = slow_figures(truth, predicted, base)
    assert values_of(found) == pytest.approx(expected, rel=1e-9)


def test_marked_tasks_are_left_out_of_pooled_figures_and_stand_apart():
    truth, predicted, subsets, base = simulate()
    found = compare_predictions(truth, predicted, subsets, base, marked=[4, 2], n_bootstrap=0)
    hidden = truth.copy()
    hidden[:, :, [2, 4]] = np.nan
    expected = slow_figures(hidden, predicted, base)
    assert values_of(found.overall) == pytest.approx(expected, rel=1e-9)
    assert found.marked == (2, 4) and found.per_task.keys() == set(range(6)) and found.one_or_all.tasks == (0, 1, 3, 5)
    plain = compare_predictions(truth, predicted, subsets, base, n_bootstrap=0)
    assert found.per_task == plain.per_task
    assert found.transfer[0].n_cells < plain.transfer[0].n_cells


def test_with_every_task_marked_the_pooled_figures_are_empty():
    found = compare_predictions(*simulate(), marked=range(6), n_bootstrap=20)
    assert found.overall.n_cells == 0 and set(values_of(found.overall).values()) == {None}
    assert found.by_size == {} and found.one_or_all is None and found.transfer == {} and len(found.per_task) == 6


def test_a_true_value_of_zero_has_no_relative_error():
    truth = np.array([[[0.0, 0.5]]])
    found = describe(truth, np.array([[0.1, 0.4]]), [(0, 1)], np.ones(2))
    assert found.relative_error.value == pytest.approx(0.2) and found.bias.value == pytest.approx(0.0)


def test_it_can_be_written_as_json():
    found = compare_predictions(*simulate(n_seeds=1), n_bootstrap=20)
    text = json.dumps(dataclasses.asdict(found), allow_nan=False)
    assert json.loads(text)["by_size"]["3"]["rmse"]["value"] == found.by_size[3].rmse.value
    truth, predicted, subsets, _ = simulate()
    groups = compare_groupings(
        predicted, average_seeds(truth), subsets, higher_is_better=False, subset_size=3, n_bootstrap=20
    )
    assert json.loads(json.dumps(dataclasses.asdict(groups), allow_nan=False))["n_subsets"] == 12


def set_truth(s: int, i: int, value: float):
    def change(data):
        data[0][0, s, i] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.__setitem__(0, data[0][0]), r"truth has shape \(19, 6\): expected \(n_seeds"),
        (lambda data: data.__setitem__(1, data[1][:, :5]), r"predicted \(19, 5\)"),
        (lambda data: data.__setitem__(3, np.ones(5)), r"base \(5,\)"),
        (lambda data: data.__setitem__(2, (*data[2][:-1], (0,))), "19 subsets, of which 18 are distinct"),
        (lambda data: data.__setitem__(2, (*data[2][:-1], (2, 1))), r"subset \(2, 1\): expected sorted"),
        (lambda data: data.__setitem__(2, (*data[2][:-1], (1, 6))), r"subset \(1, 6\).*0 to 5"),
        (set_truth(0, 3, 0.5), r"subset \(0,\) was measured on tasks \[3\], which it does not hold"),
        (set_truth(0, 0, np.inf), r"subset \(0,\), task 0: true \[inf"),
        (lambda data: data[1].__setitem__((0, 0), np.nan), r"subset \(0,\), task 0: .*predicted nan"),
        (lambda data: data[3].__setitem__(2, np.nan), "task 2: .*base nan"),
        (lambda data: data[0].fill(np.nan), "no subset was measured"),
    ],
)
def test_wrong_input_is_refused_by_name(change, message):
    data = list(simulate())
    change(data)
    with pytest.raises(DataError, match=message):
        compare_predictions(*data)


def test_a_marked_task_must_exist():
    with pytest.raises(DataError, match=r"marked tasks \[6\]: expected indices from 0 to 5"):
        compare_predictions(*simulate(), marked=[0, 6])


# --- signs ---------------------------------------------------------------------------------------------------------


def test_one_adapter_for_all_against_one_each():
    truth, predicted, subsets, base = simulate()
    mean = average_seeds(truth)
    found = compare_predictions(truth, predicted, subsets, base, n_bootstrap=500).one_or_all
    expected = [(predicted[-1, i] - predicted[i, i], mean[-1, i] - mean[i, i]) for i in range(6)]
    np.testing.assert_allclose(found.predicted, [p for p, _ in expected])
    np.testing.assert_allclose(found.true, [t for _, t in expected])
    assert found.share_agreeing.value == np.mean([np.sign(p) == np.sign(t) for p, t in expected])
    assert found.true_mean.value == pytest.approx(np.mean(found.true))
    assert found.mean_error.value == pytest.approx(found.predicted_mean.value - found.true_mean.value)
    assert found.is_sign_right == (np.mean(found.predicted) * np.mean(found.true) > 0)
    for end in (found.predicted_mean, found.true_mean, found.mean_error):
        assert end.low < end.value < end.high


def test_a_shift_common_to_all_subsets_of_a_task_leaves_its_signs():
    truth, predicted, subsets, base = simulate()
    found = compare_predictions(truth, predicted, subsets, base, n_bootstrap=50)
    moved = compare_predictions(truth + 1.0, predicted - np.arange(6), subsets, base, n_bootstrap=50)
    assert moved.one_or_all.share_agreeing == found.one_or_all.share_agreeing
    assert moved.transfer[3].share_agreeing == found.transfer[3].share_agreeing


def test_signs_of_transfer_by_loops():
    truth, predicted, subsets, base = simulate(3, share_repeated=1.0)
    mean, found = average_seeds(truth), compare_predictions(truth, predicted, subsets, base, n_bootstrap=50).transfer
    assert found.keys() == {0, 3, 6}
    squares = np.nansum((truth - mean) ** 2, axis=(0, 1))
    own = np.maximum(membership(subsets, 6).sum(axis=0) * 2, 1)
    pooled = squares.sum() / own.sum()
    for size, signs in found.items():
        right, rises, weights = [], [], []
        for s, subset in enumerate(subsets):
            for i in subset if len(subset) == size or (size == 0 and len(subset) > 1) else ():
                difference = mean[s, i] - mean[i, i]
                right.append(difference * (predicted[s, i] - predicted[i, i]) > 0)
                rises.append(difference > 0)
                variance = (squares[i] + 4 * pooled) / (own[i] + 4)
                weights.append(abs(difference) / np.sqrt(variance * 2 / 3))
        clear = np.array(weights) > 2
        assert signs.n_cells == len(right) and signs.n_clear == clear.sum()
        assert signs.share_agreeing.value == pytest.approx(np.mean(right))
        assert signs.share_of_commoner.value == pytest.approx(max(np.mean(rises), 1 - np.mean(rises)))
        assert signs.weighted_share.value == pytest.approx(np.average(right, weights=weights))
        if clear.any():
            assert signs.clear_share.value == pytest.approx(np.mean(np.array(right)[clear]))
            share = np.mean(np.array(rises)[clear])
            assert signs.clear_share_of_commoner.value == pytest.approx(max(share, 1 - share))


def test_cells_that_differ_not_at_all_from_alone_have_no_sign():
    subsets, truth = [(0,), (1,), (0, 1)], np.array([[[0.5, np.nan], [np.nan, 0.4], [0.5, 0.6]]])
    predicted = np.array([[0.5, 0], [0, 0.4], [0.3, 0.5]])
    found = compare_predictions(truth, predicted, subsets, np.ones(2), n_bootstrap=20)
    assert found.transfer[0].n_cells == 1 and found.transfer[0].share_agreeing.value == 1.0
    truth[0, 2, 1] = 0.4
    empty = compare_predictions(truth, predicted, subsets, np.ones(2), n_bootstrap=20).transfer[0]
    assert empty.n_cells == 0 and empty.share_agreeing == Estimate(None, None, None)


def test_seeds_that_all_agree_make_every_difference_clear():
    truth, predicted, subsets, base = simulate(noise=0.0)
    found = compare_predictions(truth, predicted, subsets, base, n_bootstrap=20).transfer[0]
    assert found.n_clear == found.n_cells and 0 <= found.weighted_share.value <= 1


# --- affinity and groups -------------------------------------------------------------------------------------------


def plant(seed: int = 0, *, n=8, n_triples=40, error=0.0):
    """Scores of triples, higher is better, in which two blocks of tasks help each other; and a prediction of them."""
    rng = np.random.default_rng(seed)
    triples = list(itertools.combinations(range(n), 3))
    subsets = tuple(triples[s] for s in sorted(rng.choice(len(triples), n_triples, replace=False)))
    help_of = 0.1 * (np.arange(n)[:, None] % 2 == np.arange(n) % 2) + 0.01 * rng.normal(size=(n, n))
    np.fill_diagonal(help_of, 0.0)
    truth = rng.normal(size=n) + membership(subsets, n) @ help_of.T
    return truth + error * rng.normal(size=truth.shape), truth, subsets


def group(predicted, truth, subsets, **options):
    options = {"higher_is_better": True, "subset_size": 3, "n_bootstrap": 50, "n_random": 100} | options
    return compare_groupings(predicted, truth, subsets, **options)


def test_the_same_values_lead_to_the_same_groups():
    found = group(*plant())
    assert found.pearson.value == pytest.approx(1.0) and found.spearman == pytest.approx(1.0)
    assert [part.n_groups for part in found.groupings] == [2, 3, 4, 5]
    assert found.groupings[0].true_groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    for part in found.groupings:
        assert part.predicted_groups == part.true_groups and part.adjusted_rand_index == 1.0
        assert part.share_of_gain == pytest.approx(1.0) and part.share_of_random_beaten > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_correlation_and_groups_by_loops(seed):
    predicted, truth, subsets = plant(seed, error=0.2, n_triples=30)
    design = SubsetDesign(8, subsets)
    found = group(predicted, truth, subsets)
    rows = []  # of each task, its affinity with those tasks that some subset holds together with it
    for i in range(8):
        seen = {j: [s for s, subset in enumerate(subsets) if {i, j} <= set(subset)] for j in range(8) if j != i}
        rows.append([np.array([values[held, i].mean() for held in seen.values() if held])
                     for values in (predicted, truth)])  # fmt: skip
    centred = [np.concatenate([row[side] - row[side].mean() for row in rows]) for side in (0, 1)]
    assert found.pearson.value == pytest.approx(stats.pearsonr(*centred)[0])
    ranked = [np.concatenate([(r := stats.rankdata(row[side]) / len(row[side])) - r.mean() for row in rows])
              for side in (0, 1)]  # fmt: skip
    assert found.spearman == pytest.approx(stats.pearsonr(*ranked)[0])
    assert found.n_pairs == len(centred[0]) and found.n_pairs_filled == 56 - found.n_pairs
    guess, true = (affinity_from_scores(design, values).matrix for values in (predicted, truth))
    for part in found.groupings:
        assert part.predicted_groups == find_best_partition(guess, part.n_groups)
        assert part.true_groups == find_best_partition(true, part.n_groups)
        labels = [[g for i in range(8) for g, members in enumerate(groups) if i in members]
                  for groups in (part.true_groups, part.predicted_groups)]  # fmt: skip
        assert part.adjusted_rand_index == pytest.approx(adjusted_rand_score(*labels))
        assert part.predicted_objective == pytest.approx(compute_objective(true, part.predicted_groups))
        assert part.true_objective == pytest.approx(compute_objective(true, part.true_groups))
        gain = part.true_objective - part.random_objective
        assert part.share_of_gain == pytest.approx((part.predicted_objective - part.random_objective) / gain)
        assert part.share_of_gain <= 1 + 1e-9


def test_random_groups_are_judged_by_the_clustering_objective():
    rng = np.random.default_rng(0)
    affinity = rng.normal(size=(5, 5))
    affinity += affinity.T
    labels = np.array([0, 0, 1, 1, 2])
    found = _judge_random_groups(affinity, labels, 20_000, np.random.default_rng(1))
    every = [
        compute_objective(affinity, tuple(tuple(np.flatnonzero(np.array(dealt) == g)) for g in range(3)))
        for dealt in itertools.permutations(labels)
    ]
    np.testing.assert_allclose(np.unique(found.round(9)), np.unique(np.round(every, 9)))
    assert found.mean() == pytest.approx(np.mean(every), abs=0.05)


def test_a_loss_is_turned_into_a_score():
    predicted, truth, subsets = plant(error=0.1)
    assert group(-predicted, -truth, subsets, higher_is_better=False) == group(predicted, truth, subsets)
    assert group(-predicted, -truth, subsets) != group(predicted, truth, subsets)


def test_a_tasks_level_changes_no_correlation():
    predicted, truth, subsets = plant(error=0.1)
    found, moved = group(predicted, truth, subsets), group(predicted + np.arange(8), truth, subsets)
    assert moved.pearson.value == pytest.approx(found.pearson.value)
    assert moved.pearson.low == pytest.approx(found.pearson.low)


def test_the_order_of_subsets_and_other_sizes_change_no_groups():
    predicted, truth, subsets = plant(error=0.1)
    order = np.random.default_rng(1).permutation(len(subsets))
    rest = ((0,), tuple(range(8)))
    other = np.full((2, 8), 77.0)
    found = group(
        np.concatenate([other, predicted[order]]),
        np.concatenate([other, truth[order]]),
        (*rest, *(subsets[s] for s in order)),
    )
    assert found == group(predicted, truth, subsets)


def test_subsets_not_measured_are_passed_over():
    predicted, truth, subsets = plant(error=0.1)
    half = truth.copy()
    half[::2] = np.nan
    assert group(predicted, half, subsets) == group(predicted[1::2], truth[1::2], subsets[1::2])


def test_marked_tasks_are_in_no_group_and_their_values_are_not_read():
    predicted, truth, subsets = plant(error=0.1)
    found = group(predicted, truth, subsets, marked=[3])
    hidden, unknown = predicted.copy(), truth.copy()
    hidden[:, 3] = unknown[:, 3] = np.nan
    assert group(hidden, unknown, subsets, marked=[3]) == found
    assert found.marked == (3,) and found.n_pairs + found.n_pairs_filled == 42
    for part in found.groupings:
        assert sorted(itertools.chain(*part.predicted_groups)) == [0, 1, 2, 4, 5, 6, 7]


def test_affinity_intervals_hold_what_is_expected_of_such_subsets():
    def draw(seed):
        rng = np.random.default_rng(seed)
        triples = list(itertools.combinations(range(8), 3))
        subsets = tuple(triples[s] for s in rng.choice(len(triples), 28, replace=False))
        beta = np.random.default_rng(0).normal(size=(8, 8))
        members = membership(subsets, 8)
        truth = members @ beta.T
        return truth + rng.normal(size=truth.shape), truth, subsets

    options = {"group_counts": (), "n_bootstrap": 200}
    expected = np.mean([group(*draw(seed), **options).pearson.value for seed in range(1000, 1100)])
    ends = [group(*draw(seed), **options).pearson for seed in range(100)]
    n_held = sum(end.low <= expected <= end.high for end in ends)
    assert 86 <= n_held <= 99, f"intervals at 95 % held the expected correlation in {n_held} of 100 data sets"


def test_groupings_refuse_what_they_cannot_compare():
    predicted, truth, subsets = plant()
    with pytest.raises(DataError, match="expected two arrays"):
        group(predicted[:, :5], truth, subsets)
    with pytest.raises(DataError, match="a size of 2 or more"):
        group(predicted, truth, subsets, subset_size=1)
    with pytest.raises(DataError, match="no subset of size 4 is measured"):
        group(predicted, truth, subsets, subset_size=4)
    with pytest.raises(DataError, match=r"tasks \[7\] are in none"):
        kept = [s for s, subset in enumerate(subsets) if 7 not in subset]
        group(predicted[kept], truth[kept], [subsets[s] for s in kept])


def test_affinities_that_say_nothing_have_no_correlation_and_no_gain():
    predicted, _, subsets = plant()
    flat = np.tile(np.arange(8.0), (len(subsets), 1))
    found = group(predicted, flat, subsets)
    assert found.pearson == Estimate(None, None, None) and found.spearman is None
    assert all(np.isfinite(part.adjusted_rand_index) for part in found.groupings)
