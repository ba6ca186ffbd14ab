"""The study around the methods: equal rows, seeds and learning rates, and test rows when a method is settled.

In: a config and names of methods. Out: :class:`Study`, and in its folder ``study.json``, ``records/`` and, for each
seed, ``seed-S/``. Rows are chosen once (``data.seed``); seeds change where training starts and the order of the rows.
Every trained method has the same grid of learning rates and the same rule: the one with the least mean validation
loss on the first seed is used for all seeds. What the others cost is kept apart.

Stopped at any moment, the same call goes on: a method's trainings are kept one by one, its record is written last. A
method that fails is said and left out. Cost: the methods' own; what several share is computed once and charged to each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ensemblelora import __version__, artifacts, progress
from ensemblelora.comparison.bench import Bench
from ensemblelora.comparison.candidate import Candidate, Costs
from ensemblelora.comparison.methods import METHODS, Method
from ensemblelora.comparison.pool import Part, Pool
from ensemblelora.comparison.pooled import list_draws
from ensemblelora.comparison.record import (
    STUDY_FILE,
    MethodRecord,
    Primary,
    RateTrial,
    StudyHead,
    StudyRecord,
    identify_record,
    place_record,
    read_head,
    read_record,
    read_study,
    write_head,
    write_record,
)
from ensemblelora.comparison.request import Request, check_request, hold_folder, keep_config
from ensemblelora.config import RunConfig
from ensemblelora.errors import EnsembleLoraError, TrainingError, UsageError, first_line
from ensemblelora.evaluation.metrics import compute_chance_p_value, compute_row_correct
from ensemblelora.prediction import MemberScores, member_nll
from ensemblelora.scheduling import Cluster, Scheduler, open_scheduler

__all__ = ["Study", "compare"]

_DIGITS = 5  # of a row's loss; a difference of means is far above

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Study:
    """A comparison that was carried out: all of its records, and why methods failed this time, by name."""

    record: StudyRecord
    failures: Mapping[str, str]


def compare(
    config: RunConfig,
    methods: Sequence[str],
    n_seeds: int,
    learning_rates: Sequence[float],
    out: Path | str,
    *,
    primary: Sequence[tuple[str, str]] | None = None,
    cluster: Cluster | None = None,
) -> Study:
    """Carry out a comparison, or go on with one.

    More methods or seeds only add to what is there. Other learning rates settle methods again, on the trainings that
    there are.

    Args:
        config: Rows, model, adapter and budget; the same for all methods.
        methods: Names, or ``all`` or ``core``.
        n_seeds: ``config.seed`` and those that follow.
        learning_rates: Tried for every trained method on the first seed; empty: the config's own.
        out: The comparison's folder.
        primary: Pairs of methods whose comparison is the study's purpose; none: ours against every rival.
        cluster: Where fine-tunings run side by side that need nothing of each other; none: in this process.

    Raises:
        UsageError: If a name or number is wrong, or the folder holds a comparison of another config, rows or model.
        OutputError: If the folder can't be written, is something else, or is in use.
    """
    request = check_request(config, methods, n_seeds, learning_rates, out, primary)
    failures: dict[str, str] = {}
    with hold_folder(request), progress.stage("compare"):
        known = read_head(request.folder) if (request.folder / STUDY_FILE).exists() else None
        if known is None or _list_missing(request, known.identity):
            with open_scheduler(cluster) as scheduler:
                failures = _measure_missing(request, known, scheduler)
        else:
            write_head(request.folder, _join_heads(request, known, known, failures))
        asked = {method.name for method in request.methods}
        if earlier := [name for name in (known.methods if known else ()) if name not in asked]:
            progress.note(f"the folder has {', '.join(earlier)} from earlier, too; all are shown and corrected for")
    return Study(read_study(request.folder), failures)


def _measure_missing(request: Request, known: StudyHead | None, scheduler: Scheduler) -> dict[str, str]:
    """Load rows and model, carry out what has no record yet, and return why some of it could not be."""
    bench = Bench(request.config, request.folder, scheduler=scheduler)
    identity = artifacts.fingerprint(__version__, request.config.model_copy(update={"out": ""}), bench.identity)
    if known is not None and known.identity != identity:
        raise UsageError(
            f"{request.folder}: compared with other rows, another model or another version; choose another folder"
        )
    keep_config(request)
    bench.describe()
    fresh = StudyHead(
        identity=identity,
        tasks=bench.describe_tasks(),
        methods=(),
        seeds=(),
        learning_rates=(),
        primary=(),
        failures={},
        lower=bench.fill_lower_layers(),
    )
    head = _join_heads(request, known, fresh, {})
    write_head(request.folder, head)
    failures = _measure_all(request, head, bench)
    write_head(request.folder, _join_heads(request, head, head, failures))
    bench.close()
    return failures


def _join_heads(request: Request, known: StudyHead | None, fresh: StudyHead, failures: Mapping[str, str]) -> StudyHead:
    """Add what is asked for now to what was asked for before."""
    before, asked = known or fresh, [method.name for method in request.methods]

    def is_tested(name: str) -> bool:
        seeds, draws = (*before.seeds, *request.seeds), list_draws(name, METHODS)
        return any(place_record(request.folder, draw, seed).exists() for draw in draws for seed in seeds)

    pairs = {(pair.a, pair.b): pair for pair in before.primary}
    for a, b in request.primary:
        pairs.setdefault((a, b), Primary(a, b, is_late=is_tested(a) and is_tested(b)))
    return replace(
        fresh,
        methods=tuple(name for name in METHODS if name in {*asked, *before.methods}),
        seeds=tuple(sorted({*before.seeds, *request.seeds})),
        learning_rates=request.learning_rates,
        primary=tuple(pairs.values()),
        failures={name: why for name, why in before.failures.items() if name not in asked} | dict(failures),
        lower={key: max(fresh.lower[key], before.lower[key]) for key in fresh.lower},
    )


def _list_missing(request: Request, study: str) -> list[tuple[Method, int]]:
    """Methods and seeds without a record, seed by seed."""
    pairs = [(method, seed) for seed in request.seeds for method in request.methods]
    return [(method, seed) for method, seed in pairs if _read(request, study, method.name, seed) is None]


def _read(request: Request, study: str, method: str, seed: int) -> MethodRecord | None:
    identity = identify_record(study, method, seed, request.learning_rates)
    return read_record(request.folder, method, seed, identity)


def _measure_all(request: Request, head: StudyHead, bench: Bench) -> dict[str, str]:
    """Carry out every method on every seed; return why some could not be."""
    missing, failures = _list_missing(request, head.identity), dict[str, str]()
    n_asked = len(request.methods) * len(request.seeds)
    if len(missing) < n_asked:
        progress.note(f"{n_asked - len(missing)} of {n_asked} were measured before")
    for method, seed in progress.track(missing, "methods and seeds"):
        if method.name in failures:
            continue
        try:
            with progress.stage(f"{method.name}, seed {seed}"):
                write_record(request.folder, _measure_one(request, head, bench, method, seed))
        except Exception as error:  # whatever it is, hours of other methods are not to be lost by it
            failures[method.name] = f"seed {seed}: {_describe(error)}"
            _logger.error("%s failed, %s; the others go on", method.name, failures[method.name])
            _logger.debug("where %s failed", method.name, exc_info=True)
            if not isinstance(error, UsageError):  # what can't be asked for is refused before the model is touched
                bench.reload()
    return failures


def _describe(error: Exception) -> str:
    return first_line(error) if isinstance(error, EnsembleLoraError) else f"{type(error).__name__}: {first_line(error)}"


def _measure_one(request: Request, head: StudyHead, bench: Bench, method: Method, seed: int) -> MethodRecord:
    """Settle a method on a seed, then test it."""
    rates = request.learning_rates if method.is_trained else (request.config.training.learning_rate,)
    first = _read(request, head.identity, method.name, request.seeds[0])
    if first is not None and first.learning_rate is not None:
        rates = (first.learning_rate,)
    bench.train_ahead(seed, rates, method.work)
    trials, candidate, pool = _choose_rate(method, rates, lambda rate: bench.open_pool(seed, rate))
    chosen = min(trials, key=lambda trial: trial.validation_nll)
    nll, correct = _test(candidate, pool)
    return MethodRecord(
        identity=identify_record(head.identity, method.name, seed, request.learning_rates),
        method=method.name,
        title=method.title,
        seed=seed,
        learning_rate=chosen.learning_rate if method.is_trained else None,
        trials=trials if first is None and method.is_trained else (),
        validation_nll=chosen.validation_nll,
        costs=asdict(_charge_lower(candidate.costs, method, head.lower)),
        groups=_name_groups(candidate, pool),
        notes=candidate.notes,
        nll=nll,
        correct=correct,
        chance=_measure_chance(candidate.predict("validation"), pool),
        is_rate_at_edge=_is_at_edge(chosen.learning_rate, request.learning_rates) and method.is_trained,
    )


def _is_at_edge(rate: float, tried: Sequence[float]) -> bool:
    """Whether a rate beyond those that were tried might be better; of one that alone was tried nothing is known."""
    return len(tried) > 1 and rate in (min(tried), max(tried))


def _name_groups(candidate: Candidate, pool: Pool) -> tuple[tuple[str, ...], ...] | None:
    if candidate.groups is None:
        return None
    return tuple(tuple(pool.rows.names[task] for task in group) for group in candidate.groups)


def _choose_rate(
    method: Method, rates: Sequence[float], open_pool: Callable[[float], Pool]
) -> tuple[tuple[RateTrial, ...], Candidate, Pool]:
    """Settle a method at every rate; give what came out, and the candidate of least validation loss with its pool."""
    found: list[tuple[RateTrial, Candidate, Pool]] = []
    failure: TrainingError | None = None
    for rate in rates:
        pool = open_pool(rate)
        try:
            candidate = method.run(pool)
            losses = _compute_losses(candidate.predict("validation"), pool, "validation")
        except TrainingError as error:  # one rate that diverges leaves the others
            progress.note(f"{method.name} at a learning rate of {rate:g}: {first_line(error)}")
            failure = error
            continue
        costs, nll = candidate.costs, float(np.mean([values.mean() for values in losses]))
        trial = RateTrial(rate, nll, costs.train_flops, costs.select_flops, costs.seconds)
        found.append((trial, candidate, pool))
    if failure is not None and not found:
        raise failure
    _, candidate, pool = min(found, key=lambda entry: entry[0].validation_nll)
    return tuple(trial for trial, *_ in found), candidate, pool


def _test(candidate: Candidate, pool: Pool) -> tuple[dict[str, tuple[float, ...]], dict[str, tuple[int, ...] | None]]:
    """Loss and answer of every test row, by task: the first time that this method meets them."""
    with pool.open_tests():
        found = candidate.predict("test")
    nll: dict[str, tuple[float, ...]] = {}
    correct: dict[str, tuple[int, ...] | None] = {}
    for scores, values, split in zip(found, _compute_losses(found, pool, "test"), pool.rows.test, strict=True):
        nll[split.task] = tuple(round(float(value), _DIGITS) for value in values)
        correct[split.task] = None
        if split.kind != "sequence":
            right = compute_row_correct(scores.values[0], split.labels, split.n_choices)
            correct[split.task] = tuple(int(one) for one in right)
    return nll, correct


def _measure_chance(found: Sequence[MemberScores], pool: Pool) -> dict[str, float | None]:
    """P-value of being right on validation rows no more often than the most frequent answer is; none for free text."""
    return {
        split.task: None
        if split.kind == "sequence"
        else compute_chance_p_value(
            compute_row_correct(scores.values[0], split.labels, split.n_choices), split.labels, split.groups
        )
        for scores, split in zip(found, pool.rows.validation, strict=True)
    }


def _compute_losses(found: Sequence[MemberScores], pool: Pool, part: Part) -> list[npt.NDArray[np.float64]]:
    """Loss of every row, a task each.

    Raises:
        TrainingError: If one is not finite.
    """
    losses = []
    for task, scores in enumerate(found):
        with np.errstate(invalid="ignore"):  # what is not finite is said in words
            values = member_nll(scores, pool.split(task, part).labels)[0]
        if not np.isfinite(values).all():
            raise TrainingError(f"a {part} loss of task {pool.rows.names[task]!r} is not finite: the model diverged")
        losses.append(values)
    return losses


def _charge_lower(costs: Costs, method: Method, lower: Mapping[str, float]) -> Costs:
    """Add the pass through the layers below the adapted ones, which each method would make if it were alone."""
    if method.is_whole or not (costs.train_flops or costs.select_flops):
        return costs
    flops, seconds = costs.train_flops + int(lower["flops"]), costs.seconds + lower["seconds"]
    return replace(costs, train_flops=flops, seconds=seconds)
