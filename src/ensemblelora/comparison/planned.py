"""What the method decides before training, for one seed: features, oracle, affinity, plan.

In: a pool. Out: :class:`Planned`, read back from the pool's plan folder, a run folder like any other, where it
was made before. Features are taken at theta0, or at an adapter of the pool that stands in its place meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from ensemblelora import artifacts, stages
from ensemblelora.adapters import THETA0, adapter_state, set_adapter_state
from ensemblelora.affinity import Affinity
from ensemblelora.comparison.pool import Pool, Trained
from ensemblelora.config import TrainingConfig
from ensemblelora.estimation import Oracle
from ensemblelora.planning import Plan
from ensemblelora.store import FeatureStore
from ensemblelora.workspace import open_workspace

__all__ = ["Planned", "make_plan", "make_warm_plan"]

_STAGES = ("features", "affinity", "group")


@dataclass(frozen=True, eq=False)
class Planned:
    """The decision, what it was made from, and what it cost."""

    plan: Plan
    affinity: Affinity
    load_oracle: Callable[[], Oracle]
    store: FeatureStore
    select_flops: int
    seconds: float
    feature_flops: int
    """of the gradient pass alone, for methods that need no more of it"""
    feature_seconds: float

    @cached_property
    def oracle(self) -> Oracle:
        """What predicts any group's loss; read back, with all features, when it is first asked for."""
        return self.load_oracle()


def make_plan(pool: Pool) -> Planned:
    """Carry out the stages up to the plan as ``ensemblelora plan`` does, or read back what they left."""
    config = pool.config.model_copy(update={"out": str(pool.plan_folder)})
    found: list[Planned] = []
    with open_workspace(config, until="report", start_fingerprint=pool.start_fingerprint) as work:
        store = stages.take_features(work, pool.probe, pool.rows)
        load_oracle, affinity = stages.estimate_affinity(work, store, pool.rows, pool.probe)
        plan = stages.choose_plan(work, load_oracle, affinity, pool.rows, pool.probe)
        spent = work.flops_of(*_STAGES), work.seconds_of(*_STAGES)
        features = work.flops_of("features"), work.seconds_of("features")
        found.append(Planned(plan, affinity, load_oracle, store, *spent, *features))
    return found[0]


def make_warm_plan(pool: Pool, start: Trained, settings: TrainingConfig) -> Planned:
    """Make the plan of groups that go on from an adapter: features are taken there, A's gradient included.

    Args:
        pool: The seed's.
        start: Where the groups' trainings begin.
        settings: How they train.
    """
    warm = Pool(
        pool.config.model_copy(update={"training": settings}),
        pool.folder / f"warm-{start.name}",
        pool.rows,
        pool.probe,
        start_fingerprint=artifacts.fingerprint(pool.start_fingerprint, start),
    )
    pool.load([start.name])
    with _started_at(pool, start.name):
        return make_plan(warm)


@contextmanager
def _started_at(pool: Pool, name: str) -> Iterator[None]:
    """Let theta0 hold another adapter's tensors."""
    before = adapter_state(pool.probe, THETA0)
    set_adapter_state(pool.probe, THETA0, adapter_state(pool.probe, name))
    try:
        yield
    finally:
        set_adapter_state(pool.probe, THETA0, before)
