"""Many examples without as many objects: they lie in a file without a name, and a piece at a time is in memory.

In: examples, one after the other. Out: a sequence of the same. Few are kept as they are. The file is in the folder for
temporary files (``TMPDIR``) and goes with the sequence, or with the process.
"""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import overload

from ensemblelora.data.task import Example

__all__ = ["MOST_HELD", "PIECE", "StoredExamples", "hold"]

PIECE = 4096
"""examples in memory at a time"""
MOST_HELD = 4 * PIECE
"""examples that are kept as they are"""


def hold(examples: Iterable[Example]) -> Sequence[Example]:
    """Keep examples: as a list where they are few, else in a file."""
    remaining = iter(examples)
    first = list(islice(remaining, MOST_HELD + 1))
    return first if len(first) <= MOST_HELD else StoredExamples(chain(first, remaining))


class StoredExamples(Sequence[Example]):
    """Examples in a file; not to be read by two threads at once."""

    def __init__(self, examples: Iterable[Example]) -> None:
        """Write them."""
        self._file = tempfile.TemporaryFile()  # closed when nobody has this sequence any more
        weakref.finalize(self, self._file.close)
        self._starts = [0]
        self._read: tuple[int, list[Example]] = (-1, [])
        self._n = 0
        remaining = iter(examples)
        while piece := list(islice(remaining, PIECE)):
            plain = [(e.id, e.context, e.choices, e.label, e.group) for e in piece]
            self._starts.append(self._starts[-1] + self._file.write(json.dumps(plain).encode()))
            self._n += len(piece)
        self._file.flush()

    def __len__(self) -> int:
        """How many."""
        return self._n

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Example]: ...

    def __getitem__(self, place: int | slice) -> Example | Sequence[Example]:
        """One, or some."""
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(self._n))]
        if not -self._n <= place < self._n:
            raise IndexError(place)
        piece, position = divmod(place % self._n, PIECE)
        return self._load(piece)[position]

    def __iter__(self) -> Iterator[Example]:
        """All, a piece at a time."""
        for piece in range(len(self._starts) - 1):
            yield from self._load(piece)

    def _load(self, piece: int) -> list[Example]:
        if self._read[0] != piece:
            start, stop = self._starts[piece : piece + 2]
            self._file.seek(start)
            plain = json.loads(self._file.read(stop - start))
            self._read = piece, [Example(i, c, tuple(choices), label, group) for i, c, choices, label, group in plain]
        return self._read[1]
