"""Two runs side by side: what was asked differently, and what came out differently on the same test rows."""

from __future__ import annotations

__all__: list[str] = []
