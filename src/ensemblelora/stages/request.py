"""What can't be carried out is refused here: before the model is loaded, or before it is run."""

from __future__ import annotations

from collections.abc import Iterator

from ensemblelora.adapters import AdaptedModel, adapter_bytes
from ensemblelora.affinity import sample_subsets
from ensemblelora.config import RunConfig
from ensemblelora.data.task import TaskSet
from ensemblelora.errors import ConfigError, DataError
from ensemblelora.gradients.output import choose_mode
from ensemblelora.models import Head
from ensemblelora.planning.budget import Budget
from ensemblelora.stages.rows import Rows

__all__ = ["check_fit", "check_request", "choose_head", "count_labels"]


def check_request(config: RunConfig, tasks: TaskSet) -> None:
    """Refuse what config and tasks alone rule out, before the model is loaded.

    Raises:
        ConfigError: If more groups are asked for than there are tasks, or a later stage could not use a value; names
            every fault.
        DataError: If tasks with and without a classification head are mixed.
    """
    if faults := list(_list_config_faults(config, tasks)):
        raise ConfigError("; ".join(faults))
    sample_subsets(len(tasks.tasks), config.affinity, seed=config.seed)
    heads = {task.card.head: task.name for task in tasks.tasks}
    if len(heads) > 1:
        first, second = (f"{name!r} has head: {head}" for head, name in heads.items())
        raise DataError(f"one model has one kind of head, but task {first} and task {second}; give all the same")


def check_fit(config: RunConfig, rows: Rows, probe: AdaptedModel) -> None:
    """Refuse what the encoded tasks or the adapter's size rule out, before the model is run.

    Raises:
        ConfigError: If ``gradients.output`` does not fit a task, or the number of groups asked for breaks a budget.
    """
    for split in rows.learning:
        choose_mode(split.kind, int(split.n_choices.max()), config.gradients.output, task=split.task)
    wanted = config.grouping
    budget = Budget(adapter_bytes(probe), config.boosting.n_rounds, wanted.max_memory_bytes, wanted.max_latency_ratio)
    if wanted.n_groups != "auto" and (faults := budget.list_faults(wanted.n_groups)):
        raise ConfigError(f"grouping.n_groups {wanted.n_groups} takes {' and '.join(faults)}; change one of them")


def choose_head(tasks: TaskSet) -> Head:
    """The kind of output layer the tasks' cards ask for."""
    return tasks.tasks[0].card.head


def count_labels(tasks: TaskSet) -> int:
    """Width of a classification head that serves every task: the largest number of classes."""
    return max(len(next(iter(task.splits["train"])).choices) for task in tasks.tasks)


def _list_config_faults(config: RunConfig, tasks: TaskSet) -> Iterator[str]:
    """Values that are only found wrong beside others, or beside the tasks."""
    n_groups, n_tasks = config.grouping.n_groups, len(tasks.tasks)
    if n_groups != "auto" and not 1 <= n_groups <= n_tasks:
        yield f"grouping.n_groups {n_groups}: expected 1 to {n_tasks}, the number of tasks"
    free_text = [task.name for task in tasks.tasks if task.card.output_type != "multiple_choice"]
    if config.affinity.score == "accuracy" and free_text:
        yield f"affinity.score accuracy: tasks {', '.join(free_text)} answer with free text and have none; use nll"
    penalty, grid = config.estimation.l2_penalty, config.estimation.l2_grid
    if penalty == "auto" and not (grid and min(grid) > 0):
        yield f"estimation.l2_grid {list(grid)}: expected positive numbers, at least one"
    if penalty != "auto" and penalty <= 0:
        yield f"estimation.l2_penalty {penalty}: expected a positive number, or auto"
    if config.ensemble.weights == "global" and config.ensemble.own_group_prior == 1 and n_groups != 1:
        yield "ensemble.own_group_prior 1: leaves no common weights for tasks of several groups; lower it"
