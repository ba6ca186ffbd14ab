"""What work costs that may be broken off and taken up again: all attempts together.

In: a meter, and the identity of the work. Out: a :class:`~ensemblelora.accounting.meter.StageRecord`. A note on disk is
renewed every few seconds, since a killed process can't say what it has spent; it is of one identity, and whoever
finishes the work removes it. No torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from ensemblelora.accounting.meter import Meter, StageRecord
from ensemblelora.errors import OutputError, StoreError
from ensemblelora.files import read_json, write_json

__all__ = ["Attempt"]

_SAVING_SECONDS = 5.0


class Attempt:
    """One attempt, and what those before it cost.

    Attributes:
        meter: Measures this one.
    """

    def __init__(self, note: Path, identity: str, meter: Meter) -> None:
        """Read what earlier attempts at this very work cost.

        Args:
            note: The file that is renewed meanwhile.
            identity: Everything the work depends on; a note of other work counts for nothing.
            meter: Not yet started.

        Raises:
            StoreError: If the note is damaged.
        """
        content = read_json(note) if note.exists() else {}
        try:
            is_same = content.get("fingerprint") == identity
            self._earlier = StageRecord(**content["spent"]) if is_same else StageRecord(meter.record.stage)
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{note}: no note of a stage's costs ({error!r}); delete it and run again") from None
        self._note, self._identity, self.meter = note, identity, meter
        self._started = time.perf_counter()

    @property
    def spent(self) -> StageRecord:
        """What all attempts have cost so far."""
        record = self.meter.record  # the meter fills in the time when it ends
        seconds = record.wall_seconds or time.perf_counter() - self._started
        return self._earlier.joined(replace(record, wall_seconds=seconds))

    def save(self) -> None:
        """Renew the note.

        Raises:
            OutputError: If it can't be written.
        """
        write_json(self._note, {"fingerprint": self._identity, "spent": asdict(self.spent)})

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Inside, the meter runs and the note is kept up to date.

        Raises:
            OutputError: If the note can't be written before or after.
        """
        self.save()
        try:
            with self.meter, _repeating(self.save):
                yield
        finally:
            self.save()

    def forget(self) -> None:
        """Remove the note of work that is finished."""
        self._note.unlink(missing_ok=True)


@contextmanager
def _repeating(save: Callable[[], None]) -> Iterator[None]:
    """Call ``save`` every few seconds while the body runs."""
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.wait(_SAVING_SECONDS):
            with suppress(OutputError):  # a full disk: the work itself will say so
                save()

    thread = threading.Thread(target=repeat, name="saving costs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
