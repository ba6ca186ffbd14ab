"""The stages that judge: the baseline, and the final table on the test rows.

In: the ensemble and the test splits, which nothing before has read. Out: ``results.json``, ``costs.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora import artifacts, progress
from ensemblelora.accounting.meter import Meter, MethodCosts
from ensemblelora.adapters import THETA0, AdaptedModel, adapter_bytes, load_adapter, measure_distance
from ensemblelora.config import MaxTokens
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.identity import fingerprint_split
from ensemblelora.ensemble import Ensemble, Member, combined_scores, needed_adapters, sum_groups
from ensemblelora.evaluation.evaluate import collect_rows, compare_methods
from ensemblelora.evaluation.linearity import measure_linearity
from ensemblelora.evaluation.rows import BOOSTED_GROUP, OWN_GROUP, TaskRows, save_rows
from ensemblelora.generation import generate_answers, matches_exactly
from ensemblelora.gradients.output import choose_modes
from ensemblelora.planning import Plan
from ensemblelora.prediction import MemberScores
from ensemblelora.stages import Rows, finish_whole, score_members, train_adapter
from ensemblelora.stages.fine_tuning import SHARED, drop_checkpoints
from ensemblelora.workspace import Workspace

__all__ = ["LINEARITY_ROWS", "evaluate_methods", "train_baselines"]

LINEARITY_ROWS = 24
"""validation rows of a task by which an adapter's linearity is measured; a gradient pass each"""

_Score = Callable[[EncodedSplit, Sequence[str]], MemberScores]
Mixture = tuple[tuple[str, ...], tuple[float, ...]]
"""adapters, and their shares"""


def train_baselines(work: Workspace, probe: AdaptedModel, plan: Plan, rows: Rows) -> str | None:
    """Fine-tune one adapter for all tasks, at the same number of epochs.

    Where the plan is one adapter for all, that adapter is the baseline.

    Returns:
        Its name; none if the config asks for no such baseline.
    """
    is_wanted = SHARED in work.config.evaluation.baselines
    if not is_wanted or len(plan.groups) == 1:
        work.drop_costs("baselines")
        progress.skip("baselines", "not needed, since the plan is one adapter for all")
        return "group-0" if is_wanted else None
    everyone = range(len(rows.names))
    with work.stage("baselines", rows.learning_fingerprint(), work.start_fingerprint, work.config.training) as stage:
        if stage.is_needed:
            if work.is_spread:
                finish_whole(work, probe, rows, stage.meter)
            train_adapter(work, probe, SHARED, everyone, rows, stage, is_whole=True)
    load_adapter(probe, SHARED, work.folder.adapter(SHARED))
    return SHARED


def evaluate_methods(
    work: Workspace,
    probe: AdaptedModel,
    ensemble: Ensemble,
    shared: str | None,
    plan: Plan,
    rows: Rows,
    *,
    earlier: Sequence[Path] = (),
) -> dict[str, Any]:
    """Score base model, one adapter for all, and the ensemble on the test rows.

    Leaves ``results.json``, and in ``test_rows.npz`` what each row gave, by which two runs can be compared.
    The test rows are read here for the first time. Each task by its own group's adapter alone, which the plan
    predicted, and with the group's boosters cost no further pass, so they stand in the table too. Scores of the same
    adapters and rows are taken over from the run folders ``earlier``.
    """
    config, path = work.config, work.path / artifacts.RESULTS_FILE
    drop_checkpoints(work.path)  # every training is over; a kill may have left one whose adapter is there
    adapters = {name: work.adapter_digest(name) for name in _list_adapters(ensemble, shared)}
    tests = [fingerprint_split(split) for split in rows.test]
    inputs = (rows.learning_fingerprint(), work.start_fingerprint, asdict(ensemble), adapters, shared, tests)
    with work.stage("evaluate", *inputs, plan.predicted, config.evaluation, config.gradients) as stage:
        if stage.is_needed:
            score = partial(_score_split, work, probe, adapters, earlier, stage.meter)
            table, kept = _score_tests(work, probe, ensemble, shared, rows, score, stage.meter)
            table["linearity"] = _measure_health(work, probe, ensemble, shared, rows, stage.meter)
            table["predicted_vs_measured"] = _compare_with_plan(work, plan, ensemble, table)
            artifacts.write_json(path, table)
            save_rows(work.path / artifacts.TEST_ROWS_FILE, kept)
            stage.files += [path, work.path / artifacts.TEST_ROWS_FILE]
            _enter_costs(work, probe, ensemble, shared, rows)
    return dict(artifacts.read_json(path))


def _list_adapters(ensemble: Ensemble, shared: str | None) -> list[str]:
    names = (*(member.name for member in ensemble.members), shared)
    return [name for name in dict.fromkeys(names) if name is not None]


@dataclass(frozen=True, eq=False)
class _TaskTable:
    """Every method on one task's test rows."""

    scores: Mapping[str, npt.NDArray[np.float64]]
    exact: Mapping[str, npt.NDArray[np.bool_]]
    """free text only"""
    layout: MemberScores


def _score_tests(
    work: Workspace,
    probe: AdaptedModel,
    ensemble: Ensemble,
    shared: str | None,
    rows: Rows,
    score: _Score,
    meter: Meter,
) -> tuple[dict[str, Any], dict[str, TaskRows]]:
    """Return the table, and what it is made of row by row."""
    config = work.config.evaluation
    plain: dict[str, str | None] = {"base": probe.origin, SHARED: shared}
    baselines = {str(method): name for method in config.baselines if (name := plain[method]) is not None}
    tables = [
        _score_task(probe, ensemble, task, split, baselines, score, config.max_tokens_per_batch, meter)
        for task, split in enumerate(rows.test)
    ]
    methods = list(tables[0].scores)
    scores = {method: [table.scores[method] for table in tables] for method in methods}
    layouts = [table.layout for table in tables]
    exact = {m: {i: table.exact[m] for i, table in enumerate(tables) if m in table.exact} for m in methods}
    found = compare_methods(scores, layouts, rows.test, config, seed=work.config.seed, exact=exact)
    return found, collect_rows(scores, layouts, rows.test, exact)


def _score_split(
    work: Workspace,
    probe: AdaptedModel,
    digests: Mapping[str, str],
    earlier: Sequence[Path],
    meter: Meter,
    split: EncodedSplit,
    names: Sequence[str],
) -> MemberScores:
    """Run each adapter over a split's rows, and keep what it scored."""
    start, tokens = work.start_fingerprint, work.config.evaluation.max_tokens_per_batch
    known = {probe.origin: f"{start} {probe.origin}", THETA0: start, **digests}
    return score_members(work.path, probe, split, names, known, earlier=earlier, max_tokens=tokens, meter=meter)


def _score_task(
    probe: AdaptedModel,
    ensemble: Ensemble,
    task: int,
    split: EncodedSplit,
    baselines: Mapping[str, str],
    score: _Score,
    max_tokens: MaxTokens,
    meter: Meter,
) -> _TaskTable:
    """Score every method on one task, running each adapter once and only where a method needs it."""
    own, weights = ensemble.group_of[task], np.asarray(ensemble.weights[task])
    groups = sorted({own, *np.flatnonzero(weights).tolist()})
    names = list(dict.fromkeys([*baselines.values(), *needed_adapters(ensemble.members, groups, split.kind)]))
    found = score(split, names)
    grouped = sum_groups(found, names, ensemble.members, groups)
    scores = {method: found.values[names.index(name)].astype(np.float64) for method, name in baselines.items()}
    scores[OWN_GROUP] = found.values[names.index(ensemble.members_of(own)[0].name)].astype(np.float64)
    if ensemble.is_boosted:
        scores[BOOSTED_GROUP] = grouped.values[groups.index(own)].astype(np.float64)
    scores["ensemble"] = combined_scores(grouped, weights[groups].tolist(), ensemble.combine)
    exact: dict[str, npt.NDArray[np.bool_]] = {}
    if split.kind == "sequence":
        exact = _match_answers(probe, split, _list_mixtures(ensemble, task, baselines), max_tokens, meter)
    return _TaskTable(scores, exact, replace(found, values=found.values[:0]))


def _match_answers(
    probe: AdaptedModel, split: EncodedSplit, mixtures: Mapping[str, Mixture], max_tokens: MaxTokens, meter: Meter
) -> dict[str, npt.NDArray[np.bool_]]:
    """Generate every method's free-text answers, equal mixtures once."""
    matches: dict[Mixture, npt.NDArray[np.bool_]] = {}
    for members, weights in mixtures.values():
        if (members, weights) not in matches:
            answers = generate_answers(probe, split, members, weights, max_tokens=max_tokens, meter=meter)
            matches[members, weights] = matches_exactly(probe, split, answers)
    return {method: matches[mixture] for method, mixture in mixtures.items()}


def _list_mixtures(ensemble: Ensemble, task: int, baselines: Mapping[str, str]) -> dict[str, Mixture]:
    """Which adapters, with which shares, write each method's free-text answers."""
    names = [ensemble.members_of(g)[0].name for g in range(len(ensemble.groups))]
    used = [(names[g], weight) for g, weight in enumerate(ensemble.weights[task]) if weight > 0]
    own: Mixture = ((names[ensemble.group_of[task]],), (1.0,))  # free text is written without boosters
    return {
        **{method: ((name,), (1.0,)) for method, name in baselines.items()},
        **dict.fromkeys((OWN_GROUP, BOOSTED_GROUP) if ensemble.is_boosted else (OWN_GROUP,), own),
        "ensemble": (tuple(name for name, _ in used), tuple(weight for _, weight in used)),
    }


def _measure_health(
    work: Workspace, probe: AdaptedModel, ensemble: Ensemble, shared: str | None, rows: Rows, meter: Meter
) -> dict[str, Any]:
    """How far every adapter moved, and how linear its outputs are, on validation rows."""
    own = [ensemble.members_of(g)[0].name for g in ensemble.group_of]
    gradients = work.config.gradients
    found = measure_linearity(
        probe,
        rows.validation,
        own,
        choose_modes(rows.learning, gradients.output),
        max_rows=LINEARITY_ROWS,
        max_tokens=gradients.max_tokens_per_batch,
        meter=meter,
    )
    return {
        "tasks": {name: asdict(entry) for name, entry in zip(rows.names, found, strict=True)},
        "distances": {
            name: measure_distance(probe, name, start=probe.origin if name == SHARED else THETA0)
            for name in _list_adapters(ensemble, shared)
        },
    }


def _compare_with_plan(
    work: Workspace, plan: Plan, ensemble: Ensemble, table: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The plan's predictions beside what its adapters gave alone: on the validation rows it spoke of, and on test rows.

    No plan predicts boosters or weights. ``base_nll`` is of the validation rows, as what is predicted;
    ``measured_base_nll`` of the test rows, as what is measured, and None where no base model was asked for.
    """
    base = table["methods"].get("base")
    measured = artifacts.read_json(work.path / artifacts.ENSEMBLE_FILE)["own_validation_nll"]
    return [
        {
            "task": name,
            "group": ensemble.group_of[task],
            "predicted_nll": plan.predicted.plan.nll[task],
            "predicted_nll_se": plan.predicted.plan.nll_se[task],
            "measured_nll": table["methods"][OWN_GROUP]["per_task"][name]["nll"],
            "measured_validation_nll": measured[task],
            "base_nll": plan.predicted.base.nll[task],
            "measured_base_nll": base and base["per_task"][name]["nll"],
        }
        for task, name in enumerate(ensemble.task_names)
    ]


def _enter_costs(work: Workspace, probe: AdaptedModel, ensemble: Ensemble, shared: str | None, rows: Rows) -> None:
    """What every method costs to choose, train and use; choosing is the same for all that have the plan's groups."""
    one, chosen = adapter_bytes(probe), work.flops_of("features", "affinity", "group")
    own: list[tuple[int, ...]] = [(group,) for group in ensemble.group_of]
    used: list[tuple[int, ...]] = [tuple(np.flatnonzero(row).tolist()) for row in ensemble.weights]
    by_method = {"base": MethodCosts()} if "base" in work.config.evaluation.baselines else {}
    if shared is not None:
        taken = ("baselines",) if shared == SHARED else ("warmup", "train")
        by_method[SHARED] = MethodCosts(
            train_flops=work.flops_of(*taken), adapter_bytes=one, train_seconds=work.seconds_of(*taken)
        )
    alone = tuple(member for member in ensemble.members if member.kind == "group")
    boosted = [(BOOSTED_GROUP, ensemble.members, own, ("warmup", "train", "boost"))] if ensemble.is_boosted else []
    for method, members, groups, training in (
        (OWN_GROUP, alone, own, ("warmup", "train")),
        *boosted,
        ("ensemble", ensemble.members, used, ("warmup", "train", "boost", "combine")),
    ):
        by_method[method] = MethodCosts(
            select_flops=chosen,
            adapter_bytes=one * len(members),
            train_flops=work.flops_of(*training),
            train_seconds=work.seconds_of(*training),
            inference_forward_passes=_mean_passes(members, groups, rows),
        )
    work.enter_methods(by_method)


def _mean_passes(members: Sequence[Member], groups: Sequence[tuple[int, ...]], rows: Rows) -> float:
    """Forward passes a prediction takes, averaged over tasks."""
    passes = [len(needed_adapters(members, used, split.kind)) for used, split in zip(groups, rows.test, strict=True)]
    return float(np.mean(passes))
