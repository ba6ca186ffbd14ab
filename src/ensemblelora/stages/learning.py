"""The stages that train: one adapter a group, boosters, and the weights that combine them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora import artifacts, boosting, progress, training, weighting
from ensemblelora.adapters import THETA0, AdaptedModel, load_adapter, save_adapter
from ensemblelora.boosting import BoostRound, BoostTask
from ensemblelora.config import BoostingConfig, EnsembleConfig, RunConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.subset import list_rows, take_examples
from ensemblelora.ensemble import Ensemble, Member, load_ensemble, needed_adapters, save_ensemble, sum_groups
from ensemblelora.errors import StoreError
from ensemblelora.files import is_temporary
from ensemblelora.fusion import can_mix
from ensemblelora.gradients.collect import make_projector
from ensemblelora.planning import Plan
from ensemblelora.prediction import MemberScores, member_nll
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
from ensemblelora.stages.kept import score_members
from ensemblelora.stages.rows import Rows
from ensemblelora.startpoint import WARMUP, settle_training
from ensemblelora.store import FeatureStore
from ensemblelora.workspace import StageRun, Workspace

__all__ = [
    "BOOSTING_FILE",
    "boost_groups",
    "combine_members",
    "find_boosters",
    "keep_adapter",
    "list_boost_tasks",
    "settle_boosting",
    "settle_weights",
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
        list_boost_tasks(groups, rows, store, probe),
        settle_boosting(config),
        projector=make_projector(config.gradients, seed=config.seed),
        max_tokens=config.gradients.max_tokens_per_batch,  # its backward pass keeps activations
        seed=config.seed,
        meter=stage.meter,
    )


def combine_members(
    work: Workspace,
    probe: AdaptedModel,
    plan: Plan,
    members: Sequence[str],
    rounds: Sequence[BoostRound],
    rows: Rows,
    *,
    earlier: Sequence[Path] = (),
) -> Ensemble:
    """Fit every task's weights over the groups, on validation rows. Leaves ``ensemble.json``.

    Beside the weights stands each task's loss by its own group's adapter alone, as the plan predicted it.
    Scores of the same adapters and rows are taken over from the run folders ``earlier``.
    """
    config, path = work.config, work.path / artifacts.ENSEMBLE_FILE
    every = (
        *(Member(name, g, "group", 1.0) for g, name in enumerate(members)),
        *(Member(entry.name, entry.group, "booster", entry.rate) for entry in rounds if entry.accepted),
    )
    digests = {member.name: work.adapter_digest(member.name) for member in every}
    described = [_describe_round(index, entry) for index, entry in enumerate(rounds)]
    inputs = (rows.learning_fingerprint(), work.start_fingerprint, plan.groups, digests, described, config.ensemble)
    with work.stage("combine", *inputs) as stage:
        if stage.is_needed:
            groups, known = range(len(plan.groups)), {**digests, THETA0: work.start_fingerprint}
            scores, alone = [], []
            for split in rows.validation:
                names = needed_adapters(every, groups, split.kind)
                found = score_members(
                    work.path,
                    probe,
                    split,
                    names,
                    known,
                    earlier=earlier,
                    max_tokens=config.evaluation.max_tokens_per_batch,
                    meter=stage.meter,
                )
                scores.append(sum_groups(found, names, every, groups))
                own_scores = sum_groups(found, names, every[: len(members)], groups)
                alone.append(member_nll(own_scores, split.labels).mean(axis=1))
            model = _fit_ensemble(scores, plan, every, rows, config)
            own_nll = [float(losses[g]) for losses, g in zip(alone, model.group_of, strict=True)]
            extra = {"boosting": described, "own_validation_nll": own_nll, "adapter_sha256": digests}
            save_ensemble(model, path, **extra)
            stage.files.append(path)
    return load_ensemble(path)


def list_boost_tasks(
    groups: Sequence[Sequence[int]], rows: Rows, store: FeatureStore, probe: AdaptedModel
) -> list[list[BoostTask]]:
    """What boosting reads of every group's tasks: of training rows, those that have features.

    Raises:
        StoreError: If the features are of other rows.
    """

    def make(task: int) -> BoostTask:
        features = store.read(rows.names[task], "train")
        return BoostTask(_find_rows(rows.train[task], features.ids, probe), rows.validation[task], features)

    return [[make(task) for task in group] for group in groups]


def settle_boosting(config: RunConfig) -> BoostingConfig:
    """A step is fitted to all projections together; the ridge stays what it is beside one of them."""
    penalty = config.boosting.l2_penalty * config.gradients.n_projections
    return config.boosting.model_copy(update={"l2_penalty": penalty})


def settle_weights(
    scores: Sequence[MemberScores],
    splits: Sequence[EncodedSplit],
    own_groups: Sequence[int],
    config: EnsembleConfig,
    *,
    seed: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Every task's weights over m groups, as they are served: fitted, routed where asked for, without small ones.

    Args:
        scores: What the groups say about every task's validation rows, ``(m, n_rows, K)``.
        splits: These rows.
        own_groups: The group each task was trained in.
        config: How they are fitted, and what of it is served.
        seed: The run's root seed.

    Returns:
        Weights ``(n_tasks, m)``, and which tasks could be routed ``(n_tasks,)``.
    """
    logits = [
        weighting.MemberLogits(
            values=found.values,
            labels=split.labels,
            groups=split.groups,
            row_example=found.row_example if split.kind == "sequence" else None,
        )
        for found, split in zip(scores, splits, strict=True)
    ]
    fitted = weighting.fit_weights(logits, own_groups, config, seed=seed)
    weights = fitted.serving_weights if config.route else fitted.weights
    if config.weights in ("task", "global"):
        weights = weighting.drop_negligible(weights, config.min_weight)
    return weights, fitted.routed


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


def _fit_ensemble(
    scores: Sequence[MemberScores], plan: Plan, members: tuple[Member, ...], rows: Rows, config: RunConfig
) -> Ensemble:
    owners = {task: g for g, group in enumerate(plan.groups) for task in group}
    own = [owners[task] for task in range(len(rows.names))]
    weights, routed = settle_weights(scores, rows.validation, own, config.ensemble, seed=config.seed)
    return Ensemble(
        task_names=rows.names,
        groups=plan.groups,
        members=members,
        weights=tuple(tuple(float(weight) for weight in row) for row in weights),
        routed=tuple(bool(is_routed) for is_routed in routed),
        combine=config.ensemble.combine,
    )


def _describe_round(index: int, entry: BoostRound) -> dict[str, Any]:
    return {
        "round": index + 1,
        "group": entry.group,
        "train_loss_before": entry.train_nll_before,
        "train_loss_after": entry.train_nll_after,
        "heldout_before": entry.heldout_nll_before,
        "heldout_after": entry.heldout_nll_after,
        "rate": entry.rate * entry.step_length,
        "accepted": entry.accepted,
        "reason": entry.reason,
    }
