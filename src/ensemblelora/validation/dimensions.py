"""Oracles that see less of each gradient than the run's own, or more: what a projection costs, by its dimension.

In: a planned run. Out: oracles by name, from ``d=800`` to ``d=100`` and ``exact``, that differ from the run's own in
nothing else. Some columns of a projection are a narrower one; what the run's own is too narrow for, and gradients
without a projection, take a gradient pass each, whose outcome is kept in the run's folder ``validation/``.

Cost: seconds without these passes. With them, two passes over the rows, and the disk and memory of
:mod:`ensemblelora.gradients.exact`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ensemblelora import __version__, artifacts, stages
from ensemblelora.adapters import AdaptedModel
from ensemblelora.affinity import sample_subsets
from ensemblelora.blocks import slice_projections
from ensemblelora.config import GradientsConfig, RunConfig
from ensemblelora.errors import ConfigError, OutputError
from ensemblelora.estimation import Oracle, TaskFeatures, build_oracle, read_features
from ensemblelora.gradients.collect import collect_features
from ensemblelora.gradients.exact import join_fingerprints
from ensemblelora.progress import note
from ensemblelora.startpoint import load_start
from ensemblelora.store import FeatureBlock, FeatureStore

__all__ = ["DIMENSIONS", "WiderForm", "collect_wider", "list_predictors"]

DIMENSIONS = (800, 400, 200, 100)
"""numbers kept of each gradient; the paper's Table 3 has the last three"""
WiderForm = Literal["projected", "exact"]
_SLICEABLE = ("rademacher", "gaussian")
"""kinds whose columns are projections of their own"""


def list_predictors(
    oracle: Oracle, config: RunConfig, wider: Mapping[WiderForm, TaskFeatures] | None = None
) -> Iterator[tuple[str, Oracle]]:
    """Yield the run's own oracle, then others of the same rows and settings, each made when it is asked for.

    Args:
        oracle: The run's own.
        config: The run's.
        wider: From :func:`collect_wider`; none: only what can be cut out of the run's own features.
    """
    width, given = _width(oracle.replicates), wider or {}
    own = "exact" if config.gradients.proj_type == "none" else f"d={width}"
    yield own, oracle
    sources = [oracle.replicates] if config.gradients.proj_type in _SLICEABLE else []
    sources += [(given["projected"],)] if "projected" in given else []
    for d in DIMENSIONS:
        source = next((features for features in sources if _width(features) >= d), None)
        if source is not None and own != f"d={d}":
            yield f"d={d}", _ask_anew([_narrow(features, d) for features in source], oracle, config)
    if "exact" in given:
        yield "exact", _ask_anew([given["exact"]], oracle, config)


def collect_wider(path: Path, place: Path, oracle: Oracle, config: RunConfig) -> dict[WiderForm, TaskFeatures]:
    """Take gradients anew in the forms that the run's own features can't give, or read them back.

    What is too large for the disk or the memory is left out, and said.

    Args:
        path: The run folder.
        place: A folder in it, for features.
        oracle: The run's own.
        config: The run's.

    Returns:
        800 numbers a gradient, and all of them, where the run's own are not that already.
    """
    own = config.gradients
    is_wide = own.proj_type in _SLICEABLE and _width(oracle.replicates) >= DIMENSIONS[0]
    kind = own.proj_type if own.proj_type in _SLICEABLE else _SLICEABLE[0]
    changes: dict[WiderForm, dict[str, object]] = {}
    if not is_wide:
        changes["projected"] = {"proj_type": kind, "proj_dim": DIMENSIONS[0], "n_projections": 1}
    if own.proj_type != "none":
        changes["exact"] = {"proj_type": "none", "n_projections": 1}
    if not changes:
        return {}
    _, rows, probe = stages.prepare(config)
    start = stages.identify_start(config, probe, rows)
    probe = stages.keep_lower_layers(config, path, load_start(config, artifacts.RunFolder(path), probe), rows)
    found: dict[WiderForm, TaskFeatures] = {}
    for form, change in changes.items():
        try:
            store = _collect(place / f"features-{form}", own.model_copy(update=change), config.seed, start, rows, probe)
        except (ConfigError, OutputError) as error:
            note(f"predictions from {form} gradients are left out: {error}")
        else:
            (found[form],) = read_features(store, rows.names, 1, oracle.replicates[0].n_train)
    stages.drop_lower_layers(path)
    return found


def _collect(
    place: Path, config: GradientsConfig, seed: int, start: str, rows: stages.Rows, probe: AdaptedModel
) -> FeatureStore:
    """Take the features that the store does not have yet."""
    store = FeatureStore(place)
    identities = {key: artifacts.fingerprint(__version__, start, config, own) for key, own in rows.identities.items()}
    collect_features(probe, rows.learning, store, config, seed=seed, fingerprints=join_fingerprints(identities))
    return store


def _width(replicates: Sequence[TaskFeatures]) -> int:
    return replicates[0].train[0].proj_dim


def _narrow(features: TaskFeatures, d: int) -> TaskFeatures:
    def cut(blocks: Sequence[FeatureBlock]) -> tuple[FeatureBlock, ...]:
        return tuple(slice_projections(block, d, 0) for block in blocks)

    return replace(features, train=cut(features.train), validation=cut(features.validation))


def _ask_anew(features: Sequence[TaskFeatures], oracle: Oracle, config: RunConfig) -> Oracle:
    """An oracle of other features under the run's own settings; a ridge is chosen anew."""
    design = sample_subsets(oracle.n_tasks, config.affinity, seed=config.seed)
    return build_oracle(features, config.estimation, subsets=design.subsets, budget=oracle.budget)
