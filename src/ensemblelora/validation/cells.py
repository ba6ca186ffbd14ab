"""The (subset, task) pairs on which predictions and true fine-tuning are compared, as flat arrays.

A cell is one task of one subset that was truly fine-tuned, on one or more seeds. Cells are sorted by task, then by
the subset's size and members, so that nothing below depends on the order in which subsets were run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.errors import DataError

__all__ = ["BoolArray", "Cells", "FloatArray", "IntArray", "Subset", "collect_cells", "find_starts", "select_cells"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Subset = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Cells:
    """Measured cells; every array has one entry a cell.

    Attributes:
        task: The task's index; ascending.
        subset: The subset's position among all subsets sorted by size and members.
        size: Tasks in the subset.
        predicted: What was predicted.
        base: Value of the base model without fine-tuning.
        truth: Mean over the seeds that were run.
        n_runs: How many these are.
        run_squares: Sum over seeds of the squared distance from ``truth``.
    """

    task: IntArray
    subset: IntArray
    size: IntArray
    predicted: FloatArray
    base: FloatArray
    truth: FloatArray
    n_runs: IntArray
    run_squares: FloatArray

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.task)


def collect_cells(
    truth: npt.ArrayLike, predicted: npt.ArrayLike, subsets: Sequence[Subset], base: npt.ArrayLike
) -> Cells:
    """Gather what was measured and what was predicted for it.

    Args:
        truth: Values after fine-tuning, shape ``(n_seeds, n_subsets, n_tasks)``; NaN where not measured.
        predicted: Shape ``(n_subsets, n_tasks)``; read where the truth was measured.
        subsets: Distinct, each a sorted tuple of task indices.
        base: Values of the base model, shape ``(n_tasks,)``.

    Raises:
        DataError: If shapes or subsets are wrong, a subset was measured on a task that is not its own, a value that
            is read is not finite, or nothing was measured.
    """
    runs, guesses, start = (np.asarray(values, dtype=np.float64) for values in (truth, predicted, base))
    _check_shapes(runs, guesses, start, subsets)
    order = sorted(range(len(subsets)), key=lambda s: (len(subsets[s]), subsets[s]))
    runs, guesses, sizes = runs[:, order], guesses[order], np.array([len(subsets[s]) for s in order], dtype=np.int64)
    is_run = ~np.isnan(runs)
    _check_values(is_run, runs, guesses, start, [subsets[s] for s in order])
    task, subset = np.nonzero(is_run.any(axis=0).T)
    values, counted = runs[:, subset, task], is_run[:, subset, task]  # (n_seeds, n_cells)
    n_runs = counted.sum(axis=0)
    # A plain mean of equal values can differ from them in the last digit; seeds that agree have no noise.
    first = values[counted.argmax(axis=0), np.arange(len(task))]
    shifted = np.where(counted, values - first, 0.0)
    mean = shifted.sum(axis=0) / n_runs
    return Cells(
        task=task,
        subset=subset,
        size=sizes[subset],
        predicted=guesses[subset, task],
        base=start[task],
        truth=first + mean,
        n_runs=n_runs,
        run_squares=(np.where(counted, shifted - mean, 0.0) ** 2).sum(axis=0),
    )


def select_cells(cells: Cells, chosen: BoolArray | IntArray) -> Cells:
    """Return the cells that are marked, or those at the given positions."""
    return Cells(**{name: values[chosen] for name, values in vars(cells).items()})


def find_starts(sorted_codes: IntArray) -> IntArray:
    """Return where each run of equal codes begins."""
    is_new = np.ones(len(sorted_codes), dtype=bool)
    is_new[1:] = sorted_codes[1:] != sorted_codes[:-1]
    return np.flatnonzero(is_new)


def _check_shapes(runs: FloatArray, guesses: FloatArray, start: FloatArray, subsets: Sequence[Subset]) -> None:
    if runs.ndim != 3:
        raise DataError(f"truth has shape {runs.shape}: expected (n_seeds, n_subsets, n_tasks)")
    expected = (len(subsets), runs.shape[2])
    if runs.shape[1:] != expected or guesses.shape != expected or start.shape != expected[1:]:
        raise DataError(
            f"truth has shape {runs.shape}, predicted {guesses.shape}, base {start.shape}: expected "
            f"(n_seeds, {len(subsets)}, n_tasks), ({len(subsets)}, n_tasks) and (n_tasks,)"
        )
    if len(set(subsets)) != len(subsets):
        raise DataError(f"{len(subsets)} subsets, of which {len(set(subsets))} are distinct; give each once")
    for subset in subsets:
        if list(subset) != sorted(set(subset)) or not subset or subset[0] < 0 or subset[-1] >= runs.shape[2]:
            raise DataError(f"subset {subset}: expected sorted, distinct tasks from 0 to {runs.shape[2] - 1}")


def _check_values(
    is_run: BoolArray, runs: FloatArray, guesses: FloatArray, start: FloatArray, subsets: Sequence[Subset]
) -> None:
    is_cell: BoolArray = np.any(is_run, axis=0)
    if not np.any(is_cell):
        raise DataError("no subset was measured: every true value is NaN; fine-tune some subsets first")
    for s, subset in enumerate(subsets):
        foreign = set(np.flatnonzero(is_cell[s]).tolist()) - set(subset)
        if foreign:
            raise DataError(f"subset {subset} was measured on tasks {sorted(foreign)}, which it does not hold")
    is_wrong = (is_cell & ~(np.isfinite(guesses) & np.isfinite(start))) | np.isinf(runs).any(axis=0)
    if is_wrong.any():
        s, i = np.argwhere(is_wrong)[0].tolist()
        raise DataError(
            f"subset {subsets[s]}, task {i}: true {runs[:, s, i].tolist()}, predicted {guesses[s, i]}, "
            f"base {start[i]}; expected finite numbers wherever the truth is measured"
        )
