"""Results of long measurements, one line of JSON each, appended as they come.

In: plain values under an identity. Out: the same, read back. A line ends with its own checksum. One that a killed
process left unfinished is cut off, and measured again; nothing else is ever changed or removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ensemblelora.errors import OutputError, StoreError
from ensemblelora.files import checksum

__all__ = ["Journal", "append_line", "read_lines"]

Record = TypeVar("Record")

_CHECKSUM = "sha256"


class Journal:
    """Entries of one file by identity, in the order they were added.

    Attributes:
        path: The file; made with the first entry.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Raises:
            StoreError: If a line is damaged.
        """
        self.path = path
        self._entries: dict[str, Mapping[str, Any]] = dict(read_lines(path, _read_entry))

    def find(self, identity: str) -> Mapping[str, Any] | None:
        """Return what was added under an identity; none where nothing was."""
        return self._entries.get(identity)

    def add(self, identity: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """Add plain values under an identity, on disk before this returns, and give them as they will be read back.

        Raises:
            OutputError: If the file can't be written.
            ValueError: If a number is not finite.
        """
        line = append_line(self.path, {"identity": identity, **content})
        self._entries[identity] = json.loads(line)
        return self._entries[identity]


def append_line(path: Path, entry: Mapping[str, Any]) -> str:
    """Add one line, see to it that it is on disk, and return it without its checksum.

    Raises:
        OutputError: If the file can't be written.
        ValueError: If a number is not finite.
    """
    line = json.dumps(entry, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**entry, _CHECKSUM: checksum(line)}, allow_nan=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OutputError(f"{path}: can't be written ({error.strerror}); what was measured before is kept") from None
    return line


def read_lines(path: Path, read: Callable[[Any], Record]) -> Iterator[Record]:
    """Read every line; cuts off an unfinished last one.

    Args:
        path: The file; it need not be there.
        read: Makes a record of a line's content, and raises KeyError, TypeError or ValueError where it is none.

    Raises:
        StoreError: If another line is damaged.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            yield read(_check(json.loads(line)))
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path} line {number}: no measured run ({error!r}); delete that line") from None


def _check(entry: Any) -> Any:
    """Take the checksum off what a line holds, and compare; lines of earlier versions have none."""
    told = entry.pop(_CHECKSUM, None) if isinstance(entry, dict) else None
    if told is not None and told != checksum(json.dumps(entry)):
        raise ValueError("it is not what was written")
    return entry


def _read_entry(entry: Any) -> tuple[str, Mapping[str, Any]]:
    return str(entry["identity"]), entry
