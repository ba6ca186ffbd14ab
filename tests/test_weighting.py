"""Ensemble weights are the best on the simplex, and say how sure they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from ensemblelora.config import EnsembleConfig, parse_config
from ensemblelora.errors import ConfigError, DataError, TrainingError
from ensemblelora.weighting import MemberLogits, choose_candidates, combine, drop_negligible, drop_unraised, fit_weights
from ensemblelora.weighting.fit import _cut_folds
from ensemblelora.weighting.loss import derive, prepare, row_losses, take
from ensemblelora.weighting.solver import minimise

Array = np.ndarray


def make_task(
    n: int = 60, n_classes: int = 3, skills: tuple[float, ...] = (1.5, 1.0, 0.0), seed: int = 0
) -> MemberLogits:
    """Groups whose logits point to the right class as strongly as their skill."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    values = rng.normal(size=(len(skills), n, n_classes))
    values[:, np.arange(n), labels] += np.array(skills)[:, None]
    return MemberLogits(values, labels, np.arange(n) // 2)


def make_sequence(n: int = 20, m: int = 3, seed: int = 0) -> MemberLogits:
    rng = np.random.default_rng(seed)
    row_example = np.repeat(np.arange(n), rng.integers(1, 6, n))
    values = np.log(rng.uniform(0.01, 1.0, (m, len(row_example), 1)))
    return MemberLogits(values, np.zeros(n, dtype=int), np.arange(n), row_example)


def slow_nll(task: MemberLogits, weights: Array, how: str) -> float:
    """Mean cross-entropy of the combination, one example at a time."""
    row_example = np.arange(task.values.shape[1]) if task.row_example is None else task.row_example
    total = 0.0
    for e in range(len(task.groups)):
        losses = []
        for row in np.flatnonzero(row_example == e):
            members = task.values[:, row, :]
            if members.shape[1] == 1:
                losses.append(-np.log(weights @ np.exp(members[:, 0])))
                continue
            here = members[:, np.isfinite(members[0])]
            if how == "logits":
                losses.append(-special.log_softmax(weights @ here)[task.labels[e]])
            else:
                losses.append(-np.log(weights @ special.softmax(here, axis=1))[task.labels[e]])
        total += float(np.mean(losses))
    return total / len(task.groups)


def slow_objective(task: MemberLogits, weights: Array, how: str, prior: Array, kappa: float) -> float:
    return slow_nll(task, weights, how) + kappa * float(special.rel_entr(weights, prior).sum())


def fit_slowly(objective: Callable[[Array], float], m: int) -> Array:
    starts = [np.full(m, 1 / m), *(0.8 * np.eye(m) + 0.2 / m)]
    options: dict[str, Any] = {
        "method": "SLSQP",
        "bounds": [(1e-12, 1)] * m,
        "constraints": {"type": "eq", "fun": lambda w: w.sum() - 1},
        "options": {"ftol": 1e-13, "maxiter": 500},
    }
    found = [optimize.minimize(objective, start, **options) for start in starts]
    best: Array = min(found, key=lambda result: float(result.fun)).x
    return best


TASKS: dict[str, tuple[MemberLogits, str]] = {
    "logits": (make_task(), "logits"),
    "probabilities": (make_task(), "probabilities"),
    "sequence": (make_sequence(), "logits"),
}


@pytest.mark.parametrize("kappa", [0.0, 0.01, 0.3, 10.0])
@pytest.mark.parametrize("kind", TASKS)
def test_weights_are_scipys_optimum(kind: str, kappa: float) -> None:
    task, how = TASKS[kind]
    prior = np.array([0.9, 0.05, 0.05])

    def objective(w: Array) -> float:
        return slow_objective(task, w, how, prior, kappa)

    fit = minimise([prepare(task, how)], prior, kappa)
    slow = fit_slowly(objective, 3)
    assert objective(fit.weights) <= objective(slow) + 1e-6
    assert objective(fit.weights) - objective(slow) <= fit.gap + 1e-9, "the certificate is wrong"
    np.testing.assert_allclose(fit.weights, slow, atol=2e-3)


@pytest.mark.parametrize("kind", TASKS)
def test_no_point_of_a_grid_is_better(kind: str) -> None:
    task, how = TASKS[kind]
    prior = np.array([0.8, 0.1, 0.1])
    fit = minimise([prepare(task, how)], prior, 0.02)
    best = slow_objective(task, fit.weights, how, prior, 0.02)
    for a in np.linspace(0, 1, 11):
        for b in np.linspace(0, 1 - a, 6):
            assert best <= slow_objective(task, np.array([a, b, 1 - a - b]), how, prior, 0.02) + 1e-6


@pytest.mark.parametrize("kind", TASKS)
def test_losses_and_derivatives_are_right(kind: str) -> None:
    task, how = TASKS[kind]
    loss = prepare(task, how)
    w = np.array([0.5, 0.2, 0.3])

    def value(at: Array) -> float:
        return float(loss.mean(row_losses(loss, at)))

    assert value(w) == pytest.approx(slow_nll(task, w, how))
    gradient, hessian = derive(loss, w)
    steps = 1e-5 * np.eye(3)
    np.testing.assert_allclose(gradient, [(value(w + h) - value(w - h)) / 2e-5 for h in steps], atol=1e-8)
    slopes = [(derive(loss, w + h)[0] - derive(loss, w - h)[0]) / 2e-5 for h in steps]
    np.testing.assert_allclose(hessian, slopes, atol=1e-7)


@pytest.mark.parametrize("how", ["logits", "probabilities"])
def test_the_fitted_loss_is_the_loss_of_the_combined_scores(how: Any) -> None:
    task = make_task(n=80)
    result = fit_weights([task], [0], EnsembleConfig(combine=how), seed=0)
    combined = combine(task.values, result.weights[0], how)
    nll = -special.log_softmax(combined, axis=1)[np.arange(80), task.labels].mean()
    assert result.validation_nll[0] == pytest.approx(nll)
    own = -special.log_softmax(task.values[0], axis=1)[np.arange(80), task.labels].mean()
    assert result.own_nll[0] == pytest.approx(own)


def test_the_fitted_loss_of_a_sequence_is_that_of_its_mixture() -> None:
    task = make_sequence(n=80)
    result = fit_weights([task], [0], EnsembleConfig(), seed=0)
    rows = -combine(task.values, result.weights[0], "mixture")[:, 0]
    assert task.row_example is not None
    per_example = [rows[task.row_example == e].mean() for e in range(80)]
    assert result.validation_nll[0] == pytest.approx(np.mean(per_example))


@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from(["logits", "probabilities"]))
@settings(max_examples=20, deadline=None)
def test_weights_lie_on_the_simplex_with_a_small_gap(seed: int, m: int, how: Any) -> None:
    skills = tuple(np.random.default_rng(seed).uniform(0, 3, m))
    task = make_task(n=55, skills=skills, seed=seed)
    result = fit_weights([task], [seed % m], EnsembleConfig(combine=how), seed=0)
    assert (result.weights >= 0).all()
    assert result.weights.sum() == pytest.approx(1, abs=1e-12)
    assert 0 <= result.gaps[0] <= 2e-6


@pytest.mark.parametrize("how", ["logits", "probabilities"])
def test_only_the_own_group_helps_then_it_gets_everything(how: Any) -> None:
    task = make_task(n=300, skills=(2.0, 0.0, 0.0))
    noise = MemberLogits(np.stack([task.values[0], -2 * task.values[0], -task.values[0]]), task.labels, task.groups)
    result = fit_weights([noise], [0], EnsembleConfig(combine=how, kl_penalty=0.0), seed=0)
    np.testing.assert_array_equal(result.weights[0], [1, 0, 0])
    assert result.routed[0] and result.routes[0] == 0


def test_another_groups_weight_wins_when_it_is_the_only_one_that_helps() -> None:
    task = make_task(n=300, skills=(0.0, 3.0))
    result = fit_weights([task], [0], EnsembleConfig(), seed=0)
    assert result.weights[0, 1] > 0.9 and result.routes[0] == 1
    assert result.validation_nll[0] < result.own_nll[0] - 0.5


def test_a_complementary_pair_is_shared_and_not_routed() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    signs = np.where(labels == 1, 1.0, -1.0)
    halves = np.arange(400) % 2 == 0
    members = [np.where(halves, 6 * signs, 0.1 * rng.normal(size=400)), np.where(halves, 0.0, 6 * signs)]
    values = np.stack([np.stack([-f / 2, f / 2], axis=1) for f in members])
    result = fit_weights([MemberLogits(values, labels, np.arange(400))], [0], EnsembleConfig(kl_penalty=0.001), seed=0)
    assert 0.3 < result.weights[0, 0] < 0.7
    assert not result.routed[0]
    np.testing.assert_array_equal(result.serving_weights, result.weights)


def test_indistinguishable_groups_are_routed_to_the_own_one() -> None:
    task = make_task(n=100, skills=(1.0,))
    same = MemberLogits(np.repeat(task.values, 3, axis=0), task.labels, task.groups)
    result = fit_weights([same], [2], EnsembleConfig(), seed=0)
    assert result.routed[0] and result.routes[0] == 2
    np.testing.assert_array_equal(result.serving_weights[0], [0, 0, 1])
    np.testing.assert_allclose(result.weights[0], [0.05, 0.05, 0.9], atol=1e-4)


def test_twins_do_not_make_a_gain_more_certain() -> None:
    """The same evidence, each row copied four times inside its group, routes as before."""
    task, config = make_task(n=60, skills=(1.0, 0.5), seed=8), EnsembleConfig(kl_penalty=0.05)

    def is_routed(copies: int, groups: Array) -> bool:
        values, labels = np.repeat(task.values, copies, axis=1), np.repeat(task.labels, copies)
        return bool(fit_weights([MemberLogits(values, labels, groups)], [0], config, seed=0).routed[0])

    assert is_routed(1, np.arange(60))
    assert is_routed(4, np.repeat(np.arange(60), 4))
    assert not is_routed(4, np.arange(240))


@pytest.mark.parametrize("kind", TASKS)
def test_weights_follow_the_groups_when_they_are_renumbered(kind: str) -> None:
    task, how = TASKS[kind]
    order = np.array([2, 0, 1])
    moved = MemberLogits(task.values[order], task.labels, task.groups, task.row_example)
    config = EnsembleConfig(combine="logits" if how == "logits" else "probabilities", kl_penalty=0.05)
    a = fit_weights([task], [0], config, seed=0).weights[0]
    b = fit_weights([moved], [1], config, seed=0).weights[0]
    np.testing.assert_allclose(a[order], b, atol=1e-4)


def test_constants_added_to_a_groups_logits_change_nothing() -> None:
    task = make_task()
    shifts = np.random.default_rng(1).normal(size=(3, 60, 1)) * 50
    moved = MemberLogits(task.values + shifts, task.labels, task.groups)
    hows: tuple[Any, ...] = ("logits", "probabilities")
    for how in hows:
        config = EnsembleConfig(combine=how, kl_penalty=0.05)
        a, b = (fit_weights([t], [0], config, seed=0).weights for t in (task, moved))
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_tasks_do_not_disturb_each_other() -> None:
    tasks = [make_task(seed=1), make_sequence(n=60), make_task(n=80, n_classes=5, seed=2)]
    together = fit_weights(tasks, [0, 1, 2], EnsembleConfig(), seed=4)
    for i, task in enumerate(tasks):
        alone = fit_weights([task], [i], EnsembleConfig(), seed=4)
        np.testing.assert_array_equal(together.weights[i], alone.weights[0])
        assert together.kl_penalties[i] == alone.kl_penalties[0]


def test_the_prior_takes_over_as_the_penalty_grows() -> None:
    task = make_task(skills=(0.0, 3.0))
    shares = [
        fit_weights([task], [0], EnsembleConfig(kl_penalty=kappa), seed=0).weights[0, 0] for kappa in (0.01, 1.0, 1e4)
    ]
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] == pytest.approx(0.9, abs=1e-3)


def test_a_certain_prior_leaves_no_choice() -> None:
    result = fit_weights([make_task(skills=(0.0, 3.0))], [0], EnsembleConfig(own_group_prior=1.0), seed=0)
    np.testing.assert_array_equal(result.weights[0], [1, 0])


def test_few_examples_stay_near_the_prior_and_many_are_cross_validated() -> None:
    few = fit_weights([make_task(n=50, skills=(1.0, 1.2))], [0], EnsembleConfig(), seed=0)
    assert few.kl_penalties[0] == 1.0 and few.weights[0, 0] > 0.8
    many = fit_weights([make_task(n=400, skills=(0.2, 1.5))], [0], EnsembleConfig(), seed=0)
    assert many.kl_penalties[0] < 0.3 and many.weights[0, 1] > 0.8


def test_the_penalty_is_the_one_with_the_lowest_cross_validated_loss() -> None:
    task = make_task(n=70, skills=(1.0, 1.3), seed=5)
    loss, prior = prepare(task, "logits"), np.array([0.9, 0.1])
    folds = _cut_folds(loss.groups, 7)
    grid = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
    scores = []
    for kappa in grid:
        held = 0.0
        for k in range(5):
            w = minimise([take(loss, folds != k)], prior, kappa).weights
            rows = folds == k
            here = MemberLogits(task.values[:, rows], task.labels[rows], task.groups[rows])
            held += rows.sum() / 70 * slow_nll(here, w, "logits")
        scores.append(held)
    result = fit_weights([task], [0], EnsembleConfig(), seed=7)
    chosen = scores[grid.index(float(result.kl_penalties[0]))]
    assert chosen <= min(scores) + 1e-4


def test_folds_never_cut_a_group_and_are_even() -> None:
    groups = np.random.default_rng(0).integers(0, 23, 200)
    groups = np.unique(groups, return_inverse=True)[1]
    folds = _cut_folds(groups, 0)
    assert all(len(set(folds[groups == g])) == 1 for g in range(groups.max() + 1))
    sizes = [len(set(groups[folds == k])) for k in range(5)]
    assert max(sizes) - min(sizes) <= 1


def test_part_of_a_sequence_task_keeps_whole_examples() -> None:
    task = make_sequence(n=9)
    keep = np.arange(9) % 2 == 0
    part = take(prepare(task, "logits"), keep)
    assert task.row_example is not None
    rows = keep[task.row_example]
    renamed = np.unique(task.row_example[rows], return_inverse=True)[1]
    smaller = MemberLogits(task.values[:, rows], task.labels[keep], task.groups[keep], renamed)
    w = np.array([0.2, 0.3, 0.5])
    assert part.mean(row_losses(part, w)) == pytest.approx(slow_nll(smaller, w, "logits"))


def test_global_weights_minimise_the_mean_over_tasks() -> None:
    tasks = [make_task(n=60, skills=(2.0, 0.5), seed=1), make_task(n=90, skills=(0.3, 1.0), n_classes=2, seed=2)]
    config = EnsembleConfig(weights="global", kl_penalty=0.05)
    result = fit_weights(tasks, [0, 1], config, seed=0)
    np.testing.assert_array_equal(result.weights[0], result.weights[1])
    priors = np.array([[0.9, 0.1], [0.1, 0.9]])

    def objective(w: Array) -> float:
        both = zip(tasks, priors, strict=True)
        return float(np.mean([slow_objective(task, w, "logits", prior, 0.05) for task, prior in both]))

    np.testing.assert_allclose(result.weights[0], fit_slowly(objective, 2), atol=1e-4)


def test_modes_that_fit_nothing() -> None:
    tasks = [make_task(seed=1), make_task(seed=2)]
    own = fit_weights(tasks, [2, 0], EnsembleConfig(weights="own"), seed=0)
    np.testing.assert_array_equal(own.weights, [[0, 0, 1], [1, 0, 0]])
    assert own.routed.all() and list(own.routes) == [2, 0] and np.isnan(own.kl_penalties).all()
    uniform = fit_weights(tasks, [2, 0], EnsembleConfig(weights="uniform"), seed=0)
    np.testing.assert_allclose(uniform.weights, 1 / 3)
    assert not uniform.routed.any() and (uniform.gaps == 0).all()


@pytest.mark.parametrize("mode", ["task", "global", "uniform", "own"])
def test_one_group_gets_everything(mode: Any) -> None:
    result = fit_weights([make_task(skills=(1.0,))], [0], EnsembleConfig(weights=mode), seed=0)
    np.testing.assert_array_equal(result.weights, [[1.0]])
    assert result.routed.all()
    assert result.validation_nll[0] == pytest.approx(result.own_nll[0])


def test_absent_classes_are_never_looked_at() -> None:
    task = make_task(n=80, n_classes=4)
    n_choices = np.random.default_rng(1).integers(2, 5, 80)
    absent = np.arange(4) >= n_choices[:, None]
    masked = MemberLogits(np.where(absent, -np.inf, task.values), task.labels % n_choices, task.groups)
    hows: tuple[Any, ...] = ("logits", "probabilities")
    for how in hows:
        config = EnsembleConfig(combine=how, kl_penalty=0.05)
        result = fit_weights([masked], [0], config, seed=0)
        assert result.validation_nll[0] == pytest.approx(slow_nll(masked, result.weights[0], how))
        combined = combine(masked.values, result.weights[0], how)
        np.testing.assert_array_equal(np.isneginf(combined), absent)


def test_combinations_are_what_they_say() -> None:
    values = np.random.default_rng(0).normal(size=(2, 5, 3))
    w = np.array([0.25, 0.75])
    np.testing.assert_allclose(combine(values, w, "logits"), 0.25 * values[0] + 0.75 * values[1])
    mixed = np.log(0.25 * special.softmax(values[0], axis=1) + 0.75 * special.softmax(values[1], axis=1))
    np.testing.assert_allclose(combine(values, w, "probabilities"), mixed)
    logs = special.log_softmax(values, axis=2)
    np.testing.assert_allclose(combine(logs, w, "mixture"), mixed)
    np.testing.assert_array_equal(combine(values, [0.0, 1.0], "logits"), values[1])


def test_certain_and_impossible_tokens_do_not_break_a_mixture() -> None:
    values = np.array([[0.0, -2000.0], [-2000.0, 0.0]])[:, :, None]
    task = MemberLogits(values, np.zeros(2, dtype=int), np.arange(2))
    result = fit_weights([task], [0], EnsembleConfig(kl_penalty=0.0), seed=0)
    np.testing.assert_allclose(result.weights[0], [0.5, 0.5], atol=1e-4)
    assert result.validation_nll[0] == pytest.approx(np.log(2), abs=1e-5)


def test_equal_inputs_give_equal_weights() -> None:
    a, b = (fit_weights([make_task(n=120)], [0], EnsembleConfig(), seed=3) for _ in range(2))
    np.testing.assert_array_equal(a.weights, b.weights)


def test_impossible_inputs_are_refused() -> None:
    task = make_task()
    broken = task.values.copy()
    broken[0, 0, 0] = np.nan
    with pytest.raises(TrainingError, match=r"not finite.*learning_rate"):
        MemberLogits(broken, task.labels, task.groups)
    broken[0, 0, 0] = -np.inf
    with pytest.raises(TrainingError, match="not finite"):
        MemberLogits(broken, task.labels, task.groups)
    with pytest.raises(DataError, match=r"labels.*each a class"):
        MemberLogits(task.values, task.labels + 2, task.groups)
    with pytest.raises(DataError, match="a row for every example"):
        MemberLogits(task.values, task.labels, task.groups[:-1])
    with pytest.raises(DataError, match="expected"):
        MemberLogits(task.values[0], task.labels, task.groups)


def test_impossible_requests_are_refused() -> None:
    task = make_task()
    with pytest.raises(ConfigError, match=r"ensemble\.kl_penalty: got -1"):
        parse_config({"data": {"tasks": ["t"]}, "ensemble": {"kl_penalty": -1.0}})
    with pytest.raises(DataError, match=r"task 0.*own group 3"):
        fit_weights([task], [3], EnsembleConfig(), seed=0)
    with pytest.raises(DataError, match="task 1: 2 groups"):
        fit_weights([task, make_task(skills=(1.0, 1.0))], [0, 0], EnsembleConfig(), seed=0)
    with pytest.raises(DataError, match="1 tasks and 2 own groups"):
        fit_weights([task], [0, 1], EnsembleConfig(), seed=0)
    with pytest.raises(ConfigError, match=r"own_group_prior.*lower it"):
        config = EnsembleConfig(weights="global", own_group_prior=1.0)
        fit_weights([task, task], [0, 1], config, seed=0)


def test_impossible_combinations_are_refused() -> None:
    values = make_task().values
    for weights in ([0.5, 0.6, 0.1], [-0.5, 1.0, 0.5], [0.5, 0.5]):
        with pytest.raises(DataError, match="weights"):
            combine(values, weights, "logits")


def test_negligible_weights_go_and_the_rest_sums_to_one() -> None:
    weights = np.array([[0.9, 0.09, 0.01], [0.34, 0.33, 0.33], [1.0, 0.0, 0.0], [0.015, 0.97, 0.015]])
    found = drop_negligible(weights, 0.02)
    np.testing.assert_allclose(found[0], [0.9 / 0.99, 0.09 / 0.99, 0.0])
    np.testing.assert_array_equal(found[1:3], weights[1:3])
    np.testing.assert_array_equal(found[3], [0.0, 1.0, 0.0])
    np.testing.assert_array_equal(drop_negligible(weights, 0.0), weights)
    spread_thin = np.full((1, 60), 1 / 60)
    np.testing.assert_allclose(drop_negligible(spread_thin, 0.02), spread_thin, err_msg="the largest always stay")


def test_weights_that_the_rows_did_not_raise_go_and_the_own_groups_never() -> None:
    weights = np.array([[0.9, 0.05, 0.05], [0.05, 0.85, 0.1], [0.06, 0.44, 0.5], [0.3, 0.3, 0.4], [0.05, 0.0, 0.95]])
    found = drop_unraised(weights, [0, 1, 0, 2, 0], 0.9)  # the others begin with 0.05 each
    np.testing.assert_array_equal(found[0], [1.0, 0.0, 0.0])
    np.testing.assert_allclose(found[1:4], [[0.0, 0.85 / 0.95, 0.1 / 0.95], [0.06, 0.44, 0.5], [0.3, 0.3, 0.4]])
    np.testing.assert_array_equal(found[4], [0.05, 0.0, 0.95])
    np.testing.assert_array_equal(drop_unraised(np.ones((2, 1)), [0, 0], 0.9), np.ones((2, 1)))
    np.testing.assert_array_equal(drop_unraised(weights, [0, 1, 0, 2, 0], 1.0), weights)


def test_where_rows_say_nothing_the_own_group_answers_alone() -> None:
    alike = make_task(n=200, skills=(1.0, 1.0, 1.0))
    values = np.repeat(alike.values[:1], 3, axis=0)
    task = MemberLogits(values, alike.labels, alike.groups)
    fitted = fit_weights([task], [1], EnsembleConfig(), seed=0)
    np.testing.assert_allclose(fitted.weights, [[0.05, 0.9, 0.05]], atol=1e-4)
    np.testing.assert_array_equal(drop_unraised(fitted.weights, [1], 0.9), [[0.0, 1.0, 0.0]])


# Who competes


def test_a_tasks_candidates_are_its_own_group_and_those_predicted_best_for_it() -> None:
    predicted = [[0.5, 0.2, 0.9, 0.3], [0.5, 0.2, 0.9, 0.3], [0.1, 0.1, 0.1, 0.1]]
    config = EnsembleConfig(max_candidates=2)
    assert choose_candidates([0, 1, 3], 4, config, predicted) == ((0, 1), (1, 3), (0, 3))
    assert choose_candidates([2, 2, 2], 4, EnsembleConfig(max_candidates=3), predicted)[0] == (1, 2, 3)
    for few, config in ((1, EnsembleConfig(max_candidates=1)), (1, EnsembleConfig(weights="own"))):
        assert choose_candidates([0, 1, 3], 4, config, predicted) == ((0,), (1,), (3,)) and few == 1
        assert config.count_candidates(4) == 1


@pytest.mark.parametrize(
    ("config", "predicted"),
    [
        (EnsembleConfig(max_candidates=None), [[0.1, 0.2, 0.3]]),
        (EnsembleConfig(max_candidates=5), [[0.1, 0.2, 0.3]]),
        (EnsembleConfig(max_candidates=2, weights="global"), [[0.1, 0.2, 0.3]]),
        (EnsembleConfig(max_candidates=2, weights="uniform"), [[0.1, 0.2, 0.3]]),
        (EnsembleConfig(max_candidates=2), ()),
    ],
)
def test_every_group_competes_where_that_is_asked_for_or_nothing_is_predicted(config: Any, predicted: Any) -> None:
    assert choose_candidates([1], 3, config, predicted) == ((0, 1, 2),)
