"""What a run is asked and what it answers: plain values, and what is refused before anything is run. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensemblelora.data.task import Example
from ensemblelora.errors import UsageError

__all__ = ["Asked", "Prediction", "Question", "check_rows", "name_choices"]


@dataclass(frozen=True)
class Prediction:
    """The ensemble's answer to one question."""

    label: str
    """the likeliest choice, or the generated text"""
    probabilities: dict[str, float] | None
    """of every choice; none for free text"""
    groups: dict[str, float]
    """which group adapters answered, and with which weight"""
    members: dict[str, float]
    """every adapter that was run, and its share of the scores: a booster's is its group's weight times its rate, and it
    counts by its distance from the start point"""
    task: str
    """whose prompt and labels were used"""
    routing: dict[str, float] | None
    """where no task was named: how likely each one is that could be asked, the likeliest first"""
    probability: float | None = None
    """how sure the label is; none for free text"""
    task_probability: float | None = None
    """where no task was named: how sure it is that the row is of this one"""
    doubt: str | None = None
    """``at chance`` or ``too few rows``, where the run's own test did not show any method to be above always answering
    the task's most frequent class; none where it did, or where there was no such test"""


@dataclass(frozen=True)
class Question:
    """Rows to answer together."""

    task: str | None
    """none: each row is routed"""
    rows: Sequence[Mapping[str, Any] | str]


@dataclass(frozen=True, eq=False)
class Asked:
    """One example to answer, and whose question it is of."""

    question: int
    task: str
    example: Example
    weights: np.ndarray
    """(n_groups,)"""
    routing: dict[str, float] | None


def check_rows(asked: str, rows: Sequence[Mapping[str, Any] | str]) -> None:
    """Refuse one row in place of a list, which would be answered letter by letter, and texts without a word."""
    if isinstance(rows, str | Mapping):
        what = "one text" if isinstance(rows, str) else "one mapping"
        raise UsageError(f"{asked}: got {what}, expected a list of rows; put it in brackets: [row]")
    for place, row in enumerate(rows, start=1):
        if isinstance(row, str) and not row.strip():
            raise UsageError(f"{asked}: text {place} of {len(rows)} is empty; give the text to answer")


def name_choices(example: Example, probabilities: Sequence[float]) -> dict[str, float]:
    """Probability of each choice by its text; equal texts add up."""
    named: dict[str, float] = {}
    for choice, probability in zip(example.choices, probabilities, strict=False):  # other rows may have more choices
        named[choice.strip()] = named.get(choice.strip(), 0.0) + probability
    return named
