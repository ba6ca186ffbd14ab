"""Rows to predict, from a file: a table with a header, a JSON array, or a JSON object or text a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ensemblelora.data.reading import read_file
from ensemblelora.errors import DataError, quote

__all__ = ["read_questions"]

_TABLES = frozenset((".csv", ".tsv", ".parquet"))


def read_questions(file: Path) -> list[Any]:
    """Read the rows that a file holds, by its name's ending: csv, tsv, parquet, json; of others a row a line.

    Returns:
        For each row its columns, or its text.

    Raises:
        DataError: If the file can't be read, is empty, or holds what is neither columns nor text.
    """
    kind = file.suffix.lower()
    rows = list(read_file(file)) if kind in _TABLES else _read_text(file, is_json=kind == ".json")
    if not rows:
        raise DataError(f"{file}: no rows; give a JSON object or a text a line")
    return rows


def _read_text(file: Path, *, is_json: bool) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: can't be read ({error.strerror}); give a csv, JSONL, JSON or text file") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: its text is not UTF-8; save it as UTF-8") from None
    whole = _try_json(text) if is_json else None
    if isinstance(whole, list):
        return [_check_row(row, f"{file} row {number}") for number, row in enumerate(whole, 1)]
    if isinstance(whole, dict):
        return [whole]
    must_be_json = is_json or file.suffix.lower() == ".jsonl"
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    return [_read_row(line.strip(), f"{file} line {number}", must_be_json) for number, line in lines]


def _try_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None  # a row a line, perhaps


def _read_row(line: str, where: str, must_be_json: bool) -> Any:
    if not must_be_json and not line.startswith(("{", '"')):
        return line
    try:
        return _check_row(json.loads(line), where)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}); give a JSON object or a text a line") from None


def _check_row(row: Any, where: str) -> Any:
    if isinstance(row, dict | str):
        return row
    raise DataError(f"{where}: expected an object of columns or a text, got {quote(json.dumps(row))}")
