"""Where cards' templates run: Jinja's sandbox, with bounds on what a single step can make.

A template can read the row it is given and nothing else: no attribute that leads out of it, no file, no import, no
change to the row. Jinja's own sandbox leaves open how large a value may become; here numbers that ask for a large one
are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import Any

from jinja2 import StrictUndefined
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["make_environment"]

_MOST = 100_000
_SEQUENCES = (str, bytes, list, tuple)
_WIDE = re.compile(r"\{[^{}]*:[^{}]*(\d{6,}|\{)|%(\([^)]*\))?[-+ #.\d]*(\d{6,}|\*)")
"""a width of six digits, or one that is another argument"""
_FORMATS = ("format", "format_map")
_UNBOUNDED = ("int", "float", "abs", "default", "d", "string")
"""filters to which data may give large numbers"""


def make_environment() -> ImmutableSandboxedEnvironment:
    """An environment in which a name that is no column is an error, and a value that is missing."""
    environment = _Environment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_refuse_nothing)
    environment.filters = {name: _bounded(name, function) for name, function in environment.filters.items()}
    environment.filters["regex_replace"] = _regex_replace
    return environment


class _Environment(ImmutableSandboxedEnvironment):
    """Looks at the operands of what can make much out of little."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Carry out an operation, or refuse it."""
        if _size_of_result(operator, left, right) > _MOST:
            raise SecurityError(f"{operator} would make more than {_MOST:,} characters or digits")
        if operator == "%" and isinstance(left, str):
            _check_width(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **options: Any) -> Any:
        """Call what a template calls, unless an argument asks for too much."""
        name = getattr(function, "__name__", "call")
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if name in _FORMATS and isinstance(owner, str):
            _check_width(owner)
        elif name != "safe_range":  # which has limits of its own
            _check_numbers(name, (*args, *options.values()))
        return super().call(context, function, *args, **options)


def _refuse_nothing(value: Any) -> Any:
    """What a template shows must be there: a missing value would be read as the word None."""
    if value is None:
        raise SecurityError("a value that it shows is missing (null) in the row")
    return value


def _size_of_result(operator: str, left: Any, right: Any) -> int:
    """Characters, elements or bits that an operation gives; 0 where that is no matter."""
    if operator == "+" and isinstance(left, _SEQUENCES) and isinstance(right, _SEQUENCES):
        return (len(left) + len(right)) // 100  # texts of data may be long
    for sequence, times in ((left, right), (right, left)):
        if operator == "*" and isinstance(sequence, _SEQUENCES) and isinstance(times, int):
            return len(sequence) * max(times, 0)
    if isinstance(left, int) and isinstance(right, int):
        bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}
        return bits.get(operator, 0)
    return 0


def _check_numbers(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MOST:
            raise SecurityError(f"{name}: {value} is more than {_MOST:,}")


def _check_width(text: str) -> None:
    if _WIDE.search(text):
        raise SecurityError("a field's width has six digits or is another field")


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if name in _UNBOUNDED:
        return function

    @wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        if name == "format":
            _check_width(str(args[0]))
        else:
            _check_numbers(name, (*args[1:], *options.values()))
        return function(*args, **options)

    return checked


def _regex_replace(text: str, pattern: str, replacement: str = "", count: int = 0) -> str:
    return re.sub(pattern, replacement, text, count=count)
