"""Task cards: where they are, how they are read, and which ones a config means."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ensemblelora.data.folder import describe_source, is_data_file, task_from_file, tasks_from_folder, tasks_from_url
from ensemblelora.data.harness_keys import drop_report_keys, quote_functions
from ensemblelora.data.reading import BUILDERS
from ensemblelora.data.remote import is_url
from ensemblelora.data.task import TaskCard
from ensemblelora.errors import DataError, join_faults, quote
from ensemblelora.yamltext import YamlError, parse_yaml

__all__ = ["find_cards", "load_card", "parse_card", "resolve_cards"]

_SHIPPED = Path(__file__).with_name("cards")


def find_cards() -> dict[str, Path]:
    """Return the cards that ship with the package, by task name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def resolve_cards(entries: Sequence[str]) -> list[TaskCard]:
    """Return the cards a config names: shipped cards, card files, data files, or folders of either.

    Args:
        entries: ``DataConfig.tasks``. A folder gives its cards; where there is none, or one stands beside the data file
            of the same name, it gives a task for each data file that no card reads, too. Data files, and folders of
            them, may be URLs.

    Raises:
        DataError: Names every entry that is nothing of the kind, every faulty card, and every name that occurs twice.
    """
    cards: list[TaskCard] = []
    faults: list[str] = []
    for entry in entries:
        try:
            cards.extend(_resolve_entry(entry))
        except DataError as error:
            faults.append(str(error))
        except OSError as error:  # a name that no file can have
            faults.append(f"task {quote(entry)}: can't be looked for ({error.strerror})")
    twice = [name for name, n in Counter(card.task for card in cards).items() if n > 1]
    faults += [f"task {name!r}: the name occurs twice; rename a card or file" for name in twice]
    if faults:
        raise DataError("; ".join(faults))
    return cards


def load_card(path: Path) -> TaskCard:
    """Read a card.

    ``include`` names another card, a file beside this one or a shipped card, whose keys this one overrides. Relative
    data paths count from the folder of the card that holds them. A card without ``dataset_path`` describes the data
    file beside it with the same stem, and need only say what its columns mean.

    Raises:
        DataError: If a file is missing or no YAML, or any key is unknown, missing or wrong; names every fault.
    """
    values = _read_card(path, seen=())
    if "dataset_path" not in values and (file := _find_file_beside(path)) is not None:
        values = {**describe_source(file), **_describe_use(values), **values}
    return parse_card(values, source=str(path))


def parse_card(values: dict[str, Any], *, source: str = "card") -> TaskCard:
    """Check a card's keys and return it.

    Raises:
        DataError: Names every fault: key, what arrived, what was expected.
    """
    try:
        return TaskCard.model_validate(values)
    except ValidationError as error:
        faults = [_describe_fault(fault) for fault in error.errors()]
        raise DataError(f"card {source}: {join_faults(faults)}") from None


def _resolve_entry(entry: str) -> list[TaskCard]:
    shipped = find_cards()
    if entry in shipped:
        return [load_card(shipped[entry])]
    if is_url(entry):
        return tasks_from_url(entry)
    path = Path(entry).expanduser()
    if path.is_dir():
        return _resolve_folder(path)
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return [load_card(path)]
    if path.is_file() and is_data_file(path):
        return [task_from_file(path)]
    is_file = path.suffix in (".yaml", ".yml") or is_data_file(path)
    what = "no such file" if is_file else "neither a shipped card nor a file or folder"
    raise DataError(f"task {entry!r}: {what}; {_suggest(entry, shipped)}")


def _suggest(entry: str, shipped: Collection[str]) -> str:
    """What may have been meant: a shipped card, or what lies in the folder that was named."""
    folder = Path(entry).expanduser().parent
    beside = [str(path) for path in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(entry, [*shipped, *beside], n=1)
    return f"did you mean {close[0]!r}?" if close else "`ensemblelora tasks` lists the shipped cards"


def _resolve_folder(folder: Path) -> list[TaskCard]:
    files = sorted(p for p in folder.iterdir() if p.suffix in (".yaml", ".yml") and not p.name.startswith("."))
    cards = [load_card(file) for file in files]
    if cards and not any(map(_find_file_beside, files)):
        return cards
    named = [card.dataset_kwargs.get("data_files") for card in cards]
    read = {Path(file).resolve() for some in named if isinstance(some, dict) for file in map(str, some.values())}
    return cards + tasks_from_folder(folder, besides=read, may_be_empty=bool(cards))


def _find_file_beside(card: Path) -> Path | None:
    """The data file with a card's own stem."""
    folder = card.resolve().parent
    return next((p for p in sorted(folder.iterdir()) if p.stem == card.stem and is_data_file(p)), None)


def _describe_use(values: dict[str, Any]) -> dict[str, Any]:
    """What a card that names only columns leaves out: as for a file without a card."""
    kind = {"output_type": "generate_until"}
    if "doc_to_choice" in values:
        kind = {"output_type": "multiple_choice", "length_normalization": "tokens"}
    return {**kind, "group": values.get("doc_to_text")}


def _read_card(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        values = parse_yaml(quote_functions(path.read_text(encoding="utf-8")))
    except YamlError as error:
        raise DataError(f"card {path}: not plain YAML ({error}); a card is data and can't call functions") from None
    except (OSError, ValueError) as error:
        raise DataError(f"card {path}: can't be read ({error})") from None
    if not isinstance(values, dict):
        raise DataError(f"card {path}: expected keys and values, got {type(values).__name__}")
    values = _anchor_paths(drop_report_keys(values, str(path)), path.resolve().parent)
    included = values.pop("include", None)
    if included is None:
        return values
    parent = _find_included(str(included), path)
    if parent in (*seen, path.resolve()):
        raise DataError(f"card {path}: include {included!r} leads back to itself")
    return {**_read_card(parent, (*seen, path.resolve())), **values}


def _find_included(name: str, path: Path) -> Path:
    beside = path.resolve().parent / name
    return beside if beside.is_file() else find_cards().get(name, beside)


def _anchor_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    anchored = dict(values)
    source = values.get("dataset_path")
    # A reader's name stays one, whatever folders lie about.
    is_folder = isinstance(source, str) and source not in BUILDERS and (folder / source).is_dir()
    if isinstance(source, str) and (source.startswith(("./", "../")) or is_folder):
        anchored["dataset_path"] = str((folder / source).resolve())
    options = values.get("dataset_kwargs")
    if isinstance(options, dict) and isinstance(options.get("data_files"), dict):
        files = {split: _anchor_path(file, folder) for split, file in options["data_files"].items()}
        anchored["dataset_kwargs"] = {**options, "data_files": files}
    return anchored


def _anchor_path(file: Any, folder: Path) -> Any:
    if not isinstance(file, str) or file.startswith(("${", "/", "~")) or is_url(file):
        return file
    return str((folder / file).resolve())


def _describe_fault(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key; known keys: include, {', '.join(TaskCard.model_fields)}"
    if fault["type"] == "missing":
        beside = "; give it, or put the data file beside the card under the card's name" * (where == "dataset_path")
        return f"{where}: missing{beside}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: got {quote(fault['input'])}: {message}" if where else message
