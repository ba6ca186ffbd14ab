"""The subset oracle: predicted performance of any set of tasks trained together, without training.

Input: features of every task for train and validation, under one or more projection seeds. Output:
:class:`~ensemblelora.estimation.scoring.SubsetScores`. Fits are kept, so a subset is solved once. Predictions are
averaged over projection seeds; weights never are, since each seed has its own coordinates. Cost and memory: see
:mod:`ensemblelora.estimation.solver`, plus 8 d bytes per kept fit and, once asked, the training rows in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import numpy.typing as npt

from ensemblelora.config import EstimationConfig
from ensemblelora.errors import DataError
from ensemblelora.estimation.memory import FitMemory, HandedFits, KnownFit
from ensemblelora.estimation.scoring import RowOutcomes, SubsetScores, predict_outcomes, score_outcomes
from ensemblelora.estimation.solver import Subset, check_subsets, prepare_problem, solve_subsets
from ensemblelora.estimation.steps import TrainingBudget, simulate_training
from ensemblelora.store import FeatureBlock

__all__ = ["Oracle", "PenaltyTrial", "TaskFeatures", "build_oracle", "choose_l2_penalty", "score_subsets"]

FloatArray = npt.NDArray[np.float64]

# Enough for a choice among seven penalties: the table's rows differ by far more than the spread over subsets.
_MAX_TRIAL_SUBSETS = 40


@dataclass(frozen=True, eq=False)
class TaskFeatures:
    """Features of every task under one projection seed, train and validation in the same task order.

    Attributes:
        train: One block per task.
        validation: One block per task, or of the first tasks alone, where the others are learnt from and never judged.
        n_train: Training rows of each task, where ``train`` holds a share of them; none: it holds all.
    """

    train: tuple[FeatureBlock, ...]
    validation: tuple[FeatureBlock, ...]
    n_train: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse tasks that don't match."""
        names = [[block.task for block in blocks] for blocks in (self.train, self.validation)]
        if not names[1] or names[0][: len(names[1])] != names[1]:
            raise DataError(f"train features of tasks {names[0]}, validation features of {names[1]}: expected the same")
        for train, validation in zip(self.train, self.validation, strict=False):
            if (train.mode, train.proj_dim) != (validation.mode, validation.proj_dim) or not validation.ids:
                raise DataError(
                    f"task {train.task!r}: train features are {train.mode} of dimension {train.proj_dim}, validation "
                    f"{validation.mode} of {validation.proj_dim} with {len(validation.ids)} rows; collect both again"
                )
        held = [block.n_examples for block in self.train]
        if len(self.counts) != len(held) or any(n < h for n, h in zip(self.counts, held, strict=True)):
            raise DataError(
                f"{held} training rows have features, of {list(self.counts)}: expected a share of each task"
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """Training rows of each task, with features or without."""
        return self.n_train or tuple(block.n_examples for block in self.train)


@dataclass(frozen=True)
class PenaltyTrial:
    """One row of the table that the relative ridge is chosen from.

    Attributes:
        l2_penalty: Relative ridge.
        nll: Mean predicted validation nll over the subsets' own tasks, then over subsets.
        distance: Mean norm of the fitted weights.
        converged: Share of fits that met their tolerance.
        n_fits: Subset fits, each asked about every task's validation rows.
        row_iterations: Training rows times iterations of all of them; see :attr:`Oracle.row_iterations`.
    """

    l2_penalty: float
    nll: float
    distance: float
    converged: float
    n_fits: int
    row_iterations: int


@dataclass(frozen=True, eq=False)
class _Stack:
    weights: FloatArray  # (k, d)
    converged: npt.NDArray[np.bool_]  # (k,)


@dataclass(frozen=True, eq=False)
class Oracle:
    """Answers what any subset of tasks would give; made by :func:`build_oracle`.

    Attributes:
        replicates: Features under each projection seed; rows must be the same.
        l2_penalty: Relative ridge, shared by subsets of every size; not used by method ``steps``.
        config: Settings of the fits.
        penalty_table: What the penalty was chosen from; empty if it was given.
        budget: What method ``steps`` simulates.
        judges: Tasks whose validation loss chooses the epoch that method ``steps`` keeps; none: the subset's own.
    """

    replicates: tuple[TaskFeatures, ...]
    l2_penalty: float
    config: EstimationConfig
    penalty_table: tuple[PenaltyTrial, ...] = ()
    budget: TrainingBudget | None = None
    judges: Subset | None = None
    # Not part of the value: equal questions give equal answers with or without it.
    _memories: tuple[FitMemory, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Refuse replicates of different rows, and start one memory of fits per replicate."""
        if not self.replicates:
            raise DataError("an oracle needs the features of at least one projection seed")
        ids = [[block.ids for block in replicate.validation] for replicate in self.replicates]
        if any(other != ids[0] for other in ids[1:]):
            raise DataError("projection seeds hold different validation rows; collect them from the same data")
        if self.config.method == "steps" and self.budget is None:
            raise DataError("estimation.method steps: needs the training budget that it simulates")
        if not self._memories:
            object.__setattr__(self, "_memories", tuple(FitMemory() for _ in self.replicates))

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of their indices."""
        return tuple(block.task for block in self.replicates[0].train)

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return len(self.replicates[0].train)

    @property
    def n_fits(self) -> int:
        """Subset fits solved so far, over all projection seeds."""
        return sum(len(memory.fits) for memory in self._memories)

    @property
    def n_unconverged(self) -> int:
        """How many of them stopped before they met their tolerance."""
        return sum(not fit.converged for memory in self._memories for fit in memory.fits.values())

    @property
    def row_iterations(self) -> int:
        """Training rows times iterations, summed over all fits so far: what a fit's cost is counted in.

        A row counts once for each of its outputs. All rows at the base model, where fits start, are among them.
        Simulated steps take as many rows as the training would; fits, those that have features.
        """
        total = 0
        for replicate, memory in zip(self.replicates, self._memories, strict=True):
            sizes = [block.outputs.size for block in replicate.train]
            if self.config.method == "steps":
                sizes = [n * block.n_outputs for n, block in zip(replicate.counts, replicate.train, strict=True)]
            total += sum(fit.iterations * sum(sizes[i] for i in subset) for subset, fit in memory.fits.items())
            total += memory.start_iterations * sum(sizes)
        return total

    def validation_groups(self, task: int) -> npt.NDArray[np.int64]:
        """Return the codes of validation rows that belong together, shape ``(n_val,)``."""
        return self.replicates[0].validation[task].groups

    def take_replicates(self, which: Sequence[int]) -> Oracle:
        """Return an oracle of some of the projection seeds that shares this one's fits."""
        chosen = tuple(self.replicates[r] for r in which)
        return replace(self, replicates=chosen, _memories=tuple(self._memories[r] for r in which))

    def solve(self, subsets: Sequence[Subset]) -> None:
        """Fit the subsets not known yet side by side, so that questions about single tasks find them solved."""
        self._fit(subsets)

    def list_unsolved(self, subsets: Sequence[Subset]) -> list[Subset]:
        """Return those of some subsets that are not fitted yet, each once."""
        wanted = dict.fromkeys(_normalise(subset) for subset in subsets)
        return [subset for subset in wanted if subset and any(subset not in memory.fits for memory in self._memories)]

    def hand_over(self, subsets: Sequence[Subset]) -> tuple[HandedFits, ...]:
        """Solve subsets, and return their fits for another oracle of the same features, one entry a projection seed."""
        self.solve(subsets)
        return tuple(memory.hand_over([_normalise(subset) for subset in subsets]) for memory in self._memories)

    def take_over(self, handed: Sequence[HandedFits]) -> None:
        """Take up the fits that an oracle of the same features, penalty and budget has handed over."""
        for memory, fits in zip(self._memories, handed, strict=True):
            memory.take_over(fits)

    def score(self, subsets: Sequence[Subset]) -> SubsetScores:
        """Predict the performance of every subset on every task that has validation rows.

        Args:
            subsets: Tuples of distinct task indices; ``()`` asks about the base model.

        Raises:
            UsageError: If a subset names a task twice or one that is not there.
        """
        fits = self._fit(subsets)
        n_judged = len(self.replicates[0].validation)
        shape = (len(subsets), n_judged)
        columns = {name: np.empty(shape) for name in ("nll", "nll_se", "accuracy", "accuracy_se", "macro_f1")}
        for task in range(n_judged):
            outcomes = self._predict(fits, task)
            for name, values in zip(columns, score_outcomes(outcomes, self.validation_groups(task)), strict=True):
                columns[name][:, task] = values
        return SubsetScores(
            subsets=tuple(_normalise(subset) for subset in subsets),
            **columns,
            distances=np.mean([np.linalg.norm(fit.weights, axis=1) for fit in fits], axis=0),
            converged=np.all([fit.converged for fit in fits], axis=0),
            l2_penalty=self.l2_penalty,
        )

    def weights(self, subsets: Sequence[Subset]) -> tuple[FloatArray, ...]:
        """Return every subset's fitted weights in projected coordinates, ``(k, d)``, one entry per projection seed."""
        return tuple(stack.weights for stack in self._fit(subsets))

    def row_outcomes(self, subsets: Sequence[Subset], task: int) -> tuple[RowOutcomes, ...]:
        """Return one task's row by row outcomes under every subset, one entry per projection seed."""
        return tuple(self._predict(self._fit(subsets), task))

    def row_nll(self, subsets: Sequence[Subset], task: int) -> FloatArray:
        """Return one task's loss on every validation row, averaged over projection seeds, shape ``(k, n_val)``."""
        return np.asarray(np.mean([outcome.nll for outcome in self.row_outcomes(subsets, task)], axis=0))

    def _predict(self, fits: Sequence[_Stack], task: int) -> list[RowOutcomes]:
        return [
            predict_outcomes(replicate.validation[task], fit.weights)
            for replicate, fit in zip(self.replicates, fits, strict=True)
        ]

    def _fit(self, subsets: Sequence[Subset]) -> list[_Stack]:
        """Return the weights of every subset in every replicate, solving those not known yet."""
        wanted = [_normalise(subset) for subset in subsets]
        stacks = []
        for replicate, memory in zip(self.replicates, self._memories, strict=True):
            missing = [subset for subset in dict.fromkeys(wanted) if subset and subset not in memory.fits]
            if missing:
                self._remember(replicate, memory, missing)
            base = KnownFit(np.zeros(replicate.train[0].proj_dim), True, 0)
            stacks.append(_stack([memory.fits[subset] if subset else base for subset in wanted], base.weights.size))
        return stacks

    def _remember(self, replicate: TaskFeatures, memory: FitMemory, subsets: Sequence[Subset]) -> None:
        fit = self._fit_ridge if self.config.method == "ridge" else self._fit_steps
        memory.fits.update(zip(subsets, fit(replicate, memory, subsets), strict=True))

    def _fit_ridge(self, replicate: TaskFeatures, memory: FitMemory, subsets: Sequence[Subset]) -> list[KnownFit]:
        if memory.problem is None:
            memory.problem = prepare_problem(
                replicate.train,
                l2_penalty=self.l2_penalty,
                balance=self.config.balance,
                n_train=replicate.counts,
                max_iter=self.config.max_iter,
                tolerance=self.config.tolerance,
            )
        fit = solve_subsets(memory.problem, subsets)
        solved = zip(fit.weights, fit.converged, fit.iterations, strict=True)
        return [KnownFit(weights, bool(done), int(count)) for weights, done, count in solved]

    def _fit_steps(self, replicate: TaskFeatures, memory: FitMemory, subsets: Sequence[Subset]) -> list[KnownFit]:
        budget, checked = cast("TrainingBudget", self.budget), check_subsets(subsets, self.n_tasks)
        found = simulate_training(
            replicate.train, replicate.validation, checked, budget, n_train=replicate.counts, judges=self.judges
        )
        return [KnownFit(weights, True, budget.num_train_epochs) for weights in found]


def build_oracle(
    replicates: Sequence[TaskFeatures],
    config: EstimationConfig,
    *,
    subsets: Sequence[Subset] = (),
    budget: TrainingBudget | None = None,
    judges: Subset | None = None,
) -> Oracle:
    """Make an oracle, choosing the relative ridge if the config says ``auto``.

    Args:
        replicates: Features under each projection seed; the ridge is chosen with the first.
        config: Settings of the fits.
        subsets: What the ridge is chosen on; none: every single task and all tasks together.
        budget: What method ``steps`` simulates.
        judges: Tasks whose validation loss chooses ridge and epoch; none: each subset's own.

    Raises:
        DataError: If the features of tasks or seeds don't match.
    """
    if config.method == "steps" or config.l2_penalty != "auto":
        penalty = 0.0 if config.l2_penalty == "auto" else config.l2_penalty
        return Oracle(tuple(replicates), penalty, config, budget=budget, judges=judges)
    first = replicates[0]
    penalty, table = choose_l2_penalty(
        first.train, first.validation, subsets, config, n_train=first.n_train, judges=judges
    )
    return Oracle(tuple(replicates), penalty, config, table, judges=judges)


def choose_l2_penalty(
    train: Sequence[FeatureBlock],
    validation: Sequence[FeatureBlock],
    subsets: Sequence[Subset],
    config: EstimationConfig,
    *,
    n_train: tuple[int, ...] | None = None,
    judges: Subset | None = None,
) -> tuple[float, tuple[PenaltyTrial, ...]]:
    """Choose the relative ridge with the least predicted validation loss, before any training.

    Every subset counts once, by the mean nll of its own tasks. Singles and the full set join the subsets asked about,
    since one penalty must serve every size; of many subsets an evenly spaced part is used. The grid is walked from its
    largest value and left after two rises in a row: the smallest penalties cost most, and overfit more and more.

    Args:
        train: One block per task.
        validation: One block per task.
        subsets: Tuples of task indices; may be empty.
        config: Its ``l2_grid`` holds the candidates.
        n_train: As :class:`TaskFeatures` has it.
        judges: Tasks whose nll a subset counts by instead; singles and the full set then don't join.

    Returns:
        The penalty (of equals the largest) and the table of those tried, by rising penalty.
    """
    features = TaskFeatures(tuple(train), tuple(validation), n_train)
    asked = _choose_trial_subsets(check_subsets(subsets, len(train)), len(train) if judges is None else 0)
    trials: list[PenaltyTrial] = []
    for penalty in sorted(set(config.l2_grid), reverse=True):
        trials.append(_try_penalty(features, asked, penalty, config, judges))
        if len(trials) > 2 and trials[-3].nll < trials[-2].nll < trials[-1].nll:
            break
    best = min(trials, key=lambda trial: trial.nll)
    return best.l2_penalty, tuple(reversed(trials))


def score_subsets(
    train: Sequence[FeatureBlock],
    validation: Sequence[FeatureBlock],
    subsets: Sequence[Subset],
    config: EstimationConfig,
) -> SubsetScores:
    """Fit every subset and predict its performance on every task; see :meth:`Oracle.score`."""
    features = TaskFeatures(tuple(train), tuple(validation))
    return build_oracle([features], config, subsets=subsets).score(subsets)


def _try_penalty(
    features: TaskFeatures,
    subsets: Sequence[Subset],
    penalty: float,
    config: EstimationConfig,
    judges: Subset | None,
) -> PenaltyTrial:
    oracle = Oracle((features,), penalty, config)
    scores = oracle.score(subsets)
    own = [scores.nll[s, list(judges or subset)].mean() for s, subset in enumerate(scores.subsets)]
    return PenaltyTrial(
        l2_penalty=float(penalty),
        nll=float(np.mean(own)),
        distance=float(scores.distances.mean()),
        converged=float(scores.converged.mean()),
        n_fits=oracle.n_fits,
        row_iterations=oracle.row_iterations,
    )


def _choose_trial_subsets(subsets: Sequence[Subset], n_tasks: int) -> list[Subset]:
    """Thin out the subsets, and add singles and the full set of the first tasks; of none, nothing is added."""
    step = max(1, -(-len(subsets) // _MAX_TRIAL_SUBSETS))
    singles = [(i,) for i in range(0, n_tasks, max(1, -(-n_tasks // _MAX_TRIAL_SUBSETS)))]
    full = [tuple(range(n_tasks))] if n_tasks else []
    return list(dict.fromkeys([*subsets[::step], *singles, *full]))


def _stack(fits: Sequence[KnownFit], dimension: int) -> _Stack:
    weights = np.array([fit.weights for fit in fits]).reshape(len(fits), dimension)
    return _Stack(weights, np.array([fit.converged for fit in fits], dtype=bool))


def _normalise(subset: Subset) -> Subset:
    return tuple(sorted(int(i) for i in subset))
