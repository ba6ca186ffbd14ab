"""Small cards, tasks and data files for the tests of the data layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ensemblelora.data.task import SPLITS, Example, Task, TaskCard

TOKENIZER = Path(__file__).parent / "data" / "tokenizer"

CARD: dict[str, Any] = {
    "task": "toy",
    "dataset_path": "json",
    "training_split": "train",
    "doc_to_text": "text",
    "doc_to_choice": ["no", "yes"],
    "doc_to_target": "label",
    "output_type": "multiple_choice",
}


@cache
def load_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TOKENIZER)


def make_card(**keys: Any) -> TaskCard:
    return TaskCard.model_validate(CARD | keys)


def make_task(name: str = "toy", n: int = 2, **keys: Any) -> Task:
    """A task of ``n`` short examples a split."""
    splits = {
        s: [Example(f"{s}:{i}", f"context {i}", (" no", " yes"), i % 2, str(i)) for i in range(n)] for s in SPLITS
    }
    return Task(make_card(task=name, **keys), splits)


def task_of(examples: Sequence[Example], **keys: Any) -> Task:
    """A task with these training examples, and the first of them in the other splits."""
    return Task(make_card(**keys), {"train": examples, "validation": examples[:1], "test": examples[:1]})


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
