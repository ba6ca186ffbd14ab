"""What the paper says in words, as rows: ours with its interval beside it, and whether the two agree. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ensemblelora.reproduction.exhibit import Row
from ensemblelora.reproduction.shape import judge_order

__all__ = ["judge_sign", "make_claim", "name_claims"]


_ZERO = {"value": 0.0, "low": 0.0, "high": 0.0}


def make_claim(
    claim: str,
    estimate: Mapping[str, Any] | None,
    *,
    sign: int,
    printed: float | None = None,
    verdict: str | None = None,
) -> Row:
    """Put a claim of the paper beside what was measured.

    Args:
        claim: What is told of what.
        estimate: ``value``, ``low``, ``high``; none where it was not measured.
        sign: Which the paper says it has, 1 or -1; 0: it says nothing.
        printed: The paper's number, where it has one.
        verdict: None: by the sign.
    """
    found = estimate or dict.fromkeys(("value", "low", "high"))
    told = verdict or judge_sign(found, sign)
    return {
        "claim": claim,
        "ours": found["value"],
        "low": found["low"],
        "high": found["high"],
        "paper": printed,
        "verdict": told,
    }


def judge_sign(estimate: Mapping[str, Any], sign: int) -> str:
    """Say whether an interval lies on the paper's side of zero.

    Args:
        estimate: ``value``, ``low``, ``high``; none where unknown.
        sign: 1 or -1; 0: the paper says nothing.

    Example:
        >>> judge_sign({"value": -0.3, "low": -0.5, "high": -0.1}, -1)
        'agrees'
        >>> judge_sign({"value": -0.3, "low": -0.7, "high": 0.1}, -1)
        'undecided'
    """
    if estimate["value"] is None:
        return "not measured"
    if sign == 0:
        return "not in the paper"
    return judge_order(estimate, _ZERO) if sign > 0 else judge_order(_ZERO, estimate)


def name_claims(folder: Path, folders: Sequence[Path], claims: Sequence[Row]) -> list[Row]:
    """Say whose a claim is, where there are several folders."""
    if len(folders) == 1:
        return list(claims)
    return [{**row, "claim": f"{folder.name}, {row['claim']}"} for row in claims]
