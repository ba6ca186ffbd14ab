"""Files written whole or not at all, hashes of files, and fingerprints of values.

Every file is written under a temporary name in its own folder, flushed to disk and renamed, so a reader sees the
old content or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from ensemblelora.errors import OutputError, StoreError

__all__ = [
    "atomic_folder",
    "checksum",
    "describe_error",
    "expand_folders",
    "file_sha256",
    "fingerprint",
    "flush_to_disk",
    "is_temporary",
    "load_arrays",
    "map_new_array",
    "read_json",
    "save_array",
    "save_arrays",
    "write_json",
    "write_text",
]

_TEMPORARY = ".tmp"
_CHECKSUM = "checksum of the rest"
"""the last key of a JSON object; no task, method, stage or file can be called this"""
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, making its folder if needed.

    Raises:
        OutputError: If the place can't be written.
    """
    _write_atomically(path, lambda stream: stream.write(text.encode("utf-8")))


def write_json(path: Path, value: object) -> None:
    """Write plain values as JSON atomically.

    Dataclasses, pydantic models, paths, numpy scalars and arrays become plain values; NaN and infinities become
    null, since JSON has none. An object ends with a checksum of the rest, which :func:`read_json` takes off again; a
    list has none.

    Raises:
        OutputError: If the place can't be written.
        TypeError: If a value has no plain form.
    """
    plain = _to_plain(value)
    if isinstance(plain, dict):
        plain.pop(_CHECKSUM, None)
        plain[_CHECKSUM] = checksum(json.dumps(plain))
    write_text(path, json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of a run. One of an earlier version, without a checksum, is taken as it is.

    Raises:
        StoreError: If the file is missing, is not JSON, or is no longer what was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path}: can't be read as JSON ({error}); delete it and run again") from None
    if isinstance(content, dict) and not _take_checksum_off(content):
        raise StoreError(f"{path}: altered since it was written; delete it and run again")
    return content


def checksum(text: str) -> str:
    """Return 16 hexadecimal digits that differ where two texts do: against damage, not against malice."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_arrays(path: Path, arrays: Mapping[str, npt.ArrayLike]) -> None:
    """Write named arrays as one ``.npz`` file atomically; the same arrays give the same bytes.

    Raises:
        OutputError: If the place can't be written.
        ValueError: If an array holds Python objects.
    """
    plain = {name: np.asarray(values) for name, values in arrays.items()}
    _write_atomically(path, lambda stream: np.savez(stream, allow_pickle=False, **plain))


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write one array as a ``.npy`` file atomically.

    Raises:
        OutputError: If the place can't be written.
        ValueError: If the array holds Python objects.
    """
    _write_atomically(path, lambda stream: np.save(stream, array, allow_pickle=False))


def load_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read the named arrays of a ``.npz`` file.

    Raises:
        StoreError: If the file is missing, damaged, or holds pickled objects.
    """
    try:
        # Opened here because numpy leaves its own handle open when the archive is damaged.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
            if strangers := [name for name, values in arrays.items() if not isinstance(values, np.ndarray)]:
                raise ValueError(f"{strangers[0]} is no array")
            return arrays
    except Exception as error:  # zipfile and numpy raise whatever a damaged byte leads them to
        raise StoreError(f"{path}: can't be read as arrays ({error!r}); delete it and run again") from None


def map_new_array(path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.memmap[Any, Any]:
    """Map a new ``.npy`` file, in a folder that nobody reads yet, whose room on the disk is taken at once.

    A mapped page without any would kill the process when it is written.

    Raises:
        OutputError: If the file can't be made that large.
    """
    with _as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        values: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
        if hasattr(os, "posix_fallocate") and path.stat().st_size:
            descriptor = os.open(path, os.O_RDWR)
            try:
                os.posix_fallocate(descriptor, 0, path.stat().st_size)
            finally:
                os.close(descriptor)
        return values


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes ``path`` when the body succeeds, replacing what was there.

    Raises:
        OutputError: If the place can't be written.
    """
    token = uuid.uuid4().hex[:8]
    fresh = path.with_name(f".{path.name}.{token}{_TEMPORARY}")
    stale = path.with_name(f".{path.name}.{token}.old{_TEMPORARY}")
    try:
        with _as_output_error(path):
            fresh.mkdir(parents=True)
        with _as_output_error(path, only=_NO_ROOM):
            yield fresh
        with _as_output_error(path):
            for file in expand_folders([fresh]):
                flush_to_disk(file)
            if path.exists():
                path.rename(stale)
            fresh.rename(path)
            flush_to_disk(path.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal, reading it in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(*values: object) -> str:
    """Return the SHA-256 of values, equal for equal values on every machine.

    Takes JSON's own types, tuples (as lists), sets, bytes, enums, paths, numpy scalars and arrays (dtype, shape and
    content), dataclasses and pydantic models. The order of a mapping's keys does not matter.

    Raises:
        TypeError: If a value has no canonical form.

    Example:
        >>> fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1})
        True
    """
    return hashlib.sha256(_to_canonical(list(values)).encode()).hexdigest()


def expand_folders(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the paths, with every folder replaced by the files below it, sorted."""
    for path in paths:
        yield from sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]


def is_temporary(path: Path) -> bool:
    """Say whether a file or folder is one that an unfinished write left behind."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


def describe_error(error: OSError) -> str:
    """Return the system's reason without number and path."""
    return error.strerror or str(error)


def _take_checksum_off(content: dict[str, Any]) -> bool:
    """Say whether an object is what was written, and leave it without its checksum."""
    # Damage to the key itself leaves one of its halves.
    keys = [key for key in content if key.startswith(_CHECKSUM[:12]) or key.endswith(_CHECKSUM[-8:])]
    told = {key: content.pop(key) for key in keys}
    return not told or told == {_CHECKSUM: checksum(json.dumps(content))}


def _to_canonical(value: object) -> str:
    return json.dumps(_to_plain(value, exact=True), sort_keys=True, separators=(",", ":"))


def _to_plain(value: object, *, exact: bool = False) -> Any:
    """Turn a value into JSON's types; ``exact`` keeps apart what a reader of JSON need not tell apart."""
    if value is None or (isinstance(value, (bool, int, str)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, float):
        return value if exact or math.isfinite(value) else None
    if isinstance(value, Mapping):
        return _plain_mapping(value, exact=exact)
    if isinstance(value, (list, tuple)):
        return [_to_plain(item, exact=exact) for item in value]
    if isinstance(value, np.generic):
        return _to_plain(value.item(), exact=exact)
    if isinstance(value, np.ndarray):
        return _plain_array(value) if exact else _to_plain(value.tolist())
    kind, parts = _take_apart(value)
    plain = _to_plain(parts, exact=exact)
    return [kind, plain] if exact else plain


def _take_apart(value: object) -> tuple[str, Any]:
    """Return the kind of a value that JSON has no type for, and what it is made of."""
    if isinstance(value, PurePath):
        return "path", value.as_posix()
    if isinstance(value, bytes):
        return "bytes", value.hex()
    if isinstance(value, (set, frozenset)):
        return "set", sorted(value, key=_to_canonical)
    kind = type(value).__qualname__
    if isinstance(value, enum.Enum):
        return kind, value.value
    if isinstance(value, BaseModel):
        return kind, value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return kind, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"a {kind} has no plain form; give numbers, text, arrays, paths or records")


def _plain_mapping(value: Mapping[Any, object], *, exact: bool) -> dict[str, Any]:
    wrong = next((key for key in value if not isinstance(key, str)), None)
    if wrong is not None:
        raise TypeError(f"mapping key {wrong!r} is not text; JSON would turn it into text")
    return {key: _to_plain(item, exact=exact) for key, item in value.items()}


def _plain_array(value: npt.NDArray[Any]) -> list[Any]:
    if value.dtype.hasobject:
        raise TypeError("an array of Python objects has no canonical form; give numbers or text")
    ordered = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
    return ["array", ordered.dtype.str, list(value.shape), hashlib.sha256(ordered.tobytes()).hexdigest()]


def _write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_TEMPORARY}")
    with _as_output_error(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
            flush_to_disk(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _as_output_error(path: Path, *, only: Collection[int] = ()) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if only and error.errno not in only:
            raise
        raise OutputError(
            f"{path}: can't be written ({describe_error(error)}); free the place or choose another"
        ) from None


def flush_to_disk(path: Path) -> None:
    """Have the system write a file, or a folder's list of files, to the disk itself."""
    # Folders can't be flushed on some file systems; the rename is then as durable as that system makes it.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
