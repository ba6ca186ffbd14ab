"""Random projections of gradients that are never stored: every entry is a function of (seed, part, row, column).

``project`` keeps inner products on average, ``E[P P^T] = I``. Errors below are of an inner product, over the product
of the two norms, as a root mean square over P; d is ``proj_dim`` and p' the number of coordinates.

* ``rademacher``: +-1/sqrt(d) everywhere. p' d multiply-adds a gradient. Error 1/sqrt(d), and sqrt(2/d) for parallel
  gradients, the worst case.
* ``gaussian``: N(0, 1/d) everywhere. The same cost and error, but entries ten times as dear to draw.
* ``sjlt``: s = 4 entries +-1/sqrt(s) in each row. p' s multiply-adds, whatever d; the same error. (Projections sliced
  from a wide one share the four; from more than four slices, each sees only some of the coordinates.)
* ``kronecker``: a part's ``(n_out, n_in)`` gradient G becomes ``P_out^T G P_in``, of ``k_out k_in``, about 2 d,
  numbers, and those become d; all three matrices of signs. A side that is small already, such as a LoRA's rank, is
  left alone. ``n_out n_in k_out + k_out k_in d`` multiply-adds where that is ``n_in``: at d = 400, 2.4 times fewer
  than ``rademacher`` for 576 x 8 and 7 times for 4096 x 16, with 5 and 50 times fewer entries to draw. Error near
  1/sqrt(d) where the gradient is spread over parts, since their matrices are independent; the worst case, parallel
  gradients of rank one in a lone part, has the square ``(1 + 2/k_out) (1 + 2/k_in) (1 + 2/d) - 1`` at most (1 in
  place of a factor for a side left alone).
* ``none``: the identity, all parts side by side. No cost, no error.

The factors of ``kronecker`` always meet the finished gradient. To meet a layer's input and output gradients before
their outer product, they would have to take ``n_out k_out`` multiply-adds a token, against the outer product's
``n_out n_in``: that saves work only where both sides are wide, and an adapter's layers have a narrow side.

Source: paper, section 2.2; Johnson and Lindenstrauss (1984), Achlioptas (2003), Kane and Nelson (2014).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ensemblelora.gradients.sketch import AbstractSketch, DenseSketch, KroneckerSketch, SparseSketch
from ensemblelora.seeding import seed_for

__all__ = ["Projector", "choose_factors"]

_SKETCH_FACTOR = 2  # numbers between the factors and the mix of kronecker, in units of proj_dim


@dataclass(frozen=True)
class Projector:
    """P for every part of a model, made anew, block by block, whenever it is used.

    A part is a weight or a bias; its name keys its matrix. ``none`` keeps every coordinate: exact, for small models
    and as the twin that measures the bias.
    """

    proj_type: Literal["rademacher", "gaussian", "sjlt", "kronecker", "none"]
    proj_dim: int
    seed: int

    def project(self, part: str, gradients: Tensor) -> Tensor:
        """Return ``gradients @ P_part``.

        Args:
            part: Name that keys the part's matrix.
            gradients: ``(n, *shape)`` float32, gradients of the part, in its own shape.

        Returns:
            ``(n, proj_dim)`` float32; for ``none`` the gradients themselves, ``(n, size)``.
        """
        flat = gradients.flatten(1)
        return flat if self.proj_type == "none" else self._sketch(part, gradients.shape[1:]).apply(flat)

    def count_flops(self, parts: Iterable[tuple[str, Sequence[int]]]) -> int:
        """FLOPs of projecting one gradient, by the parts' names and shapes; drawing entries is not counted."""
        if self.proj_type == "none":
            return 0
        return sum(self._sketch(part, shape).flops for part, shape in parts)

    def expand(self, part: str, shape: Sequence[int], weights: Tensor) -> Tensor:
        """Return ``P_part @ weights``, the parameter step that ``weights`` stands for.

        Args:
            part: Name that keys the part's matrix.
            shape: The part's own shape.
            weights: ``(proj_dim,)``; for ``none`` the part's own ``(size,)``.

        Returns:
            A step of the part's shape.
        """
        step = weights if self.proj_type == "none" else self._sketch(part, shape).expand(weights)
        return step.reshape(tuple(shape))

    def matrix(
        self, part: str, shape: Sequence[int], start: int = 0, stop: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Return rows ``start:stop`` of P_part; for tests and inspection.

        Args:
            part: Name that keys the part's matrix.
            shape: The part's own shape; a row belongs to each coordinate, in row-major order.
            start: First row.
            stop: End of the rows; none: all.

        Returns:
            ``(stop - start, proj_dim)``; for ``none`` of the identity, ``(stop - start, size)``.
        """
        size = math.prod(shape)
        stop = size if stop is None else stop
        if self.proj_type == "none":
            return np.eye(stop - start, size, start, dtype=np.float32)
        return self._sketch(part, shape).rows(start, stop)

    def _sketch(self, part: str, shape: Sequence[int]) -> AbstractSketch:
        size, width = math.prod(shape), self.proj_dim
        if self.proj_type == "sjlt":
            return SparseSketch(self._key(part), size, width)
        if self.proj_type == "kronecker":
            return self._kronecker_sketch(part, shape)
        return DenseSketch(self._key(part), size, width, "signs" if self.proj_type == "rademacher" else "normals")

    def _kronecker_sketch(self, part: str, shape: Sequence[int]) -> KroneckerSketch:
        n_out, n_in = shape[0], math.prod(shape[1:])
        k_out, k_in = choose_factors(n_out, n_in, self.proj_dim)
        return KroneckerSketch(
            (n_out, n_in),
            DenseSketch(self._key(part, "out"), n_out, k_out) if k_out < n_out else None,
            DenseSketch(self._key(part, "in"), n_in, k_in) if k_in < n_in else None,
            DenseSketch(self._key(part, "mix"), k_out * k_in, self.proj_dim),
        )

    def _key(self, *names: str) -> int:
        return seed_for(self.seed, "projection", self.proj_type, *names)


def choose_factors(n_out: int, n_in: int, proj_dim: int) -> tuple[int, int]:
    """Return the sides ``(k_out, k_in)`` to which ``kronecker`` shrinks a gradient matrix.

    Of the ways to get to about ``2 proj_dim`` numbers (one side left alone, or both shrunk alike), the one whose
    factors add least variance to an inner product in the worst case.

    Example:
        >>> choose_factors(576, 8, 400), choose_factors(192, 4, 400), choose_factors(4096, 4096, 400)
        ((100, 8), (192, 4), (29, 29))
    """
    target = _SKETCH_FACTOR * proj_dim
    side = math.isqrt(target - 1) + 1
    ways = [(min(n_out, side), min(n_in, side))]
    if n_in <= target:
        ways.append((min(n_out, -(-target // n_in)), n_in))
    if n_out <= target:
        ways.append((n_out, min(n_in, -(-target // n_out))))

    def worst_variance(way: tuple[int, int]) -> float:
        return math.prod(1.0 if k == n else 1.0 + 2.0 / k for k, n in zip(way, (n_out, n_in), strict=True))

    return min(ways, key=worst_variance)
