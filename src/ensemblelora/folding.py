"""Several LoRA adapters folded into one, on their tensors alone.

An adapter is what PEFT saves of it: ``MODULE.lora_A.weight`` A (r, in) and ``MODULE.lora_B.weight`` B (out, r) change
the module's weight by ``scale B A``. Whatever else a state holds (a classifier head) is averaged.

Stacking is exact; truncating is the best approximation of a rank, each module by itself. Cost O((in + out) R^2) a
module, R the stacked rank; a matrix of the module's own size (out, in) is never formed. The paper's boosted adapters
collapse the same way: where outputs are linear in the weights, a sum of outputs is the output of a sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ensemblelora.errors import ModelError, StoreError, TrainingError, UsageError

__all__ = ["State", "Truncated", "list_averaged", "rank_of", "stack_adapters", "truncate"]

State = dict[str, Tensor]
"""an adapter's tensors, keyed as PEFT saves them"""

_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, eq=False)
class Truncated:
    """An adapter of lower rank, and what it leaves out, as shares of Frobenius norms."""

    state: State
    residuals: dict[str, float]
    """by module: norm of what is left out over the norm of the module's whole change"""
    residual: float
    """the same over all modules together"""


def stack_adapters(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float], scale: float) -> State:
    """Return the one adapter, of scale 1, whose change is exactly ``sum_k weights[k] scale B_k A_k``.

    Ranks add up, but adapters that share an A (all of a run with a frozen A; theta0 and the boosters, whose A has no
    gradient there) have their B summed instead, and a B of zeros takes no rank. Where modules end at different ranks,
    zeros fill up to the largest: an adapter has one rank.

    Args:
        states: The adapters, of any ranks, with the same modules.
        weights: One factor each; negative ones count as such.
        scale: ``lora_alpha / r`` of every state.

    Returns:
        A (R, in) and B (out, R) of every module in the states' own precision; other tensors as weighted sums, which
        are averages where the weights sum to one.

    Raises:
        StoreError: If there is no state, or they are not of the same modules.
        ModelError: If a state holds parts of an adapter other than A and B.
        TrainingError: If a number is not finite.
    """
    _check_states(states, weights)
    first = states[0]
    pairs = {
        module: _stack_module(
            [(s[module + _A], s[module + _B], w * scale) for s, w in zip(states, weights, strict=True)]
        )
        for module in _list_modules(first)
    }
    folded = _join(first, pairs)
    for key in list_averaged(first):
        total = sum(weight * state[key].double() for state, weight in zip(states, weights, strict=True))
        folded[key] = torch.as_tensor(total).to(first[key].dtype)
    return folded


def truncate(state: Mapping[str, Tensor], rank: int) -> Truncated:
    """Return the adapter of a lower rank that is nearest in every module (Eckart and Young).

    With B = Q_b R_b and A^T = Q_a R_a, the singular values of B A are those of the small R_b R_a^T; the kept ones are
    split evenly between the new factors. In float64.

    Args:
        state: An adapter of scale 1, as :func:`stack_adapters` gives it.
        rank: Largest rank of the result; at or above the state's own nothing is lost.

    Raises:
        UsageError: If the rank is below 1.
    """
    if rank < 1:
        raise UsageError(f"rank {rank}: expected a whole number from 1 on")
    kept = min(rank, rank_of(state))
    pairs, lost, whole = {}, {}, {}
    for module in _list_modules(state):
        a, b, singular = _truncate_module(state[module + _A], state[module + _B], kept)
        pairs[module] = (a, b)
        lost[module], whole[module] = float(singular[kept:].square().sum()), float(singular.square().sum())
    return Truncated(
        state=_join(state, pairs) | {key: state[key] for key in list_averaged(state)},
        residuals={module: _share(lost[module], whole[module]) for module in pairs},
        residual=_share(sum(lost.values()), sum(whole.values())),
    )


def rank_of(state: Mapping[str, Tensor]) -> int:
    """The largest rank of a state's modules."""
    return max(len(state[module + _A]) for module in _list_modules(state))


def list_averaged(state: Mapping[str, Tensor]) -> list[str]:
    """Keys of the tensors that are no LoRA factors, and are averaged: a classifier head's."""
    return [key for key in state if not key.endswith((_A, _B))]


def _list_modules(state: Mapping[str, Tensor]) -> list[str]:
    return [key.removesuffix(_A) for key in state if key.endswith(_A)]


def _stack_module(factors: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """Stack one module's ``(A, B, weight)``, those of equal A in one place."""
    stacked: list[tuple[Tensor, Tensor]] = []
    for a, b, weight in factors:
        place = next((i for i, (other, _) in enumerate(stacked) if torch.equal(other, a)), None)
        if place is None:
            stacked.append((a, weight * b.double()))
        else:
            stacked[place] = (a, stacked[place][1] + weight * b.double())
    kept = [(a, b) for a, b in stacked if b.any()] or stacked[:1]
    return torch.cat([a.double() for a, _ in kept]), torch.cat([b for _, b in kept], dim=1)


def _truncate_module(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (<= rank, in), B (out, <= rank) and all singular values of ``b @ a``."""
    q_b, r_b = torch.linalg.qr(b.double())  # (out, k), (k, R)
    q_a, r_a = torch.linalg.qr(a.double().T)  # (in, l), (l, R)
    left, singular, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)  # (k, k') (k',) (k', l)
    root = singular[:rank].sqrt()
    return (root[:, None] * right[:rank]) @ q_a.T, q_b @ (left[:, :rank] * root), singular


def _join(like: Mapping[str, Tensor], pairs: Mapping[str, tuple[Tensor, Tensor]]) -> State:
    """Write factors under PEFT's keys, filled up with zeros to one rank, in the precision of ``like``."""
    rank = max(len(a) for a, _ in pairs.values())
    joined: State = {}
    for module, (a, b) in pairs.items():
        more = rank - len(a)
        joined[module + _A] = torch.cat([a, a.new_zeros(more, a.shape[1])]).to(like[module + _A].dtype)
        joined[module + _B] = torch.cat([b, b.new_zeros(len(b), more)], dim=1).to(like[module + _B].dtype)
    return joined


def _share(lost: float, whole: float) -> float:
    return (lost / whole) ** 0.5 if whole else 0.0


def _check_states(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> None:
    if states and states[0] and not _list_modules(states[0]):
        raise ModelError(f"adapter 0: folding knows LoRA's A and B alone, not {next(iter(states[0]))!r}")
    if not states or len(states) != len(weights) or not _list_modules(states[0]):
        raise StoreError(
            f"{len(states)} adapters and {len(weights)} weights: expected one weight for each LoRA adapter"
        )
    for k, state in enumerate(states):
        if different := states[0].keys() ^ state.keys():
            raise StoreError(f"adapter {k}: other modules than adapter 0, such as {min(different)!r}; train both alike")
        unknown = [key for key in list_averaged(state) if "lora_" in key]
        if unknown:
            raise ModelError(f"adapter {k}: folding knows LoRA's A and B alone, not {unknown[0]!r}")
        broken = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise TrainingError(f"adapter {k}: {broken[0]!r} is not finite: it diverged; lower training.learning_rate")
