"""A run folder as a report, one self-contained HTML page and one Markdown page; the work is in ``build``."""

from __future__ import annotations

from ensemblelora.report.build import write_report

__all__ = ["write_report"]
