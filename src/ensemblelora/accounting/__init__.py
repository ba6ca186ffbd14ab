"""What a run costs: arithmetic and bytes in closed form, time and memory by measurement."""

from __future__ import annotations

__all__: list[str] = []
