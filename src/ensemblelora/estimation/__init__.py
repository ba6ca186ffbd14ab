"""The subset oracle: what any set of tasks trained together would give, predicted from gradients alone.

``fit_subsets`` solves the convex fits, ``score_subsets`` and :class:`Oracle` answer with predicted loss and accuracy of
every task. Input: :class:`~ensemblelora.store.FeatureBlock` per task and split. No torch.
"""

from __future__ import annotations

from ensemblelora.estimation.averaging import AbstractClients, RowClients, simulate_averaging
from ensemblelora.estimation.oracle import (
    Oracle,
    PenaltyTrial,
    TaskFeatures,
    build_oracle,
    choose_l2_penalty,
    score_subsets,
)
from ensemblelora.estimation.reading import read_features
from ensemblelora.estimation.scoring import (
    RowOutcomes,
    SubsetScores,
    average_outcomes,
    compute_clustered_se,
    compute_wilson_interval,
    mean_loss_gradients,
    predict_outcomes,
    predict_rows,
)
from ensemblelora.estimation.solver import Fit, compute_penalties, fit_subsets
from ensemblelora.estimation.steps import TrainingBudget, simulate_training

__all__ = [
    "AbstractClients",
    "Fit",
    "Oracle",
    "PenaltyTrial",
    "RowClients",
    "RowOutcomes",
    "SubsetScores",
    "TaskFeatures",
    "TrainingBudget",
    "average_outcomes",
    "build_oracle",
    "choose_l2_penalty",
    "compute_clustered_se",
    "compute_penalties",
    "compute_wilson_interval",
    "fit_subsets",
    "mean_loss_gradients",
    "predict_outcomes",
    "predict_rows",
    "read_features",
    "score_subsets",
    "simulate_averaging",
    "simulate_training",
]
