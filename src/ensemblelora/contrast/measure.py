"""How two runs differ: settings, groups, predictions, and scores with intervals. No torch.

In: two run folders. Out: :class:`Contrast`, plain values. Where both runs kept what each test row gave, differences are
over the rows both tested, paired row by row; else they are those of two unrelated samples, which makes intervals wider.
Differences are B less A. Slow twin in the tests: one row at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from ensemblelora.artifacts import TEST_ROWS_FILE
from ensemblelora.earlier import list_settings
from ensemblelora.errors import UsageError
from ensemblelora.evaluation.metrics import compare_paired_tasks
from ensemblelora.evaluation.rows import METRICS, TaskRows, read_rows
from ensemblelora.report.heatmaps import remove_levels
from ensemblelora.report.reading import load_record
from ensemblelora.report.records import MethodScores, PlanRecord, RunRecord
from ensemblelora.report.result_sections import compute_rank_correlation

__all__ = ["Contrast", "Score", "Setting", "contrast_runs"]

_PLACES = ("out",)  # where a run lies is no difference


@dataclass(frozen=True)
class Setting:
    """One setting or version that differs; ``None`` where a run has none of it."""

    name: str
    a: str | None
    b: str | None


@dataclass(frozen=True)
class Score:
    """One method's score in both runs.

    Attributes:
        method: Its name in both runs.
        metric: ``accuracy`` or ``nll``.
        task: Its name; none for the mean over the tasks that both runs have.
        a: In run A; over the rows that both tested where it is paired, else over all of its own.
        b: In run B.
        difference: B less A.
        low: Lower end of its interval; none where rows tell no spread.
        high: Upper end.
        n_rows: Rows that were compared; 0 where it is not paired.
        is_paired: Whether it is of the same rows one by one.
    """

    method: str
    metric: str
    task: str | None
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    n_rows: int
    is_paired: bool


@dataclass(frozen=True)
class Contrast:
    """All that differs between two runs.

    Attributes:
        names: What to call the two, A first.
        tasks: That both have, in A's order.
        only: Tasks that one alone has, for each run.
        settings: Settings and versions that differ.
        scores: Of every method and task that both have, and their means.
        confidence: Of intervals.
        share_alike: Of pairs of common tasks, how many both plans treat alike, together or apart; none without pairs.
        affinity_correlation: Rank correlation of both affinities over pairs, without levels; none where unknown.
    """

    names: tuple[str, str]
    tasks: tuple[str, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    settings: tuple[Setting, ...]
    scores: tuple[Score, ...]
    confidence: float
    share_alike: float | None
    affinity_correlation: float | None

    def find(self, method: str, metric: str, task: str | None = None) -> Score | None:
        """Return one score; without a task, the mean."""
        wanted = (method, metric, task)
        return next((one for one in self.scores if (one.method, one.metric, one.task) == wanted), None)


def contrast_runs(first: Path, second: Path) -> tuple[RunRecord, RunRecord, Contrast]:
    """Read two run folders and compare them.

    Raises:
        UsageError: If one has no plan yet, both are one folder, or they have no task in common.
        StoreError: If a file of one is damaged.
    """
    if first.resolve() == second.resolve():
        raise UsageError(f"{first}: the same run twice; give the folders of two runs")
    a, b = load_record(first), load_record(second)
    tasks = tuple(name for name in a.plan.task_names if name in set(b.plan.task_names))
    if not tasks:
        raise UsageError(f"{first} and {second}: no task in common, so there is nothing to compare")
    rows = tuple(_read_kept(folder) for folder in (first, second))
    found = Contrast(
        names=_name_runs(first, second),
        tasks=tasks,
        only=(_list_missing(a.plan, b.plan), _list_missing(b.plan, a.plan)),
        settings=tuple(_list_settings(a, b)),
        scores=tuple(_compare_scores(a, b, tasks, rows[0], rows[1])),
        confidence=a.config.evaluation.confidence,
        share_alike=_compare_groups(a.plan, b.plan, tasks),
        affinity_correlation=_compare_affinities(a, b, tasks),
    )
    return a, b, found


def _read_kept(folder: Path) -> dict[str, TaskRows]:
    """What each test row gave; nothing for a run that has not come so far, or did not keep it."""
    path = folder / TEST_ROWS_FILE
    return read_rows(path) if path.exists() else {}


def _name_runs(first: Path, second: Path) -> tuple[str, str]:
    """The ends of both paths, as long as it takes to tell them apart."""
    parts = [path.resolve().parts for path in (first, second)]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if names[0] != names[1]:
            break
    return names[0], names[1]


def _list_missing(plan: PlanRecord, other: PlanRecord) -> tuple[str, ...]:
    return tuple(name for name in plan.task_names if name not in set(other.task_names))


def _list_settings(a: RunRecord, b: RunRecord) -> Iterator[Setting]:
    configs = [yaml.safe_load(run.config.text) or {} for run in (a, b)]
    made = [run.environment.model_dump(exclude={"created"}) for run in (a, b)]
    for pair in (configs, made):
        left, right = ({name: str(value) for name, value in list_settings(values)} for values in pair)
        for name in dict.fromkeys((*left, *right)):
            if left.get(name) != right.get(name) and name not in _PLACES:
                yield Setting(name, left.get(name), right.get(name))


def _compare_scores(
    a: RunRecord, b: RunRecord, tasks: Sequence[str], kept_a: Mapping[str, TaskRows], kept_b: Mapping[str, TaskRows]
) -> Iterator[Score]:
    if a.results is None or b.results is None:
        return
    evaluation = a.config.evaluation
    options = {"confidence": evaluation.confidence, "n_bootstrap": evaluation.n_bootstrap, "seed": a.config.seed or 0}
    for method, scores in a.results.ordered_methods.items():
        others = b.results.methods.get(method)
        for metric in METRICS if others is not None else ():
            pairs = [
                pair
                for task in tasks
                if (pair := _make_pair(scores, others, method, metric, task, kept_a, kept_b)) is not None
            ]
            if pairs:
                yield _compare(pairs, None, options)
                yield from (_compare([pair], pair.task, options) for pair in pairs)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of one task that both runs tested: A's and B's values, and codes of rows that belong together."""

    a: npt.NDArray[np.float64]
    b: npt.NDArray[np.float64]
    groups: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Pair:
    """One method on one task in both runs.

    Attributes:
        method: Its name.
        metric: ``accuracy`` or ``nll``.
        task: Its name.
        a: Value in run A, over the common rows where there are some, else over all of its rows.
        b: In run B.
        half_width: Of the interval of two unrelated samples' difference; none where a run has no interval.
        rows: Where both runs kept them.
    """

    method: str
    metric: str
    task: str
    a: float
    b: float
    half_width: float | None
    rows: _Rows | None

    @property
    def difference(self) -> float:
        """B less A."""
        return self.b - self.a


def _make_pair(
    first: MethodScores,
    second: MethodScores | None,
    method: str,
    metric: str,
    task: str,
    kept_a: Mapping[str, TaskRows],
    kept_b: Mapping[str, TaskRows],
) -> _Pair | None:
    """Put a method's scores on a task together; none where a run has none."""
    one, other = (None if scores is None else scores.per_task.get(task) for scores in (first, second))
    a, b = getattr(one, metric, None), getattr(other, metric, None)
    if a is None or b is None:
        return None
    ends = [getattr(score, f"{metric}_{end}") for score in (one, other) for end in ("low", "high")]
    half = None if None in ends else math.hypot((ends[1] - ends[0]) / 2, (ends[3] - ends[2]) / 2)
    rows = _pair_rows(kept_a, kept_b, task, method, metric)
    if rows is not None:
        a, b = float(rows.a.mean()), float(rows.b.mean())
    return _Pair(method, metric, task, a, b, half, rows)


def _pair_rows(
    kept_a: Mapping[str, TaskRows], kept_b: Mapping[str, TaskRows], task: str, method: str, metric: str
) -> _Rows | None:
    """Rows of the same name and label in both runs; none where one did not keep the method's values."""
    if task not in kept_a or task not in kept_b:
        return None
    first, second = kept_a[task], kept_b[task]
    if metric not in first.values.get(method, {}) or metric not in second.values.get(method, {}):
        return None
    places = {name: i for i, name in enumerate(second.ids)}
    common = [
        (i, j)
        for i, name in enumerate(first.ids)
        if (j := places.get(name)) is not None and first.labels[i] == second.labels[j]
    ]
    if not common:
        return None
    left, right = np.array(common, dtype=np.int64).T
    codes = np.unique(first.groups[left], return_inverse=True)[1]
    return _Rows(first.values[method][metric][left], second.values[method][metric][right], codes.astype(np.int64))


def _compare(pairs: Sequence[_Pair], task: str | None, options: Mapping[str, Any]) -> Score:
    """Compare on one task, or in the mean over several, each of which counts once."""
    low, high, n_rows = _find_interval(pairs, options)
    a, b, difference = (float(np.mean([getattr(pair, name) for pair in pairs])) for name in ("a", "b", "difference"))
    first = pairs[0]
    return Score(first.method, first.metric, task, a, b, difference, low, high, n_rows, n_rows > 0)


def _find_interval(pairs: Sequence[_Pair], options: Mapping[str, Any]) -> tuple[float | None, float | None, int]:
    """Ends of the interval of the mean difference, and the number of rows it is over; 0 rows: of unrelated samples."""
    rows = [pair.rows for pair in pairs if pair.rows is not None]
    if len(rows) == len(pairs):
        found = compare_paired_tasks(
            [one.b for one in rows], [one.a for one in rows], [one.groups for one in rows], **options
        )
        n_rows = sum(len(one.a) for one in rows)
        return (found.low, found.high, n_rows) if math.isfinite(found.low) else (None, None, n_rows)
    halves = [pair.half_width for pair in pairs]
    if any(half is None for half in halves):
        return None, None, 0
    half = math.hypot(*(half or 0.0 for half in halves)) / len(pairs)
    middle = float(np.mean([pair.difference for pair in pairs]))
    return middle - half, middle + half, 0


def _compare_groups(a: PlanRecord, b: PlanRecord, tasks: Sequence[str]) -> float | None:
    """Share of pairs that both plans put together, or both apart (Rand 1971)."""
    if len(tasks) < 2:
        return None
    same = []
    for plan in (a, b):
        codes = np.array([plan.group_by_name[task] for task in tasks])
        same.append(codes[:, None] == codes[None, :])
    above = np.triu_indices(len(tasks), k=1)
    return float((same[0][above] == same[1][above]).mean())


def _compare_affinities(a: RunRecord, b: RunRecord, tasks: Sequence[str]) -> float | None:
    if a.affinity is None or b.affinity is None or len(tasks) < 3:
        return None
    above = np.triu_indices(len(tasks), k=1)
    pairs = []
    for run, affinity in ((a, a.affinity), (b, b.affinity)):
        places = [run.plan.task_names.index(task) for task in tasks]
        pairs.append(remove_levels(affinity.matrix[np.ix_(places, places)])[above])
    known = np.isfinite(pairs[0]) & np.isfinite(pairs[1])
    if known.sum() < 3:
        return None
    return compute_rank_correlation(pairs[0][known].tolist(), pairs[1][known].tolist())
