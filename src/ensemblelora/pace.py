"""How a run's work divides among its stages, roughly: from tokens alone, without a pass through the model.

A forecast (:mod:`ensemblelora.forecast`) times passes and counts every batch. Here shares are enough: the stages that
are done say how long a token takes, and the shares how long the others will. Writing free text is not told apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from ensemblelora.config import RunConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.stages import Rows

__all__ = ["divide_work"]

_GRADIENT = 3.0
"""a forward and a backward pass, in forward passes"""
_BOOSTING = 7.0
"""passes over the boosted group's rows: its scores, a direction, steps along it"""


def divide_work(config: RunConfig, rows: Rows) -> dict[str, float]:
    """Return every costly stage's work, in tokens of a forward pass.

    Args:
        config: The run.
        rows: Encoded tasks.
    """
    train, validation, test = (_count_tokens(splits) for splits in (rows.train, rows.validation, rows.test))
    gradients, training, n_rounds = config.gradients, config.training, config.boosting.n_rounds
    n_groups = config.grouping.n_groups_asked or config.grouping.list_numbers(len(rows.names))[-1]
    n_checks = 1 + training.num_train_epochs * training.evaluations_per_epoch
    trained = _GRADIENT * training.num_train_epochs * train + n_checks * validation
    n_asked = config.ensemble.count_candidates(n_groups) + n_rounds
    return {
        "features": _GRADIENT * (gradients.train_fraction * train + gradients.validation_fraction * validation),
        "train": trained,
        "boost": n_rounds * _BOOSTING * (train + validation) / n_groups,
        "combine": n_asked * validation,
        "baselines": trained if "shared" in config.evaluation.baselines else 0.0,
        "evaluate": (n_asked + len(config.evaluation.baselines)) * test,
    }


def _count_tokens(splits: Sequence[EncodedSplit]) -> float:
    return float(sum(int(split.row_lengths.sum()) for split in splits))
