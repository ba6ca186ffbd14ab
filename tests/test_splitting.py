"""Laws of cutting and subsampling."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemblelora.data.splitting import cut_by_group, draw_pool, subsample

ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=80)  # stratum, group
FRACTIONS = (0.7, 0.1, 0.2)


@given(ROWS, st.integers(0, 5))
def test_parts_hold_everything_once_and_share_no_group(rows: list[tuple[int, int]], seed: int) -> None:
    strata, groups = zip(*rows, strict=True)
    parts = cut_by_group(strata, groups, FRACTIONS, seed=seed)
    assert sorted(p for part in parts for p in part) == list(range(len(rows)))
    held = [{groups[p] for p in part} for part in parts]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])
    assert parts == cut_by_group(strata, groups, FRACTIONS, seed=seed)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=300), st.integers(0, 5))
def test_single_rows_are_spread_to_within_one(strata: list[int], seed: int) -> None:
    counts = Counter(strata)
    parts = cut_by_group(strata, range(len(strata)), FRACTIONS, seed=seed)
    for stratum, n in counts.items():
        if n == 1:
            continue
        for part, fraction in zip(parts, FRACTIONS, strict=True):
            got = sum(strata[p] == stratum for p in part)
            assert abs(got - fraction * n) <= 1 + 1e-9


def test_the_greedy_cut_is_close_to_the_best_of_all_cuts() -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        sizes = rng.integers(1, 6, size=8)
        groups = np.repeat(np.arange(8), sizes)
        wanted = 0.3 * sizes.sum()
        part = cut_by_group([0] * len(groups), list(groups), (0.7, 0.3), seed=seed)[1]
        masks = (np.arange(2**8)[:, None] >> np.arange(8)) & 1  # every way to choose groups
        assert abs(len(part) - wanted) <= np.abs(masks @ sizes - wanted).min() + 1.5


def test_one_huge_group_does_not_fill_a_small_part() -> None:
    groups = [0] * 50 + list(range(1, 51))
    train, validation = cut_by_group([0] * 100, groups, (0.9, 0.1), seed=0)
    assert 0 in {groups[p] for p in train}
    assert len(validation) == 10


def test_other_seeds_cut_elsewhere() -> None:
    cuts = {cut_by_group([0] * 60, range(60), (0.5, 0.5), seed=seed)[0].__str__() for seed in range(5)}
    assert len(cuts) == 5


@given(st.lists(st.integers(0, 4), min_size=1, max_size=120), st.integers(1, 120), st.integers(0, 3))
def test_a_subsample_is_proportional(strata: list[int], limit: int, seed: int) -> None:
    kept = subsample(strata, limit, seed=seed)
    assert kept == sorted(set(kept)) == subsample(strata, limit, seed=seed)
    assert len(kept) == min(limit, len(strata))
    counts, got = Counter(strata), Counter(strata[p] for p in kept)
    common = {stratum: n for stratum, n in counts.items() if n > 1}
    if limit >= len(counts):
        assert all(got[stratum] for stratum in common)  # no class is lost
    for stratum, n in common.items():
        assert got[stratum] <= n
        if limit >= 5 * len(counts):
            assert abs(got[stratum] - limit * n / len(strata)) <= len(counts) or limit >= len(strata)


def test_free_text_is_one_stratum() -> None:
    assert len(subsample([f"answer {i}" for i in range(1000)], 10, seed=0)) == 10


@pytest.mark.parametrize("limit", [None, 7, 8])
def test_nothing_is_dropped_without_need(limit: int | None) -> None:
    assert subsample([0] * 7, limit, seed=0) == list(range(7))


def test_each_row_is_as_likely_to_stay() -> None:
    kept = Counter(p for seed in range(2000) for p in subsample([0, 0, 0, 0, 1, 1, 1, 1], 4, seed=seed))
    assert all(abs(n - 1000) < 120 for n in kept.values())  # 5 sigma of Binomial(2000, 1/2)


def test_a_pool_is_drawn_without_order_or_repetition() -> None:
    pool = draw_pool(10**6, 50, seed=0)
    assert len(set(pool)) == 50
    assert pool == sorted(pool) == draw_pool(10**6, 50, seed=0)
    assert draw_pool(5, 50, seed=0) == draw_pool(5, None, seed=1) == [0, 1, 2, 3, 4]
