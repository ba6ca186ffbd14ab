"""Which rows of a source go into which split: rows are looked at in passing, and a few bytes are kept of each.

In: a card's tables and the limits of a config. Out: for each split its rows, read as they are asked for. What decides a
row's place is its label and its group; contexts and choices are not rendered.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ensemblelora.config import DataConfig
from ensemblelora.data.examples import PIECE
from ensemblelora.data.rendering import Renderer, Row, explode_row
from ensemblelora.data.splitting import deal_groups, draw_pool, number_values, subsample
from ensemblelora.data.task import SPLITS, TaskCard
from ensemblelora.errors import DataError
from ensemblelora.seeding import seed_for

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Sources", "choose_rows", "size_pools"]

_POOL_FACTOR, _POOL_EXTRA = 4, 1000
"""Rows looked at for each row needed, and besides: room for strata and groups that come in lumps."""

Sources = Mapping[str, str | None]
"""the card's split behind each of ours; none: cut from the training rows"""


@dataclass(frozen=True, eq=False)
class _Candidates:
    """The examples that a source's rows give.

    Attributes:
        card: The task's.
        source: The card's name of the split.
        table: Its rows.
        numbers: int64 (n_examples,). Rows they are of, ascending.
        places: int32 (n_examples,). Which of a row's examples each is.
        strata: (n_examples,). Labels.
        groups: int64 (n_examples,). Numbered by where they first occur.
    """

    card: TaskCard
    source: str
    table: Dataset
    numbers: NDArray[np.int64]
    places: NDArray[np.int32]
    strata: list[Hashable]
    groups: NDArray[np.int64]

    def read(self, positions: NDArray[np.int64]) -> Iterator[tuple[str, Row]]:
        """The examples at some ascending positions: id and column values."""
        rows, starts = np.unique(self.numbers[positions], return_index=True)
        ends = [*starts.tolist(), len(positions)][1:]
        for (number, row), first, end in zip(_iterate(self.table, rows.tolist()), starts.tolist(), ends, strict=True):
            wanted = set(self.places[positions[first:end]].tolist())
            for k, inner in enumerate(explode_row(row, self.card.explode)):
                if k in wanted:
                    yield _name(self.card, self.source, number, k), inner


def size_pools(card: TaskCard, sources: Sources, config: DataConfig) -> dict[str, int | None]:
    """How many rows of each of a card's splits to look at; none: all of them."""
    limits = {split: getattr(config, f"max_{split}_examples") for split in SPLITS}
    n_dealt = card.part[1] if card.part else 1
    sizes: dict[str, int | None] = {}
    for split, source in sources.items():
        if source is not None:
            size = _size_pool(_list_parts(split, sources, config), limits)
            sizes[source] = size and size * n_dealt
    return sizes


def choose_rows(
    card: TaskCard,
    sources: Sources,
    tables: Mapping[str, Dataset],
    renderers: Mapping[str, Renderer],
    config: DataConfig,
    *,
    seed: int,
) -> dict[str, Iterator[tuple[str, Row]]]:
    """Rows of each of our splits: cut where the card names no source, and limited.

    Args:
        card: The task's.
        sources: Its splits.
        tables: Their rows.
        renderers: Of each.
        config: Limits and shares.
        seed: The task's.

    Returns:
        Id and column values of every example, ascending.

    Raises:
        DataError: If a row's label or group can't be found out.
    """
    sizes = size_pools(card, sources, config)
    chosen: dict[str, Iterator[tuple[str, Row]]] = {}
    for split, source in sources.items():
        if source is None:
            continue
        parts, n_rows = _list_parts(split, sources, config), len(tables[source])
        size = sizes[source]
        pool = range(n_rows) if size is None or n_rows <= size else draw_pool(n_rows, size, seed=seed_for(seed, source))
        found = _look_at(card, source, tables[source], pool, renderers[source])
        dealt = deal_groups(found.strata, found.groups, list(parts.values()), seed=seed) if len(parts) > 1 else None
        for number, part in enumerate(parts):
            positions = np.arange(len(found.numbers)) if dealt is None else np.flatnonzero(dealt == number)
            limit = getattr(config, f"max_{part}_examples")
            if limit is not None and limit < len(positions):
                strata = [found.strata[position] for position in positions]
                positions = positions[subsample(strata, limit, seed=seed_for(seed, part))]
            chosen[part] = found.read(positions)
    return chosen


def _list_parts(split: str, sources: Sources, config: DataConfig) -> dict[str, float]:
    """Which of our splits are cut from one of the card's, and the share of each."""
    if split != "train":
        return {split: 1.0}
    wanted = {"validation": config.validation_fraction, "test": config.test_fraction}
    missing = {other: fraction for other, fraction in wanted.items() if sources[other] is None}
    return {"train": 1 - sum(missing.values()), **missing}


def _size_pool(parts: Mapping[str, float], limits: Mapping[str, int | None]) -> int | None:
    """How many source rows to look at; None where a part takes all."""
    needs = [limits[part] for part in parts]
    if None in needs:
        return None
    needed = max(limit / share for limit, share in zip(needs, parts.values(), strict=True) if limit is not None)
    return ceil(_POOL_FACTOR * needed) + _POOL_EXTRA


def _look_at(card: TaskCard, source: str, table: Dataset, pool: Sequence[int], renderer: Renderer) -> _Candidates:
    numbers, places, groups = array("q"), array("i"), array("Q")
    strata: list[Hashable] = []
    known: dict[str, str] = {}  # one object for each label
    for number, row in _iterate(table, pool):
        try:
            for k, inner in enumerate(explode_row(row, card.explode)):
                stratum = "" if card.doc_to_choice is None else str(renderer.target(inner))
                group = renderer.group(inner) or _name(card, source, number, k)
                if card.part is None or seed_for(0, "part", group) % card.part[1] == card.part[0]:
                    numbers.append(number)
                    places.append(k)
                    groups.append(_hash(group))
                    strata.append(known.setdefault(stratum, stratum))
        except DataError as error:
            raise DataError(f"task {card.task!r}: row {source}:{number}: {error}") from None
    numbered = number_values(np.array(groups, np.uint64))
    return _Candidates(card, source, table, np.array(numbers, np.int64), np.array(places, np.int32), strata, numbered)


def _iterate(table: Dataset, numbers: Sequence[int]) -> Iterator[tuple[int, Row]]:
    """Rows by their numbers, in memory by pieces."""
    for first in range(0, len(numbers), PIECE):
        some = numbers[first : first + PIECE]
        columns = table[some.start : some.stop] if isinstance(some, range) else table[list(some)]
        for i, number in enumerate(some):
            yield number, {name: values[i] for name, values in columns.items()}


def _name(card: TaskCard, source: str, number: int, k: int) -> str:
    return f"{source}:{number}" if card.explode is None else f"{source}:{number}.{k}"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
