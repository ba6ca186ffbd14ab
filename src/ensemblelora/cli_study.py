"""The commands that take hours and say how far something can be relied on: compare, validate, reproduce."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ensemblelora.artifacts import CONFIG_FILE
from ensemblelora.config import RunConfig
from ensemblelora.console import say, show_json, show_rows, show_table, talking
from ensemblelora.errors import UsageError
from ensemblelora.options import AsJson, Device, DryRun, Place, Request, RunPath, Source, Talk, spread
from ensemblelora.recipe import read_request

__all__ = ["add_study_commands"]

_PANEL = "Compare, and check"


def add_study_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    for command in (compare, validate, reproduce):
        app.command(rich_help_panel=_PANEL)(spread(command))


def compare(
    source: Source,
    request: Request,
    *,
    methods: Annotated[
        str, typer.Option("--methods", metavar="A,B,...", help="Names of methods; all, core, or some of them.")
    ] = "core",
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Seeds; the first chooses the rates.")] = 3,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            "--learning-rates", metavar="X,Y,...", help="Tried for every trained method; by default the config's alone."
        ),
    ] = None,
    primary: Annotated[
        str | None,
        typer.Option(
            "--primary",
            metavar="A:B,...",
            help="Comparisons that are the purpose, named beforehand; by default ours against every rival, and our "
            "groups alone against other groups. random and random-ours are the mean of their draws.",
        ),
    ] = None,
    place: Place,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    talk: Talk,
) -> None:
    """Train and test ways to fine-tune on the tasks, with equal rows, seeds and rates, for hours; in RUN-compare."""
    config, folder = _read_source(source, request)
    asked: tuple[Any, ...] = (config, _split(methods), seeds, _read_rates(learning_rates), folder)
    pairs = None if primary is None else [_read_pair(pair) for pair in _split(primary)]
    with talking(**asdict(talk)):
        if dry_run:
            from ensemblelora.study_forecast import forecast_study

            forecast = forecast_study(*asked, primary=pairs)
            return show_json(forecast) if as_json else show_rows(forecast)
        _carry_out(asked, {"primary": pairs, "cluster": place.read()}, as_json=as_json)


def validate(
    run: RunPath,
    *,
    subsets: Annotated[
        int, typer.Option("--subsets", metavar="N", help="Distinct subsets: all tasks, each alone, and others.")
    ] = 50,
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", help="Fine-tunings of each; two or more measure the noise.")
    ] = 1,
    all_dimensions: Annotated[
        bool,
        typer.Option(
            "--all-dimensions",
            help="Predict from 100 to 800 numbers a gradient and from whole ones besides: two gradient passes.",
        ),
    ] = False,
    device: Device = None,
    place: Place,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    talk: Talk,
) -> None:
    """Fine-tune subsets of a run's tasks for hours, and compare with what its oracle predicts."""
    asked: dict[str, Any] = {"n_subsets": subsets, "n_seeds": seeds, "all_dimensions": all_dimensions, "device": device}
    with talking(**asdict(talk)):
        if dry_run:
            from ensemblelora.validation_forecast import forecast_validation

            forecast = forecast_validation(run, **asked)
            return show_json(forecast) if as_json else show_rows(forecast)
        from ensemblelora.validation.validate import validate_run

        try:
            found = validate_run(run, **asked, cluster=place.read())
        except KeyboardInterrupt:
            say("interrupted; what was fine-tuned is kept: give the same command again")
            raise
    if as_json:
        return show_json(found.to_dict())
    from ensemblelora.verdict import render_validation

    show_table(*render_validation(found))


def reproduce(
    exhibit: Annotated[
        str,
        typer.Argument(
            metavar="EXHIBIT",
            help="table1, table4, table6, table7, figure4, figure7, section2.1 or section3.3, of comparisons; table2, "
            "table3, table5 or figure2, of validated runs; table2, table5, figure2, figure6, figure9, figure11, "
            "figure12 or sectionB.6, of analyses; extension or extension-sizes, of federations.",
        ),
    ],
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="Of compare, analyze or federate, or validated runs; or records of compare or analyze.",
        ),
    ],
    as_json: AsJson = False,
    *,
    talk: Talk,
) -> None:
    """Make a table or figure of the paper, its own numbers beside ours."""
    with talking(**asdict(talk)):
        from ensemblelora.reproduction.tables import reproduce as make

        made = make(exhibit, folders)
    if as_json:
        return show_json(made)
    if all("folder" in row for row in made.rows):
        from ensemblelora.ranking import render_exhibit

        return show_table(*render_exhibit(made))
    if all("claim" in row for row in made.rows):
        claims = {str(row["claim"]): {key: value for key, value in row.items() if key != "claim"} for row in made.rows}
        show_rows(claims, title=made.heading)
        for line in made.notes:
            typer.echo(line)
        return None
    from ensemblelora.ranking import render_lines

    show_table(*render_lines(made))


def _carry_out(asked: tuple[Any, ...], options: Mapping[str, Any], *, as_json: bool) -> None:
    """Compare, write the page, show both, and exit with 1 where a method failed."""
    from ensemblelora.comparison.page import describe_study, write_page
    from ensemblelora.comparison.study import compare as carry_out

    try:
        made = carry_out(*asked, **options)
    except KeyboardInterrupt:
        say("interrupted; finished methods and trainings are kept: give the same command again")
        raise
    page = write_page(made.record.folder)
    if as_json:
        show_json({"study": describe_study(page.study)} | asdict(page.statistics))
    else:
        from ensemblelora.ranking import render_comparison

        show_table(*render_comparison(page))
    if made.failures:
        raise typer.Exit(1)


def _read_source(source: Path, request: Request) -> tuple[RunConfig, Path]:
    """Read the config, and say where the comparison goes: its own folder where one is named, or RUN-compare."""
    home = source if source.is_dir() else source.parent
    is_known = (home / "study.json").is_file() and (source.is_dir() or source.name == CONFIG_FILE)
    config = read_request(home / CONFIG_FILE if is_known else source, request.overrides)
    if request.out is not None:
        return config, request.out
    return config, home if is_known else Path(f"{config.out}-compare")


def _read_rates(text: str | None) -> list[float]:
    try:
        return [float(rate) for rate in _split(text or "")]
    except ValueError:
        raise UsageError(f"--learning-rates {text!r}: expected numbers, such as 2.5e-4,5e-4,1e-3") from None


def _read_pair(text: str) -> tuple[str, str]:
    first, separator, second = text.partition(":")
    if not (first and separator and second) or ":" in second:
        raise UsageError(f"--primary {text!r}: expected two methods, such as ours:shared")
    return first, second


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
