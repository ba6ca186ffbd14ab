"""What an analysis would cost, before it starts: its own count of rows, times what a row costs in each variant.

In: an analysis and its request. Out: a line a part, and the total. A variant's model is loaded and a few of its passes
are timed, once for each base, precision and kind of adapter; ranks of one kind cost alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ensemblelora import artifacts, progress, stages
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel
from ensemblelora.analysis.registry import Analysis
from ensemblelora.analysis.request import AnalysisRequest, Work
from ensemblelora.analysis.variant import change_config
from ensemblelora.config import RunConfig
from ensemblelora.counting import count_full_training, count_training
from ensemblelora.data.batching import collate
from ensemblelora.data.task import TaskSet
from ensemblelora.forecast import list_stages, make_forecaster
from ensemblelora.stages import Rows

__all__ = ["forecast_analysis"]


@dataclass(frozen=True)
class _Price:
    """Of one row: seconds, FLOPs."""

    trained: tuple[float, float]
    gradient: tuple[float, float]
    forward: tuple[float, float]
    full: float
    """times a trained row, where all weights are trained"""


def forecast_analysis(analysis: Analysis, request: AnalysisRequest[Any]) -> dict[str, dict[str, float]]:
    """Predict an analysis' fine-tunings, FLOPs and seconds; nothing is written, nothing is trained.

    Args:
        analysis: What is asked for.
        request: Its request.

    Returns:
        For each part ``fine_tunings``, ``flops`` and ``seconds``; ``total`` adds them up.

    Raises:
        UsageError: As the analysis would.
    """
    tasks, rows, _ = stages.prepare(request.config)
    prices: dict[str, _Price] = {}
    lines = {}
    for name, work in analysis.forecast(request, rows).items():
        config = change_config(request.config, work.changes)
        kind = artifacts.fingerprint(config.model, config.adapter.method, config.adapter.layers_to_transform)
        if kind not in prices:
            is_alike = (config.data, config.seed) == (request.config.data, request.config.seed)
            progress.note(f"timing a few passes for {name} ...")
            prices[kind] = _find_price(config, tasks if is_alike else None)
        lines[name] = _multiply(work, prices[kind])
    if len(prices) < len(lines):
        progress.note("parts that differ in rank, width or number alone are priced as one, at the config's")
    keys = ("fine_tunings", "flops", "seconds")
    return lines | {"total": {key: sum(line[key] for line in lines.values()) for key in keys}}


def _find_price(config: RunConfig, tasks: TaskSet | None) -> _Price:
    """Time a few passes of a variant, and divide a run's forecast by its rows."""
    evaluation = config.evaluation.model_copy(update={"baselines": ("base", "shared")})
    config = config.model_copy(update={"evaluation": evaluation})
    _, rows, probe = stages.prepare(config, tasks=tasks)
    run = make_forecaster(config, probe, rows)
    found = list_stages(run)
    n_members = config.ensemble.count_candidates(run.most_groups) + config.boosting.n_rounds + len(evaluation.baselines)
    n_train, n_test = (sum(split.n_examples for split in splits) for splits in (rows.train, rows.test))
    n_validation = sum(split.n_examples for split in rows.validation)
    n_features = config.gradients.train_fraction * n_train + config.gradients.validation_fraction * n_validation

    def price(stage: str, n_rows: float) -> tuple[float, float]:
        return found[stage].seconds / n_rows, found[stage].flops / n_rows

    return _Price(
        trained=price("baselines", n_train * config.training.num_train_epochs),
        gradient=price("features", n_features),
        forward=price("evaluate", n_members * n_test),
        full=_compare_full(probe, rows),
    )


def _compare_full(probe: AdaptedModel, rows: Rows) -> float:
    """FLOPs of training all weights over those of training the adapter, whose lower blocks run once for all epochs."""
    split = max(rows.train, key=lambda s: s.n_examples)
    batch = collate([(split, 0)], probe.base.pad_token_id)
    full, own = Meter("full"), Meter("adapter")
    count_full_training(full, probe.costs, batch)
    count_training(own, probe.costs, batch)
    return full.record.flops / own.record.flops if own.record.flops else 1.0


def _multiply(work: Work, price: _Price) -> dict[str, float]:
    trained = work.trained_rows * (price.full if work.is_full else 1.0)
    parts = ((trained, price.trained), (work.gradient_rows, price.gradient), (work.forward_rows, price.forward))
    return {
        "fine_tunings": work.fine_tunings,
        "flops": sum(n * flops for n, (_, flops) in parts),
        "seconds": sum(n * seconds for n, (seconds, _) in parts),
    }
