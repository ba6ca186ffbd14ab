"""Inner products of gradients without a projection, for fewer rows than coordinates.

With X the ``(N, p')`` matrix of the gradients of all rows, train and validation rows of all tasks together, features F
with ``F F^T = X X^T`` are kept in place of X. A fit whose weights lie in the span of the rows, such as a ridge fit or
any number of gradient steps from zero, meets rows only through their inner products: it predicts with F what it
predicts with X. F is a triangular factor with as many columns d as X has independent rows, at most N. (Penalties are
told in units of the mean curvature over d: the same ridge is a number p' / d times larger with X than with F.)

In: gradients, written to a file in the store's folder as they come. Out: F, ``(N, d)`` float32.
Cost: 2 p' FLOPs for each pair of rows, and N^3 / 3. Disk: 4 N p' bytes, given back at the end. Memory: 12 N^2 bytes and
two blocks of some coordinates.
The columns of F mean something only for all rows together: a row can't be added later, nor a task taken anew by
itself. Whatever changes, all of it is made again (:func:`join_fingerprints`).
Slow twin: numpy on whole gradients, in tests/test_exact.py. No torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.linalg.blas import dsyrk
from scipy.linalg.lapack import dpstrf

from ensemblelora.config import MAX_PROJ_DIM
from ensemblelora.errors import ConfigError, OutputError
from ensemblelora.files import describe_error, fingerprint
from ensemblelora.progress import track

__all__ = [
    "MAX_GRAM_ROWS",
    "FeatureForm",
    "Scratch",
    "choose_form",
    "clear_scratch",
    "compute_gram",
    "factor_gram",
    "gram_bytes",
    "join_fingerprints",
    "measure_error",
    "open_scratch",
    "scratch_bytes",
]

MAX_GRAM_ROWS = 10_000
"""their inner products take 800 MB"""
FeatureForm = Literal["projected", "coordinates", "gram"]

_FOLDER, _FILE = ".gradients.tmp", "gradients.f32"
_BLOCK_BYTES = 2**27
_FACTOR_ROWS = 512
# Of a row's squared norm: what a millionth of its length leaves, which gradients in float32 don't resolve.
_TOLERANCE = 1e-12
_SAMPLE = 21  # rows, 210 pairs

Key = TypeVar("Key")
FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]


def choose_form(proj_type: str, *, n_coordinates: int, n_rows: int) -> FeatureForm:
    """Choose what is kept of each gradient.

    Args:
        proj_type: The config's; ``none`` asks for exact inner products.
        n_coordinates: p'.
        n_rows: N, examples of all splits times their outputs.

    Returns:
        ``projected``; ``coordinates``, all p' of them, where there are no more than rows; otherwise ``gram``, at most N
        numbers.

    Raises:
        ConfigError: If there are too many of both.
    """
    if proj_type != "none":
        return "projected"
    if n_rows < n_coordinates and n_rows <= MAX_GRAM_ROWS:
        return "gram"
    if n_coordinates <= MAX_PROJ_DIM:
        return "coordinates"
    raise ConfigError(
        f"gradients.proj_type none: {n_rows:,} rows (training and validation examples of all tasks, times their "
        f"outputs) of {n_coordinates:,} coordinates; at most {MAX_GRAM_ROWS:,} rows or {MAX_PROJ_DIM:,} coordinates "
        "can be kept exactly; use rademacher, or lower data.max_train_examples and data.max_validation_examples"
    )


def scratch_bytes(n_rows: int, n_coordinates: int) -> int:
    """Disk that the gradients take until their inner products are taken."""
    return 4 * n_rows * n_coordinates


def gram_bytes(n_rows: int) -> int:
    """Memory of all inner products, their factor, and two blocks of coordinates."""
    return 12 * n_rows**2 + 2 * _BLOCK_BYTES


def join_fingerprints(fingerprints: Mapping[Key, str]) -> dict[Key, str]:
    """Make every block's identity depend on all of them, as the blocks of one factor do."""
    everything = fingerprint(sorted(fingerprints.values()))
    return {key: fingerprint(own, everything) for key, own in fingerprints.items()}


@dataclass(frozen=True)
class Scratch:
    """A file of N gradients in float32, mapped to memory a piece at a time.

    A piece is mapped anew whenever it is asked for: what was written to one that is dropped stays in the file, not in
    this process's memory.
    """

    path: Path
    shape: tuple[int, int]
    """(rows, coordinates)"""

    def map_rows(self, start: int, stop: int) -> Float32Array:
        """Rows ``start:stop`` for writing; zeros at first."""
        width = self.shape[1]
        return np.memmap(self.path, np.float32, "r+", offset=4 * start * width, shape=(stop - start, width))

    def map_columns(self, start: int, stop: int) -> Float32Array:
        """Some coordinates of all rows, for reading: ``(rows, stop - start)``."""
        return np.memmap(self.path, np.float32, "r", shape=self.shape)[:, start:stop]

    def blocks(self) -> list[tuple[int, int]]:
        """Ranges of coordinates that fit the memory in float64."""
        n_rows, width = self.shape
        step = max(1, _BLOCK_BYTES // (8 * n_rows))
        return [(start, min(start + step, width)) for start in range(0, width, step)]


@contextmanager
def open_scratch(folder: Path, *, n_rows: int, n_coordinates: int, reserved_bytes: int = 0) -> Iterator[Scratch]:
    """Give room for gradients on disk, all of it at once; it is given back however the body ends.

    Args:
        folder: The store's.
        n_rows: N.
        n_coordinates: p'.
        reserved_bytes: Of the free disk, what others are going to take.

    Raises:
        OutputError: If the disk has no room; nothing is written then.
    """
    clear_scratch(folder)
    n_bytes, path = scratch_bytes(n_rows, n_coordinates), folder / _FOLDER / _FILE
    try:
        try:
            path.parent.mkdir(parents=True)
            free = shutil.disk_usage(folder).free - reserved_bytes
            if n_bytes <= free:
                _reserve(path, n_bytes)
        except OSError as error:
            raise OutputError(f"{path}: can't be written ({describe_error(error)}); choose another place") from None
        if n_bytes > free:
            raise OutputError(
                f"{folder}: gradients.proj_type none needs {n_bytes / 1e9:.1f} GB here for {n_rows:,} gradients of "
                f"{n_coordinates:,} numbers until their inner products are taken, and {max(free, 0) / 1e9:.1f} GB are "
                "free; free some, or use rademacher"
            )
        yield Scratch(path, (n_rows, n_coordinates))
    finally:
        clear_scratch(folder)


def clear_scratch(folder: Path) -> None:
    """Remove what a killed process left of :func:`open_scratch`."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)


def compute_gram(scratch: Scratch) -> FloatArray:
    """Sum the inner products of all rows over blocks of coordinates.

    Returns:
        K = X X^T, ``(N, N)`` in Fortran's order, its lower triangle alone.
    """
    n_rows = scratch.shape[0]
    gram: FloatArray = np.zeros((n_rows, n_rows), order="F")
    for start, stop in track(scratch.blocks(), "inner products"):
        block = scratch.map_columns(start, stop).astype(np.float64)
        gram = dsyrk(1.0, block.T, beta=1.0, c=gram, trans=1, lower=1, overwrite_c=1)  # in place
    return gram


def factor_gram(gram: FloatArray) -> Float32Array:
    """Return F with ``F F^T = K``: a Cholesky factor, the row with the largest remainder first.

    It ends where no row has more than 1e-12 of its squared norm left, so that no inner product is off by more than
    1e-12 of the product of the norms, and rounding F to float32 decides.

    Args:
        gram: K, ``(N, N)``, its lower triangle; it is overwritten.

    Returns:
        ``(N, d)``, d the number of independent rows, at least one.
    """
    norms: FloatArray = np.sqrt(np.diagonal(gram))  # a copy
    scales = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    gram *= scales[:, None]
    gram *= scales
    factor, order, rank, _ = dpstrf(gram, tol=_TOLERANCE, lower=1, overwrite_a=1)
    rank = max(1, int(rank))
    features: Float32Array = np.zeros((len(norms), rank), np.float32)
    for start in range(0, len(norms), _FACTOR_ROWS):
        rows = order[start : start + _FACTOR_ROWS] - 1
        below = np.tril(factor[start : start + len(rows), :rank], k=start)
        features[rows] = norms[rows, None] * below
    return features


def measure_error(scratch: Scratch, features: Float32Array) -> float | None:
    """Median error of the inner products of some rows, over the product of their norms; none without two rows."""
    moving = np.flatnonzero(features.any(axis=1))
    if len(moving) < 2:
        return None
    rows = moving[np.linspace(0, len(moving) - 1, min(_SAMPLE, len(moving))).astype(int)]
    exact: FloatArray = np.zeros((len(rows), len(rows)))
    for start, stop in scratch.blocks():
        block = scratch.map_columns(start, stop)[rows].astype(np.float64)
        exact += block @ block.T
    kept = features[rows].astype(np.float64)
    norms = np.sqrt(np.diagonal(exact))
    errors = np.abs(kept @ kept.T - exact) / np.outer(norms, norms)
    return float(np.median(errors[np.triu_indices(len(rows), k=1)]))


def _reserve(path: Path, n_bytes: int) -> None:
    """Make a file of zeros. Writing to a mapped file on a full disk would kill the process, so all is taken now."""
    with path.open("xb") as stream:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, n_bytes)
        else:
            stream.truncate(n_bytes)
