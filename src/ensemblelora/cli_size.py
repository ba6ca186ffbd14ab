"""What a run would cost: the command forecast, of another machine, and the screen of a dry run here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ensemblelora.config import RunConfig
from ensemblelora.console import show_json, show_rows, talking
from ensemblelora.errors import UsageError
from ensemblelora.options import AsJson, Request, Source, Talk, spread
from ensemblelora.recipe import read_request

if TYPE_CHECKING:
    from ensemblelora.pipeline import Foresight

__all__ = ["add_size_command", "show_foresight"]


def add_size_command(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command(rich_help_panel="The whole method")(spread(forecast))


def forecast(
    source: Source,
    request: Request,
    *,
    machine: Annotated[
        str, typer.Option("--machine", metavar="8xH100|FILE", help="Devices, or a YAML file that describes them.")
    ],
    measured: Annotated[
        Path | None,
        typer.Option("--measured", metavar="RUN", help="A run folder of one such device, whose rates are taken."),
    ] = None,
    tasks: Annotated[int, typer.Option("--tasks", metavar="N", help="Tasks.")] = 10,
    rows: Annotated[int, typer.Option("--rows", metavar="N", help="Training rows of all tasks together.")],
    held_out: Annotated[
        float, typer.Option("--held-out", metavar="X", help="Validation rows, and as many test rows, per training row.")
    ] = 0.1,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="Of a row.")] = 256,
    classes: Annotated[int, typer.Option("--classes", metavar="N", help="Answers of a task.")] = 2,
    as_json: AsJson = False,
    talk: Talk,
) -> None:
    """Predict a run's time, memory, disk and FLOPs on another machine, without the model's weights."""
    config = read_request(source, request.overrides)
    if min(tasks, rows, tokens, classes - 1) < 1 or held_out <= 0:
        raise UsageError("forecast: expected 1 or more tasks, rows and tokens, 2 classes, and --held-out above 0")
    with talking(**asdict(talk)):
        from ensemblelora.machines import read_machine, with_measured_rates
        from ensemblelora.sizing import DataSize, read_model_shape, size_run

        n_held = max(1, round(held_out * rows))
        data = DataSize(tasks, rows, n_held, n_held, tokens, classes)
        named = read_machine(machine)
        rated = named if measured is None else with_measured_rates(named, measured)
        found = size_run(config, read_model_shape(config.model.name), data, rated)
    stages = {name: asdict(stage) for name, stage in found.items()}
    show_json(stages) if as_json else show_rows(stages)


def show_foresight(found: Foresight, config: RunConfig, *, as_json: bool) -> None:
    """Show what a run would take, what is left for others to do, and what would happen to a finished one."""
    from ensemblelora.report.wording import format_seconds

    kept = {} if found.set_aside is None else {"set_aside": {"folder": found.set_aside, "changes": found.changes}}
    if as_json:
        return show_json({**found.stages, **kept, **({"is_finished": True} if found.is_finished else {})})
    if found.is_finished:
        typer.echo(
            f"{config.out} holds this very run, finished: nothing would be done again. In another folder (--out):"
        )
    show_rows(found.stages)
    if found.later_seconds > 0:
        later = format_seconds(found.later_seconds)
        typer.echo(f"the stages after that, which this command leaves to `ensemblelora run`: {later} more")
    if found.set_aside is not None:
        typer.echo(
            f"{config.out} is finished, and was made otherwise: {'; '.join(found.changes)}. Before a stage that this "
            f"changes is done again, the finished run is set aside, whole, in {found.set_aside} (another --out keeps "
            "both apart)"
        )
