"""One adapter in place of an ensemble: made on the model that holds the members, and measured against them.

Fold and ensemble see the same validation rows. Test rows are not read: which fold to keep is a choice.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt
from peft import LoraConfig, set_peft_model_state_dict

from ensemblelora.adapters import THETA0, AdaptedModel, activate, adapter_state, keep_head_in_float32
from ensemblelora.config import AdapterConfig, MaxTokens
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.ensemble import Ensemble, needed_adapters, predict_ensemble
from ensemblelora.errors import TrainingError
from ensemblelora.folding import State, Truncated, list_averaged, rank_of, stack_adapters, truncate
from ensemblelora.models import forked_generators
from ensemblelora.placement import standing_in
from ensemblelora.prediction import MemberScores, member_nll, predict_members

__all__ = ["Fold", "Judge", "TaskChange", "add_fold", "fold_members", "mean_rise", "weigh_adapters"]


@dataclass(frozen=True)
class TaskChange:
    """One task's validation rows under the ensemble and under the one adapter."""

    task: str
    n_examples: int
    nll_ensemble: float
    nll_folded: float
    accuracy_ensemble: float | None
    """none for free text"""
    accuracy_folded: float | None


@dataclass(frozen=True, eq=False)
class Fold:
    """One adapter in place of several."""

    cut: Truncated
    weights: Mapping[str, float]
    """what each adapter's change was multiplied with"""
    rank: int
    exact_rank: int
    """at which nothing is cut away"""
    averaged: tuple[str, ...]
    """tensors that are weighted means, since they are no LoRA factors: a classifier head's"""


@dataclass(frozen=True, eq=False)
class Judge:
    """Rows, and what the ensemble says about them."""

    splits: tuple[EncodedSplit, ...]
    expected: tuple[npt.NDArray[np.float64], ...]
    """combined scores, ``(n_rows, K)`` for each split"""
    max_tokens: MaxTokens

    @classmethod
    def ask(
        cls,
        adapted: AdaptedModel,
        ensemble: Ensemble,
        splits: Mapping[int, EncodedSplit],
        *,
        max_tokens: MaxTokens,
    ) -> Judge:
        """Run the ensemble over the rows of some tasks, given by their index in it."""
        expected = [predict_ensemble(adapted, ensemble, i, split, max_tokens=max_tokens) for i, split in splits.items()]
        return cls(tuple(splits.values()), tuple(expected), max_tokens)

    def measure(self, adapted: AdaptedModel, name: str) -> tuple[TaskChange, ...]:
        """Run one adapter over the same rows.

        Raises:
            TrainingError: If a loss is not finite.
        """
        return tuple(
            _compare(split, expected, predict_members(adapted, split, [name], max_tokens=self.max_tokens))
            for split, expected in zip(self.splits, self.expected, strict=True)
        )


def weigh_adapters(ensemble: Ensemble, splits: Mapping[int, EncodedSplit]) -> dict[str, float]:
    """What each adapter's change is multiplied with: its share of a task's scores, averaged over the tasks.

    A booster's is its group's weight times its rate, and theta0 carries the same negative amount, since boosters are
    measured from it; free-text tasks have no boosters. The weights sum to one.

    Args:
        ensemble: Members and weights.
        splits: Rows of the tasks that count, by their index in the ensemble.
    """
    total: dict[str, float] = {}
    for task, split in splits.items():
        for member in ensemble.members:
            if member.name not in needed_adapters(ensemble.members, [member.group], split.kind):
                continue
            share = ensemble.weights[task][member.group] * member.rate / len(splits)
            total[member.name] = total.get(member.name, 0.0) + share
            if member.kind == "booster":
                total[THETA0] = total.get(THETA0, 0.0) - share
    return {name: weight for name, weight in total.items() if weight}


def fold_members(adapted: AdaptedModel, weights: Mapping[str, float], config: AdapterConfig, rank: int | None) -> Fold:
    """Fold adapters into one: the weighted sum of their changes, cut to a rank; none: exactly, their ranks added up.

    Args:
        adapted: The model that holds them.
        weights: Of each adapter, by name.
        config: Their own settings.
        rank: Largest rank of the fold.
    """
    states = [adapter_state(adapted, name) for name in weights]
    exact = stack_adapters(states, list(weights.values()), config.lora_alpha / config.r)
    whole = rank_of(exact)
    cut = truncate(exact, whole if rank is None else rank)
    return Fold(cut, weights, rank_of(cut.state), whole, tuple(list_averaged(exact)))


def add_fold(adapted: AdaptedModel, name: str, state: State) -> None:
    """Put a folded adapter, of scale 1 and a rank of its own, beside the others on the model."""
    settings = copy.deepcopy(cast("LoraConfig", adapted.peft.peft_config[THETA0]))
    settings.r = settings.lora_alpha = rank_of(state)
    settings.modules_to_save = None  # PEFT adds the head's names itself, each time
    with (
        activate(adapted, THETA0),
        forked_generators(adapted.device),
        standing_in(adapted.network),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # what PEFT has to say of these settings it said of theta0
        adapted.peft.add_adapter(name, settings)
    adapted.peft.eval()
    keep_head_in_float32(adapted, name)
    set_peft_model_state_dict(adapted.peft, state, adapter_name=name)


def mean_rise(changes: Sequence[TaskChange]) -> float:
    """Rise of the mean loss over tasks, in nats."""
    return float(np.mean([change.nll_folded - change.nll_ensemble for change in changes]))


def _compare(split: EncodedSplit, expected: npt.NDArray[np.float64], found: MemberScores) -> TaskChange:
    both = replace(found, values=np.stack([expected, found.values[0]]))  # (2, n_rows, K)
    ensemble, folded = member_nll(both, split.labels).mean(axis=1).tolist()
    if not np.isfinite(folded):
        raise TrainingError(f"task {split.task!r}: the loss of one folded adapter is not finite; export format peft")
    accuracies: list[float | None] = [None, None]
    if split.kind != "sequence":
        accuracies = [float(right) for right in (both.values.argmax(axis=2) == split.labels).mean(axis=1)]
    return TaskChange(split.task, split.n_examples, ensemble, folded, *accuracies)
