"""What a run is doing now, for whoever listens; silent unless someone does.

The library announces stages and wraps its loops; it never prints. The command line turns the announcements
on with :func:`announcing`: bars on a terminal, one line per stage anywhere else.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["announcing", "note", "stage", "track"]

Item = TypeVar("Item")

_console: ContextVar[Console | None] = ContextVar("_console", default=None)
_bars: ContextVar[Progress | None] = ContextVar("_bars", default=None)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield ``items`` unchanged, moving a bar when someone watches.

    Args:
        items: Anything that can be looped over.
        description: What one pass does, such as ``"features boolq"``.
        total: Number of items; taken from ``len(items)`` where that exists.

    Yields:
        The items, in order.

    Example:
        >>> list(track([1, 2], "counting"))
        [1, 2]
    """
    bars = _bars.get()
    if bars is None:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    bar = bars.add_task(description, total=total)
    try:
        for item in items:
            yield item
            bars.advance(bar)
    finally:
        bars.remove_task(bar)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Announce that a stage runs, and how many seconds it took or after how many it broke off."""
    console = _console.get()
    if console is None:
        yield
        return
    started = time.perf_counter()
    try:
        with _showing_bars(console, name):
            yield
    except BaseException:
        note(f"{name}: stopped after {time.perf_counter() - started:.1f} s")
        raise
    note(f"{name}: {time.perf_counter() - started:.1f} s")


def note(text: str) -> None:
    """Say one line to whoever listens, such as that a finished stage is not run again."""
    console = _console.get()
    if console is not None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def announcing(console: Console) -> Iterator[None]:
    """Send announcements made inside this context to ``console``; contexts may be nested."""
    token = _console.set(console)
    try:
        yield
    finally:
        _console.reset(token)


@contextmanager
def _showing_bars(console: Console, name: str) -> Iterator[None]:
    """Show bars while a stage runs; nothing where the console is no terminal, or bars are up already."""
    if not console.is_terminal or _bars.get() is not None:
        yield
        return
    # Here, not at the top: rich takes 50 ms to import, and only a terminal needs it.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        token = _bars.set(bars)
        bars.add_task(name, total=None)
        try:
            yield
        finally:
            _bars.reset(token)
