"""The command that writes reports: of a run, a comparison or a federation again, or of two runs side by side."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ensemblelora import progress
from ensemblelora.artifacts import CONFIG_FILE, PLAN_FILE, RUN_FILE
from ensemblelora.console import show_json, show_rows, talking
from ensemblelora.errors import UsageError
from ensemblelora.options import AsJson, RunPath, Talk, spread

__all__ = ["add_report_command"]

Other = Annotated[
    Path | None, typer.Argument(metavar="RUN", show_default=False, help="A second run folder, to compare with.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", help="Of two runs: where the page goes, instead of beside the first."),
]


def add_report_command(app: typer.Typer, *, panel: str) -> None:
    """Register the command.

    Args:
        app: Of the command line.
        panel: Where it stands in the help.
    """

    @app.command(rich_help_panel=panel)
    @spread
    def report(run: RunPath, other: Other = None, *, out: Out = None, as_json: AsJson = False, talk: Talk) -> None:
        """Write the report of a run again, as far as it has come, and train nothing; of two runs, how they differ."""
        with talking(**asdict(talk)):
            if other is not None:
                return _show_contrast(_find_folder(run), _find_folder(other), out, as_json=as_json)
            if out is not None:
                raise UsageError("report --out: of one run, the report goes into its folder; --out is for two runs")
            page = _write_page(_find_folder(run))
        show_json({"report": page}) if as_json else typer.echo(str(page))


def _find_folder(path: Path) -> Path:
    """A run folder stands for itself, and so does the config in it."""
    folder = path.parent if path.name == CONFIG_FILE else path
    if not folder.is_dir():
        raise UsageError(f"{path}: no run folder; a report is of a run that was made, by its folder (runs/NAME)")
    return folder


def _write_page(folder: Path) -> Path:
    """Write the page of what a folder holds: a comparison, a federation, or a run."""
    if (folder / "study.json").is_file():
        from ensemblelora.comparison.page import write_page as write_comparison

        return write_comparison(folder).path
    if (folder / "traffic.json").is_file():
        from ensemblelora.federation.page import write_page as write_federation

        return write_federation(folder)
    if not (folder / RUN_FILE).is_file():
        command = f"ensemblelora run {shlex.quote(str(folder))}"
        raise UsageError(f"{folder}: no run folder; report trains nothing: make a run first ({command})")
    return _write_again(folder)


def _write_again(folder: Path) -> Path:
    """Write a run's report from what it holds, and say so if that was made from other data files."""
    from ensemblelora.earlier import find_origin, list_changed_files

    command = f"ensemblelora run {shlex.quote(str(find_origin(folder)))}"
    if not (folder / PLAN_FILE).exists():
        raise UsageError(f"{folder}: not planned yet, so that there is nothing to report; go on with: {command}")
    if changed := list_changed_files(folder):
        progress.note(
            f"{', '.join(changed)} changed since this run, or went; the report is of the run as it was made ({command} "
            "makes a new one, and keeps this one)"
        )
    from ensemblelora.reporting import write_report
    from ensemblelora.workspace import reopen_run

    with reopen_run(folder) as run:
        return write_report(run)


def _show_contrast(first: Path, second: Path, out: Path | None, *, as_json: bool) -> None:
    from ensemblelora.contrast.page import write_contrast, write_headline

    page, found = write_contrast(first, second, out)
    if as_json:
        return show_json({"page": page, **asdict(found)})
    from ensemblelora.contrast.sections import describe_score
    from ensemblelora.report.wording import format_number, format_percent

    typer.echo(write_headline(found))
    rows: dict[str, dict[str, Any]] = {
        f"{score.method}, {'accuracy' if score.metric == 'accuracy' else 'loss'}": {
            "A": write(score.a),
            "B": write(score.b),
            "B_less_A": describe_score(score, found.confidence),
        }
        for score in found.scores
        if score.task is None
        for write in (format_percent if score.metric == "accuracy" else format_number,)
    }
    if rows:
        show_rows(rows, title="means over tasks")
    typer.echo(str(page))
