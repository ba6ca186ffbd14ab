"""Rows without a task's name: which tasks they may be of, how likely each is, and the weights that follow.

What a row brings, without any card's own words around it, is read by the base model. Tasks are told apart by the mean
of its last hidden states: the nearer a task's training rows, in standard deviations of rows about their task, the
likelier it is. One temperature, fitted on validation rows, makes probabilities of the distances. A task that can't be
asked with the row's columns has none.

In: a run's cards and model. Out: :class:`Router`, kept beside the run as ``routing.json`` and ``routing.npz``; and a
:class:`Route` a row. Cost: one forward pass over up to 300 rows a task, once; then one over each row that is routed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import softmax
from sklearn.covariance import ledoit_wolf

from ensemblelora import artifacts, progress
from ensemblelora.adapters import AdaptedModel
from ensemblelora.config import RunConfig
from ensemblelora.data.loading import load_task, place_of, render_inputs
from ensemblelora.data.rendering import as_row, strip_words
from ensemblelora.data.task import Kind, TaskCard
from ensemblelora.embedding import embed_texts
from ensemblelora.errors import DataError, MissingExtraError, OutputError, StoreError
from ensemblelora.passes import choose_max_tokens
from ensemblelora.seeding import generator_for
from ensemblelora.weighting.temperature import fit_temperature

__all__ = [
    "ROUTING_ARRAYS_FILE",
    "ROUTING_FILE",
    "Route",
    "Router",
    "choose_route",
    "describe_format",
    "fit_router",
    "open_router",
    "read_texts",
    "route_rows",
    "score_tasks",
    "weigh_tasks",
]

logger = logging.getLogger(__name__)

ROUTING_FILE = "routing.json"
ROUTING_ARRAYS_FILE = "routing.npz"

FloatArray = npt.NDArray[np.float64]

_FORMAT = 1
_MOST_ROWS = {"train": 200, "validation": 100}
"""rows of each task; more hardly move a mean"""
_LEAST_SPREAD = 1e-3
"""of a number within tasks, over its spread in all rows"""
_LEAST_SHARE = 0.01
"""less likely tasks have no say in the weights: each could cost a pass of its own"""


@dataclass(frozen=True, eq=False)
class Router:
    """Tells n tasks apart by h numbers of a row: ``scores = ((e - center) / scale) @ directions.T + offsets``."""

    task_names: tuple[str, ...]
    formats: tuple[str, ...]
    """how each task is answered; tasks of one format may share weights"""
    center: FloatArray
    """(h,)"""
    scale: FloatArray
    """(h,): standard deviation of a task's rows about their mean"""
    directions: FloatArray
    """(n, h)"""
    offsets: FloatArray
    """(n,)"""
    temperature: float
    doubt: float
    """share of every row's probability that all tasks have alike: few validation rows prove no certainty"""


@dataclass(frozen=True, eq=False)
class Route:
    """What a row without a task's name is answered with."""

    task: int
    """whose prompt and labels are used"""
    weights: FloatArray
    """(n_groups,): the mean of its format's tasks', by their probabilities"""
    probabilities: dict[str, float]
    """of every task that the row could be of, the likeliest first"""


def fit_router(
    train: Sequence[FloatArray],
    validation: Sequence[FloatArray],
    *,
    task_names: Sequence[str],
    formats: Sequence[str],
) -> Router:
    """Fit means of tasks, the covariance that they share, and the temperature.

    Tasks are taken to be equally likely, however many rows they have.

    Args:
        train: Embedded training rows of each task, ``(n_rows, h)``.
        validation: Embedded validation rows of each; they fit the temperature alone.
        task_names: In the same order.
        formats: See :class:`Router`.

    Reference:
        Linear discriminant analysis; Ledoit and Wolf (2004), "A well-conditioned estimator for large-dimensional
        covariance matrices", since there may be fewer rows than numbers.
    """
    tasks = np.repeat(np.arange(len(train)), [len(rows) for rows in train])
    center = np.concatenate(train).mean(axis=0)
    means = np.stack([rows.mean(axis=0) for rows in train])
    within = np.concatenate(train) - means[tasks]
    # A number that hardly varies within tasks must not decide alone.
    scale = np.maximum(within.std(axis=0), _LEAST_SPREAD * np.concatenate(train).std(axis=0))
    scale = np.where(scale > 0, scale, 1.0)
    covariance, _ = ledoit_wolf(within / scale, assume_centered=True)
    covariance += 1e-6 * np.eye(len(scale))
    centered = (means - center) / scale
    directions = np.linalg.solve(covariance, centered.T).T
    offsets = -0.5 * (directions * centered).sum(axis=1)
    labels = np.repeat(np.arange(len(validation)), [len(rows) for rows in validation])
    doubt = 1 / (len(labels) + 1)
    plain = Router(tuple(task_names), tuple(formats), center, scale, directions, offsets, temperature=1.0, doubt=doubt)
    return replace(plain, temperature=fit_temperature(score_tasks(plain, np.concatenate(validation)), labels))


def score_tasks(router: Router, embedded: FloatArray) -> FloatArray:
    """How near tasks are to rows ``(n_rows, h)``: ``(n_rows, n_tasks)``, higher is nearer, up to a row's constant."""
    distances = ((embedded - router.center) / router.scale) @ router.directions.T + router.offsets
    return np.asarray(distances / router.temperature)


def weigh_tasks(router: Router, scores: FloatArray) -> FloatArray:
    """Probabilities of the tasks, ``(n_rows, n_tasks)``, from their scores; none where a score is -inf."""
    is_possible = np.isfinite(scores)
    even = is_possible / is_possible.sum(axis=1, keepdims=True)
    return np.asarray((1 - router.doubt) * softmax(scores, axis=1) + router.doubt * even)


def choose_route(router: Router, scores: FloatArray, weights: FloatArray) -> Route:
    """Choose a row's format, task and weights from the scores of the tasks it may be of.

    The format whose tasks are likeliest together is answered in: with the prompt and labels of its likeliest task,
    under the mean of its tasks' weights by probability.

    Args:
        router: Names the tasks.
        scores: ``(n_tasks,)``, -inf where the row can't be of the task.
        weights: Of every task, ``(n_tasks, n_groups)``.
    """
    shares = weigh_tasks(router, scores[None])[0]
    formats = np.array(router.formats)
    totals = {name: float(shares[formats == name].sum()) for name in dict.fromkeys(router.formats)}
    chosen = max(totals, key=lambda name: totals[name])
    inside = np.where(formats == chosen, shares, 0.0)
    counted = np.where(inside >= _LEAST_SHARE * inside.sum(), inside, 0.0)
    order = [int(i) for i in np.argsort(-shares, kind="stable") if np.isfinite(scores[i])]
    return Route(
        task=int(inside.argmax()),
        weights=np.asarray(counted @ weights / counted.sum()),
        probabilities={router.task_names[i]: float(shares[i]) for i in order},
    )


def read_texts(cards: Sequence[TaskCard], rows: Sequence[Mapping[str, Any] | str]) -> list[list[str | None]]:
    """What every task's card reads in every row, without its own words: ``n_rows`` lists of ``n_tasks`` texts.

    Args:
        cards: The tasks'.
        rows: Column values; a plain text stands for the one column of a card that has one.

    Returns:
        None where a card can't read the row.
    """
    texts: list[list[str | None]] = [[None] * len(cards) for _ in rows]
    alike: dict[tuple[str, ...] | None, list[int]] = {}
    for place, row in enumerate(rows):
        alike.setdefault(None if isinstance(row, str) else tuple(row), []).append(place)
    for task, card in enumerate(map(strip_words, cards)):
        for places in alike.values():  # a template is compiled once for all rows of the same columns
            for place, text in zip(places, _read_alike(card, [rows[place] for place in places]), strict=True):
                texts[place][task] = text
    return texts


def route_rows(
    router: Router,
    adapted: AdaptedModel,
    config: RunConfig,
    texts: Sequence[Sequence[str | None]],
    weights: FloatArray,
) -> list[Route]:
    """Route rows, each distinct text read once.

    Args:
        router: Fitted to the run's tasks.
        adapted: The run's model.
        config: The run's.
        texts: As :func:`read_texts` gives them.
        weights: Of every task, ``(n_tasks, n_groups)``.

    Raises:
        DataError: If a row could be of no task.
    """
    for place, row in enumerate(texts, start=1):
        if all(text is None for text in row):
            raise DataError(
                f"row {place} of {len(texts)}: no task of this run can be asked with what it brings; name a task to "
                "see which columns are missing"
            )
    distinct = {text: i for i, text in enumerate(dict.fromkeys(t for row in texts for t in row if t is not None))}
    found = score_tasks(router, _embed(adapted, config, list(distinct)))
    return [
        choose_route(
            router,
            np.array([-np.inf if text is None else found[distinct[text], i] for i, text in enumerate(row)]),
            weights,
        )
        for row in texts
    ]


def describe_format(card: TaskCard, kind: Kind) -> str:
    """How a task is answered: weights of tasks that agree in this speak of the same labels, scored alike.

    Example:
        >>> from ensemblelora.data.catalog import find_cards, load_card
        >>> describe_format(load_card(find_cards()["rte"]), "verbalizer")
        'verbalizer: False | True'
    """
    if card.doc_to_choice is None:
        return kind
    if isinstance(card.doc_to_choice, str):
        return f"{kind}: {card.doc_to_choice}"
    choices = card.doc_to_choice.values() if isinstance(card.doc_to_choice, dict) else card.doc_to_choice
    return f"{kind}: {' | '.join(sorted(choice.strip() for choice in choices))}"


def open_router(
    folder: Path, config: RunConfig, cards: Sequence[TaskCard], kinds: Sequence[Kind], adapted: AdaptedModel
) -> Router:
    """Read a run's router, or fit it and keep it beside the run.

    Args:
        folder: Of the run.
        config: The run's.
        cards: Of its tasks, in their order.
        kinds: How each is scored.
        adapted: Its model.

    Raises:
        DataError: If it has to be fitted and the training rows can't be read.
    """
    formats = [describe_format(card, kind) for card, kind in zip(cards, kinds, strict=True)]
    made_of = [card.model_dump(mode="json") for card in cards]
    identity = artifacts.fingerprint(_FORMAT, made_of, formats, config.data, config.seed, adapted.base.fingerprint)
    names = [card.task for card in cards]
    if (kept := _read(folder, identity, names, formats)) is not None:
        return kept
    with progress.stage("learning which task a text belongs to (routing)"):
        drawn = [_draw_texts(card, config) for card in progress.track(cards, "reading rows")]
        embedded = {split: [_embed(adapted, config, texts[split]) for texts in drawn] for split in _MOST_ROWS}
        router = fit_router(embedded["train"], embedded["validation"], task_names=names, formats=formats)
    _keep(folder, identity, router, embedded)
    return router


def _embed(adapted: AdaptedModel, config: RunConfig, texts: Sequence[str]) -> FloatArray:
    max_tokens = choose_max_tokens(adapted, config.evaluation.max_tokens_per_batch)
    return embed_texts(adapted, texts, max_length=config.data.max_length, max_tokens=max_tokens)


def _read_alike(bare: TaskCard, rows: Sequence[Mapping[str, Any] | str]) -> list[str | None]:
    """What a card reads in rows of the same columns; None where it can't."""
    try:
        examples = render_inputs(bare, [as_row(bare, row) for row in rows])
    except DataError:
        return [None] if len(rows) == 1 else [text for row in rows for text in _read_alike(bare, [row])]
    found: list[list[str]] = [[] for _ in rows]
    for example in examples:
        found[place_of(example)].append(_tidy(example.context))
    return ["\n".join(dict.fromkeys(texts)) if texts else None for texts in found]


def _tidy(text: str) -> str:
    """Lines without what surrounds them, so that a value is the same text wherever a template puts it."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def _draw_texts(card: TaskCard, config: RunConfig) -> dict[str, list[str]]:
    """Some rows of each split, as :func:`read_texts` would read them."""
    seed = config.seed if config.data.seed is None else config.data.seed
    try:
        splits = load_task(strip_words(card), config.data, seed=seed).splits
    except (DataError, MissingExtraError) as error:
        raise DataError(f"routing is fitted to the run's rows, which can't be read: {error}; name a task") from None
    drawn = {}
    for split, most in _MOST_ROWS.items():
        order = generator_for(config.seed, "routing", card.task, split).permutation(len(splits[split]))[:most]
        drawn[split] = [_tidy(splits[split][int(e)].context) for e in order]
    return drawn


def _keep(folder: Path, identity: str, router: Router, embedded: Mapping[str, Sequence[FloatArray]]) -> None:
    """Write the router, and how well it names the tasks of validation rows; a run that can't be written stays so."""
    arrays = {name: getattr(router, name) for name in ("center", "scale", "directions", "offsets")}
    record = {
        "identity": identity,
        "task_names": router.task_names,
        "formats": router.formats,
        "temperature": router.temperature,
        "doubt": router.doubt,
        "n_rows": {split: [len(rows) for rows in found] for split, found in embedded.items()},
        "validation": _judge(router, embedded["validation"]),
    }
    try:
        artifacts.save_arrays(folder / ROUTING_ARRAYS_FILE, arrays)
        digest = artifacts.file_sha256(folder / ROUTING_ARRAYS_FILE)
        artifacts.write_json(folder / ROUTING_FILE, record | {"arrays_sha256": digest})
    except (OutputError, OSError) as error:
        logger.info("routing is not kept: %s", error)


def _judge(router: Router, rows: Sequence[FloatArray]) -> dict[str, Any]:
    """How often the likeliest task, and its format, is right, told by texts alone; which is taken for which."""
    tasks = np.repeat(np.arange(len(rows)), [len(found) for found in rows])
    scores = score_tasks(router, np.concatenate(rows))
    named, formats = scores.argmax(axis=1), np.array(router.formats)
    confusion = np.zeros((len(rows), len(rows)), dtype=np.int64)
    np.add.at(confusion, (tasks, named), 1)
    shares = weigh_tasks(router, scores)
    return {
        "accuracy": float((named == tasks).mean()),
        "format_accuracy": float((formats[named] == formats[tasks]).mean()),
        "nll": float(-np.log(shares[np.arange(len(tasks)), tasks]).mean()),
        "confusion": confusion,
    }


def _read(folder: Path, identity: str, names: Sequence[str], formats: Sequence[str]) -> Router | None:
    """The router that was kept, if it is of this run as it is now."""
    record_file, arrays_file = folder / ROUTING_FILE, folder / ROUTING_ARRAYS_FILE
    if not (record_file.exists() and arrays_file.exists()):
        return None
    try:
        record = artifacts.read_json(record_file)
        is_current = record["identity"] == identity and record["arrays_sha256"] == artifacts.file_sha256(arrays_file)
        arrays = artifacts.load_arrays(arrays_file) if is_current else {}
        if not arrays:
            return None
        return Router(tuple(names), tuple(formats), temperature=record["temperature"], doubt=record["doubt"], **arrays)
    except (KeyError, TypeError, StoreError) as error:
        logger.info("%s: not a router (%s); it is fitted again", record_file, error)
        return None
