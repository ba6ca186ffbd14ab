"""Data that lies elsewhere: URLs that fsspec opens, copied once for each version of the file.

In: a URL such as ``s3://bucket/rows.parquet``. Out: the path of a copy, which is used again for as long as what the
server says of the file (entity tag, time, size) stays the same. Where it says no more than a size, the file is fetched
each time. Credentials come from where the file system's own package looks for them, or from
``dataset_kwargs.storage_options``, and are never shown.
"""

from __future__ import annotations

import importlib.util
import re
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import Any
from urllib.parse import unquote

from ensemblelora.errors import DataError, MissingExtraError
from ensemblelora.files import fingerprint

__all__ = ["Source", "check_url", "fetch", "is_url", "list_files", "name_of", "show_place", "show_url"]

Source = Path | str
"""a path here, or a URL"""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+://")
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    "hf": "huggingface_hub",
    "hdfs": "pyarrow",
    "memory": "fsspec",
    "file": "fsspec",
}
"""the package that opens each kind of URL; no other kind is opened, whatever fsspec knows"""
_VERSION_KEYS = frozenset(
    {
        *("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "crc32c", "checksum", "blob_id", "generation"),
        *("VersionId", "Last-Modified", "LastModified", "last_modified", "mtime", "modified", "updated", "created"),
    }
)
"""what file systems call that by which a file is known to have changed"""


def is_url(text: str) -> bool:
    """Whether a text names a place elsewhere.

    Example:
        >>> is_url("s3://bucket/rows.csv"), is_url("rows.csv"), is_url("C:/rows.csv")
        (True, False, False)
    """
    return _URL.match(text) is not None


def name_of(source: Source) -> PurePath:
    """A path, or the path in a URL, for its stem and suffix.

    Example:
        >>> name_of("https://host/data/my%20rows.csv?version=2").name
        'my rows.csv'
    """
    if isinstance(source, Path):
        return source
    rest = source.partition("://")[2]
    if _kind_of(source) in ("http", "https"):
        rest = unquote(re.split("[?#]", rest)[0])
    return PurePosixPath("/" + rest.partition("/")[2])


def show_url(url: str) -> str:
    """A URL without what may be secret in it, on one line.

    Example:
        >>> show_url("https://me:word@host/rows.csv?signature=abc")
        'https://host/rows.csv'
    """
    return repr(re.sub(r"://[^/@]*@", "://", url).partition("?")[0])[1:-1]


def show_place(source: Source) -> str:
    """A path as it is, or a URL as :func:`show_url` has it."""
    return show_url(source) if isinstance(source, str) else str(source)


def check_url(url: str, options: Mapping[str, Any]) -> None:
    """Make sure that a file is there before it is streamed.

    Raises:
        DataError: If it is of no known kind, is not there, or empty.
        MissingExtraError: If the package that opens it isn't installed.
        Exception: Whatever its file system raises.
    """
    _find(url, options)


def fetch(url: str, options: Mapping[str, Any], folder: Path) -> Path:
    """Give the path of a copy of a file.

    Args:
        url: Of one of the kinds known here; ``file://`` needs no copy.
        options: For its file system, as fsspec has them.
        folder: Where copies are kept.

    Raises:
        DataError: If it is of no known kind, is not there, or empty.
        MissingExtraError: If the package that opens it isn't installed.
        Exception: Whatever its file system raises.
    """
    filesystem, path, info = _find(url, options)
    if _kind_of(url) == "file":
        return Path(path)
    version = {key: str(info[key]) for key in _VERSION_KEYS & info.keys() if info[key] is not None}
    name = fingerprint(url, version, str(info.get("size")))[:32]
    copy = folder / f"{name}{name_of(url).suffix.lower()}"
    if not version or not copy.exists():
        _copy(filesystem, path, copy)
    return copy


def list_files(url: str) -> list[str]:
    """Name the files of a folder, without its subfolders, by their URLs, sorted.

    Raises:
        DataError: If it is of no known kind, or is not there.
        MissingExtraError: If the package that opens it isn't installed.
        Exception: Whatever its file system raises.
    """
    filesystem, path = _open(url, {})
    try:
        found = filesystem.ls(path, detail=True)
    except FileNotFoundError:
        raise DataError(f"folder {show_url(url)}: not found") from None
    return sorted(filesystem.unstrip_protocol(entry["name"]) for entry in found if entry["type"] == "file")


def _kind_of(url: str) -> str:
    return url.partition("://")[0].lower()


def _open(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The file system, and the path in it."""
    kind = _kind_of(url)
    if kind not in _PACKAGES or "::" in url:  # a chain of them could unpack or run what it likes
        known = ", ".join(f"{kind}://" for kind in _PACKAGES)
        raise DataError(f"{show_url(url)}: no place that data is read from; expected one of {known}")
    package = _PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(
            f"{show_url(url)}: {kind}:// needs the package {package}, which isn't installed; run: pip install {package}"
        )
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]  # ships no types

    filesystem, path = url_to_fs(url, **options)
    filesystem.invalidate_cache()  # of what it was told before: a file may have changed since
    return filesystem, str(path)


def _find(url: str, options: Mapping[str, Any]) -> tuple[Any, str, dict[str, Any]]:
    """The file system, the path in it, and what it says of the file there."""
    filesystem, path = _open(url, options)
    try:
        info = dict(filesystem.info(path))
    except FileNotFoundError:
        raise DataError(f"data file {show_url(url)}: not found") from None
    if info.get("type") == "directory":
        raise DataError(f"data file {show_url(url)}: a folder, expected a file")
    if info.get("size") == 0:
        raise DataError(f"data file {show_url(url)}: empty")
    return filesystem, path, info


def _copy(filesystem: Any, path: str, copy: Path) -> None:
    """Fetch a file, whole or not at all."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    fresh = copy.with_name(f".{copy.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        filesystem.get_file(path, str(fresh))
        fresh.replace(copy)
    finally:
        fresh.unlink(missing_ok=True)
