"""The paper's tables and figures by name; tables 2, 3 and 5 and figure 2, which are made from validated runs, in full.

In: run folders that ``ensemblelora validate`` has been through, or folders of ``ensemblelora compare`` and ``analyze``,
whose exhibits are in modules of their own. Out: :class:`~.exhibit.Reproduction`, rows of numbers with the paper's
beside them. Tables 2 and 3 read records; table 5 and figure 2 load the model and the adapters that the validation kept,
and measure the expansion's error along the line from theta0 to each, or read what an analysis measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ensemblelora import artifacts
from ensemblelora.config import RunConfig, load_config
from ensemblelora.errors import UsageError
from ensemblelora.reproduction import paper
from ensemblelora.reproduction.analysed import ANALYSED_EXHIBITS, LINEARIZED_EXHIBITS, is_analysed, make_linearized
from ensemblelora.reproduction.compared import COMPARED_EXHIBITS, open_compared, write_ensemble_gain
from ensemblelora.reproduction.exhibit import Reproduction, Row, name_base_method
from ensemblelora.reproduction.expansion import ExpansionError, measure_expansion
from ensemblelora.reproduction.federated import FEDERATED_EXHIBITS
from ensemblelora.reproduction.pairs import count_worse_pairs
from ensemblelora.reproduction.sharpness import SHARPNESS_EXHIBITS
from ensemblelora.reproduction.similarity import SIMILARITY_EXHIBITS
from ensemblelora.validation.records import TrueRun, read_all_runs
from ensemblelora.validation.validate import TRUTH_FILE, VALIDATION_FILE, VALIDATION_FOLDER

__all__ = ["EXHIBITS", "reproduce"]

_PAIRS = 45


def reproduce(exhibit: str, folders: Sequence[Path | str]) -> Reproduction:
    """Make a table of the paper anew.

    Args:
        exhibit: One of :data:`EXHIBITS`.
        folders: Validated runs, or comparisons; each is a row or a few, or a table of its own.

    Raises:
        UsageError: If the exhibit is unknown, or a folder does not hold what it is made from.
    """
    if exhibit not in EXHIBITS:
        raise UsageError(f"exhibit {exhibit!r}: expected one of {', '.join(sorted(EXHIBITS))}")
    return EXHIBITS[exhibit]([Path(folder) for folder in folders])


@dataclass(frozen=True, eq=False)
class _Validated:
    path: Path
    config: RunConfig
    runs: tuple[TrueRun, ...]

    @property
    def of_design(self) -> tuple[TrueRun, ...]:
        """Fine-tunings of the subsets of the size that the run asks its oracle about."""
        return tuple(run for run in self.runs if len(run.tasks) == self.config.affinity.subset_size)


def _open(folder: Path) -> _Validated:
    if not (folder / artifacts.RUN_FILE).exists():
        raise UsageError(
            f"{folder}: no run folder; give one that `ensemblelora validate` has measured, or for table2, table5 and "
            "figure2 what `ensemblelora analyze linearization` left"
        )
    path = artifacts.RunFolder.open(folder).path
    place = path / VALIDATION_FOLDER
    if not (place / VALIDATION_FILE).exists():
        raise UsageError(f"{path}: not validated yet; measure it with: ensemblelora validate {path}")
    return _Validated(path, load_config(path / artifacts.CONFIG_FILE), read_all_runs(place / TRUTH_FILE))


def _table_2(found: Sequence[_Validated]) -> Reproduction:
    rows: list[Row] = []
    for entry in found:
        moved = [run.relative_distance for run in entry.of_design]
        printed = paper.DISTANCE.get(name_base_method(entry.config))
        rows.append(
            _describe(entry)
            | {"mean": float(np.mean(moved)), "sd": float(np.std(moved, ddof=1)) if len(moved) > 1 else None}
            | {"fine-tunings": float(len(moved))}
            | {f"paper {model}": printed[i] if printed else None for i, model in enumerate(paper.MODELS)}
        )
    note = "Smaller models are trained with larger steps: distances of 135 million parameters are not the paper's."
    return Reproduction("table2", "Distance of fine-tuned weights, over the norm of the model", tuple(rows), (note,))


def _table_3(found: Sequence[_Validated]) -> Reproduction:
    rows: list[Row] = []
    for entry in found:
        record = artifacts.read_json(entry.path / VALIDATION_FOLDER / VALIDATION_FILE)
        size, costs = str(entry.config.affinity.subset_size), record["costs"]
        for comparison in record["comparisons"]:
            row: dict[str, float | str | None] = dict(_describe(entry)) | {"predictor": comparison["predictor"]}
            for name in ("nll", "accuracy"):
                figures = (comparison[name] or {}).get("by_size", {}).get(size)
                row |= {f"{name} error": figures and figures["relative_error"]["value"]}
                row |= {f"{name} Pearson": figures and figures["pearson"]["value"]}
            d = comparison["predictor"].removeprefix("d=")
            error = paper.ESTIMATION_ERROR.get(int(d)) if d.isdigit() else None
            row |= {f"paper {model}": error[i] if error else None for i, model in enumerate(paper.MODELS)}
            row |= {"speed-up": costs["design"] / costs["estimation"]}
            row |= {"at 10 epochs": costs["design_paper_epochs"] / costs["estimation"], "paper speed-up": paper.SPEEDUP}
            rows.append(row)
    note = "The paper's errors are of test accuracy; ours of validation rows, the same for prediction and truth."
    return Reproduction("table3", "Relative error of predicted performance on subsets", tuple(rows), (note,))


def _table_5(found: Sequence[_Validated]) -> Reproduction:
    rows = tuple(
        _describe(entry)
        | {"distance": distance, "mean squared relative": error.squared_relative, "sd": error.sd}
        | {"RMS relative": error.rms_relative, "R2 over zero order": error.r2_over_zero_order}
        | {"paper, smallest model": printed.get(name_base_method(entry.config))}
        for entry in found
        for (distance, printed), error in zip(
            paper.EXPANSION_ERROR.items(), _expand(entry, tuple(paper.EXPANSION_ERROR)), strict=True
        )
    )
    return Reproduction("table5", "Error of the first-order expansion by relative distance", rows, ())


def _figure_2(found: Sequence[_Validated]) -> Reproduction:
    rows = tuple(
        _describe(entry)
        | {"mean squared relative": error.squared_relative, "sd": error.sd, "RMS relative": error.rms_relative}
        | {"R2 over zero order": error.r2_over_zero_order}
        | {"paper, at most": paper.EXPANSION_LIMIT.get(name_base_method(entry.config))}
        for entry in found
        for error in _expand(entry, (None,))
    )
    return Reproduction("figure2", "Error of the first-order expansion where fine-tuning ended", rows, ())


def _section_2_1(folders: Sequence[Path]) -> Reproduction:
    """Pairs that are worse together, from validated runs; the ensemble of MTL-FT's adapters, from comparisons."""
    is_run = {folder: (folder / artifacts.RUN_FILE).exists() for folder in folders}
    validated = [_open(folder) for folder in folders if is_run[folder]]
    compared = [open_compared(folder) for folder in folders if not is_run[folder]]
    rows = [*(row for entry in validated for row in _list_pairs(entry)), *write_ensemble_gain(compared)]
    notes = (
        *(entry.describe() for entry in compared),
        "The paper: Llama-3-8B, ten datasets, 45 pairs. A pair's tasks count half each; here by validation loss.",
        "Its memory is a GPU's at inference; ours the process's in training, and beside it the bytes of the adapters.",
    )
    return Reproduction(
        "section2.1", "Pairs trained together to worse than apart; an ensemble of ten", tuple(rows), notes
    )


def _list_pairs(entry: _Validated) -> list[Row]:
    """Counts of one run's pairs, each beside the paper's share of 45.

    Raises:
        UsageError: If no pair was fine-tuned.
    """
    counts = count_worse_pairs(entry.runs)
    if counts is None:
        raise UsageError(
            f"{entry.path}: no pair of tasks was fine-tuned; run with affinity.subset_size=2, then: "
            f"ensemblelora validate {entry.path} --subsets 56"
        )
    base, n_pairs = name_base_method(entry.config), counts["pairs"]
    printed = paper.WORSE_PAIRS.get(base)
    share = None if printed is None else printed / _PAIRS
    shares = {"worse": counts["worse"] / n_pairs, "worse in the mean": counts["worse_in_mean"] / n_pairs}
    return [
        {
            "folder": entry.path.name,
            "row": f"pairs {name}, of {n_pairs:.0f}",
            "column": base,
            "unit": "accuracy",
            "ours": value,
            "sd": None,
            "paper": share if name == "worse" else None,
        }
        for name, value in shares.items()
    ]


def _expand(entry: _Validated, distances: Sequence[float | None]) -> tuple[ExpansionError, ...]:
    return measure_expansion(entry.config, entry.path / VALIDATION_FOLDER, entry.of_design, distances)


def _describe(entry: _Validated) -> dict[str, float | str | None]:
    return {"run": entry.path.name, "model": entry.config.model.name, "adapter": name_base_method(entry.config)}


_OF_RUNS: Mapping[str, Callable[[Sequence[_Validated]], Reproduction]] = {
    "table2": _table_2,
    "table3": _table_3,
    "table5": _table_5,
    "figure2": _figure_2,
}


def _make_of_runs(exhibit: str, folders: Sequence[Path]) -> Reproduction:
    """Make an exhibit from validated runs and, where it is one of theirs, analyses of the expansion."""
    analysed = [f for f in folders if exhibit in LINEARIZED_EXHIBITS and is_analysed(f, "linearization")]
    others = [folder for folder in folders if folder not in analysed]
    parts = [_OF_RUNS[exhibit]([_open(folder) for folder in others])] if others else []
    parts += [make_linearized(exhibit, analysed)] if analysed else []
    rows, notes = (tuple(one for part in parts for one in getattr(part, name)) for name in ("rows", "notes"))
    return replace(parts[0], rows=rows, notes=notes)


def _make_of_comparisons(exhibit: str, folders: Sequence[Path]) -> Reproduction:
    return COMPARED_EXHIBITS[exhibit]([open_compared(folder) for folder in folders])


EXHIBITS: Mapping[str, Callable[[Sequence[Path]], Reproduction]] = {
    **{name: partial(_make_of_runs, name) for name in _OF_RUNS},
    **{name: partial(_make_of_comparisons, name) for name in COMPARED_EXHIBITS},
    **SHARPNESS_EXHIBITS,
    **SIMILARITY_EXHIBITS,
    **ANALYSED_EXHIBITS,
    **FEDERATED_EXHIBITS,
    "section2.1": _section_2_1,
}
