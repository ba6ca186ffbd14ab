"""A plan's numbers per task, and its sentences: why it was chosen, and what to keep in mind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ensemblelora.affinity import SubsetDesign, list_blind_tasks
from ensemblelora.config import AffinityConfig, GroupingConfig
from ensemblelora.estimation import Oracle, compute_clustered_se
from ensemblelora.grouping import Partition, to_labels
from ensemblelora.planning.budget import Budget
from ensemblelora.planning.judge import Judge, JudgedRows
from ensemblelora.planning.record import Candidate, Comparison, Prediction

__all__ = [
    "count_errors_to_part",
    "describe_choice",
    "describe_cosines",
    "describe_request",
    "explain_one_adapter",
    "is_above_error",
    "list_design_warnings",
    "list_few_rows",
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
_FEW_ROWS = 10
"""independent validation rows of a task below which a standard error is itself hardly known"""
_MAX_NAMED = 6
_OTHER_WAYS = {
    "one per task": "One adapter per task",
    "random groups": "Random grouping",
    "gradient cosine": "Grouping by gradient cosine",
}
"""What warnings call the ways that a plan is compared with."""


def is_above_error(gain: float, gain_se: float | None, *, n_errors: float = 1.0) -> bool:
    """Say whether a gain is above zero by more than some standard errors."""
    return gain_se is not None and gain > max(n_errors * gain_se, 0.0)


def count_errors_to_part(oracle: Oracle) -> float:
    """Return by how many standard errors groups have to be better than one adapter for all.

    One, or two where the tasks have so few validation rows that the error is itself hardly known.
    """
    counts = [len(np.unique(oracle.validation_groups(task))) for task in range(oracle.n_tasks)]
    return 2.0 if float(np.mean(counts)) < _FEW_ROWS else 1.0


def describe_request(
    asked: int, chosen: Candidate, auto: Candidate, *, is_given: bool = False, is_by_cosine: bool = False
) -> str:
    """Say that the number of groups, or the groups themselves, were set, and what would have been chosen."""
    if is_given:
        would = "one adapter for all" if auto.n_groups == 1 else f"{auto.n_groups} groups of its own"
        would = "the same" if auto.groups == chosen.groups else f"{would} ({_describe_gain(auto)})"
        return (
            f"Groups were given by hand (grouping.groups); auto would choose {would}. Here: {_describe_gain(chosen)}."
        )
    would = "the same" if auto.n_groups == chosen.n_groups else f"{auto.n_groups}"
    here = "Here, by gradient cosine" if is_by_cosine else "Here"
    return (
        f"Groups were set to {asked} (grouping.n_groups); auto would choose {would}. {here}: {_describe_gain(chosen)}."
    )


def describe_cosines(
    chosen: Candidate, before: Candidate, gain: float, gain_se: float | None, *, n_errors: float = 1.0
) -> str:
    """Say why groups by gradient cosine take the place of what was chosen.

    Args:
        chosen: The groups by gradient cosine.
        before: What was chosen by predicted loss alone.
        gain: Of the one over the other.
        gain_se: Its standard error.
        n_errors: By how many groups had to be better than one adapter.
    """
    reason = f"{chosen.n_groups} groups by gradient cosine: {_describe_gain(chosen)}"
    if before.n_groups == 1:
        return f"{reason}; no grouping found by affinity is by more than {_name_errors(n_errors)}."
    return f"{reason}; {gain:.4f} ± {gain_se or 0.0:.4f} better than the {before.n_groups} groups found by affinity."


def describe_choice(chosen: Candidate, best: Candidate, rivals: Sequence[Candidate], *, can_share: bool = True) -> str:
    """Say why a number of groups was accepted, and whether one adapter for all was a choice at all."""
    reason = f"{chosen.n_groups} groups: {_describe_gain(chosen)}"
    if chosen != best:
        reason += f"; {best.n_groups} groups are better by less than one standard error, so the smaller number is taken"
    if dropped := [str(candidate.n_groups) for candidate in rivals if not candidate.allowed]:
        reason += f"; {', '.join(dropped)} groups are over budget"
    if not can_share:
        reason += "; the constraints rule one adapter for all out"
    return f"{reason}."


def explain_one_adapter(
    rivals: Sequence[Candidate], budget: Budget, config: GroupingConfig, *, n_errors: float = 1.0
) -> str:
    """Say why no grouping was accepted.

    Args:
        rivals: Every number of groups above one.
        budget: What was allowed.
        config: What was asked for.
        n_errors: By how many standard errors groups had to be better.
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
    kind = "grouping by threshold" if config.rounding == "threshold" else "grouping"
    return (
        f"No {kind} is predicted to beat one adapter for all by more than {_name_errors(n_errors)}; the best has "
        f"{best.n_groups} groups: {_describe_gain(best)}."
    )


def list_design_warnings(design: SubsetDesign, names: Sequence[str], config: AffinityConfig) -> Iterator[str]:
    """Say which tasks' partners the subsets that were asked about can't tell apart."""
    blind = [names[task] for task in list_blind_tasks(design)]
    if blind:
        are = "is" if len(blind) == 1 else "are"
        yield (
            f"With affinity.n_subsets {config.n_subsets}, {_name_some(blind)} {are} in one subset only, where no "
            "partner can be told from another; raise it, or affinity.min_pair_count."
        )


def list_few_rows(counts: Mapping[str, int]) -> Iterator[str]:
    """Say which tasks have so few validation rows that predictions are rough.

    Args:
        counts: Independent validation rows of each task.
    """
    few = [f"{name} ({n_groups})" for name, n_groups in counts.items() if 2 <= n_groups < _FEW_ROWS]
    if few:
        yield (
            f"Few validation rows, repeated texts counted once, of {_name_some(few)}: predictions and their standard "
            "errors are rough. Give more rows, or raise data.validation_fraction."
        )


def list_oracle_warnings(judge: Judge, plan: Prediction) -> Iterator[str]:
    """Say what limits every prediction of this oracle, the plan's among them."""
    oracle = judge.oracle
    counts = {name: len(np.unique(oracle.validation_groups(i))) for i, name in enumerate(oracle.task_names)}
    if alone := [name for name, n_rows in counts.items() if n_rows < 2]:
        yield f"All validation rows of {', '.join(alone)} belong together, so standard errors leave these tasks out."
    yield from list_few_rows(counts)
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
    allows: Callable[[Partition], bool],
    n_errors: float = 1.0,
) -> Iterator[str]:
    """Say what speaks against the plan.

    Another way to train is better, as in the choice itself, by more than one standard error, and than one adapter for
    all by more than ``n_errors`` of them.

    Args:
        chosen: The plan's point on the curve.
        plan: Its prediction.
        base: The base model's.
        comparisons: Other ways to train.
        halves: The partitions that the two halves of the validation rows chose.
        budget: What is allowed.
        config: What was asked for.
        allows: Whether the constraints allow groups.
        n_errors: Standard errors by which groups have to be better than one adapter for all.
    """
    if plan.mean_nll >= base.mean_nll:
        yield "No adapter is predicted to help: the base model's validation loss is as low as the plan's."
    if faults := budget.list_faults(chosen.n_groups):
        yield f"The plan takes {' and '.join(faults)}."
    for other in comparisons:
        gain, gain_se = other.gain_over_plan, other.gain_over_plan_se
        if other.name == "one adapter" or gain is None or gain_se is None:
            continue
        if is_above_error(gain, gain_se, n_errors=n_errors if chosen.n_groups == 1 else 1.0):
            mean = ", in the mean over draws" if other.groups is None else ""
            yield (
                f"{_OTHER_WAYS[other.name]} ({other.n_groups} adapters{mean}) is predicted to do better than the plan "
                f"by {gain:.4f} ± {gain_se:.4f} nats{_say_how_to_allow(other, budget, config, allows)}."
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


def _name_errors(n_errors: float) -> str:
    return "one standard error" if n_errors == 1 else "two standard errors, which so few validation rows ask for"


def _name_some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (f" and {len(names) - _MAX_NAMED} more" if names[_MAX_NAMED:] else "")


def _describe_gain(candidate: Candidate) -> str:
    """Say what a number of groups is predicted to give against one adapter, where it is not that itself."""
    loss, gain = (
        f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
        for value, error in (
            (candidate.predicted_nll, candidate.predicted_nll_se),
            (abs(candidate.gain), candidate.gain_se),
        )
    )
    if candidate.n_groups == 1:
        return f"predicted mean validation loss {loss} nats"
    direction = "better" if candidate.gain >= 0 else "worse"
    return f"predicted mean validation loss {loss} nats, {gain} {direction} than one adapter for all"


def _say_how_to_allow(
    other: Comparison, budget: Budget, config: GroupingConfig, allows: Callable[[Partition], bool]
) -> str:
    """Name every setting that keeps a way to train out of the choice; nothing where it was open and not chosen."""
    if other.groups is None:
        return ""  # a mean over draws is no grouping that could be trained
    is_open = other.n_groups in config.list_numbers(sum(len(group) for group in other.groups))
    values = [] if is_open else [f"grouping.max_groups to {other.n_groups} or more"]
    if other.name == "gradient cosine" and config.rounding == "threshold":
        values.append("grouping.rounding to best")
    steps = ["raise the budget"] if budget.list_faults(other.n_groups) else []
    if not allows(other.groups):
        steps.append("loosen the constraints on groups")
    if not values and not steps:
        return ""
    if config.groups is not None:
        steps.append("leave grouping.groups out")
    elif config.n_groups != "auto":
        values.insert(0, "grouping.n_groups to auto")
    settings = [f"set {' and '.join(values)}"] if values else []
    return f"; {' and '.join([*settings, *steps])} to allow it"


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
