"""Some examples of an encoded split, as a split of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ensemblelora.data.encoding import EncodedSplit

__all__ = ["list_rows", "take_examples"]


def take_examples(split: EncodedSplit, examples: Sequence[int] | NDArray[np.int64]) -> EncodedSplit:
    """Return a split of the given examples, in that order; codes of groups and what was cut stay the whole split's.

    Args:
        split: Where they are taken from.
        examples: Their indices.
    """
    index, rows = np.asarray(examples, np.int64), list_rows(split, examples)
    spans = [split.tokens[split.row_starts[row] : split.row_starts[row + 1]] for row in rows]
    return replace(
        split,
        tokens=np.concatenate(spans) if spans else split.tokens[:0],
        row_starts=np.concatenate([[0], np.cumsum(split.row_lengths[rows])]).astype(np.int64),
        answer_starts=split.answer_starts[rows],
        example_rows=np.concatenate([[0], np.cumsum(split.row_counts[index])]).astype(np.int64),
        labels=split.labels[index],
        n_choices=split.n_choices[index],
        divisors=split.divisors[rows],
        groups=split.groups[index],
        ids=tuple(split.ids[e] for e in index),
    )


def list_rows(split: EncodedSplit, examples: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows of the given examples, example after example, ``(n_rows,)``."""
    own = [np.arange(split.example_rows[e], split.example_rows[e + 1]) for e in examples]
    return np.concatenate(own) if own else np.zeros(0, np.int64)
