"""The stages that train: one adapter a group, boosters, and the weights that combine them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from ensemblelora import artifacts, boosting, progress, training
from ensemblelora.adapters import AdaptedModel, is_at_start, load_adapter, save_adapter
from ensemblelora.boosting import BoostRound, BoostTask
from ensemblelora.config import BoostingConfig, RunConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.subset import list_rows, take_examples
from ensemblelora.errors import StoreError
from ensemblelora.files import is_temporary
from ensemblelora.fusion import can_mix
from ensemblelora.gradients.collect import make_projector
from ensemblelora.planning import Plan
from ensemblelora.stages.bench import Bench
from ensemblelora.stages.fine_tuning import (
    CHECKPOINTS,
    SHARED,
    drop_checkpoints,
    identify_adapter,
    train_elsewhere,
    train_one,
    write_adapter,
)
from ensemblelora.stages.rows import Rows
from ensemblelora.startpoint import WARMUP, settle_training
from ensemblelora.store import FeatureStore
from ensemblelora.workspace import StageRun, Workspace

__all__ = [
    "BOOSTING_FILE",
    "boost_groups",
    "find_boosters",
    "keep_adapter",
    "list_boost_tasks",
    "settle_boosting",
    "train_adapter",
    "train_groups",
]

BOOSTING_FILE = "boosting.json"
"""every round, kept or not"""


def train_groups(
    work: Workspace,
    probe: AdaptedModel,
    plan: Plan,
    rows: Rows,
    *,
    bring: Callable[[StageRun, Mapping[str, str]], None] | None = None,
) -> tuple[str, ...]:
    """Fine-tune one adapter per group. Leaves ``adapters/group-G/`` with ``training.json``; returns their names.

    An adapter depends on its own group's rows alone, so a change in another group leaves it as it is.
    With ``training.together`` those that are still to train share their passes through the base; on a cluster each is
    a job, and so is the baseline of all tasks, which begins with them.

    Args:
        work: Keeps them.
        probe: The model.
        plan: The groups.
        rows: Of all tasks.
        bring: Puts adapters in place that come from elsewhere, and marks them done; told every adapter's identity.
    """
    groups, settings = {f"group-{g}": group for g, group in enumerate(plan.groups)}, settle_training(work.config)
    identities = {name: identify_adapter(work, name, group, rows, settings) for name, group in groups.items()}
    with work.stage("train", identities, parts=identities.values()) as stage:
        if stage.is_needed:
            if bring is not None:
                bring(stage, identities)
            if work.is_spread:
                train_elsewhere(work, probe, groups, identities, rows, settings, stage.meter)
            elif _shares_passes(work, probe, groups):
                _train_together(work, probe, groups, rows, stage)
            for name, group in groups.items():
                train_adapter(work, probe, name, group, rows, stage)
            _drop_adapters(work, keep=list(groups), keep_boosters_of=list(groups))
    for name in groups:
        load_adapter(probe, name, work.folder.adapter(name))
    return tuple(groups)


def train_adapter(
    work: Workspace,
    probe: AdaptedModel,
    name: str,
    group: Sequence[int],
    rows: Rows,
    stage: StageRun,
    *,
    is_whole: bool = False,
) -> None:
    """Train one adapter, or keep it where it is already there and intact (a killed run's finished part).

    Args:
        work: Keeps it.
        probe: The model.
        name: The adapter's.
        group: Its tasks.
        rows: Of all tasks.
        stage: Takes up files and cost.
        is_whole: From the base model for all epochs, whether or not groups go on from a warm-up.
    """
    settings = work.config.training if is_whole else settle_training(work.config)
    identity = identify_adapter(work, name, group, rows, settings)
    if not work.folder.is_done(name, identity):
        bench = Bench(work.config, work.folder, rows, probe)
        train_one(bench, name, group, settings, identity, stage.meter, is_whole=is_whole)
        drop_checkpoints(work.path)
    stage.files.append(work.folder.adapter(name))


def boost_groups(
    work: Workspace,
    probe: AdaptedModel,
    plan: Plan,
    members: Sequence[str],
    store: FeatureStore,
    rows: Rows,
    *,
    find: Callable[[StageRun], Sequence[BoostRound]] | None = None,
) -> tuple[BoostRound, ...]:
    """Add adapters where a group still errs. Leaves them under ``adapters/`` and the rounds in ``boosting.json``.

    Args:
        work: Keeps them.
        probe: The model with the groups' adapters.
        plan: The groups.
        members: Names of the groups' adapters.
        store: Gradients of training rows.
        rows: Of all tasks.
        find: Gives the rounds instead of boosting all groups; the adapters of accepted ones are in the model then.
    """
    config, path = work.config, work.path / BOOSTING_FILE
    digests = [work.adapter_digest(name) for name in members]
    inputs = (rows.learning_fingerprint(), work.start_fingerprint, plan.groups, digests)
    with work.stage("boost", *inputs, config.boosting, config.gradients) as stage:
        if stage.is_needed:
            _drop_adapters(work, keep=members)
            found = find(stage) if find is not None else find_boosters(work, probe, plan, members, store, rows, stage)
            for name in [entry.name for entry in found if entry.accepted]:
                with artifacts.atomic_folder(work.folder.adapter(name)) as scratch:
                    save_adapter(probe, name, scratch)
                stage.files.append(work.folder.adapter(name))
            artifacts.write_json(path, [asdict(entry) for entry in found])
            stage.files.append(path)
    rounds = tuple(BoostRound(**entry) for entry in artifacts.read_json(path))
    for entry in rounds:
        if entry.accepted:
            load_adapter(probe, entry.name, work.folder.adapter(entry.name))
    return rounds


def find_boosters(
    work: Workspace,
    probe: AdaptedModel,
    plan: Plan,
    members: Sequence[str],
    store: FeatureStore,
    rows: Rows,
    stage: StageRun,
    *,
    only: Sequence[int] | None = None,
) -> tuple[BoostRound, ...]:
    """Boost the groups, or some of them; accepted adapters are in the model then. As :func:`boost_groups`."""
    config = work.config
    groups = [group if only is None or g in only else () for g, group in enumerate(plan.groups)]
    return boosting.boost(
        probe,
        members,
        list_boost_tasks(groups, members, rows, store, probe),
        settle_boosting(config),
        projector=make_projector(config.gradients, seed=config.seed),
        max_tokens=config.gradients.max_tokens_per_batch,  # its backward pass keeps activations
        seed=config.seed,
        meter=stage.meter,
    )


def list_boost_tasks(
    groups: Sequence[Sequence[int]], members: Sequence[str], rows: Rows, store: FeatureStore, probe: AdaptedModel
) -> list[list[BoostTask]]:
    """What boosting reads of every group's tasks: of training rows, those that have features.

    Nothing of a group whose adapter stayed where it began: its training loss is the largest because no step helped
    held-out rows, and a booster is one more step.

    Raises:
        StoreError: If the features are of other rows.
    """

    def make(task: int) -> BoostTask:
        features = store.read(rows.names[task], "train")
        return BoostTask(_find_rows(rows.train[task], features.ids, probe), rows.validation[task], features)

    return [
        [] if is_at_start(probe, member) else [make(task) for task in group]
        for member, group in zip(members, groups, strict=True)
    ]


def settle_boosting(config: RunConfig) -> BoostingConfig:
    """A step is fitted to all projections together; the ridge stays what it is beside one of them."""
    penalty = config.boosting.l2_penalty * config.gradients.n_projections
    return config.boosting.model_copy(update={"l2_penalty": penalty})


def _find_rows(split: EncodedSplit, ids: Sequence[str], probe: AdaptedModel) -> EncodedSplit:
    """Take the named examples of a split; what is kept of their lower layers is found again."""
    if tuple(ids) == split.ids:
        return split
    places = {name: e for e, name in enumerate(split.ids)}
    if not places.keys() >= set(ids):
        raise StoreError(f"features of task {split.task!r} are of rows that it does not have; take the features again")
    examples = [places[name] for name in ids]
    part = take_examples(split, examples)
    if probe.prefix is not None and probe.prefix.cache is not None:
        probe.prefix.cache.enlist_part(part, split, list_rows(split, examples))
    return part


def _shares_passes(work: Workspace, probe: AdaptedModel, groups: Mapping[str, Sequence[int]]) -> bool:
    """Whether several adapters train in one pass: asked for, and possible for this model."""
    if not work.config.training.together or len(groups) == 1:
        return False
    if can_mix(probe):
        return True
    progress.note("training.together: these adapters can't share a pass (by their kind or output layer); one by one")
    return False


def _train_together(
    work: Workspace, probe: AdaptedModel, groups: Mapping[str, Sequence[int]], rows: Rows, stage: StageRun
) -> None:
    """Train the adapters that are not there yet in lock step."""
    settings = settle_training(work.config)
    identities = {name: identify_adapter(work, name, group, rows, settings) for name, group in groups.items()}
    jobs, shares = [], {}
    for name in [name for name, identity in identities.items() if not work.folder.is_done(name, identity)]:
        work.folder.forget(name)
        train, validation = ([part[task] for task in groups[name]] for part in (rows.train, rows.validation))
        jobs.append(training.TrainingJob(name, train, validation))
        shares[identities[name]] = sum(split.tokens.size for split in train)
    if not jobs:
        return
    with stage.meter.part(shares):
        found = training.fine_tune_together(
            probe,
            jobs,
            settings,
            seed=work.config.seed,
            checkpoints=work.path / CHECKPOINTS / artifacts.fingerprint([*shares])[:12],
            meter=stage.meter,
            keeps_last=True,
        )
    for trained in found:
        write_adapter(work.folder, probe, trained, identities[trained.name])
    drop_checkpoints(work.path)


def keep_adapter(work: Workspace, probe: AdaptedModel, trained: training.TrainedAdapter, identity: str) -> None:
    """Write an adapter's folder, and the marker that says it is whole."""
    write_adapter(work.folder, probe, trained, identity)
    drop_checkpoints(work.path)


def _drop_adapters(work: Workspace, *, keep: Sequence[str], keep_boosters_of: Sequence[str] = ()) -> None:
    """Remove the adapters of an earlier plan, so that ``adapters/`` holds what the run uses and no more."""
    kept = {SHARED, WARMUP, *keep}
    for folder in (work.path / artifacts.ADAPTERS_FOLDER).glob("*"):
        is_finished = not is_temporary(folder)  # a worker may be writing another one
        if is_finished and folder.name not in kept and folder.name.partition("-boost-")[0] not in keep_boosters_of:
            work.folder.forget(folder.name)
            shutil.rmtree(folder)
