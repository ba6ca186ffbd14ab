"""A corpus of bad requests: each gives one line that says what is wrong, or a right result, and leaves nothing behind.

All run in one process through the functions that every command calls before it makes a run folder.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ensemblelora.config import DataConfig, RunConfig, load_config, parse_config
from ensemblelora.data.encoding import encode_split
from ensemblelora.data.loading import load_card, load_tasks, render_inputs
from ensemblelora.data.rendering import compile_card
from ensemblelora.data.task import SPLITS, Example, Task
from ensemblelora.errors import ConfigError, DataError, EnsembleLoraError, MissingExtraError
from ensemblelora.questions import read_questions
from tests.test_security import BAD_YAML, BOMB
from tests.toys import load_tokenizer, make_card

# pandas leaves a file that it can't decode open until it is collected, which is no fault of the corpus.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. <_io\.FileIO name=.*\.[ct]sv:pytest.PytestUnraisableExceptionWarning"
)
LONGEST_LINE = 4000


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "corpus-cache")
    yield


def assert_one_line(error: BaseException) -> str:
    told = str(error)
    assert told and "\n" not in told and "Traceback" not in told, repr(told)
    assert len(told) < LONGEST_LINE, f"{len(told)} characters: {told[:200]}"
    return told


# Recipes

SETTINGS: dict[str, list[Any]] = {
    "seed": [-1, 1.5, "x", None, [1], "0x", {"a": 1}, "1e3000"],
    "out": [None, 3, ["a"], {"a": "b"}],
    "compat": ["papers", None, 1],
    "data": [
        None,
        [],
        "boolq",
        3,
        {},
        {"tasks": []},
        {"tasks": None},
        {"tasks": "boolq"},
        {"tasks": [None]},
        {"task": 1},
    ],
    "data.max_train_examples": [0, -5, 1.5, "many", math.nan],
    "data.validation_fraction": [0, 1, -0.1, 1.1, "half", math.nan, math.inf, None],
    "data.max_length": [0, -1, "long", None, 1e300, math.nan],
    "data.overlap": ["ignore", True, 0],
    "model": [None, "smollm2-135m", []],
    "model.name": [None, 3, ["a"]],
    "model.dtype": ["int8", "float64", 16],
    "model.quantization": ["int4", True],
    "model.prefix_cache_gb": [-1, "all", math.nan, math.inf],
    "model.trust_remote_code": [True, False],
    "adapter.r": [0, -8, 1.5, "eight", None, math.inf],
    "adapter.lora_alpha": [0, -1, math.nan, math.inf],
    "adapter.lora_dropout": [1, -0.1, 2, math.nan],
    "adapter.method": ["full", None, 1],
    "adapter.layers_to_transform": [[-1], "bottom", [1.5]],
    "gradients.proj_dim": [0, -1, 10**9, 1.5, "all"],
    "gradients.proj_type": ["dense", None],
    "gradients.n_projections": [0, -1, 1.5],
    "gradients.train_fraction": [0, 1.5, -1, math.nan],
    "estimation.method": ["lasso", 1],
    "estimation.l2_penalty": [-1, math.nan, math.inf, "some"],
    "estimation.l2_grid": ["auto", [math.nan], [math.inf], [None]],
    "estimation.max_iter": [0, -1],
    "estimation.tolerance": [0, -1, math.nan, math.inf],
    "affinity.subset_size": [0, -3, 2.5],
    "affinity.n_subsets": [0, -200],
    "affinity.score": ["f1", None],
    "grouping.n_groups": [1.5, "all", None],
    "grouping.threshold": [0, math.nan, math.inf],
    "grouping.groups": [3, "a", [1], [[1]], [[]]],
    "grouping.must_link": ["a", [["a"]], [[]]],
    "grouping.max_latency_ratio": [0, math.nan, math.inf],
    "training.learning_rate": [0, -1e-4, math.nan, math.inf, "fast", None],
    "training.num_train_epochs": [0, -1, 1.5],
    "training.max_grad_norm": [0, -1, math.nan],
    "training.warmup_ratio": [1, -0.5, math.nan],
    "training.lr": [1e-4],
    "boosting.n_rounds": [-1, 0.5],
    "boosting.boosting_rate": [0, -1, math.nan, math.inf],
    "ensemble.min_weight": [0.5, -1, math.nan],
    "ensemble.own_group_prior": [0, 1.1, math.nan],
    "ensemble.kl_penalty": [-1, math.nan, math.inf],
    "evaluation.n_bootstrap": [0, 99, -1],
    "evaluation.confidence": [0.5, 1, 95, math.nan],
    "evaluation.baselines": [["mine"], "base", [None]],
    "evaluation": [[], "all", 3],
    "trainning": [{}],
    "": [1],
}
BAD_SETTINGS = [(key, value) for key, values in SETTINGS.items() for value in values]


@pytest.mark.parametrize(("key", "value"), BAD_SETTINGS, ids=[f"{key}={value}" for key, value in BAD_SETTINGS])
def test_a_wrong_value_of_a_recipe_is_named_with_its_key(key, value):
    recipe: dict[str, Any] = {"data": {"tasks": ["a"]}}
    section, _, name = key.rpartition(".")
    if section:
        recipe.setdefault(section, {})[name] = value
    else:
        recipe[name] = value
    with pytest.raises(ConfigError) as caught:
        parse_config(recipe)
    assert key.partition(".")[0] in assert_one_line(caught.value)


RECIPES = {
    "empty": b"",
    "a list": b"- a",
    "a word": b"hello",
    "a number": b"3",
    "no utf-8": b"data: {tasks: [\xff\xfe]}",
    "utf-16": "data: {tasks: [a]}".encode("utf-16"),
    "zero bytes": bytes(200),
    "keys that are no text": b"1: 2\n3.5: 4\n",
    "a date as key": b"2020-01-01: x",
    "a key of null": b"null: x\ndata: {tasks: [a]}",
    "a tag": b"!!python/name:os.system",
    "a tag of its own": b"data: !mine {tasks: [a]}",
    "broken flow": b"data: {tasks: [a}",
    "broken indent": b"data:\n  tasks: [a]\n model: x",
    "an alias to nothing": b"data: *nowhere",
    "twice": b"data: {tasks: [a]}\ndata: {tasks: [b]}",
    "a binary value": b"data: {tasks: [!!binary aGVsbG8=]}",
    "a set": b"data: {tasks: !!set {a, b}}",
    "1,000 unknown keys": "\n".join(f"key{i}: 1" for i in range(1000)).encode(),
    "a long unknown key": b"x" * 1000 + b": 1",
    "a long value": b"seed: " + b"y" * 100_000,
    "a deep value": b"data: {tasks: " + b"[" * 400 + b"]" * 400 + b"}",
    "html": b"<html><body>404</body></html>",
    "json with a comment": b'{"data": /* here */ {"tasks": ["a"]}}',
    "a shell's error": b"cat: recipe.yaml: No such file or directory",
    "merge of a word": b"<<: word",
    "control characters": b"data: {tasks: ['a\x07b']}",
    "a bomb": BOMB.encode(),
    "a bomb in a value": BOMB.encode() + b"data: {tasks: *a11}\n",
    "a bomb of merged keys": BAD_YAML["merged keys without end"][0].encode(),
    "an alias to itself": b"data: &a {tasks: [*a]}",
    "huge": b"data: {tasks: [" + b"aa, " * 2**18 + b"a]}",
    "one huge word": b"a" * (2**20 + 1),
    "deep without end": b"[" * 100_000,
    "a shorthand for another type": b"data: {tasks: [!!float a]}",
    "a pickled object": b"data: !!python/object:os.stat_result {}",
}


@pytest.mark.parametrize("content", RECIPES.values(), ids=RECIPES)
def test_a_file_that_is_no_recipe_is_told_in_one_line(content, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "recipe.yaml")
    assert "recipe.yaml" in assert_one_line(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


OVERRIDES = ["x", "=1", "a.b.c=1", "seed", "seed=[", "seed.deep=1", "data.tasks=", "data=3", "seed=a: b: c", ".=1",
             "seed=\x00", "seed=" + "9" * 5000, "training..learning_rate=1", "data.tasks=[*a]",
             "out=!!python/none"]  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: text[:20])
def test_a_wrong_override_is_told_in_one_line(override, tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {tasks: [a]}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "recipe.yaml", (override,))
    assert_one_line(caught.value)


# Cards

GOOD_CARD = {"task": "toy", "dataset_path": "json", "training_split": "train", "doc_to_text": "text"}
GOOD_CARD |= {"doc_to_choice": ["no", "yes"], "doc_to_target": "label", "output_type": "multiple_choice"}
CARD_KEYS: dict[str, list[Any]] = {
    "task": ["", " ", "a b", "../x", "/etc/passwd", "a/b", "a\\b", ".hidden", "-rf", "x" * 65, "a.", "tâche", "\uff54",
             "a\n",
             "a\u202ecod", "a\u200b", "😀", "a\x00b", None, 3, ["a"], "..", "~", "$HOME", "a;b"],
    "dataset_path": [None, 3, [], "/nowhere/at/all", "package:../x", "package:os.path/x", "${NOT_SET_ANYWHERE}/x",
                     "pandas"],
    "dataset_kwargs": [None, 3, "x", {"data_files": 3}, {"data_files": {}}, {"data_files": {"train": None}},
                       {"data_files": {"train": "nowhere.jsonl"}}, {"data_files": {"train": "/dev/null"}},
                       {"data_files": {"train": "../../../../../etc/passwd"}}, {"data_files": "x" * 5000 + ".jsonl"},
                       {"streaming": True}],
    "training_split": [None, 3, ["train"]],
    "validation_split": ["train", 3],
    "doc_to_text": [None, 3, "{{ text", "{{ nothing }}", "{% for %}", "{{ text | nofilter }}", "word", "{{ text.a.b }}",
                    "{% raise %}", "{{ 1 / 0 }}", "{{ text['x'] }}", "{{ text() }}", "{{ [][5] }}", "{{ 'a' + 1 }}"],
    "doc_to_choice": [[], ["a"], ["a", "a"], [True, False], [1, 2], [None, "a"], "text", "[", "{{ 3 }}", "{{ text }}",
                      "['a', 'b'", {"a": 1}, 3, ["a", ["b"]], "{{ [1] }}"],
    "doc_to_target": [None, [0], "nothing", "{{ 7 }}", "{{ -1 }}", "{{ 0.5 }}", "{{ [0, 1] }}", "{{ text }}", 5, -1,
                      1.5,
                      "{{ '9' * 5000 }}", "{{ none }}", "{{ label }}{{ label }}"],
    "output_type": ["regression", None, "loglikelihood"],
    "scoring": ["best", 1],
    "length_normalization": ["chars", True],
    "head": ["regression", None],
    "part": [[2, 2], [0], [-1, 2], [0, 0], "half", [5, 3]],
    "explode": ["a.b", 3, "text.x", ".", ""],
    "group": ["nothing", "{{ x }}", 3],
    "include": ["nowhere.yaml", "card.yaml", 3, "/etc/passwd"],
    "unknown": [1],
    "metadata": [3, "x"],
}  # fmt: skip
BAD_CARDS = [(key, value) for key, values in CARD_KEYS.items() for value in values]
LABELS_OF_ROWS = [{"text": f"t{i}", "label": ["no", "yes"][i % 2]} for i in range(12)]


@pytest.mark.parametrize(("key", "value"), BAD_CARDS, ids=[f"{k}={str(v)[:30]!r}" for k, v in BAD_CARDS])
def test_a_card_with_a_wrong_key_is_refused_in_one_line(key, value, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".cache")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LABELS_OF_ROWS), encoding="utf-8")
    card = {**GOOD_CARD, "dataset_kwargs": {"data_files": {"train": "rows.jsonl"}}, key: value}
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(card, allow_unicode=False), encoding="utf-8")
    columns = ("text", "label")
    with pytest.raises((DataError, MissingExtraError)) as caught:
        read = load_card(tmp_path / "card.yaml")
        if key in ("dataset_path", "dataset_kwargs"):
            load_tasks(DataConfig(tasks=(str(tmp_path / "card.yaml"),)), seed=0)
        elif key == "explode":
            render_inputs(read, LABELS_OF_ROWS[:1])
        for row in LABELS_OF_ROWS:
            compile_card(read, columns).example(row, "0")
            compile_card(read, columns).group(row)
    assert_one_line(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".cache") == ["card.yaml", "rows.jsonl"]


# Rows: values of any kind under a column that a card reads

VALUES: list[Any] = [None, math.nan, math.inf, 0.5, -1, 7, 2**70, [], ["no"], ["no", "yes"], {}, {"no": 1}, "", " ",
                     "maybe", "No", "no ", "\u200bno", "NO\x00", "0.5", "[0, 1]", "{[]: 1}", "2", "-1", "\u0667",
                     "\u00b2",
                     "1e400", "9" * 5000, "(" * 2000, "\ud800", b"no", "no\n", True, False, 1.0]  # fmt: skip
RIGHT = {"no": 0, "yes": 1, "0": 0, "1": 1, "True": 1, "False": 0, "\u0661": 1}


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:30])
def test_any_value_of_a_label_is_a_class_or_refused(value):
    for target in ("label", "{{ label }}"):
        try:
            example = compile_card(make_card(doc_to_target=target), ["text", "label"]).example(
                {"text": "a", "label": value}, "0"
            )
        except DataError as error:
            assert_one_line(error)
        else:
            assert example.choices[example.label].strip() in ("no", "yes")
            assert RIGHT[str(value).strip()] == example.label


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:30])
def test_any_value_of_choices_gives_choices_or_is_refused(value):
    card = make_card(doc_to_choice="options", doc_to_target=0)
    try:
        example = compile_card(card, ["text", "options"]).example({"text": "a", "options": value}, "0")
    except DataError as error:
        assert_one_line(error)
    else:
        assert len(example.choices) == 2 and all(isinstance(choice, str) for choice in example.choices)


# Files


def lines(rows: list[Any], **options: Any) -> bytes:
    return "".join(json.dumps(row, **options) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def table(rows: list[list[Any]], **dialect: Any) -> bytes:
    stream = io.StringIO()
    csv.writer(stream, **dialect).writerows(rows)
    return stream.getvalue().encode()


ROWS = [{"text": f"text {i}", "label": ["no", "yes"][i % 2]} for i in range(40)]
CELLS = [["text", "label"], *([row["text"], row["label"]] for row in ROWS)]
LONGER = [CELLS[0], *(["so", *cells] for cells in CELLS[1:])]
N_ROWS = len(ROWS)


def with_texts(write: Callable[[int], Any], **options: Any) -> bytes:
    """The same labels beside texts of another kind."""
    return lines([row | {"text": write(i)} for i, row in enumerate(ROWS)], **options)


FINE = {
    "a byte order mark": ("a.csv", b"\xef\xbb\xbf" + table(CELLS), N_ROWS),
    "windows' ends of lines": ("a.csv", table(CELLS, lineterminator="\r\n"), N_ROWS),
    "quotes around all": ("a.csv", table(CELLS, quoting=csv.QUOTE_ALL), N_ROWS),
    "lines within quotes": ("a.csv", table([CELLS[0], *([f"{t}\nmore, and \"so\"", y] for t, y in CELLS[1:])]), N_ROWS),
    "tabs": ("a.tsv", table(CELLS, delimiter="\t"), N_ROWS),
    "semicolons": ("a.csv", table(CELLS, delimiter=";"), N_ROWS),
    "tabs in a csv": ("a.csv", table(CELLS, delimiter="\t"), N_ROWS),
    "commas beside semicolons": ("a.csv", table([*CELLS[:-1], ["a; b", "yes"]]), N_ROWS),
    "no end of the last line": ("a.csv", table(CELLS).rstrip(), N_ROWS),
    "blank lines": ("a.csv", table(CELLS).replace(b"\r\n", b"\n\n"), N_ROWS),
    "text called NA": ("a.csv", table([*CELLS[:-5], *(["NA", label] for _, label in CELLS[-5:])]), N_ROWS),
    "numbers as text": ("a.csv", table([CELLS[0], *([i, y] for i, (_, y) in enumerate(CELLS[1:]))]), N_ROWS),
    "an enormous text": ("a.jsonl", lines([*ROWS[:-1], ROWS[-1] | {"text": "word " * 20_000}]), N_ROWS),
    "every kind of space": ("a.jsonl", with_texts(lambda i: f"\u00a0\u2028\x85\t{i}\u3000"), N_ROWS),
    "other scripts": ("a.jsonl", with_texts(lambda i: f"日本語 العربية 🎉 {i}", ensure_ascii=False), N_ROWS),
    "right to left marks": ("a.jsonl", with_texts(lambda i: f"\u202e{i}\u202c"), N_ROWS),
    "markup": ("a.jsonl", with_texts(lambda i: f"<script>alert({i})</script>{{{{ 7 * 7 }}}}"), N_ROWS),
    "a zero byte": ("a.jsonl", with_texts(lambda i: f"a\x00{i}"), N_ROWS),
    "columns in any order": ("a.jsonl", lines([dict(reversed(r.items())) for r in ROWS]), N_ROWS),
    "a column too many": ("a.jsonl", lines([r | {"more": {"deep": [1, {"x": None}]}} for r in ROWS]), N_ROWS),
    "all texts the same": ("a.jsonl", lines([*ROWS, *[r | {"text": "same"} for r in ROWS]]), 2 * N_ROWS),
}  # fmt: skip
FAULTY = {
    "nothing": ("a.csv", b"", "empty"),
    "spaces": ("a.csv", b"   \n\n", None),
    "a header alone": ("a.csv", b"text,label\n", "empty"),
    "no header": ("a.csv", table(CELLS[1:]), "expected columns"),
    "more cells than columns": ("a.csv", table([*CELLS, ["a", "b", "c", "d"]]), "can't be read"),
    "more cells than columns everywhere": ("a.csv", table(LONGER), "line 2 has 3"),
    "more tabs than columns": ("a.tsv", table(LONGER, delimiter="\t"), "'tab'"),
    "an open quote": ("a.csv", table(CELLS) + b'"never closed,no\n', None),
    "utf-16": ("a.csv", table(CELLS).decode().encode("utf-16"), None),
    "latin-1": ("a.csv", table([*CELLS, ["café", "no"]]).decode().encode("latin-1"), "save it as UTF-8"),
    "a picture": ("a.csv", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, None),
    "an archive": ("a.csv", b"PK\x03\x04" + bytes(range(256)) * 4, None),
    "zero bytes": ("a.csv", bytes(4096), None),
    "the same column twice": ("a.csv", table([["text", "text"], *CELLS[1:]]), "expected columns"),
    "one class": ("a.csv", table([CELLS[0], *([t, "no"] for t, _ in CELLS[1:])]), "only one class"),
    "labels all different": ("a.csv", table([CELLS[0], *([t, t] for t, _ in CELLS[1:])]), "too many to be classes"),
    "an empty label": ("a.csv", table([*CELLS, ["a", ""]]), "empty in row"),
    "numbers with decimals": ("a.csv", table([CELLS[0], *([row[0], 0.5] for row in CELLS[1:])]), "regression"),
    "two rows": ("a.csv", table(CELLS[:3]), "too few|too many"),
    "a list": ("a.json", b"[1, 2, 3]", "can't be read|expected columns"),
    "a record": ("a.json", b'{"text": "a", "label": "no"}', None),
    "a word": ("a.json", b'"hello"', "can't be read"),
    "broken json": ("a.jsonl", b'{"text": "a", "label": "no"}\n{"text": ', "can't be read"),
    "two objects a line": ("a.jsonl", b'{"text": "a"} {"label": "no"}\n', None),
    "json of python": ("a.jsonl", b"{'text': 'a', 'label': 'no'}\n", "can't be read"),
    "kinds that change": ("a.jsonl", lines([*ROWS, {"text": ["a"], "label": "no"}]), "can't be read|lists or records"),
    "labels of two kinds": ("a.jsonl", lines([*ROWS, {"text": "a", "label": 1}]), None),
    "nested labels": ("a.jsonl", lines([r | {"label": {"is": r["label"]}} for r in ROWS]), "lists|not supported"),
    "labels in lists": ("a.jsonl", lines([r | {"label": [r["label"]]} for r in ROWS]), "multi-label"),
    "no texts": ("a.jsonl", with_texts(lambda i: None), "missing"),
    "some texts missing": ("a.jsonl", lines([*ROWS, {"label": "no"}]), "missing"),
    "no labels": ("a.jsonl", lines([{"text": "a"}] * 9), "expected columns"),
    "half characters": ("a.jsonl", with_texts(lambda i: f"\ud800{i}"), None),
    "texts in lists": ("a.jsonl", with_texts(lambda i: [f"text {i}"]), "lists or records"),
    "deep json": ("a.jsonl", b'{"text": ' + b"[" * 600 + b"]" * 600 + b"}\n", None),
    "no parquet": ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "can't be read"),
    "a cut parquet": ("a.parquet", b"PAR1", "can't be read"),
    "a bad name": ("a b.csv", table(CELLS), "rename the file"),
    "a name with a trick": ("a\u202ebc.csv", table(CELLS), "rename the file"),
    "a name too long": ("a" * 80 + ".csv", table(CELLS), "rename the file"),
    "an unknown kind": ("a.xlsx", b"PK\x03\x04", "neither a shipped card nor a file"),
    "a pickle": ("a.pkl", b"\x80\x04N.", "neither a shipped card nor a file"),
    "choices without an answer": ("a.jsonl", lines([{"question": "q", "choices": ["a", "b"]}] * 9), "expected columns"),
    "one choice": ("a.jsonl", lines([{"question": "q", "choices": ["a"], "answer": "a"}] * 9), "two choices or more"),
    "no such choice": ("a.jsonl", lines([{"question": "q", "choices": ["a", "b"], "answer": "c"}] * 9), "no choice"),
    "empty answers": ("a.jsonl", lines([{"question": f"q{i}", "answer": ""} for i in range(40)]), "answer is empty"),
    "answers in lists": ("a.jsonl", lines([{"question": f"q{i}", "answer": ["a"]} for i in range(40)]), "a list"),
}  # fmt: skip


ODD = {
    "empty texts": ("a.jsonl", with_texts(lambda i: "")),
    "texts of spaces": ("a.jsonl", with_texts(lambda i: " " * i)),
    "a text of a book": ("a.jsonl", lines([*ROWS[:-1], ROWS[-1] | {"text": "word " * 60_000}])),
    "a text of one long word": ("a.jsonl", lines([*ROWS[:-1], ROWS[-1] | {"text": "a" * 100_000}])),
    "nulls in texts": ("a.jsonl", with_texts(lambda i: None if i % 7 == 0 else f"t{i}")),
    "a null in labels": ("a.jsonl", lines([*ROWS, {"text": "t", "label": None}])),
    "a zero byte in a cell": ("a.csv", table(CELLS).replace(b"text 3", b"te\x00xt 3")),
    "old ends of lines": ("a.csv", table(CELLS, lineterminator="\r")),
    "bars between cells": ("a.csv", table(CELLS, delimiter="|")),
    "quotes escaped by strokes": ("a.csv", table(CELLS, quoting=csv.QUOTE_ALL, escapechar="\\", doublequote=False)),
    "single quotes": ("a.csv", table(CELLS, quotechar="'", quoting=csv.QUOTE_ALL)),
    "spaces after commas": ("a.csv", table(CELLS).replace(b",", b", ")),
    "a header in capitals": ("a.csv", table([["Text", "Label"], *CELLS[1:]])),
    "a line that says the separator": ("a.csv", b"sep=,\n" + table(CELLS)),
    "fewer cells than columns": ("a.csv", table([*CELLS, ["alone"]])),
    "utf-32": ("a.csv", table(CELLS).decode().encode("utf-32")),
    "cp1252": ("a.csv", table([*CELLS, ["\u201cquoted\u201d", "no"]]).decode().encode("cp1252")),
    "shift-jis": ("a.csv", table([*CELLS, ["\u65e5\u672c", "no"]]).decode().encode("shift_jis")),
    "overlong utf-8": ("a.csv", table(CELLS).replace(b"text 3", b"te\xc0\xafxt 3")),
    "compressed": ("a.csv", gzip.compress(table(CELLS))),
    "jsonl with a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + lines(ROWS)),
    "jsonl with blank lines": ("a.jsonl", lines(ROWS).replace(b"\n", b"\n\n")),
    "jsonl with windows' ends of lines": ("a.jsonl", lines(ROWS).replace(b"\n", b"\r\n")),
    "jsonl with a comma at each end": ("a.jsonl", lines(ROWS).replace(b"\n", b",\n")),
    "a key twice": ("a.jsonl", lines(ROWS).replace(b'{"text"', b'{"label": "maybe", "text"')),
    "numbers that are none": ("a.jsonl", lines(ROWS).replace(b'"text 3"', b"NaN")),
    "huge numbers": ("a.jsonl", with_texts(lambda i: 10**30 + i)),
    "records in records": ("a.jsonl", with_texts(lambda i: {"deep": [{"deeper": [i]}]})),
    "columns that begin late": ("a.jsonl", lines([*ROWS, {"text": "t", "label": "no", "late": [[1]]}])),
    "a column of a thousand": ("a.jsonl", lines([row | {f"column {i}": i for i in range(1000)} for row in ROWS])),
    "tags of language": ("a.jsonl", with_texts(lambda i: "\U000e0041" * i + f"t{i}", ensure_ascii=False)),
    "combining marks without end": ("a.jsonl", with_texts(lambda i: f"t{i}" + "\u0301" * 3000, ensure_ascii=False)),
}  # fmt: skip


def load_rows(folder: Path, name: str, content: bytes) -> Task:
    """Load a file as the commands do, and encode its rows."""
    (folder / name).write_bytes(content)
    (task,) = load_tasks(DataConfig(tasks=(str(folder / name),)), seed=0).tasks
    for split in SPLITS:
        encode_split(task, split, load_tokenizer(), max_length=64)
    return task


@pytest.mark.parametrize(("name", "content", "n_rows"), FINE.values(), ids=FINE)
def test_a_strange_file_gives_all_of_its_rows(name, content, n_rows, tmp_path):
    task = load_rows(tmp_path, name, content)
    found = [example for split in SPLITS for example in task.splits[split]]
    assert len(found) == n_rows and {example.choices[example.label].strip() for example in found} == {"no", "yes"}
    for example in found:
        number = int(example.id.partition(":")[2])
        assert example.choices[example.label].strip() == ["no", "yes"][number % 2], "a label of another row"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("name", "content", "message"), FAULTY.values(), ids=FAULTY)
def test_a_faulty_file_is_refused_in_one_line(name, content, message, tmp_path, capfd):
    with pytest.raises(DataError, match=message) as caught:
        load_rows(tmp_path, name, content)
    assert_one_line(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "content"), ODD.values(), ids=ODD)
def test_an_odd_file_gives_right_labels_or_one_line(name, content, tmp_path, capfd):
    try:
        task = load_rows(tmp_path, name, content)
    except DataError as error:
        assert_one_line(error)
    else:
        for example in (example for split in SPLITS for example in task.splits[split]):
            number = int(example.id.partition(":")[2])
            assert example.choices[example.label].strip() == ["no", "yes"][number % 2], "a label of another row"
    assert [path.name for path in tmp_path.iterdir()] == [name] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shared", [1, 20])
def test_rows_that_two_splits_share_are_counted_or_refused(shared, tmp_path):
    for name, first in (("train", 0), ("test", 40 - shared)):
        rows = [{"text": f"text {i}", "label": ["no", "yes"][i % 2]} for i in range(first, first + 40)]
        (tmp_path / f"{name}.jsonl").write_bytes(lines(rows))
    files = {"train": "train.jsonl", "test": "test.jsonl"}
    card = {**GOOD_CARD, "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    config = DataConfig(tasks=(str(tmp_path / "card.yaml"),))
    found = load_tasks(config, seed=0).overlaps
    assert sum(overlap.n_examples for overlap in found if overlap.kind == "content") == shared
    with pytest.raises(DataError, match="splits overlap: ") as caught:
        load_tasks(config.model_copy(update={"overlap": "refuse"}), seed=0)
    assert_one_line(caught.value)


def test_ten_thousand_choices_are_a_task_and_a_hundred_thousand_are_refused():
    names = tuple(f"class {i}" for i in range(10_000))
    example = compile_card(make_card(doc_to_choice=names), ["text", "label"]).example({"text": "a", "label": 9999}, "0")
    assert (len(example.choices), example.choices[example.label]) == (10_000, " class 9999")
    task = Task(make_card(doc_to_choice=names, scoring="options"), {split: [example] for split in SPLITS})
    encoded = encode_split(task, "train", load_tokenizer(), max_length=64)
    assert (int(encoded.n_choices[0]), int(encoded.labels[0]), len(encoded.row_starts) - 1) == (10_000, 9999, 10_000)
    many = make_card(doc_to_choice="options", doc_to_target=0)
    with pytest.raises(DataError, match="100,000 choices, at most 32,767"):
        compile_card(many, ["text", "options"]).example({"text": "a", "options": list(map(str, range(100_000)))}, "0")


QUESTIONS = [b"", b"\n\n", b"\xff\xfe", b"{", b"[1, 2]", b"3\n", b'{"text": "a"}\n{"text": ', b"null\n", bytes(50)]


@pytest.mark.parametrize("content", QUESTIONS, ids=repr)
def test_a_file_of_questions_is_read_or_refused_in_one_line(content, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    try:
        rows = read_questions(tmp_path / "rows.jsonl")
        render_inputs(make_card(), [row if isinstance(row, dict) else {"text": row} for row in rows])
    except EnsembleLoraError as error:
        assert_one_line(error)


QUESTION_FILES = {
    "a table": ("rows.csv", table([["text", "label"], ["a, b", "no"], ["c", "yes"]])),
    "semicolons": ("rows.csv", table([["text", "label"], ["a, b", "no"], ["c", "yes"]], delimiter=";")),
    "tabs": ("rows.TSV", table([["text"], ["a, b"], ["c"]], delimiter="\t")),
    "an array": ("rows.json", b'[{"text": "a, b"},\n {"text": "c"}]'),
    "an array of texts": ("rows.json", b'["a, b", "c"]'),
    "objects in lines": ("rows.json", b'{"text": "a, b"}\n{"text": "c"}\n'),
    "lines": ("rows.jsonl", b'\xef\xbb\xbf{"text": "a, b"}\r\n\r\n"c"\r\n'),
    "texts": ("rows.txt", b"a, b\nc\n"),
}


@pytest.mark.parametrize("name", QUESTION_FILES)
def test_questions_come_in_every_format_that_tasks_come_in(name, tmp_path):
    file, content = QUESTION_FILES[name]
    (tmp_path / file).write_bytes(content)
    rows = read_questions(tmp_path / file)
    assert [row["text"] if isinstance(row, dict) else row for row in rows] == ["a, b", "c"]


NO_QUESTIONS = {
    "no lines of JSON": ("rows.jsonl", b"just a text\n", "line 1: not valid JSON"),
    "a number": ("rows.json", b"[1, 2]", "row 1: expected an object of columns or a text, got '1'"),
    "longer rows": ("rows.csv", b"text\na,b\nc,d\n", "line 2 has 2 fields, the header 1"),
    "another format": ("rows.jsonl", gzip.compress(b"a"), "not UTF-8"),
    "nothing there": ("rows.parquet", None, "not found"),
    "no such text": ("rows.txt", None, r"can't be read \(No such file or directory\)"),
}


@pytest.mark.parametrize("name", NO_QUESTIONS)
def test_a_file_without_questions_is_told_by_its_line(name, tmp_path):
    file, content, told = NO_QUESTIONS[name]
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=told) as caught:
        read_questions(tmp_path / file)
    assert_one_line(caught.value)
    assert str(caught.value).count(file) == 1


def test_the_corpus_is_large_enough():
    tables = (BAD_SETTINGS, RECIPES, OVERRIDES, BAD_CARDS, VALUES, VALUES, FINE, FAULTY, ODD, QUESTIONS)
    assert sum(map(len, tables)) >= 200


# What nobody thought of

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["auto", "none"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = sorted({f"{name}.{key}" for name, field in RunConfig.model_fields.items()
               for key in getattr(field.annotation, "model_fields", {})})  # fmt: skip
FUZZ = settings(max_examples=400, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@FUZZ
@given(changes=st.dictionaries(st.sampled_from(KEYS), PLAIN, max_size=3))
def test_any_values_give_a_config_or_one_line(changes):
    recipe: dict[str, Any] = {"data": {"tasks": ["a"]}}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        recipe.setdefault(section, {})[name] = value
    with contextlib.suppress(ConfigError):
        assert parse_config(json.loads(parse_config(recipe).model_dump_json())) == parse_config(recipe)
    try:
        parse_config(recipe)
    except ConfigError as error:
        assert_one_line(error)


@pytest.mark.slow
@FUZZ
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_recipe_and_a_card_or_one_line(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.yaml"
        path.write_bytes(content)
        for load in (load_config, load_card):
            try:
                load(path)
            except EnsembleLoraError as error:
                assert_one_line(error)


@pytest.mark.slow
@FUZZ
@given(
    template=st.text(st.sampled_from("{}%|.'\"[]() text1label+*~-<>=if for in end set"), max_size=40),
    row=st.fixed_dictionaries({"text": PLAIN, "label": PLAIN}),
)
def test_any_template_on_any_row_gives_an_example_or_one_line(template, row):
    for keys in (
        {"doc_to_text": template},
        {"doc_to_target": template},
        {"doc_to_choice": template},
        {"group": template},
    ):
        try:
            example = compile_card(make_card(**keys), list(row)).example(row, "0")
        except DataError as error:
            assert_one_line(error)
        else:
            assert isinstance(example, Example) and 0 <= example.label < len(example.choices)
            assert all(isinstance(text, str) for text in (example.context, example.group, *example.choices))


@pytest.mark.slow
@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".parquet"]),
    content=st.binary(max_size=300)
    | st.text(st.sampled_from('text,label\n\t"{}[]:ab01é '), max_size=200).map(lambda text: text.encode())
    | st.lists(st.fixed_dictionaries({"text": PLAIN, "label": PLAIN}), max_size=12).map(lines),
)
def test_any_file_is_a_task_or_one_line(kind: str, content: bytes):
    with tempfile.TemporaryDirectory() as folder:
        try:
            task = load_rows(Path(folder), f"a{kind}", content)
        except DataError as error:
            assert_one_line(error)
        else:
            assert all(task.splits[split] for split in SPLITS)
