"""The sections on what was measured: predictions checked, test scores, weights, boosting, linearity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ensemblelora.evaluation.rows import BOOSTED_GROUP, OWN_GROUP
from ensemblelora.report.cells import group_cell, task_cell
from ensemblelora.report.charts import draw_prediction
from ensemblelora.report.document import Block, Cell, Column, FigureRow, Legend, Row, Section, Table, Text
from ensemblelora.report.feature_record import describe_features
from ensemblelora.report.heatmaps import draw_weights
from ensemblelora.report.records import BoostingRound, EnsembleRecord, Linearity, Prediction, RunRecord
from ensemblelora.report.wording import (
    count,
    format_number,
    format_percent,
    format_ratio,
    format_signed,
    group_letter,
    join_names,
)

__all__ = [
    "STAYED",
    "compute_rank_correlation",
    "list_unmoved",
    "list_warnings",
    "write_boosting",
    "write_linearity",
    "write_prediction_check",
    "write_weights",
]

STAYED = "kept its start: = base model"
_LOW_R2 = 0.5
_FEWEST_RANKS = 5
"""below which one exchange of neighbours changes a rank correlation by half or more"""


def write_prediction_check(run: RunRecord) -> Section | None:
    """Show the losses that were predicted before training against those that the groups' adapters alone then gave."""
    points = run.results.predicted_vs_measured if run.results else ()
    both = [point for point in points if point.predicted_nll is not None and point.measured_nll is not None]
    if not both:
        return None
    figures = [draw_prediction(both, as_change=False)]
    text = _agreement(
        "loss", [point.predicted_nll or 0.0 for point in both], [point.measured_nll or 0.0 for point in both]
    )
    from_base = [point for point in both if None not in (point.base_nll, point.measured_base_nll)]
    if from_base:
        figures.append(draw_prediction(from_base, as_change=True))
        predicted = [(point.predicted_nll or 0.0) - (point.base_nll or 0.0) for point in from_base]
        measured = [(point.measured_nll or 0.0) - (point.measured_base_nll or 0.0) for point in from_base]
        text += " " + _agreement("change from the base model", predicted, measured)
    caption = (
        "Measured: each task by its own group's adapter, without boosters or weights, which no plan predicts. Dotted: "
        "equality. Bars: one standard error of the prediction. Losses differ between tasks mostly by how hard "
        "the tasks are, so the changes, from the base model on the same rows, are the stricter test of the prediction."
    )
    blocks: list[Block] = [_outcome_table(run), Text(text), FigureRow(tuple(figures), caption)]
    return Section("prediction", "Predicted against measured", blocks)


def write_weights(run: RunRecord) -> Section | None:
    """Show how much each task listens to each group's adapter."""
    ensemble, plan = run.ensemble, run.plan
    if ensemble is None or not ensemble.weights or len(plan.groups) < 2:
        return None
    routed = ensemble.routed or (False,) * plan.n_tasks
    figure = draw_weights(ensemble.weights, plan.task_names, plan.groups, routed)
    names = [name for name, is_routed in zip(plan.task_names, routed, strict=False) if is_routed]
    text = (
        f"{count(len(names), 'task')} of {plan.n_tasks} can be answered by one group alone without measurable loss, "
        f"which makes predicting cheaper: {join_names(names)}. {_tell_how_to_route(ensemble, routed)}".strip()
        if names
        else "No task can be answered by one group alone without measurable loss."
    )
    caption = "Weights of a row sum to 1. Frames: the task's own group. Fitted on validation rows."
    legend = Legend("0", "1", "sequential")
    return Section("weights", "Ensemble weights", [Text(text), FigureRow((figure,), caption, legend)])


def _tell_how_to_route(ensemble: EnsembleRecord, routed: Sequence[bool]) -> str:
    """Say what answers the tasks so that could be, where their weights show that they are not."""
    is_mixed = any(can and max(weights) < 1 for can, weights in zip(routed, ensemble.weights, strict=False))
    return "--set ensemble.route=true has them answered so; no adapter is trained again." if is_mixed else ""


def write_boosting(run: RunRecord) -> Section | None:
    """List the attempts to add an adapter where a group still errs."""
    if run.ensemble is None:
        return None
    rounds = run.ensemble.boosting
    if not rounds:
        return Section("boosting", "Boosting", [Text(_no_boosting(run.ensemble))])
    n_accepted = sum(item.accepted for item in rounds)
    text = (
        f"{count(n_accepted, 'booster')} of {len(rounds)} tried {'was' if n_accepted == 1 else 'were'} kept. A booster "
        "is fitted to what the group with the largest training loss still gets wrong, and kept only if the loss on "
        "held-out rows drops by more than its standard error."
    )
    columns = (
        Column("Round", is_number=False),
        Column("Group", is_number=False),
        Column("Training loss"),
        Column("Held-out loss"),
        Column("Step \u00d7 share"),
        Column("Outcome", is_number=False),
    )
    note = (
        "Step: how far along the fitted direction the training loss was lowest, by line search; a gradient's length is "
        "no measure of it, so steps above 1 are usual. Share: of what that step changes, what is added "
        "(boosting.boosting_rate)."
    )
    share = run.config.boosting.boosting_rate
    table = Table("Boosting rounds", columns, tuple(_boosting_row(item, share) for item in rounds), note)
    return Section("boosting", "Boosting", [Text(text), table])


def write_linearity(run: RunRecord) -> Section | None:
    """Show what the gradients kept, how far training moved, and how well the linear model of the plan holds there."""
    blocks: list[Block] = []
    linearity = run.results.linearity if run.results else Linearity()
    if linearity.tasks or linearity.distances:
        blocks.append(Text(_judge_linearity(linearity)))
    if run.features is not None:
        blocks.append(Text(describe_features(run.features)))
    if linearity.tasks:
        blocks.append(_linearity_table(linearity, run))
    if linearity.distances:
        blocks.append(_distance_table(linearity, run.ensemble))
    return Section("linearity", "Does the linear model hold", blocks) if blocks else None


def list_warnings(run: RunRecord) -> tuple[str, ...]:
    """What to keep in mind before believing a run: of training, of the rows, and the plan's own."""
    shown = (_warn_of_outcome(run), _warn_of_linearity(run.results.linearity)) if run.results else ()
    of_rows = tuple(f"{warning[0].upper()}{warning[1:]}." for warning in run.tasks.warnings) if run.tasks else ()
    return (*(warning for warning in shown if warning), *of_rows, *run.plan.warnings)


def list_unmoved(linearity: Linearity) -> frozenset[str]:
    """Name the adapters that training left where they began: no evaluation was better than the model itself."""
    return frozenset(name for name, distance in linearity.distances.items() if distance.relative_to_model == 0)


def _warn_of_outcome(run: RunRecord) -> str | None:
    """Say where one adapter for all was the better choice after all, what had been predicted, and what to do."""
    plan, results = run.plan, run.results
    losses = results.find_difference("ensemble", "shared", "nll") if results else None
    if losses is None or losses.low is None or losses.low <= 0 or len(plan.groups) < 2:
        return None
    point = next((point for point in plan.curve if point.n_groups == len(plan.groups)), None)
    gain, error = (None, None) if point is None else (point.gain, point.gain_se)
    said = "" if gain is None else f" ({format_number(gain)}{'' if error is None else f' ± {format_number(error)}'})"
    wrong = f"the plan predicted the opposite{said}; " if gain is not None and gain > 0 else ""
    return (
        f"One adapter for all has the lower test loss here, by {format_number(losses.difference)}: {wrong}"
        "--set grouping.n_groups=1 trains one."
    )


def _warn_of_linearity(linearity: Linearity) -> str | None:
    """Say of which tasks the plan's predictions can't be trusted, since training left the linear model's reach."""
    values = {name: item.r2_over_zero_order for name, item in linearity.tasks.items()}
    low = [name for name, value in values.items() if value is not None and value < _LOW_R2]
    if not low:
        return None
    where = f"R² of the linear model is below {_LOW_R2} on {join_names(low)}"
    return f"{where}: what the plan says of them is a guess; go by the measured losses."


def compute_rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, ties ranked by their mean; none where a side does not vary."""
    ranks = np.array([_rank(np.asarray(first, dtype=np.float64)), _rank(np.asarray(second, dtype=np.float64))])
    if (ranks.std(axis=1) == 0).any():
        return None
    return float(np.corrcoef(ranks)[0, 1])


def _rank(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _outcome_table(run: RunRecord) -> Table:
    """The means that were predicted on validation rows beside those that were measured on test rows."""
    predicted, names = run.plan.predicted, run.plan.task_names
    methods = run.results.methods if run.results else {}
    ways = {
        "base": ("Base model", predicted.base),
        "shared": ("One adapter for all", predicted.shared),
        OWN_GROUP: ("The plan, each task by its own group's adapter", predicted.plan),
        BOOSTED_GROUP: ("The plan with boosters", Prediction()),
        "ensemble": ("The plan with weights and boosters", Prediction()),
    }
    if len(run.plan.groups) == 1 and "shared" in methods:
        ways = {"base": ways["base"], "shared": ("The plan, one adapter for all", predicted.plan)}
        if run.ensemble is not None and any(member.kind == "booster" for member in run.ensemble.members):
            ways["ensemble"] = ("The plan with boosters", Prediction())
    rows = []
    for method, (label, way) in ways.items():
        if method not in methods and way.mean_nll is None:
            continue
        measured = methods[method].mean("nll", names) if method in methods else None
        if method == OWN_GROUP and measured is None:
            measured = _mean_of_own(run)
        error = f"± {format_number(way.mean_nll_se)}" if way.mean_nll_se else ""
        rows.append(Row((Cell(label), Cell(format_number(way.mean_nll), error), Cell(format_number(measured)))))
    columns = (Column("Training", is_number=False), Column("Predicted loss"), Column("Measured loss"))
    note = (
        "Means over tasks, ± one standard error: predicted on validation rows before training, measured on test rows "
        "after it. A plan predicts the groups' adapters alone: boosters and weights are fitted later."
    )
    return Table("What the plan predicted, and what came out", columns, tuple(rows), note)


def _mean_of_own(run: RunRecord) -> float | None:
    """What the groups' own adapters gave, where it is kept beside the predictions alone."""
    points = run.results.predicted_vs_measured if run.results else ()
    known = [point.measured_nll for point in points if point.measured_nll is not None]
    return sum(known) / len(known) if known and len(known) == run.plan.n_tasks else None


def _agreement(what: str, predicted: Sequence[float], measured: Sequence[float]) -> str:
    error = float(np.mean(np.abs(np.subtract(predicted, measured))))
    correlation = compute_rank_correlation(predicted, measured) if len(predicted) >= _FEWEST_RANKS else None
    ranks = "" if correlation is None else f"; rank correlation {format_number(correlation, 2)}"
    tasks = count(len(predicted), "task")
    return f"Mean absolute error of the predicted {what}: {format_number(error)} over {tasks}{ranks}."


def _no_boosting(ensemble: EnsembleRecord) -> str:
    boosters = [member.name for member in ensemble.members if member.kind == "booster"]
    return f"Boosters: {join_names(boosters)}." if boosters else "No boosting was tried."


def _boosting_row(item: BoostingRound, share: float | None) -> Row:
    # The record has the product.
    parts = f"{format_ratio(item.rate / share)} \u00d7 {format_ratio(share)}" if item.rate is not None and share else ""
    return Row(
        (
            Cell(str(item.round)),
            group_cell(item.group),
            _change_cell(item.train_loss_before, item.train_loss_after),
            _change_cell(item.heldout_before, item.heldout_after),
            Cell(parts or format_number(item.rate)),
            Cell("kept" if item.accepted else "not kept", item.reason),
        )
    )


def _change_cell(before: float | None, after: float | None) -> Cell:
    change = None if before is None or after is None else after - before
    return Cell(f"{format_number(before)} → {format_number(after)}", "" if change is None else format_signed(change))


def _judge_linearity(linearity: Linearity) -> str:
    text = (
        "The plan takes the model to be linear in the adapter's weights around the base model. R² says how much of "
        "what training changed in the outputs that linear model explains: 1 is all, 0 no better than no change."
    )
    if not any(item.r2_over_zero_order is not None for item in linearity.tasks.values()):
        return text
    if warning := _warn_of_linearity(linearity):
        return f"{text} {warning}"
    return f"{text} It is at least {_LOW_R2} on every task measured."


def _linearity_table(linearity: Linearity, run: RunRecord) -> Table:
    groups = run.plan.group_by_name
    known = [name for name in run.plan.ordered_names if name in linearity.tasks]
    rows = tuple(
        Row(
            (
                task_cell(name, groups[name]),
                _r2_cell(linearity.tasks[name].r2_over_zero_order),
                Cell(format_percent(linearity.tasks[name].rms_relative_error)),
            )
        )
        for name in known
    )
    columns = (Column("Task", is_number=False), Column("R²"), Column("Relative error (RMS)"))
    return Table("R² of the linear model over no change, held-out rows", columns, rows)


def _r2_cell(value: float | None) -> Cell:
    return Cell(format_number(value, 2), share=None if value is None else min(1.0, max(0.0, value)))


def _distance_table(linearity: Linearity, ensemble: EnsembleRecord | None) -> Table:
    group_of = {member.name: member.group for member in ensemble.members} if ensemble else {}
    stayed = list_unmoved(linearity)
    rows = tuple(
        Row(
            (
                Cell(name, f"group {group_letter(group_of[name])}" if name in group_of else ""),
                Cell(format_percent(distance.relative_to_model, 2), STAYED if name in stayed else ""),
                Cell(format_percent(distance.relative_to_adapter_init, 1)),
            )
        )
        for name, distance in linearity.distances.items()
    )
    columns = (
        Column("Adapter", is_number=False),
        Column("Of the model's norm"),
        Column("Of the adapter's norm at start"),
    )
    return Table("How far training moved each adapter", columns, rows)
