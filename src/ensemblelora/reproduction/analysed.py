"""Tables 2 and 5, figures 2 and 11 and appendix B.6 of the paper, from the results of analyses.

In: folders of ``ensemblelora analyze``. Out: :class:`~.exhibit.Reproduction`; its notes say, order by order, where ours
agrees with the paper, where it does not, and what intervals leave open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemblelora.analysis.record import find_result, read_result
from ensemblelora.analysis.transfer_page import list_rates
from ensemblelora.config import parse_config
from ensemblelora.report.wording import count
from ensemblelora.reproduction import paper
from ensemblelora.reproduction.exhibit import Reproduction, Row
from ensemblelora.reproduction.shape import judge_order, list_orders, list_values

__all__ = ["ANALYSED_EXHIBITS", "LINEARIZED_EXHIBITS", "is_analysed", "make_linearized"]

Result = Mapping[str, Any]
Estimate = Mapping[str, Any]

_PAIRS = 45
_SECOND_ORDER = 4
"""exponent of a squared remainder of second order in the distance"""


@dataclass(frozen=True, eq=False)
class Analysed:
    """One folder's result."""

    name: str
    result: Result

    def describe(self) -> str:
        """Model, sizes, epochs and seeds in one line."""
        config = parse_config(self.result["config"])
        rounded = " (itself a dequantised 4-bit file)" if config.model.name.endswith((".gguf", "smollm2-135m")) else ""
        return (
            f"{self.name}: {config.model.name}{rounded}, {count(len(config.data.tasks), 'task')}, at most "
            f"{config.data.max_train_examples or 'all'} training rows a task, "
            f"{count(config.training.num_train_epochs, 'epoch')}, {count(len(self.result['seeds']), 'seed')}"
        )


def is_analysed(folder: Path, name: str) -> bool:
    """Whether a folder holds an analysis' result, or is the analysis' own, or is a benchmark's record of one."""
    return find_result(folder, name) is not None


def make_linearized(exhibit: str, folders: Sequence[Path]) -> Reproduction:
    """Make an exhibit of the expansion's error from analyses ``linearization``.

    Raises:
        UsageError: If a folder has none.
    """
    return LINEARIZED_EXHIBITS[exhibit]([_open(folder, "linearization") for folder in folders])


def _open(folder: Path, name: str) -> Analysed:
    return Analysed(folder.resolve().name, read_result(folder, name))


def _table_2(found: Sequence[Analysed]) -> Reproduction:
    rows: list[Row] = []
    notes = [entry.describe() for entry in found]
    for entry in found:
        bases = _by_base(entry.result["distances"], entry.result)
        for row in entry.result["distances"]:
            printed = paper.DISTANCE.get(row["base"])
            rows.append(
                _describe(entry, row)
                | {"mean": row["distance"]["value"], "sd": row["sd"], **_ends(row["distance"])}
                | {"over the adapter's initial norm": row["distance_adapter"]["value"]}
                | {"fine-tunings": float(row["n_adapters"])}
                | {f"paper {model}": printed[i] if printed else None for i, model in enumerate(paper.MODELS)}
            )
        smallest = {base: values[0] for base, values in paper.DISTANCE.items()}
        notes += list_orders("distance", {base: row["distance"] for base, row in bases.items()}, smallest)
    notes.append(
        "Smaller models are trained with larger steps: distances of 135 million parameters are not the paper's."
    )
    return Reproduction(
        "table2", "Distance of fine-tuned weights, over the norm of the model", tuple(rows), tuple(notes)
    )


def _table_5(found: Sequence[Analysed]) -> Reproduction:
    rows: list[Row] = []
    notes = [entry.describe() for entry in found]
    for entry in found:
        lines = [r for r in entry.result["by_distance"] if r["kind"] == "line" and r["precision"] == "float32"]
        for row in lines:
            printed = paper.EXPANSION_ERROR.get(row["asked"], {})
            rows.append(
                _describe(entry, row)
                | {"distance": row["asked"], "mean squared relative": row["squared_relative"]["value"]}
                | _ends(row["squared_relative"])
                | {"RMS relative": row["rms_relative"]["value"]}
                | {"R2 over zero order": row["r2_over_zero_order"]["value"]}
                | {"paper, smallest model": printed.get(row["base"])}
            )
        notes += _describe_growth(entry, lines)
    return Reproduction("table5", "Error of the first-order expansion by relative distance", tuple(rows), tuple(notes))


def _describe_growth(entry: Analysed, lines: Sequence[Result]) -> Iterator[str]:
    """How much the error grows over the paper's distances, beside the paper and a second-order remainder."""
    first, last = min(paper.EXPANSION_ERROR), max(paper.EXPANSION_ERROR)
    for base, own in _by_base(lines, entry.result, every=True).items():
        errors = {row["asked"]: row["squared_relative"] for row in own}
        if first not in errors or last not in errors:
            continue
        verdict = judge_order(errors[last], errors[first])
        yield f"{base}: the paper's error rises with distance; ours {verdict}"
        near, far = (errors[distance]["value"] for distance in (first, last))
        ratio = f"{far / near:.3g}" if near else "beyond all bounds"
        printed = [paper.EXPANSION_ERROR[distance].get(base) for distance in (first, last)]
        told = f"{printed[1] / printed[0]:.3g}" if printed[0] and printed[1] else "nothing"
        theory = (last / first) ** _SECOND_ORDER
        yield (
            f"{base}: from {first:.2%} to {last:.2%} the squared error grows {ratio} times; in the paper {told} times; "
            f"a remainder of second order {theory:.3g} times"
        )


def _figure_2(found: Sequence[Analysed]) -> Reproduction:
    rows: list[Row] = []
    notes = [entry.describe() for entry in found]
    for entry in found:
        ends = [row for row in entry.result["ends"] if row["precision"] == "float32"]
        rows += [
            _describe(entry, row)
            | {"distance": row["distance"], "mean squared relative": row["squared_relative"]["value"]}
            | _ends(row["squared_relative"])
            | {"RMS relative": row["rms_relative"]["value"], "R2 over zero order": row["r2_over_zero_order"]["value"]}
            | {"paper, at most": paper.EXPANSION_LIMIT.get(row["base"])}
            for row in ends
        ]
        for base, row in _by_base(ends, entry.result).items():
            limit = paper.EXPANSION_LIMIT.get(base)
            if limit is not None:
                bound = {"value": limit, "low": limit, "high": limit}
                verdict = judge_order(bound, row["squared_relative"])
                notes.append(f"{base}: the paper's squared relative error is below {limit:.0%}; ours {verdict}")
    return Reproduction(
        "figure2", "Error of the first-order expansion where fine-tuning ended", tuple(rows), tuple(notes)
    )


def _figure_11(folders: Sequence[Path]) -> Reproduction:
    found = [_open(folder, "transfer") for folder in folders]
    rows: list[Row] = []
    notes = [entry.describe() for entry in found]
    for entry in found:
        for base, one in entry.result["bases"].items():
            shared = one["methods"]["shared"]
            for name, method in one["methods"].items():
                rate = None if method["transfer"] is None else method["transfer"]["rate"]
                column = f"{base}: {name}"
                cells: dict[str, tuple[str, float | None, float | None]] = {
                    "positive transfer": ("accuracy", rate and rate["value"], _print_rate(base, name)),
                    "FLOPs over shared": ("ratio", method["flops"] / shared["flops"], None),
                    "weights that answer": ("bytes", method["weight_bytes"], None),
                    "forward passes": ("ratio", method["forward_passes"], None),
                }
                rows += [_cell(entry, row, column, *cell) for row, cell in cells.items()]
            rates = {n: m["transfer"]["rate"] for n, m in one["methods"].items() if m["transfer"] is not None}
            printed = {n: told for n in rates if (told := _print_rate(base, n)) is not None}
            notes += [f"{base}, {line}" for line in list_orders("positive transfer", rates, printed)]
    notes.append("The paper: Llama-3-8B, ten tasks, counted by test loss; its axes are FLOPs and a GPU's memory.")
    return Reproduction("figure11", "Positive transfer against FLOPs and memory", tuple(rows), tuple(notes))


def _appendix_b6(folders: Sequence[Path]) -> Reproduction:
    found = [_open(folder, "transfer") for folder in folders]
    rows: list[Row] = []
    notes = [entry.describe() for entry in found]
    for entry in found:
        bases = entry.result["bases"]
        for base, what, rate in list_rates(entry.result):
            printed = {"pairs": paper.POSITIVE_PAIRS, "all tasks": paper.POSITIVE_ALL}.get(what, {}).get(base)
            rows.append(_cell(entry, what, base, "accuracy", rate["value"], printed))
            if what == "pairs":
                told = paper.WORSE_PAIRS.get(base)
                worse = 1 - rate["value"]
                rows.append(_cell(entry, "pairs worse", base, "accuracy", worse, told and told / _PAIRS))
        rows += _memory_cells(entry)
        pairs = {base: one["pairs"]["rate"] for base, one in bases.items() if one["pairs"] is not None}
        together = {base: one["all"]["rate"] for base, one in bases.items()}
        if 0 < entry.result["n_pairs"] < entry.result["n_all_pairs"]:
            which = "shortest texts" if entry.result["options"]["shortest"] else "tasks alike often"
            notes.append(f"{entry.name}: {entry.result['n_pairs']} of {entry.result['n_all_pairs']} pairs, {which}")
        notes += list_values("pairs", pairs, paper.POSITIVE_PAIRS)
        notes += list_orders("pairs", pairs, paper.POSITIVE_PAIRS)
        notes += list_values("all tasks", together, paper.POSITIVE_ALL)
        notes += list_orders("all tasks", together, paper.POSITIVE_ALL)
        notes += _judge_averages(bases)
    notes.append("The paper: Llama-3-8B, ten tasks, 45 pairs, counted by loss; averages of weights: no numbers.")
    return Reproduction("sectionB.6", "Rates of positive transfer by base method", tuple(rows), tuple(notes))


def _judge_averages(bases: Mapping[str, Result]) -> Iterator[str]:
    for base, one in bases.items():
        for kind, own in one["averages"].items():
            if one["pairs"] is not None and own["pairs"] is not None:
                verdict = judge_order(one["pairs"]["rate"], own["pairs"]["rate"])
                yield (
                    f"{base}, averages ({kind}): the paper has training on pairs above averaging two adapters; ours "
                    f"{verdict}"
                )


def _memory_cells(entry: Analysed) -> Iterator[Row]:
    """What one more adapter takes: its weights here; on the paper's GPU, also what it kept of activations."""
    for base, measured in entry.result["memory"].items():
        if len(measured) > 1:
            first, last = measured[0], measured[-1]
            more = (last["weight_bytes"] - first["weight_bytes"]) / (last["n_adapters"] - first["n_adapters"])
            printed = paper.MEMORY_BY_ADAPTERS.get(base)
            yield _cell(entry, "memory of one more adapter", base, "bytes", more, printed and printed[1])
            share = more / first["weight_bytes"]
            told = printed and printed[1] / printed[0]
            yield _cell(entry, "over one adapter and its base", base, "ratio", share, told)


def _print_rate(base: str, name: str) -> float | None:
    if name == "shared":
        return paper.POSITIVE_ALL.get(base)
    return paper.POSITIVE_METHODS.get(base, {}).get(name)


def _by_base(rows: Sequence[Result], result: Result, *, every: bool = False) -> dict[str, Any]:
    """Rows by base method, each at the rank and epochs of the config, or of its first row: those of the comparison.

    Args:
        rows: Of variants.
        result: Whose config says what its own rank and epochs are.
        every: Give all rows of that variant, not its first.
    """
    config = parse_config(result["config"])
    epochs = config.training.num_train_epochs
    groups: dict[str, list[Result]] = {}
    for row in rows:
        is_own = row["epochs"] == epochs and row["r"] in (None, config.adapter.r)
        if is_own:
            groups.setdefault(str(row["base"]), []).append(row)
    return {base: own if every else own[0] for base, own in groups.items()}


def _describe(entry: Analysed, row: Result) -> dict[str, float | str | None]:
    config = parse_config(entry.result["config"])
    return {
        "run": entry.name,
        "model": config.model.name,
        "adapter": str(row["base"]),
        "r": None if row["r"] is None else float(row["r"]),
        "epochs": float(row["epochs"]),
    }


def _ends(estimate: Estimate) -> dict[str, float | None]:
    return {"low": estimate["low"], "high": estimate["high"]}


def _cell(entry: Analysed, row: str, column: str, unit: str, ours: float | None, printed: float | None) -> Row:
    return {
        "folder": entry.name,
        "row": row,
        "column": column,
        "unit": unit,
        "ours": ours,
        "sd": None,
        "paper": printed,
    }


LINEARIZED_EXHIBITS: Mapping[str, Callable[[Sequence[Analysed]], Reproduction]] = {
    "table2": _table_2,
    "table5": _table_5,
    "figure2": _figure_2,
}

ANALYSED_EXHIBITS: Mapping[str, Callable[[Sequence[Path]], Reproduction]] = {
    "figure11": _figure_11,
    "sectionB.6": _appendix_b6,
}
