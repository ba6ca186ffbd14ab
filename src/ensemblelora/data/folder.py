"""The simplest input: a folder with one data file per task and no cards.

A file with columns ``text`` and ``label`` is a classification task. A file with an ``answer`` (or ``output``,
``response``) beside a ``question`` (or ``instruction``, ``text``), and maybe an ``input`` or ``context``, is a task for
generation; with ``choices`` (see :mod:`ensemblelora.data.choices`) and an ``answer`` or ``label``, a multiple-choice
task. The file's name is the task's. A file with other columns needs a card beside it, which may leave to
:func:`describe_source` everything but what the columns mean.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ensemblelora.data.choices import ChoiceColumns, describe_target, find_choice_columns
from ensemblelora.data.reading import list_folder, read_file
from ensemblelora.data.remote import Source, name_of, show_place, show_url
from ensemblelora.data.task import TaskCard
from ensemblelora.errors import DataError, list_nearest

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["describe_source", "is_data_file", "task_from_file", "tasks_from_folder", "tasks_from_url"]

logger = logging.getLogger(__name__)

_FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_ANSWERS = ("answer", "output", "response")
_QUESTIONS = {"question": "Question", "instruction": "Instruction", "text": ""}
_CONTEXTS = ("input", "context")
_UNDERSTOOD = ("text", "label", "choices", *_QUESTIONS, *_ANSWERS)
_MAX_CLASSES = 100
_FEW_ROWS = 20
"""of fewer, a label of its own for every other row says nothing"""
_PIECE = 4096  # rows in memory at a time


def is_data_file(path: PurePath) -> bool:
    """Whether a path's name is that of a data file."""
    return path.suffix.lower() in _FORMATS and not path.name.startswith(".")


def tasks_from_folder(folder: Path, *, besides: Collection[Path] = (), may_be_empty: bool = False) -> list[TaskCard]:
    """Make a card for each data file of a folder (csv, tsv, jsonl, json, parquet), ordered by name.

    Args:
        folder: Looked at without its subfolders.
        besides: Resolved paths of files that cards read already, which are passed over.
        may_be_empty: Whether other tasks come from this folder.

    Raises:
        DataError: If there is no data file, or names every file that can't be a task, with the reason.
    """
    every = sorted(path for path in folder.iterdir() if path.is_file() and is_data_file(path))
    files = [path for path in every if path.resolve() not in besides]
    if not files and not may_be_empty:
        raise DataError(f"folder {folder}: no task in it; expected .csv, .tsv, .jsonl, .json, .parquet or card files")
    return _make_cards(files)


def tasks_from_url(url: str) -> list[TaskCard]:
    """Make a card for a data file elsewhere, or for each of a folder.

    Raises:
        DataError: If there is no data file, a card lies there, or names every file that can't be a task, with the
            reason.
        MissingExtraError: If the package that opens the URL isn't installed.
    """
    if is_data_file(name_of(url)):
        return [task_from_file(url)]
    every = list_folder(url)
    if cards := [one for one in every if name_of(one).suffix in (".yaml", ".yml")]:
        raise DataError(
            f"folder {show_url(url)}: holds the card {name_of(cards[0]).name}; cards are read from folders of this "
            "machine only: copy it here, and name the file in its dataset_kwargs.data_files"
        )
    files = [one for one in every if is_data_file(name_of(one))]
    if not files:
        raise DataError(f"folder {show_url(url)}: no task in it; expected .csv, .tsv, .jsonl, .json or .parquet files")
    return _make_cards(files)


def _make_cards(files: Sequence[Source]) -> list[TaskCard]:
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


def describe_source(source: Source) -> dict[str, Any]:
    """Return the keys of a card that say where a data file's rows are: all in one split, to be cut."""
    name = name_of(source)
    return {
        "task": name.stem,
        "dataset_path": _FORMATS[name.suffix.lower()],
        "dataset_kwargs": {"data_files": {"train": source if isinstance(source, str) else str(source.resolve())}},
        "training_split": "train",
    }


def task_from_file(source: Source) -> TaskCard:
    """Make a card for one data file; its splits are cut from its rows.

    Raises:
        DataError: If the file can't be read, lacks the columns, has labels or choices that can't be understood, or has
            a bad name.
    """
    rows, path = read_file(source), show_place(source)
    columns = rows.column_names
    question = next((name for name in _QUESTIONS if name in columns), None)
    answer = next((name for name in _ANSWERS if name in columns), None)
    choices, keyed = find_choice_columns(columns), answer or ("label" if "label" in columns else None)
    if question and getattr(rows.features[question], "dtype", None) is None:
        raise DataError(f"data file {path}: column {question!r} holds lists or records; give one text a row")
    if choices and question and keyed:
        keys = _describe_choices(rows, question, keyed, choices, path)
    elif not choices and "text" in columns and "label" in columns:
        keys = _describe_labelled(rows, path)
    elif not choices and question and answer:
        _warn_of_lists(rows, path)
        keys = _describe_generation(columns, question, answer)
    else:
        raise DataError(_explain_columns(path, name_of(source).stem, columns))
    try:
        return TaskCard.model_validate({**describe_source(source), **keys})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise DataError(f"data file {path}: its name can't be the task's: {reason}; rename the file") from None


def _explain_columns(path: str, stem: str, columns: Sequence[str]) -> str:
    """Say which columns are understood, and how to name others: by a card of three lines."""
    first, last = columns[0], columns[-1]
    return (
        f"data file {path}: expected columns text and label; question, choices and answer; or question and answer; got "
        f"{list_nearest(columns, _UNDERSTOOD)}. Rename them, or put a card {stem}.yaml beside the file that says what "
        f"they mean, such as doc_to_text: {first} / doc_to_choice: [its classes in order] / doc_to_target: {last} (one "
        "line each; see README, 'With your own files')"
    )


def _describe_labelled(rows: Dataset, path: str) -> dict[str, Any]:
    names, target = _name_classes(rows, path)
    return {
        # A list of the labels in the prompt misled a 135M model (AUC 0.44 against 0.70 on film reviews, untrained).
        "doc_to_text": "{{text}}\nLabel:",
        "doc_to_choice": names,
        "doc_to_target": target,
        "output_type": "multiple_choice",
        "length_normalization": "tokens",
        "group": "text",
    }


def _explain_values(path: str, n_rows: int) -> str:
    """Say of how many rows it is, why these are no classes, and what to do."""
    if n_rows < _FEW_ROWS:
        return (
            f"{n_rows} rows, too few rows to tell classes (two rows a class on average) from free text; give more "
            f"rows, name the column answer if it is free text, or put a card {Path(path).stem}.yaml beside the file "
            "that names the classes: doc_to_text: text / doc_to_choice: [the classes in order] / doc_to_target: label "
            "(one line each; see README, 'With your own files')"
        )
    return (
        f"{n_rows} rows, too many to be classes (at most {_MAX_CLASSES}, and two rows a class on average); for free "
        "text, name the column answer"
    )


def _name_classes(rows: Dataset, path: str) -> tuple[tuple[str, ...], str]:
    """The classes' names, and the template that turns a row's label into one of them."""
    kinds, values = _list_values(rows, "label")
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
        row = min(values[value] for value in (None, "") if value in values)
        raise DataError(f"{what} is empty in row {row} (counted from 0)")
    if len(kinds) > 1:
        raise DataError(f"{what} mixes {' and '.join(sorted(kind.__name__ for kind in kinds))}; use one kind of label")
    distinct = sorted(set(values))
    if len(distinct) == 1:
        raise DataError(f"{what} holds only one class, {distinct[0]!r}; a task needs two or more")
    # With a label of its own for nearly every row there is nothing to learn, and scoring every row by every label would
    # take as many passes as there are rows.
    if len(distinct) > min(_MAX_CLASSES, len(rows) / 2):
        raise DataError(f"{what} holds {len(distinct)} different values in {_explain_values(path, len(rows))}")
    if kinds == {bool}:
        return ("false", "true"), "label"
    if kinds == {int}:
        return tuple(map(str, distinct)), f"{{{{ {distinct}.index(label) }}}}"
    return tuple(distinct), "label"


def _list_values(rows: Dataset, name: str) -> tuple[set[type], dict[Any, int]]:
    """What kinds of values a column has; and each distinct one that is no list, with the first row that has it."""
    kinds: set[type] = set()
    values: dict[Any, int] = {}
    column = rows.select_columns([name])
    for first in range(0, len(rows), _PIECE):
        for row, value in enumerate(column[first : first + _PIECE][name], first):
            kinds.add(type(value))
            if not isinstance(value, (list, dict)):
                values.setdefault(value, row)
    return kinds, values


def _describe_choices(rows: Dataset, question: str, answer: str, choices: ChoiceColumns, path: str) -> dict[str, Any]:
    return {
        **_describe_question(rows.column_names, question),
        "doc_to_choice": choices.template,
        "doc_to_target": describe_target(rows, answer, choices, f"data file {path}"),
        "output_type": "multiple_choice",
        "scoring": "options",
        "length_normalization": "tokens",
    }


def _describe_generation(columns: Sequence[str], question: str, answer: str) -> dict[str, Any]:
    return {**_describe_question(columns, question), "doc_to_target": answer, "output_type": "generate_until"}


def _describe_question(columns: Sequence[str], question: str) -> dict[str, Any]:
    """The prompt, and what makes two rows ask the same."""
    title = _QUESTIONS[question]
    context = next((name for name in _CONTEXTS if name in columns), None)
    before = f"{{% if {context} %}}{{{{{context}}}}}\n{{% endif %}}" if context else ""
    asked = f"{title}: {{{{{question}}}}}" if title else f"{{{{{question}}}}}"
    return {
        "doc_to_text": f"{before}{asked}\nAnswer:",
        "group": f"{{{{{question}}}}} {{{{{context} or ''}}}}" if context else question,
    }


def _warn_of_lists(rows: Dataset, path: str) -> None:
    """Say which columns look like choices under another name, since free text leaves them out."""
    lists = [name for name, value in rows[0].items() if isinstance(value, list)]
    if lists:
        logger.warning(
            "data file %s: read as free text; column %s holds lists and isn't used (choices are looked for in a column "
            "named choices)",
            path,
            ", ".join(lists),
        )
