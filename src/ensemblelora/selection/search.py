"""Searches over sets of sources, step by step: forward, backward, swaps, and a beam.

In: a :class:`~.prospect.Prospect`. Out: a :class:`Found`. A search moves where the target's predicted validation loss
falls by at least the tolerance and by one standard error of that very difference (paired over rows), else it stops; so
noise alone moves nothing. All sets that one step looks at are fitted side by side.

Cost: at most n fits a step forward or backward, width x n for a beam, s (n - s) + n for swaps of a set of s. Slow twins
in tests/test_selection.py: one set at a time. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ensemblelora.errors import UsageError
from ensemblelora.selection.prospect import Choice, Prospect, unless_nan

__all__ = [
    "Found",
    "Move",
    "SearchSettings",
    "search_backward",
    "search_beam",
    "search_forward",
    "search_swaps",
]


@dataclass(frozen=True)
class SearchSettings:
    """How sets of sources are searched.

    Attributes:
        tolerance: Least fall of the target's predicted loss that is worth a move, nats.
        max_sources: No more are chosen; none: no limit.
        beam_width: Sets that a beam goes on with.
        n_permutations: Orders of the sources behind Shapley values, each with its reverse; all of them where there are
            no more.
        subset_size: Sources of a random subset; cut to half of all, so that some are left out.
        n_subsets: Random subsets behind the scores; all of them where there are no more.
        seed: Root of what is drawn.
    """

    tolerance: float = 0.0
    max_sources: int | None = None
    beam_width: int = 4
    n_permutations: int = 32
    subset_size: int = 3
    n_subsets: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no search can follow."""
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise UsageError(f"--tolerance {self.tolerance}: expected a number of nats, 0 or more")
        limits = {
            "--max-sources": self.max_sources,
            "--beam-width": self.beam_width,
            "--permutations": self.n_permutations,
            "affinity.subset_size": self.subset_size,
            "affinity.n_subsets": self.n_subsets,
        }
        for name, value in limits.items():
            if value is not None and value < 1:
                raise UsageError(f"{name} {value}: expected 1 or more")


@dataclass(frozen=True)
class Move:
    """One step of a search.

    Attributes:
        added: Sources that came in.
        dropped: Sources that went out.
        gain: By how much the target's predicted loss falls, nats.
        gain_se: Its standard error; none where it is unknown.
        nll: The predicted loss afterwards.
        n_options: Sets that were looked at.
    """

    added: Choice
    dropped: Choice
    gain: float
    gain_se: float | None
    nll: float
    n_options: int


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    Attributes:
        choice: The sources chosen.
        moves: How it came there.
        stopped: Why it did not go on.
        n_asked: Sets whose loss was predicted, as often as they were asked about.
    """

    choice: Choice
    moves: tuple[Move, ...]
    stopped: str
    n_asked: int


Neighbours = Callable[[Choice], list[Choice]]


def search_forward(prospect: Prospect, settings: SearchSettings) -> Found:
    """Begin with no source; add the one that helps most, as long as one helps.

    Reference:
        Li et al., "Scalable Fine-tuning from Multiple Data Sources", EMNLP Findings 2024, forward selection.
    """
    return _climb(prospect, (), settings, lambda chosen: list(_list_additions(prospect, chosen, settings)))


def search_backward(prospect: Prospect, settings: SearchSettings) -> Found:
    """Begin with all sources; drop the one whose absence helps most, as long as that helps, or there are too many."""
    return _climb(prospect, prospect.everything, settings, lambda chosen: list(_list_removals(chosen)))


def search_swaps(prospect: Prospect, settings: SearchSettings) -> Found:
    """Go on from where the search forward ended, by any addition, removal or exchange that helps most."""

    def neighbours(chosen: Choice) -> list[Choice]:
        exchanges = (
            tuple(sorted({*removed, j}))
            for removed in _list_removals(chosen)
            for j in prospect.everything
            if j not in chosen
        )
        return [*_list_additions(prospect, chosen, settings), *_list_removals(chosen), *exchanges]

    first = search_forward(prospect, settings)
    found = _climb(prospect, first.choice, settings, neighbours)
    return Found(found.choice, (*first.moves, *found.moves), found.stopped, first.n_asked + found.n_asked)


def search_beam(prospect: Prospect, settings: SearchSettings) -> Found:
    """Search forward from the best few sets of every size instead of the best one; of width 1 it is the same."""
    best: Choice = ()
    beam: list[Choice] = [best]
    moves: list[Move] = []
    n_asked = 1
    while True:
        options = list(dict.fromkeys(s for start in beam for s in _list_additions(prospect, start, settings)))
        if not options:
            return Found(best, tuple(moves), _no_option(prospect, best, settings), n_asked)
        prospect.solve(options)
        gains, n_asked = prospect.compare(options, best), n_asked + len(options)
        order = np.argsort(-gains.values, kind="stable")[: settings.beam_width]
        top = int(order[0])
        if not _is_enough(gains.values[top], gains.errors[top], settings):
            return Found(best, tuple(moves), _too_little(gains.values[top], gains.errors[top], settings), n_asked)
        moves.append(_describe(prospect, best, options[top], gains.values[top], gains.errors[top], len(options)))
        best, beam = options[top], [options[int(s)] for s in order]


def _climb(prospect: Prospect, start: Choice, settings: SearchSettings, neighbours: Neighbours) -> Found:
    """Move to the best neighbour as long as that helps; where there are too many sources, whether it helps or not."""
    chosen, moves, n_asked = start, list[Move](), 1
    while options := neighbours(chosen):
        prospect.solve([chosen, *options])
        gains, n_asked = prospect.compare(options, chosen), n_asked + len(options)
        top = int(np.argmax(gains.values))  # the first of equals
        gain, error = float(gains.values[top]), float(gains.errors[top])
        is_too_large = settings.max_sources is not None and len(chosen) > settings.max_sources
        if not is_too_large and not _is_enough(gain, error, settings):
            return Found(chosen, tuple(moves), _too_little(gain, error, settings), n_asked)
        moves.append(_describe(prospect, chosen, options[top], gain, error, len(options)))
        chosen = options[top]
    return Found(chosen, tuple(moves), _no_option(prospect, chosen, settings), n_asked)


def _list_additions(prospect: Prospect, chosen: Choice, settings: SearchSettings) -> Iterator[Choice]:
    if settings.max_sources is None or len(chosen) < settings.max_sources:
        yield from (tuple(sorted((*chosen, j))) for j in prospect.everything if j not in chosen)


def _list_removals(chosen: Choice) -> Iterator[Choice]:
    yield from (chosen[:i] + chosen[i + 1 :] for i in range(len(chosen)))


def _is_enough(gain: float, error: float, settings: SearchSettings) -> bool:
    """Whether a gain is worth a move; where its error is unknown, the tolerance alone decides."""
    bar = settings.tolerance if math.isnan(error) else max(settings.tolerance, error)
    return gain >= bar and gain > 0


def _describe(prospect: Prospect, before: Choice, after: Choice, gain: float, error: float, n_options: int) -> Move:
    return Move(
        added=tuple(j for j in after if j not in before),
        dropped=tuple(j for j in before if j not in after),
        gain=float(gain),
        gain_se=unless_nan(error),
        nll=float(prospect.score([after]).values[0]),
        n_options=n_options,
    )


def _too_little(gain: float, error: float, settings: SearchSettings) -> str:
    told = f"{gain:.4f} nats" if math.isnan(error) else f"{gain:.4f} ± {error:.4f} nats"
    if gain <= 0:
        return f"no further step is predicted to gain anything (the best one {told})"
    bar = "no more than chance" if gain < error else f"less than --tolerance {settings.tolerance:g}"
    return f"the best further step is predicted to gain {told}, {bar}"


def _no_option(prospect: Prospect, chosen: Choice, settings: SearchSettings) -> str:
    if settings.max_sources is not None and len(chosen) >= settings.max_sources:
        return f"as many sources as --max-sources {settings.max_sources} allows"
    return "no source is left out" if len(chosen) == prospect.n_sources else "no source is left in"
