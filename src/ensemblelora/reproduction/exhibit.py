"""One table or figure of the paper, made anew: rows of plain numbers, the paper's beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ensemblelora.config import RunConfig

__all__ = ["Reproduction", "Row", "name_base_method"]

Row = Mapping[str, float | str | None]


@dataclass(frozen=True)
class Reproduction:
    """One table.

    Attributes:
        exhibit: Its name in the paper, such as ``table4``.
        title: What it shows.
        rows: Where a row has ``run``, numbers of that run; else ``folder``, ``row``, ``column``, ``unit``, ``ours``,
            ``sd`` and ``paper``: a cell of the folder's table.
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


def name_base_method(config: RunConfig) -> str:
    """Name adapter and base as :mod:`.paper` does.

    Example:
        >>> from ensemblelora.config import parse_config
        >>> name_base_method(parse_config({"data": {"tasks": ["a"]}, "model": {"quantization": "nf4"}}))
        'qlora'
    """
    is_packed, method = config.model.quantization != "none", config.adapter.method
    if not is_packed:
        return method
    return "qlora" if method == "lora" else f"quantised {method}"
