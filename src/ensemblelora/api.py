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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from scipy.special import softmax

from ensemblelora import artifacts
from ensemblelora.adapters import AdaptedModel
from ensemblelora.answers import Asked, Prediction, Question, check_rows, name_choices
from ensemblelora.config import EvaluationConfig, RunConfig, load_config
from ensemblelora.data.encoding import EncodedSplit, encode_split
from ensemblelora.data.loading import render_inputs
from ensemblelora.data.rendering import as_row, read_columns
from ensemblelora.data.task import Example, Kind, Task, TaskCard
from ensemblelora.earlier import describe_missing
from ensemblelora.ensemble import Ensemble, list_members, load_ensemble, predict_weighted
from ensemblelora.errors import StoreError, UsageError
from ensemblelora.estimation import Oracle, compute_wilson_interval
from ensemblelora.exporting import TOLERANCE, Export, Format, export_run
from ensemblelora.generation import decode_answers, generate, list_contexts
from ensemblelora.members import load_members
from ensemblelora.report.chance import Chance, judge_chance
from ensemblelora.report.records import ResultsRecord
from ensemblelora.routing import Route, Router, open_router, read_texts, route_rows
from ensemblelora.stages import read_oracle
from ensemblelora.workspace import ORACLE_FILE

__all__ = ["Prediction", "Question", "Run", "load_run"]

_MAX_NEW_TOKENS = 64
_ANY_ANSWER = " a"  # tells where a context ends; never read by the model


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
        return self._read(artifacts.PLAN_FILE, "plan")

    @property
    def results(self) -> dict[str, Any]:
        """What ``results.json`` holds.

        Raises:
            UsageError: If the run has not been evaluated.
        """
        return self._read(artifacts.RESULTS_FILE)

    def list_doubts(self, tasks: Collection[str]) -> list[str]:
        """Say in sentences on which of some tasks the run's own tests showed nothing better than one fixed answer.

        Args:
            tasks: Names.

        Returns:
            None where every task is above chance, or there are no test results that can be read.
        """
        return list(judge_chance(self._tested, sorted(tasks)).tell())

    def predict(self, task: str | None, rows: Sequence[Mapping[str, Any] | str]) -> list[Prediction]:
        """Answer questions of one task, or of whichever task each row is likeliest of.

        Args:
            task: Its name; none: rows are routed (:mod:`ensemblelora.routing`), which needs the run's training rows
                the first time.
            rows: A list of column values as the task's card reads them; a plain text stands for the card's one column,
                and one that is a JSON object for several.

        Returns:
            One answer a question, in order (a row that the card explodes asks several).

        Raises:
            UsageError: If the task is unknown, ``rows`` is one text or mapping instead of a list of them, a text is
                empty, or the run has no ensemble yet.
            DataError: If a row lacks a column, or is of no task that could be asked.
        """
        return self.predict_all([Question(task, rows)])[0]

    def predict_all(self, questions: Sequence[Question]) -> list[list[Prediction]]:
        """Answer several lists of rows, of any tasks, in as few passes as one list would take; see :meth:`predict`.

        All is checked before anything is run. Rows of one task share passes, whoever asks.

        Args:
            questions: Rows, each with their task's name or none.

        Returns:
            The answers of each question.
        """
        questions = [self._take_columns(question) for question in questions]
        rendered = [[] if q.task is None else self._render(q.task, q.rows) for q in questions]
        texts = [self._read_texts(q.rows) if q.task is None else [] for q in questions]
        routes = iter(self._route([row for found in texts for row in found]))
        asked: list[Asked] = []
        for i, question in enumerate(questions):
            if question.task is not None:
                asked += [Asked(i, question.task, e, self._weights[question.task], None) for e in rendered[i]]
                continue
            for row, route in zip(question.rows, routes, strict=False):  # those left are later questions'
                task = tuple(self.cards)[route.task]
                asked += [Asked(i, task, e, route.weights, route.probabilities) for e in self._render(task, [row])]
        answers: list[list[Prediction]] = [[] for _ in questions]
        for one, answer in zip(asked, self._answer_all(asked), strict=True):
            answers[one.question].append(answer)
        return answers

    def score(self, task: str, examples: Sequence[Example]) -> np.ndarray:
        """Probabilities of the choices of one task's rendered examples, ``(n, K)``."""
        return self._score(task, examples, np.tile(self._weights[task], (len(examples), 1)))

    def write(self, task: str, examples: Sequence[Example], *, max_new_tokens: int = _MAX_NEW_TOKENS) -> list[str]:
        """Write a text after each of one task's rendered examples, greedily; surrounding blanks are removed."""
        asked = Asked(0, task, examples[0], self._weights[task], None)
        return self._generate(task, examples, self._name_groups(asked), max_new_tokens)

    def load(self, *, with_router: bool = False) -> None:
        """Load the model now instead of with the first question.

        Args:
            with_router: Also make ready for rows without a task's name.

        Raises:
            UsageError: If the run has no ensemble yet, or its base model is another one now.
            DataError: If the router has yet to be fitted, and the run's rows can't be read.
        """
        _ = self._model
        if with_router:
            _ = self._router

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
    def _tested(self) -> ResultsRecord:
        """The test results; empty where there are none, or none that can be read, since predictions don't need them."""
        try:
            path = self.path / artifacts.RESULTS_FILE
            return ResultsRecord.model_validate(self.results, strict=False) if path.exists() else ResultsRecord()
        except (StoreError, ValidationError):
            return ResultsRecord()

    @cached_property
    def _chance(self) -> Chance:
        return judge_chance(self._tested, list(self.cards))

    @cached_property
    def _model(self) -> tuple[AdaptedModel, Ensemble]:
        self._read(artifacts.ENSEMBLE_FILE)
        ensemble = load_ensemble(self.path / artifacts.ENSEMBLE_FILE)
        heads = {card.head for card in self.cards.values()}
        n_labels = max(len(card.doc_to_choice or ()) for card in self.cards.values())
        return load_members(self.path, self.config, ensemble, head=heads.pop(), n_labels=n_labels), ensemble

    @cached_property
    def _router(self) -> Router:
        adapted, _ = self._model
        return open_router(self.path, self.config, list(self.cards.values()), list(self.kinds.values()), adapted)

    @cached_property
    def _weights(self) -> dict[str, np.ndarray]:
        """Every task's weights over the groups, ``(n_groups,)``."""
        _, ensemble = self._model
        return {task: np.array(row) for task, row in zip(ensemble.task_names, ensemble.weights, strict=True)}

    def _render(self, task: str, rows: Sequence[Mapping[str, Any] | str]) -> list[Example]:
        card = self._card(task)
        check_rows(f"task {task!r}", rows)
        return render_inputs(card, [as_row(card, row) for row in rows])

    def _take_columns(self, question: Question) -> Question:
        """Let a text without a task's name be the columns that it names, where a task reads these."""
        if question.task is not None:
            return question
        check_rows("no task named", question.rows)
        return Question(None, [read_columns(self.cards.values(), row) for row in question.rows])

    def _read_texts(self, rows: Sequence[Mapping[str, Any] | str]) -> list[list[str | None]]:
        return read_texts(list(self.cards.values()), rows)

    def _route(self, texts: Sequence[Sequence[str | None]]) -> list[Route]:
        if not texts:
            return []
        adapted, _ = self._model
        weights = np.stack([self._weights[task] for task in self.cards])
        return route_rows(self._router, adapted, self.config, texts, weights)

    def _answer_all(self, asked: Sequence[Asked]) -> list[Prediction]:
        """Answer task by task, and return the answers in the order of what was asked."""
        found: dict[int, Prediction] = {}
        for task in dict.fromkeys(one.task for one in asked):
            places = [place for place, one in enumerate(asked) if one.task == task]
            found |= zip(places, self._answer(task, [asked[place] for place in places]), strict=True)
        return [found[place] for place in range(len(asked))]

    def _answer(self, task: str, asked: Sequence[Asked]) -> list[Prediction]:
        examples = [one.example for one in asked]
        probabilities: list[dict[str, float]] | list[None]
        if self.kinds[task] == "sequence":
            labels, probabilities = self._generate_each(task, asked), [None] * len(asked)
        else:
            shares = self._score(task, examples, np.stack([one.weights for one in asked]))
            labels = [e.choices[int(row.argmax())].strip() for e, row in zip(examples, shares, strict=True)]
            probabilities = [name_choices(e, row.tolist()) for e, row in zip(examples, shares, strict=True)]
        return [
            Prediction(
                label=label,
                probabilities=some,
                groups=self._name_groups(one),
                members=self._name_members(one),
                task=task,
                routing=one.routing,
                probability=None if some is None else some[label],
                task_probability=None if one.routing is None else one.routing[task],
                doubt=self._chance.mark(task) or None,
            )
            for label, some, one in zip(labels, probabilities, asked, strict=True)
        ]

    def _score(self, task: str, examples: Sequence[Example], weights: np.ndarray) -> np.ndarray:
        """Probabilities of the choices ``(n, K)`` under weights ``(n, n_groups)``."""
        adapted, ensemble = self._model
        split = self._encode(task, examples, max_length=self.config.data.max_length)
        scores = predict_weighted(
            adapted, ensemble, split, weights, max_tokens=self.config.evaluation.max_tokens_per_batch
        )
        return np.asarray(softmax(scores, axis=1))

    def _name_groups(self, one: Asked) -> dict[str, float]:
        _, ensemble = self._model
        return {ensemble.members_of(g)[0].name: float(w) for g, w in enumerate(one.weights) if w > 0}

    def _name_members(self, one: Asked) -> dict[str, float]:
        _, ensemble = self._model
        used = [int(g) for g in np.flatnonzero(one.weights)]
        members = list_members(ensemble.members, used, self.kinds[one.task])
        return {member.name: float(one.weights[member.group] * member.rate) for member in members}

    @cached_property
    def _oracle(self) -> Oracle:
        self._read(ORACLE_FILE, "plan")
        return read_oracle(self.path, list(self.cards), self.config.estimation)

    def _encode(self, task: str, examples: Sequence[Example], *, max_length: int) -> EncodedSplit:
        card, kind = self.cards[task], self.kinds[task]
        if kind in ("verbalizer", "options"):
            # Said outright: a few rows may look like another kind than the task's rows together.
            card = card.model_copy(update={"scoring": kind})
        adapted, _ = self._model
        asked = Task(card, {"train": [], "validation": [], "test": examples})
        return encode_split(asked, "test", adapted.base.tokenizer, max_length=max_length)

    def _generate(
        self, task: str, examples: Sequence[Example], shares: Mapping[str, float], length: int = _MAX_NEW_TOKENS
    ) -> list[str]:
        adapted, _ = self._model
        asked = [Example(e.id, e.context, (_ANY_ANSWER,), 0, e.group) for e in examples]
        split = self._encode(task, asked, max_length=max(self.config.data.max_length - length, 8))
        answers = generate(
            adapted,
            list_contexts(split),
            list(shares),
            list(shares.values()),
            max_new_tokens=length,
            max_tokens=self.config.evaluation.max_tokens_per_batch,
        )
        return decode_answers(adapted, answers)

    def _generate_each(self, task: str, asked: Sequence[Asked]) -> list[str]:
        """Free-text answers; those under equal weights are written together."""
        shares = [self._name_groups(one) for one in asked]
        found: dict[int, str] = {}
        for mixture in [dict(items) for items in dict.fromkeys(tuple(some.items()) for some in shares)]:
            places = [place for place, some in enumerate(shares) if some == mixture]
            found |= zip(places, self._generate(task, [asked[p].example for p in places], mixture), strict=True)
        return [found[place] for place in range(len(asked))]

    def _card(self, name: str) -> TaskCard:
        if name not in self.cards:
            raise UsageError(f"task {name!r}: not in this run; its tasks are {', '.join(self.cards)}")
        return self.cards[name]

    def _read(self, name: str, command: str = "run") -> dict[str, Any]:
        if not (self.path / name).exists():
            raise UsageError(describe_missing(self.path, name, command))
        artifacts.RunFolder(self.path).check(name)
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
        content = artifacts.read_json(tasks)
        entries = content["tasks"]
        if content.get("sha256", digest := artifacts.fingerprint(entries)) != digest:
            raise ValueError("its checksum differs")
        cards = [TaskCard.model_validate(entry["card"]) for entry in entries]
        kinds = {card.task: entry["kind"] for card, entry in zip(cards, entries, strict=True)}
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{tasks}: not the cards of a run ({error!r}); delete it and run again") from None
    return Run(path, load_config(path / artifacts.CONFIG_FILE), {card.task: card for card in cards}, kinds)


def _bound_accuracy(share: float, groups: np.ndarray, config: EvaluationConfig) -> dict[str, float | None]:
    """An interval, with one observation per group of rows as in the standard errors, and the number of rows."""
    low, high = None, None
    if math.isfinite(share):
        low, high = compute_wilson_interval(float(share), len(np.unique(groups)), config.confidence)
    return {"accuracy_low": low, "accuracy_high": high, "n_validation": len(groups)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
