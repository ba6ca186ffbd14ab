"""Encoded rows one after the other into flat arrays, and what is known of each example: numbers, not objects.

Of many tokens the array is a mapped file without a name, in the folder for temporary files (``TMPDIR``): what memory it
takes is the system's to give and to take back. The file goes with the array.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemblelora.data.splitting import number_values
from ensemblelora.data.task import Example

__all__ = ["Described", "Packed", "Row", "describe_examples", "pack_rows"]

_MOST_HELD = 2**20
"""tokens in memory before they go to a file"""


class Row(NamedTuple):
    """One encoded row.

    Attributes:
        tokens: Its token ids.
        answer_start: Where the answer starts; their number where there is none.
        divisor: What its log-likelihood is divided by.
        n_cut: Tokens that its context lost.
    """

    tokens: Sequence[int]
    answer_start: int
    divisor: float
    n_cut: int


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows back to back: the fields of :class:`Row` as arrays, (n_tokens,) or (n_rows,)."""

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    answer_starts: NDArray[np.int32]
    divisors: NDArray[np.float32]
    n_cut: NDArray[np.int64]

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each row begins, and the last ends: int64 (n_rows + 1,)."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    @property
    def n_read(self) -> NDArray[np.int64]:
        """Tokens of each row that a model reads: int64 (n_rows,). An answer's last one is only predicted."""
        return self.lengths - (self.answer_starts < self.lengths)


@dataclass(frozen=True, eq=False)
class Described:
    """What is known of each example beside its text: (n_examples,) each."""

    labels: NDArray[np.int64]
    n_choices: NDArray[np.int16]
    groups: NDArray[np.int64]
    ids: tuple[str, ...]


class _Tokens:
    """Token ids as they come: few in memory, many in a file."""

    def __init__(self) -> None:
        self._held: array[int] = array("i")
        self._file: Any = None

    def extend(self, tokens: Sequence[int]) -> None:
        self._held.extend(tokens)
        if len(self._held) >= _MOST_HELD:
            self._write()

    def finish(self) -> NDArray[np.int32]:
        """All of them, ``(n_tokens,)``; not to be written to."""
        if self._file is None:
            return _as_numbers(self._held, np.int32)
        self._write()
        with self._file:  # the mapping holds on to it
            return np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), np.int32)

    def _write(self) -> None:
        self._file = self._file or tempfile.TemporaryFile()
        self._held.tofile(self._file)
        self._file.flush()
        self._held = array("i")


def pack_rows(rows: Iterable[Row]) -> Packed:
    """Put rows behind each other as they come."""
    tokens, lengths, starts, divisors, cuts = _Tokens(), array("q"), array("i"), array("f"), array("q")
    for row in rows:
        tokens.extend(row.tokens)
        lengths.append(len(row.tokens))
        starts.append(row.answer_start)
        divisors.append(row.divisor)
        cuts.append(row.n_cut)
    return Packed(
        tokens.finish(),
        _as_numbers(lengths, np.int64),
        _as_numbers(starts, np.int32),
        _as_numbers(divisors, np.float32),
        _as_numbers(cuts, np.int64),
    )


def _as_numbers(values: array[Any], dtype: Any) -> NDArray[Any]:
    """The same memory as numpy's."""
    return np.frombuffer(values, dtype) if values else np.zeros(0, dtype)


def describe_examples(examples: Iterable[Example]) -> Described:
    """Keep of examples what is not text; groups are numbered by where they first occur."""
    labels, n_choices, groups = array("q"), array("h"), array("Q")
    ids: list[str] = []
    for example in examples:
        labels.append(example.label)
        n_choices.append(len(example.choices))
        digest = hashlib.blake2b(example.group.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        groups.append(int.from_bytes(digest, "little"))
        ids.append(example.id)
    return Described(
        _as_numbers(labels, np.int64),
        _as_numbers(n_choices, np.int16),
        number_values(_as_numbers(groups, np.uint64)),
        tuple(ids),
    )
