"""What planted tasks promise: each family can be learned, opposed ones not together."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ensemblelora.data.encoding import encode_split
from ensemblelora.data.synthetic import FILLERS, MAX_FAMILIES, TOPICS, make_planted_tasks
from ensemblelora.data.task import SPLITS, Example, TaskSet
from ensemblelora.errors import ConfigError
from tests.toys import load_tokenizer

WORDS = {word: i for i, word in enumerate([*(word for topic in TOPICS for word in topic), *FILLERS])}


def count_words(examples: list[Example]) -> np.ndarray:
    counts = np.zeros((len(examples), len(WORDS)))
    for row, example in zip(counts, examples, strict=True):
        for word, n in Counter(example.context.removeprefix("Words: ").removesuffix("\nAnswer:").split()).items():
            row[WORDS[word]] = n
    return counts


def fit_and_test(tasks: TaskSet, indices: list[int]) -> float:
    """Test accuracy of least squares on word counts, trained on these tasks together."""
    parts = {s: [e for i in indices for e in tasks.tasks[i].splits[s]] for s in ("train", "test")}
    signs = {s: np.array([2 * e.label - 1 for e in found]) for s, found in parts.items()}
    weights = np.linalg.lstsq(count_words(parts["train"]), signs["train"], rcond=None)[0]
    return float(np.mean(np.sign(count_words(parts["test"]) @ weights) == signs["test"]))


def test_each_family_is_learned_from_words_and_opposed_families_are_not() -> None:
    tasks = make_planted_tasks(2, 2, n_train=200, n_test=200)
    assert fit_and_test(tasks, [0, 1]) > 0.98
    assert fit_and_test(tasks, [2, 3]) > 0.98
    assert 0.35 < fit_and_test(tasks, [0, 2]) < 0.65
    agreeing = make_planted_tasks(2, 2, n_train=200, n_test=200, opposed=False)
    assert fit_and_test(agreeing, [0, 1, 2, 3]) > 0.98


def test_families_oppose_in_pairs_and_agree_by_half_otherwise() -> None:
    tasks = make_planted_tasks(MAX_FAMILIES, 1, n_train=40).tasks
    labels = np.array([[2 * e.label - 1 for e in task.splits["train"]] for task in tasks])  # topics come in turn
    agreement = labels @ labels.T / 40
    pairs = np.kron(np.eye(MAX_FAMILIES // 2), [[1, -1], [-1, 1]])
    assert (agreement == pairs).all()


def test_splits_are_balanced_and_named() -> None:
    tasks = make_planted_tasks(2, 3, n_train=8, n_validation=4, n_test=12)
    assert tasks.names == tuple(f"family{f}_task{t}" for f in (0, 1) for t in (0, 1, 2))
    for task in tasks.tasks:
        assert [len(task.splits[split]) for split in SPLITS] == [8, 4, 12]
        assert all(2 * sum(e.label for e in task.splits[split]) == len(task.splits[split]) for split in SPLITS)


def test_the_seed_decides_and_tasks_are_independent() -> None:
    assert make_planted_tasks(seed=3).fingerprint == make_planted_tasks(seed=3).fingerprint
    assert make_planted_tasks(seed=3).fingerprint != make_planted_tasks(seed=4).fingerprint
    assert make_planted_tasks(1, 1).tasks[0].fingerprint == make_planted_tasks(3, 2).tasks[0].fingerprint


@pytest.mark.parametrize("kind", ["verbalizer", "options", "sequence", "classification"])
def test_every_kind_is_encoded_as_such(kind: str) -> None:
    task = make_planted_tasks(1, 1, kind=kind).tasks[0]  # type: ignore[arg-type]
    assert encode_split(task, "train", load_tokenizer(), max_length=64).kind == kind


def test_noise_turns_labels_around() -> None:
    clean, noisy = (make_planted_tasks(1, 1, n_train=1000, label_noise=p).tasks[0].splits["train"] for p in (0.0, 0.2))
    rule = [clean[i].label for i in range(4)]
    assert all(e.label == rule[i % 4] for i, e in enumerate(clean))
    assert 0.15 < np.mean([e.label != rule[i % 4] for i, e in enumerate(noisy)]) < 0.25


def test_too_many_families() -> None:
    with pytest.raises(ConfigError, match="expected 1 to 6"):
        make_planted_tasks(MAX_FAMILIES + 1)
