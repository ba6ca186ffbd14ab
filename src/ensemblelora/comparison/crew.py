"""A comparison's fine-tunings in processes of a cluster: each is a job that leaves its adapter in the pool's folder.

In: what a pool wants trained. Out: nothing but files. A process holds the model with one seed's theta0; rows, settings
and order of rows are those that the pool itself would train with, so that the adapter is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ensemblelora import artifacts, stages
from ensemblelora.adapters import AdaptedModel
from ensemblelora.comparison.pool import Pool
from ensemblelora.comparison.trained import Errand, Wish
from ensemblelora.config import RunConfig
from ensemblelora.errors import TrainingError
from ensemblelora.scheduling import Equipment, Job, Scheduler
from ensemblelora.stages import Rows

__all__ = ["ClusterCrew", "hire"]


@dataclass(frozen=True, eq=False)
class ClusterCrew:
    """Hands fine-tunings to a scheduler.

    Attributes:
        scheduler: Of a cluster.
        equipment: Rows, and the model with theta0.
        start_fingerprint: Identity of theta0.
    """

    scheduler: Scheduler
    equipment: Equipment
    start_fingerprint: str

    def train(self, errands: Sequence[Errand]) -> None:
        """As :meth:`~.trained.Crew.train`; those with most tasks first."""
        order = sorted(errands, key=lambda errand: -len(errand.wish.tasks))
        jobs = [
            Job(f"adapter {name}", (self.start_fingerprint, str(folder.resolve()), wish))
            for folder, name, wish in order
        ]
        for _ in self.scheduler.run(_train, jobs, self.equipment, what="fine-tunings"):
            pass


def hire(
    scheduler: Scheduler,
    config: RunConfig,
    folder: Path,
    rows: Rows,
    probe: AdaptedModel,
    start_fingerprint: str,
    *,
    marker: str = artifacts.RUN_FILE,
) -> ClusterCrew | None:
    """Give who trains for a pool; none where there are no other processes.

    Args:
        scheduler: Carries out jobs.
        config: The pool's seed, model and adapter.
        folder: Which all machines see.
        rows: The pool's.
        probe: The model; theta0 is as it was attached.
        start_fingerprint: Identity of theta0.
        marker: A file that is in the folder.
    """
    if not scheduler.n_workers:
        return None
    base = config.gradients.model_copy(update={"linearize_at": "base"})  # every adapter starts at the base model
    plain = config.model_copy(update={"gradients": base})
    equipment = stages.equip(plain, folder, rows, probe, start_fingerprint, marker=marker)
    return ClusterCrew(scheduler, equipment, start_fingerprint)


def _train(bench: stages.Bench, start_fingerprint: str, folder: str, wish: Wish) -> None:
    pool = Pool(bench.config, Path(folder), bench.rows, bench.probe, start_fingerprint=start_fingerprint)
    try:
        pool.train(wish.tasks, **wish.options)
    except TrainingError:
        pass  # the pool's folder remembers it, and whoever wanted the adapter is told from there
