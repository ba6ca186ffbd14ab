"""Data elsewhere, data that is streamed, and data too large to be held: the same tasks, by fewer means."""

from __future__ import annotations

import http.server
import json
import pickle
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem

from ensemblelora.config import DataConfig
from ensemblelora.data import examples, remote
from ensemblelora.data.examples import StoredExamples, hold
from ensemblelora.data.loading import load_tasks
from ensemblelora.data.overlap import _keys, find_overlaps
from ensemblelora.data.packing import Row, pack_rows
from ensemblelora.data.reading import read_file, read_split
from ensemblelora.data.remote import name_of, show_url
from ensemblelora.data.splitting import _TOTAL, _merge_rare, cut_by_group
from ensemblelora.data.task import SPLITS, Example, Overlap, Task, TaskSet
from ensemblelora.errors import DataError, MissingExtraError
from ensemblelora.seeding import generator_for
from tests.toys import CARD, make_card, make_task


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()


def make_csv(n: int, word: str = "text") -> str:
    return "text,label\n" + "".join(f"{word} number {i},{('no', 'yes')[i % 2]}\n" for i in range(n))


def put(url: str, text: str) -> str:
    with fsspec.open(url, "w") as stream:
        stream.write(text)
    return url


def load(*entries: Path | str, **keys: Any) -> TaskSet:
    return load_tasks(DataConfig(tasks=tuple(map(str, entries)), **keys), seed=0)


# Elsewhere


def test_a_file_or_folder_elsewhere_gives_the_tasks_that_it_gives_here(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    rows = [{"text": f"line {i}", "label": i % 3} for i in range(30)]
    files = {"first.csv": make_csv(40), "second.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}
    for name, text in files.items():
        (tmp_path / "tasks" / name).write_text(text, encoding="utf-8")
        put(f"memory://bucket/tasks/{name}", text)
    put("memory://bucket/tasks/readme.txt", "not a task")
    here = load(tmp_path / "tasks")
    assert here.names == ("first", "second")
    assert load("memory://bucket/tasks/").fingerprint == here.fingerprint
    assert load(*(f"memory://bucket/tasks/{name}" for name in files)).fingerprint == here.fingerprint
    assert load(f"file://{tmp_path}/tasks/first.csv").fingerprint == here.of([0]).fingerprint


def test_a_card_names_files_elsewhere(tmp_path: Path) -> None:
    put("memory://bucket/rows.csv", make_csv(40).replace("text,label", "body,verdict"))
    files = {"train": "memory://bucket/rows.csv"}
    card = {**CARD, "dataset_path": "csv", "doc_to_text": "{{body}}", "doc_to_target": "verdict"}
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(card | {"dataset_kwargs": {"data_files": files}}), encoding="utf-8")
    task = load(path).tasks[0]
    assert sum(len(task.splits[split]) for split in SPLITS) == 40
    assert task.card.dataset_kwargs["data_files"] == files


def test_a_file_is_copied_once_and_again_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    get_file = MemoryFileSystem.get_file

    def count(self: MemoryFileSystem, source: str, target: str, **options: Any) -> None:
        fetched.append(source)
        get_file(self, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", count)
    url = put("memory://bucket/rows.csv", make_csv(30, "word"))
    first, again = load(url), load(url)
    assert first.fingerprint == again.fingerprint and len(fetched) == 1
    put(url, make_csv(30, "term"))  # as many bytes
    assert load(url).fingerprint != first.fingerprint and len(fetched) == 2

    info = MemoryFileSystem.info
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: {**info(self, path), "created": None})
    for n in (3, 4):  # by its size alone a changed file can't be told
        load(url)
        assert len(fetched) >= n


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("memory://bucket/none.csv", "data file memory://bucket/none.csv: not found"),
        ("memory://bucket/empty.csv", "data file memory://bucket/empty.csv: empty"),
        ("memory://nowhere/", "folder memory://nowhere/: not found"),
        ("memory://bucket/texts/", r"no task in it; expected \.csv"),
        ("memory://bucket/cards/", "holds the card a.yaml; cards are read from folders of this machine only"),
        ("ftp://host/rows.csv", r"ftp://host/rows.csv: no place that data is read from; expected one of s3://"),
        ("memory://bucket/rows.csv::simplecache://", "no place that data is read from"),
        ("https://me:word@host:1/a\nb.csv::x", r"https://host:1/a\\nb.csv::x: no place"),
    ],
)
def test_what_is_not_there_is_one_line(url: str, told: str) -> None:
    MemoryFileSystem().pipe_file("/bucket/empty.csv", b"")
    put("memory://bucket/texts/a.txt", "x")
    put("memory://bucket/cards/a.yaml", "x")
    put("memory://bucket/rows.csv", make_csv(4))
    with pytest.raises(DataError, match=told) as caught:
        load(url)
    assert "\n" not in str(caught.value) and "word" not in str(caught.value)


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.importlib.util, "find_spec", lambda name: None)
    for url, package in (("s3://b/a.csv", "s3fs"), ("gs://b/a.csv", "gcsfs"), ("abfs://b/a.csv", "adlfs")):
        with pytest.raises(MissingExtraError, match=f"run: pip install {package}$"):
            load(url)


def test_whatever_a_file_system_raises_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: MemoryFileSystem, path: str) -> dict[str, Any]:
        raise PermissionError("403\nForbidden")

    monkeypatch.setattr(MemoryFileSystem, "info", refuse)
    with pytest.raises(DataError, match=r"data file memory://b/a.csv: can't be fetched \(403 Forbidden\)"):
        load("memory://b/a.csv")


def test_a_url_as_a_dataset_path_is_told_where_it_belongs() -> None:
    with pytest.raises(DataError, match=r"name the format here .* in dataset_kwargs: \{data_files: \{SPLIT: URL\}\}"):
        read_split(make_card(dataset_path="s3://bucket/rows"), "train")


def test_options_reach_the_file_system_and_secrets_stay_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    find = fsspec.core.url_to_fs

    def spy(url: str, **options: Any) -> Any:
        seen.append(options)
        return find(url)

    monkeypatch.setattr("fsspec.core.url_to_fs", spy)
    monkeypatch.setenv("TOY_SECRET", "open sesame")
    put("memory://bucket/rows.csv", make_csv(4))
    options = {"key": "me", "client_kwargs": {"secret": "${TOY_SECRET}", "retries": 2}}
    kwargs = {"data_files": {"train": "memory://bucket/rows.csv"}, "storage_options": options}
    card = make_card(dataset_path="csv", dataset_kwargs=kwargs)
    assert len(read_split(card, "train")) == 4
    assert seen == [{"key": "me", "client_kwargs": {"secret": "open sesame", "retries": 2}}]
    assert "sesame" not in card.model_dump_json()
    bad = make_card(dataset_path="csv", dataset_kwargs=kwargs | {"storage_options": "me"})
    with pytest.raises(DataError, match="storage_options: expected keys and values, got 'me'"):
        read_split(bad, "train")


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/a/rows.parquet", "rows.parquet"),
        ("s3://bucket/a/what?.csv", "what?.csv"),
        ("https://h/a%20b.csv?x=/c.d#e", "a b.csv"),
        ("https://h", ""),
    ],
)
def test_a_urls_name_is_that_of_its_path(url: str, name: str) -> None:
    assert name_of(url).name == name
    assert "?" not in show_url(url) or "what" not in url


@pytest.mark.slow
def test_files_of_a_web_server_are_read_and_seen_to_change(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(make_csv(30, "word"), encoding="utf-8")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/rows.csv"
        try:
            first = load(url)
            assert load(url).fingerprint == first.fingerprint
            assert first.fingerprint == load(tmp_path / "rows.csv").fingerprint
            (tmp_path / "rows.csv").write_text(make_csv(30, "other"), encoding="utf-8")
            assert load(url).fingerprint != first.fingerprint
            with pytest.raises(DataError, match=r"data file http://127\.0\.0\.1:\d+/none\.csv: not found"):
                load(url.replace("rows", "none"))
        finally:
            server.shutdown()


# Streamed

LIMITS = {"max_train_examples": 20, "max_validation_examples": 10, "max_test_examples": 10}
TAKEN = 4 * 50 + 1000  # of which 20 / 0.7, 10 / 0.1 and 10 / 0.2 are needed, at most 100 rows


def write_streamed(folder: Path, place: str, **keys: Any) -> Path:
    files = {"dataset_kwargs": {"data_files": {"train": place}}}
    card = {**CARD, "dataset_path": Path(place).suffix[1:].replace("jsonl", "json"), "streaming": True, **files, **keys}
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(card), encoding="utf-8")
    return path


@pytest.mark.parametrize("place", ["memory://bucket/rows.csv", "rows.jsonl"])
def test_of_a_stream_no_more_than_its_beginning_is_read(tmp_path: Path, place: str) -> None:
    n_taken = 4 * 100 + 1000
    rows = [{"text": f"text number {i}", "label": i % 2} for i in range(6000)]
    if "://" in place:
        put(place, "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    else:
        (tmp_path / place).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    card = write_streamed(tmp_path, place)
    task, again = (load(card, **LIMITS).tasks[0] for _ in range(2))
    assert task.fingerprint == again.fingerprint
    assert load_tasks(DataConfig(tasks=(str(card),), **LIMITS), seed=1).fingerprint != TaskSet((task,)).fingerprint
    assert {split: len(task.splits[split]) for split in SPLITS} == {"train": 20, "validation": 10, "test": 10}
    numbers = sorted(int(e.context.split()[2]) for split in SPLITS for e in task.splits[split])
    assert len(set(numbers)) == 40 and numbers[-1] < 2 * n_taken
    assert numbers[-1] > 40, "drawn, not simply the first"
    assert all(e.label == int(e.context.split()[2]) % 2 for e in task.splits["train"])


def test_a_stream_needs_to_be_told_how_much_to_take(tmp_path: Path) -> None:
    card = write_streamed(tmp_path, put("memory://bucket/rows.csv", make_csv(4)))
    with pytest.raises(
        DataError, match=r"split 'train' is streamed, so it must be said how many rows .* data\.max_train"
    ):
        load(card, max_train_examples=2)


@pytest.mark.parametrize("place", ["memory://bucket/none.csv", "none.csv"])
def test_a_stream_that_is_not_there_is_one_line(tmp_path: Path, place: str) -> None:
    with pytest.raises(DataError, match=r"none\.csv: not found$"):
        load(write_streamed(tmp_path, place), **LIMITS)


# Large


def test_many_examples_lie_in_a_file_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "PIECE", 4), monkeypatch.setattr(examples, "MOST_HELD", 8)
    every = [
        Example(f"id{i}", f"text {i} \u2028 \ud800", (" a", f" {i}")[: i % 3], i % 2, f"g{i // 2}") for i in range(9)
    ]
    assert hold(iter(every[:8])) == every[:8]
    stored = hold(iter(every))
    assert isinstance(stored, StoredExamples) and len(stored) == 9
    assert list(stored) == list(stored) == every
    assert [stored[i] for i in (8, 0, -1, 3, -9)] == [every[i] for i in (8, 0, -1, 3, -9)]
    assert stored[2:9:3] == every[2:9:3] and every[4] in stored
    with pytest.raises(IndexError):
        stored[9]
    assert [e for a, e in zip(stored, stored, strict=True) if a == e] == every, "two at once, too"


@pytest.mark.parametrize("explode", [None, "items"])
def test_large_tables_are_cut_as_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, explode: str | None
) -> None:
    rows = [{"items": [{"t": f"text {i} {k}", "y": (i + k) % 2} for k in range(i % 3)]} for i in range(60)]
    keys: dict[str, Any] = {"doc_to_text": "{{items.t}}", "doc_to_target": "{{items.y}}", "explode": "items"}
    if explode is None:
        rows = [{"text": f"text {i}", "label": i % 2, "twin": i // 3} for i in range(60)]
        keys = {"group": "{{twin}}"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {"dataset_kwargs": {"data_files": {"train": str(tmp_path / "rows.jsonl")}}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**CARD, **files, **keys}), encoding="utf-8")
    whole = load(tmp_path / "toy.yaml", max_train_examples=17)
    for module in ("examples", "candidates"):
        monkeypatch.setattr(f"ensemblelora.data.{module}.PIECE", 7)
    monkeypatch.setattr(examples, "MOST_HELD", 7)
    pieces = load(tmp_path / "toy.yaml", max_train_examples=17)
    assert isinstance(pieces.tasks[0].splits["train"], StoredExamples)
    assert pieces.fingerprint == whole.fingerprint


@pytest.mark.parametrize("most_held", [1, 3, 10**6])
def test_many_tokens_lie_in_a_file_and_are_the_same(most_held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemblelora.data.packing._MOST_HELD", most_held)
    rows = [Row(list(range(n)), n - 1, 1.0, 0) for n in (1, 4, 2, 7)]
    packed = pack_rows(rows)
    assert packed.tokens.dtype == np.int32 and packed.tokens.tolist() == [token for row in rows for token in row.tokens]
    assert packed.starts.tolist() == [0, 1, 5, 7, 14]
    again = pickle.loads(pickle.dumps(packed))  # as it goes to other processes
    np.testing.assert_array_equal(again.tokens, packed.tokens)
    is_mapped = not packed.tokens.flags.writeable
    assert is_mapped == (most_held < 10**6)
    assert pack_rows([]).tokens.shape == (0,) and pack_rows([]).starts.tolist() == [0]


def deal_slowly(
    strata: Sequence[Hashable], groups: Sequence[Hashable], fractions: Sequence[float], *, seed: int
) -> tuple[list[int], ...]:
    """The slow twin of cut_by_group: lists of positions for every group."""
    strata = _merge_rare(strata)
    members: dict[Hashable, list[int]] = defaultdict(list)
    for position, group in enumerate(groups):
        members[group].append(position)
    blocks = list(members.values())
    order = sorted(generator_for(seed, "cut").permutation(len(blocks)), key=lambda b: -len(blocks[b]))
    totals: dict[Hashable, int] = {**Counter(strata), _TOTAL: len(strata)}
    wanted = [{stratum: fraction * n for stratum, n in totals.items()} for fraction in fractions]
    missing = [dict(share) for share in wanted]
    parts: tuple[list[int], ...] = tuple([] for _ in fractions)
    for b in order:
        counts: dict[Hashable, int] = {**Counter(strata[position] for position in blocks[b]), _TOTAL: len(blocks[b])}
        gains = [sum(n * (2 * missing[p][s] - n) / wanted[p][s] for s, n in counts.items()) for p in range(len(parts))]
        chosen = int(np.argmax(gains))
        parts[chosen].extend(blocks[b])
        for stratum, n in counts.items():
            missing[chosen][stratum] -= n
    return tuple(sorted(part) for part in parts)


@pytest.mark.parametrize("seed", range(8))
def test_groups_are_dealt_as_their_slow_twin_deals_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 200))
    strata = [f"label {k}" for k in rng.integers(0, 4, n)]
    groups = rng.integers(0, max(1, n // (1 + seed % 4)), n)
    for given in (groups.tolist(), [f"group {g}" for g in groups], groups.astype(np.uint64)):
        expected = deal_slowly(strata, list(given), (0.7, 0.1, 0.2), seed=seed)
        assert cut_by_group(strata, given, (0.7, 0.1, 0.2), seed=seed) == expected


def find_slowly(tasks: Sequence[Task]) -> set[tuple[str, tuple[str, str], tuple[str, str], int]]:
    """The slow twin of find_overlaps, without the examples: every later split against all earlier ones."""
    found: Counter[tuple[str, tuple[str, str], tuple[str, str]]] = Counter()
    for late, second in enumerate(SPLITS):
        for theirs in tasks:
            for example in theirs.splits[second]:
                seen = set()
                for kind, key in _keys(theirs, example):
                    for first in SPLITS[:late]:
                        for ours in tasks:
                            holds = any(key in [k for _, k in _keys(ours, e)] for e in ours.splits[first])
                            if holds and (ours.name, first) not in seen:
                                seen.add((ours.name, first))
                                found[kind, (ours.name, first), (theirs.name, second)] += 1
    return {(*key, n) for key, n in found.items()}


@pytest.mark.parametrize("seed", range(4))
def test_overlaps_are_those_that_their_slow_twin_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def draw(name: str) -> Task:
        splits = {
            split: [
                Example(f"{split}:{i}", f"text {rng.integers(12)}", (" a", " b"), 0, f"{'long ' * 9}{rng.integers(9)}")
                for i in range(4)
            ]
            for split in SPLITS
        }
        return Task(make_card(task=name), splits)

    tasks = [draw("a"), draw("b"), make_task("c")]

    def plain(overlap: Overlap) -> tuple[str, tuple[str, str], tuple[str, str], int]:
        return overlap.kind, overlap.first, overlap.second, overlap.n_examples

    assert {plain(overlap) for overlap in find_overlaps(tasks)} == find_slowly(tasks)


def test_a_label_column_is_looked_at_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemblelora.data.folder._PIECE", 3)
    (tmp_path / "toy.csv").write_text(make_csv(10), encoding="utf-8")
    assert load(tmp_path / "toy.csv").tasks[0].card.doc_to_choice == ("no", "yes")
    (tmp_path / "toy.csv").write_text(make_csv(10) + "more,\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"column 'label' is empty in row 10 \(counted from 0\)"):
        load(tmp_path / "toy.csv")
    assert len(read_file(tmp_path / "toy.csv")) == 11


MEASURE = """
import sys, threading, time
from ensemblelora.config import DataConfig
from ensemblelora.data import packing
from ensemblelora.data.encoding import encode_split
from ensemblelora.data.loading import load_tasks
from tests.toys import load_tokenizer

def own():
    lines = open("/proc/self/status", encoding="ascii").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

packing._MOST_HELD = 2**16
tokenizer, peak, over = load_tokenizer(), [0], threading.Event()
tokenizer(["warm"] * 4096)
def watch():
    while not over.wait(0.02):
        peak[0] = max(peak[0], own())
thread = threading.Thread(target=watch)
before = own()
thread.start()
tasks = load_tasks(DataConfig(tasks=(sys.argv[1],)), seed=0)
rows = [encode_split(tasks.tasks[0], split, tokenizer, max_length=64) for split in ("train", "validation", "test")]
over.set(), thread.join()
n_bytes = sum(split.tokens.nbytes for split in rows)
print(peak[0] - before, own() - before, n_bytes, sum(split.n_examples for split in rows))
"""


def measure_loading(folder: Path, n: int) -> list[int]:
    """Bytes at the highest and at the end, of token ids, and examples."""
    path = folder / f"rows{n}.csv"
    path.write_text("text,label\n" + "".join(f"row {i} of {n} says,{('no', 'yes')[i % 2]}\n" for i in range(n)))
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


@pytest.mark.slow
def test_memory_grows_by_numbers_a_row_and_not_by_objects(tmp_path: Path) -> None:
    small, large = measure_loading(tmp_path, 25_000), measure_loading(tmp_path, 100_000)
    assert (large[0] - small[0]) / (large[3] - small[3]) < 450, "token ids, 96 bytes of each row, lie in files"
