"""Standard errors of the affinity against a bootstrap of validation rows and against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ensemblelora import affinity as affinities
from ensemblelora import pipeline
from ensemblelora.affinity import affinity_from_scores, sample_subsets, select_values, weigh_scores
from ensemblelora.config import AffinityConfig, EstimationConfig
from ensemblelora.estimation import Oracle, TaskFeatures, compute_clustered_se
from ensemblelora.planning import estimate_affinity_errors, precision
from ensemblelora.store import FeatureBlock
from tests.tiny_run import copy_run, read_config

N_TASKS, N_VALIDATION = 5, 60


def make_block(task: int, split: str, *, n: int, d: int = 6, seed: int = 0) -> FeatureBlock:
    """Rows of a binary task; two rows share a group."""
    rng = np.random.default_rng([seed, task, n, d])
    features = rng.normal(size=(n, 1, d)).astype(np.float32)
    truth = np.random.default_rng(task % 2).normal(size=6)[:d]
    labels = (features[:, 0] @ truth + rng.logistic(size=n) > 0).astype(np.int64)
    return FeatureBlock(
        task=f"task-{task}",
        split=split,
        mode="margin",
        outputs=rng.normal(0, 0.3, size=(n, 1)).astype(np.float32),
        features=features,
        labels=labels,
        n_choices=np.full(n, 2),
        squared_norms=(features**2).sum(axis=(1, 2)),
        groups=np.arange(n) // 2,
        ids=tuple(f"{split}:{row}" for row in range(n)),
    )


def make_features(seed: int = 0) -> TaskFeatures:
    return TaskFeatures(
        tuple(make_block(i, "train", n=40, seed=seed) for i in range(N_TASKS)),
        tuple(make_block(i, "validation", n=N_VALIDATION, seed=seed + 100) for i in range(N_TASKS)),
    )


def blur(features: TaskFeatures, seed: int) -> TaskFeatures:
    """The same rows under another projection: features with some noise of their own."""
    rng = np.random.default_rng(seed)

    def blurred(block: FeatureBlock) -> FeatureBlock:
        noise = rng.normal(0, 0.3, size=block.features.shape).astype(np.float32)
        return replace(block, features=block.features + noise)

    return TaskFeatures(tuple(map(blurred, features.train)), tuple(map(blurred, features.validation)))


CONFIG = EstimationConfig(method="ridge", l2_penalty=0.1)


def estimate(oracle: Oracle, config: AffinityConfig) -> tuple[np.ndarray, np.ndarray]:
    design = sample_subsets(oracle.n_tasks, config, seed=0)
    scores = oracle.score(design.subsets)
    values = select_values(scores.nll, scores.accuracy, config.score)
    affinity = affinity_from_scores(design, values, row_scale=config.row_scale, surrogate=config.surrogate)
    return affinity.matrix, estimate_affinity_errors(oracle, design, values, config)


@pytest.mark.parametrize("surrogate", ["linear", "kernel"])
@pytest.mark.parametrize("score", ["nll", "accuracy"])
def test_errors_are_those_of_drawing_validation_rows_anew(score, surrogate):
    """Bootstrap over groups of rows: the spread of the affinity with each row's own level taken off."""
    oracle = Oracle((make_features(),), 0.1, CONFIG)
    config = AffinityConfig(subset_size=3, n_subsets=5, min_pair_count=0, score=score, surrogate=surrogate)
    design = sample_subsets(N_TASKS, config, seed=0)
    matrix, errors = estimate(oracle, config)
    found = oracle.score(design.subsets)
    values = select_values(found.nll, found.accuracy, score)
    draws = np.zeros((1500, N_TASKS, N_TASKS))
    rng = np.random.default_rng(1)
    every = list(weigh_scores(design, values, surrogate=surrogate))
    assert any(row.surrogate.any() for row in every), "some pairs are in no subset"
    for i, row in enumerate(every):
        (outcome,) = oracle.row_outcomes([design.subsets[s] for s in row.subsets], i)
        rows = -outcome.nll if score == "nll" else outcome.correct
        pairs = rows.reshape(len(rows), -1, 2).mean(axis=2)  # one number a group
        for draw in draws:
            draw[i] = row.weights @ pairs[:, rng.integers(pairs.shape[1], size=pairs.shape[1])].mean(axis=1)
    off = ~np.eye(N_TASKS, dtype=bool)
    draws -= draws.mean(axis=2, where=off, keepdims=True)
    bootstrap = ((draws + draws.transpose(0, 2, 1)) / 2).std(axis=0)
    np.testing.assert_allclose(errors[off], bootstrap[off], rtol=0.15, atol=1e-9)
    assert matrix.shape == errors.shape and np.array_equal(errors, errors.T)


def test_projections_that_differ_widen_the_errors():
    features = make_features()
    config = AffinityConfig(n_subsets=10)
    same = Oracle((features, features), 0.1, CONFIG)
    others = Oracle((blur(features, 1), blur(features, 2)), 0.1, CONFIG)
    _, alone = estimate(Oracle((features,), 0.1, CONFIG), config)
    np.testing.assert_allclose(estimate(same, config)[1], alone)
    design = sample_subsets(N_TASKS, config, seed=0)
    values = -others.score(design.subsets).nll
    slow = np.empty((N_TASKS, N_TASKS))
    for i, row in enumerate(weigh_scores(design, values)):
        first, second = (row.weights @ o.nll for o in others.row_outcomes([design.subsets[s] for s in row.subsets], i))
        first, second = (x - np.delete(x, i, axis=0).mean(axis=0) for x in (first, second))
        rows = compute_clustered_se((first + second) / 2, others.validation_groups(i))
        slow[i] = rows**2 + (first.mean(axis=1) - second.mean(axis=1)) ** 2 / 4
    _, errors = estimate(others, config)
    np.testing.assert_allclose(errors, np.sqrt(slow + slow.T) / 2)
    assert (errors**2 > 0).all()


def test_a_harder_task_has_no_larger_errors_for_its_level_alone():
    """A constant on a task's scores is its level: it moves the affinity, and no error."""
    features = make_features()
    config = AffinityConfig(n_subsets=10)
    oracle = Oracle((features,), 0.1, CONFIG)
    design = sample_subsets(N_TASKS, config, seed=0)
    values = -oracle.score(design.subsets).nll
    moved = values + 3.0 * np.arange(N_TASKS)
    errors = [estimate_affinity_errors(oracle, design, v, config) for v in (values, moved)]
    np.testing.assert_allclose(*errors, rtol=1e-6)


def test_scaled_rows_have_scaled_errors():
    oracle = Oracle((make_features(),), 0.1, CONFIG)
    plain, scaled = (AffinityConfig(n_subsets=10, row_scale=scale) for scale in ("none", "sd"))
    design = sample_subsets(N_TASKS, plain, seed=0)
    values = -oracle.score(design.subsets).nll
    directed = affinity_from_scores(design, values).directed
    spread = np.array([np.delete(row, i).std() for i, row in enumerate(directed)])
    (matrix, errors), (_, unscaled) = estimate(oracle, scaled), estimate(oracle, plain)
    np.testing.assert_allclose(matrix, (directed / spread[:, None] + (directed / spread[:, None]).T) / 2)
    assert not np.allclose(errors, unscaled)
    smallest, largest = 1 / spread.max(), 1 / spread.min()
    off = ~np.eye(N_TASKS, dtype=bool)
    ratio = (errors / unscaled)[off]
    assert smallest <= ratio.min() and ratio.max() <= largest


def test_rows_of_one_group_and_lone_tasks_have_no_error():
    features = make_features()
    blocks = list(features.validation)
    blocks[2] = replace(blocks[2], groups=np.zeros(N_VALIDATION, dtype=np.int64))
    oracle = Oracle((TaskFeatures(features.train, tuple(blocks)),), 0.1, CONFIG)
    _, errors = estimate(oracle, AffinityConfig(n_subsets=10))
    assert np.isnan(errors[2]).all() and np.isfinite(np.delete(np.delete(errors, 2, 0), 2, 1)).all()
    alone = Oracle((TaskFeatures(features.train[:1], features.validation[:1]),), 0.1, CONFIG)
    assert np.isnan(estimate(alone, AffinityConfig())[1]).all()


def test_scores_are_weighed_once_for_the_matrix_and_its_errors(tmp_path, monkeypatch):
    config = AffinityConfig(subset_size=2)
    design, oracle = sample_subsets(N_TASKS, config, seed=0), Oracle((make_features(),), 0.1, CONFIG)
    values = -oracle.score(design.subsets).nll
    weights = tuple(weigh_scores(design, values))
    np.testing.assert_array_equal(
        estimate_affinity_errors(oracle, design, values, config, weights),
        estimate_affinity_errors(oracle, design, values, config),
    )
    matrix = affinity_from_scores(design, values, weights=weights).matrix
    np.testing.assert_array_equal(matrix, affinity_from_scores(design, values).matrix)
    calls, recipe = [], copy_run(tmp_path)
    monkeypatch.setattr(affinities, "weigh_scores", lambda *a, **k: calls.append(a) or weigh_scores(*a, **k))
    monkeypatch.setattr(precision, "weigh_scores", lambda *a, **k: pytest.fail("weighed again"))
    pipeline.run(read_config(recipe, affinity={"n_subsets": 6}), until="affinity")
    assert len(calls) == 1
