"""What cutting long rows at ``max_length`` takes from the tasks, and the line that says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["CutSplit", "describe_cuts", "measure_cuts"]

_WORTH_SAYING = 0.03  # of a task's rows
_KEPT_WHOLE = 0.99
_MAX_NAMED = 6


class CutSplit(Protocol):
    """What is asked of an encoded split."""

    @property
    def task(self) -> str:
        """Name of its task."""

    @property
    def n_examples(self) -> int:
        """Examples it has."""

    @property
    def n_truncated(self) -> int:
        """Examples that lost tokens."""

    @property
    def fitting_length(self) -> int:
        """The ``max_length`` that leaves 99 % of them whole."""


def measure_cuts(
    n_cut: Sequence[int] | npt.NDArray[np.int64],
    n_read: Sequence[int] | npt.NDArray[np.int64],
    rows_each: npt.NDArray[np.int64],
) -> tuple[int, int]:
    """Return how many examples lost tokens, and the least ``max_length`` that leaves 99 % of all whole; 0 if none did.

    Args:
        n_cut: Tokens that each row lost.
        n_read: Tokens of each row that the model reads.
        rows_each: Rows of each example, one or more.
    """
    if not any(n_cut):
        return 0, 0
    starts = np.cumsum([0, *rows_each[:-1]])
    whole = np.maximum.reduceat(np.add(n_cut, n_read), starts)
    n_truncated = int((np.maximum.reduceat(np.asarray(n_cut), starts) > 0).sum())
    return n_truncated, int(np.quantile(whole, _KEPT_WHOLE, method="inverted_cdf"))


def describe_cuts(tasks: Sequence[Sequence[CutSplit]], max_length: int) -> str | None:
    """Say in one line which tasks lose the start of more than a few of their rows, and what would keep nearly all.

    Args:
        tasks: The splits of each task that count, at least one.
        max_length: Where their rows were cut.

    Returns:
        The line; none where hardly a row was cut.
    """
    found = []
    for splits in tasks:
        n_examples = sum(split.n_examples for split in splits)
        share = sum(split.n_truncated for split in splits) / max(n_examples, 1)
        if share > _WORTH_SAYING:
            found.append((share, splits[0].task, max(split.fitting_length for split in splits)))
    if not found:
        return None
    found.sort(key=lambda one: (-one[0], one[1]))
    named = [f"{share:.0%} of {task}'s" for share, task, _ in found[:_MAX_NAMED]]
    more = f" and of {len(found) - _MAX_NAMED} more tasks'" if len(found) > _MAX_NAMED else ""
    return (
        f"Rows over data.max_length {max_length} lost the start of their text: {', '.join(named)}{more}; "
        f"data.max_length {max(fitting for *_, fitting in found)} would keep 99% of each task's whole."
    )
