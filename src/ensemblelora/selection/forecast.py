"""What a selection would cost, before it starts: the stages it shares with a run, and fine-tunings at their most.

In: what :func:`~.select.select_sources` takes. Out: a line a stage, and the total. Searches take seconds and are left
out. A fine-tuning costs at most what one on all tasks does, and there are at most as many as methods.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from ensemblelora import stages
from ensemblelora.forecast import list_stages, make_forecaster
from ensemblelora.selection.request import Request, check_tasks, without_groups
from ensemblelora.startpoint import is_warm

__all__ = ["forecast_selection"]

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
        n_finals, one = _N_BASELINES + len(request.strategies), found["baselines"]
        times = {key: n_finals * value for key, value in one.items() if key != "memory_bytes"}
        lines["final, at most"] = {key: times.get(key, value) for key, value in one.items()}
    first = next(iter(lines.values()))
    total = {key: sum(line[key] for line in lines.values()) for key in first}
    return lines | {"total": total | {"memory_bytes": max(line["memory_bytes"] for line in lines.values())}}
