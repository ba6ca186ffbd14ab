"""What a change cost, beside a run from the beginning.

A full rerun is counted from the ledger of the run that is changed: every stage's FLOPs there, times how many more
tokens its rows have now. Choosing, training and combining are one sum, and the one that counts; tests, the report's
checks and baselines are work that another may not want, and stand in a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ensemblelora.data.encoding import EncodedSplit

__all__ = ["LEARNING", "Costs", "compare_costs", "count_tokens", "scale_rerun"]

LEARNING = ("warmup", "features", "affinity", "group", "train", "boost", "combine")
"""stages that choose, train and combine"""


@dataclass(frozen=True)
class Costs:
    """FLOPs of a change, and of a run of the same tasks from the beginning.

    Attributes:
        flops: Of every stage here.
        rerun_flops: Of every stage of a full rerun.
        learning_share: What choosing, training and combining take here, over what they would take in a rerun.
        total_share: The same of all stages, tests and baselines included.
    """

    flops: Mapping[str, int]
    rerun_flops: Mapping[str, int]
    learning_share: float
    total_share: float


def count_tokens(splits: Iterable[EncodedSplit]) -> int:
    """Tokens that a model reads of some splits, each row once."""
    return sum(int(split.input_lengths.sum()) for split in splits)


def scale_rerun(
    rerun: Mapping[str, int], rows_before: Mapping[str, int], learning: Sequence[EncodedSplit], changed: str
) -> dict[str, int]:
    """Count a full rerun of the changed run, by stage.

    Args:
        rerun: Of the run as it was.
        rows_before: Rows that its tasks were learnt from, by task.
        learning: Training and validation rows now.
        changed: The task that came, went or has other rows; what its rows were long, the present ones tell.
    """
    tokens: dict[str, int] = {}
    counts: dict[str, int] = {}
    for split in learning:
        tokens[split.task] = tokens.get(split.task, 0) + count_tokens([split])
        counts[split.task] = counts.get(split.task, 0) + split.n_examples
    every = sum(tokens.values()) / sum(counts.values())
    one = tokens[changed] / counts[changed] if changed in tokens else every
    before = sum(n * one if name == changed else tokens[name] for name, n in rows_before.items())
    return {stage: round(flops * sum(tokens.values()) / before) for stage, flops in rerun.items()}


def compare_costs(flops: Mapping[str, int], rerun: Mapping[str, int]) -> Costs:
    """Set what was spent beside a rerun."""
    return Costs(
        dict(flops), dict(rerun), _share(flops, rerun, LEARNING), _share(flops, rerun, {*flops, *rerun} - {"report"})
    )


def _share(flops: Mapping[str, int], rerun: Mapping[str, int], stages: Iterable[str]) -> float:
    own, other = (float(np.sum([one.get(stage, 0) for stage in stages])) for one in (flops, rerun))
    return own / other if other else 0.0
