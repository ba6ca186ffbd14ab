"""Datasets of a hub, whose rows change behind a run's back: a run stays with the commit that it was begun with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from datasets.packaged_modules.json.json import Json

from ensemblelora import artifacts, pipeline
from ensemblelora.artifacts import pinned_commits
from ensemblelora.config import DataConfig
from ensemblelora.data.loading import load_task, load_tasks
from ensemblelora.data.task import TaskCard, TaskSet
from ensemblelora.errors import DataError
from tests.tiny_run import copy_run, read_config, tensors_of
from tests.toys import make_card, write_rows

FIRST, SECOND = "a" * 40, "b" * 40
NAME = "owner/planted"


@dataclass
class Hub:
    """What ``datasets.load_dataset`` does with a hub, a cache, and without a network. The rows say where they are from.

    Attributes:
        folder: The cache: a folder for each commit, as the reader's own has.
        head: The newest commit.
        is_reachable: Whether there is a network.
        moves: Whether someone pushes a commit after each load.
        tells: Whether it says which commit a stream is of.
        asked: The revisions that were asked for.
    """

    folder: Path
    rows: Mapping[str, list[dict[str, Any]]]
    head: str = FIRST
    is_reachable: bool = True
    moves: bool = False
    tells: bool = True
    asked: list[str | None] = field(default_factory=list)

    def load(self, path: str, name: str | None = None, *, split: str, revision: str | None = None) -> Dataset:
        commit = self.answer(path, revision)
        place = self.folder / commit
        if not (place / split).exists():
            Dataset.from_list(self.rows_of(commit, split)).save_to_disk(place / split)
            (place / split / "data-00000-of-00001.arrow").rename(place / f"planted-{split}.arrow")
        self.head = SECOND if self.moves else self.head
        return Dataset.from_file(str(place / f"planted-{split}.arrow"))

    def load_builder(self, path: str, name: str | None = None, *, revision: str | None = None) -> Json:
        """What ``datasets.load_dataset_builder`` gives: a reader of files that knows the commit they are of."""
        commit = self.answer(path, revision)
        files = {split: str(write_rows(self.folder / f"{commit}-{split}.jsonl", self.rows_of(commit, split)))
                 for split in self.rows}  # fmt: skip
        self.head = SECOND if self.moves else self.head
        return Json(cache_dir=str(self.folder / "json"), data_files=files, hash=commit if self.tells else "a1b2")

    def answer(self, path: str, revision: str | None) -> str:
        self.asked.append(revision)
        commit = self.head if revision in (None, "main") else revision
        if not self.is_reachable:
            return max(place.name[:40] for place in self.folder.iterdir() if place.name[:40] in (FIRST, SECOND))
        if commit not in (FIRST, SECOND):
            raise ValueError(f"Revision '{revision}' doesn't exist for dataset '{path}' on the Hub.")
        return commit

    def rows_of(self, commit: str, split: str) -> list[dict[str, Any]]:
        return [row | {"text": f"{commit[0]}: {row['text']}"} for row in self.rows[split]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(40)]
    made = Hub(tmp_path / "cache", {"train": rows, "validation": rows[:20]})
    made.folder.mkdir()
    monkeypatch.setattr("datasets.load_dataset", made.load)
    monkeypatch.setattr("datasets.load_dataset_builder", made.load_builder)
    return made


def card_of(**keys: Any) -> TaskCard:
    return make_card(dataset_path=NAME, training_split="train", **keys)


def origins(tasks: TaskSet) -> set[str]:
    """The commits that rows came from."""
    return {example.context[0] for task in tasks.tasks for split in task.splits.values() for example in split}


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write_card(tmp_path / "planted.yaml")
    return DataConfig(tasks=(str(tmp_path / "planted.yaml"),))


def write_card(path: Path, more: str = "") -> None:
    path.write_text(
        f"task: planted\ndataset_path: {NAME}\ntraining_split: train\ndoc_to_text: '{{{{text}}}}'\n"
        f"doc_to_choice: ['no', 'yes']\ndoc_to_target: label\noutput_type: multiple_choice\n{more}",
        encoding="utf-8",
    )


def test_a_card_of_a_hub_is_pinned_to_the_commit_that_its_rows_came_from(hub, config):
    tasks = load_tasks(config, seed=0)
    assert tasks.tasks[0].card.dataset_kwargs == {"revision": FIRST} and hub.asked == [None]
    hub.head = SECOND
    commits = {("planted", NAME): FIRST}
    again = load_tasks(config, seed=0, commits=commits)
    assert origins(again) == {"a"} and again.fingerprint == tasks.fingerprint and hub.asked[1:] == [FIRST]
    assert again.tasks[0].card == tasks.tasks[0].card
    assert origins(load_tasks(config, seed=0)) == {"b"}, "a new run takes what is there now"
    assert origins(load_tasks(config, seed=0, commits={("planted", "another/name"): FIRST})) == {"b"}


def test_all_splits_are_of_one_commit_though_the_hub_moves_in_between(hub):
    hub.moves = True
    task = load_task(card_of(validation_split="validation"), DataConfig(tasks=("x",)), seed=0)
    assert {example.context[0] for split in task.splits.values() for example in split} == {"a"}
    assert hub.asked == [None, FIRST]


def test_a_cache_of_another_commit_is_refused_where_the_hub_can_not_be_reached(hub, config):
    hub.head = SECOND
    load_tasks(config, seed=0)
    hub.is_reachable = False
    assert origins(load_tasks(config, seed=0)) == {"b"}, "without a wish, what is kept is as good as any"
    with pytest.raises(DataError, match=f"at revision {FIRST}.*the cache holds revision {SECOND}") as caught:
        load_tasks(config, seed=0, commits={("planted", NAME): FIRST})
    assert "\n" not in str(caught.value)


STREAMED = {"max_train_examples": 12, "max_validation_examples": 6, "max_test_examples": 6}


def test_a_stream_of_a_hub_is_pinned_too(hub, config, tmp_path, caplog):
    write_card(tmp_path / "planted.yaml", "streaming: true\n")
    config = config.model_copy(update=STREAMED)
    tasks = load_tasks(config, seed=0)
    assert tasks.tasks[0].card.dataset_kwargs == {"revision": FIRST} and not caplog.text
    hub.head = SECOND
    again = load_tasks(config, seed=0, commits={("planted", NAME): FIRST})
    assert origins(again) == {"a"} and again.fingerprint == tasks.fingerprint
    assert hub.asked == [None, FIRST]
    assert origins(load_tasks(config, seed=0)) == {"b"}, "a new run takes what is there now"
    hub.is_reachable = False
    with pytest.raises(DataError, match=f"at revision {FIRST}.*the cache holds revision {SECOND}"):
        load_tasks(config, seed=0, commits={("planted", NAME): FIRST})


def test_splits_of_a_stream_are_of_one_commit_though_the_hub_moves_in_between(hub):
    hub.moves = True
    card = card_of(validation_split="validation", streaming=True)
    task = load_task(card, DataConfig(tasks=("x",), **STREAMED), seed=0)
    assert {example.context[0] for split in task.splits.values() for example in split} == {"a"}
    assert hub.asked == [None, FIRST]


def test_a_stream_of_no_known_commit_is_told(hub, config, tmp_path, caplog):
    hub.tells = False
    write_card(tmp_path / "planted.yaml", "streaming: true\n")
    (task,) = load_tasks(config.model_copy(update=STREAMED), seed=0).tasks
    assert "revision" not in task.card.dataset_kwargs
    assert f"dataset '{NAME}', split 'train': of no known commit" in caplog.text


def test_a_commit_that_is_gone_is_named(hub, config):
    with pytest.raises(DataError, match=f"{NAME}' at revision {'c' * 40}.*doesn't exist"):
        load_tasks(config, seed=0, commits={("planted", NAME): "c" * 40})


@pytest.mark.parametrize(("revision", "origin"), [(SECOND, "b"), ("main", "a")])
def test_a_cards_own_revision_counts_and_is_told_where_it_is_another(revision, origin, hub, config, tmp_path, caplog):
    write_card(tmp_path / "planted.yaml", f"dataset_kwargs: {{revision: {revision}}}\n")
    with caplog.at_level(logging.WARNING):
        tasks = load_tasks(config, seed=0, commits={("planted", NAME): FIRST})
    assert origins(tasks) == {origin} and tasks.tasks[0].card.dataset_kwargs == {"revision": revision}
    assert f"task 'planted': now revision {revision} of dataset {NAME}, before {FIRST}" in caplog.text


def test_cards_of_files_name_no_commit(tmp_path):
    folder = tmp_path / FIRST
    folder.mkdir()
    write_rows(folder / "toy.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(40)])
    (task,) = load_tasks(DataConfig(tasks=(str(folder / "toy.jsonl"),)), seed=0).tasks
    assert "revision" not in task.card.dataset_kwargs


@pytest.mark.slow
def test_a_run_goes_on_with_the_rows_it_was_begun_with(hub, tmp_path):
    recipe = copy_run(tmp_path / "home")
    write_card(tmp_path / "planted.yaml")
    changes = {"data": {"tasks": [str(tmp_path / "planted.yaml")]}, "grouping": {"n_groups": "auto"}}
    here, there = ({"out": str(tmp_path / name / "run")} for name in ("here", "there"))
    pipeline.run(read_config(recipe, **changes, **here), until="train")
    assert pinned_commits(tmp_path / "here" / "run") == {("planted", NAME): FIRST}
    hub.head = SECOND
    trained = tensors_of(tmp_path / "here")
    pipeline.run(read_config(recipe, **changes, **here))
    pipeline.run(read_config(recipe, **changes, **there), until="train")
    assert {name: tensors_of(tmp_path / "here")[name] for name in trained} == trained
    assert tensors_of(tmp_path / "there") != trained, "another folder takes what the hub has now"
    assert pinned_commits(tmp_path / "there" / "run") == {("planted", NAME): SECOND}
    hub.is_reachable = False
    for commit in (SECOND, FIRST):
        assert (hub.folder / commit).exists()
    with pytest.raises(DataError, match=f"the cache holds revision {SECOND}"):
        pipeline.run(read_config(recipe, **changes, **here))
    assert artifacts.read_json(tmp_path / "here" / "run" / "results.json")["methods"]
