"""Whether ours has the paper's order and shape: agreements, disagreements, and what intervals leave open.

In: estimates by name, and the paper's numbers. Out: sentences. A claim agrees where the intervals of the two numbers it
compares lie apart in the paper's order, disagrees where they lie apart in the other, and is undecided where they meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any, Literal

__all__ = ["Verdict", "judge_order", "list_orders"]

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
