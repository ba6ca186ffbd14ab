"""What server and clients tell each other: arrays and plain values, and nothing that could be executed. No torch.

A :class:`Request` names an action; a :class:`Reply` answers it. A server reads a reply only through
:func:`check_reply`, which says what was expected; whatever does not fit is refused, not repaired.

========  =================================================  ====================================================
action    request                                            reply
========  =================================================  ====================================================
hello     nothing                                            ``client``, ``start``, rows of each part
features  nothing                                            rows or moments of train and validation
train     ``start`` (p,); ``members`` (k, p) and ``terms``   ``adapter`` (p,), ``n_examples``, ``loss``
          if a booster is trained
score     ``members`` (k, p); ``methods`` as terms,          ``validation`` and ``test``, losses of each method asked
          ``parts`` and which of them, ``weigh``             for, and last of the weighed ones; ``weights``
tune      ``start`` (p,), ``passes``, ``name``               ``validation`` and ``test``, one loss each; ``train_flops``
========  =================================================  ====================================================

An adapter travels as one vector of its tensors (:mod:`.adapters`), a loss is the mean over a client's rows, in nats.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "PARTS",
    "Action",
    "Arrays",
    "Part",
    "Refusal",
    "Reply",
    "Request",
    "Shape",
    "Term",
    "check_reply",
    "count_bytes",
    "read_count",
    "read_number",
    "shorten",
]

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
"""of a client's rows"""
Action = Literal["hello", "features", "train", "score", "tune"]
Arrays = Mapping[str, npt.NDArray[Any]]
Shape = tuple[int | None, ...]
"""of an expected array; none: any size"""
Term = tuple[int, float]
"""a member, counted from 1 (0 is the base model with the start adapter), and what its output is multiplied with"""

_MAX_TOLD = 200  # characters of a client's own words in our messages


@dataclass(frozen=True, eq=False)
class Request:
    """What a server asks of one client.

    Attributes:
        action: What to do.
        order: The federation's config as JSON, as far as clients need it.
        arrays: By name.
        values: Plain values, as JSON has them.
    """

    action: Action
    order: str
    arrays: Arrays = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Reply:
    """What a client answers; its values tell what it cost, too: ``flops``, ``n_tokens``, ``n_padded_tokens``."""

    arrays: Arrays = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


class Refusal(ValueError):
    """A reply that can't be used; the message says why."""


def check_reply(reply: Reply, expected: Mapping[str, Shape]) -> Reply:
    """Return a reply that has the expected arrays and no others, all of finite floating-point numbers.

    Args:
        reply: As it came.
        expected: Shape of each array.

    Raises:
        Refusal: Says what arrived and what was expected.
    """
    if "error" in reply.values:
        raise Refusal(shorten(reply.values["error"]))
    if set(reply.arrays) != set(expected):
        raise Refusal(f"sent {_list_names(reply.arrays)}, expected {_list_names(expected)}")
    for name, shape in expected.items():
        array = reply.arrays[name]
        fits = len(array.shape) == len(shape) and all(
            want in (None, n) for n, want in zip(array.shape, shape, strict=True)
        )
        if not fits or array.dtype not in (np.float32, np.float64):
            raise Refusal(f"{name} of shape {array.shape} and {array.dtype}, expected {_write_shape(shape)} of float32")
        n_broken = int((~np.isfinite(array)).sum())
        if n_broken:
            raise Refusal(f"{name}: {n_broken} of {array.size} numbers are not finite")
    return reply


def read_count(reply: Reply, name: str, most: int) -> int:
    """Return a whole number that a client claims, no more than ``most``, which is known of it.

    Raises:
        Refusal: If it is no positive whole number.
    """
    value = read_number(reply, name)
    if value < 1 or value != int(value):
        raise Refusal(f"{name} {value:g}, expected a whole number from 1 on")
    return min(int(value), most)


def read_number(reply: Reply, name: str) -> float:
    """Return a finite number that a client states.

    Raises:
        Refusal: If it is none.
    """
    value = reply.values.get(name)
    # A whole number that no float holds is as little use as one that is not finite.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise Refusal(f"{name} {shorten(value)}, expected a finite number")
    return float(value)


def shorten(told: object) -> str:
    """A client's own words, in one line of no great length."""
    return " ".join(str(told)[:_MAX_TOLD].split())


def count_bytes(message: Request | Reply) -> int:
    """Bytes of a message: its arrays' numbers, and its values as JSON."""
    order = len(message.order.encode()) if isinstance(message, Request) else 0
    return (
        order + sum(array.nbytes for array in message.arrays.values()) + len(json.dumps(dict(message.values)).encode())
    )


def _list_names(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(shorten(name) for name in names)) or "no arrays"


def _write_shape(shape: Shape) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"
