"""The report's first lines: one sentence that says what came out, and the numbers worth reading first."""

from __future__ import annotations

from ensemblelora.evaluation.rows import BOOSTED_GROUP, OWN_GROUP
from ensemblelora.report.document import Tile
from ensemblelora.report.records import (
    Difference,
    EnsembleRecord,
    MethodCosts,
    PlanRecord,
    Prediction,
    ResultsRecord,
    RunRecord,
)
from ensemblelora.report.wording import (
    count,
    describe_coverage,
    format_bytes,
    format_interval,
    format_number,
    format_percent,
    format_points,
    format_ratio,
    format_seconds,
    format_signed,
)

__all__ = [
    "METHOD_LABELS",
    "describe_difference",
    "describe_shape",
    "find_rival",
    "method_label",
    "write_headline",
    "write_tiles",
]

METHOD_LABELS = {
    "base": "Base model",
    "shared": "One adapter for all",
    "singles": "One adapter per task",
    OWN_GROUP: "Own group alone",
    BOOSTED_GROUP: "Own group, boosted",
    "ensemble": "Ensemble",
}

_MAX_SIZES = 6
_METRIC_NAMES = {"accuracy": "mean test accuracy", "nll": "mean test loss"}
_RIVALS = ("shared", "singles", "base")
"""of the tile; the ensemble's own parts stand in the table"""


def method_label(method: str) -> str:
    """Return what the report calls a method."""
    return METHOD_LABELS.get(method, method)


def find_rival(plan: PlanRecord) -> str:
    """Return the method that a run is compared with first: one adapter for all, or where that is the plan, the base."""
    return "base" if len(plan.groups) == 1 else "shared"


def write_headline(run: RunRecord) -> str:
    """Say in a sentence or two whether the tasks were grouped, how, and what that gained, with its interval."""
    if run.results is None or "ensemble" not in run.results.methods:
        return _headline_of_plan(run.plan)
    return _headline_of_results(run, run.results)


def describe_difference(difference: Difference, confidence: float) -> str:
    """Say by how much ``a`` is above ``b``, and whether that can be told from no difference.

    Accuracy and macro-F1 are in percentage points; a loss is in its own unit and lower is better.
    """
    is_rate = difference.metric in ("accuracy", "macro_f1")
    scale, digits, unit = (100.0, 1, " points") if is_rate else (1.0, 3, "")
    change = f"{format_signed(scale * (difference.difference or 0.0), digits)}{unit}"
    interval = format_interval(difference.low, difference.high, scale=scale, digits=digits)
    return f"{change} ({confidence:.0%} interval {interval})" if interval else change


def write_tiles(run: RunRecord) -> tuple[Tile, ...]:
    """Choose the few numbers to show large: what is known at the point the run has reached."""
    tiles = [_tile_of_groups(run.plan)]
    if run.results is not None and "ensemble" in run.results.methods:
        tiles.append(_tile_of_accuracy(run.results, run.plan))
    else:
        tiles.append(_tile_of_prediction(run.plan))
    if run.costs is not None:
        tiles += [tile for tile in (_tile_of_flops(run.costs.methods), _tile_of_bytes(run.costs.methods)) if tile]
        if (seconds := run.costs.wall_seconds) is not None:
            tiles.append(
                Tile(
                    "Wall time",
                    format_seconds(seconds),
                    f"{count(len(run.costs.stages), 'stage')}, without this page's",
                )
            )
    return tuple(tiles)


def _headline_of_plan(plan: PlanRecord) -> str:
    n_groups = len(plan.groups)
    if plan.n_tasks == 1:
        return f"{describe_shape(plan)}: there is nothing to group."
    if n_groups == 1 and any(point.n_groups > 1 for point in plan.curve):
        return f"{describe_shape(plan)}: no grouping is predicted to be clearly better."
    chosen = next((point for point in plan.curve if point.n_groups == n_groups), None)
    if n_groups == 1 or chosen is None or chosen.gain is None:
        return f"{describe_shape(plan)}: that is the plan."
    error = "" if chosen.gain_se is None else f" ± {format_number(chosen.gain_se)} (1 SE)"
    direction = "better" if chosen.gain >= 0 else "worse"
    size = f"{format_number(abs(chosen.gain))}{error}"
    return f"{describe_shape(plan)}: mean validation loss predicted {size} {direction} than one adapter for all."


def describe_shape(plan: PlanRecord) -> str:
    """Say what is trained."""
    if plan.n_tasks == 1:
        return f"One adapter for {plan.task_names[0]}"
    if len(plan.groups) == 1:
        return f"One adapter for all {plan.n_tasks} tasks"
    if len(plan.groups) == plan.n_tasks:
        return f"One adapter for each of {plan.n_tasks} tasks"
    return f"Training {plan.n_tasks} tasks in {len(plan.groups)} groups"


def _headline_of_results(run: RunRecord, results: ResultsRecord) -> str:
    if len(run.plan.groups) == 1:
        return _headline_of_one(run, results)
    shape = describe_shape(run.plan) + _name_boosters(run.ensemble)
    return _measure(shape, run, results, find_rival(run.plan), "one adapter for all")


def _headline_of_one(run: RunRecord, results: ResultsRecord) -> str:
    """Say that one adapter is the plan, what it gained over the base model, and what its boosters added to that."""
    shape, boosters = describe_shape(run.plan), _name_boosters(run.ensemble)
    opening = f"The plan is {shape[0].lower()}{shape[1:]}."
    who = f"{boosters.strip().capitalize()} it" if boosters else "It"
    told = _measure(who, run, results, find_rival(run.plan), "the base model")
    plain = next((name for name in (OWN_GROUP, "shared") if name in results.methods), None)
    if not boosters or plain is None:
        return f"{opening} {told}"
    metric = _choose_metric(run, results)
    added = results.find_difference("ensemble", plain, metric)
    if added is None or added.low is None or added.high is None:
        return f"{opening} {told}"
    change = describe_difference(added, run.config.evaluation.confidence)
    return f"{opening} {told} Against the same adapter without boosters: {change} in {_METRIC_NAMES[metric]}."


def _choose_metric(run: RunRecord, results: ResultsRecord) -> str:
    return "accuracy" if results.methods["ensemble"].mean("accuracy", run.plan.task_names) is not None else "nll"


def _measure(who: str, run: RunRecord, results: ResultsRecord, rival: str, against: str) -> str:
    """Say in a sentence what the ensemble gained over a rival in the mean over tasks."""
    metric = _choose_metric(run, results)
    difference = results.find_difference("ensemble", rival, metric)
    if difference is None or difference.low is None or difference.high is None:
        return f"{who}: {_compare_means(results, run.plan, metric, rival, against)}."
    confidence = run.config.evaluation.confidence
    judgement = _judge(difference, difference.low, difference.high, against, confidence)
    loss = results.find_difference("ensemble", rival, "nll")
    if metric == "accuracy" and not _is_shown(difference) and loss is not None and _is_shown(loss):
        change = describe_difference(difference, confidence)
        judgement = _judge(loss, loss.low or 0.0, loss.high or 0.0, against, confidence)
        judgement += f"; in mean test accuracy it made no difference that this run can show: {change}"
    return f"{who} {judgement}."


def _name_boosters(ensemble: EnsembleRecord | None) -> str:
    """What was measured beside the adapters; a table without it shows the adapters alone."""
    n_boosters = sum(member.kind == "booster" for member in ensemble.members) if ensemble else 0
    return f" with {count(n_boosters, 'booster')}" if n_boosters else ""


def _is_shown(difference: Difference) -> bool:
    """Whether the interval leaves zero out."""
    low, high = difference.low, difference.high
    return low is not None and high is not None and not low <= 0 <= high


def _judge(difference: Difference, low: float, high: float, against: str, confidence: float) -> str:
    """Say raised or lowered, made worse, or not shown to differ, as the interval allows."""
    is_rate, what = difference.metric == "accuracy", _METRIC_NAMES[difference.metric]
    value = difference.difference or 0.0
    size = f"{format_points(value)} points" if is_rate else format_number(abs(value))
    scale, digits = (100.0, 1) if is_rate else (1.0, 3)
    if low <= 0 <= high:
        change = describe_difference(difference, confidence)
        return f"made no difference that this run can show against {against}: {change} in {what}"
    if value < 0:  # the interval is of the size that is named, and has no sign
        low, high = -high, -low
    interval = (
        f"{confidence:.0%} interval {format_number(scale * low, digits)} to {format_number(scale * high, digits)}"
    )
    if is_rate == (value > 0):
        return f"{'raised' if is_rate else 'lowered'} {what} by {size} against {against} ({interval})"
    return f"made {what} worse by {size} against {against} ({interval})"


def _compare_means(results: ResultsRecord, plan: PlanRecord, metric: str, rival: str, against: str) -> str:
    show = format_percent if metric == "accuracy" else format_number
    mine = results.methods["ensemble"].mean(metric, plan.task_names)
    text = f"{_METRIC_NAMES[metric]} {show(mine)}"
    if rival in results.methods:
        text += f" against {show(results.methods[rival].mean(metric, plan.task_names))} for {against}"
    return text


def _tile_of_groups(plan: PlanRecord) -> Tile:
    sizes = [len(group) for group in plan.groups]
    tasks = count(plan.n_tasks, "task")
    if len(sizes) == 1:
        detail = tasks
    elif min(sizes) == max(sizes):
        detail = f"{tasks}: {sizes[0]} in each"
    else:
        listed = " + ".join(map(str, sizes)) if len(sizes) <= _MAX_SIZES else f"{min(sizes)} to {max(sizes)} in each"
        detail = f"{tasks}: {listed}"
    return Tile("Groups", str(len(sizes)), detail)


def _tile_of_accuracy(results: ResultsRecord, plan: PlanRecord) -> Tile:
    mean = results.methods["ensemble"].mean("accuracy", plan.task_names)
    if mean is None:
        loss = results.methods["ensemble"].mean("nll", plan.task_names)
        return Tile("Mean test loss", format_number(loss), "nats, lower is better")
    # Where the plan is one adapter for all, that is no rival of the ensemble, but a part of it.
    rivals = [name for name in _RIVALS if name in results.methods and (name != "shared" or len(plan.groups) > 1)]
    others = [
        f"{format_percent(value)} {method_label(name).lower()}"
        for name in rivals
        if (value := results.methods[name].mean("accuracy", plan.task_names)) is not None
    ]
    coverage = describe_coverage(results.methods["ensemble"].count("accuracy", plan.task_names), plan.n_tasks)
    detail = "; ".join(["ensemble", *others])
    return Tile(f"Mean test accuracy {coverage}".strip(), format_percent(mean), detail)


def _tile_of_prediction(plan: PlanRecord) -> Tile:
    rival, name = (
        (plan.predicted.base, "the base model")
        if len(plan.groups) == 1
        else (plan.predicted.shared, "one adapter for all")
    )
    return Tile("Predicted loss", _with_error(plan.predicted.plan), f"{_with_error(rival)} with {name}")


def _with_error(way: Prediction) -> str:
    error = "" if way.mean_nll_se is None else f" ± {format_number(way.mean_nll_se)}"
    return f"{format_number(way.mean_nll)}{error}"


def _tile_of_flops(methods: dict[str, MethodCosts]) -> Tile | None:
    totals = {}
    for method in ("shared", "ensemble"):
        costs = methods.get(method)
        if costs is None or costs.train_flops is None:
            return None
        totals[method] = costs.train_flops + (costs.select_flops or 0.0)
    if not totals["shared"]:
        return None  # its one adapter came from another run
    ratio = totals["ensemble"] / totals["shared"]
    return Tile("Compute", f"{format_ratio(ratio)}\u00d7", "of one adapter's training, selection included")


def _tile_of_bytes(methods: dict[str, MethodCosts]) -> Tile | None:
    costs = methods.get("ensemble")
    if costs is None or costs.adapter_bytes is None:
        return None
    passes = costs.inference_forward_passes
    detail = "" if passes is None else f"{format_ratio(passes)} forward pass{'' if passes == 1 else 'es'} to predict"
    return Tile("Adapters", format_bytes(costs.adapter_bytes), detail)
