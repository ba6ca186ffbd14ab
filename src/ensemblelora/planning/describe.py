"""A plan's numbers per task, and its sentences: why it was chosen, and what to keep in mind."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ensemblelora.config import GroupingConfig
from ensemblelora.estimation import Oracle, compute_clustered_se
from ensemblelora.grouping import Partition, to_labels
from ensemblelora.planning.budget import Budget
from ensemblelora.planning.judge import Judge, JudgedRows
from ensemblelora.planning.record import Candidate, Comparison, Prediction

__all__ = [
    "describe_choice",
    "describe_request",
    "explain_one_adapter",
    "is_above_error",
    "list_oracle_warnings",
    "list_plan_warnings",
    "predict",
]

FloatArray = npt.NDArray[np.float64]

_WHAT_ERRORS_LEAVE_OUT = (
    "Standard errors cover validation rows and projection seeds. They leave out training seeds, the choice of training "
    "rows, and how far the linear model is from real fine-tuning."
)
_SHAKY_AGREEMENT = 0.8
_OTHER_WAYS = {
    "one per task": "One adapter per task",
    "random groups": "Random grouping",
    "gradient cosine": "Grouping by gradient cosine",
}
"""What warnings call the ways that a plan is compared with."""


def is_above_error(gain: float, gain_se: float | None) -> bool:
    """Say whether a gain is above zero by more than one standard error."""
    return gain_se is not None and gain > max(gain_se, 0.0)


def describe_request(asked: int, chosen: Candidate, auto: Candidate, *, is_given: bool = False) -> str:
    """Say that the number of groups, or the groups themselves, were set, and what would have been chosen."""
    if is_given:
        would = "one adapter for all" if auto.n_groups == 1 else f"{auto.n_groups} groups of its own"
        would = "the same" if auto.groups == chosen.groups else f"{would} ({_describe_gain(auto)})"
        return (
            f"Groups were given by hand (grouping.groups); auto would choose {would}. Here: {_describe_gain(chosen)}."
        )
    would = "the same" if auto.n_groups == chosen.n_groups else f"{auto.n_groups}"
    return f"Groups were set to {asked} (grouping.n_groups); auto would choose {would}. Here: {_describe_gain(chosen)}."


def describe_choice(chosen: Candidate, best: Candidate, rivals: Sequence[Candidate], *, can_share: bool = True) -> str:
    """Say why a number of groups was accepted, and whether one adapter for all was a choice at all."""
    reason = f"{chosen.n_groups} groups: {_describe_gain(chosen)}"
    if chosen != best:
        reason += f"; {best.n_groups} groups are better by less than one standard error"
    if dropped := [str(candidate.n_groups) for candidate in rivals if not candidate.allowed]:
        reason += f"; {', '.join(dropped)} groups are over budget"
    if not can_share:
        reason += "; the constraints rule one adapter for all out"
    return f"{reason}."


def explain_one_adapter(rivals: Sequence[Candidate], budget: Budget) -> str:
    """Say why no grouping was accepted.

    Args:
        rivals: Every number of groups above one.
        budget: What was allowed.
    """
    allowed = [candidate for candidate in rivals if candidate.allowed]
    if not rivals:
        return "One adapter is all that grouping.max_groups and grouping.rounding leave."
    if not allowed:
        faults = " and ".join(budget.list_faults(rivals[0].n_groups))
        return f"Only one adapter is within budget: {rivals[0].n_groups} groups take {faults}."
    best = max(allowed, key=lambda candidate: candidate.gain)
    if best.gain_se is None:
        return "Every task's validation rows all belong together, so no gain from grouping can be told from chance."
    return (
        "No grouping is predicted to beat one adapter for all by more than one standard error; the best has "
        f"{best.n_groups} groups: {_describe_gain(best)}."
    )


def list_oracle_warnings(judge: Judge, plan: Prediction) -> Iterator[str]:
    """Say what limits every prediction of this oracle, the plan's among them."""
    oracle = judge.oracle
    alone = [name for i, name in enumerate(oracle.task_names) if len(np.unique(oracle.validation_groups(i))) < 2]
    if alone:
        yield f"All validation rows of {', '.join(alone)} belong together, so standard errors leave these tasks out."
    if oracle.n_unconverged:
        yield f"{oracle.n_unconverged} of {oracle.n_fits} fits did not converge; raise estimation.max_iter."
    if edge := _find_grid_edge(oracle):
        yield f"The best l2_penalty, {oracle.l2_penalty:g}, is the {edge} of estimation.l2_grid; widen the grid."
    without = [name for name, known in zip(oracle.task_names, plan.accuracy, strict=True) if known is None]
    if without:
        n_tasks = len(oracle.task_names)
        yield (
            f"Of free text only the loss is predicted: accuracies leave {', '.join(without)} out, and their means are "
            f"over {n_tasks - len(without)} of {n_tasks} tasks."
        )
    yield _WHAT_ERRORS_LEAVE_OUT  # last: it holds for every plan


def list_plan_warnings(
    chosen: Candidate,
    plan: Prediction,
    base: Prediction,
    comparisons: Sequence[Comparison],
    halves: tuple[Partition, Partition],
    budget: Budget,
    config: GroupingConfig,
) -> Iterator[str]:
    """Say what speaks against the plan.

    Args:
        chosen: The plan's point on the curve.
        plan: Its prediction.
        base: The base model's.
        comparisons: Other ways to train.
        halves: The partitions that the two halves of the validation rows chose.
        budget: What is allowed.
        config: What was asked for.
    """
    if plan.mean_nll >= base.mean_nll:
        yield "No adapter is predicted to help: the base model's validation loss is as low as the plan's."
    if faults := budget.list_faults(chosen.n_groups):
        yield f"The plan takes {' and '.join(faults)}."
    for other in comparisons:
        gain, gain_se = other.gain_over_plan, other.gain_over_plan_se
        if other.name == "one adapter" or gain is None or gain_se is None:
            continue
        if gain > gain_se and other.n_groups != chosen.n_groups:
            yield (
                f"{_OTHER_WAYS[other.name]} ({other.n_groups} adapters) is predicted to do better than the plan by "
                f"{gain:.4f} ± {gain_se:.4f} nats; {_say_how_to_allow(other.n_groups, config)}."
            )
        elif other.n_groups == chosen.n_groups > 1 and gain >= 0 and other.groups != chosen.groups:
            meaning = ": which tasks are together matters little" if other.groups is None else ""
            yield (
                f"{_OTHER_WAYS[other.name]} into {chosen.n_groups} groups is predicted to do as well as the plan"
                f"{meaning}."
            )
    agreement = _measure_agreement(*halves)
    if agreement < _SHAKY_AGREEMENT:
        yield (
            f"The groups are uncertain: those found on the two halves of the validation rows agree on "
            f"{agreement:.0%} of task pairs."
        )


def predict(judge: Judge, rows: JudgedRows) -> Prediction:
    """Average rows to tasks, and tasks to one number, with standard errors."""
    codes = [judge.oracle.validation_groups(task) for task in range(judge.oracle.n_tasks)]
    nll, nll_se, mean_nll, mean_nll_se = _average(rows.nll, rows.seed_nll, codes)
    accuracy, accuracy_se, mean_accuracy, mean_accuracy_se = _average(rows.correct, rows.seed_correct, codes)
    assert mean_nll is not None  # every mode has a loss
    return Prediction(
        nll=tuple(value for value in nll if value is not None),
        nll_se=nll_se,
        accuracy=accuracy,
        accuracy_se=accuracy_se,
        mean_nll=mean_nll,
        mean_nll_se=mean_nll_se,
        mean_accuracy=mean_accuracy,
        mean_accuracy_se=mean_accuracy_se,
    )


def _describe_gain(candidate: Candidate) -> str:
    """Say what a number of groups is predicted to give against one adapter."""
    loss, gain = (
        f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
        for value, error in (
            (candidate.predicted_nll, candidate.predicted_nll_se),
            (abs(candidate.gain), candidate.gain_se),
        )
    )
    return (
        f"predicted mean validation loss {loss} nats, {gain} "
        f"{'below' if candidate.gain >= 0 else 'above'} one adapter for all"
    )


def _say_how_to_allow(n_groups: int, config: GroupingConfig) -> str:
    """Name the setting that keeps a number of groups from being chosen."""
    if config.groups is not None:
        return "leave grouping.groups out to allow it"
    if config.n_groups == "auto":
        constrained = config.must_link or config.cannot_link or config.min_group_size > 1 or config.max_group_size
        more = ", or loosen the constraints," if constrained else ""
        return f"raise grouping.max_groups or the budget{more} to allow it"
    more = f" and grouping.max_groups to {n_groups} or more" if n_groups > config.max_groups else ""
    return f"set grouping.n_groups to auto{more} to allow it"


def _average(
    rows: Sequence[FloatArray], by_seed: FloatArray, codes: Sequence[npt.NDArray[np.int64]]
) -> tuple[tuple[float | None, ...], tuple[float | None, ...], float | None, float | None]:
    """Return means and errors of tasks, and of their mean over the tasks that have one; none instead of NaN."""
    means = np.array([values.mean() for values in rows])
    variances = np.array([compute_clustered_se(values, code) ** 2 for values, code in zip(rows, codes, strict=True)])
    n_seeds = len(by_seed)
    seeds = by_seed.var(axis=0, ddof=1) / n_seeds if n_seeds > 1 else np.zeros(len(rows))
    errors = np.sqrt(variances + seeds)
    known = ~np.isnan(means)
    if not known.any():
        return _without_nan(means), _without_nan(errors), None, None
    mean_error = None
    if not np.isnan(variances[known]).all():
        variance = np.nansum(variances[known]) / known.sum() ** 2
        if n_seeds > 1:
            variance += by_seed[:, known].mean(axis=1).var(ddof=1) / n_seeds
        mean_error = float(np.sqrt(variance))
    return _without_nan(means), _without_nan(errors), float(means[known].mean()), mean_error


def _without_nan(values: FloatArray) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else float(value) for value in values)


def _find_grid_edge(oracle: Oracle) -> str | None:
    tried = [trial.l2_penalty for trial in oracle.penalty_table]
    if len(tried) < 2 or min(tried) < oracle.l2_penalty < max(tried):
        return None
    return "smallest" if oracle.l2_penalty == min(tried) else "largest"


def _measure_agreement(one: Partition, other: Partition) -> float:
    """Return the share of task pairs that both partitions put together or both keep apart (the Rand index)."""
    first, second = to_labels(one), to_labels(other)
    pairs = list(itertools.combinations(range(len(first)), 2))
    same = [(first[i] == first[j]) == (second[i] == second[j]) for i, j in pairs]
    return float(np.mean(same)) if pairs else 1.0
