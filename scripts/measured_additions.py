"""What the benchmark of later datasets recorded, as a section of docs/measured.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from statistics import NormalDist
from typing import Any

__all__ = ["render_additions"]

Record = dict[str, Any]

_REACH = NormalDist().inv_cdf(0.975)


def render_additions(record: Record) -> Iterator[str]:
    """Every arrival: where it went, what that cost, and accuracy beside a run from the beginning."""
    config, entries = record["config"], record["arrivals"]
    settings = f", changed by {' '.join(f'`{change}`' for change in config['set'])}" if config["set"] else ""
    yield from textwrap.wrap(
        f"Each dataset was added to a run of `{config['recipe']}`{settings}, and beside that all tasks and the arrival "
        "were run from the beginning. Cost: FLOPs of what chooses, trains and combines over those of the run from the "
        "beginning; in brackets with tests. Accuracy: in points, the mean over tasks when added and when run from the "
        "beginning, and the difference on the same test rows [95 % over the rows; seeds of training are not in it].",
        120,
        break_on_hyphens=False,
        break_long_words=False,
    )
    yield from ("", "| arrival | went to | cost | all tasks | difference | of the arrival | of the others |")
    yield "|---|---|---|---|---|---|---|"
    for name, entry in entries.items():
        found, place = entry["accuracy"], entry["place"]
        where = f"{place}, though nowhere was predicted" if entry["is_forced"] else place
        cost = f"{entry['learning_share']:.1%} ({entry['total_share']:.1%})"
        levels = f"{100 * found['all']['accuracy']:.1f} and {100 * found['all']['rerun_accuracy']:.1f}"
        changes = " | ".join(_format_change(found[part]) for part in ("all", "arrival", "others"))
        yield f"| {name} | {where} | {cost} | {levels} | {changes} |"


def _format_change(part: Record) -> str:
    change, reach = 100 * part["difference"], 100 * _REACH * part["se"]
    return f"{change:+.1f} [{change - reach:+.1f}, {change + reach:+.1f}]"
