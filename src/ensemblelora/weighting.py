"""Convex weights of the groups' models, task by task (paper, section 2.3; docs/paper.md, row "ensemble weights").

In: what every group's model says about each task's validation rows. Out: :class:`EnsembleWeights`, on the simplex.

    min over w in the simplex   mean CE(sum_g w_g F_g, y) + kappa KL(w || w0)

is convex: cross-entropy is convex in the logits, and these are linear in w. Mixing probabilities instead, with
-log sum_g w_g p_g(y), is convex too, and is what free-text tasks always get, token by token. w0 puts most weight on
the task's own group. The solver is Newton's method with a logarithmic barrier; every answer carries a duality gap,
a proven bound on how far it is from the best.

Cost of a fit: about 40 Newton steps of n K m^2 multiply-adds for n rows, K classes, m groups.
Slow twins: scipy's SLSQP and a grid on the simplex, in tests/test_weighting.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ensemblelora.config import EnsembleConfig
from ensemblelora.errors import ConfigError, DataError, SolverError
from ensemblelora.seeding import generator_for

__all__ = ["EnsembleWeights", "MemberLogits", "combine", "fit_weights"]

Array = npt.NDArray[np.float64]

# With so few validation examples their own cross-validation says little: stay near the prior.
_FEW_EXAMPLES = 50
_STRONG_PENALTY = 1.0
_PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
_N_FOLDS = 5
_MAX_GAP = 1e-7
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True, eq=False)
class MemberLogits:
    """What every group's model says about one task's rows.

    Attributes:
        values: float ``(m, n_rows, K)``: class logits, -inf past a row's number of classes. K = 1 marks a free-text
            task, whose rows are answer tokens and whose values are the right tokens' log-probabilities.
        labels: Right classes ``(n_examples,)``; not looked at for a free-text task.
        groups: Codes of examples that belong together ``(n_examples,)``.
        row_example: The example of each row ``(n_rows,)``; none: a row is an example.
    """

    values: npt.NDArray[np.floating]
    labels: npt.NDArray[np.integer]
    groups: npt.NDArray[np.integer]
    row_example: npt.NDArray[np.integer] | None = None


@dataclass(frozen=True, eq=False)
class EnsembleWeights:
    """Fitted weights of m groups for every task.

    Attributes:
        weights: ``(n_tasks, m)``, rows on the simplex.
        own_groups: The group each task was trained in ``(n_tasks,)``.
        routes: The best single group for each task ``(n_tasks,)``.
        routed: Whether the weights gain no more than one standard error over that single group ``(n_tasks,)``: the
            others may then be skipped.
        kl_penalties: kappa of each task; NaN where nothing was fitted ``(n_tasks,)``.
        validation_nll: Mean cross-entropy under the weights ``(n_tasks,)``, in nats.
        own_nll: The same under the own group alone ``(n_tasks,)``.
        gaps: Bound on the distance to the optimum ``(n_tasks,)``, in nats; 0 where nothing was fitted.
    """

    weights: Array
    own_groups: npt.NDArray[np.int64]
    routes: npt.NDArray[np.int64]
    routed: npt.NDArray[np.bool_]
    kl_penalties: Array
    validation_nll: Array
    own_nll: Array
    gaps: Array

    @property
    def serving_weights(self) -> Array:
        """Weights with each routed task's row replaced by its one group: as few models as the evidence asks for."""
        return np.where(self.routed[:, None], np.eye(self.weights.shape[1])[self.routes], self.weights)
