"""What the method decides before training, for one seed: features, oracle, affinity, plan.

In: a pool. Out: :class:`Planned`, read back from the pool's plan folder, a run folder like any other, where it
was made before. Features are taken at theta0, or at an adapter of the pool that stands in its place meanwhile. What
features of a share of the rows lead to is found out from those of all rows, and charged as if these had not been taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from ensemblelora import artifacts, stages
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import adapter_state
from ensemblelora.affinity import Affinity
from ensemblelora.comparison.candidate import Costs
from ensemblelora.comparison.pool import Pool, Trained
from ensemblelora.config import GradientsConfig, TrainingConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.estimation import Oracle
from ensemblelora.gradients.plan import choose_examples, count_pass
from ensemblelora.planning import Plan
from ensemblelora.speed import measure_work
from ensemblelora.startpoint import started_at
from ensemblelora.store import FeatureStore
from ensemblelora.workspace import Workspace, open_workspace

__all__ = ["Planned", "charge_features", "make_part_plan", "make_plan", "make_warm_plan"]

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
    gradients: GradientsConfig
    """what it was made with"""
    peak_memory_bytes: int = 0
    added_memory_bytes: int = 0
    """the most above what was resident when one of the stages began"""

    @property
    def costs(self) -> Costs:
        """What deciding took, for the methods that train what it names."""
        return Costs(
            0,
            select_flops=self.select_flops,
            seconds=self.seconds,
            peak_memory_bytes=self.peak_memory_bytes,
            added_memory_bytes=self.added_memory_bytes,
        )

    @cached_property
    def oracle(self) -> Oracle:
        """What predicts any group's loss; read back, with all features, when it is first asked for."""
        return self.load_oracle()


def make_plan(pool: Pool) -> Planned:
    """Carry out the stages up to the plan as ``ensemblelora plan`` does, or read back what they left."""
    return _make(pool)


def charge_features(pool: Pool, planned: Planned) -> Costs:
    """What the gradient pass takes of a method that needs the training rows' alone: their share of it, by formula.

    Args:
        pool: The seed's.
        planned: Its plan, whose pass took validation rows, too.

    Returns:
        Time as the share of what was measured; entered as FLOPs of deciding.
    """
    share = _count_features(pool, pool.rows.train) / _count_features(pool)
    return replace(
        planned.costs,
        select_flops=round(share * planned.feature_flops),
        seconds=share * planned.feature_seconds,
    )


def make_part_plan(pool: Pool, train_fraction: float) -> Planned:
    """Make the plan that ``gradients.train_fraction`` would lead to, from the features that all rows have already.

    Its gradient pass is charged by what it would take beside the whole one. Where the config itself takes a share of
    the rows, the pass is made.

    Args:
        pool: The seed's.
        train_fraction: Share of each task's training rows.
    """
    whole, before = make_plan(pool), pool.config.gradients
    gradients = before.model_copy(update={"train_fraction": train_fraction})
    part = Pool(
        pool.config.model_copy(update={"gradients": gradients}),
        pool.folder,
        pool.rows,
        pool.probe,
        start_fingerprint=pool.start_fingerprint,
        plan_folder=pool.plan_folder.with_name(f"{pool.plan_folder.name}-{train_fraction:g}"),
    )
    if before.train_fraction < 1:
        return _make(part)
    found = _make(part, partial(_fill_store, part, whole.store))
    share = _count_features(part) / _count_features(pool)
    flops, seconds = round(share * whole.feature_flops), share * whole.feature_seconds
    return replace(
        found,
        feature_flops=flops,
        feature_seconds=seconds,
        select_flops=found.select_flops - found.feature_flops + flops,
        seconds=found.seconds - found.feature_seconds + seconds,
    )


def _make(pool: Pool, fill: Callable[[Workspace], None] | None = None) -> Planned:
    """Carry out the stages; ``fill`` puts features that are known into the folder first."""
    config = pool.config.model_copy(update={"out": str(pool.plan_folder)})
    found: list[Planned] = []
    with open_workspace(config, until="report", start_fingerprint=pool.start_fingerprint) as work:
        if fill is not None:
            fill(work)
        store = stages.take_features(work, pool.probe, pool.rows)
        load_oracle, affinity = stages.estimate_affinity(work, store, pool.rows, pool.probe)
        plan = stages.choose_plan(work, load_oracle, affinity, pool.rows, pool.probe)
        spent = work.flops_of(*_STAGES), work.seconds_of(*_STAGES)
        features = work.flops_of("features"), work.seconds_of("features")
        peaks = work.peaks_of(*_STAGES)
        found.append(Planned(plan, affinity, load_oracle, store, *spent, *features, config.gradients, *peaks))
    return found[0]


def _fill_store(pool: Pool, whole: FeatureStore, work: Workspace) -> None:
    """Put the features of the rows that a pool's config asks for into a folder, from those of all rows."""
    store = FeatureStore(work.path / artifacts.FEATURES_FOLDER)
    wanted = stages.identify_features(work, pool.probe, pool.rows)
    for split in pool.rows.learning:
        identity = wanted[split.task, split.split]
        if not store.has(split.task, split.split, identity):
            examples = choose_examples(split, pool.config.gradients, seed=pool.config.seed)
            store.write(whole.read(split.task, split.split).take(examples), identity)


def _count_features(pool: Pool, splits: Sequence[EncodedSplit] | None = None) -> int:
    """What the gradient pass that a pool's config asks for takes on some rows, or all: FLOPs, or padded tokens."""
    meter = Meter("features")
    count_pass(pool.probe, splits or pool.rows.learning, pool.config.gradients, seed=pool.config.seed, meter=meter)
    return measure_work(meter.record)


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
    with started_at(pool.probe, adapter_state(pool.probe, start.name)):
        return make_plan(warm)
