"""A user's own files: multiple choice, and columns that a card beside the file gives their meaning."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from ensemblelora.cards import show_card
from ensemblelora.config import DataConfig
from ensemblelora.data.choices import find_choice_columns
from ensemblelora.data.loading import load_card, load_tasks, parse_card, resolve_cards
from ensemblelora.data.reading import read_split
from ensemblelora.data.rendering import compile_card
from ensemblelora.data.task import SPLITS, Example, Task
from ensemblelora.errors import DataError
from tests.toys import write_rows

CITIES = ["Rome", "Oslo", "Lima", "Bonn"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield


def load(*entries: Path | str) -> tuple[Task, ...]:
    return load_tasks(DataConfig(tasks=tuple(map(str, entries))), seed=0).tasks


def examples_of(task: Task) -> dict[int, Example]:
    return {int(e.id.partition(":")[2]): e for split in SPLITS for e in task.splits[split]}


def ask(index: int, answer: Any, column: str = "answer") -> dict[str, Any]:
    turned = CITIES[index % 4 :] + CITIES[: index % 4]
    return {"question": f"Where is {index}?", "choices": turned, column: answer}


# Multiple choice


@pytest.mark.parametrize("column", ["answer", "label"])
@pytest.mark.parametrize(
    "name_it",
    [
        lambda row, k: row[k],  # its text
        lambda row, k: "abcd"[k],
        lambda row, k: " ABCD"[k + 1],
        lambda row, k: k,
        lambda row, k: str(k),
        lambda row, k: k + 1,
        lambda row, k: str(k + 1),
    ],
    ids=["text", "small letter", "letter", "number", "digits", "number from 1", "digits from 1"],
)
def test_every_way_to_name_the_right_choice_gives_the_same_task(tmp_path: Path, column: str, name_it: Any) -> None:
    rows = [ask(i, None, column) for i in range(40)]
    for i, row in enumerate(rows):
        row[column] = name_it(row["choices"], (i * i + i // 3) % 4)
    (task,) = load(write_rows(tmp_path / "geo.jsonl", rows))
    assert (task.card.output_type, task.card.scoring) == ("multiple_choice", "options")
    found = examples_of(task)
    assert len(found) == 40
    for i, example in found.items():
        assert example.context == f"Question: Where is {i}?\nAnswer:"
        assert example.choices == tuple(f" {text}" for text in rows[i]["choices"])
        assert example.label == (i * i + i // 3) % 4


@pytest.mark.parametrize("names", [["choice_a", "choice_b", "choice_c"], ["option3", "option1", "option2"]])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_column_a_choice(tmp_path: Path, names: list[str], suffix: str) -> None:
    # Quotes and braces must survive the way through the template; the last choice is missing in every other row.
    rows = [
        {"question": f"q{i}?", "answer": "AB"[i % 2]}
        | dict(zip(sorted(names), [f'say "{{x}} {i}', f"it's {i}", "" if i % 2 else f"c{i}"], strict=True))
        for i in range(40)
    ]
    frame = pd.DataFrame(rows)[["question", *names, "answer"]]
    path = tmp_path / f"quiz{suffix}"
    writers = {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        ".parquet": lambda: frame.to_parquet(path),
    }
    writers[suffix]()
    found = examples_of(load(path)[0])
    assert found[2].choices == (' say "{x} 2', " it's 2", " c2")
    assert found[3].choices == (' say "{x} 3', " it's 3")
    assert [found[i].label for i in range(4)] == [0, 1, 0, 1]


def test_numbers_among_numbers_mean_themselves(tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1?", "choices": [i + 7, i + 8, i + 1][i % 3 :], "answer": i + 1} for i in range(4, 44)]
    rows = [row for row in rows if len(row["choices"]) > 1]
    found = examples_of(load(write_rows(tmp_path / "sums.jsonl", rows))[0])
    assert all(example.choices[example.label] == f" {rows[i]['answer']}" for i, example in found.items())


def test_lists_in_a_csv_and_a_passage(tmp_path: Path) -> None:
    rows = [ask(i, "ABCD"[i % 4]) | {"context": f"p{i}"} for i in range(40)]
    pd.DataFrame(rows).to_csv(tmp_path / "geo.csv", index=False)
    found = examples_of(load(tmp_path)[0])
    assert found[1].context == "p1\nQuestion: Where is 1?\nAnswer:"
    assert found[1].choices == (" Oslo", " Lima", " Bonn", " Rome")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [ask(i, i % 4) for i in range(9)] + [ask(9, 7), ask(10, -1)],
            "row 9: 7 is no choice .*and 1 more rows.*A to D",
        ),
        ([ask(i, "ABCD"[i % 4]) for i in range(9)] + [ask(9, "E")], "row 9: 'E' is no choice of that row; expected"),
        ([ask(i, 1 + i % 2) for i in range(9)], "could hold numbers counted from 0 or numbers counted from 1"),
        ([ask(i, i % 2 == 0) for i in range(9)], "row 0: True is no choice"),
        ([ask(0, 0) | {"choices": ["Rome"]}], "row 0: choices: expected two choices or more, got 1"),
        ([ask(0, 0), ask(1, 0) | {"choices": ["Rome", ""]}], "row 1: choices: a choice is empty"),
        ([ask(0, 0) | {"choices": "Rome or Oslo"}], "row 0: choices is not a list of texts .*'Rome or Oslo'"),
        ([ask(0, 0) | {"choices": {"text": ["a", "b"], "label": ["A", "B"]}}], "row 0: choices is not a list of texts"),
        (
            [{"question": "q", "choices": ["a", "b"], "gold": 0}],
            "expected columns .*question, choices and answer.*gold",
        ),
    ],
)
def test_choices_that_cannot_be_understood(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write_rows(tmp_path / "geo.jsonl", rows)
    with pytest.raises(DataError, match=message) as fault:
        load(path)
    assert str(path) in str(fault.value) and "\n" not in str(fault.value)


def test_choices_under_another_name_are_not_dropped_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": f"q{i}", "candidates": ["a", "b"], "answer": "a"} for i in range(30)]
    with caplog.at_level(logging.WARNING, "ensemblelora"):
        (task,) = load(write_rows(tmp_path / "geo.jsonl", rows))
    assert task.card.output_type == "generate_until"
    assert "column candidates holds lists" in caplog.text


def test_one_column_that_ends_in_a_letter_holds_no_choices() -> None:
    assert find_choice_columns(["text", "option_a", "label"]) is None
    assert find_choice_columns(["choice10", "choice2", "choice1"]).names == ("choice1", "choice2", "choice10")


# A card beside the file


def test_three_lines_give_columns_their_meaning(tmp_path: Path) -> None:
    write_rows(tmp_path / "reviews.jsonl", [{"sentence": f"s{i}", "target": i % 2} for i in range(40)])
    write_rows(tmp_path / "plain.jsonl", [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(40)])
    write_rows(tmp_path / "free.jsonl", [{"prompt": f"p{i}", "reply": f"r{i}"} for i in range(40)])
    (tmp_path / "reviews.yaml").write_text(
        'doc_to_text: "{{sentence}}\\nVerdict:"\ndoc_to_choice: [bad, good]\ndoc_to_target: target\n', encoding="utf-8"
    )
    (tmp_path / "free.yaml").write_text("doc_to_text: prompt\ndoc_to_target: reply\n", encoding="utf-8")
    tasks = {task.name: task for task in load(tmp_path)}
    assert set(tasks) == {"free", "reviews", "plain"}  # no file is left out for the cards' sake
    example = examples_of(tasks["reviews"])[3]
    assert (example.context, example.choices, example.label) == ("s3\nVerdict:", (" bad", " good"), 1)
    assert example.group == "s3 verdict:"
    assert examples_of(tasks["free"])[3].choices == (" r3",)
    assert load(tmp_path / "reviews.yaml")[0].fingerprint == tasks["reviews"].fingerprint


def test_a_folder_of_cards_is_no_folder_of_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(40)])
    write_rows(tmp_path / "stray.jsonl", [{"anything": 1}])
    card = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"train": "rows.jsonl"}}, "task": "toy"}
    card |= {"training_split": "train", "doc_to_text": "text", "doc_to_choice": ["a", "b"], "doc_to_target": "label"}
    (tmp_path / "toy.yaml").write_text(json.dumps(card | {"output_type": "multiple_choice"}), encoding="utf-8")
    assert [task.name for task in load(tmp_path)] == ["toy"]


def test_a_card_without_data_says_where_it_could_be(tmp_path: Path) -> None:
    (tmp_path / "reviews.yaml").write_text("doc_to_text: sentence\ndoc_to_target: target\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"dataset_path: missing; .*beside the card under the card's name"):
        load_card(tmp_path / "reviews.yaml")


def test_a_folder_called_as_a_reader_is_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(40)]
    keys = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"train": "rows.jsonl"}}, "task": "toy"}
    keys |= {"training_split": "train", "doc_to_text": "text", "doc_to_choice": ["a", "b"], "doc_to_target": "label"}
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "toy.yaml").write_text(json.dumps(keys | {"output_type": "multiple_choice"}), encoding="utf-8")
    (tmp_path / "json").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(examples_of(load("toy.yaml")[0])) == 40


def test_the_examples_of_the_documentation_are_what_they_are_said_to_be(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    section = (root / "README.md").read_text(encoding="utf-8").partition("## With your own files")[2]
    blocks = re.findall(r"```(?:csv|json|yaml)\n(.*?)```", section, re.DOTALL)[:4]
    files = dict(zip(("reviews.csv", "quiz.jsonl", "facts.jsonl", "notes.yaml"), blocks, strict=True))
    assert all(text.count("\n") == 3 for text in files.values())
    header, *rows = files["reviews.csv"].splitlines()
    files["reviews.csv"] = "\n".join([header, *rows * 2])
    files["notes.csv"] = "sentence,target\nIt works.,1\nIt broke.,0\n"
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = {}
    for card in resolve_cards([str(tmp_path)]):
        rows = read_split(card, "train")
        example = compile_card(card, rows.column_names).example(rows[0], "0")
        found[card.task] = (card.output_type, example.context, example.choices[example.label])
    assert found == {
        "facts": ("generate_until", "Question: What is the capital of Peru?\nAnswer:", " Lima"),
        "notes": ("multiple_choice", "It works.\nVerdict:", " good"),
        "quiz": ("multiple_choice", "Question: What is the capital of Peru?\nAnswer:", " Lima"),
        "reviews": ("multiple_choice", "A joy from start to end.\nLabel:", " positive"),
    }
    page = (root / "docs" / "own-files.md").read_text(encoding="utf-8")
    short, long, remote = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    assert all("://" in source for source in remote["data"]["tasks"])
    write_rows(tmp_path / "short.jsonl", [{"title": "t", "body": "b", "target": 1}])
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short), encoding="utf-8")
    assert load_card(tmp_path / "short.yaml").doc_to_choice == parse_card(long).doc_to_choice == ("bad", "good")


# Faults that many rows or tasks share


def test_a_missing_variable_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENSEMBLELORA_DATA", raising=False)
    with pytest.raises(DataError) as fault:
        load("boolq", "cb", "copa")
    assert str(fault.value).count("ENSEMBLELORA_DATA is not set") == 1
    assert "the data of boolq, cb, copa is read from it" in str(fault.value)


def test_rows_with_the_same_fault_are_counted(tmp_path: Path) -> None:
    write_rows(tmp_path / "toy.jsonl", [{"words": f"t{i}", "kind": i % 3} for i in range(60)])
    (tmp_path / "toy.yaml").write_text(
        "doc_to_text: words\ndoc_to_choice: [a, b]\ndoc_to_target: kind\n", encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"row train:\d+: label 2 .*\(and 19 more faulty rows\)") as fault:
        load(tmp_path)
    assert str(fault.value).count("label 2") == 1


@pytest.mark.parametrize(
    "rows", [[{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(40)], [ask(i, "Rome") for i in range(40)]]
)
def test_the_card_shown_for_a_file_is_the_one_it_is_read_by(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    file = write_rows(tmp_path / "mine.jsonl", rows)
    shown = show_card(str(file))
    (alone,) = resolve_cards([str(file)])
    assert (shown.task, shown.path, shown.problem) == ("mine", str(file), None) and shown.example is not None
    file.with_suffix(".yaml").write_text(shown.card, encoding="utf-8")
    assert load_card(file.with_suffix(".yaml")) == alone
