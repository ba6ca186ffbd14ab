"""Which partitions are allowed: how large groups are, which tasks stay together, and which stay apart.

In: lists of task indices and two sizes. Out: :class:`Constraints` over tasks, and the clustering problem they leave:
tasks that stay together become one unit, whose affinities are the sums of theirs and which counts as many tasks. This
is exact, since a group's density is the sum of its units' affinities over its number of tasks, so that linking tasks
makes the problem smaller and never harder. What units must still meet is in :class:`Limits`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ensemblelora.grouping.partition import Partition

__all__ = ["Constraints", "Limits"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Limits:
    """What groups of units must meet.

    Attributes:
        sizes: Tasks of each unit, shape ``(k,)``.
        cliques: Lists of units no two of which share a group.
        min_size: Tasks a group has at least.
        max_size: Tasks it has at most.
    """

    sizes: FloatArray
    cliques: tuple[tuple[int, ...], ...]
    min_size: int
    max_size: int

    @classmethod
    def free(cls, n_tasks: int) -> Limits:
        """Every task a unit, and every partition allowed."""
        return cls(np.ones(n_tasks), (), 1, n_tasks)

    @property
    def is_free(self) -> bool:
        """Whether every partition of the units is allowed."""
        return not self.cliques and self.min_size <= self.sizes.min() and self.max_size >= self.sizes.sum()

    @cached_property
    def apart(self) -> BoolArray:
        """Which pairs of units share no group, bool ``(k, k)``."""
        apart = np.zeros((len(self.sizes),) * 2, dtype=bool)
        for clique in self.cliques:
            apart[np.ix_(clique, clique)] = True
        np.fill_diagonal(apart, False)
        return apart

    def allows(self, labels: Labels) -> bool:
        """Whether the groups that a label per unit describes meet everything."""
        sizes = np.bincount(labels, weights=self.sizes)
        sizes = sizes[np.bincount(labels) > 0]
        in_bounds = bool((sizes >= self.min_size).all() and (sizes <= self.max_size).all())
        return in_bounds and all(len(set(labels[list(clique)].tolist())) == len(clique) for clique in self.cliques)

    def take(self, order: Sequence[int] | npt.NDArray[np.int64]) -> Limits:
        """The same limits of units in another order."""
        places = {int(unit): place for place, unit in enumerate(order)}
        cliques = tuple(tuple(places[unit] for unit in clique) for clique in self.cliques)
        return replace(self, sizes=self.sizes[np.asarray(order)], cliques=cliques)


@dataclass(frozen=True)
class Constraints:
    """What a partition of the tasks must meet.

    Attributes:
        n_tasks: Number of tasks.
        must_link: Lists of tasks that share a group.
        cannot_link: Lists of tasks no two of which share a group.
        min_size: Tasks a group has at least.
        max_size: Tasks it has at most; none: no limit.
    """

    n_tasks: int
    must_link: tuple[tuple[int, ...], ...] = ()
    cannot_link: tuple[tuple[int, ...], ...] = ()
    min_size: int = 1
    max_size: int | None = None

    @property
    def is_free(self) -> bool:
        """Whether every partition is allowed."""
        return len(self.units) == self.n_tasks and self.limits.is_free and not self.is_contradictory

    @cached_property
    def units(self) -> Partition:
        """Tasks in the pieces that stay whole, in the order of their smallest tasks.

        Example:
            >>> Constraints(5, must_link=((3, 1), (4, 3))).units
            ((0,), (1, 3, 4), (2,))
        """
        owner = list(range(self.n_tasks))  # the smallest task of each one's unit
        for linked in self.must_link:
            merged = {owner[task] for task in linked}
            owner = [min(merged) if own in merged else own for own in owner]
        return tuple(
            tuple(task for task in range(self.n_tasks) if owner[task] == first) for first in sorted(set(owner))
        )

    @cached_property
    def limits(self) -> Limits:
        """What groups of the units must meet; without those pairs that are one unit, see :attr:`is_contradictory`."""
        cliques = dict.fromkeys(tuple(sorted({self._unit_of[task] for task in apart})) for apart in self.cannot_link)
        return Limits(
            sizes=np.array([len(unit) for unit in self.units], dtype=np.float64),
            cliques=tuple(clique for clique in cliques if len(clique) > 1),
            min_size=self.min_size,
            max_size=self.n_tasks if self.max_size is None else self.max_size,
        )

    @property
    def is_contradictory(self) -> bool:
        """Whether two tasks must be together and apart, so that no partition is allowed."""
        pairs = itertools.chain.from_iterable(itertools.combinations(apart, 2) for apart in self.cannot_link)
        return any(self._unit_of[one] == self._unit_of[other] for one, other in pairs)

    def allows(self, groups: Iterable[Sequence[int]]) -> bool:
        """Whether every group meets everything; they need not be all of a partition."""
        return all(self.allows_group(group) for group in groups)

    def allows_group(self, group: Sequence[int]) -> bool:
        """Whether one group does."""
        tasks = set(group)
        is_sized = self.min_size <= len(tasks) <= (self.max_size or self.n_tasks)
        is_whole = all(tasks.issuperset(self.units[self._unit_of[task]]) for task in tasks)
        return is_sized and is_whole and all(sum(task in tasks for task in apart) < 2 for apart in self.cannot_link)

    def merge(self, affinity: FloatArray) -> FloatArray:
        """Return the units' affinities, sums over their tasks, shape ``(k, k)``."""
        if len(self.units) == self.n_tasks:
            return affinity
        members = np.zeros((len(self.units), self.n_tasks))
        for u, unit in enumerate(self.units):
            members[u, list(unit)] = 1.0
        return np.asarray(members @ affinity @ members.T)

    @cached_property
    def _unit_of(self) -> dict[int, int]:
        return {task: u for u, unit in enumerate(self.units) for task in unit}
