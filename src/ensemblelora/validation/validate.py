"""Is the oracle right? A run's predictions beside true fine-tunings of subsets of its tasks.

In: a planned run's folder. Out: :class:`Validation`, and in the run folder ``validation/``: ``truth.jsonl`` and the
adapters as they come, ``validation.json`` at the end. Test rows are not read. Cost: one fine-tuning a subset and seed,
hours where a run takes minutes; predictions cost seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ensemblelora import artifacts, progress, stages
from ensemblelora.adapters import AdaptedModel
from ensemblelora.affinity import sample_subsets
from ensemblelora.config import RunConfig, load_config
from ensemblelora.errors import UsageError
from ensemblelora.estimation import Oracle
from ensemblelora.scheduling import Cluster, open_scheduler
from ensemblelora.stages import Rows
from ensemblelora.startpoint import load_start
from ensemblelora.validation.agreement import Agreement, compare_predictions
from ensemblelora.validation.dimensions import collect_wider, list_predictors
from ensemblelora.validation.groupings import GroupingAgreement, compare_groupings
from ensemblelora.validation.records import TrueRun, read_runs
from ensemblelora.validation.table import Truth, mean_over_seeds, tabulate
from ensemblelora.validation.truth import Subset, choose_subsets, measure_base, measure_subsets, plan_measurements
from ensemblelora.workspace import ORACLE_FILE

__all__ = [
    "TRUTH_FILE",
    "VALIDATION_FILE",
    "VALIDATION_FOLDER",
    "Comparison",
    "Validation",
    "collect_truth",
    "compare",
    "count_costs",
    "find_unmeasured",
    "open_validated",
    "validate_run",
]

VALIDATION_FOLDER = "validation"
VALIDATION_FILE = "validation.json"
TRUTH_FILE = "truth.jsonl"
_PAPER_EPOCHS = 10


@dataclass(frozen=True)
class Comparison:
    """One predictor against the truth."""

    predictor: str
    nll: Agreement
    accuracy: Agreement | None
    """none where no task has one"""
    groupings: GroupingAgreement | None
    """none where a task was measured in no subset of ``affinity.subset_size``"""


@dataclass(frozen=True)
class Costs:
    """What predicting and measuring cost, in FLOPs, each distinct subset once.

    Attributes:
        estimation: Features and oracle, all the subsets the run asks about included.
        gradient_share: Of it, features.
        true_runs: The measured fine-tunings of the first seed, validation of checkpoints included.
        true_seconds: Of all measured fine-tunings.
        design: What fine-tuning all subsets that the run asked the oracle about would cost, by the measured singles.
        design_paper_epochs: The same at the paper's ten epochs.
        n_subsets_measured: Behind ``true_runs``.
        n_subsets_design: Behind ``design``.
    """

    estimation: int
    gradient_share: float
    true_runs: int
    true_seconds: float
    design: int
    design_paper_epochs: int
    n_subsets_measured: int
    n_subsets_design: int


@dataclass(frozen=True)
class Validation:
    """Predicted against true, for every predictor that was asked."""

    tasks: tuple[str, ...]
    subsets: tuple[tuple[str, ...], ...]
    n_true_runs: int
    n_seeds: int
    marked: tuple[str, ...]
    mean_relative_distance: float
    """of trained weights from theta0, over the norm of the base weights (paper, table 2)"""
    comparisons: tuple[Comparison, ...]
    costs: Costs

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for ``validation.json``: tasks by name, sizes as text."""
        plain = asdict(self)
        for entry in plain["comparisons"]:
            for agreement in (entry["nll"], entry["accuracy"]):
                if agreement is not None:
                    agreement["per_task"] = {self.tasks[i]: f for i, f in agreement["per_task"].items()}
                    for name in ("by_size", "transfer"):
                        agreement[name] = {str(size): figures for size, figures in agreement[name].items()}
        return plain


def validate_run(
    folder: Path | str,
    *,
    n_subsets: int = 50,
    n_seeds: int = 1,
    all_dimensions: bool = False,
    device: str | None = None,
    cluster: Cluster | None = None,
) -> Validation:
    """Fine-tune subsets of a run's tasks and compare what comes out with what the run's oracle predicts.

    Stopped at any moment, the same call goes on from the last finished fine-tuning; asking for more subsets or seeds
    only adds to them.

    Args:
        folder: A run folder that holds an oracle (``ensemblelora affinity`` or a later stage).
        n_subsets: Distinct subsets: all tasks, each alone, and for the rest ``affinity.subset_size`` of them.
        n_seeds: Fine-tunings of each, with other orders of rows; two or more measure the noise.
        all_dimensions: Whether to predict from 800, 400, 200 and 100 numbers a gradient and from whole gradients
            (``exact``) besides; narrower ones than the run's own always are. Takes two gradient passes.
        device: Where to train; none: as the run's config says.
        cluster: Where fine-tunings run side by side; none: in this process.

    Raises:
        UsageError: If the run has no oracle yet, or its model or rows have changed.
        OutputError: If ``folder`` is no run or can't be written.
        StoreError: If a file of it is damaged.
    """
    run, config = open_validated(folder, n_subsets=n_subsets, n_seeds=n_seeds, device=device)
    with run.lock(), progress.stage("validate"):
        runs, base = collect_truth(run.path, config, n_subsets=n_subsets, n_seeds=n_seeds, cluster=cluster)
        oracle, place = stages.read_oracle(run.path, tuple(base.nll), config.estimation), run.path / VALIDATION_FOLDER
        wider = collect_wider(run.path, place, oracle, config) if all_dimensions else None
        found = compare(run.path, config, runs, base, list_predictors(oracle, config, wider))
        artifacts.write_json(place / VALIDATION_FILE, found.to_dict())
    return found


def open_validated(
    folder: Path | str, *, n_subsets: int, n_seeds: int, device: str | None
) -> tuple[artifacts.RunFolder, RunConfig]:
    """Open a run that can be validated, and read its config; raises what :func:`validate_run` does."""
    run = artifacts.RunFolder.open(folder)
    config = load_config(run.path / artifacts.CONFIG_FILE)
    if device is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"device": device})})
    if n_seeds < 1 or n_subsets < 1:
        raise UsageError(f"{n_subsets} subsets, {n_seeds} seeds: expected 1 or more of each")
    if not (run.path / ORACLE_FILE).exists():
        raise UsageError(f"{run.path}: no oracle yet; make it with: ensemblelora plan {run.path}")
    return run, config


def find_unmeasured(
    run: artifacts.RunFolder, config: RunConfig, rows: Rows, probe: AdaptedModel, *, n_subsets: int, n_seeds: int
) -> list[tuple[Subset, int]]:
    """List the subsets, with their seeds, that a validation would have to fine-tune still."""
    wanted = _plan(run.path, config, rows, probe, n_subsets=n_subsets, n_seeds=n_seeds)
    found = read_runs(run.path / VALIDATION_FOLDER / TRUTH_FILE, wanted)
    return [subset for identity, subset in wanted.items() if identity not in found]


def _plan(
    path: Path, config: RunConfig, rows: Rows, probe: AdaptedModel, *, n_subsets: int, n_seeds: int
) -> dict[str, tuple[Subset, int]]:
    """List all fine-tunings that are asked for, by identity."""
    before = artifacts.read_json(path / artifacts.ENVIRONMENT_FILE)["model"]["fingerprint"]
    if probe.base.fingerprint != before:
        raise UsageError(f"{path}: made with another version of {config.model.name!r} or another model.dtype")
    subsets = choose_subsets(len(rows.names), n_subsets, config.affinity.subset_size, seed=config.seed)
    return plan_measurements(subsets, n_seeds, rows, stages.identify_start(config, probe, rows), config)


def collect_truth(
    path: Path, config: RunConfig, *, n_subsets: int, n_seeds: int, cluster: Cluster | None = None
) -> tuple[tuple[TrueRun, ...], TrueRun]:
    """Fine-tune what is not measured yet; return all that was asked for, and the base model's record."""
    _, rows, probe = stages.prepare(config)
    start = stages.identify_start(config, probe, rows)
    wanted = _plan(path, config, rows, probe, n_subsets=n_subsets, n_seeds=n_seeds)
    probe = stages.keep_lower_layers(config, path, load_start(config, artifacts.RunFolder(path), probe), rows)
    place = path / VALIDATION_FOLDER / TRUTH_FILE
    base = measure_base(place, start, probe, rows, config)
    with open_scheduler(cluster) as scheduler:
        found = measure_subsets(place, wanted, probe, rows, config, scheduler=scheduler, start_fingerprint=start)
    stages.drop_lower_layers(path)
    return tuple(found.values()), base


def compare(
    path: Path, config: RunConfig, runs: Sequence[TrueRun], base: TrueRun, predictors: Iterable[tuple[str, Oracle]]
) -> Validation:
    """Ask oracles, the run's own first, about the measured subsets.

    Args:
        path: The run folder.
        config: The run's.
        runs: The true fine-tunings.
        base: The base model's record.
        predictors: Oracles of the run's tasks, by name.
    """
    truth = tabulate(runs, base, tuple(base.nll), confidence=config.evaluation.confidence)
    return Validation(
        tasks=truth.tasks,
        subsets=tuple(tuple(truth.tasks[i] for i in subset) for subset in truth.subsets),
        n_true_runs=len(runs),
        n_seeds=len(truth.nll),
        marked=tuple(truth.tasks[i] for i in truth.marked),
        mean_relative_distance=float(np.mean([run.relative_distance for run in runs])),
        comparisons=tuple(_compare(name, oracle, truth, config) for name, oracle in predictors),
        costs=count_costs(path, config, runs, truth.tasks),
    )


def _compare(name: str, oracle: Oracle, truth: Truth, config: RunConfig) -> Comparison:
    scores, confidence = oracle.score(truth.subsets), config.evaluation.confidence
    against = partial(compare_predictions, subsets=truth.subsets, confidence=confidence, seed=config.seed)
    has_none = [i for i, accuracy in enumerate(truth.base_accuracy) if math.isnan(accuracy)]
    size, groupings = config.affinity.subset_size, None
    covered = {i for subset in truth.subsets if len(subset) == size for i in subset}
    if size >= 2 and len(covered) == len(truth.tasks):
        groupings = compare_groupings(
            scores.nll,
            mean_over_seeds(truth.nll),
            truth.subsets,
            higher_is_better=False,
            subset_size=size,
            marked=truth.marked,
            confidence=confidence,
            seed=config.seed,
        )
    return Comparison(
        predictor=name,
        nll=against(truth.nll, scores.nll, base=truth.base_nll, marked=truth.marked),
        accuracy=against(truth.accuracy, scores.accuracy, base=truth.base_accuracy, marked={*truth.marked, *has_none})
        if len({*truth.marked, *has_none}) < len(truth.tasks)
        else None,
        groupings=groupings,
    )


def count_costs(path: Path, config: RunConfig, runs: Sequence[TrueRun], names: Sequence[str]) -> Costs:
    """Compare what predicting took, by the run's ledger, with what fine-tuning took and would take."""
    ledger = {entry["stage"]: entry["flops"] for entry in artifacts.read_json(path / artifacts.COSTS_FILE)["stages"]}
    features, oracle = ledger["features"], ledger["affinity"]
    first = {run.tasks: run for run in runs if run.seed == 0}
    alone = {name: first[(name,)].flops for name in names if (name,) in first}
    design = sample_subsets(len(names), config.affinity, seed=config.seed).subsets
    full = sum(alone.get(names[i], 0) for subset in design for i in subset)
    return Costs(
        estimation=features + oracle,
        gradient_share=features / (features + oracle),
        true_runs=sum(run.flops for run in first.values()),
        true_seconds=sum(run.seconds for run in runs),
        design=full,
        design_paper_epochs=full * _PAPER_EPOCHS // config.training.num_train_epochs,
        n_subsets_measured=len(first),
        n_subsets_design=len(design),
    )
