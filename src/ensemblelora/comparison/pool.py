"""One seed's rows, model and adapters: what any method asks for is trained once and kept.

In: encoded rows, the model with theta0, the config of one seed. Out: :class:`Trained` records, adapters under
``adapters/`` and their scores under ``scores/``, so that a comparison that is broken off goes on where it was.
What several methods need is computed once; what it cost is in the record, for each method to be charged.

Memory: the base, and as many adapters as are asked about at once. Test rows are closed until :meth:`Pool.open_tests`.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import TrainerCallback

from ensemblelora import __version__, artifacts, training
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import (
    THETA0,
    AdaptedModel,
    adapter_bytes,
    adapter_state,
    load_adapter,
    remove_adapter,
    save_adapter,
)
from ensemblelora.attempts import Attempt
from ensemblelora.comparison.trained import Crew, Errand, Trained, Wish
from ensemblelora.config import RunConfig, TrainingConfig
from ensemblelora.counting import count_forward, count_lower
from ensemblelora.data.batching import iterate_batches
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import TrainingError
from ensemblelora.passes import choose_max_tokens
from ensemblelora.prediction import MemberScores, arrange_scores, predict_members
from ensemblelora.report.wording import join_names
from ensemblelora.seeding import seed_for
from ensemblelora.stages import Rows

__all__ = ["Part", "Pool", "Runner", "Trained", "Watch", "Wish"]

Part = Literal["train", "validation", "test"]
Runner = Callable[[list[str], EncodedSplit], NDArray[np.float32]]
"""scores rows with some adapters, ``(len(names), n_rows, K)``"""

Watch = Callable[[int, int, Callable[[], dict[str, Tensor]]], None]
"""told after every optimiser step how many were done, of how many, and what gives the adapter's tensors as they are"""

_logger = logging.getLogger(__name__)

_MOST_LOADED = 16
"""adapters kept in the model between questions"""


class Pool:
    """The adapters of one seed; see the module's description.

    Attributes:
        config: With this seed and these learning rates.
        folder: Where everything is kept.
        rows: The same for every seed.
        probe: The model; theta0 depends on the seed.
        start_fingerprint: Identity of theta0.
        plan_folder: Where features and plan are; pools whose plans are the same share it.
        base_folder: Where theta0's scores are: every adapter starts as the base model, whatever the seed and rate.
        crew: Who fine-tunes several adapters side by side; none: one after the other, here.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        rows: Rows,
        probe: AdaptedModel,
        *,
        start_fingerprint: str,
        plan_folder: Path | None = None,
        base_folder: Path | None = None,
        crew: Crew | None = None,
    ) -> None:
        self.config, self.folder, self.rows, self.probe = config, folder, rows, probe
        self.start_fingerprint = start_fingerprint
        self.plan_folder = folder / "plan" if plan_folder is None else plan_folder
        self.base_folder = folder if base_folder is None else base_folder
        self.crew = crew
        self._are_tests_open = False

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return len(self.rows.names)

    @property
    def everyone(self) -> tuple[int, ...]:
        """All tasks."""
        return tuple(range(self.n_tasks))

    def train(
        self,
        tasks: Sequence[int],
        *,
        start: Trained | None = None,
        copy: int = 0,
        settings: TrainingConfig | None = None,
        weights: Sequence[NDArray[np.float64]] | None = None,
        judges: Sequence[int] | None = None,
        watch: Watch | None = None,
    ) -> Trained:
        """Fine-tune an adapter on some tasks, or find the one that was.

        Args:
            tasks: Indices, in any order.
            start: Where to begin; none: theta0.
            copy: Another one differs in the order of its rows.
            settings: None: the config's.
            weights: What each training row's loss is multiplied with, ``(n_rows,)`` of each task in ascending order of
                their indices; none: one.
            judges: Tasks whose validation rows choose the checkpoint; none: those it trains on.
            watch: Told of every step, where the adapter is not there yet.

        Raises:
            TrainingError: If it diverges, or did so before.
        """
        wish = Wish(tuple(tasks), start, copy, settings, weights, None if judges is None else tuple(judges))
        wish = wish.settled(self.config.training)
        name = self._name(wish)
        folder = self.folder / "adapters" / name
        if self._is_missing(folder):
            with self._remembering(name):
                self._train(name, wish, watch)
        return Trained.from_dict(artifacts.read_json(folder / "trained.json"))

    def train_each(self, wishes: Sequence[Wish]) -> list[Trained]:
        """Fine-tune adapters that need nothing of each other, or find those that were: as :meth:`train` one by one.

        Raises:
            TrainingError: If one diverges, or did so before.
            ClusterError: If a worker is lost again and again.
        """
        errands = self.list_errands(wishes)
        if self.crew is not None and len(errands) > 1:
            self.crew.train(errands)
        return [self.train(wish.tasks, **wish.options) for wish in wishes]

    def list_errands(self, wishes: Sequence[Wish]) -> list[Errand]:
        """What of some wishes a crew is to do, each once; nothing without one. What diverged is left out."""
        settled = {self._name(wish): wish for wish in (w.settled(self.config.training) for w in wishes if self.crew)}
        return [
            Errand(self.folder, name, wish)
            for name, wish in settled.items()
            if not self._note_of(name).exists() and self._is_missing(self.folder / "adapters" / name)
        ]

    def keep(self, trained: Trained) -> Trained:
        """Write an adapter that is in the model under its name, made by other means than :meth:`train`."""
        with artifacts.atomic_folder(self.folder / "adapters" / trained.name) as scratch:
            save_adapter(self.probe, trained.name, scratch)
            artifacts.write_json(scratch / "trained.json", asdict(trained))
            artifacts.seal_folder(scratch)
        return trained

    def load(self, names: Sequence[str]) -> None:
        """Put adapters into the model, and take out others where they would become too many."""
        wanted = [name for name in dict.fromkeys(names) if name != THETA0]
        loaded = [name for name in self.probe.peft.peft_config if name.startswith("pool-")]
        others = [name for name in loaded if name not in wanted]
        for name in others[: max(0, len(others) + len(wanted) - _MOST_LOADED)]:
            remove_adapter(self.probe, name)
        for name in wanted:
            if name not in loaded:
                load_adapter(self.probe, name, self.folder / "adapters" / name)

    def score(self, names: Sequence[str], task: int, part: Part, *, run: Runner | None = None) -> MemberScores:
        """Score one task's rows with some adapters; what was scored before is read back.

        Args:
            names: Of the pool's adapters, or theta0.
            task: Its index.
            part: ``test`` only after :meth:`open_tests`.
            run: Scores those that were not scored before; none: the model with their adapters.

        Returns:
            Values ``(len(names), n_rows, K)``.

        Raises:
            TrainingError: If test rows are asked for while a method is still being settled.
        """
        if part == "test" and not self._are_tests_open:
            raise TrainingError("test rows asked for before the method was settled; this would be training on them")
        split = self.split(task, part)
        places = {name: self._place_of(name, task, part) for name in names}
        missing = [name for name, place in places.items() if not place.exists()]
        if missing:
            began = time.perf_counter()
            found = (run or self._run)(missing, split)
            seconds = np.array((time.perf_counter() - began) / len(missing))
            for name, values in zip(missing, found, strict=True):
                places[name].parent.mkdir(parents=True, exist_ok=True)
                artifacts.save_arrays(places[name], {"values": values, "seconds": seconds})
        values = np.stack([artifacts.load_arrays(places[name])["values"] for name in names])
        return arrange_scores(split, values)

    def is_scored(self, name: str, part: Part) -> bool:
        """Whether all tasks' rows were scored with an adapter before."""
        return all(self._place_of(name, task, part).exists() for task in self.everyone)

    def time_scoring(self, names: Sequence[str], task: int, part: Part) -> float:
        """Seconds that scoring one task's rows with some adapters took; whenever it was done."""
        kept = [artifacts.load_arrays(self._place_of(name, task, part)) for name in names]
        return float(sum(arrays.get("seconds", 0.0) for arrays in kept))

    def count_scoring(self, task: int, part: Part, n_adapters: int) -> int:
        """FLOPs of scoring one task's rows with some adapters together; the same whether they were scored or not."""
        cache = self.probe.prefix and self.probe.prefix.cache  # then the lower blocks ran once, for everything
        meter, split = Meter("count"), self.split(task, part)
        budget = choose_max_tokens(self.probe, self.config.evaluation.max_tokens_per_batch)
        costs, layout = self.probe.costs, self.probe.layout
        for batch in iterate_batches(split, budget, self.probe.base.pad_token_id, layout=layout):
            if cache is None:
                count_lower(meter, costs, batch)
            count_forward(meter, costs, batch, times=n_adapters)
        return meter.record.flops

    def recall(self, kind: str, inputs: object, compute: Callable[[], Any]) -> Any:
        """Carry out an expensive step once: what it gave lies in ``kept/`` as JSON, under its inputs' fingerprint.

        Args:
            kind: The step's name, which begins the file's.
            inputs: Everything the result depends on, beside the pool's own folder.
            compute: Gives plain values.

        Raises:
            StoreError: If what was kept is damaged.
        """
        path = self.folder / "kept" / f"{kind}-{artifacts.fingerprint(__version__, inputs)[:16]}.json"
        if not path.exists():
            artifacts.write_json(path, {"result": compute()})
        kept = artifacts.read_json(path)
        # Earlier versions kept the result alone.
        return kept["result"] if isinstance(kept, dict) and kept.keys() == {"result"} else kept

    def split(self, task: int, part: Part) -> EncodedSplit:
        """One task's rows."""
        splits: tuple[EncodedSplit, ...] = getattr(self.rows, part)
        return splits[task]

    @property
    def are_tests_open(self) -> bool:
        """Whether test rows may be scored."""
        return self._are_tests_open

    @contextmanager
    def open_tests(self) -> Iterator[None]:
        """Inside, test rows may be scored: everything else about a method is settled."""
        self._are_tests_open = True
        try:
            yield
        finally:
            self._are_tests_open = False

    @contextmanager
    def _remembering(self, name: str) -> Iterator[None]:
        """Let a training that diverges fail again at once when another method asks for it; its note says why."""
        note = self._note_of(name)
        if note.exists():
            raise TrainingError(f"{artifacts.read_json(note)['reason']} (so it was before; {note} remembers it)")
        try:
            yield
        except TrainingError as error:
            remove_adapter(self.probe, name)
            artifacts.write_json(note, {"reason": str(error)})
            raise

    def _name(self, wish: Wish) -> str:
        """An adapter's name: everything that it depends on."""
        chosen, judges = wish.tasks, wish.judges
        identity = artifacts.fingerprint(
            *(__version__, self.rows.learning_fingerprint(chosen), chosen, self.start_fingerprint, wish.settings),
            *(wish.copy, wish.start and wish.start.name, wish.weights),
            *(() if judges is None else (judges, self.rows.learning_fingerprint(judges))),
        )
        return f"pool-{identity[:16]}"

    def _note_of(self, name: str) -> Path:
        return self.folder / "failed" / f"{name}.json"

    def _is_missing(self, folder: Path) -> bool:
        """Whether an adapter has to be trained: it never was, or its files are no longer what they were."""
        fault = artifacts.find_seal_fault(folder, may_lack_seal=True)
        if fault and folder.exists():
            _logger.warning("adapter %s is trained again: %s", folder.name, fault)
            remove_adapter(self.probe, folder.name)
        return fault is not None

    def _place_of(self, name: str, task: int, part: Part) -> Path:
        home = self.base_folder if name == THETA0 else self.folder
        return home / "scores" / name / f"{part}-{task}.npz"

    def _run(self, names: list[str], split: EncodedSplit) -> np.ndarray:
        self.load(names)
        return predict_members(self.probe, split, names, max_tokens=self.config.evaluation.max_tokens_per_batch).values

    def _train(self, name: str, wish: Wish, watch: Watch | None) -> None:
        tasks, start, settings = wish.tasks, wish.start, wish.settings or self.config.training
        if start is not None:
            self.load([start.name])
        state = None if start is None else adapter_state(self.probe, start.name)
        judges = tasks if wish.judges is None else wish.judges
        train, validation = [self.split(i, "train") for i in tasks], [self.split(i, "validation") for i in judges]
        checkpoints, listed = self.folder / "checkpoints" / name, join_names([split.task for split in train])
        attempt = Attempt(checkpoints.with_name(f"{name}.begun.json"), name, Meter("train"))
        with attempt.measured():
            (trained,) = training.fine_tune_together(
                self.probe,
                [training.TrainingJob(name, train, validation, state, wish.weights, f"an adapter of {listed}")],
                settings,
                seed=seed_for(self.config.seed, "pool", str(wish.copy), *map(str, tasks)),
                checkpoints=checkpoints,
                meter=attempt.meter,
                keeps_last=True,
                callbacks=[] if watch is None else [_StepTeller(self.probe, name, watch)],
            )
        self.keep(Trained.of(name, tasks, trained, attempt.spent, adapter_bytes(self.probe, name)))
        attempt.forget()
        shutil.rmtree(checkpoints, ignore_errors=True)
        remove_adapter(self.probe, name)


class _StepTeller(TrainerCallback):
    """Tells a watch of every step of one adapter."""

    def __init__(self, probe: AdaptedModel, name: str, watch: Watch) -> None:
        self._read, self._watch = partial(adapter_state, probe, name), watch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell."""
        self._watch(int(state.global_step), int(state.max_steps), self._read)
