"""Adapters added where a group still errs: functional gradient descent on a group's label scores.

A round takes the group with the largest training loss, regresses the residual ``onehot - softmax(F)`` of its scores F
on the features (:mod:`.residual`, a ridge fit in closed form), turns the fit into a step away from theta0
(:mod:`.direction`), finds its length by true forward passes over the training rows, and keeps the new adapter if the
held-out loss drops (:mod:`.rounds`). What is added to F (:mod:`.state`) is ``rate x (z_new - z_theta0)``: the change,
not the base's own scores again. The paper adds the whole output and uses a fixed 0.1.

Free-text tasks keep their group's adapter alone: residuals live on class scores.
Cost of a round: one weighted backward pass and a handful of forward passes over the group's training rows.
"""

from __future__ import annotations

from ensemblelora.boosting.residual import fit_residual, residual_targets
from ensemblelora.boosting.rounds import Boosting, BoostRound, boost, boost_once, search_length, start_boosting
from ensemblelora.boosting.state import BoostTask, Setup

__all__ = [
    "BoostRound",
    "BoostTask",
    "Boosting",
    "Setup",
    "boost",
    "boost_once",
    "fit_residual",
    "residual_targets",
    "search_length",
    "start_boosting",
]
