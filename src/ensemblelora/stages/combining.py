"""The stage behind the training: every task's weights over the groups that compete for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora import artifacts, weighting
from ensemblelora.adapters import THETA0, AdaptedModel
from ensemblelora.boosting import BoostRound
from ensemblelora.config import EnsembleConfig, RunConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.ensemble import Ensemble, Member, load_ensemble, needed_adapters, save_ensemble, sum_groups
from ensemblelora.grouping import to_labels
from ensemblelora.planning import Plan
from ensemblelora.prediction import MemberScores, member_nll
from ensemblelora.stages.kept import score_members
from ensemblelora.stages.rows import Rows
from ensemblelora.workspace import Workspace

__all__ = ["combine_members", "settle_weights"]


def combine_members(
    work: Workspace,
    probe: AdaptedModel,
    plan: Plan,
    members: Sequence[str],
    rounds: Sequence[BoostRound],
    rows: Rows,
    *,
    earlier: Sequence[Path] = (),
) -> Ensemble:
    """Fit every task's weights over the groups, on validation rows. Leaves ``ensemble.json``.

    Beside the weights stands each task's loss by its own group's adapter alone, as the plan predicted it.
    Scores of the same adapters and rows are taken over from the run folders ``earlier``.
    """
    config, path = work.config, work.path / artifacts.ENSEMBLE_FILE
    every = (
        *(Member(name, g, "group", 1.0) for g, name in enumerate(members)),
        *(Member(entry.name, entry.group, "booster", entry.rate) for entry in rounds if entry.accepted),
    )
    digests = {member.name: work.adapter_digest(member.name) for member in every}
    described = [_describe_round(index, entry) for index, entry in enumerate(rounds)]
    own = to_labels(plan.groups).tolist()
    candidates = weighting.choose_candidates(own, len(plan.groups), config.ensemble, plan.by_group)
    settings = (plan.groups, candidates, digests, described, config.ensemble)
    inputs = (rows.learning_fingerprint(), work.start_fingerprint, *settings)
    with work.stage("combine", *inputs) as stage:
        if stage.is_needed:
            known = {**digests, THETA0: work.start_fingerprint}
            scores, own_nll = [], []
            for split, groups, own_group in zip(rows.validation, candidates, own, strict=True):
                names = needed_adapters(every, groups, split.kind)
                found = score_members(
                    work.path,
                    probe,
                    split,
                    names,
                    known,
                    earlier=earlier,
                    max_tokens=config.evaluation.max_tokens_per_batch,
                    meter=stage.meter,
                )
                scores.append(sum_groups(found, names, every, groups))
                alone = sum_groups(found, names, every[: len(members)], [own_group])
                own_nll.append(float(member_nll(alone, split.labels)[0].mean()))
            model = _fit_ensemble(scores, candidates, plan, every, rows, config)
            extra = {"boosting": described, "own_validation_nll": own_nll, "adapter_sha256": digests}
            save_ensemble(model, path, **extra)
            stage.files.append(path)
    return load_ensemble(path)


def settle_weights(
    scores: Sequence[MemberScores],
    splits: Sequence[EncodedSplit],
    own_groups: Sequence[int],
    candidates: Sequence[Sequence[int]],
    config: EnsembleConfig,
    *,
    n_groups: int,
    seed: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Every task's weights over m groups, as they are served: fitted, routed where asked for, without small ones.

    Args:
        scores: What each task's candidates say about its validation rows, ``(n_candidates, n_rows, K)``.
        splits: These rows.
        own_groups: The group each task was trained in.
        candidates: The groups that compete for each task, its own among them; others get no weight.
        config: How they are fitted, and what of it is served.
        n_groups: m.
        seed: The run's root seed.

    Returns:
        Weights ``(n_tasks, m)``, and which tasks could be routed ``(n_tasks,)``.
    """
    logits = [
        weighting.MemberLogits(
            values=found.values,
            labels=split.labels,
            groups=split.groups,
            row_example=found.row_example if split.kind == "sequence" else None,
        )
        for found, split in zip(scores, splits, strict=True)
    ]
    places = [list(groups).index(own) for groups, own in zip(candidates, own_groups, strict=True)]
    is_apart = config.weights in ("task", "own")  # else one fit, over all groups, is of all tasks
    parts = [([one], [place]) for one, place in zip(logits, places, strict=True)] if is_apart else [(logits, places)]
    fits = [weighting.fit_weights(*part, config, seed=seed) for part in parts]
    shown = [fitted.serving_weights if config.route else fitted.weights for fitted in fits]
    if config.weights == "task" and config.min_weight > 0:
        shown = [
            weighting.drop_unraised(some, fitted.own_groups.tolist(), config.own_group_prior)
            for some, fitted in zip(shown, fits, strict=True)
        ]
    rows = [row for some in shown for row in some]
    weights = np.zeros((len(rows), n_groups))
    for whole, groups, row in zip(weights, candidates, rows, strict=True):
        whole[list(groups)] = row
    if config.weights in ("task", "global"):
        weights = weighting.drop_negligible(weights, config.min_weight)
    return weights, np.concatenate([fitted.routed for fitted in fits])


def _fit_ensemble(
    scores: Sequence[MemberScores],
    candidates: Sequence[Sequence[int]],
    plan: Plan,
    members: tuple[Member, ...],
    rows: Rows,
    config: RunConfig,
) -> Ensemble:
    own, m = to_labels(plan.groups).tolist(), len(plan.groups)
    weights, routed = settle_weights(
        scores, rows.validation, own, candidates, config.ensemble, n_groups=m, seed=config.seed
    )
    return Ensemble(
        task_names=rows.names,
        groups=plan.groups,
        members=members,
        weights=tuple(tuple(float(weight) for weight in row) for row in weights),
        routed=tuple(bool(is_routed) for is_routed in routed),
        combine=config.ensemble.combine,
    )


def _describe_round(index: int, entry: BoostRound) -> dict[str, Any]:
    return {
        "round": index + 1,
        "group": entry.group,
        "train_loss_before": entry.train_nll_before,
        "train_loss_after": entry.train_nll_after,
        "heldout_before": entry.heldout_nll_before,
        "heldout_after": entry.heldout_nll_after,
        "rate": entry.rate * entry.step_length,
        "accepted": entry.accepted,
        "reason": entry.reason,
    }
