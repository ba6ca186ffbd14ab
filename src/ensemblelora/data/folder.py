"""The simplest input: a folder with one data file per task and no cards.

A file with columns ``text`` and ``label`` is a classification task. A file with a free-text ``answer`` (or ``output``,
``response``) beside a ``question`` (or ``instruction``, ``text``), and maybe an ``input`` or ``context``, is a task for
generation. The file's name is the task's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ensemblelora.data.reading import read_file
from ensemblelora.data.task import TaskCard
from ensemblelora.errors import DataError

__all__ = ["is_data_file", "task_from_file", "tasks_from_folder"]

_FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_ANSWERS = ("answer", "output", "response")
_QUESTIONS = {"question": "Question", "instruction": "Instruction", "text": ""}
_CONTEXTS = ("input", "context")
_MAX_CLASSES = 100


def is_data_file(path: Path) -> bool:
    """Whether a path's name is that of a data file."""
    return path.suffix.lower() in _FORMATS and not path.name.startswith(".")


def tasks_from_folder(folder: Path) -> list[TaskCard]:
    """Make a card for each data file of a folder (csv, tsv, jsonl, json, parquet), ordered by name.

    Raises:
        DataError: If there is no data file, or names every file that can't be a task, with the reason.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and is_data_file(path))
    if not files:
        raise DataError(f"folder {folder}: no task in it; expected .csv, .tsv, .jsonl, .json, .parquet or card files")
    cards: list[TaskCard] = []
    faults: list[str] = []
    for path in files:
        try:
            cards.append(task_from_file(path))
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("; ".join(faults))
    return cards


def task_from_file(path: Path) -> TaskCard:
    """Make a card for one data file; its splits are cut from its rows.

    Raises:
        DataError: If the file can't be read, lacks the columns, has labels that are no classes, or has a bad name.
    """
    rows = read_file(path)
    columns = rows.column_names
    common = {
        "task": path.stem,
        "dataset_path": _FORMATS[path.suffix.lower()],
        "dataset_kwargs": {"data_files": {"train": str(path.resolve())}},
        "training_split": "train",
    }
    if "text" in columns and "label" in columns:
        keys = _describe_labelled(list(rows["label"]), path)
    elif any(name in columns for name in _ANSWERS) and any(name in columns for name in _QUESTIONS):
        keys = _describe_generation(columns)
    else:
        raise DataError(
            f"data file {path}: expected columns text and label, or question (instruction, text) and answer (output, "
            f"response); got {', '.join(columns)}"
        )
    try:
        return TaskCard.model_validate({**common, **keys})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise DataError(f"data file {path}: its name can't be the task's: {reason}; rename the file") from None


def _describe_labelled(values: Sequence[Any], path: Path) -> dict[str, Any]:
    names, target = _name_classes(values, path)
    return {
        # A list of the labels in the prompt misled a 135M model (AUC 0.44 against 0.70 on film reviews, untrained).
        "doc_to_text": "{{text}}\nLabel:",
        "doc_to_choice": names,
        "doc_to_target": target,
        "output_type": "multiple_choice",
        "length_normalization": "tokens",
        "group": "text",
    }


def _name_classes(values: Sequence[Any], path: Path) -> tuple[tuple[str, ...], str]:
    """The classes' names, and the template that turns a row's label into one of them."""
    kinds = {type(value) for value in values}
    what = f"data file {path}: column 'label'"
    if list in kinds or dict in kinds:
        raise DataError(f"{what} holds lists: multi-label tasks are not supported, only one label a row")
    if float in kinds:
        example = next(value for value in values if isinstance(value, float))
        raise DataError(
            f"{what} holds numbers such as {example}: regression is not supported, only classes; bin the "
            "values into names or whole numbers"
        )
    if type(None) in kinds or "" in values:
        row = next(i for i, value in enumerate(values) if value is None or value == "")
        raise DataError(f"{what} is empty in row {row} (counted from 0)")
    if len(kinds) > 1:
        raise DataError(f"{what} mixes {' and '.join(sorted(kind.__name__ for kind in kinds))}; use one kind of label")
    distinct = sorted(set(values))
    if not 2 <= len(distinct) <= _MAX_CLASSES:
        raise DataError(
            f"{what} holds {len(distinct)} different values, expected 2 to {_MAX_CLASSES} classes; for free "
            "text, name the column answer"
        )
    if kinds == {bool}:
        return ("false", "true"), "label"
    if kinds == {int}:
        return tuple(map(str, distinct)), f"{{{{ {distinct}.index(label) }}}}"
    return tuple(distinct), "label"


def _describe_generation(columns: Sequence[str]) -> dict[str, Any]:
    answer = next(name for name in _ANSWERS if name in columns)
    question = next(name for name in _QUESTIONS if name in columns)
    title = _QUESTIONS[question]
    context = next((name for name in _CONTEXTS if name in columns), None)
    before = f"{{% if {context} %}}{{{{{context}}}}}\n{{% endif %}}" if context else ""
    asked = f"{title}: {{{{{question}}}}}" if title else f"{{{{{question}}}}}"
    return {
        "doc_to_text": f"{before}{asked}\nAnswer:",
        "doc_to_target": answer,
        "output_type": "generate_until",
        "group": f"{{{{{question}}}}} {{{{{context} or ''}}}}" if context else question,
    }
