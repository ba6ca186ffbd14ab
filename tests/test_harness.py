"""lm-evaluation-harness and this package: its cards run here, and it scores an ensemble to the same digits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lm_eval
import lm_eval.tasks
import numpy as np
import pytest
import yaml
from datasets import Dataset, DatasetDict

from ensemblelora.api import load_run
from ensemblelora.config import DataConfig
from ensemblelora.data.catalog import load_card
from ensemblelora.data.harness_keys import drop_report_keys, quote_functions
from ensemblelora.data.loading import load_task
from ensemblelora.errors import DataError, UsageError
from ensemblelora.harness import EnsembleModel, model
from tests.test_exporting import CLASSIFIED, make_run
from tests.tiny_run import TASKS, finished_run, read_json
from tests.toys import load_tokenizer

CARDS = Path(lm_eval.__file__).resolve().parent / "tasks"
SRC = Path(__file__).resolve().parent.parent / "src"


def make_boolq(n: int) -> dict[str, Any]:
    return {"passage": f"Passage {n}.", "question": f"is {n} odd", "label": n % 2}


def make_piqa(n: int) -> dict[str, Any]:
    return {"goal": f"Goal {n}", "sol1": f"do {n}", "sol2": f"undo {n}", "label": n % 2}


def make_arc(n: int) -> dict[str, Any]:
    choices = {"text": [f"first {n}", f"second {n}", f"third {n}"], "label": ["A", "B", "C"]}
    return {"question": f"Which, {n}?", "choices": choices, "answerKey": "ABC"[n % 3]}


SHIPPED = {
    "super_glue/boolq/default.yaml": (
        make_boolq, "Passage 4.\nQuestion: is 4 odd?\nAnswer:", (" no", " yes"), 0
    ),
    "piqa/piqa.yaml": (make_piqa, "Question: Goal 4\nAnswer:", (" do 4", " undo 4"), 0),
    "arc/arc_easy.yaml": (
        make_arc, "Question: Which, 4?\nAnswer:", (" first 4", " second 4", " third 4"), 1
    ),
}  # fmt: skip


FAMILIES = (
    "arc", "coqa", "commonsense_qa", "glue", "gsm8k", "hellaswag", "logiqa", "medmcqa", "nq_open", "openbookqa", "piqa",
    "race", "sciq", "siqa", "storycloze", "super_glue", "swag", "triviaqa", "winogrande",
)  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_the_harness_own_cards_run_unchanged_on_local_rows(name: str, tmp_path: Path) -> None:
    make, context, choices, label = SHIPPED[name]
    path = Path(shutil.copy(CARDS / name, tmp_path / "card.yaml"))
    values = yaml.safe_load(quote_functions(path.read_text(encoding="utf-8")))
    splits = {split: Dataset.from_list([make(n) for n in range(30)]) for split in ("train", "validation", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / values["dataset_path"])
    task = load_task(load_card(path), DataConfig(tasks=(name,)), seed=0)
    assert task.name == values["task"] and task.card.output_type == "multiple_choice"
    example = next(e for e in task.splits["validation"] if e.id.endswith(":4"))
    assert (example.context, example.choices, example.label) == (context, choices, label)


def test_each_card_of_many_families_is_taken_or_refused_in_a_line_that_says_why() -> None:
    taken = []
    for path in sorted(path for family in FAMILIES for path in (CARDS / family).rglob("[!_]*.yaml")):
        try:
            taken.append(load_card(path).task)
        except DataError as error:
            assert "\n" not in str(error) and str(path.parent) in str(error)
    assert {"arc_challenge", "sst2", "mrpc", "boolq", "cb", "multirc", "wic", "piqa", "sciq"} <= set(taken)
    assert len(taken) >= 20


def test_what_only_reports_is_passed_over_and_functions_are_refused(tmp_path: Path) -> None:
    card = load_card(CARDS / "super_glue" / "cb" / "default.yaml")
    assert card.doc_to_choice == ("True", "False", "Neither"), "its metric's function is none of our business"
    with pytest.raises(DataError, match=r"doc_to_text calls utils_logiqa\.doc_to_text.*can't call functions"):
        load_card(CARDS / "logiqa" / "logiqa.yaml")
    assert drop_report_keys({"task": "x", "num_fewshot": 0, "repeats": 3}, "card") == {"task": "x"}
    with pytest.raises(DataError, match="num_fewshot 5"):
        drop_report_keys({"num_fewshot": 5}, "card")
    plain = "doc_to_text: 'a: !function is a word'"
    assert yaml.safe_load(quote_functions(plain)) is not None


class FakeRun:
    """A run of one task with choices and one of free text; a choice's probability is its share of the letters."""

    path = Path("runs/fake")
    cards: ClassVar = {"choose": None, "write": None}
    kinds: ClassVar = {"choose": "options", "write": "sequence"}

    def score(self, task: str, examples: list[Any]) -> np.ndarray:
        width = max(len(example.choices) for example in examples)
        lengths = [[len(c) for c in e.choices] + [0] * (width - len(e.choices)) for e in examples]
        return np.array([np.array(row) / sum(row) for row in lengths])

    def write(self, task: str, examples: list[Any], *, max_new_tokens: int) -> list[str]:
        return [f"{example.context} {max_new_tokens}\nmore" for example in examples]


def make_request(task: str, doc: int, *arguments: Any) -> Any:
    return SimpleNamespace(task_name=task, doc_id=doc, args=arguments)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> EnsembleModel:
    monkeypatch.setattr(model, "load_run", lambda path: FakeRun())
    return EnsembleModel("runs/fake")


def test_requests_of_a_question_are_put_together_whatever_their_order(fake: EnsembleModel) -> None:
    requests = [make_request("choose", d, f"c{d}", choice) for d, choice in ((0, " a"), (1, " yes"), (0, " abc"))]
    requests += [make_request("choose", 1, "c1", " no"), make_request("choose", 1, "c1", " maybe")]
    found = fake.loglikelihood(requests)
    expected = [2 / 6, 4 / 13, 4 / 6, 3 / 13, 6 / 13]
    assert [value for value, _ in found] == pytest.approx(np.log(expected))
    again = fake.loglikelihood(requests[::-1])[::-1]
    assert again == found


def test_answers_stop_where_they_are_told_to(fake: EnsembleModel) -> None:
    stop = {"until": ["\n"], "max_gen_toks": 7}
    requests = [
        make_request("write", 0, "one", stop),
        make_request("write", 1, "two", {}),
        make_request("write", 2, "x", stop),
    ]
    assert fake.generate_until(requests) == ["one 7", "two 256\nmore", "x 7"]


def test_what_an_ensemble_can_not_do_is_refused(fake: EnsembleModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="perplexity"):
        fake.loglikelihood_rolling([])
    with pytest.raises(UsageError, match="likelihood of one text"):
        fake.loglikelihood([make_request("choose", 0, "c", " a")])
    with pytest.raises(UsageError, match="choices among contexts"):
        fake.loglikelihood([make_request("choose", 0, "c", " a"), make_request("choose", 0, "", " a")])
    with pytest.raises(UsageError, match="add task=NAME"):
        fake.loglikelihood([make_request("other", 0, "c", " a"), make_request("other", 0, "c", " b")])
    with pytest.raises(UsageError, match="free text"):
        fake.generate_until([make_request("choose", 0, "c", {})])
    with pytest.raises(UsageError, match="do_sample"):
        fake.generate_until([make_request("write", 0, "c", {"do_sample": True})])
    named = EnsembleModel("runs/fake", task="choose")
    pair = [make_request("other", 0, "c", " a"), make_request("other", 0, "c", " bcd")]
    assert len(named.loglikelihood(pair)) == 2, "the task was named"
    with pytest.raises(UsageError, match="not in"):
        EnsembleModel("runs/fake", task="nobody")


def write_harness_card(task: str, folder: Path, home: Path | None = None) -> None:
    """The card of a test run's task as the harness has it: absolute paths, its own keys, its metrics."""
    entries = read_json(home or finished_run(), "tasks.json")["tasks"]
    entry = next(e for e in entries if e["card"]["task"] == task)["card"]
    keys = ("task", "dataset_path", "dataset_kwargs", "training_split", "validation_split", "test_split", "output_type")
    card = {key: entry[key] for key in (*keys, "doc_to_text", "doc_to_target", "doc_to_choice") if entry.get(key)}
    metric = "acc" if entry["output_type"] == "multiple_choice" else "exact_match"
    card["metric_list"] = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]
    if metric == "exact_match":
        longest = max(count_answer_tokens(Path(card["dataset_kwargs"]["data_files"]["test"])))
        card["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": longest, "do_sample": False}
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")


def count_answer_tokens(file: Path) -> list[int]:
    """Tokens of each row's answer and the end behind it: as long as the run lets its own answers be."""
    labels = [json.loads(line)["label"] for line in file.read_text(encoding="utf-8").splitlines()]
    tokenizer = load_tokenizer()
    return [len(tokenizer(f" {label}", add_special_tokens=False)["input_ids"]) + 1 for label in labels]


@pytest.mark.slow
def test_the_harness_finds_the_accuracy_that_the_run_found(tmp_path: Path) -> None:
    cards = tmp_path / "cards"
    cards.mkdir()
    for task in TASKS:
        write_harness_card(task, cards)
    command = [sys.executable, "-m", "ensemblelora.harness", "--model", "ensemblelora"]
    command += ["--model_args", f"run={finished_run() / 'run'}", "--tasks", ",".join(TASKS)]
    command += ["--include_path", str(cards), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(SRC)}, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text(encoding="utf-8"))["results"]
    own = read_json(finished_run(), "results.json")["methods"]["ensemble"]["per_task"]
    for task in TASKS:
        theirs = found[task]["exact_match,none" if own[task]["kind"] == "sequence" else "acc,none"]
        assert theirs == own[task]["accuracy"], task


@pytest.mark.slow
def test_a_classifier_head_agrees_too_asked_from_python(tmp_path: Path) -> None:
    run = make_run(tmp_path / "home", head="sequence_classification")
    (cards := tmp_path / "cards").mkdir()
    for task in CLASSIFIED:
        write_harness_card(task, cards, tmp_path / "home")
    found = lm_eval.simple_evaluate(
        model="ensemblelora",
        model_args=f"run={run}",
        tasks=list(CLASSIFIED),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(cards), include_defaults=False),
        bootstrap_iters=0,
    )
    for task in CLASSIFIED:
        lines = (tmp_path / "home" / "tasks" / f"{task}.test.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        own = [a.label == row["label"] for a, row in zip(load_run(run).predict(task, rows), rows, strict=True)]
        assert found["results"][task]["acc,none"] == sum(own) / len(own), task
