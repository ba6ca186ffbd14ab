"""The feature store: projected gradients of every example, appendable, hashed, read through memory maps.

Input: rows of one task's split, in any number of pieces. Output: a :class:`FeatureBlock`. A store is a folder with
``manifest.json`` and one sub-folder per block; a block is complete exactly when the manifest names it, so a killed
writer leaves nothing behind that a reader could take for features. Every file's SHA-256 is in the manifest and is
checked when the file is first read by a process. Arrays are plain ``.npy`` files (never pickles). No torch.

Cost: 4 (proj_dim + 1) bytes per example and output on disk; a writer holds at most one shard in memory.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, cast, get_args

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from ensemblelora.blocks import DTYPES, FeatureBlock, OutputMode, find_fault, helmert
from ensemblelora.errors import StoreError
from ensemblelora.files import file_sha256, fingerprint, map_new_array, save_array, write_json

__all__ = ["FeatureBlock", "FeatureStore", "FeatureWriter", "OutputMode", "helmert"]

_FORMAT = 1
_MANIFEST = "manifest.json"
_IDS = "ids"
_DEFAULT_SHARD_BYTES = 2**28
# Files this process has found intact: (path, modification time in ns, size, digest). A changed file is checked again.
_VERIFIED: set[tuple[str, int, int, str]] = set()


class _FileRecord(TypedDict):
    """One file of a shard as the manifest lists it."""

    file: str
    bytes: int
    sha256: str


class _ShardRecord(TypedDict):
    """Consecutive rows of a block, one file per array."""

    n_rows: int
    files: dict[str, _FileRecord]


class _BlockRecord(TypedDict):
    """One task's split as the manifest lists it."""

    task: str
    split: str
    fingerprint: str
    mode: OutputMode
    folder: str
    shards: list[_ShardRecord]


class FeatureStore:
    """A folder of feature blocks, one per task and split.

    One writer per task and split at a time; writers of different blocks, in any number of processes, and readers do
    not disturb each other.
    """

    def __init__(self, folder: Path | str) -> None:
        """Name the folder; nothing is read or created until it is needed."""
        self.folder = Path(folder)

    def has(self, task: str, split: str, fingerprint: str) -> bool:
        """Say whether a complete block made from exactly these inputs is there."""
        record = self._find(task, split)
        return record is not None and record["fingerprint"] == fingerprint and (self.folder / record["folder"]).is_dir()

    def writer(
        self,
        task: str,
        split: str,
        fingerprint: str,
        *,
        mode: OutputMode,
        shard_bytes: int = _DEFAULT_SHARD_BYTES,
    ) -> FeatureWriter:
        """Open a writer; use it in a ``with`` statement, which commits the block or, on an error, drops it.

        Args:
            task: The task's name; any text.
            split: ``train``, ``validation`` or ``test``.
            fingerprint: Identity of everything the features depend on.
            mode: Which outputs the rows hold.
            shard_bytes: Rows are written out whenever about so many bytes have gathered.
        """
        return FeatureWriter(self, task, split, fingerprint, mode=mode, shard_bytes=shard_bytes)

    def write(self, block: FeatureBlock, fingerprint: str) -> None:
        """Write a whole block.

        Args:
            block: Its task, split and rows.
            fingerprint: Identity of everything the features depend on.

        Raises:
            StoreError: If a number is not finite, or a row is there twice.
        """
        with self.writer(block.task, block.split, fingerprint, mode=block.mode) as writer:
            writer.append(**{name: getattr(block, name) for name in DTYPES}, ids=block.ids)

    def join(self, task: str, split: str, fingerprint: str, pieces: Sequence[FeatureStore]) -> None:
        """Make one block of what several writers left in stores of their own, in the order of these; one file an array.

        Args:
            task: The task's name.
            split: Of it.
            fingerprint: Identity of the block.
            pieces: Each holds some rows of it, under the same name; they stay as they are. No row is there twice.

        Raises:
            StoreError: If a piece is missing, damaged, or of rows of another shape or kind.
        """
        parts = [piece.read(task, split) for piece in pieces]
        shapes = {(part.mode, part.features.shape[1:]) for part in parts}
        if len(shapes) != 1:
            raise StoreError(f"features of task {task!r}, {split}: pieces of different kinds {sorted(shapes)}")
        writer = self.writer(task, split, fingerprint, mode=parts[0].mode)
        with writer:
            writer.append_files(parts)

    def read(self, task: str, split: str, *, verify: bool = True) -> FeatureBlock:
        """Return a block: memory-mapped if it has one shard, otherwise concatenated in memory.

        Args:
            task: The task's name.
            split: ``train``, ``validation`` or ``test``.
            verify: Compare each file with its recorded SHA-256, once per process.

        Raises:
            StoreError: If the block is missing, or one of its files is missing, truncated or altered.
        """
        record = self._find(task, split)
        if record is None:
            raise StoreError(f"{self.folder}: holds no features of task {task!r}, {split}; run the features stage")
        folder = self.folder / record["folder"]
        shards = [_read_shard(folder, shard, verify=verify) for shard in record["shards"]]
        arrays = {name: _join([shard[name] for shard in shards]) for name in DTYPES}
        ids = tuple(text for shard in shards for text in shard[_IDS])
        return FeatureBlock(task, split, record["mode"], **arrays, ids=ids)

    def _find(self, task: str, split: str) -> _BlockRecord | None:
        matches = (block for block in self._read_manifest() if (block["task"], block["split"]) == (task, split))
        return next(matches, None)

    def _read_manifest(self) -> list[_BlockRecord]:
        path = self.folder / _MANIFEST
        remedy = f"delete {self.folder} and run the features stage again"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            blocks, recorded = content["blocks"], content["sha256"]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: can't be read as a store's manifest ({error}); {remedy}") from None
        if content.get("format") != _FORMAT:
            raise StoreError(f"{path}: format {content.get('format')!r}, this version reads {_FORMAT}; {remedy}")
        if fingerprint(blocks) != recorded:
            raise StoreError(f"{path}: its contents do not match its checksum; {remedy}")
        return cast("list[_BlockRecord]", blocks)

    def _commit(self, record: _BlockRecord) -> None:
        """Make a written block the valid one, then drop what it replaces (and what killed writers left)."""
        key = (record["task"], record["split"])
        with FileLock(self.folder / f"{_MANIFEST}.lock"):
            kept = [block for block in self._read_manifest() if (block["task"], block["split"]) != key]
            blocks = sorted([*kept, record], key=lambda block: (block["task"], block["split"]))
            write_json(self.folder / _MANIFEST, {"format": _FORMAT, "blocks": blocks, "sha256": fingerprint(blocks)})
        for stale in self.folder.glob(f"{_block_prefix(*key)}-*"):
            if stale.name != record["folder"]:
                shutil.rmtree(stale, ignore_errors=True)


class FeatureWriter:
    """Streams the rows of one block to disk; made by :meth:`FeatureStore.writer`."""

    def __init__(
        self, store: FeatureStore, task: str, split: str, fingerprint: str, *, mode: OutputMode, shard_bytes: int
    ) -> None:
        """Keep the block's identity; nothing is on disk before the first shard."""
        if mode not in get_args(OutputMode):
            raise StoreError(f"output mode {mode!r}: expected one of {', '.join(get_args(OutputMode))}")
        self._store = store
        self._shard_bytes = shard_bytes
        self._folder = store.folder / f"{_block_prefix(task, split)}-{uuid.uuid4().hex[:8]}"
        self._record: _BlockRecord = {
            "task": task,
            "split": split,
            "fingerprint": fingerprint,
            "mode": mode,
            "folder": self._folder.name,
            "shards": [],
        }
        self._pending: list[dict[str, Any]] = []
        self._row_shape: tuple[int, int] | None = None
        self._seen_ids: set[str] = set()

    def __enter__(self) -> FeatureWriter:
        """Begin the block; its folder appears with its first shard."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit the block, or remove it if the body failed."""
        is_committed = False
        try:
            if kind is None:
                self._flush()
                if not self._record["shards"]:
                    raise StoreError(f"{self._name}: no rows were written; check that the split is not empty")
                self._store._commit(self._record)
                is_committed = True
        finally:
            if not is_committed:
                shutil.rmtree(self._folder, ignore_errors=True)

    def append(
        self,
        *,
        outputs: npt.ArrayLike,
        features: npt.ArrayLike,
        labels: npt.ArrayLike,
        n_choices: npt.ArrayLike,
        squared_norms: npt.ArrayLike,
        groups: npt.ArrayLike,
        ids: Iterable[str],
    ) -> None:
        """Add rows; shapes and meanings are those of :class:`FeatureBlock`. The arrays are copied.

        Raises:
            StoreError: If shapes disagree with each other or with earlier rows, a number is not finite, or an id
                was already written.
        """
        given = (outputs, features, labels, n_choices, squared_norms, groups)
        rows: dict[str, Any] = {
            name: np.array(values, dtype=DTYPES[name]) for name, values in zip(DTYPES, given, strict=True)
        }
        rows[_IDS] = tuple(ids)
        if not rows[_IDS]:
            return
        self._check(rows)
        self._seen_ids.update(rows[_IDS])
        self._pending.append(rows)
        if sum(piece["features"].nbytes for piece in self._pending) >= self._shard_bytes:
            self._flush()

    def append_files(self, parts: Sequence[FeatureBlock]) -> None:
        """Add rows that were checked when they were written, as one shard; at most one part of them is in memory."""
        self._flush()
        number, n_rows = len(self._record["shards"]), sum(len(part.ids) for part in parts)
        files = {}
        for name in DTYPES:
            path = self._folder / f"{name}-{number:05d}.npy"
            _join_files(path, [getattr(part, name) for part in parts])
            files[name] = _describe(path)
        path = self._folder / f"{_IDS}-{number:05d}.json"
        write_json(path, [text for part in parts for text in part.ids])
        files[_IDS] = _describe(path)
        self._record["shards"].append({"n_rows": n_rows, "files": files})

    @property
    def _name(self) -> str:
        return f"features of task {self._record['task']!r}, {self._record['split']}"

    def _check(self, rows: Mapping[str, Any]) -> None:
        fault = find_fault(self._record["mode"], rows, rows[_IDS])
        if fault:
            raise StoreError(f"{self._name}: {fault}")
        for name in ("outputs", "features", "squared_norms"):
            finite = np.isfinite(rows[name].reshape(len(rows[_IDS]), -1)).all(axis=1)
            if not finite.all():
                first = rows[_IDS][int(np.argmin(finite))]
                raise StoreError(f"{self._name}: {name} of example {first!r} are not finite; use a wider dtype")
        repeated = sorted(self._seen_ids.intersection(rows[_IDS]))
        if repeated or len(set(rows[_IDS])) < len(rows[_IDS]):
            raise StoreError(
                f"{self._name}: an example was written twice ({', '.join(repeated[:3]) or 'in one piece'})"
            )
        row_shape = rows["features"].shape[1:]
        if self._row_shape is not None and row_shape != self._row_shape:
            raise StoreError(f"{self._name}: rows of shape {row_shape} after rows of shape {self._row_shape}")
        self._row_shape = row_shape

    def _flush(self) -> None:
        pieces, self._pending = self._pending, []
        if not pieces:
            return
        number = len(self._record["shards"])
        files = {}
        for name in DTYPES:
            path = self._folder / f"{name}-{number:05d}.npy"
            save_array(path, np.concatenate([piece[name] for piece in pieces]))
            files[name] = _describe(path)
        ids = [text for piece in pieces for text in piece[_IDS]]
        path = self._folder / f"{_IDS}-{number:05d}.json"
        write_json(path, ids)
        files[_IDS] = _describe(path)
        self._record["shards"].append({"n_rows": len(ids), "files": files})


def _block_prefix(task: str, split: str) -> str:
    """Return a file name that is safe for any task name, readable, and different for different blocks."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "_", f"{task}-{split}")[:48]
    return f"{readable}-{fingerprint([task, split])[:12]}"


def _join_files(path: Path, arrays: Sequence[npt.NDArray[Any]]) -> None:
    """Write arrays below each other into one file."""
    shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
    whole = map_new_array(path, shape, arrays[0].dtype)
    np.concatenate(arrays, out=whole)
    whole.flush()


def _describe(path: Path) -> _FileRecord:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _read_shard(folder: Path, shard: _ShardRecord, *, verify: bool) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, record in shard["files"].items():
        path = folder / record["file"]
        remedy = f"delete {folder} and run again: the features stage makes it anew"
        try:
            _check_file(path, record, verify=verify)
            rows[name] = _load(path)
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{path}: {error}; {remedy}") from None
        if len(rows[name]) != shard["n_rows"]:
            raise StoreError(f"{path}: {len(rows[name])} rows, the manifest says {shard['n_rows']}; {remedy}")
    return rows


def _load(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _check_file(path: Path, record: _FileRecord, *, verify: bool) -> None:
    status = path.stat()
    if status.st_size != record["bytes"]:
        raise ValueError(f"{status.st_size} bytes, the manifest says {record['bytes']} (truncated or altered)")
    key = (str(path.resolve()), status.st_mtime_ns, status.st_size, record["sha256"])
    if not verify or key in _VERIFIED:
        return
    if file_sha256(path) != record["sha256"]:
        raise ValueError("its SHA-256 is not the one in the manifest (altered on disk)")
    _VERIFIED.add(key)


def _join(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
