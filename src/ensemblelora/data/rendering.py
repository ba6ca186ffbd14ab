"""From a row to an example: the card's fields, as columns or templates.

The semantics are lm-evaluation-harness's. A field that is a column's name gives the column's value; any other text is a
Jinja template. A template for choices renders to a Python list; a target that renders to digits is an index into the
choices, and any other text is looked up among them. Templates run in Jinja's sandbox, and a name that is no column
is an error.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, UndefinedError, meta, nodes

from ensemblelora.data.sandbox import make_environment
from ensemblelora.data.task import Example, TaskCard
from ensemblelora.errors import DataError, list_nearest, quote

__all__ = [
    "Renderer",
    "Row",
    "as_row",
    "compile_card",
    "explode_row",
    "find_input_columns",
    "normalize_text",
    "parse_literal",
    "read_columns",
    "strip_words",
]

Row = Mapping[str, Any]

_Field = Callable[[Row], Any]

_MOST_CHOICES = 2**15 - 1
_QUOTED_NAME = re.compile("'([^']+)'")
_MOST_DIGITS = 18
_TEMPLATE_ERRORS = (
    *(TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError),
    *(RecursionError, MemoryError),
)


@dataclass(frozen=True, eq=False)
class Renderer:
    """A card's fields, ready to be applied to rows.

    Attributes:
        target: The raw target of a row: a number, or text.
        group: The row's group key, normalised; empty where the card names none.
        example: Renders everything, given the row and its id.
    """

    target: Callable[[Row], Any]
    group: Callable[[Row], str]
    example: Callable[[Row, str], Example]


def compile_card(card: TaskCard, columns: Collection[str]) -> Renderer:
    """Compile a card's templates against the columns of its data.

    The renderer's functions raise DataError, without the task's name: a missing field, a target outside the choices, a
    number with decimals (regression) or a list of labels (multi-label) where one class is expected.

    Args:
        card: The card.
        columns: Names of the data's columns.

    Raises:
        DataError: Names every template that is not valid Jinja, and every name in one that is no column.
    """
    environment = make_environment()
    _check_fields(card, columns, environment)
    text = _compile_field("doc_to_text", card.doc_to_text, columns, environment)
    target = _compile_target(card, columns, environment)
    choices = _compile_choices(card, columns, environment)
    group = _compile_field("group", card.group, columns, environment) if card.group else None

    def render_group(row: Row) -> str:
        return normalize_text(str(group(row))) if group else ""

    def render_example(row: Row, example_id: str) -> Example:
        context = card.description + _as_text(text(row), "doc_to_text")
        if choices is None:
            answer = _as_answer(target(row))
            # lm-evaluation-harness puts no delimiter in front of a loglikelihood target: it brings its own.
            delimiter = card.target_delimiter if card.output_type == "generate_until" else ""
            return Example(example_id, context, (delimiter + answer,), 0, render_group(row) or example_id)
        names = choices(row)
        label = _find_label(target(row), names)
        delimiter = card.target_delimiter if card.head == "lm" else ""
        return Example(
            example_id, context, tuple(delimiter + name for name in names), label, render_group(row) or example_id
        )

    return Renderer(target, render_group, render_example)


def find_input_columns(card: TaskCard) -> tuple[str, ...]:
    """Names of the columns that a card's context and choices can't do without, sorted.

    Example:
        >>> from ensemblelora.data.catalog import find_cards, load_card
        >>> find_input_columns(load_card(find_cards()["rte"]))
        ('hypothesis', 'premise')
    """
    environment = make_environment()
    found: set[str] = set()
    for text in (card.doc_to_text, card.doc_to_choice):
        if isinstance(text, str) and text:
            is_template = "{" in text or text.startswith("[")
            found |= _find_names(environment.parse(text)) - set(environment.globals) if is_template else {text}
    return tuple(sorted(found))


def as_row(card: TaskCard, row: Row | str) -> Row:
    """Let a text stand for the one column that a card reads, or, as a JSON object, for several; values stay as is.

    Raises:
        DataError: If the card reads several columns, or none, and the text is no JSON object that holds these.
    """
    if not isinstance(row, str):
        return row
    columns = find_input_columns(card)
    return {columns[0]: row} if len(columns) == 1 else _parse_object(card.task, columns, row)


def read_columns(cards: Iterable[TaskCard], row: Row | str) -> Row | str:
    """Take a text for columns if it is a JSON object that a card of several columns reads; any other row stays."""
    if isinstance(row, str) and row.lstrip().startswith("{"):
        for card in cards:
            columns = find_input_columns(card)
            with suppress(DataError):
                if len(columns) > 1:
                    return _parse_object(card.task, columns, row)
    return row


def strip_words(card: TaskCard) -> TaskCard:
    """Return the card with its own words left out of the context: what the row brings is left, each value on a line.

    Words inside an expression, such as ``{{ "Q: " + question }}``, stay.

    Example:
        >>> from ensemblelora.data.catalog import find_cards, load_card
        >>> strip_words(load_card(find_cards()["rte"])).doc_to_text.split()
        ['{{premise}}', '{{hypothesis}}']
    """
    text = card.doc_to_text
    if "{" in text:
        pieces = make_environment().lex(text)
        text = "".join("\n" if kind == "data" else value for _, kind, value in pieces)
    return card.model_copy(update={"doc_to_text": text, "description": ""})


def explode_row(row: Row, path: str | None) -> Iterator[Row]:
    """Yield one row for every innermost element of the nested lists along a dotted path.

    Along the path, each list is replaced by one of its elements, so templates name the elements as they would the
    lists: with ``passage.questions.answers``, ``{{passage.questions.answers.text}}`` is the text of one answer.

    Args:
        row: Column values.
        path: The path; None yields the row as it is.

    Raises:
        DataError: If a part of the path is missing.

    Example:
        >>> list(explode_row({"id": 7, "qs": [{"as": ["x", "y"]}, {"as": ["z"]}]}, "qs.as"))
        [{'id': 7, 'qs': {'as': 'x'}}, {'id': 7, 'qs': {'as': 'y'}}, {'id': 7, 'qs': {'as': 'z'}}]
    """
    if path is None:
        yield row
        return
    name, _, rest = path.partition(".")
    if not isinstance(row, Mapping) or name not in row:
        known = ", ".join(sorted(row)) if isinstance(row, Mapping) else "no fields here"
        raise DataError(f"explode: no field {name!r}; known: {known}")
    value = row[name]
    for element in value if isinstance(value, list) else [value]:
        for inner in explode_row(element, rest) if rest else [element]:
            yield {**row, name: inner}


def normalize_text(text: str) -> str:
    """Fold case and whitespace, for comparing texts."""
    return " ".join(text.split()).casefold()


def _parse_object(task: str, columns: Sequence[str], text: str) -> Row:
    """Read a text as a JSON object with the columns of a task."""
    example = json.dumps(dict.fromkeys(columns, "..."))
    advice = f"its text is made of the columns {', '.join(columns)}; give a JSON object with these: {example}"
    if not text.lstrip().startswith("{"):
        raise DataError(f"task {task!r}: {advice}")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"task {task!r}: not valid JSON ({_one_line(error)}); {advice}") from None
    if missing := [column for column in columns if column not in values]:
        raise DataError(f"task {task!r}: no {' and no '.join(missing)} in {quote(text)}; {advice}")
    return dict(values)


def _check_fields(card: TaskCard, columns: Collection[str], environment: Environment) -> None:
    keys = ("doc_to_text", "doc_to_choice", "doc_to_target", "group")
    fields = {key: getattr(card, key) for key in keys}
    faults: list[str] = []
    unknown: dict[str, list[str]] = {}
    for key, text in fields.items():
        if not isinstance(text, str) or text in columns or not text:
            continue
        if "{" not in text and not (key == "doc_to_choice" and text.startswith("[")):
            unknown.setdefault(text, []).append(key)  # plain words would be the same for every row
            continue
        try:
            names = _find_names(environment.parse(text)) - set(environment.globals) - set(columns)
        except TemplateSyntaxError as error:
            faults.append(f"{key}: not a valid template ({error.message}): {quote(text)}")
            continue
        except (ValueError, RecursionError) as error:
            faults.append(f"{key}: not a valid template ({_one_line(error)}): {quote(text)}")
            continue
        for name in sorted(names):
            unknown.setdefault(name, []).append(key)
    if unknown:
        told = ", ".join(f"{' and '.join(keys)}: unknown column {quote(name)}" for name, keys in unknown.items())
        faults.append(f"{told} (columns: {list_nearest(columns, list(unknown))})")
    if faults:
        raise DataError("; ".join(faults))


def _find_names(template: nodes.Template) -> set[str]:
    """Names a template can't do without; one that it tests for or gives a default may be missing."""
    optional = {
        node.node.name
        for node in template.find_all((nodes.Test, nodes.Filter))
        if node.name in ("defined", "undefined", "default", "d") and isinstance(node.node, nodes.Name)
    }
    return meta.find_undeclared_variables(template) - optional


def _compile_field(key: str, text: str, columns: Collection[str], environment: Environment) -> _Field:
    if text in columns:
        return lambda row: row[text]
    template = _compile_template(key, text, environment)

    def render(row: Row) -> str:
        try:
            return template.render(row)
        except UndefinedError as error:
            named = list_nearest(columns, _QUOTED_NAME.findall(error.message or ""))
            raise DataError(f"{key}: {error.message} (columns: {named})") from None
        except _TEMPLATE_ERRORS as error:
            raise DataError(f"{key}: {_one_line(error)}") from None

    return render


def _compile_template(key: str, text: str, environment: Environment) -> Template:
    try:
        return environment.from_string(text)
    except (TemplateError, SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        # What Jinja parses may still be more than Python compiles, such as thirty loops inside each other.
        raise DataError(f"{key}: not a valid template ({_one_line(error)}): {quote(text)}") from None


def _compile_target(card: TaskCard, columns: Collection[str], environment: Environment) -> _Field:
    if isinstance(card.doc_to_target, int):
        fixed = card.doc_to_target
        return lambda row: fixed
    field = _compile_field("doc_to_target", card.doc_to_target, columns, environment)
    if card.doc_to_target in columns or card.doc_to_choice is None:
        return field

    def render(row: Row) -> Any:
        text = str(field(row)).strip()
        return int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else text

    return render


def _compile_choices(
    card: TaskCard, columns: Collection[str], environment: Environment
) -> Callable[[Row], tuple[str, ...]] | None:
    spec = card.doc_to_choice
    if spec is None:
        return None
    if not isinstance(spec, str):
        fixed = tuple(spec.values() if isinstance(spec, dict) else spec)
        _check_choices(fixed)
        return lambda row: fixed
    field = _compile_field("doc_to_choice", spec, columns, environment)

    def render(row: Row) -> tuple[str, ...]:
        value = field(row)
        if isinstance(value, str):
            value = parse_literal(value)
        if not isinstance(value, (list, tuple)):
            raise DataError(f"doc_to_choice: expected a list, got {quote(value)}")
        names = tuple(_as_text(item, "doc_to_choice") for item in value)
        _check_number(names)
        return names  # real data holds rows with the same option twice; they stay

    return render


def _check_choices(names: tuple[str, ...]) -> None:
    _check_number(names)
    if len(set(names)) < len(names):
        raise DataError(f"doc_to_choice: the same choice twice: {quote(list(names))}")


def _check_number(names: tuple[str, ...]) -> None:
    if len(names) < 2:
        raise DataError(f"doc_to_choice: expected two choices or more, got {quote(list(names))}")
    if len(names) > _MOST_CHOICES:
        raise DataError(f"doc_to_choice: {len(names):,} choices, at most {_MOST_CHOICES:,} can be told apart")


def _find_label(value: Any, names: tuple[str, ...]) -> int:
    """Index of the target among the choices."""
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, str) and re.fullmatch(r"\[.*\]|-?\d*\.\d+", value, re.DOTALL):
        value = parse_literal(value)  # a template of a list or a number renders to text
    if isinstance(value, (list, tuple, dict)):
        raise DataError(f"the target is a list ({quote(value)}): multi-label tasks are not supported, only one choice")
    if isinstance(value, float):
        raise DataError(
            f"the target is the number {value}: regression is not supported, only classes; bin the values, or give "
            "whole numbers from 0"
        )
    if value is None:
        raise DataError("the target is missing")
    if isinstance(value, int) and 0 <= value < len(names):
        return int(value)
    raise DataError(
        f"label {quote(value)} is not one of {quote(list(names))} (nor an index into them); correct the row, or the "
        "card's doc_to_choice"
    )


def parse_literal(text: str) -> Any:
    """Read a list or number written as text; what is neither stays the text."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _as_answer(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        raise DataError(f"the answer is a list ({quote(value)}); pick one, such as {{{{answers[0]}}}}")
    answer = _as_text(value, "doc_to_target")
    if not answer.strip():
        raise DataError("the answer is empty")
    return answer


def _as_text(value: Any, key: str) -> str:
    if value is None:
        raise DataError(f"{key}: the value is missing")
    return value if isinstance(value, str) else str(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
