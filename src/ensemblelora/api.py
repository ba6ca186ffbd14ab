"""A finished run, in Python: predict with its ensemble, ask its oracle about any subset.

    >>> from ensemblelora import load_run
    >>> run = load_run("runs/demo")                                     # doctest: +SKIP
    >>> run.predict("demo_sst2", [{"sentence": "A joy."}])[0].label     # doctest: +SKIP
    'positive'
    >>> run.ask(["demo_rte", "demo_cb"])["demo_rte"]["nll"]             # doctest: +SKIP
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
from ensemblelora.adapters import AdaptedModel, attach, load_adapter
from ensemblelora.config import RunConfig, load_config
from ensemblelora.data.encoding import encode_split
from ensemblelora.data.loading import render_inputs
from ensemblelora.data.rendering import find_input_columns
from ensemblelora.data.task import Task, TaskCard
from ensemblelora.ensemble import Ensemble, load_ensemble, predict_ensemble
from ensemblelora.errors import DataError, UsageError
from ensemblelora.estimation import Oracle, TaskFeatures, build_oracle
from ensemblelora.generation import decode_answers, generate
from ensemblelora.models import load_base
from ensemblelora.store import FeatureStore

__all__ = ["Prediction", "Run", "load_run"]

_MAX_NEW_TOKENS = 64


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
            rows: Column values as the task's card reads them; a plain text stands for the card's one column.

        Raises:
            UsageError: If the task is unknown or the run has no ensemble yet.
            DataError: If a row lacks a column.
        """
        card = self._card(task)
        examples = render_inputs(card, [_as_row(card, row) for row in rows])
        adapted, ensemble = self._model
        index = ensemble.task_names.index(task)
        shares = {
            ensemble.members_of(g)[0].name: weight for g, weight in enumerate(ensemble.weights[index]) if weight > 0
        }
        if card.output_type != "multiple_choice":
            texts = self._generate([example.context for example in examples], shares)
            return [Prediction(text, None, shares) for text in texts]
        split = encode_split(
            Task(card, {"train": [], "validation": [], "test": examples}),
            "test",
            adapted.base.tokenizer,  # type: ignore[arg-type]
            max_length=self.config.data.max_length,
        )
        scores = predict_ensemble(
            adapted, ensemble, index, split, max_tokens=self.config.evaluation.max_tokens_per_batch
        )
        shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)
        return [
            Prediction(
                label=example.choices[int(row.argmax())].strip(),
                probabilities={choice.strip(): float(p) for choice, p in zip(example.choices, row, strict=False)},
                groups=shares,
            )
            for example, row in zip(examples, probabilities, strict=True)
        ]

    def ask(self, subset: Sequence[str]) -> dict[str, dict[str, float | None]]:
        """Predict what training a subset of tasks together would give, without training.

        Args:
            subset: Names of tasks; none asks about the base model.

        Returns:
            For every task of the run: ``nll``, ``accuracy``, their standard errors, and ``is_in_subset``.

        Raises:
            UsageError: If a name is unknown, or the run has no features yet.
        """
        names = list(self.cards)
        indices = tuple(names.index(self._card(name).task) for name in dict.fromkeys(subset))
        scores = self._oracle.score([indices])
        columns = {"nll": scores.nll, "nll_se": scores.nll_se, "accuracy": scores.accuracy, "accuracy_se": scores.accuracy_se}
        return {
            name: {column: _finite(values[0, i]) for column, values in columns.items()} | {"is_in_subset": i in indices}
            for i, name in enumerate(names)
        }

    @cached_property
    def _model(self) -> tuple[AdaptedModel, Ensemble]:
        path = self.path / artifacts.ENSEMBLE_FILE
        if not path.exists():
            raise UsageError(f"{self.path}: the run has no ensemble yet; finish it with: ensemblelora run {self.path}")
        ensemble = load_ensemble(path)
        heads = {card.head for card in self.cards.values()}
        n_labels = max(len(card.doc_to_choice or ()) for card in self.cards.values())
        base = load_base(self.config.model, head=heads.pop(), n_labels=n_labels)
        made_with = artifacts.read_json(self.path / artifacts.ENVIRONMENT_FILE)["model"]["fingerprint"]
        if base.fingerprint != made_with:
            raise UsageError(
                f"{self.path}: made with another version of {self.config.model.name!r} or another model.dtype than the "
                "one loaded now; give the original, or run again"
            )
        adapted = attach(base, self.config.adapter, seed=self.config.seed)
        folder = artifacts.RunFolder.open(self.path)
        for member in ensemble.members:
            load_adapter(adapted, member.name, folder.adapter(member.name))
        return adapted, ensemble

    @cached_property
    def _oracle(self) -> Oracle:
        store = FeatureStore(self.path / artifacts.FEATURES_FOLDER)
        features = TaskFeatures(
            train=tuple(store.read(name, "train") for name in self.cards),
            validation=tuple(store.read(name, "validation") for name in self.cards),
        )
        settings = self.config.estimation
        plan = self.path / artifacts.PLAN_FILE
        if plan.exists():  # the ridge was chosen then; the same answers now
            settings = settings.model_copy(update={"l2_penalty": artifacts.read_json(plan)["l2_penalty"]})
        return build_oracle([features], settings)

    def _generate(self, contexts: Sequence[str], shares: Mapping[str, float]) -> list[str]:
        adapted, _ = self._model
        encoded = adapted.base.tokenizer([text.rstrip() for text in contexts])["input_ids"]
        room = self.config.data.max_length - _MAX_NEW_TOKENS
        tokens = [np.array(ids[-max(room, 1) :], dtype=np.int64) for ids in encoded]  # type: ignore[index]
        answers = generate(
            adapted,
            tokens,
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
    """
    path = artifacts.RunFolder.open(folder).path
    tasks = path / artifacts.TASKS_FILE
    if not tasks.exists():
        raise UsageError(f"{path}: nothing was done yet; start with: ensemblelora run {path}")
    cards = [TaskCard.model_validate(entry["card"]) for entry in artifacts.read_json(tasks)["tasks"]]
    return Run(path, load_config(path / artifacts.CONFIG_FILE), {card.task: card for card in cards})


def _as_row(card: TaskCard, row: Mapping[str, Any] | str) -> Mapping[str, Any]:
    if not isinstance(row, str):
        return row
    columns = find_input_columns(card)
    if len(columns) != 1:
        raise DataError(
            f"task {card.task!r}: its text is made of the columns {', '.join(columns)}; give a JSON object with these"
        )
    return {columns[0]: row}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
