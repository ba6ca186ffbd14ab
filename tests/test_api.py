"""A finished run in use: predictions that agree with its results, and the oracle's answers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ensemblelora
from ensemblelora import pipeline
from ensemblelora.api import Run, load_run
from ensemblelora.data.task import Example, TaskCard
from ensemblelora.errors import DataError, OutputError, StoreError, UsageError
from ensemblelora.estimation import TaskFeatures, build_oracle
from ensemblelora.stages import read_oracle
from ensemblelora.store import FeatureStore
from tests.tiny_run import TASKS, copy_run, finished_run, make_inputs, read_config, read_json

CHOICES = TASKS[:4]


@cache
def loaded() -> Run:
    """The finished run, its model loaded once."""
    return load_run(finished_run() / "run")


def read_rows(task: str, split: str = "test") -> list[dict[str, str]]:
    lines = (finished_run() / "tasks" / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("task", CHOICES)
def test_predictions_give_the_table_back(task):
    rows = read_rows(task)
    found = loaded().predict(task, [{"text": row["text"]} for row in rows])
    expected = read_json(finished_run(), "results.json")["methods"]["ensemble"]["per_task"][task]
    gold = [prediction.probabilities[row["label"]] for prediction, row in zip(found, rows, strict=True)]
    assert -np.log(gold).mean() == pytest.approx(expected["nll"], rel=1e-4)
    right = [prediction.label == row["label"] for prediction, row in zip(found, rows, strict=True)]
    assert np.mean(right) == pytest.approx(expected["accuracy"])
    for prediction in found:
        assert sum(prediction.probabilities.values()) == pytest.approx(1.0)
        assert prediction.label == max(prediction.probabilities, key=prediction.probabilities.get)
        assert sum(prediction.groups.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("a text", r"got one text, expected a list of rows; put it in brackets: \[row\]"),
        ({"text": "a text"}, "got one mapping, expected a list of rows"),
        ([""], "text 1 of 1 is empty; give the text to answer"),
        (["a text", " \n"], "text 2 of 2 is empty"),
    ],
)
@pytest.mark.parametrize("task", [TASKS[0], "written"])
def test_what_is_no_list_of_texts_is_refused_and_not_answered_letter_by_letter(task, rows, told):
    with pytest.raises(UsageError, match=f"task '{task}': {told}"):
        loaded().predict(task, rows)


def test_free_text_is_generated():
    rows = read_rows("written")
    found = loaded().predict("written", [{"text": row["text"]} for row in rows])
    matches = [prediction.label == row["label"] for prediction, row in zip(found, rows, strict=True)]
    expected = read_json(finished_run(), "results.json")["methods"]["ensemble"]["per_task"]["written"]
    assert np.mean(matches) == pytest.approx(expected["accuracy"])
    assert all(prediction.probabilities is None for prediction in found)


@pytest.mark.parametrize("task", [CHOICES[0], CHOICES[3], "written"])
def test_a_plain_text_stands_for_the_one_column_and_rows_do_not_meet(task):
    texts = [row["text"] for row in read_rows(task)[:3]]
    together = loaded().predict(task, [{"text": text} for text in texts])
    alone = [loaded().predict(task, [text])[0] for text in texts]
    assert [prediction.label for prediction in together] == [prediction.label for prediction in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.probabilities is None or one.probabilities == pytest.approx(other.probabilities, rel=1e-4)


def test_no_question_no_answer():
    assert loaded().predict(CHOICES[0], []) == []


def test_unknown_tasks_and_columns_are_named():
    with pytest.raises(UsageError, match="task 'nothing': not in this run; its tasks are family0_task0"):
        loaded().predict("nothing", ["text"])
    with pytest.raises(UsageError, match="task 'nothing': not in this run"):
        loaded().ask(["nothing"])
    with pytest.raises(DataError, match="row 1 of 1: doc_to_text: unknown column 'text'"):
        loaded().predict(CHOICES[0], [{"words": "fire"}])


def make_column_run() -> Run:
    """The finished run with one card changed: two columns, and choices of the row's own."""
    card = (
        loaded()
        .cards[CHOICES[0]]
        .model_copy(
            update={"doc_to_text": "{{a}} and {{b}}:", "doc_to_choice": "options", "length_normalization": "bytes"}
        )
    )
    return replace(loaded(), cards={card.task: card}, kinds={card.task: "options"})


def test_a_plain_text_is_not_enough_for_several_columns():
    with pytest.raises(DataError, match=r"made of the columns a, b, options; give a JSON object with these: \{"):
        make_column_run().predict(CHOICES[0], ["text"])


def test_a_text_that_is_a_json_object_stands_for_several_columns(monkeypatch):
    run = make_column_run()
    row = {"a": "fire", "b": "water", "options": ["it is so", "it is not so"]}
    (asked,) = run.predict(CHOICES[0], [row])
    (found,) = run.predict(CHOICES[0], [json.dumps(row)])
    assert found.probabilities == pytest.approx(asked.probabilities)
    routed: list[Any] = []
    monkeypatch.setattr(Run, "_route", lambda self, texts: routed.extend(texts) or [])
    run.predict(None, [json.dumps(row)])
    assert routed == [["fire\nwater"]], "without a task's name, too"
    # A task of one column reads it as the text that it is.
    assert loaded().predict(CHOICES[0], ['{"a": 1}'])[0].task == CHOICES[0]


@pytest.mark.parametrize("kind", ["options", "verbalizer"])
def test_rows_are_scored_as_the_task_was_and_not_as_they_look(kind):
    # The kind was decided on all rows of the task; the label tokens of a few new rows could suggest another.
    run = replace(loaded(), kinds={CHOICES[0]: kind})
    run.__dict__["_model"] = loaded()._model
    example = Example("0", "Words: fire\nAnswer:", (" no", " yes"), 0, "0")
    assert run._encode(CHOICES[0], [example], max_length=64).kind == kind


def test_a_row_may_bring_its_own_choices_and_equal_ones_add_up():
    run = make_column_run()
    run.__dict__["_model"] = loaded()._model
    row = {"a": "fire", "b": "ice", "options": ["no", "yes"]}
    assert set(run.predict(CHOICES[0], [row])[0].probabilities) == {"no", "yes"}
    repeated = run.predict(CHOICES[0], [row | {"options": ["no", "yes", "no"]}])[0].probabilities
    assert sum(repeated.values()) == pytest.approx(1.0) and set(repeated) == {"no", "yes"}


def test_long_contexts_lose_their_beginning_before_an_answer_is_generated():
    run = loaded()
    length = run.config.data.max_length
    text = "fire and ice again " * length
    example = Example("0", text, (" a",), 0, "0")
    split = run._encode("written", [example], max_length=length - 64)
    assert split.n_truncated == 1 and split.answer_starts[0] <= length - 64
    assert run.predict("written", [text])


def test_the_oracle_answers_as_it_answered_the_run():
    folder, names = finished_run() / "run", list(TASKS)
    oracle = read_oracle(folder, names, loaded().config.estimation)
    for subset in ((0, 2), (4,), (0, 1, 2, 3, 4)):
        scores = oracle.score([subset])
        answer = loaded().ask([names[task] for task in subset])
        assert list(answer) == names
        for task, name in enumerate(names):
            assert answer[name]["nll"] == pytest.approx(scores.nll[0, task], rel=1e-12)
            assert answer[name]["is_in_subset"] == (task in subset)
    plan = read_json(finished_run(), "plan.json")
    assert oracle.l2_penalty == plan["l2_penalty"]


def test_reading_the_oracle_back_is_choosing_it_again():
    store = FeatureStore(finished_run() / "run" / "features")
    features = TaskFeatures(*(tuple(store.read(name, split) for name in TASKS) for split in ("train", "validation")))
    config = loaded().config.estimation
    read = read_oracle(finished_run() / "run", TASKS, config)
    made = build_oracle([features], config, budget=read.budget)
    assert read.budget is not None and made.config.method == "steps"
    np.testing.assert_array_equal(read.score([(1, 3)]).nll, made.score([(1, 3)]).nll)


def test_an_accuracy_of_few_rows_keeps_a_width():
    answer = loaded().ask([TASKS[0]])
    for task in TASKS[:4]:
        entry = answer[task]
        assert entry["n_validation"] == 12
        assert 0 <= entry["accuracy_low"] <= entry["accuracy"] <= entry["accuracy_high"] <= 1
        assert entry["accuracy_high"] - entry["accuracy_low"] > 0.2
    assert answer["written"]["accuracy_low"] is None and answer["written"]["n_validation"] == 12


def test_no_task_asks_about_the_base_model():
    base = read_json(finished_run(), "plan.json")["predicted"]["base"]
    answer = loaded().ask([])
    assert [entry["nll"] for entry in answer.values()] == pytest.approx(base["nll"])
    assert not any(entry["is_in_subset"] for entry in answer.values())
    assert answer["written"]["accuracy"] is None, "free text has no accuracy, and NaN is no answer"
    assert loaded().ask([TASKS[0], TASKS[0]]) == loaded().ask([TASKS[0]])


def test_plan_and_results_are_those_of_the_folder():
    assert loaded().plan == read_json(finished_run(), "plan.json")
    assert loaded().results == read_json(finished_run(), "results.json")
    assert ensemblelora.load_run is load_run


def test_doubts_are_of_tasks_that_nothing_is_above_chance_on(tmp_path):
    copy_run(tmp_path)
    run = load_run(tmp_path / "run")
    scores = {name: [one["per_task"][name] for one in run.results["methods"].values()] for name in TASKS}
    tested = [name for name in TASKS if any(one.get("is_above_chance") is not None for one in scores[name])]
    doubtful = [name for name in tested if not any(one["is_above_chance"] for one in scores[name])]
    assert doubtful and len(doubtful) < len(TASKS), "both kinds are in it"
    told = " ".join(run.list_doubts(TASKS))
    assert all((name in told) == (name in doubtful) for name in TASKS)
    assert run.list_doubts([name for name in TASKS if name not in doubtful]) == []
    for name in (doubtful[0], next(name for name in TASKS if name not in doubtful)):
        [answer] = run.predict(name, ["x"])
        assert answer.doubt in (("at chance", "too few rows") if name in doubtful else (None,))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{", encoding="utf-8")])
def test_predictions_need_no_test_results(tmp_path, damage):
    copy_run(tmp_path)
    damage(tmp_path / "run" / "results.json")
    run = load_run(tmp_path / "run")
    assert run.list_doubts(TASKS) == [], "nothing is known of a run that was not tested"
    assert [answer.doubt for answer in run.predict(TASKS[0], ["x"])] == [None]


def test_what_is_not_there_yet_is_said_with_the_command_that_makes_it(tmp_path):
    recipe = copy_run(tmp_path)
    with pytest.raises(OutputError, match="not a run folder"):
        load_run(tmp_path / "tasks")
    run = load_run(tmp_path / "run")
    # Another affinity makes another plan; everything after it is gone until it is made again.
    pipeline.run(read_config(recipe, affinity={"row_scale": "sd"}), until="affinity")
    assert run.ask([TASKS[0]])[TASKS[0]]["nll"] > 0
    for call, stage in (
        (lambda: run.plan, "plan"),
        (lambda: run.predict(TASKS[0], ["x"]), "run"),
        (lambda: run.results, "run"),
    ):
        kept = f"use the finished run that was set aside: give {tmp_path / 'run' / 'earlier' / '1'}$"
        with pytest.raises(UsageError, match=f"make it with: ensemblelora {stage} {tmp_path / 'run'} .*{kept}"):
            call()
    (tmp_path / "run" / "oracle.json").unlink()
    with pytest.raises(UsageError, match="no plan yet; make it with: ensemblelora plan "):
        load_run(tmp_path / "run").ask([TASKS[0]])
    (tmp_path / "run" / "tasks.json").unlink()
    with pytest.raises(UsageError, match="nothing was done yet; start with: ensemblelora run"):
        load_run(tmp_path / "run")


def test_another_model_than_the_run_was_made_with_is_refused(tmp_path):
    copy_run(tmp_path)
    environment = read_json(tmp_path, "environment.json")
    environment["model"]["fingerprint"] = "another"
    (tmp_path / "run" / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    with pytest.raises(UsageError, match="made with another version of"):
        load_run(tmp_path / "run").predict(TASKS[0], ["x"])


@pytest.mark.parametrize("name", ["tasks.json", "oracle.json"])
def test_damaged_files_are_named(tmp_path, name):
    copy_run(tmp_path)
    (tmp_path / "run" / name).write_text('{"tasks": [{}]}', encoding="utf-8")
    with pytest.raises(StoreError, match=name):
        load_run(tmp_path / "run").ask([])


def make_classification_recipe(folder: Path) -> Path:
    """Two of the tiny tasks with a classification head."""
    recipe = make_inputs(folder)
    for path in (folder / "tasks").glob("*.yaml"):
        if path.stem not in (TASKS[0], TASKS[2]):
            path.unlink()
        else:
            path.write_text(path.read_text(encoding="utf-8") + "head: sequence_classification\n", encoding="utf-8")
    return recipe


def test_a_run_with_a_classification_head_predicts_what_it_reports(tmp_path):
    recipe = make_classification_recipe(tmp_path)
    result = pipeline.run(read_config(recipe, training={"num_train_epochs": 1}))
    run = load_run(tmp_path / "run")
    for task in (TASKS[0], TASKS[2]):
        assert isinstance(run.cards[task], TaskCard) and run.kinds[task] == "classification"
        rows = read_rows(task)
        found = run.predict(task, [row["text"] for row in rows])
        gold = [prediction.probabilities[row["label"]] for prediction, row in zip(found, rows, strict=True)]
        expected = result.results["methods"]["ensemble"]["per_task"][task]["nll"]
        assert -np.log(gold).mean() == pytest.approx(expected, rel=1e-4)
    shutil.rmtree(tmp_path / "run")
