"""What can't be carried out is refused here: before the model is loaded, or before it is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from ensemblelora.adapters import AdaptedModel, adapter_bytes, attach
from ensemblelora.affinity import list_blind_tasks, sample_subsets
from ensemblelora.artifacts import pinned_commits, pinned_revision
from ensemblelora.config import (
    MAX_PROJ_DIM,
    AffinityConfig,
    EstimationConfig,
    GradientsConfig,
    ModelConfig,
    RunConfig,
)
from ensemblelora.data.loading import load_tasks
from ensemblelora.data.task import TaskSet
from ensemblelora.errors import ConfigError, DataError
from ensemblelora.gradients.collect import find_active_layers, plan_features
from ensemblelora.gradients.output import choose_modes
from ensemblelora.models import Head, load_base
from ensemblelora.planning.budget import Budget
from ensemblelora.planning.demand import find_budget_fault, list_demand_faults
from ensemblelora.quantization import check_installed
from ensemblelora.stages.rows import Rows, encode_tasks
from ensemblelora.startpoint import is_warm, settle_training

__all__ = ["check_fit", "check_request", "choose_head", "count_labels", "prepare"]

_SHARED_RANDOMNESS = {
    "none": "would all be the same",
    "sjlt": "would share the few entries of each row",
    "kronecker": "would share their factors",
}
"""why columns of one wide matrix are not projections of their own"""


def prepare(
    config: RunConfig, check: Callable[[TaskSet], None] | None = None, *, tasks: TaskSet | None = None
) -> tuple[TaskSet, Rows, AdaptedModel]:
    """Load and check everything a run needs; nothing is written.

    Args:
        config: The run's.
        check: Refuses what else the tasks alone rule out, before the model is loaded.
        tasks: Where they were loaded for another config with the same ``data`` and ``seed``.

    Returns:
        The tasks, their encoded rows, and the model with theta0, where gradients are taken.

    Raises:
        UsageError: If config, data or model are wrong.
    """
    check_installed(config.model)
    tasks = tasks or load_tasks(config.data, seed=config.seed, commits=pinned_commits(Path(config.out)))
    check_request(config, tasks)
    if check is not None:
        check(tasks)
    model = _pin_model(config, Path(config.out))
    base = load_base(model, head=choose_head(tasks), n_labels=count_labels(tasks), max_length=config.data.max_length)
    rows = encode_tasks(tasks, base, max_length=config.data.max_length)
    probe = attach(base, config.adapter, seed=config.seed)
    check_fit(config, rows, probe)
    return tasks, rows, probe


def check_request(config: RunConfig, tasks: TaskSet) -> None:
    """Refuse what config and tasks alone rule out, before the model is loaded.

    Raises:
        ConfigError: If no grouping of the tasks meets what is asked, or a later stage could not use a value; names
            every fault.
        DataError: If tasks with and without a classification head are mixed.
    """
    if faults := list(_list_config_faults(config, tasks)):
        raise ConfigError("; ".join(faults))
    heads = {task.card.head: task.name for task in tasks.tasks}
    if len(heads) > 1:
        first, second = (f"{name!r} has head: {head}" for head, name in heads.items())
        raise DataError(f"one model has one kind of head, but task {first} and task {second}; give all the same")


def check_fit(config: RunConfig, rows: Rows, probe: AdaptedModel) -> None:
    """Refuse what the encoded tasks, the model or the adapter's size rule out, before the first stage.

    Raises:
        ConfigError: If ``gradients.output`` does not fit a task, the number of groups asked for breaks a budget, or
            the model can't do what a later stage would ask of it.
    """
    choose_modes(rows.learning, config.gradients.output)
    if faults := list(_list_model_faults(config, rows, probe)):
        raise ConfigError("; ".join(faults))


def choose_head(tasks: TaskSet) -> Head:
    """The kind of output layer the tasks' cards ask for."""
    return tasks.tasks[0].card.head


def count_labels(tasks: TaskSet) -> int:
    """Width of a classification head that serves every task: the largest number of classes."""
    return max(len(next(iter(task.splits["train"])).choices) for task in tasks.tasks)


def _pin_model(config: RunConfig, folder: Path) -> ModelConfig:
    """The model's settings, at the commit that a run folder was begun with, unless the config names one."""
    revision = config.model.revision or pinned_revision(folder, config.model.name)
    return config.model.model_copy(update={"revision": revision})


def _list_config_faults(config: RunConfig, tasks: TaskSet) -> Iterator[str]:
    """Values that are only found wrong beside others, or beside the tasks."""
    yield from list_demand_faults(config.grouping, tasks.names)
    free_text = [task.name for task in tasks.tasks if task.card.output_type != "multiple_choice"]
    if config.affinity.score == "accuracy" and free_text:
        yield f"affinity.score accuracy: tasks {', '.join(free_text)} answer with free text and have none; use nll"
    if fault := _find_subset_fault(len(tasks.tasks), config.affinity, config.seed):
        yield fault
    if fault := _find_projection_fault(config.gradients):
        yield fault
    yield from _list_estimation_faults(config.estimation)
    yield from _list_layout_faults(config)
    if is_warm(config):
        try:
            settle_training(config)
        except ConfigError as error:
            yield str(error)
    is_one_group = config.grouping.n_groups_asked == 1
    if config.ensemble.weights == "global" and config.ensemble.own_group_prior == 1 and not is_one_group:
        yield "ensemble.own_group_prior 1: leaves no common weights for tasks of several groups; lower it"
    trackers = config.training.report_to
    for name in trackers if trackers not in (("all",), ("none",)) else ():
        try:
            # What the trainer itself will do: whether a tracker is installed, it says on being made.
            get_reporting_integration_callbacks([name])[0]()
        except (ImportError, RuntimeError, ValueError) as error:
            yield f"training.report_to {name!r}: {str(error).splitlines()[0]}"


def _list_layout_faults(config: RunConfig) -> Iterator[str]:
    """What a model that is not whole on one device can't do."""
    if config.training.together and config.model.device_map == "fsdp":
        yield "training.together: not where processes share the work out (model.device_map fsdp); set it to false"
    if config.training.compile and config.model.device_map != "one":
        yield "training.compile: not for a model spread over devices (model.device_map); set it to false"


def _list_estimation_faults(config: EstimationConfig) -> Iterator[str]:
    """What the fit of the linear model can't do."""
    penalty, grid = config.l2_penalty, config.l2_grid
    if penalty == "auto" and not (grid and min(grid) > 0):
        yield f"estimation.l2_grid {list(grid)}: expected positive numbers, at least one"
    if config.method == "ridge" and penalty != "auto" and penalty <= 0:
        yield f"estimation.l2_penalty {penalty}: expected a positive number, or auto"
    if config.method == "steps":
        for key, value, default in (("l2_penalty", penalty, "auto"), ("balance", config.balance, "example")):
            if value != default:
                yield (
                    f"estimation.{key} {value}: method steps trains as the training does and has none; set "
                    "estimation.method: ridge"
                )


def _find_subset_fault(n_tasks: int, config: AffinityConfig, seed: int) -> str | None:
    """What keeps the subsets that the oracle is asked about from telling all tasks apart."""
    try:
        design = sample_subsets(n_tasks, config, seed=seed)
    except ConfigError as error:
        return str(error)
    n_absent = int((~design.membership.any(axis=0)).sum())
    if n_absent:
        return f"affinity.n_subsets {config.n_subsets}: {n_absent} of {n_tasks} tasks would be in no subset; raise it"
    if n_tasks > 2 and len(list_blind_tasks(design)) == n_tasks:
        size = len(design.subsets[0])
        return (
            f"affinity.n_subsets {config.n_subsets}: every task would be in one subset only, where no partner can be "
            f"told from another; set it to {min(math.comb(n_tasks, size), AffinityConfig().n_subsets)}"
        )
    return None


def _find_projection_fault(config: GradientsConfig) -> str | None:
    """What keeps several projections from being independent, or from being fitted."""
    n, width = config.n_projections, config.n_projections * config.proj_dim
    if n > 1 and config.proj_type in _SHARED_RANDOMNESS:
        reason = _SHARED_RANDOMNESS[config.proj_type]
        return (
            f"gradients.n_projections {n}: projections of proj_type {config.proj_type} {reason}; use rademacher or "
            "gaussian"
        )
    if width > MAX_PROJ_DIM:
        return (
            f"gradients.n_projections {n} of proj_dim {config.proj_dim}: a stored gradient has {width} numbers, at "
            f"most {MAX_PROJ_DIM} are allowed; lower one of them"
        )
    return None


def _list_model_faults(config: RunConfig, rows: Rows, probe: AdaptedModel) -> Iterator[str]:
    """Values that are only found wrong beside the model and the rows as it reads them."""
    wanted, model = config.grouping, probe.base.model
    budget = Budget(adapter_bytes(probe), config.boosting.n_rounds, wanted.max_memory_bytes, wanted.max_latency_ratio)
    if fault := find_budget_fault(wanted, rows.names, budget):
        yield fault
    if config.training.gradient_checkpointing and not model.supports_gradient_checkpointing:
        yield f"training.gradient_checkpointing: {type(model).__name__} can't recompute activations; set it to false"
    n_positions = getattr(model.config, "max_position_embeddings", None)
    longest = max((*rows.learning, *rows.test), key=lambda split: int(np.max(split.input_lengths, initial=0)))
    n_tokens = int(np.max(longest.input_lengths, initial=0))
    if n_positions is not None and n_tokens > n_positions:
        yield (
            f"data.max_length {config.data.max_length}: a row of task {longest.task!r} has {n_tokens} tokens, and the "
            f"model takes {n_positions}; lower it"
        )
    if config.gradients.proj_type == "none" and (fault := _find_exact_fault(config, rows, probe)):
        yield fault


def _find_exact_fault(config: RunConfig, rows: Rows, probe: AdaptedModel) -> str | None:
    """What keeps gradients from being kept without a projection, or from being used like that."""
    try:
        plan = plan_features(
            find_active_layers(probe, rows.learning), rows.learning, config.gradients, seed=config.seed
        )
    except ConfigError as error:
        return str(error)
    if plan.form == "gram" and config.boosting.n_rounds and config.boosting.direction == "projected":
        return (
            "boosting.direction projected: with gradients.proj_type none, inner products are kept, which can't be "
            "expanded to a step; use dual"
        )
    return None
