"""Every way to choose sources, by name; each from the same prospect.

In: a :class:`~.prospect.Prospect` and settings. Out: :class:`Selection`, plain values that JSON keeps. No torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensemblelora.errors import UsageError
from ensemblelora.selection.prospect import Choice, Prospect, unless_nan
from ensemblelora.selection.search import (
    Found,
    Move,
    SearchSettings,
    search_backward,
    search_beam,
    search_forward,
    search_swaps,
)
from ensemblelora.selection.values import VALUATIONS, choose_prefix

__all__ = ["DEFAULT_STRATEGY", "STRATEGIES", "Selection", "choose_strategies", "select"]

_SEARCHES: Mapping[str, Callable[[Prospect, SearchSettings], Found]] = {
    "forward": search_forward,
    "backward": search_backward,
    "swap": search_swaps,
    "beam": search_beam,
}

STRATEGIES: Mapping[str, str] = {
    "forward": "add the best source, step by step",
    "backward": "drop the worst source, step by step",
    "swap": "forward, then exchanges",
    "beam": "forward from several sets",
    "scores": "mean loss of random sets",
    "loo": "leave one out",
    "shapley": "Shapley values",
}
"""names, and what each does in a few words"""
DEFAULT_STRATEGY = "backward"
"""what did best where it was measured (docs/decisions/0023)"""


@dataclass(frozen=True)
class Selection:
    """What one strategy chose, and why.

    Attributes:
        strategy: Its name.
        sources: Indices of the chosen sources.
        nll: The target's predicted validation loss with them, nats.
        nll_se: Its standard error; none, like the others, where it is unknown.
        gain: By how much that is below the loss without any source; paired.
        gain_se: Its standard error.
        gain_over_all: By how much it is below the loss with all sources.
        gain_over_all_se: Its standard error.
        moves: Steps of a search, or the sources of a ranking as they came in.
        values: What each source is worth, for strategies that say so; else empty.
        value_errors: Their standard errors.
        stopped: Why there are no more, or no fewer.
        n_asked: Sets asked about.
        seconds: Time it took, fits included; sets that an earlier strategy asked about cost nothing again.
        row_iterations: Rows times iterations of its fits: what a fit's cost is counted in.
    """

    strategy: str
    sources: Choice
    nll: float
    nll_se: float | None
    gain: float
    gain_se: float | None
    gain_over_all: float
    gain_over_all_se: float | None
    moves: tuple[Move, ...]
    values: tuple[float | None, ...]
    value_errors: tuple[float | None, ...]
    stopped: str
    n_asked: int
    seconds: float
    row_iterations: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Selection:
        """Take back what ``dataclasses.asdict`` gave and JSON kept."""
        moves = tuple(
            Move(**{**move, "added": tuple(move["added"]), "dropped": tuple(move["dropped"])})
            for move in values["moves"]
        )
        lists = {name: tuple(values[name]) for name in ("sources", "values", "value_errors")}
        return cls(**{**values, **lists, "moves": moves})


def choose_strategies(names: Sequence[str]) -> tuple[str, ...]:
    """Find strategies by name, in the order given; ``all`` stands for every one, the default first.

    Raises:
        UsageError: If a name is unknown; lists those there are.
    """
    wanted = [one for name in names for one in ((DEFAULT_STRATEGY, *STRATEGIES) if name == "all" else [name])]
    unknown = [name for name in wanted if name not in STRATEGIES]
    if unknown or not wanted:
        told = f"unknown strategy {', '.join(map(repr, unknown))}" if unknown else "no strategy"
        raise UsageError(f"{told}: expected all, or some of {', '.join(STRATEGIES)}")
    return tuple(dict.fromkeys(wanted))


def select(prospect: Prospect, strategy: str, settings: SearchSettings) -> Selection:
    """Choose sources by one strategy.

    Args:
        prospect: The target and its sources.
        strategy: One of :data:`STRATEGIES`.
        settings: How it searches.
    """
    started, before = time.perf_counter(), prospect.oracle.row_iterations
    values = None
    if strategy in _SEARCHES:
        found = _SEARCHES[strategy](prospect, settings)
    else:
        values = VALUATIONS[strategy](prospect, settings)
        ranked = choose_prefix(prospect, values.values, settings)
        found = Found(ranked.choice, ranked.moves, ranked.stopped, values.n_asked + ranked.n_asked)
    references: list[Choice] = [(), prospect.everything]
    prospect.solve([*references, found.choice])
    loss = prospect.score([found.choice])
    gains = [prospect.compare([found.choice], over=reference) for reference in references]
    return Selection(
        strategy=strategy,
        sources=found.choice,
        nll=float(loss.values[0]),
        nll_se=unless_nan(loss.errors[0]),
        gain=float(gains[0].values[0]),
        gain_se=unless_nan(gains[0].errors[0]),
        gain_over_all=float(gains[1].values[0]),
        gain_over_all_se=unless_nan(gains[1].errors[0]),
        moves=found.moves,
        values=() if values is None else tuple(map(unless_nan, values.values)),
        value_errors=() if values is None else tuple(map(unless_nan, values.errors)),
        stopped=found.stopped,
        n_asked=found.n_asked,
        seconds=time.perf_counter() - started,
        row_iterations=prospect.oracle.row_iterations - before,
    )
