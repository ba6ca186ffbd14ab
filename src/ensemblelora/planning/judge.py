"""Predicted loss of partitions on validation rows that did not choose them, with paired standard errors.

Every task's validation rows are cut in two halves by their groups, and projection seeds too where there are several.
What is found on one half is judged on the other, and both halves together give every row one honest loss per partition.
Standard errors come from a bootstrap that draws groups of rows, the same ones for every partition.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ensemblelora.estimation import Oracle
from ensemblelora.grouping import Partition
from ensemblelora.seeding import generator_for

__all__ = ["Judge", "JudgedRows", "PairedMeans", "average_rows", "make_judge", "pair_means"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Group = tuple[int, ...]

N_HALVES = 2
_DRAWS_AT_ONCE = 200


@dataclass(frozen=True, eq=False)
class JudgedRows:
    """What one way to train the tasks is predicted to give, row by row.

    Attributes:
        nll: Per task, loss of every validation row, shape ``(n_i,)``.
        correct: Per task, 1 where right and 0 where wrong, NaN where that is unknown, shape ``(n_i,)``.
        seed_nll: Mean loss of each task under each projection seed, shape ``(n_seeds, n_tasks)``.
        seed_correct: The same for ``correct``.
    """

    nll: tuple[FloatArray, ...]
    correct: tuple[FloatArray, ...]
    seed_nll: FloatArray
    seed_correct: FloatArray

    @property
    def mean_nll(self) -> float:
        """Mean loss over rows, then over tasks."""
        return float(np.mean([rows.mean() for rows in self.nll]))


@dataclass(frozen=True, eq=False)
class Judge:
    """The oracle and how its validation rows are cut; made by :func:`make_judge`.

    Attributes:
        oracle: Predicts rows under any group.
        owner: Per task, the half that judges each row, shape ``(n_i,)``.
        searchable: Per task and half, the rows it may search on, bool ``(2, n_i)``; a task whose rows are all of one
            group can't be cut, and both halves search on all of it.
    """

    oracle: Oracle
    owner: tuple[npt.NDArray[np.int64], ...]
    searchable: tuple[BoolArray, ...]
    # A memory: (seeds, n_i) losses and hits of a task in a group.
    _rows: dict[tuple[Group, int], tuple[FloatArray, FloatArray]] = field(default_factory=dict, repr=False)

    def seeds_of(self, half: int) -> list[int]:
        """Projection seeds that a half may use: every other one, or the only one."""
        n_seeds = len(self.oracle.replicates)
        return list(range(half % n_seeds, n_seeds, N_HALVES)) if n_seeds > 1 else [0]

    def fetch(self, groups: Iterable[Group], tasks: Sequence[int] | None = None) -> None:
        """Predict the rows of every group's tasks (or of ``tasks``) at once, those not known yet."""
        wanted = list(dict.fromkeys(groups))
        self.oracle.solve(wanted)
        for task in range(self.oracle.n_tasks):
            missing = [g for g in wanted if task in (g if tasks is None else tasks) and (g, task) not in self._rows]
            if missing:
                outcomes = self.oracle.row_outcomes(missing, task)
                for k, group in enumerate(missing):
                    losses, hits = ([getattr(o, name)[k] for o in outcomes] for name in ("nll", "correct"))
                    self._rows[group, task] = (np.array(losses), np.array(hits))

    def search_losses(self, groups: Sequence[Group], half: int | None) -> list[float]:
        """Return each group's summed mean loss over its tasks, on what ``half`` may use (none: on everything)."""
        self.fetch(groups)
        return [sum(self.search_mean(group, task, half)[0] for task in group) for group in groups]

    def search_mean(self, group: Group, task: int, half: int | None) -> tuple[float, float]:
        """Return a task's mean loss and share of hits in a group, on what ``half`` may use."""
        losses, hits = self._rows[group, task]
        if half is not None:
            rows, seeds = self.searchable[task][half], self.seeds_of(half)
            losses, hits = losses[seeds][:, rows], hits[seeds][:, rows]
        return float(losses.mean()), float(hits.mean())

    def predict_each(self, groups: Sequence[Group]) -> FloatArray:
        """Predict every task's mean validation loss under every group, its own or not, ``(n_tasks, len(groups))``."""
        self.oracle.solve(list(groups))
        outcomes = (self.oracle.row_outcomes(list(groups), task) for task in range(self.oracle.n_tasks))
        return np.array([np.mean([one.nll.mean(axis=1) for one in seeds], axis=0) for seeds in outcomes])

    def judge(self, *found: Partition) -> JudgedRows:
        """Judge partitions: one for all rows, or the one found by each half, which the other half judges.

        Args:
            found: One partition, or the first half's and the second half's.
        """
        judged_by = [found[-1], found[0]]  # half 0 judges what half 1 found
        groups = [{task: group for group in partition for task in group} for partition in judged_by]
        self.fetch([group for partition in judged_by for group in partition])
        return self._assemble(groups)

    def judge_base(self) -> JudgedRows:
        """Judge the base model as it is."""
        self.fetch([()], tasks=range(self.oracle.n_tasks))
        base: dict[int, Group] = dict.fromkeys(range(self.oracle.n_tasks), ())
        return self._assemble([base, base])

    def _assemble(self, groups: Sequence[dict[int, Group]]) -> JudgedRows:
        """Take every row from the group that the half owning it judges: ``groups[half][task]``."""
        parts = []
        for task, owner in enumerate(self.owner):
            first, second = (self._rows[by_task[task], task] for by_task in groups)
            nll, correct = (np.where(owner == 0, *pair) for pair in zip(first, second, strict=True))  # (seeds, n_i)
            averaged = (self._average_seeds(owner, values) for values in (nll, correct))
            parts.append((*averaged, nll.mean(axis=1), correct.mean(axis=1)))
        row_nll, row_correct, seed_nll, seed_correct = zip(*parts, strict=True)
        return JudgedRows(row_nll, row_correct, np.array(seed_nll).T, np.array(seed_correct).T)

    def _average_seeds(self, owner: npt.NDArray[np.int64], values: FloatArray) -> FloatArray:
        """Average ``(seeds, n_i)`` over the projection seeds that each row's half may use."""
        first, second = (values[self.seeds_of(half)].mean(axis=0) for half in range(N_HALVES))
        return np.asarray(np.where(owner == 0, first, second))


@dataclass(frozen=True, eq=False)
class PairedMeans:
    """Mean losses over tasks of several ways to train, and how they vary together.

    Attributes:
        means: Shape ``(n_ways,)``.
        draws: Under a bootstrap of validation rows, shape ``(n_draws, n_ways)``; none where no task has two groups of
            rows.
        seed_means: Under each projection seed, shape ``(n_seeds, n_ways)``.
    """

    means: FloatArray
    draws: FloatArray | None
    seed_means: FloatArray

    def compare(self, one: int, other: int) -> tuple[float, float | None]:
        """Return by how much ``other`` lowers the mean loss of ``one``, and the standard error of that.

        Identical ways differ by exactly 0, without error. The error is none where the rows can't tell it.
        """
        gain = float(self.means[one] - self.means[other])
        if self.draws is None:
            return gain, None
        variance = (self.draws[:, one] - self.draws[:, other]).var(ddof=1)
        if len(self.seed_means) > 1:
            variance += (self.seed_means[:, one] - self.seed_means[:, other]).var(ddof=1) / len(self.seed_means)
        return gain, float(np.sqrt(variance))


def make_judge(oracle: Oracle, *, seed: int) -> Judge:
    """Cut every task's validation rows in two halves of about equal size, never through a group of rows."""
    owners, searchable = [], []
    for task, name in enumerate(oracle.task_names):
        _, codes, sizes = np.unique(oracle.validation_groups(task), return_inverse=True, return_counts=True)
        halves, filled = np.zeros(len(sizes), dtype=np.int64), [0, 0]
        for code in generator_for(seed, "halves", name).permutation(len(sizes)):
            halves[code] = int(filled[1] < filled[0])
            filled[halves[code]] += int(sizes[code])
        owner = halves[codes]
        owners.append(owner)
        is_whole = len(sizes) < N_HALVES
        searchable.append(np.array([(owner == half) | is_whole for half in range(N_HALVES)]))
    return Judge(oracle, tuple(owners), tuple(searchable))


def average_rows(judged: Sequence[JudgedRows]) -> JudgedRows:
    """Average several ways to train, row by row."""
    n_tasks = len(judged[0].nll)
    return JudgedRows(
        tuple(np.mean([j.nll[i] for j in judged], axis=0) for i in range(n_tasks)),
        tuple(np.mean([j.correct[i] for j in judged], axis=0) for i in range(n_tasks)),
        np.mean([j.seed_nll for j in judged], axis=0),
        np.mean([j.seed_correct for j in judged], axis=0),
    )


def pair_means(judge: Judge, judged: Sequence[JudgedRows], *, n_draws: int = 1000, seed: int = 0) -> PairedMeans:
    """Compare ways to train by a bootstrap that draws groups of validation rows anew within every task.

    Args:
        judge: Knows which rows belong together.
        judged: Ways to train; all see the same draws, so that differences are paired.
        n_draws: Number of draws.
        seed: The run's seed.
    """
    n_tasks = judge.oracle.n_tasks
    means = np.array([way.mean_nll for way in judged])
    seed_means = np.stack([way.seed_nll.mean(axis=1) for way in judged], axis=1)
    draws, can_vary = np.zeros((n_draws, len(judged))), False
    for task, name in enumerate(judge.oracle.task_names):
        _, codes, sizes = np.unique(judge.oracle.validation_groups(task), return_inverse=True, return_counts=True)
        can_vary |= len(sizes) > 1
        sums = np.stack([np.bincount(codes, weights=way.nll[task]) for way in judged], axis=1)  # (n_groups, n_ways)
        mean, n_codes = sums.sum(axis=0) / sizes.sum(), len(sizes)
        widening = np.sqrt(n_codes / (n_codes - 1)) if n_codes > 1 else 1.0  # drawn from what was seen, means vary less
        generator = generator_for(seed, "bootstrap", name)
        for first in range(0, n_draws, _DRAWS_AT_ONCE):
            n = min(_DRAWS_AT_ONCE, n_draws - first)
            times = generator.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=n)  # (n, n_groups)
            drawn = (times @ sums) / (times @ sizes)[:, None]
            draws[first : first + n] += mean + widening * (drawn - mean)
    return PairedMeans(means, draws / n_tasks if can_vary else None, seed_means)
