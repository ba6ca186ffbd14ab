"""Tables 2, 3 and 5 and figure 2 of the paper, from validated runs.

In: run folders that ``ensemblelora validate`` has been through. Out: :class:`Reproduction`, rows of numbers with the
paper's beside them. Tables 2 and 3 read records; table 5 and figure 2 load the model and the adapters that the
validation kept, and measure the expansion's error along the line from theta0 to each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ensemblelora import artifacts
from ensemblelora.config import RunConfig, load_config
from ensemblelora.errors import UsageError
from ensemblelora.reproduction import paper
from ensemblelora.reproduction.expansion import ExpansionError, measure_expansion
from ensemblelora.validation.records import TrueRun, read_all_runs
from ensemblelora.validation.validate import TRUTH_FILE, VALIDATION_FILE, VALIDATION_FOLDER

__all__ = ["EXHIBITS", "Reproduction", "reproduce"]

Row = Mapping[str, float | str | None]


@dataclass(frozen=True)
class Reproduction:
    """One table."""

    exhibit: str
    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def reproduce(exhibit: str, folders: Sequence[Path | str]) -> Reproduction:
    """Make a table of the paper anew.

    Args:
        exhibit: One of :data:`EXHIBITS`.
        folders: Validated runs; each is a row or a few.

    Raises:
        UsageError: If the exhibit is unknown, or a run has not been validated.
    """
    if exhibit not in EXHIBITS:
        raise UsageError(f"exhibit {exhibit!r}: expected one of {', '.join(EXHIBITS)}")
    return EXHIBITS[exhibit]([_open(Path(folder)) for folder in folders])


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
    path = artifacts.RunFolder.open(folder).path
    place = path / VALIDATION_FOLDER
    if not (place / VALIDATION_FILE).exists():
        raise UsageError(f"{path}: not validated yet; measure it with: ensemblelora validate {path}")
    return _Validated(path, load_config(path / artifacts.CONFIG_FILE), read_all_runs(place / TRUTH_FILE))


def _table_2(found: Sequence[_Validated]) -> Reproduction:
    rows: list[Row] = []
    for entry in found:
        moved, method = [run.relative_distance for run in entry.of_design], entry.config.adapter.method
        rows.append(
            _describe(entry)
            | {"mean": float(np.mean(moved)), "sd": float(np.std(moved, ddof=1)) if len(moved) > 1 else None}
            | {"fine-tunings": float(len(moved))}
            | {f"paper {model}": value for model, value in zip(paper.MODELS, paper.DISTANCE[method], strict=True)}
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
        | {"paper, smallest model": printed[entry.config.adapter.method]}
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
        | {"R2 over zero order": error.r2_over_zero_order, "paper, at most": 0.01}
        for entry in found
        for error in _expand(entry, (None,))
    )
    return Reproduction("figure2", "Error of the first-order expansion where fine-tuning ended", rows, ())


def _expand(entry: _Validated, distances: Sequence[float | None]) -> tuple[ExpansionError, ...]:
    return measure_expansion(entry.config, entry.path / VALIDATION_FOLDER, entry.of_design, distances)


def _describe(entry: _Validated) -> dict[str, float | str | None]:
    return {"run": entry.path.name, "model": entry.config.model.name, "adapter": entry.config.adapter.method}


EXHIBITS: Mapping[str, Callable[[Sequence[_Validated]], Reproduction]] = {
    "table2": _table_2,
    "table3": _table_3,
    "table5": _table_5,
    "figure2": _figure_2,
}
