"""Named errors. Each says what arrived, what was expected, and what to do, in one line.

The command line prints the message without a traceback and exits with ``exit_code``.
"""

from __future__ import annotations

__all__ = [
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
]


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


def first_line(error: BaseException) -> str:
    r"""The first line of another library's message, to be quoted in one of ours.

    Example:
        >>> first_line(ValueError("no such file.\nStack of the caller: ..."))
        'no such file'
    """
    text = str(error).strip()
    return text.splitlines()[0].rstrip(" .") if text else type(error).__name__
