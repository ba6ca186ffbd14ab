"""What a job in another process says, said here: its progress and its warnings, under the job's name.

In: a way to send a :class:`Line` from there to here, which is whoever carries out the jobs. Warnings are logged as they
were there; of lines about progress one is said every half minute, whoever it is of. No torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ensemblelora.progress import announcing, mention

__all__ = ["Line", "relayed", "say"]

_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class Line:
    """One line of a job.

    Attributes:
        job: Its name.
        text: What it said.
        logger: Whose warning it is; none: it is about progress.
        level: Of the warning.
    """

    job: str
    text: str
    logger: str | None = None
    level: int = logging.INFO


class _Mouth(logging.Handler):
    """Sends warnings, and what is printed to it as to a console."""

    is_terminal = False

    def __init__(self, job: str, send: Callable[[Line], object]) -> None:
        super().__init__(logging.WARNING)
        self._job, self._send = job, send

    def emit(self, record: logging.LogRecord) -> None:
        """Send a warning."""
        self._send(Line(self._job, record.getMessage(), record.name, record.levelno))

    def print(self, text: str, **_: Any) -> None:
        """Send a line about progress."""
        self._send(Line(self._job, text))


@contextmanager
def relayed(job: str, send: Callable[[Line], object]) -> Iterator[None]:
    """Inside, where a job is carried out, send what the package logs and announces.

    Args:
        job: Its name.
        send: Called with each line.
    """
    mouth, logger = _Mouth(job, send), logging.getLogger(_PACKAGE)
    console: Any = mouth
    logger.addHandler(mouth)
    try:
        with announcing(console):
            yield
    finally:
        logger.removeHandler(mouth)


def say(lines: Iterable[Line]) -> None:
    """Say here what jobs elsewhere have sent."""
    for line in lines:
        if line.logger is None:
            mention(f"{line.job}: {line.text}")
        else:
            logging.getLogger(line.logger).log(line.level, "%s: %s", line.job, line.text)
