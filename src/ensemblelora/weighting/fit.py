"""The weights of every task (paper, section 2.3; docs/paper.md, row "ensemble weights").

    min over w in the simplex   mean CE(sum_g w_g F_g, y) + kappa KL(w || w0)

w0 puts most weight on the task's own group; kappa, how strongly, is chosen by cross-validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ensemblelora.config import EnsembleConfig
from ensemblelora.errors import ConfigError, DataError
from ensemblelora.seeding import generator_for
from ensemblelora.weighting.loss import MemberLogits, TaskLoss, prepare, row_losses, take
from ensemblelora.weighting.solver import Fit, minimise

__all__ = ["EnsembleWeights", "drop_negligible", "drop_unraised", "fit_weights"]

Array = npt.NDArray[np.float64]

# With so few validation examples their own cross-validation says little: stay near the prior.
_FEW_EXAMPLES = 50
_STRONG_PENALTY = 1.0
_PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
_N_FOLDS = 5
_RAISED = 2.0
"""times its prior weight, from which a group's weight is more than the prior's"""
_FOLD_GAP = 1e-5  # far below what five folds can tell apart


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


def fit_weights(
    tasks: Sequence[MemberLogits], own_groups: Sequence[int], config: EnsembleConfig, *, seed: int
) -> EnsembleWeights:
    """Fit the weights of m groups for every task.

    ``task`` fits each task on its own; ``global`` fits one set for the mean over tasks; ``uniform`` and ``own`` fit
    nothing. With ``kl_penalty: auto``, kappa is the one of a grid with the lowest loss in 5-fold cross-validation
    with folds cut between groups of examples, the larger on ties; tasks of up to 50 examples get 1.

    Args:
        tasks: Validation rows of every task, scored by the same m groups in the same order.
        own_groups: The group each task was trained in.
        config: Mode, combination, prior, penalty.
        seed: The run's root seed; it cuts the folds.

    Returns:
        Weights with their certificates.

    Raises:
        ConfigError: If the prior leaves tasks of several groups no common weights.
        DataError: If shapes disagree, or a group or label is out of range.
        TrainingError: If a logit is not finite.
        SolverError: If a fit does not come within 1e-8 nats of the best.

    Reference:
        Paper, section 2.3, which says "train the weights" and no more; docs/paper.md, row "ensemble weights".
    """
    _check_tasks(tasks, own_groups)
    n_groups = len(tasks[0].values)
    losses = [prepare(task, config.combine) for task in tasks]
    if config.weights == "uniform":
        fits = [Fit(np.full(n_groups, 1 / n_groups), np.nan, 0.0)] * len(tasks)
    elif config.weights == "own" or n_groups == 1:
        fits = [Fit(np.eye(n_groups)[own], np.nan, 0.0) for own in own_groups]
    else:
        priors = [_make_prior(own, n_groups, config.own_group_prior) for own in own_groups]
        if config.weights == "task":
            fits = [_fit([loss], prior, config.kl_penalty, seed) for loss, prior in zip(losses, priors, strict=True)]
            return _summarise(fits, losses, own_groups, priors)
        fits = [_fit(losses, _mean_prior(priors), config.kl_penalty, seed)] * len(tasks)
    return _summarise(fits, losses, own_groups)


def drop_negligible(weights: Array, smallest: float) -> Array:
    """Set weights below ``smallest`` to zero, never a row's largest, and let rows sum to one again."""
    kept = np.where((weights >= smallest) | (weights == weights.max(axis=1, keepdims=True)), weights, 0.0)
    return np.asarray(kept / kept.sum(axis=1, keepdims=True))


def drop_unraised(weights: Array, own_groups: Sequence[int], own_prior: float) -> Array:
    """Set other groups' weights to zero that the rows did not raise to twice what they began with.

    Where rows say nothing, the fit stays at the prior, and every group would be run for it. A row's largest weight and
    its own group's stay.

    Args:
        weights: ``(n_tasks, m)``.
        own_groups: The group each task was trained in.
        own_prior: Prior weight of a task's own group.
    """
    n_groups = weights.shape[1]
    if n_groups == 1:
        return weights
    is_own = np.eye(n_groups, dtype=bool)[list(own_groups)]
    least = _RAISED * (1 - own_prior) / (n_groups - 1)
    kept = np.where((weights >= least) | is_own | (weights == weights.max(axis=1, keepdims=True)), weights, 0.0)
    return np.asarray(kept / kept.sum(axis=1, keepdims=True))


def _fit(losses: Sequence[TaskLoss], prior: Array, penalty: Literal["auto"] | float, seed: int) -> Fit:
    kappa = _choose_penalty(losses, prior, seed) if penalty == "auto" else float(penalty)
    return minimise(losses, prior, kappa)


def _choose_penalty(losses: Sequence[TaskLoss], prior: Array, seed: int) -> float:
    """Return the penalty with the lowest cross-validated loss, the largest of equals."""
    is_small = sum(len(loss.groups) for loss in losses) <= _FEW_EXAMPLES
    if is_small or (prior == 0).any() or any(loss.groups.max() == 0 for loss in losses):
        return _STRONG_PENALTY
    folds = [_cut_folds(loss.groups, seed) for loss in losses]
    held_out = np.zeros(len(_PENALTIES))
    for k in range(_N_FOLDS):
        training = [take(loss, fold != k) for loss, fold in zip(losses, folds, strict=True)]
        for row, kappa in enumerate(_PENALTIES):
            weights = minimise(training, prior, kappa, max_gap=_FOLD_GAP).weights
            for loss, fold in zip(losses, folds, strict=True):
                is_held = (fold == k)[loss.row_example]
                held_out[row] += (loss.row_weights * row_losses(loss, weights))[is_held].sum()
    return _PENALTIES[int(held_out.argmin())]


def _cut_folds(groups: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """Return each example's fold ``(n_examples,)``; examples of a group stay together."""
    n_groups = int(groups.max()) + 1
    order = generator_for(seed, "ensemble folds", n_groups).permutation(n_groups)
    fold_of_group = np.empty(n_groups, dtype=np.int64)
    fold_of_group[order] = np.arange(n_groups) % _N_FOLDS
    return fold_of_group[groups]


def _make_prior(own: int, n_groups: int, own_prior: float) -> Array:
    prior = np.full(n_groups, (1 - own_prior) / (n_groups - 1))
    prior[own] = own_prior
    return prior


def _mean_prior(priors: Sequence[Array]) -> Array:
    """The prior whose KL is the mean of the tasks' KLs up to a constant: their normalised geometric mean."""
    with np.errstate(divide="ignore"):
        logs = np.mean(np.log(priors), axis=0)
    if not np.isfinite(logs).any():
        raise ConfigError("ensemble.own_group_prior: 1 leaves no common weights for tasks of several groups; lower it")
    return np.asarray(np.exp(logs - np.logaddexp.reduce(logs)))


def _summarise(
    fits: Sequence[Fit], losses: Sequence[TaskLoss], own_groups: Sequence[int], priors: Sequence[Array] | None = None
) -> EnsembleWeights:
    """Gather the fits; with ``priors``, tasks were fitted one by one and may be routed."""
    n_groups = len(fits[0].weights)
    singles = np.array([[loss.mean(row_losses(loss, one)) for one in np.eye(n_groups)] for loss in losses])
    routes = np.array(own_groups, dtype=np.int64)
    routed = np.array([bool(fit.weights.max() == 1.0) for fit in fits])
    for i, (fit, loss) in enumerate(zip(fits, losses, strict=True)):
        if routed[i]:
            routes[i] = fit.weights.argmax()
        elif priors is not None:
            routes[i] = _find_route(singles[i], priors[i], fit.kl_penalty, own_groups[i])
            routed[i] = _is_within_one_se(loss, fit.weights, int(routes[i]))
    return EnsembleWeights(
        weights=np.array([fit.weights for fit in fits]),
        own_groups=np.array(own_groups, dtype=np.int64),
        routes=routes,
        routed=routed,
        kl_penalties=np.array([fit.kl_penalty for fit in fits]),
        validation_nll=np.array([loss.mean(row_losses(loss, f.weights)) for f, loss in zip(fits, losses, strict=True)]),
        own_nll=singles[np.arange(len(losses)), np.array(own_groups)],
        gaps=np.array([fit.gap for fit in fits]),
    )


def _find_route(single_losses: Array, prior: Array, kappa: float, own: int) -> int:
    """Return the corner of the simplex with the lowest objective; the own group on ties."""
    objective = single_losses - kappa * np.log(prior)
    return own if objective[own] == objective.min() else int(objective.argmin())


def _is_within_one_se(loss: TaskLoss, weights: Array, route: int) -> bool:
    """Say whether one group alone loses no more than the standard error of that loss, clustered by group of rows."""
    extra = row_losses(loss, np.eye(len(weights))[route]) - row_losses(loss, weights)
    per_example = np.bincount(loss.row_example, loss.row_weights * extra) * len(loss.groups)
    mean = float(per_example.mean())
    n_clusters = int(loss.groups.max()) + 1
    if n_clusters < 2:
        return True
    sums = np.bincount(loss.groups, per_example - mean)
    variance = n_clusters / (n_clusters - 1) * float(sums @ sums)
    return mean <= float(np.sqrt(variance)) / len(per_example)


def _check_tasks(tasks: Sequence[MemberLogits], own_groups: Sequence[int]) -> None:
    if not tasks or len(tasks) != len(own_groups):
        raise DataError(f"{len(tasks)} tasks and {len(own_groups)} own groups; expected one group for each task")
    n_groups = len(tasks[0].values)
    for i, (task, own) in enumerate(zip(tasks, own_groups, strict=True)):
        if len(task.values) != n_groups or not 0 <= own < n_groups:
            raise DataError(
                f"task {i}: {len(task.values)} groups, own group {own}; expected {n_groups} and 0 to one less"
            )
