"""How alike adapters are: subspaces and directions of the weights' changes, without a matrix of the weights' size.

In: adapters' tensors, keyed as PEFT saves them. Out: :class:`Similarity`. LoRA changes a weight (out, in) by B A; with
B = Q_b R_b and A^T = Q_a R_a, the singular vectors of B A are Q_b and Q_a times those of the small R_b R_a^T, and the
overlap of two such subspaces is a product of r by r. Cost O((out + in) r^2) a module; the slow twin in the tests takes
the singular value decomposition of B A itself.

A bottleneck's two matrices (down (k, h), up (h, k)) are compared as they are: what they read from and write to the
residual stream stands for the two subspaces. Their k hidden units are no subspace: k rows of k units always overlap.

All adapters of a run begin at the same theta0. What they read (A, down) has barely left it after a short training, so
that side's overlap is near one whatever was learnt; both sides are therefore told apart, beside their mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ensemblelora.comparison.likeness import compare_adapters
from ensemblelora.errors import ModelError, StoreError
from ensemblelora.folding import stack_adapters

__all__ = ["Similarity", "average_states", "measure_similarity"]

State = Mapping[str, Tensor]

_LORA = (".lora_B.weight", ".lora_A.weight")
_BOTTLENECK = (".bottleneck_up.weight", ".bottleneck_down.weight")
"""what writes (n_out, r), and what reads (r, n_in)"""
_RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest are rounding errors, and their vectors accidents."""


@dataclass(frozen=True)
class Similarity:
    """Two adapters, means over modules.

    Attributes:
        overlap: ``(||U1^T U2||^2 + ||V1^T V2||^2) / (2 r)`` of the top r singular vectors, in [0, 1].
        left: The first term over r: what the changes write.
        right: The second term over r: what they read.
        chance: The overlap that random subspaces of these sizes have on average.
        cosine: Between the changes from theta0 of all modules together.
        n_modules: Modules compared.
    """

    overlap: float
    left: float
    right: float
    chance: float
    cosine: float
    n_modules: int


def measure_similarity(one: State, other: State, start: State, *, rank: int) -> Similarity:
    """Compare two adapters.

    Args:
        one: An adapter's tensors.
        other: Another's with the same modules, of any rank.
        start: theta0's, from which both began.
        rank: r: of more singular vectors, those of the largest values count; modules of fewer have fewer.

    Raises:
        ModelError: If the adapters are neither LoRA nor bottlenecks.
        StoreError: If they have different modules, or one of them changes nothing.

    Reference:
        Paper, appendix B.6 and figure 12; docs/paper.md, row "adapter similarity".
    """
    overlaps = [
        (_overlap(u, other_u), _overlap(v, other_v), _chance(u, other_u), _chance(v, other_v))
        for (u, v), (other_u, other_v) in _pair_up(_list_factors(one), _list_factors(other), rank)
    ]
    left, right, chance_left, chance_right = (float(np.mean(column)) for column in zip(*overlaps, strict=True))
    return Similarity(
        overlap=(left + right) / 2,
        left=left,
        right=right,
        chance=(chance_left + chance_right) / 2,
        cosine=float(compare_adapters([one, other], start)[0, 1]),
        n_modules=len(overlaps),
    )


def average_states(states: Sequence[State]) -> dict[str, Tensor]:
    """Average adapters: LoRA's changes B A exactly, at the sum of the ranks; other tensors one by one.

    Raises:
        StoreError: If there is no state, or they have different modules.
    """
    if states and any(key.endswith(_LORA) for key in states[0]):
        return stack_adapters(states, [1.0 / len(states)] * len(states), 1.0)
    if not states or any(state.keys() != states[0].keys() for state in states):
        raise StoreError(f"{len(states)} adapters to average: expected one or more, all of the same modules")
    return {key: torch.stack([state[key].double() for state in states]).mean(dim=0).float() for key in states[0]}


def _list_factors(state: State) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """What writes ``(n_out, r)`` and what reads ``(r, n_in)`` of every module, and whether their product is a matrix.

    Raises:
        ModelError: If there are no such parts.
    """
    found: dict[str, tuple[Tensor, Tensor, bool]] = {}
    for write, read in (_LORA, _BOTTLENECK):
        modules = [key.removesuffix(write) for key in state if key.endswith(write)]
        found |= {m: (state[m + write].double(), state[m + read].double(), write == _LORA[0]) for m in modules}
    if not found:
        raise ModelError("adapter similarity: defined for LoRA and bottleneck adapters, whose matrices span subspaces")
    return found


def _pair_up(
    one: Mapping[str, tuple[Tensor, Tensor, bool]], other: Mapping[str, tuple[Tensor, Tensor, bool]], rank: int
) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Bases of both adapters' subspaces, module by module."""
    if one.keys() != other.keys():
        raise StoreError(f"adapters of different modules, such as {min(one.keys() ^ other.keys())!r}; train both alike")
    for module, factors in one.items():
        bases = [_find_bases(*own, rank) for own in (factors, other[module])]
        if any(basis.shape[1] == 0 for pair in bases for basis in pair):
            raise StoreError(f"module {module!r}: an adapter that changes nothing spans no subspace; train it first")
        yield bases[0], bases[1]


def _find_bases(write: Tensor, read: Tensor, is_product: bool, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal bases U ``(n_out, <= rank)`` and V ``(n_in, <= rank)`` of the top singular vectors."""
    if not is_product:
        return _find_top(write, rank), _find_top(read.T, rank)
    q_b, r_b = torch.linalg.qr(write)  # (out, k), (k, R)
    q_a, r_a = torch.linalg.qr(read.T)  # (in, l), (l, R)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)  # (k, k') (k',) (k', l)
    kept = _count_kept(values, rank)
    return q_b @ left[:, :kept], q_a @ right[:kept].T


def _find_top(matrix: Tensor, rank: int) -> Tensor:
    """Left singular vectors of a tall matrix, ``(n, <= rank)``."""
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    top: Tensor = left[:, : _count_kept(values, rank)]
    return top


def _count_kept(values: Tensor, rank: int) -> int:
    largest = float(values[0]) if len(values) else 0.0
    return min(rank, int((values > _RANK_TOLERANCE * largest).sum()))


def _overlap(one: Tensor, other: Tensor) -> float:
    """``||U1^T U2||^2`` over the smaller of the two dimensions."""
    return float((one.T @ other).square().sum()) / min(one.shape[1], other.shape[1])


def _chance(one: Tensor, other: Tensor) -> float:
    """Mean of :func:`_overlap` over random subspaces: the larger dimension over that of the space."""
    return max(one.shape[1], other.shape[1]) / len(one)
