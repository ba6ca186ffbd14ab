"""The last stage: the report of what a run folder holds. No torch, so that it can be written again at once.

In: a run folder with at least a plan. Out: ``report.html`` and ``report.md``.
"""

from __future__ import annotations

from pathlib import Path

from ensemblelora import artifacts
from ensemblelora.report import write_report as compose_report
from ensemblelora.workspace import OpenRun

__all__ = ["write_report"]

_REPORTED = (
    artifacts.CONFIG_FILE,
    artifacts.ENVIRONMENT_FILE,
    artifacts.TASKS_FILE,
    artifacts.PLAN_FILE,
    artifacts.FEATURE_HEALTH_FILE,
    artifacts.AFFINITY_FILE,
    artifacts.ENSEMBLE_FILE,
    artifacts.RESULTS_FILE,
)


def write_report(work: OpenRun) -> Path:
    """Write ``report.html`` and ``report.md`` from what the run folder holds, and return the former's path.

    Raises:
        UsageError: If there is no plan yet.
        StoreError: If a file of the run is damaged or does not fit the others.
    """
    work.settle()
    made_of = {name: artifacts.file_sha256(work.path / name) for name in _REPORTED if (work.path / name).exists()}
    spent = [record for record in work.ledger.stages if record.stage != "report"]
    html = work.path / artifacts.REPORT_HTML_FILE
    with work.stage("report", made_of, spent, dict(work.ledger.methods)) as stage:
        if stage.is_needed:
            compose_report(work.path)
            stage.files += [html, work.path / artifacts.REPORT_MARKDOWN_FILE]
    return html
