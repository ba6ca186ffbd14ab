"""From a config to tasks: cards resolved, rows chosen, splits cut, examples rendered, overlaps found.

Rows are chosen before they are rendered, so keeping a hundred rows of a million renders a hundred; of many that are
kept, a piece at a time is in memory. Every fault of every task is gathered and reported at once.

In: a :class:`~ensemblelora.config.DataConfig` and the run's seed. Out: a
:class:`~ensemblelora.data.task.TaskSet`. Invariants: splits of a task are disjoint; a missing split is cut from the
training rows, by group and stratified by label, never from test rows; no task's rows depend on which others are loaded.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ensemblelora import progress
from ensemblelora.config import DataConfig
from ensemblelora.data.candidates import choose_rows, size_pools
from ensemblelora.data.catalog import find_cards, load_card, parse_card, resolve_cards
from ensemblelora.data.contradictions import describe_contradictions
from ensemblelora.data.examples import hold
from ensemblelora.data.folder import tasks_from_folder
from ensemblelora.data.overlap import describe_overlap, find_overlaps, summarize_overlaps
from ensemblelora.data.reading import Draw, list_missing_variables, pin_commit, read_split
from ensemblelora.data.rendering import Renderer, Row, compile_card, explode_row
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
    "place_of",
    "render_inputs",
    "resolve_cards",
    "tasks_from_folder",
]

logger = logging.getLogger(__name__)


def load_tasks(config: DataConfig, *, seed: int, commits: Mapping[tuple[str, str], str] | None = None) -> TaskSet:
    """Load every task a config names.

    Args:
        config: Which tasks, how many rows, what to do about overlaps.
        seed: The run's seed, for a config without a seed of its own; each task derives its own from it.
        commits: The hub's commit that a run was begun with, by task and dataset; none: what the hub has now.

    Returns:
        Tasks in the config's order, with what their splits share; cards of a hub's datasets name the commit.

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
            pinned = _stay_with(card, (commits or {}).get((card.task, card.dataset_path)))
            tasks.append(load_task(pinned, config, seed=seed if config.seed is None else config.seed))
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("; ".join(faults))
    overlaps = find_overlaps(tasks)
    if overlaps and config.overlap == "refuse":
        found = "; ".join(map(describe_overlap, overlaps))
        raise DataError(f"splits overlap: {found}; remove the rows, or set data.overlap to report")
    warnings = [f"splits overlap: {summarize_overlaps(overlaps)}"] if overlaps else []
    warnings += [contradictions] if (contradictions := describe_contradictions(tasks)) else []
    for warning in warnings:
        logger.warning("%s", warning)
    return TaskSet(tuple(tasks), overlaps, tuple(warnings))


def load_task(card: TaskCard, config: DataConfig, *, seed: int) -> Task:
    """Load one task: read, choose rows, cut missing splits, render.

    Raises:
        DataError: Every fault of the task, each with its name, joined by ``"; "``.
    """
    named = dict(zip(SPLITS, (card.training_split, card.validation_split, card.test_split), strict=True))
    own_seed = seed_for(seed, "data", card.task)
    draws = _plan_draws(card, size_pools(card, named, config), seed=own_seed)
    tables = _read_tables(card, draws)
    card = pin_commit(card, tables[card.training_split])
    renderers = _compile_renderers(card, tables)
    chosen = choose_rows(card, named, tables, renderers, config, seed=own_seed)
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
            raise DataError(f"task {card.task!r}: row {i + 1} of {len(rows)}: {error}") from None
    if card.output_type == "multiple_choice":
        return examples
    return [Example(e.id, e.context, (), 0, e.group) for e in examples]


def place_of(example: Example) -> int:
    """Which of the rows given to :func:`render_inputs` an example came from."""
    return int(example.id.removeprefix("row:").partition(".")[0])


def _stay_with(card: TaskCard, commit: str | None) -> TaskCard:
    """A card at the commit that a run was begun with, unless it names a revision itself."""
    own = card.dataset_kwargs.get("revision", commit)
    if own != commit and commit is not None:
        told = (card.task, own, card.dataset_path, commit)
        logger.warning("task %r: now revision %s of dataset %s, before %s; what other rows change is done again", *told)
    return card if own is None else card.model_copy(update={"dataset_kwargs": {**card.dataset_kwargs, "revision": own}})


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


def _plan_draws(card: TaskCard, sizes: Mapping[str, int | None], *, seed: int) -> dict[str, Draw | None]:
    """What to take of each of a card's splits; none: all of it."""
    if not card.streaming:
        return dict.fromkeys(sizes)
    draws: dict[str, Draw | None] = {}
    for source, size in sizes.items():
        if size is None:
            raise DataError(
                f"task {card.task!r}: split {source!r} is streamed, so it must be said how many rows to take; set "
                "data.max_train_examples, data.max_validation_examples and data.max_test_examples"
            )
        draws[source] = Draw(size, seed_for(seed, source))
    return draws


def _read_tables(card: TaskCard, draws: Mapping[str, Draw | None]) -> dict[str, Dataset]:
    tables: dict[str, Dataset] = {}
    faults: list[str] = []
    for source, draw in draws.items():
        try:
            tables[source] = read_split(card, source, draw)
            card = pin_commit(card, tables[source])  # all splits are of one commit
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


def _render(chosen: Iterable[tuple[str, Row]], renderer: Renderer) -> tuple[Sequence[Example], list[str]]:
    """Return the examples, and what is wrong with each row that gives none."""
    faults: list[str] = []

    def render() -> Iterator[Example]:
        for name, row in chosen:
            try:
                yield renderer.example(row, name)
            except DataError as error:
                faults.append(f"row {name}: {error}")

    return hold(render()), faults


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
