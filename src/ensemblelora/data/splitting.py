"""Which examples go where: cutting splits by group, and keeping a stratified few.

Everything works on positions, strata and groups, before any text is rendered, and depends only on them and a seed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemblelora.seeding import generator_for

__all__ = ["cut_by_group", "deal_groups", "draw_pool", "number_values", "sample_by_group", "subsample"]

_TOTAL = object()  # a stratum no example can be of


def cut_by_group(
    strata: Sequence[Hashable], groups: Sequence[Hashable], fractions: Sequence[float], *, seed: int
) -> tuple[list[int], ...]:
    """Cut examples into parts of given sizes so that no group is in two parts and strata are spread evenly.

    Groups are dealt out, largest first and otherwise in random order, each to the part where it lowers
    ``sum((got - wanted)^2 / wanted)`` most, summed over the strata and the total. The total counts too because small
    strata alone would all be rounded the same way, and a small part could stay empty.

    Args:
        strata: (n_examples,). What to spread evenly, such as labels.
        groups: (n_examples,). What must stay together.
        fractions: Share of each part, above zero; they sum to one, and the first part wins ties.
        seed: Orders groups of equal size.

    Returns:
        Positions in each part, ascending.
    """
    dealt = deal_groups(strata, number_values(groups), fractions, seed=seed)
    return tuple(np.flatnonzero(dealt == part).tolist() for part in range(len(fractions)))


def number_values(values: Sequence[Hashable] | NDArray[Any]) -> NDArray[np.int64]:
    """Number values by where they first occur: int64 (n,). An array's are never objects.

    Example:
        >>> number_values(["b", "a", "b"]).tolist()
        [0, 1, 0]
    """
    if isinstance(values, np.ndarray):
        _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        return rank[inverse.reshape(-1)]
    known: dict[Hashable, int] = {}
    return np.fromiter((known.setdefault(value, len(known)) for value in values), np.int64, len(values))


def deal_groups(
    strata: Sequence[Hashable], groups: NDArray[np.int64], fractions: Sequence[float], *, seed: int
) -> NDArray[np.int8]:
    """As :func:`cut_by_group`, with a few bytes for each example.

    Args:
        strata: (n_examples,). What to spread evenly, such as labels.
        groups: int64 (n_examples,). Numbered by where they first occur.
        fractions: Share of each part.
        seed: Orders groups of equal size.

    Returns:
        The part of each example: int8 (n_examples,).
    """
    strata = _merge_rare(strata)
    sizes = np.bincount(groups)
    by_group, ends = np.argsort(groups, kind="stable"), np.cumsum(sizes)
    shuffled = generator_for(seed, "cut").permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]

    totals: dict[Hashable, int] = {**Counter(strata), _TOTAL: len(strata)}
    wanted = [{stratum: fraction * n for stratum, n in totals.items()} for fraction in fractions]
    missing = [dict(share) for share in wanted]
    dealt, parts = np.empty(len(sizes), np.int8), range(len(fractions))
    for b in order:
        block = by_group[ends[b] - sizes[b] : ends[b]]
        counts: dict[Hashable, int] = {**Counter(strata[position] for position in block), _TOTAL: len(block)}
        gains = [sum(n * (2 * missing[p][s] - n) / wanted[p][s] for s, n in counts.items()) for p in parts]
        chosen = int(np.argmax(gains))
        dealt[b] = chosen
        for stratum, n in counts.items():
            missing[chosen][stratum] -= n
    return dealt[groups]


def sample_by_group(strata: Sequence[Hashable], groups: Sequence[Hashable], fraction: float, *, seed: int) -> list[int]:
    """Keep a share of the examples: whole groups, strata spread evenly, and never nothing.

    Args:
        strata: (n_examples,). What to spread evenly, such as labels.
        groups: (n_examples,). What must stay together.
        fraction: Share of the examples, above 0; 1 keeps all.
        seed: Orders groups of equal size.

    Returns:
        Positions kept, ascending; their number is the share asked for, up to half of a group.
    """
    if fraction >= 1 or not strata:
        return list(range(len(strata)))
    kept, _ = cut_by_group(strata, groups, (fraction, 1 - fraction), seed=seed)
    if kept:
        return kept
    sizes = Counter(groups)
    smallest = min(sizes, key=lambda group: sizes[group])
    return [position for position, group in enumerate(groups) if group == smallest]


def subsample(strata: Sequence[Hashable], limit: int | None, *, seed: int) -> list[int]:
    """Keep ``limit`` examples, each stratum in proportion and none left out where the limit allows.

    Args:
        strata: (n_examples,).
        limit: How many to keep; None keeps all.
        seed: Chooses within each stratum.

    Returns:
        Positions kept, ascending.
    """
    n = len(strata)
    if limit is None or n <= limit:
        return list(range(n))
    merged = _merge_rare(strata)
    generator = generator_for(seed, "subsample")
    members: dict[Hashable, list[int]] = defaultdict(list)
    for position in generator.permutation(n):
        members[merged[position]].append(int(position))
    names = sorted(members, key=str)
    quotas = _share(np.array([len(members[name]) for name in names]), limit)
    return sorted(p for name, quota in zip(names, quotas, strict=True) for p in members[name][:quota])


def draw_pool(n_rows: int, size: int | None, *, seed: int) -> list[int]:
    """Draw rows to look at, ascending, without looking at any: all when ``size`` is None or large enough."""
    if size is None or n_rows <= size:
        return list(range(n_rows))
    return sorted(int(row) for row in generator_for(seed, "pool").choice(n_rows, size, replace=False))


def _share(sizes: NDArray[np.int64], limit: int) -> list[int]:
    # Largest remainder, after one place for each stratum where there is room.
    floor = np.minimum(sizes, 1) if limit >= len(sizes) else np.zeros_like(sizes)
    exact = sizes / sizes.sum() * limit
    quotas = np.maximum(np.floor(exact).astype(np.int64), floor)
    while quotas.sum() > limit:
        quotas[np.argmax(np.where(quotas > floor, quotas - exact, -np.inf))] -= 1
    while quotas.sum() < limit:
        quotas[np.argmax(np.where(quotas < sizes, exact - quotas, -np.inf))] += 1
    return [int(quota) for quota in quotas]


def _merge_rare(strata: Sequence[Hashable]) -> list[Hashable]:
    """Put strata of a single example together: they can't be spread, and free text would make each row its own."""
    counts = Counter(strata)
    return [stratum if counts[stratum] > 1 else None for stratum in strata]
