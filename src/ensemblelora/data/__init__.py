"""Tasks: cards, rows, splits, token ids and batches."""

from __future__ import annotations

__all__: list[str] = []
