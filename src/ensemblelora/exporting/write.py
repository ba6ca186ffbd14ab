"""The files of an export, written whole once they are accepted, with what was measured in ``export.json``."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ensemblelora import __version__, artifacts, progress
from ensemblelora.adapters import THETA0, AdaptedModel, attach, save_adapter
from ensemblelora.data.encoding import EncodedSplit, encode_split
from ensemblelora.data.identity import fingerprint_split
from ensemblelora.data.loading import load_tasks
from ensemblelora.data.task import TaskSet
from ensemblelora.errors import DataError, UsageError
from ensemblelora.exporting.card import Origin, describe_member, read_origin, write_header, write_origin
from ensemblelora.exporting.fold import Fold, Judge, TaskChange, add_fold, fold_members, mean_rise, weigh_adapters
from ensemblelora.exporting.notes import ROUNDING, BaseNote, describe_fold, describe_members, describe_merged
from ensemblelora.exporting.request import PEFT_FILES, TOLERANCE, Format, Request, holding, read_request
from ensemblelora.members import load_members
from ensemblelora.models import BaseModel, Head, prepare_base
from ensemblelora.placement import refuse_waiting
from ensemblelora.quantization import dequantize_layers, find_packed_layers
from ensemblelora.startpoint import is_warm

__all__ = ["Export", "export_run"]

_FOLDED, _EXACT = "folded", "exact-stack"
_NO_RESIDUAL = 1e-6  # what float32 leaves of nothing
_RECORD_FILE, _NOTE_FILE = "export.json", "README.md"


@dataclass(frozen=True)
class Export:
    """What was written, and what was measured; ``peft`` changes nothing, so that nothing is measured there."""

    folder: Path
    format: Format
    files: tuple[str, ...]
    """in the folder"""
    task: str | None = None
    """whose weights were folded; none: the mean of all tasks'"""
    weights: Mapping[str, float] | None = None
    """what each adapter's change was multiplied with; theta0 carries what boosters are measured from"""
    rank: int | None = None
    exact_rank: int | None = None
    """at which nothing is cut away"""
    residual: float | None = None
    """Frobenius norm of what the truncation left out, over that of the exact stack"""
    residuals: Mapping[str, float] | None = None
    """the same by module"""
    averaged: tuple[str, ...] = ()
    """tensors that are weighted means, since they are no LoRA factors: a classifier head's"""
    tasks: tuple[TaskChange, ...] = ()
    nll_rise: float | None = None
    """mean over tasks, nats"""
    accuracy_change: float | None = None
    """mean over the tasks that have an accuracy"""
    tolerance: float | None = None


def export_run(
    folder: Path | str,
    out: Path | str | None = None,
    *,
    format: Format,
    task: str | None = None,
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    device: str | None = None,
    license: str | None = None,
) -> Export:
    """Write a finished run's ensemble as files that other software loads.

    Args:
        folder: The run folder; nothing but ``export/`` in it changes.
        out: A new or empty folder; none: ``export/FORMAT``, or ``export/FORMAT-TASK``, in the run folder.
        format: ``peft``: every member. ``folded``: one LoRA. ``merged``: the base weights with that LoRA inside.
        task: Fold this task's weights, judged by its rows alone; none: the mean of all tasks' weights, judged by all.
        rank: Largest rank of the fold. None: the run's own ``adapter.r``; for ``merged``, where a rank costs nothing,
            the exact stack's.
        tolerance: Largest rise of the mean validation loss, in nats.
        device: Where to measure; none: as the run's config says.
        license: What the adapters are published under, as hubs abbreviate it; none: the cards say it is not settled.

    Raises:
        UsageError: If the arguments contradict each other or the run, the base model is not the run's, or the
            fold hurts more than ``tolerance``.
        OutputError: If ``folder`` is no run, or ``out`` can't be written or holds something.
        DataError: If the rows are no longer those the run had.
        StoreError: If a file of the run is damaged.
    """
    request = read_request(folder, out, format=format, task=task, rank=rank, tolerance=tolerance, device=device)
    request = replace(request, license=license)
    with holding(request), progress.stage("export"):
        return _export_members(request) if format == "peft" else _export_fold(request)


def _export_members(request: Request) -> Export:
    ensemble, base, origin = request.ensemble, _describe_base(request), _read_origin(request)
    boosted = any(member.kind == "booster" for member in ensemble.members)
    # Boosters are measured from the start: a classifier head that is not in the base's files begins at random, and
    # after a warm-up every start is something that the base doesn't compute.
    start = THETA0 if boosted and (base.head != "lm" or is_warm(request.config)) else None
    with artifacts.atomic_folder(request.out) as scratch:
        for member in ensemble.members:
            (scratch / member.name).mkdir()
            for name in PEFT_FILES:
                shutil.copyfile(request.run.adapter(member.name) / name, scratch / member.name / name)
            artifacts.write_text(scratch / member.name / _NOTE_FILE, describe_member(base, origin, member.name))
        if start is not None:
            save_adapter(_load_model(request, base), start, scratch / start)
        shutil.copyfile(request.run.path / artifacts.ENSEMBLE_FILE, scratch / artifacts.ENSEMBLE_FILE)
        note = describe_members(base, ensemble, start, method=request.config.adapter.method)
        return _close(scratch, request, base, note)


def _export_fold(request: Request) -> Export:
    tasks, base = _load_rows(request), _describe_base(request)
    adapted = _load_model(request, base)
    config, ensemble = request.config, request.ensemble
    splits = _encode_rows(request, tasks, adapted.base)
    weights = weigh_adapters(ensemble, splits)
    usual = None if request.format == "merged" else config.adapter.r
    fold = fold_members(adapted, weights, config.adapter, request.rank or usual)
    judge = Judge.ask(adapted, ensemble, splits, max_tokens=config.evaluation.max_tokens_per_batch)
    add_fold(adapted, _FOLDED, fold.cut.state)
    changes, uncut = judge.measure(adapted, _FOLDED), None
    if mean_rise(changes) > request.tolerance:
        if fold.rank < fold.exact_rank:
            add_fold(adapted, _EXACT, fold_members(adapted, weights, config.adapter, None).cut.state)
            uncut = mean_rise(judge.measure(adapted, _EXACT))
        raise UsageError(_explain_refusal(request, changes, fold, uncut) + _explain_rounding(changes, fold, base))
    if request.format == "merged":
        return _write_merged(request, base, adapted, judge, fold)
    with artifacts.atomic_folder(request.out) as scratch:
        save_adapter(adapted, _FOLDED, scratch)
        note = describe_fold(base, weights, _tabulate(changes), len(fold.averaged))
        return _close(scratch, request, base, note, fold, changes)


def _write_merged(request: Request, base: BaseNote, adapted: AdaptedModel, judge: Judge, fold: Fold) -> Export:
    """Merge, measure what came out, and write it; the model's adapters are gone afterwards."""
    tokenizer, adapted = adapted.base.tokenizer, _make_mergeable(request, adapted, fold)
    adapted.peft.set_adapter(_FOLDED)  # the one whose classifier head stays
    network = adapted.peft.merge_and_unload(safe_merge=True, adapter_names=[_FOLDED])
    merged = prepare_base(base.name, network, tokenizer, head=base.head)
    probe = attach(merged, request.config.adapter, seed=request.config.seed)  # theta0 computes what its base does
    changes = judge.measure(probe, THETA0)
    if mean_rise(changes) > request.tolerance:
        raise UsageError(
            f"export refused: the fold itself is within the tolerance of {request.tolerance:g} nats, but rounded to "
            f"{base.dtype} weights it raises the mean validation loss by {mean_rise(changes):.3g}; give --format "
            f"folded, which keeps float32, or --tolerance {_round_up(mean_rise(changes))}"
        )
    with artifacts.atomic_folder(request.out) as scratch:
        probe.peft.unload().save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        note = describe_merged(base, fold.weights, _tabulate(changes), len(fold.averaged))
        return _close(scratch, request, base, note, fold, changes)


def _make_mergeable(request: Request, adapted: AdaptedModel, fold: Fold) -> AdaptedModel:
    """Unpack a base that is in 4 bits: what is merged into it would be lost in rounding."""
    base = adapted.base
    refuse_waiting(base.model, "--format merged")
    if not find_packed_layers(base.model):
        return adapted
    network = adapted.peft.unload()
    dequantize_layers(network)
    plain = prepare_base(base.name, network, base.tokenizer, head=base.head)
    unpacked = attach(plain, request.config.adapter, seed=request.config.seed)
    add_fold(unpacked, _FOLDED, fold.cut.state)
    return unpacked


def _load_model(request: Request, base: BaseNote) -> AdaptedModel:
    return load_members(request.run.path, request.config, request.ensemble, head=base.head, n_labels=base.n_labels)


def _load_rows(request: Request) -> TaskSet:
    """Load the run's tasks; they must have as many validation rows as they had."""
    commits = artifacts.pinned_commits(request.run.path)
    tasks = load_tasks(request.config.data, seed=request.config.seed, commits=commits)
    now = {task.name: len(task.splits["validation"]) for task in tasks.tasks}
    before = {entry["card"]["task"]: entry["n_examples"]["validation"] for entry in _read_tasks(request)}
    if list(now.items()) != list(before.items()):
        raise DataError(
            f"{request.run.path}: made with the validation rows {before}, and now there are {now}; "
            "give it its data back, or run again"
        )
    return tasks


def _encode_rows(request: Request, tasks: TaskSet, base: BaseModel) -> dict[int, EncodedSplit]:
    """Encode the rows that judge a fold, by their tasks' index; they must be those that the run learnt from."""
    entries, splits = _read_tasks(request), {}
    for i in request.indices:
        split = encode_split(tasks.tasks[i], "validation", base.tokenizer, max_length=request.config.data.max_length)
        if fingerprint_split(split) != entries[i].get("validation_fingerprint"):
            raise DataError(
                f"{request.run.path}: the validation rows of task {split.task!r} are not those it was made with; "
                "give it its data back, or run again"
            )
        splits[i] = split
    return splits


def _read_tasks(request: Request) -> list[dict[str, Any]]:
    return list(artifacts.read_json(request.run.path / artifacts.TASKS_FILE)["tasks"])


def _read_origin(request: Request) -> Origin:
    return read_origin(request.run.path, request.ensemble, request.config.adapter.method, request.license)


def _describe_base(request: Request) -> BaseNote:
    path = request.run.path
    cards = [entry["card"] for entry in _read_tasks(request)]
    made_with = artifacts.read_json(path / artifacts.ENVIRONMENT_FILE)["model"]
    head: Head = cards[0]["head"]
    settings = artifacts.read_json(request.run.adapter(request.ensemble.members[0].name) / PEFT_FILES[0])
    return BaseNote(
        name=request.config.model.name,
        location=settings["base_model_name_or_path"],
        dtype=made_with["dtype"],
        head=head,
        n_labels=max(len(card["doc_to_choice"] or ()) for card in cards),
        quantization=made_with.get("quantization"),
        is_packed_on_loading=request.config.model.quantization != "none",
    )


def _explain_refusal(request: Request, changes: Sequence[TaskChange], fold: Fold, uncut: float | None) -> str:
    """Say what was measured, what the exact stack would have cost, and the ways out."""
    rise, scope = mean_rise(changes), "all tasks" if request.task is None else f"task {request.task!r}"
    worst = max(changes, key=lambda change: change.nll_folded - change.nll_ensemble)
    ways = [f"--tolerance {_round_up(rise)}"]
    if len(request.indices) > 1:
        ways.insert(0, "--task NAME to fold for one task")
    said = (
        f"the exact stack, rank {fold.exact_rank}, raises it by {uncut:.3g}"
        if uncut is not None
        else "this is the exact stack, so that no rank would help"
    )
    if uncut is not None and uncut <= request.tolerance:
        ways.insert(0, f"--rank {fold.exact_rank}")
    most = f" (most: {worst.task!r}, {worst.nll_folded - worst.nll_ensemble:.3g})" if len(changes) > 1 else ""
    return (
        f"export refused: one adapter of rank {fold.rank} for {scope} raises the mean validation loss by {rise:.3g} "
        f"nats{most}, more than the tolerance of {request.tolerance:g}; {said}; give {', '.join(ways[:-1])}"
        f"{', or ' if len(ways) > 1 else ''}{ways[-1]}; format peft loses nothing"
    )


def _explain_rounding(changes: Sequence[TaskChange], fold: Fold, base: BaseNote) -> str:
    """Say that a small rise without a cut may be no change of the model at all."""
    if fold.cut.residual > _NO_RESIDUAL or mean_rise(changes) >= ROUNDING or base.dtype == "float32":
        return ""
    return (
        f"; nothing was cut away, and up to about {ROUNDING:g} may be rounding in {base.dtype}, "
        "whose scores depend on which rows share a batch"
    )


def _round_up(nats: float) -> str:
    return f"{math.ceil(nats * 100 + 1e-9) / 100:g}"


def _tabulate(changes: Sequence[TaskChange]) -> list[list[str]]:
    """Every task's loss and accuracy, a header first."""
    table = [["task", "rows", "ensemble loss", "loss here", "ensemble accuracy", "accuracy here"]]
    for change in changes:
        accuracies = (change.accuracy_ensemble, change.accuracy_folded)
        numbers = [f"{change.nll_ensemble:.4f}", f"{change.nll_folded:.4f}"]
        numbers += ["" if value is None else f"{value:.4f}" for value in accuracies]
        table.append([change.task, str(change.n_examples), *numbers])
    return table


def _close(
    scratch: Path,
    request: Request,
    base: BaseNote,
    note: str,
    fold: Fold | None = None,
    changes: tuple[TaskChange, ...] = (),
) -> Export:
    """Add README and record to the files of an export."""
    origin = _read_origin(request)
    header = write_header(base, origin, is_merged=request.format == "merged")
    artifacts.write_text(scratch / _NOTE_FILE, header + note + write_origin(base, origin, request.indices))
    named = {path.relative_to(scratch).as_posix() for path in scratch.rglob("*") if path.is_file()}
    record = Export(request.out, request.format, tuple(sorted(named | {_RECORD_FILE})), request.task)
    if fold is not None:
        gains = [
            change.accuracy_folded - change.accuracy_ensemble
            for change in changes
            if change.accuracy_folded is not None and change.accuracy_ensemble is not None
        ]
        record = replace(
            record,
            weights=fold.weights,
            rank=fold.rank,
            exact_rank=fold.exact_rank,
            residual=fold.cut.residual,
            residuals=fold.cut.residuals,
            averaged=fold.averaged,
            tasks=changes,
            nll_rise=mean_rise(changes),
            accuracy_change=float(np.mean(gains)) if gains else None,
            tolerance=request.tolerance,
        )
    made = {"package_version": __version__, "base": asdict(base), **asdict(record)}
    del made["folder"]  # where it lies now says nothing where it is moved to
    artifacts.write_json(scratch / _RECORD_FILE, made)
    return record
