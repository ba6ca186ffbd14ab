"""From a row to an example: the card's fields, as columns or templates.

The semantics are lm-evaluation-harness's. A field that is a column's name gives the column's value; any other text is a
Jinja template. A template for choices renders to a Python list; a target that renders to digits is an index into the
choices, and any other text is looked up among them. Templates run in Jinja's sandbox, and a name that is no column
is an error.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ensemblelora.data.task import Example, TaskCard
from ensemblelora.errors import DataError

__all__ = ["Renderer", "Row", "compile_card", "explode_row", "find_input_columns", "normalize_text", "parse_literal"]

Row = Mapping[str, Any]

_Field = Callable[[Row], Any]


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
    environment = _make_environment()
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
    environment = _make_environment()
    found: set[str] = set()
    for text in (card.doc_to_text, card.doc_to_choice):
        if isinstance(text, str) and text:
            is_template = "{" in text or text.startswith("[")
            found |= _find_names(environment.parse(text)) - set(environment.globals) if is_template else {text}
    return tuple(sorted(found))


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


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = _regex_replace
    return environment


def _regex_replace(text: str, pattern: str, replacement: str = "", count: int = 0) -> str:
    return re.sub(pattern, replacement, text, count=count)


def _check_fields(card: TaskCard, columns: Collection[str], environment: ImmutableSandboxedEnvironment) -> None:
    keys = ("doc_to_text", "doc_to_choice", "doc_to_target", "group")
    fields = {key: getattr(card, key) for key in keys}
    faults: list[str] = []
    unknown: list[str] = []
    for key, text in fields.items():
        if not isinstance(text, str) or text in columns or not text:
            continue
        if "{" not in text and not (key == "doc_to_choice" and text.startswith("[")):
            unknown.append(f"{key}: unknown column {text!r}")  # plain words would be the same for every row
            continue
        try:
            names = _find_names(environment.parse(text)) - set(environment.globals) - set(columns)
        except TemplateSyntaxError as error:
            faults.append(f"{key}: not a valid template ({error.message}): {_shorten(text)}")
            continue
        unknown += [f"{key}: unknown column {name!r}" for name in sorted(names)]
    if unknown:
        faults.append(f"{', '.join(unknown)} (columns: {', '.join(columns)})")
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


def _compile_field(key: str, text: str, columns: Collection[str], environment: ImmutableSandboxedEnvironment) -> _Field:
    if text in columns:
        return lambda row: row[text]
    template = environment.from_string(text)

    def render(row: Row) -> str:
        try:
            return template.render(row)
        except UndefinedError as error:
            raise DataError(f"{key}: {error.message} (columns: {', '.join(columns)})") from None
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{key}: {_one_line(error)}") from None

    return render


def _compile_target(card: TaskCard, columns: Collection[str], environment: ImmutableSandboxedEnvironment) -> _Field:
    if isinstance(card.doc_to_target, int):
        fixed = card.doc_to_target
        return lambda row: fixed
    field = _compile_field("doc_to_target", card.doc_to_target, columns, environment)
    if card.doc_to_target in columns or card.doc_to_choice is None:
        return field

    def render(row: Row) -> Any:
        text = str(field(row)).strip()
        return int(text) if text.isdecimal() else text

    return render


def _compile_choices(
    card: TaskCard, columns: Collection[str], environment: ImmutableSandboxedEnvironment
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
            raise DataError(f"doc_to_choice: expected a list, got {_shorten(value)}")
        names = tuple(_as_text(item, "doc_to_choice") for item in value)
        if len(names) < 2:
            raise DataError(f"doc_to_choice: expected two choices or more, got {_shorten(list(names))}")
        return names  # real data holds rows with the same option twice; they stay

    return render


def _check_choices(names: tuple[str, ...]) -> None:
    if len(names) < 2:
        raise DataError(f"doc_to_choice: expected two choices or more, got {list(names)}")
    if len(set(names)) < len(names):
        raise DataError(f"doc_to_choice: the same choice twice: {_shorten(list(names))}")


def _find_label(value: Any, names: tuple[str, ...]) -> int:
    """Index of the target among the choices."""
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, str) and re.fullmatch(r"\[.*\]|-?\d*\.\d+", value, re.DOTALL):
        value = parse_literal(value)  # a template of a list or a number renders to text
    if isinstance(value, (list, tuple, dict)):
        raise DataError(
            f"the target is a list ({_shorten(value)}): multi-label tasks are not supported, only one choice"
        )
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
        f"label {value!r} is not one of {_shorten(list(names))} (nor an index into them); correct the row, or the "
        "card's doc_to_choice"
    )


def parse_literal(text: str) -> Any:
    """Read a list or number written as text; what is neither stays the text."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _as_answer(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        raise DataError(f"the answer is a list ({_shorten(value)}); pick one, such as {{{{answers[0]}}}}")
    answer = _as_text(value, "doc_to_target")
    if not answer.strip():
        raise DataError("the answer is empty")
    return answer


def _as_text(value: Any, key: str) -> str:
    if value is None:
        raise DataError(f"{key}: the value is missing")
    return value if isinstance(value, str) else str(value)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
