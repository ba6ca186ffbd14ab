"""What a cluster is about, in its own words: how the texts of its most typical rows begin.

In: a cluster's encoded rows and features, and the tokenizer. Out: a line a row. No torch.
"""

from __future__ import annotations

from typing import Any

from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.selection.clusters import find_typical
from ensemblelora.store import FeatureBlock

__all__ = ["quote_typical"]

_N_EXAMPLES = 2
_MOST_CHARACTERS = 120


def quote_typical(split: EncodedSplit, block: FeatureBlock, tokenizer: Any) -> tuple[str, ...]:
    """Quote the rows that stand for a cluster, as the model reads them, without the answer.

    Args:
        split: The cluster's training rows.
        block: Their features, in the same order.
        tokenizer: The model's.
    """
    return tuple(_quote(split, e, tokenizer) for e in find_typical(block, _N_EXAMPLES))


def _quote(split: EncodedSplit, example: int, tokenizer: Any) -> str:
    row = int(split.example_rows[example])  # of several choices the first: what stands before the answer is the same
    start = int(split.row_starts[row])
    tokens = split.tokens[start : start + int(split.answer_starts[row])]
    text = " ".join(str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True)).split())
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."
