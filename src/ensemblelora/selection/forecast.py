"""What a selection would cost, before it starts: the stages it shares with a run, and fine-tunings at their most.

In: what :func:`~.select.select_sources` takes. Out: a line a stage, and the total. Searches take seconds and are left
out. A fine-tuning costs at most what one on all tasks does, and there are at most as many as methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

from ensemblelora import stages
from ensemblelora.forecast import list_stages, make_forecaster
from ensemblelora.selection.request import Request, check_tasks, without_groups
from ensemblelora.startpoint import is_warm

__all__ = ["describe_stages", "forecast_selection"]

_N_BASELINES = 4  # none, all, and two kinds of likeness


def forecast_selection(request: Request) -> dict[str, dict[str, float]]:
    """Predict a selection's seconds, FLOPs, tokens and disk space; nothing is written, nothing is trained.

    Args:
        request: Checked.

    Raises:
        UsageError: As the selection would.
    """
    config = without_groups(request.config)
    baselines = config.evaluation.model_copy(update={"baselines": ("base", "shared")})
    config = config.model_copy(update={"evaluation": baselines})
    _, rows, probe = stages.prepare(config, check=partial(check_tasks, request))
    run = make_forecaster(config, probe, rows)
    share, judges = config.gradients.train_fraction, (request.target,)
    expected = list_stages(run) | {"features": run.features(share, is_moved=is_warm(config), judges=judges)}
    found = {name: asdict(stage) for name, stage in expected.items()}
    lines: dict[str, dict[str, float]] = {name: found[name] for name in ("warmup", "features") if name in found}
    if request.wants_final:
        n_finals, one = _count_finals(request), found["baselines"]
        times = {key: n_finals * value for key, value in one.items() if key != "memory_bytes"}
        lines["final, at most"] = {key: times.get(key, value) for key, value in one.items()}
    first = next(iter(lines.values()))
    total = {key: sum(line[key] for line in lines.values()) for key in first}
    return lines | {"total": total | {"memory_bytes": max(line["memory_bytes"] for line in lines.values())}}


def describe_stages(request: Request, forecast: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Put each line of a forecast under what it is in plain words.

    Args:
        request: Checked.
        forecast: Of :func:`forecast_selection`.
    """
    words = {
        "warmup": "a short training on all tasks (warm-up)",
        "features": "gradients of the rows (features)",
        "final, at most": f"fine-tunings at the end, at most {_count_finals(request)}",
        "total": "in all, at most" if request.wants_final else "in all",
    }
    return {words[name]: line for name, line in forecast.items()}


def _count_finals(request: Request) -> int:
    return _N_BASELINES + len(request.strategies)
