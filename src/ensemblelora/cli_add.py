"""The commands that change a finished run: a dataset is added, dropped, or gets other rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ensemblelora.console import say, show_json, show_rows, talking
from ensemblelora.options import AsJson, Device, RunPath, Talk, spread

if TYPE_CHECKING:
    from ensemblelora.additions import Change, Option, Outcome

__all__ = ["add_change_commands"]

_PANEL = "When datasets come and go"

Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", help="The changed run's folder, instead of one beside RUN."),
]
OnlySay = Annotated[
    bool,
    typer.Option("--dry-run", metavar="", help="Say what would be trained and what that costs, and train nothing."),
]
Replay = Annotated[
    float,
    typer.Option("--replay", metavar="X", help="Of onward: rows of the group's other tasks, over the task's own."),
]
TaskName = Annotated[str, typer.Argument(metavar="TASK", help="A task of the run.")]
Entry = Annotated[str, typer.Argument(metavar="CARD|FILE", help="A shipped card's name, a card file, or a data file.")]
Way = Annotated[
    Literal["onward", "whole"] | None,
    typer.Option(
        "--training",
        metavar="onward|whole",
        help="Go on from the group's adapter with the task's rows and some of the others', or train the group from its "
        "start on all rows.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Common:
    """What all three take."""

    out: Out = None
    dry_run: OnlySay = False
    device: Device = None


def add_change_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    for command in (add, drop, update):
        app.command(rich_help_panel=_PANEL)(spread(command))


def add(
    run: RunPath,
    entry: Entry,
    *,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="group-G|A|alone",
            help="Where it goes, whatever is predicted: a group, by name or letter, or alone.",
        ),
    ] = None,
    training: Way = None,
    replay: Replay = 0.5,
    common: Common,
    as_json: AsJson = False,
    talk: Talk,
) -> None:
    """Add a dataset to a finished run: find its group, train that one alone, and fit the weights again."""
    with talking(**asdict(talk)):
        from ensemblelora.additions import add_task

        change = _carry_out(lambda: add_task(run, entry, place=to, training=training, replay=replay, **asdict(common)))
    show_json(change) if as_json else _show(change)


def drop(
    run: RunPath,
    task: TaskName,
    *,
    training: Annotated[
        Literal["whole", "keep"] | None,
        typer.Option(
            "--training",
            metavar="whole|keep",
            help="whole (usual): its group's adapter is trained again, from its start, on the rows of the tasks that "
            "are left there. keep: no adapter is trained, and the old one still knows the rows.",
            show_default=False,
        ),
    ] = None,
    common: Common,
    as_json: AsJson = False,
    talk: Talk,
) -> None:
    """Take a dataset out of a finished run; the tasks it was grouped with are trained again without it, others stay."""
    with talking(**asdict(talk)):
        from ensemblelora.additions import drop_task

        change = _carry_out(lambda: drop_task(run, task, training=training, **asdict(common)))
    show_json(change) if as_json else _show(change)


def update(
    run: RunPath,
    task: TaskName,
    entry: Entry,
    *,
    training: Way = None,
    replay: Replay = 0.5,
    common: Common,
    as_json: AsJson = False,
    talk: Talk,
) -> None:
    """Give a task of a finished run other rows; its group is trained again."""
    with talking(**asdict(talk)):
        from ensemblelora.additions import update_task

        change = _carry_out(lambda: update_task(run, task, entry, training=training, replay=replay, **asdict(common)))
    show_json(change) if as_json else _show(change)


def _carry_out(change: Any) -> Change:
    try:
        found: Change = change()
    except KeyboardInterrupt:
        say("interrupted; give the same command again to go on")
        raise
    return found


def _show(change: Change) -> None:
    """Show where the task goes, what that costs, and where it lies."""
    if change.is_known:
        typer.echo(_say_known(change))
        return
    if change.options:
        typer.echo(f"{change.task}: {change.reason}")
        show_rows({option.place: _describe_task(option) for option in change.options}, title="predicted of the task")
        saved = "loss that a place saves all tasks it touches, against leaving the task out"
        show_rows({option.place: _describe_place(option) for option in change.options}, title=saved)
    typer.echo(_say_costs(change))
    if change.place == "nowhere":
        typer.echo("nothing was trained, and the run stays as it is; --to says where the task goes nevertheless")
    elif change.trained:
        typer.echo(
            f"{'to be trained' if change.is_forecast else 'trained'}: {', '.join(change.trained)} ({change.training})"
        )
    if change.folder == change.source:
        return
    if change.place != "nowhere":
        _show_outcome(change)
    if change.is_forecast:
        typer.echo("no run yet; what was computed is kept for the same command without --dry-run:")
    typer.echo(str(change.folder))


def _show_outcome(change: Change) -> None:
    """Show what the tests gave, the groups, and whether they are still good ones."""
    from ensemblelora.report.wording import count, group_letter

    others = [tested for name, tested in change.tests.items() if name != change.task]
    rows = {change.task: asdict(change.tests[change.task])} if change.task in change.tests else {}
    if others:
        rows[f"mean of {'' if change.action == 'drop' else 'the other '}{count(len(others), 'task')}"] = _average(
            others
        )
    if rows:
        named = {"accuracy_before": "accuracy_before", "accuracy": "accuracy_now", "nll_before": "loss_before"}
        named |= {"nll": "loss_now"}
        shown = {name: {label: row[key] for key, label in named.items()} for name, row in rows.items()}
        show_rows(shown, title="test rows, answered by the ensemble")
    groups = {f"{group_letter(g)} (group-{g})": ", ".join(names) for g, names in enumerate(change.groups)}
    show_rows(groups, title="groups as they would be" if change.is_forecast else "groups now")
    if change.advice:
        times = count(change.n_changes, "change")
        typer.echo(f"{change.advice} ({times} since the last one; all cards are in {change.folder / 'cards'})")


def _average(tests: Sequence[Outcome]) -> dict[str, float | None]:
    """Means over the tasks that have a number; before and now over the same tasks."""
    means: dict[str, float | None] = {}
    for name in ("accuracy", "nll"):
        pairs = [(getattr(one, name), getattr(one, f"{name}_before")) for one in tests]
        whole = [pair for pair in pairs if None not in pair]
        now = [pair[0] for pair in whole or pairs if pair[0] is not None]
        means[name] = sum(now) / len(now) if now else None
        means[f"{name}_before"] = sum(pair[1] for pair in whole) / len(whole) if whole else None
    return means


def _say_known(change: Change) -> str:
    done = {"add": "is already in the run at", "drop": "is already gone from the run at", "update": "has these rows in"}
    return f"{change.task} {done[change.action]} {change.folder}: nothing to do"


def _say_costs(change: Change) -> str:
    from ensemblelora.report.wording import format_flops

    costs = change.costs
    spent, rerun = (sum(flops.values()) for flops in (costs.flops, costs.rerun_flops))
    if change.place == "nowhere":
        return (
            f"finding that out took {format_flops(spent)}, {costs.learning_share:.1%} of what a run from the beginning "
            "takes to choose, train and combine"
        )
    verb = "would cost about" if change.is_forecast else "cost"
    return (
        f"{verb} {costs.learning_share:.0%} of a run from the beginning to choose, train and combine; with tests and "
        f"baselines {costs.total_share:.0%} ({format_flops(spent)} of {format_flops(rerun)})"
    )


def _describe_task(option: Option) -> dict[str, Any]:
    from ensemblelora.report.wording import format_interval

    return {
        "loss": option.nll,
        "loss_between": format_interval(option.nll_low, option.nll_high),
        "accuracy": option.accuracy,
        "accuracy_between": format_interval(option.accuracy_low, option.accuracy_high),
        "loss_before_training": option.untrained_nll,
    }


def _describe_place(option: Option) -> dict[str, Any]:
    from ensemblelora.report.wording import format_number

    error = "" if option.behind_se is None else f" ± {format_number(option.behind_se)}"
    ruled_out = "" if option.is_allowed else "ruled out by the run's budgets or constraints"
    return {
        "saved": option.gain,
        "standard_error": option.gain_se,
        "of_it_by_tasks_there": option.others,
        "below_the_chosen": "" if option.is_chosen else f"{format_number(option.behind)}{error}",
        "outcome": "chosen" if option.is_chosen else ruled_out,
    }
