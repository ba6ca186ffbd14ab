"""Rows to predict, from a file: a JSON object, a JSON text or a plain text a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ensemblelora.errors import DataError

__all__ = ["read_questions"]


def read_questions(file: Path) -> list[Any]:
    """Read a JSON value a line, or plain text lines where they are no JSON.

    Raises:
        DataError: If the file can't be read, is empty, or a line that begins as JSON is none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: can't be read ({error}); give a JSONL or text file") from None
    rows = [_read_row(line, f"{file} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{file}: no rows; give a JSON object or a text a line")
    return rows


def _read_row(line: str, where: str) -> Any:
    if not line.lstrip().startswith(("{", '"')):
        return line
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}); give a JSON object or a text a line") from None
