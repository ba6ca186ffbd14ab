"""Cells that many of the report's tables have."""

from __future__ import annotations

from ensemblelora.report.document import Cell
from ensemblelora.report.plotting import N_GROUP_COLOURS
from ensemblelora.report.wording import group_letter

__all__ = ["group_cell", "task_cell"]


def task_cell(name: str, group: int | None, *, tag: str = "") -> Cell:
    """Name a task, marked with its group's letter and colour; without a group, not marked."""
    if group is None:
        return Cell(name, tag=tag)
    return Cell(name, tag=tag, colour=group % N_GROUP_COLOURS, mark=group_letter(group))


def group_cell(group: int) -> Cell:
    """Name a group by its letter."""
    return Cell("", colour=group % N_GROUP_COLOURS, mark=group_letter(group))
