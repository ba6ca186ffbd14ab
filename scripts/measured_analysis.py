"""What the benchmarks of the paper's analyses recorded, as sections of docs/measured.md.

Each ends with the paper's claims that its exhibits judge, what it cost, and the steps that are left, if any.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ensemblelora.analysis.linearization_page import name_variant
from ensemblelora.analysis.sharpness_summary import ALL, read_measures
from ensemblelora.analysis.transfer_page import list_rates
from ensemblelora.reproduction import paper

__all__ = ["render_linearization", "render_sharpness", "render_similarity", "render_transfer"]

Record = Mapping[str, Any]

_NOTHING = "-"
_LOWEST_R2 = -1.0
_GAINS = {
    "pearson": "correlation",
    "spearman": "rank correlation",
    "within_pearson": "correlation within tasks",
    "sign_share": "share of signs",
}
_KINDS = {"together": "fine-tuned together", "averaged": "averaged", "apart": "single ones, of each other"}
_SHARPNESS = ("largest trace", "largest trace, rescaled", "largest trace, first member", "largest eigenvalue")
_CORRELATED = ("largest trace", "mean trace", "largest GGN trace", "largest eigenvalue", "largest trace, first member")
_OUTCOME = "target loss less the base model's"
_FIELDS = {"overlap": "overlap", "left": "what is written", "right": "what is read", "cosine": "cosine"}


def render_linearization(record: Record) -> Iterator[str]:
    """Errors where fine-tuning ended, and by distance."""
    outcome = record["outcome"]
    n_subsets, n_rows = (outcome["options"][name] for name in ("n_subsets", "max_rows"))
    yield from _wrap(
        f"{_describe(record)}. Each number is over {n_subsets} adapters, a subset of tasks each, and {n_rows} "
        f"validation rows of each task; {outcome['confidence']:.0%} intervals over adapters in brackets. *Squared*: "
        "the paper's mean squared relative error. *R2*: over the prediction that nothing changes. Everything in "
        "float32 unless *native* is said."
    )
    yield ""
    yield "| where fine-tuning ended | distance | over the adapter's initial norm | squared | RMS relative | R2 |"
    yield "|---|---|---|---|---|---|"
    lengths = {_identify(row): row for row in outcome["distances"]}
    for row in outcome["ends"]:
        own = lengths.get(_identify(row))
        norm = _NOTHING if own is None else f"{own['distance_adapter']['value']:.1%}"
        yield f"| {name_variant(row)} | {row['distance']:.3%} | {norm} | {_list_errors(row)} |"
    yield from ("", *_render_distances(outcome))
    yield from _close(record)


def _render_distances(outcome: Record) -> Iterator[str]:
    """The config's own way to train, by distance along every line; where it breaks; the remainder's order."""
    if not outcome["by_distance"]:
        return
    own = {key: outcome["by_distance"][0][key] for key in ("base", "r", "epochs")}
    rows = [row for row in outcome["by_distance"] if _is_own(row, own)]
    found = {(row["kind"], row["precision"], row["asked"]): row for row in rows}
    yield f"| {name_variant(own)}, distance | squared | paper | squared, native | R2 | R2, the fit | R2, P w |"
    yield "|---|---|---|---|---|---|---|"
    for distance in sorted({row["asked"] for row in rows}):
        line, native = (found.get(("line", precision, distance)) for precision in ("float32", "native"))
        printed = paper.EXPANSION_ERROR.get(distance, {}).get(own["base"])
        fits = [_write_r2(found.get((kind, "float32", distance))) for kind in ("line", "dual", "projected")]
        cells = [_estimate(one and one["squared_relative"], ".2g") for one in (line, native)]
        told = _NOTHING if printed is None else f"{printed:.2g}"
        yield f"| {distance:.2%} | {cells[0]} | {told} | {cells[1]} | {' | '.join(fits)} |"
    yield ""
    yield from _wrap(
        "Along the straight line from the start to the fine-tuned adapter; *the fit*: along the sum of gradients that "
        "the oracle's fit of the same tasks stands for; *P w*: along the same fit expanded as the paper does."
    )
    broken = [row for row in outcome["breaks"] if row["precision"] == "float32" and row["kind"] == "line"]
    lines = "; ".join(
        f"{name_variant(row)} {row['r2_below_0.5']:.2%}" for row in broken if row["r2_below_0.5"] is not None
    )
    if lines:
        yield from ("", *_wrap(f"R2 falls below a half, along that line, at: {lines}."))
    law = [row for row in outcome["law"] if _is_own(row, own) and row["kind"] == "line"]
    told = "; ".join(
        f"{row['from']:.2%} to {row['to']:.2%} {_estimate(row['exponent'], '.1f')}"
        f"{', native' * (row['precision'] == 'native')}"
        for row in law
        if row["exponent"]["value"] is not None
    )
    if told:
        yield from ("", *_wrap(f"Exponent of the remainder in the distance, 2 for a second order: {told}."))


def _write_r2(row: Record | None) -> str:
    """R2 with its interval; far away it falls without bound."""
    found = None if row is None else row["r2_over_zero_order"]
    if found is None or found["value"] is None or found["value"] >= _LOWEST_R2:
        return _estimate(found, ".3f")
    return f"below {_LOWEST_R2:.0f}"


def render_transfer(record: Record) -> Iterator[str]:
    """Rates of positive transfer, their price, and whether the oracle knew."""
    outcome = record["outcome"]
    n, n_all, n_seeds = outcome["n_pairs"], outcome["n_all_pairs"], len(outcome["seeds"])
    which = ", those of the shortest texts" if outcome["options"]["shortest"] and 0 < n < n_all else ""
    yield from _wrap(
        f"{_describe(record)}; {n} of {n_all} pairs{which}. A task gains where its {outcome['part']} loss together is "
        f"below its loss alone; {outcome['confidence']:.0%} intervals over rows"
        f"{' and seeds' if n_seeds > 1 else ', with one seed: too narrow'}. *In any case*: the rate if all undecided "
        "cells were negative, or positive."
    )
    yield ""
    yield "| base method | fine-tuned on | positive | in any case | decided + | decided - | undecided | paper |"
    yield "|---|---|---|---|---|---|---|---|"
    for base, what, rate in list_rates(outcome):
        printed = {"pairs": paper.POSITIVE_PAIRS, "all tasks": paper.POSITIVE_ALL}.get(what, {}).get(base)
        told = _print_method(what) if printed is None else f"{printed:.0%}"
        counts = " | ".join(str(rate[key]) for key in ("n_positive", "n_negative", "n_undecided"))
        case = f"{rate['decided_low']:.0%} to {rate['decided_high']:.0%}"
        yield f"| {base} | {what} | {_estimate(rate, '.0%')} | {case} | {counts} | {told} |"
    yield from ("", *_render_price(outcome))
    if outcome["map"] is not None:
        yield from ("", *_render_gains(outcome["map"]))
    yield from _close(record)


def _print_method(what: str) -> str:
    """The paper's rate of a method, which it has for quantised bases alone."""
    printed = paper.POSITIVE_METHODS["qlora"].get(what.rpartition(", ")[2])
    return _NOTHING if printed is None else f"{printed:.0%} (QLoRA)"


def _render_price(outcome: Record) -> Iterator[str]:
    yield "| all tasks by | positive | mean loss | FLOPs over shared | forward passes | weights that answer |"
    yield "|---|---|---|---|---|---|"
    for base, found in outcome["bases"].items():
        shared = found["methods"]["shared"]["flops"]
        for name, method in found["methods"].items():
            rate = _NOTHING if method["transfer"] is None else f"{method['transfer']['rate']['value']:.0%}"
            loss = _NOTHING if method["loss"] is None else f"{method['loss']:.3f}"
            weights = f"{method['weight_bytes'] / 1e6:.1f} MB"
            ratio = f"{method['flops'] / shared:.2f}x"
            yield f"| {base}: {name} | {rate} | {loss} | {ratio} | {method['forward_passes']:.1f} | {weights} |"
    for base, measured in outcome["memory"].items():
        if len(measured) > 1:
            first, last = measured[0], measured[-1]
            more = (last["weight_bytes"] - first["weight_bytes"]) / (last["n_adapters"] - first["n_adapters"])
            yield from ("", *_wrap(f"{base}: one more adapter takes {more / 1e6:.2f} MB of weights."))


def _render_gains(found: Record) -> Iterator[str]:
    """What every partner gives a task, predicted and true."""
    gains, cells = found["gains"], found["cells"]
    decided = [cell for cell in cells if cell["verdict"] != "undecided"]
    told = ", ".join(f"{title} {_estimate(gains[key], '.2f')}" for key, title in _GAINS.items())
    yield from _wrap(
        f"Gain of a task by a partner on validation rows, predicted from gradients at the start against measured, "
        f"{gains['n_cells']} ordered pairs, {len(decided)} of them decided: {told}."
    )
    if decided:
        ranked = sorted(decided, key=lambda cell: float(cell["difference"]))
        named = "; ".join(
            f"{cell['task']} by {cell['partner']} {-cell['difference']:+.3f} (predicted {cell['predicted_gain']:+.3f})"
            for cell in (*ranked[:3], *ranked[max(3, len(ranked) - 3) :])
        )
        yield from ("", *_wrap(f"The farthest of these, in nats: {named}."))


def render_sharpness(record: Record) -> Iterator[str]:
    """Gaps and traces of every way to train, and how they go together."""
    outcome = record["outcome"]
    options, points = outcome["options"], outcome["points"]
    tasks = _join(dict.fromkeys(point["task"] for point in points))
    n_test, n_train = points[0]["n_test"], points[0]["n_train"]
    yield from _wrap(
        f"{_describe(record)}; adapters of {tasks}, each for one task, at the end of their training. Gap: test loss "
        f"less training loss, {n_test} and {n_train} rows, {outcome['confidence']:.0%} intervals over rows. Traces of "
        f"the loss's Hessian at {options['n_examples']} training rows, {options['n_probes']} random vectors, the "
        "largest with its standard error. *Times k*: what averaging k members takes off is put back. *First member*: "
        "what a program sees that differentiates with respect to it alone."
    )
    yield ""
    yield "| way to train | task | gap (nats) | largest trace | times k | first member | largest eigenvalue |"
    yield "|---|---|---|---|---|---|---|"
    for point in _list_distinct(points):
        values = read_measures(point["sharpness"])
        cells = [f"{values[name]:.3g}" if name in values else _NOTHING for name in _SHARPNESS]
        cells[0] += f" ± {point['sharpness']['adapter']['greatest_se']:.1g}"
        gap = _estimate({"value": point["gap"], "low": point["low"], "high": point["high"]}, "+.3f")
        yield f"| {point['label']} | {point['task']} | {gap} | {' | '.join(cells)} |"
    yield from ("", *_render_correlations(outcome))
    yield from _close(record)


def _render_correlations(outcome: Record) -> Iterator[str]:
    """Rank correlations within tasks, over all adapters, or over those of the one study there is."""
    scopes = list(dict.fromkeys(one["scope"] for one in outcome["correlations"]))
    scope = ALL if ALL in scopes else scopes[0]
    found = {one["measure"]: one for one in outcome["correlations"] if one["scope"] == scope}
    shifted = {
        one["measure"]: one
        for one in outcome["out_of_domain"]
        if one["outcome"] == _OUTCOME and one["scope"] == outcome["out_of_domain"][-1]["scope"]
    }
    n_points = next(iter(found.values()))["n_points"]
    yield f"| rank correlation within tasks, {n_points} adapters or ensembles | with the gap | with loss elsewhere |"
    yield "|---|---|---|"
    for name in dict.fromkeys((*_CORRELATED, *shifted)):
        if name in found or name in shifted:
            cells = [_estimate(one[name]["spearman"], "+.2f") if name in one else _NOTHING for one in (found, shifted)]
            yield f"| {name} | {' | '.join(cells)} |"
    if shifted:
        yield ""
        yield from _wrap(
            f"Elsewhere: {_join(outcome['options']['targets'])}, not trained on; less the base model's loss. "
            f"{' '.join(outcome['limits'])}"
        )


def render_similarity(record: Record) -> Iterator[str]:
    """How alike adapters for several tasks and for one are, as the tasks become more."""
    outcome = record["outcome"]
    yield from _wrap(
        f"{_describe(record)}. Adapters of subsets of tasks against those of their tasks alone: share of the top "
        "singular vectors' spaces of B A that both have, of what is written and of what is read, and the cosine of "
        f"the changes; {outcome['confidence']:.0%} intervals over subsets. What is read (A) begins alike in all."
    )
    yield ""
    yield f"| adapters | tasks | compared | {' | '.join(_FIELDS.values())} | by chance |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in outcome["by_size"]:
        cells = " | ".join(_estimate(row[name], ".2f") for name in _FIELDS)
        kind = f"{row['base']}, {_KINDS[row['kind']]}"
        yield f"| {kind} | {row['size']} | {row['n']} | {cells} | {row['chance']:.3f} |"
    yield from _close(record)


def _close(record: Record) -> Iterator[str]:
    """The paper's claims, costs, and what is left."""
    claims = [
        (row["claim"], _estimate({"value": row["ours"], **row}, ".3g"), row["paper"], row["verdict"])
        for made in record["exhibits"].values()
        for row in made["rows"]
        if "claim" in row and row["verdict"] in ("agrees", "disagrees", "undecided")
    ]
    if claims:
        yield from ("", "| claim of the paper | ours | paper | |", "|---|---|---|---|")
        for claim, ours, printed, verdict in claims:
            yield f"| {claim} | {ours} | {_NOTHING if printed is None else f'{printed:.3g}'} | {verdict} |"
    told = [f"* {note}" for made in record["exhibits"].values() for note in made["notes"] if "; ours " in note]
    if told:
        yield from ("", "Beside the paper:", "", *_wrap_items(dict.fromkeys(told)))
    left = "" if record["is_whole"] else f" Partial, not measured yet: {_join(record['steps_left'])}."
    yield ""
    yield from _wrap(
        f"`ensemblelora reproduce {next(iter(record['exhibits']), 'NAME')} benchmarks/results/"
        f"analysis-{record['outcome']['analysis']}.json` has all rows. {record['n_fine_tunings']} fine-tunings, "
        f"{record['flops']:.2g} FLOPs, {record['seconds'] / 60:.0f} minutes of {_count_threads(record)} in all."
        f"{left}"
    )


def _count_threads(record: Record) -> str:
    n = record["config"]["threads"]
    return "one thread" if n == 1 else f"{n} threads"


def _describe(record: Record) -> str:
    """Model, rows, epochs, seeds."""
    config, seeds = record["outcome"]["config"], record["outcome"]["seeds"]
    return (
        f"`ensemblelora analyze {record['outcome']['analysis']}`, {config['model']['name']}, "
        f"{config['data']['max_train_examples']} training rows a dataset, {config['training']['num_train_epochs']} "
        f"epochs unless said, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    )


def _identify(row: Record) -> tuple[Any, ...]:
    return row["base"], row["r"], row["epochs"]


def _is_own(row: Record, own: Record) -> bool:
    return all(row[key] == value for key, value in own.items())


def _list_errors(row: Record) -> str:
    forms = {"squared_relative": ".2g", "rms_relative": ".1%", "r2_over_zero_order": ".3f"}
    return " | ".join(_estimate(row[name], form) for name, form in forms.items())


def _list_distinct(points: Sequence[Record]) -> list[Record]:
    """Every adapter or ensemble once, whichever studies it is part of."""
    return list({(tuple(point["members"]), point["task"]): point for point in reversed(points)}.values())[::-1]


def _estimate(found: Record | None, form: str) -> str:
    if found is None or found["value"] is None:
        return _NOTHING
    low, high = found["low"], found["high"]
    ends = "" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"
    return f"{found['value']:{form}}{ends}"


def _join(names: Iterable[str]) -> str:
    return ", ".join(names)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, width=120, break_on_hyphens=False, break_long_words=False)


def _wrap_items(items: Iterable[str]) -> Iterator[str]:
    for item in items:
        yield from textwrap.wrap(item, width=120, subsequent_indent="  ", break_on_hyphens=False)
