"""Files are written whole or not at all; fingerprints are equal exactly when values are."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from ensemblelora import files
from ensemblelora.errors import OutputError, StoreError
from ensemblelora.files import atomic_folder, fingerprint, load_arrays, read_json, save_arrays, write_json, write_text


class Color(enum.Enum):
    RED = "red"


class Settings(BaseModel):
    rate: float = 0.5
    names: tuple[str, ...] = ("a",)


@dataclasses.dataclass(frozen=True)
class Record:
    values: Any
    name: str = "r"


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_text_and_json_come_back(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "zürich\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "zürich\n".encode()
    write_json(tmp_path / "b.json", {"x": [1, 2.5, None, True, "é"]})
    assert read_json(tmp_path / "b.json") == {"x": [1, 2.5, None, True, "é"]}
    assert names_in(tmp_path) == {"new", "b.json"}


def test_json_takes_records_arrays_and_paths_and_writes_nan_as_null(tmp_path: Path) -> None:
    value = {
        "record": Record(np.float32(1.5)),
        "array": np.array([[1.0, math.nan], [math.inf, 2.0]]),
        "path": Path("a/b"),
        "settings": Settings(),
        "enum": Color.RED,
        "count": np.int64(3),
        "flag": np.bool_(True),
    }
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == {
        "record": {"values": 1.5, "name": "r"},
        "array": [[1.0, None], [None, 2.0]],
        "path": "a/b",
        "settings": {"rate": 0.5, "names": ["a"]},
        "enum": "red",
        "count": 3,
        "flag": True,
    }


@pytest.mark.parametrize("value", [object(), {1: "a"}, {"f": len}])
def test_json_refuses_what_has_no_plain_form(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", value)
    assert names_in(tmp_path) == set()


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=r"a\.txt: can't be written \(No space left on device\)"):
        write_text(path, "new")
    assert path.read_text() == "old" and names_in(tmp_path) == {"a.txt"}


def test_an_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "below"
    with pytest.raises(OutputError, match="can't be written"):
        write_text(place, "")
    with pytest.raises(OutputError, match="can't be written"):
        save_arrays(place, {"a": [1]})


def test_damaged_json_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    for name in ("a.json", "missing.json"):
        with pytest.raises(StoreError, match=rf"{name}.*delete it and run again"):
            read_json(tmp_path / name)


def test_arrays_come_back_and_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    arrays = {"matrix": np.arange(6.0).reshape(2, 3), "names": np.array(["a", "bc"]), "empty": np.zeros((0, 2))}
    save_arrays(tmp_path / "a.npz", arrays)
    save_arrays(tmp_path / "b.npz", arrays)
    back = load_arrays(tmp_path / "a.npz")
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_arrays_are_never_pickled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pickle"):
        save_arrays(tmp_path / "a.npz", {"a": np.array([{}], dtype=object)})
    np.savez(tmp_path / "b.npz", a=np.array([{}], dtype=object))
    with pytest.raises(StoreError, match=r"b\.npz"):
        load_arrays(tmp_path / "b.npz")


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:40], lambda b: b[: len(b) // 2], lambda b: b"x" * 99])
def test_damaged_arrays_are_a_store_error(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.npz"
    save_arrays(path, {"a": np.arange(100)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StoreError, match=r"a\.npz.*delete it"):
        load_arrays(path)


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "adapters" / "g0"
    for k in range(2):
        with atomic_folder(target) as fresh:
            (fresh / f"file{k}").write_text(str(k))
            assert not (target / f"file{k}").exists()
    assert names_in(target) == {"file1"} and names_in(target.parent) == {"g0"}


def test_a_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "g0"
    with atomic_folder(target) as fresh:
        (fresh / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(target) as fresh:
        (fresh / "a").write_text("new")
        raise RuntimeError
    assert (target / "a").read_text() == "old" and names_in(tmp_path) == {"g0"}


def test_an_unwritable_folder_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be written"), atomic_folder(tmp_path / "file" / "g0"):
        pytest.fail("the body ran")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(JSON_VALUES, JSON_VALUES)
def test_fingerprints_are_equal_exactly_when_values_are(a: Any, b: Any) -> None:
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (fingerprint(a) == fingerprint(b)) == same


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("a", Path("a")),
        (1, 1.0),
        (1, True),
        (None, "null"),
        ([1, 2], [[1], 2]),
        (np.zeros(2), np.zeros(3)),
        (np.zeros(4), np.zeros((2, 2))),
        (np.zeros(2), np.zeros(2, dtype=np.float32)),
        (np.array([1.0, 2.0]), np.array([1.0, 2.5])),
        (Settings(), Settings(rate=0.25)),
        (Record(1), Record(2)),
        (Record(np.zeros(2)), Record(np.ones(2))),
        (Settings(), Settings().model_dump(mode="json")),
        (b"a", b"b"),
        ({"a", "b"}, {"a", "c"}),
        (Color.RED, "red"),
    ],
)
def test_different_values_have_different_fingerprints(a: object, b: object) -> None:
    assert fingerprint(a) != fingerprint(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((1, (2,)), [1, [2]]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (np.arange(6).reshape(2, 3).T, np.arange(6).reshape(2, 3).T.copy()),
        (np.arange(3, dtype="<i8"), np.arange(3, dtype=">i8")),
        (np.float64(1.5), 1.5),
        ({"x", "y", "z"}, frozenset(["z", "y", "x"])),
        (Settings(), Settings(rate=0.5)),
    ],
)
def test_equal_values_have_equal_fingerprints(a: object, b: object) -> None:
    assert fingerprint(a) == fingerprint(b)


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    code = "from ensemblelora.files import fingerprint; print(fingerprint({'b': {1, 2, 3}, 'a': (1.5, 'x')}))"
    outputs = {
        subprocess.run([sys.executable, "-c", code], env=_environment(seed), capture_output=True, check=True).stdout
        for seed in ("1", "2")
    }
    assert outputs == {(fingerprint({"b": {1, 2, 3}, "a": (1.5, "x")}) + "\n").encode()}


def test_one_bare_array_is_not_an_archive(tmp_path: Path) -> None:
    files.save_array(tmp_path / "a.npy", np.arange(3))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.arange(3))
    with pytest.raises(StoreError, match=r"a\.npy.*can't be read as arrays"):
        load_arrays(tmp_path / "a.npy")


@pytest.mark.parametrize("value", [object(), {1: 2}, np.array([{}], dtype=object), len])
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        fingerprint(value)


def test_file_hashes_do_not_depend_on_the_piece_size(tmp_path: Path) -> None:
    content = os.urandom(2**20 + 17)
    (tmp_path / "a").write_bytes(content)
    assert files.file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def _environment(hash_seed: str = "0") -> dict[str, str]:
    source = str(Path(files.__file__).parents[1])
    return {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": source}
