"""The command line: arguments in, one call, result out.

Exit codes: 0 done, 1 failed, 2 wrong usage, config or data, 130 interrupted, by Ctrl-C or SIGTERM. ``--help`` imports
no torch.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ensemblelora import __version__, progress
from ensemblelora.artifacts import CONFIG_FILE
from ensemblelora.cli_add import add_change_commands
from ensemblelora.cli_analyze import add_analyze_command
from ensemblelora.cli_answers import show_answer, show_routed, warn_of_routing
from ensemblelora.cli_federate import add_federation_commands
from ensemblelora.cli_report import add_report_command
from ensemblelora.cli_select import add_select_command
from ensemblelora.cli_serve import add_serve_command
from ensemblelora.cli_size import add_size_command, show_foresight
from ensemblelora.cli_study import add_study_commands
from ensemblelora.config import RunConfig
from ensemblelora.console import describe_failure, say, show_json, show_rows, show_table, talking
from ensemblelora.errors import DataError, UsageError
from ensemblelora.options import AsJson, Debug, Device, DryRun, Place, Request, RunPath, Source, Talk, spread
from ensemblelora.questions import read_questions
from ensemblelora.recipe import describe_config, read_demo, read_request

if TYPE_CHECKING:
    from ensemblelora.exporting import Export

__all__ = ["app", "main"]

_logger = logging.getLogger(__name__)

_WHOLE = "The whole method"
_STAGE = "One stage, with what it needs before it"
_USE = "Use and inspect a run"
_SETUP = "Set up"

_PAGE = (100, 10_000)
"""columns and lines of what is no terminal: nothing is left out"""

_License = Annotated[
    str | None, typer.Option("--license", metavar="ID", help="What the cards publish it under, such as apache-2.0.")
]
_Push = Annotated[
    str | None, typer.Option("--push", metavar="ORG/NAME", help="Also upload it to a model hub, as private.")
]

app = typer.Typer(
    name="ensemblelora",
    help="Find out which of your datasets to fine-tune a language model on together, train one adapter per group, "
    "combine them, and test that against one adapter for all. To begin: `ensemblelora demo`, or "
    "`ensemblelora plan FOLDER` with one CSV or JSONL file a dataset (columns text and label).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; by default, this process's own arguments.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = app(arguments, prog_name="ensemblelora", standalone_mode=False)
    except Exception as error:
        return describe_failure(error, debug="--debug" in arguments)
    return code if isinstance(code, int) else 0


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", metavar="", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"ensemblelora {__version__}")
        raise typer.Exit


@app.command(rich_help_panel=_WHOLE)
@spread
def demo(request: Request, place: Place, *, as_json: AsJson = False, dry_run: DryRun = False, talk: Talk) -> None:
    """Run the whole method on real tasks and a small real model from two pip packages; no model hub is asked."""
    config = read_demo(request.overrides)
    with talking(**asdict(talk)):
        _carry_out(config, "run", "report", place, as_json=as_json, dry_run=dry_run)


@dataclass(frozen=True)
class _Pipeline:
    """A command that runs the pipeline up to a stage; all of these take the same arguments."""

    name: str
    until: str
    panel: str
    purpose: str


_PIPELINES = (
    _Pipeline("plan", "group", _WHOLE, "Say which tasks to train together, and what that would give, before training."),
    _Pipeline("run", "report", _WHOLE, "Run the whole method; a run that was broken off goes on where it was."),
    _Pipeline("features", "features", _STAGE, "Collect every task's projected gradients at the base model."),
    _Pipeline(
        "affinity", "affinity", _STAGE, "Predict training on many subsets of tasks, and from that who helps whom."
    ),
    _Pipeline("group", "group", _STAGE, "Choose the groups, how many, and whether to group at all."),
    _Pipeline("train", "train", _STAGE, "Fine-tune one adapter per group."),
    _Pipeline("boost", "boost", _STAGE, "Add adapters where a group still errs."),
    _Pipeline("combine", "combine", _STAGE, "Fit every task's weights over the adapters."),
    _Pipeline("evaluate", "evaluate", _STAGE, "Test the ensemble and its baselines."),
)


def _add_pipeline(entry: _Pipeline) -> None:
    @app.command(entry.name, help=entry.purpose, rich_help_panel=entry.panel)
    @spread
    def command(
        source: Source,
        request: Request,
        place: Place,
        *,
        as_json: AsJson = False,
        dry_run: DryRun = False,
        talk: Talk,
    ) -> None:
        config = read_request(source, request.overrides)
        with talking(**asdict(talk)):
            _carry_out(config, entry.name, entry.until, place, as_json=as_json, dry_run=dry_run)


for _entry in _PIPELINES:
    _add_pipeline(_entry)


@app.command(rich_help_panel=_USE)
@spread
def predict(
    run: RunPath,
    *,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="NAME", help="The task to answer for; without it, each row's likeliest one."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="TEXT", help="A text to answer, or a JSON object of columns; repeatable."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="FILE", help="A csv, tsv, JSON, JSONL or parquet file of them, or a text a line."
        ),
    ] = None,
    as_json: AsJson = False,
    talk: Talk,
) -> None:
    """Answer questions with a finished run's ensemble: a label, or a text, for each."""
    if (file is None) == (not text):
        raise UsageError("predict: give the input as --text or as --file, one of the two")
    rows: list[Any] = list(text or ()) if file is None else read_questions(file)
    with talking(**asdict(talk)):
        from ensemblelora.api import load_run

        found = load_run(run)
        predictions = found.predict(task, rows)
        for doubt in found.list_doubts({prediction.task for prediction in predictions}):
            _logger.warning("in this run's own test: %s%s", doubt[0].lower(), doubt[1:])
        if task is None:
            warn_of_routing(predictions)
    if as_json:
        return show_json(predictions)
    if task is None:
        return show_routed(predictions)
    for prediction in predictions:
        typer.echo(prediction.label)


@app.command(rich_help_panel=_USE)
@spread
def ask(
    run: RunPath,
    *,
    subset: Annotated[str, typer.Option("--subset", metavar="A,B,C", help="Names of tasks to train together.")],
    as_json: AsJson = False,
    talk: Talk,
) -> None:
    """Predict what training any subset of a run's tasks together would give, without training."""
    given = [name.strip() for name in subset.split(",") if name.strip()]
    names = list(dict.fromkeys(given))
    with talking(**asdict(talk)):
        from ensemblelora.api import load_run

        opened = load_run(run)
        answer, confidence = opened.ask(names), opened.config.evaluation.confidence
    if len(names) < len(given):
        say("note: a task named twice counts once")
    show_json(answer) if as_json else show_answer(answer, names, confidence)


@app.command(rich_help_panel=_USE)
@spread
def export(
    run: RunPath,
    *,
    format: Annotated[
        Literal["peft", "folded", "merged"],
        typer.Option(
            "--format",
            metavar="peft|folded|merged",
            help="Every member; one LoRA adapter in their place; or base weights with it inside.",
        ),
    ],
    task: Annotated[
        str | None, typer.Option("--task", metavar="NAME", help="Fold for this task alone, not for all on average.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="R", help="Largest rank of the fold. By default adapter.r; merged: no limit."),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            metavar="X",
            help="Refuse a fold that raises the mean validation loss by more nats than this; by default 0.02.",
        ),
    ] = 0.02,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="A new folder, instead of RUN/export/FORMAT or FORMAT-TASK."),
    ] = None,
    license: _License = None,
    push: _Push = None,
    as_json: AsJson = False,
    talk: Talk,
) -> None:
    """Write a run's adapters for other software: each of them, or all folded into one, with what that costs."""
    with talking(**asdict(talk)):
        from ensemblelora.exporting import export_run
        from ensemblelora.exporting.push import check_repository, push_export

        if push is not None:
            check_repository(push)
        made = export_run(run, out, format=format, task=task, rank=rank, tolerance=tolerance, license=license)
        place = push_export(made.folder, push) if push is not None else None
    show_json(made) if as_json else _show_export(made)
    if place is not None and not as_json:
        typer.echo(place)


add_report_command(app, panel=_USE)
add_serve_command(app, panel=_USE)
add_change_commands(app)
add_size_command(app)
add_select_command(app)
add_federation_commands(app)
add_study_commands(app)
add_analyze_command(app)


@app.command(rich_help_panel=_SETUP)
def tasks(
    card: Annotated[
        str | None, typer.Argument(metavar="CARD", help="A shipped card's name, a card file, or a data file.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the shipped task cards, or show a card, or a data file, with an example as the model sees it."""
    from ensemblelora import cards

    with talking(debug=debug):
        if card is None:
            listing = cards.list_cards()
            return show_json(listing) if as_json else show_rows(listing)
        shown = cards.show_card(card)
    show_json(shown) if as_json else typer.echo(cards.render_card(shown))
    if shown.problem and not shown.is_shipped:  # a shipped card is worth seeing without its data, one's own is on trial
        raise DataError(shown.problem)


@app.command(rich_help_panel=_SETUP)
def config(
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Write the JSON schema instead.")] = False,
) -> None:
    """Write every key of a recipe with its default and meaning; the output is a recipe itself."""
    show_json(RunConfig.model_json_schema()) if as_json else typer.echo(describe_config(), nl=False)


@app.command(rich_help_panel=_SETUP)
@spread
def doctor(
    *,
    self_test: Annotated[
        bool, typer.Option("--self-test/--skip-self-test", metavar="", help="Train a tiny model on the device.")
    ] = True,
    device: Device = None,
    as_json: AsJson = False,
    talk: Talk,
) -> None:
    """Check versions, device, memory, caches and the demo's packages, and try the method on a tiny model."""
    from ensemblelora.doctor import examine, render_findings

    with talking(**asdict(talk)):
        findings = examine(device=device or "auto", self_test=self_test)
    show_json(findings) if as_json else typer.echo(render_findings(findings))
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(1)


def _carry_out(config: RunConfig, command: str, until: str, place: Place, *, as_json: bool, dry_run: bool) -> None:
    """Run or estimate, and show the result; ``command`` is what goes on with the run folder."""
    cluster = place.read()
    progress.note(f"loading libraries, data and model {config.model.name} ...")  # nothing else is said for seconds
    try:
        from ensemblelora import pipeline

        if dry_run:
            return show_foresight(pipeline.foresee(config, until=until), config, as_json=as_json)
        result = pipeline.run(config, until=until, cluster=cluster)
    except KeyboardInterrupt:
        if not dry_run:
            say(f"interrupted; {_say_how_to_continue(command, Path(config.out), place)}")
        raise
    if result.folder.absolute() != Path(config.out).absolute():  # kept beside the first of several processes
        return None
    if as_json:
        names = ("folder", "plan", "results", "costs", "report")
        return show_json({name: getattr(result, name) for name in names})
    if result.plan is None:
        return typer.echo(str(result.folder))
    from ensemblelora.summary import summarize

    show_table(*summarize(result.folder, size=None if sys.stdout.isatty() else _PAGE))


def _show_export(made: Export) -> None:
    """Show what was measured, where anything was, and the folder."""
    if made.tasks:
        rows = {
            change.task: {
                "ensemble_loss": change.nll_ensemble,
                f"{made.format}_loss": change.nll_folded,
                "ensemble_accuracy": change.accuracy_ensemble,
                f"{made.format}_accuracy": change.accuracy_folded,
            }
            for change in made.tasks
        }
        show_rows(rows, title="validation rows")
        names = ("rank", "exact_rank", "residual", "accuracy_change")
        show_rows({"mean_loss_rise": made.nll_rise} | {name: getattr(made, name) for name in names})
    typer.echo(str(made.folder))


def _say_how_to_continue(command: str, folder: Path, place: Place) -> str:
    if (folder / CONFIG_FILE).exists():
        return f"continue with: {shlex.join(['ensemblelora', command, str(folder), *place.arguments])}"
    return "nothing was begun: give the same command again"
