"""The stages that learn, from rows to an ensemble: what each reads, what it leaves in the run folder.

A stage takes plain values of the stages before it and returns one. Where its marker in the run folder carries the
fingerprint of its inputs, the value is read back instead of computed. The order is pipeline.py's business; the
stages that judge the outcome are in judging.py. Test rows enter no fingerprint and no computation here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ensemblelora import affinity as affinities
from ensemblelora import artifacts, boosting, planning, training, weighting
from ensemblelora.accounting.formulas import count_oracle_flops, count_regression_flops
from ensemblelora.adapters import AdaptedModel, adapter_bytes, load_adapter, save_adapter
from ensemblelora.boosting import BoostRound, BoostTask
from ensemblelora.config import RunConfig
from ensemblelora.data.encoding import EncodedSplit, encode_split
from ensemblelora.data.task import SPLITS, TaskSet
from ensemblelora.ensemble import Ensemble, Member, group_scores, load_ensemble, save_ensemble
from ensemblelora.errors import ConfigError, DataError
from ensemblelora.estimation import Oracle, TaskFeatures, build_oracle
from ensemblelora.gradients.collect import collect_features, make_projector
from ensemblelora.models import BaseModel, Head
from ensemblelora.planning import Plan
from ensemblelora.prediction import MemberScores, member_nll
from ensemblelora.store import FeatureStore
from ensemblelora.workspace import StageRun, Workspace, describe_environment, fingerprint_split

__all__ = [
    "Rows",
    "boost_groups",
    "check_request",
    "choose_head",
    "choose_plan",
    "combine_members",
    "count_labels",
    "describe_run",
    "encode_tasks",
    "estimate_affinity",
    "load_oracle",
    "take_features",
    "train_adapter",
    "train_groups",
    "training_inputs",
]

_BOOSTING_FILE = "boosting.json"
_HEALTH_FILE = "feature_health.json"
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, eq=False)
class Rows:
    """Every task's encoded splits."""

    train: tuple[EncodedSplit, ...]
    validation: tuple[EncodedSplit, ...]
    test: tuple[EncodedSplit, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Task names, in the order that indices refer to."""
        return tuple(split.task for split in self.train)

    @property
    def learning_fingerprint(self) -> str:
        """Identity of what may be learnt from: train and validation, never test."""
        return artifacts.fingerprint(*(fingerprint_split(split) for split in (*self.train, *self.validation)))


def encode_tasks(tasks: TaskSet, base: BaseModel, *, max_length: int) -> Rows:
    """Turn every split of every task into token ids."""
    encoded = {
        split: tuple(encode_split(task, split, base.tokenizer, max_length=max_length) for task in tasks.tasks)  # type: ignore[arg-type]
        for split in SPLITS
    }
    return Rows(**encoded)


def check_request(config: RunConfig, tasks: TaskSet) -> None:
    """Refuse what can't be carried out, before the model is loaded.

    Raises:
        ConfigError: If more groups are asked for than there are tasks.
        DataError: If tasks with and without a classification head are mixed.
    """
    n_groups = config.grouping.n_groups
    if n_groups != "auto" and not 1 <= n_groups <= len(tasks.tasks):
        raise ConfigError(f"grouping.n_groups {n_groups}: expected 1 to {len(tasks.tasks)}, the number of tasks")
    heads = {task.card.head: task.name for task in tasks.tasks}
    if len(heads) > 1:
        first, second = (f"{name!r} has head: {head}" for head, name in heads.items())
        raise DataError(f"one model has one kind of head, but task {first} and task {second}; give all the same")


def choose_head(tasks: TaskSet) -> Head:
    """The kind of output layer the tasks' cards ask for."""
    return tasks.tasks[0].card.head


def count_labels(tasks: TaskSet) -> int:
    """Width of a classification head that serves every task: the largest number of classes."""
    return max(len(next(iter(task.splits["train"])).choices) for task in tasks.tasks)


def describe_run(work: Workspace, tasks: TaskSet, probe: AdaptedModel) -> None:
    """Write what the run is made of: ``environment.json``, and ``tasks.json`` with every card."""
    base = probe.base
    model = {
        "name": base.name,
        "n_parameters": sum(p.numel() for p in base.model.parameters()) - sum(p.numel() for p in probe.peft.parameters() if p.requires_grad),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "fingerprint": base.fingerprint,
    }
    environment = describe_environment(model, str(base.device))
    artifacts.write_json(work.path / artifacts.ENVIRONMENT_FILE, environment)
    cards = [
        {"card": task.card.model_dump(mode="json"), "n_examples": {split: len(task.splits[split]) for split in SPLITS}}
        for task in tasks.tasks
    ]
    artifacts.write_json(work.path / artifacts.TASKS_FILE, {"tasks": cards, "overlaps": [asdict(o) for o in tasks.overlaps]})
    work.start_fingerprint = artifacts.fingerprint(base.fingerprint, work.config.adapter, work.config.seed)


def take_features(work: Workspace, probe: AdaptedModel, rows: Rows) -> FeatureStore:
    """Projected gradients of every train and validation row. Leaves ``features/`` and its health record."""
    config = work.config
    store = FeatureStore(work.path / artifacts.FEATURES_FOLDER)
    splits = (*rows.train, *rows.validation)
    identities = {
        (s.task, s.split): artifacts.fingerprint(work.start_fingerprint, config.gradients, fingerprint_split(s))
        for s in splits
    }
    with work.stage("features", sorted(identities.values())) as stage:
        if stage.is_needed or not all(store.has(*key, identity) for key, identity in identities.items()):
            health = collect_features(
                probe, splits, store, config.gradients, seed=config.seed, fingerprints=identities, meter=stage.meter
            )
            artifacts.write_json(work.path / _HEALTH_FILE, asdict(health))
    return store


def load_oracle(work: Workspace, store: FeatureStore, names: Sequence[str], subsets: Sequence[tuple[int, ...]]) -> Oracle:
    """Read the features back and choose the ridge; no model is needed."""
    features = TaskFeatures(
        train=tuple(store.read(name, "train") for name in names),
        validation=tuple(store.read(name, "validation") for name in names),
    )
    return build_oracle([features], work.config.estimation, subsets=subsets)


def estimate_affinity(work: Workspace, store: FeatureStore, rows: Rows) -> tuple[Oracle, affinities.Affinity]:
    """Ask the oracle about many subsets and average into the task affinity. Leaves ``affinity.npz``."""
    config = work.config
    design = affinities.sample_subsets(len(rows.names), config.affinity, seed=config.seed)
    oracle = load_oracle(work, store, rows.names, design.subsets)
    path = work.path / artifacts.AFFINITY_FILE
    inputs = (rows.learning_fingerprint, work.start_fingerprint, config.gradients, config.estimation, config.affinity)
    with work.stage("affinity", *inputs) as stage:
        if stage.is_needed:
            scores = oracle.score(design.subsets)
            values = affinities.select_values(scores.nll, scores.accuracy, config.affinity.score)
            matrix = affinities.affinity_from_scores(design, values, row_scale=config.affinity.row_scale)
            artifacts.save_arrays(path, asdict(matrix))
            stage.meter.add_flops(_count_oracle(oracle, len(design.subsets)))
            stage.files.append(path)
    return oracle, affinities.Affinity(**artifacts.load_arrays(path))


def choose_plan(work: Workspace, oracle: Oracle, matrix: affinities.Affinity, rows: Rows, probe: AdaptedModel) -> Plan:
    """Choose the groups, and whether to group at all. Leaves ``plan.json``."""
    config = work.config
    path = work.path / artifacts.PLAN_FILE
    inputs = (artifacts.fingerprint(asdict(matrix)), rows.learning_fingerprint, work.start_fingerprint)
    with work.stage("group", *inputs, config.grouping, config.estimation, config.gradients, config.boosting) as stage:
        if stage.is_needed:
            plan = planning.choose_groups(
                matrix.matrix,
                oracle,
                config.grouping,
                affinity_config=config.affinity,
                n_boosters=config.boosting.n_rounds,
                bytes_per_adapter=adapter_bytes(probe),
                seed=config.seed,
            )
            artifacts.write_json(path, asdict(plan))
            stage.meter.add_flops(_count_oracle(oracle, oracle.n_fits))
            stage.files.append(path)
    return planning.read_plan(artifacts.read_json(path))


def train_groups(work: Workspace, probe: AdaptedModel, plan: Plan, rows: Rows) -> tuple[str, ...]:
    """Fine-tune one adapter per group. Leaves ``adapters/group-G/`` and ``training.json``; returns their names."""
    names = tuple(f"group-{g}" for g in range(len(plan.groups)))
    with work.stage("train", training_inputs(work, rows), plan.groups) as stage:
        if stage.is_needed:
            for name, group in zip(names, plan.groups, strict=True):
                train_adapter(work, probe, name, group, rows, stage)
    for name in names:
        load_adapter(probe, name, work.folder.adapter(name))
    return names


def training_inputs(work: Workspace, rows: Rows) -> str:
    return artifacts.fingerprint(rows.learning_fingerprint, work.start_fingerprint, work.config.training)


def train_adapter(
    work: Workspace, probe: AdaptedModel, name: str, group: Sequence[int], rows: Rows, stage: StageRun
) -> None:
    """Train one adapter, or keep it where it is already there and intact (a killed run's finished part)."""
    config, folder = work.config, work.folder.adapter(name)
    identity = artifacts.fingerprint(training_inputs(work, rows), [rows.names[task] for task in group])
    if not work.folder.is_done(name, identity):
        work.folder.forget(name)
        trained = training.fine_tune(
            probe,
            name,
            [rows.train[task] for task in group],
            [rows.validation[task] for task in group],
            config.training,
            seed=config.seed,
            checkpoints=work.path / _CHECKPOINTS / f"{name}-{identity[:12]}",
            meter=stage.meter,
        )
        with artifacts.atomic_folder(folder) as scratch:
            save_adapter(probe, name, scratch)
            artifacts.write_json(scratch / "training.json", asdict(trained))
        work.folder.mark_done(name, identity, files=[folder])
    stage.files.append(folder)


def boost_groups(
    work: Workspace, probe: AdaptedModel, plan: Plan, members: Sequence[str], store: FeatureStore, rows: Rows
) -> tuple[BoostRound, ...]:
    """Add adapters where a group still errs. Leaves them under ``adapters/`` and the rounds in ``boosting.json``."""
    config, path = work.config, work.path / _BOOSTING_FILE
    with work.stage("boost", training_inputs(work, rows), plan.groups, config.boosting, config.gradients) as stage:
        if stage.is_needed:
            groups = [
                [BoostTask(rows.train[i], rows.validation[i], store.read(rows.names[i], "train")) for i in group]
                for group in plan.groups
            ]
            rounds = boosting.boost(
                probe,
                members,
                groups,
                config.boosting,
                projector=make_projector(config.gradients, seed=config.seed),
                max_tokens=config.gradients.max_tokens_per_batch,
                seed=config.seed,
                meter=stage.meter,
            )
            for entry in rounds:
                if entry.accepted:
                    with artifacts.atomic_folder(work.folder.adapter(entry.name)) as scratch:
                        save_adapter(probe, entry.name, scratch)
                    stage.files.append(work.folder.adapter(entry.name))
            artifacts.write_json(path, [asdict(entry) for entry in rounds])
            stage.files.append(path)
    rounds = tuple(BoostRound(**entry) for entry in artifacts.read_json(path))
    for entry in rounds:
        if entry.accepted:
            load_adapter(probe, entry.name, work.folder.adapter(entry.name))
    return rounds


def combine_members(
    work: Workspace,
    probe: AdaptedModel,
    plan: Plan,
    members: Sequence[str],
    rounds: Sequence[BoostRound],
    rows: Rows,
) -> Ensemble:
    """Fit every task's weights over the groups, on validation rows. Leaves ``ensemble.json``."""
    config, path = work.config, work.path / artifacts.ENSEMBLE_FILE
    every = (
        *(Member(name, g, "group", 1.0) for g, name in enumerate(members)),
        *(Member(entry.name, entry.group, "booster", entry.rate) for entry in rounds if entry.accepted),
    )
    inputs = (training_inputs(work, rows), plan.groups, [asdict(entry) for entry in rounds])
    with work.stage("combine", *inputs, config.ensemble) as stage:
        if stage.is_needed:
            groups = range(len(plan.groups))
            tokens = config.evaluation.max_tokens_per_batch
            scores = [
                group_scores(probe, split, every, groups, max_tokens=tokens, meter=stage.meter)
                for split in rows.validation
            ]
            owners = {task: g for g, group in enumerate(plan.groups) for task in group}
            own = [owners[task] for task in range(len(rows.names))]
            fitted = _fit_weights(scores, rows.validation, own, config)
            model = Ensemble(
                task_names=rows.names,
                groups=plan.groups,
                members=every,
                weights=tuple(tuple(float(w) for w in row) for row in fitted.weights),
                routed=tuple(bool(r) for r in fitted.routed),
                combine=config.ensemble.combine,
            )
            measured = [_own_validation_nll(s, split, g) for s, split, g in zip(scores, rows.validation, own, strict=True)]
            save_ensemble(model, path, boosting=[_describe_round(i, r) for i, r in enumerate(rounds)], own_validation_nll=measured)
            stage.files.append(path)
    return load_ensemble(path)


def _fit_weights(
    scores: Sequence[MemberScores], splits: Sequence[EncodedSplit], groups: Sequence[int], config: RunConfig
) -> weighting.EnsembleWeights:
    logits = [
        weighting.MemberLogits(
            values=found.values,
            labels=split.labels,
            groups=split.groups,
            row_example=found.row_example if split.kind == "sequence" else None,
        )
        for found, split in zip(scores, splits, strict=True)
    ]
    return weighting.fit_weights(logits, groups, config.ensemble, seed=config.seed)


def _own_validation_nll(scores: MemberScores, split: EncodedSplit, group: int) -> float:
    return float(member_nll(scores, split.labels)[group].mean())


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


def _count_oracle(oracle: Oracle, n_subsets: int) -> int:
    """FLOPs of the fits solved so far, and of predicting validation rows under ``n_subsets`` of them."""
    first = oracle.replicates[0]
    held = sum(block.outputs.size for block in first.validation)
    dim = first.train[0].proj_dim
    return count_regression_flops(oracle.row_iterations, 1, dim) + count_oracle_flops(n_subsets, held, dim)
