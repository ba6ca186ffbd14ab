"""Parts of one dataset: clusters of its rows by their projected gradients.

In: a feature block. Out: a cluster's number for every row, the largest cluster first. Gradients of the outputs are
clustered, not of the loss: of classes with label-free outputs (``margin``, ``contrast``) they say what a row is about
and not how it is labelled, so that a cluster keeps its classes in proportion, and wrong labels in it are found by what
it does to the target. Rows count by direction alone.

Cost: k-means on n rows of c d numbers, ten starts. No torch.
"""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from ensemblelora.errors import UsageError
from ensemblelora.seeding import seed_for
from ensemblelora.store import FeatureBlock

__all__ = ["cluster_rows", "find_typical"]

_N_STARTS = 10


def cluster_rows(block: FeatureBlock, n_clusters: int, *, seed: int) -> npt.NDArray[np.int64]:
    """Cut rows into clusters of similar direction by k-means on normalised gradients, the best of ten starts.

    Args:
        block: n rows.
        n_clusters: K; fewer are returned where rows have fewer directions.
        seed: The run's root seed.

    Returns:
        Numbers from 0, by falling size and then by the first row, int64 ``(n,)``.

    Raises:
        UsageError: If there are fewer rows than clusters, or less than one cluster is asked for.
    """
    if not 1 <= n_clusters <= block.n_examples:
        raise UsageError(
            f"--by-cluster {n_clusters}: task {block.task!r} has {block.n_examples} training rows; give 1 to "
            f"{block.n_examples}"
        )
    # Here, not at the top: it takes a second to import, and most selections need no clusters.
    from sklearn.cluster import KMeans

    state = seed_for(seed, "selection", "clusters", block.task) % 2**32
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Number of distinct clusters")  # fewer directions than clusters
        found = KMeans(n_clusters, n_init=_N_STARTS, random_state=state).fit(_normalise(block)).labels_
    _, labels, sizes = np.unique(found, return_inverse=True, return_counts=True)
    first = np.full(len(sizes), len(labels))
    np.minimum.at(first, labels, np.arange(len(labels)))
    order = np.lexsort((first, -sizes))
    return np.asarray(np.argsort(order)[labels], dtype=np.int64)


def find_typical(block: FeatureBlock, number: int) -> list[int]:
    """Find the rows that stand for all: those whose direction is nearest to the mean direction; of equals the first.

    Args:
        block: n rows of one cluster.
        number: Fewer are returned where there are fewer rows.
    """
    rows = _normalise(block)
    return [int(e) for e in np.argsort(-(rows @ rows.mean(axis=0)), kind="stable")[:number]]


def _normalise(block: FeatureBlock) -> npt.NDArray[np.float32]:
    """Unit vectors ``(n, c d)``; what is zero stays zero."""
    rows = np.asarray(block.features, dtype=np.float32).reshape(block.n_examples, -1)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0))
