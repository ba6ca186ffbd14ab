"""From a finished feature store to what an oracle is made of. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from ensemblelora.blocks import slice_projections
from ensemblelora.estimation.oracle import TaskFeatures
from ensemblelora.store import FeatureStore

__all__ = ["read_features"]


def read_features(
    store: FeatureStore, names: Sequence[str], n_projections: int, n_train: tuple[int, ...] | None = None
) -> list[TaskFeatures]:
    """Return every projection's features; they lie side by side in the store.

    Args:
        store: Holds train and validation rows of every task.
        names: The tasks, in their order.
        n_projections: R.
        n_train: Training rows of each task, where the store holds a share of them; none: it holds all.

    Raises:
        StoreError: If features are missing, damaged, or too narrow for so many projections.
    """
    train, validation = ([store.read(name, split) for name in names] for split in ("train", "validation"))
    width = train[0].proj_dim // n_projections
    return [
        TaskFeatures(
            train=tuple(slice_projections(block, width, which) for block in train),
            validation=tuple(slice_projections(block, width, which) for block in validation),
            n_train=n_train,
        )
        for which in range(n_projections)
    ]
