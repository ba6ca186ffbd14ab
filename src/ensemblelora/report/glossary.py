"""The words of the trade that a page uses, each told in half a line at its end and linked where it first stands."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from ensemblelora.report.document import Document, Figure, Fold

__all__ = ["Word", "find_words", "link_words"]


@dataclass(frozen=True)
class Word:
    """One word.

    Attributes:
        name: As the list has it, and of its place in the page.
        meaning: Half a line.
        forms: How it stands in a text, as a regular expression without groups; letters' case counts.
    """

    name: str
    meaning: str
    forms: str

    @property
    def place(self) -> str:
        """Identity of its entry in a page."""
        return f"word-{self.name.lower().replace(' ', '-')}"


_WORDS = (
    Word("adapter", "a few trained numbers beside a base model, whose own numbers stay as they are", "[Aa]dapters?"),
    Word("AdaBoost", "boosting that weighs up the rows the adapters before got wrong", "AdaBoost"),
    Word("affinity", "how well two tasks do in training sets that hold both; higher is better", "[Aa]ffinit(?:y|ies)"),
    Word(
        "boosting",
        "adding adapters (boosters) fitted to what a group's adapter still gets wrong",
        "[Bb]oosting|[Bb]oosters?",
    ),
    Word("ensemble", "the groups' adapters and boosters together, their outputs weighted for each task", "[Ee]nsemble"),
    Word("FLOPs", "floating-point operations: the work of a computer, whatever its speed", "[kMGTPEZ]?FLOPs"),
    Word("gradient cosine", "how much alike two tasks' mean gradients at the base model point", "[Gg]radient cosines?"),
    Word("LoRA", "an adapter that adds a product of two thin matrices to a weight matrix", "LoRA"),
    Word("macro-F1", "mean over classes of F1, which punishes missing a class and calling too often", "[Mm]acro[ -]F1"),
    Word("MTL-FT", "one adapter trained on all tasks, then a copy of it trained on for each task", "MTL-FT"),
    Word("nats", "unit of loss: natural logarithms; guessing between two equals costs 0.69", "nats"),
    Word("oracle", "the fit to gradients that predicts what training on a set of tasks would give", "[Oo]racle"),
    Word("QLoRA", "LoRA beside a base model held in 4 bits", "QLoRA"),
    Word("R²", "share of what varies that is explained: 1 is all of it, 0 is none", "R²"),
    Word("surrogate", "a fit over other sets of tasks, in place of a pair never asked about", "[Ss]urrogate"),
    Word("TAG", "grouping by what a training step on one task does to the others' losses", "TAG"),
)


def find_words(document: Document) -> tuple[Word, ...]:
    """Return the words that a page uses, in alphabetical order."""
    text = "\n".join(_list_texts(document))
    return tuple(word for word in _WORDS if re.search(_bound(word.forms), text))


def link_words(words: Iterable[Word]) -> Callable[[object], Markup]:
    """Return what escapes a page's texts one after the other, and links each word where it stands first.

    Args:
        words: From :func:`find_words`.

    Example:
        >>> link = link_words([Word("TAG", "a way to group", "TAG")])
        >>> str(link("TAG < TAG")), str(link("TAG"))
        ('<a href="#word-tag">TAG</a> &lt; TAG', 'TAG')
    """
    unseen = {word.name: word for word in words}

    def link(text: object) -> Markup:
        parts, end, plain = [], 0, str(text)
        pattern = "|".join(rf"(?P<w{place}>{word.forms})" for place, word in enumerate(unseen.values()))
        names = list(unseen)
        for found in re.finditer(_bound(pattern), plain) if unseen else ():
            word = unseen.pop(names[int(str(found.lastgroup)[1:])], None)
            if word is not None:
                link_to = Markup('<a href="#{}">{}</a>').format(word.place, found.group())
                parts += [escape(plain[end : found.start()]), link_to]
                end = found.end()
        return Markup("").join([*parts, escape(plain[end:])])

    return link


def _bound(forms: str) -> str:
    return rf"(?<![\w-])(?:{forms})(?![\w-])"


def _list_texts(value: Any) -> Iterator[str]:
    """Yield every text of a page but those of figures and of folded files."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _list_texts(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, Figure | Fold):
        for field in dataclasses.fields(value):
            yield from _list_texts(getattr(value, field.name))
