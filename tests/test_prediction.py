"""Predictions of several members: in the split's own order, whatever the batches were."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from ensemblelora import passes, prediction
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel, activate, add_adapter
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.passes import choose_max_tokens
from ensemblelora.prediction import member_nll, predict_members
from tests.test_scoring import score_slowly
from tests.tiny import count_tokens, disturb, make_adapted, make_split

MEMBERS = ("one", THETA0, "two")
SPLITS = {
    "verbalizer": lambda: make_split("verbalizer", n=9),
    "options": lambda: make_split("options", n=9, n_choices=4, ragged=True),
    "sequence": lambda: make_split("sequence", n=9),
}


def make_members(head: str = "lm", **options) -> AdaptedModel:
    adapted = make_adapted("llama", head=head, **options)
    for seed, name in enumerate(("one", "two")):
        add_adapter(adapted, name)
        disturb(adapted, name, seed=seed)
    return adapted


def answer_lengths(split: EncodedSplit) -> list[int]:
    return [int(n) for n in split.row_lengths - split.answer_starts]


@pytest.mark.parametrize("kind", SPLITS)
def test_every_member_scores_every_example_in_order(kind: str) -> None:
    adapted, split = make_members(), SPLITS[kind]()
    scores = predict_members(adapted, split, MEMBERS, max_tokens=40)
    for m, member in enumerate(MEMBERS):
        with activate(adapted, member):
            for e in range(split.n_examples):
                expected = score_slowly(adapted.network, split, e)  # type: ignore[arg-type]
                rows = scores.values[m, scores.row_example == e]
                if kind == "sequence":
                    assert rows.shape == (answer_lengths(split)[e], 1)
                    np.testing.assert_allclose(rows.mean(), expected[0], rtol=1e-4)
                else:
                    np.testing.assert_allclose(rows[0, : len(expected)], expected, rtol=1e-4, atol=1e-5)
                    assert np.isneginf(rows[0, len(expected) :]).all()
    assert not np.allclose(scores.values[0], scores.values[2])


@pytest.mark.parametrize("kind", SPLITS)
def test_batches_do_not_matter(kind: str) -> None:
    adapted, split = make_members(), SPLITS[kind]()
    small, large = (predict_members(adapted, split, MEMBERS, max_tokens=n) for n in (1, 10_000))
    np.testing.assert_allclose(small.values, large.values, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(small.row_example, large.row_example)


def test_a_head_wider_than_the_task_gives_the_tasks_own_classes() -> None:
    adapted = make_members("sequence_classification", n_labels=5)
    split = make_split("classification", n_choices=2)
    scores = predict_members(adapted, split, [THETA0], max_tokens=40)
    assert scores.values.shape == (1, 6, 2)
    expected = [score_slowly(adapted.network, split, e) for e in range(6)]  # type: ignore[arg-type]
    np.testing.assert_allclose(scores.values[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SPLITS)
def test_row_weights_make_a_mean_within_each_example(kind: str) -> None:
    split = SPLITS[kind]()
    scores = predict_members(make_members(), split, [THETA0], max_tokens=200)
    np.testing.assert_allclose(np.bincount(scores.row_example, scores.row_weights), np.ones(split.n_examples))


@pytest.mark.parametrize("kind", SPLITS)
def test_losses_are_those_of_a_softmax_or_of_the_mean_token(kind: str) -> None:
    adapted, split = make_members(), SPLITS[kind]()
    losses = member_nll(predict_members(adapted, split, MEMBERS, max_tokens=60), split.labels)
    assert losses.shape == (3, split.n_examples)
    with activate(adapted, "two"):
        for e in range(split.n_examples):
            scores = np.array(score_slowly(adapted.network, split, e))  # type: ignore[arg-type]
            expected = -scores[0] if kind == "sequence" else np.log(np.exp(scores).sum()) - scores[split.labels[e]]
            assert losses[2, e] == pytest.approx(expected, rel=1e-4)


def test_the_meter_is_told_of_every_members_pass() -> None:
    adapted, split = make_members(), SPLITS["options"]()
    meter = Meter("predict")
    predict_members(adapted, split, MEMBERS, max_tokens=60, meter=meter)
    assert meter.record.n_tokens == 3 * count_tokens(split, adapted.layout)
    assert meter.record.n_padded_tokens >= meter.record.n_tokens
    assert meter.record.flops > 0


def test_the_active_adapter_is_what_it_was() -> None:
    adapted = make_members()
    with activate(adapted, "two"):
        predict_members(adapted, SPLITS["verbalizer"](), ["one"], max_tokens=60)
        assert adapted.peft.active_adapter == "two"


def test_a_budget_too_large_for_the_accelerator_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, split = make_members(), SPLITS["options"]()
    expected = predict_members(adapted, split, MEMBERS, max_tokens=60).values
    tried: list[int] = []
    score_split = prediction._score_split

    def run_out(max_tokens: int, *rest: Any) -> np.ndarray:
        tried.append(max_tokens)
        if max_tokens > 100:
            raise torch.OutOfMemoryError
        return score_split(max_tokens, *rest)

    monkeypatch.setattr(prediction, "_score_split", run_out)
    found = predict_members(adapted, split, MEMBERS, max_tokens=480).values
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert tried == [480, 240, 120, 60]


@pytest.fixture
def _looks_anew() -> Iterator[None]:
    """Forget what was found of this machine's memory before, and what a test makes it seem."""
    passes._find_fitting.cache_clear()
    yield
    passes._find_fitting.cache_clear()


def pretend_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))


@pytest.mark.usefixtures("_looks_anew")
def test_the_budget_follows_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_members()
    assert choose_max_tokens(adapted, 77) == 77
    found = []
    for free in (10**5, 10**8, 10**12):
        passes._find_fitting.cache_clear()
        pretend_free(monkeypatch, free)
        found.append(choose_max_tokens(adapted, "auto"))
    assert found[0] == 512 < found[1] < found[2] == 4096


@pytest.mark.usefixtures("_looks_anew")
def test_memory_is_looked_at_once_so_that_all_passes_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_members()
    pretend_free(monkeypatch, 10**8)
    first = choose_max_tokens(adapted, "auto")
    pretend_free(monkeypatch, 10**5)
    assert choose_max_tokens(adapted, "auto") == first > 512
