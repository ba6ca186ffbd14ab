"""What speaks against a choice: another search found better, or there are too few rows to tell.

In: a :class:`~.prospect.Prospect` and what searches found. Out: :class:`Better`, and sentences. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ensemblelora.planning.describe import list_few_rows
from ensemblelora.report.wording import format_number, join_names
from ensemblelora.selection.prospect import Choice, Prospect
from ensemblelora.selection.strategies import Selection

__all__ = ["RIVALS", "Better", "find_better", "list_caveats", "name_choice", "say_better"]

RIVALS = ("backward", "forward")
"""searches that are carried out beside any other: unless --max-sources is in the way, what begins with all sources is
never predicted worse than all of them, and what begins with none never worse than none"""
_MOST_NAMED = 4
_CLEAR = 2.0
"""standard errors that a gain has to have to be told from none"""
_STOPS = {
    "forward": "It adds one source at a time and stops at the first step that does not pay",
    "beam": "It adds one source at a time and stops at the first step that does not pay",
    "backward": "It drops one source at a time and stops at the first step that does not pay",
    "swap": "It goes on from where the search forward ended, one change at a time, and stops at the first that does "
    "not pay",
}
_CUT = "It ranks the sources one by one and takes the fewest that are within a standard error of the ranking's best"
_BEGINS = {"forward": "begins without any source", "backward": "begins with all sources"}


@dataclass(frozen=True)
class Better:
    """A choice that is predicted to be better than the first strategy's.

    Attributes:
        strategy: Whose it is.
        sources: Indices of its sources.
        gain: By how much the target's predicted loss is lower than with the first strategy's choice, nats; paired.
        gain_se: Its standard error.
        n_asked: Sets that the other strategies asked about, among which it was found.
    """

    strategy: str
    sources: Choice
    gain: float
    gain_se: float
    n_asked: int = 1


def find_better(prospect: Prospect, first: Selection, others: Sequence[Selection]) -> Better | None:
    """Find the choice with the least predicted loss, if it is further below the first one's than luck would take it.

    Of N sets that are worth the same, the luckiest is some ``sqrt(2 log N)`` standard errors better than it is; so much
    is asked for, N the sets that the others asked about.

    Args:
        prospect: The target and its sources.
        first: What counts as chosen.
        others: What other strategies found; of equals the first is named.
    """
    if not others:
        return None
    gains = prospect.compare([one.sources for one in others], over=first.sources)
    n_asked = sum(one.n_asked for one in others)
    luck = max(1.0, float(np.sqrt(2 * np.log(max(n_asked, 1)))))
    is_clear = gains.values > luck * np.maximum(np.nan_to_num(gains.errors, nan=np.inf), 0.0)
    if not is_clear.any():
        return None
    top = int(np.argmax(np.where(is_clear, gains.values, -np.inf)))
    found = others[top]
    return Better(found.strategy, found.sources, float(gains.values[top]), float(gains.errors[top]), n_asked)


def say_better(better: Better, names: Sequence[str]) -> str:
    """Name a better choice and by how much it is, as the end of a sentence.

    Args:
        better: What :func:`find_better` found.
        names: Of all sources.
    """
    told = name_choice(better.sources, names) or "none"
    gain = f"{format_number(better.gain, 4)} ± {format_number(better.gain_se, 4)}"
    return f"{better.strategy} chooses {told}, whose predicted loss is {gain} nats lower still"


def name_choice(choice: Choice, names: Sequence[str]) -> str:
    """Name sources on one line: by those left out where these are few; empty for none.

    Args:
        choice: Their indices.
        names: Of all sources.
    """
    left_out = [name for j, name in enumerate(names) if j not in set(choice)]
    if not left_out:
        return f"all {len(names)}" if len(names) > 1 else names[0]
    if len(left_out) <= _MOST_NAMED < len(choice):
        return f"all but {join_names(left_out)}"
    return join_names([names[j] for j in choice], limit=_MOST_NAMED)


def list_caveats(
    prospect: Prospect, target: str, names: Sequence[str], first: Selection, better: Better | None
) -> Iterator[str]:
    """Say what to keep in mind about the first strategy's choice.

    Args:
        prospect: The target and its sources.
        target: The target's name.
        names: Of all sources.
        first: What counts as chosen.
        better: What is predicted to be better.
    """
    if better is not None:
        begins = f", which {_BEGINS[better.strategy]}," if better.strategy in _BEGINS else ""
        yield (
            f"{_STOPS.get(first.strategy, _CUT)} (here: {first.stopped}). {better.strategy.capitalize()}{begins} found "
            f"the lowest of {better.n_asked} sets' predictions, and the lowest of many is partly luck: compare both on "
            f"test rows with --strategy {first.strategy},{better.strategy}."
        )
    what, gain, error = "the choice", first.gain, first.gain_se
    if not first.sources:
        what, gain, error = "all sources", -first.gain_over_all, first.gain_over_all_se
    if error and abs(gain) <= _CLEAR * error:
        yield (
            f"{len(np.unique(prospect.validation_groups))} validation rows of {target} can't tell a gain below some "
            f"{format_number(_CLEAR * error, 3)} nats from chance; that of {what} over no source is smaller."
        )
    yield from list_few_rows({target: len(np.unique(prospect.validation_groups))})
