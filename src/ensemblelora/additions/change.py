"""A task comes, goes, or has other rows: the main path, from an earlier run to a changed one in a folder of its own.

In: a finished run, a card or data file. Out: :class:`Change`, and a run folder like any other: it can be predicted
with, asked, exported, evaluated again, and changed once more. Features are taken of rows that are new, the oracle says
where they belong, one group is trained, and weights are fitted again from scores that are kept. The earlier run is only
read; one that is broken off goes on when the same command is given again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ensemblelora import artifacts, judging, reporting, stages
from ensemblelora.adapters import AdaptedModel, adapter_bytes
from ensemblelora.additions.carry import Carrier, Training, carry_features, lengthen_training
from ensemblelora.additions.costs import Costs, compare_costs, scale_rerun
from ensemblelora.additions.forecast import forecast_flops
from ensemblelora.additions.options import ALONE, NOWHERE, Option, list_options, place_task
from ensemblelora.additions.outcome import Change, advise, compare_tests, recall_change, write_change
from ensemblelora.additions.request import REPLAY, Request, ask, identify
from ensemblelora.additions.source import (
    Source,
    change_cards,
    read_source,
    settle_config,
    write_cards,
)
from ensemblelora.config import RunConfig
from ensemblelora.data.loading import load_task
from ensemblelora.data.task import TaskCard, TaskSet
from ensemblelora.errors import DataError
from ensemblelora.grouping import Partition, sort_groups
from ensemblelora.planning.budget import Budget
from ensemblelora.planning.demand import read_constraints
from ensemblelora.stages import Rows
from ensemblelora.startpoint import settle_training
from ensemblelora.store import FeatureStore
from ensemblelora.workspace import Workspace, open_workspace

__all__ = ["Change", "add_task", "drop_task", "update_task"]


@dataclass(frozen=True, eq=False)
class _Prepared:
    """Cards, rows and model of the changed run."""

    paths: tuple[str, ...]
    """of the cards"""
    tasks: TaskSet
    rows: Rows
    probe: AdaptedModel
    start: str


@dataclass(frozen=True, eq=False)
class _Placed:
    """Where the task goes."""

    options: tuple[Option, ...]
    place: str | None
    reason: str
    groups: Partition
    """of the changed run, in its order; where the task goes nowhere, without it"""


def add_task(
    run: Path | str,
    entry: str,
    out: Path | str | None = None,
    *,
    place: str | None = None,
    training: Training | None = None,
    replay: float = REPLAY,
    dry_run: bool = False,
    device: str | None = None,
) -> Change:
    """Add a dataset to a finished run.

    Its features alone are taken; the oracle says which group it joins, or that it gets an adapter of its own, or that
    it belongs nowhere, in which case nothing is trained.

    Args:
        run: The run folder.
        entry: A shipped card's name, a card file, or a data file.
        out: The changed run's folder; none: beside the run, ``RUN-with-TASK``.
        place: Where it goes, whatever is predicted: ``group-G``, the group's letter in the report, or ``alone``.
        training: ``onward`` (usual): from the group's adapter, on its rows and some of the others'; ``whole``: the
            group from its start, on all rows.
        replay: Of ``onward``: rows of the group's other tasks, over its own.
        dry_run: Whether only to say where it belongs and what that would cost. Its features are kept in ``out``.
        device: Where the model runs; none: as in the run.

    Raises:
        UsageError: If run, place or way of training are wrong, or the run has a task of that name.
        DataError: If the entry can't be read, or the run's own rows are no longer what they were.
        OutputError: If ``out`` can't be written, or holds something else.
    """
    source = read_source(run, device=device)
    cards, task = change_cards(source, "add", entry=entry)
    return _change(ask("add", source, task, out, training, replay, place, is_dry=dry_run), source, cards)


def drop_task(
    run: Path | str,
    task: str,
    out: Path | str | None = None,
    *,
    training: Training | None = None,
    dry_run: bool = False,
    device: str | None = None,
) -> Change:
    """Take a dataset out of a finished run; as :func:`add_task`.

    Args:
        run: The run folder.
        task: Its name.
        out: The changed run's folder; none: ``RUN-without-TASK``.
        training: ``whole`` (usual): its group is trained again, so that nothing of its rows is left in any adapter;
            ``keep``: the adapter stays, and only weights are fitted again.
        dry_run: Whether only to say what that would cost.
        device: Where the model runs; none: as in the run.
    """
    source = read_source(run, device=device)
    cards, _ = change_cards(source, "drop", task=task)
    return _change(ask("drop", source, task, out, training, REPLAY, None, is_dry=dry_run), source, cards)


def update_task(
    run: Path | str,
    task: str,
    entry: str,
    out: Path | str | None = None,
    *,
    training: Training | None = None,
    replay: float = REPLAY,
    dry_run: bool = False,
    device: str | None = None,
) -> Change:
    """Give a task of a finished run other rows; it stays in its group. As :func:`add_task`.

    Args:
        run: The run folder.
        task: Its name.
        entry: A card that takes the place of the task's, or a data file with other training rows for it.
        out: The changed run's folder; none: ``RUN-updated-TASK``.
        training: ``whole`` (usual): its group is trained again, so that nothing of the old rows is left; ``onward``.
        replay: Of ``onward``: rows of the group's other tasks, over its own.
        dry_run: Whether only to say where it would belong now, and what the change would cost.
        device: Where the model runs; none: as in the run.
    """
    source = read_source(run, device=device)
    cards, _ = change_cards(source, "update", task=task, entry=entry)
    return _change(ask("update", source, task, out, training, replay, None, is_dry=dry_run), source, cards)


def _change(request: Request, source: Source, cards: tuple[TaskCard, ...]) -> Change:
    """Carry a change out in two parts: where the task goes, and what follows from that."""
    data, seed = source.config.data, source.config.seed
    changed: TaskCard | None = None
    for card in cards:
        if card.task == request.task:  # a faulty file is told of before there is a folder
            changed = load_task(card, data, seed=seed if data.seed is None else data.seed).card
    if not request.is_dry and (known := recall_change(request, source, changed)) is not None:
        return known
    run, names = artifacts.RunFolder.create(request.out), tuple(card.task for card in cards)
    with run.lock():
        begun = identify(request, source) | {"is_forecast": request.is_dry, "rerun_flops": source.rerun_flops}
        artifacts.write_json(run.path / artifacts.CHANGE_FILE, begun)
        paths = write_cards(cards, run.path)
    config = settle_config(source, request.out, paths, names, None)
    tasks, rows, probe = stages.prepare(config)
    ready = _Prepared(paths, tasks, rows, probe, stages.identify_start(config, probe, rows))
    placed, ready = _place(request, source, config, ready)
    if placed.place == NOWHERE or request.is_dry:
        change = _forecast(request, source, config, ready, placed)
        return change if request.is_dry else _leave_nothing(change)
    change = _train(request, source, ready, placed)
    stages.drop_lower_layers(request.out)
    return change


def _place(request: Request, source: Source, config: RunConfig, ready: _Prepared) -> tuple[_Placed, _Prepared]:
    """Take what features are missing, ask the oracle, and choose a place. Leaves features and affinity.

    Returns:
        The place, and the model with what it keeps of its lower layers.
    """
    rows = ready.rows
    rest, home = _list_rest(source, request.task, rows.names)
    with open_workspace(config, until="", start_fingerprint=ready.start) as work:
        stages.describe_run(work, ready.tasks, rows, ready.probe)
        probe = stages.keep_lower_layers(config, work.path, ready.probe, rows)
        ready = replace(ready, probe=probe)
        store = FeatureStore(work.path / artifacts.FEATURES_FOLDER)
        missing = carry_features(source, store, stages.identify_features(work, probe, rows))
        _check_rows(source, request.task, missing)
        store = stages.take_features(work, probe, rows)
        load_oracle, _ = stages.estimate_affinity(work, store, rows, probe)
        if request.action == "drop":
            return _Placed((), None, "It was dropped.", sort_groups(rest)), ready
        own = rows.names.index(request.task)
        longer = lengthen_training(settle_training(config), probe, rows, (own,), rest)
        options, reason = list_options(
            load_oracle(),
            rest,
            own,
            confidence=config.evaluation.confidence,
            allows=_make_limits(config, ready),
            wanted=home if request.action == "update" else request.place,
            n_epochs=longer.num_train_epochs,
        )
    chosen = next(option.place for option in options if option.is_chosen)
    reason = "It stays where it was." if request.action == "update" else reason
    groups = rest if chosen == NOWHERE else place_task(rest, own, chosen)
    return _Placed(options, chosen, reason, sort_groups(groups)), ready


def _train(request: Request, source: Source, ready: _Prepared, placed: _Placed) -> Change:
    """Train what changed, fit the weights, and judge: the stages of a run, with adapters that come from another."""
    rows, probe = ready.rows, ready.probe
    by_name = [[rows.names[i] for i in group] for group in placed.groups]
    config = settle_config(source, request.out, ready.paths, rows.names, by_name)
    with open_workspace(config, until="", start_fingerprint=ready.start) as work:
        store = stages.take_features(work, probe, rows)
        load_oracle, matrix = stages.estimate_affinity(work, store, rows, probe)
        plan = stages.choose_plan(work, load_oracle, matrix, rows, probe)
        carrier = _make_carrier(request, source, work, ready, plan.groups)
        members = stages.train_groups(work, probe, plan, rows, bring=carrier.bring)
        rounds = stages.boost_groups(
            work, probe, plan, members, store, rows, find=lambda stage: carrier.find_rounds(plan, members, stage)
        )
        kept = (source.path, work.path)  # the changed group's boosters were judged by scores that are there already
        ensemble = stages.combine_members(work, probe, plan, members, rounds, rows, earlier=kept)
        shared = judging.train_baselines(work, probe, plan, rows)
        table = judging.evaluate_methods(work, probe, ensemble, shared, plan, rows, earlier=(source.path,))
        reporting.write_report(work)
        costs = compare_costs(_spent(work), _rerun(source, ready, request.task))
        trained = tuple(members[g] for g in carrier.list_trained())
        per_task = table["methods"]["ensemble"]["per_task"]
        accuracy = {name: per_task[name].get("accuracy") for name in rows.names}
        change = replace(
            _describe(request, source, placed, rows.names, trained, costs, accuracy),
            tests=compare_tests(table, source),
            advice=advise(plan),
        )
        write_change(work.path, request, source, change)
    return change


def _forecast(request: Request, source: Source, config: RunConfig, ready: _Prepared, placed: _Placed) -> Change:
    """Say what the change would cost; nothing is trained. Where the task goes nowhere, that is what it has cost."""
    with open_workspace(config, until="", start_fingerprint=ready.start) as work:
        spent, rerun = _spent(work), _rerun(source, ready, request.task)
        trained: tuple[str, ...] = ()
        if placed.place != NOWHERE:
            carrier = _make_carrier(request, source, work, ready, placed.groups)
            trained = tuple(f"group-{g}" for g in carrier.list_trained())
            spent = {"group": rerun.get("group", 0), **forecast_flops(carrier), **spent}
        costs = compare_costs(spent, rerun)
        change = _describe(request, source, placed, ready.rows.names, trained, costs, {}, is_forecast=True)
        write_change(work.path, request, source, change)
    return change


def _leave_nothing(change: Change) -> Change:
    """Take away the folder of a change that did not come about, unless it holds one that did before."""
    if not (change.folder / artifacts.PLAN_FILE).exists():
        shutil.rmtree(change.folder, ignore_errors=True)
    return replace(change, folder=change.source)


def _make_carrier(request: Request, source: Source, work: Workspace, ready: _Prepared, groups: Partition) -> Carrier:
    store = FeatureStore(work.path / artifacts.FEATURES_FOLDER)
    asked = (request.task, request.training, request.replay)
    return Carrier(source, work, ready.probe, groups, ready.rows, store, *asked)


def _list_rest(source: Source, task: str, names: tuple[str, ...]) -> tuple[Partition, str]:
    """The earlier run's groups without a task, in the changed run's indices, and the place it had in them."""
    rest: list[tuple[int, ...]] = []
    home = ALONE
    for group in source.named_groups:
        others = tuple(sorted(names.index(name) for name in group if name != task))
        if others:
            home = f"group-{len(rest)}" if task in group else home
            rest.append(others)
    return tuple(rest), home


def _make_limits(config: RunConfig, ready: _Prepared) -> Callable[[Partition], bool]:
    """What says whether a partition meets the run's constraints and budgets."""
    grouping, n_boosters = config.grouping, config.boosting.n_rounds
    limits = read_constraints(grouping, ready.rows.names)
    budget = Budget(adapter_bytes(ready.probe), n_boosters, grouping.max_memory_bytes, grouping.max_latency_ratio)
    return lambda groups: limits.allows(groups) and not budget.list_faults(len(groups))


def _check_rows(source: Source, task: str, missing: Iterable[tuple[str, str]]) -> None:
    """Refuse to go on from a run whose rows are others by now."""
    changed = sorted({name for name, _ in missing} - {task})
    if changed:
        raise DataError(
            f"{source.path}: has no features of {', '.join(changed)} as they are now: their rows changed since, or the "
            "run was made with another version; give them their rows back, update them one by one, or make a new run"
        )


def _spent(work: Workspace) -> dict[str, int]:
    return {record.stage: record.flops for record in work.ledger.stages}


def _rerun(source: Source, ready: _Prepared, task: str) -> dict[str, int]:
    entries = artifacts.read_json(source.path / artifacts.TASKS_FILE)["tasks"]
    before = {e["card"]["task"]: e["n_examples"]["train"] + e["n_examples"]["validation"] for e in entries}
    return scale_rerun(source.rerun_flops, before, ready.rows.learning, task)


def _describe(
    request: Request,
    source: Source,
    placed: _Placed,
    names: tuple[str, ...],
    trained: tuple[str, ...],
    costs: Costs,
    accuracy: Mapping[str, float | None],
    *,
    is_forecast: bool = False,
) -> Change:
    return Change(
        action=request.action,
        task=request.task,
        folder=request.out,
        source=source.path,
        options=placed.options,
        place=placed.place,
        reason=placed.reason,
        groups=tuple(tuple(names[i] for i in group) for group in placed.groups),
        trained=trained,
        training=request.training,
        costs=costs,
        is_forecast=is_forecast,
        accuracy=accuracy,
        n_changes=source.n_changes + 1,
    )
