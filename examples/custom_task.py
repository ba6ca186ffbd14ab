"""A task with columns of its own: a card says what they mean, and the model's view of a row is shown before training.

python examples/custom_task.py                      # SmolLM2-135M; a minute or two
"""

from __future__ import annotations

import argparse
import csv
from itertools import product
from pathlib import Path

import yaml

import ensemblelora

_CARD = {
    "doc_to_text": "From: {{sender}}\nSubject: {{subject}}\n\nShould it be answered today?",  # a Jinja template
    "doc_to_choice": ["no", "yes"],
    "doc_to_target": "urgent",  # the column with the class's number
    "group": "sender",  # all mails of a sender stay in one split, so that the test meets new senders
}


def main() -> None:
    """Write a CSV with a card beside it, show an example, and plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="mails", help="where the files are written")
    parser.add_argument("--model", default="smollm2-135m", help="a hub id, a folder, a .gguf file, or smollm2-135m")
    parser.add_argument("--out", default="runs/mails", help="the run folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as on the command line")
    given = parser.parse_args()

    folder = _write_files(Path(given.folder))
    config = ensemblelora.read_request(folder, (f"model.name={given.model}", f"out={given.out}", *given.set))
    tasks = ensemblelora.load_tasks(config.data, seed=config.seed)
    for task in tasks.tasks:
        example = task.splits["train"][0]
        print(f"--- {task.name}, answer{example.choices[example.label]}\n{example.context}")
    planned = ensemblelora.run(config, until="group")
    print(f"--- plan: {planned.plan['decision']}. {planned.plan['reason']}")


def _write_files(folder: Path) -> Path:
    """Two inboxes that follow opposed rules, each a CSV file with a card of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    subjects = ("Server down", "Lunch on Friday", "Contract ends today", "Holiday pictures")
    for name, urgent in (("office", (1, 0, 1, 0)), ("home", (0, 1, 0, 1))):
        rows = [
            (f"person{number}@example.org", subject, mark)
            for number, (subject, mark) in product(range(20), zip(subjects, urgent, strict=True))
        ]
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("sender", "subject", "urgent"), *rows])
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(_CARD), encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
