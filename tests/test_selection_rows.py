"""Clusters of rows, rows one by one, and what sources are made of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.metrics import adjusted_rand_score, roc_auc_score

from ensemblelora.blocks import FeatureBlock
from ensemblelora.config import EstimationConfig
from ensemblelora.errors import UsageError
from ensemblelora.estimation import Oracle, TaskFeatures, compute_clustered_se, compute_penalties, predict_outcomes
from ensemblelora.selection.clusters import cluster_rows
from ensemblelora.selection.influence import measure_influence
from ensemblelora.selection.prospect import Prospect
from ensemblelora.selection.search import SearchSettings
from ensemblelora.selection.similarity import compare_gradients, take_most_alike
from ensemblelora.selection.sources import Source, cut_blocks, cut_splits, find_target, list_sources
from ensemblelora.selection.strategies import STRATEGIES, select
from ensemblelora.selection.values import VALUATIONS
from tests.selection_toys import RIDGE, STEPS, make_budget, make_prospect, plant_block, plant_features
from tests.tiny import make_split

TRUTH = np.array([1.0, -0.5, 0.3, 0.8, -1.0, 0.2])


def turn(block: FeatureBlock, rows: np.ndarray) -> FeatureBlock:
    """Make the labels of some rows wrong."""
    return replace(block, labels=np.where(rows, 1 - block.labels, block.labels))


# Clusters


def plant_clusters(n_clusters: int, n_each: int = 24) -> tuple[FeatureBlock, np.ndarray]:
    """Rows about some directions, some of the rows long and some short."""
    rng = np.random.default_rng(1)
    centres = np.linalg.qr(rng.normal(size=(8, 8)))[0][:n_clusters]
    labels = rng.permutation(np.repeat(np.arange(n_clusters), n_each))
    rows = centres[labels] + 0.15 * rng.normal(size=(len(labels), 8))
    rows *= np.exp(rng.normal(size=(len(labels), 1)))
    block = plant_block("source", np.ones(8), n=len(labels))
    return replace(block, features=rows[:, None].astype(np.float32)), labels


def test_planted_clusters_are_found_whatever_the_length_of_rows():
    block, labels = plant_clusters(5)
    found = cluster_rows(block, 5, seed=0)
    assert adjusted_rand_score(labels, found) == 1.0
    scaled = replace(block, features=block.features * np.float32(7))
    np.testing.assert_array_equal(cluster_rows(scaled, 5, seed=0), found)
    np.testing.assert_array_equal(cluster_rows(block, 5, seed=0), found)


def test_clusters_are_numbered_by_size_and_first_row():
    block, _ = plant_clusters(3)
    some = block.take(np.arange(40))
    found = cluster_rows(some, 3, seed=0)
    sizes = np.bincount(found)
    first = [int(np.argmax(found == k)) for k in range(3)]
    assert [(-size, place) for size, place in zip(sizes, first, strict=True)] == sorted(
        (-size, place) for size, place in zip(sizes, first, strict=True)
    )


def test_what_a_row_is_labelled_moves_it_to_no_other_cluster():
    block, _ = plant_clusters(4)
    other = replace(block, labels=1 - block.labels)
    np.testing.assert_array_equal(cluster_rows(block, 4, seed=0), cluster_rows(other, 4, seed=0))


def test_rows_of_few_directions_give_few_clusters_and_empty_ones_are_no_trouble():
    block = plant_block("source", TRUTH, n=6)
    same = replace(block, features=np.ones_like(block.features))
    assert set(cluster_rows(same, 3, seed=0)) == {0}
    nothing = replace(block, features=np.zeros_like(block.features))
    assert set(cluster_rows(nothing, 2, seed=0)) == {0}


@pytest.mark.parametrize("number", [0, 7])
def test_a_number_of_clusters_that_can_not_be_is_refused(number):
    with pytest.raises(UsageError, match=f"--by-cluster {number}: task 'source' has 6 training rows; give 1 to 6"):
        cluster_rows(plant_block("source", TRUTH, n=6), number, seed=0)


# Sources


def test_sources_are_all_other_datasets_or_their_clusters():
    names = ("a", "b", "c")
    assert [s.name for s in list_sources(names, 1, includes_target=True)] == ["a", "c"]
    assert [s.name for s in list_sources(names, 1, includes_target=False)] == ["a", "b", "c"]
    clusters = {0: np.array([0, 1, 0, 1]), 2: np.array([0, 0])}
    found = list_sources(names, 1, includes_target=True, clusters=clusters)
    assert [s.name for s in found] == ["a/0", "a/1", "c/0"]
    assert found[1].rows.tolist() == [1, 3]
    assert find_target(names, "b") == 1
    with pytest.raises(UsageError, match="--target 'd': expected one of the tasks a, b, c"):
        find_target(names, "d")
    with pytest.raises(UsageError, match="target 'a': no sources, the config has no other task; add tasks"):
        list_sources(("a",), 0, includes_target=True)
    assert [s.name for s in list_sources(("a",), 0, includes_target=False, clusters={0: np.array([0, 1])})] == [
        "a/0", "a/1",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["verbalizer", "options", "sequence"])
def test_a_clusters_rows_are_the_same_in_features_and_in_training(kind):
    splits = [make_split(kind, n=9, task=name, seed=seed) for seed, name in enumerate("ab")]
    blocks = [replace(plant_block(name, TRUTH, n=9), ids=split.ids) for name, split in zip("ab", splits, strict=True)]
    sources = (Source("b/0", 1, np.array([1, 4, 8])), Source("b/1", 1, np.array([0, 2, 3, 5, 6, 7])))
    own_splits, own_blocks = cut_splits(splits, 0, sources), cut_blocks(blocks, 0, sources)
    assert [s.task for s in own_splits] == [b.task for b in own_blocks] == ["a", "b/0", "b/1"]
    assert [s.ids for s in own_splits] == [b.ids for b in own_blocks]
    assert own_splits[0] is splits[0] and own_blocks[0] is blocks[0]
    part = own_splits[1]
    for place, row in enumerate([1, 4, 8]):
        own = range(*part.example_rows[place : place + 2])
        whole = range(*splits[1].example_rows[row : row + 2])
        for a, b in zip(own, whole, strict=True):
            np.testing.assert_array_equal(
                part.tokens[part.row_starts[a] : part.row_starts[a + 1]],
                splits[1].tokens[splits[1].row_starts[b] : splits[1].row_starts[b + 1]],
            )
    held = cut_splits([replace(s, split="validation") for s in splits], 0, sources)
    assert held[1].n_examples == 9 and held[1].task == "b/0"


# Noisy parts of one dataset


@pytest.mark.parametrize("config", [RIDGE, STEPS], ids=["ridge", "steps"])
def test_noisy_clusters_of_one_dataset_are_found_and_dropped(config):
    """Clusters of planted features, every label of half of them wrong: values part them, and none is chosen."""
    rng = np.random.default_rng(0)
    n_clusters, n_each, d = 8, 30, 12
    centres = 3 * np.linalg.qr(rng.normal(size=(d, d)))[0][:n_clusters]
    truth = rng.normal(size=d)
    labels_of = np.repeat(np.arange(n_clusters), n_each)

    def draw(split: str, codes: np.ndarray) -> FeatureBlock:
        rows = 0.3 * centres[codes] * rng.choice([-1, 1], size=(len(codes), 1)) + rng.normal(size=(len(codes), d))
        block = plant_block("one", truth, n=len(codes), split=split)
        labels = (rows @ truth > 0).astype(np.int64)
        return replace(block, features=rows[:, None].astype(np.float32), labels=labels)

    whole, held = draw("train", labels_of), draw("validation", np.arange(n_clusters).repeat(60))
    is_noisy = np.arange(n_clusters) % 2 == 1
    whole = turn(whole, is_noisy[labels_of])
    sources = list_sources(("one",), 0, includes_target=False, clusters={0: labels_of})
    train = cut_blocks([whole], 0, sources)
    validation = cut_blocks([held], 0, sources)
    budget = make_budget(n_clusters + 1, n_coordinates=float(d), learning_rate=0.02) if config is STEPS else None
    prospect = Prospect(Oracle((TaskFeatures(train, validation),), 1.0, config, (), budget, (0,)), False)
    for strategy in STRATEGIES:
        found = select(prospect, strategy, SearchSettings(n_permutations=32))
        assert found.sources and not is_noisy[list(found.sources)].any(), strategy
        if strategy in VALUATIONS:
            assert roc_auc_score(~is_noisy, found.values) == 1.0, strategy


# Rows one by one


def refit(prospect: Prospect, task: int, row: int, weight: float) -> np.ndarray:
    """The target's loss on every validation row at the objective's minimum, where one row's loss has another weight."""
    features = prospect.oracle.replicates[0]
    tasks = prospect.subset_of(prospect.everything)
    n_rows = sum(features.train[i].n_examples for i in tasks)
    ridge = compute_penalties([features.train[i] for i in tasks], [tuple(range(len(tasks)))], 1.0)[0]
    rows = np.concatenate([features.train[i].features[:, 0].astype(float) for i in tasks])
    signs = 1 - 2.0 * np.concatenate([features.train[i].labels for i in tasks])
    weights = np.ones(n_rows)
    weights[sum(features.train[i].n_examples for i in tasks[: tasks.index(task)]) + row] = weight

    def objective(w):
        margins = signs * (rows @ w)
        slopes = weights * signs / (1 + np.exp(-margins)) / n_rows
        return weights @ np.logaddexp(0, margins) / n_rows + 0.5 * ridge * w @ w, slopes @ rows + ridge * w

    w = minimize(objective, np.zeros(rows.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-12}).x
    return predict_outcomes(features.validation[0], w[None]).nll[0]


def test_a_rows_influence_is_what_refitting_with_less_of_it_does():
    prospect = make_prospect((0.2, 0.6), n=24)
    found = measure_influence(prospect)
    assert [one.source for one in found] == ["target", "source0", "source1"]
    step, places = 0.01, [(task, row) for task, n in ((0, 8), (1, 24), (2, 24)) for row in range(0, n, 5)]
    slow = [(refit(prospect, *place, 1 - step) - refit(prospect, *place, 1 + step)) / (2 * step) for place in places]
    fast = [found[task].values[row] for task, row in places]
    np.testing.assert_allclose(fast, [s.mean() for s in slow], rtol=1e-3, atol=1e-7)
    errors = [compute_clustered_se(s, prospect.validation_groups) for s in slow]
    np.testing.assert_allclose([found[task].errors[row] for task, row in places], errors, rtol=1e-3, atol=1e-7)
    without = [(refit(prospect, *place, 0.0) - refit(prospect, *place, 1.0)).mean() for place in places]
    assert np.corrcoef(fast, without)[0, 1] > 0.99, "leaving a row out is nearly linear in it"


def test_wrong_labels_harm_and_right_ones_help():
    features = plant_features((0.0, 0.0), n=120)
    is_wrong = np.arange(120) % 4 == 0
    train = (*features.train[:2], turn(features.train[2], is_wrong))
    strong = EstimationConfig(method="ridge", l2_penalty=30.0)
    prospect = Prospect(Oracle((replace(features, train=train),), 30.0, strong, judges=(0,)))
    clean, mixed = measure_influence(prospect)[1:]
    assert roc_auc_score(~is_wrong, mixed.values) > 0.8, "rows near the border say little either way"
    assert clean.share_harmful < mixed.share_harmful < 0.5
    assert mixed.values[is_wrong].mean() < 0 < mixed.values[~is_wrong].mean()


def test_rows_are_valued_alike_in_pieces_and_over_projections(monkeypatch):
    prospect = make_prospect((0.2, 0.6), n=24)
    whole = measure_influence(prospect)
    monkeypatch.setattr("ensemblelora.selection.influence._NUMBERS_AT_ONCE", 64)
    for one, other in zip(whole, measure_influence(prospect), strict=True):
        np.testing.assert_allclose(one.values, other.values, atol=1e-12)
    (features,) = prospect.oracle.replicates
    twice = Prospect(Oracle((features, features), 1.0, RIDGE, judges=(0,)))
    np.testing.assert_allclose(measure_influence(twice)[1].values, whole[1].values, atol=1e-12)


# Likeness


def test_likeness_is_the_mean_cosine_over_all_pairs_of_rows():
    features = plant_features((0.0, 1.0, 0.5), n=12)
    target = features.validation[0]

    def gradient(block, e):
        residual = 1 / (1 + np.exp(-block.outputs[e, 0].astype(float))) - block.labels[e]
        return residual * block.features[e, 0].astype(float)

    slow = []
    for source in features.train[1:]:
        cosines = [
            a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            for a in (gradient(source, e) for e in range(source.n_examples))
            for b in (gradient(target, e) for e in range(target.n_examples))
        ]
        slow.append(np.mean(cosines))
    found = compare_gradients(features.train[1:], target)
    np.testing.assert_allclose(found, slow, atol=1e-6)
    assert found[0] > found[2] > found[1] and take_most_alike(found, 2) == (0, 2)


def test_a_source_without_gradients_is_like_nothing():
    features = plant_features((0.0,), n=12)
    silent = replace(features.train[1], features=np.zeros_like(features.train[1].features))
    assert compare_gradients([silent], features.validation[0])[0] == 0
