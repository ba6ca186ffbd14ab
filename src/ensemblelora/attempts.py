"""What work costs that may be broken off and taken up again: all attempts together; and a run's ledger on disk.

In: a meter, and the identity of the work. Out: a :class:`~ensemblelora.accounting.meter.StageRecord`. A note on disk is
renewed every few seconds, since a killed process can't say what it has spent; it is of one identity, and whoever
finishes the work removes it. No torch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from ensemblelora.accounting.meter import Ledger, Meter, StageRecord
from ensemblelora.artifacts import COSTS_FILE
from ensemblelora.errors import OutputError, StoreError
from ensemblelora.files import read_json, write_json

__all__ = ["Attempt", "read_ledger", "write_ledger"]

_COSTS_COPY = ".costs.json"
_SAVING_SECONDS = 5.0

_logger = logging.getLogger(__name__)


class Attempt:
    """One attempt, and what those before it cost.

    Attributes:
        meter: Measures this one.
    """

    def __init__(self, note: Path, identity: str, meter: Meter, *, parts: Collection[str] = ()) -> None:
        """Read what earlier attempts at this very work cost.

        Args:
            note: The file that is renewed meanwhile.
            identity: Everything the work depends on; a note of other work counts for nothing, but for these parts.
            meter: Not yet started.
            parts: What the work consists of.

        Raises:
            StoreError: If the note is damaged.
        """
        content = read_json(note) if note.exists() else {}
        try:
            spent = StageRecord.from_dict(content["spent"]) if content else meter.record
            if content.get("fingerprint") != identity:
                begun = {name: one for name, one in spent.parts.items() if name in parts}
                spent = StageRecord(meter.record.stage, parts=begun)
                for one in begun.values():
                    spent = spent.joined(one)
            self._earlier = spent
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{note}: no note of a stage's costs ({error!r}); delete it and run again") from None
        self._note, self._identity, self.meter = note, identity, meter
        self._started = time.perf_counter()

    @property
    def spent(self) -> StageRecord:
        """What all attempts have cost so far."""
        record = self.meter.record  # the meter fills in the time when it ends
        seconds = record.wall_seconds or time.perf_counter() - self._started
        spent = self._earlier.joined(replace(record, wall_seconds=seconds))
        added_up = sum(one.wall_seconds for one in spent.parts.values())
        if added_up <= spent.wall_seconds:
            return spent
        share = spent.wall_seconds / added_up  # parts that were made side by side took the stage no longer than it was
        parts = {name: replace(one, wall_seconds=share * one.wall_seconds) for name, one in spent.parts.items()}
        return replace(spent, parts=parts)

    def save(self) -> None:
        """Renew the note.

        Raises:
            OutputError: If it can't be written.
        """
        write_json(self._note, {"fingerprint": self._identity, "spent": self.spent.to_dict()})

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Inside, the meter runs and the note is kept up to date.

        Raises:
            OutputError: If the note can't be written before or after.
        """
        self.save()
        self.meter.on_part = self._try_to_save  # a part that is there after a kill is never made, and counted, again
        try:
            with self.meter, _repeating(self._try_to_save):
                yield
        finally:
            self.save()

    def forget(self) -> None:
        """Remove the note of work that is finished."""
        self._note.unlink(missing_ok=True)

    def _try_to_save(self) -> None:
        with suppress(OutputError):  # a full disk: the work itself will say so
            self.save()


def read_ledger(folder: Path) -> Ledger:
    """What a run has cost so far; by the copy where the file is damaged, since no stage can tell what it once took.

    Raises:
        StoreError: If the copy is damaged, too.
    """
    path, copy = folder / COSTS_FILE, folder / _COSTS_COPY
    if not path.exists():
        return Ledger()
    try:
        return Ledger.from_dict(read_json(path))
    except StoreError as error:
        if not copy.exists():
            raise
        ledger = Ledger.from_dict(read_json(copy))
        _logger.warning("%s; it is written anew from its copy", str(error).partition(";")[0])
        write_json(path, ledger.to_dict())
        return ledger


def write_ledger(folder: Path, ledger: Ledger) -> None:
    """Write a run's ledger, and its copy.

    Raises:
        OutputError: If they can't be written.
    """
    for name in (_COSTS_COPY, COSTS_FILE):
        write_json(folder / name, ledger.to_dict())


@contextmanager
def _repeating(save: Callable[[], None]) -> Iterator[None]:
    """Call ``save`` every few seconds while the body runs."""
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.wait(_SAVING_SECONDS):
            save()

    thread = threading.Thread(target=repeat, name="saving costs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
