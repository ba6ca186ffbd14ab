"""What can be chosen: whole datasets, or clusters of their training rows.

In: names of datasets, and the clusters that some were cut into. Out: :class:`Source` records; their rows as encoded
splits for training, and as feature blocks for the oracle, in the same order. The target comes first in both: task 0,
whether its own training rows are in every set or are sources like any others. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ensemblelora.blocks import FeatureBlock
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.subset import take_examples
from ensemblelora.errors import UsageError

__all__ = ["Source", "cut_blocks", "cut_splits", "find_target", "list_sources"]

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Source:
    """One thing that can be chosen.

    Attributes:
        name: The dataset's, or with the cluster's number behind it: ``rte/2``.
        task: Index of the dataset.
        rows: Its training rows, ascending; none: all.
    """

    name: str
    task: int
    rows: npt.NDArray[np.int64] | None = None


def find_target(names: Sequence[str], target: str) -> int:
    """Find the target among the datasets.

    Raises:
        UsageError: If it is not there; lists those there are.
    """
    if target not in names:
        raise UsageError(f"--target {target!r}: expected one of the tasks {', '.join(names)}")
    return list(names).index(target)


def list_sources(
    names: Sequence[str], target: int, *, includes_target: bool, clusters: Mapping[int, Labels] | None = None
) -> tuple[Source, ...]:
    """List what can be chosen, dataset by dataset.

    Args:
        names: Of all datasets.
        target: Index of the target, whose rows are no source where they are in every set.
        includes_target: Whether they are.
        clusters: For datasets that were cut, the cluster of every training row ``(n_train,)``, numbered from 0.

    Raises:
        UsageError: If there is nothing to choose from.
    """
    datasets = [task for task in range(len(names)) if task != target or not includes_target]
    if not datasets:
        raise UsageError(
            f"target {names[target]!r}: no sources, the config has no other task; add tasks to data.tasks, or cut the "
            "target's own rows with --by-cluster"
        )
    return tuple(source for task in datasets for source in _cut(names[task], task, (clusters or {}).get(task)))


def cut_splits(splits: Sequence[EncodedSplit], target: int, sources: Sequence[Source]) -> tuple[EncodedSplit, ...]:
    """Return the target's split and the sources' own rows, each under its source's name.

    Args:
        splits: Of all datasets, one part; where it is not the training part, sources get their dataset's whole split.
        target: Index of the target.
        sources: What can be chosen.
    """
    return (splits[target], *(_take_split(splits[source.task], source) for source in sources))


def cut_blocks(blocks: Sequence[FeatureBlock], target: int, sources: Sequence[Source]) -> tuple[FeatureBlock, ...]:
    """Return the features of the same training rows as :func:`cut_splits`."""
    return (blocks[target], *(_take_block(blocks[source.task], source) for source in sources))


def _cut(name: str, task: int, labels: Labels | None) -> Iterator[Source]:
    if labels is None:
        yield Source(name, task)
        return
    for cluster in np.unique(labels):
        yield Source(f"{name}/{cluster}", task, np.flatnonzero(labels == cluster))


def _take_split(split: EncodedSplit, source: Source) -> EncodedSplit:
    if source.rows is None:
        return split
    part = split if split.split != "train" else take_examples(split, source.rows)
    return replace(part, task=source.name)


def _take_block(block: FeatureBlock, source: Source) -> FeatureBlock:
    if source.rows is None:
        return block
    return replace(block.take(source.rows), task=source.name)
