"""The commands of a federation: carry one out, and assign a client that came later."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ensemblelora.artifacts import CONFIG_FILE
from ensemblelora.config_federation import FederationConfig
from ensemblelora.console import say, show_json, show_rows, talking
from ensemblelora.options import AsJson, Device, DryRun, Request, RunPath, Talk, spread
from ensemblelora.recipe import read_federation

if TYPE_CHECKING:
    from ensemblelora.federation.arrival import Assignment
    from ensemblelora.federation.results import Outcome

__all__ = ["add_federation_commands"]

_PANEL = "Clients whose texts stay with them"


def add_federation_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    for command in (federate, assign):
        app.command(rich_help_panel=_PANEL)(spread(command))


def federate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG|FOLDER", help="A recipe, the folder of a federation, or a folder with a text file a client."
        ),
    ],
    request: Request,
    *,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="simulation|process|deployment",
            help="Flower's simulation; this process alone; or SuperNodes at engine.superlink.",
        ),
    ] = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    talk: Talk,
) -> None:
    """Group clients by their gradients, train one adapter a group by federated averaging, and compare; for hours."""
    chosen = () if engine is None else (f"engine.kind={engine}",)
    config = read_federation(source, (*request.overrides, *chosen))
    with talking(**asdict(talk)):
        if dry_run:
            from ensemblelora.federation.forecast import forecast_federation

            forecast = {name: asdict(stage) for name, stage in forecast_federation(config).items()}
            return show_json(forecast) if as_json else show_rows(forecast)
        outcome = _carry_out(config)
    show_json({"folder": config.out, **asdict(outcome)}) if as_json else _show_outcome(config, outcome)


def assign(
    run: RunPath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The client's .txt, .jsonl or .csv file.")],
    *,
    measure: Annotated[
        bool, typer.Option("--measure", metavar="", help="Also try the group's adapters on the file's last lines.")
    ] = False,
    device: Device = None,
    as_json: AsJson = False,
    talk: Talk,
) -> None:
    """Say which group of a finished federation a new client belongs to, by its features; nobody is trained again."""
    with talking(**asdict(talk)):
        from ensemblelora.federation.arrival import assign_client

        found = assign_client(run, file, device=device, is_measured=measure)
    show_json(found) if as_json else _show_assignment(found)


def _carry_out(config: FederationConfig) -> Outcome:
    from ensemblelora.federation.engines import run_federation

    try:
        return run_federation(config)
    except KeyboardInterrupt:
        folder = Path(config.out)
        is_begun = (folder / CONFIG_FILE).exists()
        command = f"ensemblelora federate {shlex.quote(str(folder))}"
        say(f"interrupted; continue with: {command}" if is_begun else "interrupted; nothing was begun")
        raise


def _show_outcome(config: FederationConfig, outcome: Outcome) -> None:
    from ensemblelora.federation.page import write_headline
    from ensemblelora.federation.record import title_of
    from ensemblelora.report.wording import format_bytes, format_flops, format_interval, format_number, format_signed

    typer.echo(write_headline(outcome))
    rows: dict[str, dict[str, Any]] = {}
    for name, one in sorted(outcome.methods.items(), key=lambda item: item[1].nll):
        cost = one.cost
        rows[title_of(name)] = {
            "test_loss": f"{format_number(one.nll)} ({format_interval(one.low, one.high)})",
            "against_one_for_all": format_signed(one.difference),
            "flops": format_flops(None if cost is None else cost.flops),
            "sent": format_bytes(None if cost is None else cost.bytes_per_client),
        }
    show_rows(rows)
    for stage, client, reason in outcome.refused[:3]:
        say(f"not used: {stage}, client {client}: {reason}")
    typer.echo(str(Path(config.out) / "report.html"))


def _show_assignment(found: Assignment) -> None:
    rows = {
        f"group {g}": {
            "clients": one.n_clients,
            "predicted_loss": one.nll,
            "gain": one.gain,
            "\u00b1": one.gain_se,
            "is_chosen": g == found.group,
        }
        for g, one in enumerate(found.groups)
    }
    show_rows(rows, title=f"{found.client}: {found.n_rows} rows, base model's loss {found.base_nll:.3f}")
    if found.measured:
        show_rows(dict(found.measured), title="last rows")
    for folder, rate in found.adapters:
        typer.echo(folder if rate == 1.0 else f"{folder}  (times {rate:g})")
