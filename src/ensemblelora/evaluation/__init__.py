"""Scores of the finished ensemble beside its baselines, with intervals, on rows no other stage has seen."""

from __future__ import annotations

__all__: list[str] = []
