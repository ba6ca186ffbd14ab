"""Scores equal scikit-learn's; intervals and tests respect groups."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, log_loss

from ensemblelora.errors import DataError, TrainingError
from ensemblelora.evaluation import metrics
from ensemblelora.evaluation.metrics import (
    compare_paired,
    compare_paired_tasks,
    compute_chance_p_value,
    compute_row_correct,
    compute_row_nll,
    score_predictions,
    score_sequences,
)
from ensemblelora.seeding import generator_for


def make_predictions(n: int = 60, n_classes: int = 3, n_groups: int = 20, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    logits = rng.normal(size=(n, n_classes))
    logits[np.arange(n), labels] += 1.0
    return {
        "logits": logits,
        "labels": labels,
        "n_choices": np.full(n, n_classes),
        "groups": rng.integers(0, n_groups, n) * 7 - 3,
    }


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_point_values_are_scikit_learns(n_classes: int) -> None:
    data = make_predictions(n_classes=n_classes)
    scores = score_predictions(**data, n_bootstrap=100)
    probabilities = np.exp(data["logits"]) / np.exp(data["logits"]).sum(axis=1, keepdims=True)
    guesses = data["logits"].argmax(axis=1)
    assert scores.nll == pytest.approx(log_loss(data["labels"], probabilities, labels=range(n_classes)))
    assert scores.accuracy == pytest.approx(accuracy_score(data["labels"], guesses))
    assert scores.macro_f1 == pytest.approx(f1_score(data["labels"], guesses, average="macro"))
    assert scores.majority == pytest.approx(np.bincount(data["labels"]).max() / 60)
    assert (scores.n_examples, scores.n_groups) == (60, len(set(data["groups"])))


def test_macro_f1_counts_only_classes_that_occur() -> None:
    data = make_predictions(n=6)
    data["labels"] = np.array([0, 0, 1, 1, 0, 1])
    data["logits"][:, 2] = -50.0
    scores = score_predictions(**data, n_bootstrap=100)
    expected = f1_score(data["labels"], data["logits"].argmax(axis=1), average="macro")
    assert scores.macro_f1 == pytest.approx(expected)


@pytest.mark.parametrize("fill", [-np.inf, np.nan, 99.0])
def test_classes_a_row_does_not_have_are_never_looked_at(fill: float) -> None:
    data = make_predictions(n_classes=4)
    data["n_choices"] = np.random.default_rng(1).integers(2, 5, 60)
    data["labels"] %= data["n_choices"]
    for e, count in enumerate(data["n_choices"]):
        data["logits"][e, count:] = fill
    nll = compute_row_nll(data["logits"], data["labels"], data["n_choices"])
    correct = compute_row_correct(data["logits"], data["labels"], data["n_choices"])
    for e, count in enumerate(data["n_choices"]):
        z = data["logits"][e, :count]
        assert nll[e] == pytest.approx(math.log(sum(math.exp(v) for v in z)) - z[data["labels"][e]])
        assert correct[e] == (np.argmax(z) == data["labels"][e])


@given(st.integers(0, 10_000), st.floats(-1e4, 1e4))
@settings(max_examples=25, deadline=None)
def test_scores_do_not_depend_on_row_order_or_on_constants_added_to_a_row(seed: int, shift: float) -> None:
    data = make_predictions(n=20, seed=seed)
    base = score_predictions(**data, n_bootstrap=100)
    order = np.random.default_rng(seed).permutation(20)
    moved: dict[str, Any] = {name: values[order] for name, values in data.items()}
    moved["logits"] = moved["logits"] + shift
    for name, value in dataclasses.asdict(score_predictions(**moved, n_bootstrap=100)).items():
        assert value == pytest.approx(getattr(base, name), abs=1e-9), name


def test_large_logits_do_not_overflow() -> None:
    assert compute_row_nll([[1e4, -1e4]], [1], [2])[0] == pytest.approx(2e4)
    assert compute_row_nll([[1e4, -1e4]], [0], [2])[0] == 0.0


def slow_bootstrap(data: dict[str, Any], n_bootstrap: int, seed: int) -> np.ndarray:
    names = np.unique(data["groups"])
    draws = generator_for(seed, "bootstrap", len(names)).integers(0, len(names), (n_bootstrap, len(names)))
    values = []
    for draw in draws:
        rows = np.concatenate([np.flatnonzero(data["groups"] == names[g]) for g in draw])
        z, y = data["logits"][rows], data["labels"][rows]
        guesses = z.argmax(axis=1)
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        nll = log_loss(y, p, labels=range(z.shape[1]))
        values.append((nll, accuracy_score(y, guesses), f1_score(y, guesses, average="macro", zero_division=0)))
    return np.array(values)


def test_intervals_are_those_of_resampled_groups() -> None:
    data = make_predictions(n=40, n_groups=12)
    scores = score_predictions(**data, n_bootstrap=150, confidence=0.9, seed=3)
    expected = np.quantile(slow_bootstrap(data, 150, 3), [0.05, 0.95], axis=0)
    for k, name in ((0, "nll"), (2, "macro_f1")):
        assert getattr(scores, f"{name}_low") == pytest.approx(expected[0, k])
        assert getattr(scores, f"{name}_high") == pytest.approx(expected[1, k])


@pytest.mark.parametrize("n_right", range(6))
def test_an_accuracys_interval_is_wilsons_and_never_a_point(n_right: int) -> None:
    labels = np.zeros(5, dtype=int)
    logits = np.where(np.arange(5)[:, None] < n_right, [1.0, 0.0], [0.0, 1.0])
    groups = np.arange(5)
    scores = score_predictions(logits, labels, np.full(5, 2), groups, n_bootstrap=100)
    matches = score_sequences(np.ones(5), groups, exact_match=np.arange(5) < n_right, n_bootstrap=100)
    expected = stats.binomtest(n_right, 5).proportion_ci(0.95, method="wilson")
    for found in (scores, matches):
        assert (found.accuracy_low, found.accuracy_high) == pytest.approx((expected.low, expected.high))
        assert found.accuracy_low <= found.accuracy <= found.accuracy_high
    twins = {"groups": groups.repeat(3), "n_choices": np.full(15, 2), "n_bootstrap": 100}
    thrice = score_predictions(logits.repeat(3, axis=0), labels.repeat(3), **twins)
    assert thrice.accuracy_low == pytest.approx(scores.accuracy_low), "one observation a group"


def test_blocks_of_draws_make_no_difference_to_their_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_predictions()
    whole = score_predictions(**data, n_bootstrap=4000)
    monkeypatch.setattr(metrics, "_MAX_DRAWN_NUMBERS", 700)
    parts = score_predictions(**data, n_bootstrap=4000)
    assert parts.nll == whole.nll
    assert parts.nll_low == pytest.approx(whole.nll_low, abs=0.03)
    assert parts.nll_high == pytest.approx(whole.nll_high, abs=0.03)


def test_copies_of_rows_inside_their_group_add_no_certainty() -> None:
    data = make_predictions(n=30, n_groups=30)
    twice: dict[str, Any] = {name: np.concatenate([values, values]) for name, values in data.items()}
    a, b = score_predictions(**data, n_bootstrap=500), score_predictions(**twice, n_bootstrap=500)
    for name in ("nll", "nll_low", "nll_high", "accuracy_low", "accuracy_high", "macro_f1_low", "chance_p_value"):
        assert getattr(a, name) == pytest.approx(getattr(b, name)), name
    apart = {**twice, "groups": np.arange(60)}
    width = score_predictions(**apart, n_bootstrap=500)
    assert width.nll_high - width.nll_low < 0.85 * (b.nll_high - b.nll_low)


def test_intervals_cover_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        effects = rng.normal(size=40).repeat(4)
        values = effects + rng.normal(size=160)
        result = compare_paired(values, np.zeros(160), np.arange(40).repeat(4), n_bootstrap=300, seed=trial)
        hits += result.low <= 0.0 <= result.high
    assert 0.88 <= hits / 200 <= 0.985


def test_one_group_has_no_interval() -> None:
    data = {**make_predictions(), "groups": np.zeros(60, dtype=int)}
    scores = score_predictions(**data, n_bootstrap=100)
    assert math.isnan(scores.nll_low) and math.isnan(scores.accuracy_high) and math.isfinite(scores.nll)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    data = make_predictions()
    assert score_predictions(**data, seed=1) == score_predictions(**data, seed=1)
    assert score_predictions(**data, seed=1).nll_low != score_predictions(**data, seed=2).nll_low


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_the_chance_test_is_the_exact_sign_flip_test(sums: list[int]) -> None:
    correct, labels, groups = rows_with_sums(sums)
    observed = sum(sums)
    flips = [
        sum(s * v for s, v in zip(signs, sums, strict=True)) for signs in itertools.product((1, -1), repeat=len(sums))
    ]
    expected = np.mean([flip >= observed for flip in flips])
    assert compute_chance_p_value(correct, labels, groups) == pytest.approx(expected)


def rows_with_sums(sums: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows whose groups' sums of correct - majority are as given, with label 0 the majority."""
    correct, labels, groups = [], [], []
    for g, value in enumerate(sums):
        correct += [value > 0] * abs(value)
        labels += [1 if value > 0 else 0] * abs(value)
        groups += [g] * abs(value)
    padding = len(labels) + 1
    return np.array(correct + [True] * padding), np.array(labels + [0] * padding), np.array(groups + [99] * padding)


def test_with_single_rows_the_chance_test_is_mcnemars() -> None:
    correct, labels, groups = rows_with_sums([1] * 15 + [-1] * 6)
    assert compute_chance_p_value(correct, labels, groups) == pytest.approx(
        stats.binomtest(15, 21, alternative="greater").pvalue
    )


def test_the_normal_limit_is_close_to_the_exact_test(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_with_sums([1] * 110 + [-1] * 90)
    exact = compute_chance_p_value(*rows)
    monkeypatch.setattr(metrics, "_MAX_EXACT_GROUPS", 10)
    assert compute_chance_p_value(*rows) == pytest.approx(exact, abs=2e-3)


def test_guessing_is_rarely_called_better_than_chance() -> None:
    rng = np.random.default_rng(0)
    calls = 0
    for _ in range(300):
        labels = rng.random(80) < 0.5
        correct = rng.random(80) < 0.5
        calls += compute_chance_p_value(correct, labels.astype(int), np.arange(80)) < 0.05
    assert calls / 300 < 0.07


def test_always_the_majority_is_not_above_chance_and_skill_is() -> None:
    data = make_predictions(n=100, n_groups=100)
    constant = {
        **data,
        "logits": np.tile([1.0, 0.0, 0.0], (100, 1)),
        "labels": np.r_[np.zeros(60, int), np.ones(40, int)],
    }
    scores = score_predictions(**constant, n_bootstrap=100)
    assert scores.accuracy == scores.majority == 0.6
    assert scores.is_above_chance is False and scores.chance_p_value == 1.0
    skilled = {**data, "logits": 9.0 * np.eye(3)[data["labels"]]}
    assert score_predictions(**skilled, n_bootstrap=100).is_above_chance is True


def test_twins_count_once_in_the_chance_test() -> None:
    correct, labels, groups = rows_with_sums([1] * 8)
    alone = compute_chance_p_value(correct, labels, groups)
    twins = compute_chance_p_value(np.tile(correct, 3), np.tile(labels, 3), np.tile(groups, 3))
    assert twins == pytest.approx(alone)


def test_sequences_have_no_classes() -> None:
    nll, groups = np.array([1.0, 2.0, 3.0, 6.0]), np.array([0, 0, 1, 2])
    scores = score_sequences(nll, groups, exact_match=[True, False, False, False], n_bootstrap=200)
    assert (scores.nll, scores.accuracy, scores.n_examples, scores.n_groups) == (3.0, 0.25, 4, 3)
    assert scores.nll_low <= 3.0 <= scores.nll_high
    assert math.isnan(scores.macro_f1) and math.isnan(scores.majority) and scores.is_above_chance is None
    without = score_sequences(nll, groups, n_bootstrap=200)
    assert math.isnan(without.accuracy) and math.isnan(without.accuracy_low) and without.nll_low == scores.nll_low


def test_differences_are_means_over_the_same_rows() -> None:
    rng = np.random.default_rng(0)
    a, b, groups = rng.normal(size=50), rng.normal(size=50), np.arange(50) // 2
    result = compare_paired(a, b, groups)
    turned = compare_paired(b, a, groups)
    assert result.difference == pytest.approx((a - b).mean())
    assert (turned.difference, turned.low, turned.high) == pytest.approx(
        (-result.difference, -result.high, -result.low)
    )
    same = compare_paired(a, a, groups)
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)


def test_pairing_is_narrower_than_comparing_two_intervals() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=100)
    a, b = difficulty + 0.01 * rng.normal(size=100), difficulty
    paired = compare_paired(a, b, np.arange(100))
    alone = score_sequences(a, np.arange(100))
    assert paired.high - paired.low < 0.1 * (alone.nll_high - alone.nll_low)


def test_every_task_counts_once_in_a_difference_over_tasks() -> None:
    rng = np.random.default_rng(0)
    a = [rng.normal(size=n) for n in (10, 200)]
    b = [np.zeros(10), np.zeros(200)]
    groups = [np.arange(10), np.arange(200)]
    result = compare_paired_tasks(a, b, groups, n_bootstrap=4000)
    assert result.difference == pytest.approx((a[0].mean() + a[1].mean()) / 2)
    spread = math.sqrt(a[0].var() / 10 + a[1].var() / 200) / 2
    assert result.high - result.low == pytest.approx(2 * 1.96 * spread, rel=0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": np.zeros(59, int)}, DataError, r"labels \(59,\)"),
        ({"n_choices": np.full(60, 4)}, DataError, "above 3"),
        ({"labels": np.full(60, 3)}, DataError, "not below"),
        ({"labels": np.full(60, -1)}, DataError, "not below"),
        ({"logits": np.full((60, 3), np.nan)}, TrainingError, "row 0 are not finite.*learning_rate"),
        ({"logits": np.zeros(60)}, DataError, "expected"),
    ],
)
def test_impossible_predictions_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        score_predictions(**{**make_predictions(), **change})


def test_impossible_rows_are_refused() -> None:
    with pytest.raises(DataError, match="expected"):
        score_predictions(np.zeros((0, 2)), [], [], [])
    with pytest.raises(DataError, match="expected"):
        score_sequences([], [])
    with pytest.raises(DataError, match="exact_match"):
        score_sequences([1.0], [0], exact_match=[True, False])
    with pytest.raises(TrainingError, match="row 1 is not finite"):
        compare_paired([1.0, np.inf], [0.0, 0.0], [0, 1])
    with pytest.raises(DataError, match="no task"):
        compare_paired_tasks([], [], [])
