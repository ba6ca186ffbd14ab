"""The command line's two streams: results on stdout, talk on stderr.

Talk is progress, log lines, warnings and errors; a program that reads stdout never sees it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pydantic_core
import typer

from ensemblelora import progress
from ensemblelora.errors import EnsembleLoraError

if TYPE_CHECKING:
    from types import FrameType

    from rich.console import Console

__all__ = ["describe_failure", "round_floats", "say", "show_json", "show_rows", "show_table", "talking"]

# Libraries that draw bars or advise on stderr by themselves; a user who sets one of these keeps it.
_QUIET_LIBRARIES = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


_MOMENT = 0.05
"""seconds after which an interruption that was lost comes again: by then whatever swallowed it has ended"""
_RARE = frozenset({"dequantization_flops"})
"""columns of a table that are left out where every number is 0"""


@contextmanager
def talking(*, quiet: bool = False, verbose: int = 0, debug: bool = False) -> Iterator[None]:
    """Show progress and log lines on stderr while the body runs.

    Args:
        quiet: Show errors only.
        verbose: 1 adds what the library notes, 2 its details and other libraries' warnings.
        debug: Everything anyone says.
    """
    from rich.console import Console  # 50 ms that --help need not wait for

    console = Console(stderr=True, highlight=False)
    quiet = quiet or os.environ.get("RANK", "0") != "0"  # of processes side by side, the first one talks
    if verbose < 2 and not debug:
        for name, value in _QUIET_LIBRARIES.items():
            os.environ.setdefault(name, value)
    ours = logging.ERROR if quiet else logging.WARNING - 10 * min(verbose, 2)
    theirs = logging.WARNING if verbose > 1 else logging.ERROR
    levels = {"ensemblelora": logging.DEBUG if debug else ours, "": logging.DEBUG if debug else theirs}
    with _logging_to(console, levels), _keeping_interrupts(), nullcontext() if quiet else progress.announcing(console):
        yield


@contextmanager
def _keeping_interrupts() -> Iterator[None]:
    """Take the request to end that schedulers send (SIGTERM) for a Ctrl-C, and lose neither.

    A Ctrl-C that strikes while Python clears an object away is forgotten there: it is delivered again.
    """
    before, owner = sys.unraisablehook, os.getpid()

    def strike_again(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type is KeyboardInterrupt:
            # In the background (nohup, a shell's &) a Ctrl-C is ignored, and it was the other.
            number = signal.SIGTERM if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else signal.SIGINT
            threading.Timer(_MOMENT, signal.raise_signal, [number]).start()
        else:
            before(lost)

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)  # a forked worker ends as any process does
        signal.raise_signal(number)

    is_ours = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    sys.unraisablehook = strike_again
    if is_ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        sys.unraisablehook = before
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _logging_to(console: Console, levels: Mapping[str, int]) -> Iterator[None]:
    """Send log lines and Python's warnings to the console, and leave logging as it was."""
    handler = _ConsoleHandler(console)
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def say(text: str) -> None:
    """Write one line of talk."""
    typer.echo(text, err=True)


def show_json(value: object) -> None:
    """Write a result as JSON; records become objects, arrays lists, NaN null, and 0.1 + 0.2 is 0.3."""
    plain = pydantic_core.to_jsonable_python(value, inf_nan_mode="constants", fallback=_to_list)
    typer.echo(pydantic_core.to_json(round_floats(plain), indent=2, inf_nan_mode="null").decode())


def show_table(*parts: object) -> None:
    """Write rich tables and lines on stdout, 100 columns wide where it is no terminal; ``no_wrap`` texts stay whole."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=100)
    for part in parts:
        console.print(part, soft_wrap=bool(getattr(part, "no_wrap", False)))


def show_rows(values: Mapping[str, Any], *, title: str = "") -> None:
    """Write a result whose shape is its own: one row a key; records within become columns, deeper ones tables.

    The unit is read off the end of a name: ``_seconds``, ``_bytes``, ``flops``.
    """
    from rich.table import Table

    tables = {key: value for key, value in values.items() if _is_nested(value)}
    rows = {key: value for key, value in values.items() if key not in tables}
    records = {key: value for key, value in rows.items() if isinstance(value, Mapping)}
    columns = list(dict.fromkeys(name for record in records.values() for name in record))
    columns = [name for name in columns if name not in _RARE or any(one.get(name) for one in records.values())]
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, show_header=bool(columns))
    table.add_column(overflow="fold")
    for name in columns or [""]:
        is_text = any(isinstance(record.get(name), str) for record in records.values())
        table.add_column(
            _head(name), justify="left" if is_text or not name else "right", overflow="fold"
        )  # folded where it can't be wrapped, never cut
    for key, value in rows.items():
        cells = [_write(name, value.get(name)) for name in columns] if key in records else [_write(key, value)]
        table.add_row(key if key in records else key.replace("_", " "), *cells)
    if rows:
        show_table(table)
    for key, value in tables.items():
        show_rows(value, title=key.replace("_", " "))


def _head(name: str) -> str:
    """What a column is called: its numbers are written with their units, which the name need not repeat."""
    if name == "flops" or name.endswith("_flops"):
        return name.replace("_", " ").replace("flops", "FLOPs")
    if name == "fine_tunings":
        return "fine-tunings"
    plain = "time" if name == "seconds" else name.removeprefix("n_").removesuffix("_bytes")
    return plain.replace("_seconds", "_time").replace("_", " ")


def _is_nested(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(part, Mapping) for part in value.values())


def describe_failure(error: BaseException, *, debug: bool = False) -> int:
    """Write one line on what went wrong, and say with which code to exit.

    Args:
        error: What a command raised.
        debug: Write the traceback first.

    Returns:
        2 for wrong usage, config or data; 1 for anything else.
    """
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    fault = _usage_fault()
    message = _format_usage(error) if isinstance(error, fault) else str(error)
    code = error.exit_code if isinstance(error, (EnsembleLoraError, fault)) else 1
    if isinstance(error, fault) and message.strip():
        command = getattr(getattr(error, "ctx", None), "command_path", "")
        message = f"{message.rstrip('.')}; see {command} --help".replace("  ", " ")
    if not isinstance(error, (EnsembleLoraError, fault, OSError)):
        message = _describe_unexpected(error)
    if message.strip():  # typer shows the help of a command without arguments, and raises an empty message
        say(f"error: {' '.join(message.split())}")
    return code


def _format_usage(error: Any) -> str:
    """What the parser says; a suggestion that typer made is not made again by click, since its version 8.4."""
    return str(error.message if "Did you mean" in error.message else error.format_message())


def _usage_fault() -> Any:
    """What typer raises for wrong usage: its own class, click's in the versions that Flower asks for."""
    own = getattr(typer, "TyperException", None)
    if own is None:
        from click import ClickException as own
    return own


def _describe_unexpected(error: BaseException) -> str:
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return (
            "out of memory; lower --set training.max_tokens_per_batch=..., gradients.max_tokens_per_batch "
            "or data.max_length, or see what a run needs with --dry-run"
        )
    return f"unexpected {name}: {error} (a fault of ensemblelora or of its installation; --debug shows where)"


def _write(name: str, value: object) -> str:
    from ensemblelora.report import wording

    if value is None or isinstance(value, str):
        return value or wording.NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        units = {"seconds": wording.format_seconds, "bytes": wording.format_bytes, "flops": wording.format_flops}
        write = units.get(name.rpartition("_")[2])
        return write(value) if write else f"{value:,}" if isinstance(value, int) else wording.format_number(value)
    return ", ".join(_write(name, item) for item in value) if isinstance(value, (list, tuple)) else str(value)


def round_floats(value: Any) -> Any:
    """The same values with 15 digits, which every float holds: 0.95, not 0.9500000000000001."""
    if isinstance(value, float):
        return float(f"{value:.15g}")
    if isinstance(value, dict):
        return {key: round_floats(part) for key, part in value.items()}
    return [round_floats(part) for part in value] if isinstance(value, list) else value


def _to_list(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


class _ConsoleHandler(logging.Handler):
    """Log lines through the console that draws the bars, so that neither breaks the other."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Write one log line, with its level unless it is mere information."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        self._console.print(f"{level}{self.format(record)}", markup=False, highlight=False, soft_wrap=True)
