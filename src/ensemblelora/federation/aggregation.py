"""One adapter from many clients': weighted means, exact in the product B A or factor by factor.

In: clients' adapters as vectors, their numbers of rows. Out: :class:`Aggregated`. The mean of products is not the
product of means: ``mean(B) mean(A)`` holds cross terms of clients that never met. ``exact`` stacks the weighted
products, whose sum is exactly the mean change of the weights, and cuts the stack to the adapter's rank by QR and SVD
(:mod:`ensemblelora.folding`); what that leaves out is reported.

The cut product is then split so that A's rows are orthogonal and as long as theta0's together: the size of a client's
step depends on A, which an even split would shrink to the size of the change itself.

Cost: O((in + out) R^2) a module, R the clients times the rank. Slow twin: dense matrices, in
tests/test_federation_aggregation.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ensemblelora.errors import TrainingError
from ensemblelora.federation.adapters import Template, Vector
from ensemblelora.folding import stack_adapters, truncate

__all__ = ["Aggregated", "aggregate"]

_A, _B = ".lora_A.weight", ".lora_B.weight"
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Aggregated:
    """An adapter, and what its rank could not hold.

    Attributes:
        vector: ``(p,)``.
        residual: Norm of what was cut off over the norm of the whole mean change; 0 where nothing was.
    """

    vector: Vector
    residual: float


def aggregate(
    vectors: Sequence[Vector],
    weights: Sequence[float],
    template: Template,
    *,
    how: Literal["exact", "factors"],
    scale: float,
    trains_a: bool = True,
) -> Aggregated:
    """Average adapters.

    Args:
        vectors: In a fixed order: sums are taken in it.
        weights: Of each, such as its rows; they need not sum to one.
        template: What the vectors are made of.
        how: See the module's description.
        scale: ``lora_alpha / r``.
        trains_a: If not, all share theta0's A, and the mean of B is exact by itself.

    Raises:
        TrainingError: If there is nothing to average.
    """
    shares = np.asarray(weights, np.float64)
    if not len(vectors) or not shares.sum() > 0:
        raise TrainingError("federated averaging: no client's adapter to average")
    shares = shares / shares.sum()
    if how == "factors" or not trains_a:
        total = np.zeros(template.size)
        for share, vector in zip(shares, vectors, strict=True):
            total += share * vector.astype(np.float64)
        return Aggregated(total.astype(np.float32), 0.0)
    states = [{name: tensor.double() for name, tensor in template.unpack(v).items()} for v in vectors]
    rank = max(shape[0] for name, shape in template.shapes.items() if name.endswith(_A))
    cut = truncate(stack_adapters(states, shares.tolist(), scale), rank)
    state = _fill(cut.state, template)
    _settle(state, template, scale)
    return Aggregated(template.pack(state), cut.residual)


def _fill(state: dict[str, Tensor], template: Template) -> dict[str, Tensor]:
    """Fill the factors up with zeros to the adapter's rank: a stack of few can have less."""
    filled = {}
    for name, shape in template.shapes.items():
        tensor = state[name].double()
        whole = torch.zeros(shape, dtype=torch.float64)
        whole[tuple(slice(n) for n in tensor.shape)] = tensor
        filled[name] = whole
    return filled


def _settle(state: dict[str, Tensor], template: Template, scale: float) -> None:
    """Split every module's product again: orthogonal rows of A, together as long as theta0's; the rest is B's.

    The cut gives rows of A and columns of B of length ``sqrt(sigma)`` each. Where sigma is zero, theta0's row stays, so
    that training can go on from there.
    """
    start = template.unpack(template.start)
    for name in [name for name in state if name.endswith(_A)]:
        down, up, first = state[name], state[name.removesuffix(_A) + _B], start[name].double()
        length = first.norm() / len(first) ** 0.5
        sizes = down.norm(dim=1)  # (r,)
        is_used = sizes > _TINY * sizes.max().clamp(min=_TINY)
        state[name] = torch.where(is_used[:, None], down / sizes.clamp(min=_TINY)[:, None] * length, first)
        state[name.removesuffix(_A) + _B] = up * (sizes * is_used / (length * scale))[None, :]
