"""Token ids against lm-evaluation-harness's rule, written out one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ensemblelora.data.encoding import EncodedSplit, choose_kind, encode_split
from ensemblelora.data.synthetic import make_planted_tasks
from ensemblelora.data.task import Example
from ensemblelora.errors import DataError
from tests.toys import load_tokenizer, task_of

WORDS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "a", "b", "c", "yes", "no", "so"]


def encode_pair_slowly(context: str, continuation: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Any:
    """The rule for one context and continuation: (kept context tokens, answer tokens)."""
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole = tokenizer.encode(context + continuation, add_special_tokens=False)
    n_context = len(tokenizer.encode(context, add_special_tokens=False))
    start, answer = whole[:n_context], whole[n_context:]
    if not start:
        start = [tokenizer.eos_token_id]
    return (start + answer)[-(max_length + 1) :], answer  # the harness keeps one more, then drops the last input


def rows_of(encoded: EncodedSplit) -> list[tuple[list[int], int]]:
    spans = zip(encoded.row_starts[:-1], encoded.row_starts[1:], encoded.answer_starts, strict=True)
    return [(encoded.tokens[first:last].tolist(), int(answer)) for first, last, answer in spans]


def encode(example: Example | list[Example], max_length: int = 64, **keys: Any) -> EncodedSplit:
    examples = example if isinstance(example, list) else [example]
    return encode_split(task_of(examples, **keys), "train", load_tokenizer(), max_length=max_length)


TEXT = st.text(alphabet=st.sampled_from("ab Ayes?.\n ü"), max_size=24)


@given(TEXT, st.lists(TEXT, min_size=2, max_size=3), st.integers(6, 40))
def test_options_follow_the_rule(context: str, ends: list[str], max_length: int) -> None:
    choices = tuple(" " + end + "x" for end in ends)
    try:
        encoded = encode(Example("train:0", context, choices, 0, "g"), max_length, scoring="options")
    except DataError as error:
        too_long = max(len(encode_pair_slowly(context, c, load_tokenizer(), 999)[1]) for c in choices) > max_length
        assert too_long or "change the last tokens" in str(error)
        return
    assert encoded.n_rows == len(choices)
    for (tokens, start), choice in zip(rows_of(encoded), choices, strict=True):
        expected, answer = encode_pair_slowly(context, choice, load_tokenizer(), max_length)
        assert tokens == expected
        assert tokens[start:] == answer


@given(st.lists(TEXT, min_size=1, max_size=5), st.integers(8, 40))
def test_a_verbalizer_is_the_context_and_each_label_one_token(contexts: list[str], max_length: int) -> None:
    examples = [Example(f"train:{i}", f"{c}\nAnswer:", (" no", " yes"), i % 2, "g") for i, c in enumerate(contexts)]
    encoded = encode(examples, max_length, scoring="verbalizer")
    assert encoded.kind == "verbalizer"
    assert encoded.n_rows == encoded.n_examples == len(contexts)
    for (tokens, start), example in zip(rows_of(encoded), examples, strict=True):
        assert start == len(tokens) <= max_length
        for choice, label in zip(example.choices, encoded.label_tokens, strict=True):
            expected, answer = encode_pair_slowly(example.context, choice, load_tokenizer(), 999)
            assert answer == [label]
            assert tokens == expected[:-1][-max_length:]


def test_one_example_at_a_time_gives_the_same_rows() -> None:
    for kind in ("verbalizer", "options", "sequence"):
        task = make_planted_tasks(1, 1, n_train=12, kind=kind).tasks[0]
        together = encode_split(task, "train", load_tokenizer(), max_length=16)
        alone = [encode(e, 16, **task.card.model_dump(exclude={"task"})) for e in task.splits["train"]]
        assert rows_of(together) == [row for split in alone for row in rows_of(split)]
        assert together.example_lengths.tolist() == [int(split.example_lengths[0]) for split in alone]


def test_trailing_space_of_the_context_belongs_to_the_answer() -> None:
    choices = ("no", "yes")
    spaced = encode(Example("train:0", "a question \n", choices, 0, "g"), scoring="options")
    tokenizer = load_tokenizer()
    for (tokens, start), choice in zip(rows_of(spaced), choices, strict=True):
        assert tokenizer.decode(tokens[:start]) == "a question"
        assert tokenizer.decode(tokens[start:]) == f" \n{choice}"


@pytest.mark.parametrize("context", ["", "  "])
def test_an_empty_context_starts_from_the_end_of_text_token(context: str) -> None:
    encoded = encode(Example("train:0", context, (" no", " yes"), 0, "g"))
    assert {tokens[0] for tokens, _ in rows_of(encoded)} == {load_tokenizer().eos_token_id}
    assert all(1 <= start <= len(tokens) for tokens, start in rows_of(encoded))


def test_lengths_of_inputs_leave_out_the_answers_last_token() -> None:
    encoded = encode(Example("train:0", "a", (" it is so", " it is"), 0, "g"), scoring="options")
    assert encoded.row_lengths.tolist() == [4, 3]
    assert encoded.input_lengths.tolist() == [3, 2]
    assert encoded.example_lengths.tolist() == [3]
    labels = encode(Example("train:0", "a", (" no", " yes"), 0, "g"))
    assert labels.input_lengths.tolist() == labels.row_lengths.tolist() == [1]


def test_truncation_takes_the_context_from_the_left_and_is_counted() -> None:
    context = "one two three " * 9 + "the end"
    examples = [
        Example("train:0", context, (" it is so", " so"), 0, "g"),
        Example("train:1", "a", (" it", " so"), 0, "h"),
    ]
    encoded = encode(examples, 8, scoring="options")
    assert encoded.n_truncated == 1
    assert encode(examples, encoded.fitting_length, scoring="options").n_truncated == 0
    assert encode(examples, encoded.fitting_length - 1, scoring="options").n_truncated == 1
    assert encoded.input_lengths.tolist()[:2] == [8, 8]
    decoded = [load_tokenizer().decode(tokens[:start]) for tokens, start in rows_of(encoded)]
    assert all(context.endswith(kept) for kept in decoded[:2])
    assert [tokens[start:] for tokens, start in rows_of(encoded)] == [
        tokens[start:] for tokens, start in rows_of(encode(examples, 64, scoring="options"))
    ]


def test_an_answer_that_does_not_fit_is_refused() -> None:
    long = Example("train:7", "a", (" so" * 9, " it"), 0, "g")
    assert encode(long, 9, scoring="options").input_lengths[0] == 9
    with pytest.raises(DataError, match=r"train row train:7: the answer has 9 tokens, .*max_length 8 .*and 1 more"):
        encode([long, long], 8, scoring="options")


@pytest.mark.parametrize(("rule", "expected"), [("none", [1, 1]), ("tokens", [3, 1]), ("bytes", [11, 3])])
def test_divisors(rule: str, expected: list[int]) -> None:
    example = Example("train:0", "a", (" it is ü so", " yes"), 0, "g")
    encoded = encode(example, scoring="options", length_normalization=rule)
    if rule == "tokens":
        expected = [len(tokens) - start for tokens, start in rows_of(encoded)]
    assert encoded.divisors.tolist() == expected


def test_free_text_ends_with_the_end_of_text_token_only_for_generation() -> None:
    example = Example("train:0", "a question", (" it is so",), 0, "g")
    keys: dict[str, Any] = {"doc_to_choice": None}
    generation = encode(example, output_type="generate_until", **keys)
    likelihood = encode(example, output_type="loglikelihood", **keys)
    assert generation.kind == likelihood.kind == "sequence"
    assert generation.tokens.tolist() == [*likelihood.tokens.tolist(), load_tokenizer().eos_token_id]
    assert (generation.divisors[0], likelihood.divisors[0]) == (4, 3)
    assert generation.n_choices.tolist() == [1]


@pytest.mark.parametrize(
    ("choices", "scoring", "kind"),
    [
        ((" no", " yes"), None, "verbalizer"),
        ((" it is so", " it is not so"), None, "options"),
        ((" no", " yes"), "options", "options"),
        ((" no", " yes it is"), None, "options"),
        ((" no", " yes it is"), "verbalizer", "options"),  # distinct first tokens: a row a choice
    ],
)
def test_kinds(choices: tuple[str, ...], scoring: str | None, kind: str) -> None:
    task = task_of([Example("train:0", "a", choices, 0, "g")], scoring=scoring)
    assert choose_kind(task, load_tokenizer()) == kind
    assert encode_split(task, "train", load_tokenizer(), max_length=64).kind == kind


def test_choices_of_each_row_are_options_however_they_look() -> None:
    task = task_of([Example("train:0", "a", (" no", " yes"), 0, "g")], doc_to_choice="{{ends}}")
    assert {encode_split(task, s, load_tokenizer(), max_length=64).kind for s in task.splits} == {"options"}


@pytest.mark.parametrize(
    ("choices", "keys", "message"),
    [
        ((" it is so", " it is not so"), {}, "begin with the same token.*set scoring: options"),
        ((" no", " yes"), {"doc_to_choice": "{{ends}}"}, "choices come from each row.*set scoring: options"),
    ],
)
def test_a_verbalizer_that_can_not_be(choices: tuple[str, ...], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(Example("train:0", "a", choices, 0, "g"), scoring="verbalizer", **keys)


@pytest.mark.parametrize("scoring", [None, "verbalizer", "options"])
def test_choices_that_melt_into_the_context_are_refused(scoring: str | None) -> None:
    contexts = ["so:", "so: a"]  # "a" and "n" make one token
    rows = [Example(f"train:{i}", context, ("n", "y"), 0, "g") for i, context in enumerate(contexts)]
    with pytest.raises(DataError, match="train:1: choices change the last tokens"):
        encode(rows, scoring=scoring)


def test_labels_whose_tokens_depend_on_the_context_are_refused() -> None:
    rows = [Example(f"train:{i}", context, ("n", "y"), 0, "g") for i, context in enumerate(["so:", "so:\n"])]
    with pytest.raises(DataError, match="train:1: the labels' tokens depend on the context"):
        encode(rows)


def test_an_answer_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="adds no token"):
        encode(Example("train:0", "a", ("", " yes"), 0, "g"), scoring="options")


def test_groups_are_numbered_by_first_appearance() -> None:
    examples = [Example(f"train:{i}", "a", (" no", " yes"), 0, g) for i, g in enumerate("bacab")]
    assert encode(examples).groups.tolist() == [0, 1, 2, 1, 0]


def test_dtypes_and_shapes() -> None:
    encoded = encode_split(make_planted_tasks(1, 1, kind="options").tasks[0], "test", load_tokenizer(), max_length=64)
    dtypes = {
        "tokens": np.int32,
        "row_starts": np.int64,
        "answer_starts": np.int32,
        "example_rows": np.int64,
        "labels": np.int64,
        "n_choices": np.int16,
        "label_tokens": np.int32,
        "divisors": np.float32,
        "groups": np.int64,
    }
    assert {name: getattr(encoded, name).dtype for name in dtypes} == dtypes
    assert encoded.row_starts.shape == (encoded.n_rows + 1,)
    assert encoded.example_rows.shape == (encoded.n_examples + 1,)
    assert encoded.row_counts.tolist() == encoded.n_choices.tolist()
    assert encoded.ids == tuple(f"test:{i}" for i in range(32))


def make_word_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts its own tokens around a text, as BERT and Llama 3 do."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, WORDS.index(name)) for name in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


@pytest.mark.parametrize(("max_length", "expected"), [(9, "[CLS] a b c a [SEP]"), (5, "[CLS] b c a [SEP]")])
def test_a_classifier_reads_the_end_of_the_text_between_special_tokens(max_length: int, expected: str) -> None:
    task = task_of([Example("train:0", "a b c a", ("no", "yes"), 1, "g")], head="sequence_classification")
    tokenizer = make_word_tokenizer("[CLS] $A [SEP]")
    encoded = encode_split(task, "train", tokenizer, max_length=max_length)
    assert encoded.kind == "classification"
    assert encoded.tokens.tolist() == [WORDS.index(word) for word in expected.split()]
    assert (encoded.n_truncated, encoded.fitting_length) == ((1, 6) if max_length == 5 else (0, 0))
    assert encoded.answer_starts.tolist() == encoded.row_lengths.tolist() == encoded.input_lengths.tolist()
    assert (encoded.labels.tolist(), encoded.n_choices.tolist()) == ([1], [2])


def test_a_classifier_without_special_tokens_reads_an_empty_text() -> None:
    task = task_of([Example("train:0", "", ("no", "yes"), 1, "g")], head="sequence_classification")
    encoded = encode_split(task, "train", load_tokenizer(), max_length=8)
    assert encoded.tokens.tolist() == [load_tokenizer().eos_token_id]


@pytest.mark.parametrize(("max_length", "expected"), [(9, "[CLS] a b c"), (3, "[CLS] b c")])
def test_a_tokenizers_own_first_token_stays_in_front(max_length: int, expected: str) -> None:
    task = task_of([Example("train:0", "a b c", (" no", " yes"), 1, "g")])
    encoded = encode_split(task, "train", make_word_tokenizer("[CLS] $A"), max_length=max_length)
    assert encoded.kind == "verbalizer"
    assert encoded.tokens.tolist() == [WORDS.index(word) for word in expected.split()]


def test_no_context_and_no_token_to_start_from() -> None:
    tokenizer = make_word_tokenizer("$A")
    with pytest.raises(DataError, match="neither a bos nor an eos"):
        encode_split(task_of([Example("train:0", "", (" no", " yes"), 1, "g")]), "train", tokenizer, max_length=8)
