"""Shared options: typer must see a record's fields as it sees options written out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
import typer.main

from ensemblelora.options import AsJson, Debug, Device, Request, RunPath, Talk, spread

Name = Annotated[str, typer.Option("--name", help="Required, and between two records.")]


def run(command: Any, *arguments: str) -> Any:
    app = typer.Typer()
    app.command()(command)
    return app(list(arguments), standalone_mode=False)


def describe(command: Any) -> list[tuple[Any, ...]]:
    app = typer.Typer()
    app.command(help="x")(command)
    parameters = typer.main.get_command(app).params  # type: ignore[attr-defined]
    return [(p.name, p.opts, p.secondary_opts, p.default, p.required, p.metavar, p.param_type_name) for p in parameters]


def test_typer_sees_what_it_would_see_written_out():
    @spread
    def short(run: RunPath, *, talk: Talk, name: Name, as_json: AsJson = False) -> None: ...

    def long(
        run: RunPath,
        *,
        quiet: Annotated[bool, typer.Option("--quiet", "-q", metavar="")] = False,
        verbose: Annotated[int, typer.Option("--verbose", "-v", metavar="", count=True)] = 0,
        debug: Debug = False,
        name: Name,
        as_json: AsJson = False,
    ) -> None: ...

    assert describe(short) == describe(long)
    assert short.__name__ == "short"


def test_records_arrive_filled():
    arrived = []

    @spread
    def command(run: RunPath, request: Request, *, as_json: AsJson = False, talk: Talk) -> None:
        arrived.append((run, request, as_json, talk))

    run(command, "here", "--seed", "3", "-vv", "--set", "a=1", "--set", "b=2", "--json")
    assert arrived == [(Path("here"), Request(seed=3, changes=["a=1", "b=2"]), True, Talk(verbose=2))]
    run(command, "here")
    assert arrived[1] == (Path("here"), Request(), False, Talk())


def test_a_command_without_records_stays_as_it_is():
    def plain(*, device: Device = None) -> None: ...

    assert describe(spread(plain)) == describe(plain)


@pytest.mark.parametrize(
    ("request_", "overrides"),
    [
        (Request(), ()),
        (Request(changes=["seed=1"], seed=0), ("seed=1", "seed=0")),
        (Request(out=Path("a b"), device="cpu", model="1e3"), ('out="a b"', 'model.device="cpu"', 'model.name="1e3"')),
    ],
)
def test_options_that_stand_for_a_key_come_last(request_, overrides):
    assert request_.overrides == overrides
