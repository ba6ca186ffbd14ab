"""Random matrices P that are applied block by block, from entries drawn anew: ``G @ P``, ``P @ w``, and rows of P.

:class:`DenseSketch` has a sign or a normal everywhere, :class:`SparseSketch` a few signs in each row, and
:class:`KroneckerSketch` first shrinks each side of a gradient matrix and then is dense. All have ``E[P P^T] = I``.

Extra memory: a few blocks of at most 2**20 entries, whatever the size of P and the number of gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from ensemblelora.gradients.entries import count_nonzeros, draw_bits, draw_nonzeros, draw_normals

__all__ = ["AbstractSketch", "DenseSketch", "KroneckerSketch", "SparseSketch"]

_BLOCK_ENTRIES = 2**20
_DRAWN_NUMBERS = 32  # float32 numbers' worth of memory that drawing one row's nonzeros takes


class AbstractSketch(Protocol):
    """A random ``(size, width)`` matrix P."""

    @property
    def flops(self) -> int:
        """FLOPs of projecting one gradient, a multiply-add as two."""

    def apply(self, gradients: Tensor) -> Tensor:
        """Return ``gradients @ P``: float32 ``(n, size)`` to ``(n, width)``."""

    def expand(self, weights: Tensor) -> Tensor:
        """Return ``P @ weights``: ``(width,)`` to ``(size,)``."""

    def rows(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows ``start:stop`` of P."""


@dataclass(frozen=True)
class DenseSketch:
    """Entries +-1/sqrt(width), or normals of that standard deviation."""

    key: int
    size: int
    width: int
    entries: Literal["signs", "normals"] = "signs"

    @property
    def flops(self) -> int:
        """FLOPs of projecting one gradient."""
        return 2 * self.size * self.width

    def apply(self, gradients: Tensor) -> Tensor:
        """Return ``gradients @ P``: ``(..., size)`` to ``(..., width)``."""
        n_vectors = math.prod(gradients.shape[:-1])
        total = gradients.new_zeros(*gradients.shape[:-1], self.width)
        for start, block in self._blocks(n_vectors, gradients.device):
            total += gradients[..., start : start + len(block)] @ block
        if self.entries == "signs":  # signs are 2 bits - 1: one product with the bits does it
            total.mul_(2.0).sub_(gradients.sum(-1, keepdim=True))
        return total.div_(math.sqrt(self.width))

    def expand(self, weights: Tensor) -> Tensor:
        """Return ``weights @ P^T``: ``(..., width)`` to ``(..., size)``."""
        n_vectors = math.prod(weights.shape[:-1])
        total = torch.cat([weights @ block.T for _, block in self._blocks(n_vectors, weights.device)], dim=-1)
        if self.entries == "signs":
            total.mul_(2.0).sub_(weights.sum(-1, keepdim=True))
        return total.div_(math.sqrt(self.width))

    def rows(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows ``start:stop`` of P."""
        return self.whole_rows(start, stop) / np.float32(math.sqrt(self.width))

    def whole_rows(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows ``start:stop`` of ``sqrt(width) P``, whole numbers where the entries are signs."""
        drawn = self._draw(start, stop).astype(np.float32)
        return np.float32(2.0) * drawn - np.float32(1.0) if self.entries == "signs" else drawn

    def _blocks(self, n_vectors: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, bits or normals), in one buffer: touching fresh memory costs more than drawing."""
        step = max(1, _BLOCK_ENTRIES // max(self.width, n_vectors))
        buffer = torch.empty(min(self.size, step), self.width, device=device)
        for start in range(0, self.size, step):
            drawn = torch.from_numpy(self._draw(start, min(self.size, start + step)))
            yield start, buffer[: len(drawn)].copy_(drawn.to(device))

    def _draw(self, start: int, stop: int) -> npt.NDArray[np.uint8] | npt.NDArray[np.float32]:
        draw = draw_bits if self.entries == "signs" else draw_normals
        return draw(self.key, self.width, start, stop)


@dataclass(frozen=True)
class SparseSketch:
    """s = min(4, width) entries +-1/sqrt(s) in each row (SJLT): width/s times fewer multiplications than dense."""

    key: int
    size: int
    width: int

    @property
    def flops(self) -> int:
        """FLOPs of projecting one gradient on a processor; an accelerator fills the matrix up."""
        return 2 * self.size * count_nonzeros(self.width)

    def apply(self, gradients: Tensor) -> Tensor:
        """Return ``gradients @ P``: ``(n, size)`` to ``(n, width)``; no sum depends on threads or on chance."""
        n_vectors, total = len(gradients), gradients.new_zeros(len(gradients), self.width)
        on_cpu = gradients.device.type == "cpu"
        multiply = _multiply_sparse if on_cpu else _multiply_filled
        for start, columns, signs in self._blocks(n_vectors if on_cpu else max(n_vectors, self.width)):
            total += multiply(gradients[:, start : start + len(columns)], columns, signs, self.width)
        return total.div_(self._scale)

    def expand(self, weights: Tensor) -> Tensor:
        """Return ``P @ weights``: ``(width,)`` to ``(size,)``."""
        pieces = [
            (weights[torch.from_numpy(columns).to(weights.device)] * torch.from_numpy(signs).to(weights)).sum(1)
            for _, columns, signs in self._blocks(1)
        ]
        return torch.cat(pieces).div_(self._scale)

    def rows(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows ``start:stop`` of P."""
        columns, signs = draw_nonzeros(self.key, self.width, start, stop)
        block = np.zeros((stop - start, self.width), np.float32)
        np.put_along_axis(block, columns, signs, axis=1)
        return block / np.float32(self._scale)

    @property
    def _scale(self) -> float:
        return math.sqrt(count_nonzeros(self.width))

    def _blocks(self, n_numbers: int) -> Iterator[tuple[int, npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        """Yield (first row, columns, signs); for each row the caller holds ``n_numbers``, and its draw takes some."""
        step = max(1, _BLOCK_ENTRIES // max(_DRAWN_NUMBERS, n_numbers))
        for start in range(0, self.size, step):
            yield start, *draw_nonzeros(self.key, self.width, start, min(self.size, start + step))


@dataclass(frozen=True)
class KroneckerSketch:
    """``(P_out (x) P_in) P_mix`` for a gradient matrix ``(n_out, n_in)``, flattened: three small dense matrices.

    The factors shrink the matrix's sides to ``k_out`` and ``k_in``, or leave a side as it is; the mix takes the
    ``k_out k_in`` numbers to the width.
    """

    shape: tuple[int, int]
    out_factor: DenseSketch | None
    in_factor: DenseSketch | None
    mix: DenseSketch

    @property
    def flops(self) -> int:
        """FLOPs of projecting one gradient."""
        n_in, (k_out, _) = self.shape[1], self._small_shape
        by_out = n_in * self.out_factor.flops if self.out_factor else 0
        by_in = k_out * self.in_factor.flops if self.in_factor else 0
        return by_out + by_in + self.mix.flops

    def apply(self, gradients: Tensor) -> Tensor:
        """Return ``gradients @ P``: ``(n, n_out n_in)`` to ``(n, width)``."""
        small = gradients.unflatten(1, self.shape)
        if self.out_factor:
            small = self.out_factor.apply(small.mT).mT
        if self.in_factor:
            small = self.in_factor.apply(small)
        return self.mix.apply(small.flatten(1))

    def expand(self, weights: Tensor) -> Tensor:
        """Return ``P @ weights``: ``(width,)`` to ``(n_out n_in,)``."""
        step = self.mix.expand(weights).reshape(self._small_shape)
        if self.in_factor:
            step = self.in_factor.expand(step)
        if self.out_factor:
            step = self.out_factor.expand(step.mT).mT
        return step.flatten()

    def rows(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows ``start:stop`` of P: sums of whole numbers, exact in any order, scaled at the end."""
        out_index, in_index = np.divmod(np.arange(start, stop), self.shape[1])
        out_rows = _factor_rows(self.out_factor, self.shape[0])[out_index]
        in_rows = _factor_rows(self.in_factor, self.shape[1])[in_index]
        small = (out_rows[:, :, None] * in_rows[:, None, :]).reshape(stop - start, -1)  # rows of P_out (x) P_in
        mixed: npt.NDArray[np.float32] = np.matmul(small, self.mix.whole_rows(0, self.mix.size))
        width = math.prod(part.width for part in (self.out_factor, self.in_factor, self.mix) if part)
        return mixed / np.float32(math.sqrt(width))

    @property
    def _small_shape(self) -> tuple[int, int]:
        n_out, n_in = self.shape
        return (
            self.out_factor.width if self.out_factor else n_out,
            self.in_factor.width if self.in_factor else n_in,
        )


def _factor_rows(factor: DenseSketch | None, side: int) -> npt.NDArray[np.float32]:
    return np.eye(side, dtype=np.float32) if factor is None else factor.whole_rows(0, side)


def _multiply_sparse(
    gradients: Tensor, columns: npt.NDArray[np.int32], signs: npt.NDArray[np.float32], width: int
) -> Tensor:
    ends = np.arange(0, columns.size + 1, columns.shape[1], dtype=np.int32)
    block = sparse.csr_array((signs.ravel(), columns.ravel(), ends), shape=(len(columns), width))
    return torch.from_numpy(block.T @ gradients.numpy().T).T


def _multiply_filled(
    gradients: Tensor, columns: npt.NDArray[np.int32], signs: npt.NDArray[np.float32], width: int
) -> Tensor:
    """The same by a dense product, for accelerators: there, adding at indices sums in an order left to chance."""
    block = gradients.new_zeros(len(columns), width)
    index = torch.from_numpy(columns).to(gradients.device, torch.int64)
    return gradients @ block.scatter_(1, index, torch.from_numpy(signs).to(gradients.device))
