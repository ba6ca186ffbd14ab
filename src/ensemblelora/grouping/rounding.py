"""From the relaxation's matrix to exactly m groups: many starts, each improved by moves and swaps, the best kept.

What is moved is a task, or a unit of tasks that stay together. Limits on groups are met from the start on: each start
is taken to the nearest labels that meet them, and a step that would break them is none.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ensemblelora.errors import ConfigError
from ensemblelora.grouping.allowed import find_labels
from ensemblelora.grouping.constraints import Limits
from ensemblelora.grouping.partition import Partition, to_partition
from ensemblelora.seeding import generator_for

__all__ = ["improve_labels", "repair_labels", "round_to_groups"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int64]


def round_to_groups(
    relaxed: FloatArray,
    affinity: FloatArray,
    n_groups: int,
    *,
    n_restarts: int = 20,
    seed: int = 0,
    limits: Limits | None = None,
) -> Partition:
    """Return a partition into exactly ``n_groups`` groups with a high objective.

    Starts: k-means of the leading eigenvectors (``n_restarts`` times), complete and average linkage, and ``n_restarts``
    random ones. Each is repaired to exactly ``n_groups`` groups that meet the limits, and improved by
    :func:`improve_labels`.

    Args:
        relaxed: X of the relaxation, or any matrix whose leading eigenvectors show the groups, shape ``(n, n)``.
        affinity: Symmetric A, shape ``(n, n)``; of units, sums over their tasks.
        n_groups: From 1 to n.
        n_restarts: Random starts of each kind.
        seed: The run's seed.
        limits: Units and what their groups must meet; none: single tasks, and any groups.

    Raises:
        ConfigError: If no partition into so many groups meets the limits.
        SolverError: If that is not settled in half a minute.
    """
    limits = limits or Limits.free(len(affinity))
    best, best_value = None, -np.inf
    # Strictly better by more than rounding errors, so that the first of equals wins on every machine.
    margin = 1e-10 * max(float(np.abs(affinity).max()), 1e-300) * len(affinity)
    for start in _starts(relaxed, n_groups, n_restarts, seed):
        labels = _meet(limits, repair_labels(affinity, start, n_groups, limits), n_groups)
        labels = improve_labels(affinity, labels, n_groups, limits)
        _, within, sizes = _group_sums(affinity, labels, n_groups, limits.sizes)
        value = float((within / sizes).sum())
        if value > best_value + margin:
            best, best_value = to_partition(labels), value
    assert best is not None  # linkage always gives a start
    return best


def repair_labels(affinity: FloatArray, labels: Labels, n_groups: int, limits: Limits | None = None) -> Labels:
    """Fill empty groups with the tasks whose leaving costs the objective least."""
    limits = limits or Limits.free(len(labels))
    labels = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    own_sizes, diagonal = limits.sizes, np.diag(affinity)
    while labels.max() + 1 < n_groups:
        sums, within, sizes = _group_sums(affinity, labels, labels.max() + 1, own_sizes)
        own, left = sums[np.arange(len(labels)), labels], sizes[labels] - own_sizes
        rest = (within[labels] - 2 * own + diagonal) / np.maximum(left, 1)
        gains = np.where(left > 0, rest - within[labels] / sizes[labels] + diagonal / own_sizes, -np.inf)
        labels[int(np.argmax(gains))] = labels.max() + 1
    return labels


def improve_labels(affinity: FloatArray, labels: Labels, n_groups: int, limits: Limits | None = None) -> Labels:
    """Make the best move of a task, or where there is none the best swap of two, until the objective stops rising.

    Args:
        affinity: Symmetric A, shape ``(n, n)``.
        labels: A group per task, all groups 0 to ``n_groups - 1`` in use, that meets the limits.
        n_groups: Number of groups, which stays.
        limits: Units and what their groups must meet; none: single tasks, and any groups.
    """
    limits = limits or Limits.free(len(labels))
    labels = labels.copy()
    margin = 1e-10 * max(float(np.abs(affinity).max()), 1e-300)
    while True:
        sums, within, sizes = _group_sums(affinity, labels, n_groups, limits.sizes)
        meetings = _count_meetings(limits, labels, n_groups)
        move = _move_gains(affinity, sums, within, sizes, labels, limits, meetings)
        task, group = np.unravel_index(int(np.argmax(move)), move.shape)
        if move[task, group] > margin:
            labels[task] = group
            continue
        swap = _swap_gains(affinity, sums, within, sizes, labels, limits, meetings)
        one, other = np.unravel_index(int(np.argmax(swap)), swap.shape)
        if swap[one, other] <= margin:
            return labels
        labels[one], labels[other] = labels[other], labels[one]


def _meet(limits: Limits, labels: Labels, n_groups: int) -> Labels:
    """Return the labels if they meet the limits, or else the nearest that do."""
    if limits.is_free or limits.allows(labels):
        return labels
    nearest = find_labels(limits, n_groups, n_groups, near=labels)
    if nearest is None:
        raise ConfigError(f"no partition of the tasks into {n_groups} groups meets the constraints; loosen them")
    return nearest


def _group_sums(
    affinity: FloatArray, labels: Labels, n_groups: int, own_sizes: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return ``sum_{j in g} A_ij`` per task and group ``(n, m)``, sums within groups ``(m,)``, and sizes ``(m,)``."""
    members = (labels[:, None] == np.arange(n_groups)).astype(np.float64)
    sums = affinity @ members
    return sums, (members * sums).sum(axis=0), own_sizes @ members


def _count_meetings(limits: Limits, labels: Labels, n_groups: int) -> FloatArray | None:
    """Return how many units of each group each unit must be apart from, ``(n, m)``; none where none must."""
    if not limits.cliques:
        return None
    members = (labels[:, None] == np.arange(n_groups)).astype(np.float64)
    return np.asarray(limits.apart.astype(np.float64) @ members)


def _move_gains(
    affinity: FloatArray,
    sums: FloatArray,
    within: FloatArray,
    sizes: FloatArray,
    labels: Labels,
    limits: Limits,
    meetings: FloatArray | None,
) -> FloatArray:
    """Return the objective's change if a task joined a group, shape ``(n, m)``; no step that breaks a limit."""
    everyone, diagonal, own_sizes = np.arange(len(labels)), np.diag(affinity), limits.sizes
    own, left, joined = sums[everyone, labels], sizes[labels] - own_sizes, sizes + own_sizes[:, None]
    leaving = (within[labels] - 2 * own + diagonal) / np.maximum(left, 1) - (within / sizes)[labels]
    joining = (within + 2 * sums + diagonal[:, None]) / joined - within / sizes
    gains = leaving[:, None] + joining
    gains[everyone, labels] = -np.inf
    gains[left < max(limits.min_size, 1)] = -np.inf  # 0: the last of its group
    gains[joined > limits.max_size] = -np.inf
    if meetings is not None:
        gains[meetings > 0] = -np.inf
    return gains


def _swap_gains(
    affinity: FloatArray,
    sums: FloatArray,
    within: FloatArray,
    sizes: FloatArray,
    labels: Labels,
    limits: Limits,
    meetings: FloatArray | None,
) -> FloatArray:
    """Return the objective's change if two tasks of different groups changed places, shape ``(n, n)``."""
    everyone, diagonal, own_sizes = np.arange(len(labels)), np.diag(affinity), limits.sizes
    own = sums[everyone, labels]
    # The group of j with j replaced by i:
    # + 2 sum_{l in C_j} A_il - 2 A_ij - 2 sum_{l in C_j} A_jl + A_ii + A_jj, over s_i - s_j more tasks
    change = 2 * sums[:, labels] - 2 * affinity - 2 * own + diagonal[:, None] + diagonal
    new_sizes = sizes[labels] + own_sizes[:, None] - own_sizes
    gains = (within[labels] + change) / new_sizes - (within / sizes)[labels]
    is_barred = (new_sizes < limits.min_size) | (new_sizes > limits.max_size) | (labels[:, None] == labels)
    if meetings is not None:
        is_barred |= meetings[:, labels] > limits.apart  # others than j itself
    return np.where(is_barred | is_barred.T, -np.inf, gains + gains.T)


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
