"""The stages up to the plan: features, affinity, groups. Nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from ensemblelora import affinity as affinities
from ensemblelora import artifacts, planning
from ensemblelora.accounting.formulas import count_oracle_flops, count_regression_flops
from ensemblelora.adapters import AdaptedModel, adapter_bytes
from ensemblelora.config import EstimationConfig
from ensemblelora.errors import StoreError
from ensemblelora.estimation import Oracle, PenaltyTrial, TaskFeatures, build_oracle
from ensemblelora.gradients.collect import collect_features
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
    made_of = (__package__, work.start_fingerprint, config.gradients)
    wanted = {key: artifacts.fingerprint(*made_of, identity) for key, identity in rows.identities.items()}
    is_complete = all(store.has(*key, identity) for key, identity in wanted.items())
    with work.stage("features", wanted_in_order(wanted), is_complete=is_complete) as stage:
        if stage.is_needed:
            health = collect_features(
                probe, rows.learning, store, config.gradients, seed=config.seed, fingerprints=wanted, meter=stage.meter
            )
            artifacts.write_json(work.path / _HEALTH_FILE, asdict(health))
            stage.files.append(work.path / _HEALTH_FILE)
    return store
