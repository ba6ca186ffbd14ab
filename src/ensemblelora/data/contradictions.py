"""Texts of one task that stand with more than one answer: no model can get all of them right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ensemblelora.data.overlap import KEY_BYTES, hash_answer, hash_content, row_of
from ensemblelora.data.task import SPLITS, Example, Task

__all__ = ["describe_contradictions"]


def describe_contradictions(tasks: Sequence[Task]) -> str | None:
    """Say in a sentence which tasks hold texts with more than one answer; nothing where none does.

    Free text has no wrong answers, and is left out. A row is known by its digests alone, 32 bytes each.

    Args:
        tasks: Tasks with rendered splits.
    """
    found = {task.name: pairs for task in tasks if (pairs := _list_contradictions(task))}
    if not found:
        return None
    told = (f"{len(pairs)} of {name!r} ({_name(*pairs[0])}, say)" for name, pairs in found.items())
    return f"texts that stand with more than one answer: {', '.join(told)}: no model can learn both; check their labels"


def _list_contradictions(task: Task) -> list[tuple[str, str]]:
    """For each text with more than one answer, two rows of it that differ, in the order of the data."""
    hashed = bytearray()
    for split in SPLITS:
        for example in task.splits[split]:
            # Free text has one choice, and so the same answer wherever its content is the same.
            hashed += hash_content(example) + hash_answer(example)
    keys = np.frombuffer(hashed, np.dtype([("content", f"V{KEY_BYTES}"), ("answer", f"V{KEY_BYTES}")]))
    _, texts = np.unique(keys["content"], return_inverse=True)
    _, answers = np.unique(keys["answer"], return_inverse=True)
    order = np.lexsort((answers, texts))
    differs = (texts[order[1:]] == texts[order[:-1]]) & (answers[order[1:]] != answers[order[:-1]])
    pairs = {int(texts[order[k]]): (int(order[k]), int(order[k + 1])) for k in np.flatnonzero(differs)[::-1]}
    found = [sorted((_find(task, place).id for place in sorted(pair)), key=row_of) for pair in pairs.values()]
    return sorted(((first, second) for first, second in found), key=lambda pair: tuple(map(row_of, pair)))


def _name(first: str, second: str) -> str:
    sources = [one.rpartition(":")[0] for one in (first, second)]
    if sources[0] == sources[1]:
        return f"rows {row_of(first)} and {row_of(second)}"
    return f"row {row_of(first)} of {sources[0]} and row {row_of(second)} of {sources[1]}"


def _find(task: Task, place: int) -> Example:
    for split in SPLITS:
        if place < len(task.splits[split]):
            return task.splits[split][place]
        place -= len(task.splits[split])
    raise IndexError(place)
