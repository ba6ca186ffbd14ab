"""The scores that boosting improves: F of one group, on its training and held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel
from ensemblelora.blocks import FeatureBlock
from ensemblelora.boosting.residual import mean_nll
from ensemblelora.config import BoostingConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.gradients.projection import Projector
from ensemblelora.prediction import predict_members

__all__ = ["BoostTask", "GroupState", "Scores", "Setup"]

Scores = list[npt.NDArray[np.float32]]
"""(n, K) scores of each task"""
Part = Literal["train", "validation"]


@dataclass(frozen=True, eq=False)
class BoostTask:
    """What boosting reads of one task; ``features`` are those of its training rows, in their order."""

    train: EncodedSplit
    validation: EncodedSplit
    features: FeatureBlock


@dataclass(frozen=True, eq=False)
class Setup:
    """What stays the same from round to round."""

    adapted: AdaptedModel
    config: BoostingConfig
    projector: Projector
    max_tokens: int
    seed: int
    meter: Meter

    def predict(self, splits: Sequence[EncodedSplit], members: Sequence[str]) -> list[npt.NDArray[np.float32]]:
        """Scores of each split, ``(members, n, K)``."""
        return [
            predict_members(self.adapted, split, members, max_tokens=self.max_tokens, meter=self.meter).values
            for split in splits
        ]


@dataclass(eq=False)
class GroupState:
    """F of one group and the base's own scores, per task."""

    tasks: Sequence[BoostTask]
    scores: dict[Part, Scores]
    base: dict[Part, Scores]

    @classmethod
    def start(cls, setup: Setup, member: str, tasks: Sequence[BoostTask]) -> GroupState:
        """Take F from the group's own adapter."""
        state = cls(tasks, {}, {})
        for part in ("train", "validation"):
            both = setup.predict(state.splits(part), [member, THETA0])
            state.scores[part] = [values[0] for values in both]
            state.base[part] = [values[1] for values in both]
        return state

    @property
    def n_rows(self) -> int:
        """Training rows of all tasks."""
        return sum(len(scores) for scores in self.scores["train"])

    def splits(self, part: Part) -> list[EncodedSplit]:
        """The tasks' encoded rows."""
        return [task.train if part == "train" else task.validation for task in self.tasks]

    def nll(self, part: Part, scores: Scores | None = None) -> float:
        """Mean over the rows of all tasks, as the training loss counts them; of F, or of other scores."""
        found = self.scores[part] if scores is None else scores
        sizes = [len(split.labels) for split in self.splits(part)]
        means = [mean_nll(values, split.labels) for values, split in zip(found, self.splits(part), strict=True)]
        return float(np.average(means, weights=sizes))

    def add(self, setup: Setup, booster: str, rate: float) -> None:
        """Move F by a booster that was kept."""
        found = {part: [values[0] for values in setup.predict(self.splits(part), [booster])] for part in self.scores}
        self.scores = {part: self.moved(part, new, rate) for part, new in found.items()}

    def moved(self, part: Part, new: Scores, rate: float) -> Scores:
        """F plus ``rate`` times the change from the base to the new adapter; absent choices stay absent."""
        with np.errstate(invalid="ignore"):  # -inf - -inf, where it is not used
            return [
                np.where(np.isfinite(f), f + rate * (z - z0), f)
                for f, z, z0 in zip(self.scores[part], new, self.base[part], strict=True)
            ]
