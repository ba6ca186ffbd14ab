"""Adapters added where a group still errs: functional gradient descent on a group's label scores.

State: F, the current scores of each group on its own tasks. A round takes the group with the largest training
loss, regresses the residual ``onehot - softmax(F)`` on the features (a ridge fit in closed form), turns the fit
into a step away from theta0, finds its length by true forward passes over the training rows, and keeps the new
adapter if the held-out loss drops. What is added to F is ``rate x (z_new - z_theta0)``: the change, not the base's
own scores again. (The paper adds the whole output and uses a fixed 0.1; see docs/decisions.)

Free-text tasks keep their group's adapter alone: residuals live on class scores.
Cost of a round: one weighted backward pass and a handful of forward passes over the group's training rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import (
    THETA0,
    AdaptedModel,
    activate,
    adapter_state,
    add_adapter,
    remove_adapter,
    set_adapter_state,
    trainable_linears,
)
from ensemblelora.blocks import FeatureBlock
from ensemblelora.config import BoostingConfig, TrainingConfig
from ensemblelora.counting import count_training
from ensemblelora.data.batching import collate, iterate_batches, schedule_training
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import StoreError
from ensemblelora.gradients.collect import find_active_linears
from ensemblelora.gradients.output import compute_outputs
from ensemblelora.gradients.projection import Projector
from ensemblelora.prediction import predict_members
from ensemblelora.progress import note
from ensemblelora.scoring import score_batch

__all__ = ["BoostRound", "BoostTask", "boost", "fit_residual", "residual_targets"]

_MOST_LENGTHS = 8  # forward passes over the training rows in one line search


@dataclass(frozen=True, eq=False)
class BoostTask:
    """What boosting reads of one task."""

    train: EncodedSplit
    validation: EncodedSplit
    features: FeatureBlock


@dataclass(frozen=True)
class BoostRound:
    """One round, kept or not."""

    name: str
    group: int
    rate: float
    step_length: float
    train_nll_before: float
    train_nll_after: float
    heldout_nll_before: float
    heldout_nll_after: float
    accepted: bool
    reason: str


def boost(
    adapted: AdaptedModel,
    members: Sequence[str],
    groups: Sequence[Sequence[BoostTask]],
    config: BoostingConfig,
    *,
    projector: Projector,
    max_tokens: int,
    seed: int,
    meter: Meter,
) -> tuple[BoostRound, ...]:
    """Add at most ``config.n_rounds`` adapters; the kept ones stay in the model under their names.

    Args:
        adapted: The model with every member.
        members: The group adapters' names.
        groups: Each group's tasks; free-text tasks are passed over.
        config: Rounds, rate, direction, ridge.
        projector: The projection the features were made with.
        max_tokens: Padded tokens in a forward pass.
        seed: The run's root seed.
        meter: Told how many tokens were read.

    Returns:
        Every round tried, in order.
    """
    states = {
        g: _GroupState.start(adapted, members[g], tasks, max_tokens, meter)
        for g, every in enumerate(groups)
        if config.n_rounds and (tasks := [task for task in every if task.train.kind != "sequence"])
    }
    rounds: list[BoostRound] = []
    exhausted: set[int] = set()
    while sum(r.accepted for r in rounds) < config.n_rounds and exhausted != states.keys():
        g = max((g for g in states if g not in exhausted), key=lambda g: (states[g].train_nll, states[g].n_rows))
        name = f"{members[g]}-boost-{sum(r.group == g and r.accepted for r in rounds) + 1}"
        result = _try_round(adapted, name, g, states[g], config, projector=projector, max_tokens=max_tokens, seed=seed, meter=meter)
        rounds.append(result)
        note(f"boosting {name}: {result.reason}")
        if not result.accepted:
            remove_adapter(adapted, name)
            exhausted.add(g)
    return tuple(rounds)


def residual_targets(scores: np.ndarray, labels: np.ndarray, decoder: np.ndarray) -> np.ndarray:
    """Negative gradient of the cross-entropy in output space: ``decoder^T (onehot - softmax(F))``, ``(n, c)``.

    Args:
        scores: F, ``(n, K)``, -inf past an example's choices.
        labels: ``(n,)`` class indices.
        decoder: ``(K, c)`` map from outputs to class logits.
    """
    residual = -np.exp(log_softmax(scores.astype(np.float64), axis=1))
    residual[np.arange(len(labels)), labels] += 1.0
    targets: np.ndarray = residual @ decoder
    return targets


def fit_residual(features: np.ndarray, targets: np.ndarray, l2_penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Ridge fit of the targets: ``min_w mean ||t - J w||^2 + lambda ||w||^2``, lambda in curvature units.

    Args:
        features: ``(n, c, d)``.
        targets: ``(n, c)``.
        l2_penalty: lambda over the mean squared feature norm per dimension.

    Returns:
        ``w (d,)`` and the dual variables ``alpha (n, c)`` with ``w = sum alpha J``.
    """
    n, _, d = features.shape
    jacobian = features.reshape(-1, d).astype(np.float64)
    flat = targets.reshape(-1).astype(np.float64)
    penalty = l2_penalty * float((jacobian**2).sum()) / (n * d)
    w = np.linalg.solve(jacobian.T @ jacobian / n + penalty * np.eye(d), jacobian.T @ flat / n)
    alpha = (flat - jacobian @ w) / (penalty * n)
    return w, alpha.reshape(targets.shape)


@dataclass(eq=False)
class _GroupState:
    """F and the base's scores of one group, per task."""

    tasks: Sequence[BoostTask]
    train_scores: list[np.ndarray]
    validation_scores: list[np.ndarray]
    train_base: list[np.ndarray]
    validation_base: list[np.ndarray]

    @classmethod
    def start(
        cls, adapted: AdaptedModel, member: str, tasks: Sequence[BoostTask], max_tokens: int, meter: Meter
    ) -> _GroupState:
        both = [member, THETA0]
        train = [predict_members(adapted, t.train, both, max_tokens=max_tokens, meter=meter).values for t in tasks]
        held = [predict_members(adapted, t.validation, both, max_tokens=max_tokens, meter=meter).values for t in tasks]
        return cls(tasks, [v[0] for v in train], [v[0] for v in held], [v[1] for v in train], [v[1] for v in held])

    @property
    def n_rows(self) -> int:
        return sum(len(scores) for scores in self.train_scores)

    @property
    def train_nll(self) -> float:
        return _mean_nll(self.train_scores, [t.train.labels for t in self.tasks])

    @property
    def heldout_nll(self) -> float:
        return _mean_nll(self.validation_scores, [t.validation.labels for t in self.tasks])

    def moved(self, new: Sequence[np.ndarray], rate: float, split: str) -> list[np.ndarray]:
        scores, base = (self.train_scores, self.train_base) if split == "train" else (self.validation_scores, self.validation_base)
        with np.errstate(invalid="ignore"):
            return [np.where(np.isfinite(f), f + rate * (z - z0), f) for f, z, z0 in zip(scores, new, base, strict=True)]


def _try_round(
    adapted: AdaptedModel,
    name: str,
    group: int,
    state: _GroupState,
    config: BoostingConfig,
    *,
    projector: Projector,
    max_tokens: int,
    seed: int,
    meter: Meter,
) -> BoostRound:
    before, heldout_before = state.train_nll, state.heldout_nll
    add_adapter(adapted, name)
    start = adapter_state(adapted, THETA0)
    step = _direction(adapted, name, state, config, projector=projector, max_tokens=max_tokens, seed=seed, meter=meter)

    def scores_at(length: float, split: str) -> list[np.ndarray]:
        set_adapter_state(adapted, name, {key: start[key] + length * step.get(key, torch.zeros(())) for key in start})
        encoded = [task.train if split == "train" else task.validation for task in state.tasks]
        new = [predict_members(adapted, e, [name], max_tokens=max_tokens, meter=meter).values[0] for e in encoded]
        return state.moved(new, config.boosting_rate, split)

    labels = [task.train.labels for task in state.tasks]
    if config.line_search:
        length, after = _search_length(lambda t: _mean_nll(scores_at(t, "train"), labels), before)
    else:
        length, after = 1.0, _mean_nll(scores_at(1.0, "train"), labels)
    train_scores, validation_scores = scores_at(length, "train"), scores_at(length, "validation")
    heldout_after = _mean_nll(validation_scores, [task.validation.labels for task in state.tasks])
    if after >= before * (1 - config.tolerance):
        accepted, reason = False, "training loss does not drop"
    elif heldout_after >= heldout_before:
        accepted, reason = False, f"held-out loss does not drop ({heldout_before:.4f} to {heldout_after:.4f})"
    else:
        accepted, reason = True, f"held-out loss drops ({heldout_before:.4f} to {heldout_after:.4f})"
        state.train_scores, state.validation_scores = train_scores, validation_scores
    return BoostRound(
        name, group, config.boosting_rate, length, before, after, heldout_before, heldout_after, accepted, reason
    )


def _search_length(loss_at: object, loss_at_zero: float) -> tuple[float, float]:
    """Double or halve the step while the true training loss drops; ``loss(0)`` is known."""
    loss = {0.0: loss_at_zero}

    def measure(length: float) -> float:
        if length not in loss:
            loss[length] = float(loss_at(length))  # type: ignore[operator]
        return loss[length]

    best = 1.0
    factor = 2.0 if measure(1.0) < loss_at_zero else 0.5
    while len(loss) <= _MOST_LENGTHS:
        if measure(best * factor) >= measure(best) and not (factor < 1 and measure(best) >= loss_at_zero):
            break
        best *= factor
    best = min((length for length in loss if length > 0), key=lambda length: loss[length])
    return best, loss[best]


def _direction(
    adapted: AdaptedModel,
    name: str,
    state: _GroupState,
    config: BoostingConfig,
    *,
    projector: Projector,
    max_tokens: int,
    seed: int,
    meter: Meter,
) -> dict[str, Tensor]:
    """The parameter step, keyed as the adapter's saved tensors."""
    if config.direction == "steps":
        return _train_residual(adapted, name, state, config, seed=seed, meter=meter)
    for task in state.tasks:
        if task.features.ids != task.train.ids:
            raise StoreError(f"features of task {task.train.task!r} are in another order than its rows; run the features stage again")
    features = [np.asarray(task.features.features) for task in state.tasks]
    width = max(f.shape[1] for f in features)
    targets = [
        residual_targets(scores[:, : len(task.features.decoder)], task.train.labels, task.features.decoder)
        for scores, task in zip(state.train_scores, state.tasks, strict=True)
    ]
    padded = np.concatenate([np.pad(f, ((0, 0), (0, width - f.shape[1]), (0, 0))) for f in features])
    w, alpha = fit_residual(padded, np.concatenate([np.pad(t, ((0, 0), (0, width - t.shape[1]))) for t in targets]), config.l2_penalty)
    with activate(adapted, name, trainable=True):
        linears = find_active_linears(adapted, [task.train for task in state.tasks])
    if config.direction == "projected":
        return _as_state(adapted, name, {n: _expand(projector, n, m, w) for n, m in linears.items()})
    starts = np.cumsum([0, *(len(f) for f in features)])
    pieces = [alpha[a:b, : f.shape[1]] for a, b, f in zip(starts, starts[1:], features, strict=False)]
    return _weighted_gradient(adapted, name, state, pieces, max_tokens=max_tokens, meter=meter)


def _weighted_gradient(
    adapted: AdaptedModel, name: str, state: _GroupState, alphas: Sequence[np.ndarray], *, max_tokens: int, meter: Meter
) -> dict[str, Tensor]:
    """``sum_s alpha_s grad u_s`` at theta0, by one weighted backward pass."""
    with activate(adapted, name, trainable=True), torch.enable_grad():
        for task, alpha in zip(state.tasks, alphas, strict=True):
            for batch in iterate_batches(task.train, max_tokens, adapted.base.pad_token_id):
                z = score_batch(adapted.network, batch).z
                labels, n_choices = torch.from_numpy(batch.labels).to(z.device), torch.from_numpy(batch.n_choices).to(z.device)
                outputs = compute_outputs(z, labels, n_choices, task.features.mode)
                weights = torch.from_numpy(alpha[batch.examples].astype(np.float32)).to(z.device)
                (outputs * weights).sum().backward()
                count_training(meter, adapted.costs, batch)
        gradients = {n: (m.weight.grad, None if m.bias is None else m.bias.grad) for n, m in trainable_linears(adapted, name).items()}
        adapted.peft.zero_grad(set_to_none=True)
    return _as_state(adapted, name, gradients)


def _train_residual(
    adapted: AdaptedModel, name: str, state: _GroupState, config: BoostingConfig, *, seed: int, meter: Meter
) -> dict[str, Tensor]:
    """A few real optimiser steps on ``CE(F + rate (z - z_theta0))`` from theta0; the step is where they lead."""


    splits = [task.train for task in state.tasks]
    schedule = schedule_training(splits, TrainingConfig(num_train_epochs=1), seed=seed)[: config.n_steps]
    start = adapter_state(adapted, THETA0)
    with activate(adapted, name, trainable=True), torch.enable_grad():
        parameters = [p for p in adapted.peft.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
        for step in schedule:
            batch = collate([(splits[task], example) for task, example in step], adapted.base.pad_token_id)
            z = score_batch(adapted.network, batch).z
            rows = [(state.train_scores[t][e], state.train_base[t][e]) for t, e in step]
            scores, base = (torch.from_numpy(_stack([row[i] for row in rows], z.shape[1])).to(z.device) for i in (0, 1))
            finite = torch.isfinite(z) & torch.isfinite(scores)
            moved = torch.where(finite, scores + config.boosting_rate * (z - base), -torch.inf)
            loss = torch.nn.functional.cross_entropy(moved, torch.from_numpy(batch.labels).to(z.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            count_training(meter, adapted.costs, batch)
    end = adapter_state(adapted, name)
    return {key: end[key] - start[key] for key in start}


def _stack(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    return np.stack([np.pad(row[:width], (0, width - len(row[:width])), constant_values=-np.inf) for row in rows])


def _expand(projector: Projector, name: str, module: torch.nn.Linear, w: np.ndarray) -> tuple[Tensor, Tensor | None]:
    weights = torch.from_numpy(w.astype(np.float32))
    weight = projector.expand(f"{name}.weight", module.weight.numel(), weights).reshape(module.weight.shape)
    return weight, None if module.bias is None else projector.expand(f"{name}.bias", module.bias.numel(), weights)


def _as_state(adapted: AdaptedModel, name: str, steps: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> dict[str, Tensor]:
    """Rename per-layer steps to the keys of the saved adapter, by writing them through the layers themselves."""
    before = adapter_state(adapted, name)
    linears = trainable_linears(adapted, name)
    with torch.no_grad():
        for layer, (weight, bias) in steps.items():
            if weight is not None:
                linears[layer].weight.add_(weight.to(linears[layer].weight.device))
            if bias is not None:
                linears[layer].bias.add_(bias.to(linears[layer].bias.device))
    after = adapter_state(adapted, name)
    set_adapter_state(adapted, name, before)
    return {key: after[key] - before[key] for key in before}


def _mean_nll(scores: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> float:
    """Mean over examples of all tasks, as the training loss counts them."""
    rows = [
        -log_softmax(s.astype(np.float64), axis=1)[np.arange(len(y)), y] for s, y in zip(scores, labels, strict=True)
    ]
    return float(np.concatenate(rows).mean())
