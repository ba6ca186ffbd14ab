"""The screen of a validation: every predictor against the truth, then tasks, groups and costs of the run's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from ensemblelora.report.wording import NOTHING, count, format_flops, format_seconds
from ensemblelora.validation.agreement import Agreement, Estimate, Figures
from ensemblelora.validation.validate import Comparison, Validation

__all__ = ["render_validation"]


def render_validation(found: Validation) -> list[Text | Table]:
    """Say on one screen how far the oracle's predictions can be relied on.

    Args:
        found: What :func:`ensemblelora.validation.validate.validate_run` measured.

    Returns:
        Lines and tables for :func:`ensemblelora.console.show_table`.
    """
    own = found.comparisons[0]
    seeds = count(found.n_seeds, "seed")
    title = f"{count(len(found.subsets), 'subset')} of {len(found.tasks)} tasks fine-tuned, {seeds}: {_judge(own.nll)}"
    parts: list[Text | Table] = [Text(title, style="bold"), Text(), _compare_predictors(found), Text()]
    parts += [_list_tasks(found, own.nll), Text()]
    parts += [Text(line) for line in _list_notes(found, own)]
    return parts


def _judge(loss: Agreement) -> str:
    """One sentence on what matters for grouping: are the differences that partners make predicted."""
    within, over = loss.overall.corrected_within_pearson, loss.overall.r2_over_task_mean
    if within.value is None:
        within = loss.overall.within_pearson
    if within.value is None:
        return "too few to tell what partners change"
    told = f"partners' effects are predicted with correlation {_write(within)}"
    beats = over.low is not None and over.low > 0
    return told + ("" if beats else "; a task's mean is predicted no worse")


def _compare_predictors(found: Validation) -> Table:
    table = _table("predictor", "relative error", "Pearson", "within tasks", "less noise", "R² base", "R² task mean")
    for entry in found.comparisons:
        table.add_row(f"{entry.predictor}, loss", *_row(entry.nll.overall))
    for entry in found.comparisons:
        if entry.accuracy is not None:
            table.add_row(f"{entry.predictor}, accuracy", *_row(entry.accuracy.overall))
    return table


def _row(figures: Figures) -> Sequence[str]:
    columns = ("pearson", "within_pearson", "corrected_within_pearson", "r2_over_base", "r2_over_task_mean")
    error = _write(figures.relative_error, percent=True)
    return error, *(_write(getattr(figures, name)) for name in columns)


def _list_tasks(found: Validation, loss: Agreement) -> Table:
    table = _table("task", "cells", "relative error", "bias", "within task", "noise", "signal")
    for i, figures in loss.per_task.items():
        name = found.tasks[i]
        table.add_row(
            f"{name} (at chance)" if name in found.marked else name,
            str(figures.n_cells),
            _write(figures.relative_error, percent=True, interval=False),
            _write(figures.bias, interval=False),
            _write(figures.within_pearson),
            _write(figures.noise_sd, interval=False),
            _write(figures.signal_sd, interval=False),
        )
    return table


def _list_notes(found: Validation, own: Comparison) -> Iterator[str]:
    one = own.nll.one_or_all
    if one is not None:
        yield (
            "one adapter for all against one per task, mean loss: "
            f"predicted {_write(one.predicted_mean)}, measured {_write(one.true_mean)}"
        )
    for entry in own.groupings.groupings if own.groupings is not None else ():
        gain = NOTHING if entry.share_of_gain is None else f"{entry.share_of_gain:.0%}"
        yield f"{entry.n_groups} groups by prediction have {gain} of the density that groups by the truth gain"
    yield f"trained weights moved by {found.mean_relative_distance:.2%} of the base model's norm"
    costs = found.costs
    ratio = costs.true_runs / costs.estimation
    paper = costs.design_paper_epochs / costs.estimation
    yield (
        f"predicting took {format_flops(costs.estimation)} ({costs.gradient_share:.0%} gradients), the "
        f"{count(costs.n_subsets_measured, 'true run')} {ratio:.1f}x that and {format_seconds(costs.true_seconds)} in "
        f"all; all {costs.n_subsets_design} subsets of the affinity at the paper's 10 epochs would take {paper:.0f}x"
    )


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name in ("predictor", "task") else "right")
    return table


def _write(value: Estimate, *, percent: bool = False, interval: bool = True) -> str:
    if value.value is None:
        return NOTHING
    form = "{:.1%}" if percent else "{:.2f}" if interval else "{:.3f}"
    told = form.format(value.value)
    if interval and value.low is not None and value.high is not None:
        told += f" [{form.format(value.low)}, {form.format(value.high)}]"
    return told
