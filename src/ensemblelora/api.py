"""A finished run, in Python: predict with its ensemble, ask its oracle about any subset, export its adapters.

Example:
    >>> from ensemblelora import load_run
    >>> run = load_run("runs/demo")  # doctest: +SKIP
    >>> run.predict("demo_sst2", [{"sentence": "A joy."}])[0].label  # doctest: +SKIP
    'positive'
    >>> run.ask(["demo_rte", "demo_cb"])["demo_rte"]["nll"]  # doctest: +SKIP
    0.61
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ensemblelora import artifacts
from ensemblelora.adapters import AdaptedModel
from ensemblelora.config import EvaluationConfig, RunConfig, load_config
from ensemblelora.data.encoding import EncodedSplit, encode_split
from ensemblelora.data.loading import render_inputs
from ensemblelora.data.rendering import find_input_columns
from ensemblelora.data.task import Example, Kind, Task, TaskCard
from ensemblelora.ensemble import Ensemble, load_ensemble, predict_ensemble
from ensemblelora.errors import DataError, StoreError, UsageError
from ensemblelora.estimation import Oracle, compute_wilson_interval
from ensemblelora.exporting import TOLERANCE, Export, Format, export_run
from ensemblelora.generation import decode_answers, generate, list_contexts
from ensemblelora.members import load_members
from ensemblelora.stages import read_oracle
from ensemblelora.workspace import ORACLE_FILE

__all__ = ["Prediction", "Run", "load_run"]

_MAX_NEW_TOKENS = 64
_ANY_ANSWER = " a"  # tells where a context ends; never read by the model


@dataclass(frozen=True)
class Prediction:
    """The ensemble's answer to one question."""

    label: str
    """the likeliest choice, or the generated text"""
    probabilities: dict[str, float] | None
    """of every choice; none for free text"""
    groups: dict[str, float]
    """which group adapters answered, and with which weight"""


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder opened for use; the model is loaded when it is first needed."""

    path: Path
    config: RunConfig
    cards: Mapping[str, TaskCard]
    kinds: Mapping[str, Kind]
    """how every task is scored with this run's tokenizer"""

    @property
    def plan(self) -> dict[str, Any]:
        """What ``plan.json`` holds.

        Raises:
            UsageError: If the run has not been planned.
        """
        return self._read(artifacts.PLAN_FILE, "group")

    @property
    def results(self) -> dict[str, Any]:
        """What ``results.json`` holds.

        Raises:
            UsageError: If the run has not been evaluated.
        """
        return self._read(artifacts.RESULTS_FILE, "evaluate")

    def predict(self, task: str, rows: Sequence[Mapping[str, Any] | str]) -> list[Prediction]:
        """Answer questions of one task.

        Args:
            task: Its name.
            rows: A list of column values as the task's card reads them; a plain text stands for the card's one column.

        Returns:
            One answer a question, in order (a row that the card explodes asks several).

        Raises:
            UsageError: If the task is unknown, ``rows`` is one text or mapping instead of a list of them, a text is
                empty, or the run has no ensemble yet.
            DataError: If a row lacks a column.
        """
        card = self._card(task)
        _check_rows(task, rows)
        if not rows:
            return []
        examples = render_inputs(card, [_as_row(card, row) for row in rows])
        adapted, ensemble = self._model
        index = ensemble.task_names.index(task)
        weights = ensemble.weights[index]
        shares = {ensemble.members_of(g)[0].name: weight for g, weight in enumerate(weights) if weight > 0}
        if self.kinds[task] == "sequence":
            return [Prediction(text, None, shares) for text in self._generate(task, examples, shares)]
        split = self._encode(task, examples, max_length=self.config.data.max_length)
        scores = predict_ensemble(
            adapted, ensemble, index, split, max_tokens=self.config.evaluation.max_tokens_per_batch
        )
        shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)
        return [
            Prediction(example.choices[int(row.argmax())].strip(), _name_choices(example, row.tolist()), shares)
            for example, row in zip(examples, probabilities, strict=True)
        ]

    def ask(self, subset: Sequence[str]) -> dict[str, dict[str, float | None]]:
        """Predict what training a subset of tasks together would give, without training.

        Args:
            subset: Names of tasks; none asks about the base model.

        Returns:
            For every task of the run: ``nll`` and ``accuracy`` with their standard errors; ``accuracy_low`` and
            ``accuracy_high``, Wilson's interval at ``evaluation.confidence``, which few rows do not shrink to a point;
            ``n_validation``, the rows predicted on; and ``is_in_subset``. Free text has no accuracy: None.

        Raises:
            UsageError: If a name is unknown, or the run has no oracle yet.
        """
        names = list(self.cards)
        indices = tuple(names.index(self._card(name).task) for name in dict.fromkeys(subset))
        scores = self._oracle.score([indices])
        columns = ("nll", "nll_se", "accuracy", "accuracy_se")
        return {
            name: {column: _finite(getattr(scores, column)[0, i]) for column in columns}
            | _bound_accuracy(scores.accuracy[0, i], self._oracle.validation_groups(i), self.config.evaluation)
            | {"is_in_subset": i in indices}
            for i, name in enumerate(names)
        }

    def export(
        self,
        out: Path | str | None = None,
        *,
        format: Format,
        task: str | None = None,
        rank: int | None = None,
        tolerance: float = TOLERANCE,
    ) -> Export:
        """Write the ensemble as files that other software loads; see :func:`ensemblelora.exporting.export_run`."""
        return export_run(self.path, out, format=format, task=task, rank=rank, tolerance=tolerance)

    @cached_property
    def _model(self) -> tuple[AdaptedModel, Ensemble]:
        self._read(artifacts.ENSEMBLE_FILE, "combine")
        ensemble = load_ensemble(self.path / artifacts.ENSEMBLE_FILE)
        heads = {card.head for card in self.cards.values()}
        n_labels = max(len(card.doc_to_choice or ()) for card in self.cards.values())
        return load_members(self.path, self.config, ensemble, head=heads.pop(), n_labels=n_labels), ensemble

    @cached_property
    def _oracle(self) -> Oracle:
        self._read(ORACLE_FILE, "affinity")
        return read_oracle(self.path, list(self.cards), self.config.estimation)

    def _encode(self, task: str, examples: Sequence[Example], *, max_length: int) -> EncodedSplit:
        card, kind = self.cards[task], self.kinds[task]
        if kind in ("verbalizer", "options"):
            # Said outright: a few rows may look like another kind than the task's rows together.
            card = card.model_copy(update={"scoring": kind})
        adapted, _ = self._model
        asked = Task(card, {"train": [], "validation": [], "test": examples})
        return encode_split(asked, "test", adapted.base.tokenizer, max_length=max_length)

    def _generate(self, task: str, examples: Sequence[Example], shares: Mapping[str, float]) -> list[str]:
        adapted, _ = self._model
        asked = [Example(e.id, e.context, (_ANY_ANSWER,), 0, e.group) for e in examples]
        split = self._encode(task, asked, max_length=max(self.config.data.max_length - _MAX_NEW_TOKENS, 8))
        answers = generate(
            adapted,
            list_contexts(split),
            list(shares),
            list(shares.values()),
            max_new_tokens=_MAX_NEW_TOKENS,
            max_tokens=self.config.evaluation.max_tokens_per_batch,
        )
        return decode_answers(adapted, answers)

    def _card(self, name: str) -> TaskCard:
        if name not in self.cards:
            raise UsageError(f"task {name!r}: not in this run; its tasks are {', '.join(self.cards)}")
        return self.cards[name]

    def _read(self, name: str, stage: str) -> dict[str, Any]:
        if not (self.path / name).exists():
            raise UsageError(f"{self.path}: no {name} yet; make it with: ensemblelora {stage} {self.path}")
        return dict(artifacts.read_json(self.path / name))


def load_run(folder: Path | str) -> Run:
    """Open a run folder.

    Raises:
        OutputError: If it is no run folder.
        UsageError: If its first stage has not begun.
        StoreError: If a file in it is damaged.
    """
    path = artifacts.RunFolder.open(folder).path
    tasks = path / artifacts.TASKS_FILE
    if not tasks.exists():
        raise UsageError(f"{path}: nothing was done yet; start with: ensemblelora run {path}")
    try:
        entries = artifacts.read_json(tasks)["tasks"]
        cards = [TaskCard.model_validate(entry["card"]) for entry in entries]
        kinds = {card.task: entry["kind"] for card, entry in zip(cards, entries, strict=True)}
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{tasks}: not the cards of a run ({error!r}); delete it and run again") from None
    return Run(path, load_config(path / artifacts.CONFIG_FILE), {card.task: card for card in cards}, kinds)


def _check_rows(task: str, rows: Sequence[Mapping[str, Any] | str]) -> None:
    """Refuse one row in place of a list, which would be answered letter by letter, and texts without a word."""
    if isinstance(rows, str | Mapping):
        what = "one text" if isinstance(rows, str) else "one mapping"
        raise UsageError(f"task {task!r}: got {what}, expected a list of rows; put it in brackets: [row]")
    for place, row in enumerate(rows, start=1):
        if isinstance(row, str) and not row.strip():
            raise UsageError(f"task {task!r}: text {place} of {len(rows)} is empty; give the text to answer")


def _as_row(card: TaskCard, row: Mapping[str, Any] | str) -> Mapping[str, Any]:
    if not isinstance(row, str):
        return row
    columns = find_input_columns(card)
    if len(columns) != 1:
        raise DataError(
            f"task {card.task!r}: its text is made of the columns {', '.join(columns)}; give a JSON object with these"
        )
    return {columns[0]: row}


def _name_choices(example: Example, probabilities: Sequence[float]) -> dict[str, float]:
    """Probability of each choice by its text; equal texts add up."""
    named: dict[str, float] = {}
    for choice, probability in zip(example.choices, probabilities, strict=False):  # other rows may have more choices
        named[choice.strip()] = named.get(choice.strip(), 0.0) + probability
    return named


def _bound_accuracy(share: float, groups: np.ndarray, config: EvaluationConfig) -> dict[str, float | None]:
    """An interval, with one observation per group of rows as in the standard errors, and the number of rows."""
    low, high = None, None
    if math.isfinite(share):
        low, high = compute_wilson_interval(float(share), len(np.unique(groups)), config.confidence)
    return {"accuracy_low": low, "accuracy_high": high, "n_validation": len(groups)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
