"""What a run is doing now, for whoever listens; silent unless someone does.

The library announces stages and wraps its loops; it never prints. The command line turns the announcements
on with :func:`announcing`: bars on a terminal; anywhere else a line per stage, and one every half minute from the
loop that is running. Stages of a sequence that is known beforehand are numbered (:func:`counting`), and where their
shares of the work are known, the end of each says about how long the rest will take.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["announcing", "counting", "mention", "note", "number", "skip", "stage", "track"]

Item = TypeVar("Item")

_SILENT_SECONDS = 30.0
_TELLING_SHARE = 0.02
"""of the work, from which its pace tells of the rest"""


@dataclass
class _Listener:
    """Who listens, and when a line was last said: one clock for all loops, since many short ones take long too."""

    console: Console
    said_at: float = field(default_factory=lambda: time.perf_counter())


_listener: ContextVar[_Listener | None] = ContextVar("_listener", default=None)
_bars: ContextVar[Progress | None] = ContextVar("_bars", default=None)


@dataclass
class _Sequence:
    """Stages in their order, each one's share of the work where it is known, and the seconds that some have taken."""

    names: tuple[str, ...] = ()
    work: Mapping[str, float] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)

    def predict_rest(self, name: str) -> float | None:
        """Seconds that the stages after this one will take, at the pace so far; None while that says little."""
        done = sum(self.work.get(other, 0.0) for other in self.spent)
        if name not in self.names or done < _TELLING_SHARE * sum(self.work.values()):
            return None
        later = self.names[self.names.index(name) + 1 :]
        return sum(self.spent.values()) / done * sum(self.work.get(other, 0.0) for other in later) if done else None


_sequence: ContextVar[_Sequence] = ContextVar("_sequence", default=_Sequence())  # noqa: B039 (the default stays empty)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield ``items`` unchanged, moving a bar when someone watches, or saying now and then how far the loop is.

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
    if total is None and isinstance(items, Sized):
        total = len(items)
    bars = _bars.get()
    if bars is None:
        yield from _track_in_lines(items, description, total)
        return
    of = "" if total is None else f"/{total}"
    bar, started, n_done = bars.add_task(description, total=total, done=f"0{of}", rate=""), time.perf_counter(), 0
    try:
        for item in items:
            yield item
            n_done += 1
            rate = _write_rate(n_done, time.perf_counter() - started)
            bars.update(bar, advance=1, done=f"{n_done}{of}", rate=rate)
    finally:
        bars.remove_task(bar)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Announce that a stage runs, and how many seconds it took or after how many it broke off."""
    listener = _listener.get()
    if listener is None:
        yield
        return
    title, started = number(name), time.perf_counter()
    if title != name and not listener.console.is_terminal:  # where bars don't say which stage of how many runs
        note(f"{title} ...")
    try:
        with _showing_bars(listener.console, title):
            yield
    except BaseException:
        note(f"{title}: stopped after {time.perf_counter() - started:.1f} s")
        raise
    seconds, sequence = time.perf_counter() - started, _sequence.get()
    if name in sequence.names:
        sequence.spent[name] = seconds
    rest = sequence.predict_rest(name)
    note(f"{title}: {seconds:.1f} s{f', about {_round_time(rest)} to go' if rest else ''}")


@contextmanager
def counting(names: Sequence[str], work: Mapping[str, float] | None = None) -> Iterator[None]:
    """Number the stages of these names inside this context, which come in this order: ``[3/9] group``.

    Args:
        names: The stages.
        work: What each takes, in any unit; then the end of a stage says about how long the others will take.
    """
    token = _sequence.set(_Sequence(tuple(names), dict(work or {})))
    try:
        yield
    finally:
        _sequence.reset(token)


def number(name: str) -> str:
    """A stage's name after its number in the sequence that is counted; the bare name where it is in none.

    Example:
        >>> with counting(["features", "affinity"]):
        ...     number("affinity"), number("export")
        ('[2/2] affinity', 'export')
    """
    names = _sequence.get().names
    return f"[{names.index(name) + 1}/{len(names)}] {name}" if name in names else name


def skip(name: str, reason: str) -> None:
    """Say why a stage that is counted is left out, so that no number is missing; nothing of any other stage."""
    if name in _sequence.get().names:
        note(f"{number(name)}: {reason}")


def note(text: str) -> None:
    """Say one line to whoever listens, such as that a finished stage is not run again."""
    listener = _listener.get()
    if listener is not None:
        listener.said_at = time.perf_counter()
        listener.console.print(text, markup=False, highlight=False, soft_wrap=True)


def mention(text: str) -> None:
    """Say one line, unless there was one in the last half minute."""
    listener = _listener.get()
    if listener is not None and time.perf_counter() - listener.said_at >= _SILENT_SECONDS:
        note(text)


@contextmanager
def announcing(console: Console) -> Iterator[None]:
    """Send announcements made inside this context to ``console``; contexts may be nested."""
    token = _listener.set(_Listener(console))
    try:
        yield
    finally:
        _listener.reset(token)


def _track_in_lines(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    """Yield ``items``, and say a line where none was said for a while and there is no terminal for bars."""
    started, n_done = time.perf_counter(), 0
    for item in items:
        yield item
        n_done += 1
        listener, now = _listener.get(), time.perf_counter()
        if listener is None or listener.console.is_terminal or now - listener.said_at < _SILENT_SECONDS:
            continue
        rate = _write_rate(n_done, now - started)
        if total is None:
            note(f"{description}: {n_done}, {rate}")
        elif n_done < total:  # the end of a loop is said by what comes after it
            left = _round_time((now - started) * (total - n_done) / n_done)
            note(f"{description}: {n_done}/{total}, {rate}, {left} left")


def _write_rate(n_done: int, seconds: float) -> str:
    """Say how fast a loop goes: items a second, or where that is below one seconds an item.

    Example:
        >>> _write_rate(60, 30.0), _write_rate(2, 30.0)
        ('2.0/s', '15 s each')
    """
    if seconds <= 0:
        return ""
    if n_done >= seconds:
        rate = n_done / seconds
        return f"{rate:.1f}/s" if rate < 10 else f"{rate:,.0f}/s"
    return f"{_round_time(seconds / n_done)} each"


def _round_time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def _showing_bars(console: Console, name: str) -> Iterator[None]:
    """Show bars while a stage runs; nothing where the console is no terminal, or bars are up already."""
    if not console.is_terminal or _bars.get() is not None:
        yield
        return
    # Here, not at the top: rich takes 50 ms to import, and only a terminal needs it.
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),  # the widest that leaves 80 columns room for the rest
        TextColumn("{task.fields[done]}", justify="right"),
        TextColumn("{task.fields[rate]}", justify="right"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        token = _bars.set(bars)
        bars.add_task(name, total=None, done="", rate="")
        try:
            yield
        finally:
            _bars.reset(token)
