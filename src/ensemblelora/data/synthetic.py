"""Planted tasks: families of tasks whose right grouping is known, for tests and self-checks.

A text is a handful of words about one of a few topics among words that mean nothing. A family is a rule that says
which topics are answered yes. Families come in opposed pairs (one says yes exactly where the other says no), and rules
of different pairs agree on half of the topics. Nothing in a text tells its family, so whoever learns two opposed
families at once can do no better than guess, while each family alone can be learned from single words.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from ensemblelora.data.task import SPLITS, Example, Task, TaskCard, TaskSet
from ensemblelora.errors import ConfigError
from ensemblelora.seeding import generator_for

__all__ = ["FILLERS", "MAX_FAMILIES", "TOPICS", "make_planted_tasks"]

TOPICS: tuple[tuple[str, ...], ...] = (
    ("fire", "sun", "warm", "summer", "desert"),
    ("ice", "snow", "cold", "winter", "frost"),
    ("river", "rain", "boat", "fish", "wave"),
    ("stone", "hill", "sand", "rock", "dust"),
)
"""Words that tell a topic."""

FILLERS = ("and", "the", "then", "here", "there", "again", "maybe", "also", "still", "often", "one", "some")
"""Words that tell nothing."""

_RULES = np.array([[1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])  # orthogonal, and each balanced over the topics
MAX_FAMILIES = 2 * len(_RULES)

_ANSWERS = {
    "verbalizer": ("no", "yes"),
    "classification": ("no", "yes"),
    "options": ("it is not so", "it is so"),
    "sequence": ("it is not so", "it is so"),
}


def make_planted_tasks(
    n_families: int = 2,
    tasks_per_family: int = 2,
    *,
    n_train: int = 64,
    n_validation: int = 32,
    n_test: int = 32,
    kind: Literal["verbalizer", "options", "sequence", "classification"] = "verbalizer",
    opposed: bool = True,
    label_noise: float = 0.0,
    n_words: int = 6,
    seed: int = 0,
) -> TaskSet:
    """Make families of tasks with known conflicts.

    Args:
        n_families: How many rules, at most ``MAX_FAMILIES``; family ``2k + 1`` opposes family ``2k``.
        tasks_per_family: Tasks that follow the same rule. Task ``f * tasks_per_family + t`` is ``family<f>_task<t>``.
        n_train: Examples to train on, per task; likewise the other two splits.
        n_validation: See ``n_train``.
        n_test: See ``n_train``.
        kind: How the tasks are scored; ``sequence`` makes tasks for generation.
        opposed: False lets every family follow the first rule, so that all tasks help each other.
        label_noise: Chance of a wrong label, in every split.
        n_words: Words of a text, two of them about its topic.
        seed: Root seed.

    Raises:
        ConfigError: If there are more families than rules.

    Example:
        >>> make_planted_tasks(2, 1, n_train=4).names
        ('family0_task0', 'family1_task0')
    """
    if not 1 <= n_families <= MAX_FAMILIES:
        raise ConfigError(f"n_families is {n_families}; expected 1 to {MAX_FAMILIES}")
    sizes = dict(zip(SPLITS, (n_train, n_validation, n_test), strict=True))
    tasks = []
    for family in range(n_families):
        rule = _RULES[family // 2] * (-1) ** family if opposed else _RULES[0]
        for t in range(tasks_per_family):
            name = f"family{family}_task{t}"
            generator = generator_for(seed, "planted", name)
            splits = {
                split: [
                    _make_example(f"{split}:{row}", row, rule, kind, label_noise, n_words, generator)
                    for row in range(size)
                ]
                for split, size in sizes.items()
            }
            tasks.append(Task(_make_card(name, kind), splits))
    return TaskSet(tuple(tasks))


def _make_example(
    name: str,
    row: int,
    rule: np.ndarray,
    kind: str,
    label_noise: float,
    n_words: int,
    generator: np.random.Generator,
) -> Example:
    topic = row % len(TOPICS)  # in turn: every split holds every topic, and as many yes as no
    words = [*generator.choice(TOPICS[topic], 2), *generator.choice(FILLERS, max(n_words - 2, 0))]
    generator.shuffle(words)
    label = int(rule[topic] > 0)
    if generator.random() < label_noise:
        label = 1 - label
    context = f"Words: {' '.join(words)}\nAnswer:"
    answers = _ANSWERS[kind] if kind == "classification" else tuple(f" {answer}" for answer in _ANSWERS[kind])
    if kind == "sequence":
        return Example(name, context, (answers[label],), 0, name)
    return Example(name, context, answers, label, name)


def _make_card(name: str, kind: str) -> TaskCard:
    is_choice = kind != "sequence"
    return TaskCard(
        task=name,
        dataset_path="planted",
        training_split="train",
        validation_split="validation",
        test_split="test",
        doc_to_text="text",
        doc_to_choice=_ANSWERS[kind] if is_choice else None,
        doc_to_target="label",
        output_type="multiple_choice" if is_choice else "generate_until",
        scoring=kind if kind in ("verbalizer", "options") else None,
        length_normalization="tokens" if kind == "options" else "none",
        head="sequence_classification" if kind == "classification" else "lm",
    )
