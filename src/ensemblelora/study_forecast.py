"""What a comparison would cost, before it starts: fine-tunings counted, FLOPs and seconds from a run's forecast.

In: a config, methods, seeds, learning rates. Out: a line a method, and the total. A method says what it fine-tunes
(``Method.work``); one adapter for all is forecast as a run's baseline, and the other kinds of work by how often they
take all rows. Boosting is counted at its most, for rounds that are all kept, and what TAG looks at by its very batches.
What is charged to a method is in its line; what several share is in the total once. Weights and the scoring of rows are
left out: together a few per cent of the trainings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ensemblelora import stages
from ensemblelora.comparison.lookahead import count_looks
from ensemblelora.comparison.methods import Method, Work
from ensemblelora.comparison.request import Request, check_request
from ensemblelora.config import RunConfig
from ensemblelora.forecast import Forecaster, Passes, StageForecast, list_stages, make_forecaster

__all__ = ["count_fine_tunings", "forecast_study"]

_OWN: frozenset[Work] = frozenset({"other one", "other groups", "other matched groups", "half groups"})
"""work that is each method's own; any other is the same for all methods"""
_SIZES: Mapping[Work, Callable[[int, int], tuple[int, float]]] = {
    "one": lambda n, m: (1, 1),
    "other one": lambda n, m: (1, 1),
    "tasks": lambda n, m: (n, 1),
    "matched tasks": lambda n, m: (n, n),
    "continued": lambda n, m: (n, 1),
    "matched continued": lambda n, m: (n, n),
    "half": lambda n, m: (1, 0.5),
    "groups": lambda n, m: (m, 1),
    "matched groups": lambda n, m: (m, m),
    "other groups": lambda n, m: (m, 1),
    "other matched groups": lambda n, m: (m, m),
    "draw 1": lambda n, m: (m, 1),
    "draw 2": lambda n, m: (m, 1),
    "draw 3": lambda n, m: (m, 1),
    "half groups": lambda n, m: (m, 0.5),
    "copies": lambda n, m: (m, m),
    "soup": lambda n, m: (m, m),
    "row learner": lambda n, m: (1, 1),
    "task learner": lambda n, m: (1, 1),
    "real learner": lambda n, m: (1, 1),
}
"""of n tasks and m groups: fine-tunings, and how often they take all rows through their epochs, together"""


def forecast_study(
    config: RunConfig,
    methods: Sequence[str],
    n_seeds: int,
    learning_rates: Sequence[float],
    out: Path | str,
    *,
    primary: Sequence[tuple[str, str]] | None = None,
) -> dict[str, dict[str, float]]:
    """Predict a comparison's fine-tunings, FLOPs and seconds; nothing is written, nothing is trained.

    Args are those of :func:`ensemblelora.comparison.study.compare`.

    Returns:
        For each method ``fine_tunings``, ``flops`` and ``seconds`` of all seeds and rates; ``total`` counts once what
        methods share.

    Raises:
        UsageError: As the comparison would.
    """
    request = check_request(config, methods, n_seeds, learning_rates, out, primary)
    base = request.config.evaluation.model_copy(update={"baselines": ("base", "shared")})
    config = request.config.model_copy(update={"evaluation": base})
    _, rows, probe = stages.prepare(config)
    prices = _Prices(make_forecaster(config, probe, rows))
    lines = {method.name: _forecast(method, request, prices) for method in request.methods}
    return lines | {"total": _add_up(request, prices)}


def count_fine_tunings(work: Sequence[Work], *, n_tasks: int, n_groups: int) -> tuple[int, float]:
    """Count what some work takes.

    Returns:
        Fine-tunings, and how often they take all rows through their epochs, together.

    Example:
        >>> count_fine_tunings(("one", "continued"), n_tasks=10, n_groups=3)
        (11, 2)
    """
    sizes = [_SIZES[kind](n_tasks, n_groups) for kind in work]
    return sum(n for n, _ in sizes), sum(whole for _, whole in sizes)


@dataclass(frozen=True, eq=False)
class _Prices:
    """What each part of a comparison costs once."""

    run: Forecaster
    _known: dict[tuple[str, float], StageForecast] = field(default_factory=dict)

    @cached_property
    def one(self) -> StageForecast:
        """One adapter for all tasks."""
        return list_stages(self.run)["baselines"]

    @cached_property
    def moved_features(self) -> StageForecast:
        """The gradient pass at an adapter that was trained."""
        return self.run.features(self.run.config.gradients.train_fraction, is_moved=True)

    @cached_property
    def looks(self) -> StageForecast:
        """What TAG looks at."""
        config = self.run.config
        training, forward = count_looks(self.run.probe, self.run.rows.train, config.training, seed=config.seed)
        return self.run.predict(Passes(training, forward))

    def work(self, kinds: Sequence[Work]) -> tuple[int, float]:
        """Fine-tunings, and how often they take all rows."""
        return count_fine_tunings(kinds, n_tasks=len(self.run.rows.names), n_groups=self.run.most_groups)

    def boosting(self, method: Method) -> StageForecast | None:
        """What a method's boosters cost; none if it has none."""
        n_rounds = self.run.config.boosting.n_rounds if method.n_boosters is None else method.n_boosters
        if ("boosting", n_rounds) not in self._known:
            self._known["boosting", n_rounds] = self.run.boosting(n_rounds)
        return self._known["boosting", n_rounds] if n_rounds else None

    def features(self, fraction: float | None = None) -> StageForecast:
        """The gradient pass over a share of the training rows; none: the config's."""
        share = self.run.config.gradients.train_fraction if fraction is None else fraction
        if ("features", share) not in self._known:
            self._known["features", share] = self.run.features(share)
        return self._known["features", share]


@dataclass
class _Sum:
    """A line that is being added up."""

    fine_tunings: int = 0
    flops: float = 0
    seconds: float = 0.0

    def add(self, part: StageForecast | None, times: float, *, n_trained: int = 0) -> None:
        """Enter something that is done some number of times."""
        self.fine_tunings += n_trained
        if part is not None:
            self.flops += times * part.flops
            self.seconds += times * part.seconds


def _forecast(method: Method, request: Request, prices: _Prices) -> dict[str, float]:
    times, line = _count_times(method, request), _Sum()
    n_trained, n_whole = prices.work(method.work)
    line.add(prices.one, n_whole * times, n_trained=n_trained * times)
    _add_own(line, method, request, prices)
    line.add(prices.boosting(method), times)
    if method.is_planned and not method.plans_anew:
        line.add(prices.features(method.train_fraction), len(request.seeds))
    return vars(line)


def _add_own(line: _Sum, method: Method, request: Request, prices: _Prices) -> None:
    """What no other method has use for, besides fine-tunings."""
    times = _count_times(method, request)
    line.add(prices.looks if method.looks_ahead else None, times)
    line.add(prices.moved_features if method.plans_anew else None, times)


def _add_up(request: Request, prices: _Prices) -> dict[str, float]:
    """Everything once: of each kind of shared work as much as the method that needs most of it."""
    line, shared = _Sum(), dict[Work, tuple[int, int]]()
    boosted: dict[str, tuple[float, StageForecast]] = {}
    for method in request.methods:
        times = _count_times(method, request)
        for kind, n in Counter(method.work).items():
            if kind in _OWN:
                _add_work(line, kind, n * times, prices)
            else:
                shared[kind] = max(shared.get(kind, (0, 0)), (n, times))
        _add_own(line, method, request, prices)
        if (rounds := prices.boosting(method)) is not None:
            key = method.name if method.boosted == "own" else method.boosted
            boosted[key] = max(boosted.get(key, (0.0, rounds)), (times, rounds), key=lambda one: one[0] * one[1].flops)
    for kind, (n, times) in shared.items():
        _add_work(line, kind, n * times, prices)
    for share, rounds in boosted.values():
        line.add(rounds, share)
    if any(method.is_planned and not method.plans_anew for method in request.methods):
        line.add(prices.features(), len(request.seeds))
    return vars(line)


def _add_work(line: _Sum, kind: Work, times: int, prices: _Prices) -> None:
    n_trained, n_whole = prices.work([kind])
    line.add(prices.one, n_whole * times, n_trained=n_trained * times)


def _count_times(method: Method, request: Request) -> int:
    """How often a method is carried out: at every rate on the first seed, at one on the others."""
    return (len(request.learning_rates) if method.is_trained else 1) + len(request.seeds) - 1
