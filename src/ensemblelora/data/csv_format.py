"""What a csv or tsv file's text says of its own format, and what no reader tells: rows longer than the header."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ensemblelora.data.remote import Source, name_of, show_place
from ensemblelora.errors import DataError

__all__ = ["choose_csv_options", "refuse_longer_rows"]

_HEADER_BYTES = 65536
_INDEX_PREFIX = "__index_level_"
"""What the reader calls columns that the header doesn't name."""


def choose_csv_options(source: Source) -> dict[str, Any]:
    """Return the reader's options for a csv or tsv file: its separator; text such as ``NA`` stays text."""
    return {"sep": _find_separator(source), "keep_default_na": False}


def refuse_longer_rows(source: Source, columns: Sequence[str], separator: str) -> None:
    """Refuse rows with more fields than the header has: the reader takes their first fields for names of rows.

    Args:
        source: The file.
        columns: As the reader named them.
        separator: The character between fields.

    Raises:
        DataError: If the rows are longer; it names the first of them, where the file lies here.
    """
    if not any(name.startswith(_INDEX_PREFIX) for name in columns):
        return
    found = _find_longer_row(source, separator) if isinstance(source, Path) else "rows have more fields than the header"
    if found:
        shown = "tab" if separator == "\t" else separator
        raise DataError(
            f"data file {show_place(source)}: {found}; put texts that hold a {shown!r} in double quotes, or save the "
            "file as JSONL"
        )


def _find_longer_row(path: Path, separator: str) -> str | None:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator)
        n_named = len(next(rows))
        for row in rows:
            if len(row) > n_named:
                return f"line {rows.line_num} has {len(row)} fields, the header {n_named}"
    return None  # the header itself names such a column


def _find_separator(source: Source) -> str:
    """A tab in a tsv; in a csv a comma, or what spreadsheets of other languages write: its first line tells."""
    if name_of(source).suffix.lower() == ".tsv":
        return "\t"
    header = b""
    if isinstance(source, Path):
        with source.open("rb") as file:
            header = file.readline(_HEADER_BYTES)
    return next((separator for separator in ",;\t" if separator.encode() in header), ",")
