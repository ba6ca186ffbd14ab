"""The command that puts a run behind HTTP."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ensemblelora.console import talking
from ensemblelora.options import Device, RunPath, Talk, spread
from ensemblelora.serving.limits import Limits, check_installed

if TYPE_CHECKING:
    from ensemblelora.serving.server import Started

__all__ = ["add_serve_command"]

_USUAL = Limits()


def add_serve_command(app: typer.Typer, *, panel: str) -> None:
    """Register the command."""
    app.command(rich_help_panel=panel)(spread(serve))


def serve(
    run: RunPath,
    *,
    host: Annotated[
        str, typer.Option("--host", metavar="NAME", help="Where to listen; beyond this machine there is no password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0: a free one.")] = 8000,
    batch: Annotated[
        int, typer.Option("--batch", metavar="ROWS", min=1, help="Rows answered together.")
    ] = _USUAL.max_batch_rows,
    wait: Annotated[
        float, typer.Option("--wait", metavar="MS", min=0, help="How long a batch that isn't full waits for more.")
    ] = _USUAL.batch_wait_ms,
    queue: Annotated[
        int, typer.Option("--queue", metavar="ROWS", min=1, help="Rows that may wait; beyond, requests are refused.")
    ] = _USUAL.max_waiting_rows,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows",
            metavar="N",
            min=1,
            help=f"Rows of one request, at most; by default {_USUAL.max_rows} or the queue's.",
        ),
    ] = None,
    size: Annotated[
        int, typer.Option("--bytes", metavar="N", min=1, help="Bytes of one request, at most.")
    ] = _USUAL.max_body_bytes,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="S", min=0, help="Seconds until a request is given up.")
    ] = _USUAL.timeout_seconds,
    device: Device = None,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="Say as one line of JSON that the server is ready.")
    ] = False,
    talk: Talk,
) -> None:
    """Answer questions over HTTP with a run's ensemble, until told to stop."""
    limits = Limits(batch, wait, queue, min(_USUAL.max_rows, queue) if rows is None else rows, size, timeout)
    check_installed()
    with talking(**asdict(talk)):
        from ensemblelora.serving.server import serve_run

        def announce(started: Started) -> None:
            typer.echo(json.dumps(asdict(started)) if as_json else _describe(started))

        serve_run(run, host=host, port=port, limits=limits, device=device, announce=announce)


def _describe(started: Started) -> str:
    routed = "" if started.is_routing else ", each by name"
    return f"{started.url}/predict answers {len(started.tasks)} tasks of {started.run}{routed}; Ctrl-C stops"
