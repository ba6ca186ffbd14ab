"""The identity of an encoded split: what a stored result must have been made from to be used again."""

from __future__ import annotations

import numpy as np

from ensemblelora.artifacts import fingerprint
from ensemblelora.data.encoding import EncodedSplit

__all__ = ["fingerprint_split"]


def fingerprint_split(split: EncodedSplit) -> str:
    """Identity of one encoded split: tokens, answers, labels, order."""
    arrays = (split.tokens, split.row_starts, split.answer_starts, split.example_rows, split.labels, split.n_choices)
    more = (split.label_tokens, split.divisors, split.groups, np.array(split.ids))
    return fingerprint(split.task, split.split, split.kind, *arrays, *more)
