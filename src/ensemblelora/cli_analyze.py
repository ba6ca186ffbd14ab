"""The command that carries out one of the paper's analyses: analyze."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ensemblelora.artifacts import CONFIG_FILE, RUN_FILE
from ensemblelora.console import say, show_json, show_rows, show_table, talking
from ensemblelora.options import AsJson, DryRun, Request, Source, Talk, spread
from ensemblelora.recipe import read_request

__all__ = ["add_analyze_command"]

_PANEL = "Compare, and check"


def add_analyze_command(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command(rich_help_panel=_PANEL)(spread(analyze))


def analyze(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="linearization, transfer, sharpness or similarity."),
    ],
    source: Source,
    request: Request,
    *,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Seeds of theta0 and of the order of rows.")] = 1,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="KEY=VALUE",
            help="An option of the analysis, such as n_subsets=2 or base_methods=[lora,qlora]; repeatable. A wrong key "
            "lists those there are.",
        ),
    ] = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    talk: Talk,
) -> None:
    """Carry out one of the paper's analyses, for hours; in RUN-analysis, which several of one config share."""
    config = read_request(source, request.overrides)
    home = Path(f"{config.out}-analysis") if request.out is None else request.out
    with talking(**asdict(talk)):
        from ensemblelora.analysis.record import carry_out, find_analysis, make_request, read_options

        analysis = find_analysis(name)
        options = read_options(analysis, settings or [])
        asked = make_request(analysis, config, options, n_seeds=seeds, home=home, run=_find_run(source))
        if dry_run:
            from ensemblelora.analysis_forecast import forecast_analysis

            forecast = forecast_analysis(analysis, asked)
            return show_json(forecast) if as_json else show_rows(forecast)
        try:
            result = carry_out(analysis, asked)
        except KeyboardInterrupt:
            say("interrupted; finished fine-tunings and measurements are kept: give the same command again")
            raise
        from ensemblelora.analysis.page import write_page

        page = write_page(home, analysis, result)
    show_json(result) if as_json else _show(analysis.headline(result), result, page)


def _show(headline: str, result: dict[str, Any], page: Path) -> None:
    from rich.text import Text

    spent = {name: {key: part[key] for key in ("n", "flops", "seconds")} for name, part in result["costs"].items()}
    show_table(Text(headline, style="bold"), Text())
    show_rows(spent)
    show_table(Text(f"report: {page}", no_wrap=True))


def _find_run(source: Path) -> Path | None:
    """The run folder that was named, by itself or by its config."""
    home = source.parent if source.name == CONFIG_FILE else source
    return home if (home / RUN_FILE).is_file() else None
