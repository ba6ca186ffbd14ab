"""Write three small tasks as CSV files, to try things out with: ``python examples/make_tasks.py tasks``.

Two ask for a class, one is multiple choice. Sixty rows each: enough to see every command work, too few for a result.
"""

from __future__ import annotations

import argparse
import csv
from itertools import product
from pathlib import Path

_FILMS = ("The first film", "This sequel", "The last episode", "The whole series", "Her new play", "That old musical")
_PRAISE = ("made me laugh", "is a joy from start to end", "moved everyone", "deserves a prize", "went by too fast")
_BLAME = ("put me to sleep", "is two hours too long", "annoyed everyone", "deserves no sequel", "never gets going")
_PEOPLE = ("A customer", "My colleague", "The school", "Our neighbour", "The new user")
_REQUESTS = {
    "billing": ("was charged twice", "asks for an invoice", "wants the money back", "sees a wrong price"),
    "technical": ("gets an error message", "cannot open the page", "says that it crashes", "waits for it to load"),
    "account": ("forgot the password", "wants another user name", "cannot log in", "asks to be deleted"),
}
_KINDS = {
    "metal": ("tin", "iron", "copper", "zinc", "lead"),
    "bird": ("wren", "crow", "heron", "finch", "owl"),
    "fish": ("carp", "trout", "perch", "eel", "pike"),
    "tree": ("oak", "birch", "alder", "elm", "willow"),
}


def write_tasks(folder: Path | str) -> Path:
    """Write ``reviews.csv``, ``tickets.csv`` and ``quiz.csv`` into a folder, and return it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    reviews = [(f"{film} {said}.", label) for film in _FILMS for label, said in _label_opinions()]
    tickets = [
        (f"{who} {what}.", label) for label, requests in _REQUESTS.items() for who, what in product(_PEOPLE, requests)
    ]
    _write(folder / "reviews.csv", ("text", "label"), reviews)
    _write(folder / "tickets.csv", ("text", "label"), tickets)
    _write(folder / "quiz.csv", ("question", "choice_a", "choice_b", "choice_c", "answer"), _ask_questions())
    return folder


def _label_opinions() -> list[tuple[str, str]]:
    return [("positive", said) for said in _PRAISE] + [("negative", said) for said in _BLAME]


def _ask_questions() -> list[tuple[str, str, str, str, str]]:
    """Each word once as the right answer, beside two words of other kinds, in each of three places."""
    rows = []
    for place, (kind, words) in product(range(3), _KINDS.items()):
        others = [name for name in _KINDS if name != kind]
        for number, word in enumerate(words):
            first, second = (_KINDS[others[(place + shift) % 3]][number] for shift in (0, 1))
            choices = [first, second]
            choices.insert(place, word)
            rows.append((f"Which one is a kind of {kind}: number {number + 1}?", *choices, "ABC"[place]))
    return rows


def _write(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    print(write_tasks(parser.parse_args().folder))
