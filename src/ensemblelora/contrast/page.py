"""Two runs become one HTML page, one Markdown page, and the numbers behind both. No torch.

In: two run folders, as far as they have come. Out: three files beside the first run, or where they are asked for.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ensemblelora.artifacts import write_json, write_text
from ensemblelora.contrast.measure import Contrast, Score, contrast_runs
from ensemblelora.contrast.sections import (
    describe_score,
    write_again,
    write_costs,
    write_groups,
    write_limits,
    write_means,
    write_settings,
    write_tasks,
)
from ensemblelora.report.build import render_html, render_markdown
from ensemblelora.report.document import Document, Step, Steps
from ensemblelora.report.records import RunRecord
from ensemblelora.report.wording import count, format_number, format_percent, join_names

__all__ = ["compose_page", "write_contrast", "write_headline"]

_UNDECIDED = "no difference shown"


def write_contrast(first: Path, second: Path, out: Path | None = None) -> tuple[Path, Contrast]:
    """Compare two runs and write the page.

    Args:
        first: Folder of run A.
        second: Folder of run B.
        out: Folder for ``contrast.html``, ``contrast.md`` and ``contrast.json``; by default
            ``A-against-B`` beside run A.

    Returns:
        Path of the HTML page, and how the runs differ.

    Raises:
        UsageError: If a folder has no plan yet, or the runs have no task in common.
        StoreError: If a file of a run is damaged.
        OutputError: If the files can't be written.
    """
    a, b, found = contrast_runs(first, second)
    folder = out if out is not None else first.parent / f"{first.resolve().name}-against-{second.resolve().name}"
    document = compose_page((a, b), found, (first, second))
    write_json(folder / "contrast.json", asdict(found))
    write_text(folder / "contrast.md", render_markdown(document))
    write_text(folder / "contrast.html", render_html(document))
    return folder / "contrast.html", found


def compose_page(runs: tuple[RunRecord, RunRecord], found: Contrast, folders: tuple[Path, Path]) -> Document:
    """Turn how two runs differ into text, tables and figures."""
    sections = (
        write_settings(runs, found),
        write_means(runs, found),
        write_tasks(runs, found),
        write_groups(runs, found),
        write_costs(runs, found),
        write_limits(runs, found),
        write_again(folders),
    )
    facts = (f"A: {found.names[0]}", f"B: {found.names[1]}", f"{count(len(found.tasks), 'task')} in common")
    title = f"{found.names[0]} against {found.names[1]}: ensemblelora"
    steps = tuple(
        Step(f"{letter}: {name}", _tell_run(run)) for letter, name, run in zip("AB", found.names, runs, strict=True)
    )
    different = Step("Different", _tell_settings(found))
    kept = [section for section in sections if section is not None]
    return Document(title, facts, write_headline(found), (Steps((*steps, different)),), kept)


def write_headline(found: Contrast) -> str:
    """Say in one sentence whether the runs' ensembles can be told apart, on the same rows where these were kept."""
    score, loss = (found.find("ensemble", metric) for metric in ("accuracy", "nll"))
    score = score or loss
    if score is None:
        return (
            f"{found.names[0]} and {found.names[1]} have {count(len(found.tasks), 'task')} in common; not both tested."
        )
    what = "mean test accuracy" if score.metric == "accuracy" else "mean test loss"
    rows = f" on the same {count(score.n_rows, 'row')}" if score.is_paired else " (rows not paired)"
    change = describe_score(score, found.confidence)
    told = f"B ({found.names[1]}) against A ({found.names[0]}){rows}: {change} in {what}: {_judge(score)}"
    if loss is not None and score is not loss and _judge(score) == _UNDECIDED != _judge(loss):
        told += f"; {describe_score(loss, found.confidence)} in mean test loss: {_judge(loss)}"
    return f"{told}."


def _judge(score: Score) -> str:
    if score.low is None or score.high is None or score.low <= 0 <= score.high:
        return _UNDECIDED
    return "B is better" if (score.low > 0) == (score.metric == "accuracy") else "A is better"


def _tell_run(run: RunRecord) -> str:
    text = f"{count(len(run.plan.groups), 'group')} of {count(run.plan.n_tasks, 'task')}"
    if run.results is None or "ensemble" not in run.results.methods:
        loss = run.plan.predicted.plan.mean_nll
        return f"{text}; predicted validation loss {format_number(loss)}, nothing tested yet."
    scores, names = run.results.methods["ensemble"], run.plan.task_names
    accuracy, loss = scores.mean("accuracy", names), scores.mean("nll", names)
    tested = f"test accuracy {format_percent(accuracy)}, " if accuracy is not None else "test "
    return f"{text}; {tested}loss {format_number(loss)}."


def _tell_settings(found: Contrast) -> str:
    names = [one.name for one in found.settings]
    return f"{join_names(names, 5)}." if names else "Nothing in settings, seed, model or versions."
