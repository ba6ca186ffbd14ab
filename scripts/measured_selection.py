"""What the benchmark of source selection recorded, as sections of docs/measured.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

__all__ = ["render_costs", "render_noise", "render_search", "render_targets", "render_truth"]

Record = dict[str, Any]

_NOTHING = "-"
_BASELINES = ("none", "all", "gradients", "texts")


def render_targets(record: Record) -> Iterator[str]:
    """Every strategy against all sources, none, and the most alike."""
    config = record["config"]
    data = config["recipe"]["data"]
    yield from _tell_partial(record, f"{config['n_found']} of {config.get('n_asked')} targets and seeds")
    yield from _wrap(
        f"`ensemblelora select`, {config['n_targets']} of {len(data['tasks'])} of the paper's datasets as targets, the "
        f"others as sources, {data['max_train_examples']} training rows each, {config['n_found']} targets and seeds in "
        "all. Test accuracy and loss of the target; differences are means over targets, the smallest and largest "
        "target in brackets, and in how many the strategy is better."
    )
    yield ""
    yield "| trained on | accuracy | loss | sources | over none, points | over all, points | over gradients, points |"
    yield "|---|---|---|---|---|---|---|"
    for name, found in record["methods"].items():
        cells = [
            _format(record["differences"].get(f"{name} - {reference}", {}).get("accuracy"), 100, "+.1f")
            for reference in ("none", "all", "gradients")
        ]
        number = record["n_chosen"].get(name)
        told = _NOTHING if number is None else f"{number:.1f}"
        yield f"| {name} | {_percent(found['accuracy'])} | {found['nll']:.3f} | {told} | {' | '.join(cells)} |"
    if record["speed_up"]:
        yield ""
        yield from _wrap(
            "Truly fine-tuning every set that the search forward asks about would cost "
            f"{record['speed_up']['mean']:.1f} times the FLOPs of warm-up, gradient pass and one target's search."
        )


def render_costs(record: Record) -> Iterator[str]:
    """A search that fine-tunes against one that predicts."""
    yield from _tell_partial(record, "some of the targets")
    settings = record["config"]["recipe"]["training"]
    yield from _wrap(
        "FLOPs of truly fine-tuning every set that a search forward asks about, over those of the gradient pass (with "
        f"the warm-up, where there is one) and the search itself; {settings['num_train_epochs']} epochs. The true "
        "search is counted by the ledger's formulas, not run. Targets and seeds in brackets."
    )
    yield ""
    yield "| sources | of them chosen | true search over ours |"
    yield "|---|---|---|"
    for kind, label in (("whole", "whole datasets"), ("clusters", "clusters of them")):
        found = record[kind]
        told = _format(found["speed_up"], 1, ".1f")
        yield f"| {found['n_sources']:.0f}, {label} | {found['n_chosen']:.1f} | {told} |"


def render_truth(record: Record) -> Iterator[str]:
    """Predicted losses against true ones."""
    yield from _tell_partial(record, "some of the sets")
    yield from _wrap(
        "Sets of sources, predicted and truly fine-tuned from the warm-up, on the target's validation rows. *Error of "
        "the mean*: of predicting the mean over the true ones. *Base*: the rank correlation with fine-tunings that "
        "begin at the base model. *Regret*: true loss of the set with the best prediction over that of the best set; "
        "of all sources in brackets."
    )
    yield ""
    yield "| target | sets | relative error | error of the mean | Pearson | Spearman | base | regret |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, found in record["targets"].items():
        shown = [_number(found[key]) for key in ("pearson", "spearman", "spearman_base")]
        yield (
            f"| {name} | {len(found['sets'])} | {found['relative_error']:.2%} | {found['relative_error_of_mean']:.2%} "
            f"| {' | '.join(shown)} | {found['regret']:.4f} ({found['regret_of_all']:.4f}) |"
        )


def render_noise(record: Record) -> Iterator[str]:
    """Whether wrong labels are found."""
    config = record["config"]
    tasks = ", ".join(config["recipe"]["data"]["tasks"])
    yield from _tell_partial(record, f"{config['n_found']} of {config['seeds']} seeds")
    n_seeds = config["n_found"]
    yield from _wrap(
        f"Labels of half of {config['n_clusters']} clusters of {tasks} turned, {n_seeds} seed{'s' * (n_seeds > 1)}. "
        "Area under the curve of telling right from wrong clusters by what they are worth, and rows one by one; share "
        "of wrong clusters among the chosen; smallest and largest seed in brackets."
    )
    yield ""
    yield "| by | area under the curve |"
    yield "|---|---|"
    for name in ("scores", "loo", "shapley", "rows"):
        yield f"| {name} | {_format(record.get(f'auc_{name}'), 1, '.2f')} |"
    yield ""
    yield "| strategy | wrong clusters among the chosen |"
    yield "|---|---|"
    for name in ("forward", "backward", "swap", "beam"):
        yield f"| {name} | {_format(record.get(f'share_noisy_{name}'), 1, '.0%')} |"
    yield ""
    known = [name for name in ("all", "forward", "backward", "clean") if f"accuracy_{name}" in record]
    parts = [f"{name} {_format(record[f'accuracy_{name}'], 100, '.1f')}" for name in known]
    yield from _wrap(
        "Test accuracy of training on all clusters, on those that a search took, and on the right ones, %: "
        f"{', '.join(parts)}."
    )


def render_search(record: Record) -> Iterator[str]:
    """Time of a search."""
    config = record["config"]
    yield from _tell_partial(record, "one of two kinds of fit")
    kinds = {"steps": "by simulated training", "ridge": "by the convex fit"}
    known = {name: told for name, told in kinds.items() if f"forward_{name}_seconds" in record}
    seconds = ", ".join(f"{record[f'forward_{name}_seconds']:.1f} s {told}" for name, told in known.items())
    saved = min(record[f"forward_{name}_rows_saved"] for name in known)
    yield from _wrap(
        f"Search forward over {config['n_sources']} planted sources of {config['rows_a_source']} rows, d = "
        f"{config['proj_dim']}, from a finished store: {seconds}. Truly fine-tuning every set that it asks about, for "
        f"{config['epochs']} epochs, would pass {saved:.0f} times the rows of a warm-up of half the epochs and one "
        "gradient pass."
    )


def _tell_partial(record: Record, what: str) -> Iterator[str]:
    if not record["is_whole"]:
        yield from (f"**Partial**: {what}; the time was over before the rest.", "")


def _format(found: Record | None, scale: float, form: str) -> str:
    if not found:
        return _NOTHING
    mean, low, high = (format(scale * found[key], form) for key in ("mean", "min", "max"))
    better = f", {found['n_better']}/{found['n']}" if "n_better" in found else ""
    return f"{mean} [{low}, {high}]{better}"


def _percent(value: float | None) -> str:
    return _NOTHING if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.2f}"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)
