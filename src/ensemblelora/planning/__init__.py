"""How many groups, which, and whether to group at all (see :mod:`ensemblelora.planning.record` for the result)."""

from __future__ import annotations

from ensemblelora.planning.record import Candidate, Comparison, Plan, Prediction, Predictions

__all__ = ["Candidate", "Comparison", "Plan", "Prediction", "Predictions"]
