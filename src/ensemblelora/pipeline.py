"""The main path: from datasets and a language model to an ensemble and its report, one line a stage.

Read :func:`run` first; it is the method. Everything it calls is in the package ``stages`` and in ``judging.py``, in the
same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ensemblelora import artifacts, judging, progress, reporting, stages
from ensemblelora.config import RunConfig, dump_config
from ensemblelora.earlier import foresee_place, list_changes
from ensemblelora.errors import ConfigError
from ensemblelora.forecast import add_up, forecast_run
from ensemblelora.pace import divide_work
from ensemblelora.report.wording import count, join_names
from ensemblelora.scheduling import Cluster, open_scheduler
from ensemblelora.sharding import find_place
from ensemblelora.startpoint import is_warm
from ensemblelora.workspace import check_place, open_workspace

__all__ = ["STAGES", "Foresight", "RunResult", "estimate", "foresee", "read_result", "run"]

_MOST_NAMED = 12

STAGES = ("features", "affinity", "group", "train", "boost", "combine", "evaluate", "report")
_COSTLY = ("warmup", *STAGES[:-2], "baselines", "evaluate", "report")
"""stages that a forecast may name and a run may go through, in their order"""


@dataclass(frozen=True)
class RunResult:
    """What a run has left so far; none for what is not there yet."""

    folder: Path
    plan: dict[str, Any] | None
    results: dict[str, Any] | None
    costs: dict[str, Any] | None
    report: Path | None

    @property
    def groups(self) -> tuple[tuple[str, ...], ...] | None:
        """The plan's groups, by the tasks' names."""
        if self.plan is None:
            return None
        names = self.plan["task_names"]
        return tuple(tuple(names[task] for task in group) for group in self.plan["groups"])


@dataclass(frozen=True)
class Foresight:
    """What a run would do to its folder, and take, before it is made."""

    stages: dict[str, dict[str, float]]
    """each up to the last one asked for, and their ``total``"""
    later_seconds: float
    """that the stages after it would take"""
    set_aside: Path | None
    """where the finished run that lies in the folder would be kept, if something changes it"""
    changes: tuple[str, ...]
    """what does, in a few words each"""
    is_finished: bool = False
    """whether the folder holds the very run that is asked for, so that nothing would be done"""


def run(config: RunConfig, *, until: str = "report", cluster: Cluster | None = None) -> RunResult:
    """Run the method, or continue it where it was broken off.

    Args:
        config: Everything the run needs; see :mod:`ensemblelora.config`.
        until: The last stage to run, one of :data:`STAGES`.
        cluster: Where independent jobs run, from :func:`~ensemblelora.scheduling.read_cluster`; none: in this process.

    Returns:
        Plan, results, costs and report of the run folder ``config.out``.

    Raises:
        UsageError: If config, data, model or output folder are wrong; before the run folder is made or changed.
        EnsembleLoraError: If a stage fails; what was finished is kept.
    """
    if until not in STAGES:
        raise ConfigError(f"stage {until!r}: expected one of {', '.join(STAGES)}")
    config = _take_place(config, cluster)
    check_place(Path(config.out))
    tasks, rows, probe = stages.prepare(config)
    start = stages.identify_start(config, probe, rows)
    with (
        progress.counting(_list_stages(config, until), divide_work(config, rows) if cluster is None else None),
        open_scheduler(cluster) as scheduler,
        open_workspace(config, until=until, start_fingerprint=start, scheduler=scheduler) as work,
    ):
        stages.describe_run(work, tasks, rows, probe)
        probe = stages.keep_lower_layers(
            config, work.path, probe, rows
        )  # activations that no adapter changes, once a row

        probe = stages.warm_up(work, probe, rows)  # another start than the base model, where one is asked for
        store = stages.take_features(work, probe, rows)  # projected gradients, section 2.2
        oracle, affinity = stages.estimate_affinity(work, store, rows, probe)  # f-hat of many subsets; equation 1
        plan = stages.choose_plan(work, oracle, affinity, rows, probe)  # groups, m, or "do not group"
        members = stages.train_groups(work, probe, plan, rows)  # one adapter per group, section 2.3
        rounds = stages.boost_groups(work, probe, plan, members, store, rows)  # adapters where a group still errs
        ensemble = stages.combine_members(work, probe, plan, members, rounds, rows)  # convex weights per task
        shared = judging.train_baselines(work, probe, plan, rows)
        judging.evaluate_methods(work, probe, ensemble, shared, plan, rows)  # the test rows, for the first time
        reporting.write_report(work)
    if until == "report":
        stages.drop_lower_layers(Path(config.out))
    return read_result(Path(config.out))


def _list_stages(config: RunConfig, until: str) -> list[str]:
    """Name the stages that a run goes through, in their order."""
    left_out = set() if is_warm(config) else {"warmup"}
    if "shared" not in config.evaluation.baselines:
        left_out.add("baselines")
    return [name for name in _COSTLY[: _COSTLY.index(until) + 1] if name not in left_out]


def _take_place(config: RunConfig, cluster: Cluster | None) -> RunConfig:
    """Give each of several processes that run side by side a run folder of its own; the first has the one asked for."""
    if config.model.device_map != "fsdp":
        return config
    if cluster is not None:
        raise ConfigError("--cluster: not with model.device_map fsdp, whose processes run side by side; leave one out")
    return config.model_copy(update={"out": str(find_place(Path(config.out)))})


def estimate(config: RunConfig) -> dict[str, dict[str, float]]:
    """Predict every stage's time, FLOPs, tokens and disk space without writing anything.

    Loads data and model and times a few passes; the model is not trained.

    Raises:
        UsageError: If config, data or model are wrong, as :func:`run` would say.
    """
    return foresee(config).stages


def foresee(config: RunConfig, *, until: str = "report") -> Foresight:
    """Predict what :func:`run` up to a stage would take, and whether it would set a finished run aside.

    Args:
        config: The run.
        until: The last stage, one of :data:`STAGES`.

    Raises:
        UsageError: As :func:`estimate`.
    """
    tasks, rows, probe = stages.prepare(config)
    progress.note(_describe_request(config, tasks.names))
    found = forecast_run(config, probe, rows)
    total = found.pop("total")
    asked = {name: stage for name, stage in found.items() if _COSTLY.index(name) <= _COSTLY.index(until)}
    shown = asked | {"total": add_up(list(asked.values()))}
    folder, changes = Path(config.out), list[str]()
    if (folder / artifacts.ENSEMBLE_FILE).exists():
        records = stages.make_records(config, folder, tasks, rows, probe)
        changes = list_changes(folder, {artifacts.CONFIG_FILE: dump_config(config), **records})
    return Foresight(
        stages={name: asdict(stage) for name, stage in shown.items()},
        later_seconds=total.seconds - shown["total"].seconds,
        set_aside=foresee_place(folder) if changes else None,
        changes=tuple(changes),
        is_finished=not changes and (folder / artifacts.REPORT_HTML_FILE).exists(),
    )


def _describe_request(config: RunConfig, names: Sequence[str]) -> str:
    """Name model, tasks and run folder in a line."""
    tasks = f"{count(len(names), 'task')} ({join_names([*names], _MOST_NAMED)})"
    return f"predicted for model {config.model.name} and {tasks}, in {config.out}"


def read_result(folder: Path) -> RunResult:
    """Read what a run folder holds.

    Raises:
        OutputError: If it is no run folder.
        StoreError: If a file in it is damaged.
    """
    opened = artifacts.RunFolder.open(folder)
    path = opened.path

    def read(name: str) -> Any:
        opened.check(name)
        return artifacts.read_json(path / name) if (path / name).exists() else None

    html, costs = path / artifacts.REPORT_HTML_FILE, read(artifacts.COSTS_FILE)
    return RunResult(
        folder=path,
        plan=read(artifacts.PLAN_FILE),
        results=read(artifacts.RESULTS_FILE),
        costs=costs and _leave_out_notes(costs),
        report=html if html.exists() else None,
    )


def _leave_out_notes(costs: dict[str, Any]) -> dict[str, Any]:
    """The ledger without what is in it for later runs alone."""
    stages = [{key: value for key, value in stage.items() if key != "parts"} for stage in costs["stages"]]
    return {name: value for name, value in costs.items() if name != "unconfirmed"} | {"stages": stages}
