"""Free-text answers against the obvious way: no cache, no padding, a full forward pass for every token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import activate, add_adapter, attach
from ensemblelora.config import AdapterConfig
from ensemblelora.data.encoding import encode_split
from ensemblelora.data.synthetic import make_planted_tasks
from ensemblelora.generation import decode_answers, generate, generate_answers, list_contexts, matches_exactly
from ensemblelora.models import prepare_base
from tests.tiny import DECODERS, disturb, make_adapted, make_network, make_split
from tests.toys import load_tokenizer

NAMES = ("one", "two")


def make_members(family: str = "llama"):
    adapted = make_adapted(family)
    for seed, name in enumerate(NAMES, start=1):
        add_adapter(adapted, name)
        disturb(adapted, name, seed=seed, scale=5.0)
    return adapted


def generate_slowly(adapted, context: np.ndarray, members, weights, max_new_tokens: int) -> list[int]:
    """One context, greedily, a full forward pass a token and member."""
    tokens, answer = [int(token) for token in context], []
    for _ in range(max_new_tokens):
        mixture = np.zeros(adapted.base.model.config.vocab_size)
        for member, weight in zip(members, weights, strict=True):
            with activate(adapted, member), torch.no_grad():
                logits = adapted.network(input_ids=torch.tensor([tokens])).logits[0, -1].double()
            mixture += weight * torch.softmax(logits, -1).numpy()
        token = int(mixture.argmax())
        if token == adapted.base.tokenizer.eos_token_id:
            return answer
        answer.append(token)
        tokens.append(token)
    return answer


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(("members", "weights"), [(("one",), (1.0,)), (NAMES, (0.4, 0.6))])
def test_cached_and_padded_equals_the_slow_loop(family, members, weights):
    adapted = make_members(family)
    contexts = [np.random.default_rng(n).integers(1, 90, n) for n in (9, 1, 4, 6)]
    found = generate(adapted, contexts, members, weights, max_new_tokens=5, max_tokens=40)
    assert found == [generate_slowly(adapted, context, members, weights, 5) for context in contexts]
    assert len({tuple(answer) for answer in found}) > 1, "every answer is the same: the test is empty"


def test_the_mixture_is_neither_member_alone():
    adapted = make_members()
    contexts = [np.random.default_rng(n).integers(1, 90, 5) for n in range(12)]
    answers = [
        generate(adapted, contexts, members, [1 / len(members)] * len(members), max_new_tokens=4, max_tokens=512)
        for members in (NAMES, ("one",), ("two",))
    ]
    assert answers[0] != answers[1] != answers[2] != answers[0]


@pytest.mark.parametrize("max_tokens", [1, 30, 1000])
def test_batches_do_not_change_answers(max_tokens):
    adapted = make_members()
    contexts = [np.random.default_rng(n).integers(1, 90, 2 + 3 * n) for n in range(5)]
    together = generate(adapted, contexts, NAMES, (0.5, 0.5), max_new_tokens=4, max_tokens=max_tokens)
    alone = [generate(adapted, [c], NAMES, (0.5, 0.5), max_new_tokens=4, max_tokens=9)[0] for c in contexts]
    assert together == alone


def test_an_answer_stops_at_the_end_token_and_the_others_go_on():
    adapted = make_members()
    contexts = [np.random.default_rng(n).integers(1, 90, 6) for n in range(6)]

    def generate_until(end: int) -> list[list[int]]:
        base = dataclasses.replace(adapted.base, tokenizer=_Ending(end))
        ending = dataclasses.replace(adapted, base=base)
        return generate(ending, contexts, ("one",), (1.0,), max_new_tokens=6, max_tokens=512)

    free = generate_until(-1)
    end = free[0][2]  # what the first answer says third shall end answers
    cut = generate_until(end)
    assert cut == [answer[: answer.index(end)] if end in answer else answer for answer in free]
    assert len(cut[0]) < len(free[0])


class _Ending:
    """A tokenizer of which only the end token matters."""

    pad_token_id = 0

    def __init__(self, end: int) -> None:
        self.eos_token_id = end


def test_contexts_end_where_answers_start():
    split = make_split("sequence")
    contexts = list_contexts(split)
    for context, start, answer in zip(contexts, split.row_starts[:-1], split.answer_starts, strict=True):
        np.testing.assert_array_equal(context, split.tokens[start : start + answer])


def test_an_exact_match_is_the_reference_text_and_nothing_more():
    tokenizer = load_tokenizer()
    network = make_network("llama", vocab_size=len(tokenizer))
    adapted = attach(prepare_base("tiny", network, tokenizer), AdapterConfig(r=2), seed=0)
    task = make_planted_tasks(1, 1, kind="sequence", n_test=3).tasks[0]
    split = encode_split(task, "test", tokenizer, max_length=64)
    texts = [example.choices[0] for example in task.splits["test"]]
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert decode_answers(adapted, answers) == [text.strip() for text in texts]
    assert matches_exactly(adapted, split, answers).tolist() == [True] * 3
    changed = [answers[0][:-1], [*answers[1], *answers[1]], []]
    assert matches_exactly(adapted, split, changed).tolist() == [False] * 3
    made = generate_answers(adapted, split, ["theta0"], [1.0], max_tokens=256)
    longest = max(len(answer) for answer in answers) + 1  # and the end token
    assert all(len(answer) <= longest for answer in made)


def test_the_ledger_counts_what_generation_computes():
    adapted, meter = make_members(), Meter("generate")
    contexts = [np.random.default_rng(n).integers(1, 90, n) for n in (7, 3)]
    counter = FlopCounterMode(display=False)
    with counter:
        answers = generate(adapted, contexts, NAMES, (0.5, 0.5), max_new_tokens=4, max_tokens=512, meter=meter)
    assert [len(answer) for answer in answers] == [4, 4], "an answer ended early: choose other contexts"
    assert meter.record.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert meter.record.n_padded_tokens == 2 * (2 * 7 + 2 * 3)
    assert meter.record.n_tokens == 2 * (7 + 3 + 2 * 3)
