"""What a selection is asked for, checked before anything dear.

In: a config, the target's name, names of strategies, numbers. Out: :class:`Request`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ensemblelora.config import AffinityConfig, BoostingConfig, EnsembleConfig, GroupingConfig, RunConfig
from ensemblelora.config_stage import Stage
from ensemblelora.data.task import TaskSet
from ensemblelora.errors import ConfigError, UsageError
from ensemblelora.report.wording import join_names
from ensemblelora.selection.search import SearchSettings
from ensemblelora.selection.sources import find_target, list_sources
from ensemblelora.selection.strategies import choose_strategies

__all__ = ["Request", "check_request", "check_tasks", "settle_target", "without_groups"]


_UNUSED: Mapping[str, type[Stage]] = {
    "affinity": AffinityConfig,
    "grouping": GroupingConfig,
    "boosting": BoostingConfig,
    "ensemble": EnsembleConfig,
}


@dataclass(frozen=True)
class Request:
    """What is to be selected, for which target, and how far to go.

    Attributes:
        config: Of the run folder; where features are taken is settled.
        target: The task that counts.
        strategies: Names; the first says how many sources the baselines by likeness take.
        settings: Of the searches.
        includes_target: Whether the target's training rows are in every set; none: unless there is nothing else.
        n_clusters: Parts that each source is cut into; none: whole datasets.
        wants_samples: Whether rows are valued one by one.
        wants_final: Whether adapters are trained on what was chosen, and tested.
    """

    config: RunConfig
    target: str
    strategies: tuple[str, ...]
    settings: SearchSettings
    includes_target: bool | None
    n_clusters: int | None
    wants_samples: bool
    wants_final: bool


def check_request(
    config: RunConfig,
    target: str,
    strategies: Sequence[str],
    settings: SearchSettings | None = None,
    *,
    includes_target: bool | None = None,
    n_clusters: int | None = None,
    wants_samples: bool = False,
    wants_final: bool = True,
) -> Request:
    """Check names and numbers that need no data.

    Args:
        config: ``gradients.linearize_at: auto`` stands for a warm-up here.
        target: A task's name.
        strategies: As :func:`~.strategies.choose_strategies` takes them.
        settings: None: sizes and number of random sets, and the seed, are the config's.
        includes_target: See :class:`Request`.
        n_clusters: See :class:`Request`.
        wants_samples: See :class:`Request`.
        wants_final: See :class:`Request`.

    Raises:
        UsageError: If one is wrong.
        ConfigError: If clusters or the warm-up can't be made with the config.
    """
    chosen = choose_strategies(strategies)
    if n_clusters is not None and n_clusters < 1:
        raise UsageError(f"--by-cluster {n_clusters}: expected 1 or more")
    if n_clusters is not None and config.gradients.train_fraction < 1:
        raise ConfigError(
            f"gradients.train_fraction {config.gradients.train_fraction}: clusters need the features of all training "
            "rows; set it to 1"
        )
    if config.gradients.linearize_at == "auto":
        gradients = config.gradients.model_copy(update={"linearize_at": "warmup"})
        config = config.model_copy(update={"gradients": gradients})
    if config.gradients.linearize_at == "warmup" and config.training.num_train_epochs < 2:
        raise ConfigError(
            f"training.num_train_epochs {config.training.num_train_epochs}: a warm-up takes half of the epochs; give "
            "at least 2, or leave the warm-up out with --set gradients.linearize_at=base"
        )
    if settings is None:
        sizes = {"subset_size": config.affinity.subset_size, "n_subsets": config.affinity.n_subsets}
        settings = SearchSettings(**sizes, seed=config.seed)
    return Request(config, target, chosen, settings, includes_target, n_clusters, wants_samples, wants_final)


def check_tasks(request: Request, tasks: TaskSet) -> None:
    """Refuse what the tasks rule out, before the model is loaded.

    Raises:
        UsageError: If the target is unknown, there is nothing to choose from, or a source has fewer rows than it is to
            have clusters; names all of these.
    """
    target, includes_target = find_target(tasks.names, request.target), settle_target(request, len(tasks.names))
    list_sources(tasks.names, target, includes_target=includes_target)
    if request.n_clusters is None:
        return
    sizes = {task.name: len(task.splits["train"]) for task in tasks.tasks}
    if includes_target:
        del sizes[request.target]
    if small := [f"{name} ({n_rows})" for name, n_rows in sizes.items() if n_rows < request.n_clusters]:
        raise UsageError(
            f"--by-cluster {request.n_clusters}: more clusters than training rows in {join_names(small)}; give at most "
            f"{min(sizes.values())}"
        )


def without_groups(config: RunConfig) -> RunConfig:
    """The config without what is asked of groups, which a selection does not make: it must not stop one."""
    return config.model_copy(update={name: section() for name, section in _UNUSED.items()})


def settle_target(request: Request, n_tasks: int) -> bool:
    """Whether the target's training rows are in every set: unless asked otherwise, or its clusters are all there is."""
    if request.includes_target is not None:
        return request.includes_target
    return n_tasks > 1 or request.n_clusters is None
