"""What is wrong with a config, one line a key: where, what arrived, what was expected.

pydantic reports a key that takes several kinds of value once for each kind it tried; here these become one.
"""

from __future__ import annotations

import difflib
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ensemblelora.errors import quote

__all__ = ["list_faults"]

_LIKENESS = 0.5  # low, so that epochs finds num_train_epochs
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
_BOUNDS = {"ge": "from {:g} on", "gt": "above {:g}", "le": "up to {:g}", "lt": "below {:g}"}


def list_faults(error: ValidationError, model: type[BaseModel]) -> list[tuple[str, str]]:
    """Say what is wrong, every key once and in the order they were found.

    Args:
        error: What checking values against ``model`` raised.
        model: The whole config.

    Returns:
        Pairs of the key, its sections before it parted by dots, and the line that names it.

    Example:
        >>> from ensemblelora.config import RunConfig
        >>> try:
        ...     RunConfig(data={"tasks": ["a"]}, grouping={"n_groups": "many"})
        ... except ValidationError as error:
        ...     list_faults(error, RunConfig)
        [('grouping.n_groups', "grouping.n_groups: got 'many': expected auto, or a whole number")]
    """
    found: dict[tuple[str, str], str] = {}
    for fault in error.errors():
        where, kinds = _locate(fault["loc"], model)
        if kinds is None:
            found.setdefault((where, str(fault["type"])), _describe(where, fault, model))
        else:  # the first of the kinds in our unions is a plain word, whose fault has the whole value
            found.setdefault((where, "kinds"), f"{where}: got {quote(fault['input'])}: expected {_say_kinds(kinds)}")
    return [(where, told) for (where, _), told in found.items()]


def _locate(parts: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, Any]:
    """Where a fault is, and the type of the key there if it takes several kinds of value; else none."""
    place: list[str] = []
    kind: Any = model
    for part in parts:
        is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
        if isinstance(part, str) and not is_section:  # no key: the kind that was tried
            return ".".join(place), kind
        field = kind.model_fields.get(part) if is_section else None
        kind = field.annotation if field else None
        place.append(str(part))
    return ".".join(place), None


def _describe(where: str, fault: Any, model: type[BaseModel]) -> str:
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key; {_suggest_key(where, model)}"
    if fault["type"] == "missing":
        return f"{where}: missing"
    if fault["type"] == "value_error":  # raised by a section of ours, or by the whole, about several of its keys
        return ": ".join([*([where] if where else []), str(fault["ctx"]["error"])])
    told = fault["msg"].replace("tuple", "list").replace("Tuple", "List")  # YAML has lists
    return f"{where}: got {quote(fault['input'])}: {told[0].lower()}{told[1:]}"


def _suggest_key(unknown: str, model: type[BaseModel]) -> str:
    """Name the key that was probably meant: the same in another section, or one spelt much alike in this one."""
    parent, _, name = unknown.rpartition(".")
    sections: dict[str, list[str]] = {"": list(model.model_fields)}
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections[key] = list(field.annotation.model_fields)
    same = [f"{section}.{name}".lstrip(".") for section, keys in sections.items() if name in keys]
    close = difflib.get_close_matches(name, sections.get(parent, ()), n=1, cutoff=_LIKENESS)
    found = same or [f"{parent}.{one}".lstrip(".") for one in close]
    hint = f"did you mean {' or '.join(found)}? " if found else ""
    return f"{hint}`ensemblelora config` lists the known ones"


def _say_kinds(kind: Any) -> str:
    """List in words what a key takes.

    Example:
        >>> _say_kinds(Literal["half", "all"] | int | None)
        'half, all, a whole number, or null'
    """
    words = [word for choice in _choices(kind) for word in _say_kind(choice)]
    return ", ".join([*words[:-1], f"or {words[-1]}"]) if len(words) > 1 else words[0]


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _say_kind(kind: Any) -> list[str]:
    origin = get_origin(kind)
    if origin is Literal:
        return [str(value) for value in get_args(kind)]
    if origin is Annotated:
        return [_say_annotated(*get_args(kind))]
    if origin is tuple:
        word = _WORDS.get(get_args(kind)[0], "a value")
        return [f"a list of {word.removeprefix('a ')}s"]
    return [_WORDS.get(kind, str(kind))]


def _say_annotated(kind: Any, *notes: Any) -> str:
    """Say a kind with its bounds, or by the title it has."""
    named = [note.title for note in notes if isinstance(note, FieldInfo) and note.title]
    if named:
        return str(named[0])
    limits = [limit for note in notes for limit in (note.metadata if isinstance(note, FieldInfo) else [note])]
    said = [
        text.format(getattr(limit, name)) for limit in limits for name, text in _BOUNDS.items() if hasattr(limit, name)
    ]
    return " ".join([*_say_kind(kind), *said])
