"""Commands, code and data that the pages show, collected from their fenced blocks and inline code.

A comment at a command's end that begins with one of :data:`NOT_RUN` says to readers why it is not for trying out at
once, and to the tests that it is parsed and not run; on a line of its own, it says so of the commands below it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GENERATED = ("cli.md", "config.md", "modules.md", "measured.md")
NOT_RUN = ("hours", "GPU", "network", "elsewhere")

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)(?P<rest>[^\n]*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S
)
_COMMENT = re.compile(r"""(?:'[^']*'|"[^"]*"|[^'"])*?(?:^|(?<=\s))(?P<note>#.*)$""", re.S)  # not within quotes
_TITLE = re.compile(r'title="([^"]+)"')
_SEPARATORS = {"|", "||", "&&", ";", "&"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command line of a shell block: its words, and the comment behind it."""

    where: str
    words: tuple[str, ...]
    note: str = ""

    @property
    def is_run(self) -> bool:
        return not self.note.startswith(NOT_RUN)

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def list_pages() -> list[Path]:
    """Every page that people write."""
    written = [path for path in DOCS.rglob("*.md") if path.name not in GENERATED]
    roots = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "recipes" / "README.md"]
    return sorted([*written, *roots])


def list_blocks(page: Path, *languages: str) -> list[Block]:
    """A page's fenced blocks in order, of some languages or of all."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in _FENCE.finditer(text):
        title = _TITLE.search(match["rest"])
        body = re.sub(f"^{match['indent']}", "", match["body"], flags=re.M)
        line = text.count("\n", 0, match.start()) + 1
        blocks.append(Block(page, line, match["language"], title and title[1], body))
    return [block for block in blocks if not languages or block.language in languages]


def list_commands(block: Block) -> Iterator[Command]:
    """The commands of a shell block: lines joined where they or their quotes go on, cut at pipes, no redirections."""
    kept = standing = ""
    for line in block.text.replace("\\\n", " ").splitlines():
        try:
            words, note = _split(kept + line)
        except ValueError:  # a quotation that the next line closes
            kept += f"{line}\n"
            continue
        kept = ""
        if not words and note.startswith(NOT_RUN):
            standing = note
        for part in _cut(words):
            yield Command(str(block), tuple(part), note if note.startswith(NOT_RUN) else standing or note)
    assert not kept, f"{block}: a quotation is not closed"


def list_inline_commands(page: Path) -> Iterator[Command]:
    """Inline code that is a command of ours."""
    text = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text(encoding="utf-8"))
    for match in re.finditer(r"`(ensemblelora [^`]+)`", text):
        line = text.count("\n", 0, match.start()) + 1
        for part in _cut(_split(match[1].replace("\n", " "))[0]):
            yield Command(f"{page.relative_to(ROOT)}:{line}", tuple(part))


def _split(line: str) -> tuple[list[str], str]:
    found = _COMMENT.match(line)
    command, note = (line[: found.start("note")], found["note"]) if found else (line, "")
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    return list(lexer), note.lstrip("# ")


def _cut(words: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    skips = 0
    for word in [*words, ";"]:
        if word in _SEPARATORS:
            if part:
                yield part
            part, skips = [], 0
        elif set(word) <= {"<", ">"}:
            skips = 1
        elif skips:
            skips = 0
        elif part or not re.match(r"[A-Za-z_]\w*=", word):  # a variable set for one command
            part.append(word)
