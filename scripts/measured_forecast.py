"""What the benchmark of the forecasts recorded, as a section of docs/measured.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

__all__ = ["render_forecast"]

Record = dict[str, Any]

_LABELS = {
    "time_ratio": "time (`--dry-run`)",
    "memory_ratio": "memory (`--dry-run`)",
    "disk_ratio": "disk (`--dry-run`)",
    "sized_time_ratio": "time (`forecast`, by the model's config alone)",
}


def render_forecast(record: Record) -> Iterator[str]:
    """Predicted over true: in all, and the time of every stage and size."""
    config = record["config"]
    yield from textwrap.wrap(
        f"Runs of `{config['model']}` on {config['tasks']} tasks with {config['rows']} training rows each, and up to "
        f"{max(config['factors'])} times the rows or the tasks, predicted by rates measured once at the smallest size "
        "and then carried out. Predicted over true: above 1, the forecast was on the safe side. *Worst* is farthest "
        f"from 1. Stages of less than {config['least_seconds']:g} s are left out of time; what depends on the outcome "
        "(weights, evaluation) is forecast at its most. Memory is what a stage itself needs; that measured is the "
        "process's, which after training still holds most of what training took: later stages' ratios are low.",
        width=120,
    )
    yield from ("", "| forecast | geometric mean | worst |", "|---|---|---|")
    for key, label in _LABELS.items():
        if key in record:
            yield f"| {label} | {record[key]:.2f}x | {record[f'{key}_worst']:.2f}x |"
    stages = list(dict.fromkeys(stage for size in record["sizes"].values() for stage in size))
    yield from (
        "",
        "Time, predicted over true:",
        "",
        f"| size | {' | '.join(stages)} |",
        "|---" * (len(stages) + 1) + "|",
    )
    for name, size in record["sizes"].items():
        axis, _, factor = name.partition("-")
        cells = (f"{size[s]['time_ratio']:.2f}x" if "time_ratio" in size.get(s, {}) else "-" for s in stages)
        yield f"| {factor} x {axis} | {' | '.join(cells)} |"
