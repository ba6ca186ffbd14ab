"""Cards, examples and task sets as values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ensemblelora.data.task import Example, Overlap, Task, TaskCard, TaskSet
from tests.toys import make_card, make_task


@pytest.mark.parametrize("name", ["a", "wic", "demo_arc-easy.v2", "9lives", "a" * 64])
def test_good_names(name: str) -> None:
    assert make_card(task=name).task == name


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "../up", "a\\b", "a b", "-x", "a.", "a\n", "ä", "a" * 65])
def test_names_that_could_be_paths_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="a task's name"):
        make_card(task=name)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"doc_to_choice": None}, "doc_to_choice belongs to output_type multiple_choice"),
        ({"output_type": "generate_until"}, "doc_to_choice belongs to output_type multiple_choice"),
        ({"output_type": "loglikelihood_rolling"}, "output_type"),
        ({"output_type": "loglikelihood", "doc_to_choice": None, "scoring": "options"}, "scoring and head belong"),
        ({"head": "sequence_classification", "scoring": "options"}, "class names, and no scoring"),
        ({"head": "sequence_classification", "doc_to_choice": "endings"}, "class names, and no scoring"),
        ({"validation_split": "train"}, "must differ"),
        ({"validation_split": "dev", "test_split": "dev"}, "must differ"),
        ({"doc_to_choice": [False, True]}, "quotes around it"),
        ({"doc_to_choice": {"a": 1}}, "quotes around it"),
        ({"num_fewshot": 5}, "num_fewshot"),
    ],
)
def test_wrong_cards_say_why(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_card(**keys)


def test_a_card_can_not_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_card().task = "other"  # type: ignore[misc]


def test_a_card_survives_writing_and_reading() -> None:
    card = make_card(group="text", metadata={"version": 1.0})
    assert TaskCard.model_validate(card.model_dump(mode="json")) == card


def test_of_keeps_order_and_the_overlaps_among_the_chosen() -> None:
    inside = Overlap("group", ("a", "train"), ("b", "test"), 1, ("train:0", "test:0"))
    across = Overlap("group", ("a", "train"), ("c", "test"), 1, ("train:0", "test:0"))
    tasks = TaskSet(tuple(make_task(name) for name in "abc"), (inside, across))
    chosen = tasks.of([1, 0])
    assert chosen.names == ("b", "a")
    assert chosen.overlaps == (inside,)


@pytest.mark.parametrize("field", ["id", "context", "choices", "label", "group"])
def test_the_fingerprint_sees_every_field(field: str) -> None:
    task = make_task()
    first = task.splits["test"][0]
    other = {"id": "x", "context": "x", "choices": (" no", " maybe"), "label": 1, "group": "x"}[field]
    changed = {**task.splits, "test": [replace(first, **{field: other}), *task.splits["test"][1:]]}
    assert Task(task.card, changed).fingerprint != task.fingerprint


def test_the_fingerprint_sees_order_split_and_scoring_but_not_where_data_lies() -> None:
    task = make_task()
    swapped = Task(task.card, {**task.splits, "train": task.splits["validation"], "validation": task.splits["train"]})
    scored = Task(make_card(scoring="options"), task.splits)
    moved = Task(make_card(dataset_path="elsewhere"), task.splits)
    assert len({task.fingerprint, swapped.fingerprint, scored.fingerprint}) == 3
    assert moved.fingerprint == make_task().fingerprint == task.fingerprint
    assert TaskSet((task, scored)).fingerprint != TaskSet((scored, task)).fingerprint


@given(st.text(max_size=6), st.text(min_size=1, max_size=6))
def test_the_fingerprint_sees_where_a_text_ends(context: str, choice: str) -> None:
    one = Example("0", context + choice[:1], (choice[1:], "b"), 0, "")
    two = Example("0", context, (choice, "b"), 0, "")
    tasks = [Task(make_card(), {"train": [e], "validation": [], "test": []}) for e in (one, two)]
    assert tasks[0].fingerprint != tasks[1].fingerprint
