"""Clients and their lines, from a folder of texts or from plays; nothing here knows a model.

In: a :class:`~ensemblelora.config_federation.ClientsConfig`. Out: :class:`ClientText`, by name. Lines are in the order
in which they were said: the last are tested on, those before them validate, the rest is learnt from.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ensemblelora.config_federation import ClientsConfig
from ensemblelora.data.reading import expand_variables
from ensemblelora.errors import DataError
from ensemblelora.federation.protocol import Part
from ensemblelora.seeding import generator_for

__all__ = ["ClientText", "load_clients", "read_client"]

_FEWEST_LINES = 3  # one for each part
_HEADING = re.compile(r"(ACT|SCENE|PROLOGUE|EPILOGUE|INDUCTION)\b")
_DIRECTION = re.compile(r"\[[^\]]*\]?")


@dataclass(frozen=True)
class ClientText:
    """One client's lines.

    Attributes:
        name: Unlike any other client's.
        lines: In their order, at least three.
    """

    name: str
    lines: tuple[str, ...]

    def split(self, config: ClientsConfig) -> dict[Part, tuple[str, ...]]:
        """Cut the lines in time: first train, then validation, last test; each part has one at least."""
        n = len(self.lines)
        n_test = min(max(1, round(n * config.test_fraction)), n - 2)
        n_validation = min(max(1, round((n - n_test) * config.validation_fraction)), n - n_test - 1)
        first, last = n - n_test - n_validation, n - n_test
        return {"train": self.lines[:first], "validation": self.lines[first:last], "test": self.lines[last:]}


def load_clients(config: ClientsConfig, *, seed: int) -> tuple[ClientText, ...]:
    """Read all clients that have lines enough, or so many of them as are asked for.

    Returns:
        In the order of their names.

    Raises:
        DataError: If the folder is missing, a file can't be read, or fewer than two clients have lines enough.
    """
    folder = _find_folder(config)
    every = _read_plays(folder) if config.kind == "roles" else _read_files(folder, config)
    fewest = max(config.min_lines, _FEWEST_LINES)
    found = sorted((client for client in every if len(client.lines) >= fewest), key=lambda client: client.name)
    if len(found) < 2:
        raise DataError(
            f"clients.source {folder}: {len(found)} clients of {fewest} lines or more, expected at least 2; lower "
            "clients.min_lines, or name another folder"
        )
    if config.max_clients is None or len(found) <= config.max_clients:
        return tuple(found)
    drawn = generator_for(seed, "clients").choice(len(found), config.max_clients, replace=False)
    return tuple(found[i] for i in sorted(drawn.tolist()))


def read_client(path: Path, text_column: str = "text") -> ClientText:
    """Read one client's file; its name is the file's, without the ending.

    A ``.txt`` file has a line a line, a ``.jsonl`` or ``.csv`` file a text a row, which is one or several lines.

    Raises:
        DataError: If the file can't be read, lacks the column, or has fewer than three lines.
    """
    lines = _read_lines(path, text_column)
    if len(lines) < _FEWEST_LINES:
        raise DataError(
            f"client file {path}: {len(lines)} lines, expected {_FEWEST_LINES} or more, to learn, choose and test by"
        )
    return ClientText(path.stem, lines)


def _find_folder(config: ClientsConfig) -> Path:
    folder = Path(expand_variables(config.source)).expanduser()
    if not folder.is_dir():
        raise DataError(f"clients.source {config.source}: no such folder; give one with a file for each client or play")
    return folder


def _read_files(folder: Path, config: ClientsConfig) -> Iterator[ClientText]:
    known: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _READERS and not path.name.startswith("."):
            if path.stem in known:
                raise DataError(f"clients {known[path.stem].name} and {path.name} have the same name; rename one")
            known[path.stem] = path
            yield ClientText(path.stem, _read_lines(path, config.text_column))


def _read_lines(path: Path, text_column: str) -> tuple[str, ...]:
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"client file {path}: expected a file ending in {', '.join(_READERS)}")
    try:
        texts = list(read(path, text_column))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"client file {path}: can't be read ({error}); give a text in UTF-8") from None
    return tuple(line for text in texts for part in text.splitlines() if (line := part.strip()))


def _read_txt(path: Path, text_column: str) -> Iterator[str]:
    yield path.read_text(encoding="utf-8")


def _read_jsonl(path: Path, text_column: str) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"client file {path}, line {number}: not valid JSON ({error})") from None
            yield _pick_text(row, text_column, f"client file {path}, line {number}")


def _read_csv(path: Path, text_column: str) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream), 2):
            yield _pick_text(row, text_column, f"client file {path}, row {number}")


def _pick_text(row: object, column: str, where: str) -> str:
    text = row.get(column) if isinstance(row, Mapping) else None
    if not isinstance(text, str):
        known = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise DataError(f"{where}: no text in column {column!r} (found: {known}); set clients.text_column")
    return text


def _read_plays(folder: Path) -> Iterator[ClientText]:
    """Give every speaking role of every play of the folder."""
    for path in sorted(folder.glob("*.txt")):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"play {path}: can't be read ({error}); give a text in UTF-8") from None
        yield from (ClientText(f"{path.stem}.{role}", lines) for role, lines in _find_roles(text).items())


def _find_roles(text: str) -> dict[str, tuple[str, ...]]:
    """Collect what each role says, in its order.

    A speech is ``SPEAKER<TAB>line`` and continuation lines that begin with a tab, up to an empty line. What stands
    before the first act (the list of persons), headings, and stage directions in brackets are left out.
    """
    spoken: dict[str, list[str]] = {}
    speaker: str | None = None
    has_begun = False
    for line in text.splitlines():
        if _HEADING.match(line):
            has_begun, speaker = has_begun or not line.startswith("SCENE"), None
        elif not line.strip():
            speaker = None
        elif has_begun:
            name, _, words = line.partition("\t")
            speaker = name.strip() or speaker
            said = _DIRECTION.sub("", words).strip()
            if speaker and said:
                spoken.setdefault(speaker, []).append(said)
    return {role: tuple(lines) for role, lines in spoken.items()}


_READERS: Mapping[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}
