"""How the commands that answer questions show their answers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from ensemblelora.console import show_rows

if TYPE_CHECKING:
    from ensemblelora.answers import Prediction

__all__ = ["show_answer", "show_routed", "warn_of_routing"]

_logger = logging.getLogger(__name__)

_SURE = 0.8
"""how likely a row's task has to be to go without a warning"""


def show_routed(predictions: Sequence[Prediction]) -> None:
    """Show every row's answer, and the task that it was taken to be of."""
    show_rows({str(n): _describe_routed(found) for n, found in enumerate(predictions, start=1)})


def warn_of_routing(predictions: Sequence[Prediction]) -> None:
    """Warn of rows without a task's name that may well be of another task than they were taken to be of."""
    from ensemblelora.report.wording import count

    unsure = [one for one in predictions if (one.task_probability or 0.0) < _SURE]
    if not unsure:
        return
    likeliest = Counter(tuple(sorted(list(one.routing)[:2])) for one in unsure if one.routing and len(one.routing) > 1)
    pair = f"; most often {' or '.join(likeliest.most_common(1)[0][0])}" if likeliest else ""
    _logger.warning(
        "%s of %d may be of another task than shown (less than %.0f %% sure%s), and its answer another then: name the "
        "task with --task",
        count(len(unsure), "row"),
        len(predictions),
        100 * _SURE,
        pair,
    )


def show_answer(answer: Mapping[str, Mapping[str, Any]], names: Sequence[str], confidence: float) -> None:
    """Show what a subset is predicted to give, and what a dash means where there is one."""
    from ensemblelora.report.wording import NOTHING, format_interval

    rows = {
        task: {
            "loss": found["nll"],
            "\u00b1": found["nll_se"],
            "accuracy": found["accuracy"],
            f"{confidence:.0%} interval": format_interval(found["accuracy_low"], found["accuracy_high"]),
            "validation_rows": found["n_validation"],
            "in_the_subset": found["is_in_subset"],
        }
        for task, found in answer.items()
    }
    show_rows(rows, title=f"if trained together: {', '.join(names)}" if names else "the base model, nothing trained")
    if any(found["accuracy"] is None for found in answer.values()):
        typer.echo(f"{NOTHING}: of free text only the loss is predicted")


def _describe_routed(prediction: Prediction) -> dict[str, str]:
    """The answer to a row without a task's name, the task that it was taken to be of, and how sure each of them is."""
    from ensemblelora.report.wording import format_percent

    return {
        "answer": prediction.label,
        "sure_of_the_answer": format_percent(prediction.probability, 0),
        "task": prediction.task,
        "sure_of_the_task": format_percent(prediction.task_probability, 0),
    }
