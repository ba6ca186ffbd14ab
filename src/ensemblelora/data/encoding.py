"""From rendered examples to token ids: one rule for every kind of task.

The rule is lm-evaluation-harness's own, so that scores can agree with it. Trailing whitespace of the context moves to
the continuation, context and continuation are encoded together, and the number of tokens of the context alone says
where the answer starts. The context is cut from the left; an answer never is.

In: a :class:`~ensemblelora.data.task.Task` and a tokenizer. Out: an :class:`EncodedSplit`, flat arrays. Cost: one
encoding of each context and of each context with each of its choices.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ensemblelora.data.packing import Row, describe_examples, pack_rows
from ensemblelora.data.task import Example, Kind, Task
from ensemblelora.data.truncation import measure_cuts
from ensemblelora.errors import DataError

__all__ = ["EncodedSplit", "Layout", "Tokenizer", "choose_kind", "encode_split"]

logger = logging.getLogger(__name__)

_TEXTS_PER_CALL = 4096  # bounds memory; the tokenizer's own threads are busy well before
_WORTH_SHARING = 0.9  # of the tokens of separate rows; a shared context costs an attention mask of its own

Layout = Literal["rows", "shared", "answer"]
"""how an options example becomes rows: one a choice; one in all, the choices side by side after the context they share,
where that is shorter; or the right choice alone. Other kinds have one row in any layout."""


class Tokenizer(Protocol):
    """What is asked of a transformers tokenizer."""

    @property
    def bos_token_id(self) -> int | None:
        """First token of a text, where the model knows one."""

    @property
    def eos_token_id(self) -> int | None:
        """Last token of a text, where the model knows one."""

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]:
        """Encode texts; the answer holds ``input_ids``, one list of ids a text."""


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """One split of one task as token ids, rows back to back.

    A verbalizer, sequence or classification example is one row; an options example is a row per choice.

    Attributes:
        task: The task's name.
        split: The split's name.
        kind: How rows are scored.
        tokens: int32 (n_tokens,). Rows back to back.
        row_starts: int64 (n_rows + 1,). Row ``r`` is ``tokens[row_starts[r]:row_starts[r + 1]]``.
        answer_starts: int32 (n_rows,). Where the answer starts in the row; the row's length where it holds no answer.
        example_rows: int64 (n_examples + 1,). Example ``e`` has rows ``example_rows[e]:example_rows[e + 1]``.
        labels: int64 (n_examples,). Index of the right choice; 0 for sequence.
        n_choices: int16 (n_examples,). 1 for sequence.
        label_tokens: int32 (K,). The verbalizer's tokens; empty for other kinds.
        divisors: float32 (n_rows,). What a row's log-likelihood is divided by: 1, answer tokens, or answer bytes.
        groups: int64 (n_examples,). Equal for examples of equal group; numbered within this split.
        ids: The examples' ids.
        n_truncated: How many examples lost tokens of their context.
        fitting_length: The least ``max_length`` that leaves 99 % of the examples whole; 0 where none lost tokens.
    """

    task: str
    split: str
    kind: Kind
    tokens: NDArray[np.int32]
    row_starts: NDArray[np.int64]
    answer_starts: NDArray[np.int32]
    example_rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    n_choices: NDArray[np.int16]
    label_tokens: NDArray[np.int32]
    divisors: NDArray[np.float32]
    groups: NDArray[np.int64]
    ids: tuple[str, ...]
    n_truncated: int
    fitting_length: int = 0

    @property
    def n_examples(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def n_rows(self) -> int:
        """Number of rows: examples, or choices for ``options``."""
        return len(self.answer_starts)

    @cached_property
    def row_lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, answer included: int64 (n_rows,)."""
        return np.diff(self.row_starts)

    @cached_property
    def input_lengths(self) -> NDArray[np.int64]:
        """Tokens of each row that the model reads: int64 (n_rows,). An answer's last token is only predicted."""
        return self.row_lengths - (self.answer_starts < self.row_lengths)

    @cached_property
    def example_lengths(self) -> NDArray[np.int64]:
        """The longest input of each example's rows: int64 (n_examples,)."""
        if self.n_examples == 0:
            return np.zeros(0, np.int64)
        return np.maximum.reduceat(self.input_lengths, self.example_rows[:-1])

    @property
    def row_counts(self) -> NDArray[np.int64]:
        """Rows of each example: int64 (n_examples,)."""
        return np.diff(self.example_rows)

    @cached_property
    def shared_lengths(self) -> NDArray[np.int64]:
        """Tokens that all of an example's rows begin with, answers not counted: int64 (n_examples,); 0 for one row."""
        lengths = np.zeros(self.n_examples, np.int64)
        for e in np.flatnonzero(self.row_counts > 1):
            rows = np.arange(self.example_rows[e], self.example_rows[e + 1])
            longest = int(self.answer_starts[rows].min())
            heads = self.tokens[self.row_starts[rows][:, None] + np.arange(longest)]
            differs = np.flatnonzero((heads != heads[0]).any(axis=0))
            lengths[e] = differs[0] if len(differs) else longest
        return lengths

    @cached_property
    def is_shared(self) -> NDArray[np.bool_]:
        """Which examples the layout ``shared`` puts into one row: where that takes fewer tokens, and pairs of them."""
        counts, longest, joint = self.row_counts, self.example_lengths, self._joint_lengths
        return (counts > 1) & (joint <= _WORTH_SHARING * counts * longest) & (joint**2 <= counts * longest**2)

    def answer_rows(self) -> NDArray[np.int64]:
        """The row of each example's right choice: int64 (n_examples,)."""
        return self.example_rows[:-1] + np.where(self.row_counts > 1, self.labels, 0)

    def measure(self, layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Length of each example's longest row and how many it has, in a layout: both int64 (n_examples,)."""
        joint = self.is_shared
        if layout == "answer":
            return self.input_lengths[self.answer_rows()], np.ones_like(self.row_counts)
        if layout == "rows" or not joint.any():
            return self.example_lengths, self.row_counts
        return np.where(joint, self._joint_lengths, self.example_lengths), np.where(joint, 1, self.row_counts)

    @cached_property
    def _joint_lengths(self) -> NDArray[np.int64]:
        if self.n_examples == 0:
            return np.zeros(0, np.int64)
        every = np.add.reduceat(self.input_lengths, self.example_rows[:-1])
        return np.asarray(every - (self.row_counts - 1) * self.shared_lengths)


class _Pair(NamedTuple):
    """An example's tokens: of its context, and of its context together with each choice."""

    context: list[int]
    wholes: list[list[int]]

    @property
    def answers(self) -> list[list[int]]:
        return [whole[len(self.context) :] for whole in self.wholes]

    @property
    def splits_alike(self) -> bool:
        """Whether every choice leaves the same tokens in front of it."""
        first, *others = (whole[: len(self.context)] for whole in self.wholes)
        return all(other == first for other in others)


def choose_kind(task: Task, tokenizer: Tokenizer) -> Kind:
    """Decide how a task is scored with this tokenizer; the same for all of its splits.

    A multiple-choice task whose card lists its choices is a verbalizer task when each is a single token of its own, and
    an options task otherwise, unless the card says which. Choices from a column or template always make options: a few
    rows to predict must not be scored otherwise than the rows that were trained on.

    Raises:
        DataError: If the card asks for ``verbalizer`` and choices vary by row or begin with the same token.
    """
    card = task.card
    if card.output_type != "multiple_choice":
        return "sequence"
    if card.head == "sequence_classification":
        return "classification"
    if card.scoring == "options":
        return "options"
    if isinstance(card.doc_to_choice, str):
        if card.scoring == "verbalizer":
            raise DataError(
                f"task {task.name!r}: choices come from each row, so a verbalizer can't score them; "
                "set scoring: options"
            )
        return "options"
    labels = _encode_labels(task, tokenizer)
    firsts = [label[0] for label in labels if label]
    if card.scoring == "verbalizer" and (len(firsts) < len(labels) or len(set(firsts)) < len(firsts)):
        choices = ", ".join(map(repr, _first_example(task).choices))
        raise DataError(
            f"task {task.name!r}: of the labels {choices} two begin with the same token, so their logits "
            "can't be told apart; choose other words, or set scoring: options"
        )
    is_verbalizer = len(set(firsts)) == len(labels) and all(len(label) == 1 for label in labels)
    if card.scoring == "verbalizer" and not is_verbalizer:
        logger.info("task %r: labels of several tokens, scored as options", task.name)
    return "verbalizer" if is_verbalizer else "options"


def encode_split(task: Task, split: str, tokenizer: Tokenizer, *, max_length: int) -> EncodedSplit:
    """Encode one split of a task.

    A task for generation (``output_type: generate_until``) gets the end-of-text token behind its answer, so that a
    model trained on it learns to stop; every other row is what lm-evaluation-harness would score. A tokenizer that
    puts its own token in front of every text (Llama 3, Gemma) does so here too, and truncation keeps it.

    Args:
        task: Its examples must be rendered.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        tokenizer: A fast transformers tokenizer.
        max_length: Tokens of a row that the model reads, at most. The context gives way, from the left.

    Raises:
        DataError: If an answer is longer than ``max_length``, adds no token, or changes the context's last tokens in
            a way that makes choices incomparable; or if label tokens collide (see :func:`choose_kind`).
    """
    kind = choose_kind(task, tokenizer)
    examples = task.splits[split]
    if kind == "classification":
        rows = pack_rows(_encode_texts(examples, tokenizer, max_length))
        label_tokens: list[int] = []
    else:
        label_tokens = [label[0] for label in _encode_labels(task, tokenizer)] if kind == "verbalizer" else []
        rows = pack_rows(_encode_rows(task, split, kind, label_tokens, tokenizer, max_length))
    known = describe_examples(examples)
    rows_each = known.n_choices.astype(np.int64) if kind == "options" else np.ones(len(examples), np.int64)
    n_truncated, fitting_length = measure_cuts(rows.n_cut, rows.n_read, rows_each)
    return EncodedSplit(
        task=task.name,
        split=split,
        kind=kind,
        tokens=rows.tokens,
        row_starts=rows.starts,
        answer_starts=rows.answer_starts,
        example_rows=np.concatenate([np.zeros(1, np.int64), np.cumsum(rows_each)]),
        labels=known.labels,
        n_choices=known.n_choices,
        label_tokens=np.array(label_tokens, np.int32),
        divisors=rows.divisors,
        groups=known.groups,
        ids=known.ids,
        n_truncated=n_truncated,
        fitting_length=fitting_length,
    )


def _encode_rows(
    task: Task, split: str, kind: Kind, label_tokens: list[int], tokenizer: Tokenizer, max_length: int
) -> Iterator[Row]:
    examples = task.splits[split]
    lead = _leading_tokens(tokenizer)
    faults: list[tuple[str, str]] = []
    for example, pair in zip(examples, _encode_pairs(examples, tokenizer), strict=True):
        fault = _find_fault(pair, kind, label_tokens)
        if fault:
            faults.append((example.id, fault))
            continue
        for choice, whole, answer in zip(example.choices, pair.wholes, pair.answers, strict=True):
            context = whole[: len(pair.context)]
            start = lead or ([] if context else _first_token(tokenizer))
            if kind == "verbalizer":
                yield _fit_row(start, context, [], 1.0, max_length)
                break  # one row: the choices are compared at its last position
            ending = _end_of_answer(task, tokenizer)
            if len(answer) + len(ending) + max(len(start), 1) > max_length + 1:
                faults.append(
                    (
                        example.id,
                        f"the answer has {len(answer) + len(ending)} tokens, more than max_length "
                        f"{max_length} leaves, and answers are never cut",
                    )
                )
                break
            divisor = _choose_divisor(task, kind, choice, len(answer) + len(ending))
            yield _fit_row(start, context, answer + ending, divisor, max_length)
    if faults:
        (where, what), n_more = faults[0], len(faults) - 1
        more = f" (and {n_more} more rows like it)" if n_more else ""
        raise DataError(f"task {task.name!r}, {split} row {where}: {what}{more}")


def _find_fault(pair: _Pair, kind: Kind, label_tokens: list[int]) -> str | None:
    if not pair.splits_alike:
        return "choices change the last tokens of the context differently; end the context before a space or line break"
    if not all(pair.answers):
        return "an answer adds no token to its context; give it text, or another target_delimiter"
    if kind == "verbalizer" and pair.answers != [[token] for token in label_tokens]:
        return "the labels' tokens depend on the context; set scoring: options, or another target_delimiter"
    return None


def _fit_row(start: list[int], context: list[int], answer: list[int], divisor: float, max_length: int) -> Row:
    # The model never reads an answer's last token, so a row with an answer may hold one token more.
    room = max_length + bool(answer) - len(start) - len(answer)
    kept = context[max(len(context) - room, 0) :]
    return Row([*start, *kept, *answer], len(start) + len(kept), divisor, len(context) - len(kept))


def _choose_divisor(task: Task, kind: Kind, choice: str, n_tokens: int) -> float:
    card = task.card
    if kind == "sequence" or card.length_normalization == "tokens":
        return float(n_tokens)
    if card.length_normalization == "bytes":  # of the choice itself: the delimiter is the same for all
        return float(max(len(choice.removeprefix(card.target_delimiter).encode()), 1))
    return 1.0


def _end_of_answer(task: Task, tokenizer: Tokenizer) -> list[int]:
    if task.card.output_type != "generate_until" or tokenizer.eos_token_id is None:
        return []
    return [tokenizer.eos_token_id]


def _encode_pairs(examples: Sequence[Example], tokenizer: Tokenizer) -> Iterator[_Pair]:
    remaining = iter(examples)
    while chunk := list(islice(remaining, _TEXTS_PER_CALL)):
        texts: list[str] = []
        for example in chunk:
            context = example.context.rstrip()
            moved = example.context[len(context) :]
            texts += [context, *(context + moved + choice for choice in example.choices)]
        tokens = iter(_encode(texts, tokenizer))
        for example in chunk:
            yield _Pair(next(tokens), [next(tokens) for _ in example.choices])


def _encode_texts(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Iterator[Row]:
    """Rows for a classification head: the tokenizer's own special tokens around the end of the context."""
    remaining = iter(examples)
    while chunk := list(islice(remaining, _TEXTS_PER_CALL)):
        encoded = tokenizer([example.context for example in chunk], return_special_tokens_mask=True)
        for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            body = np.flatnonzero(np.logical_not(special))
            first, last = (int(body[0]), int(body[-1]) + 1) if len(body) else (len(ids), len(ids))
            start, end = list(ids[:first]) or ([] if len(body) else _first_token(tokenizer)), list(ids[last:])
            kept = list(ids[max(first, last - max(max_length - len(start) - len(end), 0)) : last])
            tokens = [*start, *kept, *end]
            yield Row(tokens, len(tokens), 1.0, last - first - len(kept))


def _encode(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return encoded


def _leading_tokens(tokenizer: Tokenizer) -> list[int]:
    encoded = tokenizer(["a"], return_special_tokens_mask=True)
    special = encoded["special_tokens_mask"][0]
    return list(encoded["input_ids"][0][: special.index(0)])


def _first_token(tokenizer: Tokenizer) -> list[int]:
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise DataError("a row has no context and the tokenizer has neither a bos nor an eos token to start from")
    return [token]


def _encode_labels(task: Task, tokenizer: Tokenizer) -> list[list[int]]:
    """Tokens of each choice behind the first training context."""
    return next(_encode_pairs([_first_example(task)], tokenizer)).answers


def _first_example(task: Task) -> Example:
    return next(example for split in task.splits.values() for example in split)
