"""Does sharpness say anything of data that was not trained on? A question that the paper leaves open. No torch.

In: trained adapters, how sharp each is at its own training rows, and its loss on the test rows of another task. Out:
correlations within each pair of tasks. Each target's loss is taken as it is and less the base model's, which is the
same for all adapters on one base; the adapter's own test loss and its gap are set beside, as other measures.

Limits: another dataset with the same form of question is a mild shift, chosen by us; adversarial rewording of the same
questions is not studied. A few dozen adapters of one model are compared; that they were trained in ways that differ
systematically (rank, number of members, base) is what makes sharpness vary at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ensemblelora.analysis.generalization import correlate_within

__all__ = ["LIMITS", "Shifted", "relate_to_targets"]

LIMITS = (
    "Targets are other datasets of the same form of question, chosen beforehand: a mild shift.",
    "Adversarial rewording of the questions trained on is not studied.",
    "Adapters of one small model; they differ in rank, members, base or width, which is why sharpness differs.",
)

_OUTCOMES = ("target loss", "target loss less the base model's")


@dataclass(frozen=True)
class Shifted:
    """One adapter or ensemble on one target.

    Attributes:
        source: Task it was trained on.
        target: Task it never saw.
        unit: How it was made.
        measures: What may predict: sharpness by name, and its own test loss and gap.
        nll: Mean loss on the target's test rows.
        base_nll: The base model's.
    """

    source: str
    target: str
    unit: str
    measures: Mapping[str, float]
    nll: float
    base_nll: float


def relate_to_targets(
    found: Sequence[Shifted], *, n_bootstrap: int, confidence: float, seed: int
) -> list[dict[str, Any]]:
    """Correlate every measure with the loss on data that was not trained on, pooled within pairs of tasks.

    Args:
        found: Of any pairs.
        n_bootstrap: Draws behind the intervals.
        confidence: Share of them inside.
        seed: Their root.

    Returns:
        A record for each pair and for all together, outcome and measure, that every adapter of the scope has.
    """
    pairs = list(dict.fromkeys(f"{one.source}:{one.target}" for one in found))
    scopes = {pair: [one for one in found if f"{one.source}:{one.target}" == pair] for pair in pairs}
    if len(pairs) > 1:
        scopes["all pairs"] = list(found)
    outcomes: Mapping[str, Callable[[Shifted], float]] = dict(
        zip(_OUTCOMES, (lambda one: one.nll, lambda one: one.nll - one.base_nll), strict=True)
    )
    return [
        {"scope": scope, "measure": measure, "outcome": outcome}
        | asdict(
            correlate_within(
                [one.measures[measure] for one in some],
                [read(one) for one in some],
                [f"{one.source}:{one.target}" for one in some],
                [one.unit for one in some],
                n_bootstrap=n_bootstrap,
                confidence=confidence,
                seed=seed,
            )
        )
        for scope, some in scopes.items()
        for outcome, read in outcomes.items()
        for measure in some[0].measures
        if all(measure in one.measures for one in some)
    ]
