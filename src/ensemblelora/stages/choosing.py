"""The stages up to the plan: features, affinity, groups. Nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ensemblelora import __version__, artifacts, planning
from ensemblelora import affinity as affinities
from ensemblelora.accounting.formulas import count_oracle_flops, count_regression_flops
from ensemblelora.adapters import AdaptedModel, adapter_bytes
from ensemblelora.config import EstimationConfig
from ensemblelora.errors import StoreError
from ensemblelora.estimation import Oracle, PenaltyTrial, TaskFeatures, build_oracle
from ensemblelora.gradients.collect import collect_features
from ensemblelora.gradients.output import choose_modes
from ensemblelora.planning import Plan
from ensemblelora.stages.rows import Rows
from ensemblelora.store import FeatureStore
from ensemblelora.workspace import ORACLE_FILE, Workspace

__all__ = ["choose_plan", "estimate_affinity", "read_oracle", "take_features"]

_HEALTH_FILE = "feature_health.json"


def take_features(work: Workspace, probe: AdaptedModel, rows: Rows) -> FeatureStore:
    """Projected gradients of every train and validation row. Leaves ``features/`` and its health record."""
    config = work.config
    store = FeatureStore(work.path / artifacts.FEATURES_FOLDER)
    modes = choose_modes(rows.learning, config.gradients.output)  # another split's rows may change them
    shared = (__version__, work.start_fingerprint, config.gradients)
    wanted = {key: artifacts.fingerprint(*shared, modes[key[0]], identity) for key, identity in rows.identities.items()}
    is_complete = all(store.has(*key, identity) for key, identity in wanted.items())
    with work.stage("features", sorted(wanted.values()), is_complete=is_complete) as stage:
        if stage.is_needed:
            health = collect_features(
                probe, rows.learning, store, config.gradients, seed=config.seed, fingerprints=wanted, meter=stage.meter
            )
            artifacts.write_json(work.path / _HEALTH_FILE, asdict(health))
            stage.files.append(work.path / _HEALTH_FILE)
    return store


def estimate_affinity(
    work: Workspace, store: FeatureStore, rows: Rows
) -> tuple[Callable[[], Oracle], affinities.Affinity]:
    """Ask the oracle about many subsets and average into the task affinity. Leaves ``affinity.npz``, ``oracle.json``.

    Returns:
        What gives the oracle, read back only where a later stage needs it, and the affinity.
    """
    config, path = work.config, work.path / artifacts.AFFINITY_FILE
    load = partial(read_oracle, work.path, rows.names, config.estimation)
    inputs = (rows.learning_fingerprint(), work.start_fingerprint, config.gradients, config.estimation, config.affinity)
    with work.stage("affinity", *inputs) as stage:
        if stage.is_needed:
            design = affinities.sample_subsets(len(rows.names), config.affinity, seed=config.seed)
            oracle = build_oracle([_read_features(store, rows.names)], config.estimation, subsets=design.subsets)
            oracle.solve(design.subsets)
            scores = oracle.score(design.subsets)
            values = affinities.select_values(scores.nll, scores.accuracy, config.affinity.score)
            matrix = affinities.affinity_from_scores(design, values, row_scale=config.affinity.row_scale)
            chosen = {"l2_penalty": oracle.l2_penalty, "penalty_table": [asdict(t) for t in oracle.penalty_table]}
            artifacts.write_json(work.path / ORACLE_FILE, chosen)
            artifacts.save_arrays(path, asdict(matrix))
            stage.meter.add_flops(_count_trials(oracle) + _count_work(oracle, len(design.subsets)))
            stage.files += [path, work.path / ORACLE_FILE]
            load = partial(_same, oracle)
    return load, affinities.Affinity(**artifacts.load_arrays(path))


def choose_plan(
    work: Workspace, load_oracle: Callable[[], Oracle], matrix: affinities.Affinity, rows: Rows, probe: AdaptedModel
) -> Plan:
    """Choose the groups, and whether to group at all. Leaves ``plan.json``."""
    config, path = work.config, work.path / artifacts.PLAN_FILE
    n_boosters, one = config.boosting.n_rounds, adapter_bytes(probe)
    inputs = (rows.learning_fingerprint(), work.start_fingerprint, config.gradients, config.estimation, config.affinity)
    with work.stage("group", asdict(matrix), *inputs, config.grouping, n_boosters, one) as stage:
        if stage.is_needed:
            oracle = load_oracle()
            known = _count_work(oracle, oracle.n_fits)
            # All at once, as the affinity stage did: fits solved in other company differ in their last bits.
            oracle.solve(affinities.sample_subsets(len(rows.names), config.affinity, seed=config.seed).subsets)
            plan = planning.choose_groups(
                matrix.matrix,
                oracle,
                config.grouping,
                affinity_config=config.affinity,
                n_boosters=n_boosters,
                bytes_per_adapter=one,
                seed=config.seed,
            )
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
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{folder / ORACLE_FILE}: no record of an oracle ({error!r}); delete it and run again"
        ) from None
    features = _read_features(FeatureStore(folder / artifacts.FEATURES_FOLDER), names)
    return Oracle((features,), penalty, config, table)


def _read_features(store: FeatureStore, names: Sequence[str]) -> TaskFeatures:
    return TaskFeatures(
        train=tuple(store.read(name, "train") for name in names),
        validation=tuple(store.read(name, "validation") for name in names),
    )


def _same(oracle: Oracle) -> Oracle:
    return oracle


def _count_trials(oracle: Oracle) -> int:
    """FLOPs of the fits that the ridge was chosen from."""
    table = oracle.penalty_table
    return _count_fits(oracle, sum(trial.row_iterations for trial in table), sum(trial.n_fits for trial in table))


def _count_work(oracle: Oracle, n_subsets: int) -> int:
    """FLOPs of the fits solved so far, and of predicting all validation rows under ``n_subsets`` of them."""
    return _count_fits(oracle, oracle.row_iterations, n_subsets)


def _count_fits(oracle: Oracle, row_iterations: int, n_asked: int) -> int:
    first = oracle.replicates[0]
    held, dim = sum(block.outputs.size for block in first.validation), first.train[0].proj_dim
    return count_regression_flops(row_iterations, 1, dim) + count_oracle_flops(n_asked, held, dim)
