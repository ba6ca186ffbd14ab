"""What the benchmarks recorded: a page of docs/, and a table for the README; what has no record is left out."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from measured_additions import render_additions
from measured_analysis import render_linearization, render_sharpness, render_similarity, render_transfer
from measured_federated import render_federated, render_ways
from measured_forecast import render_forecast
from measured_scale import render_scale

from measured_comparison import render_comparison, render_run
from measured_selection import render_costs, render_noise, render_search, render_targets, render_truth
from measured_serving import render_serving

__all__ = ["render_measured", "summarize_speed"]

Record = dict[str, Any]

_TRAINING_LABELS = {
    "all": "ensemblelora, every layer",
    "top-third": "ensemblelora, top third",
    "groups-in-turn": "ensemblelora, every layer, four groups in turn",
    "groups-together": "ensemblelora, every layer, four groups together",
    "all-compiled": "ensemblelora, every layer, compiled",
    "stock": "Trainer + PEFT, their defaults",
    "stock-bf16": "Trainer + PEFT, bf16",
    "stock-bf16-weights": "Trainer + PEFT, bf16 weights",
}
_TRAINING_RATIOS = {
    "speedup_together": "Four groups together (`training.together`): {:.2f}x the tokens/s of one after the other",
    "speedup_compiled": "compiled (`training.compile`), compiling included: {:.2f}x of not compiled",
}
_INFERENCE_LABELS = {
    "exact": "exact, top third",
    "booster": "exact, three members and a booster (five passes), top third",
    "routed": "routed, top third",
    "folded": "folded, one adapter for all tasks, top third",
    "folded_per_task": "folded, one adapter for each task (ten), top third",
    "exact_all_layers": "exact, every layer (the default)",
}
_NOTHING = "-"
_VARIANT_LABELS = {"top-half": "top half", "top-third": "top third", "frozen-a": "every layer, frozen A"}
_SUMMARY = (
    ("training", "speedup_all_layers", "fine-tuning, every layer", "Trainer + PEFT, bf16", "{:.1f}x as fast"),
    ("training", "speedup_top_third", "fine-tuning, top third, 3 epochs", "Trainer + PEFT, bf16", "{:.1f}x as fast"),
    ("inference", "latency_ratio_exact", "four members, top third", "one adapter", "{:.1f}x the time"),
    ("inference", "latency_ratio_routed", "the same, each task routed", "one adapter", "{:.1f}x the time"),
    ("features", "ratio_to_train_step", "projected gradients", "a LoRA training step", "{:.2f}x as fast"),
    ("features", "ratio_to_sample_loop", "the same", "one backward pass an example", "{:.1f}x as fast"),
    ("oracle", "speedup_vs_sklearn", "200 subset fits", "scikit-learn's fastest solver", "{:.1f}x as fast"),
)


def summarize_speed(records: dict[str, Record]) -> Iterator[str]:
    """A table of one ratio a line."""
    yield from ("", "| what | against | measured |", "|---|---|---|")
    for name, key, what, against, form in _SUMMARY:
        if key in records.get(name, {}):
            ratio = records[name].get("spread", {}).get(key, {}).get("mean", records[name][key])  # as on the page
            yield f"| {what} | {against} | {form.format(ratio)} |"


def render_measured(records: dict[str, Record]) -> Iterator[str]:
    """Every comparison that was recorded, with the commit and the machine."""
    yield "# Measured"
    yield ""
    yield from _wrap(
        "Ratios of systems that ran side by side in one run of a script in `benchmarks/`; the records, with commands, "
        "versions and spreads, are in `benchmarks/results/`. What was tried and given up, and why: [log.md](log.md)."
    )
    for name, title, render in _SECTIONS:
        if name in records:
            record = records[name]
            yield from ("", f"## {title}", "", *render(record), "")
            cores = record.get("machine", record)["n_processors"]
            yield f"`{record['command']}`, commit {record['commit']}, {cores} processor cores."


def _render_training(record: dict[str, Any]) -> Iterator[str]:
    config = record["config"]
    yield from _wrap(
        f"Fine-tuning, LoRA r 8, one adapter for {config['rows_per_task']} rows of each of the ten datasets, unless "
        f"groups are named. Mean of {config['seeds']} seeds, the smallest and largest in brackets; what has no "
        "brackets was run once."
    )
    yield from ("", "| training | real tokens/s | held-out loss (nats) | peak memory |", "|---|---|---|---|")
    for name, system in record["systems"].items():
        rate, loss = _format_spread(system["tokens_per_second"], ".0f"), _format_spread(system["validation_nll"], ".3f")
        memory = f"{system['peak_memory_bytes']['mean'] / 1e9:.1f} GB"
        yield f"| {_label_training(name)} | {rate} | {loss} | {memory} |"
    said = [text.format(record[key]) for key, text in _TRAINING_RATIOS.items() if key in record]
    if said:
        yield from ("", *_wrap(f"{'; '.join(said)}."))


def _label_training(name: str) -> str:
    system, _, epochs = name.partition(", ")
    return f"{_TRAINING_LABELS.get(system, system)}, {epochs.replace('1 epochs', '1 epoch')}"


def _render_inference(record: dict[str, Any]) -> Iterator[str]:
    has_intervals = any(f"accuracy_points_lost_{key}_interval" in record for key in _INFERENCE_LABELS)
    noise = " [95 % over the rows]: where that holds 0, no difference is shown" if has_intervals else ""
    yield from _wrap(
        "*Exact* runs all four members for every row and averages their scores; a *booster* is one more adapter of a "
        "group, measured from the start adapter, which costs a pass too; *routed* runs each task's best member alone, "
        "as `ensemble.route: true` does for the tasks that lose nothing measurable by it; *folded* adds the members up "
        "into one adapter."
    )
    yield ""
    yield from _wrap(
        "Latency against one adapter of the same layers, and change of test accuracy and loss against the first row"
        f"{noise}."
    )
    yield from ("", "| inference | all rows of a task | one question | accuracy (points) | loss (nats) |")
    yield "|---|---|---|---|---|"
    for key, label in _INFERENCE_LABELS.items():
        ratios = [record.get(f"{name}_ratio_{key}") for name in ("latency", "single_latency")]
        if None in ratios:
            continue
        batch, single = (f"{ratio:.2f}x" for ratio in ratios)
        points = _format_change(record, f"accuracy_points_lost_{key}", "+.2f", sign=-1)
        nats = _format_change(record, f"nll_rise_{key}", "+.3f", sign=1)
        yield f"| {label} | {batch} | {single} | {points} | {nats} |"
    if "memory_ratio_exact" in record:
        yield from ("", f"Peak memory of the exact ensemble: {record['memory_ratio_exact']:.2f}x that of one adapter.")


def _render_price(record: dict[str, Any]) -> Iterator[str]:
    seeds, variants = record["config"]["seeds"], record["variants"]
    yield from _wrap(
        "*Frozen A* (`adapter.train_A: false`) trains only the second of LoRA's two factors. "
        f"Against adapting every layer, {seeds} seeds: mean difference, the smallest and largest in brackets; where "
        "these hold 0, no difference is shown. Without brackets: the difference of the means."
    )
    yield from ("", "| adapted | test accuracy (points) | test loss (nats) | validation loss (nats) | training time |")
    yield "|---|---|---|---|---|"
    for name, change in record["differences_to_all"].items():
        points, test = _format_spread(change["accuracy_points"], "+.1f"), _format_spread(change["test_nll"], "+.3f")
        # Earlier records have no differences seed by seed here, so that only the means' can be told.
        mean = variants[name]["validation_nll"]["mean"] - variants["all"]["validation_nll"]["mean"]
        validation = _format_spread(change.get("validation_nll", {"mean": mean}), "+.3f")
        label = _VARIANT_LABELS.get(name, name)
        yield f"| {label} | {points} | {test} | {validation} | {1 / change['speedup']:.2f}x |"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, width=120)


def _format_spread(values: dict[str, float], form: str) -> str:
    """Write a mean, with its range where it is one of several."""
    mean = format(values["mean"], form)
    return f"{mean} [{values['min']:{form}}, {values['max']:{form}}]" if "sd" in values else mean


def _format_change(record: dict[str, Any], key: str, form: str, *, sign: int) -> str:
    """Write a change against the exact ensemble with its interval; a dash where it was not measured."""
    if key not in record:
        return _NOTHING
    ends = sorted(sign * end for end in record.get(f"{key}_interval", ()))
    return format(sign * record[key], form) + (f" [{', '.join(format(end, form) for end in ends)}]" if ends else "")


def _render_features(record: Record) -> Iterator[str]:
    config = record["config"]
    yield from _wrap(
        f"Every example's own gradient, projected to {config['proj_dim']} numbers, batches of {config['examples']} "
        f"rows of one length, LoRA in every layer; rates of real tokens, {config['repeats']} repeats, range in "
        "brackets."
    )
    yield from ("", "| against | rate of features over its |", "|---|---|")
    labels = {
        "ratio_to_train_step": "a fine-tuning step of transformers and PEFT",
        "ratio_to_own_train_step": "our own fine-tuning step",
        "ratio_to_sample_loop": "a backward pass an example and a stored dense projection",
    }
    for key, label in labels.items():
        yield f"| {label} | {_format_spread(record['spread'][key], '.2f')} |"
    extra = record["projection_extra_bytes_by_coordinates"]
    told = ", ".join(f"{n_bytes / 1e6:.0f} MB for {size} coordinates" for size, n_bytes in extra.items())
    yield from ("", f"Memory that projecting adds: {told}.")


def _render_oracle(record: Record) -> Iterator[str]:
    config = record["config"]
    yield from _wrap(
        f"{config['n_subsets']} subsets of 3 of {config['n_tasks']} tasks with {config['rows']} rows each, d = "
        f"{config['proj_dim']}, predictions included, one thread, to the same optimum within {config['accuracy']:g}; "
        "against the fastest solver of each library, one subset after the other."
    )
    yield from ("", "| ridge | over scikit-learn | over scipy |", "|---|---|---|")
    for ridge, found in record["ridges"].items():
        cells = [_format_spread(found[f"speedup_vs_{name}"], ".1f") for name in ("sklearn", "scipy")]
        yield f"| {ridge} | {' | '.join(cells)} |"
    large = record["large"]
    yield ""
    yield f"500 tasks, 2,000 subsets of ten: {large['seconds']:.1f} s, {large['peak_memory_bytes'] / 1e9:.2f} GB."


def _render_memory(record: Record) -> Iterator[str]:
    config = record["config"]
    yield from _wrap(
        f"A store of {config['n_examples']:,} drawn rows of {config['n_tasks']} tasks, {config['proj_dim']} numbers "
        f"each, in a process that the system gives no more than {config['limit_bytes'] / 1e9:.0f} GB: built in "
        f"{record['build_seconds']:.0f} s within {record['build_peak_bytes'] / 1e9:.2f} GB; {config['n_subsets']} "
        f"subsets fitted, predicted and grouped in {record['solve_seconds'] + record['group_seconds']:.0f} s within "
        f"{record['peak_memory_bytes'] / 1e9:.2f} GB. On disk {record['store_bytes'] / 1e9:.2f} GB."
    )


def _render_sdp(record: Record) -> Iterator[str]:
    yield from _wrap(
        "The semidefinite relaxation of planted groups drowned in noise, one thread: seconds at the default tolerance; "
        "at equal accuracy, against the faster of Clarabel and SCS through cvxpy."
    )
    yield from ("", "| tasks | seconds | over cvxpy |", "|---|---|---|")
    for n in (10, 100, 500):
        if f"seconds_{n}" in record:
            yield f"| {n} | {record[f'seconds_{n}']:.2g} | {record[f'speedup_{n}']:.1f}x |"


_CALIBRATION_COLUMNS = {
    "relative error": ("all sizes", "relative_error", ".1%"),
    "R2 over the base": ("all sizes", "r2_over_base", ".2f"),
    "R2 over task means": ("all sizes", "r2_over_task_mean", ".2f"),
    "correlation within tasks": ("all sizes", "within_pearson", ".2f"),
    "without seed noise": ("all sizes", "corrected_within_pearson", ".2f"),
}


def _render_calibration(record: Record) -> Iterator[str]:
    config, costs = record["config"], record["costs"]
    yield from _wrap(
        f"Loss of {config['n_subsets']} subsets of the paper's ten datasets, truly fine-tuned (sizes 1, 3 and 10; "
        f"{_count_seeds(config)}) and predicted in several ways, all from gradients at d = {config['proj_dim']} unless "
        "said otherwise. *R2 over the base* is against predicting no change, *over task means* against knowing each "
        "task's mean over all true fine-tunings. *All - alone*: one adapter for all tasks less one a task, in nats; "
        "*distance*: predicted over true. 95 % intervals in brackets. Where the pilot is named, one true fine-tuning "
        "of all tasks was used."
    )
    yield from _render_predictors(record, "all tasks")
    true = record["predictors"][0]["all tasks"]["all_together_minus_alone"]["true"]
    ratio, ten = (costs[name] / costs["estimation"] for name in ("design", "design_paper_epochs"))
    yield ""
    yield from _wrap(
        f"Truly, all - alone is {_format_estimate(true, '+.3f')}. Fine-tuning all {costs['n_subsets_design']} subsets "
        f"that the run asked about would cost {ratio:.0f} times the FLOPs of predicting them, {ten:.0f} times at ten "
        f"epochs; {costs['gradient_share']:.2%} of predicting is the gradient pass."
    )
    if config["at_chance"]:
        yield ""
        yield from _wrap(
            f"No fine-tuning told the answers of {', '.join(config['at_chance'])} from chance, though losses moved. "
            "The other tasks alone:"
        )
        yield from _render_predictors(record, "above chance")


def _render_predictors(record: Record, which: str) -> Iterator[str]:
    yield ""
    yield f"| predictor | {' | '.join(_CALIBRATION_COLUMNS)} | all - alone | distance |"
    yield "|---" * (len(_CALIBRATION_COLUMNS) + 3) + "|"
    for entry in record["predictors"]:
        found, shown = entry[which], _CALIBRATION_COLUMNS.values()
        cells = [_format_estimate(found.get(size, {}).get(name), form) for size, name, form in shown]
        signs = found.get("all_together_minus_alone")
        sign = f"{signs['predicted']['value']:+.3f}" if signs else _NOTHING
        distance = f"{entry['distance_ratio']:.2f}" if "distance_ratio" in entry else _NOTHING
        yield f"| {entry['predictor']} | {' | '.join(cells)} | {sign} | {distance} |"


def _count_seeds(config: Record) -> str:
    counts = {int(n): k for n, k in config["subsets_by_number_of_seeds"].items()}
    return ", ".join(f"{k} with {n} seed{'s' if n > 1 else ''}" for n, k in sorted(counts.items()))


def _format_estimate(estimate: Record | None, form: str) -> str:
    if estimate is None or estimate["value"] is None:
        return _NOTHING
    low, high = estimate["low"], estimate["high"]
    return format(estimate["value"], form) + (f" [{low:{form}}, {high:{form}}]" if low is not None else "")


_SECTIONS: tuple[tuple[str, str, Callable[[Record], Iterator[str]]], ...] = (
    ("training", "Fine-tuning", _render_training),
    ("inference", "Prediction", _render_inference),
    ("variants", "Fewer layers, frozen A", _render_price),
    ("features", "Gradients", _render_features),
    ("oracle", "Subset fits", _render_oracle),
    ("memory", "A million rows", _render_memory),
    ("calibration", "Predicted and true fine-tuning", _render_calibration),
    ("comparison-opposed", "Methods, where tasks conflict", render_comparison),
    ("comparison-cpu", "Methods, on the ten datasets", render_comparison),
    ("comparison-parts", "Numbers of groups, boosters, weights", render_comparison),
    ("comparison-bottleneck", "Methods, on the ten datasets, bottleneck adapters", render_comparison),
    ("superglue-cpu", "One run on the ten datasets", render_run),
    ("sdp", "Grouping", _render_sdp),
    ("analysis-linearization", "The first-order expansion", render_linearization),
    ("analysis-transfer", "Who helps whom", render_transfer),
    ("analysis-sharpness", "Sharpness and the generalisation gap", render_sharpness),
    ("analysis-similarity", "How alike adapters are", render_similarity),
    ("selection-targets", "Choosing sources", render_targets),
    ("selection-truth", "Predicted and true sets of sources", render_truth),
    ("selection-noise", "Noisy parts of a dataset", render_noise),
    ("selection-speed", "Searching sources", render_search),
    ("selection-costs", "What a search saves", render_costs),
    ("federated-cpu", "Groups of 500 clients", render_federated),
    ("federated-factors", "Averaging adapters", render_ways),
    ("additions", "Datasets that arrive later", render_additions),
    ("additions-alone", "A dataset that arrives and stays alone", render_additions),
    ("serving", "Serving", render_serving),
    ("forecast", "Forecasts and what was true", render_forecast),
    ("scale", "Beyond one process", render_scale),
)
