from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ensemblelora.analysis.generalization import (
    RowLosses,
    average_losses,
    choose_rows,
    compare_gaps,
    correlate_within,
    gap_of,
    measure_gap,
)
from ensemblelora.analysis.outofdomain import Shifted, relate_to_targets
from ensemblelora.errors import DataError

DRAW = {"n_bootstrap": 2000, "confidence": 0.95, "seed": 0}


def make_losses(gap: float, *, n_train=60, n_test=60, seed=0, noise=1.0) -> RowLosses:
    rng = np.random.default_rng(seed)
    train, test = (noise * rng.standard_normal(n) for n in (n_train, n_test))
    return RowLosses(train.tolist(), list(range(n_train)), (test + gap).tolist(), list(range(n_test)))


def test_the_gap_is_a_difference_of_means_with_an_interval_of_both_parts():
    losses = make_losses(0.5)
    found = measure_gap(losses, **DRAW)
    assert found.gap == pytest.approx(np.mean(losses.test) - np.mean(losses.train))
    assert (found.n_train, found.n_test) == (60, 60)
    # Two means of independent rows.
    error = np.sqrt((np.var(losses.train) + np.var(losses.test)) / 60)
    assert found.low == pytest.approx(found.gap - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.gap + 1.96 * error, abs=0.15 * error)


def test_rows_of_a_group_are_drawn_together():
    single = make_losses(0.0, noise=1.0)
    grouped = RowLosses(single.train, [i // 30 for i in range(60)], single.test, [i // 30 for i in range(60)])
    same = RowLosses(np.repeat(single.train[:6], 10).tolist(), np.repeat(range(6), 10).tolist(),
                     np.repeat(single.test[:6], 10).tolist(), np.repeat(range(6), 10).tolist())  # fmt: skip
    six = RowLosses(single.train[:6], list(range(6)), single.test[:6], list(range(6)))
    assert measure_gap(grouped, **DRAW).gap == measure_gap(single, **DRAW).gap
    assert measure_gap(same, **DRAW).low == pytest.approx(measure_gap(six, **DRAW).low)
    one_group = RowLosses(single.train, [0] * 60, single.test, list(range(60)))
    assert measure_gap(one_group, **DRAW).low is None


def test_as_many_training_rows_as_wanted_are_drawn_and_fewer_are_among_them():
    many, few = (set(choose_rows(100, n, seed=0, task="rte").tolist()) for n in (50, 8))
    assert (len(many), len(few)) == (50, 8)
    assert few < many
    assert choose_rows(10, 50, seed=0, task="rte").tolist() == list(range(10))
    assert set(choose_rows(100, 50, seed=0, task="copa").tolist()) != many
    assert set(choose_rows(100, 50, seed=1, task="rte").tolist()) != many


def test_two_gaps_on_the_same_rows_are_compared_row_by_row():
    # What all rows have in common is no part of a difference: a small one is found beside large spreads.
    losses = make_losses(0.5, noise=3.0)
    shifted = RowLosses(losses.train, losses.train_groups, (np.array(losses.test) - 0.1).tolist(), losses.test_groups)
    change = compare_gaps([shifted], [losses], **DRAW)
    assert change.difference.value == pytest.approx(-0.1)
    assert (change.difference.low, change.difference.high) == pytest.approx((-0.1, -0.1))


def test_the_relative_change_is_told_where_the_reference_is_surely_positive():
    reference, halved = make_losses(2.0, noise=0.2), make_losses(1.0, noise=0.2)
    change = compare_gaps([halved], [reference], **DRAW)
    assert change.relative.value == pytest.approx(gap_of(halved) / gap_of(reference) - 1)
    assert change.relative.low < -0.4 and change.relative.high > -0.6
    assert compare_gaps([halved], [make_losses(0.01, noise=3.0)], **DRAW).relative is None


def test_tasks_count_equally():
    small, large = make_losses(1.0, n_test=10, seed=1), make_losses(3.0, n_test=200, seed=2)
    zero = [RowLosses(one.train, one.train_groups, one.train[:10] * (len(one.test) // 10), one.test_groups)
            for one in (small, large)]  # fmt: skip
    change = compare_gaps([small, large], zero, **DRAW)
    means = [np.mean([gap_of(one) for one in some]) for some in ((small, large), zero)]
    assert change.difference.value == pytest.approx(means[0] - means[1])


def test_other_rows_can_not_be_compared():
    with pytest.raises(DataError, match="different rows"):
        compare_gaps([make_losses(1.0)], [make_losses(1.0, n_test=50)], **DRAW)


def test_seeds_are_averaged_row_by_row():
    one, two = make_losses(1.0, seed=1), make_losses(2.0, seed=2)
    mean = average_losses([one, two])
    assert mean.test == pytest.approx([(a + b) / 2 for a, b in zip(one.test, two.test, strict=True)])
    assert gap_of(mean) == pytest.approx((gap_of(one) + gap_of(two)) / 2)


def test_correlations_within_one_block_are_scipys():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(30)
    y = 0.5 * x + rng.standard_normal(30)
    found = correlate_within(x, y, ["a"] * 30, [str(i) for i in range(30)], **DRAW)
    assert found.pearson.value == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found.spearman.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.pearson.low < found.pearson.value < found.pearson.high
    assert (found.n_points, found.n_units) == (30, 30)


def test_levels_of_blocks_take_no_part():
    x, y = np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1])
    blocks, units = ["a"] * 4 + ["b"] * 4, ["1", "2", "3", "4"] * 2
    found = correlate_within([*x, *(x + 100)], [*y, *(y + 100)], blocks, units, **DRAW)
    assert found.pearson.value == pytest.approx(-1)
    order = [3, 7, 0, 4, 1, 5, 2, 6]  # in any order
    mixed = correlate_within(
        [[*x, *(x + 100)][i] for i in order],
        [[*y, *(y + 100)][i] for i in order],
        [blocks[i] for i in order],
        [units[i] for i in order],
        **DRAW,
    )
    assert mixed == found


def test_few_ways_to_train_give_no_interval():
    found = correlate_within([1, 2, 3, 1, 2, 3], [1, 2, 4, 2, 3, 9], ["a"] * 3 + ["b"] * 3, ["p", "q", "r"] * 2, **DRAW)
    assert found.pearson.value > 0.8
    assert found.pearson.low is None


def test_what_does_not_vary_has_no_correlation():
    found = correlate_within([1.0] * 5, [1, 2, 3, 4, 5], ["a"] * 5, list("vwxyz"), **DRAW)
    assert found.pearson.value is None


def test_losses_on_targets_are_related_within_pairs():
    found = [
        Shifted("rte", target, f"way {i}", {"largest trace": i, "gap": -i} if target == "cb" else {"largest trace": i},
                nll=level + 0.1 * i, base_nll=level)
        for target, level in (("cb", 1.0), ("wic", 5.0))
        for i in range(6)
    ]  # fmt: skip
    records = relate_to_targets(found, **DRAW)
    by_key = {(r["scope"], r["measure"], r["outcome"]): r for r in records}
    assert set(by_key) == {
        *(("rte:cb", measure, outcome) for measure in ("largest trace", "gap")
          for outcome in ("target loss", "target loss less the base model's")),
        *((scope, "largest trace", outcome) for scope in ("rte:wic", "all pairs")
          for outcome in ("target loss", "target loss less the base model's")),
    }  # fmt: skip
    assert by_key["all pairs", "largest trace", "target loss"]["pearson"]["value"] == pytest.approx(1)
    assert by_key["rte:cb", "gap", "target loss"]["spearman"]["value"] == pytest.approx(-1)
    assert relate_to_targets([], **DRAW) == []
