"""A comparison's folder becomes one HTML page, one Markdown page, and the numbers behind both. No torch.

In: the records of a comparison, as far as it has come. Out: ``compare.html``, one file that needs no network,
``compare.md``, the same without figures, and ``compare.json``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemblelora.artifacts import write_json, write_text
from ensemblelora.comparison.ablation_sections import write_boosting, write_numbers
from ensemblelora.comparison.closing import list_limits, write_again
from ensemblelora.comparison.record import OURS, StudyRecord, read_study
from ensemblelora.comparison.sections import (
    describe_change,
    format_p_value,
    rank_methods,
    write_costs,
    write_groups,
    write_pareto,
    write_primary,
    write_scores,
)
from ensemblelora.comparison.statistics import LEVEL, Statistics, compute_statistics
from ensemblelora.errors import UsageError
from ensemblelora.report.build import render_html, render_markdown
from ensemblelora.report.document import Document, Step, Steps, Tile, Tiles
from ensemblelora.report.wording import (
    count,
    format_flops,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
    join_names,
)

__all__ = ["COMPARISON_FILES", "Page", "compose_comparison", "describe_study", "write_headline", "write_page"]

COMPARISON_FILES = ("compare.html", "compare.md", "compare.json")
_SECTIONS = (
    write_primary,
    write_scores,
    write_pareto,
    write_numbers,
    write_boosting,
    write_costs,
    write_groups,
    list_limits,
    write_again,
)


@dataclass(frozen=True)
class Page:
    """What was written."""

    path: Path
    study: StudyRecord
    statistics: Statistics


def write_page(folder: Path | str) -> Page:
    """Write the three files into a comparison's folder.

    Args:
        folder: With at least one record.

    Raises:
        UsageError: If it holds no comparison, or no record yet.
        StoreError: If a file of it is damaged.
        OutputError: If the files can't be written.
    """
    study = read_study(folder)
    if not study.records:
        told = "; ".join(f"{name}: {why}" for name, why in study.head.failures.items())
        raise UsageError(f"{folder}: no method has a result{f' ({told})' if told else ''}")
    found = compute_statistics(study)
    document = compose_comparison(study, found)
    html, markdown, numbers = (study.folder / name for name in COMPARISON_FILES)
    write_json(numbers, {"study": describe_study(study)} | asdict(found))
    write_text(markdown, render_markdown(document))
    write_text(html, render_html(document))
    return Page(html, study, found)


def compose_comparison(study: StudyRecord, found: Statistics) -> Document:
    """Turn a comparison into the page's text, tables and figures."""
    about, sections = describe_study(study), [write(study, found) for write in _SECTIONS]
    facts = (
        f"comparison {study.folder.name}",
        count(len(found.tasks), "task"),
        about["model"],
        f"{about['adapter']}, {count(about['num_train_epochs'], 'epoch')}",
        count(len(about["seeds"]), "seed"),
        *(fact for fact in (about["version"] and f"ensemblelora {about['version']}", about["created"]) if fact),
    )
    opening = (_write_steps(study, found), Tiles(_write_tiles(study, found)))
    name = f"{study.folder.name}: ensemblelora comparison"
    return Document(name, facts, write_headline(found), opening, [section for section in sections if section])


def describe_study(study: StudyRecord) -> dict[str, Any]:
    """What tables of several comparisons name beside numbers: model, adapter, sizes, epochs, seeds, versions."""
    config, tasks = study.config, study.head.tasks
    environment = study.environment
    return {
        "folder": study.folder.name,
        "model": config.model.name,
        "quantization": config.model.quantization,
        "adapter": config.adapter.method,
        "num_train_epochs": config.training.num_train_epochs,
        "learning_rates": study.head.learning_rates,
        "seeds": study.head.seeds,
        "n_train": {task.name: task.n_train for task in tasks},
        "n_validation": {task.name: task.n_validation for task in tasks},
        "n_test": {task.name: len(task.groups) for task in tasks},
        "version": environment.get("package_version"),
        "created": environment.get("created"),
        "device": environment.get("device"),
        "failures": study.head.failures,
        "lower": study.head.lower,
    }


def write_headline(found: Statistics) -> str:
    """Say how ours stands against the best of the methods it is compared with, or which is the best.

    Where nothing was learnt, a second sentence says so: no difference between methods means anything then.
    """
    return f"{_write_outcome(found)}{_write_vain(found)}"


def _write_outcome(found: Statistics) -> str:
    metric = "accuracy" if any("accuracy" in method.mean for method in found.methods.values()) else "nll"
    ranked = [method for method in rank_methods(found) if metric in method.mean]
    against = [pair.b for pair in found.primary if pair.a == OURS and pair.metric == metric]
    rivals = [method for method in ranked if method.name in against]
    what = "accuracy" if metric == "accuracy" else "loss"
    if OURS in found.methods and rivals:
        result = found.find(OURS, rivals[0].name, metric)
        if result is not None:
            change = describe_change(result, found.confidence)
            p_value = "" if result.p_holm is None else f", corrected p {format_p_value(result.p_holm)}"
            mean = _write_mean(found, OURS, metric)
            others = f", the best of {len(rivals)} rivals" if len(rivals) > 1 else ""
            return f"Ours: mean test {what} {mean}; {change} against {rivals[0].title}{others}{p_value}."
    best = _write_mean(found, ranked[0].name, metric)
    return f"Of {count(len(ranked), 'method')}, {ranked[0].title} has the best mean test {what}: {best}."


def _write_vain(found: Statistics) -> str:
    """Say so where no task was learnt, or no training did better than none."""
    told = ""
    base = found.methods.get("base")
    trained = [method for name, method in found.methods.items() if name != "base"]
    metric = "accuracy" if base is not None and "accuracy" in base.mean else "nll"
    sign = 1 if metric == "accuracy" else -1
    known = [sign * method.mean[metric].value for method in trained if metric in method.mean]
    if base is not None and metric in base.mean and known and sign * base.mean[metric].value >= max(known):
        told += f" No training is better than the model as it is ({_write_mean(found, 'base', metric)})."
    if trained and found.at_chance and set(found.at_chance) == set(found.tasks):
        told += (
            " All tasks are at chance, so that no difference between methods means anything: give more rows or epochs."
        )
    return told


def _write_steps(study: StudyRecord, found: Statistics) -> Steps:
    """Tell a comparison in three sentences: what was named beforehand, and what of it came out."""
    named = len({(result.a, result.b) for result in found.primary if not result.is_late})
    asked = f"{count(len(study.head.methods), 'method')} on {count(len(found.tasks), 'task')}, the same rows for all, "
    asked += f"{count(len(study.head.seeds), 'seed')}."
    shown = [result for result in found.primary if result.p_holm is not None and result.p_holm < LEVEL]
    told = [f"{r.a} against {r.b} ({'accuracy' if r.metric == 'accuracy' else 'loss'})" for r in shown]
    some = f": {join_names(told, 4)}" if told else ""
    came = f"{len(shown)} of {count(len(found.primary), 'line')} are told apart after correction{some}."
    return Steps(
        (
            Step("Asked", asked),
            Step("Named beforehand", f"{count(named, 'pair')} of methods, in accuracy and loss."),
            Step("Came out", came),
        )
    )


def _write_mean(found: Statistics, name: str, metric: str) -> str:
    value = found.methods[name].mean[metric].value
    return format_percent(value) if metric == "accuracy" else format_number(value)


def _write_tiles(study: StudyRecord, found: Statistics) -> tuple[Tile, ...]:
    seeds, seconds = count(len(study.head.seeds), "seed"), sum(r.costs["seconds"] for r in study.records)
    n_rows = sum(len(task.groups) for task in study.head.tasks)
    tiles = [
        Tile("Methods", str(len(study.methods)), f"{seeds}, {count(len(study.records), 'record')}"),
        Tile("Test rows", f"{n_rows:,}", count(len(found.tasks), "task")),
    ]
    primary = [r for r in found.primary if r.metric == "accuracy" and not r.is_above_chance]
    visible = [r.detectable for r in primary if r.detectable is not None]
    if visible:
        points = f"{format_number(100 * float(np.median(visible)), 1)} points"
        tiles.append(Tile("Could be found", points, "of accuracy by a primary comparison, in 80% of studies"))
    ours, shared = (found.methods.get(name) for name in (OURS, "shared"))
    if ours and shared and shared.costs.flops:
        ratio = f"{format_ratio(ours.costs.flops / shared.costs.flops)}\u00d7"
        tiles.append(Tile("Compute", ratio, "of one adapter for all, choosing included"))
    spent = sum(method.costs.grid_flops for method in found.methods.values())
    detail = f"search of learning rates {format_flops(spent)}" if spent else "of methods, one by one"
    tiles.append(Tile("Measured time", format_seconds(seconds), detail))
    return tuple(tiles)
