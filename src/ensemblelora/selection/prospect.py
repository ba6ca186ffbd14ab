"""What a target is predicted to gain from sets of sources.

In: a subset oracle whose task 0 is the target and whose other tasks are the sources. Out: predicted validation losses
of the target (nats), and paired differences of them, with standard errors over groups of validation rows and
projection seeds. Whatever a search wants to know is a linear function of the losses of some sets, row by row; so one
function gives every interval. Cost: a fit a set, 2 n_val d flops a question. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.errors import DataError
from ensemblelora.estimation import Oracle, average_outcomes

__all__ = ["Choice", "Estimates", "Prospect", "unless_nan"]

FloatArray = npt.NDArray[np.float64]
Choice = tuple[int, ...]
"""indices of sources, ascending"""

_SHARE_OF_HARM = 0.1


@dataclass(frozen=True, eq=False)
class Estimates:
    """Predicted numbers and their standard errors, both ``(k,)``; errors are NaN where rows are all of one group."""

    values: FloatArray
    errors: FloatArray


@dataclass(frozen=True, eq=False)
class Prospect:
    """A target and its sources.

    Attributes:
        oracle: Task 0 is the target, task 1 + j is source j; what is fitted is judged by the target's validation rows.
        includes_target: Whether the target's own training rows are in every set.
    """

    oracle: Oracle
    includes_target: bool = True

    def __post_init__(self) -> None:
        """Refuse a target without sources."""
        if self.oracle.n_tasks < 2:
            raise DataError(f"target {self.oracle.task_names[0]!r}: no sources to choose from; give one or more")

    @property
    def n_sources(self) -> int:
        """Number of sources, n."""
        return self.oracle.n_tasks - 1

    @property
    def everything(self) -> Choice:
        """All sources."""
        return tuple(range(self.n_sources))

    @property
    def validation_groups(self) -> npt.NDArray[np.int64]:
        """Codes of the target's validation rows that belong together, ``(n_val,)``."""
        return self.oracle.validation_groups(0)

    def subset_of(self, choice: Choice) -> tuple[int, ...]:
        """The oracle's tasks that a set of sources stands for; none stands for the model where features were taken."""
        own = (0,) if self.includes_target else ()
        return (*own, *(1 + j for j in choice))

    def solve(self, choices: Sequence[Choice]) -> None:
        """Fit many sets side by side."""
        self.oracle.solve([self.subset_of(choice) for choice in choices])

    def row_nll(self, choices: Sequence[Choice]) -> FloatArray:
        """The target's loss on every validation row under each set, ``(n_seeds, k, n_val)``.

        Where training on a set only does harm, the trainer keeps its start. A small part of the harm still counts, so
        that such sets are told apart.
        """
        outcomes = self.oracle.row_outcomes([(), *map(self.subset_of, choices)], 0)
        rows = np.stack([outcome.nll for outcome in outcomes])
        start, trained = rows[:, :1], rows[:, 1:]
        if self.oracle.config.method == "ridge":
            return trained  # of a convex fit, few rows say little of harm: shrinking it would hide every first step
        does_harm = trained.mean(axis=2, keepdims=True) > start.mean(axis=2, keepdims=True)
        return np.where(does_harm, start + _SHARE_OF_HARM * (trained - start), trained)

    def score(self, choices: Sequence[Choice]) -> Estimates:
        """The target's mean loss under each set."""
        return Estimates(*average_outcomes(self.row_nll(choices), self.validation_groups))

    def compare(self, choices: Sequence[Choice], over: Choice) -> Estimates:
        """By how much the target's loss is lower under each set than under the set ``over``; positive is better."""
        rows = self.row_nll([over, *choices])
        return Estimates(*average_outcomes(rows[:, :1] - rows[:, 1:], self.validation_groups))

    def combine(self, choices: Sequence[Choice], weights: npt.ArrayLike) -> Estimates:
        """Weighted sums of the losses under some sets.

        Args:
            choices: k sets.
            weights: Shape ``(m, k)``.

        Returns:
            m sums; where a row of weights sums to zero, its error is that of a paired difference.
        """
        rows = np.einsum("mk,rkn->rmn", np.asarray(weights, dtype=np.float64), self.row_nll(choices))
        return Estimates(*average_outcomes(rows, self.validation_groups))


def unless_nan(value: float) -> float | None:
    """A number as JSON can keep it: none where it is not one.

    Example:
        >>> unless_nan(0.5), unless_nan(float("nan"))
        (0.5, None)
    """
    return None if math.isnan(value) else float(value)
