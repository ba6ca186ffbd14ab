"""The sections of a comparison's page on the number of groups, and on one step of boosting. No torch.

In: what :mod:`.ablation` collects. Out: sections; none where their methods were not carried out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ensemblelora.comparison.ablation import (
    FirstRound,
    GroupNumber,
    collect_first_rounds,
    collect_numbers,
    compare_boosting,
    rank_alike,
)
from ensemblelora.comparison.record import StudyRecord
from ensemblelora.comparison.sections import describe_change
from ensemblelora.comparison.statistics import Figure as Number
from ensemblelora.comparison.statistics import Statistics
from ensemblelora.report.document import Block, Cell, Column, Figure, FigureRow, Row, Section, Table, Text
from ensemblelora.report.plotting import LEGEND_ABOVE, complete
from ensemblelora.report.wording import count, format_interval, format_number, format_percent, join_names

__all__ = ["write_boosting", "write_numbers"]


def write_numbers(study: StudyRecord, found: Statistics) -> Section | None:
    """What each number of groups gave, beside what the plan expected of it."""
    numbers = collect_numbers(study, found)
    if len(numbers) < 2:
        return None
    labels = ("Accuracy", "Loss", "Validation loss", "Predicted loss", "Predicted gain", "Density", "Chosen by")
    note = (
        "Each task answered by its own group's adapter, without boosters or weights, so that nothing but the groups "
        "differs; one group is one adapter for all. Predicted: by the oracle before training, of validation rows that "
        "did not choose the groups. Density: mean affinity within groups, by which the paper chooses. Chosen by: plans "
        "of so many seeds."
    )
    rows = tuple(_number_row(number, len(study.head.seeds)) for number in numbers)
    table = Table("Numbers of groups", (Column("Groups"), *map(Column, labels)), rows, note)
    blocks: list[Block] = [table, Text(_tell_agreement(numbers))]
    blocks.append(FigureRow((_draw_losses(numbers),), "Bars: intervals of the test loss over test rows and trainings."))
    return Section("numbers", "Choosing the number of groups", blocks)


def write_boosting(study: StudyRecord, found: Statistics) -> Section | None:
    """What the first step of boosting did to the training rows of its group, and to the test rows of all tasks."""
    rounds = collect_first_rounds(study)
    if not rounds:
        return None
    labels = ("Error before", "Error after", "Reduction", "Loss before", "Loss after", "Reduction of loss", "Kept")
    rows = [_round_row(one) for one in rounds]
    if len(rounds) > 1:
        means = [_mean([getattr(one, name) for one in rounds]) for name in ("error_reduction", "nll_reduction")]
        texts = ["", "", format_percent(means[0]), "", "", format_percent(means[1]), _count_kept(rounds)]
        rows.append(Row((Cell("Mean"), Cell(""), *map(Cell, texts)), is_summary=True))
    columns = (Column("Seed"), Column("Group", is_number=False), *map(Column, labels))
    note = (
        "Training rows of the group with the largest training loss, under its adapter and with one booster added. A "
        "booster stays if the loss of validation rows drops. Reductions are relative; the paper has 18% of the error."
    )
    changes = [pair for metric in ("accuracy", "nll") if (pair := compare_boosting(found, metric)) is not None]
    told = [
        f"{'Accuracy' if pair.metric == 'accuracy' else 'Loss'}: {describe_change(pair, found.confidence)}."
        for pair in changes
    ]
    blocks: list[Block] = [Table("The first step of boosting", columns, tuple(rows), note)]
    if told:
        text = f"On the test rows of all tasks, {changes[0].a} against {changes[0].b}: "
        blocks.append(Text(text + " ".join(told) + " The paper has +0.4 points of accuracy."))
    return Section("boosting", "One step of boosting", blocks)


def _number_row(number: GroupNumber, n_seeds: int) -> Row:
    accuracy, nll = (number.method.mean.get(metric) for metric in ("accuracy", "nll"))
    return Row(
        (
            Cell(str(number.n_groups), tag="the plan's" if number.n_chosen else ""),
            _figure_cell(accuracy, 100.0, 1),
            _figure_cell(nll, 1.0, 3),
            Cell(format_number(number.validation_nll)),
            Cell(format_number(number.predicted_nll)),
            Cell(format_number(number.gain)),
            Cell(format_number(number.density)),
            Cell(f"{number.n_chosen} of {n_seeds}"),
        )
    )


def _figure_cell(figure: Number | None, scale: float, digits: int) -> Cell:
    if figure is None:
        return Cell(format_number(None))
    interval = format_interval(*figure.ends, scale=scale, digits=digits)
    return Cell(format_number(scale * figure.value, digits), interval)


def _tell_agreement(numbers: Sequence[GroupNumber]) -> str:
    """Say how well prediction and density order the numbers of groups as the test rows do."""
    measured = [number.method.mean["nll"].value for number in numbers]
    predicted = rank_alike([number.predicted_nll for number in numbers], measured)
    dense = rank_alike([-number.density for number in numbers], measured)
    best = numbers[int(np.argmin(measured))]
    foreseen = min(numbers, key=lambda number: number.predicted_nll)
    return (
        f"The least test loss has {count(best.n_groups, 'group')}; the least predicted loss "
        f"{count(foreseen.n_groups, 'group')}. Over the numbers of groups, test loss ranks like predicted loss with "
        f"{format_number(predicted, 2)} (Spearman), like falling density with {format_number(dense, 2)}."
    )


def _draw_losses(numbers: Sequence[GroupNumber]) -> Figure:
    places = [number.n_groups for number in numbers]
    tested = [number.method.mean["nll"] for number in numbers]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [0.0 if high is None else high - f.value for f in tested for high in f.ends[1:]],
        "arrayminus": [0.0 if low is None else f.value - low for f in tested for low in f.ends[:1]],
        "thickness": 1,
        "width": 0,
    }
    traces = [
        _line("test", places, [f.value for f in tested], "var(--accent)") | {"error_y": bars},
        _line("predicted", places, [number.predicted_nll for number in numbers], "var(--method-other)"),
    ]
    layout = {
        "xaxis": {"title": {"text": "number of groups"}, "dtick": 1, "zeroline": False},
        "yaxis": {"title": {"text": "mean loss (nats)"}, "zeroline": False},
        "legend": LEGEND_ABOVE,
    }
    listed = join_names([f"{m}: {format_number(f.value)}" for m, f in zip(places, tested, strict=True)], limit=12)
    alt = f"Mean test loss by number of groups, beside the loss that was predicted before training; {listed}."
    return Figure("numbers", "Loss by number of groups", alt, complete(traces, layout), height=340)


def _line(name: str, x: Sequence[int], y: Sequence[float], colour: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": [round(value, 5) for value in y],
        "line": {"color": colour, "width": 1.5},
        "marker": {"color": colour, "size": 7},
    }


def _round_row(one: FirstRound) -> Row:
    texts = (
        format_percent(one.error_before),
        format_percent(one.error_after),
        format_percent(one.error_reduction),
        format_number(one.nll_before),
        format_number(one.nll_after),
        format_percent(one.nll_reduction),
        "yes" if one.is_kept else "no",
    )
    return Row((Cell(str(one.seed)), Cell(join_names(list(one.tasks), 12)), *map(Cell, texts)))


def _count_kept(rounds: Sequence[FirstRound]) -> str:
    return f"{sum(one.is_kept for one in rounds)} of {len(rounds)}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
