"""Named errors. Each says what arrived, what was expected, and what to do, in one line.

The command line prints the message without a traceback and exits with ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "ClusterError",
    "ConfigError",
    "DataError",
    "EnsembleLoraError",
    "MissingExtraError",
    "ModelError",
    "OutputError",
    "SolverError",
    "StoreError",
    "TrainingError",
    "UsageError",
    "first_line",
    "join_faults",
    "list_nearest",
    "quote",
]

_QUOTED = 80
"""characters of a value that a message shows"""
_TOLD = 20
"""faults that a message tells"""
_NAMED = 6
"""names out of many that a message lists"""
_LIKENESS = 0.6  # of two names of which one may be the other, misspelt


class EnsembleLoraError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code = 1


class UsageError(EnsembleLoraError):
    """The request can't be carried out as asked: wrong arguments, config, data or place."""

    exit_code = 2


class ConfigError(UsageError):
    """A config file, key or value is wrong."""


class DataError(UsageError):
    """A task card or the data behind it is wrong."""


class ModelError(UsageError):
    """A model can't be found, loaded, or used for what is asked."""


class OutputError(UsageError):
    """A folder can't be written, or is in use by another process."""


class MissingExtraError(UsageError):
    """An optional package is needed; the message carries the install command."""


class StoreError(EnsembleLoraError):
    """A file in a run folder or feature store is damaged or belongs to other inputs."""


class SolverError(EnsembleLoraError):
    """A numerical solver ended without an acceptable answer."""


class TrainingError(EnsembleLoraError):
    """Fine-tuning diverged or produced something unusable."""


class ClusterError(EnsembleLoraError):
    """Other processes could not do what they were given."""


def first_line(error: BaseException) -> str:
    r"""The first line of another library's message, to be quoted in one of ours.

    Example:
        >>> first_line(ValueError("no such file.\nStack of the caller: ..."))
        'no such file'
    """
    text = str(error).strip()
    return text.splitlines()[0].rstrip(" .") if text else type(error).__name__


def quote(value: object) -> str:
    """A value as a message shows it: in quotes where it is text, on one line, and cut where it is long.

    Example:
        >>> quote("a" * 100)[-8:], quote(0.5)
        ("aaaa'...", '0.5')
    """
    text = repr(value[:_QUOTED]) + "..." if isinstance(value, str) and len(value) > _QUOTED else repr(value)
    return text if len(text) <= 2 * _QUOTED or isinstance(value, str) else f"{text[:_QUOTED]}..."


def join_faults(faults: Sequence[str]) -> str:
    """Faults on one line; of very many, the first."""
    more = [f"and {len(faults) - _TOLD:,} more"] if len(faults) > _TOLD else []
    return "; ".join([*faults[:_TOLD], *more])


def list_nearest(names: Iterable[str], arrived: Sequence[str]) -> str:
    """Names of which one was probably meant: those most like what arrived first, and of many a handful.

    Example:
        >>> list_nearest(["id", "source", "year", "review", "stars", "url", "page", "sentence"], ["sentnce"])
        'sentence, id, source, year, review, stars and 2 more'
    """
    ranked = sorted(names, key=lambda name: -max((_measure_likeness(name, one) for one in arrived), default=0.0))
    more = f" and {len(ranked) - _NAMED:,} more" if len(ranked) > _NAMED else ""
    return ", ".join(ranked[:_NAMED]) + more


def _measure_likeness(first: str, second: str) -> float:
    """From 0, where one is hardly the other misspelt, so that names which are unlike stay in their order."""
    ratio = difflib.SequenceMatcher(None, first.casefold(), second.casefold()).ratio()
    return ratio if ratio >= _LIKENESS else 0.0
