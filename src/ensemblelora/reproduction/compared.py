"""Tables 1, 4, 6 and 7, figures 4 and 7 and sections 2.1 and 3.3 of the paper, from records of comparisons. No torch.

In: folders of ``ensemblelora compare``, or records of them. Out: :class:`~.exhibit.Reproduction`, a table a folder:
methods across, tasks, FLOPs and memory down, the paper's numbers beside ours. A method that was not compared has the
paper's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ensemblelora.artifacts import read_json
from ensemblelora.comparison.ablation import collect_first_rounds, collect_numbers, compare_boosting
from ensemblelora.comparison.page import describe_study
from ensemblelora.comparison.record import StudyRecord, read_study
from ensemblelora.comparison.sections import describe_change
from ensemblelora.comparison.statistics import Figure, MethodResult, Statistics, compute_statistics
from ensemblelora.config import parse_config
from ensemblelora.errors import ConfigError, StoreError, UsageError
from ensemblelora.report.wording import count
from ensemblelora.reproduction import paper
from ensemblelora.reproduction.exhibit import Reproduction, Row, name_base_method
from ensemblelora.reproduction.paper import Printed

__all__ = ["COMPARED_EXHIBITS", "Compared", "open_compared", "write_ensemble_gain"]

Thing = TypeVar("Thing")

_AVERAGE = "average"
_N_TASKS = 10
"""of the paper's averages"""
_BASE_LINES = ("lora", "qlora")
"""the paper's lines of one adapter on all tasks"""


@dataclass(frozen=True, eq=False)
class Compared:
    """A comparison.

    Attributes:
        name: Of its folder, or of the record made of it.
        base_method: Adapter and base, as the paper's numbers name them.
        about: Model, sizes, epochs and seeds, as :func:`~.page.describe_study` has them.
        statistics: All its figures.
        study: Row by row; none of a record, which keeps figures alone.
    """

    name: str
    base_method: str
    about: Mapping[str, Any]
    statistics: Statistics
    study: StudyRecord | None

    def find(self, method: str) -> MethodResult | None:
        """A method's result; none where it was not carried out."""
        return self.statistics.methods.get(method)

    def describe(self) -> str:
        """Model, adapter, sizes, epochs and seeds in one line."""
        about = self.about
        sizes = {part: _span([int(n) for n in about[f"n_{part}"].values()]) for part in ("train", "validation", "test")}
        told = ", ".join(f"{size} {part}" for part, size in sizes.items())
        rounded = " (itself a dequantised 4-bit file)" if about["model"].endswith((".gguf", "smollm2-135m")) else ""
        return (
            f"{self.name}: {about['model']}{rounded}, {self.base_method}, {told} rows a task, "
            f"{count(about['num_train_epochs'], 'epoch')}, {count(len(about['seeds']), 'seed')}"
        )


def open_compared(place: Path) -> Compared:
    """Read a comparison's folder, or a file that ``benchmarks/record_comparison.py`` made of one.

    Raises:
        UsageError: If it is neither, or has no result yet.
        StoreError: If a file is damaged.
    """
    if place.is_file():
        return _open_record(place)
    if not place.exists():
        raise UsageError(f"{place}: no such folder or file; give a folder of ensemblelora compare, or a record of one")
    study = read_study(place)
    if not study.records:
        raise UsageError(f"{place}: no method has a result yet")
    name, base_method = study.folder.resolve().name, name_base_method(study.config)
    return Compared(name, base_method, describe_study(study), compute_statistics(study), study)


def _open_record(path: Path) -> Compared:
    content = read_json(path)
    outcome = content.get("comparison") if isinstance(content, dict) else None
    if not isinstance(outcome, dict):
        raise UsageError(
            f"{path}: no record of a comparison; give a folder of ensemblelora compare, or what "
            "benchmarks/record_comparison.py made of one"
        )
    try:
        statistics = TypeAdapter(Statistics).validate_python(outcome)
        return Compared(
            path.stem, name_base_method(parse_config(content["config"])), outcome["study"], statistics, None
        )
    except (KeyError, ValidationError, ConfigError) as error:
        what = str(error).splitlines()[0]
        raise StoreError(f"{path}: a record of a comparison of another version ({what}); record it again") from None


def _span(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def _cell(
    entry: Compared,
    row: str,
    column: str,
    unit: str,
    ours: float | None,
    printed: float | None,
    *,
    sd: float | None = None,
) -> Row:
    return {
        "folder": entry.name,
        "row": row,
        "column": column,
        "unit": unit,
        "ours": ours,
        "sd": sd,
        "paper": printed,
    }


def _table_1(found: Sequence[Compared]) -> Reproduction:
    rows: list[Row] = []
    for entry in found:
        shared, ours, n_tasks = entry.find("shared"), entry.find("ours"), len(entry.statistics.tasks)
        if shared is None:
            raise UsageError(f"{entry.name}: table 1 counts in units of one adapter for all; compare the method shared")
        share = _compare_costs(ours, shared, "select_flops")
        printed: dict[str, tuple[float | None, float | None]] = {
            "shared": (1.0, 1.0),
            "mtl-ft": (2.0, float(n_tasks)),
            "ours": (_read(share, lambda g: 1 + g), _compare_costs(ours, shared, "n_bytes")),
        }
        for name, (runtime, memory) in printed.items():
            method = entry.find(name)
            cells = {
                "runtime (T)": (_compare_costs(method, shared, "flops"), runtime),
                "memory (A)": (_compare_costs(method, shared, "n_bytes"), memory),
                "forward passes": (_read(method, lambda m: m.costs.forward_passes), None),
            }
            rows += [_cell(entry, label, name, "ratio", *pair) for label, pair in cells.items()]
    notes = (
        "The paper: T and A, 2 T and n A, T + G and M A; G and M are ours as measured. Runtime here: FLOPs to make, "
        "over one adapter for all; memory: bytes kept beside the base.",
    )
    return _finish("table1", "Runtime and memory against one adapter for all", rows, found, notes)


def _table_4(found: Sequence[Compared]) -> Reproduction:
    rows = [row for entry in found for row in _tabulate(entry, paper.TABLE_4, entry.base_method)]
    notes = (
        "The paper: Llama-3-8B, all rows, 10 epochs, 3 seeds; MTL-FT, TAG and ours on QLoRA. Its averages are over ten "
        "tasks, of which it prints seven. Its memory is a GPU's at inference, ours the process's in training.",
        *_tell_other_numbers(found),
    )
    return _finish("table4", "Test accuracy, FLOPs and memory", rows, found, notes)


def _table_6(found: Sequence[Compared]) -> Reproduction:
    rows = [row for entry in found for row in _tabulate(entry, paper.TABLE_6, "qlora")]
    notes = (
        "The paper: CodeLlama-34B-Instruct, QLoRA, all rows, 10 epochs, 3 seeds; its averages are not the means of its "
        "lines. Its memory is a GPU's at inference, ours the process's in training.",
        *_tell_other_numbers(found),
    )
    return _finish("table6", "Test accuracy, FLOPs and memory of a large model", rows, found, notes)


def _tell_other_numbers(found: Sequence[Compared]) -> Iterator[str]:
    """Say where a mean of ours is over another number of tasks than the paper's ten."""
    for entry in found:
        if (n_tasks := len(entry.about["n_test"])) != _N_TASKS:
            yield f"The average of {entry.name} is over {n_tasks} tasks, and stands beside one over ten."


def _table_7(found: Sequence[Compared]) -> Reproduction:
    rows = [row for entry in found for row in _tabulate(entry, paper.TABLE_7, "")]
    notes = (
        "The paper: Llama-3-8B, QLoRA, all rows, 10 epochs, 3 seeds; it prints no averages, and says 0.8 % of grouping "
        "by gradients.",
    )
    return _finish("table7", "Grouping by the similarity of gradients, and ours", rows, found, notes)


def _figure_4(found: Sequence[Compared]) -> Reproduction:
    rows = [row for entry in found for row in _draw_tradeoff(entry, paper.TABLE_4, entry.base_method)]
    notes = ("The paper: Llama-3-8B, all rows, 10 epochs, 3 seeds; MTL-FT, TAG and ours on QLoRA.",)
    return _finish("figure4", "Error against FLOPs and memory", rows, found, notes)


def _figure_7(found: Sequence[Compared]) -> Reproduction:
    rows: list[Row] = []
    for entry in found:
        for name, printed in paper.FIGURE_7.items():
            for label, value in printed.items():
                unit = {"memory_bytes": "bytes"}.get(label, "points" if label.startswith("accuracy") else "ratio")
                rows.append(_cell(entry, label.removesuffix("_bytes"), name, unit, _relate(entry, name, label), value))
    notes = (
        "The paper: Llama-3-8B, QAdapter, all rows, 10 epochs, 3 seeds, as its text tells the figure. Its memory is a "
        "GPU's at inference, ours the process's in training.",
    )
    ours = " and ".join(dict.fromkeys(entry.base_method for entry in found))
    title = f"Error against FLOPs and memory: the paper with QAdapter, ours with {ours}"
    return _finish("figure7", title, rows, found, notes)


def write_ensemble_gain(found: Sequence[Compared]) -> list[Row]:
    """Section 2.1, second part: the weighted adapters of MTL-FT against one adapter for all.

    Args:
        found: Comparisons that have ``mtl-ft-ensemble`` and ``shared``.
    """
    rows: list[Row] = []
    for entry in found:
        gain = _relate(entry, "mtl-ft-ensemble", "accuracy over shared")
        printed = paper.ENSEMBLE_GAIN.get(entry.base_method)
        rows.append(_cell(entry, "accuracy over one adapter", "mtl-ft-ensemble", "points", gain, printed))
        method = entry.find("mtl-ft-ensemble")
        shared = entry.find("shared")
        kept, peak = (_compare_costs(method, shared, what) for what in ("n_bytes", "peak_memory_bytes"))
        passes = _read(method, lambda m: m.costs.forward_passes)
        cells: dict[str, tuple[float | None, float | None]] = {
            "memory": (peak, paper.ENSEMBLE_MEMORY),
            "adapter bytes": (kept, None),
            "forward passes": (passes, None),
        }
        for label, pair in cells.items():
            rows.append(_cell(entry, f"{label} over one adapter", "mtl-ft-ensemble", "ratio", *pair))
    return rows


def _section_3_3(found: Sequence[Compared]) -> Reproduction:
    """The number of groups, and the first step of boosting."""
    rows: list[Row] = []
    notes = [
        "The paper: Llama-3-8B, QLoRA, ten datasets, 10 epochs; m from 2 to 6, accuracy stable from 3 on; it shows no "
        "number for any m. One group here: one adapter for all. Nothing but the groups differs between the columns."
    ]
    for entry in found:
        if entry.study is None:
            raise UsageError(
                f"{entry.name}: section 3.3 needs what each training kept, and a record has figures alone; give the "
                "comparison's folder, of the methods ours-m1 to ours-m6, or ours-boost-0 and ours-boost-1"
            )
        numbers = collect_numbers(entry.study, entry.statistics)
        for number in numbers:
            column = count(number.n_groups, "group")
            rows.append(_accuracy_cell(entry, "test accuracy", column, number.method.mean.get("accuracy"), None))
            nll = number.method.mean.get("nll")
            losses = {"test loss": _read(nll, lambda f: f.value), "predicted loss": number.predicted_nll}
            rows += [_cell(entry, row, column, "nats", value, None) for row, value in losses.items()]
            rows.append(_cell(entry, "density", column, "nats", number.density, None))
            rows.append(_cell(entry, "plans of so many seeds", column, "ratio", float(number.n_chosen), None))
        rows += _list_first_rounds(entry, entry.study)
        if (change := compare_boosting(entry.statistics, "accuracy")) is not None:
            told = describe_change(change, entry.statistics.confidence)
            notes.append(f"{entry.name}: accuracy of {change.a} against {change.b}: {told}.")
    if not rows:
        raise UsageError("section 3.3: compare the methods ours-m1 to ours-m6, or ours-boost-0 and ours-boost-1")
    return _finish("section3.3", "The number of groups, and one step of boosting", rows, found, notes)


def _list_first_rounds(entry: Compared, study: StudyRecord) -> Iterator[Row]:
    """What one booster changes: its group's training rows, relative, and the test rows of all tasks."""
    rounds = collect_first_rounds(study)
    if not rounds:
        return
    errors, losses = ([getattr(one, name) for one in rounds] for name in ("error_reduction", "nll_reduction"))
    told = (("training error, reduced by", errors, paper.BOOSTING_ERROR), ("training loss, reduced by", losses, None))
    for row, values, printed in told:
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if known else None
        yield _cell(entry, row, "one booster", "accuracy", mean, printed)
    change = compare_boosting(entry.statistics, "accuracy")
    gain, sd = _read(change, lambda c: c.difference), _read(change, lambda c: c.seed_sd)
    yield _cell(entry, "test accuracy, raised by", "one booster", "points", gain, paper.BOOSTING_GAIN, sd=sd)
    kept = sum(one.is_kept for one in rounds) / len(rounds)
    yield _cell(entry, "kept", "one booster", "accuracy", kept, None)


def _finish(
    exhibit: str, title: str, rows: Sequence[Row], found: Sequence[Compared], notes: Sequence[str]
) -> Reproduction:
    return Reproduction(exhibit, title, tuple(rows), (*(entry.describe() for entry in found), *notes))


def _match_lines(table: Mapping[str, Printed], base_method: str) -> dict[str, Printed | None]:
    """The paper's lines by our methods' names: its line for one adapter on all tasks is that of the base method."""
    others: dict[str, Printed | None] = {name: line for name, line in table.items() if name not in _BASE_LINES}
    if not set(_BASE_LINES) & set(table):
        return others
    return {"shared": table.get(base_method) if base_method in _BASE_LINES else None, **others}


def _tabulate(entry: Compared, table: Mapping[str, Printed], base_method: str) -> Iterator[Row]:
    """Accuracy of every task, the average, FLOPs and memory of every method."""
    tasks = dict.fromkeys((*paper.TASKS, *entry.statistics.tasks))
    for name, line in _match_lines(table, base_method).items():
        method = entry.find(name)
        for task in tasks:
            figure = None if method is None else method.per_task.get(task, {}).get("accuracy")
            told = None if line is None else line.accuracy.get(task)
            yield _accuracy_cell(entry, task, name, figure, told and told[0])
        average = None if method is None else method.mean.get("accuracy")
        yield _accuracy_cell(entry, _AVERAGE, name, average, _read(line, _print_average))
        flops = _read(method, lambda m: m.costs.flops), _read(line, lambda one: one.flops)
        yield _cell(entry, "FLOPs", name, "flops", *flops)
        yield from _cost_cells(entry, name, line, table.get("qlora"))


def _draw_tradeoff(entry: Compared, table: Mapping[str, Printed], base_method: str) -> Iterator[Row]:
    """One minus the average, FLOPs and memory of every method."""
    for name, line in _match_lines(table, base_method).items():
        method = entry.find(name)
        figure = None if method is None else method.mean.get("accuracy")
        error, told = _read(figure, lambda f: 1 - f.value), _read(_read(line, _print_average), lambda mean: 1 - mean)
        yield _cell(entry, "error", name, "accuracy", error, told, sd=_read(figure, lambda f: f.seed_sd))
        yield _cell(entry, "adapters", name, "bytes", _read(method, lambda m: m.costs.n_bytes), None)
        yield from _cost_cells(entry, name, line, table.get("qlora"))


def _cost_cells(entry: Compared, name: str, line: Printed | None, unit: Printed | None) -> Iterator[Row]:
    """FLOPs over one adapter's, and memory; of the paper's methods that adapter is QLoRA's, on which they are."""
    method, told = entry.find(name), None
    if line is not None and unit is not None and line.flops and unit.flops:
        told = 1.0 if name == "shared" else line.flops / unit.flops
    yield _cell(entry, "x one adapter", name, "ratio", _compare_costs(method, entry.find("shared"), "flops"), told)
    peak = _read(method, lambda m: m.costs.peak_memory_bytes or None)
    yield _cell(entry, "memory", name, "bytes", peak, _read(line, lambda one: one.memory_bytes))


def _accuracy_cell(entry: Compared, row: str, column: str, figure: Figure | None, printed: float | None) -> Row:
    value, sd = (None, None) if figure is None else (figure.value, figure.seed_sd)
    return _cell(entry, row, column, "accuracy", value, printed, sd=sd)


def _compare_costs(method: MethodResult | None, other: MethodResult | None, what: str) -> float | None:
    """A method's cost over another's; ``select_flops`` over all that the other's FLOPs are."""
    if method is None or other is None:
        return None
    base = getattr(other.costs, "flops" if what == "select_flops" else what)
    return float(getattr(method.costs, what) / base) if base else None


def _read(thing: Thing | None, read: Callable[[Thing], float | None]) -> float | None:
    """Read a number off something that may not be there."""
    return None if thing is None else read(thing)


def _print_average(line: Printed) -> float | None:
    return None if line.average is None else line.average[0]


def _relate(entry: Compared, name: str, label: str) -> float | None:
    """A method's number as a label of :data:`~.paper.FIGURE_7` asks for it."""
    method = entry.find(name)
    if method is None:
        return None
    if label == "memory_bytes":
        return method.costs.peak_memory_bytes or None
    what, _, reference = label.partition(" over ")
    other = entry.find(reference)
    if other is None:
        return None
    if what == "flops":
        return _compare_costs(method, other, "flops")
    first, second = (result.mean.get("accuracy") for result in (method, other))
    return None if first is None or second is None else first.value - second.value


COMPARED_EXHIBITS: Mapping[str, Callable[[Sequence[Compared]], Reproduction]] = {
    "table1": _table_1,
    "table4": _table_4,
    "table6": _table_6,
    "table7": _table_7,
    "figure4": _figure_4,
    "figure7": _figure_7,
    "section3.3": _section_3_3,
}
