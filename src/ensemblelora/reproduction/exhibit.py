"""One table or figure of the paper, made anew: rows of plain numbers, the paper's beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ensemblelora.analysis.bases import name_base_method

__all__ = ["Reproduction", "Row", "name_base_method"]

Row = Mapping[str, float | str | None]


@dataclass(frozen=True)
class Reproduction:
    """One table.

    Attributes:
        exhibit: Its name in the paper, such as ``table4``.
        title: What it shows.
        rows: Where a row has ``run``, numbers of that run; where it has ``claim``, something that the paper says in
            words; else ``folder``, ``row``, ``column``, ``unit``, ``ours``, ``sd`` and ``paper``: a cell of the
            folder's table.
        notes: What has to be known to read it: models, sizes, epochs.
    """

    exhibit: str
    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def heading(self) -> str:
        """Name and title in one line."""
        return f"{self.exhibit}: {self.title}"
