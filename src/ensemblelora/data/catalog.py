"""Task cards: where they are, how they are read, and which ones a config means."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ensemblelora.data.folder import is_data_file, task_from_file, tasks_from_folder
from ensemblelora.data.task import TaskCard
from ensemblelora.errors import DataError

__all__ = ["find_cards", "load_card", "parse_card", "resolve_cards"]

_SHIPPED = Path(__file__).with_name("cards")


def find_cards() -> dict[str, Path]:
    """Return the cards that ship with the package, by task name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def resolve_cards(entries: Sequence[str]) -> list[TaskCard]:
    """Return the cards a config names: shipped cards, card files, data files, or folders of either.

    Args:
        entries: ``DataConfig.tasks``. A folder with cards gives those; any other folder one task a data file.

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
    twice = [name for name, n in Counter(card.task for card in cards).items() if n > 1]
    faults += [f"task {name!r}: the name occurs twice; rename a card or file" for name in twice]
    if faults:
        raise DataError("; ".join(faults))
    return cards


def load_card(path: Path) -> TaskCard:
    """Read a card.

    ``include`` names another card, a file beside this one or a shipped card, whose keys this one overrides. Relative
    data paths count from the folder of the card that holds them.

    Raises:
        DataError: If a file is missing or no YAML, or any key is unknown, missing or wrong; names every fault.
    """
    return parse_card(_read_card(path, seen=()), source=str(path))


def parse_card(values: dict[str, Any], *, source: str = "card") -> TaskCard:
    """Check a card's keys and return it.

    Raises:
        DataError: Names every fault: key, what arrived, what was expected.
    """
    try:
        return TaskCard.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(_describe_fault(fault) for fault in error.errors())
        raise DataError(f"card {source}: {faults}") from None


def _resolve_entry(entry: str) -> list[TaskCard]:
    shipped = find_cards()
    if entry in shipped:
        return [load_card(shipped[entry])]
    path = Path(entry).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml") and not p.name.startswith("."))
        return [load_card(file) for file in files] or tasks_from_folder(path)
    if path.suffix in (".yaml", ".yml"):
        return [load_card(path)]
    if is_data_file(path):
        return [task_from_file(path)]
    close = difflib.get_close_matches(entry, shipped, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "`ensemblelora tasks` lists the shipped cards"
    raise DataError(f"task {entry!r}: neither a shipped card nor a file or folder; {hint}")


def _read_card(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"card {path}: can't be read ({error})") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"card {path}: not plain YAML ({reason}); a card is data and can't call functions") from None
    if not isinstance(values, dict):
        raise DataError(f"card {path}: expected keys and values, got {type(values).__name__}")
    values = _anchor_paths(values, path.resolve().parent)
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
    if isinstance(source, str) and (source.startswith(("./", "../")) or (folder / source).is_dir()):
        anchored["dataset_path"] = str((folder / source).resolve())
    options = values.get("dataset_kwargs")
    if isinstance(options, dict) and isinstance(options.get("data_files"), dict):
        files = {split: _anchor_path(file, folder) for split, file in options["data_files"].items()}
        anchored["dataset_kwargs"] = {**options, "data_files": files}
    return anchored


def _anchor_path(file: Any, folder: Path) -> Any:
    if not isinstance(file, str) or file.startswith(("${", "/", "~")):
        return file
    return str((folder / file).resolve())


def _describe_fault(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key; known keys: include, {', '.join(TaskCard.model_fields)}"
    if fault["type"] == "missing":
        return f"{where}: missing"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: got {fault['input']!r}: {message}" if where else message
