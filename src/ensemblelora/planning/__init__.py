"""How many groups, which, and whether to group at all, predicted before any training.

``choose_groups`` takes the affinity and the subset oracle and returns a :class:`Plan` of plain values, which
``dataclasses.asdict`` turns into the run folder's ``plan.json`` and :func:`read_plan` reads back. Every number in it is
judged on validation rows that did not choose what is judged. Errors: ConfigError for more groups than tasks or a budget
that what is asked for breaks. No torch.
"""

from __future__ import annotations

from ensemblelora.planning.choose import choose_groups
from ensemblelora.planning.precision import estimate_affinity_errors
from ensemblelora.planning.record import Candidate, Comparison, Plan, Prediction, Predictions, read_plan

__all__ = [
    "Candidate",
    "Comparison",
    "Plan",
    "Prediction",
    "Predictions",
    "choose_groups",
    "estimate_affinity_errors",
    "read_plan",
]
