"""The subset oracle against scipy, finite differences, plain loops and a model that is truly linear."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad, minimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from ensemblelora.config import EstimationConfig
from ensemblelora.errors import ConfigError, DataError, UsageError
from ensemblelora.estimation import (
    Oracle,
    TaskFeatures,
    build_oracle,
    choose_l2_penalty,
    compute_clustered_se,
    compute_penalties,
    compute_wilson_interval,
    fit_subsets,
    loss,
    mean_loss_gradients,
    predict_outcomes,
    predict_rows,
    problem,
    score_subsets,
    solver,
)
from ensemblelora.estimation.descent import StepMemory
from ensemblelora.estimation.inverse import OwnInverse, SharedInverse
from ensemblelora.estimation.loss import LinearRows, compute_curvature_trace, compute_hessian, sum_losses
from ensemblelora.store import FeatureBlock, helmert

MODES = ("margin", "contrast", "logodds", "sequence")
CONFIG = EstimationConfig(method="ridge", l2_penalty=0.3, tolerance=1e-10)


def make_block(
    task: str, *, mode: str = "margin", n: int = 30, d: int = 7, seed: int = 0, split: str = "train"
) -> FeatureBlock:
    """Random features with learnable labels; contrast rows have 2, 3 or 4 of four classes."""
    rng = np.random.default_rng([seed, n, d, MODES.index(mode), *task.encode(), *split.encode()])
    c = 3 if mode == "contrast" else 1
    outputs, features = rng.normal(size=(n, c)), rng.normal(size=(n, c, d)) * rng.uniform(0.2, 2, size=d)
    n_choices = (
        rng.integers(2, 5, size=n) if mode == "contrast" else np.full(n, {"sequence": 1, "logodds": 9}.get(mode, 2))
    )
    truth = np.random.default_rng([*task.encode()]).normal(size=d)
    u = outputs + features @ truth
    if mode == "contrast":
        logits = u @ helmert(4) + rng.gumbel(size=(n, 4))
        labels = np.where(np.arange(4) < n_choices[:, None], logits, -np.inf).argmax(axis=1)
    else:
        labels = (u[:, 0] + rng.logistic(size=n) > 0) * (mode == "margin")
    return FeatureBlock(
        task,
        split,
        mode,
        outputs.astype(np.float32),
        features.astype(np.float32),
        labels.astype(np.int64),
        n_choices.astype(np.int64),
        (features**2).sum(axis=(1, 2)).astype(np.float32),
        np.arange(n) // 2,
        tuple(f"{split}:{e}" for e in range(n)),
    )


def make_features(*modes: str, n: int = 30, d: int = 7, seed: int = 0) -> TaskFeatures:
    names = [f"{mode}{i}" for i, mode in enumerate(modes)]
    train = tuple(
        make_block(name, mode=mode, n=n + 3 * i, d=d, seed=seed)
        for i, (name, mode) in enumerate(zip(names, modes, strict=True))
    )
    validation = tuple(
        make_block(name, mode=mode, n=20, d=d, seed=seed, split="validation")
        for name, mode in zip(names, modes, strict=True)
    )
    return TaskFeatures(train, validation)


def slow_logits(block: FeatureBlock, w: np.ndarray, e: int) -> np.ndarray:
    """One row's logits, written out: the classes it has, nothing else."""
    u = block.outputs[e].astype(float) + block.features[e].astype(float) @ w
    if block.mode == "margin":
        return np.array([0.0, u[0]])
    if block.mode == "contrast":
        return (helmert(block.n_outputs + 1).T @ u)[: block.n_choices[e]]
    return np.array([u[0], 0.0])


def slow_objective(
    blocks: list[FeatureBlock], w: np.ndarray, ridge: float, weights: list[np.ndarray] | None = None
) -> float:
    """The subset's objective by a loop over rows."""
    total = mass = 0.0
    for i, block in enumerate(blocks):
        for e in range(len(block.ids)):
            a = 1.0 if weights is None else weights[i][e]
            total -= a * log_softmax(slow_logits(block, w, e))[block.labels[e]]
            mass += a
    return total / mass + 0.5 * ridge * w @ w


@pytest.mark.parametrize("mode", MODES)
def test_gradient_and_hessian_agree_with_finite_differences(mode: str) -> None:
    rows = LinearRows.from_block(make_block("a", mode=mode), np.linspace(0.5, 2, 30))
    w = np.random.default_rng(1).normal(size=7) * 0.3
    assert check_grad(lambda v: sum_losses(rows, v[None])[0][0], lambda v: sum_losses(rows, v[None])[1][0], w) < 1e-4
    step = 1e-5 * np.eye(7)
    ahead, behind = sum_losses(rows, w + step)[1], sum_losses(rows, w - step)[1]
    np.testing.assert_allclose(compute_hessian(rows, w), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_sums_of_losses_agree_with_a_loop_whatever_is_held_at_once(mode: str, monkeypatch) -> None:
    block, a = make_block("a", mode=mode, n=70), np.linspace(0.5, 2, 70)
    weights = np.random.default_rng(2).normal(size=(4, 7))
    rows = LinearRows.from_block(block, a, unit=2.5)
    losses, gradients = sum_losses(rows, weights)
    np.testing.assert_allclose(losses, [a.sum() * slow_objective([block], w / 2.5, 0, [a]) for w in weights])
    single = sum_losses(rows, weights.astype(np.float32))
    assert single[1].dtype == np.float32
    np.testing.assert_allclose(single[0], losses, rtol=1e-5)
    np.testing.assert_allclose(single[1], gradients, rtol=1e-4, atol=1e-4 * np.abs(gradients).max())
    monkeypatch.setattr(loss, "_BLOCK_BYTES", 1)
    parts = sum_losses(rows, weights)
    np.testing.assert_allclose(parts[0], losses, rtol=1e-12)
    np.testing.assert_allclose(parts[1], gradients, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(compute_hessian(rows, weights[0]), hessian_of_rows(block, a, weights[0] / 2.5) / 2.5**2)


def hessian_of_rows(block: FeatureBlock, weights: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The sum over rows of J^T D^T (diag p - p p^T) D J, written out."""
    total = np.zeros((len(w), len(w)))
    for e, a in enumerate(weights):
        p = softmax(slow_logits(block, w, e))
        decoder = block.decoder[: len(p)]
        j = decoder @ block.features[e].astype(float)
        total += a * j.T @ (np.diag(p) - np.outer(p, p)) @ j
    return total


@pytest.mark.parametrize("mode", MODES)
def test_losses_agree_with_a_loop_over_rows(mode: str) -> None:
    block = make_block("a", mode=mode)
    weights = np.random.default_rng(2).normal(size=(4, 7))
    outcomes = predict_outcomes(block, weights)
    slow = [[-log_softmax(slow_logits(block, w, e))[block.labels[e]] for e in range(30)] for w in weights]
    np.testing.assert_allclose(outcomes.nll, slow, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(predict_outcomes(block, weights, block_bytes=1).nll, outcomes.nll, rtol=1e-9)
    if mode in ("logodds", "sequence"):
        h = block.outputs + block.features[:, 0].astype(float) @ weights.T
        np.testing.assert_allclose(
            outcomes.nll, np.logaddexp(0, -h).T, rtol=1e-12, atol=1e-14, err_msg="softplus(-h) is the nll"
        )


@pytest.mark.parametrize("mode", MODES)
def test_curvature_trace_is_the_hessian_at_equal_probabilities(mode: str) -> None:
    block = make_block("a", mode=mode)
    level = replace(block, outputs=np.zeros_like(block.outputs))
    for e, trace in enumerate(compute_curvature_trace(block)):
        hessian = compute_hessian(LinearRows.from_block(level.take([e])), np.zeros(7))
        assert trace == pytest.approx(np.trace(hessian), rel=1e-6)  # summed in float32
    if mode != "contrast":
        squares = (block.features.astype(float) ** 2).sum(axis=(1, 2))
        np.testing.assert_allclose(compute_curvature_trace(block), 0.25 * squares, rtol=1e-6)


@pytest.mark.parametrize("balance", ["example", "task"])
@pytest.mark.parametrize("penalty", [1e-3, 1.0, 100.0])
def test_fit_is_the_optimum_scipy_finds(balance: str, penalty: float) -> None:
    train = make_features("margin", "contrast", "logodds", "sequence", n=8, d=4).train
    subsets = [(0,), (1, 3), (0, 1, 2, 3)]
    fit = fit_subsets(train, subsets, l2_penalty=penalty, balance=balance, tolerance=1e-10)
    assert fit.converged.all()
    for s, subset in enumerate(subsets):
        blocks = [train[i] for i in subset]
        weights = [np.full(len(b.ids), 1 / len(b.ids) if balance == "task" else 1.0) for b in blocks]
        ridge = compute_penalties(train, subsets, penalty)[s]
        optimum = partial(slow_objective, blocks)
        twin = minimize(optimum, np.zeros(4), (ridge, weights), method="BFGS", options={"gtol": 1e-7})
        here = slow_objective(blocks, fit.weights[s], ridge, weights)
        assert here <= twin.fun + 1e-12
        assert here == pytest.approx(twin.fun, abs=1e-6)
        np.testing.assert_allclose(fit.weights[s], twin.x, atol=1e-4 * np.abs(twin.x).max())


@pytest.mark.parametrize("penalty", [0.01, 1.0, 30.0])
def test_many_fits_in_more_dimensions_than_are_measured_are_the_optima(penalty: float) -> None:
    train = make_features("margin", "contrast", "margin", "logodds", n=45, d=130).train
    subsets = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    fit = fit_subsets(train, subsets, l2_penalty=penalty, tolerance=1e-9)
    assert fit.converged.all() and fit.gradient_norms.max() <= 1e-9 * max(1, fit.objectives.max())
    for s, subset in enumerate(subsets):
        blocks, n = [train[i] for i in subset], sum(len(train[i].ids) for i in subset)
        rows = [LinearRows.from_block(block) for block in blocks]

        def objective(w: np.ndarray, rows=rows, n=n, s=s) -> tuple[float, np.ndarray]:
            losses, gradients = zip(*(sum_losses(task, w[None]) for task in rows), strict=True)
            ridge = fit.penalties[s]
            return sum(losses)[0] / n + ridge / 2 * w @ w, sum(gradients)[0] / n + ridge * w

        twin = minimize(objective, np.zeros(130), jac=True, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-8})
        assert fit.objectives[s] == pytest.approx(slow_objective(blocks, fit.weights[s], fit.penalties[s]), rel=1e-12)
        assert fit.objectives[s] <= twin.fun + 1e-12
        assert fit.objectives[s] == pytest.approx(twin.fun, rel=1e-6)


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_no_objective_is_lower_than_its_certificate_allows(tolerance: float, penalty: float) -> None:
    train = make_features("margin", "contrast", "logodds", d=12).train
    subsets = [(0,), (0, 1), (1, 2), (0, 1, 2)]
    best = fit_subsets(train, subsets, l2_penalty=penalty, tolerance=1e-10).objectives
    fit = fit_subsets(train, subsets, l2_penalty=penalty, tolerance=tolerance)
    assert (fit.objectives >= best - 1e-12).all() and (fit.objectives - best <= fit.objective_gaps + 1e-12).all()
    scale = fit.penalties / fit_subsets(train, [(0,)], l2_penalty=penalty).penalties * penalty  # in curvature units
    assert (fit.objective_gaps <= tolerance**2 * np.maximum(1, fit.objectives) ** 2 / (2 * scale) * 1.5).all()
    assert fit_subsets(train, subsets, l2_penalty=penalty, max_iter=1).objective_gaps.max() == np.inf


def test_fits_that_get_a_hessian_of_their_own_end_at_the_same_optimum(monkeypatch) -> None:
    train = make_features("margin", "contrast", "margin", n=40, d=110).train
    subsets = [(0,), (1,), (0, 1), (0, 1, 2)]
    together = fit_subsets(train, subsets, l2_penalty=0.01, tolerance=1e-9)
    monkeypatch.setattr(solver, "_PATIENCE", 2)
    alone = fit_subsets(train, subsets, l2_penalty=0.01, tolerance=1e-9, block_bytes=1)
    assert alone.converged.all() and (alone.iterations > 2).all()
    np.testing.assert_allclose(alone.weights, together.weights, rtol=1e-5, atol=1e-7)


def test_the_shared_inverse_is_the_inverse_hessian_at_the_base_model() -> None:
    train = make_features("margin", "contrast", "logodds", n=40, d=20).train
    shared = problem.prepare_problem(train, l2_penalty=0.2)
    batch = problem.make_batch(shared, [(0, 1), (2,), (0, 1, 2)])
    vectors = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    which = np.arange(3)
    found = SharedInverse(batch).solve(vectors, which)
    slow = OwnInverse(batch, np.zeros((3, 20))).solve(vectors, which)
    np.testing.assert_allclose(found, slow, rtol=1e-3, atol=1e-3 * np.abs(slow).max())
    few = SharedInverse(batch).solve(vectors[1:2], which[1:2])
    np.testing.assert_allclose(few[0], found[1], rtol=1e-4, atol=1e-5)


def test_the_measured_directions_hold_most_of_the_curvature_and_leave_a_positive_inverse() -> None:
    train = make_features("margin", "margin", n=150, d=200).train
    scales = np.arange(1, 201) ** -0.7
    train = [replace(b, features=(b.features * scales).astype(np.float32)) for b in train]
    shared = problem.prepare_problem(train, l2_penalty=0.1)
    basis = shared.curvatures.basis
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-4)
    hessian = sum(compute_hessian(rows, np.zeros(200)) for rows in shared.rows) / 300
    held, best = np.trace(basis.T @ hessian @ basis), np.linalg.eigvalsh(hessian)[-basis.shape[1] :].sum()
    assert 0.97 * best <= held <= best * (1 + 1e-5)
    assert shared.curvatures.rest == pytest.approx((np.trace(hessian) - held) / (200 - basis.shape[1]), rel=1e-2)
    inverse = SharedInverse(problem.make_batch(shared, [(0,)] * 200)).solve(
        np.eye(200, dtype=np.float32), np.arange(200)
    )
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-4 * inverse.max())
    assert np.linalg.eigvalsh((inverse + inverse.T) / 2).min() > 0


def test_the_memory_of_steps_is_the_bfgs_update_of_the_inverse() -> None:
    rng = np.random.default_rng(0)
    steps, hessian = rng.normal(size=(3, 2, 5)), np.diag(np.arange(1.0, 6.0))
    memory = StepMemory(2)
    inverses = np.stack([np.eye(5) / 2] * 2)
    for moves in steps:
        changes = moves @ hessian
        memory.add(np.arange(2), moves, changes)
        for k, (s, y) in enumerate(zip(moves, changes, strict=True)):
            left = np.eye(5) - np.outer(s, y) / (s @ y)
            inverses[k] = left @ inverses[k] @ left.T + np.outer(s, s) / (s @ y)
    gradients = rng.normal(size=(2, 5))

    class Half:
        def solve(self, vectors, which):
            return vectors / 2

    found = memory.correct(Half(), gradients, np.arange(2))
    np.testing.assert_allclose(found, np.einsum("kij,kj->ki", inverses, gradients), rtol=1e-4, atol=1e-5)
    memory.add(np.arange(2), steps[0], -steps[0])  # a change that no convex objective makes
    memory.forget(np.array([1]))
    kept, lost = memory.correct(Half(), gradients, np.arange(2))
    np.testing.assert_allclose(kept, found[0], rtol=1e-4)
    np.testing.assert_allclose(lost, gradients[1] / 2, rtol=1e-4)


def test_fit_equals_scikit_learn_where_it_can_express_the_problem() -> None:
    block = make_block("a", n=60)
    block = replace(block, outputs=np.zeros_like(block.outputs))  # scikit-learn knows no offsets
    fit = fit_subsets([block], [(0,)], l2_penalty=0.5, tolerance=1e-10)
    strength = 1 / (60 * compute_penalties([block], [(0,)], 0.5)[0])
    twin = LogisticRegression(C=strength, fit_intercept=False, tol=1e-12, max_iter=10_000)
    twin.fit(block.features[:, 0].astype(float), block.labels)
    np.testing.assert_allclose(fit.weights[0], twin.coef_[0], rtol=1e-5)


def test_the_oracle_is_exact_where_the_model_is_linear() -> None:
    """A "language model" whose logits are linear in its adapter: fine-tuning it must give what was predicted."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(5, 3))  # inputs (5,) to logits of three classes (3,)
    inputs = {split: [rng.normal(size=(40, 5)) for _ in range(3)] for split in ("train", "validation")}
    answers = {
        split: [np.argmax(x @ rng.normal(size=(5, 3)), axis=1) for x in parts] for split, parts in inputs.items()
    }

    def block(split: str, i: int) -> FeatureBlock:
        x, y = inputs[split][i], answers[split][i]
        jacobian = np.einsum("kc,nf->nkfc", helmert(3), x).reshape(len(x), 2, 15)  # d(U z) / d adapter
        arrays = [(x @ base @ helmert(3).T).astype(np.float32), jacobian.astype(np.float32), y.astype(np.int64)]
        n = len(x)
        return FeatureBlock(
            f"t{i}",
            split,
            "contrast",
            *arrays,
            np.full(n, 3),
            np.ones(n, np.float32),
            np.arange(n),
            tuple(map(str, range(n))),
        )

    train, validation = ([block(split, i) for i in range(3)] for split in inputs)
    subset = (0, 2)
    ridge = compute_penalties(train, [subset], 0.05)[0]
    x, y = (np.concatenate([source["train"][i] for i in subset]) for source in (inputs, answers))

    def training_loss(theta: np.ndarray) -> float:
        logits = x @ (base + theta.reshape(5, 3))
        return -log_softmax(logits, axis=1)[np.arange(len(y)), y].mean() + 0.5 * ridge * theta @ theta

    tuned = minimize(training_loss, np.zeros(15), method="BFGS", options={"gtol": 1e-7}).x.reshape(5, 3)
    scores = score_subsets(
        train, validation, [subset], EstimationConfig(method="ridge", l2_penalty=0.05, tolerance=1e-10)
    )
    for i in range(3):
        logits = inputs["validation"][i] @ (base + tuned)
        truth = answers["validation"][i]
        assert scores.nll[0, i] == pytest.approx(-log_softmax(logits, axis=1)[np.arange(40), truth].mean(), abs=1e-5)
        assert scores.accuracy[0, i] == (logits.argmax(axis=1) == truth).mean()
        assert scores.macro_f1[0, i] == pytest.approx(f1_score(truth, logits.argmax(axis=1), average="macro"))


@settings(max_examples=15, deadline=None)
@given(scale=st.sampled_from([1e-4, 0.1, 30.0, 1e4]), seed=st.integers(0, 5))
def test_predictions_do_not_depend_on_the_unit_of_the_features(scale: float, seed: int) -> None:
    features = make_features("margin", "contrast", seed=seed)
    scaled = TaskFeatures(
        *(
            tuple(replace(b, features=(b.features * scale).astype(np.float32)) for b in blocks)
            for blocks in (features.train, features.validation)
        )
    )
    subsets = [(0,), (0, 1)]
    before, after = (Oracle((f,), 0.1, CONFIG).score(subsets) for f in (features, scaled))
    np.testing.assert_allclose(after.nll, before.nll, rtol=1e-5)
    np.testing.assert_allclose(after.distances * scale, before.distances, rtol=1e-4)


def test_predictions_do_not_depend_on_the_order_of_tasks_subsets_or_blocks() -> None:
    features = make_features("margin", "contrast", "logodds")
    subsets = [(0,), (1, 2), (0, 1, 2), (2,)]
    order = [2, 0, 1]
    shuffled = [tuple(order.index(i) for i in subset) for subset in reversed(subsets)]
    plain = fit_subsets(features.train, subsets, l2_penalty=0.1, tolerance=1e-10)
    moved = fit_subsets([features.train[i] for i in order], shuffled, l2_penalty=0.1, tolerance=1e-10, block_bytes=1)
    np.testing.assert_allclose(moved.weights[::-1], plain.weights, rtol=1e-6, atol=1e-9)


def test_penalty_falls_with_the_subset_and_a_huge_one_leaves_the_base_model() -> None:
    features = make_features("margin", "margin", "contrast")
    sizes = np.array([len(b.ids) for b in features.train])
    subsets = [(0,), (1, 2), (0, 1, 2)]
    penalties = compute_penalties(features.train, subsets, 2.0)
    np.testing.assert_allclose(penalties * [sizes[list(s)].sum() for s in subsets], penalties[0] * sizes[0])
    np.testing.assert_allclose(fit_subsets(features.train, subsets, l2_penalty=2.0).penalties, penalties)
    oracle = Oracle((features,), 1e9, CONFIG)
    scores = oracle.score([(0, 1, 2), ()])
    np.testing.assert_allclose(scores.nll[0], scores.nll[1], rtol=1e-6)
    assert scores.distances[1] == 0


def test_example_weights_count_like_repeated_rows() -> None:
    block = make_block("a", n=12)
    counts = np.arange(12) % 3
    repeated = block.take(np.repeat(np.arange(12), counts))
    weighted = fit_subsets([block], [(0,)], l2_penalty=0.2, example_weights=[counts], tolerance=1e-10)
    penalty = 0.2 * weighted.penalties[0] / fit_subsets([repeated], [(0,)], l2_penalty=0.2).penalties[0]
    np.testing.assert_allclose(
        fit_subsets([repeated], [(0,)], l2_penalty=penalty, tolerance=1e-10).weights, weighted.weights, rtol=1e-6
    )


def test_separable_rows_converge_at_the_smallest_penalty() -> None:
    block = make_block("a", n=10, d=40)
    fit = fit_subsets([block], [(0,)], l2_penalty=1e-4)
    assert fit.converged.all() and fit.gradient_norms[0] <= 1e-6
    assert predict_outcomes(block, fit.weights).correct.all()


def test_a_fit_that_runs_out_of_steps_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    features = make_features("margin", "contrast")
    with caplog.at_level(logging.WARNING):
        scores = Oracle((features,), 1e-4, EstimationConfig(method="ridge", max_iter=2)).score([(0,), ()])
    assert scores.converged.tolist() == [False, True]
    assert "raise estimation.max_iter" in caplog.text


def test_class_probabilities_skip_the_classes_a_row_does_not_have() -> None:
    block = make_block("a", mode="contrast")
    logits = predict_rows(block, np.random.default_rng(3).normal(size=(2, 7)))
    assert logits.shape == (2, 30, 4)
    assert (np.isinf(logits) == (np.arange(4) >= block.n_choices[:, None])).all()
    np.testing.assert_allclose(softmax(logits, axis=2).sum(axis=2), 1)


def test_what_a_mode_cannot_tell_is_nan() -> None:
    scores = Oracle((make_features("margin", "contrast", "logodds", "sequence"),), 0.3, CONFIG).score([(0, 1), (2, 3)])
    assert np.isfinite(scores.nll).all() and np.isfinite(scores.nll_se).all()
    assert (np.isnan(scores.accuracy) == [False, False, False, True]).all()
    assert (np.isnan(scores.macro_f1) == [False, False, True, True]).all()


def test_a_logodds_row_counts_as_right_above_one_half() -> None:
    block = make_block("a", mode="logodds")
    weights = np.random.default_rng(6).normal(size=(3, 7))
    outcomes = predict_outcomes(block, weights)
    np.testing.assert_array_equal(outcomes.correct, np.exp(-outcomes.nll) > 0.5)


def test_macro_f1_equals_scikit_learn() -> None:
    block = make_block("a", mode="contrast", n=25)
    weights = np.random.default_rng(4).normal(size=(6, 7))
    outcomes = predict_outcomes(block, weights)
    for k, logits in enumerate(predict_rows(block, weights)):
        twin = f1_score(block.labels, logits.argmax(axis=1), average="macro", zero_division=0)
        assert outcomes.macro_f1[k] == pytest.approx(twin)


def test_standard_error_counts_groups_not_rows() -> None:
    values = np.random.default_rng(5).normal(size=(3, 24))
    plain = compute_clustered_se(values, np.arange(24))
    np.testing.assert_allclose(plain, values.std(axis=1, ddof=1) / np.sqrt(24))
    tripled = compute_clustered_se(np.repeat(values, 3, axis=1), np.repeat(np.arange(24), 3))
    np.testing.assert_allclose(tripled, plain, err_msg="copies of a row in its group add no information")
    assert np.isnan(compute_clustered_se(values, np.zeros(24, int))).all()


def test_several_projection_seeds_are_averaged_and_widen_the_error() -> None:
    first = make_features("margin", "contrast")
    second = make_features("margin", "contrast", seed=1)  # other gradients of the same rows
    second = TaskFeatures(
        *(
            tuple(
                replace(b, outputs=a.outputs, labels=a.labels, n_choices=a.n_choices)
                for a, b in zip(*pair, strict=True)
            )
            for pair in ((first.train, second.train), (first.validation, second.validation))
        )
    )
    subsets = [(0,), (0, 1), ()]
    both = Oracle((first, second), 0.3, CONFIG)
    one, two, mean = (
        oracle.score(subsets) for oracle in (Oracle((first,), 0.3, CONFIG), both.take_replicates([1]), both)
    )
    np.testing.assert_allclose(mean.nll, (one.nll + two.nll) / 2)
    np.testing.assert_allclose(mean.accuracy, (one.accuracy + two.accuracy) / 2)
    rows = np.stack([both.row_nll(subsets, task).mean(axis=1) for task in range(2)], axis=1)
    np.testing.assert_allclose(mean.nll, rows)
    spread = np.abs(one.nll - two.nll) / 2  # standard error of the mean of two
    assert (mean.nll_se[:2] >= spread[:2] - 1e-12).all() and spread[:2].min() > 0
    np.testing.assert_allclose(
        mean.nll_se[2], one.nll_se[2], err_msg="the base model does not depend on the projection"
    )


def test_the_oracle_solves_a_subset_once_and_in_any_order_of_its_tasks() -> None:
    oracle = Oracle((make_features("margin", "margin", "contrast"),), 0.3, CONFIG)
    scores = oracle.score([(2, 0), (0, 2), (1,), ()])
    assert scores.subsets == ((0, 2), (0, 2), (1,), ())
    assert oracle.n_fits == 2
    np.testing.assert_array_equal(scores.nll[0], scores.nll[1])
    oracle.take_replicates([0]).row_nll([(1,), (0, 2)], 1)
    assert oracle.n_fits == 2
    np.testing.assert_allclose(
        Oracle((oracle.replicates[0],), 0.3, CONFIG).score([(1,)]).nll[0], scores.nll[2], rtol=1e-9
    )


@pytest.fixture
def evaluated(monkeypatch) -> list[int]:
    """Outputs times weight vectors of every evaluation of the objective, as they happen."""
    counts: list[int] = []

    def spy(rows, weights):
        counts.append(rows.outputs.size * len(weights))
        return sum_losses(rows, weights)

    monkeypatch.setattr(problem, "sum_losses", spy)
    return counts


def test_the_oracle_counts_the_rows_its_fits_went_through(evaluated) -> None:
    features = make_features("margin", "contrast")
    oracle = Oracle((features, features), 0.3, CONFIG)
    assert oracle.row_iterations == 0
    oracle.solve([(0,), (0, 1)])
    assert oracle.row_iterations == sum(evaluated) > 0
    oracle.solve([(1,), (0,)])
    assert oracle.row_iterations == sum(evaluated)


def test_the_fits_that_a_penalty_is_chosen_from_are_counted_too(evaluated) -> None:
    features = make_features("margin", "contrast", "margin")
    oracle = build_oracle(
        [features], EstimationConfig(method="ridge", l2_grid=(0.1, 1.0, 10.0)), subsets=[(0, 1), (1, 2)]
    )
    assert sum(trial.row_iterations for trial in oracle.penalty_table) == sum(evaluated) > 0
    assert [trial.n_fits for trial in oracle.penalty_table] == [6, 6, 6], "two subsets, three singles, and all"
    assert oracle.row_iterations == 0


def test_auto_penalty_is_the_grid_value_with_the_least_validation_loss() -> None:
    features = make_features("margin", "contrast", "margin", n=60)
    subsets = [(0, 1), (1, 2)]
    config = EstimationConfig(method="ridge", l2_grid=(10.0, 0.1, 1000.0, 1.0), tolerance=1e-10)
    penalty, table = choose_l2_penalty(features.train, features.validation, subsets, config)
    assert [trial.l2_penalty for trial in table] == [0.1, 1.0, 10.0, 1000.0]
    assert np.all(np.diff([trial.distance for trial in table]) < 0), "a larger ridge gives shorter weights"
    asked = [*subsets, (0,), (1,), (2,), (0, 1, 2)]
    for trial in table:
        scores = Oracle((features,), trial.l2_penalty, config).score(asked)
        mean = np.mean([scores.nll[s, list(subset)].mean() for s, subset in enumerate(asked)])
        assert trial.nll == pytest.approx(mean) and trial.converged == 1.0
    assert penalty == min(table, key=lambda trial: trial.nll).l2_penalty
    assert build_oracle([features], config, subsets=subsets).l2_penalty == penalty
    assert score_subsets(features.train, features.validation, subsets, config).l2_penalty == penalty
    assert build_oracle([features], EstimationConfig(method="ridge", l2_penalty=2.5)).penalty_table == ()


def test_small_penalties_are_left_out_once_the_loss_only_rises() -> None:
    features = make_features("margin", "margin", n=15, d=20)
    grid = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
    penalty, table = choose_l2_penalty(
        features.train, features.validation, [], EstimationConfig(method="ridge", l2_grid=grid)
    )
    everything = [Oracle((features,), p, CONFIG).score([(0,), (1,), (0, 1)]).nll for p in grid]
    losses = [np.mean([nll[0, 0], nll[1, 1], nll[2].mean()]) for nll in everything]
    assert penalty == grid[int(np.argmin(losses))]
    np.testing.assert_allclose([trial.nll for trial in table], losses[-len(table) :], rtol=1e-4)
    assert len(table) < len(grid) and table[0].nll > table[1].nll > table[2].nll


def test_equal_losses_choose_the_largest_penalty() -> None:
    features = make_features("margin")
    silent = TaskFeatures(
        features.train, tuple(replace(b, features=np.zeros_like(b.features)) for b in features.validation)
    )
    penalty, _ = choose_l2_penalty(
        silent.train, silent.validation, [], EstimationConfig(method="ridge", l2_grid=(0.1, 1.0, 10.0))
    )
    assert penalty == 10.0


def test_mean_loss_gradient_is_the_derivative_of_the_mean_loss() -> None:
    train = make_features("margin", "contrast", "logodds", "sequence").train
    for block, gradient in zip(train, mean_loss_gradients(train), strict=True):
        step = 1e-6 * np.eye(7)
        numeric = [(slow_objective([block], e, 0) - slow_objective([block], -e, 0)) / 2e-6 for e in step]
        np.testing.assert_allclose(gradient, numeric, atol=1e-6)


def test_bad_input_is_refused_by_name() -> None:
    train = make_features("margin", "margin").train
    cases = [
        (ConfigError, "l2_penalty 0", lambda: fit_subsets(train, [(0,)], l2_penalty=0)),
        (UsageError, "subset", lambda: fit_subsets(train, [()], l2_penalty=1)),
        (UsageError, "from 0 to 1", lambda: fit_subsets(train, [(0, 2)], l2_penalty=1)),
        (UsageError, "distinct", lambda: fit_subsets(train, [(1, 1)], l2_penalty=1)),
        (DataError, "no tasks", lambda: fit_subsets([], [], l2_penalty=1)),
        (DataError, "no rows", lambda: fit_subsets([train[0].take([])], [(0,)], l2_penalty=1)),
        (DataError, "dimension 3", lambda: fit_subsets([train[0], make_block("b", d=3)], [(0,)], l2_penalty=1)),
        (DataError, "not all 0", lambda: fit_subsets(train[:1], [(0,)], l2_penalty=1, example_weights=[np.zeros(30)])),
        (
            DataError,
            "no gradient",
            lambda: fit_subsets([replace(train[0], features=0 * train[0].features)], [(0,)], l2_penalty=1),
        ),
        (DataError, "1 of 30 rows", lambda: fit_subsets([poisoned(train[0])], [(0,)], l2_penalty=1)),
        (DataError, "expected the same", lambda: TaskFeatures(train, train[::-1])),
        (
            DataError,
            "different validation rows",
            lambda: Oracle(
                (TaskFeatures(train, train), TaskFeatures(train, (train[0].take([0]), train[1]))), 1.0, CONFIG
            ),
        ),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def poisoned(block: FeatureBlock) -> FeatureBlock:
    features = block.features.copy()
    features[3, 0, 2] = np.nan
    return replace(block, features=features)


def test_no_subsets_give_empty_scores() -> None:
    scores = Oracle((make_features("margin", "margin"),), 0.3, CONFIG).score([])
    assert scores.nll.shape == (0, 2) and scores.distances.shape == (0,) and scores.converged.shape == (0,)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(("hits", "n"), [(0, 1), (20, 20), (0, 20), (7, 20), (999, 1000)])
def test_wilsons_interval_is_scipys_and_never_a_point(hits: int, n: int, confidence: float) -> None:
    found = compute_wilson_interval(hits / n, n, confidence)
    expected = scipy.stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found[0] < found[1]
