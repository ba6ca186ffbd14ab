"""The command that chooses sources for one target."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ensemblelora.artifacts import CONFIG_FILE, RUN_FILE
from ensemblelora.config import RunConfig
from ensemblelora.console import say, show_json, show_rows, show_table, talking
from ensemblelora.options import AsJson, DryRun, Place, Request, Source, Talk, spread
from ensemblelora.progress import note
from ensemblelora.recipe import read_request

__all__ = ["add_select_command"]

_PANEL = "For one target"


def add_select_command(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command(rich_help_panel=_PANEL)(spread(select))


@dataclass(frozen=True)
class Wanted:
    """What can be chosen, and what is done with it."""

    by_cluster: Annotated[
        int | None,
        typer.Option(
            "--by-cluster",
            metavar="K",
            help="Cut every source into K clusters of its rows and choose among these; with one task alone, its own.",
        ),
    ] = None
    own_rows: Annotated[
        bool | None,
        typer.Option(
            "--own-rows/--choose-own-rows",
            metavar="",
            show_default=False,
            help="The target's own training rows: in every set (usual), or a source like any other.",
        ),
    ] = None
    samples: Annotated[
        bool, typer.Option("--samples", metavar="", help="Also say of every training row what it does to the target.")
    ] = False
    search_only: Annotated[
        bool, typer.Option("--search-only", metavar="", help="Choose, and fine-tune nothing on what was chosen.")
    ] = False


@dataclass(frozen=True)
class Search:
    """How sets of sources are searched."""

    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            metavar="X",
            help="Least predicted gain of a step, in nats; a step gains at least its standard error, too.",
        ),
    ] = 0.0
    max_sources: Annotated[
        int | None, typer.Option("--max-sources", metavar="N", help="Choose no more than so many.")
    ] = None
    beam_width: Annotated[
        int, typer.Option("--beam-width", metavar="N", help="Of beam: sets that it goes on with.")
    ] = 4
    permutations: Annotated[
        int, typer.Option("--permutations", metavar="N", help="Of shapley: orders of the sources, with their reverses.")
    ] = 32


def select(
    source: Source,
    request: Request,
    *,
    target: Annotated[
        str, typer.Option("--target", metavar="TASK", help="The task that counts; the others are sources.")
    ],
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            metavar="A,B,...",
            help="backward (begin with all sources), forward (begin with none), swap, beam, scores (random sets), loo "
            "(leave one out), shapley; all, or some of them. The first one is what the headline tells of.",
        ),
    ] = "backward",
    wanted: Wanted,
    search: Search,
    place: Place,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    talk: Talk,
) -> None:
    """Choose the sources that help one target, fine-tune on them, and test that against all and none; in RUN-select."""
    config = _read_source(source, request)
    names = [name.strip() for name in strategy.split(",")]
    with talking(**asdict(talk)):
        from ensemblelora.selection.strategies import choose_strategies

        choose_strategies(names)  # a slip is told before anything is loaded
        options = _settle(config, wanted, search)
        note(f"loading libraries, data and model {config.model.name} ...")  # nothing else is said for seconds
        if dry_run:
            return _foretell(config, target, names, options, as_json=as_json)
        _carry_out(config, target, names, options | {"cluster": place.read()}, as_json=as_json)


def _settle(config: RunConfig, wanted: Wanted, search: Search) -> dict[str, Any]:
    """Options of the command as the library takes them."""
    from ensemblelora.selection.search import SearchSettings

    settings = SearchSettings(
        tolerance=search.tolerance,
        max_sources=search.max_sources,
        beam_width=search.beam_width,
        n_permutations=search.permutations,
        subset_size=config.affinity.subset_size,
        n_subsets=config.affinity.n_subsets,
        seed=config.seed,
    )
    return {
        "settings": settings,
        "includes_target": wanted.own_rows,
        "n_clusters": wanted.by_cluster,
        "wants_samples": wanted.samples,
        "wants_final": not wanted.search_only,
    }


def _foretell(config: RunConfig, target: str, names: list[str], options: dict[str, Any], *, as_json: bool) -> None:
    """Show what a selection would take."""
    from ensemblelora.selection.forecast import describe_stages, forecast_selection
    from ensemblelora.selection.request import check_request

    request = check_request(config, target, names, **options)
    forecast = forecast_selection(request)
    if as_json:
        return show_json(forecast)
    show_rows(describe_stages(request, forecast))
    told = "the searches between features and fine-tunings take seconds and are left out"
    if not request.wants_final:
        told = "the searches after that take seconds and are left out; nothing is fine-tuned on what they choose"
    typer.echo(f"{told}; what is done before in {config.out} is not taken off")


def _carry_out(config: RunConfig, target: str, names: list[str], options: dict[str, Any], *, as_json: bool) -> None:
    from ensemblelora.selection.select import select_sources

    try:
        record = select_sources(config, target, names, **options)
    except KeyboardInterrupt:
        say("interrupted; finished stages and trainings are kept: give the same command again")
        raise
    if as_json:
        return show_json(record.to_dict())
    from ensemblelora.selection.screen import render_selection

    show_table(*render_selection(record))


def _read_source(source: Path, request: Request) -> RunConfig:
    """Read the config; its run folder is one of its own, unless one is named or it is a selection's already."""
    config = read_request(source, request.overrides)
    home = source if source.is_dir() else source.parent
    is_selection = (home / "selection").is_dir() and (home / RUN_FILE).is_file()
    is_known = is_selection and (source.is_dir() or source.name == CONFIG_FILE)
    if request.out is not None or is_known:
        return config
    return config.model_copy(update={"out": f"{config.out}-select"})
