"""Every method's loss and answer on every test row, kept so that two runs can be compared row by row. No torch.

In: what each row gave, when the test rows are scored. Out: ``test_rows.npz`` of a run folder, one block of arrays a
task; a value that a method has none of, such as the exact match of free text that was not generated, is NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ensemblelora.artifacts import load_arrays, save_arrays
from ensemblelora.errors import StoreError

__all__ = ["BOOSTED_GROUP", "METRICS", "OWN_GROUP", "TaskRows", "name_methods", "read_rows", "save_rows"]

METRICS = ("nll", "accuracy")
OWN_GROUP, BOOSTED_GROUP = "own group", "boosted group"
"""methods: each task by its own group's adapter alone, which is what a plan predicts; and with that group's boosters"""


@dataclass(frozen=True, eq=False)
class TaskRows:
    """One task's test rows.

    Attributes:
        ids: Names of the rows within their task.
        labels: int64 ``(n,)`` index of the right choice; 0 for free text.
        groups: int64 ``(n,)`` equal for rows that belong together.
        values: Method -> metric -> float64 ``(n,)``; a metric that a method has none of is left out.
    """

    ids: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    values: Mapping[str, Mapping[str, npt.NDArray[np.float64]]]


def name_methods(methods: Iterable[str], *, has_boosters: bool) -> dict[str, str]:
    """Say what a record's methods are called now: once, an ensemble's ``own group`` had the boosters in it.

    Args:
        methods: As the record names them.
        has_boosters: Whether its ensemble has some.

    Example:
        >>> name_methods(["shared", "own group"], has_boosters=True)
        {'shared': 'shared', 'own group': 'boosted group'}
    """
    names = {name: name for name in methods}
    if has_boosters and OWN_GROUP in names and BOOSTED_GROUP not in names:
        names[OWN_GROUP] = BOOSTED_GROUP
    return names


def save_rows(path: Path, tasks: Mapping[str, TaskRows]) -> None:
    """Write all tasks' rows.

    Raises:
        OutputError: If the place can't be written.
    """
    arrays: dict[str, npt.ArrayLike] = {"tasks": np.array(list(tasks), dtype=np.str_), "metrics": np.array(METRICS)}
    for i, rows in enumerate(tasks.values()):
        none = np.full(len(rows.ids), np.nan)
        arrays |= {
            f"{i}.ids": np.array(rows.ids, dtype=np.str_),
            f"{i}.labels": rows.labels,
            f"{i}.groups": rows.groups,
            f"{i}.methods": np.array(list(rows.values), dtype=np.str_),
            f"{i}.values": np.array([[own.get(metric, none) for metric in METRICS] for own in rows.values.values()]),
        }
    save_arrays(path, arrays)


def read_rows(path: Path) -> dict[str, TaskRows]:
    """Read all tasks' rows back.

    Raises:
        StoreError: If the file is missing or damaged.
    """
    arrays = load_arrays(path)
    try:
        metrics = arrays["metrics"].tolist()
        return {str(name): _read_task(arrays, i, metrics) for i, name in enumerate(arrays["tasks"])}
    except (KeyError, ValueError, IndexError) as error:
        raise StoreError(f"{path}: no scores of test rows ({error!r}); delete it and run again") from None


def _read_task(arrays: Mapping[str, npt.NDArray[np.generic]], i: int, metrics: list[str]) -> TaskRows:
    ids, labels, groups = (arrays[f"{i}.{name}"] for name in ("ids", "labels", "groups"))
    methods, values = arrays[f"{i}.methods"].tolist(), np.asarray(arrays[f"{i}.values"], dtype=np.float64)
    if values.shape != (len(methods), len(metrics), len(ids)) or not len(ids) == len(labels) == len(groups):
        raise ValueError(f"task {i}: arrays of different lengths")
    known = {
        method: {metric: row for metric, row in zip(metrics, own, strict=True) if np.isfinite(row).all()}
        for method, own in zip(methods, values, strict=True)
    }
    return TaskRows(tuple(map(str, ids)), labels.astype(np.int64), groups.astype(np.int64), known)
