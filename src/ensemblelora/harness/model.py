"""A run's ensemble behind the harness's interface for models: choices are scored, answers are written.

A question's choices come as requests of their own. Those of one question are put together again, and each gets the
logarithm of its probability among them, as :meth:`ensemblelora.api.Run.predict` gives it: so the harness's ``acc`` is
the run's own accuracy, however its members are combined. ``acc_norm`` divides these by lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ensemblelora.api import Run, load_run
from ensemblelora.data.task import Example
from ensemblelora.errors import MissingExtraError, UsageError

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    raise MissingExtraError("lm-evaluation-harness is not installed; run: pip install 'ensemblelora[eval]'") from None

__all__ = ["EnsembleModel"]

_MAX_NEW_TOKENS = 256  # the harness's own, where a task says nothing
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")


@register_model("ensemblelora")
class EnsembleModel(LM):  # type: ignore[misc]  # it ships no types
    """A finished run, asked through the harness."""

    def __init__(
        self,
        run: str,
        task: str | None = None,
        device: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        """Open the run; its model is loaded with the first request.

        Args:
            run: The run folder.
            task: The run's task whose weights answer; none: the one that has the harness's task's name.
            device: Not looked at: the model runs where the run's config says.
            batch_size: Not looked at: passes are filled by their tokens.
            max_batch_size: Not looked at.

        Raises:
            UsageError: If the run has no such task.
        """
        super().__init__()
        self._run: Run = load_run(run)
        self._task = task
        if task is not None:
            self._find_task(task)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each choice among its question's; whether it would be written unasked isn't known.

        Raises:
            UsageError: If a task is none of the run's, or a question is no choice among continuations of one context.
        """
        questions: dict[tuple[Any, ...], list[int]] = {}
        for place, request in enumerate(requests):
            questions.setdefault((request.task_name, request.doc_id), []).append(place)
        found = np.zeros(len(requests))
        for task in dict.fromkeys(request.task_name for request in requests):
            own = [places for (name, _), places in questions.items() if name == task]
            examples = [_join(task, [requests[place].args for place in places]) for places in own]
            shares = self._run.score(self._find_task(task, has_choices=True), examples)
            for places, row in zip(own, shares, strict=True):
                found[places] = row[: len(places)]
        with np.errstate(divide="ignore"):
            return [(float(value), False) for value in np.log(found)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Refused: a run is trained to answer, and its weights belong to tasks, not to running text.

        Raises:
            UsageError: Always.
        """
        raise UsageError("an ensemble answers its tasks, and has no perplexity of running text; leave such tasks out")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Write an answer to each question, greedily, up to the first of the texts it is to stop at.

        Raises:
            UsageError: If a task is none of the run's, or asks for sampling.
        """
        found: dict[int, str] = {}
        wanted = [_read_settings(request) for request in requests]
        for task, length in dict.fromkeys((r.task_name, n) for r, (n, _) in zip(requests, wanted, strict=True)):
            places = [i for i, r in enumerate(requests) if (r.task_name, wanted[i][0]) == (task, length)]
            examples = [Example(f"request:{i}", requests[i].args[0], (), 0, f"request:{i}") for i in places]
            texts = self._run.write(self._find_task(task, has_choices=False), examples, max_new_tokens=length)
            found |= {i: _cut(text, wanted[i][1]) for i, text in zip(places, texts, strict=True)}
        return [found[i] for i in range(len(requests))]

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells cached requests apart by."""
        return str(self._run.config.model.name)

    def _find_task(self, name: str | None, *, has_choices: bool | None = None) -> str:
        """The run's task that answers a task of the harness; refused where one chooses and the other writes."""
        asked = self._task or str(name)
        if asked not in self._run.cards:
            raise UsageError(
                f"task {asked!r}: not in {self._run.path}, whose tasks are {', '.join(self._run.cards)}; add task=NAME "
                "to --model_args to say which of them answers"
            )
        if has_choices is not None and has_choices == (self._run.kinds[asked] == "sequence"):
            raise UsageError(f"task {asked!r}: one of choices and free text here, and the other in the harness")
        return asked


def _join(task: str, arguments: Sequence[tuple[Any, ...]]) -> Example:
    """One question of the requests for its choices."""
    contexts = {str(context) for context, *_ in arguments}
    if len(contexts) > 1 or len(arguments) < 2:
        what = "the likelihood of one text" if len(arguments) < 2 else "choices among contexts"
        raise UsageError(f"task {task!r}: asks for {what}; an ensemble chooses among continuations of one context")
    choices = tuple(str(continuation) for _, continuation, *_ in arguments)
    name = f"{task} {contexts}"
    return Example(name, contexts.pop(), choices, 0, name)


def _read_settings(request: Any) -> tuple[int, tuple[str, ...]]:
    """How long an answer may be, and at what texts it ends."""
    settings: Mapping[str, Any] = request.args[1] if len(request.args) > 1 else {}
    if settings.get("do_sample") and settings.get("temperature", 1.0):
        raise UsageError(f"task {request.task_name!r}: do_sample: only the likeliest answer is written; leave it out")
    until = settings.get("until") or ()
    length = next((int(settings[key]) for key in _LENGTHS if settings.get(key)), _MAX_NEW_TOKENS)
    return length, (until,) if isinstance(until, str) else tuple(until)


def _cut(text: str, until: Sequence[str]) -> str:
    ends = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
