"""What a comparison would cost, before it starts: fine-tunings counted, FLOPs and seconds from a run's forecast.

In: a config, methods, seeds, learning rates. Out: a line a method, and the total. A method says what it fine-tunes
(``Method.work``); one adapter for all is forecast as a run's baseline, and every kind of work takes every row as often,
so that it costs about the same. What is charged to a method is in its line; what several share is in the total once.
Boosting, weights and the scoring of rows are left out: together a few per cent of the trainings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ensemblelora import stages
from ensemblelora.comparison.methods import Method, Work
from ensemblelora.comparison.request import Request, check_request
from ensemblelora.config import RunConfig
from ensemblelora.forecast import StageForecast, forecast_run

__all__ = ["count_fine_tunings", "forecast_study"]

_SHARED: frozenset[Work] = frozenset({"one", "tasks", "continued", "copies"})
"""work that is the same for every method; groups differ"""


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
    found = forecast_run(config, probe, rows)
    n_tasks, n_groups = len(rows.names), _most_groups(config, len(rows.names))
    lines = {
        method.name: _forecast(method, request, found, n_tasks=n_tasks, n_groups=n_groups) for method in request.methods
    }
    return lines | {"total": _add_up(request, found, n_tasks=n_tasks, n_groups=n_groups)}


def count_fine_tunings(work: Sequence[Work], *, n_tasks: int, n_groups: int) -> tuple[int, int]:
    """Count what some work takes.

    Returns:
        Fine-tunings, and how often they take all rows through their epochs, together.

    Example:
        >>> count_fine_tunings(("one", "continued"), n_tasks=10, n_groups=3)
        (11, 2)
    """
    sizes: Mapping[Work, tuple[int, int]] = {
        "one": (1, 1),
        "tasks": (n_tasks, 1),
        "continued": (n_tasks, 1),
        "groups": (n_groups, 1),
        "copies": (n_groups, n_groups),
    }
    return sum(sizes[kind][0] for kind in work), sum(sizes[kind][1] for kind in work)


def _forecast(
    method: Method, request: Request, found: Mapping[str, StageForecast], *, n_tasks: int, n_groups: int
) -> dict[str, float]:
    times = _count_times(method, request)
    n_trained, n_whole = count_fine_tunings(method.work, n_tasks=n_tasks, n_groups=n_groups)
    one, plan = found["baselines"], found["features"]
    n_plans = len(request.seeds) * method.is_planned
    return {
        "fine_tunings": n_trained * times,
        "flops": n_whole * times * one.flops + n_plans * plan.flops,
        "seconds": n_whole * times * one.seconds + n_plans * plan.seconds,
    }


def _add_up(request: Request, found: Mapping[str, StageForecast], *, n_tasks: int, n_groups: int) -> dict[str, float]:
    """Everything once: of each kind of shared work as much as the method that needs most of it."""
    shared: dict[Work, tuple[int, int]] = {}
    own: list[tuple[Work, int]] = []
    for method in request.methods:
        times = _count_times(method, request)
        for kind, n in Counter(method.work).items():
            if kind in _SHARED:
                shared[kind] = max(shared.get(kind, (0, 0)), (n, times))
            else:
                own.append((kind, n * times))
    work = [*((kind, n * times) for kind, (n, times) in shared.items()), *own]
    counts = [(n, *count_fine_tunings([kind], n_tasks=n_tasks, n_groups=n_groups)) for kind, n in work]
    n_whole = sum(n * whole for n, _, whole in counts)
    n_plans = len(request.seeds) * any(method.is_planned for method in request.methods)
    one, plan = found["baselines"], found["features"]
    return {
        "fine_tunings": sum(n * trained for n, trained, _ in counts),
        "flops": n_whole * one.flops + n_plans * plan.flops,
        "seconds": n_whole * one.seconds + n_plans * plan.seconds,
    }


def _count_times(method: Method, request: Request) -> int:
    """How often a method is carried out: at every rate on the first seed, at one on the others."""
    return (len(request.learning_rates) if method.is_trained else 1) + len(request.seeds) - 1


def _most_groups(config: RunConfig, n_tasks: int) -> int:
    asked = config.grouping.n_groups_asked
    return min(config.grouping.max_groups, n_tasks) if asked is None else asked
