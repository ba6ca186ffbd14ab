"""Which groups compete for a task: its own, and those whose adapters are predicted to answer it best.

Every competitor costs a pass over the task's validation rows. Where each group competes for each task that grows with
n_tasks x m; with a bound it grows with n_tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ensemblelora.config import EnsembleConfig

__all__ = ["choose_candidates"]


def choose_candidates(
    own_groups: Sequence[int], n_groups: int, config: EnsembleConfig, predicted: npt.ArrayLike = ()
) -> tuple[tuple[int, ...], ...]:
    """Choose each task's candidates, in ascending order.

    Args:
        own_groups: The group each task was trained in.
        n_groups: m.
        config: How weights are found, and ``max_candidates``. Equal weights and weights common to all tasks take
            every group; no weights, the own one.
        predicted: Loss of every task under every group's adapter, ``(n_tasks, m)``, from the plan; empty: unknown, and
            every group competes.
    """
    most = config.count_candidates(n_groups)
    if most == 1:
        return tuple((own,) for own in own_groups)
    losses = np.asarray(predicted, dtype=np.float64)
    if most == n_groups or not losses.size:
        return (tuple(range(n_groups)),) * len(own_groups)
    others = [
        [int(g) for g in np.argsort(row, kind="stable") if g != own]
        for own, row in zip(own_groups, losses, strict=True)
    ]
    return tuple(tuple(sorted([own, *some[: most - 1]])) for own, some in zip(own_groups, others, strict=True))
