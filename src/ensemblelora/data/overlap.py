"""Which rows occur in more than one split, within a task or across tasks.

A test row that a model was trained on says nothing about the model, whichever task it was trained in. Splits of the
same name (two tasks' training rows, say) may share rows: nothing leaks.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from ensemblelora.data.rendering import normalize_text
from ensemblelora.data.task import SPLITS, Example, Overlap, Task

__all__ = ["describe_overlap", "find_overlaps", "summarize_overlaps"]

_SHARED_TEXT_LENGTH = 40
"""Across tasks, a group key counts only when this long: a passage or sentence, not a word, a name or a number."""
_KEY_BYTES = 16


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
    holders: dict[bytes, dict[tuple[int, str], str]] = defaultdict(dict)
    found: dict[tuple[str, int, str, int, str], list[tuple[str, str]]] = defaultdict(list)
    for split in SPLITS:
        for i, task in enumerate(tasks):
            for example in task.splits[split]:
                seen: set[tuple[int, str]] = set()
                for kind, key in _keys(task, example):
                    if key not in shared:
                        continue
                    for (j, earlier), first_id in holders[key].items():
                        if order[earlier] < order[split] and (j, earlier) not in seen:
                            seen.add((j, earlier))
                            found[kind, j, earlier, i, split].append((first_id, example.id))
                    holders[key].setdefault((i, split), example.id)
    return tuple(
        Overlap(_as_kind(kind), (tasks[j].name, earlier), (tasks[i].name, split), len(pairs), pairs[0])
        for (kind, j, earlier, i, split), pairs in sorted(found.items(), key=lambda item: item[0])
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
        f"{describe_overlap(worst)}{more}: scores on such rows flatter; they are listed in the run folder's "
        "tasks.json, and data.overlap: refuse stops at them"
    )


def describe_overlap(overlap: Overlap) -> str:
    """Say in a line which split repeats what of which; the examples are rows as the data file numbers them."""
    alike = "have the same text as" if overlap.kind == "content" else "belong to the same passage or group as"
    (first_task, first_split), (second_task, second_split) = overlap.first, overlap.second
    pair = " and ".join(overlap.example_ids)
    return (
        f"{overlap.n_examples} {second_split} rows of {second_task!r} {alike} {first_split} rows of "
        f"{first_task!r} (such as rows {pair} of the data)"
    )


def _find_shared(tasks: Sequence[Task]) -> frozenset[bytes]:
    """Keys that occur in splits of different names; of the others there may be millions, which take bytes alone."""
    seen, shared = np.zeros(0, f"S{_KEY_BYTES}"), set[bytes]()
    for split in SPLITS:
        keys = bytearray()
        for task in tasks:
            for example in task.splits[split]:
                for _, key in _keys(task, example):
                    keys += key
        own = np.unique(np.frombuffer(keys, seen.dtype) if keys else seen[:0])
        again = np.intersect1d(seen, own, assume_unique=True)
        shared.update(key.ljust(_KEY_BYTES, b"\0") for key in again.tolist())  # numpy drops zeros at the end
        seen = np.union1d(seen, own)
    return frozenset(shared)


def _keys(task: Task, example: Example) -> Iterable[tuple[str, bytes]]:
    choices = sorted(normalize_text(choice) for choice in example.choices)
    yield "content", _hash("content", normalize_text(example.context), *choices)
    if example.group != example.id:
        key = normalize_text(example.group)
        scope = "" if len(key) >= _SHARED_TEXT_LENGTH else task.name
        yield "group", _hash("group", scope, key)


def _hash(*texts: str) -> bytes:
    return hashlib.blake2b("\x1f".join(texts).encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest()


def _as_kind(kind: str) -> Literal["content", "group"]:
    return "content" if kind == "content" else "group"
