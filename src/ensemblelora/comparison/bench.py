"""The rows and the model of a comparison, and a pool for every seed and learning rate.

In: a config and a folder. Out: :class:`~.pool.Pool`, one a seed and rate. Rows are encoded once and the model is loaded
once; a seed's theta0 is taken off again before the next one's is put on. Features do not depend on the learning rate,
so a seed's pools share them. A plan that simulates the training (``estimation.method: steps``) does, and is each pool's
own; with ``ridge`` it is shared, too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from ensemblelora import artifacts, stages
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel, attach
from ensemblelora.comparison.crew import ClusterCrew, hire
from ensemblelora.comparison.pool import Pool, Wish
from ensemblelora.comparison.record import STUDY_FILE, TaskRows
from ensemblelora.config import RunConfig
from ensemblelora.counting import count_forward, count_lower
from ensemblelora.data.batching import collate, iterate_batches
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.identity import fingerprint_split
from ensemblelora.data.task import TaskSet
from ensemblelora.models import BaseModel, load_base
from ensemblelora.passes import FILL_TOKENS, run_lower
from ensemblelora.progress import note
from ensemblelora.scheduling import HERE, Scheduler
from ensemblelora.stages import Rows
from ensemblelora.workspace import Workspace

__all__ = ["Bench"]

_FEATURE_FILES = (artifacts.RUN_FILE, artifacts.FEATURE_HEALTH_FILE, artifacts.COSTS_FILE)


class Bench:
    """The rows and the model, with one seed's theta0 on it at a time.

    Attributes:
        rows: Of all seeds.
        identity: Of rows, test rows included, and model.
    """

    def __init__(
        self, config: RunConfig, folder: Path, *, like: Bench | None = None, scheduler: Scheduler = HERE
    ) -> None:
        """Load rows and model.

        Args:
            config: Its sections ``data``, ``model`` and ``adapter`` say what is loaded.
            folder: For what is kept.
            like: Of the same data and model, and another adapter: its rows and base are taken over, and it can't be
                used any more.
            scheduler: Carries out fine-tunings that need nothing of each other.

        Raises:
            UsageError: If config, data or model are wrong.
        """
        self._config, self._folder, self._scheduler = config, folder, scheduler
        self._crew: ClusterCrew | None = None
        self._tasks, self.rows, probe = stages.prepare(config) if like is None else like._hand_over(config)
        self._head, self._n_labels = stages.choose_head(self._tasks), stages.count_labels(self._tasks)
        tests = [fingerprint_split(split) for split in self.rows.test]
        self.identity = artifacts.fingerprint(self.rows.learning_fingerprint(), tests, probe.base.fingerprint)
        self._seed, self._probe = config.seed, self._keep_lower(probe)

    def describe(self) -> None:
        """Write ``environment.json`` and ``tasks.json``, as a run does."""
        start = stages.identify_start(self._config, self._probe)
        work = Workspace(
            config=self._config, folder=artifacts.RunFolder(self._folder), until="report", start_fingerprint=start
        )
        stages.describe_run(work, self._tasks, self.rows, self._probe)

    def open_pool(self, seed: int, learning_rate: float) -> Pool:
        """Give the pool of a seed and a learning rate; pools of other seeds can't be used any more.

        Args:
            seed: Root of all randomness but the choice of rows.
            learning_rate: Of everything the pool trains.
        """
        if seed != self._seed:
            self._attach(_detach(self._probe) or self._load(), seed)
        training = self._config.training.model_copy(update={"learning_rate": learning_rate})
        home = self._folder / f"seed-{seed}"
        folder = home / f"lr-{learning_rate:g}"
        config = self._config.model_copy(update={"seed": seed, "training": training, "out": str(folder)})
        plan = home / "plan"
        if config.estimation.method == "steps":
            plan = folder / "plan"
            _share_features(home, plan)
        start = stages.identify_start(config, self._probe)
        places = {"plan_folder": plan, "base_folder": self._folder / "base"}
        self._hire(seed, start)
        return Pool(config, folder, self.rows, self._probe, start_fingerprint=start, crew=self._crew, **places)

    def train_ahead(self, seed: int, learning_rates: Sequence[float], work: Sequence[str]) -> None:
        """Fine-tune on a cluster what is known beforehand to be needed at several learning rates, all side by side.

        Args:
            seed: Of the pools.
            learning_rates: One pool each.
            work: Kinds of work, as methods name them.
        """
        if not self._scheduler.n_workers or len(learning_rates) == 1:
            return
        pools = [self.open_pool(seed, rate) for rate in learning_rates]
        everyone = pools[0].everyone
        known = {"one": [Wish(everyone)], "tasks": [Wish((task,)) for task in everyone]}
        wishes = [wish for kind in dict.fromkeys(work) for wish in known.get(kind, [])]
        errands = [errand for pool in pools for errand in pool.list_errands(wishes)]
        if self._crew is not None and len(errands) > 1:
            self._crew.train(errands)

    def reload(self) -> None:
        """Load the model again, where a failure may have left it changed."""
        self._attach(self._load(), self._seed)

    def describe_tasks(self) -> tuple[TaskRows, ...]:
        """Every task's sizes and test rows, and what a pass over a test row costs."""
        found = []
        for train, validation, test in zip(self.rows.train, self.rows.validation, self.rows.test, strict=True):
            lower, upper = _count_passes(self._probe, test)
            found.append(
                TaskRows(
                    name=test.task,
                    kind=test.kind,
                    n_train=train.n_examples,
                    n_validation=validation.n_examples,
                    groups=tuple(int(code) for code in test.groups),
                    labels=tuple(int(label) for label in test.labels),
                    lower_flops=lower / test.n_examples,
                    upper_flops=upper / test.n_examples,
                )
            )
        return tuple(found)

    def fill_lower_layers(self) -> Mapping[str, float]:
        """Run the blocks below the lowest adapted one for all rows that are learnt from, as far as they are kept.

        Done before any method, so that no method pays for another.

        Returns:
            ``flops`` by formula, whether it was done now or before; ``seconds`` it took now.
        """
        probe, counted, timed = self._probe, Meter("lower layers"), Meter("lower layers")
        cache = probe.prefix.cache if probe.prefix else None
        with timed:
            for split in self.rows.learning if cache is not None else ():
                first = collate([(split, 0)], probe.base.pad_token_id, layout=probe.layout)
                run_lower(probe, first)  # fills the whole split's file
                if cache is not None and cache.read(first, probe.device)[1].all():
                    _count_fill(counted, probe, split)
        return {"flops": counted.record.flops, "seconds": timed.record.wall_seconds}

    def close(self) -> None:
        """Free the disk that activations took."""
        stages.drop_lower_layers(self._folder)

    def _hand_over(self, config: RunConfig) -> tuple[TaskSet, Rows, AdaptedModel]:
        """What :func:`~ensemblelora.stages.prepare` would load for another adapter."""
        stages.check_request(config, self._tasks)
        probe = attach(_detach(self._probe) or self._load(), config.adapter, seed=config.seed)
        stages.check_fit(config, self.rows, probe)
        return self._tasks, self.rows, probe

    def _hire(self, seed: int, start_fingerprint: str) -> None:
        """Let other processes, if there are any, train from this theta0."""
        if self._crew is None or self._crew.start_fingerprint != start_fingerprint:
            config = self._config.model_copy(update={"seed": seed})
            given = (self._scheduler, config, self._folder, self.rows, self._probe, start_fingerprint)
            self._crew = hire(*given, marker=STUDY_FILE)

    def _attach(self, base: BaseModel, seed: int) -> None:
        self._probe = self._keep_lower(attach(base, self._config.adapter, seed=seed))
        self._seed, self._crew = seed, None

    def _keep_lower(self, probe: AdaptedModel) -> AdaptedModel:
        return stages.keep_lower_layers(self._config, self._folder, probe, self.rows, with_tests=True)

    def _load(self) -> BaseModel:
        config = self._config
        return load_base(config.model, head=self._head, n_labels=self._n_labels, max_length=config.data.max_length)


def _detach(probe: AdaptedModel) -> BaseModel | None:
    """Take all adapters off the base model; none where some of them would stay."""
    unloaded: Any = probe.peft.unload()  # the tuner's own
    left = [name for name, module in unloaded.named_modules() if isinstance(module, BaseTunerLayer)]
    if left or unloaded is not probe.base.model:
        note("the model is loaded again: its adapters can't be taken off")
        return None
    return probe.base


def _share_features(home: Path, plan: Path) -> None:
    """Let a plan's folder begin with the features that another rate's plan of the same seed has."""
    marker = Path(artifacts.STAGES_FOLDER) / "features.json"
    others = sorted(other for other in home.glob("*/plan") if (other / marker).exists())
    if plan.exists() or not others:
        return
    with artifacts.atomic_folder(plan) as scratch:
        for name in (*_FEATURE_FILES, str(marker)):
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(others[0] / name, scratch / name)
        folder = artifacts.FEATURES_FOLDER
        shutil.copytree(others[0] / folder, scratch / folder, copy_function=_link)


def _link(source: str, target: str) -> None:
    """Give a file that is never written to again a second name, or copy it where the disk has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _count_fill(meter: Meter, probe: AdaptedModel, split: EncodedSplit) -> None:
    for batch in iterate_batches(split, FILL_TOKENS, probe.base.pad_token_id, layout=probe.layout):
        count_lower(meter, probe.costs, batch)


def _count_passes(probe: AdaptedModel, split: EncodedSplit) -> tuple[int, int]:
    """FLOPs of a pass over a split below the lowest adapted block, and from there up."""
    lower, upper = Meter("lower"), Meter("upper")
    for batch in iterate_batches(split, FILL_TOKENS, probe.base.pad_token_id, layout=probe.layout):
        if probe.prefix is not None:
            count_lower(lower, probe.costs, batch)
        count_forward(upper, probe.costs, batch)
    return lower.record.flops, upper.record.flops
