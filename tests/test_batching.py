"""Batches and schedules against their definitions."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemblelora.config import TrainingConfig
from ensemblelora.data.batching import Batch, collate, iterate_batches, plan_batches, schedule_training
from ensemblelora.data.encoding import EncodedSplit, encode_split
from ensemblelora.data.synthetic import make_planted_tasks
from tests.toys import load_tokenizer

PAD = 1
SIZES = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 4)), max_size=60)  # length, rows


def encode_planted(kind: str, n: int = 10, **options: int) -> EncodedSplit:
    task = make_planted_tasks(1, 1, n_train=n, kind=kind, **options).tasks[0]  # type: ignore[arg-type]
    return encode_split(task, "train", load_tokenizer(), max_length=64)


@pytest.fixture(scope="module")
def splits() -> dict[str, EncodedSplit]:
    kinds = ("verbalizer", "options", "sequence", "classification")
    return {kind: encode_planted(kind, n_words=4 + i) for i, kind in enumerate(kinds)}


@given(SIZES, st.integers(1, 300), st.none() | st.integers(1, 9))
def test_batches_hold_every_example_once_within_the_budget(
    sizes: list[tuple[int, int]], max_tokens: int, max_examples: int | None
) -> None:
    lengths = np.array([length for length, _ in sizes], np.int64)
    rows = np.array([n for _, n in sizes], np.int64)
    batches = plan_batches(lengths, rows, max_tokens, max_examples=max_examples)
    assert sorted(int(e) for batch in batches for e in batch) == list(range(len(sizes)))
    for batch in batches:
        assert max_examples is None or len(batch) <= max_examples
        assert len(batch) == 1 or lengths[batch].max() * rows[batch].sum() <= max_tokens
    order = [int(lengths[e]) for batch in batches for e in batch]
    assert order == sorted(order, reverse=True)


@given(SIZES, st.integers(1, 300))
def test_no_batch_ends_before_it_must(sizes: list[tuple[int, int]], max_tokens: int) -> None:
    lengths = np.array([length for length, _ in sizes], np.int64)
    rows = np.array([n for _, n in sizes], np.int64)
    batches = plan_batches(lengths, rows, max_tokens)
    for batch, following in pairwise(batches):
        assert lengths[batch].max() * (rows[batch].sum() + rows[following[0]]) > max_tokens


def read_back(batch: Batch) -> list[list[int]]:
    return [ids[mask.astype(bool)].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def test_collate_against_rows_written_out(splits: dict[str, EncodedSplit]) -> None:
    parts = [(splits[kind], e) for e in (3, 0, 7) for kind in ("options", "verbalizer", "sequence")]
    batch = collate(parts, PAD)
    inputs, scored, examples, choices, divisors = [], [], [], [], []
    for i, (split, e) in enumerate(parts):
        for choice, row in enumerate(range(split.example_rows[e], split.example_rows[e + 1])):
            tokens = split.tokens[split.row_starts[row] : split.row_starts[row + 1]].tolist()
            start = int(split.answer_starts[row])
            inputs.append(tokens if start == len(tokens) else tokens[:-1])
            if start == len(tokens):
                scored.append((len(inputs) - 1, len(tokens) - 1, -1))
            scored += [(len(inputs) - 1, t - 1, tokens[t]) for t in range(start, len(tokens))]
            examples.append(i)
            choices.append(choice)
            divisors.append(split.divisors[row])
    assert read_back(batch) == inputs
    assert [(*p, t) for p, t in zip(batch.positions.tolist(), batch.targets.tolist(), strict=True)] == scored
    assert batch.position_choice.tolist() == [row for row, _, _ in scored]
    assert batch.row_example.tolist() == examples
    assert batch.choice_example.tolist() == examples
    assert batch.choice_index.tolist() == choices
    assert batch.divisors.tolist() == divisors
    assert batch.labels.tolist() == [int(split.labels[e]) for split, e in parts]
    assert batch.n_choices.tolist() == [int(split.n_choices[e]) for split, e in parts]
    assert batch.examples.tolist() == [e for _, e in parts]
    assert batch.kinds == tuple(split.kind for split, _ in parts)
    assert (batch.input_ids[batch.attention_mask == 0] == PAD).all()


def test_label_tokens_are_padded(splits: dict[str, EncodedSplit]) -> None:
    batch = collate([(splits["options"], 0), (splits["verbalizer"], 0)], PAD)
    assert batch.label_tokens.tolist() == [[-1, -1], splits["verbalizer"].label_tokens.tolist()]
    assert collate([(splits["options"], 0)], PAD).label_tokens.shape == (1, 0)


def test_a_classifier_scores_no_position(splits: dict[str, EncodedSplit]) -> None:
    batch = collate([(splits["classification"], 0)], PAD)
    assert batch.positions.shape == (0, 2)
    assert batch.targets.shape == batch.position_choice.shape == (0,)
    assert batch.n_real_tokens == splits["classification"].row_lengths[0]


@pytest.mark.parametrize("kind", ["verbalizer", "options", "sequence", "classification"])
def test_iterating_meets_each_example_once(splits: dict[str, EncodedSplit], kind: str) -> None:
    batches = list(iterate_batches(splits[kind], 40, PAD))
    assert len(batches) > 1
    assert sorted(e for batch in batches for e in batch.examples) == list(range(10))
    assert sum(batch.n_real_tokens for batch in batches) == splits[kind].input_lengths.sum()
    for batch in batches:
        assert batch.n_padded_tokens == batch.input_ids.size <= max(40, splits[kind].input_lengths.max() * 2)
        alone = [ids for e in batch.examples for ids in read_back(collate([(splits[kind], int(e))], PAD))]
        assert read_back(batch) == alone


def make_config(**keys: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"num_train_epochs": 2, "max_tokens_per_batch": 64} | keys)


def schedule(encoded: list[EncodedSplit], seed: int = 0, **keys: object) -> list[list[tuple[int, int]]]:
    return schedule_training(encoded, make_config(**keys), seed=seed)


@pytest.fixture(scope="module")
def uneven() -> list[EncodedSplit]:
    return [encode_planted("verbalizer", 40, n_words=3), encode_planted("options", 8), encode_planted("sequence", 16)]


def test_proportional_shows_each_example_once_an_epoch(uneven: list[EncodedSplit]) -> None:
    steps = schedule(uneven, num_train_epochs=1)
    shown = sorted(pair for step in steps for pair in step)
    assert shown == [(i, e) for i, split in enumerate(uneven) for e in range(split.n_examples)]
    twice = Counter(pair for step in schedule(uneven) for pair in step)
    assert set(twice.values()) == {2}


@pytest.mark.parametrize(("sampling", "shares"), [("sqrt", np.sqrt([40, 8, 16])), ("uniform", np.ones(3))])
def test_other_samplings_share_an_epoch_out(uneven: list[EncodedSplit], sampling: str, shares: np.ndarray) -> None:
    steps = schedule(uneven, sampling=sampling, num_train_epochs=3)
    counts = Counter(pair for step in steps for pair in step)
    totals = np.array([sum(n for (i, _), n in counts.items() if i == task) for task in range(3)])
    assert totals.sum() == 3 * 64
    assert np.abs(totals - 3 * 64 * shares / shares.sum()).max() <= 3
    for task, split in enumerate(uneven):  # none a second time before all were shown
        times = [counts[task, e] for e in range(split.n_examples)]
        assert max(times) - min(times) <= 1


def test_steps_keep_both_limits(uneven: list[EncodedSplit]) -> None:
    for step in schedule(uneven, max_examples_per_batch=5):
        assert 1 <= len(step) <= 5
        batch = collate([(uneven[i], e) for i, e in step], PAD)
        assert batch.n_padded_tokens <= 64 or len(step) == 1


def test_the_schedule_depends_on_the_seed_alone(uneven: list[EncodedSplit]) -> None:
    assert schedule(uneven) == schedule(uneven)
    assert schedule(uneven) != schedule(uneven, seed=1)
    first = len(schedule(uneven, num_train_epochs=1))
    assert schedule(uneven)[:first] == schedule(uneven, num_train_epochs=1)
    assert sorted(map(sorted, schedule(uneven)[first:])) != sorted(map(sorted, schedule(uneven)[:first]))


def test_steps_mix_tasks_and_pad_little() -> None:
    encoded = [encode_planted("verbalizer", 100, n_words=n) for n in (4, 4, 6, 30)]
    steps = schedule(encoded, max_tokens_per_batch=10_000, max_examples_per_batch=8)
    assert np.mean([len({i for i, _ in step}) for step in steps]) > 1.5
    batches = [collate([(encoded[i], e) for i, e in step], PAD) for step in steps]
    real, padded = (sum(getattr(b, name) for b in batches) for name in ("n_real_tokens", "n_padded_tokens"))
    assert real / padded > 0.85  # without sorting by length: 0.45


def test_an_empty_schedule_is_empty() -> None:
    assert schedule([]) == []
