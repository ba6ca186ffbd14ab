"""Whose rows a batch holds, and what is computed of each row with its own member's weights.

Several members share one pass through the base when a batch holds their rows one member after the other. In: member
names, and how many rows each has. Out: products and scalings of activations in which each member's rows meet its own
tensors. Weights are converted to the base model's precision instead of activations to theirs; gradients still arrive
at the float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["MemberSwitch"]


class MemberSwitch:
    """Whose rows a batch holds: one member's, or several members' in turn."""

    def __init__(self, members: Sequence[str]) -> None:
        self._members: tuple[str, ...] = tuple(members)
        self._row_counts: tuple[int, ...] | None = None
        self._weights: dict[tuple[int, tuple[str, ...]], tuple[Tensor, ...]] = {}

    @property
    def members(self) -> tuple[str, ...]:
        """Their names, in the order of their rows."""
        return self._members

    def use(self, members: Sequence[str], row_counts: Sequence[int] | None = None) -> None:
        """Say whose rows come next.

        Args:
            members: Their names, in the order of their rows.
            row_counts: How many rows of a batch belong to each; none: equally many.
        """
        self._members = tuple(members)
        is_even = row_counts is None or len(set(row_counts)) == 1
        self._row_counts = None if is_even else tuple(row_counts or ())

    def stack(self, layer: Any, dtype: torch.dtype, read: Callable[[str], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Collect the members' weights at a layer, ``(m, ...)`` each; kept while no gradients are on.

        Args:
            layer: What they belong to.
            dtype: The precision to compute in.
            read: Gives one member's tensors.
        """
        key = (id(layer), self._members)
        if not torch.is_grad_enabled() and key in self._weights:
            return self._weights[key]
        own = [read(name) for name in self._members]
        stacked = tuple(torch.stack(tensors).to(dtype) for tensors in zip(*own, strict=True))
        if not torch.is_grad_enabled():
            self._weights[key] = stacked
        return stacked

    def multiply(self, x: Tensor, weights: Tensor, start: Tensor | None = None) -> Tensor:
        """Return ``start + x @ weights``, every row with its own member's weights.

        Args:
            x: ``(tokens, in)``, the members' rows one after the other.
            weights: ``(m, in, out)``
            start: ``(tokens, out)``; or biases, ``(m, 1, out)``; none: zero.

        Returns:
            ``(tokens, out)``
        """
        m, out = len(weights), weights.shape[2]
        if m == 1:
            return _product(x, weights[0], start if start is None or start.dim() == 2 else start[0])
        if self._row_counts is None:
            apart = x.reshape(m, -1, x.shape[1])
            if start is None:
                return torch.bmm(apart, weights).view(-1, out)
            begin = start if start.dim() == 3 else start.reshape(m, -1, out)
            return torch.baddbmm(begin, apart, weights).view(-1, out)
        # One product a member, not one masked product for all: what overflows in one member stays there.
        sizes = self._count_tokens(len(x))
        begins: Sequence[Tensor | None] = [None] * m
        if start is not None:
            begins = start.split(sizes) if start.dim() == 2 else start.unbind()
        pieces = zip(x.split(sizes), weights, begins, strict=True)
        return torch.cat([_product(own, weight, begin) for own, weight, begin in pieces])

    def scale(self, x: Tensor, vectors: Tensor) -> Tensor:
        """Multiply every row's activations by its own member's vector.

        Args:
            x: ``(rows, ..., n)``, the members' rows one after the other.
            vectors: ``(m, n)``
        """
        m = len(vectors)
        if m == 1:
            return x * vectors[0]
        counts = torch.tensor(self._row_counts or [len(x) // m] * m, device=x.device)
        own = vectors.repeat_interleave(counts, dim=0, output_size=len(x))
        return x * own.reshape(len(x), *[1] * (x.dim() - 2), -1)

    def _count_tokens(self, n_tokens: int) -> list[int]:
        counts = self._row_counts or ()
        width = n_tokens // sum(counts)
        return [n_rows * width for n_rows in counts]


def _product(x: Tensor, weight: Tensor, start: Tensor | None) -> Tensor:
    return x @ weight if start is None else torch.addmm(start, x, weight)
