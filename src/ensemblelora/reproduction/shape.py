"""Whether ours has the paper's order and shape: agreements, disagreements, and what intervals leave open.

In: estimates by name, and the paper's numbers. Out: sentences. A claim agrees where the intervals of the two numbers it
compares lie apart in the paper's order, disagrees where they lie apart in the other, and is undecided where they meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any, Literal

__all__ = ["Verdict", "judge_order", "list_orders", "list_values"]

Verdict = Literal["agrees", "disagrees", "undecided"]
Estimate = Mapping[str, Any]
"""``value``, ``low`` and ``high``; ends may be none"""


def judge_order(higher: Estimate, lower: Estimate) -> Verdict:
    """Judge the claim that one number is above another.

    Args:
        higher: What is claimed to be above.
        lower: What is claimed to be below.

    Example:
        >>> judge_order({"value": 2, "low": 1.5, "high": 2.5}, {"value": 1, "low": 0.5, "high": 1.4})
        'agrees'
        >>> judge_order({"value": 2, "low": 1.0, "high": 2.5}, {"value": 1, "low": 0.5, "high": 1.4})
        'undecided'
    """
    ends = (higher["low"], higher["high"], lower["low"], lower["high"])
    if any(end is None for end in ends):
        return "undecided"
    if higher["low"] > lower["high"]:
        return "agrees"
    return "disagrees" if higher["high"] < lower["low"] else "undecided"


def list_values(what: str, ours: Mapping[str, Estimate], printed: Mapping[str, float]) -> Iterator[str]:
    """Say of every share that both have whether our interval holds the paper's; that it does is no proof.

    Args:
        what: What the share is of, such as "pairs".
        ours: Estimates by name.
        printed: The paper's, by name.

    Yields:
        One sentence a name.
    """
    for name, value in printed.items():
        found = ours.get(name)
        if found is None or None in (found["low"], found["high"]):
            continue
        verdict = "holds that" if found["low"] <= value <= found["high"] else "leaves that out"
        told = f"{found['value']:.0%} ({found['low']:.0%} to {found['high']:.0%})"
        yield f"{what}, {name}: the paper has {value:.0%}; ours {told} {verdict}"


def list_orders(what: str, ours: Mapping[str, Estimate], printed: Mapping[str, float]) -> Iterator[str]:
    """Judge the paper's order of every two names that both have.

    Args:
        what: The number that is compared, such as "distance".
        ours: Estimates by name.
        printed: The paper's, by name; of equals nothing is claimed.

    Yields:
        One sentence a claim, and one that counts them.
    """
    counts: dict[Verdict, int] = {"agrees": 0, "disagrees": 0, "undecided": 0}
    names = [name for name in printed if name in ours and ours[name]["value"] is not None]
    for a, b in combinations(names, 2):
        if printed[a] == printed[b]:
            continue
        high, low = (a, b) if printed[a] > printed[b] else (b, a)
        verdict = judge_order(ours[high], ours[low])
        counts[verdict] += 1
        lean = "above" if ours[high]["value"] > ours[low]["value"] else "below or equal"
        told = f" (measured {lean})" if verdict == "undecided" else ""
        yield f"{what}: the paper has {high} above {low}; ours {verdict}{told}"
    if sum(counts.values()):
        told = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
        yield f"{what}: of {sum(counts.values())} orders of the paper, {told}"
