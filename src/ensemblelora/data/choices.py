"""Multiple choice in a user's own file: which columns hold the choices, and how the answer names one of them.

An answer is the choice's own text, its letter, or its number. Which of these a file means is read off all of its rows;
a file that allows two readings is refused, since a wrong guess would train on wrong labels.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ensemblelora.data.rendering import parse_literal
from ensemblelora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ChoiceColumns", "describe_target", "find_choice_columns"]

_LISTS = ("choices", "options")
_NUMBERED = re.compile(r"(choice|option)_?([a-z]|\d+)", re.IGNORECASE)
_MIN_CHOICES = 2

_Read = Callable[[Any, Sequence[str]], int | None]
"""From an answer and the row's choices to the choice's index; none where the answer is nothing of the kind."""


@dataclass(frozen=True)
class ChoiceColumns:
    """Where a file keeps its choices.

    Attributes:
        names: One column of lists, or a column a choice.
        is_list: Which of the two.
    """

    names: tuple[str, ...]
    is_list: bool

    @property
    def as_list(self) -> str:
        """The row's choices in a template."""
        return self.names[0] if self.is_list else f"[{', '.join(self.names)}]|reject('in', [none, ''])|list"

    @property
    def template(self) -> str:
        """A card's ``doc_to_choice``."""
        return self.names[0] if self.is_list else f"{{{{ {self.as_list} }}}}"

    def read(self, row: dict[str, Any], where: str) -> list[str]:
        """Return a row's choices as texts.

        Raises:
            DataError: If they are no list of two texts or more, or one is empty.
        """
        if not self.is_list:
            values = [row[name] for name in self.names]
            while values and values[-1] in (None, ""):  # rows may have fewer choices than the file has columns
                values.pop()
        else:
            values = row[self.names[0]]
            if isinstance(values, str):
                values = parse_literal(values)  # as a csv holds a list
        what = ", ".join(self.names)
        if not isinstance(values, list) or any(isinstance(value, (dict, list)) for value in values):
            raise DataError(f"{where}: {what} is not a list of texts (got {str(row[self.names[0]])[:60]!r})")
        if any(value in (None, "") for value in values):
            raise DataError(f"{where}: {what}: a choice is empty")
        if len(values) < _MIN_CHOICES:
            raise DataError(f"{where}: {what}: expected two choices or more, got {len(values)}")
        return [str(value) for value in values]


def find_choice_columns(columns: Sequence[str]) -> ChoiceColumns | None:
    """Return the columns that hold choices: ``choices`` or ``options``, or ``choice_a``, ``choice_b`` or the like.

    Example:
        >>> find_choice_columns(["question", "option1", "option2", "answer"]).names
        ('option1', 'option2')
    """
    listed = next((name for name in _LISTS if name in columns), None)
    if listed is not None:
        return ChoiceColumns((listed,), is_list=True)
    found = {name: match for name in columns if (match := _NUMBERED.fullmatch(name))}
    for stem in ("choice", "option"):
        names = [name for name, match in found.items() if match[1].lower() == stem]
        if len(names) >= _MIN_CHOICES:
            return ChoiceColumns(tuple(sorted(names, key=lambda name: _place(found[name][2]))), is_list=False)
    return None


def describe_target(rows: Dataset, answer: str, choices: ChoiceColumns, what: str) -> str:
    """Find out how a file's answers name choices, and return that as a card's ``doc_to_target``.

    Args:
        rows: The file.
        answer: The column of the answers.
        choices: The columns of the choices.
        what: The file, for messages.

    Raises:
        DataError: If a row's choices or answer can't be understood, or the answers could be meant in two ways.
    """
    # (n_rows,) each: answers, and the texts they choose from
    answers = list(rows[answer])
    texts = [choices.read(row, f"{what}: row {i}") for i, row in enumerate(rows.select_columns(list(choices.names)))]
    readings = {name: [read(a, t) for a, t in zip(answers, texts, strict=True)] for name, read in _READINGS.items()}
    complete = {name: found for name, found in readings.items() if None not in found}
    if "text" in complete and all(isinstance(value, str) for value in answers):
        return answer  # a text that stands among the choices means itself
    if not complete:
        raise DataError(_explain_misfit(answers, texts, readings, f"{what}: column {answer!r}"))
    if len({tuple(found) for found in complete.values()}) > 1:
        ways = " or ".join(_MEANINGS[name] for name in complete)
        raise DataError(
            f"{what}: column {answer!r} could hold {ways} (such as {answers[0]!r} in row 0); give the choices' letters "
            "(A, B, ...) or their texts"
        )
    if "text" in complete and choices.is_list and isinstance(rows[0][choices.names[0]], str):
        raise DataError(
            f"{what}: column {answer!r} holds numbers that are choices themselves; give letters (A, B, ...)"
        )
    return _TEMPLATES[next(iter(complete))].format(answer=answer, choices=choices.as_list)


def _explain_misfit(
    answers: Sequence[Any], texts: Sequence[Sequence[str]], readings: dict[str, list[int | None]], what: str
) -> str:
    """Name the first row that the reading with the fewest misfits can't place, and count the others."""
    name = min(readings, key=lambda key: readings[key].count(None))
    wrong = [i for i, index in enumerate(readings[name]) if index is None]
    more = f" (and {len(wrong) - 1} more rows)" if len(wrong) > 1 else ""
    row = wrong[0]
    listed = ", ".join(map(repr, texts[row]))
    listed = listed if len(listed) <= 100 else f"{listed[:97]}..."
    return (
        f"{what}: row {row}: {answers[row]!r} is no choice of that row{more}; expected the text of one of {listed}, "
        f"its letter A to {string.ascii_uppercase[min(len(texts[row]), 26) - 1]}, or its number counted from 0"
    )


def _read_text(answer: Any, texts: Sequence[str]) -> int | None:
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        return None
    return texts.index(str(answer)) if str(answer) in texts else None


def _read_letter(answer: Any, texts: Sequence[str]) -> int | None:
    letter = answer.strip().lower() if isinstance(answer, str) else ""
    index = string.ascii_lowercase.find(letter) if len(letter) == 1 else -1
    return index if 0 <= index < len(texts) else None


def _read_number(answer: Any, texts: Sequence[str]) -> int | None:
    if isinstance(answer, str) and answer.strip().isdecimal():
        answer = int(answer)
    is_index = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts)
    return int(answer) if is_index else None


def _read_number_from_1(answer: Any, texts: Sequence[str]) -> int | None:
    index = _read_number(answer, ["", *texts])
    return index - 1 if index else None


_READINGS: dict[str, _Read] = {
    "text": _read_text,
    "letter": _read_letter,
    "number": _read_number,
    "number from 1": _read_number_from_1,
}
_MEANINGS = {
    "text": "the choices' texts",
    "letter": "letters",
    "number": "numbers counted from 0",
    "number from 1": "numbers counted from 1",
}
_TEMPLATES = {
    "text": "{{{{ ({choices}|map('string')|list).index({answer}|string) }}}}",  # a bare number would be an index
    "letter": "{{{{ '" + string.ascii_lowercase + "'.index({answer}|trim|lower) }}}}",
    "number": "{{{{ {answer} }}}}",
    "number from 1": "{{{{ {answer}|int - 1 }}}}",
}


def _place(label: str) -> tuple[int, str]:
    return (int(label), "") if label.isdecimal() else (0, label.lower())
