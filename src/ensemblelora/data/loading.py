"""From a config to tasks: cards resolved, rows chosen, splits cut, examples rendered, overlaps found.

Rows are chosen before they are rendered, so keeping a hundred rows of a million renders a hundred. Every fault of every
task is gathered and reported at once.

In: a :class:`~ensemblelora.config.DataConfig` and the run's seed. Out: a
:class:`~ensemblelora.data.task.TaskSet`. Invariants: splits of a task are disjoint; a missing split is cut from the
training rows, by group and stratified by label, never from test rows; no task's rows depend on which others are loaded.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from ensemblelora import progress
from ensemblelora.config import DataConfig
from ensemblelora.data.catalog import find_cards, load_card, parse_card, resolve_cards
from ensemblelora.data.folder import tasks_from_folder
from ensemblelora.data.overlap import describe_overlap, find_overlaps
from ensemblelora.data.reading import list_missing_variables, read_split
from ensemblelora.data.rendering import Renderer, Row, compile_card, explode_row
from ensemblelora.data.splitting import cut_by_group, draw_pool, subsample
from ensemblelora.data.task import SPLITS, Example, Task, TaskCard, TaskSet
from ensemblelora.errors import ConfigError, DataError
from ensemblelora.seeding import seed_for

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "find_cards",
    "load_card",
    "load_task",
    "load_tasks",
    "parse_card",
    "render_inputs",
    "resolve_cards",
    "tasks_from_folder",
]

logger = logging.getLogger(__name__)

_POOL_FACTOR, _POOL_EXTRA = 4, 1000
"""Rows looked at for each row needed, and besides: room for strata and groups that come in lumps."""


class _Candidate(NamedTuple):
    id: str
    row: Row
    stratum: Hashable
    group: str


def load_tasks(config: DataConfig, *, seed: int) -> TaskSet:
    """Load every task a config names.

    Args:
        config: Which tasks, how many rows, what to do about overlaps.
        seed: The run's seed, for a config without a seed of its own; each task derives its own from it.

    Returns:
        Tasks in the config's order, with what their splits share.

    Raises:
        ConfigError: If the fractions to cut leave nothing to train on.
        DataError: Every fault of every task, joined by ``"; "``; the environment variables that data paths need and
            that are not set, each once; or the overlaps, where the config refuses them.
        MissingExtraError: If a card's data lies in a package that isn't installed.
    """
    if config.validation_fraction + config.test_fraction >= 1:
        raise ConfigError("data.validation_fraction and data.test_fraction: together they must stay below 1")
    tasks: list[Task] = []
    faults: list[str] = []
    cards = resolve_cards(config.tasks)
    _check_variables(cards)
    for card in progress.track(cards, description="loading tasks"):
        try:
            tasks.append(load_task(card, config, seed=seed if config.seed is None else config.seed))
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("; ".join(faults))
    overlaps = find_overlaps(tasks)
    if overlaps and config.overlap == "refuse":
        found = "; ".join(map(describe_overlap, overlaps))
        raise DataError(f"splits overlap: {found}; remove the rows, or set data.overlap to report")
    for overlap in overlaps:
        logger.warning("splits overlap: %s", describe_overlap(overlap))
    return TaskSet(tuple(tasks), overlaps)


def load_task(card: TaskCard, config: DataConfig, *, seed: int) -> Task:
    """Load one task: read, choose rows, cut missing splits, render.

    Raises:
        DataError: Every fault of the task, each with its name, joined by ``"; "``.
    """
    named = dict(zip(SPLITS, (card.training_split, card.validation_split, card.test_split), strict=True))
    tables = _read_tables(card, [source for source in named.values() if source is not None])
    renderers = _compile_renderers(card, tables)
    chosen = _choose_rows(card, named, tables, renderers, config, seed=seed_for(seed, "data", card.task))
    splits: dict[str, Sequence[Example]] = {}
    faults: list[str] = []
    row_faults: list[str] = []
    for split in SPLITS:
        source = named[split] or card.training_split
        examples, wrong = _render(chosen[split], renderers[source])
        splits[split] = examples
        row_faults += wrong
        faults += [] if wrong else _find_faults(card, split, examples)
    if row_faults:
        more = f" (and {len(row_faults) - 1} more faulty rows)" if len(row_faults) > 1 else ""
        faults.insert(0, f"{row_faults[0]}{more}")
    _raise_faults(card, faults)
    return Task(card, splits)


def render_inputs(card: TaskCard, rows: Sequence[Row]) -> list[Example]:
    """Render rows without targets, such as those to predict: label 0, no group; free text has no choices.

    Args:
        card: The task's card. ``explode`` is applied.
        rows: Column values.

    Raises:
        DataError: If a row lacks a column that the context or the choices need.
    """
    blank = card.model_copy(update={"doc_to_target": 0, "group": None})
    renderers: dict[tuple[str, ...], Renderer] = {}
    examples: list[Example] = []
    for i, row in enumerate(rows):
        try:
            columns = tuple(row)
            if columns not in renderers:
                renderers[columns] = compile_card(blank, columns)
            renderer = renderers[columns]
            for k, inner in enumerate(explode_row(row, card.explode)):
                examples.append(renderer.example(inner, f"row:{i}" if card.explode is None else f"row:{i}.{k}"))
        except DataError as error:
            raise DataError(f"task {card.task!r}: row {i}: {error}") from None
    if card.output_type == "multiple_choice":
        return examples
    return [Example(e.id, e.context, (), 0, e.group) for e in examples]


def _check_variables(cards: Sequence[TaskCard]) -> None:
    """Name each environment variable that is missing once, however many tasks read from it."""
    users: dict[str, list[str]] = {}
    for card in cards:
        for name in list_missing_variables(card):
            users.setdefault(name, []).append(card.task)
    faults = [
        f"the environment variable {name} is not set, and the data of {', '.join(tasks)} is read from it; set it to "
        f"the folder of the data: export {name}=FOLDER"
        for name, tasks in users.items()
    ]
    if faults:
        raise DataError("; ".join(faults))


def _read_tables(card: TaskCard, sources: Sequence[str]) -> dict[str, Dataset]:
    tables: dict[str, Dataset] = {}
    faults: list[str] = []
    for source in sources:
        try:
            tables[source] = read_split(card, source)
        except DataError as error:
            faults.append(str(error))
            continue
        if len(tables[source]) == 0:
            faults.append(f"split {source!r} is empty; give it rows, or leave it out of the card to have it cut")
    _raise_faults(card, faults)
    return tables


def _compile_renderers(card: TaskCard, tables: Mapping[str, Dataset]) -> dict[str, Renderer]:
    renderers: dict[str, Renderer] = {}
    faults: list[str] = []
    for source, table in tables.items():
        try:
            renderers[source] = compile_card(card, table.column_names)
        except DataError as error:
            faults.append(f"split {source!r}: {error}")
    _raise_faults(card, faults)
    return renderers


def _choose_rows(
    card: TaskCard,
    named: Mapping[str, str | None],
    tables: Mapping[str, Dataset],
    renderers: Mapping[str, Renderer],
    config: DataConfig,
    *,
    seed: int,
) -> dict[str, list[_Candidate]]:
    """Candidates of each of our splits: cut where the card names no source, and limited."""
    limits = {split: getattr(config, f"max_{split}_examples") for split in SPLITS}
    fractions = _share_training_rows(named, config)
    chosen: dict[str, list[_Candidate]] = {}
    for split, source in named.items():
        if source is None:
            continue
        parts = fractions if split == "train" else {split: 1.0}
        size, n_dealt = _size_pool(parts, limits), card.part[1] if card.part else 1
        pool = draw_pool(len(tables[source]), size and size * n_dealt, seed=seed_for(seed, source))
        candidates = list(_look_at(card, source, tables[source], pool, renderers[source]))
        strata = [candidate.stratum for candidate in candidates]
        groups = [candidate.group for candidate in candidates]
        cut = (
            cut_by_group(strata, groups, list(parts.values()), seed=seed)
            if len(parts) > 1
            else [range(len(candidates))]
        )
        for part, positions in zip(parts, cut, strict=True):
            kept = subsample([strata[p] for p in positions], limits[part], seed=seed_for(seed, part))
            chosen[part] = [candidates[positions[k]] for k in kept]
    return chosen


def _share_training_rows(named: Mapping[str, str | None], config: DataConfig) -> dict[str, float]:
    wanted = {"validation": config.validation_fraction, "test": config.test_fraction}
    missing = {split: fraction for split, fraction in wanted.items() if named[split] is None}
    return {"train": 1 - sum(missing.values()), **missing}


def _size_pool(parts: Mapping[str, float], limits: Mapping[str, int | None]) -> int | None:
    """How many source rows to look at; None where a part takes all."""
    needs = [limits[part] for part in parts]
    if None in needs:
        return None
    needed = max(limit / share for limit, share in zip(needs, parts.values(), strict=True) if limit is not None)
    return ceil(_POOL_FACTOR * needed) + _POOL_EXTRA


def _look_at(
    card: TaskCard, source: str, table: Dataset, pool: Sequence[int], renderer: Renderer
) -> Iterator[_Candidate]:
    """Yield what decides a row's place: its label and group. Contexts and choices are not rendered."""
    for number, row in zip(pool, table.select(pool), strict=True):
        try:
            for k, inner in enumerate(explode_row(row, card.explode)):
                name = f"{source}:{number}" if card.explode is None else f"{source}:{number}.{k}"
                stratum = "" if card.doc_to_choice is None else str(renderer.target(inner))
                group = renderer.group(inner) or name
                if card.part is None or seed_for(0, "part", group) % card.part[1] == card.part[0]:
                    yield _Candidate(name, inner, stratum, group)
        except DataError as error:
            raise DataError(f"task {card.task!r}: row {source}:{number}: {error}") from None


def _render(candidates: Sequence[_Candidate], renderer: Renderer) -> tuple[list[Example], list[str]]:
    """Return the examples, and what is wrong with each row that gives none."""
    examples: list[Example] = []
    faults: list[str] = []
    for candidate in candidates:
        try:
            examples.append(renderer.example(candidate.row, candidate.id))
        except DataError as error:
            faults.append(f"row {candidate.id}: {error}")
    return examples, faults


def _find_faults(card: TaskCard, split: str, examples: Sequence[Example]) -> list[str]:
    if not examples:
        return [f"split {split!r} is empty: too few rows or groups to cut it from; give more, or name the split"]
    if split != "train" or card.doc_to_choice is None:
        return []
    labels = Counter(example.label for example in examples)
    if len(labels) > 1:
        return []
    return [
        f"only one class in {len(examples)} training rows (always choice {next(iter(labels))}); a task needs two, "
        "and options must not always be right at the same place"
    ]


def _raise_faults(card: TaskCard, faults: Sequence[str]) -> None:
    if faults:
        raise DataError("; ".join(f"task {card.task!r}: {fault}" for fault in faults))
