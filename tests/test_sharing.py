"""Choices that share their context in one row score, and learn, as they do in rows of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ensemblelora.adapters import THETA0, activate
from ensemblelora.data.batching import collate, iterate_batches, plan_batches
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.scoring import cross_entropy, score_batch
from ensemblelora.sharing import can_share_context
from tests.tiny import DECODERS, disturb, make_adapted, make_network, make_split


def make_options(contexts: list[list[int]], choices: list[list[list[int]]]) -> EncodedSplit:
    """Questions spelled out: a context and its choices' tokens each."""
    rows = [context + answer for context, answers in zip(contexts, choices, strict=True) for answer in answers]
    counts = [len(answers) for answers in choices]
    starts = np.repeat([len(context) for context in contexts], counts)
    return EncodedSplit(
        task="t",
        split="train",
        kind="options",
        tokens=np.concatenate(rows).astype(np.int32),
        row_starts=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        answer_starts=starts.astype(np.int32),
        example_rows=np.cumsum([0, *counts], dtype=np.int64),
        labels=np.zeros(len(contexts), np.int64),
        n_choices=np.array(counts, np.int16),
        label_tokens=np.zeros(0, np.int32),
        divisors=np.ones(len(rows), np.float32),
        groups=np.arange(len(contexts)),
        ids=tuple(map(str, range(len(contexts)))),
        n_truncated=0,
    )


MIXED = make_options(
    [[5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 7, 8]],
    [[[20, 21], [22], [23, 24, 25]], [[30], [31]]],
)


def test_a_row_holds_the_context_once_and_the_choices_after_it() -> None:
    batch = collate([(MIXED, 0), (MIXED, 1)], 0, layout="shared")
    # An answer's last token is predicted and never read: the second choice of the first question adds nothing.
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 20, 23, 24], [3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0]]
    assert batch.segments is not None
    assert batch.segments.tolist()[0] == [0] * 8 + [1, 3, 3]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist()[0] == [*range(8), 8, 8, 9]
    assert batch.positions.tolist() == [[0, 7], [0, 8], [0, 7], [0, 7], [0, 9], [0, 10], [1, 5], [1, 5]]
    assert batch.targets.tolist() == [20, 21, 22, 23, 24, 25, 30, 31]
    assert batch.position_choice.tolist() == [0, 0, 1, 2, 2, 2, 3, 4]
    assert batch.choice_example.tolist() == [0, 0, 0, 1, 1]
    assert batch.choice_index.tolist() == [0, 1, 2, 0, 1]
    assert batch.row_example.tolist() == [0, 1]


def test_the_answer_layout_runs_the_right_choice_alone() -> None:
    split = replace(MIXED, labels=np.array([2, 1]))
    batch = collate([(split, 0), (split, 1)], 0, layout="answer")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 23, 24], [3, 4, 5, 6, 7, 8, 0, 0, 0, 0]]
    assert batch.choice_index.tolist() == [2, 1]
    assert batch.segments is None


@pytest.mark.parametrize("layout", ["rows", "shared", "answer"])
@pytest.mark.parametrize("kind", ["options", "verbalizer", "sequence"])
def test_what_is_measured_is_what_is_laid_out(kind: str, layout: str) -> None:
    split = make_split(kind, n=9)
    lengths, counts = split.measure(layout)  # type: ignore[arg-type]
    for e in range(split.n_examples):
        assert collate([(split, e)], 0, layout=layout).input_ids.shape == (counts[e], lengths[e])  # type: ignore[arg-type]
    plan = plan_batches(lengths, counts, 64)
    batches = list(iterate_batches(split, 64, 0, layout=layout))  # type: ignore[arg-type]
    assert [batch.examples.tolist() for batch in batches] == [part.tolist() for part in plan]


def test_contexts_cut_to_different_lengths_share_what_is_left_in_common() -> None:
    apart = make_options([[9, 9, 9, 9]], [[[20], [21]]])
    tokens = apart.tokens.copy()
    tokens[5:9] = [8, 9, 9, 9]  # the second row's context begins otherwise
    different = replace(apart, tokens=tokens)
    assert apart.shared_lengths.tolist() == [4]
    assert different.shared_lengths.tolist() == [0]
    assert not different.is_shared.any()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", DECODERS)
def test_scores_and_gradients_are_those_of_separate_rows(family: str, attention: str) -> None:
    adapted = make_adapted(family)
    disturb(adapted)
    adapted.base.model.set_attn_implementation(attention)
    assert can_share_context(adapted.base.model)
    parts = [(MIXED, 0), (make_split("verbalizer", n=3), 2), (MIXED, 1), (make_split("options", n=3), 1)]
    found = []
    for layout in ("rows", "shared"):
        batch = collate(parts, 0, layout=layout)  # type: ignore[arg-type]
        with activate(adapted, THETA0, trainable=True):
            z = score_batch(adapted.network, batch).z
            cross_entropy(z, batch).sum().backward()
        gradients = [p.grad.clone() for p in adapted.peft.parameters() if p.grad is not None]
        adapted.peft.zero_grad(set_to_none=True)
        found.append((z.detach(), gradients, batch.n_padded_tokens))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)
    assert found[1][2] < found[0][2]


def test_a_family_that_looks_back_a_few_tokens_only_is_left_alone() -> None:
    network = make_network("llama").eval()
    assert can_share_context(network)
    network.config.sliding_window = 4
    assert not can_share_context(network)


def test_a_family_that_ignores_the_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network("llama").eval()
    body = network.base_model
    forward = body.forward
    monkeypatch.setattr(body, "forward", lambda attention_mask=None, **inputs: forward(**inputs))
    assert not can_share_context(network)
