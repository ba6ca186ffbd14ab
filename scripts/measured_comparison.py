"""What runs and comparisons of methods recorded: tables for the README and docs/measured.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

__all__ = ["render_comparison", "render_run", "summarize_comparison"]

Record = dict[str, Any]

_NOTHING = "-"
_BASELINE = "shared"


def summarize_comparison(record: Record) -> Iterator[str]:
    """Mean accuracy, loss and cost of every method."""
    outcome = record["comparison"]
    methods, study = outcome["methods"], outcome["study"]
    yield f"`{record['command']}`"
    yield ""
    yield "| method | accuracy | loss (nats) | training FLOPs | passes a row |"
    yield "|---|---|---|---|---|"
    best = {metric: _find_best(methods, metric) for metric in ("accuracy", "nll")}
    base = _spent(methods[_BASELINE]) if _BASELINE in methods else None
    for name, method in methods.items():
        if name.startswith("random-") and "random" in methods:
            continue  # their mean stands for the draws
        cells = [_format_mean(method["mean"][metric], metric, name == best[metric]) for metric in best]
        spent = f"{_spent(method) / base:.2f}x" if base and _spent(method) else _NOTHING
        yield f"| {method['title']} | {' | '.join(cells)} | {spent} | {method['costs']['forward_passes']:.1f} |"
    yield ""
    yield from _wrap(
        f"{study['model']}, {len(study['seeds'])} seed{'s' * (len(study['seeds']) > 1)}, "
        f"{study['num_train_epochs']} epochs; means over "
        f"{len(outcome['tasks'])} tasks, 95 % intervals over rows and seeds. FLOPs are training and choosing groups, "
        "against one adapter for all; rates tried on validation rows alike for all, not counted."
    )


def render_comparison(record: Record) -> Iterator[str]:
    """The table, every task's accuracy, and the comparisons named beforehand."""
    yield from summarize_comparison(record)
    outcome = record["comparison"]
    methods = outcome["methods"]
    yield ""
    yield f"| test accuracy | {' | '.join(method['title'] for method in methods.values())} |"
    yield "|---" * (len(methods) + 1) + "|"
    for task in outcome["tasks"]:
        marked = f"{task} (chance)" if task in outcome["at_chance"] else task
        cells = [f"{100 * method['per_task'][task]['accuracy']['value']:.1f}" for method in methods.values()]
        yield f"| {marked} | {' | '.join(cells)} |"
    for name, method in methods.items():
        grouped = [" ".join(f"({', '.join(group)})" for group in groups) for groups in method["groups"] or () if groups]
        if name in ("ours", "grouped") and grouped:
            yield ""
            yield from _wrap(f"Groups of *{method['title']}*, seed by seed: {'; '.join(grouped)}.")
    if outcome["primary"]:
        yield ""
        yield "| named beforehand | metric | difference | p, corrected (Holm) | could have been seen |"
        yield "|---|---|---|---|---|"
    for entry in outcome["primary"]:
        scale, form = (100, "+.1f") if entry["metric"] == "accuracy" else (1, "+.3f")
        ends = [entry["low"], entry["high"]]
        interval = "" if None in ends else f" [{', '.join(format(scale * end, form) for end in ends)}]"
        p = _NOTHING if entry["p_holm"] is None else f"{entry['p_holm']:.3g}"
        seen = entry["detectable_corrected"] or entry["detectable"]
        told = _NOTHING if seen is None else format(scale * seen, form[1:])
        over = ", tasks above chance" if entry["is_above_chance"] else ""
        change = f"{scale * entry['difference']:{form}}{interval}"
        yield f"| {entry['a']} - {entry['b']}{over} | {entry['metric']} | {change} | {p} | {told} |"


def render_run(record: Record) -> Iterator[str]:
    """Accuracy of every task, of the run's own methods."""
    model, plan, results = record["environment"]["model"], record["plan"], record["results"]
    minutes = record["wall_seconds"] / 60
    yield f"{model['name']} ({model['dtype']}), one seed, {minutes:.0f} minutes. The plan: {plan['decision']}."
    yield from ("", *_wrap(plan["reason"]), "")
    methods = list(results["methods"])
    yield f"| test rows | {' | '.join(methods)} |"
    yield "|---" * (len(methods) + 1) + "|"
    for task in plan["task_names"]:
        scores = [results["methods"][method]["per_task"][task] for method in methods]
        cells = " | ".join(_format_interval(score) for score in scores)
        yield f"| {task} ({scores[0]['n_examples']}) | {cells} |"
    for metric, name in (("accuracy", "mean accuracy"), ("nll", "mean loss (nats)")):
        yield f"| {name} | {' | '.join(format(results['methods'][m]['mean'][metric], '.3f') for m in methods)} |"


def _format_interval(score: Record) -> str:
    low, high = score["accuracy_low"], score["accuracy_high"]
    return f"{score['accuracy']:.2f} [{low:.2f}, {high:.2f}]" if score["accuracy"] is not None else _NOTHING


def _find_best(methods: dict[str, Record], metric: str) -> str:
    sign = 1 if metric == "accuracy" else -1
    return max(methods, key=lambda name: sign * methods[name]["mean"][metric]["value"])


def _spent(method: Record) -> float:
    return float(method["costs"]["train_flops"] + method["costs"]["select_flops"])


def _format_mean(mean: Record, metric: str, is_best: bool) -> str:
    def show(value: float) -> str:
        return f"{100 * value:.1f}" if metric == "accuracy" else f"{value:.3f}"

    ends = (mean["low"], mean["high"]) if mean["low"] is not None else (mean["rows_low"], mean["rows_high"])
    told = f"**{show(mean['value'])}**" if is_best else show(mean["value"])
    return f"{told} [{show(ends[0])}, {show(ends[1])}]"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, width=120)
