"""Options that several commands share, each declared once: as annotations, and as records of what belongs together.

Typer knows parameters, not records; :func:`spread` shows it a record's fields as parameters of the command itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ensemblelora.recipe import override
from ensemblelora.scheduling import Cluster, read_cluster

__all__ = ["AsJson", "Debug", "Device", "DryRun", "Place", "Request", "RunPath", "Source", "Talk", "spread"]

Source = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG|FOLDER", help="A YAML recipe, a run folder, or a folder of CSV and JSONL files, one task each."
    ),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/demo.")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; auto takes the best.")
]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Write the result as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", metavar="", help="Show the traceback of an error.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", metavar="", help="Only predict time, memory, disk and FLOPs; train nothing.")
]


@dataclass(frozen=True)
class Request:
    """What changes a recipe."""

    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="The run folder, instead of runs/<name of CONFIG or FOLDER>."),
    ] = None
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a value, such as training.num_train_epochs=1; repeatable. `ensemblelora config` lists all.",
        ),
    ] = None
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of all that is random.")] = None
    device: Device = None
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="A hub id, a local folder, a .gguf file, or smollm2-135m."),
    ] = None

    @property
    def overrides(self) -> tuple[str, ...]:
        """All of it as changes in the form of ``--set``; the options that stand for a key win over ``--set``."""
        out = None if self.out is None else str(self.out)
        keys = {"out": out, "seed": self.seed, "model.device": self.device, "model.name": self.model}
        return (
            *(self.changes or ()),
            *(override(key, value) for key, value in keys.items() if value is not None),
        )


@dataclass(frozen=True)
class Place:
    """Where independent jobs run."""

    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="local:N|auto|ADDRESS",
            help="Run independent jobs side by side: in N processes here, or on a Ray cluster.",
        ),
    ] = None
    per_job: Annotated[
        str | None,
        typer.Option(
            "--per-job",
            metavar="cpus=N,gpus=N",
            help="What each of these jobs gets; also memory_gb=N. By default an accelerator, or an equal share.",
        ),
    ] = None

    def read(self) -> Cluster | None:
        """Understand both; none: jobs run in this process."""
        return read_cluster(self.cluster, self.per_job)

    @property
    def arguments(self) -> list[str]:
        """Both as they are given on the command line."""
        options = {"--cluster": self.cluster, "--per-job": self.per_job}
        return [word for option, value in options.items() if value is not None for word in (option, value)]


@dataclass(frozen=True)
class Talk:
    """How much a command says on stderr."""

    quiet: Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="Say nothing but errors on stderr.")] = False
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose", "-v", metavar="", count=True, show_default=False, help="Say more on stderr; -vv: all there is."
        ),
    ] = 0
    debug: Debug = False


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take records of options; typer sees their fields in the records' places."""
    own = inspect.signature(command, eval_str=True).parameters
    records: dict[str, Any] = {name: kind for name, kind in get_type_hints(command).items() if is_dataclass(kind)}
    options = {name: _list_options(own[name], records.get(name)) for name in own}

    @wraps(command)
    def command_of_options(**given: Any) -> None:
        for name, record in records.items():
            given[name] = record(**{option: given.pop(option) for option in options[name]})
        command(**given)

    flat = [option for group in options.values() for option in group.values()]
    command_of_options.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]  # inspect asks it first
    return command_of_options


def _list_options(parameter: inspect.Parameter, record: Any) -> Mapping[str, inspect.Parameter]:
    """The parameter itself, or the fields of the record it takes."""
    found = inspect.signature(record, eval_str=True).parameters if record else {parameter.name: parameter}
    return {name: option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, option in found.items()}
