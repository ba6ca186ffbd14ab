"""Which rows occur in more than one split, within a task or across tasks.

A test row that a model was trained on says nothing about the model, whichever task it was trained in. Splits of the
same name (two tasks' training rows, say) may share rows: nothing leaks.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from ensemblelora.data.rendering import normalize_text
from ensemblelora.data.task import SPLITS, Example, Overlap, Task

__all__ = [
    "KEY_BYTES",
    "describe_overlap",
    "find_overlaps",
    "hash_answer",
    "hash_content",
    "row_of",
    "summarize_overlaps",
]

_SHARED_TEXT_LENGTH = 40
"""Across tasks, a group key counts only when this long: a passage or sentence, not a word, a name or a number."""
KEY_BYTES = 16


def find_overlaps(tasks: Sequence[Task]) -> tuple[Overlap, ...]:
    """Find examples of a later split (train, validation, test) whose content or group an earlier split holds.

    Content is the context and the choices, folded for case and whitespace, choices in any order.

    Args:
        tasks: Tasks with rendered splits.

    Returns:
        One record per kind and pair of splits, in the order of the tasks; a row that agrees in content isn't counted
        again for its group.
    """
    order = {name: i for i, name in enumerate(SPLITS)}
    shared = _find_shared(tasks)
    if not shared:
        return ()
    holders: dict[bytes, dict[tuple[int, str], tuple[str, bytes]]] = defaultdict(dict)
    found: dict[tuple[str, int, str, int, str], list[tuple[str, str]]] = defaultdict(list)
    n_opposed: Counter[tuple[str, int, str, int, str]] = Counter()
    for split in SPLITS:
        for i, task in enumerate(tasks):
            for example in task.splits[split]:
                seen: set[tuple[int, str]] = set()
                for kind, key in _keys(task, example):
                    if key not in shared:
                        continue
                    answer = hash_answer(example)
                    for (j, earlier), (first_id, first_answer) in holders[key].items():
                        if order[earlier] < order[split] and (j, earlier) not in seen:
                            seen.add((j, earlier))
                            place = (kind, j, earlier, i, split)
                            found[place].append((first_id, example.id))
                            n_opposed[place] += kind == "content" and answer != first_answer
                    holders[key].setdefault((i, split), (example.id, answer))
    return tuple(
        Overlap(
            _as_kind(place[0]),
            (tasks[place[1]].name, place[2]),
            (tasks[place[3]].name, place[4]),
            len(pairs),
            pairs[0],
            n_opposed[place],
        )
        for place, pairs in sorted(found.items(), key=lambda item: item[0])
    )


def summarize_overlaps(overlaps: Sequence[Overlap]) -> str:
    """Say in a sentence how bad it is: the pair of splits that shares most, how many more there are, what to do.

    Raises:
        ValueError: If there are no overlaps.
    """
    worst = max(overlaps, key=lambda overlap: overlap.n_examples)
    rest = sum(overlap.n_examples for overlap in overlaps) - worst.n_examples
    others = len(overlaps) - 1
    more = f", and so do {rest} rows of {others} more pair{'s' * (others > 1)} of splits" if others else ""
    return (
        f"{describe_overlap(worst)}{more}: scores on such rows don't show what new rows would get; a run's tasks.json "
        "counts every pair of splits, and data.overlap: refuse stops at them"
    )


def describe_overlap(overlap: Overlap) -> str:
    """Say in a line which split repeats what of which, and how many of the rows have another answer there."""
    alike = "have the same text as" if overlap.kind == "content" else "belong to the same passage or group as"
    (first_task, first_split), (second_task, second_split) = overlap.first, overlap.second
    there, here = map(row_of, overlap.example_ids)
    opposed = f"; {overlap.n_opposed} of them with another answer" if overlap.n_opposed else ""
    return (
        f"{overlap.n_examples} {second_split} rows of {second_task!r} {alike} {first_split} rows of "
        f"{first_task!r} (row {here} of the data is row {there} there{opposed})"
    )


def row_of(example_id: str) -> int:
    """The row of the data that an example came from, the first being 1.

    Example:
        >>> row_of("train:16.2")
        17
    """
    return int(example_id.rpartition(":")[2].partition(".")[0]) + 1


def _find_shared(tasks: Sequence[Task]) -> frozenset[bytes]:
    """Keys that occur in splits of different names; of the others there may be millions, which take bytes alone."""
    seen, shared = np.zeros(0, f"S{KEY_BYTES}"), set[bytes]()
    for split in SPLITS:
        keys = bytearray()
        for task in tasks:
            for example in task.splits[split]:
                for _, key in _keys(task, example):
                    keys += key
        own = np.unique(np.frombuffer(keys, seen.dtype) if keys else seen[:0])
        again = np.intersect1d(seen, own, assume_unique=True)
        shared.update(key.ljust(KEY_BYTES, b"\0") for key in again.tolist())  # numpy drops zeros at the end
        seen = np.union1d(seen, own)
    return frozenset(shared)


def _keys(task: Task, example: Example) -> Iterable[tuple[str, bytes]]:
    yield "content", hash_content(example)
    if example.group != example.id:
        key = normalize_text(example.group)
        scope = "" if len(key) >= _SHARED_TEXT_LENGTH else task.name
        yield "group", _hash("group", scope, key)


def hash_content(example: Example) -> bytes:
    """A digest of the context and the choices, folded for case and whitespace, choices in any order."""
    choices = sorted(normalize_text(choice) for choice in example.choices)
    return _hash("content", normalize_text(example.context), *choices)


def hash_answer(example: Example) -> bytes:
    """A digest of the right choice, folded for case and whitespace."""
    return _hash(normalize_text(example.choices[example.label]))


def _hash(*texts: str) -> bytes:
    return hashlib.blake2b("\x1f".join(texts).encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


def _as_kind(kind: str) -> Literal["content", "group"]:
    return "content" if kind == "content" else "group"
