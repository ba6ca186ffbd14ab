"""What a config asks of the groups, checked against the tasks and against itself before anything is computed.

In: the grouping section and the tasks' names. Out: constraints and hand-made groups in task indices, the numbers of
groups that are left, and faults in words: for demands that no partition meets, a smallest set of them that conflicts.
"""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ensemblelora.config import GroupingConfig
from ensemblelora.errors import ConfigError, SolverError
from ensemblelora.grouping import Constraints, Partition, can_meet, sort_groups
from ensemblelora.planning.budget import Budget

__all__ = [
    "check_demands",
    "find_budget_fault",
    "list_demand_faults",
    "list_group_numbers",
    "read_constraints",
    "read_groups",
]

_logger = logging.getLogger(__name__)

_LISTS = ("must_link", "cannot_link")
_MAX_NAMED = 12


@dataclass(frozen=True)
class _Demand:
    """One thing asked of the groups: a key, and its value or one of its lists."""

    key: str
    value: Any

    def __str__(self) -> str:
        value = f"[{', '.join(self.value)}]" if isinstance(self.value, tuple) else self.value
        return f"grouping.{self.key} {value}"


def read_constraints(config: GroupingConfig, names: Sequence[str]) -> Constraints:
    """Return what the config asks of any partition, in task indices.

    Args:
        config: Its names are among ``names``; :func:`check_demands` sees to it.
        names: Of the tasks, in their order.
    """
    return _constrain(_list_demands(config), names)


def read_groups(config: GroupingConfig, names: Sequence[str]) -> Partition | None:
    """Return the groups given by hand, in task indices; none where there are none."""
    return (
        None if config.groups is None else sort_groups([names.index(task) for task in group] for group in config.groups)
    )


def check_demands(config: GroupingConfig, names: Sequence[str]) -> None:
    """Refuse what no partition of the tasks can meet.

    Raises:
        ConfigError: Names every fault.
    """
    if faults := list(list_demand_faults(config, names)):
        raise ConfigError("; ".join(faults))


def list_demand_faults(config: GroupingConfig, names: Sequence[str]) -> Iterator[str]:
    """Say what is wrong with the numbers, names and lists that groups are asked to meet."""
    if config.n_groups != "auto" and not 1 <= config.n_groups <= len(names):
        yield f"grouping.n_groups {config.n_groups}: expected 1 to {len(names)}, the number of tasks"
        return
    if unknown := list(_list_unknown(config, names)):
        yield from unknown
    elif config.groups is not None:
        yield from _list_group_faults(config, names)
    else:
        yield from _list_conflicts(config, names)


def list_group_numbers(config: GroupingConfig, names: Sequence[str]) -> list[int]:
    """Return the numbers of groups to look at: those to the most allowed that meet everything, and the one asked for.

    Raises:
        SolverError: If it is not settled in time whether a number can be met.
    """
    constraints, asked = read_constraints(config, names), config.n_groups_asked
    open_numbers = config.list_numbers(len(names))
    numbers = {m for m in open_numbers if m == asked or can_meet(constraints, range(m, m + 1))}
    return sorted(numbers if asked is None else numbers | {asked})


def find_budget_fault(config: GroupingConfig, names: Sequence[str], budget: Budget) -> str | None:
    """Say so if the number of groups asked for, or every one that meets the constraints, is over budget."""
    asked = config.n_groups_asked
    if asked is not None:
        faults = budget.list_faults(asked)
        told = f"grouping.groups: {asked} groups take" if config.groups else f"grouping.n_groups {asked} takes"
        return f"{told} {' and '.join(faults)}; change one of them" if faults else None
    numbers = list_group_numbers(config, names)
    if 1 in numbers or not all(budget.list_faults(m) for m in numbers):
        return None
    faults = budget.list_faults(numbers[0])
    return f"grouping: the constraints need {numbers[0]} groups, which take {' and '.join(faults)}; change one of them"


def _list_demands(config: GroupingConfig) -> list[_Demand]:
    """Everything that the groups themselves are asked to meet."""
    demands = [_Demand("min_group_size", config.min_group_size)] if config.min_group_size > 1 else []
    if config.max_group_size is not None:
        demands.append(_Demand("max_group_size", config.max_group_size))
    return [*demands, *(_Demand(key, tasks) for key in _LISTS for tasks in getattr(config, key))]


def _constrain(demands: Sequence[_Demand], names: Sequence[str]) -> Constraints:
    places = {name: i for i, name in enumerate(names)}
    lists = {key: tuple(tuple(places[task] for task in d.value) for d in demands if d.key == key) for key in _LISTS}
    sizes = {d.key: d.value for d in demands if d.key not in _LISTS}
    return Constraints(
        len(names), **lists, min_size=sizes.get("min_group_size", 1), max_size=sizes.get("max_group_size")
    )


def _list_unknown(config: GroupingConfig, names: Sequence[str]) -> Iterator[str]:
    """Say which names are no task's."""
    for key in (*_LISTS, "groups"):
        named = dict.fromkeys(task for tasks in getattr(config, key) or () for task in tasks)
        unknown = [name for name in named if name not in names]
        if unknown:
            close = dict.fromkeys(hit for name in unknown for hit in difflib.get_close_matches(name, names, n=1))
            known = list(close) or list(names[:_MAX_NAMED])
            hint = "did you mean" if close else "the tasks are"
            more = "" if close or len(names) <= _MAX_NAMED else f" and {len(names) - _MAX_NAMED} more"
            yield f"grouping.{key}: no task is named {' or '.join(map(repr, unknown))}; {hint} {', '.join(known)}{more}"


def _list_group_faults(config: GroupingConfig, names: Sequence[str]) -> Iterator[str]:
    """Say what keeps groups given by hand from being a partition, and which other demands they break."""
    assert config.groups is not None
    counts = Counter(task for group in config.groups for task in group)
    missing, doubled = [name for name in names if not counts[name]], [name for name in names if counts[name] > 1]
    if missing:
        yield f"grouping.groups: {', '.join(missing)} in no group; put every task into one"
    if doubled:
        yield f"grouping.groups: {', '.join(doubled)} named twice; put every task into one group"
    if config.n_groups not in ("auto", len(config.groups)):
        yield f"grouping.n_groups {config.n_groups}: grouping.groups has {len(config.groups)}; leave one of them out"
    groups = read_groups(config, names)
    if not missing and not doubled and groups is not None:
        broken = [str(d) for d in _list_demands(config) if not _constrain([d], names).allows(groups)]
        if broken:
            yield f"grouping.groups: these groups break {_join(broken)}; change one of them"


def _list_conflicts(config: GroupingConfig, names: Sequence[str]) -> Iterator[str]:
    """Say which demands can't be met together."""
    demands = _list_demands(config)
    if not demands:
        return
    if config.rounding == "threshold":
        yield f"grouping.rounding threshold: it joins tasks whatever {_join([str(d) for d in demands])} says; use best"
        return
    asked = config.n_groups_asked
    demands.append(_Demand("max_groups", config.max_groups) if asked is None else _Demand("n_groups", asked))
    if conflict := _find_conflict(demands, names):
        few = "it" if len(conflict) == 1 else "one of them"
        yield f"{_join([str(d) for d in conflict])} can't be met by any grouping of {len(names)} tasks; change {few}"


def _find_conflict(demands: Sequence[_Demand], names: Sequence[str]) -> list[_Demand]:
    """Return demands that can't be met together, none of which could be left out; none if all can be met."""
    if _can_be_met(demands, names):
        return []
    kept = list(demands)
    for demand in demands:
        others = [other for other in kept if other is not demand]
        if not _can_be_met(others, names):
            kept = others
    return kept


def _can_be_met(demands: Sequence[_Demand], names: Sequence[str]) -> bool:
    limits = {d.key: d.value for d in demands if d.key in ("n_groups", "max_groups")}
    numbers = GroupingConfig(max_groups=limits.get("max_groups", len(names))).list_numbers(len(names))
    if "n_groups" in limits:
        numbers = [limits["n_groups"]]
    constraints = _constrain([d for d in demands if d.key not in limits], names)
    gap = next((i for i in range(1, len(numbers)) if numbers[i] > numbers[i - 1] + 1), len(numbers))
    try:
        return any(can_meet(constraints, range(run[0], run[-1] + 1)) for run in (numbers[:gap], numbers[gap:]) if run)
    except SolverError as error:  # the search for groups will say so, if it finds none
        _logger.warning("constraints on groups are not checked: %s", error)
        return True


def _join(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
