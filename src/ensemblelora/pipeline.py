"""The main path: from datasets and a language model to an ensemble and its report, one line a stage.

Read :func:`run` first; it is the method. Everything it calls is in the package ``stages`` and in ``judging.py``, in the
same order.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ensemblelora import artifacts, judging, stages
from ensemblelora.config import RunConfig
from ensemblelora.errors import ConfigError
from ensemblelora.forecast import forecast_run
from ensemblelora.workspace import check_place, open_workspace

__all__ = ["STAGES", "RunResult", "estimate", "read_result", "run"]

STAGES = ("features", "affinity", "group", "train", "boost", "combine", "evaluate", "report")


@dataclass(frozen=True)
class RunResult:
    """What a run has left so far; none for what is not there yet."""

    folder: Path
    plan: dict[str, Any] | None
    results: dict[str, Any] | None
    costs: dict[str, Any] | None
    report: Path | None


def run(config: RunConfig, *, until: str = "report") -> RunResult:
    """Run the method, or continue it where it was broken off.

    Args:
        config: Everything the run needs; see :mod:`ensemblelora.config`.
        until: The last stage to run, one of :data:`STAGES`.

    Returns:
        Plan, results, costs and report of the run folder ``config.out``.

    Raises:
        UsageError: If config, data, model or output folder are wrong; before the run folder is made or changed.
        EnsembleLoraError: If a stage fails; what was finished is kept.
    """
    if until not in STAGES:
        raise ConfigError(f"stage {until!r}: expected one of {', '.join(STAGES)}")
    check_place(Path(config.out))
    tasks, rows, probe = stages.prepare(config)
    start = stages.identify_start(config, probe, rows)
    with open_workspace(config, until=until, start_fingerprint=start) as work:
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
        judging.write_report(work)
    if until == "report":
        stages.drop_lower_layers(Path(config.out))
    return read_result(Path(config.out))


def estimate(config: RunConfig) -> dict[str, dict[str, float]]:
    """Predict every stage's time, FLOPs, tokens and disk space without writing anything.

    Loads data and model and times a few passes; the model is not trained.

    Raises:
        UsageError: If config, data or model are wrong, as :func:`run` would say.
    """
    _, rows, probe = stages.prepare(config)
    return {name: asdict(stage) for name, stage in forecast_run(config, probe, rows).items()}


def read_result(folder: Path) -> RunResult:
    """Read what a run folder holds.

    Raises:
        OutputError: If it is no run folder.
        StoreError: If a file in it is damaged.
    """
    path = artifacts.RunFolder.open(folder).path

    def read(name: str) -> Any:
        return artifacts.read_json(path / name) if (path / name).exists() else None

    html = path / artifacts.REPORT_HTML_FILE
    return RunResult(
        folder=path,
        plan=read(artifacts.PLAN_FILE),
        results=read(artifacts.RESULTS_FILE),
        costs=read(artifacts.COSTS_FILE),
        report=html if html.exists() else None,
    )
