"""Task cards: list the shipped ones, or show any, or a data file's, with an example as the model sees it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from ensemblelora.config import DataConfig
from ensemblelora.data.catalog import find_cards, load_card
from ensemblelora.data.folder import is_data_file, task_from_file
from ensemblelora.data.loading import load_tasks
from ensemblelora.data.task import Example, TaskCard
from ensemblelora.errors import DataError

__all__ = ["ShownCard", "list_cards", "render_card", "show_card"]

# Enough rows that every label of a card is among them, few enough that none is read in vain.
_N_ROWS = 20


@dataclass(frozen=True)
class ShownCard:
    """A card, and one of its examples where its data can be read.

    Attributes:
        task: The task's name.
        path: The card file, or the data file that a card was made for.
        card: The card's text.
        example: The first training example; none where the data is not at hand.
        problem: Why there is no example.
        is_shipped: Whether the card came with the package.
    """

    task: str
    path: str
    card: str
    example: Example | None
    problem: str | None
    is_shipped: bool


def list_cards() -> dict[str, dict[str, str]]:
    """Describe every shipped card in a line: what it reads and how it is scored."""
    cards = {name: load_card(path) for name, path in sorted(find_cards().items())}
    return {
        name: {"reads": _describe_source(card), "scored by": _describe_scoring(card)} for name, card in cards.items()
    }


def show_card(name: str) -> ShownCard:
    """Read a card, or make a data file's, and render its first training example.

    Args:
        name: A shipped card's name, a card file, or a data file.

    Raises:
        DataError: If there is no such card or file, or it is wrong.
    """
    shipped = find_cards()
    path = shipped.get(name, Path(name).expanduser())
    if name not in shipped and not path.is_file():
        raise DataError(
            f"tasks: {name!r} is neither a card, a data file nor one of the shipped cards: {', '.join(sorted(shipped))}"
        )
    is_made = name not in shipped and is_data_file(path)
    card = task_from_file(path) if is_made else load_card(path)
    text = _write_card(card, path) if is_made else path.read_text(encoding="utf-8")
    example, problem = None, None
    limits = {f"max_{split}_examples": _N_ROWS for split in ("train", "validation", "test")}
    try:
        example = load_tasks(DataConfig(tasks=(name,), **limits), seed=0).tasks[0].splits["train"][0]
    except DataError as error:  # the card is still worth showing where its data is elsewhere
        problem = str(error)
    return ShownCard(card.task, str(path), text, example, problem, name in shipped)


def render_card(shown: ShownCard) -> str:
    """Write a card and its example as text."""
    head = f"# {shown.path}\n{shown.card.rstrip()}\n"
    if shown.example is None:
        return f"{head}\n# no example: {shown.problem}"
    choices = "\n".join(
        f"{'*' if index == shown.example.label else ' '} {choice!r}"
        for index, choice in enumerate(shown.example.choices)
    )
    return (
        f"{head}\n# example {shown.example.id}\n{shown.example.context}\n\n# answers, the right one marked\n{choices}"
    )


def _write_card(card: TaskCard, file: Path) -> str:
    """What the file's columns were taken to mean, as a card that reads the data file of its own stem."""
    values = card.model_dump(mode="json", exclude_defaults=True, exclude={"dataset_path", "dataset_kwargs"})
    beside = file.with_suffix(".yaml").name
    return (
        f"# how its columns are read; to change that, save this beside it as {beside}\n"
        f"{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"
    )


def _describe_source(card: TaskCard) -> str:
    files = card.dataset_kwargs.get("data_files", {})
    return str(files.get(card.training_split) or " ".join(filter(None, (card.dataset_path, card.dataset_name))))


def _describe_scoring(card: TaskCard) -> str:
    if card.head != "lm":
        return "classification head"
    return card.scoring or {"multiple_choice": "verbalizer or options, by the labels"}.get(
        card.output_type, "free text"
    )
