"""Random projections that are never stored: every entry is a pure function of (seed, module, row, column).

``project`` estimates inner products, ``E[P P^T] = I``; their relative error is about ``1/sqrt(proj_dim)``
(Johnson-Lindenstrauss). Random bits come from Philox, a counter-based generator: row r of a module's matrix
starts at a counter that depends on r alone, so any block of rows, in any order, on any device, has the same bits.

Cost: 2 rows proj_dim multiply-adds per gradient; memory: one block of at most 2**22 entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import ndtri
from torch import Tensor

from ensemblelora.seeding import seed_for

__all__ = ["Projector"]

_BLOCK_ENTRIES = 2**22
_WORDS_PER_COUNTER = 4  # Philox4x64 gives four 64-bit words a step


@dataclass(frozen=True)
class Projector:
    """P for every module of a model, made anew, block by block, whenever it is used.

    ``none`` keeps every coordinate: exact, for small models and as the twin that measures the bias.
    """

    proj_type: Literal["rademacher", "gaussian", "none"]
    proj_dim: int
    seed: int

    def project(self, module: str, gradients: Tensor) -> Tensor:
        """Return ``gradients @ P_module``.

        Args:
            module: Name that keys the module's matrix.
            gradients: ``(n, rows)`` float32, flattened gradients of the module's weight.

        Returns:
            ``(n, proj_dim)`` float32; for ``none`` the gradients themselves, ``(n, rows)``.
        """
        if self.proj_type == "none":
            return gradients
        total: Tensor = gradients.new_zeros(len(gradients), self.proj_dim)
        for start, block in self._blocks(module, gradients.shape[1], gradients.device):
            piece = gradients[:, start : start + len(block)]
            if self.proj_type == "rademacher":  # signs are 2 bits - 1: one product with the bits does it
                total += 2.0 * (piece @ block) - piece.sum(dim=1, keepdim=True)
            else:
                total += piece @ block
        total /= self.proj_dim**0.5
        return total

    def expand(self, module: str, rows: int, weights: Tensor) -> Tensor:
        """Return ``P_module @ weights``, the parameter step that ``weights`` stands for.

        Args:
            module: Name that keys the module's matrix.
            rows: Number of the module's weights.
            weights: ``(proj_dim,)``; for ``none`` the module's own ``(rows,)``.

        Returns:
            ``(rows,)``.
        """
        if self.proj_type == "none":
            return weights
        pieces: list[Tensor] = []
        for _, block in self._blocks(module, rows, weights.device):
            signed = 2.0 * block - 1.0 if self.proj_type == "rademacher" else block
            pieces.append(signed @ weights)
        step: Tensor = torch.cat(pieces) / self.proj_dim**0.5
        return step

    def matrix(self, module: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows ``start:stop`` of P_module, ``(stop - start, proj_dim)``; for tests and inspection."""
        block = self._draw(module, start, stop).astype(np.float32)
        signed = 2.0 * block - 1.0 if self.proj_type == "rademacher" else block
        return (signed / np.float32(self.proj_dim**0.5)).astype(np.float32)

    def _blocks(self, module: str, rows: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        step = max(1, _BLOCK_ENTRIES // self.proj_dim)
        for start in range(0, rows, step):
            drawn = self._draw(module, start, min(rows, start + step))
            yield start, torch.from_numpy(drawn).to(device).float()

    def _draw(self, module: str, start: int, stop: int) -> npt.NDArray[np.uint8] | npt.NDArray[np.float32]:
        """Bits (0 or 1) or standard normals, ``(stop - start, proj_dim)``."""
        per_word = 64 if self.proj_type == "rademacher" else 2
        words_per_row = -(-self.proj_dim // per_word)
        counters_per_row = -(-words_per_row // _WORDS_PER_COUNTER)
        key = seed_for(self.seed, "projection", self.proj_type, module)
        generator = np.random.Philox(key=key, counter=start * counters_per_row)
        words = generator.random_raw((stop - start) * counters_per_row * _WORDS_PER_COUNTER)
        words = words.astype("<u8", copy=False).reshape(stop - start, -1)
        if self.proj_type == "rademacher":
            return np.unpackbits(words.view(np.uint8), axis=1, count=self.proj_dim, bitorder="little")
        uniform = (words.view("<u4")[:, : self.proj_dim].astype(np.float64) + 0.5) / 2.0**32
        return ndtri(uniform).astype(np.float32)
