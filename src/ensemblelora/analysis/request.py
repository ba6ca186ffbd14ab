"""What an analysis is given: rows, a model for every seed and variant, trainings that are kept, and a journal.

In: a config, the analysis' own options, seeds and a folder. Out: :class:`AnalysisRequest`. Everything dear goes through
it: a pool's trainings are found where they were made before, and so is what :meth:`~AnalysisRequest.measure` measured,
so that an analysis that is broken off goes on where it was. Both enter the ledger, whether made now or before.

Trainings lie in ``pools/`` beside the analyses' own folders and are shared by all of them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from ensemblelora import __version__, artifacts, stages
from ensemblelora.accounting.meter import Meter, StageRecord
from ensemblelora.analysis.variant import Changes, change_config
from ensemblelora.comparison.bench import Bench
from ensemblelora.comparison.planned import make_plan
from ensemblelora.comparison.pool import Part, Pool, Runner, Trained
from ensemblelora.config import RunConfig, load_config
from ensemblelora.config_stage import Stage
from ensemblelora.estimation import Oracle
from ensemblelora.journal import Journal
from ensemblelora.prediction import MemberScores
from ensemblelora.workspace import ORACLE_FILE

__all__ = ["JOURNAL_FILE", "AnalysisRequest", "Changes", "Work"]

JOURNAL_FILE = "journal.jsonl"
_POOLS_FOLDER = "pools"

Options = TypeVar("Options", bound=Stage)


@dataclass(frozen=True)
class Work:
    """What part of an analysis takes, in units that a forecast has a price for.

    Attributes:
        fine_tunings: Number of trainings.
        trained_rows: Training rows they take, epochs counted.
        gradient_rows: Rows taken forward and backward besides, as often as they are.
        forward_rows: Rows taken forward alone.
        changes: The variant that they are run in.
        is_full: Whether the trainings are of all the model's weights.
    """

    fine_tunings: int = 0
    trained_rows: float = 0.0
    gradient_rows: float = 0.0
    forward_rows: float = 0.0
    changes: Changes = field(default_factory=dict)
    is_full: bool = False


class AnalysisRequest(Generic[Options]):
    """One analysis that is asked for.

    Attributes:
        name: Of the analysis.
        config: Its seed is the first of ``seeds``; the seed of its rows is set.
        options: The analysis' own.
        seeds: Roots of theta0 and of the order of rows; rows are the same for all.
        folder: Of this analysis; what it leaves besides its result goes there.
        run: The finished run that was named instead of a config; none otherwise.
    """

    def __init__(
        self,
        name: str,
        config: RunConfig,
        options: Options,
        *,
        seeds: Sequence[int],
        home: Path | str,
        run: Path | None = None,
    ) -> None:
        """Set up, without loading anything.

        Args:
            name: Of the analysis.
            config: Rows are drawn by ``data.seed``, or else by its seed.
            options: The analysis' own.
            seeds: At least one.
            home: Shared by analyses of one config; each has a folder in it.
            run: A finished run with this config, whose oracle and true fine-tunings can be used.
        """
        rows_seed = config.seed if config.data.seed is None else config.data.seed
        data = config.data.model_copy(update={"seed": rows_seed})
        self.name, self.options, self.seeds, self.run = name, options, tuple(seeds), run
        self.config = config.model_copy(update={"data": data, "seed": self.seeds[0], "out": str(home)})
        self.folder, self._pools = Path(home) / name, Path(home) / _POOLS_FOLDER
        self._journal = Journal(self.folder / JOURNAL_FILE)
        self._bench: Bench | None = None
        self._bench_identity = self._kept_identity = ""
        self._charged: dict[str, dict[str, StageRecord]] = {"training": {}, "measuring": {}}

    def open_pool(self, seed: int | None = None, changes: Changes | None = None) -> Pool:
        """Give rows and model of a seed and a variant; pools given before can't be used any more.

        Loads rows and model again where ``data`` or ``model`` change. What the pool trains or scores with enters the
        ledger.

        Args:
            seed: One of any; none: the first.
            changes: What is different from the config.

        Raises:
            UsageError: If what is asked for is no config, or data or model are wrong.
        """
        config = change_config(self.config, changes or {})
        loaded = {part: getattr(config, part) for part in ("data", "model", "adapter")}
        wanted = artifacts.fingerprint(loaded)
        if self._bench is None or wanted != self._bench_identity:
            kept = artifacts.fingerprint(loaded["data"], loaded["model"])
            like = self._bench if kept == self._kept_identity else None
            self.close()
            self._bench = Bench(self.config.model_copy(update=loaded), self._pools / wanted[:12], like=like)
            self._bench_identity, self._kept_identity = wanted, kept
        found = self._bench.open_pool(self.config.seed if seed is None else seed, config.training.learning_rate)
        own = config.model_copy(update={"seed": found.config.seed, "out": found.config.out})
        plan = found.plan_folder
        if own != found.config:  # features and plans depend on more than what pools share
            plan = plan.with_name(f"{plan.name}-{artifacts.fingerprint(own)[:8]}")
        return _ChargedPool(
            own,
            found.folder,
            found.rows,
            found.probe,
            start_fingerprint=found.start_fingerprint,
            plan_folder=plan,
            base_folder=found.base_folder,
            charge=self.charge,
        )

    def measure(self, what: str, inputs: object, compute: Callable[[Meter], Any]) -> Any:
        """Carry out a measurement, or read what it gave before; enter it in the ledger.

        Args:
            what: A word for the journal.
            inputs: Everything the result depends on: names of adapters, rows' fingerprints, settings, seeds.
            compute: Gives plain values without NaN; tells the meter what its passes cost. No training inside: meters
                do not nest.
        """
        identity = artifacts.fingerprint(__version__, what, inputs)
        entry = self._journal.find(identity)
        if entry is None:
            with Meter(what) as meter:
                result = compute(meter)
            entry = self._journal.add(identity, {"what": what, "result": result, "costs": asdict(meter.record)})
        self._charged["measuring"][identity] = StageRecord(**entry["costs"])
        return entry["result"]

    def prepare_oracle(self, pool: Pool) -> Callable[[], Oracle]:
        """Make the oracle of a pool, or find that of the run which was named, where it is of the same start.

        Args:
            pool: From :meth:`open_pool`, the newest.

        Returns:
            What reads it, with all features, when it is needed.
        """
        if self.run is not None and self._is_run_like(pool, self.run):
            return partial(stages.read_oracle, self.run, pool.rows.names, pool.config.estimation)
        planned = make_plan(pool)
        self.charge_stage(f"plan {pool.plan_folder}", flops=planned.select_flops, seconds=planned.seconds)
        return planned.load_oracle

    def charge(self, trained: Trained) -> Trained:
        """Enter a fine-tuning in the ledger, once however often it is used."""
        self._charged["training"][trained.name] = StageRecord(
            trained.name,
            wall_seconds=trained.seconds,
            flops=trained.flops,
            peak_memory_bytes=trained.peak_memory_bytes,
        )
        return trained

    def charge_stage(self, name: str, *, flops: int, seconds: float) -> None:
        """Enter what was neither trained by a pool nor measured here, such as a plan; once a name."""
        self._charged["measuring"][name] = StageRecord(name, wall_seconds=seconds, flops=flops)

    def count_costs(self) -> dict[str, dict[str, float]]:
        """Sum up what was used, whether it was done now or before: ``training``, ``measuring`` and ``total``."""
        parts = {name: list(records.values()) for name, records in self._charged.items()}
        parts["total"] = [record for records in parts.values() for record in records]
        return {name: _add_up(records) for name, records in parts.items()}

    def _is_run_like(self, pool: Pool, run: Path) -> bool:
        """Whether a run has an oracle, and everything it depends on is the pool's."""
        if not (run / ORACLE_FILE).exists():
            return False
        theirs = load_config(run / artifacts.CONFIG_FILE)
        parts = ("adapter", "gradients", "estimation", "training", "seed")
        model = artifacts.read_json(run / artifacts.ENVIRONMENT_FILE)["model"]["fingerprint"]
        is_alike = all(getattr(theirs, part) == getattr(pool.config, part) for part in parts)
        return bool(is_alike and model == pool.probe.base.fingerprint)

    def close(self) -> None:
        """Let go of the model, and free the disk that activations took."""
        if self._bench is not None:
            self._bench.close()
            self._bench, self._bench_identity, self._kept_identity = None, "", ""
            gc.collect()


class _ChargedPool(Pool):
    """A pool that tells of every fine-tuning whose adapter is trained, found or scored with."""

    def __init__(self, *args: Any, charge: Callable[[Trained], Trained], **named: Any) -> None:
        super().__init__(*args, **named)
        self._charge = charge

    def train(self, tasks: Sequence[int], **how: Any) -> Trained:
        """Fine-tune, or find, and tell."""
        return self._charge(super().train(tasks, **how))

    def score(self, names: Sequence[str], task: int, part: Part, *, run: Runner | None = None) -> MemberScores:
        """Score, and tell what with."""
        for name in names:
            record = self.folder / "adapters" / name / "trained.json"
            if record.exists():
                self._charge(Trained.from_dict(artifacts.read_json(record)))
        return super().score(names, task, part, run=run)


def _add_up(records: Sequence[StageRecord]) -> dict[str, float]:
    return {
        "n": len(records),
        "flops": sum(record.flops for record in records),
        "seconds": sum(record.wall_seconds for record in records),
        "peak_memory_bytes": max((record.peak_memory_bytes for record in records), default=0),
    }
