"""Entries of random matrices that are never stored: each is a pure function of (key, row, column).

The bits come from Philox, a counter-based generator: row r of a matrix starts at a counter that depends on r and on
the matrix's width alone, so any block of rows, drawn in any order and for any device, has the same bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

__all__ = ["count_nonzeros", "draw_bits", "draw_nonzeros", "draw_normals"]

_WORDS_PER_COUNTER = 4  # Philox4x64 gives four 64-bit words a step
_MAX_NONZEROS = 4


def draw_bits(key: int, width: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
    """Return fair bits, 0 or 1, of rows ``start:stop``: shape ``(stop - start, width)``."""
    words = _draw_words(key, -(-width // 64), start, stop)
    return np.unpackbits(words.view(np.uint8), axis=1, count=width, bitorder="little")


def draw_normals(key: int, width: int, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Return standard normals of rows ``start:stop``, by inversion of 32-bit uniforms: ``(stop - start, width)``."""
    words = _draw_words(key, -(-width // 2), start, stop)
    uniform = (words.view("<u4")[:, :width].astype(np.float64) + 0.5) / 2.0**32
    return ndtri(uniform).astype(np.float32)


def count_nonzeros(width: int) -> int:
    """Nonzeros in each row of a sparse matrix, s: 4, or all of a narrower one."""
    return min(_MAX_NONZEROS, width)


def draw_nonzeros(key: int, width: int, start: int, stop: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return where the nonzeros of a sparse matrix's rows ``start:stop`` are, and their signs.

    The columns are cut into s stretches of equal length (to one), and each row has one nonzero in each, anywhere in
    it: so a row's columns are distinct without a second try (the block construction of Kane and Nelson, 2014).

    Returns:
        Columns, int32, ascending in each row, and signs, +1 or -1 in float32; both ``(stop - start, s)``.
    """
    n_nonzeros = count_nonzeros(width)
    first = start // 2  # one step of the generator makes two rows
    words = _draw_words(key, _WORDS_PER_COUNTER, first, -(-stop // 2)).view("<u4").reshape(-1, _MAX_NONZEROS)
    words = words[start - 2 * first : stop - 2 * first, :n_nonzeros]
    columns = np.empty(words.shape, np.int32)
    for stretch in range(n_nonzeros):
        begin, end = stretch * width // n_nonzeros, (stretch + 1) * width // n_nonzeros
        # The upper 31 bits of the word, as a fraction of 2**31, choose the place; the lowest bit is the sign.
        columns[:, stretch] = ((words[:, stretch] >> 1).astype(np.int64) * (end - begin) >> 31) + begin
    signs = (words & 1).astype(np.float32)
    signs *= 2.0
    signs -= 1.0
    return columns, signs


def _draw_words(key: int, per_row: int, start: int, stop: int) -> npt.NDArray[np.uint64]:
    """Words of rows ``start:stop``, at least ``per_row`` a row: ``(stop - start, whole steps of the generator)``."""
    counters_per_row = -(-per_row // _WORDS_PER_COUNTER)
    generator = np.random.Philox(key=key, counter=start * counters_per_row)
    words = generator.random_raw((stop - start) * counters_per_row * _WORDS_PER_COUNTER)
    return words.astype("<u8", copy=False).reshape(stop - start, -1)
