"""The report as plain values: sections of text, tables and figures, before any markup.

Both templates render the same :class:`Document`, so HTML and Markdown can't say different things. Every text in it
is plain: escaping is the templates' business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

__all__ = [
    "MAX_OPEN_ROWS",
    "Block",
    "Bullets",
    "Cell",
    "Column",
    "Document",
    "Figure",
    "FigureRow",
    "Fold",
    "GroupCard",
    "Groups",
    "Legend",
    "Row",
    "Section",
    "Step",
    "Steps",
    "Table",
    "Text",
    "Tile",
    "Tiles",
]


MAX_OPEN_ROWS = 40


@dataclass(frozen=True)
class Text:
    """A paragraph; a quiet one is a remark on how to read what stands before it."""

    kind: ClassVar[str] = "text"
    text: str
    is_quiet: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    kind: ClassVar[str] = "bullets"
    items: tuple[str, ...]
    is_warning: bool = False


@dataclass(frozen=True)
class Fold:
    """Preformatted text, folded away under a summary; an empty summary leaves it open."""

    kind: ClassVar[str] = "fold"
    text: str
    summary: str = ""
    language: str = ""


@dataclass(frozen=True)
class GroupCard:
    """One group: its letter, its tasks, a remark; ``colour`` numbers the palette."""

    letter: str
    colour: int
    tasks: tuple[str, ...]
    remark: str = ""


@dataclass(frozen=True)
class Groups:
    """The plan's groups."""

    kind: ClassVar[str] = "groups"
    cards: tuple[GroupCard, ...]

    @property
    def n_open(self) -> int:
        """Tasks of a group that a page shows unfolded; few where there are very many in all."""
        return 30 if sum(len(card.tasks) for card in self.cards) <= 120 else 8


@dataclass(frozen=True)
class Tile:
    """One number worth reading first."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Tiles:
    """A row of numbers."""

    kind: ClassVar[str] = "tiles"
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Step:
    """One part of a story: what it is called, and what happened in it."""

    label: str
    text: str


@dataclass(frozen=True)
class Steps:
    """A story in a few parts, such as what was asked, what was predicted and what came out."""

    kind: ClassVar[str] = "steps"
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Cell:
    """One table cell.

    Attributes:
        text: What it says.
        detail: Smaller, beside or under it, such as an interval.
        tag: A mark, such as "at chance".
        share: Length of a bar under the text, in [0, 1]; none without.
        is_best: Whether it is the best of its row.
        colour: Number in the palette of a mark before the text; none without.
        mark: What the mark says, such as a group's letter; colours alone tell nothing to some.
    """

    text: str
    detail: str = ""
    tag: str = ""
    share: float | None = None
    is_best: bool = False
    colour: int | None = None
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """A table column; numbers are set to the right."""

    label: str
    is_number: bool = True


@dataclass(frozen=True)
class Row:
    """A table row; its first cell heads it. A summary row is set apart from the rows it sums up."""

    cells: tuple[Cell, ...]
    is_summary: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first column heads the rows. ``summary`` folds it away.

    A page folds a long table away by itself, and leaves its summary rows open.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""
    summary: str = ""

    @property
    def is_long(self) -> bool:
        """Whether it would push what follows out of sight."""
        return len(self.rows) > MAX_OPEN_ROWS

    @property
    def summary_rows(self) -> tuple[Row, ...]:
        """Rows that sum up the others."""
        return tuple(row for row in self.rows if row.is_summary)


@dataclass(frozen=True)
class Figure:
    """A figure drawn by plotly.js.

    Attributes:
        name: Its name in the page, unlike any other figure's.
        title: What it shows.
        alt: One sentence that says what there is to see.
        spec: ``data`` and ``layout`` as plotly takes them; colours are names of the page's CSS variables.
        height: Pixels; 0 makes it as high as wide.
    """

    name: str
    title: str
    alt: str
    spec: Mapping[str, Any]
    height: int = 0


@dataclass(frozen=True)
class Legend:
    """The ends of a colour scale; ``scale`` is "diverging" or "sequential"."""

    low: str
    high: str
    scale: str


@dataclass(frozen=True)
class FigureRow:
    """Figures side by side under one caption."""

    kind: ClassVar[str] = "figures"
    figures: tuple[Figure, ...]
    caption: str
    legend: Legend | None = None


Block = Text | Bullets | Fold | Groups | Tiles | Steps | Table | FigureRow


@dataclass(frozen=True)
class Section:
    """A headed part of the report."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """The whole report.

    Attributes:
        title: Short, for the window.
        facts: Where it comes from, such as model, version and date.
        headline: The one sentence.
        opening: What stands between headline and sections.
        sections: In reading order.
    """

    title: str
    facts: tuple[str, ...]
    headline: str
    opening: Sequence[Block] = field(default_factory=tuple)
    sections: Sequence[Section] = field(default_factory=tuple)

    @property
    def figures(self) -> list[Figure]:
        """Every figure, in reading order."""
        blocks = [*self.opening, *(block for section in self.sections for block in section.blocks)]
        return [figure for block in blocks if isinstance(block, FigureRow) for figure in block.figures]
