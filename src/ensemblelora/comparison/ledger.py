"""What each method of a comparison cost, over its seeds. No torch.

In: records. Out: :class:`MeanCosts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemblelora.comparison.record import MethodRecord, TaskRows

__all__ = ["MeanCosts", "add_costs"]


@dataclass(frozen=True)
class MeanCosts:
    """Means over seeds; the highest of peaks.

    Attributes:
        train_flops: Everything fine-tuned for the method.
        select_flops: Deciding what to train.
        infer_flops: A prediction, in the mean over tasks: as many passes as the method takes there.
        seconds: Training and deciding, measured.
        peak_memory_bytes: The process's highest in what was done for it.
        added_memory_bytes: The highest above what was resident when a part of it began.
        n_bytes: What it keeps beside the base model.
        forward_passes: Of a prediction.
        grid_flops: The other learning rates that were tried on the first seed.
        grid_seconds: Likewise.
    """

    train_flops: float
    select_flops: float
    infer_flops: float
    seconds: float
    peak_memory_bytes: float
    added_memory_bytes: float
    n_bytes: float
    forward_passes: float
    grid_flops: float
    grid_seconds: float

    @property
    def flops(self) -> float:
        """To make it: training and deciding."""
        return self.train_flops + self.select_flops


def add_costs(tasks: Sequence[TaskRows], records: Sequence[MethodRecord]) -> MeanCosts:
    """Average a method's costs over its seeds, and add up what choosing its learning rate took besides.

    Args:
        tasks: For what a pass over a test row costs.
        records: The method's, at least one.
    """

    def mean(name: str) -> float:
        return float(np.mean([record.costs[name] for record in records]))

    lower, upper = (float(np.mean([getattr(task, f"{part}_flops") for task in tasks])) for part in ("lower", "upper"))
    others = [t for record in records for t in record.trials if t.learning_rate != record.learning_rate]
    passes = mean("forward_passes")
    return MeanCosts(
        train_flops=mean("train_flops"),
        select_flops=mean("select_flops"),
        infer_flops=lower + passes * upper,
        seconds=mean("seconds"),
        peak_memory_bytes=float(max(record.costs["peak_memory_bytes"] for record in records)),
        added_memory_bytes=float(max(record.costs.get("added_memory_bytes", 0) for record in records)),
        n_bytes=mean("n_bytes"),
        forward_passes=passes,
        grid_flops=float(sum(trial.train_flops + trial.select_flops for trial in others)),
        grid_seconds=float(sum(trial.seconds for trial in others)),
    )
