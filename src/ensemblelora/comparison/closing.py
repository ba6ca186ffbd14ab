"""The last sections of a comparison's page: what it can't say, and how to make it again. No torch.

In: a :class:`~.record.StudyRecord` and its :class:`~.statistics.Statistics`. Out: sections.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from ensemblelora.artifacts import CONFIG_FILE
from ensemblelora.comparison.record import StudyRecord
from ensemblelora.comparison.statistics import Statistics
from ensemblelora.config import dump_config
from ensemblelora.report.document import Block, Bullets, Cell, Column, Fold, Row, Section, Table
from ensemblelora.report.wording import join_names

__all__ = ["list_limits", "write_again"]

_MOST_NAMES = 12


def list_limits(study: StudyRecord, found: Statistics) -> Section:
    """What the numbers can't say, and what is missing."""
    blocks: list[Block] = [Bullets(tuple(_list_limits(study, found)))]
    if study.head.failures:
        told = tuple(f"{name} failed: {why}" for name, why in study.head.failures.items())
        blocks.append(Bullets(told, is_warning=True))
    return Section("limits", "What this can't say", blocks)


def write_again(study: StudyRecord, found: Statistics) -> Section:
    """How to make the comparison again."""
    head = study.head
    asked = ["--methods", ",".join(head.methods), "--seeds", str(len(head.seeds))]
    asked += ["--learning-rates", ",".join(f"{rate:g}" for rate in head.learning_rates)]
    if head.primary:
        asked += ["--primary", ",".join(f"{pair.a}:{pair.b}" for pair in head.primary)]
    command = shlex.join(["ensemblelora", "compare", str(study.folder / CONFIG_FILE), *asked])
    facts = [(name, value) for name, value in study.environment.items() if isinstance(value, str)]
    columns = (Column("What", is_number=False), Column("Used here", is_number=False))
    table = Table("Environment", columns, tuple(Row((Cell(name), Cell(value))) for name, value in facts))
    folded = Fold(dump_config(study.config).strip(), summary=f"The config ({CONFIG_FILE})", language="yaml")
    return Section("again", "Make it again", [Fold(command, language="sh"), table, folded])


def _list_limits(study: StudyRecord, found: Statistics) -> Iterator[str]:
    yield (
        "Intervals and p-values are over test rows of these tasks and over trainings: their starts and the orders of "
        "their rows. Which rows were drawn to learn from is the same throughout."
    )
    n_seeds = len(study.head.seeds)
    if n_seeds == 1:
        yield (
            "1 seed: what another training would have given is not known; there are no p-values, and intervals are "
            "over test rows alone."
        )
    elif n_seeds == 2:
        yield "2 seeds: the spread over seeds is hardly known, and intervals are wide for it."
    if found.undrawn:
        yield (
            f"Test rows of {join_names(list(found.undrawn), _MOST_NAMES)} are of a single group, which tells no "
            "spread: they are in every mean as they were measured, and intervals are over the rows of the others."
        )
    if "shared" not in found.methods:
        yield "No task was looked at for being at chance: that takes the shared adapter."
    edges = [method.name for method in found.methods.values() if method.is_rate_at_edge]
    if edges:
        yield (
            f"The best learning rate was the smallest or the largest tried: {join_names(edges, _MOST_NAMES)}. One "
            "beyond might be better."
        )
    incomplete = [m.name for m in found.methods.values() if len(m.seeds) < n_seeds]
    if incomplete:
        yield f"Fewer seeds than the others have: {join_names(incomplete, _MOST_NAMES)}."
    missing = [name for name in study.head.methods if name not in found.methods]
    if missing:
        yield f"Without any result yet: {join_names(missing, _MOST_NAMES)}."
