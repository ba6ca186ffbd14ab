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
from ensemblelora.boosting.residual import mean_nll, row_nll
from ensemblelora.config import BoostingConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.estimation import compute_clustered_se
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


class GroupState:
    """F of one group and the base's own scores, per task; rows are scored when they are first asked about.

    Attributes:
        tasks: The group's.
    """

    def __init__(self, setup: Setup, member: str, tasks: Sequence[BoostTask]) -> None:
        """Take F from the group's own adapter."""
        self.tasks = tasks
        self._setup, self._member = setup, member
        self._scores: dict[Part, Scores] = {}
        self._base: dict[Part, Scores] = {}

    def scores(self, part: Part) -> Scores:
        """F."""
        if part not in self._scores:
            self._scores[part] = self._score(part, self._member)
        return self._scores[part]

    def base(self, part: Part) -> Scores:
        """Scores at theta0; F comes with them in one pass where it was not asked for before."""
        if part not in self._base:
            names = [THETA0] if part in self._scores else [THETA0, self._member]
            found = self._setup.predict(self.splits(part), names)
            self._base[part] = [values[0] for values in found]
            self._scores.setdefault(part, [values[-1] for values in found])
        return self._base[part]

    @property
    def n_rows(self) -> int:
        """Training rows of all tasks."""
        return sum(split.n_examples for split in self.splits("train"))

    def splits(self, part: Part) -> list[EncodedSplit]:
        """The tasks' encoded rows."""
        return [task.train if part == "train" else task.validation for task in self.tasks]

    def nll(self, part: Part, scores: Scores | None = None) -> float:
        """Mean over the rows of all tasks, as the training loss counts them; of F, or of other scores."""
        found = self.scores(part) if scores is None else scores
        sizes = [len(split.labels) for split in self.splits(part)]
        means = [mean_nll(values, split.labels) for values, split in zip(found, self.splits(part), strict=True)]
        return float(np.average(means, weights=sizes))

    def drop_error(self, part: Part, scores: Scores) -> float:
        """Standard error of the drop of the mean loss from F to other scores, rows of one group taken together."""
        drops, codes, n_groups = [], [], 0
        for old, new, split in zip(self.scores(part), scores, self.splits(part), strict=True):
            drops.append(row_nll(old, split.labels) - row_nll(new, split.labels))
            codes.append(split.groups + n_groups)
            n_groups += int(split.groups.max()) + 1
        return float(compute_clustered_se(np.concatenate(drops), np.concatenate(codes)))

    def error(self, part: Part, scores: Scores | None = None) -> float:
        """Share of the rows of all tasks that are answered wrongly; by F, or by other scores."""
        found = self.scores(part) if scores is None else scores
        pairs = zip(found, self.splits(part), strict=True)
        return float(np.concatenate([values.argmax(axis=1) != split.labels for values, split in pairs]).mean())

    def add(self, booster: str, rate: float) -> None:
        """Move F by a booster that was kept in an earlier attempt."""
        parts: tuple[Part, ...] = ("train", "validation")
        self.replace({part: self.moved(part, self._score(part, booster), rate) for part in parts})

    def replace(self, scores: dict[Part, Scores]) -> None:
        """Put other scores in F's place."""
        self._scores.update(scores)

    def _score(self, part: Part, name: str) -> Scores:
        return [values[0] for values in self._setup.predict(self.splits(part), [name])]

    def moved(self, part: Part, new: Scores, rate: float) -> Scores:
        """F plus ``rate`` times the change from the base to the new adapter; absent choices stay absent."""
        base = self.base(part)
        with np.errstate(invalid="ignore"):  # -inf - -inf, where it is not used
            return [
                np.where(np.isfinite(f), f + rate * (z - z0), f)
                for f, z, z0 in zip(self.scores(part), new, base, strict=True)
            ]
