"""From the relaxation's matrix to exactly m groups: many starts, each improved by moves and swaps, the best kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ensemblelora.grouping.partition import Partition, compute_objective, to_partition
from ensemblelora.seeding import generator_for

__all__ = ["improve_labels", "repair_labels", "round_to_groups"]

FloatArray = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def round_to_groups(
    relaxed: FloatArray, affinity: FloatArray, n_groups: int, *, n_restarts: int = 20, seed: int = 0
) -> Partition:
    """Return a partition into exactly ``n_groups`` groups with a high objective.

    Starts: k-means of the leading eigenvectors (``n_restarts`` times), complete and average linkage, and ``n_restarts``
    random ones. Each is repaired to exactly ``n_groups`` groups and improved by :func:`improve_labels`.

    Args:
        relaxed: X of the relaxation, or any matrix whose leading eigenvectors show the groups, shape ``(n, n)``.
        affinity: Symmetric A, shape ``(n, n)``.
        n_groups: From 1 to n.
        n_restarts: Random starts of each kind.
        seed: The run's seed.
    """
    best, best_value = None, -np.inf
    # Strictly better by more than rounding errors, so that the first of equals wins on every machine.
    margin = 1e-10 * max(float(np.abs(affinity).max()), 1e-300) * len(affinity)
    for start in _starts(relaxed, n_groups, n_restarts, seed):
        labels = improve_labels(affinity, repair_labels(affinity, start, n_groups), n_groups)
        partition = to_partition(labels)
        value = compute_objective(affinity, partition)
        if value > best_value + margin:
            best, best_value = partition, value
    assert best is not None  # linkage always gives a start
    return best


def repair_labels(affinity: FloatArray, labels: Labels, n_groups: int) -> Labels:
    """Fill empty groups with the tasks whose leaving costs the objective least."""
    labels = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    while labels.max() + 1 < n_groups:
        sums, within, sizes = _group_sums(affinity, labels, labels.max() + 1)
        own, diagonal = sums[np.arange(len(labels)), labels], np.diag(affinity)
        rest = (within[labels] - 2 * own + diagonal) / np.maximum(sizes[labels] - 1, 1)
        gains = np.where(sizes[labels] > 1, rest - within[labels] / sizes[labels] + diagonal, -np.inf)
        labels[int(np.argmax(gains))] = labels.max() + 1
    return labels


def improve_labels(affinity: FloatArray, labels: Labels, n_groups: int) -> Labels:
    """Make the best move of a task, or where there is none the best swap of two, until the objective stops rising.

    Args:
        affinity: Symmetric A, shape ``(n, n)``.
        labels: A group per task, all groups 0 to ``n_groups - 1`` in use.
        n_groups: Number of groups, which stays.
    """
    labels, diagonal = labels.copy(), np.diag(affinity)
    margin = 1e-10 * max(float(np.abs(affinity).max()), 1e-300)
    while True:
        sums, within, sizes = _group_sums(affinity, labels, n_groups)
        move = _move_gains(sums, within, sizes, labels, diagonal)
        task, group = np.unravel_index(int(np.argmax(move)), move.shape)
        if move[task, group] > margin:
            labels[task] = group
            continue
        swap = _swap_gains(affinity, sums, within, sizes, labels)
        one, other = np.unravel_index(int(np.argmax(swap)), swap.shape)
        if swap[one, other] <= margin:
            return labels
        labels[one], labels[other] = labels[other], labels[one]


def _group_sums(affinity: FloatArray, labels: Labels, n_groups: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return ``sum_{j in g} A_ij`` per task and group ``(n, m)``, sums within groups ``(m,)``, and sizes ``(m,)``."""
    members = (labels[:, None] == np.arange(n_groups)).astype(np.float64)
    sums = affinity @ members
    return sums, (members * sums).sum(axis=0), members.sum(axis=0)


def _move_gains(
    sums: FloatArray, within: FloatArray, sizes: FloatArray, labels: Labels, diagonal: FloatArray
) -> FloatArray:
    """Return the objective's change if a task joined a group, shape ``(n, m)``; none leave a group of one."""
    own = sums[np.arange(len(labels)), labels]
    left = (within[labels] - 2 * own + diagonal) / np.maximum(sizes[labels] - 1, 1) - (within / sizes)[labels]
    joined = (within + 2 * sums + diagonal[:, None]) / (sizes + 1) - within / sizes
    gains = left[:, None] + joined
    gains[np.arange(len(labels)), labels] = -np.inf
    gains[sizes[labels] == 1] = -np.inf
    return gains


def _swap_gains(
    affinity: FloatArray, sums: FloatArray, within: FloatArray, sizes: FloatArray, labels: Labels
) -> FloatArray:
    """Return the objective's change if two tasks of different groups changed places, shape ``(n, n)``."""
    diagonal, own = np.diag(affinity), sums[np.arange(len(labels)), labels]
    # Group of i with i replaced by j: + 2 sum_{l in C_i} A_jl - 2 A_ij - 2 sum_{l in C_i} A_il + A_ii + A_jj
    visiting = sums[:, labels].T  # (i, j): affinity of j to the group of i
    change = 2 * visiting - 2 * affinity - 2 * own[:, None] + diagonal[:, None] + diagonal
    gains = change / sizes[labels][:, None]
    gains = gains + gains.T
    return np.where(labels[:, None] == labels, -np.inf, gains)


def _starts(relaxed: FloatArray, n_groups: int, n_restarts: int, seed: int) -> Iterator[Labels]:
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.cluster.vq import kmeans2
    from scipy.spatial.distance import squareform

    values, vectors = np.linalg.eigh((relaxed + relaxed.T) / 2)
    embedding = vectors[:, -n_groups:] * np.sqrt(np.maximum(values[-n_groups:], 0.0))  # (n, m)
    norms = np.sqrt(np.maximum(np.diag(relaxed), 1e-12))
    distances = np.clip(1.0 - relaxed / norms[:, None] / norms, 0.0, None)
    condensed = squareform((distances + distances.T) / 2 * ~np.eye(len(relaxed), dtype=bool), checks=False)
    for method in ("average", "complete"):
        yield fcluster(linkage(condensed, method), n_groups, criterion="maxclust").astype(np.int64)
    generator = generator_for(seed, "rounding", n_groups)
    for _ in range(n_restarts):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # empty clusters are repaired
            _, labels = kmeans2(embedding, n_groups, minit="++", rng=generator)
        yield labels.astype(np.int64)
        yield generator.integers(n_groups, size=len(relaxed))
