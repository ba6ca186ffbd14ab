"""Convex weights of the groups' models, task by task, and their use.

In: what every group's model says about each task's validation rows. Out: :class:`EnsembleWeights`, on the simplex.
:mod:`.loss` is the cross-entropy as a function of the weights, :mod:`.solver` minimises it with a certificate,
:mod:`.fit` chooses how far to trust it. :mod:`.temperature` says how sure the combined scores may be.
"""

from __future__ import annotations

from ensemblelora.weighting.candidates import choose_candidates
from ensemblelora.weighting.fit import EnsembleWeights, drop_negligible, drop_unraised, fit_weights
from ensemblelora.weighting.loss import MemberLogits, combine
from ensemblelora.weighting.temperature import fit_temperature

__all__ = [
    "EnsembleWeights",
    "MemberLogits",
    "choose_candidates",
    "combine",
    "drop_negligible",
    "drop_unraised",
    "fit_temperature",
    "fit_weights",
]
