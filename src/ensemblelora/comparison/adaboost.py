"""Boosting without groups: AdaBoost over rows or over tasks, and gradient boosting of one adapter for all.

In: a pool. Out: candidates of one more adapter a step. AdaBoost is SAMME, for any number of classes: each learner is an
adapter for all tasks, trained from theta0 on rows weighted by what the earlier ones got wrong. Errors, votes and the
end of boosting are each task's own, since tasks have different classes. A task that answers with free text has no
error; it keeps the first adapter, and its rows their weight.

``real`` is SAMME.R, which is over rows, too: a learner's say on a row is its log-probabilities about their mean, so
that it needs no vote of its own and is never left out.

The softmax of SAMME's votes is its own estimate of the class probabilities (Zhu and others, 2009, section 2.2), so that
losses can be compared; votes of few learners make it a coarse one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from ensemblelora.comparison.candidate import Candidate, Costs, make_candidate, make_ensemble
from ensemblelora.comparison.combined import boost_members
from ensemblelora.comparison.grouped import train_shared
from ensemblelora.comparison.planned import charge_features, make_plan
from ensemblelora.comparison.pool import Part, Pool, Trained
from ensemblelora.errors import UsageError
from ensemblelora.prediction import MemberScores

__all__ = [
    "LEVELS",
    "Level",
    "SammeStep",
    "boost_by_weights",
    "boost_shared",
    "cast_votes",
    "center_log_shares",
    "take_real_step",
    "take_samme_step",
]

FloatArray = npt.NDArray[np.float64]
Level = Literal["row", "task", "real"]
"""whether each row has a weight of its own, or each task; ``real``: each row, by probabilities"""

LEVELS: tuple[Level, ...] = ("row", "task", "real")

_LEAST_ERROR = 1e-6
_LEAST_SHARE = 1e-6  # of a class; a learner that is surer would alone decide a row, in votes and in later weights


@dataclass(frozen=True, eq=False)
class SammeStep:
    """What one learner's mistakes on one task lead to.

    Attributes:
        error: Weighted share of rows it got wrong.
        alpha: Weight of its vote; 0 if it is no better than chance, which ends the task's boosting.
        factors: What each row's weight is multiplied with ``(n_rows,)``.
    """

    error: float
    alpha: float
    factors: FloatArray


def take_samme_step(
    is_wrong: npt.NDArray[np.bool_], weights: FloatArray, n_classes: float, *, level: Level = "row"
) -> SammeStep:
    """Judge a learner on one task: SAMME's error, vote and new weights.

    Args:
        is_wrong: Which rows it got wrong ``(n_rows,)``.
        weights: What the rows weighed in its training ``(n_rows,)``.
        n_classes: K; where rows have different numbers of choices, one over the chance of guessing right.
        level: ``row``: a wrong row's weight grows by ``exp(alpha)``. ``task``: every row's by ``exp(alpha error)``.

    Reference:
        Paper, appendix A.2, "Extension to AdaBoost", whose ``alpha`` is that of two classes; Zhu and others,
        "Multi-class AdaBoost" (2009), algorithm 2.
    """
    error = float(np.average(is_wrong, weights=weights))
    if error >= 1 - 1 / n_classes:
        return SammeStep(error, 0.0, np.ones(len(weights)))
    clipped = min(max(error, _LEAST_ERROR), 1 - 1 / n_classes - _LEAST_ERROR)
    alpha = float(np.log((1 - clipped) / clipped) + np.log(n_classes - 1))
    grows = is_wrong if level != "task" else np.full(len(weights), error)
    return SammeStep(error, alpha, np.exp(alpha * grows))


def take_real_step(scores: FloatArray, labels: npt.NDArray[np.integer], weights: FloatArray) -> SammeStep:
    """Judge a learner on one task by its probabilities: SAMME.R's new weights, and its error for the record.

    A row's weight is multiplied by ``exp(-(K - 1) / K y . log p)``, y being 1 at the right class and -1 / (K - 1)
    elsewhere, which is ``exp(-c_y)`` with the log-probabilities c about their mean.

    Args:
        scores: ``(n_rows, K)``, -inf past a row's choices.
        labels: Right classes ``(n_rows,)``.
        weights: What the rows weighed in its training ``(n_rows,)``.

    Reference:
        Zhu and others, "Multi-class AdaBoost" (2009), algorithm 4.
    """
    error = float(np.average(scores.argmax(axis=1) != labels, weights=weights))
    centered = center_log_shares(scores)[np.arange(len(labels)), labels]
    return SammeStep(error, 1.0, np.exp(-centered))


def center_log_shares(scores: FloatArray) -> FloatArray:
    """Return a learner's log-probabilities less their mean over a row's choices, -inf past these.

    Summed over learners they are SAMME.R's votes over K - 1, and their softmax its estimate of the probabilities.
    """
    absent = np.isneginf(scores)
    shares = np.where(absent, 0.0, np.maximum(log_softmax(scores, axis=1), np.log(_LEAST_SHARE)))
    means = shares.sum(axis=1, keepdims=True) / (~absent).sum(axis=1, keepdims=True)
    return np.where(absent, -np.inf, shares - means)


def cast_votes(scores: Sequence[FloatArray], alphas: Sequence[float]) -> FloatArray:
    """Add up learners' votes for the class that each of them finds likeliest.

    Args:
        scores: Of each learner, ``(n_rows, K)``, -inf past a row's choices.
        alphas: Weights of their votes, one a learner.

    Returns:
        Votes ``(n_rows, K)``, -inf past a row's choices.
    """
    votes = np.zeros(scores[0].shape)
    for found, alpha in zip(scores, alphas, strict=True):
        votes[np.arange(len(votes)), found.argmax(axis=1)] += alpha
    return np.where(np.isfinite(scores[0]), votes, -np.inf)


def boost_by_weights(pool: Pool, n_steps: int, *, level: Level = "row") -> Candidate:
    """AdaBoost: ``n_steps`` adapters for all tasks beside the first, each trained where those before it erred.

    Weights have mean one over a task's rows (``row``, ``real``), or over all rows (``task``). With no step it is the
    one adapter for all tasks, and its scores are its own and not votes. Costs ``n_steps + 1`` trainings, a pass of each
    learner over the training rows, and as many passes at inference.

    Args:
        pool: The seed's.
        n_steps: Adapters beyond the first.
        level: What has a weight.

    Raises:
        UsageError: If ``n_steps`` is negative.

    Reference:
        Paper, appendix A.2, "Extension to AdaBoost".
    """
    if n_steps < 0:
        raise UsageError(f"AdaBoost with {n_steps} steps: expected 0 or more")
    if n_steps == 0:
        return train_shared(pool)
    learners, steps = _train_learners(pool, n_steps, level)
    names = [one.name for one in learners]
    alphas = [[found[task].alpha if task in found else 0.0 for found in steps] for task in pool.everyone]

    def predict(part: Part) -> list[MemberScores]:
        return [_vote(pool, names, alphas[task], task, part, level) for task in pool.everyone]

    judged = [
        Costs.of_scoring(pool, {task: [learner.name] for task in found}, "train")
        for learner, found in zip(learners, steps, strict=True)
    ]
    n_passes = [max(1, sum(alpha > 0 for alpha in own)) for own in alphas]
    kept = [one for t, one in enumerate(learners) if t == 0 or any(own[t] > 0 for own in alphas)]
    costs = replace(Costs.of(learners, kept=kept).plus(*judged), forward_passes=float(np.mean(n_passes)))
    errors = [{pool.rows.names[task]: step.error for task, step in found.items()} for found in steps]
    return Candidate(predict, costs, (pool.everyone,), {"alphas": alphas, "errors": errors, "members": names})


def boost_shared(pool: Pool, n_steps: int) -> Candidate:
    """Gradient boosting of one adapter for all tasks: at most ``n_steps`` residual adapters, while held-out loss drops.

    Costs one training, the gradient pass over the training rows, whose features the residuals are fitted to, and the
    rounds.

    Args:
        pool: The seed's.
        n_steps: Boosters at most.

    Reference:
        Paper, section 2.3 and appendix A.2, for one group.
    """
    if n_steps == 0:
        return train_shared(pool)
    planned, shared = make_plan(pool), pool.train(pool.everyone)
    boosted = boost_members(pool, planned, (pool.everyone,), [shared], n_steps)
    features = charge_features(pool, planned)  # of training, as nothing is chosen by them
    features = replace(features, train_flops=features.select_flops, select_flops=0)
    costs = Costs.of([shared, *boosted.spent], kept=[shared, *boosted.kept]).plus(features)
    ensemble = make_ensemble(pool, [shared.name], np.ones((pool.n_tasks, 1)), boosters=boosted.members)
    rounds = [vars(entry) for entry in boosted.rounds]
    return make_candidate(pool, ensemble, costs, groups=(pool.everyone,), boosting=rounds)


def _train_learners(pool: Pool, n_steps: int, level: Level) -> tuple[list[Trained], list[dict[int, SammeStep]]]:
    """Train the learners one after the other; for each, what it led to on the tasks still boosted."""
    weights = [np.ones(pool.split(task, "train").n_examples) for task in pool.everyone]
    boosted = [task for task in pool.everyone if pool.split(task, "train").kind != "sequence"]
    learners: list[Trained] = []
    steps: list[dict[int, SammeStep]] = []
    while len(learners) <= n_steps and (boosted or not learners):
        learners.append(pool.train(pool.everyone, weights=weights if learners else None))
        steps.append({task: _judge(pool, learners[-1], task, weights[task], level) for task in boosted})
        boosted = [task for task in boosted if steps[-1][task].alpha > 0]
        grown = [w * steps[-1][task].factors if task in boosted else w for task, w in enumerate(weights)]
        weights = _rescale(grown, level)
    return learners, steps


def _judge(pool: Pool, learner: Trained, task: int, weights: FloatArray, level: Level) -> SammeStep:
    split, scores = pool.split(task, "train"), pool.score([learner.name], task, "train").values[0]
    if level == "real":
        return take_real_step(scores.astype(np.float64), split.labels, weights)
    is_wrong = scores.argmax(axis=1) != split.labels
    n_classes = 1 / float(np.mean(1 / split.n_choices))
    return take_samme_step(is_wrong, weights, n_classes, level=level)


def _rescale(weights: Sequence[FloatArray], level: Level) -> list[FloatArray]:
    """Weights of mean one: over each task's rows, which keeps tasks' shares, or over all rows, which shifts them."""
    if level != "task":
        return [own / own.mean() for own in weights]
    mean = np.concatenate(weights).mean()
    return [own / mean for own in weights]


def _vote(
    pool: Pool, names: Sequence[str], alphas: Sequence[float], task: int, part: Part, level: Level
) -> MemberScores:
    """Votes of the learners that have one; the first learner's scores where none has."""
    used = [t for t, alpha in enumerate(alphas) if alpha > 0]
    found = pool.score([names[t] for t in used or [0]], task, part)
    if not used:
        return found
    scores = found.values.astype(np.float64)
    if level == "real":
        votes: FloatArray = np.sum([center_log_shares(own) for own in scores], axis=0)
    else:
        votes = cast_votes(list(scores), [alphas[t] for t in used])
    return replace(found, values=votes[None])
