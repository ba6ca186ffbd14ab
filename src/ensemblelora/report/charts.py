"""The report's charts: the gain over the number of groups, predicted against measured loss, accuracy by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ensemblelora.evaluation.rows import BOOSTED_GROUP
from ensemblelora.report.document import Figure
from ensemblelora.report.plotting import LEGEND_ABOVE, N_GROUP_COLOURS, SYMBOLS, complete, or_none, safe, short_labels
from ensemblelora.report.records import CurvePoint, GroupPrediction, MethodScores, TaskScore
from ensemblelora.report.wording import format_number, format_percent, format_signed, group_letter

__all__ = ["METHOD_SYMBOLS", "draw_curve", "draw_prediction", "draw_scores"]

METHOD_SYMBOLS = {"base": "circle-open", "shared": "diamond", "ensemble": "square"}
_OTHER_SYMBOLS = {BOOSTED_GROUP: "cross"}


def draw_curve(curve: Sequence[CurvePoint], n_chosen: int) -> Figure:
    """Draw the predicted loss saved against one adapter over the number of groups, with standard errors."""
    points = [point for point in curve if point.gain is not None]
    traces = [
        _curve_trace([point for point in points if point.allowed], "allowed", is_open=False),
        _curve_trace([point for point in points if not point.allowed], "not allowed", is_open=True),
    ]
    chosen = next((point for point in points if point.n_groups == n_chosen), None)
    layout = {
        "xaxis": {"title": {"text": "number of groups"}, "dtick": 1 if len(points) <= 20 else None, "zeroline": False},
        "yaxis": {"title": {"text": "predicted loss saved"}, "tickformat": ".3~f", "zerolinewidth": 2},
        "annotations": [] if chosen is None else [_chosen_annotation(chosen)],
        "showlegend": bool(traces[1]["x"]),
        "legend": LEGEND_ABOVE,
    }
    values = "; ".join(
        f"{point.n_groups}: {format_signed(point.gain)} ± {format_number(point.gain_se)}" for point in points
    )
    alt = f"Predicted loss saved against one adapter, by number of groups: {values}. The plan has {n_chosen}."
    return Figure("curve", "Predicted gain over the number of groups", alt, complete(traces, layout), height=340)


def draw_prediction(points: Sequence[GroupPrediction], *, as_change: bool) -> Figure:
    """Draw predicted against measured loss of every task that has both, or the change of both from the base model.

    Args:
        points: At least one of them has all the losses that are drawn.
        as_change: Whether to draw changes from the base model.
    """
    rows = [(point, *where) for point in points if (where := _locate(point, as_change=as_change))]
    groups = sorted({-1 if point.group is None else point.group for point, _, _ in rows})
    traces = [
        _prediction_trace([row for row in rows if (-1 if row[0].group is None else row[0].group) == group], group)
        for group in groups
    ]
    ends = [value for _, x, y in rows for value in (x, y)]
    diagonal = {"type": "line", "x0": min(ends), "y0": min(ends), "x1": max(ends), "y1": max(ends)}
    what = "change of loss from base" if as_change else "loss"
    layout = {
        "xaxis": {"title": {"text": f"predicted {what}"}, "zeroline": as_change},
        "yaxis": {"title": {"text": f"measured {what}"}, "zeroline": as_change},
        "shapes": [{**diagonal, "line": {"color": "var(--ink-soft)", "width": 1, "dash": "dot"}, "layer": "below"}],
        "showlegend": len(groups) > 1,
        "legend": LEGEND_ABOVE,
    }
    farthest = max(rows, key=lambda row: abs(row[2] - row[1]))
    alt = (
        f"Scatter of predicted against measured {what} for {len(rows)} tasks around the line of equality; farthest "
        f"from it is {farthest[0].task}, predicted {format_number(farthest[1])}, measured {format_number(farthest[2])}."
    )
    name, title = ("predicted-change", "Change from the base model") if as_change else ("predicted-loss", "Loss")
    return Figure(name, title, alt, complete(traces, layout), height=360)


def draw_scores(scores: Mapping[str, MethodScores], tasks: Sequence[str], labels: Mapping[str, str]) -> Figure:
    """Draw accuracy with its interval for every task and method, and the rate of the majority class.

    Args:
        scores: Every method's scores.
        tasks: Rows, from the top.
        labels: What to call each method.
    """
    methods = list(scores)
    step = 0.8 / max(4, len(methods))  # of a row's height
    traces = [
        _score_trace(
            scores[method].per_task, tasks, method, labels[method], offset=step * (place - (len(methods) - 1) / 2)
        )
        for place, method in enumerate(methods)
    ]
    majority = {task: score.majority for method in methods for task, score in scores[method].per_task.items()}
    shapes = [_majority_mark(rate, row) for row, task in enumerate(tasks) if (rate := majority.get(task)) is not None]
    layout = {
        "xaxis": {"title": {"text": "test accuracy"}, "tickformat": ".0%", "zeroline": False, "side": "top"},
        "yaxis": {**_row_axis(tasks), "range": [len(tasks) - 0.5, -0.5]},
        "shapes": shapes,
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yanchor": "top", "yref": "paper"},
    }
    means = ", ".join(
        f"{labels[method]} {format_percent(scores[method].mean('accuracy', tasks))}" for method in methods
    )
    alt = f"Test accuracy with intervals of {len(tasks)} tasks under {len(methods)} methods; means: {means}."
    return Figure(
        "accuracy",
        "Accuracy by task",
        alt,
        complete(traces, layout),
        height=110 + max(38, 12 * len(methods)) * len(tasks),
    )


def _curve_trace(points: Sequence[CurvePoint], name: str, *, is_open: bool) -> dict[str, Any]:
    errors = [point.gain_se or 0.0 for point in points]
    return {
        "type": "scatter",
        "mode": "markers" if is_open else "lines+markers",
        "name": name,
        "x": [point.n_groups for point in points],
        "y": [point.gain for point in points],
        "customdata": [
            [point.predicted_nll, error, point.predicted_nll_se or 0.0]
            for point, error in zip(points, errors, strict=True)
        ],
        "error_y": {"type": "data", "array": errors, "color": "var(--ink-soft)", "thickness": 1.2, "width": 5},
        "line": {"color": "var(--accent)", "width": 2},
        "marker": {"color": "var(--accent)", "size": 9, "symbol": "circle-open" if is_open else "circle"},
        "hovertemplate": "%{x} groups: %{y:+.4f} ± %{customdata[1]:.4f}<br>"
        "loss %{customdata[0]:.4f} ± %{customdata[2]:.4f}<extra></extra>",
    }


def _chosen_annotation(point: CurvePoint) -> dict[str, Any]:
    return {
        "x": point.n_groups,
        "y": (point.gain or 0.0) + (point.gain_se or 0.0),
        "text": "the plan",
        "yshift": 4,
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"color": "var(--accent)", "size": 12, "weight": 600},
    }


def _locate(point: GroupPrediction, *, as_change: bool) -> tuple[float, float] | None:
    if point.predicted_nll is None or point.measured_nll is None:
        return None
    if not as_change:
        return point.predicted_nll, point.measured_nll
    if point.base_nll is None or point.measured_base_nll is None:
        return None
    return point.predicted_nll - point.base_nll, point.measured_nll - point.measured_base_nll


def _prediction_trace(rows: Sequence[tuple[GroupPrediction, float, float]], group: int) -> dict[str, Any]:
    colour = f"var(--group-{group % N_GROUP_COLOURS})" if group >= 0 else "var(--ink-soft)"
    marker = {"color": colour, "size": 11, "symbol": SYMBOLS[group % len(SYMBOLS)]}
    errors = [round(point.predicted_nll_se or 0.0, 5) for point, _, _ in rows]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"group {group_letter(group)}" if group >= 0 else "no group",
        "x": [round(x, 5) for _, x, _ in rows],
        "y": [round(y, 5) for _, _, y in rows],
        "text": [safe(point.task) for point, _, _ in rows],
        "error_x": {
            "type": "data",
            "array": errors,
            "color": colour,
            "thickness": 1.2,
            "width": 0,
        },
        "marker": {**marker, "line": {"color": "var(--surface)", "width": 1}},
        "customdata": errors,
        "hovertemplate": "<b>%{text}</b><br>predicted %{x:.4f} ± %{customdata:.4f}<br>measured %{y:.4f}<extra></extra>",
    }


def _score_trace(
    per_task: Mapping[str, TaskScore], tasks: Sequence[str], method: str, label: str, *, offset: float
) -> dict[str, Any]:
    rows = [(row, task, per_task[task]) for row, task in enumerate(tasks) if task in per_task]
    rows = [(row, task, score) for row, task, score in rows if score.accuracy is not None]
    values = np.array([score.accuracy for _, _, score in rows], dtype=np.float64)
    lows = np.array([np.nan if score.accuracy_low is None else score.accuracy_low for _, _, score in rows])
    highs = np.array([np.nan if score.accuracy_high is None else score.accuracy_high for _, _, score in rows])
    colour = f"var(--method-{method})" if method in METHOD_SYMBOLS else "var(--method-other)"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": safe(label),
        "x": [or_none(value) for value in values.round(5)],
        "y": [row + offset for row, _, _ in rows],
        "text": [safe(task) for _, task, _ in rows],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, or_none(value) or 0.0) for value in (highs - values).round(5)],
            "arrayminus": [max(0.0, or_none(value) or 0.0) for value in (values - lows).round(5)],
            "color": colour,
            "thickness": 1.5,
            "width": 0,
        },
        "marker": {
            "color": colour,
            "size": 9,
            "symbol": METHOD_SYMBOLS.get(method, _OTHER_SYMBOLS.get(method, "x")),
            "line": {"color": colour, "width": 1.5},
        },
        "hovertemplate": "<b>%{text}</b><br>%{fullData.name}: %{x:.1%}<extra></extra>",
    }


def _row_axis(tasks: Sequence[str]) -> dict[str, Any]:
    return {
        "tickmode": "array",
        "tickvals": list(range(len(tasks))),
        "ticktext": short_labels(tasks),
        "zeroline": False,
        "showgrid": False,
    }


def _majority_mark(rate: float, row: int) -> dict[str, Any]:
    line = {"color": "var(--ink-soft)", "width": 1.5, "dash": "dot"}
    return {"type": "line", "x0": rate, "x1": rate, "y0": row - 0.36, "y1": row + 0.36, "line": line, "layer": "below"}
