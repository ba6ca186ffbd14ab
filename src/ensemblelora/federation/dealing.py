"""Who takes part in which round of federated averaging, for trainings and for their simulation alike. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ensemblelora.seeding import generator_for

__all__ = ["deal_clients"]


def deal_clients(
    groups: Sequence[Sequence[int]], *, participation: float, n_epochs: int, seed: int, name: str
) -> list[list[npt.NDArray[np.int64]]]:
    """Say who takes part in each round: for every group, clients of each round.

    Args:
        groups: Clients of each.
        participation: Share of a group in one round; at least one client.
        n_epochs: How often each client takes part.
        seed: The federation's.
        name: Of the training.

    Returns:
        ``[group][round]``, ascending indices; groups may have different numbers of rounds.
    """
    dealt = []
    for g, group in enumerate(groups):
        generator = generator_for(seed, "rounds", name, g)
        n_parts = math.ceil(len(group) / max(1, round(participation * len(group))))
        rounds = []
        for _ in range(n_epochs):
            order = generator.permutation(np.asarray(sorted(group), np.int64))
            rounds += [np.sort(part) for part in np.array_split(order, n_parts)]
        dealt.append(rounds)
    return dealt
