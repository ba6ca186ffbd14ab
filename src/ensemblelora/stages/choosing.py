"""The stages up to the plan: features, affinity, groups. Nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora import __version__, artifacts, planning
from ensemblelora import affinity as affinities
from ensemblelora.accounting.formulas import count_oracle_flops, count_regression_flops
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel, adapter_bytes, count_trained
from ensemblelora.config import EstimationConfig, GradientsConfig, RunConfig
from ensemblelora.data.batching import schedule_training
from ensemblelora.data.truncation import describe_cuts
from ensemblelora.errors import StoreError
from ensemblelora.estimation import Oracle, PenaltyTrial, TrainingBudget, build_oracle, read_features
from ensemblelora.gradients.collect import (
    FeaturePiece,
    collect_features,
    collect_piece,
    find_active_layers,
    plan_features,
)
from ensemblelora.gradients.exact import join_fingerprints
from ensemblelora.gradients.output import choose_modes
from ensemblelora.gradients.plan import choose_examples
from ensemblelora.planning import Plan
from ensemblelora.scheduling import Equipment, Job
from ensemblelora.seeding import seed_for
from ensemblelora.stages.bench import Bench, equip, run_measured
from ensemblelora.stages.rows import Rows
from ensemblelora.startpoint import settle_training
from ensemblelora.store import FeatureStore
from ensemblelora.training.steps import choose_layout
from ensemblelora.workspace import ORACLE_FILE, Workspace

__all__ = [
    "choose_plan",
    "estimate_affinity",
    "identify_features",
    "plan_budget",
    "read_oracle",
    "take_features",
]

_BLOCK = 16  # subsets of a job; the same for any number of workers, since fits in other company differ in last bits
_MAX_NAMED_PAIRS = 6
_MOST_DISTORTION = 3  # over sqrt(d); a projection's median is 0.67, and 0.95 for parallel gradients


def take_features(
    work: Workspace, probe: AdaptedModel, rows: Rows, *, judges: Collection[str] | None = None
) -> FeatureStore:
    """Projected gradients of train and validation rows, or of a share. Leaves ``features/`` and its health record.

    Args:
        work: The open run folder.
        probe: The model with its start adapter.
        rows: Of all tasks.
        judges: Tasks whose validation rows are wanted, where others' tell nothing; none: of all.
    """
    config = work.config
    store = FeatureStore(work.path / artifacts.FEATURES_FOLDER)
    wanted = identify_features(work, probe, rows)
    if judges is not None and config.gradients.proj_type != "none":  # exact inner products are of all rows, or none
        wanted = {key: value for key, value in wanted.items() if key[1] == "train" or key[0] in judges}
    is_complete = all(store.has(*key, identity) for key, identity in wanted.items())
    identities = sorted(wanted.values())
    with work.stage("features", identities, is_complete=is_complete, parts=identities) as stage:
        if stage.is_needed:
            elsewhere = partial(_collect_elsewhere, work, probe, rows, wanted, stage.meter)
            health = collect_features(
                probe,
                rows.learning,
                store,
                config.gradients,
                seed=config.seed,
                fingerprints=wanted,
                meter=stage.meter,
                hand_out=elsewhere if work.is_spread else None,
            )
            record = asdict(health) | _count_rows(config, rows, wanted)
            artifacts.write_json(work.path / artifacts.FEATURE_HEALTH_FILE, record)
            stage.files.append(work.path / artifacts.FEATURE_HEALTH_FILE)
    return store


def _collect_elsewhere(
    work: Workspace,
    probe: AdaptedModel,
    rows: Rows,
    wanted: Mapping[tuple[str, str], str],
    meter: Meter,
    pieces: Sequence[FeaturePiece],
) -> None:
    """Have a cluster compute pieces, the longest first."""
    equipment = equip(work.config, work.path, rows, probe, work.start_fingerprint)
    jobs = [
        Job(f"features {piece.task} ({piece.split})", (piece, wanted[piece.task, piece.split]))
        for piece in sorted(pieces, key=lambda piece: -piece.n_tokens)
    ]
    for _ in run_measured(work.scheduler, _collect_one, jobs, equipment, meter, what="features"):
        pass


def _collect_one(bench: Bench, piece: FeaturePiece, fingerprint: str, meter: Meter) -> None:
    config, store = bench.config, FeatureStore(bench.folder.path / artifacts.FEATURES_FOLDER)
    collect_piece(
        bench.probe,
        bench.rows.learning,
        store,
        config.gradients,
        seed=config.seed,
        piece=piece,
        fingerprint=fingerprint,
        meter=meter,
    )


def _count_rows(config: RunConfig, rows: Rows, wanted: Collection[tuple[str, str]]) -> dict[str, int]:
    """How many rows there are to learn from, and of how many of them features are taken."""
    splits = [split for split in rows.learning if (split.task, split.split) in wanted]
    taken = [len(choose_examples(split, config.gradients, seed=config.seed)) for split in splits]
    return {"n_rows": sum(split.n_examples for split in splits), "n_rows_taken": sum(taken)}


def identify_features(work: Workspace, probe: AdaptedModel, rows: Rows) -> dict[tuple[str, str], str]:
    """Everything that each block of features depends on, by task and split."""
    config, seed = work.config.gradients, work.config.seed
    modes = choose_modes(rows.learning, config.output)  # another split's rows may change them
    shared = (__version__, work.start_fingerprint, _identify_projection(config))
    wanted = {}
    for split in rows.learning:
        key, examples = (split.task, split.split), choose_examples(split, config, seed=seed)
        share = () if len(examples) == split.n_examples else (examples,)
        wanted[key] = artifacts.fingerprint(*shared, modes[split.task], rows.identities[key], *share)
    if config.proj_type == "none":
        plan = plan_features(find_active_layers(probe, rows.learning), rows.learning, config, seed=seed)
        wanted = join_fingerprints(wanted) if plan.form == "gram" else wanted
    return wanted


def estimate_affinity(
    work: Workspace, store: FeatureStore, rows: Rows, probe: AdaptedModel
) -> tuple[Callable[[], Oracle], affinities.Affinity]:
    """Ask the oracle about many subsets and average into the task affinity. Leaves ``affinity.npz``, ``oracle.json``.

    Returns:
        What gives the oracle, read back only where a later stage needs it, and the affinity.
    """
    config, path = work.config, work.path / artifacts.AFFINITY_FILE
    load = partial(read_oracle, work.path, rows.names, config.estimation)
    with work.stage("affinity", *_identify_oracle(work, rows)) as stage:
        if stage.is_needed:
            design = affinities.sample_subsets(len(rows.names), config.affinity, seed=config.seed)
            oracle = _make_oracle(work, store, rows, probe, design)
            _solve(work, oracle, design.subsets)
            scores = oracle.score(design.subsets)
            values = affinities.select_values(scores.nll, scores.accuracy, config.affinity.score)
            kind, scale = config.affinity.surrogate, config.affinity.row_scale
            weights = tuple(affinities.weigh_scores(design, values, surrogate=kind))
            matrix = affinities.affinity_from_scores(design, values, row_scale=scale, surrogate=kind, weights=weights)
            chosen = {"l2_penalty": oracle.l2_penalty, "penalty_table": [asdict(t) for t in oracle.penalty_table]}
            chosen["budget"] = None if oracle.budget is None else asdict(oracle.budget)
            chosen["n_projections"], chosen["n_train"] = len(oracle.replicates), oracle.replicates[0].n_train
            chosen["surrogate"] = _describe_surrogate(design, values, matrix, kind)
            artifacts.write_json(work.path / ORACLE_FILE, chosen)
            errors = planning.estimate_affinity_errors(oracle, design, values, config.affinity, weights)
            artifacts.save_arrays(path, asdict(matrix) | {"matrix_se": errors})
            stage.meter.add_flops(_count_trials(oracle) + _count_work(oracle, _count_asked(oracle, design)))
            stage.files += [path, work.path / ORACLE_FILE]
            load = partial(_same, oracle)
    arrays = artifacts.load_arrays(path)
    return load, affinities.Affinity(**{field.name: arrays[field.name] for field in fields(affinities.Affinity)})


def _make_oracle(
    work: Workspace, store: FeatureStore, rows: Rows, probe: AdaptedModel, design: affinities.SubsetDesign
) -> Oracle:
    """The oracle that a run's config asks for, from its features."""
    config, n_train, budget = work.config, None, None
    if config.gradients.train_fraction < 1:
        n_train = tuple(split.n_examples for split in rows.train)
    features = read_features(store, rows.names, config.gradients.n_projections, n_train)
    if config.estimation.method == "steps":
        health = artifacts.read_json(work.path / artifacts.FEATURE_HEALTH_FILE)
        budget = plan_budget(config, rows, probe, n_coordinates=int(health["n_coordinates"]))
    return build_oracle(features, config.estimation, subsets=design.subsets, budget=budget)


def _solve(work: Workspace, oracle: Oracle, subsets: Sequence[tuple[int, ...]]) -> None:
    """Have a cluster fit subsets block by block; what it did not, the oracle fits when it is asked."""
    missing = oracle.list_unsolved(subsets) if work.is_spread else []
    if missing:
        first, known = oracle.replicates[0], (len(oracle.replicates), oracle.l2_penalty, oracle.budget)
        given = (work.path.resolve(), oracle.task_names, work.config.estimation, *known, first.n_train)
        identity = artifacts.fingerprint("oracle", work.config, str(given[0]), *known[1:])
        blocks = [missing[s : s + _BLOCK] for s in range(0, len(missing), _BLOCK)]
        jobs = [Job(f"subsets {s * _BLOCK} and on", (block,)) for s, block in enumerate(blocks)]
        equipment = Equipment(oracle, identity, _open_oracle, given)
        for _, handed in work.scheduler.run(Oracle.hand_over, jobs, equipment, what="subsets", on_gpu=False):
            oracle.take_over(handed)
    oracle.solve(subsets)


def _open_oracle(
    folder: Path,
    names: Sequence[str],
    config: EstimationConfig,
    n_projections: int,
    penalty: float,
    budget: TrainingBudget | None,
    n_train: tuple[int, ...] | None,
) -> Oracle:
    """Make a run's oracle in another process, from the features that lie in the run folder."""
    store = FeatureStore(folder / artifacts.FEATURES_FOLDER)
    return Oracle(tuple(read_features(store, names, n_projections, n_train)), penalty, config, budget=budget)


def choose_plan(
    work: Workspace, load_oracle: Callable[[], Oracle], matrix: affinities.Affinity, rows: Rows, probe: AdaptedModel
) -> Plan:
    """Choose the groups, and whether to group at all. Leaves ``plan.json``."""
    config, path = work.config, work.path / artifacts.PLAN_FILE
    n_boosters, one = config.boosting.n_rounds, adapter_bytes(probe)
    inputs = _identify_oracle(work, rows)
    with work.stage("group", asdict(matrix), *inputs, config.grouping, n_boosters, one) as stage:
        if stage.is_needed:
            oracle = load_oracle()
            known = _count_work(oracle, oracle.n_fits)
            # All at once, as the affinity stage did: fits solved in other company differ in their last bits.
            _solve(work, oracle, affinities.sample_subsets(len(rows.names), config.affinity, seed=config.seed).subsets)
            plan = planning.choose_groups(
                matrix.matrix,
                oracle,
                config.grouping,
                affinity_config=config.affinity,
                n_boosters=n_boosters,
                bytes_per_adapter=one,
                seed=config.seed,
            )
            filled = artifacts.read_json(work.path / ORACLE_FILE)["surrogate"]
            health = artifacts.read_json(work.path / artifacts.FEATURE_HEALTH_FILE)
            warnings = (*_list_distortion(health), *_list_filled(matrix, rows.names, filled))
            cuts = describe_cuts(list(zip(rows.train, rows.validation, strict=True)), config.data.max_length)
            plan = replace(plan, warnings=(*warnings, *([cuts] if cuts else []), *plan.warnings))
            artifacts.write_json(path, asdict(plan))
            stage.meter.add_flops(_count_work(oracle, oracle.n_fits) - known)
            stage.files.append(path)
    return planning.read_plan(artifacts.read_json(path))


def read_oracle(folder: Path, names: Sequence[str], config: EstimationConfig) -> Oracle:
    """Read back the oracle that a run's affinity stage asked; no model is needed.

    Args:
        folder: The run folder.
        names: Its tasks, in their order.
        config: Settings of the fits.

    Raises:
        StoreError: If its features or its record are missing or damaged.
    """
    record = artifacts.read_json(folder / ORACLE_FILE)
    try:
        penalty, table = float(record["l2_penalty"]), tuple(PenaltyTrial(**trial) for trial in record["penalty_table"])
        budget = record["budget"] and TrainingBudget(**record["budget"])
        n_projections, counts = int(record["n_projections"]), record.get("n_train")
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{folder / ORACLE_FILE}: no record of an oracle ({error!r}); delete it and run again"
        ) from None
    store = FeatureStore(folder / artifacts.FEATURES_FOLDER)
    features = read_features(store, names, n_projections, counts and tuple(counts))
    return Oracle(tuple(features), penalty, config, table, budget)


def plan_budget(config: RunConfig, rows: Rows, probe: AdaptedModel, *, n_coordinates: int) -> TrainingBudget:
    """Say what a group's fine-tuning will do; the rows' lengths tell how many optimiser steps a task takes.

    Args:
        config: The run's.
        rows: Of all tasks.
        probe: The model, for how rows are laid out in it.
        n_coordinates: p' of the features.
    """
    training, seed = settle_training(config), seed_for(config.seed, "simulated training")
    epoch, layout = training.model_copy(update={"num_train_epochs": 1}), choose_layout(probe, training)
    return TrainingBudget(
        learning_rate=training.learning_rate,
        num_train_epochs=training.num_train_epochs,
        evaluations_per_epoch=training.evaluations_per_epoch,
        warmup_ratio=training.warmup_ratio,
        lr_scheduler_type=training.lr_scheduler_type,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        steps_per_epoch=tuple(len(schedule_training([s], epoch, seed=seed, layout=layout)) for s in rows.train),
        n_coordinates=n_coordinates,
        seed=seed,
        n_trained=count_trained(probe),
    )


def _identify_oracle(work: Workspace, rows: Rows) -> tuple[object, ...]:
    """Everything that the oracle's answers depend on."""
    config = work.config
    simulated = settle_training(config) if config.estimation.method == "steps" else None
    start = (rows.learning_fingerprint(), work.start_fingerprint, simulated)
    return (*start, config.gradients, config.estimation, config.affinity)


def _identify_projection(config: GradientsConfig) -> list[Any]:
    """The section as it was before there could be several projections, where there is one: such stores stay valid.

    Which rows are taken is in the rows' own identity, and where in the start point's.
    """
    elsewhere = {"linearize_at", "warmup_epochs", "train_fraction", "validation_fraction"}
    several = set() if config.n_projections > 1 else {"n_projections"}
    values = config.model_dump(mode="json", exclude=elsewhere | several)
    return [type(config).__qualname__, values]


def _describe_surrogate(
    design: affinities.SubsetDesign, values: npt.NDArray[np.float64], matrix: affinities.Affinity, kind: str
) -> dict[str, Any] | None:
    """Say how many pairs of tasks a surrogate filled in, and how well each kind would; none where none was needed."""
    n_pairs = int(np.triu(matrix.surrogate | matrix.surrogate.T, k=1).sum())
    if not n_pairs:
        return None
    return {"kind": kind, "n_pairs": n_pairs, "leave_one_out": affinities.compare_surrogates(design, values)}


def _list_distortion(health: Mapping[str, Any]) -> Iterator[str]:
    """Say so if inner products of the features are further off than a projection can make them."""
    error, proj_dim = health["projection_error"], int(health["proj_dim"])
    if error is not None and error > _MOST_DISTORTION / proj_dim**0.5:
        yield (
            f"Inner products of the {proj_dim} numbers kept of each gradient are off by {error:.1%} of the norms in "
            f"the median, more than {_MOST_DISTORTION}/sqrt({proj_dim}) allows: something is wrong with the features, "
            "and what is predicted from them is a guess."
        )


def _list_filled(matrix: affinities.Affinity, names: Sequence[str], filled: dict[str, Any] | None) -> Iterator[str]:
    """Say which pairs' affinities a surrogate gave, and how good it is."""
    if filled is None:
        return
    pairs = np.argwhere(np.triu(matrix.surrogate | matrix.surrogate.T, k=1))
    named = [f"{names[i]} with {names[j]}" for i, j in pairs[:_MAX_NAMED_PAIRS]]
    more = [f"{len(pairs) - len(named)} more"] if len(pairs) > len(named) else []
    told = "all" if len(pairs) == len(names) * (len(names) - 1) // 2 else ", ".join([*named, *more])
    errors = [f"{kind} {error:.4f}" for kind, error in filled["leave_one_out"].items() if error is not None]
    yield (
        f"Affinities of {len(pairs)} pairs of tasks ({told}) come from a {filled['kind']} surrogate over subsets; "
        f"leave-one-out errors of a subset's score: {', '.join(errors) or 'unknown'}."
    )


def _same(oracle: Oracle) -> Oracle:
    return oracle


def _count_trials(oracle: Oracle) -> int:
    """FLOPs of the fits that the ridge was chosen from."""
    table = oracle.penalty_table
    return _count_fits(oracle, sum(trial.row_iterations for trial in table), sum(trial.n_fits for trial in table))


def _count_asked(oracle: Oracle, design: affinities.SubsetDesign) -> int:
    """Questions about all validation rows: every subset about every task, and for errors again about its own tasks."""
    n_times = 1 + len(design.subsets[0]) / design.n_tasks
    return round(len(oracle.replicates) * len(design.subsets) * n_times)


def _count_work(oracle: Oracle, n_subsets: int) -> int:
    """FLOPs of the fits solved so far, and of predicting all validation rows under ``n_subsets`` of them."""
    return _count_fits(oracle, oracle.row_iterations, n_subsets)


def _count_fits(oracle: Oracle, row_iterations: int, n_asked: int) -> int:
    first = oracle.replicates[0]
    held, dim = sum(block.outputs.size for block in first.validation), first.train[0].proj_dim
    return count_regression_flops(row_iterations, 1, dim) + count_oracle_flops(n_asked, held, dim)
