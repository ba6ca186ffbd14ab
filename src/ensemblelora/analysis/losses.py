"""Losses row by row after fine-tuning subsets of tasks, under one base method: adapters, all weights, averages.

In: a pool, subsets of tasks. Out: for each part, every task's loss of every row. Validation rows are what the oracle
predicts on; test rows are scored when the training is settled, and nothing is chosen by them. Trainings that a
validated run kept are used instead of new ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ensemblelora import artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, adapter_state, add_adapter, load_adapter, remove_adapter
from ensemblelora.analysis.request import AnalysisRequest
from ensemblelora.comparison.candidate import Candidate
from ensemblelora.comparison.controls import attach_anew, average_factors
from ensemblelora.comparison.full import RATE_SHARE
from ensemblelora.comparison.pool import Part, Pool, Runner, Trained
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.identity import fingerprint_split
from ensemblelora.folding import stack_adapters
from ensemblelora.prediction import member_nll, predict_members
from ensemblelora.seeding import seed_for
from ensemblelora.training import TrainingJob
from ensemblelora.training.full import fine_tune_full, replaced_weights
from ensemblelora.validation.records import TrueRun, read_all_runs
from ensemblelora.validation.truth import plan_measurements
from ensemblelora.validation.validate import TRUTH_FILE, VALIDATION_FOLDER

__all__ = [
    "PARTS",
    "Losses",
    "average_exactly",
    "average_plainly",
    "find_kept",
    "score_adapter",
    "score_candidate",
    "train_all_weights",
]

Losses = Mapping[str, Mapping[str, Sequence[float]]]
"""part -> task's name -> loss of every row, nats"""

PARTS: tuple[Part, ...] = ("validation", "test")
"""whose rows are scored"""

_logger = logging.getLogger(__name__)

_DIGITS = 6
_AVERAGE = "average"
_KEPT = "kept"


def score_adapter(
    request: AnalysisRequest[Any], pool: Pool, name: str, tasks: Sequence[int], *, run: Runner | None = None
) -> Losses:
    """Score an adapter of the pool on the rows of some tasks.

    Args:
        request: Journals the losses.
        pool: Has the adapter, or knows the name that ``run`` goes by.
        name: The adapter's; theta0 is the base model.
        tasks: Whose rows.
        run: Scores rows in the adapter's stead.
    """

    def compute(meter: Meter) -> Losses:
        return _score(pool, name, tasks, run, meter)

    start = pool.start_fingerprint if name == THETA0 else None
    return request.measure("losses", (name, start, _identify(pool, tasks)), compute)  # type: ignore[no-any-return]  # plain


def score_candidate(pool: Pool, candidate: Candidate) -> Losses:
    """Score what a method of a comparison made, on all tasks' rows; the pool keeps its adapters' scores."""
    found: dict[str, dict[str, list[float]]] = {}
    for part in PARTS:
        with pool.open_tests():
            scores = candidate.predict(part)
        found[part] = {
            one.task: _round(member_nll(one, pool.split(task, part).labels)[0]) for task, one in enumerate(scores)
        }
    return found


def train_all_weights(request: AnalysisRequest[Any], pool: Pool, tasks: Sequence[int]) -> tuple[Losses, float]:
    """Fine-tune all weights of the model on some tasks and score them; the weights are not kept.

    Returns:
        The losses, and the FLOPs of the training.

    Raises:
        ModelError: If the base is quantised.
    """
    chosen = tuple(sorted(tasks))
    rate = RATE_SHARE * pool.config.training.learning_rate
    settings = pool.config.training.model_copy(update={"learning_rate": rate})
    rows = pool.rows.learning_fingerprint(chosen)
    identity = artifacts.fingerprint("all weights", rows, pool.probe.base.fingerprint, settings, pool.config.seed)
    name = f"weights-{identity[:16]}"

    def compute(meter: Meter) -> dict[str, Any]:
        train, validation = ([pool.split(i, part) for i in chosen] for part in ("train", "validation"))
        _, weights = fine_tune_full(
            pool.probe,
            TrainingJob(name, train, validation),
            settings,
            seed=seed_for(pool.config.seed, "full"),
            folder=pool.folder / "checkpoints" / name,
            meter=meter,
        )
        flops = meter.record.flops
        with replaced_weights(pool.probe, weights) as bare:

            def run(names: list[str], split: EncodedSplit) -> npt.NDArray[np.float32]:
                return predict_members(bare, split, [THETA0], max_tokens=_tokens(pool)).values

            return {"losses": _score(pool, name, chosen, run, meter), "flops": flops}

    found = request.measure("all weights", (name, _identify(pool, chosen)), compute)
    return found["losses"], found["flops"]


def average_plainly(request: AnalysisRequest[Any], pool: Pool, parts: Sequence[Trained]) -> Losses:
    """Average adapters' tensors, each by itself, and score the result on their tasks' rows.

    Reference:
        Paper, appendix B.6: averaging the weights of two adapters, each trained on a single task.
    """
    tasks = sorted({task for one in parts for task in one.tasks})
    name = f"{_AVERAGE}-{artifacts.fingerprint([one.name for one in parts])[:16]}"

    def run(names: list[str], split: EncodedSplit) -> npt.NDArray[np.float32]:
        pool.load([one.name for one in parts])
        state = average_factors([adapter_state(pool.probe, one.name) for one in parts])
        with _held(pool, state):
            return predict_members(pool.probe, split, [_AVERAGE], max_tokens=_tokens(pool)).values

    return score_adapter(request, pool, name, tasks, run=run)


def average_exactly(request: AnalysisRequest[Any], pool: Pool, pairs: Sequence[Sequence[Trained]]) -> list[Losses]:
    """Average what LoRA adapters do to the weights, ``B A``, in a second model of as much more rank as that takes.

    Args:
        request: Journals the losses.
        pool: Has the adapters.
        pairs: Adapters to average, as many in each.

    Returns:
        Losses on the rows of each pair's tasks.
    """
    adapter, scale = pool.config.adapter, pool.config.adapter.lora_alpha / pool.config.adapter.r
    r = adapter.r * max(len(pair) for pair in pairs)
    wide = adapter.model_copy(update={"r": r, "lora_alpha": float(r)})  # of scale 1, as a stack is
    found, opened = [], list[Pool]()
    with ExitStack() as stack:
        for pair in pairs:
            tasks = sorted({task for one in pair for task in one.tasks})
            name = f"{_AVERAGE}-exact-{artifacts.fingerprint([one.name for one in pair])[:16]}"

            def run(names: list[str], split: EncodedSplit, pair: Sequence[Trained] = pair) -> npt.NDArray[np.float32]:
                if not opened:  # dear, and not needed where everything was scored before
                    opened.append(stack.enter_context(attach_anew(pool, wide, f"exact-{r}")))
                pool.load([one.name for one in pair])
                states = [adapter_state(pool.probe, one.name) for one in pair]
                stacked = _widen(stack_adapters(states, [1 / len(pair)] * len(pair), scale), r)
                with _held(opened[0], stacked):
                    return predict_members(opened[0].probe, split, [_AVERAGE], max_tokens=_tokens(pool)).values

            found.append(score_adapter(request, pool, name, tasks, run=run))
    return found


def find_kept(
    request: AnalysisRequest[Any], pool: Pool, subsets: Sequence[tuple[int, ...]], n_seeds: int
) -> dict[tuple[tuple[int, ...], int], Losses]:
    """Score the adapters of subsets that the run which was named has truly fine-tuned before, with the same settings.

    Args:
        request: Its ``run`` may be none, which has none.
        pool: Of the run's own seed and variant.
        subsets: Sorted tuples of tasks.
        n_seeds: Orders of rows that are looked for.

    Returns:
        By subset and order of rows.
    """
    if request.run is None:
        return {}
    place = request.run / VALIDATION_FOLDER
    wanted = plan_measurements(subsets, n_seeds, pool.rows, pool.start_fingerprint, pool.config)
    found: dict[tuple[tuple[int, ...], int], Losses] = {}
    for run in read_all_runs(place / TRUTH_FILE):
        folder = place / "adapters" / run.identity[:16]
        if run.identity in wanted and folder.is_dir():
            if fault := artifacts.find_seal_fault(folder, may_lack_seal=True):
                _logger.warning("%s; it is trained again", fault)
                continue
            subset, order = wanted[run.identity]
            request.charge_stage(run.identity, flops=run.flops, seconds=run.seconds)
            found[subset, order] = _score_kept(request, pool, run, subset, folder)
    return found


def _score_kept(request: AnalysisRequest[Any], pool: Pool, run: TrueRun, subset: Sequence[int], folder: Path) -> Losses:
    def score(names: list[str], split: EncodedSplit) -> npt.NDArray[np.float32]:
        try:
            load_adapter(pool.probe, _KEPT, folder)
            return predict_members(pool.probe, split, [_KEPT], max_tokens=_tokens(pool)).values
        finally:
            remove_adapter(pool.probe, _KEPT)

    return score_adapter(request, pool, f"{_KEPT}-{run.identity[:16]}", subset, run=score)


def _score(pool: Pool, name: str, tasks: Sequence[int], run: Runner | None, meter: Meter) -> Losses:
    found: dict[str, dict[str, list[float]]] = {}
    for part in PARTS:
        found[part] = {}
        for task in tasks:
            with pool.open_tests():  # nothing is chosen any more
                scores = pool.score([name], task, part, run=run)
            meter.add_flops(pool.count_scoring(task, part, 1))
            split = pool.split(task, part)
            found[part][split.task] = _round(member_nll(scores, split.labels)[0])
    return found


def _round(rows: npt.NDArray[np.float64]) -> list[float]:
    return [round(float(value), _DIGITS) for value in rows]


def _identify(pool: Pool, tasks: Sequence[int]) -> list[str]:
    return [fingerprint_split(pool.split(task, part)) for part in PARTS for task in tasks]


def _tokens(pool: Pool) -> Any:
    return pool.config.evaluation.max_tokens_per_batch


@contextmanager
def _held(pool: Pool, state: dict[str, Tensor]) -> Iterator[None]:
    """Let the model have an adapter of some tensors meanwhile."""
    try:
        add_adapter(pool.probe, _AVERAGE, state)
        yield
    finally:
        remove_adapter(pool.probe, _AVERAGE)


def _widen(state: dict[str, Tensor], r: int) -> dict[str, Tensor]:
    """Fill a LoRA adapter's factors up with zeros to a rank."""
    wide = {}
    for key, tensor in state.items():
        missing = [0, 0, 0, r - len(tensor)] if key.endswith("lora_A.weight") else None
        missing = [0, r - tensor.shape[1], 0, 0] if key.endswith("lora_B.weight") else missing
        wide[key] = tensor if missing is None else torch.nn.functional.pad(tensor, missing)
    return wide
